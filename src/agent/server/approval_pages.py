"""The page of one approval, rows of lists, and the page that says what went wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

from fastapi import HTTPException, Request
from fastapi.responses import Response

from agent.approval.card import Card, make_card, visible
from agent.approval.records import Approval
from agent.approval.standing_rules import LONGEST, no_rule_because
from agent.errors import LearningError
from agent.identity import Identity
from agent.server.approval_lookup import LIST_MAX, find
from agent.server.argument_form import fields_of
from agent.server.reviewer_pages import (
    BODY_MAX,
    ApprovalDesk,
    Visitor,
    door,
    moment_of,
    one_line,
    render_page,
    report_failure,
    root_of,
    sees_tenant,
    status_of,
)

if TYPE_CHECKING:
    from agent.approval.reviewers import Reviewer


async def show(
    request: Request,
    desk: ApprovalDesk,
    visitor: Visitor,
    approval: Approval,
    identity: Identity,
    *,
    status: int = 200,
    said: str | None = None,
    problem: str | None = None,
    fields: Sequence[Any] | None = None,
) -> Response:
    """The page of one approval: the whole call, and the forms to decide."""
    together = await desk.queue.list(identity, batch_id=approval.batch_id, limit=LIST_MAX)
    reviewer = visitor.reviewer
    hindrance = _hindrance(approval, reviewer)
    query = urlencode({"tenant": identity.tenant_id})
    return render_page(
        request, "approval.html", status=status, visitor=visitor, title=visible(approval.tool), said=said,
        problem=problem, outdated=desk.queue.outdated_because(approval), approval=approval,
        card=_card(approval, identity), hindrance=hindrance,
        has_approved=_has_approved(approval, reviewer), can_edit=hindrance is None and desk.queue.can_edit(approval),
        fields=fields if fields is not None else fields_of(schema_of(desk, approval), approval.arguments),
        is_editing=fields is not None, confirms=needs_confirming(approval),
        votes=approval.votes or (),
        action=f"{root_of(request)}/approvals/{approval.approval_id}/decide?{query}",
        others=[
            row_of(request, one, identity, visitor)
            for one in sorted(together, key=lambda one: (str(one.requested_at), one.approval_id))
            if one.approval_id != approval.approval_id
        ],
        replaced_by=_replaced_by(request, approval, identity, together),
        rule=_rule_form(request, desk, approval, identity, reviewer),
    )  # fmt: skip


def _rule_form(
    request: Request, desk: ApprovalDesk, approval: Approval, identity: Identity, reviewer: Reviewer
) -> dict[str, Any] | None:
    """What the form for a standing rule shows; `None` where this reviewer makes none from this call."""
    if approval.state in {"rejected", "cancelled"} or no_rule_because(desk.queue, approval, reviewer):
        return None
    query = urlencode({"tenant": identity.tenant_id})
    return {
        "action": f"{root_of(request)}/approvals/{approval.approval_id}/allow?{query}",
        "tables": ", ".join(visible(name) for name in approval.tables) or "no table",
        "rows": approval.rows,
        "longest_hours": int(LONGEST.total_seconds() // 3_600),
    }


def _card(approval: Approval, identity: Identity) -> Card:
    """The card with nothing left out: this is where the whole is seen."""
    return make_card([approval], tenant_id=identity.tenant_id, text_limit=BODY_MAX, line_limit=BODY_MAX)


def _hindrance(approval: Approval, reviewer: Reviewer) -> str | None:
    """Why this reviewer has nothing to decide here, as far as is known; the database has the last word."""
    if approval.state != "pending":
        return "This is decided."
    if (expires := moment_of(approval.expires_at)) is not None and expires <= datetime.now(UTC):
        return "This has expired, so it is a no."
    if approval.requested_by in {reviewer.name, *reviewer.user_ids}:
        return "You asked for this yourself, so somebody else decides."
    if reviewer.name not in (approval.approvers or ()):
        return "You are not among those who may decide this."
    return None


def _has_approved(approval: Approval, reviewer: Reviewer) -> bool:
    return any(vote.get("voter") == reviewer.name for vote in approval.votes or ())


def row_of(request: Request, approval: Approval, identity: Identity, visitor: Visitor) -> dict[str, Any]:
    """An approval in a list."""
    votes = sum(vote.get("verdict") == "approve" for vote in approval.votes or ())
    return {
        "href": f"{root_of(request)}/approvals/{approval.approval_id}?{urlencode({'tenant': identity.tenant_id})}",
        "tool": visible(approval.tool),
        "risk": str(approval.risk),
        "state": str(approval.state),
        "summary": one_line(visible(approval.summary or ""), 200),
        "requested_by": visible(approval.requested_by or "nobody who is known"),
        "requested_at": moment_of(approval.requested_at),
        "expires_at": moment_of(approval.expires_at),
        "decided_at": moment_of(approval.decided_at),
        "decided_by": ", ".join(visible(name) for name in approval.decided_by or ()),
        "votes": f"{votes} of {approval.required_votes}" if (approval.required_votes or 1) > 1 else "",
        "tenant": visible(identity.tenant_id),
        "is_mine": _hindrance(approval, visitor.reviewer) is None
        and not _has_approved(approval, visitor.reviewer),
    }


def _replaced_by(
    request: Request, approval: Approval, identity: Identity, together: Sequence[Approval]
) -> str | None:
    for one in together:
        if one.replaces == approval.approval_id:
            return (
                f"{root_of(request)}/approvals/{one.approval_id}?{urlencode({'tenant': identity.tenant_id})}"
            )
    return None


async def problem_page(
    request: Request,
    desk: ApprovalDesk,
    visitor: Visitor | None,
    error: HTTPException | LearningError,
    approval_id: str | None,
    tenant: str | None,
) -> Response:
    """What went wrong, on the page of the approval where there is one."""
    status, why = status_of(error)
    if status >= 500:
        report_failure(error)
    if status == 401:
        return door(request, problem="Your session is over. Log in and decide again.", goes_to="/approvals")
    if visitor is not None and approval_id is not None and status in {403, 409, 422}:
        try:
            approval, identity = await find(desk, visitor.reviewer, approval_id, tenant)
            return await show(request, desk, visitor, approval, identity, status=status, problem=why)
        except LearningError:  # what is told is why the decision failed, not why its page did
            pass
    title = {404: "Not found", 403: "Refused"}.get(status, "Not done")
    return render_page(request, "problem.html", status=status, visitor=visitor, title=title, problem=why)


async def waiting_elsewhere(
    request: Request, desk: ApprovalDesk, reviewer: Reviewer, looked_in: Sequence[str]
) -> list[dict[str, Any]]:
    """Other tenants of this reviewer in which something waits."""
    if "*" not in reviewer.tenants and set(reviewer.tenants) <= set(looked_in):
        return []
    tenants = None if "*" in reviewer.tenants else [*reviewer.tenants]
    counts: dict[str, int] = await desk.queue.database.call("count_waiting", tenants=tenants)
    return [
        {
            "href": f"{root_of(request)}/approvals?{urlencode({'tenant': name})}",
            "tenant": visible(name),
            "count": count,
        }
        for name, count in sorted(counts.items())
        if sees_tenant(reviewer, name) and name not in looked_in
    ]


def schema_of(desk: ApprovalDesk, approval: Approval) -> Mapping[str, Any] | None:
    """The JSON schema of the call's arguments: as the paused run gave it, else as this process knows the tool."""
    schemas = (approval.interrupt or {}).get("schemas")
    schema = schemas.get(approval.approval_id) if isinstance(schemas, Mapping) else None
    return schema if isinstance(schema, Mapping) else desk.queue.schema_of(approval)


def needs_confirming(approval: Approval) -> bool:
    """Whether who approves ticks that they have read it."""
    return str(approval.risk) == "DESTRUCTIVE"
