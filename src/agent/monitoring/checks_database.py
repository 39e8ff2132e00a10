"""Checks of the queue and of the database that everything is kept in."""

from __future__ import annotations

from datetime import datetime, timedelta

from agent.identity import Identity
from agent.learning.background_learner import CLOCK_NAME as LEARNER_CLOCK
from agent.monitoring.checks import Check, Look, a_time, for_people
from agent.monitoring.exact_tests import median, robust_scale
from agent.monitoring.findings import Finding, Severity, cause_of
from agent.monitoring.readings import Series

_INTERVALS_LATE = 3
# The longest that is still well, and from when on it is critical, in seconds.
_QUEUE_SECONDS, _QUEUE_CRITICAL_SECONDS = 600, 3_600
_UNLEARNED_SECONDS, _UNLEARNED_CRITICAL_SECONDS = 3_600, 6 * 3_600
_TRANSACTION_SECONDS, _TRANSACTION_CRITICAL_SECONDS = 300, 3_600
_CONNECTIONS_SHARE, _CONNECTIONS_CRITICAL_SHARE = 0.8, 0.95
_STATEMENT_MS = 1_000
_GROWTH_BYTES_MIN = 64 * 1024 * 1024
_GROWTH_DAYS_MIN = 4
_GROWTH_SCALES = 6.0
_DAY = timedelta(days=1)


def _severity(value: float, critical: float) -> Severity:
    return "critical" if value >= critical else "warning"


async def _queue_age(look: Look) -> list[Finding]:
    state = await look.state()
    now = a_time(state["now"], "")
    return [
        Finding(
            cause=cause_of("queue_age", queue=queue["queue"]),
            check="queue_age",
            severity=_severity(queue["oldest_seconds"], _QUEUE_CRITICAL_SECONDS),
            title=f"Queue {queue['queue']!r} is {for_people(queue['oldest_seconds'])} behind",
            what=(
                f"{queue['waiting']} jobs are due, the oldest for {for_people(queue['oldest_seconds'])}; "
                f"{state['workers']} workers live."
            ),
            since=now - timedelta(seconds=queue["oldest_seconds"]),
            evidence={**queue, "workers": state["workers"]},
            advice="Start a worker (`agent worker`), or more of them; see `agent doctor`.",
        )
        for queue in state["queues"]
        if (queue["oldest_seconds"] or 0) >= _QUEUE_SECONDS
    ]


async def _learner_freshness(look: Look) -> list[Finding]:
    state = await look.state()
    now = a_time(state["now"], "")
    found = []
    for waiting in state["unlearned"]:
        oldest = a_time(waiting["oldest_at"], state["now"])
        seconds = (now - oldest).total_seconds()
        if seconds >= _UNLEARNED_SECONDS:
            found.append(
                Finding(
                    cause=cause_of("learner_freshness"),
                    check="learner_freshness",
                    severity=_severity(seconds, _UNLEARNED_CRITICAL_SECONDS),
                    title=f"{waiting['runs']} runs wait to be learned, the oldest for {for_people(seconds)}",
                    what="Agents do not know yet what was said in them.",
                    since=oldest,
                    evidence={"runs": waiting["runs"], "oldest_at": waiting["oldest_at"]},
                    advice=(
                        "Is a worker alive, and does its model answer? See `agent doctor` and the event "
                        "learning_failed."
                    ),
                    tenant_id=look.tenant(waiting["tenant_id"]),
                )
            )
    return [*found, *await _learner_ticks(look, now), *await _learner_steps(look)]


async def _learner_ticks(look: Look, now: datetime) -> list[Finding]:
    """Whether the hourly learner has done a cycle lately, where one has ever run."""
    identity = Identity(tenant_id=look.settings.tenant)
    clocks = await look.database.call("clock_status", identity, tick_limit=50)
    ticks = clocks.get(LEARNER_CLOCK, {}).get("ticks", [])
    done = [a_time(tick["finished_at"], tick["slot"]) for tick in ticks if tick["state"] == "done"]
    last = max(done, default=None) or min((a_time(tick["slot"], "") for tick in ticks), default=now)
    late = now - last
    # After a time in which nothing ran at all, the first tick is at work and not yet done.
    begun = [a_time(tick["claimed_at"], tick["slot"]) for tick in ticks if tick["state"] in ("todo", "doing")]
    patience = _INTERVALS_LATE * look.settings.learner_interval
    if late < patience or (clocks[LEARNER_CLOCK]["replicas"] and begun and now - min(begun) < patience):
        return []
    return [
        Finding(
            cause=cause_of("learner_freshness", clock=LEARNER_CLOCK),
            check="learner_freshness",
            severity="warning",
            title=f"The background learner has done no cycle for {for_people(late.total_seconds())}",
            what="Its interval is " + for_people(look.settings.learner_interval.total_seconds()) + ".",
            since=last,
            evidence={
                "last_at": last.isoformat(), "last_error": ticks[0]["error"],
                "replicas": clocks[LEARNER_CLOCK]["replicas"],
            },
            advice=(
                "Start one with `agent learner run`, or a server with LEARNING_LEARNER on; see the event "
                "tick_failed."
            ),
        )
    ]  # fmt: skip


async def _learner_steps(look: Look) -> list[Finding]:
    """The steps of the learner's newest cycle that failed for good."""
    cycles = await look.database.call("list_cycles", Identity(tenant_id=look.settings.tenant), cycle_limit=1)
    return [
        Finding(
            cause=cause_of("learner_freshness", step=step["step"]),
            check="learner_freshness",
            severity="warning",
            title=f"The step {step['step']} of the background learner failed",
            what=f"It was tried {step['attempts']} times in the newest cycle; the other steps went on.",
            since=a_time(step["finished_at"], step["started_at"]),
            evidence={"step": step["step"], "attempts": step["attempts"], "error": step["error"]},
            advice="Read the error; `agent learn --once` tries it again.",
        )
        for cycle in cycles
        for step in cycle["steps"]
        if step["state"] == "failed"
    ]


async def _connections(look: Look) -> list[Finding]:
    state = await look.state()
    share = state["connections"] / max(state["connections_max"], 1)
    if share < _CONNECTIONS_SHARE:
        return []
    return [
        Finding(
            cause="connections",
            check="connections",
            severity=_severity(share, _CONNECTIONS_CRITICAL_SHARE),
            title=f"{state['connections']} of {state['connections_max']} connections are taken",
            what="When they are all taken, recall fails and runs are spooled to disk.",
            since=a_time(state["now"], ""),
            evidence={"connections": state["connections"], "connections_max": state["connections_max"]},
            advice="Find who holds them in pg_stat_activity; use a pooler in session mode, or raise max_connections.",
        )
    ]


async def _long_transactions(look: Look) -> list[Finding]:
    state = await look.state()
    long = [one for one in state["long_transactions"] if one["seconds"] >= _TRANSACTION_SECONDS]
    if not long:
        return []
    oldest = long[0]
    return [
        Finding(
            cause="long_transactions",
            check="long_transactions",
            severity=_severity(oldest["seconds"], _TRANSACTION_CRITICAL_SECONDS),
            title=f"A transaction is open for {for_people(oldest['seconds'])}",
            what=(
                f"{len(long)} transactions are open for more than {for_people(_TRANSACTION_SECONDS)}. They keep "
                "rows from being cleaned up, and may hold locks."
            ),
            since=a_time(oldest["since"], state["now"]),
            evidence={"transactions": long},
            advice=(
                "End it with `SELECT pg_terminate_backend(pid)` if nobody needs it; set "
                "idle_in_transaction_session_timeout."
            ),
        )
    ]


async def _slow_statements(look: Look) -> list[Finding]:
    state = await look.state()
    return [
        Finding(
            cause=cause_of("slow_statements", statement=statement["statement_id"]),
            check="slow_statements",
            severity="warning",
            title=f"A statement takes {statement['mean_ms']:,.0f} ms on average",
            what=f"{statement['calls']} calls: {statement['statement'][:200]}",
            since=a_time(state["now"], ""),
            evidence=dict(statement),
            advice="Look at its plan with EXPLAIN (ANALYZE, BUFFERS); pg_stat_statements_reset() after a change.",
        )
        for statement in state["slow_statements"] or ()
        if statement["mean_ms"] >= _STATEMENT_MS
    ]


def daily_growth(series: Series) -> list[float]:
    """Bytes a table grew by in the last 24 hours, then in each day before; days that are not measured are left out."""
    sizes = {reading.at: reading.total for reading in (*series.hours, *series.recent)}
    if not sizes:
        return []
    last = max(sizes)
    found = []
    day = 0
    while last - (day + 1) * _DAY >= min(sizes):
        after, before = sizes.get(last - day * _DAY), sizes.get(last - (day + 1) * _DAY)
        if after is not None and before is not None:
            found.append(after - before)
        elif day == 0:
            return []
        day += 1
    return found


async def _table_growth(look: Look) -> list[Finding]:
    found = []
    for series in (await look.readings()).of("table_bytes"):
        growth = daily_growth(series)
        if len(growth) <= _GROWTH_DAYS_MIN or growth[0] < _GROWTH_BYTES_MIN:
            continue
        usual = median(growth[1:])
        limit = usual + _GROWTH_SCALES * max(robust_scale(growth[1:]), 0.1 * abs(usual))
        if growth[0] > limit:
            found.append(
                Finding(
                    cause=cause_of("table_growth", table=series.part),
                    check="table_growth",
                    severity="warning",
                    title=f"Table {series.part} grew by {growth[0] / 2**20:,.0f} MB in a day",
                    what=f"On the {len(growth) - 1} days before it grew by {usual / 2**20:,.1f} MB, in the median.",
                    since=series.now - _DAY,
                    evidence={
                        "table": series.part,
                        "bytes": growth[0],
                        "usual_bytes": usual,
                        "days": len(growth) - 1,
                    },
                    advice="What writes so much? See pg_stat_user_tables for dead rows that are not cleaned up.",
                )
            )
    return found


CHECKS = (
    Check(name="queue_age", about="jobs that wait too long", find=_queue_age),
    Check(name="learner_freshness", about="runs that wait to be learned", find=_learner_freshness),
    Check(name="connections", about="connections taken, of those there are", find=_connections),
    Check(name="long_transactions", about="transactions that stay open", find=_long_transactions),
    Check(name="slow_statements", about="statements that are slow on average", find=_slow_statements),
    Check(name="table_growth", about="tables that grow faster than they did", find=_table_growth),
)
