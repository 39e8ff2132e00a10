"""Requests for approval, approvals, and what became of a decision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import datetime
from typing import Any, Final, Literal, Self

from agent.approval.risk import Risk

Kind = Literal["action", "execution", "tool_version", "proposal"]
State = Literal[
    "pending", "approved", "rejected", "expired", "cancelled", "executing", "executed", "failed", "unknown"
]
Outcome = Literal["recorded", "repeated", "refused"]

WARNING: Final = "warning"
"""Key of a request's effects: the known errors that the call is likely to run into, in words."""
_YES: Final = frozenset({"approved", "executing", "executed", "failed", "unknown"})
_TIMES: Final = (
    "requested_at",
    "expires_at",
    "escalate_at",
    "escalated_at",
    "decided_at",
    "changed_at",
    "claimed_at",
    "finished_at",
)


@dataclass(frozen=True, kw_only=True)
class ApprovalRequest:
    """One call that a person is asked about."""

    tool: str
    arguments: Mapping[str, Any]
    """As they will be run."""
    args_hash: str
    """`agent.approval.binding.binding_hash` of the call: the approval holds for exactly this."""
    risk: Risk
    approvers: Sequence[str] = ()
    """Names of the reviewers who may decide; nobody where it is empty."""
    kind: Kind = "action"
    tool_version: str = "1"
    request_key: str | None = None
    """The same key in a tenant is the same approval; `None`: always a new one."""
    arguments_shown: Any = None
    """What people are shown; `None`: the arguments."""
    summary: str = ""
    reason: str = ""
    """What the model says it is for: a claim."""
    effects: Mapping[str, Any] | None = None
    """What it would do, as a trial run found, such as rows by table; and under `WARNING` what it may run into."""
    bounds: Mapping[str, Any] | None = None
    """Limits that the execution is held to."""
    required_votes: int | None = None
    """People who must say yes; `None`: two for DESTRUCTIVE, else one."""
    expires_in_seconds: float | None = None
    """Time to live, at most seven days; `None`: 15 minutes for DESTRUCTIVE, else an hour."""
    escalate_in_seconds: float | None = None
    """When more people are told; `None`: after a third of its time."""
    batch_id: str | None = None
    """The card it is shown on; `None`: one of its own."""
    held: bool = False
    """Whether its batch is not shown before the run that asks has paused (`attach_interrupt`)."""
    fingerprint: str | None = None
    """Shape of the call, for standing rules."""
    tables: Sequence[str] = ()
    rows: int | None = None
    """Rows that it touches, as far as a trial run found; `None`: not known, and no standing rule fits."""
    replaces: str | None = None
    """The approval that an edit replaces."""
    edited_by: str | None = None
    """The reviewer who edited it."""
    edited_user_ids: Sequence[str] = ()
    """Ids of that reviewer as a user of agents."""
    channel: str = ""
    """Where it was edited."""
    note: str = ""
    """What the reviewer wrote with the edit."""
    tainted: bool = False
    """Whether the run that asks had read untrusted text."""
    approved_by: str | None = None
    """`policy:<rule>` where the policy file says yes by itself; never for DESTRUCTIVE."""
    policy_version: str | None = None
    """Of the policy file that the call was judged by; `None`: an approval holds under any."""

    def as_json(self) -> dict[str, Any]:
        """As the storage function `request_approval` takes it."""
        found = {one.name: getattr(self, one.name) for one in fields(self)}
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in found.items()
            if value is not None
        }


@dataclass(frozen=True, kw_only=True)
class Approval:
    """One row of the queue as it was read. It does not follow later changes."""

    approval_id: str
    batch_id: str
    tenant_id: str
    request_key: str
    kind: Kind
    tool: str
    tool_version: str
    arguments: dict[str, Any]
    arguments_shown: Any
    args_hash: str
    risk: Risk
    summary: str
    reason: str
    """What the model says it is for: a claim."""
    effects: dict[str, Any] | None
    bounds: dict[str, Any] | None
    approvers: tuple[str, ...]
    required_votes: int
    state: State
    requested_by: str | None
    agent_id: str | None
    session_id: str | None
    run_id: str | None
    requested_at: datetime
    expires_at: datetime
    escalate_at: datetime
    escalated_at: datetime | None
    decided_at: datetime | None
    decided_by: tuple[str, ...]
    """Reviewers, or `rule:<id>`, or `policy:<rule>`."""
    note: str
    """What those who voted wrote."""
    votes: tuple[dict[str, Any], ...]
    """`{voter, verdict, channel, note, at}`, oldest first."""
    version: int
    """Goes up with each change."""
    changed_at: datetime
    interrupt: dict[str, Any] | None
    messages: tuple[dict[str, Any], ...]
    """`{channel, ref}` of each message that shows it."""
    replaces: str | None
    replaced_by: str | None
    edited_by: str | None
    tainted: bool
    """Whether the run that asked had read untrusted text; an edit of it is judged as such a call too."""
    fingerprint: str | None
    tables: tuple[str, ...]
    rows: int | None
    claimed_by: str | None
    claimed_at: datetime | None
    finished_at: datetime | None
    log_id: int | None
    policy_version: str | None = None
    """Of the policy file that the call was judged by; `None`: the approval holds under any."""

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Self:
        """From the document that the storage functions give; what this version does not know is passed over."""
        known: dict[str, Any] = {one.name: row.get(one.name) for one in fields(cls)}
        known["risk"] = Risk.of(known["risk"])
        for name in _TIMES:
            known[name] = _moment(known[name])
        for name in ("approvers", "decided_by", "votes", "messages", "tables"):
            known[name] = tuple(known[name] or ())
        return cls(**known)

    @property
    def is_open(self) -> bool:
        """Whether it still waits for a decision."""
        return self.state == "pending"

    @property
    def verdict(self) -> Literal["approve", "reject"] | None:
        """What was decided; `None` while it is open. Whatever is no clear yes is a no."""
        if self.is_open:
            return None
        return "approve" if self.state in _YES else "reject"

    def as_json(self) -> dict[str, Any]:
        """All fields as plain values."""
        found = {one.name: getattr(self, one.name) for one in fields(self)}
        for name, value in found.items():
            if isinstance(value, datetime):
                found[name] = value.isoformat()
            elif isinstance(value, Risk):
                found[name] = str(value)
            elif isinstance(value, tuple):
                found[name] = list(value)
        return found


@dataclass(frozen=True, kw_only=True)
class DecisionOutcome:
    """What became of a decision, about all approvals that it named."""

    outcome: Outcome
    """`repeated`: the same person said the same before; it counts once. `refused`: nothing was changed."""
    why: str = ""
    """Why it was refused."""
    approvals: tuple[Approval, ...] = field(default=())
    """As they are after it."""


def _moment(value: Any) -> datetime | None:
    return datetime.fromisoformat(value) if isinstance(value, str) else value
