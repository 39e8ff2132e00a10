"""Checks of what goes wrong: new errors of tools, paused runs that nobody answers, jobs that are given up."""

from __future__ import annotations

from agent.monitoring.checks import Check, Look, a_time
from agent.monitoring.exact_tests import binomial_tail
from agent.monitoring.findings import Finding, cause_of

_RECENT_HOURS = 3  # the learner counts calls once an hour
_TEMPLATE_CHANCE = 1e-3


async def _error_templates(look: Look) -> list[Finding]:
    """Errors that are new or jump; as soon as the learner has counted the runs in which they were met."""
    told = await look.database.call("monitor_errors", recent_hours=_RECENT_HOURS)
    found = []
    for one in told["errors"]:
        usual = (one["earlier_failures"] + 1) / (one["earlier_calls"] + 10)
        chance = binomial_tail(one["failures"], one["calls"], usual)
        if chance >= _TEMPLATE_CHANCE:
            continue
        told_as = "New error" if one["earlier_failures"] == 0 else "Error met more often"
        found.append(
            Finding(
                cause=cause_of("error_templates", tool=one["tool"], template=one["template"]),
                check="error_templates",
                severity="warning",
                title=f"{told_as} of {one['tool']!r}: {one['template'][:120]}",
                what=(
                    f"{one['failures']} of {one['calls']} calls in the last hours; before, "
                    f"{one['earlier_failures']} of {one['earlier_calls']}."
                ),
                since=a_time(one["since"], told["now"]),
                evidence={
                    name: one[name]
                    for name in (
                        "tool",
                        "template",
                        "failures",
                        "calls",
                        "earlier_failures",
                        "earlier_calls",
                        "run_ids",
                    )
                }
                | {"chance": chance},
                advice="Read one of the runs with `agent runs show RUN_ID`; what changed in the tool or behind it?",
                tenant_id=look.tenant(one["tenant_id"]),
            )
        )
    return found


async def _stuck_runs(look: Look) -> list[Finding]:
    state = await look.state()
    return [
        Finding(
            cause=cause_of("stuck_runs", agent=one["agent_id"]),
            check="stuck_runs",
            severity="warning",
            title=f"{one['runs']} runs of agent {one['agent_id']!r} are interrupted, and no approval of theirs is open",
            what="They paused more than an hour ago. Nobody will resume them by themselves.",
            since=a_time(one["oldest_at"], state["now"]),
            evidence={"agent_id": one["agent_id"], "runs": one["runs"], "run_ids": one["run_ids"]},
            advice="Answer the interrupt where the graph asks (`agent runs show RUN_ID`), or let the user begin anew.",
            tenant_id=look.tenant(one["tenant_id"]),
        )
        for one in state["paused_runs"]
    ]


async def _dead_jobs(look: Look) -> list[Finding]:
    state = await look.state()
    return [
        Finding(
            cause=cause_of("dead_jobs", queue=one["queue"], task=one["task"]),
            check="dead_jobs",
            severity="warning",
            title=f"{one['jobs']} jobs {one['task']} of queue {one['queue']!r} failed for good",
            what="They are not tried again by themselves; what they were for is not done.",
            since=a_time(one["first_at"], state["now"]),
            evidence={name: one[name] for name in ("queue", "task", "jobs", "job_ids", "last_at")},
            advice=(
                "See why in the event learning_failed, mend it, and start a worker: it tries them again when it "
                "starts."
            ),
        )
        for one in state["dead_jobs"]
    ]


CHECKS = (
    Check(name="error_templates", about="errors of tools that are new or jump", find=_error_templates),
    Check(name="stuck_runs", about="interrupted runs that nobody will resume", find=_stuck_runs),
    Check(name="dead_jobs", about="jobs that are given up", find=_dead_jobs),
)
