"""A run as it is recorded: plain JSON, made from LangChain messages."""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

from langchain_core.messages import (
    AIMessage,
    AnyMessage,
    BaseMessage,
    ChatMessage,
    FunctionMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
)

from agent.events import emit
from agent.identity import Identity
from agent.learning.rendering import without_recalled
from agent.learning.run_seal import RunSeal

RunStatus = Literal["completed", "interrupted", "failed", "cancelled", "blocked"]
KNOWLEDGE_MESSAGE_ID = "learned_knowledge"
"""Id of the system message by which `with_learning` hands knowledge to inner agents; never recorded."""

_ROLES: tuple[tuple[type[BaseMessage], str], ...] = (
    (HumanMessage, "user"),
    (AIMessage, "assistant"),
    (ToolMessage, "tool"),
    (FunctionMessage, "tool"),
)
_CONTENT_CHARACTERS_MAX = 2_000_000
_ERROR_CHARACTERS_MAX = 2_000


@dataclass(frozen=True, kw_only=True)
class OpenRun:
    """What is settled when a run starts, kept in the graph's private state until it ends."""

    identity: Identity
    run_id: str
    started_at: str
    first_message_id: str | None
    """Id of the first message that belongs to this run."""
    knowledge: str
    """The rendered block, empty where nothing is known."""
    exposures: Sequence[Mapping[str, Any]] = field(default_factory=tuple)
    """`{memory_id, version}` of what the block shows, in order."""
    nested: bool = False
    """Whether an agent around this one records it."""

    def as_state(self, seal: RunSeal) -> dict[str, Any]:
        """Plain values, as checkpoints keep them, sealed."""
        kept = {
            "identity": self.identity.as_json(),
            "run_id": self.run_id,
            "started_at": self.started_at,
            "first_message_id": self.first_message_id,
            "knowledge": self.knowledge,
            "exposures": [dict(item) for item in self.exposures],
            "nested": self.nested,
        }
        return kept | {"seal": seal.of(kept)}

    @classmethod
    def from_state(cls, state: Any, seal: RunSeal) -> OpenRun | None:
        """The run that a graph's state holds; `None` for nobody's, and for one that we did not seal."""
        kept = (
            state.get("learning_run") if isinstance(state, Mapping) else getattr(state, "learning_run", None)
        )
        if not kept:
            return None
        if not seal.holds(kept):
            emit("run_state_refused", run_id=str(kept.get("run_id"))[:64])
            return None
        return cls(
            identity=Identity.from_json(kept["identity"]),
            run_id=kept["run_id"],
            started_at=kept["started_at"],
            first_message_id=kept.get("first_message_id"),
            knowledge=kept.get("knowledge", ""),
            exposures=tuple(kept.get("exposures", ())),
            nested=bool(kept.get("nested")),
        )


def now() -> str:
    """This moment in UTC, ISO 8601."""
    return datetime.now(UTC).isoformat()


def text_of(content: Any) -> str:
    """The text of a message's content. Parts that are no text are named, not copied: `[image]`."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return str(content)
    parts = []
    for part in content:
        if isinstance(part, str):
            parts.append(part)
        elif isinstance(part, Mapping):
            kind = str(part.get("type", "part"))
            if isinstance(part.get("text"), str):
                parts.append(part["text"])
            elif kind not in ("tool_use", "tool_call", "function_call", "reasoning", "thinking"):
                parts.append(f"[{kind.removesuffix('_url')}]")
    return "\n".join(parts)


def message_as_json(message: BaseMessage) -> dict[str, Any]:
    """One message in the form of `agent_run.messages`."""
    text = without_recalled(text_of(message.content))[:_CONTENT_CHARACTERS_MAX]
    plain: dict[str, Any] = {
        "message_id": message.id or str(uuid.uuid4()),
        "role": _role_of(message),
        "content": text,
    }
    if isinstance(message, AIMessage) and message.tool_calls:
        plain["tool_calls"] = [
            {"id": call.get("id"), "name": call["name"], "args": call["args"]} for call in message.tool_calls
        ]
    if isinstance(message, ToolMessage):
        plain["tool_call_id"] = message.tool_call_id
        plain["name"] = message.name
        if message.status == "error":
            plain["is_error"] = True
    return plain


def _role_of(message: BaseMessage) -> str:
    """By class, because the type of a streamed message is the name of its class."""
    if isinstance(message, ChatMessage):
        return {"human": "user", "ai": "assistant"}.get(message.role, message.role)
    for kind, role in _ROLES:
        if isinstance(message, kind):
            return role
    return message.type


def messages_of_run(
    messages: Iterable[AnyMessage | BaseMessage], first_message_id: str | None
) -> list[BaseMessage]:
    """The messages from the first of a run on, without system messages; all of them where the first is not there."""
    kept = [message for message in messages if not isinstance(message, SystemMessage)]
    for position, message in enumerate(kept):
        if first_message_id is not None and message.id == first_message_id:
            return kept[position:]
    return kept if first_message_id is None else kept[_start_of_input(kept) :]


def _start_of_input(messages: Sequence[BaseMessage]) -> int:
    """Where the last turn begins: the first of the last unbroken group of human messages."""
    position = len(messages)
    while position > 0 and not isinstance(messages[position - 1], HumanMessage):
        position -= 1
    while position > 0 and isinstance(messages[position - 1], HumanMessage):
        position -= 1
    return position


def first_of_input(messages: Sequence[BaseMessage]) -> str | None:
    """Id of the first message of the input that starts a run, or `None` where there is none."""
    kept = [message for message in messages if not isinstance(message, SystemMessage)]
    position = _start_of_input(kept)
    return kept[position].id if position < len(kept) else None


def question_of(messages: Sequence[BaseMessage]) -> str:
    """What recall is asked: the text of the last human messages, at most 4,000 characters."""
    kept = [message for message in messages if not isinstance(message, SystemMessage)]
    said = [
        text_of(message.content)
        for message in kept[_start_of_input(kept) :]
        if isinstance(message, HumanMessage)
    ]
    return without_recalled("\n".join(said))[-4_000:]


def tool_errors_of(messages: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The tool results among recorded messages that are marked as errors."""
    return [
        {
            "tool": message.get("name") or "",
            "tool_call_id": message.get("tool_call_id") or "",
            "message": str(message.get("content") or "")[:_ERROR_CHARACTERS_MAX],
        }
        for message in messages
        if message.get("role") == "tool" and message.get("is_error")
    ]


_SECRETS = re.compile(
    r"""(?ix)
    ((?:password|passwd|secret|token|api[-_]?key|authorization)["']?\s*[=:]\s*(?:bearer\s+)?["']?)[^\s"'&,;}\]]+
    | (://[^:/\s]*:)[^@\s]+(?=@)
    | \b(?:sk-|sbp_|sb_secret_|bearer\s+)[\w.-]{8,}
    | \beyJ[\w-]{8,}\.[\w-]+\.[\w-]+  # a JWT
    """
)


def describe_error(error: BaseException) -> str:
    """An exception for the record: class and message, without what looks like a key."""
    try:
        said = str(error)
    except Exception:  # noqa: BLE001 - a foreign class; that it has no words must not hide what happened
        said = "(it cannot be printed)"
    text = f"{type(error).__name__}: {said}"[: 2 * _ERROR_CHARACTERS_MAX]
    shown = _SECRETS.sub(lambda found: (found[1] or found[2] or "") + "…", text)
    return shown[:_ERROR_CHARACTERS_MAX]


def run_as_json(
    run: OpenRun, status: RunStatus, messages: Iterable[BaseMessage], *, error: BaseException | None = None
) -> dict[str, Any]:
    """The argument of `record_run`."""
    plain: dict[str, dict[str, Any]] = {}
    for message in messages:
        if isinstance(message, SystemMessage) or message.id == KNOWLEDGE_MESSAGE_ID:
            continue
        item = message_as_json(message)
        plain[item["message_id"]] = item
    recorded = list(plain.values())
    return {
        "run_id": run.run_id,
        "status": status,
        "messages": recorded,
        "tool_errors": tool_errors_of(recorded),
        "error": None if error is None else describe_error(error),
        "exposures": [dict(item) for item in run.exposures],
        "started_at": run.started_at,
        "finished_at": now(),
    }
