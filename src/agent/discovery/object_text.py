"""Objects of an application in words: for memories that recall finds, and for what changed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from agent.discovery.structure import full_name, quoted

_WORD: Final = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[^\W\d_A-Z]+|\d+")
_TEXT_CHARACTERS_MAX: Final = 6_000
_COMMENT_CHARACTERS_MAX: Final = 500
_VALUES_MAX: Final = 20
_DIFFERENCES_MAX: Final = 12
_KINDS: Final = {
    "table": "Table", "partitioned_table": "Partitioned table", "view": "View",
    "materialized_view": "Materialised view", "foreign_table": "Foreign table",
}  # fmt: skip

Document = Mapping[str, Any]


def words_of(name: str) -> list[str]:
    """The words that a name is made of, in lower case: `orderItems` and `order_items` are `order`, `items`."""
    return [word.lower() for word in _WORD.findall(name)]


def table_text(table: Document, referenced_by: Iterable[str] = ()) -> str:
    """A table or view as a memory: its name also in words, columns, comments and what it refers to."""
    name = full_name(table["schema"], table["name"])
    parts = [f"{_KINDS[table['kind']]} {name}: {' '.join(words_of(table['name']))}."]
    parts += _comment(table)
    if table["partitions"]:
        parts.append(f"{table['partitions']} partitions by {table['partition_by']}.")
    if table["reads"]:
        parts.append(f"It reads {', '.join(table['reads'])}.")
    parts.append(f"Columns: {'; '.join(_column(column) for column in table['columns'])}.")
    if ties := sorted({full_name(key["to_schema"], key["to_table"]) for key in table["foreign_keys"]}):
        parts.append(f"Refers to {', '.join(ties)}.")
    if others := sorted(set(referenced_by)):
        parts.append(f"Referred to by {', '.join(others)}.")
    return _cut(" ".join(parts))


def _column(column: Document) -> str:
    text = f"{quoted(column['name'])} {column['type']}"
    in_words = " ".join(words_of(column["name"]))
    if in_words != column["name"].lower() and "_" not in column["name"]:
        text += f" ({in_words})"
    if column["enum"]:
        text += f", one of {', '.join(column['enum'][:_VALUES_MAX])}"
    return " ".join([text, *_comment(column)])


def function_text(function: Document) -> str:
    """A function as a memory."""
    name = full_name(function["schema"], function["name"])
    result = f" returning {function['result']}" if function["result"] else ""
    writes = {"yes": "It writes.", "no": "It only reads.", "unknown": "Whether it writes is not known."}
    in_words = " ".join(words_of(function["name"]))
    parts = [
        f"{function['kind'].capitalize()} {name}({function['arguments']}){result}: {in_words}.",
        *_comment(function),
        writes[function["writes"]],
    ]
    return _cut(" ".join(parts))


def relationship_text(relationship: Document) -> str:
    """A key between two tables as a memory."""
    one, other = relationship["from_table"], relationship["to_table"]
    how = "refers to" if relationship["declared"] else "seems to refer to"
    from_columns, to_columns = _names(relationship["from_columns"]), _names(relationship["to_columns"])
    in_words = f"{' '.join(words_of(one))} to {' '.join(words_of(other))}"
    return _cut(f"Relationship: {one} ({from_columns}) {how} {other} ({to_columns}): {in_words}.")


def change_text(kind: str, name: str, old: Document | None, new: Document) -> str:
    """What became of an object, in one line."""
    if old is None:
        columns = [column["name"] for column in new.get("columns", ())]
        return f"added {kind} {name}" + (f" ({_names(columns)})" if columns else "")
    differences = list(_differences(old, new))
    more = f" and {len(differences) - _DIFFERENCES_MAX} more" if len(differences) > _DIFFERENCES_MAX else ""
    return f"changed {kind} {name}: {', '.join(differences[:_DIFFERENCES_MAX]) or 'its definition'}{more}"


def _differences(old: Document, new: Document) -> Iterable[str]:
    before = {column["name"]: column for column in old.get("columns", ())}
    after = {column["name"]: column for column in new.get("columns", ())}
    yield from (f"new column {quoted(name)} {after[name]['type']}" for name in after if name not in before)
    yield from (f"no column {quoted(name)} any more" for name in before if name not in after)
    for name in after.keys() & before.keys():
        for item, value in after[name].items():
            if value != before[name].get(item):
                yield f"{item} of column {quoted(name)} is {_shown(value)}, was {_shown(before[name].get(item))}"
    for item in new:
        if item in ("columns", "fingerprint", "effects") or new[item] == old.get(item):
            continue
        if isinstance(new[item], list) and isinstance(old.get(item), list):
            yield f"{item.replace('_', ' ')}"
        elif item == "definition_hash":
            yield "its definition"
        else:
            yield f"{item.replace('_', ' ')} is {_shown(new[item])}, was {_shown(old.get(item))}"


def _shown(value: Any) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 100 else f"{text[:100]}…"


def _names(names: Sequence[str]) -> str:
    return ", ".join(quoted(name) for name in names)


def _comment(document: Document) -> list[str]:
    comment = " ".join((document["comment"] or "").split())
    return [f"({comment[:_COMMENT_CHARACTERS_MAX]})"] if comment else []


def _cut(text: str) -> str:
    return text if len(text) <= _TEXT_CHARACTERS_MAX else f"{text[:_TEXT_CHARACTERS_MAX]} …"
