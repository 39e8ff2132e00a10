"""Checks of agents and tools against their own history: errors, times, tokens, refusals."""

from __future__ import annotations

from agent.monitoring.checks import Check, Look
from agent.monitoring.detectors import watch_events, watch_level
from agent.monitoring.findings import Finding, Severity, cause_of
from agent.monitoring.readings import Series

_CRITICAL_RATIO = 4.0
"""So many times the usual is critical."""


def _who(series: Series) -> str:
    agent = f"agent {series.agent_id!r}" if series.agent_id else "agents without a name"
    return f"{series.part!r} of {agent}" if series.part else agent


def _severity(ratio: float) -> Severity:
    return "critical" if ratio >= _CRITICAL_RATIO else "warning"


async def _shifts(
    look: Look, check: str, measures: tuple[str, ...], of_what: str, advice: str
) -> list[Finding]:
    """Findings for the shares of failures that rose."""
    found = []
    for series in (await look.readings()).of(*measures):
        recent, history = series.shares()
        shift = watch_events(recent, history, is_share=True)
        if shift is None:
            continue
        found.append(
            Finding(
                cause=cause_of(check, measure=series.measure, agent=series.agent_id, tool=series.part),
                check=check,
                severity=_severity(shift.ratio),
                title=(
                    f"{of_what} of {_who(series)}: {shift.events} of {shift.exposure:g}, {shift.ratio:.1f} times "
                    "the usual"
                ),
                what=(
                    f"Since {shift.since:%Y-%m-%d %H:%M} UTC {shift.events} of {shift.exposure:g} failed, "
                    "where its own history "
                    f"expects {shift.expected:.1f}."
                ),
                since=shift.since,
                evidence={
                    "measure": series.measure, "agent_id": series.agent_id, "part": series.part, "events": shift.events,
                    "trials": shift.exposure, "expected": round(shift.expected, 2), "chance": shift.chance,
                },
                advice=advice,
                tenant_id=look.tenant(series.tenant_id),
            )
        )  # fmt: skip
    return found


async def _rises(look: Look, check: str, measures: tuple[str, ...], unit: str, advice: str) -> list[Finding]:
    """Findings for the levels that rose."""
    found = []
    for series in (await look.readings()).of(*measures):
        rise = watch_level(*series.levels())
        if rise is None:
            continue
        found.append(
            Finding(
                cause=cause_of(check, measure=series.measure, agent=series.agent_id, tool=series.part),
                check=check,
                severity=_severity(rise.ratio),
                title=f"{_who(series)}: {rise.middle:,.0f} {unit}, {rise.ratio:.1f} times the usual",
                what=(
                    f"In the last hour the median was {rise.middle:,.0f} {unit} over {rise.events} events; "
                    "its own history has "
                    f"{rise.usual:,.0f} at this time of day."
                ),
                since=rise.since,
                evidence={
                    "measure": series.measure, "agent_id": series.agent_id, "part": series.part, "median": rise.middle,
                    "usual": rise.usual, "events": rise.events, "chance": rise.chance,
                },
                advice=advice,
                tenant_id=look.tenant(series.tenant_id),
            )
        )  # fmt: skip
    return found


async def _error_rate(look: Look) -> list[Finding]:
    return await _shifts(
        look, "error_rate", ("runs",), "Failed runs",
        "Look at them with `agent runs list --failed`; then at what was released or changed when it began.",
    )  # fmt: skip


async def _tool_errors(look: Look) -> list[Finding]:
    return await _shifts(
        look, "tool_errors", ("tool_calls", "executions"), "Errors",
        "Read the errors in `agent runs list --failed` and `agent log list`; is the service behind the tool well?",
    )  # fmt: skip


async def _refusals(look: Look) -> list[Finding]:
    return await _shifts(
        look, "refusals", ("refusals",), "Refused actions",
        "See `agent log list` for what was tried; where nobody asked the agent for it, halt it: `agent "
        "approvals halt`.",
    )  # fmt: skip


async def _latency(look: Look) -> list[Finding]:
    return await _rises(
        look, "latency", ("response_time", "executions"), "ms",
        "Compare with the model provider's and the database's times; see slow_statements and queue_age.",
    )  # fmt: skip


async def _token_cost(look: Look) -> list[Finding]:
    return await _rises(
        look, "token_cost", ("run_tokens", "tool_tokens"), "tokens",
        "Look at a run of the last hour with `agent runs show`: longer prompts, larger tool results, or loops?",
    )  # fmt: skip


CHECKS = (
    Check(name="error_rate", about="runs that fail, by agent", find=_error_rate),
    Check(name="tool_errors", about="calls that fail, by agent and tool", find=_tool_errors),
    Check(name="refusals", about="actions that are refused, by agent", find=_refusals),
    Check(name="latency", about="times of runs and tools", find=_latency),
    Check(name="token_cost", about="tokens of runs and tools", find=_token_cost),
)
