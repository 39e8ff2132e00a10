"""Vectors of questions and memories, by any LangChain embedder."""

from __future__ import annotations

import asyncio
import math
from collections import OrderedDict
from collections.abc import Sequence
from datetime import timedelta

from langchain_core.embeddings import Embeddings

from agent.errors import ModelError
from agent.events import emit

_CACHED_QUESTIONS = 512
_TEXT_CHARACTERS_MAX = 8_000


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
            async with asyncio.timeout(self._timeout.total_seconds()):
                vector = as_vector(await self._embeddings.aembed_query(text))
        except TimeoutError:
            emit("embedding_failed", model=self.name, reason=f"no answer within {self._timeout}")
            return None
        except Exception as error:  # noqa: BLE001 - a foreign client may raise anything; recall goes on by words
            emit("embedding_failed", model=self.name, reason=type(error).__name__)
            return None
        self._cache[text] = vector
        if len(self._cache) > _CACHED_QUESTIONS:
            self._cache.popitem(last=False)
        return vector

    async def embed_memories(self, contents: Sequence[str]) -> list[str]:
        """The vectors of contents, in order.

        Raises:
            ModelError: the embedder failed or answered with something else than one vector each.
        """
        try:
            vectors = await self._embeddings.aembed_documents(
                [text[:_TEXT_CHARACTERS_MAX] for text in contents]
            )
        except Exception as error:  # whatever a provider's client raises: the job retries
            raise ModelError(f"the embedder {self.name} failed: {type(error).__name__}") from error
        if len(vectors) != len(contents):
            raise ModelError(
                f"the embedder {self.name} gave {len(vectors)} vectors for {len(contents)} texts"
            )
        return [as_vector(vector) for vector in vectors]


def as_vector(vector: Sequence[float]) -> str:
    """A vector as `pgvector` reads it, `[…]`; both transports carry text.

    Raises:
        ModelError: it is empty, longer than 16,000 dimensions, or holds something that is no finite number.
    """
    from pgvector import Vector

    values = [float(value) for value in vector]
    if not 1 <= len(values) <= 16_000 or not all(map(math.isfinite, values)):
        raise ModelError(
            f"an embedding of {len(values)} dimensions with values that are no finite numbers, or too many"
        )
    return str(Vector(values).to_text())
