"""`agent runs`: import, list, show."""

from __future__ import annotations

import asyncio
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO

import typer

from agent.commands.options import (
    EXIT_CODES,
    JsonOption,
    TenantOption,
    opened_database,
    settings,
    tenant_identity,
)
from agent.commands.output import (
    Column,
    heading,
    inert,
    is_terminal,
    local_time,
    one_line,
    print_lines,
    print_table,
    remark,
    say,
    say_json,
    short_id,
)

if TYPE_CHECKING:
    from agent.database import Database
    from agent.identity import Identity
    from agent.learning.run_import import BadLine, ImportReport

app = typer.Typer(help="Runs: import a log, list them, show one.", no_args_is_help=True)

_PAGE = 500
_STATUSES = ("completed", "interrupted", "blocked", "failed", "cancelled")
_OPTIONAL_USER = Annotated[
    str | None,
    typer.Option(
        "--user", metavar="USER", help="Whose runs these are; they are learned then. By default nobody's."
    ),
]


# --- import -----------------------------------------------------------------------------------------------------


@app.command(
    "import",
    epilog="Exit codes: 0 every line went in or was known, 3 some lines are bad and the rest went in, 1 nothing could "
    "be done, 2 wrong usage.",
)
def import_(
    file: Annotated[str, typer.Argument(metavar="FILE", help="The log; - is standard input.")],
    user: _OPTIONAL_USER = None,
    agent: Annotated[str | None, typer.Option(metavar="AGENT", help="Agent of runs that name none.")] = None,
    tenant: TenantOption = None,
    as_json: JsonOption = False,
) -> None:
    """Import runs in OpenAI's message format, one JSON object a line.

    A line has messages or traj, and optionally reward (1 is success), task_id, trial, session_id and agent_id. Bad
    lines are counted, the first 20 named with their number and reason, and the others go in. What is known is passed
    over, so that an interrupted import, or one of a log that has grown, is simply done again.
    """
    from agent.identity import Identity
    from agent.learning.run_import import ImportReport

    identity = tenant_identity(tenant).with_(user_id=user)
    Identity(agent_id=agent)  # refused here rather than for every line
    report = ImportReport()
    try:
        with _log(file) as log:
            _import(log, file, identity, agent, report, shows_bad=not as_json)
    except OSError as error:
        remark(
            f"agent: cannot read {file!r}: {error.strerror or error}. Name a file, or - for standard input"
        )
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        remark(f"Interrupted. {_summary(report)} The same command goes on from there.")
        raise typer.Exit(130) from None
    except BaseException:
        if report.recorded or report.known:
            remark(f"Stopped half-way. {_summary(report)} The same command goes on from there.")
        raise
    if as_json:
        say_json(
            {
                "file": file,
                "recorded": report.recorded,
                "known": report.known,
                "bad": report.bad,
                "bad_lines": [{"line": bad.line_number, "reason": bad.reason} for bad in report.bad_lines],
            }
        )
    else:
        say(_summary(report))
        if user is not None and report.recorded:
            remark(f"A worker learns what they say about {user!r}: agent worker")
    if report.bad:
        raise typer.Exit(3 if report.recorded or report.known else 1)


@contextmanager
def _log(file: str) -> Iterator[BinaryIO]:
    if file == "-":
        yield sys.stdin.buffer
    else:
        with Path(file).open("rb") as log:
            yield log


def _import(
    log: BinaryIO, file: str, identity: Identity, agent: str | None, report: ImportReport, *, shows_bad: bool
) -> None:
    from agent.database import open_database
    from agent.learning.run_import import BAD_LINES_KEPT, import_runs
    from agent.portal import portal

    database = open_database(settings())

    def store(runs: list[dict[str, Any]]) -> dict[str, int]:
        # Not in this thread's loop: reading blocks it, and Ctrl-C must reach a read of standard input.
        counts: dict[str, int] = portal().run_sync(database.call("import_runs", identity, runs=runs))
        return counts

    try:
        with _progress(log if file != "-" else None) as (advance, write):

            def show(bad: BadLine) -> None:
                if report.bad <= BAD_LINES_KEPT:
                    write(f"line {bad.line_number} {one_line(bad.reason, 300)}")
                elif report.bad == BAD_LINES_KEPT + 1:
                    write("The bad lines after these are only counted.")

            import_runs(
                log,
                store,
                report,
                source_file=None if file == "-" else Path(file).name,
                agent_id=agent,
                quiet_period=settings().quiet_period,
                on_bytes=advance,
                on_bad=show if shows_bad else lambda _: None,
            )
    finally:
        portal().run_sync(database.close())


@contextmanager
def _progress(log: BinaryIO | None) -> Iterator[tuple[Callable[[int], None], Callable[[str], None]]]:
    """A bar of bytes where standard error is a terminal: how to move it, and how to write a line above it."""
    if not sys.stderr.isatty():
        yield lambda _: None, remark
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.text import Text

    total = None
    if log is not None and log.seekable():
        total = log.seek(0, 2) or None
        log.seek(0)
    console = Console(stderr=True)
    columns = (TextColumn("importing"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("importing", total=total)
        yield lambda size: progress.advance(task, size), lambda text: console.print(Text(inert(text)))


def _summary(report: ImportReport) -> str:
    parts = [
        f"{report.recorded} {'run' if report.recorded == 1 else 'runs'} imported",
        f"{report.known} known already",
    ]
    if report.bad:
        parts.append(f"{report.bad} bad {'line' if report.bad == 1 else 'lines'}")
    return f"{', '.join(parts)}."


# --- list -------------------------------------------------------------------------------------------------------


@app.command("list", epilog=f"In a pipe: tab-separated lines without a heading. {EXIT_CODES}")
def list_(
    failed: Annotated[
        bool,
        typer.Option("--failed", help="Only runs that failed, were judged a failure, or met a tool error."),
    ] = False,
    status: Annotated[
        str | None, typer.Option(metavar="STATUS", help=f"Only runs of this status: {', '.join(_STATUSES)}.")
    ] = None,
    user: Annotated[
        str | None, typer.Option("--user", metavar="USER", help="Only runs of this user.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="Show at most so many.")] = 50,
    tenant: TenantOption = None,
    as_json: JsonOption = False,
) -> None:
    """List runs, newest first."""
    if status is not None and status not in _STATUSES:
        raise typer.BadParameter(f"{status!r} is none of {', '.join(_STATUSES)}", param_hint="'--status'")
    wanted = {"status": status, "user_id": user, "failed": failed or None}
    wanted = {name: value for name, value in wanted.items() if value is not None}

    async def read() -> list[dict[str, Any]]:
        async with opened_database() as database:
            runs: list[dict[str, Any]] = await database.call(
                "list_runs", tenant_identity(tenant), wanted=wanted, run_limit=limit + 1
            )
            return runs

    runs = asyncio.run(read())
    has_more = len(runs) > limit
    del runs[limit:]
    if as_json:
        say_json(runs)
        return
    if not runs:
        remark("No such runs." if wanted else "No runs yet. Import some: agent runs import FILE")
    elif is_terminal():
        _print_runs(runs, shows_errors=failed)
    else:
        print_lines(
            (
                run["run_id"], run["recorded_at"], run["user_id"], run["status"], outcome_of(run), _task(run),
                run["message_count"], errors_of(run),
            )
            for run in runs
        )  # fmt: skip
    if has_more:
        remark(f"The newest {limit} of them; more with --limit {limit * 4}.")


def _print_runs(runs: Sequence[Mapping[str, Any]], *, shows_errors: bool) -> None:
    has_users = any(run["user_id"] for run in runs)
    columns = [
        Column(title="run", style="cyan"),
        Column(title="recorded"),
        *([Column(title="user")] if has_users else []),
        Column(title="task"),
        Column(title="outcome"),
        *([Column(title="what went wrong", is_wide=True)] if shows_errors else [
            Column(title="messages", is_number=True), Column(title="tool errors", is_number=True)]),
    ]  # fmt: skip
    rows = [
        [
            one_line(short_id(run["run_id"])),
            local_time(run["recorded_at"]),
            *([one_line(run["user_id"] or "", 24)] if has_users else []),
            one_line(_task(run), 20),
            one_line(outcome_of(run), 24),
            *(
                [errors_of(run, width=90)]
                if shows_errors
                else [str(run["message_count"]), str(len(_objects(run["tool_errors"])))]
            ),
        ]
        for run in runs
    ]
    print_table(columns, rows)


def _task(run: Mapping[str, Any]) -> str:
    facts = run["facts"] if isinstance(run["facts"], Mapping) else {}
    task, trial = (facts.get(name) for name in ("task_id", "trial"))
    return " / ".join(str(part) for part in (task, trial) if part is not None)


def _objects(value: Any) -> list[Mapping[str, Any]]:
    """The objects of a stored list. Who records a run chooses its JSON, and an odd one must not hide the others."""
    return [item for item in value if isinstance(item, Mapping)] if isinstance(value, list) else []


def outcome_of(run: Mapping[str, Any]) -> str:
    """The judgement of a run, or its status where nobody judged it."""
    told = []
    for outcome in run["outcomes"]:
        if outcome["succeeded"] is not None:
            score = "" if outcome["score"] is None else f" {outcome['score']:g}"
            told.append(f"{'success' if outcome['succeeded'] else 'failure'} ({outcome['kind']}{score})")
    if run["status"] != "completed" or not told:
        told.insert(0, run["status"])
    return ", ".join(told)


def errors_of(run: Mapping[str, Any], width: int | None = None) -> str:
    """What went wrong, alike things once: a line each where there is a width, else one line."""
    told = Counter(
        f"{one_line(error.get('tool'), 80)}: {one_line(error.get('message'), width)}"
        for error in _objects(run["tool_errors"])
    )
    lines = [one_line(run["error"], width)] if run["error"] else []
    lines += [f"{text} (x{times})" if times > 1 else text for text, times in told.items()]
    if width is None:
        return "; ".join(lines)
    return "\n".join(lines if len(lines) <= 3 else [*lines[:3], f"and {len(lines) - 3} more"])


# --- show -------------------------------------------------------------------------------------------------------


@app.command(epilog=EXIT_CODES)
def show(
    run_id: Annotated[str, typer.Argument(metavar="RUN_ID", help="Id of the run, or how it begins.")],
    tenant: TenantOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show one run: its messages, tool errors, outcome, what was recalled in it and what was learned from it."""

    async def read() -> dict[str, Any]:
        async with opened_database() as database:
            return await _find(database, tenant_identity(tenant), run_id)

    run = asyncio.run(read())
    if as_json:
        say_json(run)
    else:
        _print_run(run)


async def _find(database: Database, identity: Identity, run_id: str) -> dict[str, Any]:
    from agent.errors import NotFound

    run: dict[str, Any] | None = await database.call("get_run", identity, the_run_id=run_id)
    if run is not None:
        return run
    found = [known async for known in _ids(database, identity) if known.startswith(run_id)] if run_id else []
    if len(found) > 1:
        raise NotFound(
            f"{len(found)} runs begin with {run_id!r}: {', '.join(one_line(known, 80) for known in found[:3])}"
            f"{', …' if found[3:] else ''}. Give more of the id"
        )
    if found:
        run = await database.call("get_run", identity, the_run_id=found[0])
    if run is None:
        raise NotFound(
            f"tenant {identity.tenant_id!r} has no run {run_id!r}. `agent runs list` shows those it has"
        )
    return run


async def _ids(database: Database, identity: Identity) -> AsyncIterator[str]:
    offset = 0
    while page := await database.call("list_runs", identity, wanted={}, run_limit=_PAGE, run_offset=offset):
        for run in page:
            yield run["run_id"]
        offset += len(page)


def _print_run(run: Mapping[str, Any]) -> None:
    heading(f"Run {one_line(run['run_id'])}")
    known = {
        "user": run["user_id"],
        "session": run["session_id"] if run["session_id"] != run["run_id"] else None,
        "agent": run["agent_id"],
        "outcome": outcome_of(run),
        "recorded": f"{local_time(run['recorded_at'])}{' from a log' if run['source'] == 'import' else ''}",
        "error": run["error"],
    }
    given = run["facts"] if isinstance(run["facts"], Mapping) else {"facts": run["facts"]}
    # A fact takes no name of ours: it would pass for what we know of the run.
    facts = {f"fact {name}" if name in known else name: value for name, value in given.items()}
    for name, value in {**known, **facts}.items():
        if value not in (None, ""):
            say(f"  {one_line(name)}: {one_line(value)}")
    for error in _objects(run["tool_errors"]):
        say(f"  tool error in {one_line(error.get('tool'))}: {one_line(error.get('message'), 300)}")
    _print_messages(run["messages"])
    if run["exposures"]:
        heading("Recalled in it")
        for exposure in run["exposures"]:
            say(
                f"  {short_id(exposure['memory_id'])} {one_line(exposure['content'] or '(deleted since)', 160)}"
            )
    if run["learned"]:
        heading("Learned from it")
        for memory in run["learned"]:
            say(f"  {short_id(memory['memory_id'])} {memory['store']}: {one_line(memory['content'], 160)}")


def _print_messages(messages: Any) -> None:
    heading("Messages")
    for message in _objects(messages):
        by = f" {one_line(message['name'])}" if message.get("name") else ""
        text = inert(message.get("content") or "").strip()
        if message.get("role") == "system" and len(text) > 300:
            text = f"{text[:300]}… ({len(text)} characters)"
        marks = " (error)" if message.get("is_error") else ""
        indented = text.replace("\n", "\n      ")
        named = " ".join(one_line(message.get(key) or "(unknown)") for key in ("message_id", "role"))
        say(f"  {named}{by}{marks}: {indented}")
        for call in _objects(message.get("tool_calls")):
            say(f"      calls {one_line(call.get('name'))} {one_line(call.get('args'), 500)}")
