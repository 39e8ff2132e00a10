"""Standing rules: a reviewer's yes in advance to calls of one shape, made from a call that they were shown.

Shape and tables come from the approval's row and never from who makes the rule, so that nobody writes one for calls
that no person has seen.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final, Self

from agent.approval.records import Approval
from agent.approval.risk import Risk
from agent.errors import ConflictError, InvalidRequest, Refused
from agent.events import emit
from agent.identity import Identity

if TYPE_CHECKING:
    from agent.approval.human_approval import HumanApprovalQueue
    from agent.approval.reviewers import Reviewer

LONGEST: Final = timedelta(days=90)
"""Greatest time that a rule lasts."""
ROWS_LIMIT: Final = 1_000_000
USES_LIMIT: Final = 1_000_000
_KEY_DIGITS: Final = 16


@dataclass(frozen=True, kw_only=True)
class StandingRule:
    """One rule as it was read."""

    rule_id: str
    tenant_id: str
    tool: str
    fingerprint: str
    """Shape of the calls it fits: for SQL, the statement without its constants."""
    tables: tuple[str, ...]
    """It fits calls that touch these and no others."""
    max_rows: int
    """Greatest number of rows that one call touches."""
    max_uses: int | None
    """How many calls it says yes to; `None`: any number."""
    uses: int
    """How many calls it has said yes to."""
    made_by: str
    made_at: datetime
    expires_at: datetime
    revoked_at: datetime | None
    revoked_by: str | None

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Self:
        """From the document that the storage functions give."""
        known: dict[str, Any] = {name: row.get(name) for name in cls.__dataclass_fields__}
        for name in ("made_at", "expires_at", "revoked_at"):
            if isinstance(known[name], str):
                known[name] = datetime.fromisoformat(known[name])
        known["tables"] = tuple(known["tables"] or ())
        return cls(**known)


async def make_rule(
    queue: HumanApprovalQueue,
    approval_id: str,
    reviewer: Reviewer,
    *,
    identity_tenant: str | None = None,
    max_rows: int,
    max_uses: int | None,
    lasts: timedelta,
    args_hash: str | None = None,
) -> StandingRule:
    """Say yes in advance to calls of the shape of this one. The approval itself stays as it is.

    Args:
        queue: whose approval it is.
        approval_id: the call that the reviewer was shown.
        reviewer: who the channel made sure it is.
        identity_tenant: `None`: the tenant of the settings.
        max_rows: greatest number of rows that one call touches; 0 or more.
        max_uses: how many calls it says yes to; `None`: any number.
        lasts: until when, from now; at most 90 days.
        args_hash: hash of what the reviewer was shown, or its first 16 digits or more; `None`: it is not compared.

    Raises:
        NotFound: this tenant has no such approval.
        InvalidRequest: the bounds are out of bounds themselves.
        ConflictError: the approval is about another call, or somebody said no to it.
        Refused: there are no rules for such a call, or this person may not decide on it.
    """
    _check_bounds(max_rows, max_uses, lasts)
    identity = Identity(tenant_id=identity_tenant or queue.settings.tenant)
    approval = await queue.get(approval_id, identity)
    try:
        if args_hash is not None and not (
            len(args_hash) >= _KEY_DIGITS and approval.args_hash.startswith(args_hash)
        ):
            raise ConflictError("the hash is not that of this call; look at it again")
        if approval.state in {"rejected", "cancelled"}:
            raise ConflictError(
                f"this call is {approval.state}: a standing rule is made from what nobody refused"
            )
        if why := no_rule_because(queue, approval, reviewer):
            raise Refused(why)
    except (ConflictError, Refused) as error:
        emit(
            "standing_rule_refused",
            tenant_id=approval.tenant_id,
            approval_id=approval.approval_id,
            reviewer=reviewer.name,
            reason=str(error),
        )
        raise
    row = await queue.database.call(
        "save_standing_rule",
        identity,
        rule={
            "tool": approval.tool,
            "fingerprint": approval.fingerprint,
            "tables": [*approval.tables],
            "max_rows": max_rows,
            "max_uses": max_uses,
            "expires_at": (datetime.now(UTC) + lasts).isoformat(),
            "made_by": reviewer.name,
        },
    )
    rule = StandingRule.from_row(row)
    emit(
        "standing_rule_made",
        tenant_id=rule.tenant_id,
        rule_id=rule.rule_id,
        approval_id=approval.approval_id,
        tool=rule.tool,
        reviewer=reviewer.name,
    )
    return rule


def no_rule_because(queue: HumanApprovalQueue, approval: Approval, reviewer: Reviewer) -> str | None:
    """Why this reviewer makes no rule from this call; `None`: they may."""
    if approval.risk is Risk.DESTRUCTIVE or approval.risk is Risk.FORBIDDEN:
        return f"there are no standing rules for what is {approval.risk}: each call is looked at"
    if approval.required_votes > 1:
        return "there are no standing rules for what needs more than one vote"
    if not approval.fingerprint:
        return "this call has no shape to go by: standing rules are for SQL"
    if approval.rows is None:
        return "it is not known how many rows this call touches, so no rule could hold it to a number"
    if reviewer.is_user(approval.requested_by):
        return "nobody makes a standing rule from what they asked for themselves"
    allowed = queue.policy.reviewers.allowed(approval.tenant_id, approval.risk)
    if reviewer.name not in approval.approvers or reviewer.name not in allowed:
        return f"{reviewer.name} may not decide on this, so neither in advance"
    return None


async def list_rules(queue: HumanApprovalQueue, identity: Identity) -> list[dict[str, Any]]:
    """The rules of a tenant, newest first, with `holds`: whether they are in force."""
    found: list[dict[str, Any]] = await queue.database.call("list_standing_rules", identity)
    return found


async def revoke_rule(
    queue: HumanApprovalQueue, rule_id: str, reviewer: Reviewer, *, identity_tenant: str | None = None
) -> bool:
    """End a rule; whether it held until now.

    Raises:
        NotFound: this tenant has no such rule.
    """
    identity = Identity(tenant_id=identity_tenant or queue.settings.tenant)
    return bool(
        await queue.database.call(
            "revoke_standing_rule", identity, the_rule_id=rule_id, revoked_by=reviewer.name
        )
    )


def _check_bounds(max_rows: int, max_uses: int | None, lasts: timedelta) -> None:
    if not 0 <= max_rows <= ROWS_LIMIT:
        raise InvalidRequest(f"max_rows={max_rows} must be from 0 to {ROWS_LIMIT:,}")
    if max_uses is not None and not 1 <= max_uses <= USES_LIMIT:
        raise InvalidRequest(f"max_uses={max_uses} must be from 1 to {USES_LIMIT:,}, or None for any number")
    if not timedelta(minutes=1) <= lasts <= LONGEST:
        raise InvalidRequest(f"lasts={lasts} must be from a minute to {LONGEST.days} days")
