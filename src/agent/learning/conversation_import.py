"""Messages of a conversation that happened elsewhere, as turns that `add_turns` takes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from langchain_core.messages import BaseMessage

from agent.errors import InvalidRequest
from agent.learning.run_record import role_of, text_of

BATCH_TURNS = 500
"""Turns of one call to the database."""
BATCH_CHARACTERS = 400_000
"""A batch ends where its texts reach this."""
TURN_MAX = 1_048_575
"""Greatest number of a turn in its session."""
_KINDS = {"user": "user", "human": "user", "assistant": "assistant", "ai": "assistant"}
_NOT_SAID = ("system", "developer", "tool", "function")
_KEYS = ("role", "content", "name", "time", "captions", "turn", "tags")


def as_turns(
    messages: Iterable[BaseMessage | Mapping[str, Any]], *, first_turn: int = 1, tags: Sequence[str] = ()
) -> Iterator[dict[str, Any]]:
    """The turns of these messages: see `SemanticSearch.add_conversation` for what a message may be.

    Raises:
        InvalidRequest: a message that cannot be read; it says which.
    """
    next_turn = first_turn
    taken: set[int] = set()
    for position, message in enumerate(messages, start=1):
        said = _read(message, position)
        if said is None:
            continue
        next_turn = said.pop("turn", None) or next_turn
        if next_turn in taken or next_turn > TURN_MAX:
            raise InvalidRequest(
                f"message {position}: turn={next_turn} must be a number up to {TURN_MAX} that no other message has"
            )
        taken.add(next_turn)
        yield said | {"turn": next_turn, "tags": sorted({*tags, *said.pop("tags", ())})}
        next_turn += 1


def batches(turns: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """The turns in lots that one call takes."""
    batch: list[dict[str, Any]] = []
    characters = 0
    for turn in turns:
        batch.append(turn)
        characters += len(turn["content"])
        if len(batch) >= BATCH_TURNS or characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _read(message: BaseMessage | Mapping[str, Any], position: int) -> dict[str, Any] | None:
    """One message as a turn without its number; `None` for one that nobody of the two said."""
    if isinstance(message, BaseMessage):
        given: Mapping[str, Any] = {
            "role": role_of(message),
            "content": message.content,
            "name": message.name,
            **{key: message.additional_kwargs.get(key) for key in ("time", "captions", "turn", "tags")},
        }
    elif isinstance(message, Mapping):
        given = message
        if unknown := [key for key in given if key not in _KEYS]:
            raise InvalidRequest(
                f"message {position}: {unknown[0]!r} is no key of a message; there are {', '.join(_KEYS)}"
            )
    else:
        raise InvalidRequest(
            f"message {position} is a {type(message).__name__}; it must be a LangChain message or a dict"
        )
    role = given.get("role")
    if role in _NOT_SAID:
        return None
    if role not in _KINDS:
        raise InvalidRequest(f"message {position}: role={role!r} is none of {', '.join(_KINDS)}")
    turn: dict[str, Any] = {"kind": _KINDS[role], "content": _content(given, position)}
    if not any(character.isalnum() for character in turn["content"]):
        return None
    name = given.get("name")
    if name is not None and not isinstance(name, str):
        raise InvalidRequest(f"message {position}: name={name!r} must be text")
    if name and name.strip():
        turn["speaker"] = name.strip()[:200]
    if given.get("time") is not None:
        turn["valid_from"] = instant(given["time"], f"message {position}: time")
    number = given.get("turn")
    if number is not None:
        if type(number) is not int or not 1 <= number <= TURN_MAX:
            raise InvalidRequest(f"message {position}: turn={number!r} must be a number from 1 to {TURN_MAX}")
        turn["turn"] = number
    turn["tags"] = texts(given.get("tags") or (), f"message {position}: tags")
    return turn


def _content(given: Mapping[str, Any], position: int) -> str:
    content = given.get("content")
    if content is not None and not isinstance(content, str | list):
        raise InvalidRequest(f"message {position}: content={content!r:.100} must be text or a list of parts")
    captions = texts(given.get("captions") or (), f"message {position}: captions")
    shown = [f"[image: {caption.strip()}]" for caption in captions if caption.strip()]
    return "\n".join(part for part in (text_of(content).strip(), *shown) if part)


def texts(given: Any, name: str) -> list[str]:
    """A list of texts.

    Raises:
        InvalidRequest: it is none.
    """
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise InvalidRequest(f"{name}={given!r:.100} must be a list of texts")
    found = list(given)
    if not all(isinstance(item, str) for item in found):
        raise InvalidRequest(f"{name}={given!r:.100} must be a list of texts")
    return found


def instant(given: Any, name: str) -> str:
    """A moment as Postgres takes it; one without a time zone is UTC.

    Raises:
        InvalidRequest: it is no `datetime` and no ISO 8601.
    """
    try:
        moment = given if isinstance(given, datetime) else datetime.fromisoformat(given)
    except (TypeError, ValueError):
        raise InvalidRequest(f"{name}={given!r:.100} must be a datetime or a text in ISO 8601") from None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return moment.isoformat()
