"""`agent discover`: find out what the application's database holds."""

from __future__ import annotations

import asyncio
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from agent.commands.options import EXIT_CODES, JsonOption, TenantOption, opened_database, settings
from agent.commands.output import (
    Column,
    counted_as,
    heading,
    is_terminal,
    local_time,
    print_lines,
    print_table,
    remark,
    say,
    say_json,
)

if TYPE_CHECKING:
    from agent.discovery.pattern_learning import PatternSummary
    from agent.discovery.structure import AppStructure

_LISTED = 50  # differences and problems on a terminal; a pipe gets all of them


def discover(
    schema: Annotated[
        list[str] | None,
        typer.Option("--schema", metavar="SCHEMA", help="Only this schema; may be repeated."),
    ] = None,
    structure_only: Annotated[
        bool,
        typer.Option(
            "--structure-only", help="Read no rows: leave the patterns of the data as they are known."
        ),
    ] = False,
    tenant: TenantOption = None,
    as_json: JsonOption = False,
) -> None:
    """Find out what the application's database holds, say what changed since last time, and what could not be seen.

    Reads tables, keys and functions, then samples the rows. Nothing is locked or written there.
    """
    structure, learned = asyncio.run(_discover(schema, structure_only, tenant))
    seen = {problem["object"] for problem in structure.problems}
    unsampled = learned.problems if learned is not None else []
    problems = [*structure.problems, *(one for one in unsampled if one["object"] not in seen)]
    if as_json:
        say_json({**structure, "problems": problems})
        return
    kinds = Counter(table["kind"].replace("_", " ") for table in structure.tables)
    counted = [counted_as(count, kind) for kind, count in sorted(kinds.items())]
    counted += [
        counted_as(len(structure.functions), "function"),
        counted_as(len(structure.relationships), "relationship"),
    ]
    heading(f"{structure.app}: {', '.join(counted)}; seen {local_time(structure.discovered_at)}")
    changes = [(what, name) for what in ("added", "changed", "removed") for name in structure.changes[what]]
    if not is_terminal():
        print_lines(changes)
        print_lines(("not seen", problem["object"], problem["reason"]) for problem in problems)
        return
    if changes:
        print_table(
            (Column(title="since last time", style="cyan"), Column(title="object", is_wide=True)),
            changes[:_LISTED],
        )
    else:
        say("Nothing changed since last time.")
    _tell_rest(len(changes))
    if problems:
        print_table(
            (Column(title="not seen", style="yellow"), Column(title="why", is_wide=True)),
            [(problem["object"], problem["reason"]) for problem in problems[:_LISTED]],
        )
        _tell_rest(len(problems))
    if learned is not None and learned.waiting:
        waiting = counted_as(learned.waiting, "table")
        remark(f"Not sampled yet: {waiting}. The next discovery begins there.")


def _tell_rest(count: int) -> None:
    if count > _LISTED:
        remark(f"… and {count - _LISTED} more; all of them with --json")


async def _discover(
    schemas: list[str] | None, structure_only: bool, tenant: str | None
) -> tuple[AppStructure, PatternSummary | None]:
    from agent.discovery.discovering import STEPS
    from agent.discovery.pattern_learning import learn_patterns
    from agent.learning.auto_discover import AutoDiscovery

    wanted = settings() if tenant is None else settings().model_copy(update={"tenant": tenant})
    async with opened_database() as database:
        discovery = AutoDiscovery(settings=wanted, database=database)
        with _bar() as move:
            structure = await discovery.discover_app_structure(
                schemas, patterns=False, progress=lambda step: move(STEPS.index(step), len(STEPS), step)
            )
            if structure_only:
                return structure, None
            learned = await learn_patterns(wanted, database, structure, progress=move)
        return await discovery.get_cached_structure() or structure, learned


@contextmanager
def _bar() -> Iterator[Callable[[int, int, str], None]]:
    """A bar where standard error is a terminal: how to move it to so many of so many, with what is being done."""
    if not sys.stderr.isatty():
        yield lambda done, total, what: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    from agent.commands.output import one_line

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}", markup=False))
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("")
        yield lambda done, total, what: progress.update(
            task, completed=done, total=total, description=one_line(what, 60)
        )


def add_to(app: typer.Typer) -> None:
    """Register this command."""
    app.command(epilog=f"In a pipe: tab-separated lines of what changed and what was not seen. {EXIT_CODES}")(
        discover
    )
