"""Vectors of questions and memories, by any LangChain embedder."""

from __future__ import annotations

import asyncio
import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

from langchain_core.embeddings import Embeddings

from agent import telemetry
from agent.errors import ModelError
from agent.events import emit

_CACHED_QUESTIONS = 512
_TEXT_CHARACTERS_MAX = 8_000
_DIMENSIONS_MAX = 16_000
_LENGTH_MIN = 1e-15  # `pgvector` squares in single precision


class Embedder:
    """An embedder with a name, a time-out for questions and a cache of them. Runs in the portal."""

    def __init__(self, embeddings: Embeddings, *, name: str, timeout: timedelta) -> None:
        self._embeddings = embeddings
        self.name = name
        """Which model made a vector: vectors of different names are never compared."""
        self._timeout = timeout
        self._cache: OrderedDict[str, str] = OrderedDict()

    async def embed_question(self, question: str) -> str | None:
        """The vector of a question as Postgres takes it, or `None` where the embedder is slow or fails:
        recall then goes by words, and the event `embedding_failed` says so."""
        text = question[:_TEXT_CHARACTERS_MAX]
        if text in self._cache:
            self._cache.move_to_end(text)
            return self._cache[text]
        try:
            with telemetry.model_call("embeddings", self._embeddings, self.name):
                async with asyncio.timeout(self._timeout.total_seconds()):
                    vector = as_vector(await self._embeddings.aembed_query(text)).text
        except TimeoutError:
            emit("embedding_failed", model=self.name, reason=f"no answer within {self._timeout}")
            return None
        except Exception as error:  # noqa: BLE001 - a foreign client may raise anything; recall goes on by words
            emit("embedding_failed", model=self.name, reason=kind_of(error))
            return None
        self._cache[text] = vector
        if len(self._cache) > _CACHED_QUESTIONS:
            self._cache.popitem(last=False)
        return vector

    async def embed_memories(
        self, contents: Sequence[str], *, timeout: timedelta, dimensions: int | None = None
    ) -> list[Vector | None]:
        """The vectors of contents, in order; `None` for one that cannot be used, which the event `embedding_failed`
        tells.

        Args:
            contents: texts, cut at 8,000 characters.
            timeout: longest wait for all of them.
            dimensions: what the vectors must have; `None`: what the first has.

        Raises:
            ModelError: the embedder failed, timed out or answered with something else than one vector each.
        """
        texts = [text[:_TEXT_CHARACTERS_MAX] for text in contents]
        try:
            with telemetry.model_call("embeddings", self._embeddings, self.name):
                async with asyncio.timeout(timeout.total_seconds()):
                    vectors = list(await self._embeddings.aembed_documents(texts))
        except TimeoutError:
            raise ModelError(f"the embedder {self.name} gave no answer within {timeout}") from None
        except Exception as error:  # whatever a provider's client raises: the job retries
            raise ModelError(f"the embedder {self.name} failed: {kind_of(error)}") from error
        if len(vectors) != len(contents):
            raise ModelError(
                f"the embedder {self.name} gave {len(vectors)} vectors for {len(contents)} texts"
            )
        usable: list[Vector | None] = []
        faults = []
        for given in vectors:
            try:
                vector = as_vector(given)
            except ModelError as error:
                faults.append(str(error))
                usable.append(None)
                continue
            dimensions = dimensions or vector.dimensions
            if vector.dimensions == dimensions:
                usable.append(vector)
            else:
                faults.append(f"an embedding of {vector.dimensions} dimensions among those of {dimensions}")
                usable.append(None)
        if faults:
            emit("embedding_failed", model=self.name, reason=faults[0], memories=len(faults))
        return usable


@dataclass(frozen=True)
class Vector:
    """A vector that can be stored and compared."""

    text: str
    """`[…]`, as `pgvector` reads it; both transports carry text."""
    dimensions: int


def as_vector(vector: Sequence[float]) -> Vector:
    """What an embedder gave, as a vector.

    Raises:
        ModelError: it is no list of numbers, empty, longer than 16,000 dimensions, or has no direction: a length of
            zero, or one that is no number or beyond what `pgvector` can count with.
    """
    from pgvector import Vector as PostgresVector

    try:
        values = [float(value) for value in vector]
    except (TypeError, ValueError, OverflowError):
        raise ModelError("an embedding that is no list of numbers") from None
    length = math.hypot(*values)
    if not 1 <= len(values) <= _DIMENSIONS_MAX or not _LENGTH_MIN <= length <= 1 / _LENGTH_MIN:
        raise ModelError(f"an embedding of {len(values)} dimensions and length {length}: it has no direction")
    return Vector(str(PostgresVector(values).to_text()), len(values))


def kind_of(error: Exception) -> str:
    """What went wrong at a provider, without its words, which may hold the text that was sent."""
    status = getattr(error, "status_code", None)
    return type(error).__name__ + (f" (HTTP {status})" if isinstance(status, int) else "")
