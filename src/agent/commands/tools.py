"""`agent tools`: tools that agents wrote: list, show, retire, resume."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Annotated, Any

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

if TYPE_CHECKING:
    from agent.database.protocol import Database
    from agent.execution.tool_run import ToolRun
    from agent.identity import Identity

app = typer.Typer(help="Tools that agents wrote: list, show, retire, resume.", no_args_is_help=True)

_STATES = ("draft", "approved", "retired")
_NameArgument = Annotated[str, typer.Argument(metavar="TOOL", help="Name of the tool.")]


@app.command("list", epilog=f"In a pipe: tab-separated lines without a heading. {EXIT_CODES}")
def list_(
    state: Annotated[
        str | None, typer.Option(metavar="STATE", help=f"Only versions of this state: {', '.join(_STATES)}.")
    ] = None,
    tenant: TenantOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the versions of tools that agents wrote. Only approved ones run."""
    if state is not None and state not in _STATES:
        raise typer.BadParameter(f"{state!r} is none of {', '.join(_STATES)}", param_hint="'--state'")

    async def read() -> list[dict[str, Any]]:
        async with opened_database() as database:
            await _activate_approved(database, tenant_identity(tenant))
            found: list[dict[str, Any]] = await database.call(
                "list_tools", tenant_identity(tenant), wanted={} if state is None else {"state": state}
            )
            return found

    found = asyncio.run(read())
    if as_json:
        say_json(found)
    elif not found:
        remark("No such tools." if state else "No agent has written a tool yet.")
    elif is_terminal():
        print_table(
            (
                Column(title="tool", style="cyan"), Column(title="version", is_number=True), Column(title="state"),
                Column(title="what it does", is_wide=True), Column(title="may call"), Column(title="made"),
            ),
            (
                (
                    one_line(tool["name"], 40), str(tool["version"]), tool["state"], one_line(tool["description"], 300),
                    one_line(_capabilities(tool), 60), local_time(tool.get("saved_at")),
                )
                for tool in found
            ),
        )  # fmt: skip
    else:
        print_lines(
            (
                tool["name"], tool["version"], tool["state"], tool["code_hash"], _capabilities(tool),
                tool.get("saved_at"), tool["description"],
            )
            for tool in found
        )  # fmt: skip


@app.command(epilog=EXIT_CODES)
def show(
    name: _NameArgument,
    version: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="This version; by default the newest.")
    ] = None,
    tenant: TenantOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show one version of a tool: its code, parameters, what it may call, examples and their results."""
    from agent.errors import NotFound

    identity = tenant_identity(tenant)

    async def read() -> dict[str, Any] | None:
        async with opened_database() as database:
            await _activate_approved(database, identity)
            found: dict[str, Any] | None = await database.call(
                "get_tool", identity, tool_name=name, version=version
            )
            return found

    tool = asyncio.run(read())
    if tool is None:
        which = "" if version is None else f" in version {version}"
        raise NotFound(
            f"tenant {identity.tenant_id!r} has no tool {name!r}{which}. `agent tools list` shows those it has"
        )
    if as_json:
        say_json(tool)
    else:
        _print_tool(tool)


@app.command(epilog=EXIT_CODES)
def retire(
    name: _NameArgument,
    version: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Only this version; by default all.")
    ] = None,
    reviewer: Annotated[
        str | None,
        typer.Option("--as", metavar="REVIEWER", help="Who does this: a reviewer with cli = true."),
    ] = None,
    tenant: TenantOption = None,
    as_json: JsonOption = False,
) -> None:
    """Retire a tool: it does not run again, and agents see it no more from their next run on."""
    from agent.approval.human_approval import HumanApprovalQueue
    from agent.commands.approvals import reviewer_of
    from agent.errors import NotFound

    async def write() -> int:
        async with opened_database() as database:
            who = reviewer_of(HumanApprovalQueue(database, settings()), reviewer)
            return int(
                await database.call(
                    "retire_tool", tenant_identity(tenant), tool_name=name, version=version, by=who.name
                )
            )

    which = f"{one_line(name)}{'' if version is None else f' version {version}'}"
    retired = asyncio.run(write())
    if not retired:
        raise NotFound(
            f"tenant {tenant_identity(tenant).tenant_id!r} has no {which} that is not retired. `agent tools list` "
            "shows those it has"
        )
    if as_json:
        say_json({"retired": retired})
    else:
        say(f"Retired: {which}.")


async def _activate_approved(database: Database, identity: Identity) -> None:
    """Let run what people have approved since an agent ran last."""
    from agent.approval.human_approval import HumanApprovalQueue
    from agent.execution.safe_executor import SafeExecutor

    executor = SafeExecutor(database, settings(), queue=HumanApprovalQueue(database, settings()))
    try:
        await executor.library.activate_approved(identity)
    finally:
        await executor.aclose()


@app.command(epilog=EXIT_CODES)
def resume(
    approval_id: Annotated[
        str, typer.Argument(metavar="APPROVAL_ID", help="Id of the approval that the run waited for.")
    ],
    tenant: TenantOption = None,
    as_json: JsonOption = False,
) -> None:
    """Go on with a run of a tool that was put away when it waited for an approval, as the user it was made for.

    A server does so by itself once the approval is decided; then this shows what came of it, for 7 days.
    """
    from agent.approval.human_approval import HumanApprovalQueue
    from agent.errors import NotFound, Refused
    from agent.execution.safe_executor import SafeExecutor

    async def go_on() -> ToolRun:
        async with opened_database() as database:
            executor = SafeExecutor(database, settings(), queue=HumanApprovalQueue(database, settings()))
            try:
                operator = tenant_identity(tenant)
                approval = await executor.queue.get(approval_id, operator)
                identity = operator.with_(
                    user_id=approval.requested_by, agent_id=approval.agent_id, session_id=approval.session_id
                )
                try:
                    return await executor.library.resume(approval.approval_id, identity)
                except NotFound:  # a keeper was quicker
                    ended = await executor.library.result(approval.approval_id, identity)
                    if ended is None:
                        raise
                    remark("It has gone on already. What came of it:")
                    return ended
            finally:
                await executor.aclose()

    run = asyncio.run(go_on())
    if as_json:
        say_json(
            {"status": run.status, "value": run.value, "approval_id": run.approval_id, "log_id": run.log_id}
        )
    elif run.status == "succeeded":
        say(json.dumps(run.value, ensure_ascii=False))
    elif run.status == "paused":
        remark(f"It waits again: agent approvals show {run.approval_id}")
    if run.status in ("failed", "refused"):
        raise Refused(f"the run of {run.tool!r} did not succeed: {run.error or run.text}")


def _capabilities(tool: Any) -> str:
    """The host functions that it may call."""
    capabilities = tool.get("capabilities")
    if isinstance(capabilities, list):
        return ", ".join(one_line(name) for name in capabilities) or "nothing"
    return one_line(json.dumps(capabilities, ensure_ascii=False)) if capabilities else "nothing"


def _print_tool(tool: Any) -> None:
    heading(f"{one_line(tool['name'])}, version {tool['version']}: {tool['state']}")
    say(f"  {one_line(tool['description'])}")
    say(f"  may call: {_capabilities(tool)}")
    say(f"  hash of the code: {one_line(tool['code_hash'])}")
    for label, name in (("author", "author"), ("approval", "approval_id")):
        if tool.get(name) not in (None, ""):
            say(f"  {label}: {one_line(tool[name])}")
    heading("Code")
    say("  " + inert(tool["code"]).rstrip().replace("\n", "\n  "))
    for title, name in (
        ("Parameters", "parameters"),
        ("Examples", "examples"),
        ("Their results", "example_results"),
    ):
        if tool.get(name):
            heading(title)
            text = inert(json.dumps(tool[name], ensure_ascii=False, indent=2))
            say("  " + text.replace("\n", "\n  "))
