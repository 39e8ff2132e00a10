"""Approvals that a reviewer may see: one, a list of them, and what programs are given of one."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from typing import TYPE_CHECKING, Any
from uuid import UUID

from fastapi import HTTPException

from agent.approval.records import Approval
from agent.errors import NotFound
from agent.identity import Identity
from agent.server.reviewer_pages import ApprovalDesk, tenants_of

if TYPE_CHECKING:
    from agent.approval.reviewers import Reviewer

LIST_MAX = 500


async def find(
    desk: ApprovalDesk, reviewer: Reviewer, approval_id: str, tenant: str | None
) -> tuple[Approval, Identity]:
    """An approval that this reviewer may see.

    Raises:
        NotFound: there is none; the same whether it does not exist or is another tenant's.
    """
    with suppress(ValueError):  # no UUID is nobody's
        wanted = str(UUID(approval_id))
        for identity in tenants_of(desk, reviewer, tenant):
            with suppress(NotFound):
                return await desk.queue.get(wanted, identity), identity
    raise NotFound(f"there is no approval {approval_id[:80]!r} that {reviewer.name!r} may see")


async def listed(
    desk: ApprovalDesk,
    reviewer: Reviewer,
    tenant: str | None,
    wanted: Mapping[str, Any],
    limit: int,
    *,
    after: str | None = None,
) -> tuple[list[tuple[Approval, Identity]], str | None]:
    """At most so many approvals, and what comes after them, where there are more."""
    asked = {**wanted, "limit": limit + 1}
    if after is not None:
        asked["after"] = _place(after)
    found: list[tuple[Approval, Identity]] = []
    for identity in tenants_of(desk, reviewer, tenant):
        rows = await desk.queue.database.call("list_approvals", identity, wanted=asked)
        found += [(Approval.from_row(row), identity) for row in rows]
    found.sort(key=lambda pair: pair[0].approval_id)
    found.sort(key=lambda pair: pair[0].requested_at, reverse=not wanted.get("oldest_first"))
    if len(found) <= limit:
        return found, None
    last = found[limit - 1][0]
    return found[:limit], f"{last.requested_at.isoformat()}~{last.approval_id}"


def _place(after: str) -> dict[str, str]:
    """The approval after which a list goes on."""
    moment, _, approval_id = after.partition("~")
    try:
        found = datetime.fromisoformat(moment)
        if found.tzinfo is None:
            raise ValueError
        return {"requested_at": found.isoformat(), "approval_id": str(UUID(approval_id))}
    except ValueError:
        raise HTTPException(422, f"after={after[:80]!r} is not the `next` of a list.") from None


def document_of(approval: Approval) -> dict[str, Any]:
    """What programs are given: the approval without where its messages and its thread are."""
    document = approval.as_json()
    for name in ("messages", "interrupt"):
        document.pop(name, None)
    return document
