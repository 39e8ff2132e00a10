"""`agent approvals`: list, show, approve, reject; the kill switch; standing rules."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agent.commands.options import (
    EXIT_CODES,
    JsonOption,
    TenantOption,
    how_long,
    only_id,
    settings,
    tenant_identity,
)
from agent.commands.output import (
    Column,
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
    from agent.approval.human_approval import HumanApprovalQueue
    from agent.approval.records import Approval, DecisionOutcome
    from agent.approval.reviewers import Reviewer
    from agent.identity import Identity

app = typer.Typer(
    help="Approvals: what agents ask for, and your decision; the kill switch.", no_args_is_help=True
)

_STATES = (
    "pending", "approved", "rejected", "expired", "cancelled", "executing", "executed", "failed", "unknown",
)  # fmt: skip
_PAGE = 1_000
_CHANNEL = "cli"

_IdArgument = Annotated[
    str, typer.Argument(metavar="APPROVAL_ID", help="Id of the approval, or how it begins.")
]
_AsOption = Annotated[
    str | None,
    typer.Option(
        "--as", metavar="REVIEWER", help="Who decides: a reviewer of the policy file with cli = true."
    ),
]
_ByOption = Annotated[
    str | None, typer.Option("--as", metavar="REVIEWER", help="Who does this: a reviewer with cli = true.")
]
_NoteOption = Annotated[str, typer.Option(metavar="TEXT", help="Why; the agent and the log are given it.")]
_HashOption = Annotated[
    str | None,
    typer.Option(
        "--hash", metavar="DIGITS", help="Only if this is how the hash of the call begins, 16 digits or more."
    ),
]
_YesOption = Annotated[bool, typer.Option("--yes", help="Do not ask.")]


# --- looking ----------------------------------------------------------------------------------------------------


@app.command("list", epilog=f"In a pipe: tab-separated lines without a heading. {EXIT_CODES}")
def list_(
    state: Annotated[
        str | None, typer.Option(metavar="STATE", help=f"Only approvals of this state: {', '.join(_STATES)}.")
    ] = None,
    all_: Annotated[bool, typer.Option("--all", help="Those that are decided too.")] = False,
    limit: Annotated[int, typer.Option(min=1, max=_PAGE, help="Show at most so many.")] = 50,
    tenant: TenantOption = None,
    as_json: JsonOption = False,
) -> None:
    """List what waits for a decision, newest first."""
    if state is not None and state not in _STATES:
        raise typer.BadParameter(f"{state!r} is none of {', '.join(_STATES)}", param_hint="'--state'")
    if state is not None and all_:
        raise typer.BadParameter("name a state or ask for all, not both", param_hint="'--all'")
    wanted: dict[str, Any] = {"limit": limit}
    if not all_:
        wanted["state"] = state or "pending"

    async def read() -> list[dict[str, Any]]:
        async with _opened_queue() as queue:
            found: list[dict[str, Any]] = await queue.database.call(
                "list_approvals", tenant_identity(tenant), wanted=wanted
            )
            return found

    found = asyncio.run(read())
    if as_json:
        say_json(found)
        return
    if not found:
        remark("Nothing waits for a decision." if wanted.get("state") == "pending" else "No such approvals.")
    elif is_terminal():
        columns = (
            Column(title="approval", style="cyan"), Column(title="state"), Column(title="risk"), Column(title="tool"),
            Column(title="what", is_wide=True), Column(title="for"), Column(title="expires"),
        )  # fmt: skip
        print_table(
            columns,
            (
                (
                    short_id(row["approval_id"]), row["state"], row["risk"], one_line(row["tool"], 30),
                    one_line(row["summary"], 200), one_line(row["requested_by"] or "", 24),
                    local_time(row["expires_at"]),
                )
                for row in found
            ),
        )  # fmt: skip
    else:
        print_lines(
            (
                row["approval_id"], row["state"], row["risk"], row["tool"], row["requested_by"], row["expires_at"],
                row["args_hash"], row["summary"],
            )
            for row in found
        )  # fmt: skip
    if len(found) == limit:
        remark(f"The newest {limit}; there may be more with --limit {min(limit * 4, _PAGE)}.")


@app.command(epilog=EXIT_CODES)
def show(approval_id: _IdArgument, tenant: TenantOption = None, as_json: JsonOption = False) -> None:
    """Show one approval: the exact call, what it would do, its hash, votes and state."""

    async def read() -> Approval:
        async with _opened_queue() as queue:
            return await _find(queue, tenant_identity(tenant), approval_id)

    approval = asyncio.run(read())
    if as_json:
        say_json(approval.as_json())
    else:
        _print_card(approval)


# --- deciding ---------------------------------------------------------------------------------------------------


@app.command(epilog=EXIT_CODES)
def approve(
    approval_id: _IdArgument,
    reviewer: _AsOption = None,
    note: _NoteOption = "",
    hash_: _HashOption = None,
    yes: _YesOption = False,
    tenant: TenantOption = None,
    as_json: JsonOption = False,
) -> None:
    """Approve one call, as it is shown. What destroys data may need the approval of others too."""
    _decide(approval_id, "approve", reviewer, note, hash_, tenant, is_sure=yes, as_json=as_json)


@app.command(epilog=EXIT_CODES)
def reject(
    approval_id: _IdArgument,
    reviewer: _AsOption = None,
    note: _NoteOption = "",
    hash_: _HashOption = None,
    yes: _YesOption = False,
    tenant: TenantOption = None,
    as_json: JsonOption = False,
) -> None:
    """Reject one call: it will not run, whoever else approved it."""
    _decide(approval_id, "reject", reviewer, note, hash_, tenant, is_sure=yes, as_json=as_json)


def _decide(
    approval_id: str,
    verdict: str,
    named: str | None,
    note: str,
    hash_: str | None,
    tenant: str | None,
    *,
    is_sure: bool,
    as_json: bool,
) -> None:
    from agent.errors import ConflictError, Refused

    async def read() -> tuple[Approval, Reviewer]:
        async with _opened_queue() as queue:
            reviewer = reviewer_of(queue, named)
            return await _find(queue, tenant_identity(tenant), approval_id), reviewer

    async def decide(approval: Approval, reviewer: Reviewer) -> tuple[DecisionOutcome, str | None]:
        async with _opened_queue() as queue:
            outcome = await queue.decide(
                [approval.approval_id],
                verdict,
                reviewer,
                channel=_CHANNEL,
                hashes={approval.approval_id: approval.args_hash},
                identity_tenant=tenant_identity(tenant).tenant_id,
                note=note,
            )
            return outcome, next(filter(None, map(queue.outdated_because, outcome.approvals)), None)

    approval, reviewer = asyncio.run(read())
    if hash_ is not None and (len(hash_) < 16 or not approval.args_hash.startswith(hash_.lower())):
        raise ConflictError(
            f"the hash of this call is {approval.args_hash}, which does not begin with {hash_!r} (16 digits or more). "
            "Look at it again: agent approvals show " + approval.approval_id
        )
    if not is_sure and hash_ is None:
        _ask_first(approval, f"{verdict.capitalize()} this as {reviewer.name}?", as_json=as_json)
    outcome, outdated = asyncio.run(decide(approval, reviewer))
    if outcome.outcome == "refused":
        raise Refused(f"not recorded: {outcome.why}")
    [after] = outcome.approvals
    if as_json:
        say_json({"outcome": outcome.outcome, "approval": after.as_json(), "notice": outdated})
        return
    again = " before; it counts once" if outcome.outcome == "repeated" else ""
    say(
        f"{reviewer.name} {'approved' if verdict == 'approve' else 'rejected'} it{again}. It is {after.state} now."
    )
    if after.is_open:
        votes = sum(vote["verdict"] == "approve" for vote in after.votes)
        remark(f"{votes} of {after.required_votes} people have approved it.")
    if outdated is not None:
        remark(outdated)


def _ask_first(approval: Approval, question: str, *, as_json: bool) -> None:
    if as_json or not is_terminal():
        raise typer.BadParameter(
            "nobody can be asked here; say --yes, or what you saw with --hash", param_hint="'--yes'"
        )
    _print_card(approval)
    if not typer.confirm(question):
        raise typer.Exit(1)


def reviewer_of(queue: HumanApprovalQueue, named: str | None) -> Reviewer:
    """The reviewer who is named, or the only one who may be.

    Raises:
        ConfigurationError: nobody of that name may decide on the command line.
    """
    from agent.errors import ConfigurationError

    allowed = [reviewer for reviewer in queue.policy.reviewers if reviewer.cli]
    chosen = [one for one in allowed if one.name == named] if named is not None else allowed
    if len(chosen) == 1:
        return chosen[0]
    names = ", ".join(sorted(one.name for one in allowed))
    if named is not None:
        raise ConfigurationError(
            f"no reviewer {named!r} may decide on the command line; the policy file allows "
            f"{names or 'nobody'}. Add `cli = true` to a [[reviewer]]"
        )
    if allowed:
        raise ConfigurationError(f"who decides? Name one of {names} with --as")
    raise ConfigurationError(
        "nobody may decide on the command line. Write a [[reviewer]] with `cli = true` into the policy file"
    )


# --- the kill switch --------------------------------------------------------------------------------------------


@app.command(epilog=EXIT_CODES)
def halt(
    reason: Annotated[str, typer.Option(metavar="TEXT", help="Why; agents are told.")],
    agent: Annotated[
        str | None, typer.Option(metavar="AGENT", help="Only this agent; by default all.")
    ] = None,
    tool: Annotated[str | None, typer.Option(metavar="TOOL", help="Only this tool; by default all.")] = None,
    reviewer: _ByOption = None,
    tenant: TenantOption = None,
    as_json: JsonOption = False,
) -> None:
    """Stop agents from running tools, from their next call on. What runs just now is not interrupted."""

    async def write() -> Any:
        async with _opened_queue() as queue:
            who = reviewer_of(queue, reviewer).name
            scope = {"agent_id": agent, "tool": tool, "reason": reason, "halted_by": who}
            return await queue.database.call(
                "halt_executions",
                tenant_identity(tenant),
                halt={name: value for name, value in scope.items() if value is not None},
            )

    made = asyncio.run(write())
    if as_json:
        say_json(made)
    else:
        say(f"Halted: {_scope({'agent_id': agent, 'tool': tool})}.")
        remark(f"It ends with: agent approvals resume {made['halt_id']}")


@app.command(epilog=EXIT_CODES)
def resume(
    halt_id: Annotated[str, typer.Argument(metavar="HALT_ID", help="Id of the halt, or how it begins.")],
    reviewer: _ByOption = None,
    tenant: TenantOption = None,
    as_json: JsonOption = False,
) -> None:
    """End a halt: what it stopped may run again."""

    async def write() -> bool:
        async with _opened_queue() as queue:
            who = reviewer_of(queue, reviewer).name
            identity = tenant_identity(tenant)
            known = await queue.database.call("list_halts", identity)
            ids = [one["halt_id"] for one in known if one["resumed_at"] is None]
            found = only_id(ids, halt_id, "halt", identity, "agent approvals halts")
            return bool(
                await queue.database.call("resume_executions", identity, halt_id=found, resumed_by=who)
            )

    ended = asyncio.run(write())
    if as_json:
        say_json({"resumed": ended})
    else:
        say("The halt has ended." if ended else "The halt had ended before.")


@app.command(epilog=f"In a pipe: tab-separated lines without a heading. {EXIT_CODES}")
def halts(tenant: TenantOption = None, as_json: JsonOption = False) -> None:
    """List what is halted."""

    async def read() -> list[dict[str, Any]]:
        async with _opened_queue() as queue:
            known: list[dict[str, Any]] = await queue.database.call("list_halts", tenant_identity(tenant))
            return [one for one in known if one["resumed_at"] is None]

    found = asyncio.run(read())
    if as_json:
        say_json(found)
    elif not found:
        remark("Nothing is halted.")
    elif is_terminal():
        print_table(
            (
                Column(title="halt", style="cyan"), Column(title="what"), Column(title="why", is_wide=True),
                Column(title="by"), Column(title="since"),
            ),
            (
                (
                    short_id(str(one["halt_id"])), _scope(one), one_line(one["reason"], 300),
                    one_line(one["halted_by"], 24), local_time(one.get("halted_at")),
                )
                for one in found
            ),
        )  # fmt: skip
    else:
        print_lines(
            (one["halt_id"], _scope(one), one["halted_by"], one.get("halted_at"), one["reason"])
            for one in found
        )


def _scope(halt: Any) -> str:
    tools = f"tool {one_line(halt['tool'], 60)}" if halt.get("tool") else "all tools"
    agents = f"agent {one_line(halt['agent_id'], 60)}" if halt.get("agent_id") else "all agents"
    return f"{tools} of {agents}"


# --- standing rules ---------------------------------------------------------------------------------------------


@app.command(epilog=EXIT_CODES)
def allow(
    approval_id: _IdArgument,
    rows: Annotated[
        int, typer.Option("--rows", metavar="N", min=0, help="Calls that touch at most so many rows.")
    ],
    lasts: Annotated[
        str, typer.Option("--for", metavar="TIME", help="How long: 30m, 12h, 7d or 2w, at most 90 days.")
    ],
    uses: Annotated[
        int | None, typer.Option("--uses", metavar="N", min=1, help="So many calls; by default any number.")
    ] = None,
    reviewer: _AsOption = None,
    hash_: _HashOption = None,
    yes: _YesOption = False,
    tenant: TenantOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a standing rule: calls of the shape of this one run unasked from now on. This one itself is not decided."""
    from agent.approval.standing_rules import StandingRule, make_rule, no_rule_because
    from agent.errors import Refused

    lifetime = how_long(lasts)

    async def read() -> tuple[Approval, Reviewer, str | None]:
        async with _opened_queue() as queue:
            who = reviewer_of(queue, reviewer)
            found = await _find(queue, tenant_identity(tenant), approval_id)
            return found, who, no_rule_because(queue, found, who)

    async def make(approval: Approval, who: Reviewer) -> StandingRule:
        async with _opened_queue() as queue:
            return await make_rule(
                queue, approval.approval_id, who, identity_tenant=tenant_identity(tenant).tenant_id,
                max_rows=rows, max_uses=uses, lasts=lifetime, args_hash=hash_.lower() if hash_ else None,
            )  # fmt: skip

    approval, who, why = asyncio.run(read())
    if why is not None:
        raise Refused(why)
    if not yes and hash_ is None:
        _ask_first(
            approval,
            f"Allow calls of this shape on {', '.join(one_line(name) for name in approval.tables) or 'no table'}, "
            f"up to {rows} rows each, for {one_line(lasts)}, by all agents and users of the tenant, as {who.name}?",
            as_json=as_json,
        )
    rule = asyncio.run(make(approval, who))
    if as_json:
        say_json(
            {"rule_id": rule.rule_id, "expires_at": rule.expires_at.isoformat(), "tables": [*rule.tables]}
        )
        return
    say(f"{who.name} allows calls of this shape until {local_time(rule.expires_at.isoformat())}.")
    remark(f"It ends with: agent approvals revoke {rule.rule_id}")
    if approval.is_open:
        remark("This call itself still waits for a decision.")


@app.command(epilog=f"In a pipe: tab-separated lines without a heading. {EXIT_CODES}")
def rules(tenant: TenantOption = None, as_json: JsonOption = False) -> None:
    """List standing rules: calls of one shape that somebody approved for a time."""

    from agent.approval.standing_rules import list_rules

    async def read() -> list[dict[str, Any]]:
        async with _opened_queue() as queue:
            return await list_rules(queue, tenant_identity(tenant))

    found = asyncio.run(read())
    if as_json:
        say_json(found)
    elif not found:
        remark("There are no standing rules.")
    elif is_terminal():
        print_table(
            (
                Column(title="rule", style="cyan"), Column(title="holds"), Column(title="tool"),
                Column(title="tables", is_wide=True), Column(title="rows", is_number=True),
                Column(title="used", is_number=True), Column(title="by"), Column(title="until"),
            ),
            (
                (
                    short_id(rule["rule_id"]), "yes" if rule["holds"] else "no", one_line(rule["tool"], 30),
                    one_line(", ".join(rule["tables"])), f"≤ {rule['max_rows']}", _uses(rule),
                    one_line(rule["made_by"], 24), local_time(rule["expires_at"]),
                )
                for rule in found
            ),
        )  # fmt: skip
    else:
        print_lines(
            (
                rule["rule_id"], "holds" if rule["holds"] else "over", rule["tool"], rule["fingerprint"],
                ",".join(rule["tables"]), rule["max_rows"], _uses(rule), rule["made_by"], rule["expires_at"],
            )
            for rule in found
        )  # fmt: skip


def _uses(rule: Any) -> str:
    return f"{rule['uses']} of {rule['max_uses']}" if rule["max_uses"] else str(rule["uses"])


@app.command(epilog=EXIT_CODES)
def revoke(
    rule_id: Annotated[str, typer.Argument(metavar="RULE_ID", help="Id of the rule, or how it begins.")],
    reviewer: _ByOption = None,
    tenant: TenantOption = None,
    as_json: JsonOption = False,
) -> None:
    """End a standing rule: calls of its shape are asked for again."""
    from agent.approval.standing_rules import list_rules, revoke_rule

    async def write() -> bool:
        async with _opened_queue() as queue:
            who = reviewer_of(queue, reviewer)
            identity = tenant_identity(tenant)
            known = await list_rules(queue, identity)
            found = only_id(
                [rule["rule_id"] for rule in known], rule_id, "rule", identity, "agent approvals rules"
            )
            return await revoke_rule(queue, found, who, identity_tenant=identity.tenant_id)

    ended = asyncio.run(write())
    if as_json:
        say_json({"revoked": ended})
    else:
        say("The rule has ended." if ended else "The rule had ended before.")


# --- shared -----------------------------------------------------------------------------------------------------


@asynccontextmanager
async def _opened_queue() -> AsyncIterator[HumanApprovalQueue]:
    """The queue of the settings; the database is closed at the end."""
    from agent.approval.human_approval import HumanApprovalQueue
    from agent.database import open_database

    database = open_database(settings())
    try:
        yield HumanApprovalQueue(database, settings())
    finally:
        await database.close()


async def _find(queue: HumanApprovalQueue, identity: Identity, approval_id: str) -> Approval:
    wanted = approval_id.strip().lower()
    if len(wanted) >= 36:
        return await queue.get(wanted, identity)
    known: list[dict[str, Any]] = []
    if re.fullmatch(r"[0-9a-f][0-9a-f-]*", wanted):
        known = await queue.database.call("list_approvals", identity, wanted={"begins": wanted, "limit": 9})
    ids = [row["approval_id"] for row in known]
    return await queue.get(only_id(ids, wanted, "approval", identity, "agent approvals list --all"), identity)


def _print_card(approval: Approval) -> None:
    from agent.approval.card import make_card

    card = make_card([approval], public_url=settings().public_url, text_limit=100_000, line_limit=5_000)
    say(card.as_text())
    say(f"  Hash of the call: {approval.args_hash}")
