"""Runs from logs: messages in OpenAI's format, read into the form of `agent_run`."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Never

from agent.errors import CallerError
from agent.identity import Identity

REWARD_OF_SUCCESS = 1 - 1e-6
"""A run with at least this reward succeeded. Rewards of whole tasks are 1.0, give or take an addition of floats."""

_CONTENT_CHARACTERS_MAX = 2_000_000
_ERROR_CHARACTERS_MAX = 2_000
_ADDRESS_CHARACTERS_MAX = 200
_ARGUMENT_LEVELS_MAX = 50
_CONTENT_LEVELS_MAX = 20


class UnreadableRun(CallerError):
    """A line of a log is no run; the message says why in a few words."""


def read_run(
    line: str, *, source_file: str | None = None, agent_id: str | None = None, session_id: str | None = None
) -> dict[str, Any]:
    """One run, as `import_runs` takes it, from one JSON object with `messages` or `traj`.

    Optional beside them: `reward` (a number), `task_id`, `trial`, `session_id`, `agent_id`. The rest is passed over.

    Args:
        line: the JSON text of the object.
        source_file: name of the file, for the record.
        agent_id: agent of a run that names none itself.
        session_id: session of a run that names none itself; `None`: each run is a session of its own.

    Raises:
        UnreadableRun: it cannot be read, and why.
    """
    try:
        return _read_run(_read_object(line), source_file, agent_id, session_id)
    except RecursionError:
        raise UnreadableRun("is nested too deeply") from None


def _read_run(
    record: Mapping[str, Any], source_file: str | None, agent_id: str | None, session_id: str | None
) -> dict[str, Any]:
    messages = _read_messages(record)
    run = {
        "run_id": _run_id(record),
        "status": "completed",
        "session_id": _identifier(record, "session_id") or session_id,
        "agent_id": _identifier(record, "agent_id") or agent_id,
        "messages": messages,
        "tool_errors": tool_errors(messages),
        "outcomes": _outcomes(record),
        "facts": {
            name: value
            for name, value in (
                ("task_id", record.get("task_id")),
                ("trial", record.get("trial")),
                ("source_file", source_file),
            )
            if isinstance(value, str | int | float)
        },
    }
    return {name: value for name, value in run.items() if value is not None}


def tool_errors(messages: Iterable[Mapping[str, Any]]) -> list[dict[str, str]]:
    """The tool results that are marked as errors: `{tool, tool_call_id, message}`."""
    return [
        {
            "tool": message.get("name") or "unknown",
            "tool_call_id": message.get("tool_call_id") or "",
            "message": (error_in(message["content"]) or message["content"]).strip()[:_ERROR_CHARACTERS_MAX],
        }
        for message in messages
        if message["role"] == "tool" and message.get("is_error")
    ]


# --- what a failed tool call looks like -------------------------------------------------------------------------

_FAILED_TEXT = re.compile(
    r"""
    (?:
        (?:error|exception)\b
        (?: \s*\Z | \s*[:!(\[\u2013\u2014] | \.(?:\s|\Z) | \s+-\s | \s+\d{3}\b
          # What follows makes the difference between "Error in line 3" and "Error handling, a guide".
          | \s+(?:occurred|while|during|when|in|from|code\s+\d|calling|connecting|creating|decoding|deleting|executing
                |fetching|getting|invoking|loading|opening|parsing|processing|reading|retrieving|running|saving|searching
                |sending|updating|validating|writing)\b )
      | <\w*error>  # some frameworks put it into a tag
      | traceback\s*(?:\(most\ recent|:)
      | (?-i:(?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception))\s*(?:[:(]|\Z)  # "requests.exceptions.HTTPError: 404"
    )
    """,
    re.VERBOSE | re.IGNORECASE,
)
_NO_ERROR = frozenset({"", "0", "false", "n/a", "nil", "no", "no error", "none", "null", "ok"})


def error_in(content: str) -> str | None:
    """What went wrong by a tool's result, or `None` where the result says of no failure.

    A failure is a text that starts as one, or a JSON object with a truthy `error`, `status` "error", `success` false or
    `isError`. A result that speaks of errors elsewhere, such as a log that was searched, is none.
    """
    text = content.strip()
    if text[:1] in ("{", '"'):
        try:
            value = _loads(text)
        except (ValueError, RecursionError):
            value = None  # a text that looks like JSON
        if isinstance(value, Mapping):
            return _error_in_object(value, text)
        if isinstance(value, str):
            text = value.strip()
    return text if _FAILED_TEXT.match(text) else None


def _error_in_object(result: Mapping[str, Any], text: str) -> str | None:
    error = result.get("error")
    is_failure = (
        result.get("isError") is True
        or result.get("is_error") is True
        or result.get("success") is False
        or result.get("status") == "error"
        # A float under this name is a measurement, and what says that it succeeded is believed.
        or (_is_error_value(error) and result.get("success") is not True)
    )
    if not is_failure:
        return None
    for said in (error, *(result.get(name) for name in ("message", "detail", "reason", "content"))):
        if isinstance(said, Mapping) and isinstance(said.get("message"), str):
            return str(said["message"])
        if isinstance(said, str) and said.strip().lower() not in _NO_ERROR:
            return said
    return text


def _is_error_value(error: Any) -> bool:
    if isinstance(error, str):
        return error.strip().lower() not in _NO_ERROR
    return bool(error) and not isinstance(error, float)


# --- messages ---------------------------------------------------------------------------------------------------


def _read_messages(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    name = next((name for name in ("messages", "traj") if record.get(name) is not None), None)
    if name is None:
        raise UnreadableRun("has neither 'messages' nor 'traj'")
    given = record[name]
    if not isinstance(given, list):
        raise UnreadableRun(f"'{name}' is {_kind(given)}, not a list")
    if not given:
        raise UnreadableRun(f"'{name}' is empty")
    messages = []
    tools: dict[str, str] = {}
    for position, message in enumerate(given, start=1):
        if not isinstance(message, Mapping):
            raise UnreadableRun(f"message {position} is {_kind(message)}, not an object")
        read = _read_message(message, position)
        tools.update((call["id"], call["name"]) for call in read.get("tool_calls", ()) if call["id"])
        if (
            read["role"] == "tool"
            and "name" not in read
            and (tool := tools.get(read.get("tool_call_id", "")))
        ):
            read["name"] = tool
        messages.append(read)
    return messages


def _read_message(message: Mapping[str, Any], position: int) -> dict[str, Any]:
    role = message.get("role")
    if not isinstance(role, str) or not role.strip():
        raise UnreadableRun(f"message {position} has no role")
    if not _has_levels(message.get("content"), _CONTENT_LEVELS_MAX):
        raise UnreadableRun(
            f"message {position}: 'content' is nested too deeply, more than {_CONTENT_LEVELS_MAX} levels"
        )
    content = _text(message.get("content"))
    if not content and isinstance(message.get("refusal"), str):
        content = message["refusal"]
    read: dict[str, Any] = {
        "message_id": f"m{position}",
        "role": "tool" if role == "function" else role,
        "content": content,
    }
    if calls := _tool_calls(message, position):
        read["tool_calls"] = calls
    for name in ("tool_call_id", "name"):
        if isinstance(message.get(name), str) and message[name]:
            read[name] = message[name]
    if read["role"] == "tool":
        is_marked = any(message.get(flag) is True for flag in ("is_error", "isError"))
        if is_marked or message.get("status") == "error" or error_in(content) is not None:
            read["is_error"] = True
    return read


def _tool_calls(message: Mapping[str, Any], position: int) -> list[dict[str, Any]]:
    calls = message.get("tool_calls") or ()
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        raise UnreadableRun(f"message {position}: 'tool_calls' is {_kind(calls)}, not a list")
    if isinstance(message.get("function_call"), Mapping):  # the form before tools
        calls = [*calls, {"function": message["function_call"]}]
    read = []
    for call in calls:
        if not isinstance(call, Mapping):
            raise UnreadableRun(f"message {position}: a tool call is {_kind(call)}, not an object")
        function = call.get("function")
        if not isinstance(function, Mapping):
            function = call
        name = function.get("name")
        read.append(
            {
                "id": call["id"] if isinstance(call.get("id"), str) else "",
                "name": name if isinstance(name, str) and name else "unknown",
                "args": _arguments(function.get("arguments", function.get("args"))),
            }
        )
    return read


def _arguments(given: Any) -> Any:
    """The arguments as an object where they are one, else as the text they are."""
    value = given
    if isinstance(given, str):
        try:
            value = _loads(given)
        except (ValueError, RecursionError):
            return _cut(given)
    if isinstance(value, Mapping) and _has_levels(value, _ARGUMENT_LEVELS_MAX):
        return value
    if given is None:
        return {}
    return _cut(given if isinstance(given, str) else json.dumps(given, ensure_ascii=False))


def _has_levels(value: Any, levels: int) -> bool:
    """Whether no more than these levels are inside one another."""
    if isinstance(value, Mapping):
        return levels > 0 and all(_has_levels(item, levels - 1) for item in value.values())
    if isinstance(value, list):
        return levels > 0 and all(_has_levels(item, levels - 1) for item in value)
    return True


# Found by its payload, whose characters cannot begin another one, and then looked at backwards over a bounded length:
# a pattern that begins at "data:" goes over the same text again and again where there is no payload.
_PAYLOAD = re.compile(r";base64,(?P<data>[A-Za-z0-9+/=_-]{256,})")
_PAYLOAD_HEAD = re.compile(r"data:(?P<kind>[\w.+-]++/[\w.+-]++)?+[\w;=.-]*+")
_PAYLOAD_HEAD_CHARACTERS_MAX = 200


def _embedded_in(text: str) -> Iterator[tuple[int, int, str]]:
    """The files in a text, as data addresses: beginning, end, and what to write in their place."""
    done = 0
    for found in _PAYLOAD.finditer(text):
        start = text.rfind("data:", max(done, found.start() - _PAYLOAD_HEAD_CHARACTERS_MAX), found.start())
        head = _PAYLOAD_HEAD.fullmatch(text, start, found.start()) if start >= 0 else None
        if head is not None:
            done = found.end()
            yield start, done, f"{head['kind'] or 'data'}, {_size(found['data'])}"


def _without_embedded(text: str) -> str:
    parts = []
    done = 0
    for start, end, label in _embedded_in(text):
        parts += [text[done:start], f"[{label}]"]
        done = end
    return "".join([*parts, text[done:]]) if parts else text


def _text(content: Any) -> str:
    """The text of a content; what is no text is named with its kind and size, never copied."""
    if content is None:
        return ""
    if isinstance(content, str):
        return _cut(_without_embedded(content))
    if isinstance(content, list):
        return _cut("\n".join(_part(part) for part in content))
    return _cut(json.dumps(content, ensure_ascii=False))


def _part(part: Any) -> str:
    if not isinstance(part, Mapping):
        return _text(part)
    kind = part["type"][:_ADDRESS_CHARACTERS_MAX] if isinstance(part.get("type"), str) else "part"
    for name in ("text", "refusal"):
        if isinstance(part.get(name), str):
            return _text(part[name])
    body = part.get(kind)
    body = body if isinstance(body, Mapping) else part
    if isinstance(part.get("image_url"), str):
        body = {"url": part["image_url"]}
    if isinstance(body.get("source"), Mapping):  # {type: image, source: {media_type, data}}
        body = body["source"]
    label = kind.removeprefix("input_").removesuffix("_url")
    url = body.get("url")
    if isinstance(url, str):
        start, _, embedded = next(_embedded_in(url), (-1, 0, ""))
        return f"[{label} {embedded if start == 0 else url[:_ADDRESS_CHARACTERS_MAX]}]"
    details = [str(body[name])[:_ADDRESS_CHARACTERS_MAX] for name in ("filename", "media_type", "format")
               if isinstance(body.get(name), str)]  # fmt: skip
    data = next((body[name] for name in ("data", "file_data") if isinstance(body.get(name), str)), None)
    if data is not None:
        details.append(_size(data.rpartition(",")[2]))
    return f"[{' '.join([label, *details])}]"


def _size(base64_text: str) -> str:
    size = len(base64_text) * 3 // 4
    return f"{size} bytes" if size < 10_000 else f"{size // 1000} kB"


def _cut(text: str) -> str:
    surplus = len(text) - _CONTENT_CHARACTERS_MAX
    return text if surplus <= 0 else f"{text[:_CONTENT_CHARACTERS_MAX]}… [{surplus} characters left out]"


# --- the line ---------------------------------------------------------------------------------------------------


def _loads(text: str) -> Any:
    """JSON as the standard has it: `NaN` and numbers beyond a float are refused, because Postgres refuses them."""
    return json.loads(text, parse_constant=_refuse_constant, parse_float=_finite)


def _refuse_constant(name: str) -> Never:
    raise ValueError(f"{name} is not JSON")


def _finite(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise ValueError(f"the number {digits[:20]} is too large")
    return value


def _read_object(line: str) -> Mapping[str, Any]:
    try:
        record = _loads(line)
    except json.JSONDecodeError as error:
        raise UnreadableRun(f"is not JSON: {error.msg} at character {error.pos + 1}") from None
    except RecursionError:
        raise UnreadableRun("is nested too deeply") from None
    except ValueError as error:
        raise UnreadableRun(f"cannot be read: {str(error)[:100]}") from None
    if not isinstance(record, dict):
        raise UnreadableRun(f"is {_kind(record)}, not an object")
    return record


def _run_id(record: Mapping[str, Any]) -> str:
    """The same for the same content, wherever it stands and however its keys are ordered."""
    try:
        canonical = json.dumps(record, sort_keys=True, separators=(",", ":"))
    except RecursionError:
        raise UnreadableRun("is nested too deeply") from None
    digest = hashlib.sha256(canonical.encode()).hexdigest()
    return f"{digest[:8]}-{digest[8:12]}-{digest[12:16]}-{digest[16:20]}-{digest[20:32]}"


def _identifier(record: Mapping[str, Any], name: str) -> str | None:
    value = record.get(name)
    if value is None or value == "":
        return None
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise UnreadableRun(f"'{name}' is {_kind(value)}, not text")
    try:
        Identity(session_id=str(value))
    except CallerError as error:
        raise UnreadableRun(str(error).replace("session_id", name, 1)[:200]) from None
    return str(value)


def _outcomes(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    reward = record.get("reward")
    if reward is None:
        return []
    if not isinstance(reward, int | float):
        raise UnreadableRun(f"'reward' is {_kind(reward)}, not a number")
    try:
        score = float(reward)
    except OverflowError:
        raise UnreadableRun("'reward' is too large a number") from None
    return [{"kind": "reward", "score": score, "succeeded": score >= REWARD_OF_SUCCESS, "details": {}}]


def _kind(value: Any) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "true or false"
        case str():
            return "text"
        case int() | float():
            return "a number"
        case list():
            return "a list"
        case _:
            return "an object"
