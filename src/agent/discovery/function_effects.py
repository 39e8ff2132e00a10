"""Whether functions write: from the words of their bodies, and from the functions that they call."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import postgast

from agent.discovery.structure import full_name

Writes = Literal["yes", "no", "unknown"]

_STARTS: Final = {None, ";", "begin", "then", "else", "loop", ">>"}
"""What stands before a statement."""
_COMMANDS: Final = {
    "alter", "cluster", "comment", "copy", "create", "drop", "grant", "import", "reassign", "refresh", "reindex",
    "revoke", "security", "truncate", "vacuum",
}  # fmt: skip
"""Statements that change something, where they begin one; elsewhere these words are names too."""
_FOLLOWED: Final = {"insert": "into", "delete": "from", "merge": "into"}
_WRITERS: Final = {
    "nextval",
    "setval",
    "lo_create",
    "lo_creat",
    "lo_from_bytea",
    "lo_import",
    "lo_put",
    "lo_unlink",
    "lowrite",
}
_UNKNOWN_PREFIXES: Final = (
    "dblink",
    "http_",
    "pg_read_",
    "pg_file_",
    "pg_ls_",
    "pg_terminate",
    "pg_cancel",
    "pg_reload",
)
_SEARCHED_FOR_SET: Final = 12
_COMMENTS: Final = {275, 276}  # SQL_COMMENT and C_COMMENT of libpg_query
_IDENTIFIER: Final = 258
_NOT_CALLABLE: Final = {2, 4}  # keywords that are column names (coalesce, values, …) or reserved


@dataclass(frozen=True, kw_only=True)
class Effects:
    """What the text of one body tells."""

    writes: Writes
    """By its own statements, those of called functions left aside."""
    calls: Sequence[str]
    """Names followed by a parenthesis, as they are written: with or without a schema. Some are no functions."""


def own_effects(document: Mapping[str, Any]) -> Effects:
    """The effects of one function's own body; `document` is as the structure query returns it."""
    language, is_volatile = document["language"], document["volatility"] == "volatile"
    if document.get("body_calls") is not None:
        return Effects(writes="yes" if document["body_writes"] else "no", calls=document["body_calls"])
    if language not in ("sql", "plpgsql"):
        return Effects(writes="no" if language == "internal" and not is_volatile else "unknown", calls=())
    try:
        found = effects_of(document["body"] or "")
    except postgast.PgQueryError:
        return Effects(writes="unknown", calls=())
    # Postgres refuses statements that write in a function that is not volatile, dynamic ones too.
    return found if is_volatile else Effects(writes="no", calls=found.calls)


def effects_of(body: str) -> Effects:
    """Read the body of an SQL or PL/pgSQL function, word by word: comments and texts do not count.

    Errs towards `unknown`: text that is put together and executed may do anything.

    Raises:
        postgast.PgQueryError: it has a text or a comment without an end.
    """
    encoded = body.encode()
    tokens = [token for token in postgast.scan(body).tokens if token.token not in _COMMENTS]
    words = [encoded[token.start : token.end].decode() for token in tokens]
    plain = [
        word.lower() if (token.token == _IDENTIFIER and word[0] != '"') or token.keyword_kind else word
        for word, token in zip(words, tokens, strict=True)
    ]
    found: Writes = "no"
    calls: dict[str, None] = {}
    for place, word in enumerate(plain):
        before = plain[place - 1] if place else None
        after = plain[place + 1] if place + 1 < len(plain) else None
        if before == ".":
            is_command = False
        elif word in _FOLLOWED:
            is_command = after == _FOLLOWED[word]
        elif word == "update":
            is_command = before not in ("for", "key") and "set" in plain[place : place + _SEARCHED_FOR_SET]
        else:
            is_command = word in _COMMANDS and before in _STARTS
        if is_command:
            found = "yes"
        elif word in ("execute", "do") and before in {*_STARTS, "query", "in", "for"} and found == "no":
            found = "unknown"
        is_name = tokens[place].token == _IDENTIFIER or tokens[place].keyword_kind not in _NOT_CALLABLE | {0}
        if after == "(" and is_name:
            name = _unquoted(word)
            qualified = before == "." and place > 1
            calls[full_name(_unquoted(plain[place - 2]), name) if qualified else name] = None
    return Effects(writes=found, calls=tuple(calls))


def _unquoted(word: str) -> str:
    return word[1:-1].replace('""', '"') if word[:1] == '"' else word


def with_writes(functions: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The documents with `writes` (`yes`, `no`, `unknown`), by their own effects and those of what they call."""
    documents = [dict(document) for document in functions]
    by_name: dict[str, list[dict[str, Any]]] = {}
    for document in documents:
        document["writes"] = document["effects"]["writes"]
        for name in (full_name(document["schema"], document["name"]), document["name"]):
            by_name.setdefault(name, []).append(document)
    changed = True
    while changed:
        changed = False
        for document in documents:
            if document["writes"] != "yes":
                worst = _worst(
                    [document["writes"], *(_of_call(name, by_name) for name in document["effects"]["calls"])]
                )
                changed = changed or worst != document["writes"]
                document["writes"] = worst
    return documents


def _of_call(name: str, by_name: Mapping[str, Sequence[Mapping[str, Any]]]) -> Writes:
    if name in by_name:
        found = {document["writes"] for document in by_name[name]}
        return found.pop() if len(found) == 1 else "unknown"  # overloaded: which one, the arguments say
    schema, _, bare = name.rpartition(".")
    if bare in _WRITERS:
        return "yes"
    is_ours_to_know = schema in ("", "pg_catalog") and not bare.startswith(_UNKNOWN_PREFIXES)
    return "no" if is_ours_to_know else "unknown"


def _worst(found: Iterable[Writes]) -> Writes:
    seen = set(found)
    return "yes" if "yes" in seen else "unknown" if "unknown" in seen else "no"
