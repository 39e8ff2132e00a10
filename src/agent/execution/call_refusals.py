"""Calls that do not run: their entry in the log, and what is said of them, or given of an earlier run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from agent.approval.records import Approval
from agent.approval.risk import Risk
from agent.errors import LearningError
from agent.events import emit
from agent.execution.call_report import report_call, report_wait
from agent.execution.execution_records import Assessment, ExecutionResult, Status, not_approved
from agent.execution.refused_arguments import as_logged
from agent.execution.result_text import fenced, inert
from agent.execution.tool_registry import ToolRegistry
from agent.identity import Identity

if TYPE_CHECKING:
    from agent.database.protocol import Database


class CallRefusals:
    """Enters calls that do not run.

    Args:
        database: where the log is.
        registry: says which tools are keyed: who repeats a call of one that ran is given its result.
    """

    def __init__(self, database: Database, registry: ToolRegistry) -> None:
        self._database = database
        self._registry = registry

    async def turn_down(
        self, found: Assessment, identity: Identity, status: Status, why: str
    ) -> ExecutionResult:
        """Enter a call that does not run, and say so."""
        return await self.turn_away(
            found.tool,
            found.arguments,
            identity,
            status,
            why,
            risk=found.risk,
            effects=found.effects,
            arguments_shown=found.arguments_shown,
            tool_version=found.tool_version,
        )

    async def turn_away(
        self,
        tool: str,
        arguments: Any,
        identity: Identity,
        status: Status,
        why: str,
        *,
        risk: Risk = Risk.WRITE,
        effects: Mapping[str, Any] | None = None,
        arguments_shown: Any = None,
        tool_version: str = "1",
        approval_id: str | None = None,
        state: str | None = None,
    ) -> ExecutionResult:
        """`turn_down` for a call that was not assessed."""
        decision = "denied" if status in ("denied", "rejected", "expired") else "refused"
        entry = {
            "state": state or (decision if status != "failed" else "failed"),
            "approval_id": approval_id,
            "tool": tool[:200],
            "tool_version": tool_version,
            "risk": str(risk),
            "decision": decision,
            "arguments_shown": as_logged(arguments_shown if arguments_shown is not None else arguments),
            "arguments_run": None,
            "error": why,
        }
        log_id = None
        try:
            log_id = str((await self._database.call("record_execution", identity, entry=entry))["log_id"])
        except LearningError as error:  # nothing was done, so the refusal stands without its entry
            emit("execution_log_failed", tool=tool[:200], approval_id=None, reason=str(error))
        report_call(tool, identity, risk=risk, decision=decision, status=status)
        emit(
            "tool_call_refused",
            tool=tool[:200],
            risk=str(risk),
            status=status,
            log_id=log_id,
            **identity.as_json(),
        )
        return ExecutionResult(
            status=status,
            tool=tool,
            risk=risk,
            effects=dict(effects or {}),
            log_id=log_id,
            error=why,
            text=f"{inert(tool)} was not executed: {inert(why)}",
        )

    async def not_run(self, approval: Approval, identity: Identity) -> ExecutionResult:
        """Enter that a call does not run because of the state of its approval, and say so; of a keyed tool's call that
        ran, give the result that was recorded."""
        if (before := await self._result_of_before(approval, identity)) is not None:
            return before
        result = not_approved(approval)
        report_wait(approval, identity)
        state = result.status if result.status in ("rejected", "expired") else "refused"
        turned = await self.turn_away(
            approval.tool,
            approval.arguments,
            identity,
            result.status,
            result.error or "",
            risk=result.risk,
            arguments_shown=approval.arguments_shown,
            tool_version=approval.tool_version,
            approval_id=approval.approval_id,
            state="cancelled" if approval.state == "cancelled" else state,
        )
        return replace(result, log_id=turned.log_id)

    async def _result_of_before(self, approval: Approval, identity: Identity) -> ExecutionResult | None:
        """What a keyed tool's call gave when it ran, for the one who asked for it; `None`: it is not known, or not
        theirs."""
        spec = self._registry.get(approval.tool)
        if approval.state != "executed" or spec is None or spec.idempotency != "keyed":
            return None
        kept = await self._database.call("get_execution_result", identity, the_key=approval.approval_id)
        if kept is None:
            return None
        value = json.loads(kept["result"])
        emit(
            "execution_repeated",
            tool=approval.tool,
            approval_id=approval.approval_id,
            log_id=str(kept["log_id"]),
        )
        return ExecutionResult(
            status="succeeded",
            tool=approval.tool,
            risk=approval.risk,
            value=value,
            effects=dict(approval.effects or {}),
            approval_id=approval.approval_id,
            log_id=str(kept["log_id"]),
            text=f"{approval.tool} was executed for this call before, and not a second time. What it gave then:\n"
            f"{fenced(approval.tool, value)}",
            decided_by=tuple(approval.decided_by),
            repeated=True,
        )
