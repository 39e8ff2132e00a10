"""The calls of one message of a model: the records that middleware, node and gate share, and what names them."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from langchain_core.messages import AIMessage, BaseMessage, ToolMessage

from agent.approval.binding import binding_hash, canonical_json
from agent.approval.records import Approval
from agent.approval.risk import Risk
from agent.errors import InvalidRequest
from agent.execution.execution_records import Assessment, Status
from agent.identity import Identity

_BATCHES: Final = uuid.UUID("5b1a8c52-7f0e-4d0c-9a55-6e0d6f1f6c11")
_EDITS_MAX: Final = 100


@dataclass(frozen=True, kw_only=True)
class Caller:
    """Whose turn it is."""

    identity: Identity
    thread_id: str | None
    tainted: bool = False
    written: frozenset[str] = frozenset()
    """Names of the tools of this run that agents wrote: what those call is gated, each call for itself."""


@dataclass(frozen=True, kw_only=True)
class GatedCall:
    """One call of the turn."""

    id: str
    name: str
    original: Mapping[str, Any]
    """The arguments as the model wrote them."""
    assessment: Assessment | None = None
    """Of a call that runs without asking."""
    approval: Approval | None = None
    """Of a call that waits, or waited; the newest where it was edited."""
    refusal: tuple[Status, str, Risk] | None = None
    """Set: it does not run, and why."""

    @property
    def is_asked(self) -> bool:
        """Whether people are asked, rather than a rule."""
        return self.approval is not None and not any(
            by.startswith(("policy:", "rule:")) for by in self.approval.decided_by
        )


@dataclass(frozen=True, kw_only=True)
class Turn:
    """All calls of one message of the model."""

    batch_id: str
    caller: Caller
    calls: Sequence[GatedCall]
    place: str | None = None
    """Thread and message, whoever asks; `None` where there is no thread to come back to."""
    notice: str = ""
    """Why the answer before did not count."""

    @property
    def asked(self) -> list[GatedCall]:
        """The calls that people are asked about; the same ones at every pause of a turn."""
        return [call for call in self.calls if call.is_asked]

    @property
    def waits(self) -> bool:
        """Whether a decision is missing."""
        return any(call.approval is not None and call.approval.is_open for call in self.calls)


def last_calls(messages: Sequence[Any]) -> AIMessage | None:
    """The last message of the model, if it calls tools that nobody has answered."""
    answered = set()
    for message in reversed(messages):
        if isinstance(message, ToolMessage):
            answered.add(message.tool_call_id)
        elif isinstance(message, AIMessage):
            open_calls = [call for call in message.tool_calls if call.get("id") not in answered]
            return message if open_calls else None
        elif isinstance(message, BaseMessage):
            return None
    return None


def newest(row: Approval, known: Sequence[Approval]) -> Approval:
    """The request that replaced this one, or this one."""
    by_id = {other.approval_id: other for other in known}
    for _ in range(_EDITS_MAX):
        if row.replaced_by is None or row.replaced_by not in by_id:
            return row
        row = by_id[row.replaced_by]
    return row


def digest_of(name: str, arguments: Mapping[str, Any]) -> str:
    """Hash of a call as the model wrote it; empty where it has none, such as one with NaN in it."""
    try:
        return binding_hash(name, dict(arguments), tenant_id="")
    except InvalidRequest:
        return ""


def batch_of(caller: Caller, message_id: str | None) -> str:
    return str(
        uuid.uuid5(_BATCHES, canonical_json([caller.identity.tenant_id, caller.thread_id, message_id]))
    )


def place_of(thread_id: str | None, message_id: str | None) -> str | None:
    if thread_id is None or message_id is None:
        return None
    return str(uuid.uuid5(_BATCHES, canonical_json([thread_id, message_id])))
