"""`python -m benchmarks.discovery_patterns [--tables 1000] [--pagila FILE]`: learning the patterns of data.

Two measurements on throw-away databases. How long the patterns of 1,000 tables with 5,000 columns take, and whether a
statement of it lasted longer than the time-out of discovery, waiting for the answer included. And how well references
are inferred: from three schemas the declared keys are taken away, rows are made up, and what is inferred is compared
with those keys.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from unittest.mock import patch

import psycopg
from psycopg import sql

from agent.database.postgres import PostgresDatabase
from agent.discovery.pattern_learning import PatternSummary, learn_patterns
from agent.discovery.sampling import SAMPLED_KINDS
from agent.discovery.structure import AppStructure, full_name
from agent.learning.auto_discover import AutoDiscovery
from agent.testing.throwaway import ThrowawayDatabase, throwaway_database
from benchmarks.environment import commit

RESULTS: Final = Path(__file__).parent / "results" / "discovery_patterns.md"
ROWS: Final = 400
"""Rows that are made up for each table."""

Reference = tuple[str, str, str, str]
"""`(from table, its column, to table, its column)`."""

# Names in the style of an object mapper, keys that are uuids, two ways to the same table.
CRM: Final = """
CREATE TABLE "User" (id uuid PRIMARY KEY, "displayName" text, "managerId" uuid REFERENCES "User");
CREATE TABLE "Company" (id uuid PRIMARY KEY, title text, "ownerId" uuid REFERENCES "User");
CREATE TABLE "Contact" (
    id uuid PRIMARY KEY, "companyId" uuid REFERENCES "Company", "createdBy" uuid REFERENCES "User", size integer);
CREATE TABLE "Deal" (
    id uuid PRIMARY KEY, "contactId" uuid REFERENCES "Contact", "companyId" uuid REFERENCES "Company",
    "assigneeUserId" uuid REFERENCES "User", stage text, "externalId" uuid);
CREATE TABLE "DealNote" (id uuid PRIMARY KEY, "dealId" uuid REFERENCES "Deal", body text, "requestId" uuid);
CREATE TABLE "Attachment" (id uuid PRIMARY KEY, "entityId" uuid, "entityType" text, "companyId" uuid);
"""
# Names with prefixes, keys of text and of small numbers, and columns that hold small numbers and are no references.
STOCK: Final = """
CREATE TABLE tbl_country (code text PRIMARY KEY, title text);
CREATE TABLE tbl_warehouse (warehouse_no integer PRIMARY KEY, country_code text REFERENCES tbl_country, floor integer);
CREATE TABLE categories (id integer PRIMARY KEY, parent_id integer REFERENCES categories, position integer);
CREATE TABLE items (
    id integer PRIMARY KEY, category_id integer REFERENCES categories, weight integer, status integer,
    legacy_id integer);
CREATE TABLE item_prices (id integer PRIMARY KEY, item_id integer REFERENCES items, level integer, batch_id integer);
CREATE TABLE shelves (id integer PRIMARY KEY, warehouse_no integer REFERENCES tbl_warehouse, items integer);
CREATE TABLE stock_moves (
    id bigint PRIMARY KEY, item_id integer REFERENCES items, from_shelf_id integer REFERENCES shelves,
    to_shelf_id integer REFERENCES shelves, quantity integer, order_id integer);
CREATE TABLE orders_2020 (id integer PRIMARY KEY, year integer);
CREATE TABLE remarks (id integer PRIMARY KEY, subject_id integer, subject_type text, priority integer);
"""

PAGILA_UNDECLARED: Final = frozenset(
    {
        ("public.payment", "customer_id", "public.customer", "customer_id"),
        ("public.payment", "rental_id", "public.rental", "rental_id"),
        ("public.payment", "staff_id", "public.staff", "staff_id"),
        ("public.store", "manager_staff_id", "public.staff", "staff_id"),
    }
)
"""True references of pagila that its schema does not declare, or declares on partitions alone."""


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """How the references that were inferred compare with the true ones."""

    schema: str
    right: frozenset[Reference]
    wrong: frozenset[Reference]
    missed: frozenset[Reference]

    @property
    def precision(self) -> float:
        """The share of those inferred that are true."""
        found = len(self.right) + len(self.wrong)
        return len(self.right) / found if found else 1.0

    @property
    def recall(self) -> float:
        """The share of the true ones that were inferred."""
        true = len(self.right) + len(self.missed)
        return len(self.right) / true if true else 1.0

    def __str__(self) -> str:
        told = (
            f"{self.schema}: {len(self.right) + len(self.missed)} references, "
            f"precision {self.precision:.2f}, recall {self.recall:.2f}"
        )
        told += "".join(f"\n  wrong: {_told(item)}" for item in sorted(self.wrong))
        return told + "".join(f"\n  missed: {_told(item)}" for item in sorted(self.missed))


def _told(reference: Reference) -> str:
    return f"{reference[0]}.{reference[1]} → {reference[2]}.{reference[3]}"


def references(relationships: Sequence[Mapping[str, Any]], *, declared: bool) -> frozenset[Reference]:
    """Relationships of one column."""
    return frozenset(
        (item["from_table"], item["from_columns"][0], item["to_table"], item["to_columns"][0])
        for item in relationships
        if item["declared"] == declared and len(item["from_columns"]) == 1
    )


async def accuracy(name: str, schema: str, undeclared: frozenset[Reference] = frozenset()) -> Accuracy:
    """Take the declared keys away from a schema, make up rows, and infer them.

    Args:
        name: of the schema.
        schema: its statements.
        undeclared: true references that it does not declare.
    """
    with throwaway_database() as place:
        _execute(place, schema)
        database = PostgresDatabase(place.url)
        try:
            discovery = AutoDiscovery(settings=place.settings, database=database)
            structure = await discovery.discover_app_structure(patterns=False)
            true = references(structure.relationships, declared=True) | undeclared
            _make_rows(place, structure, true)
            _drop_keys(place)
            bare = await discovery.discover_app_structure(patterns=False)
            learned = await learn_patterns(place.settings, database, bare)
        finally:
            await database.close()
    found = references(learned.relationships, declared=False)
    return Accuracy(schema=name, right=found & true, wrong=found - true, missed=true - found)


def _execute(place: ThrowawayDatabase, *statements: str | sql.Composed) -> None:
    with psycopg.connect(place.url, autocommit=True) as connection:
        for statement in statements:
            connection.execute(statement.encode() if isinstance(statement, str) else statement)


def _drop_keys(place: ThrowawayDatabase) -> None:
    _execute(
        place,
        """
        DO $$ DECLARE k record; BEGIN
            LOOP
                SELECT conrelid::regclass AS of_table, conname INTO k FROM pg_constraint
                WHERE contype = 'f' AND conparentid = 0 AND connamespace = 'public'::regnamespace
                  AND conrelid NOT IN (SELECT c.oid FROM pg_class c WHERE pg_get_userbyid(c.relowner) = 'agent_app'
                                       OR c.relname ~ '^(agent_|approval_|human_|alert_|learning_)') LIMIT 1;
                EXIT WHEN k.conname IS NULL;
                EXECUTE format('ALTER TABLE %s DROP CONSTRAINT %I', k.of_table, k.conname);
            END LOOP;
        END $$;
        ANALYZE;
        """,
    )


def _make_rows(place: ThrowawayDatabase, structure: AppStructure, true: frozenset[Reference]) -> None:
    """`ROWS` rows in each table; what refers to another table holds keys of it."""
    targets = {(item[0], item[1]) for item in true}
    with psycopg.connect(place.url, autocommit=True) as connection:
        connection.execute("SET session_replication_role = replica")  # no triggers, no order of keys
        for table in structure.tables:
            if table["kind"] not in SAMPLED_KINDS - {"materialized_view"}:
                continue
            name = full_name(table["schema"], table["name"])
            columns = [
                column
                for column in table["columns"]
                if not column["generated"] and ((name, column["name"]) in targets or not column["nullable"])
            ]
            columns += [
                column
                for column in table["columns"]
                if column not in columns and not column["generated"] and _family(column) != "other"
            ]
            values = sql.SQL(", ").join(
                _value(column, is_reference=(name, column["name"]) in targets) for column in columns
            )
            connection.execute(
                sql.SQL(
                    "INSERT INTO {} ({}) SELECT {} FROM generate_series(1, {}) AS i ON CONFLICT DO NOTHING"
                ).format(
                    sql.Identifier(table["schema"], table["name"]),
                    sql.SQL(", ").join(sql.Identifier(column["name"]) for column in columns),
                    values,
                    sql.Literal(ROWS),
                )
            )


def _family(column: Mapping[str, Any]) -> str:
    kind = str(column["type"])
    if kind.endswith("[]"):
        return "other"
    for family, begins in (
        ("number", ("integer", "bigint", "smallint", "numeric", "double", "real")),
        ("uuid", ("uuid",)),
        ("time", ("timestamp", "date")),
        ("text", ("text", "character")),
        ("flag", ("boolean",)),
    ):
        if kind.startswith(begins):
            return family
    return "other"


def _value(column: Mapping[str, Any], *, is_reference: bool) -> sql.Composable:
    """A value of row `i`: of a key a different one for each, of a reference one of those keys, else one of few."""
    kind, name = str(column["type"]), str(column["name"])
    is_key = name.lower() in ("id", "code", "warehouse_no") or (
        name.endswith("_id") and not column["nullable"]
    )
    number = "1 + (i * 7) % 50" if is_reference else "i" if is_key else "1 + i % 9"
    match _family(column):
        case "number" if kind.startswith("numeric"):
            return sql.SQL("(1 + i % 9)::numeric")
        case "number":
            return sql.SQL(number)  # type: ignore[arg-type]
        case "uuid":
            seed = number if is_reference or name == "id" else f"i + {10_000 + sum(map(ord, name))}"
            return sql.SQL("md5(({})::text)::uuid").format(sql.SQL(seed))  # type: ignore[arg-type]
        case "time":
            return sql.SQL("timestamptz '2022-01-05' + make_interval(hours => i % 100)")
        case "flag":
            return sql.SQL("i % 2 = 0")
        case "text":
            of_key = is_reference or name == "code"
            length = "2" if kind.startswith("character(") else "20"
            text = f"left('c' || ({number if of_key else 'i % 9'}), {length})"
            return sql.SQL(text)  # type: ignore[arg-type]
    if column["enum"]:
        return sql.SQL("{}::{}").format(sql.Literal(column["enum"][0]), sql.SQL(kind))  # type: ignore[arg-type]
    if "tsvector" in kind:
        return sql.SQL("''::tsvector")
    return sql.SQL("array_fill(0.5, ARRAY[20])::public.vector") if "vector" in kind else sql.NULL


# Time


@dataclass(frozen=True, kw_only=True)
class Timing:
    """What learning the patterns of many tables takes."""

    tables: int
    columns: int
    seconds: float
    again_seconds: float
    """The second round, when all is known."""
    problems: int
    statements: int
    """Of discovery in the application's database, both rounds."""
    longest_ms: float
    over_time_out: int
    """Statements that lasted longer than the time-out of discovery."""

    def __str__(self) -> str:
        return (
            f"patterns of {self.tables} tables, {self.columns} columns: {self.seconds:.1f} s, again "
            f"{self.again_seconds:.1f} s; {self.problems} problems; {self.statements} statements, the longest "
            f"{self.longest_ms:.0f} ms, {self.over_time_out} above the time-out"
        )


async def time_patterns(tables: int) -> Timing:
    """Make tables of five columns and 2,000 rows, and learn their patterns twice."""
    with throwaway_database() as place:
        _make_tables(place, tables)
        database = PostgresDatabase(place.url)
        try:
            discovery = AutoDiscovery(settings=place.settings, database=database)
            structure = await discovery.discover_app_structure(patterns=False)
            seconds: list[float] = []
            rounds: list[PatternSummary] = []
            meter = _Meter()
            for _ in range(2):
                begun = time.perf_counter()
                rounds.append(await meter.measured(learn_patterns(place.settings, database, structure)))
                seconds.append(time.perf_counter() - begun)
        finally:
            await database.close()
    limit_ms = place.settings.discovery_timeout.total_seconds() * 1000
    return Timing(
        tables=len(rounds[0].patterns),
        columns=sum(len(pattern["columns"]) for pattern in rounds[0].patterns),
        seconds=seconds[0],
        again_seconds=seconds[1],
        problems=len(rounds[0].problems),
        statements=len(meter.times_ms),
        longest_ms=max(meter.times_ms),
        over_time_out=sum(taken > limit_ms for taken in meter.times_ms),
    )


class _Meter:
    """How long each statement over a connection of discovery took, waiting included."""

    def __init__(self) -> None:
        self.times_ms: list[float] = []

    async def measured(self, work: Any) -> PatternSummary:
        execute = psycopg.AsyncCursor.execute

        async def timed(cursor: psycopg.AsyncCursor[Any], *arguments: Any, **named: Any) -> Any:
            begun = time.perf_counter()
            try:
                return await execute(cursor, *arguments, **named)
            finally:
                if cursor.connection.info.parameter_status("application_name") == "agent discovery":
                    self.times_ms.append((time.perf_counter() - begun) * 1000)

        with patch.object(psycopg.AsyncCursor, "execute", timed):
            summary: PatternSummary = await work
            return summary


def _make_tables(place: ThrowawayDatabase, tables: int) -> None:
    _execute(
        place,
        "CREATE SCHEMA app",
        """
        CREATE TABLE app.model AS SELECT i::bigint AS id, (ARRAY['open', 'paid', 'void'])[1 + i % 3] AS status,
            'c' || i || '@example.com' AS email, (i / 7.0)::numeric(10, 2) AS total,
            now() - make_interval(mins => i) AS created_at FROM generate_series(1, 2000) AS i
        """,
    )
    for first in range(0, tables, 100):
        _execute(
            place,
            "".join(
                f"CREATE TABLE app.things_{number} (LIKE app.model, PRIMARY KEY (id)); "
                f"INSERT INTO app.things_{number} SELECT * FROM app.model; "
                for number in range(first, min(first + 100, tables))
            ),
        )
    _execute(place, "DROP TABLE app.model", "ANALYZE")


async def main() -> None:
    """Measure, and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tables", type=int, default=1000)
    data = Path(os.environ.get("LEARNING_DATA") or Path(__file__).parents[2] / "shared" / "data")
    parser.add_argument("--pagila", type=Path, default=data / "schemas" / "pagila_schema.sql")
    given = parser.parse_args()
    found = [await accuracy(name, schema) for name, schema in (("crm", CRM), ("stock", STOCK))]
    if given.pagila.is_file():
        found.append(await accuracy("pagila", pagila_schema(given.pagila), PAGILA_UNDECLARED))
    lines = [*map(str, found), str(await time_patterns(given.tables))]
    print(*lines, sep="\n")
    where = f"Commit {commit()}, Python {platform.python_version()}, {os.cpu_count()} processors"
    busy = f"load {os.getloadavg()[0]:.1f} when it ended."
    text = "\n".join(f"- {line}" for line in lines)
    RESULTS.write_text(f"# Patterns of data\n\n{where}, {busy}\n\n{text}\n", "utf-8")


def pagila_schema(path: Path) -> str:
    """The statements of the sample application's schema, for any owner."""
    return path.read_text("utf-8").replace("OWNER TO postgres", "OWNER TO CURRENT_USER")


if __name__ == "__main__":
    asyncio.run(main())
