"""The pattern of one table, made of a sample of its rows and of what was known before. Pure: it reads nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final

from agent.discovery.column_patterns import Circumstances, as_time, column_pattern
from agent.discovery.column_types import kind_of
from agent.discovery.sampling import Sample
from agent.discovery.statuses import row_hashes, rows_met_again, status_columns, transitions_told
from agent.discovery.structure import full_name

ESTIMATES_MAX: Final = 48
"""Row estimates of a table that are kept, for its growth."""
TRANSITIONS_MAX: Final = 100
"""Pairs of a status column that are kept, the most frequent."""


@dataclass(frozen=True, kw_only=True)
class TableKnowledge:
    """What is stored of a table: its pattern and, beside it, what only the next discovery needs."""

    pattern: dict[str, Any] = field(default_factory=dict)
    """Empty before the first sample."""
    seen: dict[str, dict[str, str]] = field(default_factory=dict)
    """By status column and hash of a row's key the status it had."""
    estimates: list[list[Any]] = field(default_factory=list)
    """`[[time, rows], …]`, oldest first."""


@dataclass(frozen=True, kw_only=True)
class Neighbours:
    """What other tables tell of a table."""

    parent_column: str | None = None
    """Of a table of history: the column that points at the rows it tells of."""
    told: Mapping[str, Counter[tuple[str, str]]] = field(default_factory=dict)
    """By status column the transitions that a table of history tells."""
    keys: frozenset[str] = frozenset()
    """Columns that point at other tables without a declared key."""


def table_pattern(
    table: Mapping[str, Any],
    sample: Sample,
    now: datetime,
    before: TableKnowledge,
    *,
    secret: str | None = None,
    distinct: Mapping[str, float] | None = None,
    neighbours: Neighbours | None = None,
) -> TableKnowledge:
    """What is known of a table after a sample.

    Args:
        table: its structure document.
        sample: its rows.
        now: the clock of the database that was sampled.
        before: what was known.
        secret: key of the hashes by which rows are met again; `None`: no row is remembered.
        distinct: `n_distinct` by column, of the planner's statistics.
        neighbours: what other tables tell of it.
    """
    neighbours = neighbours or Neighbours()
    columns = _columns(table, sample, now, before, distinct or {}, neighbours)
    rows = len(sample.rows) if sample.is_whole else table.get("row_estimate")
    estimates = (
        before.estimates if rows is None else [*before.estimates, [now.isoformat(), rows]][-ESTIMATES_MAX:]
    )
    statuses, seen = _statuses(table, sample, columns, before, secret, neighbours)
    pattern = {
        "table": full_name(table["schema"], table["name"]),
        "rows_sampled": len(sample.rows) + len(sample.newest),
        "is_whole": sample.is_whole,
        "sampled_at": now.isoformat(),
        "row_estimate": rows,
        "growth_per_day": growth_per_day(estimates),
        "columns": columns,
        "status_columns": statuses,
    }
    return TableKnowledge(pattern=pattern, seen=seen, estimates=estimates)


def _columns(
    table: Mapping[str, Any],
    sample: Sample,
    now: datetime,
    before: TableKnowledge,
    distinct: Mapping[str, float],
    neighbours: Neighbours,
) -> dict[str, Any]:
    alone = [key["columns"] for key in table.get("unique", ())] + [table.get("primary_key", [])]
    unique = {names[0] for names in alone if len(names) == 1}
    keys = {name for names in alone for name in names} | neighbours.keys
    keys |= {name for key in table.get("foreign_keys", ()) for name in key["columns"]}
    known = before.pattern.get("columns", {})
    found = {}
    for column in table["columns"]:
        name = column["name"]
        if name not in sample.columns:
            continue
        where = Circumstances(
            schema=table["schema"],
            table=table["name"],
            now=now,
            is_whole=sample.is_whole,
            row_estimate=table.get("row_estimate"),
            is_key=name in keys,
            is_unique=name in unique,
            distinct_estimate=distinct.get(name),
            maximum_before=known.get(name, {}).get("maximum")
            if kind_of(column) in ("time", "other")
            else None,
        )
        found[name] = column_pattern(
            sample.column(name), column, where, newest=sample.column(name, newest=True)
        )
    return found


def _statuses(
    table: Mapping[str, Any],
    sample: Sample,
    columns: Mapping[str, Mapping[str, Any]],
    before: TableKnowledge,
    secret: str | None,
    neighbours: Neighbours,
) -> tuple[list[dict[str, Any]], dict[str, dict[str, str]]]:
    names = status_columns(table, columns)
    hashes = row_hashes(table, sample, secret) if names and secret is not None else None
    known = {status["column"]: status for status in before.pattern.get("status_columns", ())}
    found = []
    seen = {}
    for name in names:
        values = {str(value): share for value, share in columns[name]["top"]}
        observed: Counter[tuple[str, str]] = Counter()
        told_before: Counter[tuple[str, str]] = Counter()
        for step in known.get(name, {}).get("transitions", ()):
            counts = observed if step["source"] == "rows" else told_before
            counts[step["from"], step["to"]] += step["count"]
        if hashes is not None:
            steps, seen[name] = rows_met_again(sample, hashes, name, before.seen.get(name, {}), values)
            observed += steps
        # A table of history is read anew each time, so its counts replace those of before.
        told = neighbours.told.get(name) or told_of_parent(table, sample, neighbours.parent_column, columns)
        found.append(
            {
                "column": name,
                "values": values,
                "transitions": _written(observed, "rows") + _written(told or told_before, "history"),
            }
        )
    return found, seen


def _labels(columns: Mapping[str, Mapping[str, Any]]) -> set[str]:
    """The values of a table's columns that are shown."""
    return {str(value) for pattern in columns.values() for value, _ in pattern["top"]}


def told_of_parent(
    table: Mapping[str, Any],
    sample: Sample,
    parent_column: str | None,
    columns: Mapping[str, Mapping[str, Any]],
) -> Counter[tuple[str, str]]:
    """The transitions of its parent's status that a table of history tells."""
    return transitions_told(table, sample, parent_column, _labels(columns))


def _written(counts: Counter[tuple[str, str]], source: str) -> list[dict[str, Any]]:
    return [
        {"from": before, "to": after, "count": count, "source": source}
        for (before, after), count in counts.most_common(TRANSITIONS_MAX)
    ]


def growth_per_day(estimates: list[list[Any]]) -> float | None:
    """Rows that a table gains a day between the first and the last estimate; `None` before there are two, a minute
    apart at least. Negative where it shrinks."""
    times = [
        (time, rows) for time, rows in ((as_time(at), rows) for at, rows in estimates) if time is not None
    ]
    if len(times) < 2:
        return None
    (first, few), (last, many) = times[0], times[-1]
    days = (last - first).total_seconds() / 86_400
    return round((many - few) / days, 1) if days >= 1 / 1440 else None
