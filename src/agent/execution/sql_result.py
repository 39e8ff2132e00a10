"""What a statement gives: rows as they come from the server, cut to a size, as values that JSON can hold."""

from __future__ import annotations

import json
import math
import time
from contextlib import suppress
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

import psycopg

Delta = dict[str, dict[str, int]]
"""Table -> `inserted`, `updated`, `deleted`; only tables of which rows changed."""

RESULT_BYTES_MAX = 1_000_000
"""Of what the server sends as text; rows beyond are left out and the result says so."""

_CHUNK_ROWS = 100


@dataclass(frozen=True, kw_only=True)
class SqlResult:
    """What a statement gave."""

    columns: tuple[str, ...] = ()
    rows: list[list[Any]] = field(default_factory=list)
    """Values that JSON can hold. Numbers that would lose digits, and other types, are text as Postgres prints it."""
    truncated: bool = False
    """Whether there was more than `rows` holds."""
    row_count: int = 0
    """Rows in `rows`, or what the command tag counts where there are none."""
    result_bytes: int = 0
    duration_ms: float = 0.0
    delta: Delta = field(default_factory=dict)
    """Rows that a write changed, triggers and cascades included."""
    log_id: str | None = None
    """Row of the execution log; of writes."""

    @property
    def value(self) -> dict[str, Any]:
        """All of it as one document, for a model."""
        rows: list[Any] = [dict(zip(self.columns, row, strict=True)) for row in self.rows]
        found: dict[str, Any] = {"rows": rows, "row_count": self.row_count}
        if len(set(self.columns)) != len(self.columns):  # two columns of one name would become one
            found = {"columns": list(self.columns), "rows": self.rows, "row_count": self.row_count}
        if self.truncated:
            found["truncated"] = True
        if self.delta:
            found["changed"] = dict(self.delta)
        return found


_BOOL = 16
_INTEGERS = {20, 21, 23, 26}
_FLOATS = {700, 701}
_NUMERIC = 1700
_JSON = {114, 3802}


class Collected:
    """Rows as they come, up to a number of rows and of bytes."""

    def __init__(self, *, rows_max: int) -> None:
        self._rows_max = rows_max
        self._columns: tuple[str, ...] = ()
        self._rows: list[list[Any]] = []
        self._bytes = 0
        self._truncated = False
        self._tag_count = 0
        self._chunk = 1
        self._largest = 1

    @property
    def wants_more(self) -> bool:
        return not self._truncated

    @property
    def next_chunk(self) -> int:
        """How many rows to ask for: one, and then as many as fit in what is left if they are as large as the largest.

        One row beyond the limit tells whether there are more.
        """
        fitting = (RESULT_BYTES_MAX - self._bytes) // self._largest + 1
        return max(1, min(self._chunk, fitting, self._rows_max - len(self._rows) + 1))

    def add(self, cursor: psycopg.AsyncCursor[Any], *, hidden: int = 0) -> bool:
        """Take in what the server sent, but for the last `hidden` columns; whether there were rows."""
        result = cursor.pgresult
        if result is None:
            return False
        self._tag_count = max(cursor.rowcount, 0)
        width = result.nfields - hidden
        if width <= 0:
            return False
        self._columns = tuple((result.fname(i) or b"").decode() for i in range(width))
        types = [result.ftype(i) for i in range(width)]
        self._chunk = min(2 * self._chunk, _CHUNK_ROWS)
        for number in range(result.ntuples):
            values = [result.get_value(number, i) for i in range(width)]
            size = sum(len(value) for value in values if value is not None)
            self._largest = max(self._largest, size)
            if len(self._rows) >= self._rows_max or self._bytes + size > RESULT_BYTES_MAX:
                self._truncated = True
                break
            self._bytes += size
            self._rows.append([_plain(value, oid) for value, oid in zip(values, types, strict=True)])
        return result.ntuples > 0

    def result(self, began: float) -> SqlResult:
        return SqlResult(
            columns=self._columns,
            rows=self._rows,
            truncated=self._truncated,
            row_count=len(self._rows) if self._columns else self._tag_count,
            result_bytes=self._bytes,
            duration_ms=round((time.monotonic() - began) * 1000, 3),
        )


def last_column(cursor: psycopg.AsyncCursor[Any], *, rows_max: int) -> list[Any] | None:
    """The objects in the last column of what the server sent; `None` if there are more rows."""
    result = cursor.pgresult
    if result is None or result.ntuples > rows_max:
        return None
    texts = (result.get_value(number, result.nfields - 1) for number in range(result.ntuples))
    return [json.loads(text) for text in texts if text is not None]


def _plain(value: bytes | None, oid: int) -> Any:
    """A value that JSON can hold, from the server's text."""
    if value is None:
        return None
    text = value.decode("utf-8", errors="replace")
    if oid == _BOOL:
        return text == "t"
    if oid in _INTEGERS:
        return int(text)
    if oid in _FLOATS:
        number = float(text)
        return number if math.isfinite(number) else text
    if oid == _NUMERIC:
        exact = Decimal(text)
        if not exact.is_finite():
            return text
        if exact == exact.to_integral_value() and abs(exact) < 2**53:
            return int(exact)
        return float(text) if Decimal(repr(float(text))) == exact else text
    if oid in _JSON:
        with suppress(ValueError, RecursionError):
            return json.loads(text, parse_constant=str)
    return text
