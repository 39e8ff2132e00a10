"""`python -m benchmarks.safety`: every figure of the safety work as Markdown. Exit code 1 where a goal is missed.

`python -m benchmarks.safety statements escapes` measures only these parts.
"""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Sequence

from benchmarks.safety.section import Section

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


def main(arguments: Sequence[str]) -> int:
    """Print them; 1 where a goal is missed."""
    unknown = set(arguments) - set(PARTS)
    if unknown:
        print(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}", file=sys.stderr)
        return 2
    logging.getLogger("agent.events").setLevel(logging.ERROR)  # refusals are what is wanted here
    all_reached = True
    for part in arguments or PARTS:
        for section in measured([part]):
            print(as_markdown(section), flush=True)
            all_reached = all_reached and all(line.reached is not False for line in section.lines)
    return 0 if all_reached else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
