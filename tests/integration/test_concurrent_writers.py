"""Crowds of writers: 20 and 200 threads, tasks and processes at once lose nothing and count right."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import random
import signal
import sys
import threading
import time
import traceback
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from typing import Any

import pytest
from langchain.agents import create_agent

from agent import Identity, LearningMachine, LearningMode, UserMemoryConfig
from agent.database.postgres import PostgresDatabase
from agent.errors import ConflictError, DatabaseUnavailable, LearningError
from agent.portal import portal
from agent.settings import Settings, WorkerMode
from agent.testing import ScriptedChat, tool_call
from agent.testing.throwaway import ThrowawayDatabase
from tests.integration.agents import all_recorded
from tests.integration.rows import a_run, counted_scopes, memory, recounted_scopes, rows, value

ADA = Identity(user_id="ada@example.com", session_id="s1")
CROWDS = (20, 200)


@pytest.fixture
async def machine(learning_database: ThrowawayDatabase) -> AsyncIterator[LearningMachine]:
    """A machine on `learning_database` that does not learn by itself."""
    machine = LearningMachine(settings=learning_database.settings)
    yield machine
    await machine.aclose()


def _assert_nothing_lost(
    url: str, contents: Sequence[str], user_id: str | None = ADA.user_id, turns: Sequence[str] = ()
) -> None:
    found = rows(
        url,
        "SELECT content, version FROM agent_memory WHERE owner_id = %s AND superseded_at IS NULL",
        user_id,
    )
    assert sorted(content for content, _ in found) == sorted([*contents, *turns])
    assert {version for _, version in found} == {1}
    counted = counted_scopes(url)
    assert counted == recounted_scopes(url)
    assert counted["default", str(user_id)][0] == len(contents) + len(turns)
    assert value(url, "SELECT version FROM agent_scope WHERE owner_id = %s", user_id) >= len(contents)


def _write_by_sync_door(machine: LearningMachine, content: str) -> str:
    """As a thread without a loop does it."""
    return asyncio.run(_write(machine, content))


async def _write(machine: LearningMachine, content: str) -> str:
    receipt = await machine.upsert_learning(identity=ADA, store="user_memory", content=content)
    return str(receipt["status"])


# Threads, tasks, processes


@pytest.mark.parametrize("crowd", CROWDS)
def test_threads_lose_nothing(learning_database: ThrowawayDatabase, crowd: int) -> None:
    machine = LearningMachine(settings=learning_database.settings)
    contents = [f"Thread {number} likes tea" for number in range(crowd)]
    start = threading.Barrier(crowd)

    def write(content: str) -> str:
        start.wait(60)
        return _write_by_sync_door(machine, content)

    with ThreadPoolExecutor(crowd) as threads:
        assert set(threads.map(write, contents)) == {"created"}
    _assert_nothing_lost(learning_database.url, contents)
    asyncio.run(machine.aclose())


@pytest.mark.parametrize("crowd", CROWDS)
async def test_tasks_lose_nothing(
    machine: LearningMachine, learning_database: ThrowawayDatabase, crowd: int
) -> None:
    contents = [f"Task {number} likes tea" for number in range(crowd)]
    statuses = await asyncio.gather(*(_write(machine, content) for content in contents))
    assert set(statuses) == {"created"}
    _assert_nothing_lost(learning_database.url, contents)


def _write_in_process(settings: Settings, contents: Sequence[str]) -> list[str]:
    """The work of one process: all of its writes at once, then it leaves in order."""

    async def work() -> list[str]:
        machine = LearningMachine(settings=settings)
        try:
            return list(await asyncio.gather(*(_write(machine, content) for content in contents)))
        finally:
            await machine.aclose()

    return asyncio.run(work())


@pytest.mark.parametrize(("processes", "each"), [(20, 1), (200, 1), (20, 10)])
def test_processes_lose_nothing(learning_database: ThrowawayDatabase, processes: int, each: int) -> None:
    contents = [[f"Process {p} likes tea {n}" for n in range(each)] for p in range(processes)]
    # Each is forked from a clean one that has read the code already: quick, and with nothing of this process in it.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["agent.learning.machine", "agent.database.postgres", __name__])
    with ProcessPoolExecutor(processes, mp_context=context, max_tasks_per_child=1) as pool:
        work = [pool.submit(_write_in_process, learning_database.settings, texts) for texts in contents]
        statuses = {status for future in work for status in future.result(timeout=100)}
    assert statuses == {"created"}
    _assert_nothing_lost(learning_database.url, [text for texts in contents for text in texts])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_children_forked_from_a_process_that_is_at_work_lose_nothing(
    learning_database: ThrowawayDatabase,
) -> None:
    settings = learning_database.settings.model_copy(update={"worker": WorkerMode.INSIDE})
    machine = LearningMachine(settings=settings)
    contents = ["Of the parent"]
    assert _write_by_sync_door(machine, contents[0]) == "created"
    portal().run_sync(machine.record(ADA, a_run("Said to the parent")))
    assert machine.drain_sync()
    children = []
    for child in range(4):
        mine = [f"Of child {child} number {number}" for number in range(5)]
        contents += mine
        process_id = os.fork()
        if process_id == 0:
            code = 1
            try:
                assert {_write_by_sync_door(machine, content) for content in mine} == {"created"}
                there = ADA.with_(session_id=f"child {child}")
                assert portal().run_sync(machine.record(there, a_run(f"Said to child {child}")))
                assert machine.drain_sync(), "the child has a worker of its own"
                asyncio.run(machine.aclose())
                code = 0
            except BaseException:  # noqa: BLE001 - nothing of the child may go up into the parent's test run
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        children.append(process_id)
        contents.append(f"Of the parent meanwhile {child}")
        assert _write_by_sync_door(machine, contents[-1]) == "created"
    assert [_code_of(process_id) for process_id in children] == [0, 0, 0, 0]
    contents.append("Of the parent afterwards")
    assert _write_by_sync_door(machine, contents[-1]) == "created"
    said = ["Said to the parent", *(f"Said to child {child}" for child in range(4))]
    _assert_nothing_lost(learning_database.url, contents, turns=said + ["Noted."] * len(said))
    portal().run_sync(machine.record(ADA, a_run("Said to the parent at last")))
    assert machine.drain_sync()
    asyncio.run(machine.aclose())


def _code_of(process_id: int) -> int | str:
    """How a child ended; one that hangs is ended."""
    for _ in range(600):
        done, status = os.waitpid(process_id, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.1)
    os.kill(process_id, signal.SIGKILL)
    os.waitpid(process_id, 0)
    return "hung"


# Through the agent's own tools


def _saving_agent(machine: LearningMachine) -> Any:
    def answer(messages: Any) -> Any:
        last = messages[-1]
        return tool_call("save_user_memory", content=last.text) if last.type == "human" else last.text

    return create_agent(ScriptedChat(script=[answer]), [], middleware=[machine.middleware()])


def _asked(number: int) -> tuple[dict[str, Any], dict[str, Any]]:
    said = {"messages": [("user", f"Caller {number} likes tea")]}
    return said, {"configurable": {"thread_id": f"t{number}", "user_id": ADA.user_id}}


@pytest.mark.parametrize("crowd", CROWDS)
async def test_agents_that_save_at_once_lose_nothing(
    learning_database: ThrowawayDatabase, crowd: int
) -> None:
    machine = LearningMachine(
        user_memory=UserMemoryConfig(mode=LearningMode.AGENTIC), settings=learning_database.settings
    )
    agent = _saving_agent(machine)
    answers = await asyncio.gather(*(agent.ainvoke(*_asked(number)) for number in range(crowd)))
    await portal().run(machine.recorded_all())
    assert all("Saved (memory " in answer["messages"][-1].text for answer in answers)
    _assert_nothing_lost(learning_database.url, [f"Caller {number} likes tea" for number in range(crowd)])
    assert value(learning_database.url, "SELECT count(*) FROM agent_run WHERE status = 'completed'") == crowd
    assert value(learning_database.url, "SELECT count(*) FROM agent_queue.procrastinate_jobs") == crowd
    query = (
        "SELECT count(DISTINCT r.run_id) FROM agent_memory_evidence e JOIN agent_run r ON r.run_id = e.run_id"
    )
    assert value(learning_database.url, query) == crowd, "each is evidence of its own run"
    await machine.aclose()


def test_agents_in_threads_that_save_at_once_lose_nothing(learning_database: ThrowawayDatabase) -> None:
    machine = LearningMachine(
        user_memory=UserMemoryConfig(mode=LearningMode.AGENTIC), settings=learning_database.settings
    )
    agent = _saving_agent(machine)
    with ThreadPoolExecutor(20) as threads:
        answers = list(threads.map(lambda number: agent.invoke(*_asked(number)), range(40)))
    all_recorded(machine)
    assert all("Saved (memory " in answer["messages"][-1].text for answer in answers)
    _assert_nothing_lost(learning_database.url, [f"Caller {number} likes tea" for number in range(40)])
    asyncio.run(machine.aclose())


# The same thing from all sides


@pytest.mark.parametrize("crowd", CROWDS)
async def test_a_text_that_all_say_is_one_memory_with_the_evidence_of_all(
    machine: LearningMachine, learning_database: ThrowawayDatabase, crowd: int
) -> None:
    receipts = await asyncio.gather(
        *(
            machine.upsert_learning(
                identity=ADA,
                store="user_memory",
                content=("Likes tea", "likes TEA.", " Likes  tea")[number % 3],
                evidence=[{"run_id": f"r{number}"}],
            )
            for number in range(crowd)
        )
    )
    assert len({receipt["memory_id"] for receipt in receipts}) == 1
    assert sorted(receipt["status"] for receipt in receipts) == ["created"] + ["unchanged"] * (crowd - 1)
    assert value(learning_database.url, "SELECT count(*) FROM agent_memory") == 1
    assert value(learning_database.url, "SELECT count(DISTINCT run_id) FROM agent_memory_evidence") == crowd
    assert counted_scopes(learning_database.url) == recounted_scopes(learning_database.url)


@pytest.mark.parametrize("crowd", CROWDS)
async def test_a_field_that_all_set_has_one_answer_and_every_version(
    machine: LearningMachine, learning_database: ThrowawayDatabase, crowd: int
) -> None:
    receipts = await asyncio.gather(
        *(
            machine.upsert_learning(
                identity=ADA, store="user_profile", field="name", content=f"Name {number}"
            )
            for number in range(crowd)
        )
    )
    assert sorted(receipt["version"] for receipt in receipts) == list(range(1, crowd + 1))
    found = rows(
        learning_database.url,
        "SELECT version, content, superseded_at IS NULL, count(*) OVER (PARTITION BY memory_id) "
        "FROM agent_memory ORDER BY version",
    )
    assert [row[0] for row in found] == list(range(1, crowd + 1))
    assert {row[1] for row in found} == {f"Name {number}" for number in range(crowd)}
    assert [row[2] for row in found] == [False] * (crowd - 1) + [True]
    assert {row[3] for row in found} == {crowd}


async def test_nobody_overwrites_what_they_have_not_read(
    machine: LearningMachine, learning_database: ThrowawayDatabase
) -> None:
    first = await machine.upsert_learning(identity=ADA, store="user_memory", content="count 0")
    memory_id = first["memory_id"]

    async def add_one(times: int) -> int:
        refused = 0
        while times:
            read = await machine.get_learning(memory_id, identity=ADA)
            assert read is not None
            number = int(read["content"].split()[1])
            try:
                await machine.upsert_learning(
                    identity=ADA,
                    store="user_memory",
                    content=f"count {number + 1}",
                    memory_id=memory_id,
                    expected_version=read["version"],
                )
                times -= 1
            except ConflictError:
                refused += 1
        return refused

    refused = await asyncio.gather(*(add_one(5) for _ in range(10)))
    assert sum(refused) > 0, "they did get in each other's way"
    last = await machine.get_learning(memory_id, identity=ADA)
    assert last is not None
    assert (last["content"], last["version"]) == ("count 50", 51)
    assert counted_scopes(learning_database.url) == recounted_scopes(learning_database.url)


@pytest.mark.parametrize("crowd", CROWDS)
async def test_a_run_that_is_delivered_many_times_at_once_is_recorded_once(
    machine: LearningMachine, learning_database: ThrowawayDatabase, crowd: int
) -> None:
    run = a_run("Fact", run_id="r1", outcomes=[{"kind": "reward", "succeeded": True}], quiet_seconds=60)
    receipts = await asyncio.gather(
        *(machine.database.call("record_run", ADA, run=run) for _ in range(crowd))
    )
    assert sorted(receipt["recorded"] for receipt in receipts) == [False] * (crowd - 1) + [True]
    assert {receipt["status"] for receipt in receipts} == {"completed"}
    assert value(learning_database.url, "SELECT count(*) FROM agent_run") == 1
    assert value(learning_database.url, "SELECT count(*) FROM agent_outcome") == 1
    assert value(learning_database.url, "SELECT count(*) FROM agent_queue.procrastinate_jobs") == 1


async def test_two_parts_of_one_run_delivered_at_once_and_again_are_one_completed_run(
    machine: LearningMachine, learning_database: ThrowawayDatabase
) -> None:
    def part(number: int, status: str) -> dict[str, Any]:
        message = {"message_id": f"m{number}", "role": "user", "content": f"Part {number}"}
        return a_run(run_id="r1", status=status) | {"messages": [message]}

    parts = [part(number, "interrupted") for number in range(10)] * 3
    random.Random(1).shuffle(parts)
    await asyncio.gather(*(machine.database.call("record_run", ADA, run=one) for one in parts))
    await asyncio.gather(
        *(machine.database.call("record_run", ADA, run=part(10, "completed")) for _ in range(10))
    )
    run = await machine.database.call("get_run", ADA, the_run_id="r1")
    assert run["status"] == "completed"
    assert sorted(message["message_id"] for message in run["messages"]) == sorted(f"m{n}" for n in range(11))
    assert value(learning_database.url, "SELECT count(*) FROM agent_queue.procrastinate_jobs") == 1


async def test_a_session_that_is_recorded_from_all_sides_is_ordered_once(
    machine: LearningMachine, learning_database: ThrowawayDatabase
) -> None:
    await asyncio.gather(
        *(
            machine.database.call("record_run", ADA, run=a_run(f"Fact {n}", quiet_seconds=60))
            for n in range(200)
        )
    )
    assert value(learning_database.url, "SELECT count(*) FROM agent_run") == 200
    assert value(learning_database.url, "SELECT count(*) FROM agent_queue.procrastinate_jobs") == 1


async def test_importers_and_recorders_of_the_same_sessions_do_not_deadlock(
    machine: LearningMachine, learning_database: ThrowawayDatabase
) -> None:
    shared = [
        a_run(f"Shared {n}", run_id=f"shared-{n}", session_id=f"s{n % 7}", quiet_seconds=60)
        for n in range(20)
    ]

    async def bring(number: int) -> dict[str, int]:
        own = [a_run(f"Of {number}", session_id=f"s{n % 10}", quiet_seconds=60) for n in range(30)]
        runs = own + shared
        random.Random(number).shuffle(runs)
        found: dict[str, int] = await machine.database.call("import_runs", ADA, runs=runs)
        return found

    async def record(number: int) -> bool:
        run = a_run(f"Live {number}", quiet_seconds=60)
        there = ADA.with_(session_id=f"s{number % 10}")
        return bool((await machine.database.call("record_run", there, run=run))["recorded"])

    reports = await asyncio.gather(*(bring(number) for number in range(10)))
    assert sum(report["recorded"] for report in reports) == 10 * 30 + 20
    reports, recorded = await asyncio.gather(
        asyncio.gather(*(bring(number) for number in range(10, 14))),
        asyncio.gather(*(record(number) for number in range(60))),
    )
    assert set(recorded) == {True}
    assert {report["recorded"] for report in reports} == {30}
    assert value(learning_database.url, "SELECT count(*) FROM agent_queue.procrastinate_jobs") == 10


# All at once


async def test_the_counters_are_right_whatever_happens_at_once(
    machine: LearningMachine, learning_database: ThrowawayDatabase
) -> None:
    people = [Identity(user_id=f"u{n}", session_id="s") for n in range(3)]
    allowed = (LearningError,)

    async def meddle(number: int) -> str:
        chance = random.Random(number)
        for _ in range(6):
            person = chance.choice(people)
            text = f"Likes {chance.choice(['tea', 'milk', 'cake', 'rain', 'music'])} {chance.randrange(4)}"
            known = await machine.get_learnings(identity=person, store="user_memory")
            some = str(chance.choice(known)["memory_id"]) if known else None
            try:
                match chance.randrange(8):
                    case 0 if some:
                        await machine.delete_learning(some, identity=person)
                    case 1 if some:
                        retire = {"action": "retire", "store": "user_memory", "memory_id": some}
                        await machine.database.call("upsert_learnings", person, learnings=[retire])
                    case 2 if some:
                        await machine.upsert_learning(
                            identity=person, store="user_memory", content=text, memory_id=some
                        )
                    case 3:
                        await machine.database.call("record_run", person, run=a_run(text))
                        await machine.learn_session(person)
                    case 4 if chance.random() < 0.2:
                        await machine.database.call("erase_user", person)
                    case 5:
                        await machine.database.call(
                            "upsert_learning", person, learning=memory(text), memory_limit=5
                        )
                    case _:
                        await machine.upsert_learning(identity=person, store="user_memory", content=text)
            except allowed as error:
                if isinstance(error, DatabaseUnavailable):
                    raise
        return "done"

    assert set(await asyncio.gather(*(meddle(number) for number in range(40)))) == {"done"}
    assert counted_scopes(learning_database.url) == recounted_scopes(learning_database.url)
    orphans = rows(
        learning_database.url,
        "SELECT t.memory_number FROM agent_memory_term t LEFT JOIN agent_memory m USING (memory_number) "
        "WHERE m.superseded_at IS NOT NULL OR m.memory_number IS NULL",
    )
    assert orphans == []


async def test_cut_connections_lose_no_write_of_a_crowd(
    machine: LearningMachine, learning_database: ThrowawayDatabase
) -> None:
    contents = [f"Task {number} likes tea" for number in range(200)]
    is_done = threading.Event()

    def cut() -> None:
        for _ in range(3):
            is_done.wait(0.05)
            rows(
                learning_database.url,
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE datname = current_database() AND pid <> pg_backend_pid()",
            )

    async def write(content: str) -> str:
        while True:  # cut off twice, a call gives up, and its caller may try again
            try:
                return await _write(machine, content)
            except DatabaseUnavailable:
                await asyncio.sleep(0.3)

    cutting = asyncio.create_task(asyncio.to_thread(cut))
    statuses = await asyncio.gather(*(write(content) for content in contents))
    is_done.set()
    await cutting
    assert set(statuses) <= {"created", "unchanged"}
    _assert_nothing_lost(learning_database.url, contents)


async def test_one_cut_connection_is_not_noticed_by_a_crowd(
    machine: LearningMachine, learning_database: ThrowawayDatabase
) -> None:
    database = machine.database
    assert isinstance(database, PostgresDatabase)
    await asyncio.gather(*(_write(machine, f"Before {number}") for number in range(50)))
    rows(
        learning_database.url,
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
        "WHERE datname = current_database() AND pid <> pg_backend_pid()",
    )
    statuses = await asyncio.gather(*(_write(machine, f"After {number}") for number in range(200)))
    assert set(statuses) == {"created"}


async def test_more_callers_than_connections_wait_their_turn(learning_database: ThrowawayDatabase) -> None:
    database = PostgresDatabase(learning_database.url, connections_max=2)
    receipts = await asyncio.gather(
        *(database.call("upsert_learning", ADA, learning=memory(f"Fact {number}")) for number in range(200))
    )
    assert {receipt["status"] for receipt in receipts} == {"created"}
    await database.close()
