"""The queue and its workers: what is recorded is learned once, sooner or later, whatever fails in between."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest

import agent.jobs
from agent import Identity, LearningMachine, listening
from agent.errors import ConfigurationError, ConflictError
from agent.events import Event
from agent.jobs import Worker, run_forever
from agent.portal import portal
from agent.settings import WorkerMode
from agent.testing import ScriptedChat, tool_call
from agent.testing.throwaway import ThrowawayDatabase
from tests.integration.rows import a_run, counted_scopes, memory, recounted_scopes, rows, value

ADA = Identity(user_id="ada@example.com", session_id="s1")
NEVER = timedelta(hours=1)  # a quiet period that no test waits for
LEARNED_NOTHING = tool_call("Learned")

MakeMachine = Callable[..., LearningMachine]


@pytest.fixture
async def make(learning_database: ThrowawayDatabase) -> AsyncIterator[MakeMachine]:
    """Makes machines on `learning_database`; closed afterwards."""
    made: list[LearningMachine] = []

    def make(settings: dict[str, Any] | None = None, **options: Any) -> LearningMachine:
        chosen = learning_database.settings.model_copy(update=settings or {})
        made.append(LearningMachine(settings=chosen, **options))
        return made[-1]

    yield make
    for machine in made:
        await machine.aclose()
    gc.collect()  # connections that were given up while they were made hold up the removal of the database


@pytest.fixture
def heard() -> Iterator[list[Event]]:
    """Every event of the test."""
    events: list[Event] = []
    with listening(events.append):
        yield events


def _named(events: list[Event], name: str) -> list[Event]:
    return [event for event in events if event.name == name]


async def _until(condition: Callable[[], Any], *, what: str = "", seconds: float = 60) -> None:
    """Wait for what will come; fail where it does not. A condition may be a coroutine function."""
    loop = asyncio.get_running_loop()
    end = loop.time() + seconds
    while True:
        found = condition()
        if await found if isinstance(found, Awaitable) else found:
            return
        assert loop.time() < end, f"did not come: {what or condition}"
        await asyncio.sleep(0.03)


@asynccontextmanager
async def _working(
    *machines: LearningMachine, workers: int = 1, stalled_after: timedelta = timedelta(seconds=30)
) -> AsyncIterator[list[asyncio.Task[None]]]:
    """Workers as `agent worker` has them, for the block."""
    made = [
        Worker(
            await machines[0].queue_url(), machines, queues=None, concurrency=2, stalled_after=stalled_after
        )
        for _ in range(workers)
    ]
    tasks = [asyncio.create_task(run_forever(worker)) for worker in made]
    try:
        yield tasks
    finally:
        for worker in made:
            worker.stop(timedelta(seconds=10))
        await asyncio.gather(*tasks)


async def _record(machine: LearningMachine, run: dict[str, Any], identity: Identity = ADA) -> bool:
    return await portal().run(machine.record(identity, run))


def _waiting(url: str) -> int:
    found: int = value(
        url, "SELECT count(*) FROM agent_run WHERE learned_at IS NULL AND status = 'completed'"
    )
    return found


def _jobs(url: str) -> list[tuple[Any, ...]]:
    return rows(url, "SELECT status::text, args FROM agent_queue.procrastinate_jobs ORDER BY id")


def _assert_each_run_learned_once(url: str, runs: int) -> None:
    """Of the runs made by `a_run` with texts of their own: what the user said in each is one turn with one piece of
    evidence, its run, and so is the answer."""
    assert value(url, "SELECT count(*) FROM agent_run WHERE learned_at IS NOT NULL") == runs
    found = rows(
        url,
        """
        SELECT e.run_id, m.content, r.messages -> 0 ->> 'content', count(*) OVER (PARTITION BY e.run_id),
               count(*) OVER (PARTITION BY m.memory_id)
        FROM agent_memory_evidence e JOIN agent_memory m USING (tenant_id, memory_id, version)
        JOIN agent_run r ON r.tenant_id = e.tenant_id AND r.run_id = e.run_id
        WHERE m.superseded_at IS NULL AND m.kind = 'user'
        """,
    )
    assert len(found) == runs
    assert value(url, "SELECT count(*) FROM agent_memory") == 2 * runs
    for run_id, learned, said, of_run, of_memory in found:
        assert (learned, of_run, of_memory) == (said, 1, 1), run_id
    assert counted_scopes(url) == recounted_scopes(url)


# Debounce


async def test_the_runs_of_a_busy_session_are_one_job_that_moves_and_are_learned_in_one_go(
    make: MakeMachine, learning_database: ThrowawayDatabase, heard: list[Event]
) -> None:
    machine = make({"quiet_period": NEVER})
    due = []
    for number in range(5):
        assert await _record(machine, a_run(f"Fact number {number}", run_id=f"r{number}"))
        due += rows(learning_database.url, "SELECT scheduled_at FROM agent_queue.procrastinate_jobs")
    assert len(due) == 5, "one job after each run"
    assert due == sorted(due)
    assert len(set(due)) == 5, "each run pushes it on"
    assert value(
        learning_database.url, "SELECT min(scheduled_at) > now() FROM agent_queue.procrastinate_jobs"
    )

    await _record(machine, a_run("Elsewhere", run_id="e1"), ADA.with_(session_id="s2"))
    assert len(_jobs(learning_database.url)) == 2
    async with _working(machine):
        await machine.database.call("expedite_learning", sessions=[ADA.as_json()])
        await _until(lambda: _waiting(learning_database.url) == 1)
        await _until(lambda: len(_jobs(learning_database.url)) == 1)

    assert [event.facts["runs"] for event in _named(heard, "session_learned")] == [5]
    assert [args["identity"]["session_id"] for _, args in _jobs(learning_database.url)] == ["s2"]


async def test_a_quiet_period_is_counted_from_the_last_run(
    make: MakeMachine, learning_database: ThrowawayDatabase
) -> None:
    machine = make({"quiet_period": timedelta(seconds=100)})
    await _record(machine, a_run())
    query = (
        "SELECT extract(epoch FROM scheduled_at - (args ->> 'first_at')::timestamptz)::float8 "
        "FROM agent_queue.procrastinate_jobs"
    )
    assert value(learning_database.url, query) == pytest.approx(100, abs=1)


@pytest.mark.parametrize(("began", "due"), [(200, 300), (1450, 1500), (1500, 1500), (3000, 1500)])
async def test_a_session_that_never_rests_is_due_after_fifteen_quiet_periods(
    make: MakeMachine, learning_database: ThrowawayDatabase, began: int, due: int
) -> None:
    machine = make({"quiet_period": timedelta(seconds=100)})
    await _record(machine, a_run())
    rows(
        learning_database.url,
        "UPDATE agent_queue.procrastinate_jobs "
        "SET args = jsonb_set(args, '{first_at}', to_jsonb(now() - %s::interval))",
        f"{began} seconds",
    )
    await _record(machine, a_run())
    query = (
        "SELECT extract(epoch FROM scheduled_at - (args ->> 'first_at')::timestamptz)::float8 "
        "FROM agent_queue.procrastinate_jobs"
    )
    assert value(learning_database.url, query) == pytest.approx(due, abs=2)


async def test_a_session_that_never_rests_is_learned_while_it_goes_on(
    make: MakeMachine, learning_database: ThrowawayDatabase
) -> None:
    machine = make({"quiet_period": timedelta(seconds=0.3)})
    recorded = 0

    async def say_more() -> bool:
        nonlocal recorded
        await _record(machine, a_run(f"Fact {recorded}", run_id=f"r{recorded}"))
        recorded += 1
        return _waiting(learning_database.url) < recorded

    async with _working(machine):
        await _until(say_more, what="learning of a busy session")
        await _until(lambda: _waiting(learning_database.url) == 0)
    _assert_each_run_learned_once(learning_database.url, recorded)


async def test_a_run_recorded_while_its_session_is_learned_is_learned_after(
    make: MakeMachine, learning_database: ThrowawayDatabase, heard: list[Event]
) -> None:
    asked = asyncio.Event()
    loop = asyncio.get_running_loop()

    def answer(messages: Any) -> Any:
        loop.call_soon_threadsafe(asked.set)
        return LEARNED_NOTHING

    model = ScriptedChat(script=[answer], delay=timedelta(seconds=0.3))
    machine = make(model=model)
    async with _working(machine):
        await _record(machine, a_run("First", run_id="r1"))
        await asked.wait()
        await _record(machine, a_run("Second", run_id="r2"))
        await _until(lambda: _waiting(learning_database.url) == 0)
        await _until(lambda: _jobs(learning_database.url) == [])
    assert sum(event.facts["runs"] for event in _named(heard, "session_learned")) == 2


# Many workers


async def test_many_workers_never_learn_one_run_twice(
    make: MakeMachine, learning_database: ThrowawayDatabase, heard: list[Event]
) -> None:
    machines = [make() for _ in range(3)]
    sessions = [Identity(user_id=f"u{n % 4}", session_id=f"s{n}") for n in range(24)]
    async with _working(machines[0], workers=2), _working(machines[1]), _working(machines[2]):
        await asyncio.gather(
            *(
                _record(machines[n % 3], a_run(f"Fact {n} of {session.session_id}"), session)
                for n in range(6)
                for session in sessions
            )
        )
        await _until(lambda: _waiting(learning_database.url) == 0)
    _assert_each_run_learned_once(learning_database.url, 6 * len(sessions))
    assert sum(event.facts["runs"] for event in _named(heard, "session_learned")) == 6 * len(sessions)
    assert _named(heard, "learning_failed") == []


async def test_learning_one_session_many_times_at_once_learns_each_run_once(
    make: MakeMachine, learning_database: ThrowawayDatabase
) -> None:
    machines = [
        make({"quiet_period": NEVER}) for _ in range(4)
    ]  # each has a lock of its own, as processes have
    for number in range(30):
        await _record(machines[0], a_run(f"Fact {number}"))

    async def learn(machine: LearningMachine) -> int:
        try:
            return await machine.learn_session(ADA)
        except ConflictError:
            return 0

    learned = await asyncio.gather(*(learn(machine) for machine in machines * 2))
    assert sum(learned) == 30
    _assert_each_run_learned_once(learning_database.url, 30)


async def test_learning_holds_against_writers_who_do_not_pause(
    make: MakeMachine, learning_database: ThrowawayDatabase
) -> None:
    machine = make({"quiet_period": NEVER, "worker": WorkerMode.INSIDE})
    for number in range(10):
        await _record(machine, a_run(f"Said {number}"))
    is_learned = False

    async def keep_writing() -> int:
        written = 0
        while not is_learned:
            await machine.upsert_learning(identity=ADA, store="user_memory", content=f"Written {written}")
            written += 1
        return written

    writer = asyncio.create_task(keep_writing())
    try:
        assert await machine.drain()
    finally:
        is_learned = True
        written = await writer
    known = await machine.get_learnings(identity=ADA, limit=10_000)
    known += await machine.get_learnings(identity=ADA, store="conversation", kind="user")
    contents = {item["content"] for item in known}
    assert contents == {f"Said {n}" for n in range(10)} | {f"Written {n}" for n in range(written)}
    assert counted_scopes(learning_database.url) == recounted_scopes(learning_database.url)


# Failures


async def test_a_failed_attempt_is_made_again_later_and_later(
    make: MakeMachine, learning_database: ThrowawayDatabase, heard: list[Event]
) -> None:
    machine = make(model=ScriptedChat(script=["no structured answer"]))
    await _record(machine, a_run(run_id="r1"))
    async with _working(machine):
        await _until(lambda: _named(heard, "learning_attempt_failed"))
        await _until(lambda: [status for status, _ in _jobs(learning_database.url)] == ["todo"])
    ((_, args),) = _jobs(learning_database.url)
    assert args["attempt"] == 2
    assert value(learning_database.url, "SELECT scheduled_at > now() FROM agent_queue.procrastinate_jobs")
    (event,) = _named(heard, "learning_attempt_failed")
    assert event.facts["user_id"] == ADA.user_id
    assert 10 <= event.facts["next_in_seconds"] <= 15
    assert _waiting(learning_database.url) == 1


async def test_a_model_that_fails_for_good_leaves_the_runs_waiting_and_says_so(
    make: MakeMachine,
    learning_database: ThrowawayDatabase,
    heard: list[Event],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(agent.jobs, "_RETRY_SECONDS", 0.01)
    machine = make(model=ScriptedChat(script=["no structured answer"]))
    await _record(machine, a_run(run_id="r1"))
    async with _working(machine):
        await _until(lambda: _named(heard, "learning_failed"))
        await _until(lambda: [status for status, _ in _jobs(learning_database.url)] in ([], ["failed"]))
    delays = [event.facts["next_in_seconds"] for event in _named(heard, "learning_attempt_failed")]
    assert len(delays) == 5
    assert all(0.01 * 2**n <= delay <= 0.015 * 2**n for n, delay in enumerate(delays))
    (failed,) = _named(heard, "learning_failed")
    assert failed.facts["attempts"] == 6
    assert failed.facts["session_id"] == "s1"
    assert _waiting(learning_database.url) == 1
    assert value(learning_database.url, "SELECT count(*) FROM agent_memory") == 0

    # With the next run of the session both are learned.
    healthy = make(model=ScriptedChat(script=[LEARNED_NOTHING]))
    await _record(healthy, a_run(run_id="r2"))
    async with _working(healthy):
        await _until(lambda: _waiting(learning_database.url) == 0)
    assert [event.facts["runs"] for event in _named(heard, "session_learned")] == [2]


async def test_one_session_that_fails_does_not_hold_up_the_others(
    make: MakeMachine, learning_database: ThrowawayDatabase, heard: list[Event]
) -> None:
    def answer(messages: Any) -> Any:
        return "nonsense" if "poison" in messages[-1].text else LEARNED_NOTHING

    machine = make(model=ScriptedChat(script=[answer]))
    await _record(machine, a_run("poison", run_id="p1"), ADA.with_(session_id="bad"))
    for number in range(5):
        await _record(machine, a_run("fine"), ADA.with_(session_id=f"s{number}"))
    async with _working(machine):
        await _until(lambda: _waiting(learning_database.url) == 1)
        await _until(lambda: _named(heard, "learning_attempt_failed"))
    assert rows(learning_database.url, "SELECT run_id FROM agent_run WHERE learned_at IS NULL") == [("p1",)]


async def test_an_order_that_cannot_be_read_does_not_stop_the_worker(
    make: MakeMachine, learning_database: ThrowawayDatabase, heard: list[Event]
) -> None:
    for args in (
        '{"identity": {"user_id": ""}}',
        '{"identity": {"user_id": "ada", "shoe_size": 7}}',
        '{"identity": "ada"}',
        "{}",
        '{"identity": {}, "unknown": 1}',
    ):
        rows(
            learning_database.url,
            "INSERT INTO agent_queue.procrastinate_jobs (queue_name, task_name, args, scheduled_at) "
            "VALUES ('learning', 'agent.learn_session', %s, now())",
            args,
        )
    rows(
        learning_database.url,
        "INSERT INTO agent_queue.procrastinate_jobs (queue_name, task_name, scheduled_at) "
        "VALUES ('learning', 'agent.unheard_of', now())",
    )
    machine = make()
    await _record(machine, a_run())
    async with _working(machine):
        await _until(lambda: _waiting(learning_database.url) == 0)
        await _until(lambda: {status for status, _ in _jobs(learning_database.url)} == {"failed"})
    assert len(_jobs(learning_database.url)) == 6


async def test_whatever_ends_a_job_is_told(
    make: MakeMachine,
    learning_database: ThrowawayDatabase,
    heard: list[Event],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine = make()

    async def break_down(identity: Identity) -> int:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(machine, "learn_session", break_down)
    await _record(machine, a_run())
    async with _working(machine):
        await _until(lambda: _named(heard, "learning_failed"))
    (event,) = _named(heard, "learning_failed")
    assert "ZeroDivisionError" in event.facts["error"]
    assert event.facts["session_id"] == "s1"


# Dead workers


def _seize(url: str, heartbeat: str | None) -> int:
    """Have all jobs done by a worker that is not there, last heard of so long ago. Returns a job's id."""
    worker = None
    if heartbeat is not None:
        worker = value(
            url,
            "INSERT INTO agent_queue.procrastinate_workers (last_heartbeat) VALUES (now() - %s::interval) RETURNING id",
            heartbeat,
        )
    found: int = value(
        url, "UPDATE agent_queue.procrastinate_jobs SET status = 'doing', worker_id = %s RETURNING id", worker
    )
    return found


@pytest.mark.parametrize("heartbeat", ["31 seconds", "1 year", None])
async def test_the_job_of_a_dead_worker_is_done_by_another(
    make: MakeMachine, learning_database: ThrowawayDatabase, heard: list[Event], heartbeat: str | None
) -> None:
    machine = make()
    await _record(machine, a_run("Fact", run_id="r1"))
    _seize(learning_database.url, heartbeat)
    async with _working(machine):
        await _until(lambda: _waiting(learning_database.url) == 0)
        await _until(lambda: _jobs(learning_database.url) == [])
    assert [event.facts["jobs"] for event in _named(heard, "jobs_rescued")] == [1]
    _assert_each_run_learned_once(learning_database.url, 1)


async def test_the_job_of_a_living_worker_is_left_to_it(
    make: MakeMachine, learning_database: ThrowawayDatabase
) -> None:
    machine = make()
    await _record(machine, a_run())
    job_id = _seize(learning_database.url, "5 seconds")
    assert await machine.database.call("rescue_learning", stalled_seconds=30.0) == 0
    assert rows(learning_database.url, "SELECT id, status::text FROM agent_queue.procrastinate_jobs") == [
        (job_id, "doing")
    ]
    assert await machine.database.call("rescue_learning", stalled_seconds=4.0) == 1


async def test_a_rescued_job_goes_where_its_session_is_ordered_already(
    make: MakeMachine, learning_database: ThrowawayDatabase
) -> None:
    machine = make({"quiet_period": NEVER})
    await _record(machine, a_run(run_id="r1"))
    _seize(learning_database.url, None)
    await _record(machine, a_run(run_id="r2"))
    assert [status for status, _ in _jobs(learning_database.url)] == ["doing", "todo"]
    assert await machine.database.call("rescue_learning", stalled_seconds=30.0) == 1
    assert [status for status, _ in _jobs(learning_database.url)] == ["todo"]


async def test_a_worker_that_was_only_thought_dead_takes_no_order_away(
    make: MakeMachine, learning_database: ThrowawayDatabase
) -> None:
    machine = make()
    await _record(machine, a_run("First", run_id="r1"))
    job_id = _seize(learning_database.url, "1 hour")
    assert await machine.learn_session(ADA) == 1, "it comes back to life and learns"
    assert await machine.database.call("rescue_learning", stalled_seconds=30.0) == 1
    await _record(machine, a_run("Second", run_id="r2"))
    with pytest.raises(psycopg.errors.RaiseException, match="Job was not found"):  # and says that it is done
        rows(
            learning_database.url,
            "SELECT agent_queue.procrastinate_finish_job_v1(%s, 'succeeded', true)", job_id,
        )  # fmt: skip
    async with _working(machine):
        await _until(lambda: _waiting(learning_database.url) == 0)
    _assert_each_run_learned_once(learning_database.url, 2)


async def test_a_worker_whose_connections_are_cut_goes_on(
    make: MakeMachine, learning_database: ThrowawayDatabase, heard: list[Event]
) -> None:
    machine = make({"stalled_after": timedelta(seconds=2)})
    recorded = 0
    async with _working(machine, workers=2, stalled_after=timedelta(seconds=2)):
        for _ in range(3):
            for session in range(5):
                run = a_run(f"Fact {recorded}", run_id=f"r{recorded}")
                assert await _record(machine, run, ADA.with_(session_id=f"s{session}"))
                recorded += 1
            rows(
                learning_database.url,
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE datname = current_database() AND pid <> pg_backend_pid()",
            )
            await _until(lambda: _waiting(learning_database.url) == 0)
    _assert_each_run_learned_once(learning_database.url, recorded)
    assert _named(heard, "worker_failed") == []


async def test_a_worker_comes_back_after_the_database_was_away(
    make: MakeMachine,
    learning_database: ThrowawayDatabase,
    heard: list[Event],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(agent.jobs, "_CONNECTION_SECONDS_MAX", 1.0)
    monkeypatch.setattr(agent.jobs, "_SPOOL_INTERVAL", timedelta(seconds=1))
    machine = make({"worker": WorkerMode.INSIDE, "stalled_after": timedelta(seconds=2)})
    await _record(machine, a_run("Before", run_id="r1"))
    await _until(lambda: _waiting(learning_database.url) == 0)

    async with database_away(learning_database):
        await _until(lambda: _named(heard, "worker_database_unavailable"))
        assert not await _record(machine, a_run("Meanwhile", run_id="r2"))
        assert machine.recorder.spool.count() == 1
    await _until(lambda: value(learning_database.url, "SELECT count(*) FROM agent_run") == 2)
    await _until(lambda: _waiting(learning_database.url) == 0)

    _assert_each_run_learned_once(learning_database.url, 2)
    assert machine.recorder.spool.count() == 0


@asynccontextmanager
async def database_away(database: ThrowawayDatabase) -> AsyncIterator[None]:
    """Nobody can connect, and whoever was connected is no more."""
    elsewhere = database.url.replace(f"/{database.name}?", "/postgres?")
    rows(elsewhere, f"ALTER DATABASE {database.name} ALLOW_CONNECTIONS false")
    rows(
        elsewhere, "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", database.name
    )
    try:
        yield
    finally:
        rows(elsewhere, f"ALTER DATABASE {database.name} ALLOW_CONNECTIONS true")


# Queues and workers of several machines


async def test_each_machine_learns_what_its_agent_recorded(
    make: MakeMachine, learning_database: ThrowawayDatabase
) -> None:
    sales = make(agent_id="sales", model=ScriptedChat(script=[LEARNED_NOTHING]))
    billing = make(agent_id="billing " + "x" * 300, model=ScriptedChat(script=[LEARNED_NOTHING]))
    await _record(sales, a_run("To sales"))
    await _record(billing, a_run("To billing"), ADA.with_(session_id="s2"))
    await _record(make(), a_run("To nobody in particular"), ADA.with_(session_id="s3"))
    async with _working(sales, billing):
        await _until(lambda: _waiting(learning_database.url) == 0)
    assert isinstance(sales._model_named, ScriptedChat)
    assert isinstance(billing._model_named, ScriptedChat)
    seen = [call.messages[-1].text for call in sales._model_named.calls]
    assert len(seen) == 2
    assert any("To sales" in text for text in seen)
    assert any("To nobody" in text for text in seen), "the first also learns what no other claims"
    assert ["To billing" in call.messages[-1].text for call in billing._model_named.calls] == [True]


async def test_where_a_worker_lives_already_none_is_started_here(
    make: MakeMachine, learning_database: ThrowawayDatabase
) -> None:
    rows(learning_database.url, "INSERT INTO agent_queue.procrastinate_workers DEFAULT VALUES")
    machine = make({"worker": WorkerMode.AUTO, "quiet_period": NEVER})
    await _record(machine, a_run())
    await asyncio.sleep(1)
    assert value(learning_database.url, "SELECT count(*) FROM agent_queue.procrastinate_workers") == 1
    inside = make({"worker": WorkerMode.INSIDE, "quiet_period": NEVER})
    await _record(inside, a_run())
    await _until(
        lambda: value(learning_database.url, "SELECT count(*) FROM agent_queue.procrastinate_workers") == 2
    )


async def test_a_worker_needs_a_machine_and_room(make: MakeMachine) -> None:
    with pytest.raises(ConfigurationError, match="LearningMachine"):
        Worker("postgresql://x", [], queues=None, concurrency=1, stalled_after=NEVER)
    with pytest.raises(ConfigurationError, match="concurrency=0"):
        Worker("postgresql://x", [make()], queues=None, concurrency=0, stalled_after=NEVER)


# drain


@pytest.mark.parametrize("mode", [WorkerMode.INSIDE, WorkerMode.AUTO])
async def test_draining_waits_until_all_is_learned_and_for_no_quiet_period(
    make: MakeMachine, learning_database: ThrowawayDatabase, mode: WorkerMode
) -> None:
    machine = make({"worker": mode, "quiet_period": NEVER})
    for number in range(10):
        identity = ADA.with_(session_id=f"s{number % 3}")
        if number % 2:
            await _record(machine, a_run(f"Fact {number}"), identity)
        else:
            machine.record_later(identity, a_run(f"Fact {number}"))
    assert await machine.drain()
    assert value(learning_database.url, "SELECT count(*) FROM agent_run") == 10
    _assert_each_run_learned_once(learning_database.url, 10)
    assert await machine.drain(), "again: nothing to wait for"


async def test_draining_by_the_sync_door(make: MakeMachine, learning_database: ThrowawayDatabase) -> None:
    machine = make({"worker": WorkerMode.INSIDE, "quiet_period": NEVER})
    machine.record_later(ADA, a_run("Fact"))
    assert await asyncio.to_thread(machine.drain_sync)
    _assert_each_run_learned_once(learning_database.url, 1)


async def test_draining_where_nobody_learns_says_that_it_is_not_done(
    make: MakeMachine, learning_database: ThrowawayDatabase
) -> None:
    machine = make({"worker": WorkerMode.OFF, "quiet_period": NEVER})
    machine.record_later(ADA, a_run())
    assert not await machine.drain(timedelta(seconds=0.5))
    assert _waiting(learning_database.url) == 1


async def test_draining_with_a_model_that_fails_says_that_it_is_not_done(
    make: MakeMachine, learning_database: ThrowawayDatabase, heard: list[Event]
) -> None:
    machine = make({"worker": WorkerMode.INSIDE}, model=ScriptedChat(script=["nonsense"]))
    await _record(machine, a_run())
    assert not await machine.drain()
    assert _waiting(learning_database.url) == 1
    assert _named(heard, "learning_failed") == [], "what a hurry could not bring is tried again later"
    assert [status for status, _ in _jobs(learning_database.url)] == ["todo"]
    assert value(learning_database.url, "SELECT scheduled_at > now() FROM agent_queue.procrastinate_jobs")


async def test_draining_waits_for_what_another_process_learns(
    make: MakeMachine, learning_database: ThrowawayDatabase
) -> None:
    recording = make({"worker": WorkerMode.AUTO, "quiet_period": NEVER})
    learning = make()
    async with _working(learning):
        await _until(
            lambda: value(learning_database.url, "SELECT count(*) FROM agent_queue.procrastinate_workers")
        )
        await _record(recording, a_run("Fact"))
        assert await recording.drain()
    _assert_each_run_learned_once(learning_database.url, 1)


# Programs that end

_SCRIPT = """
import sys
from langchain.agents import create_agent
from agent import LearningMiddleware
from agent.testing import ScriptedChat

def answer(messages):
    if "fail" in messages[-1].text:
        raise RuntimeError("the model broke")
    return "\\n".join(m.text for m in messages if m.type == "system") or "I know nothing."

model = ScriptedChat(script=[answer])
agent = create_agent(model, [], middleware=[LearningMiddleware()])
config = {"configurable": {"thread_id": sys.argv[1], "user_id": "ada"}}
print(agent.invoke({"messages": [("user", sys.argv[2])]}, config)["messages"][-1].text)
"""


def _environment(database: ThrowawayDatabase, folder: Path, **more: str) -> dict[str, str]:
    """That of a program, in a folder of its own."""
    return {
        "PATH": os.environ["PATH"],
        "HOME": str(folder),
        "DATABASE_URL": database.url,
        "LEARNING_DATA_DIR": str(folder / ".agent"),
        "LEARNING_EXIT_TIMEOUT": "60",
        **more,
    }


def _run_script(
    database: ThrowawayDatabase, folder: Path, *arguments: str, script: str = _SCRIPT, **more: str
) -> str:
    """Run a program to its end, as a user would; returns what it printed."""
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *arguments],
        cwd=folder,
        env=_environment(database, folder, **more),
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    return ran.stdout + ran.stderr


def test_a_plain_script_learns_what_it_recorded_and_the_next_one_knows(
    learning_database: ThrowawayDatabase, tmp_path: Path
) -> None:
    first = _run_script(learning_database, tmp_path, "one", "My parrot is called Polly")
    assert "I know nothing." in first
    _assert_each_run_learned_once(learning_database.url, 1)
    assert value(learning_database.url, "SELECT count(*) FROM agent_queue.procrastinate_workers") == 0

    second = _run_script(learning_database, tmp_path, "two", "What do you know about my parrot?")
    assert "My parrot is called Polly" in second
    assert "Traceback" not in first + second


def test_a_plain_script_without_a_worker_leaves_its_runs_waiting(
    learning_database: ThrowawayDatabase, tmp_path: Path
) -> None:
    said = _run_script(learning_database, tmp_path, "one", "My parrot is called Polly", LEARNING_WORKER="off")
    assert "I know nothing." in said
    assert _waiting(learning_database.url) == 1
    assert [status for status, _ in _jobs(learning_database.url)] == ["todo"]
    assert value(learning_database.url, "SELECT scheduled_at > now() FROM agent_queue.procrastinate_jobs")


@pytest.mark.parametrize("mode", ["auto", "off"])
def test_a_script_that_breaks_off_has_its_failed_run_recorded(
    learning_database: ThrowawayDatabase, tmp_path: Path, mode: str
) -> None:
    said = _run_script(learning_database, tmp_path, "one", "please fail", LEARNING_WORKER=mode)
    assert "RuntimeError: the model broke" in said
    recorded = rows(learning_database.url, "SELECT status, error FROM agent_run")
    assert recorded == [("failed", "RuntimeError: the model broke")]


@pytest.mark.parametrize("mode", ["auto", "off"])
def test_a_program_that_ends_waits_until_its_runs_are_recorded(
    learning_database: ThrowawayDatabase, tmp_path: Path, mode: str
) -> None:
    script = """
        import json, sys
        from agent import Identity, LearningMachine
        LearningMachine().record_later(Identity(user_id="ada", session_id="s"), json.loads(sys.argv[1]))
        print("ends")
    """
    with psycopg.connect(learning_database.url) as connection:
        connection.execute("LOCK TABLE agent_run IN EXCLUSIVE MODE")
        unlock = threading.Timer(5, connection.rollback)  # long after the script has come to its end
        unlock.start()
        run = json.dumps(a_run(status="failed"))
        said = _run_script(learning_database, tmp_path, run, script=script, LEARNING_WORKER=mode)
        unlock.join()
    assert said == "ends\n"
    assert value(learning_database.url, "SELECT count(*) FROM agent_run") == 1


@pytest.mark.parametrize("mode", ["auto", "off"])
def test_a_program_that_ends_at_once_has_the_run_of_its_last_answer_recorded(
    learning_database: ThrowawayDatabase, tmp_path: Path, mode: str
) -> None:
    environment = _environment(learning_database, tmp_path, LEARNING_WORKER=mode)
    with psycopg.connect(learning_database.url) as connection:
        connection.execute("LOCK TABLE agent_run IN EXCLUSIVE MODE")
        with subprocess.Popen(
            [sys.executable, "-u", "-c", _SCRIPT, "one", "My parrot is called Polly"],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        ) as program:
            try:
                assert program.stdout is not None
                assert program.stdout.readline() == "I know nothing.\n", "though no run can be recorded now"
                with pytest.raises(subprocess.TimeoutExpired):
                    program.wait(2)  # far longer than it takes to leave with nothing to wait for
                connection.rollback()
                program.communicate(timeout=100)
            finally:
                program.kill()
    assert program.returncode == 0
    assert rows(learning_database.url, "SELECT status, user_id FROM agent_run") == [("completed", "ada")]
    assert list((tmp_path / ".agent").glob("spool/*.json")) == []


def test_a_worker_program_leaves_on_request_with_the_job_at_hand_done(
    learning_database: ThrowawayDatabase, tmp_path: Path
) -> None:
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "DATABASE_URL": learning_database.url,
        "LEARNING_DATA_DIR": str(tmp_path / ".agent"),
        "LEARNING_MODEL": "none",
    }
    machine = LearningMachine(settings=learning_database.settings)
    with subprocess.Popen(
        [sys.executable, "-m", "agent.cli", "worker"],
        cwd=tmp_path,
        env=environment,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as program:
        try:
            portal().run_sync(machine.record(ADA, a_run("Fact")))
            for _ in range(600):
                if _waiting(learning_database.url) == 0:
                    break
                assert program.poll() is None, program.stderr and program.stderr.read()
                signal.sigtimedwait([], 0.1)
            program.send_signal(signal.SIGTERM)
            _, said = program.communicate(timeout=60)
        finally:
            program.kill()
            portal().run_sync(machine.aclose())
    assert program.returncode == 0, said
    assert "Traceback" not in said
    _assert_each_run_learned_once(learning_database.url, 1)
    assert value(learning_database.url, "SELECT count(*) FROM agent_queue.procrastinate_workers") == 0


# Erasure and the queue


async def test_erasing_a_user_takes_their_orders_those_at_work_too(
    make: MakeMachine, learning_database: ThrowawayDatabase
) -> None:
    machine = make({"quiet_period": NEVER})
    await _record(machine, a_run(run_id="r1"))
    _seize(learning_database.url, "1 second")
    await _record(machine, a_run(run_id="r2"))
    await _record(machine, a_run(run_id="b1"), Identity(user_id="bob", session_id="s1"))
    gone = await machine.database.call("erase_user", ADA)
    assert gone["procrastinate_jobs"] == 2
    assert [args["identity"]["user_id"] for _, args in _jobs(learning_database.url)] == ["bob"]


async def test_erasing_a_user_while_they_are_learned_leaves_nothing_of_them(
    make: MakeMachine, learning_database: ThrowawayDatabase, heard: list[Event]
) -> None:
    model = ScriptedChat(script=[LEARNED_NOTHING], delay=timedelta(seconds=1))
    machine = make(model=model)
    async with _working(machine):
        await _record(machine, a_run("My secret"))
        await _until(lambda: model.calls)
        await machine.database.call("erase_user", ADA)
        await machine.database.call("upsert_learning", ADA.with_(user_id="bob"), learning=memory("Of Bob"))
    assert value(learning_database.url, "SELECT count(*) FROM agent_run") == 0
    assert rows(learning_database.url, "SELECT owner_id FROM agent_memory") == [("bob",)]
    await _until(lambda: _jobs(learning_database.url) == [])
