"""Time of recall, search and insert against the number of memories in a scope, beside a search in plain SQL.

Memories are written in bulk, and what that leaves is compared with what `upsert_learnings` leaves of the same texts,
row by row in every table that has an owner: words, counts and statistics are what users have. One scope grows from
a thousand to a million memories, and with it, memory by memory, that of another tenant which ends with 10,000. At each
size VACUUM ANALYZE does what autovacuum does in time; then questions are asked one after the other over one
connection, none of them asked before. A call is timed from the statement to its decoded answer. The time that the
server's process works for it is told beside it where the kernel counts it: other work on the machine is not in it.

The baseline is what a tutorial has: one table with an owner, a stored `tsvector` and a GIN index, no row level
security, the words joined by OR, `ts_rank`, the same texts, its best 5.

A fast search that looks at few memories must still find the right one. So memories of any age are asked for by four of
their commoner words, all of which hardly another has, and the first 10 are looked through.
"""

from __future__ import annotations

import itertools
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg

from benchmarks.made_memories import MadeTexts
from benchmarks.measuring import percentile
from benchmarks.retrieval_loading import BulkLoader, identity_of, learning
from benchmarks.retrieval_report import Row, Section, plot, table
from benchmarks.server import fresh_database, measuring_server

SIZES = (1_000, 10_000, 100_000, 1_000_000)
QUICK_SIZES = SIZES[:3]
BESIDE = 10_000
"""Memories of the small tenant at the end."""
SEARCH_GOALS_MS = {10_000: 10.0, 100_000: 30.0, 1_000_000: 60.0}
INSERT_RATIO_GOAL = 2.0
RECALL, SEARCH, INSERT = "recall_context", "match_memories", "insert"
BASELINE = "OR + ts_rank, GIN"

_BATCH = 1_000
_QUESTIONS, _WARM_UP, _BASELINE_QUESTIONS, _INSERTS, _SOUGHT = 200, 40, 60, 60, 60
_METHOD = (__doc__ or "").partition("\n")[2].strip()
_LARGE, _SMALL = "large", "small"


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Times of one thing at one size, in milliseconds."""

    what: str
    in_scope: int
    in_all: int
    p50_ms: float
    p95_ms: float
    work_p50_ms: float | None
    """Processor time of the server's process; `None` where the kernel does not count it."""
    work_p95_ms: float | None


@dataclass(frozen=True, kw_only=True)
class Found:
    """Share of memories that are among the first 10 for four of their words."""

    in_scope: int
    in_all: int
    ours: float
    baseline: float


class ScaleMeasurement:
    """One database that grows; `timings` and `found` fill as it is measured."""

    def __init__(self, connection: psycopg.Connection[Any], tell: Callable[[str], None]) -> None:
        self.timings: list[Timing] = []
        self.found: list[Found] = []
        self._samples: dict[str, list[str]] = {_LARGE: [], _SMALL: []}
        self._connection = connection
        self._tell = tell
        self._texts = MadeTexts()
        self._memories = self._texts.memories()
        self._questions = iter(self._texts.questions(100 * (_QUESTIONS + _WARM_UP)))
        self._clock = Path(f"/proc/{connection.info.backend_pid}/schedstat")
        self._counts = {_LARGE: 0, _SMALL: 0}
        self._loader = BulkLoader(connection)
        self._loader.verify(list(itertools.islice(MadeTexts().memories(), 300)))

    def grow(self, size: int, *, share_beside: float) -> None:
        """Fill the large scope to `size`, and the small one with that share of it, in turns."""
        began = time.perf_counter()
        with self._loader.loading():
            while self._counts[_LARGE] < size:
                self._load(_LARGE, min(_BATCH, size - self._counts[_LARGE]))
                self._load(_SMALL, int(self._counts[_LARGE] * share_beside) - self._counts[_SMALL])
                if self._counts[_LARGE] % 100_000 == 0:
                    self._tell(f"{self._counts[_LARGE]:,} loaded, {time.perf_counter() - began:.0f} s")
        self._connection.execute("VACUUM ANALYZE")

    def measure(self, owner: str) -> None:
        """All calls for one scope as it is."""
        in_scope, in_all = self._counts[owner], sum(self._counts.values())

        def note(what: str, calls: Sequence[tuple[float, float | None]]) -> None:
            times = [elapsed for elapsed, _ in calls]
            work = [worked for _, worked in calls if worked is not None]
            self.timings.append(
                Timing(
                    what=what,
                    in_scope=in_scope,
                    in_all=in_all,
                    p50_ms=percentile(times, 50),
                    p95_ms=percentile(times, 95),
                    work_p50_ms=percentile(work, 50) if work else None,
                    work_p95_ms=percentile(work, 95) if work else None,
                )
            )

        identity = identity_of(owner)
        for what, statement in ((RECALL, _RECALL), (SEARCH, _SEARCH)):
            note(what, self._asked(statement, lambda question: (identity, question), _QUESTIONS))
        note(BASELINE, self._asked(_PLAIN_SEARCH, lambda question: (question, owner), _BASELINE_QUESTIONS))
        for what, statement, arguments in (
            (INSERT, _INSERT, lambda text: (identity, json.dumps([learning(text)]))),
            (f"{INSERT}, {BASELINE}", _PLAIN_INSERT, lambda text: (owner, text)),
        ):
            texts = [next(self._memories) for _ in range(_INSERTS + 5)]
            note(what, [self._timed(statement, arguments(text)) for text in texts][5:])
            if what == INSERT:
                self._counts[owner] += len(texts)
        self.found.append(
            Found(
                in_scope=in_scope,
                in_all=in_all,
                ours=self._share_found(owner, lambda question: (_SEARCH_10, (identity, question))),
                baseline=self._share_found(owner, lambda question: (_PLAIN_SEARCH_10, (question, owner))),
            )
        )
        last = ", ".join(f"{t.what} {t.p50_ms:.2f}/{t.p95_ms:.2f}" for t in self.timings[-5:])
        self._tell(f"{in_scope:,} of {in_all:,}: {last} ms (p50/p95); {self.found[-1]}")

    def _load(self, owner: str, count: int) -> None:
        if count <= 0:
            return
        texts = list(itertools.islice(self._memories, count))
        self._loader.load(identity_of(owner), texts)
        self._counts[owner] += count
        self._samples[owner] += texts[::20]

    def _share_found(self, owner: str, search: Callable[[str], tuple[str, tuple[str, ...]]]) -> float:
        samples = self._samples[owner]
        sought = random.Random(len(samples)).sample(samples, min(_SOUGHT, len(samples)))
        hits = 0
        for text in sought:
            statement, arguments = search(self._texts.question_about(text))
            hits += any(
                text == content for (content,) in self._connection.execute(statement.encode(), arguments)
            )
        return hits / len(sought)

    def _asked(
        self, statement: str, arguments: Callable[[str], tuple[str, ...]], count: int
    ) -> list[tuple[float, float | None]]:
        """Times of questions that were never asked, after a few that are not counted."""
        for question in itertools.islice(self._questions, _WARM_UP if count == _QUESTIONS else 5):
            self._timed(statement, arguments(question))
        return [
            self._timed(statement, arguments(question))
            for question in itertools.islice(self._questions, count)
        ]

    def _timed(self, statement: str, arguments: tuple[str, ...]) -> tuple[float, float | None]:
        """Milliseconds of one call, and what the server's process worked in it."""
        worked = self._worked_ns()
        began = time.perf_counter()
        self._connection.execute(statement.encode(), arguments, prepare=True).fetchall()
        elapsed_ms = 1000 * (time.perf_counter() - began)
        return elapsed_ms, None if worked is None else ((self._worked_ns() or 0) - worked) / 1e6

    def _worked_ns(self) -> int | None:
        try:
            return int(self._clock.read_text().split()[0])
        except OSError:  # only Linux tells
            return None


_RECALL = "SELECT public.recall_context(%s, %s)"
_SEARCH = "SELECT public.match_memories(%s, %s)"
_SEARCH_10 = "SELECT m ->> 'content' FROM jsonb_array_elements(public.match_memories(%s, %s, 10)) AS m"
_INSERT = "SELECT public.upsert_learnings(%s, %s)"
_PLAIN_INSERT = "INSERT INTO public.plain_memory (owner, content) VALUES (%s, %s) RETURNING number"
_PLAIN_SEARCH = """
    SELECT m.content
    FROM (SELECT replace(plainto_tsquery('english', %s)::text, '&', '|')::tsquery) AS q (query), public.plain_memory m
    WHERE m.words @@ q.query AND m.owner = %s
    ORDER BY ts_rank(m.words, q.query) DESC LIMIT 5"""
_PLAIN_SEARCH_10 = _PLAIN_SEARCH.replace("LIMIT 5", "LIMIT 10")


async def measure(sizes: Sequence[int], tell: Callable[[str], None]) -> ScaleMeasurement:
    """All these sizes of one scope, and the small one at the end."""
    with measuring_server() as server:
        async with fresh_database(server, "scale") as url:
            with psycopg.connect(url, autocommit=True) as connection:
                measurement = ScaleMeasurement(connection, tell)
                for size in sizes:
                    measurement.grow(size, share_beside=BESIDE / sizes[-1])
                    measurement.measure(_LARGE)
                measurement.measure(_SMALL)
    return measurement


def rows(timings: Sequence[Timing], found: Sequence[Found]) -> list[Row]:
    """The goals of time, and whether what is right is found in it."""
    largest = max(timing.in_scope for timing in timings)
    lines = []

    def beside(timing: Timing) -> Timing:
        return next(
            other
            for other in timings
            if other.what == (BASELINE if timing.what != INSERT else f"{INSERT}, {BASELINE}")
            and (other.in_scope, other.in_all) == (timing.in_scope, timing.in_all)
        )

    for timing in timings:
        if timing.what != SEARCH or timing.in_scope not in SEARCH_GOALS_MS:
            continue
        goal_ms = SEARCH_GOALS_MS[timing.in_scope]
        baseline = beside(timing)
        lines.append(
            Row(
                measure=f"p95 of one search, {timing.in_scope:,} memories in scope{_others(timing)}",
                baseline=f"{baseline.p95_ms:.1f} ms ({baseline.p95_ms / timing.p95_ms:.1f} times ours)",
                goal=f"≤ {goal_ms:g} ms",
                ours=f"{timing.p95_ms:.1f} ms",
                reached=timing.p95_ms <= goal_ms,
            )
        )
    inserts = {timing.in_scope: timing for timing in timings if timing.what == INSERT and not _others(timing)}
    first, last = inserts[min(inserts)], inserts[largest]
    plain = beside(last).p50_ms / beside(first).p50_ms
    ratio = last.p50_ms / first.p50_ms
    worked = (last.work_p50_ms or 0) / first.work_p50_ms if first.work_p50_ms else ratio
    lines.append(
        Row(
            measure=f"insert of one memory at {largest:,} against its cost at {first.in_scope:,}",
            baseline=f"{plain:.2f} times ({beside(last).p50_ms:.2f} ms)",
            goal=f"≤ {INSERT_RATIO_GOAL:g} times",
            ours=f"{ratio:.2f} times ({last.p50_ms:.2f} ms against {first.p50_ms:.2f} ms); the server's work "
            f"{worked:.2f} times",
            reached=max(ratio, worked) <= INSERT_RATIO_GOAL,  # waiting for the disk hides what grows
        )
    )
    lines += [
        Row(
            measure=f"a memory of any age found by four of its words, {share.in_scope:,} in scope{_others(share)}",
            baseline=f"{share.baseline:.2f}",
            goal="",
            ours=f"{share.ours:.2f}",
            reached=None,
        )
        for share in found
    ]
    return lines


def _others(measured: Timing | Found) -> str:
    return f", {measured.in_all:,} in all" if measured.in_all > 1.5 * measured.in_scope else ""


def section(measurement: ScaleMeasurement, plot_name: str) -> Section:
    """Goals, all times, and where the plot is."""

    def milliseconds(value: float | None) -> str:
        return "" if value is None else f"{value:.2f}"

    lines = [
        [
            timing.what, f"{timing.in_scope:,}", f"{timing.in_all:,}", milliseconds(timing.p50_ms),
            milliseconds(timing.p95_ms), milliseconds(timing.work_p50_ms), milliseconds(timing.work_p95_ms),
        ]
        for timing in measurement.timings
    ]  # fmt: skip
    head = ("milliseconds", "in scope", "in all", "p50", "p95", "server's work p50", "server's work p95")
    return Section(
        title="Time against size",
        rows=rows(measurement.timings, measurement.found),
        text=f"{table(head, lines)}\n\n![time against size]({plot_name})\n\n{_METHOD}",
    )


def growth_plot(timings: Sequence[Timing]) -> str:
    """The times of the scope that grows, as SVG."""
    series = {
        f"{what}, {name}": [
            (timing.in_scope, getattr(timing, column))
            for timing in timings
            if timing.what == what and not _others(timing)
        ]
        for what, name, column in (
            (RECALL, "p95", "p95_ms"), (SEARCH, "p50", "p50_ms"), (SEARCH, "p95", "p95_ms"),
            (INSERT, "p50", "p50_ms"), (BASELINE, "p50", "p50_ms"), (BASELINE, "p95", "p95_ms"),
        )
    }  # fmt: skip
    return plot("Time against size of one scope", series, x="memories in scope", y="milliseconds")
