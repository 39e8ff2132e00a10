"""What an approval is bound to: one hash over everything that must not change between the yes and the deed."""

from __future__ import annotations

import hashlib
import json
import math
import unicodedata
from collections.abc import Mapping
from typing import Any, Final

from agent.errors import InvalidRequest

_DEPTH_MAX: Final = 64
_WHOLE_MIN: Final = -(2**63)
_WHOLE_MAX: Final = 2**64 - 1
_HIDING: Final = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})


def canonical_json(value: Any) -> str:
    """One text per value: keys sorted, nothing left out; `1`, `1.0`, `"1"` and `true` stay apart.

    Text is taken as it is, not normalised: two spellings of one letter are two values.

    Raises:
        InvalidRequest: something that JSON has no word for, such as NaN, a key that is no text, or half a character;
            or what the database would not give back as it is: a NUL, or a whole number of more than 64 bits.
    """
    _check(value, 0)
    return json.dumps(value, sort_keys=True, ensure_ascii=True, allow_nan=False, separators=(",", ":"))


def _check(value: Any, depth: int) -> None:
    if depth > _DEPTH_MAX:
        raise InvalidRequest(f"the arguments are nested more than {_DEPTH_MAX} deep")
    if value is None or isinstance(value, bool):
        return
    if isinstance(value, int):
        if not _WHOLE_MIN <= value <= _WHOLE_MAX:  # read back from the database it would be another number
            raise InvalidRequest("a whole number of the arguments has more than 64 bits; pass it as text")
        return
    if isinstance(value, float):
        if not math.isfinite(value):
            raise InvalidRequest(f"{value!r} is no number that can be approved")
    elif isinstance(value, str):
        if any("\ud800" <= letter <= "\udfff" for letter in value):
            raise InvalidRequest("a text of the arguments holds half a character (a lone surrogate)")
        if "\0" in value:  # Postgres keeps none, so what is logged and shown would not be what runs
            raise InvalidRequest("a text of the arguments holds a NUL character")
    elif isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise InvalidRequest(f"the key {key!r} of the arguments is no text")
            _check(key, depth)
            _check(item, depth + 1)
    elif isinstance(value, list | tuple):
        for item in value:
            _check(item, depth + 1)
    else:
        raise InvalidRequest(
            f"arguments hold a {type(value).__name__}, which JSON has no word for; pass text, numbers, lists and dicts"
        )


def binding_hash(
    tool: str,
    arguments: Mapping[str, Any],
    *,
    version: str = "1",
    tenant_id: str,
    target: str = "",
    thread_id: str | None = None,
    tool_call_id: str | None = None,
    bounds: Mapping[str, Any] | None = None,
    policy_version: str = "",
) -> str:
    """sha256 of the whole call, 64 hex digits: whatever of it changes needs another approval.

    Args:
        tool: its name.
        arguments: as they are run.
        version: of the tool.
        tenant_id: for whom.
        target: what it acts on, such as a database.
        thread_id: the conversation it belongs to.
        tool_call_id: which call of that conversation.
        bounds: limits that are held to when it runs, such as rows per table.
        policy_version: of the policy it was judged by.

    Raises:
        InvalidRequest: as `canonical_json`.
    """
    whole = {
        "tool": tool,
        "version": version,
        "arguments": dict(arguments),
        "tenant_id": tenant_id,
        "target": target,
        "thread_id": thread_id,
        "tool_call_id": tool_call_id,
        "bounds": None if bounds is None else dict(bounds),
        "policy_version": policy_version,
    }
    return hashlib.sha256(canonical_json(whole).encode()).hexdigest()


def shown(value: Any) -> str:
    """Text for people in which every character can be seen: what is invisible or turns the direction of writing is
    written as `\\u{202E}`. Line feeds and tabs stay. What is no text is shown as JSON."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return "".join(
        f"\\u{{{ord(letter):04X}}}"
        if letter not in "\n\t" and unicodedata.category(letter) in _HIDING
        else letter
        for letter in text
    )
