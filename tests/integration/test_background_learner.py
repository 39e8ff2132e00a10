"""The background learner: each step by itself, once, resumed where it was cut off, and told of."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest

from agent import Identity, LearningMachine, UserMemoryConfig
from agent.database.postgres import PostgresDatabase
from agent.errors import ConfigurationError
from agent.events import Event, listening
from agent.learning import learner_steps
from agent.learning.background_learner import BackgroundLearner
from agent.learning.learner_steps import (
    LEARNER_STEPS,
    LearnerStep,
    StepContext,
    StepReport,
    curate,
    learn_runs,
    memory_limits,
    tool_experience,
)
from agent.monitoring.continuous_monitor import ContinuousMonitor
from agent.portal import portal
from agent.settings import Settings
from agent.testing.throwaway import ThrowawayDatabase
from tests.integration.rows import a_run, counted_scopes, memory, recounted_scopes, rows, value

ADA = Identity(user_id="ada", session_id="s1")
BOB = Identity(tenant_id="other", user_id="bob", session_id="s1")
SERVER = Identity(tenant_id="default")


@pytest.fixture
def settings(learning_database: ThrowawayDatabase) -> Settings:
    """For learners that take over soon from the dead."""
    return learning_database.settings.model_copy(
        update={"stalled_after": timedelta(seconds=1.5), "exit_timeout": timedelta(seconds=1)}
    )


@pytest.fixture
async def database(learning_database: ThrowawayDatabase) -> AsyncIterator[PostgresDatabase]:
    """The transport to `learning_database`."""
    database = PostgresDatabase(learning_database.url)
    yield database
    await database.close()


@pytest.fixture
def heard() -> Iterator[list[Event]]:
    """Every event of the test."""
    events: list[Event] = []
    with listening(events.append):
        yield events


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Failed steps are tried again without a pause."""
    monkeypatch.setattr("agent.learning.background_learner._RETRY_SECONDS", 0.0)


async def _until(condition: Callable[[], Any], seconds: float = 30) -> None:
    loop = asyncio.get_running_loop()
    end = loop.time() + seconds
    while not condition():
        assert loop.time() < end, "it did not come"
        await asyncio.sleep(0.03)


def _step(name: str, run: Callable[[StepContext], Awaitable[StepReport]], **options: Any) -> LearnerStep:
    return LearnerStep(name=name, run=run, **options)


class _Counting:
    """A step that counts how often it was done, after failing some times."""

    def __init__(self, failures: int = 0) -> None:
        self.failures = failures
        self.tries = 0
        self.done = 0
        self.contexts: list[StepContext] = []

    async def __call__(self, context: StepContext) -> StepReport:
        self.tries += 1
        self.contexts.append(context)
        if self.tries <= self.failures:
            raise ValueError("not yet")
        self.done += 1
        return StepReport(counts={"things": self.tries}, details={"of": "this"})


def _analytics(url: str) -> dict[str, tuple[Any, ...]]:
    found = rows(url, "SELECT step, state, attempts, counts, error FROM learning_analytics")
    return {step: tuple(rest) for step, *rest in found}


# A cycle


async def test_a_cycle_does_its_steps_in_order_and_writes_down_what_each_did(
    settings: Settings, database: PostgresDatabase, learning_database: ThrowawayDatabase, heard: list[Event]
) -> None:
    first, second = _Counting(), _Counting()
    learner = BackgroundLearner(
        settings=settings, database=database, steps=[_step("first", first), _step("second", second)]
    )
    told: list[str] = []
    report = await learner.run_once(lambda step, what: told.append(f"{step} {what}"))

    assert told == ["first begins", "second begins"]
    assert [(step.step, step.state, step.counts) for step in report.steps] == [
        ("first", "done", {"things": 1}),
        ("second", "done", {"things": 1}),
    ]
    assert _analytics(learning_database.url) == {
        "first": ("done", 1, {"things": 1}, None),
        "second": ("done", 1, {"things": 1}, None),
    }
    assert [event.name for event in heard if event.name.startswith("learning_")] == [
        "learning_step_done", "learning_step_done", "learning_cycle_done",
    ]  # fmt: skip
    [cycle] = await database.call("list_cycles", SERVER)
    assert (cycle["cycle"], [step["step"] for step in cycle["steps"]]) == (report.cycle, ["first", "second"])
    assert first.contexts[0].since is None
    await learner.run_once()
    assert first.contexts[1].since is not None


@pytest.mark.usefixtures("quick")
async def test_a_step_that_fails_is_tried_again_after_the_others_and_told_of(
    settings: Settings, database: PostgresDatabase, learning_database: ThrowawayDatabase, heard: list[Event]
) -> None:
    once, never, fine = _Counting(failures=1), _Counting(failures=99), _Counting()
    learner = BackgroundLearner(
        settings=settings,
        database=database,
        steps=[_step("once", once), _step("never", never), _step("fine", fine)],
    )
    report = await learner.run_once()

    assert [step.state for step in report.steps] == ["done", "failed", "done"]
    assert [step.step for step in report.failed] == ["never"]
    assert (once.tries, never.tries, fine.tries) == (2, 3, 1)
    assert _analytics(learning_database.url) == {
        "once": ("done", 2, {"things": 2}, None),
        "never": ("failed", 3, {}, "ValueError: not yet"),
        "fine": ("done", 1, {"things": 1}, None),
    }
    assert [event.facts["step"] for event in heard if event.name == "learning_step_failed"] == ["never"]
    monitor = ContinuousMonitor(settings=settings, database=database)
    assert [f.cause for f in (await monitor.run_once()).findings if f.check == "learner_freshness"] == [
        "learner_freshness:step=never"
    ]
    attempts = [event.facts for event in heard if event.name == "learning_step_attempt_failed"]
    assert [(facts["step"], facts["attempt"]) for facts in attempts] == [
        ("once", 1),
        ("never", 1),
        ("never", 2),
    ]


@pytest.mark.usefixtures("quick")
async def test_a_step_that_takes_too_long_fails_and_the_others_go_on(
    settings: Settings, database: PostgresDatabase
) -> None:
    async def forever(context: StepContext) -> StepReport:
        await asyncio.Event().wait()
        raise AssertionError

    fine = _Counting()
    steps = [_step("forever", forever, time_limit=timedelta(seconds=0.2)), _step("fine", fine)]
    report = await BackgroundLearner(settings=settings, database=database, steps=steps).run_once()
    assert [step.state for step in report.steps] == ["failed", "done"]
    assert "TimeoutError" in (report.steps[0].error or "")


async def test_a_cycle_that_was_cut_off_goes_on_with_what_was_not_done(
    settings: Settings, database: PostgresDatabase, learning_database: ThrowawayDatabase
) -> None:
    first, last = _Counting(), _Counting()
    at_work = asyncio.Event()

    async def slow(context: StepContext) -> StepReport:
        at_work.set()
        await asyncio.Event().wait()
        raise AssertionError

    cut_off = BackgroundLearner(
        settings=settings,
        database=database,
        steps=[_step("first", first), _step("second", slow), _step("last", last)],
    )
    await cut_off.start()
    await asyncio.wait_for(at_work.wait(), 30)
    await cut_off.stop()
    assert {step: state for step, (state, *_) in _analytics(learning_database.url).items()} == {
        "first": "done",
        "second": "todo",
    }

    second = _Counting()
    another = BackgroundLearner(
        settings=settings,
        database=database,
        steps=[_step("first", first), _step("second", second), _step("last", last)],
    )
    await another.start()
    await _until(lambda: last.done == 1)
    await _until(lambda: rows(learning_database.url, "SELECT state FROM agent_tick") == [("done",)])
    await another.stop()
    assert (first.done, second.done, last.done) == (1, 1, 1)
    assert {attempts for _, attempts, *_ in _analytics(learning_database.url).values()} == {1}, (
        "nobody failed"
    )


async def test_a_step_never_runs_beside_itself_and_is_taken_over_from_the_dead(
    settings: Settings, database: PostgresDatabase, learning_database: ThrowawayDatabase
) -> None:
    begin = {"the_step": "s", "worker": "w", "lease_seconds": 60.0, "attempts_max": 3}
    assert (await database.call("begin_step", SERVER, the_cycle="dead", **begin))["state"] == "doing"
    begun = await asyncio.gather(
        *(database.call("begin_step", SERVER, the_cycle=f"c{n}", **begin) for n in range(10))
    )
    assert {each["state"] for each in begun} == {"busy"}
    rows(learning_database.url, "UPDATE learning_analytics SET leased_until = now()")
    done = _Counting()
    report = await BackgroundLearner(
        settings=settings, database=database, steps=[_step("s", done)]
    ).run_once()
    assert report.steps[0].state == "done"
    assert rows(
        learning_database.url, "SELECT state, error FROM learning_analytics WHERE cycle = 'dead'"
    ) == [("failed", "its process went away")]
    for state in ("done", "todo"):
        assert not await database.call(
            "finish_step", SERVER, the_cycle="dead", the_step="s", attempt=1, the_state=state, report={}
        )


async def test_replicas_do_each_step_of_each_cycle_once(
    settings: Settings, database: PostgresDatabase, learning_database: ThrowawayDatabase
) -> None:
    steps = {name: _Counting() for name in ("a", "b")}
    learners = [
        BackgroundLearner(
            1 / 3600, settings=settings, database=database, steps=[_step(name, run) for name, run in steps.items()]
        )
        for _ in range(3)
    ]  # fmt: skip
    await asyncio.gather(*(learner.start() for learner in learners))
    await _until(
        lambda: value(learning_database.url, "SELECT count(*) FROM agent_tick WHERE state = 'done'") >= 3
    )
    await asyncio.gather(*(learner.stop() for learner in learners))
    cycles = value(learning_database.url, "SELECT count(DISTINCT cycle) FROM learning_analytics")
    assert rows(
        learning_database.url, "SELECT count(*), min(state), max(attempts) FROM learning_analytics"
    ) == [(2 * cycles, "done", 1)]
    assert [run.tries for run in steps.values()] == [cycles, cycles]


def test_an_interval_must_be_some_time() -> None:
    for hours in (0, -1, float("nan")):
        with pytest.raises(ConfigurationError, match="interval_hours"):
            BackgroundLearner(interval_hours=hours)
    assert BackgroundLearner(
        2, settings=Settings(), database=PostgresDatabase("x")
    ).clock.interval == timedelta(hours=2)
    of_settings = Settings(learner_interval=timedelta(minutes=7))
    clock = BackgroundLearner(settings=of_settings, database=PostgresDatabase("x")).clock
    assert clock.interval == timedelta(minutes=7)


# Its steps


async def _run_step(
    run: Callable[[StepContext], Awaitable[StepReport]], settings: Settings, database: PostgresDatabase
) -> dict[str, int]:
    learner = BackgroundLearner(settings=settings, database=database, steps=[_step("it", run)])
    [result] = (await learner.run_once()).steps
    assert result.state == "done", result.error
    return result.counts


def _jobs(url: str) -> list[Any]:
    return [
        identity
        for (identity,) in rows(
            url,
            "SELECT args -> 'identity' FROM agent_queue.procrastinate_jobs WHERE status = 'todo' ORDER BY id",
        )
    ]


async def test_runs_that_wait_without_an_order_are_ordered_once_in_every_tenant(
    settings: Settings, database: PostgresDatabase, learning_database: ThrowawayDatabase
) -> None:
    url = learning_database.url
    for identity in (ADA, BOB, ADA.with_(session_id="ordered")):
        await database.call("record_run", identity, run=a_run("I like tea"))
    rows(url, "UPDATE agent_run SET recorded_at = recorded_at - interval '1 hour'")
    await database.call("record_run", ADA.with_(session_id="new"), run=a_run("I like tea"))
    rows(
        url, "DELETE FROM agent_queue.procrastinate_jobs WHERE args #>> '{identity,session_id}' <> 'ordered'"
    )

    assert await _run_step(learn_runs, settings, database) == {
        "sessions_waiting": 3, "ordered": 2, "given_up": 0,
    }  # fmt: skip
    sessions = sorted((job["tenant_id"], job["session_id"]) for job in _jobs(url))
    assert sessions == [("default", "ordered"), ("default", "s1"), ("other", "s1")]
    assert (await _run_step(learn_runs, settings, database))["ordered"] == 0


async def test_a_session_that_failed_for_good_is_tried_again_once_a_day_in_its_queue(
    settings: Settings, database: PostgresDatabase, learning_database: ThrowawayDatabase
) -> None:
    url = learning_database.url
    await database.call("record_run", ADA, run=a_run("I like tea", queue="learning-mine"))
    rows(url, "UPDATE agent_run SET recorded_at = recorded_at - interval '2 days'")
    rows(url, "UPDATE agent_queue.procrastinate_jobs SET status = 'doing'")
    rows(url, "UPDATE agent_queue.procrastinate_jobs SET status = 'failed'")
    counts = await _run_step(learn_runs, settings, database)
    assert (counts["ordered"], counts["given_up"]) == (0, 1)
    rows(url, "UPDATE agent_queue.procrastinate_events SET at = at - interval '25 hours'")
    assert (await _run_step(learn_runs, settings, database))["ordered"] == 1
    assert rows(url, "SELECT queue_name, status::text FROM agent_queue.procrastinate_jobs") == [
        ("learning-mine", "todo")
    ]


async def test_sessions_that_are_ordered_already_keep_no_other_from_its_turn(
    database: PostgresDatabase, learning_database: ThrowawayDatabase
) -> None:
    for number in range(3):
        identity = ADA.with_(session_id=f"s{number}")
        await database.call("record_run", identity, run=a_run("I like tea", run_id=f"r{number}"))
    rows(learning_database.url, "UPDATE agent_run SET recorded_at = recorded_at - interval '2 days'")
    rows(learning_database.url, "DELETE FROM agent_queue.procrastinate_jobs")
    ordered = [
        (await database.call("order_waiting_learning", ADA, older_than_seconds=60.0, session_limit=1))[
            "ordered"
        ]
        for _ in range(4)
    ]

    assert ordered == [1, 1, 1, 0]


async def test_curating_looks_for_doubles_where_something_was_written_since_it_last_looked(
    settings: Settings, database: PostgresDatabase, learning_database: ThrowawayDatabase
) -> None:
    url = learning_database.url
    to_look_through = "SELECT owner_id FROM agent_scope WHERE version > curated_version ORDER BY 1"
    for who in (ADA, BOB):
        await database.call(
            "upsert_learning", who, learning={**memory("Twice"), "store": "notes", "field": "f"}
        )
    await database.call("record_run", BOB, run=a_run("tea"))
    assert rows(url, to_look_through) == [("ada",), ("bob",)]
    assert (await _run_step(curate, settings, database))["duplicates"] == 0
    assert rows(url, to_look_through) == []

    await database.call("upsert_learning", ADA, learning={**memory("twice."), "store": "notes"})
    assert rows(url, to_look_through) == [("ada",)]
    assert (await _run_step(curate, settings, database))["duplicates"] == 1
    assert (await _run_step(curate, settings, database))["duplicates"] == 0
    assert rows(url, to_look_through) == []


async def test_curating_retires_what_is_past_or_doubled_or_too_much_and_a_second_time_nothing(
    settings: Settings,
    database: PostgresDatabase,
    learning_database: ThrowawayDatabase,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    url = learning_database.url
    for number in range(5):
        await database.call("upsert_learning", ADA, learning=memory(f"Fact {number}"))
    await database.call("upsert_learning", ADA, learning=memory("Past"))
    rows(url, "UPDATE agent_memory SET valid_from = now() - interval '2 days', valid_to = now() - interval '1 day' "
         "WHERE content = 'Past'")  # fmt: skip
    await database.call("upsert_learning", ADA, learning={**memory("Twice"), "store": "notes", "field": "f"})
    await database.call("upsert_learning", ADA, learning={**memory("twice."), "store": "notes"})
    await database.call("upsert_learning", BOB, learning=memory("Fact 0"))
    await database.call("record_run", BOB, run=a_run("tea"))

    machine = LearningMachine(settings=settings, user_memory=UserMemoryConfig(max_memories=3))
    monkeypatch.setattr(f"{learner_steps.__name__}.living_machines", lambda: [machine])
    counts = await _run_step(curate, settings, database)
    assert counts == {
        "expired": 1,
        "duplicates": 1,
        "over_limit": 2,
        "reindexed": 0,
        "ticks": 0,
        "steps": 0,
        "replicas": 0,
    }
    current = rows(
        url, "SELECT owner_id, content FROM agent_memory WHERE superseded_at IS NULL ORDER BY 1, 2"
    )
    assert current == [
        ("ada", "Fact 2"),
        ("ada", "Fact 3"),
        ("ada", "Fact 4"),
        ("ada", "Twice"),
        ("bob", "Fact 0"),
    ]
    assert value(url, "SELECT count(*) FROM agent_memory") == 9, "retired, never deleted"
    assert counted_scopes(url) == recounted_scopes(url)
    assert set((await _run_step(curate, settings, database)).values()) == {0}


@pytest.mark.parametrize(
    ("of_machines", "common"),
    [
        ([], {}),
        ([3, 10], {"user_memory": 10, "conversation": 20_000}),
        ([3, None], {"conversation": 20_000}),
        ([3], {"user_memory": 3, "conversation": 20_000}),
    ],
)
def test_only_a_limit_that_every_machine_of_the_process_has_holds(
    of_machines: list[int | None], common: dict[str, int], settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    machines = [
        LearningMachine(settings=settings, user_memory=UserMemoryConfig(max_memories=limit))
        for limit in of_machines
    ]
    monkeypatch.setattr(f"{learner_steps.__name__}.living_machines", lambda: machines)
    assert memory_limits() == common


async def test_old_rows_about_ourselves_are_forgotten_but_not_the_newest_tick(
    settings: Settings, database: PostgresDatabase, learning_database: ThrowawayDatabase
) -> None:
    url = learning_database.url
    rows(
        url,
        """
        INSERT INTO agent_tick (tenant_id, clock, slot, state, claimed_by, finished_at)
        SELECT 'default', 'c', now() - make_interval(days => d), 'done', 'r', now() - make_interval(days => d)
        FROM unnest(ARRAY[100, 95, 91]) AS d
        """,
    )
    rows(
        url,
        """
        INSERT INTO learning_analytics (tenant_id, cycle, step, state, worker, started_at)
        SELECT 'default', d::text, 's', 'done', 'w', now() - make_interval(days => d) FROM unnest(ARRAY[91, 10]) AS d
        """,
    )
    rows(url, "INSERT INTO agent_clock (tenant_id, clock, replica, interval_seconds, seen_at) "
         "VALUES ('default', 'c', 'gone', 1, now() - interval '2 days'), ('default', 'c', 'r', 1, now())")  # fmt: skip
    counts = await _run_step(curate, settings, database)
    assert (counts["ticks"], counts["steps"], counts["replicas"]) == (2, 1, 1)
    assert value(url, "SELECT count(*) FROM agent_tick") == 1


async def test_a_step_that_computes_does_not_hold_up_the_loop_that_answers_agents(
    settings: Settings, database: PostgresDatabase
) -> None:
    threads: list[int] = []

    async def compute(context: StepContext) -> StepReport:
        threads.append(threading.get_ident())
        return StepReport()

    async def answer() -> int:
        return threading.get_ident()

    await _run_step(compute, settings, database)
    assert threads != [await portal().run(answer())]


async def test_tools_errors_of_runs_are_learned_once_and_told(
    settings: Settings, database: PostgresDatabase, learning_database: ThrowawayDatabase
) -> None:
    call = {"id": "c", "name": "refund", "args": {"order": "W1"}}
    messages = [
        {"message_id": "1", "role": "assistant", "content": "", "tool_calls": [call]},
        {
            "message_id": "2",
            "role": "tool",
            "name": "refund",
            "tool_call_id": "c",
            "content": "Error: no order W1",
        },
    ]
    for identity in (ADA, BOB):
        await database.call("record_run", identity, run={**a_run("x"), "messages": messages})
    learner = BackgroundLearner(settings=settings, database=database, steps=[_step("it", tool_experience)])
    [first] = (await learner.run_once()).steps
    assert {name: first.counts[name] for name in ("runs", "calls", "errors")} == {
        "runs": 2,
        "calls": 2,
        "errors": 2,
    }
    assert first.details["lines"] == ["Tool errors: 1 in 1 templates."], "of its own tenant"
    [second] = (await learner.run_once()).steps
    assert second.counts["runs"] == 0


async def test_the_application_is_discovered_sampled_and_its_changes_are_counted(
    settings: Settings, database: PostgresDatabase, learning_database: ThrowawayDatabase
) -> None:
    url = learning_database.url
    rows(url, "CREATE TABLE public.orders (id integer PRIMARY KEY, status text)")
    rows(url, "INSERT INTO public.orders SELECT n, 'new' FROM generate_series(1, 50) AS n")
    steps = [step for step in LEARNER_STEPS if step.name in ("discover", "patterns", "recent_changes")]
    learner = BackgroundLearner(settings=settings, database=database, steps=steps)
    first = {step.step: step for step in (await learner.run_once()).steps}
    assert [step.error for step in first.values()] == [None] * 3
    assert first["discover"].counts["tables"] == 1
    assert first["patterns"].counts["tables"] == 1
    rows(url, "ALTER TABLE public.orders ADD COLUMN paid boolean")
    second = {step.step: step for step in (await learner.run_once()).steps}
    assert second["discover"].counts["changed"] == 1
    assert second["recent_changes"].counts["of_structure"] == 1
    assert (await learner.run_once()).steps[-1].counts == {"changes": 0, "of_structure": 0, "tables_moved": 0}
