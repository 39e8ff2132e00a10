"""A call that a person edited: assessed anew, and asked for anew."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from agent.approval.records import Approval, ApprovalRequest
from agent.errors import InvalidRequest, Refused
from agent.execution.call_judging import approvers_of, judged, request_for
from agent.execution.execution_records import Assessment, call_of
from agent.execution.tool_registry import Appraisal
from agent.identity import Identity

if TYPE_CHECKING:
    from agent.execution.safe_executor import SafeExecutor


async def reassess(
    executor: SafeExecutor, approval: Approval, arguments: Mapping[str, Any]
) -> ApprovalRequest:
    """The request for an edited call: checked and classified like a new one, never less strict than the old.

    Raises:
        InvalidRequest: arguments that the tool does not take.
        Refused: what the edit makes of it is forbidden.
    """
    identity = Identity(
        tenant_id=approval.tenant_id,
        user_id=approval.requested_by,
        session_id=approval.session_id,
        agent_id=approval.agent_id,
        run_id=approval.run_id,
    )
    thread_id, tool_call_id = call_of(approval.request_key)
    found = await _edited(executor, approval, arguments, identity, thread_id, tool_call_id)
    if found.decision == "deny":
        raise Refused(found.why)
    risk = max(found.risk, approval.risk, key=lambda one: one.rank)
    found = replace(
        found,
        decision="ask",
        risk=risk,
        approvers=approvers_of(executor.policy, identity, risk),
        required_votes=executor.policy.approval.votes(risk),
    )
    found = await executor.permits.warned(found, identity)
    request = request_for(
        executor.policy,
        found,
        request_key=f"edit:{secrets.token_hex(6)}:{approval.request_key}",
        batch_id=approval.batch_id,
        reason=approval.reason,
    )
    return replace(request, replaces=approval.approval_id)


async def _edited(
    executor: SafeExecutor,
    approval: Approval,
    arguments: Mapping[str, Any],
    identity: Identity,
    thread_id: str | None,
    tool_call_id: str | None,
) -> Assessment:
    if executor.registry.get(approval.tool) is not None:
        return await executor.assess(
            approval.tool,
            arguments,
            identity,
            approval.tainted,
            thread_id=thread_id,
            tool_call_id=tool_call_id,
        )
    if approval.kind != "action":
        raise InvalidRequest(f"there is no tool {approval.tool!r} here; reject the request instead")
    return judged(
        executor.policy,
        Appraisal(risk=approval.risk, summary=approval.summary),
        tool=approval.tool,
        tool_version=approval.tool_version,
        target="",
        kind="action",
        arguments=dict(arguments),
        identity=identity,
        tainted=False,
        thread_id=thread_id,
        tool_call_id=tool_call_id,
    )
