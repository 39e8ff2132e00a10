"""What a paused graph shows to whatever client there is, and what the answers of those clients mean.

LangChain's clients, Agent Chat UI, Agent Inbox and AG-UI each read another shape of interrupt and answer in another.
One payload has the keys of all, and one parser reads every answer. Whatever it cannot read is a no.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from agent.approval.binding import canonical_json
from agent.errors import InvalidRequest

BATCH: Final = "approval_batch"
"""Key of the batch's id, in the payload and in the answer that means: read the decisions from the rows."""
UNREADABLE: Final = "unreadable answer: not executed"

Verdict = Literal["approve", "edit", "reject"]

_YES: Final = frozenset({"approve", "approved", "accept", "accepted", "yes", "y", "ok"})
_VERDICTS: Final[Mapping[str, Verdict]] = {
    "approve": "approve",
    "accept": "approve",
    "edit": "edit",
    "reject": "reject",
    "deny": "reject",
    "ignore": "reject",
    "respond": "reject",
    "response": "reject",
}
_NOTE_CHARACTERS_MAX: Final = 2_000
_TEXT_CHARACTERS_MAX: Final = 100_000


@dataclass(frozen=True, kw_only=True)
class Proposed:
    """One call that waits for an answer, as clients are shown it."""

    tool_call_id: str
    tool: str
    arguments: Mapping[str, Any]
    description: str
    allowed: Sequence[Verdict] = ("approve", "edit", "reject")
    approval_id: str = ""
    args_hash: str = ""
    arguments_schema: Mapping[str, Any] = field(default_factory=dict)
    """JSON schema of the arguments, for a client that makes a form of it."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a person said about one call."""

    verdict: Verdict
    note: str = ""
    """What they wrote: shown to the model when it is a no."""
    arguments: Mapping[str, Any] | None = None
    """The arguments they want instead, for an edit."""
    readable: bool = True


@dataclass(frozen=True, kw_only=True)
class BatchAnswer:
    """Our own answer: the decisions about this batch are in its rows."""

    batch_id: str


def payload(
    calls: Sequence[Proposed], *, batch_id: str, message: str, expires_at: str | None = None
) -> dict[str, Any]:
    """The value of an interrupt for these calls, readable by every client there is."""
    first = calls[0]
    return {
        BATCH: batch_id,
        "action_requests": [
            {
                "name": call.tool,
                "args": dict(call.arguments),
                "arguments": dict(call.arguments),  # the name by which Agent Inbox reads them
                "description": call.description,
                "tool_call_id": call.tool_call_id,
                "approval_id": call.approval_id,
                "args_hash": call.args_hash,
            }
            for call in calls
        ],
        "review_configs": [
            {"action_name": call.tool, "allowed_decisions": list(call.allowed)} for call in calls
        ],
        "message": message,
        "reason": "tool_approval",
        "tool_call_id": first.tool_call_id,
        "expires_at": expires_at,
        "response_schema": _response_schema(calls),
    }


def _response_schema(calls: Sequence[Proposed]) -> dict[str, Any]:
    """JSON schema of the answer that says most, for display: other shapes are read too."""
    one_of = []
    for call in calls:
        variants: list[dict[str, Any]] = [
            {"type": "object", "properties": {"type": {"const": "approve"}}, "required": ["type"]},
            {
                "type": "object",
                "properties": {"type": {"const": "reject"}, "message": {"type": "string"}},
                "required": ["type"],
            },
        ]
        if "edit" in call.allowed:
            action = {
                "type": "object",
                "properties": {
                    "name": {"const": call.tool},
                    "args": dict(call.arguments_schema) or {"type": "object"},
                },
                "required": ["name", "args"],
            }
            variants.append(
                {
                    "type": "object",
                    "properties": {"type": {"const": "edit"}, "edited_action": action},
                    "required": ["type", "edited_action"],
                }
            )
        one_of.append({"oneOf": variants})
    return {
        "type": "object",
        "properties": {
            "decisions": {
                "type": "array",
                "prefixItems": one_of,
                "minItems": len(calls),
                "maxItems": len(calls),
            }
        },
        "required": ["decisions"],
    }


def read_answers(value: Any, calls: Sequence[Proposed]) -> list[Answer] | BatchAnswer:
    """The answers for these calls, one for each in their order, or the batch whose rows say it.

    An answer without a place for each call is applied only where there is one call, unless it is a no: a no is for all.
    """
    batch = _batch_of(value)
    if batch is not None:
        return BatchAnswer(batch_id=batch)
    given = _as_list(value)
    if given is not None and len(given) == len(calls):
        return [_read(item, call) for item, call in zip(given, calls, strict=True)]
    if given is not None and len(given) == 1:
        only = _read(given[0], None)
        if only.readable and only.verdict == "reject":
            return [only for _ in calls]
    return [_unreadable() for _ in calls]


def _batch_of(value: Any) -> str | None:
    value = _from_json(value)
    if isinstance(value, Mapping) and set(value) == {BATCH} and isinstance(value[BATCH], str):
        return str(value[BATCH])
    return None


def _from_json(value: Any) -> Any:
    """Some clients send their answer as JSON in a text."""
    if isinstance(value, str) and len(value) <= _TEXT_CHARACTERS_MAX and value.lstrip()[:1] in ("{", "["):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _as_list(value: Any) -> list[Any] | None:
    """The single answers in an answer, or `None` where it has no shape we know."""
    value = _from_json(value)
    if isinstance(value, Mapping):
        if "decisions" in value:
            decisions = value["decisions"]
            return list(decisions) if isinstance(decisions, list | tuple) and len(value) == 1 else None
        return [value]
    if isinstance(value, list | tuple):
        return list(value)
    if isinstance(value, bool | str):
        return [value]
    return None


def _unreadable() -> Answer:
    return Answer(verdict="reject", note=UNREADABLE, readable=False)


def _read(item: Any, call: Proposed | None) -> Answer:
    """One answer. Without a call only a no can be told from what is unreadable."""
    item = _from_json(item)
    if isinstance(item, bool):
        return Answer(verdict="approve" if item else "reject")
    if isinstance(item, str):
        word = item.strip().lower().rstrip(".!")
        if word in _YES:
            return Answer(verdict="approve")
        return Answer(verdict="reject", note="" if word in {"reject", "no", "n", "deny"} else _note(item))
    if not isinstance(item, Mapping):
        return _unreadable()
    if item.get("__agui_cancelled__") is True:
        return Answer(verdict="reject", note="cancelled")
    kind = item.get("type")
    verdict = _VERDICTS.get(kind) if isinstance(kind, str) else None
    if verdict is None:
        return _unreadable()
    if verdict == "reject":
        words = item.get("message", item.get("args"))
        return Answer(verdict="reject", note=_note(words) if isinstance(words, str) else "")
    if call is None:
        return Answer(verdict=verdict)
    if verdict not in call.allowed:
        return _unreadable()
    return _approved(item, call) if verdict == "approve" else _edited(item, call)


def _approved(item: Mapping[str, Any], call: Proposed) -> Answer:
    """A yes. Agent Inbox sends along what it showed, and a yes to something else is none."""
    shown = item.get("args")
    if shown is None:
        return Answer(verdict="approve")
    named, arguments = _action(shown)
    if named not in (None, call.tool) or arguments is None:
        return _unreadable()
    is_same = _same(as_before(call.arguments, arguments), call.arguments)
    return Answer(verdict="approve") if is_same else _unreadable()


def _edited(item: Mapping[str, Any], call: Proposed) -> Answer:
    """Other arguments. An edit cannot make another tool of it."""
    named, arguments = _action(item.get("edited_action", item.get("args")))
    if named != call.tool or arguments is None:
        return _unreadable()
    return Answer(
        verdict="edit", arguments=as_before(call.arguments, arguments), note=_note(item.get("message"))
    )


def _action(action: Any) -> tuple[str | None, dict[str, Any] | None]:
    """Name and arguments of an action in LangChain's shape (`name`) or Agent Inbox's (`action`)."""
    if not isinstance(action, Mapping):
        return None, None
    name = action.get("name", action.get("action"))
    arguments = action.get("args", action.get("arguments"))
    if not isinstance(arguments, Mapping) or not all(isinstance(key, str) for key in arguments):
        return None, None
    return (name if isinstance(name, str) else None), dict(arguments)


def as_before(before: Mapping[str, Any], edited: Mapping[str, Any]) -> dict[str, Any]:
    """The edited arguments with the types they had: Agent Inbox sends every value as text."""
    return {name: _typed(before.get(name), value) for name, value in edited.items()}


def _same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two sets of arguments are the same, where `1` is not `True`."""
    try:
        return canonical_json(dict(one)) == canonical_json(dict(other))
    except InvalidRequest:
        return False


def _typed(before: Any, value: Any) -> Any:
    if not isinstance(value, str) or isinstance(before, str) or before is None:
        return value
    try:
        read = json.loads(value)
    except (ValueError, RecursionError):
        return value
    if isinstance(before, bool) or isinstance(read, bool):
        return read if isinstance(before, bool) and isinstance(read, bool) else value
    if isinstance(before, int | float) and isinstance(read, int | float):
        return float(read) if isinstance(before, float) else read
    return read if type(read) is type(before) else value


def _note(words: Any) -> str:
    return words.strip()[:_NOTE_CHARACTERS_MAX] if isinstance(words, str) else ""
