"""Runs of agent-written tools: in the sandbox, over pauses, in this process or the next."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from agent.approval.binding import binding_hash
from agent.approval.records import Approval
from agent.approval.risk import Risk
from agent.errors import (
    ConflictError,
    DatabaseUnavailable,
    InvalidRequest,
    LearningError,
    NotFound,
    OperatorError,
    Refused,
)
from agent.events import emit
from agent.execution.argument_schema import check_arguments
from agent.execution.call_judging import require_rights
from agent.execution.continuation_seal import ContinuationSeal
from agent.execution.host_function import CallHost, HostAnswer, HostFunction, usable_as_name
from agent.execution.result_text import as_recorded, fenced, inert
from agent.execution.tool_definition import ToolVersion
from agent.execution.tool_registry import ToolRegistry
from agent.execution.tool_sandbox import SandboxResult, Snapshot, ToolSandbox
from agent.identity import Identity

if TYPE_CHECKING:
    from agent.approval.human_approval import HumanApprovalQueue
    from agent.database.protocol import Database
    from agent.execution.execution_records import ExecutionResult
    from agent.execution.safe_executor import SafeExecutor

CREATE_NEW_TOOL = "create_new_tool"
"""Name of the tool by which an agent hands in another."""
CREATE_RIGHTS = ("tools.create",)
"""Rights that it takes."""
_PUT_BACK_ATTEMPTS = 5
_ELSEWHERE_SECONDS_MAX = 60.0
_ELSEWHERE_EVERY_SECONDS = 0.5
_NOT_OURS = "the paused run is not what was put away, or belongs to somebody else; it is not resumed"
_CARRIED_OUT = ("executing", "executed", "unknown")
"""States of an approval whose version the database let run: it did so in a transaction, and the process that asked for
it may have died before it could say so."""


@dataclass(frozen=True, kw_only=True)
class ToolRun:
    """What became of one run of an agent-written tool."""

    status: Literal["succeeded", "failed", "paused", "refused"]
    tool: str
    version: int | None = None
    value: Any = None
    """What it returned."""
    text: str = ""
    """For a model: the result as fenced data, or why there is none."""
    error: str | None = None
    approval_id: str | None = None
    """Paused: what it waits for. `ToolLibrary.resume` goes on when that is decided."""
    log_id: str | None = None
    printed: str = ""
    read_untrusted: bool = False
    """Whether a function it called gave it text of strangers."""


@dataclass
class _Progress:
    """One run while it goes on, also over pauses."""

    tool: ToolVersion
    identity: Identity
    arguments: Mapping[str, Any]
    run_key: str
    stricter: bool
    """Whether its calls count as one level more dangerous: the run is tainted, or the version is new."""
    author: Identity
    """Whose rights its calls need besides those of the identity: a tool never does more than its author may."""
    calls: int = 0
    read_untrusted: bool = False

    def as_json(self) -> dict[str, Any]:
        return {
            "tool": self.tool.name,
            "version": self.tool.version,
            "identity": self.identity.as_json(),
            "arguments": dict(self.arguments),
            "run_key": self.run_key,
            "stricter": self.stricter,
            "calls": self.calls,
            "read_untrusted": self.read_untrusted,
        }


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
        self._made_seal: ContinuationSeal | None = None
        self._own_seal = ContinuationSeal(None)

    async def version(self, identity: Identity, name: str, version: int | None = None) -> ToolVersion:
        """One version of a tool; without a number the approved one, else the newest.

        Raises:
            NotFound: there is none.
        """
        row = await self._database.call("get_tool", identity, tool_name=name, version=version)
        if row is None:
            raise NotFound(
                f"there is no tool {name!r}" + (f" in version {version}" if version is not None else "")
            )
        return ToolVersion.from_row(row)

    async def run(
        self,
        name: str,
        arguments: Mapping[str, Any],
        identity: Identity,
        *,
        tainted: bool = False,
        wait_seconds: float | None = None,
    ) -> ToolRun:
        """As `ToolLibrary.run`."""
        seconds = self._wait_seconds if wait_seconds is None else wait_seconds
        try:
            return await self._run(name, arguments, identity, tainted=tainted, wait_seconds=seconds)
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
        wait_seconds: float,
    ) -> ToolRun:
        if not isinstance(name, str) or not isinstance(arguments, Mapping):
            raise InvalidRequest("a tool is run by its name, with an object of arguments")
        await self._activate(identity, name)
        version = await self.version(identity, name)
        author = self.require_usable(version, identity, await self._approval_of(version, identity))
        checked = check_arguments(dict(arguments), version.parameters)
        await self._require_no_halt(version, identity)
        progress = _Progress(
            tool=version,
            identity=identity,
            arguments=checked,
            run_key=f"tool-{secrets.token_hex(12)}",
            stricter=tainted or await self._is_new(version, identity),
            author=author,
        )
        call_host, functions = self._hosting(progress)
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
            raise Refused(_NOT_OURS)
        kept = await self._taken(first.approval_id, identity)
        if kept is None:
            raise NotFound(f"no run waits for approval {approval_id}, or another process has gone on with it")
        try:
            progress, snapshot = await self._opened_or_ended(kept, first, identity)
            self._require_functions(progress.tool)
            await self._require_no_halt(progress.tool, identity)
            result = await self._executor.run_approved(last, progress.identity)
            call_host, functions = self._hosting(progress)
            answer = self._answered(result, progress)
            ended = await self._sandbox.resume(snapshot, answer, call_host, host_functions=functions)
        except (OperatorError, Refused, asyncio.CancelledError) as error:  # it may go on later
            await asyncio.shield(self._put_back(first.approval_id, identity, error))
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
        return _told(
            said["tool"],
            int(said["version"]),
            ok=said["ok"],
            value=said["value"],
            error=said["error"],
            log_id=str(kept["log_id"]),
            read_untrusted=said["read_untrusted"],
        )

    async def _told_elsewhere(self, progress: _Progress, wait_seconds: float) -> ToolRun | None:
        """How a run ended that another process has gone on with; `None`: it has not, in this time."""
        deadline = time.monotonic() + min(wait_seconds, _ELSEWHERE_SECONDS_MAX)
        while (ran := await self._recorded(progress.run_key, progress.identity)) is None:
            if time.monotonic() >= deadline:
                return None
            await asyncio.sleep(_ELSEWHERE_EVERY_SECONDS)
        return ran

    def _require_functions(self, version: ToolVersion) -> None:
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

    async def _opened_or_ended(
        self, kept: Mapping[str, Any], approval: Approval, identity: Identity
    ) -> tuple[_Progress, Snapshot]:
        """`_opened`; a run that can never go on is ended, and that is logged."""
        try:
            return await self._opened(kept, approval, identity)
        except (Refused, NotFound) as error:
            entry = {
                "state": "refused",
                "tool": _tool_of(kept["payload"]),
                "risk": str(Risk.READ),
                "decision": "refused",
                "error": str(error),
            }
            with suppress(ConflictError):
                await self._database.call(
                    "finish_continuation",
                    identity,
                    the_approval_id=approval.approval_id,
                    the_key="",
                    entry=entry,
                )
            raise

    def require_rights(self, tool: str, capabilities: Iterable[str], identity: Identity) -> None:
        """Nothing, if tenant and agent have the rights of these functions, which a tool's code calls.

        Raises:
            Refused: they lack one.
        """
        specs = [spec for spec in map(self._executor.registry.get, capabilities) if spec is not None]
        needed = {right for spec in specs for right in spec.needed_rights}
        require_rights(self._executor.policy, tool, needed, identity)

    async def _approval_of(self, version: ToolVersion, identity: Identity) -> Approval | None:
        return None if version.approval_id is None else await self._queue.get(version.approval_id, identity)

    def require_usable(self, version: ToolVersion, identity: Identity, approval: Approval | None) -> Identity:
        """The author of a version that people approved, if both author and identity have the rights that it needs.

        Args:
            approval: the one that the version names, as it is now.

        Raises:
            Refused: it is not approved, or not any more, or one of them lacks a right.
        """
        author = self._require_runnable(version, identity, approval)
        for who in (author, identity):
            self.require_rights(version.name, version.capabilities, who)
        return author

    @staticmethod
    def _require_runnable(version: ToolVersion, identity: Identity, approval: Approval | None) -> Identity:
        """The agent that handed in a version, if this is what people approved.

        Raises:
            Refused: it is not, or not any more.
        """
        if version.state != "approved" or approval is None:
            raise Refused(
                f"the tool {version.name!r} is not approved (version {version.version} is {version.state})"
            )
        expected = {"name": version.name, "version": version.version, "code_hash": version.code_hash}
        if not (
            version.is_whole
            and approval.approval_id == version.approval_id
            and approval.kind == "tool_version"
            and approval.state in _CARRIED_OUT
            and dict(approval.arguments) == expected
            and approval.args_hash == approval_hash(expected, identity)
        ):
            raise Refused(
                f"the tool {version.name!r} is not what was approved: its code or its entry was changed. "
                "Retire it and hand it in again."
            )
        return identity.with_(user_id=approval.requested_by, agent_id=approval.agent_id)

    async def _require_no_halt(self, version: ToolVersion, identity: Identity) -> None:
        answer = await self._database.call(
            "reserve_execution", identity, the_tool=version.name, limit_key="", per_hour=None
        )
        if (halted := answer.get("halted")) is not None:
            raise Refused(f"{version.name} is stopped by {halted.get('by')}: {halted.get('reason')}")

    async def _is_new(self, version: ToolVersion, identity: Identity) -> bool:
        if self._strict_runs <= 0:
            return False
        rows = await self._database.call(
            "list_executions", identity, wanted={"tool": version.name, "state": "executed", "limit": 1000}
        )
        ran = sum(row["tool_version"] == str(version.version) for row in rows)
        return bool(ran < self._strict_runs)

    def _hosting(self, progress: _Progress) -> tuple[CallHost, list[HostFunction]]:
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
            return self._answered(result, progress)

        return call_host, granted

    async def _ended(
        self, progress: _Progress, result: SandboxResult, wait_seconds: float, *, resumed: str | None = None
    ) -> ToolRun:
        """What a run came to; a paused one is put away first, then waited for.

        Args:
            resumed: the approval after which it went on; `None`: it had not paused.
        """
        version = progress.tool
        if result.paused is not None:
            approval_id = result.paused.approval_id
            await self._put_away(progress, result.paused, wait_seconds, replaces=resumed)
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
        return _told(
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
        self, progress: _Progress, approval_id: str, entry: Mapping[str, Any], **ending: Any
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

    async def _put_away(
        self, progress: _Progress, snapshot: Snapshot, wait_seconds: float, *, replaces: str | None
    ) -> None:
        payload = json.dumps(progress.as_json() | {"snapshot": snapshot.as_json()})
        mac = (await self._seal()).of(
            payload,
            approval_id=snapshot.approval_id,
            code_hash=progress.tool.code_hash,
            tenant_id=progress.identity.tenant_id,
        )
        await self._database.call(
            "save_continuation",
            progress.identity,
            the_approval_id=snapshot.approval_id,
            payload=payload,
            mac=mac,
            wait_seconds=wait_seconds,
            replaces=replaces,
        )

    async def _taken(self, approval_id: str, identity: Identity) -> Mapping[str, Any] | None:
        taking = asyncio.ensure_future(
            self._database.call("take_continuation", identity, the_approval_id=approval_id)
        )
        try:
            kept: Mapping[str, Any] | None = await asyncio.shield(taking)
        except asyncio.CancelledError:
            with suppress(LearningError):
                if await taking is not None:
                    await self._put_back(approval_id, identity, asyncio.CancelledError())
            raise
        return kept

    async def _put_back(self, approval_id: str, identity: Identity, why: BaseException) -> None:
        """Give back what was taken and did not go on. Its call still runs once: the approval is claimed once."""
        for attempt in range(_PUT_BACK_ATTEMPTS):
            try:
                await self._database.call(
                    "release_continuation",
                    identity,
                    the_approval_id=approval_id,
                    error=f"{type(why).__name__}: {why}",
                )
            except DatabaseUnavailable:
                await asyncio.sleep(0.2 * 2**attempt)
            else:
                return
        emit("tool_continuation_lost", approval_id=approval_id)

    async def _opened(
        self, kept: Mapping[str, Any], approval: Approval, identity: Identity
    ) -> tuple[_Progress, Snapshot]:
        """A run as it was put away. The interpreter sees nothing of it before its seal is found whole.

        Raises:
            Refused: it was changed, belongs elsewhere, or its tool may not run any more.
        """
        not_ours = Refused(_NOT_OURS)
        try:
            said = json.loads(kept["payload"])
            name, number = str(said["tool"]), int(said["version"])
        except (KeyError, TypeError, ValueError, RecursionError):
            raise not_ours from None
        version = await self.version(identity, name, number)
        author = self.require_usable(version, identity, await self._approval_of(version, identity))
        seal = await self._seal()
        if not seal.holds(
            kept.get("mac"),
            kept["payload"],
            approval_id=approval.approval_id,
            code_hash=version.code_hash,
            tenant_id=identity.tenant_id,
        ):
            if seal is self._own_seal:
                raise OperatorError(
                    "the secret of the database is not known here, so no paused run can be checked"
                )
            emit("tool_continuation_refused", approval_id=approval.approval_id, tool=name)
            raise not_ours
        owner = Identity.from_json(said["identity"])
        if (owner.tenant_id, owner.user_id) != (identity.tenant_id, identity.user_id):
            raise not_ours
        progress = _Progress(
            tool=version,
            identity=owner,
            arguments=said["arguments"],
            run_key=said["run_key"],
            stricter=said["stricter"],
            author=author,
            calls=said["calls"],
            read_untrusted=said["read_untrusted"],
        )
        return progress, Snapshot.from_json(said["snapshot"])

    async def _ends_of(self, approval_id: str, identity: Identity) -> tuple[Approval, Approval]:
        """The approval as it was first asked for, and as it stands after people edited the call."""
        first = await self._queue.get(approval_id, identity)
        while first.replaces is not None:
            first = await self._queue.get(first.replaces, identity)
        last = first
        while last.replaced_by is not None:
            last = await self._queue.get(last.replaced_by, identity)
        return first, last

    async def _seal(self) -> ContinuationSeal:
        if self._made_seal is None:
            await self._database.prepare()
            if (secret := self._database.secret()) is None:
                return self._own_seal
            self._made_seal = ContinuationSeal(secret)
        return self._made_seal

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
                "arguments_shown": dict(arguments) if isinstance(arguments, Mapping) else None,
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

    def _answered(self, result: ExecutionResult, progress: _Progress) -> HostAnswer:
        """The answer to the code, remembering whether it holds text of strangers."""
        spec = self._executor.registry.get(result.tool)
        if result.ok and spec is not None and spec.untrusted:
            progress.read_untrusted = True
        return answer_of(result)


def _told(
    name: str,
    version: int,
    *,
    ok: bool,
    value: Any,
    error: str | None,
    log_id: str | None,
    read_untrusted: bool,
    printed: str = "",
) -> ToolRun:
    """A run that has ended."""
    return ToolRun(
        status="succeeded" if ok else "failed",
        tool=name,
        version=version,
        value=value,
        text=fenced(name, value) if ok else f"{name} failed.\n{fenced(name, {'error': error})}",
        error=error,
        log_id=log_id,
        printed=printed,
        read_untrusted=read_untrusted,
    )


def _tool_of(payload: Any) -> str:
    """The tool that a paused run says it is of."""
    try:
        return str(json.loads(payload)["tool"])[:200] or "paused run"
    except (KeyError, TypeError, ValueError, RecursionError):
        return "paused run"


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


def approval_hash(arguments: Mapping[str, Any], identity: Identity) -> str:
    """What the approval of a version is bound to; without the policy's version, since it must hold ever after."""
    return binding_hash(CREATE_NEW_TOOL, dict(arguments), tenant_id=identity.tenant_id)
