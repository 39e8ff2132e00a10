"""The monitor as a whole: its readings, its alerts, its failing checks, its clock and its commands."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from typer.testing import CliRunner

from agent import Event, Identity, listening
from agent.cli import app
from agent.database.postgres import PostgresDatabase
from agent.errors import ConfigurationError, DatabaseUnavailable
from agent.monitoring.checks import Check, Look
from agent.monitoring.continuous_monitor import ContinuousMonitor
from agent.monitoring.findings import Finding
from agent.portal import portal
from agent.settings import current_settings
from agent.testing.throwaway import ThrowawayDatabase
from tests.integration.approvals import ADA
from tests.integration.monitored import LATELY, LONG, a_tool_message, named, past_executions, past_runs
from tests.integration.rows import a_run, rows, value

COUNTS = """
    SELECT measure, agent_id, part, bucket, events, failures, total, middle FROM agent_reading ORDER BY 1, 2, 3, 4
"""


@pytest.fixture
async def database(learning_database: ThrowawayDatabase) -> AsyncIterator[PostgresDatabase]:
    """The transport to `learning_database`, as a server."""
    database = PostgresDatabase(learning_database.url)
    yield database
    await database.close()


def monitor(database: PostgresDatabase, place: ThrowawayDatabase, *checks: Check) -> ContinuousMonitor:
    """The monitor of these checks alone."""
    return ContinuousMonitor(settings=place.settings, database=database, checks=checks)


def a_check(name: str, *raised: Exception) -> Check:
    """A check that raises these errors, one a look, and then finds nothing."""
    errors = list(raised)

    async def find(look: Look) -> list[Finding]:
        if errors:
            raise errors.pop(0)
        return []

    return Check(name=name, about="nothing", find=find)


def open_alerts(url: str) -> list[str]:
    return [
        cause for (cause,) in rows(url, "SELECT cause FROM agent_alert WHERE resolved_at IS NULL ORDER BY 1")
    ]


# --- readings


async def _refresh(database: PostgresDatabase) -> int:
    """Bring the readings up to date; in how many steps."""
    steps = 1
    while (await database.call("refresh_readings", target_ms=1_000.0))["more"]:
        steps += 1
    return steps


async def test_readings_are_the_same_however_often_they_are_made(
    database: PostgresDatabase, learning_database: ThrowawayDatabase
) -> None:
    past_runs(
        learning_database.url,
        ("2 hours", "0"),
        status="CASE WHEN n % 5 = 0 THEN 'failed' ELSE 'completed' END",
    )
    past_executions(learning_database.url, ("2 hours", "0"))
    await asyncio.gather(*(_refresh(database) for _ in range(5)))
    first = rows(learning_database.url, COUNTS)
    rows(learning_database.url, "DELETE FROM agent_monitor_mark")
    await _refresh(database)

    assert rows(learning_database.url, COUNTS) == first
    runs = "SELECT sum(events)::int, sum(failures)::int FROM agent_reading WHERE measure = 'runs'"
    assert rows(learning_database.url, runs) == [(41, 8)]


async def test_readings_made_hour_by_hour_are_those_made_at_once(
    database: PostgresDatabase, learning_database: ThrowawayDatabase
) -> None:
    url = learning_database.url
    past_runs(
        url,
        ("9 days", "0"),
        every="7 minutes",
        status="CASE WHEN n % 5 = 0 THEN 'failed' ELSE 'completed' END",
        messages=a_tool_message("n % 3 = 0"),
        facts="jsonb_build_object('usage', jsonb_build_object('total_tokens', n))",
        recorded="at + interval '1 hour' * (n % 20)",
    )
    past_executions(url, ("9 days", "0"), every="11 minutes")
    rows(
        url,
        """
        INSERT INTO agent_outcome (tenant_id, run_id, kind, succeeded, recorded_at)
        SELECT tenant_id, run_id, 'resolved', true, least(finished_at + interval '3 hours', now()) FROM agent_run
        """,
    )
    # The hour that is cut by the seven days is in the one and not in the other.
    whole = COUNTS.replace("ORDER BY", "WHERE bucket >= now() - interval '6 days 22 hours' ORDER BY")
    hours = """
        SELECT tenant_id, measure, agent_id, part, hour, events, failures, total, squares, middle
        FROM agent_reading_hour WHERE hour >= now() - interval '6 days 22 hours' ORDER BY 1, 2, 3, 4, 5
    """
    assert await _refresh(database) > 150
    by_steps, hours_by_steps = rows(url, whole), rows(url, hours)
    assert len({bucket for _, _, _, bucket, *_ in by_steps}) > 1_000
    assert rows(url, "SELECT name FROM agent_monitor_mark") == [("readings",)]

    rows(url, "DELETE FROM agent_reading; DELETE FROM agent_reading_hour; DELETE FROM agent_monitor_mark")
    rows(
        url,
        """
        SELECT agent_private.enter_as_server(),
               agent_private.make_readings(1000, now() - interval '7 days', clock_timestamp())
        """,
    )
    # Sizes are not made by this.
    assert rows(url, whole) == [row for row in by_steps if row[0] != "table_bytes"]
    assert rows(url, hours) == [row for row in hours_by_steps if row[1] != "table_bytes"]
    by_hour = """
        SELECT tenant_id, measure, agent_id, part, date_bin('1 hour', bucket, 'epoch') AS hour, sum(events)::bigint,
               sum(failures)::bigint, sum(total), sum(squares), percentile_cont(0.5) WITHIN GROUP (ORDER BY middle)
        FROM agent_reading GROUP BY 1, 2, 3, 4, 5
        HAVING date_bin('1 hour', min(bucket), 'epoch') >= now() - interval '6 days 22 hours' ORDER BY 1, 2, 3, 4, 5
    """
    assert rows(url, by_hour) == rows(url, hours)


async def test_the_latest_readings_are_made_first_and_a_look_that_is_cut_off_is_gone_on_with(
    database: PostgresDatabase, learning_database: ThrowawayDatabase
) -> None:
    url = learning_database.url
    past_runs(url, ("5 days", "0"), every="30 minutes")
    oldest = "SELECT extract(epoch FROM now() - min(bucket)) / 3600 FROM agent_reading WHERE measure = 'runs'"
    reached = []
    for _ in range(60):
        receipt = await database.call("refresh_readings", target_ms=1_000.0)
        assert receipt["more"]
        reached.append(float(value(url, oldest)))
    assert reached[-1] < 120
    latest = value(
        url, "SELECT extract(epoch FROM now() - max(bucket)) / 60 FROM agent_reading WHERE measure = 'runs'"
    )
    assert latest < 40, "what was lately is known before what was long ago"
    await _refresh(database)
    assert value(url, "SELECT sum(events)::int FROM agent_reading WHERE measure = 'runs'") == 241


async def test_an_hour_with_very_many_runs_takes_several_steps(
    database: PostgresDatabase, learning_database: ThrowawayDatabase
) -> None:
    url = learning_database.url
    past_runs(url, ("110 minutes", "60 minutes"), every="60 milliseconds")
    steps = "SELECT agent_private.reading_step(now() - interval '110 minutes', false) < now() - interval '80 minutes'"
    assert value(url, steps), "fifty minutes hold 50,000 runs"
    back = "SELECT agent_private.reading_step(now() - interval '60 minutes', true) > now() - interval '90 minutes'"
    assert value(url, back)
    await _refresh(database)
    assert value(url, "SELECT sum(events)::int FROM agent_reading WHERE measure = 'runs'") == 50_001


async def test_a_run_that_comes_late_is_in_the_reading_of_its_time(
    database: PostgresDatabase, learning_database: ThrowawayDatabase
) -> None:
    past_runs(learning_database.url, ("3 hours", "0"))
    await _refresh(database)
    await database.call("record_run", ADA, run=a_run(run_id="spooled", status="failed", agent_id="support"))
    rows(
        learning_database.url,
        "UPDATE agent_run SET finished_at = now() - interval '2 hours', agent_id = 'support' WHERE run_id = 'spooled'",
    )
    await _refresh(database)

    late = "SELECT sum(failures)::int FROM agent_reading WHERE measure = 'runs' AND bucket < now() - interval '1 hour'"
    assert value(learning_database.url, late) == 1


async def test_a_run_that_was_resumed_counts_when_it_ended_and_not_as_slow(
    database: PostgresDatabase, learning_database: ThrowawayDatabase
) -> None:
    await database.call("record_run", ADA, run=a_run(run_id="r", status="interrupted"))
    await _refresh(database)
    assert rows(learning_database.url, "SELECT 1 FROM agent_reading WHERE measure = 'runs'") == []
    await database.call("record_run", ADA, run=a_run(run_id="r", status="completed"))
    await _refresh(database)
    measures = rows(
        learning_database.url, "SELECT measure, events::int FROM agent_reading WHERE measure <> 'table_bytes'"
    )
    assert measures == [("runs", 1)]


async def test_checks_leave_the_loop_of_the_agents_calls_free(
    database: PostgresDatabase, learning_database: ThrowawayDatabase
) -> None:
    loops = []

    async def find(look: Look) -> list[Finding]:
        loops.append(asyncio.get_running_loop())
        return []

    await monitor(database, learning_database, Check(name="where", about="", find=find)).run_once()
    assert len(loops) == 1
    assert portal().loop not in loops


async def test_imported_runs_are_not_watched(
    database: PostgresDatabase, learning_database: ThrowawayDatabase
) -> None:
    await database.call("import_runs", Identity(), runs=[a_run(run_id="i", status="failed")])
    await _refresh(database)
    assert rows(learning_database.url, "SELECT 1 FROM agent_reading WHERE measure <> 'table_bytes'") == []


async def test_old_readings_go(database: PostgresDatabase, learning_database: ThrowawayDatabase) -> None:
    rows(
        learning_database.url,
        "INSERT INTO agent_reading (tenant_id, measure, bucket, events) "
        "SELECT 'default', 'runs', now() - interval '1 day' * d, 1 FROM unnest(ARRAY[34, 36]) AS d",
    )
    removed = (await database.call("refresh_readings", target_ms=1.0))["removed"]
    assert removed == 1


async def test_the_busiest_series_are_read_and_the_others_counted(
    database: PostgresDatabase, learning_database: ThrowawayDatabase
) -> None:
    for n, agent in enumerate(("a", "b", "c"), start=1):
        past_runs(learning_database.url, LATELY, every=f"{n * 3} minutes", name=agent, agent=agent)
    await _refresh(database)
    found = await database.call("monitor_readings", recent_hours=1, history_days=1, series_limit=2)
    assert {series["agent_id"] for series in found["series"]} == {"a"}
    assert found["left_out"] > 0


# --- a look


async def test_a_finding_is_one_alert_while_it_lasts_and_is_resolved_after(
    database: PostgresDatabase, learning_database: ThrowawayDatabase
) -> None:
    past_runs(learning_database.url, LONG)
    past_runs(learning_database.url, LATELY, name="late", status="'failed'")
    watching = monitor(database, learning_database, named("error_rate"), named("stuck_runs"))

    first = await watching.run_once()
    second = await watching.run_once()

    assert [one.cause for one in first.findings] == ["error_rate:measure=runs,agent=support"]
    assert (first.notices, second.notices) == (1, 0)
    assert open_alerts(learning_database.url) == ["error_rate:measure=runs,agent=support"]
    rows(learning_database.url, "UPDATE agent_run SET status = 'completed'; DELETE FROM agent_monitor_mark")
    assert (await watching.run_once()).findings == ()
    assert open_alerts(learning_database.url) == []


async def test_a_check_that_fails_is_found_and_stops_nobody(
    database: PostgresDatabase, learning_database: ThrowawayDatabase
) -> None:
    events: list[Event] = []
    watching = monitor(
        database, learning_database, a_check("broken", RuntimeError("no such thing")), named("dead_jobs")
    )
    rows(
        learning_database.url,
        "INSERT INTO agent_queue.procrastinate_jobs (queue_name, task_name, args, status) VALUES ('q', 't', "
        "'{}', 'failed')",
    )
    with listening(events.append):
        report = await watching.run_once()

    assert [(check.name, check.error) for check in report.checks] == [
        ("broken", "RuntimeError: no such thing"), ("dead_jobs", None),
    ]  # fmt: skip
    failed = [event.facts for event in events if event.name == "monitor_check_failed"]
    assert failed == [{"check": "broken", "error": "RuntimeError: no such thing"}]
    assert open_alerts(learning_database.url) == [
        "dead_jobs:queue=q,task=t",
        "monitor_check_failed:check=broken",
    ]
    await watching.run_once()
    assert open_alerts(learning_database.url) == ["dead_jobs:queue=q,task=t"]


async def test_alerts_of_a_check_that_cannot_look_stay(
    database: PostgresDatabase, learning_database: ThrowawayDatabase
) -> None:
    rows(
        learning_database.url,
        "INSERT INTO agent_queue.procrastinate_jobs (queue_name, task_name, args, status) VALUES ('q', 't', "
        "'{}', 'failed')",
    )
    await monitor(database, learning_database, named("dead_jobs")).run_once()
    await monitor(database, learning_database, a_check("dead_jobs", OSError("away"))).run_once()
    assert "dead_jobs:queue=q,task=t" in open_alerts(learning_database.url)


async def test_a_check_that_hangs_is_given_up(
    database: PostgresDatabase, learning_database: ThrowawayDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def hang(look: Look) -> list[Finding]:
        look.budget = look.budget * 0
        await asyncio.sleep(3_600)
        return []

    from datetime import timedelta

    monkeypatch.setattr("agent.monitoring.continuous_monitor._CHECK_BUDGET", timedelta(seconds=2))
    report = await monitor(database, learning_database, Check(name="slow", about="", find=hang)).run_once()
    assert report.checks[0].error is not None
    assert report.checks[0].error.startswith("TimeoutError")


async def test_a_database_that_is_away_is_said_to_be(learning_database: ThrowawayDatabase) -> None:
    database = PostgresDatabase("postgresql://nobody@127.0.0.1:1/none")
    with pytest.raises(DatabaseUnavailable):
        await ContinuousMonitor(settings=learning_database.settings, database=database).run_once()
    await database.close()


@pytest.mark.parametrize("minutes", [0, -1, float("nan")])
def test_an_interval_must_be_some_time(minutes: float) -> None:
    with pytest.raises(ConfigurationError, match="more than 0"):
        ContinuousMonitor(minutes)


async def test_a_started_monitor_looks_once_for_two_replicas(
    database: PostgresDatabase, learning_database: ThrowawayDatabase
) -> None:
    looks: list[Event] = []
    seen = asyncio.Event()
    loop = asyncio.get_running_loop()

    def tell(event: Event) -> None:
        if event.name == "monitor_looked":
            looks.append(event)
            loop.call_soon_threadsafe(seen.set)

    both = [
        ContinuousMonitor(
            60, settings=learning_database.settings, database=database, checks=[named("dead_jobs")]
        )
        for _ in range(2)
    ]
    with listening(tell):
        await asyncio.gather(*(one.start() for one in both))
        await asyncio.wait_for(seen.wait(), 60)
        done = "SELECT count(*) FROM agent_tick WHERE clock = 'monitor' AND state = 'done'"
        while value(learning_database.url, done) == 0:  # noqa: ASYNC110 - the row is another process's
            await asyncio.sleep(0.05)
        await asyncio.gather(*(one.stop() for one in both))

    ticks = value(learning_database.url, "SELECT count(*) FROM agent_tick WHERE clock = 'monitor'")
    assert len(looks) == ticks
    assert all(not one.clock.is_running for one in both)


async def test_users_may_not_look(learning_database: ThrowawayDatabase) -> None:
    functions = (
        "refresh_readings(1)", "monitor_readings()", "monitor_state()", "monitor_security()", "unscanned_texts()",
        "record_sightings('[]', NULL)",
    )  # fmt: skip
    with psycopg.connect(learning_database.url, autocommit=True) as connection:
        claims = json.dumps({"sub": "ada", "role": "authenticated"})
        for function in functions:
            connection.execute("SELECT set_config('request.jwt.claims', %s, false)", (claims,))
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                connection.execute(f"SELECT {function}".encode())


# --- commands


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, learning_database: ThrowawayDatabase) -> Any:
    """A folder of its own in which the settings name the database."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DATABASE_URL", learning_database.url)
    current_settings.cache_clear()
    yield tmp_path
    current_settings.cache_clear()


def test_one_look_on_the_command_line(here: Path, learning_database: ThrowawayDatabase) -> None:
    past_runs(learning_database.url, LONG)
    past_runs(learning_database.url, LATELY, name="late", status="'failed'")

    plain = CliRunner().invoke(app, ["monitor", "--once"])
    told = CliRunner().invoke(app, ["monitor", "--once", "--json"])

    assert plain.exit_code == told.exit_code == 0, plain.output + told.output
    lines = [line.split("\t") for line in plain.stdout.splitlines()]
    assert ["check", "error_rate", "1", ""] in lines
    assert [line[:3] for line in lines if line[0] == "finding"] == [
        ["finding", "critical", "error_rate:measure=runs,agent=support"]
    ]
    report = json.loads(told.stdout)
    assert report["findings"][0]["evidence"]["agent_id"] == "support"
    assert [check["name"] for check in report["checks"] if check["error"]] == []


@pytest.mark.parametrize("arguments", [["--json"], ["--once", "run"], ["--json", "run"]])
def test_options_that_do_not_go_together_are_wrong_usage(here: Path, arguments: list[str]) -> None:
    assert CliRunner().invoke(app, ["monitor", *arguments]).exit_code == 2


def test_the_service_looks_until_it_is_told_to_leave(
    here: Path, learning_database: ThrowawayDatabase
) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "agent.cli", "monitor", "run"],
        stderr=subprocess.PIPE,
        text=True,
        env=dict(os.environ),
    ) as service:
        try:
            assert service.stderr is not None
            told = ""
            while "monitor_looked" not in told:
                line = service.stderr.readline()
                assert line, f"it left: {told}"
                told += line
            service.send_signal(signal.SIGTERM)
            _, rest = service.communicate(timeout=60)
        finally:
            service.kill()
    assert service.returncode == 0, told + rest
    assert "Traceback" not in told + rest
    assert value(learning_database.url, "SELECT count(*) FROM agent_tick WHERE clock = 'monitor'") >= 1
