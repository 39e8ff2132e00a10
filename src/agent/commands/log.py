"""`agent log`: what tools did: list, show, verify, undo."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Annotated, Any

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
)

app = typer.Typer(help="The log of what tools did: list, show, verify, undo.", no_args_is_help=True)

_STATES = ("executed", "failed", "unknown", "refused", "denied", "rejected", "expired", "cancelled")
_LogId = Annotated[str, typer.Argument(metavar="LOG_ID", help="Number of the log entry.")]


@app.command("list", epilog=f"In a pipe: tab-separated lines without a heading. {EXIT_CODES}")
def list_(
    tool: Annotated[str | None, typer.Option(metavar="TOOL", help="Only this tool.")] = None,
    state: Annotated[
        str | None, typer.Option(metavar="STATE", help=f"Only entries of this state: {', '.join(_STATES)}.")
    ] = None,
    user: Annotated[str | None, typer.Option(metavar="USER", help="Only what ran for this user.")] = None,
    since: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="Only since then, such as 2026-05-01 or 2026-05-01T08:00Z."),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, max=1_000, help="Show at most so many.")] = 50,
    tenant: TenantOption = None,
    as_json: JsonOption = False,
) -> None:
    """List what tools did, and what was refused, newest first."""
    if state is not None and state not in _STATES:
        raise typer.BadParameter(f"{state!r} is none of {', '.join(_STATES)}", param_hint="'--state'")
    wanted = {"tool": tool, "state": state, "user_id": user, "since": _moment(since), "limit": limit}
    wanted = {name: value for name, value in wanted.items() if value is not None}

    async def read() -> list[dict[str, Any]]:
        async with opened_database() as database:
            found: list[dict[str, Any]] = await database.call(
                "list_executions", tenant_identity(tenant), wanted=wanted
            )
            return found

    found = asyncio.run(read())
    if as_json:
        say_json(found)
        return
    if not found:
        remark("No such entries." if len(wanted) > 1 else "No tool has run yet.")
    elif is_terminal():
        columns = (
            Column(title="entry", style="cyan", is_number=True), Column(title="at"), Column(title="tool"),
            Column(title="risk"), Column(title="decision"), Column(title="state"), Column(title="for"),
            Column(title="rows", is_wide=True), Column(title="ms", is_number=True),
        )  # fmt: skip
        print_table(
            columns,
            (
                (
                    str(row["log_id"]), local_time(row["at"]), one_line(row["tool"], 30), row["risk"] or "",
                    row["decision"] or "", row["state"], one_line(row["user_id"] or "", 24),
                    _rows(row) or one_line(row["error"] or "", 120), _number(row["duration_ms"]),
                )
                for row in found
            ),
        )  # fmt: skip
    else:
        print_lines(
            (
                row["log_id"], row["at"], row["tool"], row["risk"], row["decision"], row["state"], row["user_id"],
                _rows(row), row["duration_ms"], row["error"],
            )
            for row in found
        )  # fmt: skip
    if len(found) == limit:
        remark(f"The newest {limit}; there may be more with --limit {min(limit * 4, 1_000)}.")


@app.command(epilog=EXIT_CODES)
def show(log_id: _LogId, tenant: TenantOption = None, as_json: JsonOption = False) -> None:
    """Show one entry: who, what was shown and what was run, who decided, what it changed."""
    entry = asyncio.run(_read(_number_of(log_id), tenant))
    if as_json:
        say_json(entry)
    else:
        _print_entry(entry)


@app.command(
    epilog="Exit codes: 0 the log is whole, 1 it is not, or could not be read, 2 wrong usage.",
)
def verify(tenant: TenantOption = None, as_json: JsonOption = False) -> None:
    """Check the chain of hashes: whether any entry was changed, removed or put in."""

    async def read() -> dict[str, Any]:
        async with opened_database() as database:
            found: dict[str, Any] = await database.call("verify_executions", tenant_identity(tenant))
            return found

    found = asyncio.run(read())
    if as_json:
        say_json(found)
    elif found["intact"]:
        events = found["approvals"]["rows"]
        say(
            f"Whole: {_many(found['rows'], 'entry', 'entries')}, {_many(events, 'event', 'events')} of approvals."
        )
    else:
        for what, first in (
            ("entry", found["first_broken"]), ("event of approvals", found["approvals"]["first_broken"]),
        ):  # fmt: skip
            if first is not None:
                say(f"NOT whole: from {what} {first} on it is not what was written.")
        remark("Keep the database as it is, and find out who had access to it.")
    if not found["intact"]:
        raise typer.Exit(1)


@app.command(epilog=EXIT_CODES)
def undo(
    log_id: _LogId,
    reviewer: Annotated[
        str | None,
        typer.Option("--as", metavar="REVIEWER", help="Who does this: a reviewer with cli = true."),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    tenant: TenantOption = None,
    as_json: JsonOption = False,
) -> None:
    """Put back the rows that a write changed, as they were kept, where nobody has changed them since."""
    from agent.approval.human_approval import HumanApprovalQueue
    from agent.commands.approvals import reviewer_of
    from agent.execution.safe_executor import SafeExecutor

    number = _number_of(log_id)
    entry = asyncio.run(_read(number, tenant))
    if not yes:
        if as_json or not is_terminal():
            raise typer.BadParameter("nobody can be asked here; say --yes", param_hint="'--yes'")
        _print_entry(entry)
        if not typer.confirm(f"Undo entry {number}?"):
            raise typer.Exit(1)

    async def write() -> Any:
        async with opened_database() as database:
            queue = HumanApprovalQueue(database, settings())
            who = reviewer_of(queue, reviewer)
            executor = SafeExecutor(database=database, settings=settings(), queue=queue)
            try:
                return await executor.undo(number, identity=tenant_identity(tenant).with_(user_id=who.name))
            finally:
                await executor.sql.aclose()

    result = asyncio.run(write())
    if as_json:
        say_json(_as_json(result))
    else:
        say(f"Undone; the log has it as entry {result.log_id}.")


async def _read(log_id: int, tenant: str | None) -> dict[str, Any]:
    from agent.errors import NotFound

    identity = tenant_identity(tenant)
    async with opened_database() as database:
        entry: dict[str, Any] | None = await database.call("get_execution", identity, the_log_id=log_id)
    if entry is None:
        raise NotFound(
            f"tenant {identity.tenant_id!r} has no log entry {log_id}. `agent log list` shows those it has"
        )
    return entry


def _number_of(log_id: str) -> int:
    if not log_id.isascii() or not log_id.isdigit() or len(log_id) > 18:
        raise typer.BadParameter(f"{log_id!r} is no number of a log entry", param_hint="'LOG_ID'")
    return int(log_id)


def _moment(text: str | None) -> str | None:
    from datetime import datetime

    if text is None:
        return None
    try:
        return datetime.fromisoformat(text).astimezone().isoformat()
    except (ValueError, OverflowError):
        raise typer.BadParameter(
            f"{text!r} is no time such as 2026-05-01 or 2026-05-01T08:00Z", param_hint="'--since'"
        ) from None


def _rows(entry: Mapping[str, Any]) -> str:
    """What changed by table, or how many rows were read."""
    changed = entry.get("rows")
    if isinstance(changed, Mapping) and changed:
        return "; ".join(
            f"{one_line(table, 60)}: {_counts(counts)}"
            for table, counts in changed.items()
            if isinstance(counts, Mapping)
        )
    count = entry.get("row_count")
    return "" if count is None else f"{count} read"


def _counts(counts: Mapping[str, Any]) -> str:
    return ", ".join(f"{number} {verb}" for verb, number in counts.items() if number) or "none"


def _many(number: int, one: str, more: str) -> str:
    return f"{number} {one if number == 1 else more}"


def _number(value: Any) -> str:
    return "" if value is None else f"{value:.0f}"


def _print_entry(entry: Mapping[str, Any]) -> None:
    heading(f"Entry {entry['log_id']}")
    for label, name in (
        ("tool", "tool"), ("version", "tool_version"), ("risk", "risk"), ("decision", "decision"), ("state", "state"),
        ("user", "user_id"), ("agent", "agent_id"), ("session", "session_id"), ("run", "run_id"),
        ("approval", "approval_id"), ("undoes", "undoes"), ("undone by", "undone_by"), ("error", "error"),
    ):  # fmt: skip
        if entry.get(name) not in (None, ""):
            say(f"  {label}: {one_line(entry[name])}")
    say(f"  at: {local_time(entry['at'])}")
    if entry.get("duration_ms") is not None:
        say(f"  took: {_number(entry['duration_ms'])} ms")
    if rows := _rows(entry):
        say(f"  rows: {rows}")
    for title, name in (("Shown", "arguments_shown"), ("Run", "arguments_run"), ("Before", "pre_image")):
        if entry.get(name) is not None:
            heading(title)
            text = inert(json.dumps(entry[name], ensure_ascii=False, indent=2))
            say("  " + text.replace("\n", "\n  "))
    if entry.get("erased"):
        say("  arguments and rows: erased with their user")
    if entry.get("row_hash"):
        say(f"  hash: {one_line(entry['row_hash'])}")


def _as_json(result: Any) -> Any:
    from dataclasses import asdict, is_dataclass

    return asdict(result) if is_dataclass(result) and not isinstance(result, type) else result
