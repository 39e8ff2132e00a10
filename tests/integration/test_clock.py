"""Clocks: the work of every slot is done once, by whichever replica, whatever fails in between."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import datetime, timedelta
from typing import Any

import psycopg
import pytest

from agent.clock import Clock, HandedBack, Tick
from agent.database.postgres import PostgresDatabase
from agent.errors import ConfigurationError, InvalidLearning
from agent.events import Event, listening
from agent.identity import Identity
from agent.jobs import Worker, run_forever
from agent.settings import Settings
from agent.testing.throwaway import ThrowawayDatabase
from tests.integration.rows import rows, value

HOUR = timedelta(hours=1)
SERVER = Identity(tenant_id="default")

MakeClock = Callable[..., Clock]


@pytest.fixture
async def database(learning_database: ThrowawayDatabase) -> AsyncIterator[PostgresDatabase]:
    """The transport to `learning_database`."""
    database = PostgresDatabase(learning_database.url, connections_max=20)
    yield database
    await database.close()


@pytest.fixture
def settings(learning_database: ThrowawayDatabase) -> Settings:
    """For clocks that take over soon from the dead."""
    return learning_database.settings.model_copy(
        update={"stalled_after": timedelta(seconds=1.5), "exit_timeout": timedelta(seconds=1)}
    )


@pytest.fixture
async def make(database: PostgresDatabase, settings: Settings) -> AsyncIterator[MakeClock]:
    """Makes clocks on `learning_database`; stopped afterwards."""
    made: list[Clock] = []

    def make(
        cycle: Callable[[Tick], Any], interval: timedelta = HOUR, name: str = "trial", **of: Any
    ) -> Clock:
        given = {"database": database, "settings": settings, **of}
        made.append(Clock(name, interval, cycle=cycle, **given))
        return made[-1]

    yield make
    await asyncio.gather(*(clock.stop() for clock in made))


@pytest.fixture
def heard() -> Iterator[list[Event]]:
    """Every event of the test."""
    events: list[Event] = []
    with listening(events.append):
        yield events


def _names(events: list[Event]) -> list[str]:
    return [event.name for event in events]


async def _until(condition: Callable[[], Any], seconds: float = 30) -> None:
    loop = asyncio.get_running_loop()
    end = loop.time() + seconds
    while not condition():
        assert loop.time() < end, "it did not come"
        await asyncio.sleep(0.03)


def _states(url: str) -> list[str]:
    return [state for (state,) in rows(url, "SELECT state FROM agent_tick ORDER BY slot")]


def _jobs(url: str) -> int:
    found: int = value(url, "SELECT count(*) FROM agent_queue.procrastinate_jobs")
    return found


class _Noted:
    """A cycle that notes its ticks."""

    def __init__(self) -> None:
        self.ticks: list[Tick] = []

    async def __call__(self, tick: Tick) -> None:
        self.ticks.append(tick)


async def _tick(
    database: PostgresDatabase, clock: str = "trial", seconds: float = 3600.0, replica: str = "a"
) -> Any:
    return await database.call("tick", SERVER, the_clock=clock, interval_seconds=seconds, replica=replica)


async def _take(database: PostgresDatabase, worker: str = "a", lease: float = 60.0, attempts: int = 5) -> Any:
    return await database.call(
        "take_tick", SERVER, the_clock="trial", worker=worker, lease_seconds=lease, attempts_max=attempts
    )


async def _finish(database: PostgresDatabase, taken: Any, state: str = "done", **details: Any) -> Any:
    which = {"slot": taken["slot"], "attempt": taken["attempt"]}
    return await database.call("finish_tick", SERVER, the_clock="trial", the_state=state, **which, **details)


# Claiming


async def test_of_twenty_replicas_that_tick_at_once_one_claims_the_slot_and_orders_its_work(
    database: PostgresDatabase, learning_database: ThrowawayDatabase
) -> None:
    ticked = await asyncio.gather(*(_tick(database, replica=f"replica {n}") for n in range(20)))

    assert sum(each["claimed"] for each in ticked) == 1
    assert {each["queue"] for each in ticked} == {ticked[0]["queue"]}
    assert _states(learning_database.url) == ["todo"]
    assert rows(
        learning_database.url, "SELECT queue_name, task_name, args FROM agent_queue.procrastinate_jobs"
    ) == [(ticked[0]["queue"], "agent.tick", {"identity": {"tenant_id": "default"}, "clock": "trial"})]
    assert value(learning_database.url, "SELECT count(*) FROM agent_clock") == 20


async def test_of_twenty_workers_that_take_a_tick_at_once_one_gets_it(database: PostgresDatabase) -> None:
    await _tick(database)
    taken = await asyncio.gather(*(_take(database, f"worker {n}") for n in range(20)))
    assert [each["attempt"] for each in taken if each] == [1]


async def test_slots_begin_at_multiples_of_the_interval_and_clocks_do_not_share_them(
    database: PostgresDatabase,
) -> None:
    for clock, seconds in (("one", 3600.0), ("two", 300.0), ("three", 7.0)):
        ticked = await _tick(database, clock, seconds)
        assert ticked["claimed"]
        assert datetime.fromisoformat(ticked["slot"]).timestamp() % seconds == pytest.approx(0, abs=1e-6)
        assert not (await _tick(database, clock, seconds))["claimed"]


async def test_hours_in_which_nobody_ticked_give_one_tick(
    database: PostgresDatabase, learning_database: ThrowawayDatabase
) -> None:
    await _tick(database)
    rows(learning_database.url, "UPDATE agent_tick SET slot = slot - interval '5 hours'")
    assert not (await _tick(database))["claimed"], "the one that waits does for the time since"
    assert await _take(database) is not None
    assert (await _tick(database))["claimed"], "while it is worked on, the next may wait"
    assert not (await _tick(database))["claimed"]
    assert _states(learning_database.url) == ["doing", "todo"]


async def test_a_later_tick_waits_until_the_earlier_is_over(
    database: PostgresDatabase, learning_database: ThrowawayDatabase
) -> None:
    await _tick(database)
    rows(learning_database.url, "UPDATE agent_tick SET slot = slot - interval '1 hour'")
    first = await _take(database)
    await _tick(database)
    assert await _take(database, "b") is None
    assert await _finish(database, first)
    second = await _take(database, "b")
    assert second["slot"] > first["slot"]


async def test_the_order_of_a_tick_that_got_lost_is_made_anew(
    database: PostgresDatabase, learning_database: ThrowawayDatabase
) -> None:
    await _tick(database)
    rows(learning_database.url, "DELETE FROM agent_queue.procrastinate_jobs")
    assert (await _tick(database))["open"]
    assert _jobs(learning_database.url) == 1


async def test_a_tick_whose_worker_is_silent_is_taken_over_and_the_silent_one_cannot_end_it(
    database: PostgresDatabase, learning_database: ThrowawayDatabase
) -> None:
    await _tick(database)
    silent = await _take(database, "silent", lease=0.0)
    keeper = await _take(database, "b")
    assert (silent["attempt"], keeper["attempt"]) == (1, 2)
    for taken, is_kept in ((silent, False), (keeper, True)):
        assert is_kept is await database.call(
            "keep_tick", SERVER, the_clock="trial", slot=taken["slot"], attempt=taken["attempt"], lease_seconds=60.0
        )  # fmt: skip
    assert not await _finish(database, silent)
    assert await _finish(database, keeper)
    assert await _finish(database, keeper), "told twice"
    assert rows(learning_database.url, "SELECT state, worker, attempts FROM agent_tick") == [("done", "b", 2)]


async def test_a_tick_that_ends_its_workers_fails_after_some(
    database: PostgresDatabase, learning_database: ThrowawayDatabase
) -> None:
    await _tick(database)
    for _ in range(3):
        assert (await _take(database, lease=0.0, attempts=3))["state"] == "doing"
    assert (await _take(database, attempts=3))["state"] == "failed"
    assert await _take(database) is None
    assert rows(learning_database.url, "SELECT state, error FROM agent_tick") == [
        ("failed", "each worker that began it went away")
    ]


async def test_handing_back_is_no_try_and_a_failure_is_one_that_waits(database: PostgresDatabase) -> None:
    await _tick(database)
    await _finish(database, await _take(database), "todo")
    taken = await _take(database)
    assert taken["attempt"] == 1
    await _finish(database, taken, "todo", error="E", delay_seconds=60.0)
    assert await _take(database) is None
    assert not (await _tick(database))["open"]


async def test_an_interval_or_an_end_that_cannot_be_is_refused(database: PostgresDatabase) -> None:
    for seconds in (0.0, -1.0, float("nan")):
        with pytest.raises(InvalidLearning):
            await _tick(database, seconds=seconds)
    await _tick(database)
    with pytest.raises(InvalidLearning, match="done, failed or todo"):
        await _finish(database, await _take(database), "doing")


# Clocks


async def test_replicas_do_each_slot_once_and_in_order(
    make: MakeClock, learning_database: ThrowawayDatabase
) -> None:
    noted = _Noted()
    clocks = [make(noted, timedelta(seconds=0.5)) for _ in range(3)]
    await asyncio.gather(*(clock.start() for clock in clocks))
    await _until(lambda: len(noted.ticks) >= 4)
    await asyncio.gather(*(clock.stop() for clock in clocks))

    slots = [tick.slot for tick in noted.ticks]
    assert slots == sorted(set(slots))
    assert {tick.attempt for tick in noted.ticks} == {1}
    assert value(learning_database.url, "SELECT count(*) FROM agent_tick WHERE state = 'done'") == len(slots)
    assert value(learning_database.url, "SELECT count(*) FROM agent_clock") == 0, "who left is not counted"


async def test_a_clock_catches_up_when_it_starts(
    make: MakeClock, database: PostgresDatabase, learning_database: ThrowawayDatabase
) -> None:
    await _tick(database)
    rows(learning_database.url, "DELETE FROM agent_queue.procrastinate_jobs")
    noted = _Noted()
    clock = make(noted)
    await clock.start()
    await clock.start()
    await _until(lambda: _states(learning_database.url) == ["done"])
    assert len(noted.ticks) == 1
    again = make(noted)
    await again.start()
    await _until(lambda: value(learning_database.url, "SELECT count(*) FROM agent_clock") == 3)
    await again.stop()
    assert len(noted.ticks) == 1, "what was done is not done again"


async def test_a_cycle_that_fails_is_tried_again_and_told_of(
    make: MakeClock, learning_database: ThrowawayDatabase, heard: list[Event]
) -> None:
    attempts: list[int] = []

    async def cycle(tick: Tick) -> None:
        attempts.append(tick.attempt)
        if tick.attempt < 3:
            raise ValueError("not yet")

    clock = make(cycle, timedelta(seconds=2))
    await clock.start()
    await _until(lambda: "done" in _states(learning_database.url))
    await clock.stop()
    assert attempts[:3] == [1, 2, 3]
    failed = [event.facts for event in heard if event.name == "tick_attempt_failed"]
    assert [facts["error"] for facts in failed[:2]] == ["ValueError: not yet"] * 2


async def test_a_cycle_that_keeps_failing_ends_as_failed(
    make: MakeClock, learning_database: ThrowawayDatabase, heard: list[Event]
) -> None:
    async def cycle(tick: Tick) -> None:
        raise ValueError("never")

    clock = make(cycle, timedelta(seconds=1))
    await clock.start()
    await _until(lambda: "failed" in _states(learning_database.url))
    await clock.stop()
    assert "tick_failed" in _names(heard)
    assert rows(learning_database.url, "SELECT attempts, error FROM agent_tick WHERE state = 'failed'")[
        0
    ] == (
        5,
        "ValueError: never",
    )


async def test_stopping_hands_the_tick_back_for_another_replica(
    make: MakeClock, learning_database: ThrowawayDatabase
) -> None:
    begun: list[str] = []

    async def polite(tick: Tick) -> None:
        begun.append("polite")
        while not tick.is_stopping:  # noqa: ASYNC110 - as a cycle looks between its steps
            await asyncio.sleep(0.01)
        raise HandedBack

    async def stubborn(tick: Tick) -> None:
        begun.append("stubborn")
        await asyncio.Event().wait()

    for cycle in (polite, stubborn):
        clock = make(cycle)
        await clock.start()
        await _until(lambda: cycle.__name__ in begun)  # noqa: B023 - awaited here
        await clock.stop()
        assert _states(learning_database.url) == ["todo"]
    noted = _Noted()
    await make(noted).start()
    await _until(lambda: _states(learning_database.url) == ["done"])
    assert [tick.attempt for tick in noted.ticks] == [1], "nobody failed"


async def test_a_clock_whose_database_comes_and_goes_ticks_on(
    make: MakeClock, learning_database: ThrowawayDatabase, heard: list[Event]
) -> None:
    noted = _Noted()
    clock = make(noted, timedelta(seconds=0.4))
    name = psycopg.sql.Identifier(learning_database.name)

    def allow(connections: bool) -> None:
        # Of the server's own database: it lets nobody in, and ends who is in.
        other = learning_database.url.replace(learning_database.name, "postgres")
        with psycopg.connect(other, autocommit=True) as connection:
            connection.execute(
                psycopg.sql.SQL("ALTER DATABASE {} ALLOW_CONNECTIONS {}").format(name, connections)
            )
            if not connections:
                connection.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s",
                    [learning_database.name],
                )

    await asyncio.to_thread(allow, False)
    try:
        await clock.start()
        await _until(lambda: "clock_unavailable" in _names(heard))
        await asyncio.to_thread(allow, True)
        await _until(lambda: len(noted.ticks) >= 2)
        await asyncio.to_thread(allow, False)
        await _until(lambda: _names(heard).count("clock_unavailable") == 2)
    finally:
        await asyncio.to_thread(allow, True)
    before = len(noted.ticks)
    await _until(lambda: len(noted.ticks) >= before + 2)
    assert _names(heard).count("clock_recovered") == 2
    await clock.stop()
    slots = [tick.slot for tick in noted.ticks]
    assert slots == sorted(slots)


async def test_a_worker_of_all_queues_gives_the_ticks_of_other_clocks_back(
    make: MakeClock, database: PostgresDatabase, settings: Settings, learning_database: ThrowawayDatabase
) -> None:
    worker = Worker(
        learning_database.url, [], queues=None, concurrency=1, stalled_after=settings.stalled_after, database=database
    )  # fmt: skip
    working = asyncio.create_task(run_forever(worker))
    await _tick(database)
    await _until(
        lambda: (
            rows(learning_database.url, "SELECT attempts, status::text FROM agent_queue.procrastinate_jobs")
            == [(1, "todo")]
        )
    )
    worker.stop(timedelta(seconds=5))
    await working
    noted = _Noted()
    await make(noted).start()
    await _until(lambda: len(noted.ticks) == 1)


async def test_the_worker_of_a_clock_does_not_count_for_the_queue_of_learning(
    make: MakeClock, database: PostgresDatabase, learning_database: ThrowawayDatabase
) -> None:
    noted = _Noted()
    await make(noted).start()
    await _until(lambda: len(noted.ticks) == 1)
    assert value(learning_database.url, "SELECT count(*) FROM agent_queue.procrastinate_workers") == 1
    # It says its queues beside its first work; until then it is taken for one of all.
    await _until(lambda: value(learning_database.url, "SELECT count(*) FROM agent_queue.agent_worker") == 1)
    assert (await database.call("queue_state", the_queue="learning"))["workers"] == 0


# The worker of several clocks


def _queue_connections(url: str) -> int:
    found: int = value(
        url,
        "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'agent-queue' AND datname = current_database()",
    )
    return found


async def test_the_clocks_of_a_process_share_one_worker_with_one_connection_until_the_last_stops(
    make: MakeClock, learning_database: ThrowawayDatabase
) -> None:
    url = learning_database.url
    noted = {name: _Noted() for name in ("one", "two", "three")}
    clocks = [make(cycle, name=name) for name, cycle in noted.items()]
    await asyncio.gather(*(clock.start() for clock in clocks[:2]))
    await _until(lambda: noted["one"].ticks and noted["two"].ticks)
    await clocks[2].start()
    await _until(lambda: noted["three"].ticks)

    assert value(url, "SELECT count(*) FROM agent_queue.procrastinate_workers") == 1
    assert _queue_connections(url) == 1
    await _until(lambda: value(url, "SELECT cardinality(queues) FROM agent_queue.agent_worker") == 3)
    for clock in clocks[:2]:
        await clock.stop()
    await _until(lambda: value(url, "SELECT cardinality(queues) FROM agent_queue.agent_worker") == 1)
    await clocks[2].stop()
    assert value(url, "SELECT count(*) FROM agent_queue.procrastinate_workers") == 0
    await _until(lambda: _queue_connections(url) == 0)
    assert _jobs(url) == 0


async def test_a_clock_whose_cycle_takes_long_holds_up_no_other(
    make: MakeClock, learning_database: ThrowawayDatabase
) -> None:
    begun = asyncio.Event()

    async def endless(tick: Tick) -> None:
        begun.set()
        await asyncio.Event().wait()

    slow, noted = make(endless, name="slow"), _Noted()
    await slow.start()
    await _until(begun.is_set)
    quick = make(noted, timedelta(seconds=0.5), name="quick")
    await quick.start()
    await _until(lambda: len(noted.ticks) >= 2)
    await slow.stop()
    assert rows(learning_database.url, "SELECT state FROM agent_tick WHERE clock = 'slow'") == [("todo",)]
    so_far = len(noted.ticks)
    await _until(lambda: len(noted.ticks) > so_far)


async def test_of_two_clocks_with_one_name_the_second_goes_on_when_the_first_stops(make: MakeClock) -> None:
    first, second = _Noted(), _Noted()
    clocks = [make(cycle, timedelta(seconds=0.5)) for cycle in (first, second)]
    await clocks[0].start()
    await _until(lambda: first.ticks)
    await clocks[1].start()
    await clocks[0].stop()
    await _until(lambda: second.ticks)


async def test_a_clock_that_starts_while_the_last_one_stops_gets_a_worker(make: MakeClock) -> None:
    first, second = _Noted(), _Noted()
    ending, beginning = make(first, name="ending"), make(second, name="beginning")
    await ending.start()
    await _until(lambda: first.ticks)
    await asyncio.gather(ending.stop(), beginning.start())
    await _until(lambda: second.ticks)


_FORKS = """
import asyncio, os, sys, time, warnings
from datetime import timedelta
from pydantic import SecretStr
from agent.clock import Clock
from agent.database.postgres import PostgresDatabase
from agent.settings import Settings, WorkerMode
warnings.simplefilter("ignore", DeprecationWarning)
settings = Settings(database_url=SecretStr(sys.argv[1]), worker=WorkerMode.OFF)
done = []
async def cycle(tick):
    done.append(os.getpid())
async def ticks(name):
    clock = Clock(name, timedelta(hours=1), database=PostgresDatabase(sys.argv[1]), settings=settings, cycle=cycle)
    await clock.start()
    return clock
def wait(count):
    end = time.monotonic() + 60
    while len(done) < count and time.monotonic() < end:
        time.sleep(0.02)
parents = asyncio.run(ticks("parents"))
wait(1)
child = os.fork()
if not child:
    done.clear()
    childs = asyncio.run(ticks("childs"))
    wait(1)
    asyncio.run(childs.stop())
    os._exit(0 if done == [os.getpid()] and not parents.is_running else 1)
_, status = os.waitpid(child, 0)
second = asyncio.run(ticks("second"))
wait(2)
print(os.waitstatus_to_exitcode(status), done == [os.getpid()] * 2)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_has_a_worker_of_its_own_and_the_parents_goes_on(
    learning_database: ThrowawayDatabase,
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _FORKS, learning_database.url],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert (done.returncode, done.stdout.split()) == (0, ["0", "True"]), done.stderr
    url = learning_database.url
    assert value(url, "SELECT count(*) FROM agent_queue.procrastinate_workers") == 0, "each left"
    assert sorted(rows(url, "SELECT clock, state FROM agent_tick")) == [
        ("childs", "done"), ("parents", "done"), ("second", "done"),
    ]  # fmt: skip


async def test_a_clock_that_stops_while_it_ticks_leaves_quietly(
    make: MakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(5):
        clock = make(_Noted(), timedelta(seconds=0.2))
        await clock.start()
        await asyncio.sleep(0)
        await clock.stop()
    assert [record.message for record in caplog.records if record.exc_info] == []


async def test_the_status_says_who_lives_and_when_the_next_slot_begins(
    make: MakeClock, database: PostgresDatabase
) -> None:
    noted = _Noted()
    clock = make(noted)
    await clock.start()
    await _until(lambda: len(noted.ticks) == 1)
    status = (await database.call("clock_status", SERVER))["trial"]
    assert (status["interval_seconds"], status["replicas"]) == (3600, [clock.replica])
    ahead = datetime.fromisoformat(status["next_at"]) - noted.ticks[0].slot
    assert ahead in (HOUR, 2 * HOUR)
    assert [tick["claimed_by"] for tick in status["ticks"]] == [clock.replica]
    await clock.stop()
    gone = (await database.call("clock_status", SERVER))["trial"]
    assert (gone["replicas"], gone["next_at"], len(gone["ticks"])) == ([], None, 1)
    assert await database.call("clock_status", Identity(tenant_id="another")) == {}


@pytest.mark.parametrize(("name", "interval"), [("", HOUR), ("a b", HOUR), ("a", timedelta(0))])
def test_a_clock_that_cannot_be_is_refused(
    name: str, interval: timedelta, settings: Settings, learning_database: ThrowawayDatabase
) -> None:
    with pytest.raises(ConfigurationError):
        Clock(name, interval, database=PostgresDatabase("postgresql://x"), settings=settings, cycle=_Noted())
