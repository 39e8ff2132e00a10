"""When an answer waits for its run: not for its receipt, unless it should; and the run is recorded all the same."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pytest
from langchain.agents import create_agent
from langgraph.graph import START, MessagesState, StateGraph

from agent import Identity, LearningMachine, LearningMiddleware, with_learning
from agent.portal import portal
from agent.settings import WorkerMode
from agent.testing import ScriptedChat
from agent.testing.throwaway import ThrowawayDatabase
from tests.integration.agents import ASYNC_AND_SYNC, all_recorded, as_user, call, said
from tests.integration.rows import a_run, rows

ADA = Identity(user_id="ada", session_id="s1")
MOMENT_S = 0.5
"""How long an answer is looked at that must not come: a hundred times what one takes that waits for nothing."""
UNWAITED_MAX = 64
PATIENCE_S = 30.0

colours = pytest.mark.parametrize("colour", ASYNC_AND_SYNC)


def agent_of(machine: LearningMachine) -> Any:
    return create_agent(ScriptedChat(script=["ok"]), [], middleware=[LearningMiddleware(machine)])


def graph_of(machine: LearningMachine) -> Any:
    builder = StateGraph(MessagesState)
    builder.add_node("inner", create_agent(ScriptedChat(script=["ok"]), []))
    builder.add_edge(START, "inner")
    return with_learning(builder, machine)


ways = pytest.mark.parametrize("way", [agent_of, graph_of], ids=["agent", "graph"])
Way = Callable[[LearningMachine], Any]


class Gate:
    """Holds back what a machine records, until it is opened."""

    def __init__(self, machine: LearningMachine, monkeypatch: pytest.MonkeyPatch) -> None:
        self._reached = threading.Semaphore(0)
        self._opened = asyncio.Event()
        call_database = machine.database.call

        async def call(function: str, *arguments: Any, **named: Any) -> Any:
            if function == "record_run":
                self._reached.release()
                await self._opened.wait()
            return await call_database(function, *arguments, **named)

        monkeypatch.setattr(machine.database, "call", call)

    def await_runs(self, number: int) -> None:
        """Until so many more have come to the gate."""
        for _ in range(number):
            assert self._reached.acquire(timeout=PATIENCE_S)

    def open(self) -> None:
        """Let all through, now and later."""
        portal().loop.call_soon_threadsafe(self._opened.set)


Gated = Callable[..., tuple[LearningMachine, Gate]]


@pytest.fixture
def gated(learning_database: ThrowawayDatabase, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gated]:
    """Makes machines whose database takes no run before the gate is opened."""
    made: list[tuple[LearningMachine, Gate]] = []

    def make(**changes: Any) -> tuple[LearningMachine, Gate]:
        settings = learning_database.settings.model_copy(update={"worker": WorkerMode.OFF, **changes})
        machine = LearningMachine(settings=settings)
        made.append((machine, Gate(machine, monkeypatch)))
        return made[-1]

    yield make
    for machine, gate in made:
        gate.open()
        asyncio.run(machine.aclose())


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor() as pool:
        yield pool


def recorded(database: ThrowawayDatabase) -> list[tuple[Any, ...]]:
    return rows(database.url, "SELECT session_id, status FROM agent_run")


def answering(threads: ThreadPoolExecutor, colour: str, way: Way, machine: LearningMachine) -> Future[Any]:
    """A call that goes on while the test looks on."""
    return threads.submit(call, colour, way(machine), said("hello"), as_user("ada", "1"))


@ways
@colours
def test_an_answer_does_not_wait_for_its_run(
    colour: str, way: Way, gated: Gated, learning_database: ThrowawayDatabase
) -> None:
    machine, gate = gated()
    answer = call(colour, way(machine), said("hello"), as_user("ada", "1"))

    assert answer["messages"][-1].text == "ok"
    assert recorded(learning_database) == []
    gate.open()
    all_recorded(machine)
    assert recorded(learning_database) == [("1", "completed")]


@ways
@colours
def test_an_answer_waits_where_runs_are_to_be_durable(
    colour: str, way: Way, gated: Gated, threads: ThreadPoolExecutor, learning_database: ThrowawayDatabase
) -> None:
    machine, gate = gated(durable_runs=True)
    answer = answering(threads, colour, way, machine)
    try:
        gate.await_runs(1)
        with pytest.raises(TimeoutError):
            answer.result(MOMENT_S)
        assert recorded(learning_database) == []
    finally:
        gate.open()

    assert answer.result(PATIENCE_S)["messages"][-1].text == "ok"
    assert recorded(learning_database) == [("1", "completed")]


@ways
@colours
def test_an_answer_waits_while_too_many_runs_are_on_their_way(
    colour: str, way: Way, gated: Gated, threads: ThreadPoolExecutor, learning_database: ThrowawayDatabase
) -> None:
    machine, gate = gated()
    for number in range(UNWAITED_MAX):  # a door that waited would not let the test past it
        identity = ADA.with_(session_id=f"before {number}")
        if colour == "sync":
            machine.finish(identity, a_run())
        else:
            asyncio.run(machine.afinish(identity, a_run()))
    gate.await_runs(UNWAITED_MAX)
    answer = answering(threads, colour, way, machine)
    try:
        gate.await_runs(1)
        with pytest.raises(TimeoutError):
            answer.result(MOMENT_S)
        assert recorded(learning_database) == []
    finally:
        gate.open()

    assert answer.result(PATIENCE_S)["messages"][-1].text == "ok"
    assert ("1", "completed") in recorded(learning_database)
    all_recorded(machine)
    assert len(recorded(learning_database)) == UNWAITED_MAX + 1


def test_who_gives_up_waiting_among_too_many_runs_loses_none(
    gated: Gated, learning_database: ThrowawayDatabase
) -> None:
    machine, gate = gated()
    for number in range(UNWAITED_MAX):
        machine.finish(ADA, a_run(run_id=f"r{number}"))

    async def one_more() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(machine.afinish(ADA, a_run(run_id="one more")), MOMENT_S)

    asyncio.run(one_more())
    gate.open()
    all_recorded(machine)
    found = {run_id for (run_id,) in rows(learning_database.url, "SELECT run_id FROM agent_run")}
    assert found == {*(f"r{number}" for number in range(UNWAITED_MAX)), "one more"}


@ways
@pytest.mark.parametrize("durable_runs", [False, True])
def test_a_run_that_nobody_waits_for_any_more_is_recorded(
    durable_runs: bool, way: Way, gated: Gated, learning_database: ThrowawayDatabase
) -> None:
    """Its caller gives up, and the loop of the caller ends, while the run is on its way."""
    machine, gate = gated(durable_runs=durable_runs)
    graph = way(machine)

    async def give_up() -> None:
        task = asyncio.create_task(graph.ainvoke(said("hello"), as_user("ada", "1")))
        await asyncio.to_thread(gate.await_runs, 1)
        task.cancel()
        with suppress(asyncio.CancelledError):  # unless the answer was given before
            await task
        assert task.cancelled() or not durable_runs

    asyncio.run(give_up())
    assert recorded(learning_database) == []
    gate.open()
    all_recorded(machine)
    assert recorded(learning_database) == [("1", "completed")]
