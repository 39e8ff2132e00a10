"""Processes killed between approval and execution, and between execution and log: each action runs at most once.

Two kinds of action: one whose effect is outside of our transaction, and an SQL write, whose log row is in its own.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import psycopg

from agent.approval.human_approval import HumanApprovalQueue
from agent.approval.policy_file import parse_policy
from agent.approval.risk import Risk
from agent.database.opening import open_database
from agent.execution.execution_tools import default_tools
from agent.execution.safe_executor import SafeExecutor
from agent.execution.sql_logins import create_logins, logins_file
from agent.execution.tool_registry import CallContext, Run, ToolArguments, ToolOutcome, ToolRegistry, ToolSpec
from agent.identity import Identity
from agent.portal import portal
from agent.settings import Settings
from agent.testing.throwaway import throwaway_database
from benchmarks.safety.section import Line, Section

POINTS = ("approved", "claimed", "done")
"""Where a process is killed: before it takes the approval up, before it acts, after it has acted."""
KINDS = ("outside", "sql")

_POLICY = """
[[reviewer]]
name = "ada"
[[table]]
name = "public.kill_account"
update = ["paid"]
"""
_TABLES = """
CREATE TABLE public.kill_deed (key text NOT NULL);
CREATE TABLE public.kill_account (id integer PRIMARY KEY, paid integer NOT NULL);
INSERT INTO public.kill_account SELECT i, 0 FROM generate_series(1, 1000) i;
"""
_WHO = Identity(user_id="carol", session_id="kills")
_KILLED = -signal.SIGKILL


class _Deed(ToolArguments):
    """What the tool takes."""

    key: str


@dataclass(frozen=True, kw_only=True)
class Killed:
    """What was found after one kill."""

    kind: str
    point: str
    effects: int
    """How often the action took effect."""
    state: str
    """Of the approval, in the end."""
    logged: str | None
    """State of its row in the log."""

    @property
    def is_well(self) -> bool:
        """Whether it ran at most once and what is known of it is true."""
        true = {"executed": self.effects == 1, "failed": self.effects == 0, "unknown": self.effects <= 1}
        return true.get(self.state, False) and self.logged == self.state


def _executor(settings: Settings, *, die_at: str | None) -> SafeExecutor:
    """An executor whose tools kill their process at a point."""
    database = open_database(settings)
    policy = parse_policy(_POLICY.encode())
    queue = HumanApprovalQueue(database, settings, policy)
    registry = ToolRegistry()
    executor = SafeExecutor(database, settings, policy, queue, registry)
    assert settings.database_url is not None
    url = settings.database_url.get_secret_value()

    async def act(arguments: _Deed, context: CallContext) -> ToolOutcome:
        async with await psycopg.AsyncConnection.connect(url, autocommit=True) as connection:
            await connection.execute("INSERT INTO public.kill_deed VALUES (%s)", (arguments.key,))
        return ToolOutcome(value="done")

    def deadly(run: Run) -> Run:
        async def killed(arguments: Any, context: CallContext) -> ToolOutcome:
            if die_at == "claimed":
                os.kill(os.getpid(), signal.SIGKILL)
            outcome = await run(arguments, context)
            if die_at == "done":
                os.kill(os.getpid(), signal.SIGKILL)
            return outcome

        return killed

    registry.register(
        ToolSpec(name="act", description="Act.", arguments=_Deed, risk=Risk.WRITE, run=deadly(act))
    )
    sql = next(spec for spec in default_tools(executor) if spec.name == "execute_sql")
    registry.register(replace(sql, run=deadly(sql.run)))
    return executor


def _work(settings: Settings, approval_id: str, die_at: str) -> None:
    """In a process of its own: take up an approval, and be killed."""

    async def work() -> None:
        executor = _executor(settings, die_at=die_at)
        approval = await executor.queue.get(approval_id, _WHO)
        if die_at == "approved":
            os.kill(os.getpid(), signal.SIGKILL)
        await executor.run_approved(approval, _WHO)

    asyncio.run(work())


def killed(cases: Sequence[tuple[str, str]]) -> list[Killed]:
    """What was found after each of these kills, given as kind and point."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["benchmarks.safety.kills"])
    with throwaway_database() as database:
        with psycopg.connect(database.url, autocommit=True) as connection:
            connection.execute(_TABLES.encode())
        policy = parse_policy(_POLICY.encode())
        file = logins_file(database.settings)
        portal().run_sync(create_logins(database.url, policy, _WHO.tenant_id, file=file))
        executor = _executor(database.settings, die_at=None)
        try:
            found = []
            for number, (kind, point) in enumerate(cases, start=1):
                approval_id = portal().run_sync(_approved(executor, kind, number))
                process = processes.Process(target=_work, args=(database.settings, approval_id, point))
                process.start()
                process.join(60)
                if process.exitcode != _KILLED:
                    raise RuntimeError(f"the process ended with {process.exitcode} instead of being killed")
                found.append(
                    portal().run_sync(_afterwards(executor, kind, point, number, approval_id, database.url))
                )
        finally:
            portal().run_sync(executor.aclose())
    return found


async def _approved(executor: SafeExecutor, kind: str, number: int) -> str:
    """Ask for an action and let Ada say yes."""
    tool, arguments = (
        ("act", {"key": str(number)})
        if kind == "outside"
        else ("execute_sql", {"sql": f"UPDATE public.kill_account SET paid = paid + 1 WHERE id = {number:d}"})
    )
    asked = await executor.execute(tool, arguments, identity=_WHO, wait=False)
    ada = executor.policy.reviewers.by_name("ada")
    if asked.waits_for is None or ada is None:
        raise RuntimeError(f"nothing was asked: {asked.error}")
    approval = await executor.queue.get(asked.waits_for, _WHO)
    await executor.queue.decide(
        [approval.approval_id],
        "approve",
        ada,
        channel="benchmark",
        hashes={approval.approval_id: approval.args_hash},
        identity_tenant=_WHO.tenant_id,
    )
    return approval.approval_id


async def _afterwards(
    executor: SafeExecutor, kind: str, point: str, number: int, approval_id: str, url: str
) -> Killed:
    """Try to run it again before and after it was given up, and look what there is."""
    for _ in range(2):
        await executor.run_approved(await executor.queue.get(approval_id, _WHO), _WHO)
        await executor.database.call("tend_approvals", executing_seconds=0)
    await executor.run_approved(await executor.queue.get(approval_id, _WHO), _WHO)
    approval = await executor.queue.get(approval_id, _WHO)
    log = (
        await executor.database.call("get_execution", _WHO, the_log_id=approval.log_id)
        if approval.log_id
        else None
    )
    query, value = (
        ("SELECT count(*)::int FROM public.kill_deed WHERE key = %s", str(number))
        if kind == "outside"
        else ("SELECT paid FROM public.kill_account WHERE id = %s::int", str(number))
    )
    async with await psycopg.AsyncConnection.connect(url) as connection:
        row = await (await connection.execute(query.encode(), (value,))).fetchone()
    return Killed(
        kind=kind,
        point=point,
        effects=row[0] if row is not None else 0,
        state=approval.state,
        logged=log["state"] if log is not None else None,
    )


def measure(kills: int = 50) -> Section:
    """Kill so many processes, in turn at each point of each kind of action."""
    cases = [(KINDS[number % 2], POINTS[number // 2 % 3]) for number in range(kills)]
    found = killed(cases)
    twice = sum(one.effects > 1 for one in found)
    wrong = sum(not one.is_well for one in found)
    lines = [
        Line(what="processes killed", printed=str(len(found)), reached=None),
        Line(what="actions that ran more than once", printed=f"{twice} (goal 0)", reached=twice == 0),
        Line(
            what="actions whose state is not known, or not true, after `tend_approvals`",
            printed=f"{wrong} (goal 0)",
            reached=wrong == 0,
        ),
    ]
    states = Counter((one.kind, one.point, one.state) for one in found)
    lines += [
        Line(what=f"{kind}, killed when {point}: {state}", printed=str(count), reached=None)
        for (kind, point, state), count in sorted(states.items())
    ]
    return Section(title="Killed processes", lines=lines)
