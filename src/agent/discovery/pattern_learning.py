"""Learning the patterns of an application's tables: sample, compare with what was known, save, in steps that resume."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from agent.database.protocol import Database
from agent.database.supabase import SupabaseDatabase
from agent.discovery.inferred_keys import MATCH_ROWS, Candidate, candidates, is_confirmed, whole_numbers
from agent.discovery.pattern_text import patterns_worth_knowing
from agent.discovery.recent_changes import recent_changes
from agent.discovery.sampling import (
    NOT_FILLED,
    SAMPLED_KINDS,
    ConnectionSampler,
    Sample,
    SampleError,
    Sampler,
    plan_sample,
)
from agent.discovery.statuses import is_history, status_columns
from agent.discovery.storage_sampling import StorageSampler
from agent.discovery.structure import AppStructure, full_name, open_app_database
from agent.discovery.table_patterns import Neighbours, TableKnowledge, table_pattern, told_of_parent
from agent.events import emit
from agent.identity import Identity
from agent.settings import Settings

_BATCH = 50  # tables that are saved together: what a stop loses at most
_CHANGES_OF_TABLE = 10  # changes of one table that are told at most

Progress = Callable[[int, int, str], None]
"""Told after each table: how many are done, of how many, and its name."""


@dataclass(frozen=True, kw_only=True)
class PatternSummary:
    """What one round of learning patterns gave."""

    app: str
    patterns: list[dict[str, Any]] = field(default_factory=list)
    """One per table that was sampled now."""
    relationships: list[dict[str, Any]] = field(default_factory=list)
    """References of those tables that nobody declared, with their evidence."""
    changes: list[dict[str, Any]] = field(default_factory=list)
    """What moved since last time: `{table, column, kind, what, before, after}`."""
    problems: list[dict[str, str]] = field(default_factory=list)
    """`{object, reason}` of tables that could not be sampled."""
    waiting: int = 0
    """Tables that the time did not suffice for; the next round begins with them."""


@dataclass(frozen=True, kw_only=True)
class StoredPatterns:
    """What is stored of an application's data."""

    patterns: list[dict[str, Any]]
    relationships: list[dict[str, Any]]


async def stored_patterns(settings: Settings, database: Database, app: str) -> StoredPatterns:
    """The patterns that were learned of an application, and the references that were inferred. Empty before."""
    found = await database.call("read_app_patterns", Identity(tenant_id=settings.tenant), the_app=app)
    return StoredPatterns(
        patterns=[row["document"] for row in found],
        relationships=[relationship for row in found for relationship in row["inferred"]],
    )


async def learn_patterns(
    settings: Settings,
    database: Database,
    structure: AppStructure,
    *,
    deadline: datetime | None = None,
    progress: Progress | None = None,
) -> PatternSummary:
    """Sample the tables of a structure and save what they tell, the longest unsampled first.

    Nothing is locked or written in the application's database, no statement lasts longer than `discovery_timeout`, and
    a table that fails is reported while the others go on. Saved in batches, so a stop loses little, and the next round
    begins with what this one did not reach.

    Args:
        settings: say where the application's database is and whose patterns they are.
        database: where they are saved.
        structure: the structure of that database.
        deadline: when to stop, between two tables; `None`: when all are done.
        progress: told after each table.

    Raises:
        DatabaseUnavailable: one of the databases is away. What was saved stays.
    """
    async with open_sampler(settings, database) as sampler:
        round_ = _Round(settings, database, structure, sampler)
        return await round_.run(deadline, progress)


@asynccontextmanager
async def open_sampler(settings: Settings, database: Database) -> AsyncIterator[Sampler]:
    """Where samples come from: a connection, or the storage functions where there are Supabase's keys alone."""
    if settings.app_database_url is None and isinstance(database, SupabaseDatabase):
        yield StorageSampler(database, settings.discovery_timeout)
        return
    async with open_app_database(settings) as connection:
        yield ConnectionSampler(connection)


class _Round:
    """One round over all tables."""

    def __init__(
        self, settings: Settings, database: Database, structure: AppStructure, sampler: Sampler
    ) -> None:
        self._identity = Identity(tenant_id=settings.tenant)
        self._database = database
        self._structure = structure
        self._sampler = sampler
        self._summary = PatternSummary(app=structure.app)
        self._known: dict[str, TableKnowledge] = {}
        self._secret: str | None = None
        self._now = datetime.now(UTC)
        self._candidates: dict[str, list[Candidate]] = {}
        self._told: dict[str, dict[str, Counter[tuple[str, str]]]] = {}
        self._inferred: dict[str, list[dict[str, Any]]] = {}

    async def run(self, deadline: datetime | None, progress: Progress | None) -> PatternSummary:
        begun = time.monotonic()
        await self._read_what_is_known()
        for candidate in candidates(self._structure.tables):
            name = full_name(candidate.from_schema, candidate.from_table)
            self._candidates.setdefault(name, []).append(candidate)
        waiting = self._in_order()
        count, done = len(waiting), 0
        while waiting and not _is_over(deadline):
            batch, waiting = waiting[:_BATCH], waiting[_BATCH:]
            distinct = await self._distinct(batch)
            entries = []
            for place, table in enumerate(batch):
                if _is_over(deadline):
                    waiting = batch[place:] + waiting
                    break
                entry = await self._learn(table, distinct)
                entries += [entry] if entry is not None else []
                done += 1
                if progress is not None:
                    progress(done, count, _name(table))
            if entries:
                await self._database.call(
                    "save_app_patterns", self._identity, the_app=self._structure.app, patterns=entries
                )
        await self._forget()
        summary = self._summary
        emit(
            "patterns_learned",
            tenant_id=self._identity.tenant_id,
            app=summary.app,
            tables=len(summary.patterns),
            changes=len(summary.changes),
            problems=len(summary.problems),
            waiting=len(waiting),
            seconds=round(time.monotonic() - begun, 3),
        )
        return PatternSummary(**{**vars(summary), "waiting": len(waiting)})

    async def _read_what_is_known(self) -> None:
        self._now = await self._sampler.now()
        await self._database.prepare()
        self._secret = self._database.secret()
        stored = await self._database.call(
            "read_app_patterns", self._identity, the_app=self._structure.app, rest=True
        )
        for row in stored:
            self._known[row["table"]] = TableKnowledge(
                pattern=row["document"], seen=row["seen"], estimates=row["estimates"]
            )

    def _in_order(self) -> list[dict[str, Any]]:
        """The tables to sample: the longest unsampled first, and of the same time those that tell of others."""

        def order(table: Mapping[str, Any]) -> tuple[str, bool, str]:
            known = self._known.get(_name(table), TableKnowledge())
            return known.pattern.get("sampled_at", ""), not is_history(table), _name(table)

        return sorted((t for t in self._structure.tables if t["kind"] in SAMPLED_KINDS), key=order)

    async def _distinct(self, batch: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
        try:
            estimates = await self._sampler.distinct_estimates([(t["schema"], t["name"]) for t in batch])
        except SampleError as error:
            self._summary.problems.append({"object": "pg_stats", "reason": error.reason})
            return {}
        found: dict[str, dict[str, float]] = {}
        for (schema, table, column), estimate in estimates.items():
            found.setdefault(full_name(schema, table), {})[column] = estimate
        return found

    async def _learn(
        self, table: Mapping[str, Any], distinct: Mapping[str, Mapping[str, float]]
    ) -> dict[str, Any] | None:
        """The entry of one table to be saved, or `None` where it could not be sampled."""
        name = _name(table)
        try:
            sample = await self._sample(table)
        except SampleError as error:
            if error.reason != NOT_FILLED:
                self._summary.problems.append({"object": name, "reason": error.reason})
            return None
        inferred = await self._infer(name, table.get("row_estimate") or 0)
        parent = self._parent_of(table, inferred)
        neighbours = Neighbours(
            parent_column=parent[0] if parent else None,
            told=self._told.get(name, {}),
            keys=frozenset(column for relationship in inferred for column in relationship["from_columns"]),
        )
        before = self._known.get(name, TableKnowledge())
        after = await asyncio.to_thread(
            table_pattern,
            table,
            sample,
            self._now,
            before,
            secret=self._secret,
            distinct=distinct.get(name),
            neighbours=neighbours,
        )
        if parent:
            self._tell_parent(table, sample, parent, after)
        changes = recent_changes(before.pattern, after.pattern, after.estimates)[:_CHANGES_OF_TABLE]
        self._summary.patterns.append(after.pattern)
        self._summary.relationships.extend(inferred)
        self._summary.changes.extend(changes)
        return {
            "table": name,
            "document": after.pattern,
            "seen": after.seen,
            "estimates": after.estimates,
            "inferred": inferred,
            "memory": patterns_worth_knowing(after.pattern),
            "changes": changes,
        }

    async def _sample(self, table: Mapping[str, Any]) -> Sample:
        """A sample of a table; without its generated columns, where one of them may be what cannot be read."""
        plan = plan_sample(table)
        try:
            return await self._sampler.sample(plan)
        except SampleError:
            stored = [column for column in table["columns"] if not column.get("generated")]
            if len(stored) in (0, len(table["columns"])):
                raise
        return await self._sampler.sample(plan_sample({**table, "columns": stored}))

    async def _infer(self, name: str, row_estimate: int) -> list[dict[str, Any]]:
        found = []
        percent = 100 * MATCH_ROWS / row_estimate if row_estimate else 100.0
        for candidate in self._candidates.get(name, ()):
            try:
                sampled, distinct, matched = await self._sampler.match(
                    candidate.as_reference(), 2 * MATCH_ROWS, percent if percent < 100 else None
                )
            except SampleError as error:
                self._summary.problems.append(
                    {"object": f"{name}.{candidate.from_column}", "reason": error.reason}
                )
                continue
            numbers = whole_numbers(self._structure.tables, candidate)
            if is_confirmed(sampled, distinct, matched, whole_numbers=numbers):
                found.append(candidate.relationship(sampled, matched))
        return found

    def _parent_of(
        self, table: Mapping[str, Any], inferred: Sequence[Mapping[str, Any]]
    ) -> tuple[str, dict[str, Any]] | None:
        """Of a table of history the column that points at the table it tells of, and that table."""
        if not is_history(table):
            return None
        tables = {_name(other): other for other in self._structure.tables}
        declared = [
            (key["columns"], full_name(key["to_schema"], key["to_table"])) for key in table["foreign_keys"]
        ]
        references = declared + [(item["from_columns"], item["to_table"]) for item in inferred]
        for columns, parent in references:
            if (
                len(columns) == 1
                and parent in tables
                and parent != _name(table)
                and _has_status(tables[parent])
            ):
                return columns[0], tables[parent]
        return None

    def _tell_parent(
        self,
        table: Mapping[str, Any],
        sample: Sample,
        parent: tuple[str, Mapping[str, Any]],
        known: TableKnowledge,
    ) -> None:
        column, other = parent
        counts = told_of_parent(table, sample, column, known.pattern["columns"])
        status = _has_status(other)
        if counts and status is not None:
            self._told.setdefault(_name(other), {}).setdefault(status, Counter()).update(counts)

    async def _forget(self) -> None:
        """Drop what is stored of tables that are there no more; one that could not be seen may be there."""
        kept = [_name(table) for table in self._structure.tables]
        kept += [problem["object"] for problem in self._structure.problems]
        if set(self._known) - set(kept):
            await self._database.call(
                "forget_app_patterns", self._identity, the_app=self._structure.app, kept_tables=kept
            )


def _name(table: Mapping[str, Any]) -> str:
    return full_name(table["schema"], table["name"])


def _has_status(table: Mapping[str, Any]) -> str | None:
    """The first column of a table that its name makes a status."""
    plain = {column["name"]: {"personal": None, "top": [["", 1.0]]} for column in table["columns"]}
    return next(iter(status_columns(table, plain)), None)


def _is_over(deadline: datetime | None) -> bool:
    return deadline is not None and datetime.now(UTC) >= deadline
