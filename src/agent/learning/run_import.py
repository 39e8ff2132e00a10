"""Import of a log of runs, one JSON object a line: streaming, in batches, and safe to do again.

A run's id comes from its content, so a log that is imported again, after an interruption or because it has grown, adds
what is new and nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, BinaryIO

from agent.errors import AccessRefused, InvalidLearning, LearningError, OperatorError
from agent.learning.transcripts import UnreadableRun, read_run

BATCH_RUNS = 50
"""Runs of one call to the database."""
BATCH_BYTES = 8 * 1024 * 1024
"""A batch ends where its lines reach this, so that memory is bounded by it and the longest line."""
LINE_BYTES_MAX = 64 * 1024 * 1024
"""A longer line is a bad line."""
BAD_LINES_KEPT = 20
"""How many bad lines a report names; all are counted and told to `on_bad`."""

_CHUNK_BYTES = 1024 * 1024
_TOO_MUCH = re.compile(
    r"\((?:22|54)\w{3}\)"
)  # SQLSTATE classes of a value, or a document, that Postgres cannot hold

StoreRuns = Callable[[list[dict[str, Any]]], Mapping[str, int]]
"""The storage function `import_runs`: takes runs, returns `{recorded, known}`, all of them or an error."""


@dataclass(frozen=True, kw_only=True)
class BadLine:
    """A line that did not go in."""

    line_number: int
    """From 1."""
    reason: str


@dataclass(kw_only=True)
class ImportReport:
    """How far an import is; complete when `import_runs` has returned."""

    recorded: int = 0
    """Runs that are new in the database."""
    known: int = 0
    """Runs that it had before, or that the log has twice."""
    bad: int = 0
    """Lines that did not go in."""
    bad_lines: list[BadLine] = field(default_factory=list)
    """The first of them, at most `BAD_LINES_KEPT`."""


@dataclass(frozen=True)
class _Line:
    number: int
    text: bytes
    """Empty for a line that is too long."""
    size: int
    """Bytes, line end included."""


def import_runs(
    log: BinaryIO,
    store: StoreRuns,
    report: ImportReport,
    *,
    source_file: str | None = None,
    agent_id: str | None = None,
    quiet_period: timedelta = timedelta(seconds=20),
    on_bytes: Callable[[int], None] = lambda _: None,
    on_bad: Callable[[BadLine], None] = lambda _: None,
) -> None:
    """Read the log to its end and store its runs. Blank lines do not count. Blocks: reads and stores in this thread.

    Args:
        log: opened in binary mode; lines end with a line feed.
        store: see `StoreRuns`.
        report: filled as it goes, so that it is right when this raises, too.
        source_file: name of the log, for the record.
        agent_id: agent of runs that name none.
        quiet_period: how long the learning of their sessions waits, where they belong to a user.
        on_bytes: told how many bytes further it is.
        on_bad: told of each bad line at once.

    Raises:
        LearningError: the database cannot take any; what was stored before stays, and the same call goes on there.
        OSError: the log cannot be read.
    """
    batch: list[tuple[int, dict[str, Any]]] = []
    batch_bytes = 0
    done_bytes = 0

    def refuse(line_number: int, reason: str) -> None:
        bad = BadLine(line_number=line_number, reason=reason)
        report.bad += 1
        if len(report.bad_lines) < BAD_LINES_KEPT:
            report.bad_lines.append(bad)
        on_bad(bad)

    def flush() -> None:
        nonlocal batch, batch_bytes, done_bytes
        full, batch, batch_bytes = batch, [], 0
        if full:
            _store(full, store, report, refuse)
        on_bytes(done_bytes)
        done_bytes = 0

    for line in _lines(log):
        done_bytes += line.size
        try:
            run = _read_line(line, source_file, agent_id)
        except UnreadableRun as error:
            refuse(line.number, str(error))
            run = None
        if run is not None:
            run["facts"]["line"] = line.number  # keeps the order of runs that are stored in one moment
            run["quiet_seconds"] = quiet_period.total_seconds()
            batch.append((line.number, run))
            batch_bytes += line.size
        if len(batch) >= BATCH_RUNS or batch_bytes >= BATCH_BYTES or done_bytes >= BATCH_BYTES:
            flush()
    flush()


def _store(
    batch: Sequence[tuple[int, dict[str, Any]]],
    store: StoreRuns,
    report: ImportReport,
    refuse: Callable[[int, str], None],
) -> None:
    try:
        counts = store([run for _, run in batch])
    except LearningError as error:
        if not _may_be_one_run(error):
            raise
        if len(batch) > 1:  # which of them? Stored one by one, the others go in
            for item in batch:
                _store([item], store, report, refuse)
        else:
            refuse(batch[0][0], f"was refused by the database: {error}")
        return
    report.recorded += counts["recorded"]
    report.known += counts["known"]


def _may_be_one_run(error: LearningError) -> bool:
    """Whether the database may have refused one run of the batch, rather than being unable to take any."""
    match error:
        case AccessRefused():
            return "belongs to somebody else" in str(error)
        case OperatorError():
            return _TOO_MUCH.search(str(error)) is not None
        case _:
            return isinstance(error, InvalidLearning)


def _read_line(line: _Line, source_file: str | None, agent_id: str | None) -> dict[str, Any] | None:
    if line.size > LINE_BYTES_MAX:
        raise UnreadableRun(f"is longer than {LINE_BYTES_MAX // 1024 // 1024} MB")
    text = line.text.removeprefix(b"\xef\xbb\xbf") if line.number == 1 else line.text
    text = text.strip()
    if not text:
        return None
    try:
        return read_run(text.decode(), source_file=source_file, agent_id=agent_id)
    except UnicodeDecodeError as error:
        raise UnreadableRun(f"is not UTF-8 (byte {error.start + 1})") from None


def _lines(log: BinaryIO) -> Iterator[_Line]:
    number = 0
    while line := log.readline(LINE_BYTES_MAX + 1):
        number += 1
        size = len(line)
        if size > LINE_BYTES_MAX:
            is_whole = line.endswith(b"\n")
            line = b""
            while not is_whole and (chunk := log.readline(_CHUNK_BYTES)):
                size += len(chunk)
                is_whole = chunk.endswith(b"\n")
        yield _Line(number, line, size)
