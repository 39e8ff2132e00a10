"""The two calls of the request path: recall before a run, record after it (D6)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from agent.database.protocol import Begun, Database
from agent.database.supabase import SupabaseDatabase
from agent.errors import ConfigurationError, DatabaseUnavailable, LearningError, MigrationError, OperatorError
from agent.events import emit
from agent.identity import Identity
from agent.learning.embedding import Embedder
from agent.learning.rendering import Rendered, render
from agent.learning.reranking import Reranker
from agent.learning.spool import Spool
from agent.settings import Settings
from agent.stores.base import Memory

_NOTHING = Rendered(text="", shown=())
_TOKENS_OF_A_MEMORY = 45
"""What a line of the block takes, roughly: no more memories are fetched than could be shown."""
_MEMORIES_MIN = 10
_MEMORIES_MAX = 200


class Recorder:
    """Recalls and records for one machine. Runs in the portal."""

    def __init__(
        self,
        database: Database,
        settings: Settings,
        *,
        stores: Sequence[str],
        queue: str,
        embedder: Embedder | None,
        reranker: Reranker | None = None,
        delivered: Callable[[Identity], Awaitable[None]],
    ) -> None:
        self._database = database
        self._settings = settings
        self._stores = list(stores)
        self._queue = queue
        self._embedder = embedder
        self._reranker = reranker
        self._delivered = delivered
        self._something_waits = True
        self._delivery: asyncio.Task[None] | None = None
        self._delivering = asyncio.Lock()
        self.spool = Spool(settings.data_dir / "spool")

    def begin_recall(self, identity: Identity, question: str) -> Begun | None:
        """Ask the database now, from any thread, for a `recall` with the same arguments; `None` where something has to
        come before, such as a vector."""
        if self._embedder is not None or not (identity.is_somebody and self._database.is_prepared):
            return None
        return self._database.begin("recall_context", identity, **self._asked(question))

    async def recall(self, identity: Identity, question: str, begun: Begun | None = None) -> Rendered:
        """What is known that bears on a question, rendered.

        Never raises for a failing database, embedder or clock: the agent answers without, and the event
        `recall_failed` says so. For nobody it is empty without asking.
        """
        if not identity.is_somebody:
            return _NOTHING
        started = time.monotonic()
        try:
            await self._database.prepare()
            async with asyncio.timeout(self._settings.recall_timeout.total_seconds()):
                known = await self._recall_known(identity, question, begun)
        except TimeoutError:
            emit(
                "recall_failed",
                **identity.as_json(),
                reason=f"no answer within {self._settings.recall_timeout}",
            )
            return _NOTHING
        except LearningError as error:
            emit("recall_failed", **identity.as_json(), reason=str(error))
            return _NOTHING
        if self._reranker is not None:
            known["memories"] = await self._reranker.rerank(question, known["memories"])
        memories = [
            Memory.from_row(item) for part in ("profile", "session", "memories") for item in known[part]
        ]
        rendered = render(memories, token_budget=self._settings.token_budget)
        emit(
            "knowledge_recalled",
            **identity.as_json(),
            memories=len(rendered.shown),
            duration_ms=_milliseconds_since(started),
        )
        return rendered

    async def _recall_known(
        self, identity: Identity, question: str, begun: Begun | None
    ) -> dict[str, list[dict[str, Any]]]:
        known: dict[str, list[dict[str, Any]]]
        if begun is not None:
            known = await begun()
            return known
        vector: dict[str, Any] = {}
        if self._embedder is not None and question.strip():
            embedded = await self._embedder.embed_question(question)
            if embedded is not None:
                vector = {"question_embedding": embedded, "embedding_model": self._embedder.name}
        asked = self._asked(question) | vector
        known = await self._database.call("recall_context", identity, **asked)
        return known

    def _asked(self, question: str) -> dict[str, Any]:
        wanted = max(_MEMORIES_MIN, min(_MEMORIES_MAX, self._settings.token_budget // _TOKENS_OF_A_MEMORY))
        return {"question": question, "stores": self._stores, "memory_limit": wanted}

    async def record(self, identity: Identity, run: dict[str, Any]) -> bool:
        """Record a run and order its learning; where the database cannot take it now, keep it on disk.

        Returns:
            Whether the database has it.
        """
        run = {**run, "queue": self._queue, "quiet_seconds": self._settings.quiet_period.total_seconds()}
        run["durable"] = self._settings.durable_runs
        try:
            async with asyncio.timeout(10):
                started = time.monotonic()
                await self._database.call("record_run", identity, run=run)
        except Exception as error:  # noqa: BLE001 - whatever goes wrong in recording, the answer is given
            await self._keep(identity, run, error)
            self._something_waits = True
            return False
        emit(
            "run_recorded",
            run_id=run["run_id"],
            status=run["status"],
            duration_ms=_milliseconds_since(started),
        )
        if self._something_waits:  # the database takes runs again, or this process has not looked yet
            self._something_waits = False
            self._delivery = asyncio.create_task(self._deliver_beside())
        return True

    async def settled(self) -> None:
        """Wait for a delivery that is under way."""
        if self._delivery is not None:
            await self._delivery

    async def _deliver_beside(self) -> None:
        try:
            await self.deliver_spooled()
        except Exception as error:  # noqa: BLE001 - the owner of this task is nobody's caller: it must be heard
            emit("spooled_run_delivery_failed", run_id=None, reason=type(error).__name__)

    async def _keep(self, identity: Identity, run: dict[str, Any], error: Exception) -> None:
        facts = {
            "run_id": run["run_id"],
            "status": run["status"],
            "reason": str(error) if isinstance(error, LearningError) else type(error).__name__,
        }
        try:
            await asyncio.to_thread(self.spool.put, identity, run)
        except (OSError, OperatorError, ValueError, RecursionError) as disk:
            emit("run_record_failed", **facts, spool=f"{type(disk).__name__}: {disk}")
            return
        emit("run_spooled", **facts)

    def _may_deliver(self, identity: Identity) -> bool:
        """Not in the name of another: with a user's token the database takes every run for that user's."""
        claimed = self._database.claimed_identity if isinstance(self._database, SupabaseDatabase) else None
        return claimed is None or (claimed.tenant_id, claimed.user_id) == (
            identity.tenant_id,
            identity.user_id,
        )

    async def deliver_spooled(self) -> int:
        """Hand the runs that wait on disk to the database, oldest first, until it is away again.

        A run is delivered once however often this runs: the database knows it by its id.

        Returns:
            How many were delivered.
        """
        delivered = 0
        async with self._delivering:
            for spooled in await asyncio.to_thread(lambda: list(self.spool.waiting())):
                if not self._may_deliver(spooled.identity):
                    continue
                try:
                    # Its file goes next: so this one waits for the database's disk, whatever the settings say.
                    await self._database.call(
                        "record_run", spooled.identity, run=spooled.run | {"durable": True}
                    )
                except (DatabaseUnavailable, MigrationError):
                    break  # none of them can go now
                except (OperatorError, ConfigurationError) as error:
                    # A key, a grant, an address: the operator mends it, the run waits.
                    emit("spooled_run_delivery_failed", run_id=spooled.run.get("run_id"), reason=str(error))
                    continue
                except LearningError as error:
                    await asyncio.to_thread(self.spool.set_aside, spooled.path)
                    emit("spooled_run_refused", run_id=spooled.run.get("run_id"), reason=str(error))
                    continue
                await asyncio.to_thread(self.spool.delivered, spooled.path)
                delivered += 1
                if spooled.run["status"] == "completed":
                    await self._delivered(spooled.identity)
        if delivered:
            emit("spooled_runs_delivered", runs=delivered)
        return delivered


def _milliseconds_since(started: float) -> float:
    return round((time.monotonic() - started) * 1000, 3)
