"""Agno 3.1.10 with `learning=True`, as its documentation shows it, on Postgres."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from agno.agent import Agent
from agno.db.postgres import AsyncPostgresDb, PostgresDb
from agno.learn import LearningMachine
from agno.learn.schemas import Memories
from agno.learn.stores import UserMemoryStore
from agno.models.base import Model
from agno.models.response import ModelResponse

from benchmarks.agent_under_test import ANSWER, USER_ID, ModelScript, Setup


@dataclass
class TimedModel(Model):
    """An Agno model on a script: it never calls a tool, so that nothing is ever saved."""

    id: str = "timed"
    script: ModelScript = field(default_factory=ModelScript)

    def invoke(self, *args: Any, **kwargs: Any) -> ModelResponse:
        self.script.play([message.get_content_string() for message in kwargs["messages"]])
        return ModelResponse(role="assistant", content=ANSWER)

    async def ainvoke(self, *args: Any, **kwargs: Any) -> ModelResponse:
        await self.script.aplay([message.get_content_string() for message in kwargs["messages"]])
        return ModelResponse(role="assistant", content=ANSWER)

    def invoke_stream(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("the benchmark does not stream")

    def ainvoke_stream(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("the benchmark does not stream")

    def _parse_provider_response(self, response: Any, **kwargs: Any) -> ModelResponse:
        raise NotImplementedError("invoke() builds the response itself")

    def _parse_provider_response_delta(self, response: Any) -> ModelResponse:
        raise NotImplementedError("the benchmark does not stream")


class AgnoAgent:
    """`Agent(model, db, learning=True)`: user profile and user memory, both in mode ALWAYS, its defaults.

    Its bare build has the same `db`, so that storing the session is not charged to learning. `asynchronous` uses
    `arun` with `AsyncPostgresDb`; otherwise `run` in a thread per run with `PostgresDb`.
    """

    learns_behind = False
    degraded = 0  # not told: a failing read is a line of its debug log

    def __init__(self, *, asynchronous: bool = True) -> None:
        self._asynchronous = asynchronous
        door = "arun, AsyncPostgresDb" if asynchronous else "run in threads, PostgresDb"
        self.name = f"Agno 3.1.10 ({'arun' if asynchronous else 'run'})"
        self.configuration = (
            f"`Agent(model, db, learning=True, telemetry=False)`, {door} (psycopg) on the same server; the machine it "
            "builds has user profile and user memory in mode ALWAYS; bare: the same without `learning`. All memories "
            "of a user are one JSON document; every run reads it, renders all of it into the prompt, and each of the "
            "two stores reads its document again and calls the model once more before `run` returns."
        )

    async def open(self, setup: Setup) -> None:
        # asyncio's own pool has six threads on two cores, which would queue twelve runs.
        self._threads = ThreadPoolExecutor(max_workers=32)
        url = setup.database_url.replace("postgresql://", "postgresql+psycopg://", 1)
        self._db = AsyncPostgresDb(db_url=url) if self._asynchronous else PostgresDb(db_url=url)
        model = TimedModel(script=setup.script)
        self._bare = Agent(model=model, db=self._db, telemetry=False)
        self._learning = Agent(model=model, db=self._db, learning=True, telemetry=False)
        self._learning.initialize_agent()
        machine = self._learning.learning_machine
        if not isinstance(machine, LearningMachine) or not isinstance(
            machine.user_memory_store, UserMemoryStore
        ):
            raise RuntimeError("learning=True built no LearningMachine with a user memory store")
        filling = Memories(user_id=USER_ID)
        for memory in setup.memories:
            filling.add_memory(memory)
        store = machine.user_memory_store
        await store.asave(USER_ID, filling)
        found = await store.aget(USER_ID)
        if found is None or len(found.memories) != len(setup.memories):
            # Its own errors are lines of a debug log.
            raise RuntimeError("Agno did not keep the memories it was given")

    async def run_bare(self, question: str, session_id: str) -> str:
        return await self._run(self._bare, question, session_id)

    async def run_learning(self, question: str, session_id: str) -> str:
        return await self._run(self._learning, question, session_id)

    async def _run(self, agent: Agent, question: str, session_id: str) -> str:
        if self._asynchronous:
            output = await agent.arun(question, user_id=USER_ID, session_id=session_id)
        else:
            output = await asyncio.get_running_loop().run_in_executor(
                self._threads, partial(agent.run, question, user_id=USER_ID, session_id=session_id)
            )
        return str(output.content)

    async def handed_over(self) -> None:
        pass  # a run waits for all that it stores itself

    async def settle(self, *, patience_s: float) -> int:
        return 0  # a run returns only when its extraction is done

    async def close(self) -> None:
        self._threads.shutdown()
        if isinstance(self._db, AsyncPostgresDb):
            await self._db.close()
        else:
            self._db.close()
