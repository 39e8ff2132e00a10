"""Runs of agent-written tools: in the sandbox, over pauses, in this process or the next."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any

from agent.approval.records import Approval
from agent.approval.risk import Risk
from agent.errors import (
    ConflictError,
    InvalidRequest,
    LearningError,
    NotFound,
    OperatorError,
    Refused,
)
from agent.events import emit
from agent.execution.argument_schema import check_arguments
from agent.execution.call_judging import judged
from agent.execution.call_permits import require_no_halt
from agent.execution.execution_policy import rule_on
from agent.execution.execution_records import Permit
from agent.execution.refused_arguments import as_logged
from agent.execution.result_text import as_recorded, inert
from agent.execution.tool_definition import ToolVersion
from agent.execution.tool_hosting import ToolHosting
from agent.execution.tool_pauses import NOT_OURS, ToolPauses
from agent.execution.tool_registry import Appraisal
from agent.execution.tool_run import RunProgress, ToolRun, ended_run
from agent.execution.tool_sandbox import SandboxResult, ToolSandbox
from agent.execution.usable_tools import UsableTools
from agent.identity import Identity

if TYPE_CHECKING:
    from agent.approval.human_approval import HumanApprovalQueue
    from agent.database.protocol import Database
    from agent.execution.safe_executor import SafeExecutor

_ELSEWHERE_SECONDS_MAX = 60.0
_ELSEWHERE_EVERY_SECONDS = 0.5


class ToolRunner:
    """Runs approved versions, and nothing that differs from what was approved. Arguments as of `ToolLibrary`.

    `activate` lets the versions of a tool run whose approvals were given meanwhile.
    """

    def __init__(
        self,
        database: Database,
        queue: HumanApprovalQueue,
        *,
        executor: SafeExecutor,
        sandbox: ToolSandbox,
        strict_runs: int,
        wait_seconds: float,
        activate: Callable[[Identity, str], Awaitable[object]],
    ) -> None:
        self._activate = activate
        self._database = database
        self._queue = queue
        self._executor = executor
        self._sandbox = sandbox
        self._strict_runs = strict_runs
        self._wait_seconds = wait_seconds
        self.usable = UsableTools(database, queue, executor)
        """Says which versions may run."""
        self._hosting = ToolHosting(executor)
        self._pauses = ToolPauses(database, self.usable)

    async def run(
        self,
        name: str,
        arguments: Mapping[str, Any],
        identity: Identity,
        *,
        tainted: bool = False,
        untrusted: frozenset[str] = frozenset(),
        wait_seconds: float | None = None,
        permit: Permit | None = None,
    ) -> ToolRun:
        """As `ToolLibrary.run`; `untrusted` as in `taint.untrusted_names`."""
        seconds = self._wait_seconds if wait_seconds is None else wait_seconds
        try:
            return await self._run(
                name,
                arguments,
                identity,
                tainted=tainted,
                untrusted=untrusted,
                wait_seconds=seconds,
                permit=permit,
            )
        except (InvalidRequest, NotFound, Refused) as error:
            return await self._turned_down(name, arguments, identity, error)
        except OperatorError as error:  # what the run had called before is in the log
            emit("tool_run_failed", tool=name[:200], reason=str(error))
            return ToolRun(
                status="failed",
                tool=name,
                error=str(error),
                text=f"{name} did not end: the database or the sandbox was not there. Do not call it again now.",
            )

    async def _run(
        self,
        name: str,
        arguments: Mapping[str, Any],
        identity: Identity,
        *,
        tainted: bool,
        untrusted: frozenset[str],
        wait_seconds: float,
        permit: Permit | None,
    ) -> ToolRun:
        if not isinstance(name, str) or not isinstance(arguments, Mapping):
            raise InvalidRequest("a tool is run by its name, with an object of arguments")
        await self._activate(identity, name)
        version = await self.usable.version(identity, name)
        author = self.usable.require_usable(
            version, identity, await self.usable.approval_of(version, identity)
        )
        self._require_no_denial(version, identity)
        checked = check_arguments(dict(arguments), version.parameters)
        if permit is not None and permit.assessment.tool == name:
            await self._require_no_halt(version, identity)
        else:
            await self._admit(version, checked, identity)
        progress = RunProgress(
            tool=version,
            identity=identity,
            arguments=checked,
            run_key=f"tool-{secrets.token_hex(12)}",
            stricter=tainted or await self._is_new(version, identity),
            author=author,
            untrusted=untrusted,
        )
        call_host, functions = self._hosting.hosting(progress)
        result = await self._sandbox.run(version.code, checked, call_host, host_functions=functions)
        return await self._ended(progress, result, wait_seconds)

    async def resume(
        self, approval_id: str, identity: Identity, *, wait_seconds: float | None = None
    ) -> ToolRun:
        """As `ToolLibrary.resume`."""
        first, last = await self._ends_of(approval_id, identity)
        if last.is_open:
            raise ConflictError(f"approval {last.approval_id} is not decided yet; wait for it and try again")
        if first.requested_by != identity.user_id:
            raise Refused(NOT_OURS)
        kept = await self._pauses.take(first.approval_id, identity)
        if kept is None:
            raise NotFound(f"no run waits for approval {approval_id}, or another process has gone on with it")
        try:
            progress, snapshot = await self._pauses.open(kept, first, identity)
            self._hosting.require_functions(progress.tool)
            self._require_no_denial(progress.tool, progress.identity)
            await self._require_no_halt(progress.tool, identity)
            result = await self._hosting.run_approved(last, progress)
            call_host, functions = self._hosting.hosting(progress)
            answer = self._hosting.answered(result, progress)
            ended = await self._sandbox.resume(snapshot, answer, call_host, host_functions=functions)
        except (OperatorError, Refused, asyncio.CancelledError) as error:  # it may go on later
            await asyncio.shield(self._pauses.put_back(first.approval_id, identity, error))
            raise
        seconds = self._wait_seconds if wait_seconds is None else wait_seconds
        return await self._ended(progress, ended, seconds, resumed=first.approval_id)

    async def result(self, approval_id: str, identity: Identity) -> ToolRun | None:
        """As `ToolLibrary.result`."""
        approval = await self._queue.get(approval_id, identity)
        run_key = approval.request_key.rpartition("call:")[2].rpartition("-")[0]
        return await self._recorded(run_key, identity)

    async def _recorded(self, run_key: str, identity: Identity) -> ToolRun | None:
        kept = await self._database.call("get_execution_result", identity, the_key=run_key)
        if kept is None:
            return None
        said = json.loads(kept["result"])
        return ended_run(
            said["tool"],
            int(said["version"]),
            ok=said["ok"],
            value=said["value"],
            error=said["error"],
            log_id=str(kept["log_id"]),
            read_untrusted=said["read_untrusted"],
        )

    async def _told_elsewhere(self, progress: RunProgress, wait_seconds: float) -> ToolRun | None:
        """How a run ended that another process has gone on with; `None`: it has not, in this time."""
        deadline = time.monotonic() + min(wait_seconds, _ELSEWHERE_SECONDS_MAX)
        while (ran := await self._recorded(progress.run_key, progress.identity)) is None:
            if time.monotonic() >= deadline:
                return None
            await asyncio.sleep(_ELSEWHERE_EVERY_SECONDS)
        return ran

    def _require_no_denial(self, version: ToolVersion, identity: Identity) -> None:
        ruling = rule_on(
            self._executor.policy.rules,
            tool=version.name,
            agent_id=identity.agent_id,
            tenant_id=identity.tenant_id,
            risk=Risk.READ,
        )
        if ruling.decision == "deny":
            raise Refused(ruling.why)

    async def _admit(self, version: ToolVersion, arguments: Mapping[str, Any], identity: Identity) -> None:
        """Hold a run that nobody gave a permit for to the policy's rules, and count it in their limits.

        Raises:
            Refused: a rule wants a person's yes, or its limit is used up, or the kill switch is on.
        """
        found = judged(
            self._executor.policy,
            Appraisal(risk=Risk.READ),
            tool=version.name,
            tool_version=str(version.version),
            target="",
            kind="action",
            arguments=arguments,
            identity=identity,
            tainted=False,
            thread_id=None,
            tool_call_id=None,
            rights=(),  # those of what its code calls were checked with the version
        )
        if found.decision != "allow":
            raise Refused(
                f"{found.why}, and a direct run asks nobody. Put the tool into an agent with SafeToolsMiddleware, or "
                "into the node safe_tools: they ask for an approval of each call and run it with that"
            )
        await self._executor.permits.count(found, identity)

    async def _require_no_halt(self, version: ToolVersion, identity: Identity) -> None:
        answer = await self._database.call(
            "reserve_execution", identity, the_tool=version.name, limit_key="", per_hour=None
        )
        require_no_halt(answer, version.name)

    async def _is_new(self, version: ToolVersion, identity: Identity) -> bool:
        if self._strict_runs <= 0:
            return False
        rows = await self._database.call(
            "list_executions", identity, wanted={"tool": version.name, "state": "executed", "limit": 1000}
        )
        ran = sum(row["tool_version"] == str(version.version) for row in rows)
        return bool(ran < self._strict_runs)

    async def _ended(
        self, progress: RunProgress, result: SandboxResult, wait_seconds: float, *, resumed: str | None = None
    ) -> ToolRun:
        """What a run came to; a paused one is put away first, then waited for.

        Args:
            resumed: the approval after which it went on; `None`: it had not paused.
        """
        version = progress.tool
        if result.paused is not None:
            approval_id = result.paused.approval_id
            await self._pauses.put_away(progress, result.paused, wait_seconds, replaces=resumed)
            if wait_seconds > 0:
                waited = await self._queue.wait(approval_id, progress.identity, wait_seconds)
                if waited.replaced_by is not None:
                    _, waited = await self._ends_of(approval_id, progress.identity)
                    if waited.is_open:
                        waited = await self._queue.wait(waited.approval_id, progress.identity, wait_seconds)
                if not waited.is_open:
                    try:
                        return await self.resume(approval_id, progress.identity, wait_seconds=wait_seconds)
                    except NotFound:  # another process was quicker
                        if (ran := await self._told_elsewhere(progress, wait_seconds)) is not None:
                            return ran
            return ToolRun(
                status="paused",
                tool=version.name,
                version=version.version,
                approval_id=approval_id,
                printed=result.printed,
                text=(
                    f"{version.name} waits for a person's approval of {result.paused.function}() "
                    f"(approval {approval_id}). Do not call it again: it goes on by itself when that is decided. "
                    f"An operator sees what came of it, or goes on with it, by `agent tools resume {approval_id}`."
                ),
                read_untrusted=progress.read_untrusted,
            )
        ok = result.status == "done"
        entry: dict[str, Any] = {
            "state": "executed" if ok else "failed",
            "tool": version.name,
            "tool_version": str(version.version),
            "risk": str(Risk.READ),
            "decision": "allowed",
            "arguments_shown": dict(progress.arguments),
            "arguments_run": dict(progress.arguments),
            "result_bytes": len(json.dumps(result.value).encode()),
            "duration_ms": result.duration_ms,
            "error": result.error,
        }
        if resumed is None:
            log_id = await self._logged(progress.identity, entry)
        else:
            log_id = await self._finished(
                progress, resumed, entry, ok=ok, value=result.value, error=result.error
            )
        return ended_run(
            version.name,
            version.version,
            ok=ok,
            value=result.value,
            error=result.error,
            log_id=log_id,
            printed=result.printed,
            read_untrusted=progress.read_untrusted,
        )

    async def _finished(
        self, progress: RunProgress, approval_id: str, entry: Mapping[str, Any], **ending: Any
    ) -> str | None:
        """Enter how a run ended that went on after a pause, and keep what it gave for whoever waits elsewhere."""
        said = {
            "tool": progress.tool.name,
            "version": progress.tool.version,
            "read_untrusted": progress.read_untrusted,
            **ending,
        }
        kept = as_recorded(said) or as_recorded(
            said | {"value": None, "error": "what it gave is too long to be kept"}
        )
        try:
            receipt = await self._database.call(
                "finish_continuation",
                progress.identity,
                the_approval_id=approval_id,
                the_key=progress.run_key,
                entry=dict(entry) | {"result": kept},
            )
        except LearningError as error:  # as of `_logged`; after its lease it is gone over once more
            emit("execution_log_failed", tool=progress.tool.name, approval_id=approval_id, reason=str(error))
            return None
        return str(receipt["log_id"])

    async def _ends_of(self, approval_id: str, identity: Identity) -> tuple[Approval, Approval]:
        """The approval as it was first asked for, and as it stands after people edited the call."""
        first = await self._queue.get(approval_id, identity)
        while first.replaces is not None:
            first = await self._queue.get(first.replaces, identity)
        last = first
        while last.replaced_by is not None:
            last = await self._queue.get(last.replaced_by, identity)
        return first, last

    async def _turned_down(
        self, name: str, arguments: Mapping[str, Any], identity: Identity, error: LearningError
    ) -> ToolRun:
        log_id = await self._logged(
            identity,
            {
                "state": "refused",
                "tool": name[:200],
                "tool_version": "",
                "risk": str(Risk.READ),
                "decision": "refused",
                "arguments_shown": as_logged(dict(arguments)) if isinstance(arguments, Mapping) else None,
                "arguments_run": None,
                "error": str(error),
            },
        )
        return ToolRun(
            status="refused",
            tool=name,
            error=str(error),
            text=f"{name} was not executed: {inert(str(error))}",
            log_id=log_id,
        )

    async def _logged(self, identity: Identity, entry: Mapping[str, Any]) -> str | None:
        """Enter a run in the log. What it did outside has entries of its own, so a run stands without this one."""
        try:
            return str((await self._database.call("record_execution", identity, entry=dict(entry)))["log_id"])
        except LearningError as error:
            emit("execution_log_failed", tool=str(entry["tool"]), approval_id=None, reason=str(error))
            return None
