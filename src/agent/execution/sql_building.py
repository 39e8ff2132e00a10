"""SQL made from typed values. What is made goes through the gate like any other statement."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal

from agent.errors import InvalidRequest

Comparison = Literal[
    "=", "!=", "<", "<=", ">", ">=", "like", "ilike", "in", "is_null", "is_not_null", "contains"
]

_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,62}")
_WORDS: Final[Mapping[str, str]] = {"like": "LIKE", "ilike": "ILIKE", "contains": "@>", "!=": "<>"}
_LIST_MAX: Final = 200


def identifier(name: str, of: str = "column") -> str:
    """A name as SQL, quoted; `of` says in the message what it should name.

    Raises:
        InvalidRequest: it is no plain name.
    """
    if not _NAME.fullmatch(name):
        raise InvalidRequest(f"{name!r} is no name of a {of}: letters, digits and _ only, at most 63")
    return f'"{name}"'


def table_name(name: str) -> str:
    """`schema.table` as SQL, quoted.

    Raises:
        InvalidRequest: it has no schema, or a part is no plain name.
    """
    schema, dot, table = name.partition(".")
    if not dot:
        raise InvalidRequest(f"table={name!r} must be written schema.table, such as public.{name}")
    return f"{identifier(schema, 'schema')}.{identifier(table, 'table')}"


def literal(value: Any) -> str:
    """A value as SQL. Text is a constant without a type, which takes that of the column beside it.

    Raises:
        InvalidRequest: it is none of text, number, true, false and null, or text that Postgres cannot store.
    """
    if value is None:
        return "NULL"
    if isinstance(value, bool):
        return "TRUE" if value else "FALSE"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float) and math.isfinite(value):
        return repr(value)
    if isinstance(value, str):
        if "\x00" in value:
            raise InvalidRequest("a value holds a NUL character, which Postgres cannot store")
        # `standard_conforming_strings` is on for the agent's logins and for the parser: a backslash is itself.
        return "'" + value.replace("'", "''") + "'"
    raise InvalidRequest(
        f"a value is {type(value).__name__}; allowed are text, numbers, true, false and null"
    )


def condition(column: str, comparison: Comparison, value: Any) -> str:
    """One comparison of a column with a value.

    Raises:
        InvalidRequest: the value does not fit the comparison.
    """
    name = identifier(column)
    if comparison in ("is_null", "is_not_null"):
        if value is not None:
            raise InvalidRequest(f"{comparison} of {column!r} takes no value")
        return f"{name} IS {'NOT ' if comparison == 'is_not_null' else ''}NULL"
    if comparison == "in":
        if not isinstance(value, Sequence) or isinstance(value, str) or not 0 < len(value) <= _LIST_MAX:
            raise InvalidRequest(f"'in' of {column!r} takes a list of 1 to {_LIST_MAX} values")
        return f"{name} IN ({', '.join(literal(item) for item in value)})"
    if value is None or isinstance(value, list | tuple):
        raise InvalidRequest(f"{comparison!r} of {column!r} takes one value; for none there is is_null")
    return f"{name} {_WORDS.get(comparison, comparison)} {literal(value)}"


def select(
    table: str,
    *,
    columns: Sequence[str],
    filters: Sequence[tuple[str, Comparison, Any]] = (),
    order: Sequence[tuple[str, bool]] = (),
    limit: int,
) -> str:
    """`SELECT` of these columns; all of them where none is named.

    Args:
        order: column and whether it goes downwards.
    """
    what = ", ".join(identifier(column) for column in columns) or "*"
    parts = ["SELECT", what, "FROM", table_name(table)]
    if filters:
        parts.append("WHERE " + " AND ".join(condition(*item) for item in filters))
    if order:
        parts.append(
            "ORDER BY " + ", ".join(f"{identifier(name)}{' DESC' if down else ''}" for name, down in order)
        )
    parts.append(f"LIMIT {limit:d}")
    return " ".join(parts)


def update(table: str, *, key: Mapping[str, Any], values: Mapping[str, Any]) -> str:
    """`UPDATE` of the rows whose columns are equal to all of `key`."""
    assigned = ", ".join(f"{identifier(name)} = {literal(value)}" for name, value in values.items())
    where = " AND ".join(
        condition(name, "is_null" if value is None else "=", value) for name, value in key.items()
    )
    return " ".join(("UPDATE", table_name(table), "SET", assigned, "WHERE", where))
