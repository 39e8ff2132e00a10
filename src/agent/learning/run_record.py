"""A run as it is recorded: plain JSON, made from LangChain messages."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

from langchain_core.messages import (
    AIMessage,
    BaseMessage,
    ChatMessage,
    FunctionMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
    convert_to_messages,
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
_DEPTH_MAX = 20


@dataclass(frozen=True, kw_only=True)
class OpenRun:
    """What is settled when a run starts, kept in the graph's private state until it ends."""

    identity: Identity
    run_id: str
    started_at: str
    first_message_id: str | None = None
    """Id of the first message that belongs to this run; `None` where it has none."""
    start: int = 0
    """Its position among the messages that are recorded, for messages without ids."""
    said: Sequence[str] = ()
    """Keys of what the user said to start it. Other messages in a user's name were put there by the program."""
    answers_before: int = 0
    """Answers of an assistant that its input held already."""
    asked: str = ""
    """What a graph without messages was given, in words."""
    knowledge: str = ""
    """The rendered block, empty where nothing is known."""
    exposures: Sequence[Mapping[str, Any]] = field(default_factory=tuple)
    """`{memory_id, version}` of what the block shows, in order."""
    recalled: bool = True
    """Whether knowledge and exposures are what recall gave; `False` until then."""
    nested: bool = False
    """Whether an agent around this one records it."""
    traceparent: str = ""
    """Its span (W3C), for the part of it after a pause; empty where no spans are collected."""

    def as_state(self, seal: RunSeal) -> dict[str, Any]:
        """Plain values, as checkpoints keep them, sealed."""
        kept = {
            "identity": self.identity.as_json(),
            "run_id": self.run_id,
            "started_at": self.started_at,
            "first_message_id": self.first_message_id,
            "start": self.start,
            "said": list(self.said),
            "answers_before": self.answers_before,
            "asked": self.asked,
            "knowledge": self.knowledge,
            "exposures": [dict(item) for item in self.exposures],
            "recalled": self.recalled,
            "nested": self.nested,
            "traceparent": self.traceparent,
        }
        return kept | {"seal": seal.of(kept)}

    @classmethod
    def from_state(cls, state: Any, seal: RunSeal) -> OpenRun | None:
        """The run that a graph's state holds; `None` for nobody's, and for one that we did not seal."""
        kept = kept_in(state)
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
            start=int(kept.get("start", 0)),
            said=tuple(kept.get("said", ())),
            answers_before=int(kept.get("answers_before", 0)),
            asked=str(kept.get("asked", "")),
            knowledge=kept.get("knowledge", ""),
            exposures=tuple(kept.get("exposures", ())),
            recalled=bool(kept.get("recalled", True)),
            nested=bool(kept.get("nested")),
            traceparent=str(kept.get("traceparent", "")),
        )


def kept_in(state: Any) -> Any:
    """What a graph's state keeps of a run, sealed or not; empty for nobody's."""
    return state.get("learning_run") if isinstance(state, Mapping) else getattr(state, "learning_run", None)


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


def message_as_json(message: BaseMessage, said: Sequence[str] | None = None) -> dict[str, Any]:
    """One message in the form of `agent_run.messages`.

    Args:
        message: what to record.
        said: keys of what the user said; what else comes in a user's name has the role `context`. `None`: all is the
            user's.
    """
    text = without_recalled(text_of(message.content))[:_CONTENT_CHARACTERS_MAX]
    role = role_of(message)
    if role == "user" and said is not None and message.id not in said and _content_key(message) not in said:
        role = "context"
    plain: dict[str, Any] = {"message_id": key_of(message), "role": role, "content": text}
    if message.name and role in ("user", "assistant"):
        plain["name"] = message.name
    if isinstance(message, AIMessage) and message.tool_calls:
        plain["tool_calls"] = [
            {"id": call.get("id"), "name": call["name"], "args": _shallow(call["args"])}
            for call in message.tool_calls
        ]
    if isinstance(message, ToolMessage):
        plain["tool_call_id"] = message.tool_call_id
        plain["name"] = message.name
        if message.status == "error":
            plain["is_error"] = True
    return plain


def role_of(message: BaseMessage) -> str:
    """By class, because the type of a streamed message is the name of its class."""
    if isinstance(message, ChatMessage):
        return {"human": "user", "ai": "assistant"}.get(message.role, message.role)
    for kind, role in _ROLES:
        if isinstance(message, kind):
            return role
    return message.type


def key_of(message: BaseMessage) -> str:
    """What tells a message from others of its run: its id, or without one what it says."""
    return message.id or _content_key(message)


def _content_key(message: BaseMessage) -> str:
    said = json.dumps([message.type, text_of(message.content)], ensure_ascii=True)
    return f"said-{hashlib.sha256(said.encode()).hexdigest()[:24]}"


def _shallow(value: Any, depth: int = 0) -> Any:
    """The value without what is nested deeper than any tool needs."""
    if depth == _DEPTH_MAX:
        return "…"
    if isinstance(value, Mapping):
        return {key: _shallow(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_shallow(item, depth + 1) for item in value]
    return value


def as_messages(value: Any) -> list[BaseMessage] | None:
    """The messages in a state, in whatever form of LangChain's they are; `None` where they are no messages."""
    if isinstance(value, list) and all(isinstance(item, BaseMessage) for item in value):
        return value
    try:
        return convert_to_messages(value if isinstance(value, list) else [value]) if value else []
    except (ValueError, TypeError, NotImplementedError, KeyError, AttributeError):
        return None


def _recordable(messages: Iterable[BaseMessage]) -> list[BaseMessage]:
    """The messages without system messages and without what LangChain's middleware put there, such as summaries."""
    return [
        message
        for message in messages
        if not isinstance(message, SystemMessage)
        and message.id != KNOWLEDGE_MESSAGE_ID
        and not message.additional_kwargs.get("lc_source")
    ]


@dataclass(frozen=True, kw_only=True)
class RunInput:
    """What a run starts with."""

    first_message_id: str | None = None
    start: int = 0
    said: Sequence[str] = ()
    answers_before: int = 0
    question: str = ""
    """What recall is asked: the texts of the user, at most 4,000 characters."""


def input_of(messages: Iterable[BaseMessage]) -> RunInput:
    """The part of a history that starts a run: the last unbroken group of human messages and what follows it."""
    kept = _recordable(messages)
    start = _start_of_input(kept)
    own = [message for message in kept[start:] if isinstance(message, HumanMessage)]
    question = without_recalled("\n".join(text_of(message.content) for message in own))
    return RunInput(
        first_message_id=kept[start].id if start < len(kept) else None,
        start=start,
        said=[key for message in own for key in (message.id, _content_key(message)) if key is not None],
        answers_before=sum(1 for message in kept[start:] if isinstance(message, AIMessage)),
        question=question[-4_000:],
    )


def messages_of_run(messages: Iterable[BaseMessage], run: OpenRun) -> list[BaseMessage]:
    """The messages of a history that belong to a run."""
    kept = _recordable(messages)
    if run.first_message_id is None:
        return kept[run.start :]
    for position, message in enumerate(kept):
        if message.id == run.first_message_id:
            return kept[position:]
    return kept[_start_of_input(kept) :]  # the first was taken out of the history meanwhile


def messages_of_turn(messages: Iterable[BaseMessage]) -> list[BaseMessage]:
    """The messages of a history from the user's last ones on: those of the run that goes on, where it is not known."""
    kept = _recordable(messages)
    return kept[_start_of_input(kept) :]


def _start_of_input(messages: Sequence[BaseMessage]) -> int:
    """Where the last turn begins: the first of the last unbroken group of human messages."""
    position = len(messages)
    while position > 0 and not isinstance(messages[position - 1], HumanMessage):
        position -= 1
    while position > 0 and isinstance(messages[position - 1], HumanMessage):
        position -= 1
    return position


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


def usage_of(messages: Iterable[BaseMessage]) -> dict[str, Any]:
    """What the model calls of these messages took, as their providers counted it; empty where none did.

    `{model_calls, input_tokens, output_tokens, total_tokens, tools}`; `tools` has by tool the tokens of the model calls
    that called it, divided among the calls of one message.
    """
    counted = [message for message in messages if isinstance(message, AIMessage) and message.usage_metadata]
    if not counted:
        return {}
    tools: dict[str, float] = {}
    sums = {"input_tokens": 0, "output_tokens": 0, "total_tokens": 0}
    for message in counted:
        usage: Mapping[str, Any] = message.usage_metadata or {}
        for name in sums:
            sums[name] += int(usage.get(name) or 0)
        for call in message.tool_calls:
            share = int(usage.get("total_tokens") or 0) / len(message.tool_calls)
            tools[call["name"]] = tools.get(call["name"], 0) + share
    return {
        "model_calls": len(counted),
        **sums,
        "tools": {name: round(tokens) for name, tokens in tools.items()},
    }


_SECRETS = re.compile(
    r"""(?isx)
    ((?:password|passwd|secret|token|api[-_]?key|authorization)["']?\s*[=:]\s*)
      (?: (?:basic|bearer|token)\s+[^\s"',;}\]]+ | "[^"]*" | '[^']*' | [^\s"'&,;}\]]+ )
    | (://)[^/\s]{1,500}(?=@)
    | \b(?:sk-|sk_live_|sk_test_|gsk_|gh[opsu]_|github_pat_|xox[abp]-|sbp_|sb_secret_|AIza|AKIA
        |basic\s+|bearer\s+)[\w.=+/-]{8,}
    | \beyJ[\w-]{8,}\.[\w-]+\.[\w-]+  # a JWT
    | -----BEGIN\ [A-Z ]{0,30}PRIVATE\ KEY-----.*?(?:-----END\ [^-]{0,50}-----|\Z)
    """
)


def without_secrets(text: str) -> str:
    """The text with `…` in place of what looks like a password or a key."""
    return _SECRETS.sub(lambda found: (found[1] or found[2] or "") + "…", text)


def describe_error(error: BaseException) -> str:
    """An exception for the record: class and message, without what looks like a key."""
    try:
        said = str(error)
    except Exception:  # noqa: BLE001 - a foreign class; that it has no words must not hide what happened
        said = "(it cannot be printed)"
    text = f"{type(error).__name__}: {said}"[: 2 * _ERROR_CHARACTERS_MAX]
    return without_secrets(text)[:_ERROR_CHARACTERS_MAX]


def run_as_json(
    run: OpenRun, status: RunStatus, messages: Iterable[BaseMessage], *, error: BaseException | None = None
) -> dict[str, Any]:
    """The argument of `record_run`."""
    plain: dict[str, dict[str, Any]] = {}
    messages = list(messages)
    for message in _recordable(messages):
        item = message_as_json(message, run.said)
        if message.id is None and item["message_id"] in plain:  # the same words once more
            item["message_id"] += f"-{len(plain)}"
        plain[item["message_id"]] = item
    recorded = list(plain.values())
    usage = usage_of(messages)
    return {
        "run_id": run.run_id,
        "status": status,
        "messages": recorded,
        "tool_errors": tool_errors_of(recorded),
        "error": None if error is None else describe_error(error),
        "exposures": [dict(item) for item in run.exposures],
        "started_at": run.started_at,
        "finished_at": now(),
    } | ({"facts": {"usage": usage}} if usage else {})
