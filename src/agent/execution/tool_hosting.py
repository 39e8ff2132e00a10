"""What code of agents may call, and how its calls are answered: each is a call of the executor like any other."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from agent.approval.risk import Risk
from agent.errors import InvalidRequest, LearningError, OperatorError, Refused
from agent.execution.call_judging import require_rights
from agent.execution.host_function import CallHost, HostAnswer, HostFunction, usable_as_name
from agent.execution.taint import gives_untrusted
from agent.execution.tool_definition import ToolVersion
from agent.execution.tool_registry import ToolRegistry
from agent.execution.tool_run import RunProgress
from agent.execution.usable_tools import CREATE_NEW_TOOL

if TYPE_CHECKING:
    from agent.approval.records import Approval
    from agent.execution.execution_records import ExecutionResult
    from agent.execution.safe_executor import SafeExecutor


class ToolHosting:
    """Answers the calls of code.

    Args:
        executor: who runs them.
    """

    def __init__(self, executor: SafeExecutor) -> None:
        self._executor = executor

    def require_functions(self, version: ToolVersion) -> None:
        """Nothing, if this process knows the functions that the code calls.

        Raises:
            OperatorError: it does not, and another may.
        """
        known = {function.name for function in host_functions(self._executor.registry)}
        if missing := sorted(set(version.capabilities) - known):
            raise OperatorError(
                f"this process has no tool {', '.join(missing)}, which {version.name} calls; the run goes on where it "
                "is known"
            )

    def hosting(self, progress: RunProgress) -> tuple[CallHost, list[HostFunction]]:
        """What answers the code's calls, and the functions it was granted."""
        granted = [
            function
            for function in host_functions(self._executor.registry)
            if function.name in progress.tool.capabilities
        ]

        async def call_host(name: str, arguments: dict[str, Any]) -> HostAnswer:
            progress.calls += 1
            call = f"{progress.run_key}-{progress.calls}"
            tainted = progress.stricter or progress.read_untrusted
            try:
                found = await self._executor.assess(
                    name, arguments, progress.identity, tainted=tainted, tool_call_id=call, measured=False
                )
                require_rights(self._executor.policy, name, found.rights, progress.author)
                if found.decision != "deny" and found.risk is not Risk.READ:
                    found = await self._executor.assess(
                        name, arguments, progress.identity, tainted=tainted, tool_call_id=call
                    )
                if found.decision == "ask" or (found.decision == "allow" and found.risk is not Risk.READ):
                    approval = await self._executor.permits.propose(
                        found,
                        progress.identity,
                        request_key=f"call:{call}",
                        reason=f"called by {progress.tool.name}, version {progress.tool.version}, which an agent wrote",
                    )
                    if approval.is_open:
                        return HostAnswer(paused=approval.approval_id)
                    result = await self._executor.run_approved(approval, progress.identity)
                else:
                    result = await self._executor.execute(
                        name, arguments, identity=progress.identity, tainted=tainted, request_key=call
                    )
            except Refused as error:
                result = await self._executor.refusals.turn_away(
                    name, arguments, progress.identity, "denied", str(error)
                )
            except LearningError as error:  # told to the code, which may go on without
                return HostAnswer(error=str(error))
            return self.answered(result, progress)

        return call_host, granted

    async def run_approved(self, approval: Approval, progress: RunProgress) -> ExecutionResult:
        """Run a call that was decided, unless people edited it into more than the tool's author may do."""
        if approval.state == "approved" and approval.replaces is not None:
            try:
                found = await self._executor.approved_call(approval, progress.identity)
                require_rights(self._executor.policy, approval.tool, found.rights, progress.author)
            except (InvalidRequest, Refused) as error:
                return await self._executor.refusals.turn_away(
                    approval.tool,
                    approval.arguments,
                    progress.identity,
                    "denied",
                    str(error),
                    risk=approval.risk,
                    approval_id=approval.approval_id,
                )
        return await self._executor.run_approved(approval, progress.identity)

    def answered(self, result: ExecutionResult, progress: RunProgress) -> HostAnswer:
        """The answer to the code, remembering whether it holds text of strangers."""
        spec = self._executor.registry.get(result.tool)
        if result.ran and gives_untrusted(result.tool, spec, progress.untrusted):
            progress.read_untrusted = True
        return answer_of(result)


def host_functions(registry: ToolRegistry) -> list[HostFunction]:
    """The executor's tools that code may call."""
    return [
        HostFunction(
            name=spec.name, parameters=spec.arguments.model_json_schema(), description=spec.description
        )
        for spec in registry
        if spec.for_agent_tools
        and spec.name != CREATE_NEW_TOOL
        and all(map(usable_as_name, (spec.name, *spec.arguments.model_json_schema().get("properties", {}))))
    ]


def answer_of(result: ExecutionResult) -> HostAnswer:
    """What code is told of a call that it made."""
    if not result.ok:
        why = f": {result.error}" if result.error else ""
        return HostAnswer(error=f"{result.tool} was not executed: {result.status}{why}")
    value = result.value
    if value is None and result.rows is not None:
        value = list(result.rows)
    return HostAnswer(value=json.loads(json.dumps(value, default=str)))
