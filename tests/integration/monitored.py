"""What the tests of the monitor share: a past, written as rows, and a look at it."""

from __future__ import annotations

from datetime import timedelta
from typing import Any, cast

from agent.database.postgres import PostgresDatabase
from agent.monitoring.checks import Check, Look
from agent.monitoring.continuous_monitor import CHECKS
from agent.monitoring.findings import Finding
from agent.testing.throwaway import ThrowawayDatabase
from tests.integration.rows import rows

LONG = ("5 days", "1 hour")
"""What was usual, until the last hour."""
LATELY = ("1 hour", "0")


def past_runs(
    url: str,
    times: tuple[str, str],
    *,
    every: str = "3 minutes",
    name: str = "run",
    tenant: str = "default",
    agent: str = "support",
    user: str = "ada",
    status: str = "'completed'",
    took: str = "interval '1 second' * (0.8 + 0.1 * (n % 5))",
    messages: str = "'[]'",
    facts: str = "'{}'",
    recorded: str = "at",
    learned: str = "at",
    source: str = "live",
) -> None:
    """Runs at even distances in this time before now; the rest are SQL expressions of `n`, from 1 on, and `at`."""
    rows(
        url,
        f"""
        DELETE FROM agent_monitor_mark;  -- readings begin anew: else they go on from the last time
        INSERT INTO agent_run (tenant_id, run_id, user_id, session_id, agent_id, status, source, messages, facts,
                               started_at, finished_at, recorded_at, learned_at)
        SELECT '{tenant}', '{name}-' || n, '{user}', '{name}-' || n, '{agent}', {status}, '{source}', {messages},
               {facts}, at - {took}, at, {recorded}, {learned}
        FROM generate_series(now() - interval '{times[0]}', now() - interval '{times[1]}', interval '{every}')
             WITH ORDINALITY AS t (at, n)
        """,
    )


def past_executions(
    url: str,
    times: tuple[str, str],
    *,
    every: str = "6 minutes",
    agent: str = "support",
    user: str = "ada",
    tool: str = "pay",
    state: str = "'executed'",
    risk: str = "'WRITE'",
    took: str = "100 + 10 * (n % 5)",
) -> None:
    """Rows of the log at even distances, as `past_runs` has them."""
    rows(
        url,
        f"""
        DELETE FROM agent_monitor_mark;
        INSERT INTO agent_execution_log (tenant_id, log_id, at, user_id, agent_id, tool, tool_version, risk,
                                         decision, state, decided_by, rows, duration_ms, details_hash, previous_hash,
                                         row_hash)
        SELECT 'default', before + n, at, '{user}', '{agent}', '{tool}', '1', {risk}, 'allowed', {state}, '{{}}',
               '{{}}', {took}, '', md5((before + n)::text), ''
        FROM generate_series(now() - interval '{times[0]}', now() - interval '{times[1]}', interval '{every}')
             WITH ORDINALITY AS t (at, n),
             (SELECT count(*) AS before FROM agent_execution_log) AS b
        """,
    )


def a_tool_message(is_error: str) -> str:
    """Messages with one result of the tool `search`, an error where this SQL expression says so."""
    return (
        "jsonb_build_array(jsonb_build_object('message_id', 'm', 'role', 'tool', 'name', 'search', 'content', 'x', "
        f"'is_error', {is_error}))"
    )


async def found(
    database: PostgresDatabase, learning_database: ThrowawayDatabase, name: str, **settings: Any
) -> list[Finding]:
    """What this check finds."""
    chosen = learning_database.settings.model_copy(update=settings)
    look = Look(database=database, settings=chosen, budget=timedelta(seconds=30))
    try:
        return await named(name).find(look)
    finally:
        await look.aclose()


def named(name: str) -> Check:
    """The check of this name."""
    return next(check for check in CHECKS if check.name == name)


async def found_in(name: str, learning_database: ThrowawayDatabase, **readings: Any) -> list[Finding]:
    """What this check finds where these readings (`state`, `readings`) are so: for what no test can bring about."""
    look = Look(
        database=cast("PostgresDatabase", None),
        settings=learning_database.settings,
        budget=timedelta(seconds=30),
    )
    for reading, value in readings.items():

        async def read(value: Any = value) -> Any:
            return value

        await look.once(reading, read)
    return await named(name).find(look)
