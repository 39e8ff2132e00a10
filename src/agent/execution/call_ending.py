"""How a call ended that ran: its entry in the log, the end of its approval, and its result."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from agent.errors import ConflictError, DatabaseUnavailable, LearningError
from agent.events import emit
from agent.execution.call_report import report_call
from agent.execution.execution_records import ExecutionResult, Permit, Status, told
from agent.execution.result_text import as_recorded
from agent.execution.tool_registry import ToolOutcome, ToolRegistry

if TYPE_CHECKING:
    from agent.approval.human_approval import HumanApprovalQueue
    from agent.database.protocol import Database

_FINISH_ATTEMPTS: Final = 4
_ENDINGS: Final[Mapping[str, Status]] = {"executed": "succeeded", "failed": "failed"}


class CallEnding:
    """Enters how calls ended.

    Args:
        database: where the log is.
        queue: whose approvals end with their calls.
        registry: says which tools are keyed: their results are recorded.
    """

    def __init__(self, database: Database, queue: HumanApprovalQueue, registry: ToolRegistry) -> None:
        self._database = database
        self._queue = queue
        self._registry = registry

    async def settle(self, permit: Permit, outcome: ToolOutcome) -> ExecutionResult:
        """Enter how a call ended, and make its result."""
        found = permit.assessment
        status: Status = "succeeded"
        if outcome.error is not None:
            status = "unknown" if outcome.unsure else "failed"
        entry = permit.entry | {
            "state": {"succeeded": "executed"}.get(status, status),
            "rows": dict(outcome.effects),
            "row_count": outcome.row_count,
            "result_bytes": outcome.result_bytes,
            "duration_ms": round((time.monotonic() - permit.started) * 1000, 3),
            "error": outcome.error,
            "pre_image": outcome.pre_image,
        }
        spec = self._registry.get(found.tool)
        if permit.ticket is not None and spec is not None and spec.idempotency == "keyed":
            entry["result"] = as_recorded(outcome.value)
        approval_id = permit.approval.approval_id if permit.approval is not None else None
        log_id, unlogged = outcome.log_id, ""
        if log_id is None:
            try:
                log_id, state = await self._finish(permit, entry)
                if permit.ticket is not None and state != entry["state"]:
                    # The log knows better: a write whose connection was lost has its own row, or it was given up.
                    status = _ENDINGS.get(state, "unknown")
            except LearningError as error:
                unlogged = str(error)
                emit("execution_log_failed", tool=found.tool, approval_id=approval_id, reason=unlogged)
        if unlogged:
            status = "unknown" if permit.ticket is not None else "failed"
        report_call(
            found.tool,
            permit.identity,
            risk=found.risk,
            decision=entry["decision"],
            status=status,
            seconds=time.monotonic() - permit.started,
            call_id=found.tool_call_id,
            approval=permit.approval,
        )
        if unlogged and permit.ticket is None:  # what is not in the log has not been read
            return ExecutionResult(
                status="failed",
                tool=found.tool,
                risk=found.risk,
                error=unlogged,
                text=f"{found.tool}: the result is withheld because it could not be entered in the log.",
            )
        if status in ("failed", "unknown"):
            emit("tool_call_failed", tool=found.tool, risk=str(found.risk), status=status, log_id=log_id)
        decided = permit.approval.decided_by if permit.approval is not None else ()
        return ExecutionResult(
            status=status,
            tool=found.tool,
            risk=found.risk,
            value=outcome.value,
            rows=outcome.rows,
            row_count=outcome.row_count,
            effects=dict(outcome.effects) or dict(found.effects),
            approval_id=approval_id,
            log_id=log_id,
            error=None if status == "succeeded" else outcome.error or unlogged or None,
            text=told(found.tool, status, outcome),
            decided_by=tuple(decided),
            waits_for=outcome.approval_id,
        )

    async def _finish(self, permit: Permit, entry: Mapping[str, Any]) -> tuple[str, str]:
        """Enter the end of a call: the number of its row and its state. Tried again where the database is away for a
        moment; what was entered before stays."""
        for attempt in range(_FINISH_ATTEMPTS):
            try:
                if permit.ticket is None:
                    receipt = await self._database.call(
                        "record_execution", permit.identity, entry=dict(entry)
                    )
                    return str(receipt["log_id"]), str(entry["state"])
                receipt = await self._queue.finish(permit.ticket, permit.identity, entry)
                return str(receipt["log_id"]), str(receipt["state"])
            except DatabaseUnavailable:
                if attempt == _FINISH_ATTEMPTS - 1:
                    raise
                await asyncio.sleep(0.2 * 2**attempt)
            except ConflictError:
                if permit.approval is None:
                    raise
                approval = await self._queue.get(permit.approval.approval_id, permit.identity)
                return str(approval.log_id), approval.state
        raise AssertionError("unreachable")
