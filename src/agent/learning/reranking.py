"""The reranker hook: any LangChain document compressor may put what was found into a better order."""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from langchain_core.documents import BaseDocumentCompressor, Document

from agent.errors import ConfigurationError
from agent.events import emit
from agent.learning.embedding import kind_of
from agent.learning.run_record import describe_error

CANDIDATES = 50
"""How many of the best are handed to a reranker."""
_POSITION = "position"


def reranker_of(named: str | BaseDocumentCompressor) -> BaseDocumentCompressor:
    """The compressor itself, or what `module:object` names: one, or something that returns one when it is called. It
    imports and may block: call it in a thread.

    Raises:
        ConfigurationError: there is none under this name, or it is no document compressor.
    """
    if isinstance(named, BaseDocumentCompressor):
        return named
    module, _, name = named.partition(":")
    try:
        found: Any = getattr(importlib.import_module(module), name)
        made = found if isinstance(found, BaseDocumentCompressor) else found()
    except Exception as error:  # a module of the user's own
        raise ConfigurationError(
            f"LEARNING_RERANKER={named!r} cannot be used: {describe_error(error)}"
        ) from error
    if not isinstance(made, BaseDocumentCompressor):
        raise ConfigurationError(f"LEARNING_RERANKER={named!r} is no LangChain document compressor")
    return made


class Reranker:
    """A compressor with a time-out. It is handed what was found for one identity, nothing else, and decides the order
    alone: texts that it changes or invents are passed over, and what it leaves out comes last. Runs in the portal.

    Args:
        compressor: any document compressor of LangChain.
        timeout: longest wait for it.
    """

    def __init__(self, compressor: BaseDocumentCompressor, *, timeout: timedelta) -> None:
        self._compressor = compressor
        self._timeout = timeout

    async def rerank(self, question: str, found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """What was found in its order, with its place and score in `why`; as it came where it fails or is slow, and the
        event `reranking_failed` says so.

        Args:
            question: what was asked.
            found: rows of `match_memories` or `recall_context`, best first.
        """
        rows = list(found)
        if len(rows) < 2 or not question.strip():
            return rows
        documents = [
            Document(
                page_content=f"{row['speaker']}: {row['content']}" if row.get("speaker") else row["content"],
                metadata={_POSITION: position, "store": row["store"], "recorded_at": row["recorded_at"]},
            )
            for position, row in enumerate(rows[:CANDIDATES])
        ]
        name = type(self._compressor).__name__
        try:
            async with asyncio.timeout(self._timeout.total_seconds()):
                ranked = list(await self._compressor.acompress_documents(documents, question))
        except TimeoutError:
            emit("reranking_failed", reranker=name, reason=f"no answer within {self._timeout}")
            return rows
        except Exception as error:  # noqa: BLE001 - foreign code may raise anything; the order without it is good
            emit("reranking_failed", reranker=name, reason=kind_of(error))
            return rows
        best: dict[int, dict[str, Any]] = {}
        for document in ranked:
            position = document.metadata.get(_POSITION) if isinstance(document, Document) else None
            if type(position) is not int or not 0 <= position < len(documents) or position in best:
                continue
            place: dict[str, Any] = {"rank": len(best) + 1}
            score = document.metadata.get("relevance_score")
            if isinstance(score, int | float):
                place["score"] = float(score)
            best[position] = rows[position] | {"why": {**rows[position].get("why", {}), "reranker": place}}
        return [*best.values(), *(row for position, row in enumerate(rows) if position not in best)]
