"""What the sampled values of one column tell: shares, ranges, formats; of personal data its shape alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from agent.discovery.column_types import format_of_type, kind_of
from agent.discovery.formats import VALUE_LIMIT, format_of
from agent.discovery.masking import masked
from agent.discovery.personal_data import (
    is_written_by_people,
    may_show,
    personal_by_name,
    personal_by_values,
)

TOP_MAX: Final = 20
"""Values of a low-cardinality column that are shown."""
LOW_CARDINALITY: Final = 30
"""Most different values of a column that has few of them."""
LEAST_TIMES: Final = 3
"""How often a value must occur in the sample to be shown; labels of an enum, which the structure has, always are."""
_INSPECTED = 100  # different values of a column with many that are looked at for formats and personal data
_FREE_TEXT_MEAN = 40  # mean length above which a text is written by somebody
_FREE_TEXT_LONGEST = 100
_LARGE_NUMBER = 10**6  # a whole number above it that hardly repeats may be somebody's number
_NUMBER_MAX = 10**300  # JSON has no NaN and no infinity
_NEAR_NOW = timedelta(days=2)


@dataclass(frozen=True, kw_only=True)
class Circumstances:
    """What a column's pattern depends on beside its values."""

    schema: str
    table: str
    now: datetime
    """The clock of the database that was sampled."""
    is_whole: bool
    """Whether the sample is the whole table."""
    row_estimate: int | None = None
    is_key: bool = False
    """Part of a key, declared or inferred: its numbers count rows and are no one's."""
    is_unique: bool = False
    """Unique by itself, so the table has as many different values as rows."""
    distinct_estimate: float | None = None
    """`n_distinct` of the planner's statistics: below zero a share of the rows."""
    maximum_before: str | None = None
    """The greatest time of the discovery before."""


def column_pattern(
    values: Sequence[str | None],
    column: Mapping[str, Any],
    where: Circumstances,
    *,
    newest: Sequence[str | None] = (),
) -> dict[str, Any]:
    """The pattern of one column.

    Args:
        values: the column of a sample that stands for the table, as text.
        column: its structure document.
        where: see `Circumstances`.
        newest: the column of the newest rows, for the greatest time alone.

    Returns:
        `nulls` (share), `distinct`, `distinct_is_exact`, `minimum`, `maximum`, `top` (`[[value, share], …]`),
        `format`, `format_share`, `length` (`[least, greatest]`), `personal`, `moves`. What is
        personal has no range and no values.
    """
    kind = kind_of(column)
    present = [value for value in values if value is not None]
    pattern: dict[str, Any] = {
        "nulls": round(1 - len(present) / len(values), 4) if values else None,
        "distinct": None,
        "distinct_is_exact": False,
        "minimum": None,
        "maximum": None,
        "top": [],
        "format": format_of_type(column),
        "format_share": None,
        "length": None,
        "personal": personal_by_name(where.schema, where.table, str(column["name"]), kind),
        "moves": False,
    }
    if kind == "network":
        pattern["personal"] = pattern["personal"] or "ip"
    if kind == "unread":
        return pattern
    counts = Counter(present)
    pattern |= _distinct(counts, len(values), where)
    some = list(counts) if len(counts) <= LOW_CARDINALITY else list(counts)[:_INSPECTED]
    if kind in ("text", "other"):
        pattern["format"], pattern["format_share"] = format_of(some)
        pattern["length"] = _lengths(counts)
    if pattern["personal"] is None and kind in ("text", "other", "number"):
        pattern["personal"] = personal_by_values(some)
    if pattern["personal"] is not None:
        return pattern
    if kind == "time" or (kind == "other" and pattern["format"] in ("iso_date", "iso_datetime")):
        return pattern | _times([*counts, *(value for value in newest if value is not None)], where)
    if kind == "number" or (kind == "other" and pattern["format"] in ("integer", "number")):
        pattern |= _numbers(counts, where)
    is_written = kind in ("text", "other") and is_written_by_people(column["name"])
    if not (where.is_unique or is_written or (where.is_key and kind == "number")):
        pattern["top"] = _top(counts, kind)
    return pattern


def _distinct(counts: Counter[str], rows: int, where: Circumstances) -> dict[str, Any]:
    if where.is_whole:
        return {"distinct": len(counts), "distinct_is_exact": True}
    total = where.row_estimate
    estimate: float = len(counts)
    if where.is_unique and total is not None:
        estimate = total
    elif where.distinct_estimate is not None and where.distinct_estimate > 0:
        estimate = where.distinct_estimate
    elif where.distinct_estimate is not None and total is not None:
        estimate = -where.distinct_estimate * total
    return {"distinct": max(round(estimate), len(counts)), "distinct_is_exact": False}


def _lengths(counts: Counter[str]) -> list[int] | None:
    lengths = [len(value) for value in counts]
    return [min(lengths), max(lengths)] if lengths else None


def _times(values: Sequence[str], where: Circumstances) -> dict[str, Any]:
    times = sorted(time for time in map(as_time, values) if time is not None)
    if not times:
        return {}
    has_time = any(len(value) > 10 for value in values)
    least, greatest = (str(time if has_time else time.date()) for time in (times[0], times[-1]))
    before = as_time(where.maximum_before) if where.maximum_before else None
    is_near = timedelta(hours=-1) <= where.now - times[-1] <= _NEAR_NOW
    return {
        "minimum": least,
        "maximum": greatest,
        "moves": is_near or (before is not None and times[-1] > before),
    }


def as_time(text: str) -> datetime | None:
    """A time as Postgres writes it, in UTC; `None` for `infinity` and for years that Python has not."""
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        return None
    return time.replace(tzinfo=UTC) if time.tzinfo is None else time.astimezone(UTC)


def _numbers(counts: Counter[str], where: Circumstances) -> dict[str, Any]:
    numbers = [number for number in map(_as_number, counts) if number is not None]
    if not numbers:
        return {}
    hardly_repeats = len(counts) > 0.5 * counts.total()
    if (
        not where.is_key
        and hardly_repeats
        and max(map(abs, numbers)) >= _LARGE_NUMBER
        and all(float(number).is_integer() for number in numbers)
    ):
        return {}
    return {"minimum": min(numbers), "maximum": max(numbers)}


def _as_number(text: str) -> int | float | None:
    try:
        number = int(text) if text.removeprefix("-").isdigit() else float(text)
    except ValueError:
        return None  # money is written with its currency
    return number if abs(number) < _NUMBER_MAX else None


def _top(counts: Counter[str], kind: str) -> list[list[Any]]:
    total = counts.total()
    if (
        not counts
        or len(counts) > LOW_CARDINALITY
        or kind not in ("text", "enum", "boolean", "number", "other")
    ):
        return []
    is_declared = kind in ("enum", "boolean")
    if not is_declared:
        if len(counts) * 3 > total or max(map(len, counts)) >= min(_FREE_TEXT_LONGEST, VALUE_LIMIT):
            return []
        if sum(len(value) * times for value, times in counts.items()) > _FREE_TEXT_MEAN * total:
            return []
    return [
        [value, round(times / total, 4)]
        for value, times in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:TOP_MAX]
        if (is_declared and masked(value) == value) or (times >= LEAST_TIMES and may_show(value))
    ]
