"""Calls that were decided on: how the decision is kept in a graph's state, and how each call is held to it and run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from langchain_core.messages import BaseMessage, ToolMessage
from langgraph.errors import GraphBubbleUp
from langgraph.types import Command

from agent.approval.answers import UNREADABLE
from agent.approval.risk import Risk
from agent.errors import LearningError, Refused
from agent.execution.agent_tools import AgentTools
from agent.execution.call_judging import still_approved
from agent.execution.execution_records import ExecutionResult, Permit, Status, failure_of
from agent.execution.foreign_messages import UNTRUSTED, changed_messages, fenced_content
from agent.execution.gated_turn import Caller, Turn, digest_of
from agent.execution.safe_executor import SafeExecutor
from agent.execution.taint import call_around
from agent.execution.tool_registry import ToolOutcome


class DecidedCalls:
    """Runs what was decided, or lets it be run, and enters how it ended.

    Args:
        executor: who runs.
        tools: the agent's.
    """

    def __init__(self, executor: SafeExecutor, tools: AgentTools) -> None:
        self._executor = executor
        self._tools = tools

    def frozen(self, turn: Turn) -> dict[str, Any]:
        """What was decided, by id of the call: what `admitted` holds each call to."""
        found: dict[str, Any] = {}
        for call in turn.calls:
            kept: dict[str, Any] = {"call": digest_of(call.name, call.original)}
            if not kept["call"] and call.refusal is None:
                kept["refusal"] = ["refused", "the arguments cannot be written as JSON", "WRITE"]
            elif call.refusal is not None:
                kept["refusal"] = [call.refusal[0], call.refusal[1], str(call.refusal[2])]
            elif call.approval is not None:
                kept["approval_id"] = call.approval.approval_id
            elif call.assessment is not None:
                kept["args_hash"] = call.assessment.args_hash
                kept["tainted"] = call.assessment.tainted
            # Two calls of one id cannot be told apart later, so neither runs.
            if call.id in found and found[call.id] != kept:
                kept = {"call": "", "refusal": ["refused", "two calls have the same id", "WRITE"]}
            found[call.id] = kept
        return found

    async def admitted(
        self,
        name: str,
        arguments: Mapping[str, Any],
        call_id: str,
        kept: Mapping[str, Any] | None,
        caller: Caller,
    ) -> Permit | ToolMessage:
        """The permit for a LangChain tool, or the message of a call that did not run or that the executor ran."""
        found = await self.admit(name, arguments, call_id, kept, caller)
        if isinstance(found, ExecutionResult):
            return self.message(found, call_id)
        with call_around(tainted=caller.tainted, names=self._tools.untrusted_tools) as inside:
            if self._executor.registry.get(name) is not None:
                ran = await self._executor.run(found)
                return self.message(ran, call_id, read=inside[0])
            if name in caller.written:
                return await self._run_written(found, call_id, caller)
        return found

    async def _run_written(self, permit: Permit, call_id: str, caller: Caller) -> ToolMessage:
        """Run a tool that an agent wrote; the library enters in the log what became of it."""
        name = permit.assessment.tool
        ran = await self._executor.library.run(
            name, permit.assessment.arguments, caller.identity, tainted=caller.tainted, permit=permit
        )
        if permit.ticket is not None:
            await self._executor.settle(permit, ToolOutcome(error=ran.error))
        return ToolMessage(
            content=ran.text,
            name=name,
            tool_call_id=call_id,
            status="success" if ran.status == "succeeded" else "error",
            artifact={"status": ran.status, "approval_id": ran.approval_id, "log_id": ran.log_id},
            additional_kwargs=self._mark(name, by_inside=ran.read_untrusted),
        )

    async def admit(
        self,
        name: str,
        arguments: Mapping[str, Any],
        call_id: str,
        kept: Mapping[str, Any] | None,
        caller: Caller,
    ) -> Permit | ExecutionResult:
        """The permit to run a call, or the result of one that does not run."""
        try:
            return await self._admit(name, arguments, call_id, kept, caller)
        except LearningError as error:
            status: Status = "denied" if isinstance(error, Refused) else "failed"
            return await self._executor.refusals.turn_away(
                name, arguments, caller.identity, status, str(error)
            )

    async def _admit(
        self,
        name: str,
        arguments: Mapping[str, Any],
        call_id: str,
        kept: Mapping[str, Any] | None,
        caller: Caller,
    ) -> Permit | ExecutionResult:
        if kept is None:
            raise Refused("nobody decided on this call: it did not come from the model's last message")
        if (refusal := kept.get("refusal")) is not None:
            status, why, risk = refusal
            return await self._executor.refusals.turn_away(
                name, arguments, caller.identity, status, why, risk=Risk.of(risk)
            )
        if kept.get("call") != digest_of(name, arguments):
            raise Refused("the call is not the one that was decided on")
        approval_id = kept.get("approval_id")
        if approval_id is None:
            found = await self._tools.assess(
                name, arguments, replace(caller, tainted=bool(kept.get("tainted"))), call_id
            )
            if found.args_hash != kept.get("args_hash"):
                raise Refused("the policy file has changed since the call was allowed")
            return await self._executor.permits.admit(found, caller.identity)
        approval = await self._executor.queue.get(approval_id, caller.identity)
        if approval.state != "approved":
            result = await self._executor.refusals.not_run(approval, caller.identity)
            if result.status == "rejected" and approval.note == UNREADABLE:
                why = "the answer about it could not be read, and that counts as a no"
                again = "Do not try it again unless the user asks."
                return replace(result, error=why, text=f"{name} was not executed: {why}. {again}")
            return result
        if self._executor.registry.get(name) is not None:
            found = await self._executor.approved_call(approval, caller.identity)
        else:
            found = still_approved(
                await self._tools.assess(name, approval.arguments, replace(caller, tainted=False), call_id),
                approval,
            )
        return await self._executor.permits.admit(found, caller.identity, approval)

    def message(self, result: ExecutionResult, call_id: str, *, read: bool = False) -> ToolMessage:
        """The message for a model.

        Args:
            read: whether the tool read text of strangers.
        """
        return ToolMessage(
            content=result.text,
            name=result.tool,
            tool_call_id=call_id,
            status="success" if result.ok else "error",
            artifact={
                "status": result.status,
                "risk": str(result.risk),
                "approval_id": result.approval_id,
                "log_id": result.log_id,
            },
            additional_kwargs=self._mark(result.tool, by_inside=read),
        )

    def _mark(self, name: str, *, by_inside: bool) -> dict[str, Any]:
        return {UNTRUSTED: True} if by_inside or self._tools.is_untrusted(name) else {}

    async def settle_foreign(
        self, permit: Permit, result: ToolMessage | Command[Any], *, read: bool
    ) -> ToolMessage | Command[Any]:
        """Enter how a LangChain tool ended, and fence its result where it is a stranger's text."""
        name = permit.assessment.tool
        if not isinstance(result, ToolMessage):
            settled = await self._executor.settle(permit, ToolOutcome())
            if not settled.ok:
                return self.message(settled, permit.assessment.tool_call_id or "")
            mark = self._mark(name, by_inside=read)
            return changed_messages(result, lambda message: self._strange(name, message)) if mark else result
        error = "the tool answered with an error" if result.status == "error" else None
        size = len(result.text.encode(errors="replace"))
        settled = await self._executor.settle(permit, ToolOutcome(error=error, result_bytes=size))
        if settled.error is not None and error is None:  # it could not be entered in the log
            return self.message(settled, str(result.tool_call_id))
        update: dict[str, Any] = {}
        if mark := self._mark(name, by_inside=read):
            update["additional_kwargs"] = {**result.additional_kwargs, **mark}
        if self._tools.is_untrusted(name):
            update["content"] = fenced_content(name, result.content)
        return result.model_copy(update=update) if update else result

    def _strange(self, name: str, message: BaseMessage) -> BaseMessage:
        """A message that a tool put into the state, marked and where the tool is untrusted fenced."""
        update: dict[str, Any] = {"additional_kwargs": {**message.additional_kwargs, UNTRUSTED: True}}
        if self._tools.is_untrusted(name):
            update["content"] = fenced_content(name, message.content)
        return message.model_copy(update=update)

    async def settle_error(self, permit: Permit, error: BaseException) -> None:
        """Enter that a LangChain tool raised, or paused the graph: then it is not run again with this approval."""
        if isinstance(error, GraphBubbleUp):
            if permit.ticket is not None:
                why = "the tool paused in the middle of its work"
                await self._executor.settle(permit, ToolOutcome(error=why, unsure=True))
        elif isinstance(error, Exception):
            await self._executor.settle(permit, failure_of(error))
        else:
            await self._executor.settle(
                permit, ToolOutcome(error="it was cancelled while it ran", unsure=True)
            )
