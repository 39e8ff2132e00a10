"""What kind of values a column holds, told by its type, and whether a sample reads them at all."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

_NUMBERS: Final = ("smallint", "integer", "bigint", "numeric", "real", "double precision", "money", "oid")
_TEXTS: Final = ("text", "character", "bpchar", "citext", "name", '"char"')
# Documents, lists, bytes and shapes: a value may be of any size, and says nothing as a text.
_UNREAD: Final = (
    "json", "jsonb", "xml", "bytea", "tsvector", "tsquery", "vector", "halfvec", "sparsevec", "hstore",
    "geometry", "geography", "point", "line", "lseg", "box", "path", "polygon", "circle", "bit",
)  # fmt: skip
_EXACT_FORMATS: Final[Mapping[str, str]] = {
    "smallint": "integer", "integer": "integer", "bigint": "integer", "oid": "integer", "numeric": "number",
    "real": "number", "double precision": "number", "money": "number", "boolean": "boolean", "uuid": "uuid",
    "date": "date", "json": "json", "jsonb": "json", "xml": "xml", "bytea": "bytes", "inet": "ip", "cidr": "ip",
    "macaddr": "mac", "macaddr8": "mac", "interval": "interval", "vector": "vector",
}  # fmt: skip


def base_type(column: Mapping[str, Any]) -> str:
    """The type without its length, precision and schema: `numeric(10,2)` is `numeric`."""
    plain = re.sub(r"\([^)]*\)", "", str(column["type"]))
    return plain if '"' in plain else plain.rpartition(".")[2].strip()


def kind_of(column: Mapping[str, Any]) -> str:
    """`boolean`, `number`, `time`, `enum`, `uuid`, `text`, `network`, `unread`; `other` are types that we do not know.

    Args:
        column: a column of a structure document.
    """
    name = base_type(column)
    if column.get("enum"):
        return "enum"
    if name.endswith("[]") or name.startswith(_UNREAD):
        return "unread"
    if name in ("boolean", "uuid"):
        return name
    if name in _NUMBERS:
        return "number"
    if name == "date" or name.startswith("timestamp"):
        return "time"
    if name.startswith(_TEXTS):
        return "text"
    return "network" if name in ("inet", "cidr", "macaddr", "macaddr8") else "other"


def format_of_type(column: Mapping[str, Any]) -> str | None:
    """The format that the type alone tells, or `None` for text and for types that we do not know."""
    name = base_type(column)
    if column.get("enum"):
        return "enum"
    if name.endswith("[]"):
        return "array"
    if name.startswith("timestamp"):
        return "timestamp"
    return _EXACT_FORMATS.get(name)
