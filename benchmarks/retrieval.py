"""Recall, measured: what it finds and how long it takes, each goal beside a baseline.

`python -m benchmarks.retrieval [parts…] [--quick] [--data FILE…]`, or `make bench-retrieval`, which installs what it
needs. Prints the table of goals and, where all parts are measured, writes `retrieval.md` (`retrieval_quick.md`) with
everything that was found. A part that cannot be measured says why.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

from benchmarks import retrieval_quality, retrieval_scale, retrieval_updates, retrieval_vectors
from benchmarks.environment import commit
from benchmarks.minilm import MiniLM, is_installed
from benchmarks.retrieval_report import Section, row_table

RESULTS = Path(__file__).parent / "results"
RECORDED = Path(os.environ.get("LEARNING_DATA", "../shared/data")) / "locomo"
"""Recorded conversations in LoCoMo's format; not part of this repository."""

_NO_DATA = f"Not measured: no recorded conversations in LoCoMo's format are given (`--data FILE…`) or in `{RECORDED}`."
_NO_MODEL = "all-MiniLM-L6-v2 is not installed (`make minilm`)"


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _quality(options: argparse.Namespace) -> Section:
    if not options.data:
        return Section(title="Recorded conversations", text=_NO_DATA)
    rows = retrieval_quality.quality(options.data, _embedder(), _tell)
    method = (retrieval_quality.__doc__ or "").partition("\n")[2].strip()
    return Section(title="Recorded conversations", rows=rows, text=method)


def _vectors(options: argparse.Namespace) -> Section:
    if not options.data or not is_installed():
        return Section(title="Vectors", text=f"Not measured: {_NO_MODEL}." if options.data else _NO_DATA)
    rows = retrieval_vectors.QUICK_ROWS if options.quick else retrieval_vectors.ROWS
    return retrieval_vectors.section(asyncio.run(retrieval_vectors.measure(rows, options.data, _tell)))


def _scale(options: argparse.Namespace) -> Section:
    sizes = retrieval_scale.QUICK_SIZES if options.quick else retrieval_scale.SIZES
    measurement = asyncio.run(retrieval_scale.measure(sizes, _tell))
    name = f"{_name(options)}.svg"
    (options.out / name).write_text(retrieval_scale.growth_plot(measurement.timings))
    return retrieval_scale.section(measurement, name)


def _updates(options: argparse.Namespace) -> Section:
    found = retrieval_updates.measure(quick=options.quick, embedder=_embedder(), tell=_tell)
    return retrieval_updates.section(asyncio.run(found))


def _embedder() -> MiniLM | None:
    return MiniLM() if is_installed() else None


PARTS: dict[str, Callable[[argparse.Namespace], Section]] = {
    "quality": _quality,
    "updates": _updates,
    "vectors": _vectors,
    "scale": _scale,
}


def _name(options: argparse.Namespace) -> str:
    return "retrieval_quick" if options.quick else "retrieval"


def report(sections: Sequence[Section], *, quick: bool, load: float) -> str:
    """The goals of all sections first, then each section, as Markdown."""
    command = f"python -m benchmarks.retrieval{' --quick' if quick else ''}"
    made = (
        f"Made by `{command}` at commit {commit()} with Python {platform.python_version()} on "
        f"{datetime.now(UTC).date()}, {os.cpu_count()} processors, load before {load:.1f}. The server is the embedded "
        "Postgres as it ships (128 MB of shared buffers, what is committed is on disk)."
    )
    parts = ["# Recall: what it finds and how long it takes", made]
    parts.append(row_table(row for section in sections for row in section.rows))
    if not is_installed():
        parts.append(f"Nothing was measured with an embedder: {_NO_MODEL}.")
    for section in sections:
        parts += [f"## {section.title}", section.text]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.retrieval", description="Recall, measured.")
    parser.add_argument("parts", nargs="*", metavar="part", help=f"of {', '.join(PARTS)}; default: all")
    parser.add_argument(
        "--quick", action="store_true", help="to 100,000 memories: minutes instead of an hour"
    )
    parser.add_argument(
        "--data", nargs="+", type=Path, metavar="FILE", default=sorted(RECORDED.glob("*.json")),
        help=f"recorded conversations in LoCoMo's format; default: those of {RECORDED}",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    if missing := [str(file) for file in options.data if not file.is_file()]:
        parser.error(f"no file {', '.join(missing)}")
    options.out.mkdir(parents=True, exist_ok=True)
    load = os.getloadavg()[0]
    text = report([PARTS[part](options) for part in options.parts or PARTS], quick=options.quick, load=load)
    if not options.parts:
        (options.out / f"{_name(options)}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
