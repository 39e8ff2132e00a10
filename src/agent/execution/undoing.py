"""Undoing a logged write: a write of its own, on the word of a reviewer."""

from __future__ import annotations

import secrets
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from agent.approval.risk import Risk
from agent.errors import LearningError, NotFound, Refused
from agent.execution.call_judging import judged
from agent.execution.execution_records import ExecutionResult, call_key, failure_of
from agent.execution.tool_registry import Appraisal, ToolOutcome
from agent.identity import Identity

if TYPE_CHECKING:
    from agent.execution.safe_executor import SafeExecutor

UNDO: Final = "undo"
"""Name under which the undoing of a write is approved and logged."""


async def undo(executor: SafeExecutor, log_id: int, *, identity: Identity) -> ExecutionResult:
    """Put back the rows that a logged write changed, on the word of a reviewer.

    It is a write of its own: tried first, entered as an approval that this reviewer gives, held to the rows that
    the trial changed, and logged.

    Args:
        identity: tenant, and as user the name of the reviewer.

    Raises:
        NotFound: this tenant has no such entry.
        Refused: the reviewer may not, more people would have to agree, nothing was kept to undo it by, or the rows
            have changed since.
    """
    log = await executor.database.call("get_execution", identity, the_log_id=log_id)
    if log is None:
        raise NotFound(f"tenant {identity.tenant_id!r} has no log entry {log_id}")
    if log.get("undone_by") is not None:
        raise Refused(f"entry {log_id} was undone already, by entry {log['undone_by']}")
    reviewer = executor.policy.reviewers.by_name(identity.user_id or "")
    if reviewer is None or not reviewer.may_decide(identity.tenant_id, Risk.WRITE):
        raise Refused(f"{identity.user_id} is no reviewer who may decide on a WRITE in this tenant")
    nobody = Identity(tenant_id=identity.tenant_id)
    effects = await executor.sql.try_undo(log, identity.tenant_id)
    found = judged(
        executor.policy,
        Appraisal(
            risk=Risk.WRITE,
            summary=f"undo entry {log_id} of the log",
            effects=effects,
            bounds=effects,
            tables=sorted(effects),
        ),
        tool=UNDO,
        tool_version="1",
        target="sql",
        kind="execution",
        arguments={"log_id": log_id},
        identity=nobody,
        tainted=False,
        thread_id=None,
        tool_call_id=None,
    )
    if found.decision == "deny":
        raise Refused(found.why)
    asked = await executor.permits.propose(
        replace(found, decision="ask"), nobody, request_key=call_key(None, UNDO, secrets.token_hex(16))
    )
    outcome = await executor.queue.decide(
        [asked.approval_id],
        "approve",
        reviewer,
        channel="undo",
        hashes={asked.approval_id: asked.args_hash},
        identity_tenant=identity.tenant_id,
    )
    approval = await executor.queue.get(asked.approval_id, nobody)
    if approval.state != "approved":
        await executor.queue.cancel(asked.approval_id, nobody, by=reviewer.name)
        raise Refused(
            outcome.why or f"{found.required_votes} people must agree to a write, so one alone cannot undo it"
        )
    permit = await executor.permits.admit(found, nobody, approval)
    try:
        result = await executor.sql.undo(
            log,
            identity.tenant_id,
            bounds=found.bounds,
            ticket=permit.ticket or "",
            entry=permit.entry | {"undoes": log_id},
        )
    except LearningError as error:
        await executor.settle(permit, failure_of(error))
        raise
    outcome_of = ToolOutcome(
        value={"undone": log_id, "changed": result.delta},
        row_count=result.row_count,
        effects=result.delta,
        log_id=result.log_id,
    )
    return await executor.settle(permit, outcome_of)
