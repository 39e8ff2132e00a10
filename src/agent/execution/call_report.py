"""Tells of every call that ended, run or turned away: an event for those who count, a span for those who trace."""

from __future__ import annotations

from datetime import UTC, datetime

from agent import telemetry
from agent.approval.records import Approval
from agent.approval.risk import Risk
from agent.events import emit
from agent.execution.execution_records import call_of
from agent.identity import Identity


def report_call(
    tool: str,
    identity: Identity,
    *,
    risk: Risk,
    decision: str,
    status: str,
    seconds: float = 0.0,
    call_id: str | None = None,
    approval: Approval | None = None,
) -> None:
    """Tell how a call ended.

    Args:
        tool: its name.
        identity: for whom it was.
        risk: what it counted as.
        decision: `allowed`, `approved`, `denied` or `refused`.
        status: of its result.
        seconds: how long it ran; 0 where it did not.
        call_id: the model's id of it.
        approval: what a person said about it, where one was asked.
    """
    emit(
        "tool_call_ended",
        tool=tool[:200],
        risk=str(risk),
        decision=decision,
        status=status,
        duration_ms=round(seconds * 1000, 3),
        **identity.as_json(),
    )
    telemetry.tool_call(
        tool=tool[:200],
        risk=str(risk),
        decision=decision,
        status=status,
        seconds=seconds,
        identity=identity,
        call_id=call_id,
        approval_id=approval.approval_id if approval is not None else None,
    )
    if approval is not None:
        report_wait(approval, identity)


def report_wait(approval: Approval, identity: Identity) -> None:
    """Tell how long a paused graph waited for people; a program that waits has a span of its own (`queue.wait`)."""
    thread_id, _ = call_of(approval.request_key)
    if thread_id is not None:
        telemetry.approval_wait(
            tool=approval.tool[:200],
            risk=str(approval.risk),
            state=approval.state,
            approval_id=approval.approval_id,
            identity=identity,
            since=approval.requested_at,
            until=approval.decided_at or datetime.now(UTC),
        )
