"""How long discovery of a large application takes: 1,000 tables, 5,000 columns, 500 functions.

`python -m benchmarks.discovery`. The baseline reads information_schema table by table, as tools do that reflect one
table after the other; it is run over the same database in the same process.
"""

from __future__ import annotations

import asyncio
import json
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import psycopg

from agent.database.postgres import PostgresDatabase
from agent.learning.auto_discover import AutoDiscovery
from agent.testing.throwaway import async_throwaway_database
from benchmarks.environment import commit

RESULTS = Path(__file__).parent / "results" / "discovery.md"
TABLES, FUNCTIONS = 1_000, 500
_ROUNDS = 7

_BASELINE = (
    """SELECT column_name, data_type, is_nullable, column_default FROM information_schema.columns
       WHERE table_schema = %s AND table_name = %s ORDER BY ordinal_position""",
    """SELECT constraint_name, column_name FROM information_schema.key_column_usage
       WHERE table_schema = %s AND table_name = %s ORDER BY ordinal_position""",
    "SELECT indexname, indexdef FROM pg_indexes WHERE schemaname = %s AND tablename = %s",
)


async def make_application(connection: psycopg.AsyncConnection[Any]) -> None:
    """Tables of five columns with keys, checks, indexes, comments and an enum, and functions that read and write."""
    statements = ["CREATE SCHEMA app", "CREATE TYPE app.state AS ENUM ('new', 'paid', 'refunded')"]
    for number in range(TABLES):
        parent = f" REFERENCES app.thing_{number - 1}" if number else ""
        statements.append(
            f"CREATE TABLE app.thing_{number} (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, name text NOT NULL "
            f"DEFAULT 'x', state app.state, amount numeric(10, 2) CHECK (amount >= 0), parent_id bigint{parent})"
        )
        if number % 3 == 0:
            statements.append(f"COMMENT ON TABLE app.thing_{number} IS 'Things of sort {number}'")
        if number % 2 == 0:
            statements.append(f"CREATE INDEX ON app.thing_{number} (name)")
    for number in range(FUNCTIONS):
        language, body = (
            "plpgsql",
            f"BEGIN UPDATE app.thing_{number} SET name = a WHERE id = b; RETURN 1; END",
        )
        if number % 2:
            language, body = (
                "sql",
                f"SELECT count(*)::integer FROM app.thing_{number} WHERE name = a AND id = b",
            )
        statements.append(
            f"CREATE FUNCTION app.do_{number}(a text, b bigint DEFAULT 1) RETURNS integer LANGUAGE {language} "
            f"AS $${body}$$"
        )
    for begin in range(0, len(statements), 200):
        await connection.execute("; ".join(statements[begin : begin + 200]).encode())
    await connection.execute("ANALYZE")


async def _seconds(work: Callable[[], Awaitable[Any]], rounds: int) -> tuple[float, float]:
    """Median and worst of so many rounds."""
    found = []
    for _ in range(rounds):
        began = time.perf_counter()
        await work()
        found.append(time.perf_counter() - began)
    return statistics.median(found), max(found)


async def _processor_seconds(url: str, wanted: dict[str, Any]) -> float:
    """What the server's process itself works for one structure call, whatever else the machine does: best of five."""
    found: list[float] = []

    def note(notice: psycopg.errors.Diagnostic) -> None:
        times = re.search(r"([\d.]+) s user, ([\d.]+) s system", notice.message_detail or "")
        if times is not None:
            found.append(float(times[1]) + float(times[2]))

    async with await psycopg.AsyncConnection.connect(url, autocommit=True) as connection:
        await connection.execute("SET client_min_messages = log; SET log_statement_stats = on")
        connection.add_notice_handler(note)
        rounds = []
        for _ in range(5):
            found.clear()  # parsing, binding and executing are told apart
            await connection.execute("SELECT public.discover_app_structure(%s)", (json.dumps(wanted),))
            rounds.append(sum(found))
    return min(rounds)


async def measure(rounds: int) -> str:
    """The table of times as Markdown."""
    async with async_throwaway_database() as place:
        async with await psycopg.AsyncConnection.connect(place.url, autocommit=True) as connection:
            await make_application(connection)

            async def by_information_schema() -> None:
                for number in range(TABLES):
                    for query in _BASELINE:
                        await (await connection.execute(query, ("app", f"thing_{number}"))).fetchall()

            baseline = await _seconds(by_information_schema, 1)
        database = PostgresDatabase(place.url)
        discovery = AutoDiscovery(settings=place.settings, database=database)
        known: dict[str, str] = {}

        async def structure() -> None:
            found = await database.call("discover_app_structure", wanted={"known": known})
            for item in [*found["tables"], *found["functions"]]:
                if "name" in item:
                    arguments = f"({item['identity_arguments']})" if "arguments" in item else ""
                    known[f"{item['schema']}.{item['name']}{arguments}"] = item["fingerprint"]

        async def whole() -> None:
            await discovery.discover_app_structure(patterns=False)

        first_call = await _seconds(structure, 1)
        known_call = await _seconds(structure, rounds)
        first_work = await _processor_seconds(place.url, {})
        known_work = await _processor_seconds(place.url, {"known": known})
        first = await _seconds(whole, 1)
        again = await _seconds(whole, rounds)
        await database.close()
    load = os.getloadavg()[0]
    rows = [
        ("baseline: information_schema, table by table", baseline, ""),
        ("structure, the first call", first_call, "1.5"),
        ("structure, nothing changed", known_call, "0.3"),
        ("whole first discovery: read, compared, saved, learned", first, ""),
        ("whole rediscovery, nothing changed", again, "0.3"),
    ]
    made = (
        f"Made by `python -m benchmarks.discovery` at commit {commit()} with Python {platform.python_version()}: "
        f"{TABLES:,} tables, {5 * TABLES:,} columns, {FUNCTIONS} functions. Seconds, median and worst of {rounds} "
        f"rounds where a thing can be done again. The machine's load was {load:.1f} with {os.cpu_count()} processors."
    )
    work = (
        f"Of a structure call, the server's process works {first_work:.2f} s where nothing is known and "
        f"{known_work:.2f} s where nothing changed; the rest is waiting for "
        "a processor, and for Python to read the answer."
    )
    lines = [
        "# Discovery of a large application",
        "",
        made,
        "",
        "| what | median | worst | goal | baseline takes so many times as long |",
        "|---|---|---|---|---|",
        *(
            f"| {name} | {median:.2f} | {worst:.2f} | {goal} | {baseline[0] / median:.1f} |"
            for name, (median, worst), goal in rows
        ),
        "",
        work,
        "",
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    """Print the table and keep it; `--quick` does fewer rounds and keeps nothing."""
    quick = "--quick" in arguments
    text = asyncio.run(measure(2 if quick else _ROUNDS))
    print(text)
    if not quick:
        RESULTS.write_text(text, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
