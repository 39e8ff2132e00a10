"""`python -m benchmarks.safety`: every figure of the safety work as Markdown. Exit code 1 where a goal is missed.

`python -m benchmarks.safety statements escapes` measures only these parts. All of them together are also left in
`benchmarks/results/safety.md`, with where and when they were measured.
"""

from __future__ import annotations

import importlib
import logging
import os
import platform
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import psycopg

from agent.testing.throwaway import throwaway_database
from benchmarks.environment import commit
from benchmarks.safety.section import Section
from benchmarks.safety.statements import debian_programs

RESULTS = Path(__file__).parents[1] / "results" / "safety.md"
PARTS = ("statements", "benign", "containers", "decisions", "escapes", "kills")


def measured(parts: Sequence[str]) -> list[Section]:
    """The sections of these parts, one after the other: some of them measure time."""
    return [importlib.import_module(f"benchmarks.safety.{part}").measure() for part in parts]


def as_markdown(section: Section) -> str:
    """The section as a table."""
    marks = {True: "yes", False: "**no**", None: ""}
    rows = [
        f"| {line.what} | {line.printed} | {marks[line.reached]} |".replace("\n", " ")
        for line in section.lines
    ]
    return "\n".join([f"## {section.title}", "", "| figure | value | reached |", "|---|---|---|", *rows, ""])


def where_measured() -> str:
    """Date, commit, machine and versions, as a table."""
    with throwaway_database(migrated=False) as database, psycopg.connect(database.url) as connection:
        embedded = connection.info.parameter_status("server_version")
    debian = debian_programs()
    facts = {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit(),
        "system": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "Python": platform.python_version(),
        "Postgres": f"{embedded}, embedded",
        "Postgres of the part `statements`": f"Debian's {debian.parent.name}" if debian else "embedded alone",
    }
    rows = [f"| {name} | {value} |" for name, value in facts.items()]
    return "\n".join(["## Environment", "", "|  |  |", "|---|---|", *rows, ""])


def main(arguments: Sequence[str]) -> int:
    """Print them; 1 where a goal is missed."""
    unknown = set(arguments) - set(PARTS)
    if unknown:
        print(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}", file=sys.stderr)
        return 2
    logging.getLogger("agent.events").setLevel(logging.ERROR)  # refusals are what is wanted here
    all_reached = True
    printed = [f"# What gets past the gates\n\nMade by `make bench-safety`.\n\n{where_measured()}"]
    print(printed[0], flush=True)
    for part in arguments or PARTS:
        for section in measured([part]):
            printed.append(as_markdown(section))
            print(printed[-1], flush=True)
            all_reached = all_reached and all(line.reached is not False for line in section.lines)
    if set(arguments or PARTS) == set(PARTS):
        RESULTS.write_text("\n".join(printed), "utf-8")
    return 0 if all_reached else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
