"""Checks of what went wrong and stays so: paused runs that nobody answers, jobs that are given up."""

from __future__ import annotations

from agent.monitoring.checks import Check, Look, a_time
from agent.monitoring.findings import Finding, cause_of


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
    Check(name="stuck_runs", about="interrupted runs that nobody will resume", find=_stuck_runs),
    Check(name="dead_jobs", about="jobs that are given up", find=_dead_jobs),
)
