"""Ours: `create_agent` with `LearningMiddleware`."""

from __future__ import annotations

import time
from collections import defaultdict
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psycopg
from langchain.agents import create_agent
from pydantic import SecretStr

from agent import Event, Identity, LearningMachine, LearningMiddleware, Settings, listening
from agent.database.postgres import PostgresDatabase
from agent.database.protocol import Begun
from agent.portal import portal
from agent.settings import WorkerMode
from benchmarks.agent_under_test import USER_ID, Setup, TimedChat

_FILL_BATCH = 500
_DEGRADING = ("recall_failed", "run_spooled", "run_record_failed")


class TimedDatabase(PostgresDatabase):
    """Keeps the seconds of every call by function."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.seconds: defaultdict[str, list[float]] = defaultdict(list)

    async def call(self, function: str, identity: Identity | None = None, /, **arguments: Any) -> Any:
        started = time.perf_counter()
        try:
            return await super().call(function, identity, **arguments)
        finally:
            self.seconds[function].append(time.perf_counter() - started)

    def begin(self, function: str, identity: Identity, /, **arguments: Any) -> Begun | None:
        started = time.perf_counter()
        begun = super().begin(function, identity, **arguments)
        if begun is None:
            return None

        async def timed() -> Any:
            try:
                return await begun()
            finally:
                self.seconds[function].append(time.perf_counter() - started)

        return timed


class LearningAgent:
    """`LearningMiddleware` with all three stores and a model that extracts, no embedder."""

    def __init__(self, *, worker_inside: bool) -> None:
        self.learns_behind = worker_inside
        self.degraded = 0
        where = "inside" if worker_inside else "elsewhere"
        self.name = f"ours, worker {where}"
        self.configuration = (
            "`create_agent(model, middleware=[LearningMiddleware(machine)])` with user profile, user memory and "
            "session context; bare: `create_agent(model)`. One row per memory in Postgres; a run waits for one "
            "recall before it and hands over one record after it, without waiting for its receipt or the disk (the "
            "default; `LEARNING_DURABLE_RUNS=true` makes it wait for both). "
        ) + (
            "A worker in the same process learns every run at once (quiet period 0), with one model call for the "
            "three stores."
            if worker_inside
            else "Learning is ordered in the database and left to a worker in another process, which is not running."
        )

    def _notice(self, event: Event) -> None:
        if event.name in _DEGRADING:
            self.degraded += 1

    async def open(self, setup: Setup) -> None:
        self._resources = ExitStack()
        self._resources.enter_context(listening(self._notice))
        files = self._resources.enter_context(TemporaryDirectory(prefix="learning-benchmark-files-"))
        self._url = setup.database_url
        settings = Settings(
            database_url=SecretStr(setup.database_url),
            data_dir=Path(files),
            embeddings="none",
            quiet_period=timedelta(0),
            worker=WorkerMode.INSIDE if self.learns_behind else WorkerMode.OFF,
        )
        model = TimedChat(script=setup.script, empty_calls={"Learned": {}})
        self._database = TimedDatabase(setup.database_url)
        self._machine = LearningMachine(model=model, settings=settings, database=self._database)
        self._bare = create_agent(model)
        self._learning = create_agent(model, middleware=[LearningMiddleware(self._machine)])
        for start in range(0, len(setup.memories), _FILL_BATCH):
            learnings = [
                {"store": "user_memory", "kind": "fact", "content": content}
                for content in setup.memories[start : start + _FILL_BATCH]
            ]
            await portal().run(
                self._database.call("upsert_learnings", Identity(user_id=USER_ID), learnings=learnings)
            )

    async def run_bare(self, question: str, session_id: str) -> str:
        return await self._run(self._bare, question, session_id)

    async def run_learning(self, question: str, session_id: str) -> str:
        return await self._run(self._learning, question, session_id)

    async def _run(self, agent: Any, question: str, session_id: str) -> str:
        output = await agent.ainvoke(
            {"messages": [("user", question)]},
            {"configurable": {"thread_id": session_id, "user_id": USER_ID}},
        )
        return str(output["messages"][-1].text)

    @property
    def call_times(self) -> defaultdict[str, list[float]]:
        """Seconds of every database call since it was last cleared, by function."""
        return self._database.seconds

    async def handed_over(self) -> None:
        await portal().run(self._machine.recorded_all())

    async def settle(self, *, patience_s: float) -> int | None:
        await self.handed_over()
        if not self.learns_behind:
            return None
        await self._machine.drain(timedelta(seconds=patience_s))
        async with await psycopg.AsyncConnection.connect(self._url) as connection:
            cursor = await connection.execute(
                "SELECT count(*) FROM public.agent_run WHERE learned_at IS NULL"
            )
            (unlearned,) = await cursor.fetchone() or (0,)
        return int(unlearned)

    async def close(self) -> None:
        await self._machine.aclose()
        self._resources.close()
