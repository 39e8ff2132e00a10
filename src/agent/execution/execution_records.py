"""What the executor says of a call: its assessment, the permit to run it, and how it ended."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from agent.approval.records import Approval
from agent.approval.risk import Risk
from agent.errors import DatabaseUnavailable, LearningError
from agent.execution.execution_policy import Decision
from agent.execution.result_text import fenced, inert
from agent.execution.tool_registry import ToolOutcome
from agent.identity import Identity

Status = Literal["succeeded", "failed", "refused", "denied", "rejected", "expired", "unknown"]


@dataclass(frozen=True, kw_only=True)
class Assessment:
    """What code says about one call before anything is asked or done."""

    tool: str
    tool_version: str
    kind: Literal["execution", "action"]
    risk: Risk
    decision: Decision
    why: str
    arguments: Mapping[str, Any]
    """Checked, as they are run."""
    arguments_shown: Any
    """As people are shown them: for SQL the text that runs."""
    args_hash: str
    """Binds an approval to tool, version, arguments, tenant, target, thread, call, bounds and policy."""
    effects: Mapping[str, Any] = field(default_factory=dict)
    bounds: Mapping[str, Any] = field(default_factory=dict)
    fingerprint: str | None = None
    tables: Sequence[str] = ()
    rows: int | None = None
    summary: str = ""
    per_hour: int | None = None
    """Calls of the tool by one tenant in an hour; `None`: no limit."""
    rule_per_hour: int | None = None
    """Calls of the tool under the rule that fits; `None`: no limit."""
    counted_agent: str | None = None
    """Whose calls the rule counts; `None`: those of the tenant."""
    counted: frozenset[str] = frozenset()
    """Limits in which this call is counted already."""
    rights: Sequence[str] = ()
    """Rights that it needs."""
    rule: str | None = None
    """The rule of the policy file that fits, counted from 1."""
    approvers: Sequence[str] = ()
    required_votes: int = 1
    tainted: bool = False
    thread_id: str | None = None
    tool_call_id: str | None = None


@dataclass(frozen=True, kw_only=True)
class ExecutionResult:
    """How a call ended."""

    status: Status
    tool: str
    risk: Risk
    value: Any = None
    rows: Sequence[Any] | None = None
    row_count: int | None = None
    effects: Mapping[str, Any] = field(default_factory=dict)
    """What it did, or what it would have done: for SQL rows by table."""
    approval_id: str | None = None
    log_id: str | None = None
    error: str | None = None
    text: str = ""
    """For a model: the result as fenced data, or why there is none."""
    decided_by: Sequence[str] = ()
    note: str = ""
    """What the person who decided wrote."""
    waits_for: str | None = None
    """Approval that a tool written by an agent waits for in the middle of its work."""
    repeated: bool = False
    """Whether this very call ran before, and this is the result that was recorded then."""

    @property
    def ok(self) -> bool:
        """Whether it ran and did what it should."""
        return self.status == "succeeded"

    @property
    def ran(self) -> bool:
        """Whether the tool was called: then this may hold what it read."""
        return self.status in ("succeeded", "failed", "unknown")


@dataclass(frozen=True, kw_only=True)
class Permit:
    """The right to run one call once."""

    assessment: Assessment
    identity: Identity
    approval: Approval | None = None
    ticket: str | None = None
    reason: str = ""
    """What the model says the call is for: a claim."""
    started: float = field(default_factory=time.monotonic)

    @property
    def entry(self) -> dict[str, Any]:
        """What the log says of the call before it runs."""
        found = self.assessment
        return {
            "tool": found.tool,
            "tool_version": found.tool_version,
            "risk": str(found.risk),
            "decision": "approved" if self.approval is not None else "allowed",
            "approval_id": self.approval.approval_id if self.approval is not None else None,
            "arguments_shown": found.arguments_shown,
            "arguments_run": dict(found.arguments),
        }


def call_key(thread_id: str | None, message_id: str | None, tool_call_id: str | None) -> str:
    """The key of the request for one call: the same whenever a graph comes by the same call again."""
    return "call:" + json.dumps([thread_id, message_id, tool_call_id])


def call_of(request_key: str) -> tuple[str | None, str | None]:
    """Thread and tool call in the key of a request, edited or not; `None` where it has none."""
    _, is_call, ids = request_key.partition("call:")
    if not is_call:
        return None, None
    try:
        thread_id, _, tool_call_id = json.loads(ids)
    except (ValueError, TypeError):  # a key of a tool that an agent wrote is the name of the call
        return None, ids
    return thread_id, tool_call_id


def waiting(approval: Approval) -> ExecutionResult:
    """The result of a call that waits for an approval."""
    return ExecutionResult(
        status="denied",
        tool=approval.tool,
        risk=approval.risk,
        effects=dict(approval.effects or {}),
        approval_id=approval.approval_id,
        error="it waits for an approval",
        text=f"{approval.tool} was not executed yet: it waits for an approval.",
        waits_for=approval.approval_id,
    )


def not_approved(approval: Approval) -> ExecutionResult:
    """The result of a call that nobody said yes to, or that ran already."""
    status: Status = "rejected"
    why = "it was rejected"
    if approval.state in ("expired", "pending"):
        status, why = "expired", "nobody approved it in time"
    elif approval.state == "cancelled":
        why = "the request was withdrawn"
    elif approval.state in ("executing", "executed", "failed", "unknown"):
        status, why = (
            "refused",
            f"it was run already and is {approval.state}; an approval is good for one run",
        )
    by = f" by {', '.join(approval.decided_by)}" if approval.decided_by and status == "rejected" else ""
    note = (
        f" They said: {json.dumps(inert(approval.note), ensure_ascii=False)}."
        if approval.note and status == "rejected"
        else ""
    )
    return ExecutionResult(
        status=status,
        tool=approval.tool,
        risk=approval.risk,
        effects=dict(approval.effects or {}),
        approval_id=approval.approval_id,
        error=f"{why}{by}",
        text=f"{approval.tool} was not executed: {why}{by}.{note} Do not try it again unless the user asks.",
        decided_by=tuple(approval.decided_by),
        note=approval.note,
    )


def failure_of(error: Exception) -> ToolOutcome:
    """What is entered of an error: our own words, or only the kind of a foreign one."""
    if isinstance(error, LearningError):
        return ToolOutcome(error=str(error), unsure=isinstance(error, DatabaseUnavailable))
    unsure = isinstance(error, OSError | TimeoutError)
    return ToolOutcome(error=f"the tool failed with {type(error).__name__}", unsure=unsure)


def told(tool: str, status: Status, outcome: ToolOutcome) -> str:
    """What a model is told of a call that ran."""
    if status == "succeeded":
        value = outcome.value
        if value is None and outcome.rows is not None:
            value = list(outcome.rows)
        return fenced(tool, value)
    if status == "unknown":
        return (
            f"{tool}: nobody knows whether it was executed. Do not try it again.\n"
            f"{fenced(tool, {'error': outcome.error})}"
        )
    return f"{tool} failed.\n{fenced(tool, {'error': outcome.error})}"
