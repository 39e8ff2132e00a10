"""What moved in a table since it was sampled last: new statuses, jumps of growth and of empty values, new formats."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

from agent.discovery.column_patterns import LEAST_TIMES, as_time
from agent.discovery.structure import quoted

NULLS_JUMP: Final = 0.1
"""Least difference of a share of empty values that is told, where chance does not explain it."""
GROWTH_JUMP: Final = 3.0
"""How many times faster than before a table must grow to be told."""
GROWTH_LEAST: Final = 1000
"""Rows a day below which no growth is told."""
_DEVIATIONS = 4.0  # by which two shares must differ: by chance once in 16,000 comparisons


def recent_changes(
    before: Mapping[str, Any], after: Mapping[str, Any], estimates: list[list[Any]]
) -> list[dict[str, Any]]:
    """The changes between two patterns of one table, each `{table, column, kind, what, before, after}`.

    `kind` is `status_new`, `transition_new`, `nulls`, `format`, `stopped`, `growth` or `shrunk`; `what` is a sentence.

    Args:
        before: its pattern of last time; empty: there was none, so nothing has changed.
        after: its pattern now.
        estimates: its row estimates, oldest first.
    """
    if not before:
        return []
    found = _changes_of_rows(after, estimates)
    for name, column in after["columns"].items():
        old = before["columns"].get(name)
        if old is not None:
            found += _changes_of_column(before, after, name, old, column)
    old_statuses = {status["column"]: status for status in before["status_columns"]}
    for status in after["status_columns"]:
        if status["column"] in old_statuses:
            found += _changes_of_status(after, old_statuses[status["column"]], status)
    return found


def _change(
    pattern: Mapping[str, Any], column: str | None, kind: str, what: str, before: Any, after: Any
) -> dict[str, Any]:
    return {
        "table": pattern["table"],
        "column": column,
        "kind": kind,
        "what": what,
        "before": before,
        "after": after,
    }


def _changes_of_rows(after: Mapping[str, Any], estimates: list[list[Any]]) -> list[dict[str, Any]]:
    points = [
        (time, rows) for time, rows in ((as_time(at), rows) for at, rows in estimates) if time is not None
    ]
    if len(points) < 2:
        return []
    (earlier, few), (last, many) = points[-2], points[-1]
    if few >= GROWTH_LEAST and many < few / 2:
        what = f"{after['table']} has about {many:,} rows; it had {few:,}"
        return [_change(after, None, "shrunk", what, few, many)]
    (first, fewest) = points[0]
    usual_days, last_days = (
        (earlier - first).total_seconds() / 86_400,
        (last - earlier).total_seconds() / 86_400,
    )
    if usual_days < 1 / 24 or last_days < 1 / 1440:
        return []
    usual, now = (few - fewest) / usual_days, (many - few) / last_days
    # As little as a thousandth of a large table is the error of an estimate.
    if now >= max(GROWTH_LEAST, GROWTH_JUMP * usual) and many - few > many / 1000:
        what = f"{after['table']} grows by about {round(now):,} rows a day; before it was {round(usual):,}"
        return [_change(after, None, "growth", what, round(usual, 1), round(now, 1))]
    return []


def _changes_of_column(
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    name: str,
    old: Mapping[str, Any],
    new: Mapping[str, Any],
) -> list[dict[str, Any]]:
    found = []
    called = f"{after['table']}.{quoted(name)}"
    if old["nulls"] is not None and new["nulls"] is not None:
        sizes = before["rows_sampled"], after["rows_sampled"]
        if abs(new["nulls"] - old["nulls"]) >= NULLS_JUMP and _differ(old["nulls"], new["nulls"], *sizes):
            what = f"{called} is empty in {new['nulls']:.0%} of rows; it was in {old['nulls']:.0%}"
            found.append(_change(after, name, "nulls", what, old["nulls"], new["nulls"]))
    if old["format"] and new["format"] and old["format"] != new["format"]:
        what = f"{called} now holds {new['format']}; before it held {old['format']}"
        found.append(_change(after, name, "format", what, old["format"], new["format"]))
    if old["moves"] and not new["moves"] and old["maximum"] == new["maximum"]:
        what = f"{called} has not moved since {new['maximum']}"
        found.append(_change(after, name, "stopped", what, old["maximum"], new["maximum"]))
    return found


def _differ(one: float, other: float, of_one: int, of_other: int) -> bool:
    """Whether two shares differ by more than chance explains (two proportions, pooled)."""
    if min(of_one, of_other) == 0:
        return False
    pooled = (one * of_one + other * of_other) / (of_one + of_other)
    error = math.sqrt(pooled * (1 - pooled) * (1 / of_one + 1 / of_other))
    return error == 0 or abs(one - other) / error >= _DEVIATIONS


def _changes_of_status(
    after: Mapping[str, Any], old: Mapping[str, Any], new: Mapping[str, Any]
) -> list[dict[str, Any]]:
    found = []
    called = f"{after['table']}.{quoted(new['column'])}"
    for value, share in new["values"].items():
        if value not in old["values"] and share * after["rows_sampled"] >= LEAST_TIMES:
            what = f"{called} has a new status {value} ({share:.1%} of rows)"
            found.append(_change(after, new["column"], "status_new", what, sorted(old["values"]), value))
    known = {(step["from"], step["to"]) for step in old["transitions"]}
    for step in new["transitions"]:
        if known and (step["from"], step["to"]) not in known:
            what = f"{called} went from {step['from']} to {step['to']}, which was not seen before"
            found.append(
                _change(after, new["column"], "transition_new", what, None, [step["from"], step["to"]])
            )
    return found
