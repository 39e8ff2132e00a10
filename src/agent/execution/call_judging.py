"""What the policy says of a call that its tool has appraised: whether it may run, must be asked for, by whom. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from agent.approval.binding import binding_hash, shown
from agent.approval.records import Approval, ApprovalRequest
from agent.approval.risk import Risk
from agent.errors import Refused
from agent.execution.execution_policy import lacking, rule_on, why_lacking
from agent.execution.execution_records import Assessment
from agent.execution.tool_registry import Appraisal
from agent.identity import Identity

if TYPE_CHECKING:
    from agent.approval.policy_file import PolicyFile


def judged(
    policy: PolicyFile,
    appraisal: Appraisal,
    *,
    tool: str,
    tool_version: str,
    target: str,
    kind: Literal["execution", "action"],
    arguments: Mapping[str, Any],
    identity: Identity,
    tainted: bool,
    thread_id: str | None,
    tool_call_id: str | None,
    per_hour: int | None = None,
    rights: Sequence[str] | None = None,
) -> Assessment:
    """What the policy says about a call that its tool has appraised. Pure.

    Args:
        rights: that its tool needs; `None`: the right of the tool's name.
    """
    risk = appraisal.risk.stricter if tainted else appraisal.risk
    ruling = rule_on(
        policy.rules,
        tool=tool,
        agent_id=identity.agent_id,
        tenant_id=identity.tenant_id,
        risk=risk,
    )
    decision, why = ruling.decision, appraisal.why or ruling.why
    if appraisal.forbidden_because is not None:
        decision, why = "deny", appraisal.forbidden_because
    elif risk is Risk.FORBIDDEN and appraisal.risk is not Risk.FORBIDDEN:
        why = "the run has read untrusted text, after which what is DESTRUCTIVE is FORBIDDEN"
    elif decision == "deny":
        why = appraisal.why if risk is Risk.FORBIDDEN and appraisal.why else ruling.why
    needed = ((tool,) if rights is None else tuple(rights)) + tuple(appraisal.rights)
    if risk is not Risk.FORBIDDEN and (missing := _lacking(policy, needed, identity)):
        decision = "deny"
        why = why_lacking(tool, missing, agent_id=identity.agent_id, tenant_id=identity.tenant_id)
    approvers = approvers_of(policy, identity, risk)
    votes = policy.approval.votes(risk)
    if decision == "ask" and len(approvers) < votes:
        decision = "deny"
        why = (
            f"{votes} {'person' if votes == 1 else 'people'} would have to approve it, and the policy file names "
            f"{len(approvers)} who may"
        )
    return Assessment(
        tool=tool,
        tool_version=tool_version,
        kind=kind,
        risk=risk,
        decision=decision,
        why=why,
        arguments=arguments,
        arguments_shown=dict(appraisal.shown) if appraisal.shown is not None else dict(arguments),
        args_hash=binding_hash(
            tool,
            arguments,
            version=tool_version,
            tenant_id=identity.tenant_id,
            target=target,
            thread_id=thread_id,
            tool_call_id=tool_call_id,
            bounds=dict(appraisal.bounds),
            policy_version=policy.version,
        ),
        effects=dict(appraisal.effects),
        bounds=dict(appraisal.bounds),
        fingerprint=appraisal.fingerprint,
        tables=tuple(appraisal.tables),
        rows=appraisal.rows,
        summary=appraisal.summary or f"{tool}({', '.join(sorted(arguments))})",
        per_hour=per_hour,
        rule_per_hour=ruling.per_hour,
        counted_agent=(identity.agent_id or "") if ruling.per_agent else None,
        rights=needed,
        rule=ruling.rule,
        approvers=approvers,
        required_votes=votes,
        tainted=tainted,
        thread_id=thread_id,
        tool_call_id=tool_call_id,
    )


def require_rights(policy: PolicyFile, tool: str, rights: Iterable[str], identity: Identity) -> None:
    """Nothing, if the policy grants these rights to tenant and agent.

    Raises:
        Refused: it does not.
    """
    if missing := _lacking(policy, rights, identity):
        raise Refused(why_lacking(tool, missing, agent_id=identity.agent_id, tenant_id=identity.tenant_id))


def approvers_of(policy: PolicyFile, identity: Identity, risk: Risk) -> list[str]:
    """Who may decide on a call of this risk, without whom the call is for."""
    return [
        reviewer.name
        for reviewer in policy.reviewers
        if reviewer.may_decide(identity.tenant_id, risk) and not reviewer.is_user(identity.user_id)
    ]


def request_for(
    policy: PolicyFile, found: Assessment, *, request_key: str, batch_id: str | None = None, reason: str = ""
) -> ApprovalRequest:
    """The request for an approval of this call."""
    seconds = policy.approval.ttl_seconds(found.risk)
    return ApprovalRequest(
        request_key=request_key,
        kind=found.kind,
        tool=found.tool,
        tool_version=found.tool_version,
        arguments=dict(found.arguments),
        arguments_shown=found.arguments_shown,
        args_hash=found.args_hash,
        risk=found.risk,
        summary=found.summary,
        reason=shown(reason),
        effects=dict(found.effects),
        bounds=dict(found.bounds),
        approvers=list(found.approvers),
        required_votes=found.required_votes,
        expires_in_seconds=seconds,
        escalate_in_seconds=seconds / 3,
        batch_id=batch_id,
        fingerprint=found.fingerprint,
        tables=list(found.tables),
        rows=found.rows,
        tainted=found.tainted,
        policy_version=policy.version,
        approved_by=f"policy:{found.rule}" if found.decision == "allow" and found.rule else None,
    )


def still_approved(found: Assessment, approval: Approval) -> Assessment:
    """The assessment, where the approval covers it.

    Raises:
        Refused: it does not.
    """
    if found.args_hash != approval.args_hash:
        raise Refused(
            "the call, its tool or the policy file has changed since it was approved; propose it again"
        )
    approved = approval.risk
    if found.risk is Risk.FORBIDDEN or found.risk.rank > approved.rank:
        raise Refused(f"the call counts as {found.risk} now, and was approved as {approved}")
    if found.decision == "deny":
        raise Refused(found.why)
    return replace(found, risk=approved)


def _lacking(policy: PolicyFile, rights: Iterable[str], identity: Identity) -> list[str]:
    return lacking(policy.grants, rights, agent_id=identity.agent_id, tenant_id=identity.tenant_id)
