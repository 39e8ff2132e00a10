"""Samples of an application's tables: few rows, one statement each, nothing locked, no large value fetched.

A small table is read whole. Of a large one some blocks are read (`TABLESAMPLE SYSTEM`, the same blocks each time, so
that rows are met again) and beside them the newest rows, where an index on a time gives them at once. Views are not
sampled: they have no rows of their own and cost what their queries cost. Foreign tables are not sampled: their rows are
another server's, whose time-outs are not ours.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import lru_cache
from typing import Any, Final

import psycopg
from psycopg import AsyncConnection, AsyncRawCursor, sql

from agent.database.migrations import body_of
from agent.discovery.column_types import kind_of
from agent.discovery.formats import VALUE_LIMIT
from agent.discovery.structure import full_name
from agent.errors import DatabaseUnavailable, LearningError

ROWS_MAX: Final = 1000
"""Rows of one table that are sampled at most."""
VALUES_MAX: Final = 100_000
"""Values of one table that are fetched at most: a wide table gives fewer rows."""
PARTITIONS_MAX: Final = 200
"""Partitions of a table that is sampled: a statement opens each of them."""
NOT_FILLED: Final = "it was not filled yet"
"""Why a materialised view made `WITH NO DATA` has no sample: there is nothing in it."""
SAMPLED_KINDS: Final = frozenset({"table", "partitioned_table", "materialized_view"})
_SPREAD_MAX = 8  # times more rows lie in the blocks that are read than are taken: rows of one block are alike
_DOCUMENT_BYTES = 8000  # a value of a type that we do not know is read where it takes less than this


@dataclass(frozen=True, kw_only=True)
class SamplePlan:
    """How one table is sampled."""

    schema: str
    table: str
    columns: tuple[str, ...]
    how_read: tuple[str, ...]
    """By column: `text` cut; `small` cut, and only where the whole is small; `null` whether it is there at all."""
    rows: int
    percent: float | None
    """Share of the blocks that is read, in percent; `None`: the table's first rows."""
    spread: int
    """How many times more rows lie in those blocks than are taken."""
    key: str | None
    """The column by which the same rows are taken again."""
    newest_by: str | None
    """The indexed time whose greatest rows are read too."""
    newest_rows: int
    """How many of those."""

    @property
    def name(self) -> str:
        """`schema.table`."""
        return full_name(self.schema, self.table)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """The rows of one sample: values as text, cut to `VALUE_LIMIT` characters."""

    columns: tuple[str, ...]
    rows: list[list[str | None]]
    """Those that stand for the table."""
    newest: list[list[str | None]] = field(default_factory=list)
    """The newest ones, newest first; empty where the table is known whole."""
    is_whole: bool = False

    def column(self, name: str, *, newest: bool = False) -> list[str | None]:
        """The values of one column."""
        place = self.columns.index(name)
        return [row[place] for row in (self.newest if newest else self.rows)]


class SampleError(LearningError):
    """A table could not be sampled. The reason holds nothing of its rows, which messages of Postgres may."""

    def __init__(self, table: str, reason: str) -> None:
        super().__init__(f"{table}: {reason}")
        self.reason = reason


def plan_sample(table: Mapping[str, Any], rows: int = ROWS_MAX) -> SamplePlan:
    """How to sample a table of a structure document.

    Raises:
        SampleError: it is not sampled, and why.
    """
    name = full_name(table["schema"], table["name"])
    if table["kind"] not in SAMPLED_KINDS:
        raise SampleError(name, f"a {table['kind'].replace('_', ' ')} is not sampled")
    if not table.get("readable", True):
        raise SampleError(name, "this login may not read it")
    if table.get("partitions", 0) > PARTITIONS_MAX:
        raise SampleError(
            name, f"its {table['partitions']} partitions are too many to be opened for a sample"
        )
    columns = [column for column in table["columns"] if column.get("readable", True)]
    if not columns:
        raise SampleError(name, "it has no column that this login may read")
    rows = max(1, min(rows, VALUES_MAX // len(columns)))
    estimate: int = table.get("row_estimate") or 0
    is_large = estimate > rows
    key = table["primary_key"][0] if len(table["primary_key"]) == 1 else None
    readable = {column["name"] for column in columns}
    newest_by = _newest_by(table, readable) if is_large else None
    newest_rows = rows // 2 if newest_by else 0
    rows -= newest_rows
    spread = max(1, min(_SPREAD_MAX, estimate // rows))
    return SamplePlan(
        schema=table["schema"],
        table=table["name"],
        columns=tuple(column["name"] for column in columns),
        how_read=tuple(_how_read(column) for column in columns),
        rows=rows,
        percent=min(100.0, 100 * spread * rows / estimate) if is_large else None,
        spread=spread,
        key=key if key in readable else None,
        newest_by=newest_by,
        newest_rows=newest_rows,
    )


def _how_read(column: Mapping[str, Any]) -> str:
    return {"unread": "null", "other": "small"}.get(kind_of(column), "text")


def _newest_by(table: Mapping[str, Any], readable: Iterable[str]) -> str | None:
    """The time that moves most likely among those that an index begins with."""
    times = [
        column["name"]
        for column in table["columns"]
        if column["name"] in readable and kind_of(column) == "time"
    ]
    indexed = [
        name
        for name in times
        if any(_begins_with(index["definition"], name) for index in table.get("indexes", ()))
    ]
    order = ("updated", "modified", "changed", "created", "inserted")
    indexed.sort(
        key=lambda name: next((i for i, word in enumerate(order) if word in name.lower()), len(order))
    )
    return indexed[0] if indexed else None


def _begins_with(definition: str, column: str) -> bool:
    quoted = column.replace('"', '""')
    begin = rf'USING btree \((?:"{re.escape(quoted)}"|{re.escape(column)})(?: ASC| DESC| NULLS \w+)*[,)]'
    return re.search(begin, definition) is not None and " WHERE " not in definition


def sample_statement(plan: SamplePlan) -> sql.Composed:
    """The one statement of a sample. Its rows are the columns as text and, last, whether the row is of the newest."""
    table = sql.Identifier(plan.schema, plan.table)
    values = sql.SQL(", ").join(
        _READ[how].format(
            column=sql.Identifier(column), limit=sql.Literal(VALUE_LIMIT), bytes=sql.Literal(_DOCUMENT_BYTES)
        )
        for column, how in zip(plan.columns, plan.how_read, strict=True)
    )
    if plan.percent is None:
        return sql.SQL("SELECT {}, false FROM {} LIMIT {}").format(values, table, sql.Literal(plan.rows))
    chosen = sql.SQL("pg_catalog.random() * {spread} < 1").format(spread=sql.Literal(plan.spread))
    if plan.key is not None:
        chosen = sql.SQL("pg_catalog.hashtext({key}::text) % {spread} = 0").format(
            key=sql.Identifier(plan.key), spread=sql.Literal(plan.spread)
        )
    blocks = sql.SQL(
        "(SELECT {}, false FROM {} TABLESAMPLE SYSTEM ({}) REPEATABLE (1) WHERE {} LIMIT {})"
    ).format(values, table, sql.Literal(plan.percent), chosen, sql.Literal(plan.rows))
    if plan.newest_by is None:
        return blocks
    newest = sql.SQL(
        "(SELECT {}, true FROM {} WHERE {time} IS NOT NULL ORDER BY {time} DESC LIMIT {})"
    ).format(values, table, sql.Literal(plan.newest_rows), time=sql.Identifier(plan.newest_by))
    return sql.SQL("{} UNION ALL {}").format(blocks, newest)


_READ: Final = {
    "text": sql.SQL("pg_catalog.left({column}::text, {limit})"),
    "small": sql.SQL(
        "CASE WHEN pg_catalog.pg_column_size({column}) <= {bytes} THEN pg_catalog.left({column}::text, {limit}) "
        "WHEN {column} IS NOT NULL THEN '' END"
    ),
    "null": sql.SQL("CASE WHEN {column} IS NOT NULL THEN '' END"),
}


@lru_cache(maxsize=1)
def _code_query() -> bytes:
    return body_of("code_of_others").encode()


class Sampler(ABC):
    """Where samples come from."""

    @abstractmethod
    async def now(self) -> datetime:
        """The clock of the application's database."""

    @abstractmethod
    async def sample(self, plan: SamplePlan) -> Sample:
        """The sample of one table.

        Raises:
            SampleError: it could not be read; others can.
            DatabaseUnavailable: the connection is lost, so no other can be read either.
        """

    @abstractmethod
    async def distinct_estimates(
        self, tables: Sequence[tuple[str, str]]
    ) -> dict[tuple[str, str, str], float]:
        """`n_distinct` of the planner's statistics by schema, table and column, as far as they may be read."""

    @abstractmethod
    async def match(
        self, reference: Mapping[str, Any], rows: int, percent: float | None
    ) -> tuple[int, int, int]:
        """How many values of a column were looked at, how many different ones they are, and how many values are in
        another column, which has a unique index.

        Args:
            reference: `from_schema, from_table, from_column, to_schema, to_table, to_column`.
            rows: how many rows are read at most.
            percent: of the blocks of a large table the share that they are taken from; `None`: its first rows.

        Raises:
            SampleError: they could not be compared.
            DatabaseUnavailable: the connection is lost.
        """


class ConnectionSampler(Sampler):
    """Over a connection to the application's database that `open_app_database` made."""

    def __init__(self, connection: AsyncConnection[Any]) -> None:
        self._connection = connection

    async def now(self) -> datetime:
        # Times are compared as text of one form and one zone.
        found = await self._fetch(
            "the clock",
            sql.SQL(
                "SELECT pg_catalog.now() FROM (SELECT pg_catalog.set_config('TimeZone', 'UTC', false), "
                "pg_catalog.set_config('DateStyle', 'ISO, YMD', false)) AS settings"
            ),
        )
        now: datetime = found[0][0]
        return now

    async def sample(self, plan: SamplePlan) -> Sample:
        await self._refuse_code_of_others(plan.schema, plan.table)
        found = await self._fetch(plan.name, sample_statement(plan))
        is_whole = plan.percent is None and len(found) < plan.rows
        if plan.percent is not None and not any(not row[-1] for row in found):
            # The estimate was too high, or the few blocks were empty.
            first = await self._fetch(plan.name, sample_statement(head_of(plan)))
            found += first
        return as_sample(plan, found, is_whole=is_whole)

    async def distinct_estimates(
        self, tables: Sequence[tuple[str, str]]
    ) -> dict[tuple[str, str, str], float]:
        found = await self._fetch(
            "the planner's statistics",
            sql.SQL(_DISTINCT_ESTIMATES).format(
                schemas=sql.Literal([schema for schema, _ in tables]),
                names=sql.Literal([name for _, name in tables]),
            ),
        )
        return {(schema, table, column): estimate for schema, table, column, estimate in found}

    async def match(
        self, reference: Mapping[str, Any], rows: int, percent: float | None
    ) -> tuple[int, int, int]:
        await self._refuse_code_of_others(reference["from_schema"], reference["from_table"])
        await self._refuse_code_of_others(reference["to_schema"], reference["to_table"])
        (found,) = await self._fetch(
            full_name(reference["from_schema"], reference["from_table"]),
            match_statement(reference, rows, percent),
        )
        return found[0], found[1], found[2]

    async def _refuse_code_of_others(self, schema: str, table: str) -> None:
        name = full_name(schema, table)
        for (function,) in await self._fetch(name, _code_query(), (schema, table)):
            raise SampleError(name, reason_of_code(function))

    async def _fetch(
        self, table: str, statement: sql.Composed | sql.SQL | bytes, values: Sequence[str] = ()
    ) -> list[tuple[Any, ...]]:
        try:
            cursor = AsyncRawCursor(self._connection)
            await cursor.execute(statement, values)
            return await cursor.fetchall()
        except psycopg.Error as error:
            if self._connection.broken:
                raise DatabaseUnavailable("the connection to the application's database is lost") from None
            raise SampleError(table, reason_of(error.sqlstate, type(error).__name__)) from None


def match_statement(reference: Mapping[str, Any], rows: int, percent: float | None) -> sql.Composed:
    """Compare the values of two columns in the server, each by the other's unique index: no value leaves it."""
    return sql.SQL(
        "SELECT pg_catalog.count(*)::integer, pg_catalog.count(DISTINCT v.value)::integer, "
        "pg_catalog.count(*) FILTER (WHERE EXISTS (SELECT FROM {target} AS t WHERE t.{key} = v.value OFFSET 0)) "
        "::integer "
        "FROM (SELECT {column} AS value FROM {source}{blocks} LIMIT {rows}) AS v WHERE v.value IS NOT NULL"
    ).format(
        target=sql.Identifier(reference["to_schema"], reference["to_table"]),
        key=sql.Identifier(reference["to_column"]),
        column=sql.Identifier(reference["from_column"]),
        source=sql.Identifier(reference["from_schema"], reference["from_table"]),
        blocks=sql.SQL("" if percent is None else " TABLESAMPLE SYSTEM ({})").format(sql.Literal(percent)),
        rows=sql.Literal(rows),
    )


def reason_of(sqlstate: str | None, condition: str) -> str:
    """Why a statement failed, in words that hold nothing of the rows: messages of Postgres quote values."""
    match sqlstate:
        case "57014":
            return "it took longer than discovery may take"
        case "55P03":
            return "somebody else holds a lock on it"
        case "42501":
            return "this login may not read it"
        case "55000":
            return NOT_FILLED
        case "42P01" | "42703" | "3F000":
            return "it was dropped or changed meanwhile"
        case _:
            return f"reading it failed ({sqlstate}, {condition})"


def reason_of_code(function: str) -> str:
    """Why a table is not sampled whose owner could have code run with our rights."""
    return f"reading it would run the function {function} of another role with the rights of this login"


def head_of(plan: SamplePlan) -> SamplePlan:
    """The plan that reads a table's first rows instead."""
    return replace(plan, percent=None, newest_by=None, newest_rows=0)


def as_sample(plan: SamplePlan, found: Sequence[Sequence[Any]], *, is_whole: bool) -> Sample:
    """Rows as the statement gives them, each with its mark last."""
    return Sample(
        columns=plan.columns,
        rows=[list(row[:-1]) for row in found if not row[-1]],
        newest=[list(row[:-1]) for row in found if row[-1]],
        is_whole=is_whole,
    )


_DISTINCT_ESTIMATES: Final = """
SELECT s.schemaname::text, s.tablename::text, s.attname::text, max(s.n_distinct)
FROM pg_catalog.pg_stats s
JOIN unnest({schemas}::text[], {names}::text[]) AS w (schema, name) ON s.schemaname = w.schema AND s.tablename = w.name
GROUP BY 1, 2, 3
"""
