"""Checks against the targets that a deployment sets itself: how well its agents do their work."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta

from agent.monitoring.checks import Check, Look
from agent.monitoring.detectors import misses_mean, misses_share
from agent.monitoring.findings import Finding, cause_of
from agent.monitoring.readings import Reading, Series

_WINDOW = timedelta(hours=24)
_SLOW_SHARE = 0.05  # p95: so many may take longer


async def _of_the_day(look: Look, measure: str, part: str = "") -> Iterator[tuple[Series, Reading]]:
    readings = await look.readings()
    summed = (
        (series, series.since(readings.now - _WINDOW))
        for series in readings.of(measure)
        if series.part == part
    )
    return ((series, total) for series, total in summed if total is not None)


def _finding(
    look: Look, check: str, series: Series, total: Reading, chance: float,
    *, title: str, target: float, found: float, advice: str,
) -> Finding:  # fmt: skip
    agent = f"agent {series.agent_id!r}" if series.agent_id else "agents without a name"
    return Finding(
        cause=cause_of(check, agent=series.agent_id),
        check=check,
        severity="warning",
        title=f"{title} of {agent}",
        what=(
            f"In the last 24 hours: {title}, over {total.events} runs. By chance this happens {chance:.1g} of the "
            "time."
        ),
        since=total.at,
        evidence={
            "agent_id": series.agent_id, "runs": total.events, "target": target, "found": round(found, 4),
            "chance": chance,
        },
        advice=advice,
        tenant_id=look.tenant(series.tenant_id),
    )  # fmt: skip


async def _resolution_rate(look: Look) -> list[Finding]:
    target = look.settings.target_resolution_rate
    found = []
    for series, total in await _of_the_day(look, "outcomes", "resolution"):
        solved = total.events - total.failures
        chance = misses_share(solved, total.events, target, at_least=True)
        if chance is not None:
            share = solved / total.events
            found.append(
                _finding(
                    look, "resolution_rate", series, total, chance, target=target, found=share,
                    title=f"{share:.0%} resolved, target {target:.0%}",
                    advice="Read runs that were not resolved; what did they need that the agent does not have?",
                )
            )  # fmt: skip
    return found


async def _escalation_rate(look: Look) -> list[Finding]:
    target = look.settings.target_escalation_rate
    found = []
    for series, total in await _of_the_day(look, "outcomes", "escalation"):
        chance = misses_share(total.failures, total.events, target, at_least=False)
        if chance is not None:
            share = total.failures / total.events
            found.append(
                _finding(
                    look, "escalation_rate", series, total, chance, target=target, found=share,
                    title=f"{share:.0%} handed to a person, target at most {target:.0%}",
                    advice="See which requests are handed over, and whether a tool or a rule is missing for them.",
                )
            )  # fmt: skip
    return found


async def _confidence(look: Look) -> list[Finding]:
    target = look.settings.target_confidence
    found = []
    for series, total in await _of_the_day(look, "outcomes", "confidence"):
        chance = misses_mean(total.events, total.total, total.squares, target)
        if chance is not None:
            mean = total.total / total.events
            found.append(
                _finding(
                    look, "confidence", series, total, chance, target=target, found=mean,
                    title=f"average confidence {mean:.2f}, target {target:.2f}",
                    advice="Look at runs with the least confidence: new kinds of requests, or missing knowledge?",
                )
            )  # fmt: skip
    return found


async def _category_accuracy(look: Look) -> list[Finding]:
    target = look.settings.target_category_accuracy
    found = []
    for series, total in await _of_the_day(look, "outcomes", "category"):
        right = total.events - total.failures
        chance = misses_share(right, total.events, target, at_least=True)
        if chance is not None:
            share = right / total.events
            found.append(
                _finding(
                    look, "category_accuracy", series, total, chance, target=target, found=share,
                    title=f"{share:.0%} of categories right, target {target:.0%}",
                    advice="Compare given and right categories of wrong runs; does one take the place of another?",
                )
            )  # fmt: skip
    return found


async def _response_time(look: Look) -> list[Finding]:
    target = look.settings.target_response_time.total_seconds()
    found = []
    for series, total in await _of_the_day(look, "response_time"):
        chance = misses_share(total.failures, total.events, _SLOW_SHARE, at_least=False)
        if chance is not None:
            share = total.failures / total.events
            found.append(
                _finding(
                    look, "response_time", series, total, chance, target=target, found=share,
                    title=f"{share:.0%} of answers took longer than {target:g} s, at most 5 % should",
                    advice="See the check latency for when it began, and runs of long duration in `agent runs list`.",
                )
            )  # fmt: skip
    return found


CHECKS = (
    Check(name="resolution_rate", about="runs resolved, against the target", find=_resolution_rate),
    Check(name="escalation_rate", about="runs handed to a person, against the target", find=_escalation_rate),
    Check(name="confidence", about="average confidence, against the target", find=_confidence),
    Check(
        name="category_accuracy",
        about="categories that were right, against the target",
        find=_category_accuracy,
    ),
    Check(name="response_time", about="p95 of the time to answer, against the target", find=_response_time),
)
