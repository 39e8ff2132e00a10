"""Patterns in short words, for prompts and for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from agent.discovery.structure import quoted

_VALUES_TOLD: Final = 6
_STEPS_TOLD: Final = 6
# What the type of a column says already.
_FORMATS_OF_TYPES: Final = frozenset(
    {
        "integer",
        "number",
        "boolean",
        "timestamp",
        "date",
        "enum",
        "array",
        "bytes",
        "interval",
        "xml",
        "vector",
    }
)


def describe_column(pattern: Mapping[str, Any], column: str) -> str:
    """What is known of a column in short words, such as `status: open 60 %, paid 38 %; open→paid`.

    Args:
        pattern: the pattern of its table.
        column: its name.

    Returns:
        An empty text where there is nothing to tell.
    """
    words = column_words(pattern, column)
    return f"{quoted(column)}: {words}" if words else ""


def column_words(pattern: Mapping[str, Any], column: str) -> str:
    """`describe_column` without the column's name."""
    known = pattern["columns"].get(column)
    parts = [] if known is None else _parts(known, is_whole=pattern.get("is_whole", False))
    steps = [
        f"{step['from']}→{step['to']}"
        for status in pattern["status_columns"]
        if status["column"] == column
        for step in status["transitions"]
    ]
    if steps:
        parts.append(", ".join(dict.fromkeys(steps[:_STEPS_TOLD])))
    return "; ".join(parts)


def _parts(known: Mapping[str, Any], *, is_whole: bool) -> list[str]:
    parts = []
    if known["personal"] is not None:
        parts.append(f"personal ({known['personal']})")
    if known["format"] and known["format"] not in _FORMATS_OF_TYPES and known["format"] != known["personal"]:
        parts.append(known["format"])
    if known["top"]:
        told = ", ".join(f"{value} {_percent(share)}" for value, share in known["top"][:_VALUES_TOLD])
        parts.append(told + (", …" if len(known["top"]) > _VALUES_TOLD else ""))
    elif known["minimum"] is not None:
        about = "" if is_whole else "about "  # a sample need not have met the least and the greatest
        parts.append(f"{about}{_short(known['minimum'])} to {_short(known['maximum'])}")
    if known["moves"]:
        parts.append("moves")
    if known["nulls"]:
        parts.append(f"{_percent(known['nulls'])} empty")
    return parts


def _percent(share: float) -> str:
    return f"{share * 100:.0f} %" if share >= 0.01 else "<1 %"


def _short(value: Any) -> str:
    return str(value)[:16]  # of a time the minutes


def describe_table(pattern: Mapping[str, Any]) -> str:
    """What is known of a table in short lines, the first with its rows; columns that say nothing are left out."""
    rows = pattern["row_estimate"]
    head = pattern["table"] if rows is None else f"{pattern['table']}: about {rows:,} rows"
    growth = pattern["growth_per_day"]
    if growth:
        head += f", {'+' if growth > 0 else '−'}{abs(round(growth)):,} a day"  # noqa: RUF001 - a minus, not a hyphen
    lines = (describe_column(pattern, column) for column in pattern["columns"])
    return "\n".join([head, *(f"- {line}" for line in lines if line)])


def patterns_worth_knowing(pattern: Mapping[str, Any]) -> str:
    """The sentence of a table that is kept as a memory: its statuses and how rows go through them, the values of its
    columns with few. Empty where there are none. Shares are rounded to tenths: the text stays while they waver."""
    lines = []
    for column, known in pattern["columns"].items():
        steps: list[dict[str, Any]] = next(
            (s["transitions"] for s in pattern["status_columns"] if s["column"] == column), []
        )
        if known["personal"] is None and known["top"] and known["format"] != "boolean":
            told = ", ".join(f"{value} ({_tenths(share)})" for value, share in known["top"][:_VALUES_TOLD])
            line = f"{quoted(column)} is {told}"
            if steps:
                pairs = dict.fromkeys(f"{step['from']}→{step['to']}" for step in steps[:_STEPS_TOLD])
                line += f"; rows go {', '.join(sorted(pairs))}"
            lines.append(line)
    return f"Table {pattern['table']}: {'. '.join(lines)}." if lines else ""


def _tenths(share: float) -> str:
    tenths = round(share * 10)
    return f"about {tenths * 10} %" if tenths else "few"
