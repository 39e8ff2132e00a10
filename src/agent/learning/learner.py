"""The learning half of a machine: makes memories of recorded runs, each run exactly once, and gives them vectors."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Awaitable, Callable, Mapping, Sequence

from langchain_core.language_models import BaseChatModel

from agent import telemetry
from agent.database.protocol import Database
from agent.errors import ConflictError
from agent.events import emit
from agent.identity import Identity
from agent.learning import models
from agent.learning.embedding import Embedder
from agent.learning.extraction import Extracted, Pending, extract
from agent.learning.in_process_worker import InProcessWorker
from agent.settings import Settings
from agent.stores.base import Store
from agent.stores.conversation import ConversationStore

_CONFLICT_ATTEMPTS = 5
_EMBEDDING_BATCH = 64
_ARRANGED_AT_ONCE = 2000  # vectors, about a second in a scope of a million


class Learner:
    """Learns what was recorded, for one machine. Runs in the portal.

    Args:
        database: where runs wait and memories go.
        settings: of the machine.
        stores: what is learned.
        limits: greatest number of memories by store.
        model: chat model that extracts, as an object or by name, made at first use; `None`: what was said is all that
            is remembered.
        ready_embedder: gives the embedder of the machine, made at first use, or `None` where it has none.
        worker: is told which sessions have nothing left to learn.
    """

    def __init__(
        self,
        database: Database,
        settings: Settings,
        *,
        stores: Sequence[Store],
        limits: Mapping[str, int],
        model: str | BaseChatModel | None,
        ready_embedder: Callable[[], Awaitable[Embedder | None]],
        worker: InProcessWorker,
    ) -> None:
        self._database = database
        self._settings = settings
        self._stores = tuple(stores)
        self._limits = dict(limits)
        self._model_named = model
        self._model: BaseChatModel | None = None
        self._ready_embedder = ready_embedder
        self._worker = worker
        self._locks: weakref.WeakValueDictionary[tuple[str, str | None], asyncio.Lock] = (
            weakref.WeakValueDictionary()
        )

    async def learn_session(self, identity: Identity) -> int:
        """See `LearningMachine.learn_session`."""
        lock = self._locks.setdefault((identity.tenant_id, identity.user_id), asyncio.Lock())
        # Sessions of one user would only meet in conflicts, each after a model call; other processes still may.
        async with lock:
            with telemetry.span("learn_session", {telemetry.CONVERSATION_ID: identity.session_id}) as session:
                learned = await self._learn_all(identity)
                session.set_attribute("learning.runs", learned)
            return learned

    async def _learn_all(self, identity: Identity) -> int:
        learned = 0
        generation = self._worker.generation(identity)
        while (extracted := await self._learn_against_conflicts(identity)) is not None:
            learned += len(extracted.run_ids)
        # Where nothing was left to learn too: it may have failed before.
        await self.embed_memories(identity)
        self._worker.learned(identity, generation)
        return learned

    async def _learn_against_conflicts(self, identity: Identity) -> Extracted | None:
        for _ in range(_CONFLICT_ATTEMPTS - 1):
            try:
                return await self._learn_once(identity)
            except ConflictError:
                continue
        return await self._learn_once(identity)

    async def _learn_once(self, identity: Identity) -> Extracted | None:
        pending = Pending.from_row(await self._database.call("pending_learning", identity))
        if not pending.runs:
            return None
        model = await self._ready_model()
        extracted = (
            Extracted(run_ids=[run["run_id"] for run in pending.runs])
            if model is None
            else await extract(model, pending, self._stores, identity, timeout=self._settings.model_timeout)
        )
        applied = await self._database.call(
            "apply_learning",
            identity,
            run_ids=extracted.run_ids,
            operations=extracted.operations,
            # What was said rests on nothing that was known: no write of others can make it wrong.
            expected_version=None if model is None else pending.scope_version,
            limits=self._limits,
            keep_turns=any(isinstance(store, ConversationStore) for store in self._stores),
        )
        for refused in extracted.refused:
            emit("operation_refused", **identity.as_json(), store=refused.store, reason=refused.reason)
        emit(
            "session_learned",
            **identity.as_json(),
            runs=len(extracted.run_ids),
            operations=len(applied["receipts"]),
            turns=applied["turns"],
            retired_over_limit=applied["retired_over_limit"],
        )
        return extracted

    async def _ready_model(self) -> BaseChatModel | None:
        if self._model_named is None:
            return None
        if self._model is None:
            self._model = await asyncio.to_thread(models.chat_model, self._model_named, self._settings)
        return self._model

    async def embed_memories(self, identity: Identity, scope: str = "user") -> int:
        """See `LearningMachine.embed_memories`."""
        embedder = await self._ready_embedder()
        if embedder is None:
            return 0
        embedded = 0
        known_dimensions: dict[str, int] = {}
        while True:
            waiting = await self._database.call(
                "memories_without_embedding",
                identity,
                model=embedder.name,
                memory_limit=_EMBEDDING_BATCH,
                the_scope=scope,
                **known_dimensions,
            )
            if not waiting:
                break
            vectors = await embedder.embed_memories(
                [item["content"] for item in waiting],
                timeout=self._settings.model_timeout,
                dimensions=known_dimensions.get("dimensions"),
            )
            usable = [vector for vector in vectors if vector is not None]
            if not usable:
                break
            known_dimensions = {"dimensions": usable[0].dimensions}
            stored: int = await self._database.call(
                "store_embeddings",
                identity,
                model=embedder.name,
                embeddings=[
                    {"memory_number": item["memory_number"], "embedding": vector.text}
                    for item, vector in zip(waiting, vectors, strict=True)
                    if vector is not None
                ],
                the_scope=scope,
            )
            embedded += stored
            if not stored or len(usable) < len(waiting):
                break  # all of them went meanwhile; or those without would be asked for again
        if embedded:
            await self._arrange(identity, embedder.name, known_dimensions["dimensions"], scope)
        return embedded

    async def _arrange(self, identity: Identity, model: str, dimensions: int, scope: str) -> None:
        """Bring the new vectors of a large scope into its lists, a bounded statement after the other."""
        moved = _ARRANGED_AT_ONCE
        while moved == _ARRANGED_AT_ONCE:
            moved = await self._database.call(
                "arrange_embeddings",
                identity,
                model=model,
                dimensions=dimensions,
                the_scope=scope,
                row_limit=_ARRANGED_AT_ONCE,
            )
