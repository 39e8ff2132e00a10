"""How many repeated tool errors are warned of before the call, and how many calls that succeed are, for nothing.

    python -m benchmarks.tool_warnings [--log FILE] [--date DATE] [--out FOLDER]

Every call is judged by what earlier runs taught and what its own run had shown before it; then its outcome is learned.
"""

from __future__ import annotations

import argparse
import json
import os
import random
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean

from agent.learning.tool_experience_calls import ToolCall, read_calls
from agent.learning.tool_experience_warnings import WarningCounts, evaluate_warnings
from agent.learning.transcripts import read_run
from benchmarks.environment import commit
from benchmarks.made_logs import made_logs

Run = Sequence[ToolCall]
_ORDERS = 20
"""In how many other orders the log is judged; those that were made up, whose calls are many more, in three."""
_ORDERS_OF_MADE = 3


def ever_failed(runs: Sequence[Run]) -> WarningCounts:
    """Warns of every error that the tool ever had."""
    return _count(runs, lambda call: (call.tool,))


def same_arguments(runs: Sequence[Run]) -> WarningCounts:
    """Warns of the errors that the very same call had before."""
    return _count(runs, lambda call: (call.tool, json.dumps(call.arguments, sort_keys=True)))


def _count(runs: Sequence[Run], key_of) -> WarningCounts:  # type: ignore[no-untyped-def]
    counts = WarningCounts()
    known: dict[tuple[str, ...], set[str]] = {}
    seen: set[tuple[str, str]] = set()
    for call in (call for run in runs for call in run):
        warned = known.get(key_of(call), set())
        if call.template is None:
            counts.clean += 1
            counts.clean_warned += bool(warned)
            continue
        counts.errors += 1
        if (call.tool, call.template) in seen:
            counts.repeats += 1
            counts.repeats_warned += call.template in warned
        seen.add((call.tool, call.template))
        known.setdefault(key_of(call), set()).add(call.template)
    counts.templates = len(seen)
    return counts


def table(log: str, runs: Sequence[Run], orders: int) -> list[str]:
    """The lines of Markdown for one log, in its order and in others."""
    lines = [
        f"## {log}",
        "",
        "| who warns | templates | repeats warned | clean calls warned |",
        "|---|---|---|---|",
        _row("tool ever failed", ever_failed(runs)),
        _row("same arguments failed", same_arguments(runs)),
        _row("ours", evaluate_warnings(runs)),
    ]
    return [*lines, "", *_in_other_orders(runs, orders), ""]


def _in_other_orders(runs: Sequence[Run], orders: int) -> list[str]:
    warned, clean, both = [], [], 0
    for seed in range(1, orders + 1):
        shuffled = list(runs)
        random.Random(seed).shuffle(shuffled)
        counts = evaluate_warnings(shuffled)
        warned.append(100 * counts.repeats_warned / max(counts.repeats, 1))
        clean.append(100 * counts.clean_warned / max(counts.clean, 1))
        both += warned[-1] >= 95 and clean[-1] < 5
    return [
        f"Ours, runs shuffled {orders} times: repeats warned {fmean(warned):.1f} % (worst {min(warned):.1f} %);",
        f"clean calls warned {fmean(clean):.1f} % (worst {max(clean):.1f} %);",
        f"at least 95 % and less than 5 % in {both} of them.",
    ]


def _row(name: str, counts: WarningCounts) -> str:
    return (
        f"| {name} | {counts.templates} | {_share(counts.repeats_warned, counts.repeats)} "
        f"| {_share(counts.clean_warned, counts.clean)} |"
    )


def _share(part: int, whole: int) -> str:
    return f"{part} of {whole} ({100 * part / whole:.1f} %)" if whole else "none"


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tool_warnings")
    data = Path(os.environ.get("LEARNING_DATA") or Path(__file__).parents[2] / "shared" / "data")
    parser.add_argument(
        "--log",
        type=Path,
        default=data / "trajectories" / "tau_airline_dev.jsonl",
        help="runs, one JSON object a line",
    )
    parser.add_argument("--date", default=datetime.now(UTC).date().isoformat(), help="date to print")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results", help="folder for the result"
    )
    options = parser.parse_args()
    if not options.log.exists():
        print(f"skipped: there is no log {options.log}; name one by --log, or its folder by LEARNING_DATA")
        return
    with options.log.open() as log:
        runs = [list(read_calls(read_run(line)["messages"])) for line in log if line.strip()]
    lines = [
        "# Warnings before tool calls",
        "",
        f"{options.date}, commit {commit()}. `python -m benchmarks.tool_warnings`",
        "",
        *table(options.log.stem, runs, _ORDERS),
    ]
    for name, made in made_logs().items():
        lines += table(name, made, _ORDERS_OF_MADE)
    text = "\n".join(lines)
    print(text)
    (options.out / "tool_warnings.md").write_text(text)


if __name__ == "__main__":
    main()
