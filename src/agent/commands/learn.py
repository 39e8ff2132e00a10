"""`agent learn` and `agent learner`: a cycle of the background learner now, how it stands, and as a service."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agent.commands.options import EXIT_CODES, JsonOption, opened_database, settings, tenant_identity
from agent.commands.output import (
    Column,
    heading,
    in_words,
    inert,
    is_terminal,
    local_time,
    one_line,
    print_lines,
    print_table,
    remark,
    say,
    say_json,
)

if TYPE_CHECKING:
    from agent.learning.background_learner import CycleReport, Progress

app = typer.Typer(help="The background learner: how it stands, and as a service.", no_args_is_help=True)

_ALIVE_SECONDS = 60.0


def learn(
    once: Annotated[
        bool, typer.Option("--once", help="One cycle now, then end. Without it: as agent learner run.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Learn from what changed: the application's structure and data, waiting runs, tools' errors; and curate."""
    if not once:
        if as_json:
            raise typer.BadParameter("goes with --once; a service prints no result", param_hint="'--json'")
        _serve()
        return

    async def cycle(progress: Progress) -> CycleReport:
        from agent.learning.background_learner import BackgroundLearner

        async with opened_database() as database:
            return await BackgroundLearner(settings=settings(), database=database).run_once(progress)

    with _progress() as progress:
        report = asyncio.run(cycle(progress))
    if as_json:
        say_json(report.as_json())
    else:
        _print_report(report)
    if report.failed:
        raise typer.Exit(1)


@contextmanager
def _progress() -> Iterator[Progress]:
    """A line that says which step is at what, where standard error is a terminal."""
    if not sys.stderr.isatty():
        yield lambda step, told: None
        return
    from rich.console import Console
    from rich.text import Text

    with Console(stderr=True).status(Text("begins")) as status:
        yield lambda step, told: status.update(Text(f"{inert(step)}: {one_line(told, 100)}"))


def _print_report(report: CycleReport) -> None:
    rows = [
        (step.step, step.state, _counts(step.counts), f"{step.seconds:.1f}", step.error or "")
        for step in report.steps
    ]
    if is_terminal():
        columns = [
            Column(title="step", style="cyan"),
            Column(title="state"),
            Column(title="what it did", is_wide=True),
            Column(title="seconds", is_number=True),
            Column(title="error", is_wide=True),
        ]
        print_table(columns, rows)
    else:
        print_lines(rows)
    for step in report.steps:
        for line in step.details.get("lines", ()):
            say(line)


def _counts(counts: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {number}" for name, number in counts.items() if number) or "nothing to do"


@app.command(epilog=EXIT_CODES)
def status(
    limit: Annotated[int, typer.Option("--limit", metavar="N", min=1, max=1000, help="How many cycles.")] = 5,
    as_json: JsonOption = False,
) -> None:
    """Show the last cycles with their steps, when the next begins, and which replicas are alive."""
    from agent.learning.background_learner import CLOCK_NAME

    async def read() -> tuple[dict[str, Any], list[dict[str, Any]]]:
        async with opened_database() as database:
            identity = tenant_identity(None)
            clocks = await database.call(
                "clock_status", identity, alive_seconds=_ALIVE_SECONDS, tick_limit=limit
            )
            return clocks.get(CLOCK_NAME) or {}, await database.call(
                "list_cycles", identity, cycle_limit=limit
            )

    clock, cycles = asyncio.run(read())
    replicas = clock.get("replicas", [])
    if as_json:
        found = {"next_at": clock.get("next_at"), "ticks": clock.get("ticks", [])}
        say_json({"replicas": replicas, **found, "cycles": cycles})
        return
    if is_terminal():
        if replicas:
            say(f"Alive in {', '.join(replicas)}. Next cycle: {local_time(clock['next_at'])}.")
        else:
            say("Alive nowhere. Start a server, or: agent learner run")
    _print_cycles(cycles)
    if not cycles:
        remark("No cycles yet. Do one now: agent learn --once")


def _print_cycles(cycles: Sequence[Mapping[str, Any]]) -> None:
    columns = [
        Column(title="step", style="cyan"),
        Column(title="state"),
        Column(title="tries", is_number=True),
        Column(title="what it did", is_wide=True),
        Column(title="error", is_wide=True),
    ]
    for cycle in cycles:
        rows = [
            (step["step"], step["state"], str(step["attempts"]), _counts(step["counts"]), step["error"] or "")
            for step in cycle["steps"]
        ]
        if is_terminal():
            ended = local_time(cycle["finished_at"]) or "goes on"
            heading(f"{one_line(cycle['cycle'])} ({local_time(cycle['started_at'])} to {ended})")
            print_table(columns, rows)
        else:
            print_lines((cycle["cycle"], *row) for row in rows)


@app.command(epilog=EXIT_CODES)
def run() -> None:
    """Learn every hour (LEARNING_LEARNER_INTERVAL) until SIGTERM or Ctrl-C; any number may run.

    Also learns the runs that wait, where LEARNING_WORKER is not off.
    """
    _serve()


def _serve() -> None:
    from agent.commands.services import run_service
    from agent.learning.background_learner import BackgroundLearner

    learner = BackgroundLearner(settings=settings())
    every = in_words(learner.clock.interval)
    run_service(_LearnerService(learner), learner.database, f"Learning {every}. Ctrl-C ends it.")


class _LearnerService:
    """The learner's clock and the worker that learns what it orders."""

    def __init__(self, learner: Any) -> None:
        from agent.learning.machine import LearningMachine

        self._learner = learner
        self._machine = LearningMachine(settings=settings(), database=learner.database)

    @property
    def is_running(self) -> bool:
        """Whether it was started and not stopped."""
        return bool(self._learner.is_running)

    async def start(self) -> None:
        """Begin to learn."""
        await self._machine.start_worker()
        await self._learner.start()

    async def stop(self) -> None:
        """End; what runs just now ends first, or is handed back."""
        await self._learner.stop()
        await self._machine.aclose()


def add_to(root: typer.Typer) -> None:
    """Register these commands."""
    root.command(
        epilog="Exit codes: 0 every step was done, 1 one failed or nothing could be done, 2 wrong usage."
    )(learn)
    root.add_typer(app, name="learner")
