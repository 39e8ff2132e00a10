"""Tools that agents write: handed in, tried, approved by a person, run in the sandbox, resumed after approvals.

A tool can do no more than its author: all that its code reaches are tools of the executor, each call of which is
assessed, asked for and logged as if the agent had made it. No tool makes tools.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

from agent.approval.binding import shown
from agent.approval.records import Approval
from agent.approval.risk import Risk
from agent.errors import ConflictError, InvalidRequest, LearningError, NotFound, Refused
from agent.events import emit
from agent.execution.argument_schema import same_json
from agent.execution.call_judging import judged, request_for, require_rights
from agent.execution.call_permits import running_permit
from agent.execution.execution_records import Permit
from agent.execution.host_function import HostAnswer, HostFunction
from agent.execution.taint import around_tainted, gives_untrusted, read_untrusted, untrusted_names
from agent.execution.tool_definition import (
    WRITING_TOOLS,
    ToolDefinition,
    ToolVersion,
    as_kept,
    code_hash,
    is_storable,
)
from agent.execution.tool_hosting import answer_of, host_functions
from agent.execution.tool_registry import Appraisal
from agent.execution.tool_run import ToolRun
from agent.execution.tool_running import ToolRunner
from agent.execution.tool_sandbox import ToolSandbox
from agent.execution.usable_tools import CREATE_NEW_TOOL, CREATE_RIGHTS, approval_hash
from agent.identity import Identity
from agent.portal import portal

if TYPE_CHECKING:
    from langchain_core.tools import BaseTool

    from agent.approval.human_approval import HumanApprovalQueue
    from agent.database.protocol import Database
    from agent.execution.safe_executor import SafeExecutor

__all__ = ["CREATE_NEW_TOOL", "CREATE_RIGHTS", "ToolLibrary", "ToolRun"]

_SHOWN_CHARACTERS_MAX = 300
_AT_ONCE = 1_000  # approvals that are read in one call
_sandbox_of_process = cache(ToolSandbox)


class ToolLibrary:
    """The tools that agents of a tenant have written. Works from any event loop.

    Args:
        database: where tools and paused runs are kept.
        queue: the approvals of new versions and of calls.
        executor: whose tools the code may call.
        sandbox: where the code runs; `None`: the sandbox of this process.
        strict_runs: for so many first runs of a version its calls count as one level more dangerous than they are.
        wait_seconds: how long a run waits for the approval of a call before it is put away.
    """

    def __init__(
        self,
        database: Database,
        queue: HumanApprovalQueue,
        *,
        executor: SafeExecutor,
        sandbox: ToolSandbox | None = None,
        strict_runs: int = 3,
        wait_seconds: float = 300,
    ) -> None:
        self._database = database
        self._queue = queue
        self._executor = executor
        self._sandbox = sandbox or _sandbox_of_process()
        self._runner = ToolRunner(
            database,
            queue,
            executor=executor,
            sandbox=self._sandbox,
            strict_runs=strict_runs,
            wait_seconds=wait_seconds,
            activate=self.activate_approved,
        )

    # What there is

    def host_functions(self) -> list[HostFunction]:
        """The executor's tools that code may call."""
        return host_functions(self._executor.registry)

    def guide(self) -> str:
        """How to write a tool, for the description of `create_new_tool`."""
        functions = "\n".join(
            f"- {function.signature}: {function.description.strip().partition(chr(10))[0]}"
            for function in self.host_functions()
        )
        return WRITING_TOOLS.format(functions=functions or "- none", examples_max=10)

    async def versions(self, identity: Identity, *, state: str | None = None) -> list[ToolVersion]:
        """All versions of the tenant's tools, by name, newest first; or those in one state. What was approved meanwhile
        is let run first."""
        await self.activate_approved(identity)
        rows = await self._database.call("list_tools", identity, wanted={"state": state} if state else {})
        return [ToolVersion.from_row(row) for row in rows]

    async def version(self, identity: Identity, name: str, version: int | None = None) -> ToolVersion:
        """One version of a tool; without a number the approved one, else the newest.

        Raises:
            NotFound: there is none.
        """
        return await self._runner.usable.version(identity, name, version)

    async def retire(self, identity: Identity, name: str, *, version: int | None = None, by: str) -> int:
        """Take a version, or all of them, out of use. How many were in use or drafts."""
        retired = int(
            await self._database.call("retire_tool", identity, tool_name=name, version=version, by=by)
        )
        if retired:
            emit("tool_retired", tool=name, version=version, by=by, **identity.as_json())
        return retired

    # From a draft to a tool

    async def create(
        self,
        name: str,
        description: str,
        code: str,
        parameters: Mapping[str, Any],
        examples: Sequence[Mapping[str, Any]],
        identity: Identity,
        *,
        reason: str = "",
    ) -> ToolVersion:
        """Check a new tool, run its examples, keep it as a draft and ask for approval of it.

        The same tool handed in again is the same version, and the same question.

        Returns:
            The version, with the approval that it waits for; `state` says whether it may run already.

        Raises:
            InvalidRequest: the code, the parameters or an example are wrong; for whoever wrote them.
            Refused: its author lacks a right that it needs, nobody may approve it, or somebody has rejected it.
        """
        definition = ToolDefinition.checked(
            name=name,
            description=description,
            code=code,
            parameters=parameters,
            examples=list(examples) if isinstance(examples, list | tuple) else examples,
            taken=sorted(self._executor.taken_names),
        )
        require_rights(self._executor.policy, CREATE_NEW_TOOL, CREATE_RIGHTS, identity)
        functions = self.host_functions()
        check = await self._sandbox.check(definition.code, definition.parameters, functions)
        if check.problems:
            raise InvalidRequest("the code does not pass the check:\n" + "\n".join(check.problems))
        granted = [function for function in functions if function.name in check.capabilities]
        self._runner.usable.require_rights(definition.name, check.capabilities, identity)
        results = [
            await self._tried(definition, example, number, granted, identity)
            for number, example in enumerate(definition.examples, 1)
        ]
        content: dict[str, Any] = {
            "name": definition.name,
            "description": definition.description,
            "code": definition.code,
            "parameters": definition.parameters,
            "examples": definition.examples,
            "example_results": as_kept(results),
            "capabilities": list(check.capabilities),
        }
        hashed = code_hash(**content)
        author = ", ".join(
            f"{label} {value}"
            for label, value in (
                ("user", identity.user_id),
                ("agent", identity.agent_id),
                ("run", identity.run_id),
            )
            if value
        )
        saved = await self._database.call(
            "save_tool_version",
            identity,
            tool={**content, "code_hash": hashed, "author": author or "nobody named"},
        )
        kept = await self.version(identity, definition.name, int(saved["version"]))
        if kept.state == "retired":
            raise Refused(
                f"exactly this tool was version {kept.version} of {kept.name} and was taken out of use. "
                "Hand in other code."
            )
        if kept.state != "draft":
            return kept
        approval = await self._asked(kept, identity, reason)
        emit("tool_version_saved", tool=kept.name, version=kept.version, approval_id=approval.approval_id)
        if approval.state == "rejected":
            note = f": {shown(approval.note)}" if approval.note else ""
            raise Refused(
                f"this tool was rejected by {', '.join(approval.decided_by)}{note}. Do not hand it in again."
            )
        if approval.state == "approved":
            await self.activate(approval, identity)
            return await self.version(identity, kept.name, kept.version)
        return replace(kept, approval_id=approval.approval_id)

    async def wait_for(self, version: ToolVersion, identity: Identity, timeout: float) -> ToolVersion:
        """The version when its approval is decided, or as it is after so many seconds; approved it may run."""
        if version.approval_id is not None and version.state == "draft":
            approval = await self._queue.wait(version.approval_id, identity, timeout)
            if approval.state == "approved":
                await self.activate(approval, identity)
            return replace(
                await self.version(identity, version.name, version.version), approval_id=approval.approval_id
            )
        return version

    async def activate(self, approval: Approval, identity: Identity) -> bool:
        """Let a version run whose approval was given. Whether it was this call that did."""
        claimed = await self._queue.claim(
            approval.approval_id, identity, args_hash=approval.args_hash, claimed_by=secrets.token_hex(8)
        )
        if not claimed.get("claimed"):
            return False
        ticket = str(claimed["ticket"])
        entry: dict[str, Any] = {
            "state": "executed",
            "tool": CREATE_NEW_TOOL,
            "tool_version": approval.tool_version,
            "risk": str(Risk.WRITE),
            "decision": "approved",
            "approval_id": approval.approval_id,
            "arguments_shown": approval.arguments_shown,
            "arguments_run": approval.arguments,
        }
        try:
            await self._database.call(
                "approve_tool_version",
                identity,
                ticket=ticket,
                tool_name=str(approval.arguments["name"]),
                version=int(approval.arguments["version"]),
                code_hash=str(approval.arguments["code_hash"]),
            )
        except LearningError as error:
            await self._queue.finish(ticket, identity, entry | {"state": "failed", "error": str(error)})
            raise
        await self._queue.finish(ticket, identity, entry)
        emit(
            "tool_approved",
            tool=approval.arguments["name"],
            version=approval.arguments["version"],
            by=list(approval.decided_by),
        )
        return True

    async def activate_approved(self, identity: Identity, name: str | None = None) -> int:
        """Let all versions of the tenant run whose approvals were given meanwhile, or those of one tool. How many."""
        count = 0
        for approval in await self._queue.list(identity, state="approved", limit=1000):
            if approval.kind != "tool_version" or name not in (None, approval.arguments.get("name")):
                continue
            try:
                count += await self.activate(approval, identity)
            except (
                InvalidRequest,
                Refused,
                ConflictError,
                NotFound,
            ) as error:  # this one cannot be; the others can
                emit("tool_version_refused", approval_id=approval.approval_id, reason=str(error))
        return count

    # For agents

    async def tools(self, identity: Identity) -> list[BaseTool]:
        """The approved tools that the agent has the rights for, to be given to a run when it starts."""
        found = []
        versions = await self.versions(identity, state="approved")
        ids = [version.approval_id for version in versions if version.approval_id is not None]
        approvals = {
            approval.approval_id: approval
            for place in range(0, len(ids), _AT_ONCE)
            for approval in await self._queue.list(
                identity, approval_ids=ids[place : place + _AT_ONCE], limit=_AT_ONCE
            )
        }
        for version in versions:
            try:
                self._runner.usable.require_usable(
                    version, identity, approvals.get(version.approval_id or "")
                )
            except Refused as error:
                emit("tool_version_refused", approval_id=version.approval_id, reason=str(error))
                continue
            found.append(self._as_langchain(version, identity))
        return found

    def _as_langchain(self, version: ToolVersion, identity: Identity) -> BaseTool:
        from langchain_core.tools import StructuredTool

        def ran(arguments: Mapping[str, Any]) -> Coroutine[Any, Any, ToolRun]:
            return self.run(version.name, arguments, identity, permit=running_permit.get())

        async def run(**arguments: Any) -> str:
            return (await ran(arguments)).text

        def run_sync(**arguments: Any) -> str:
            return portal().run_sync(ran(arguments)).text

        return StructuredTool(
            name=version.name,
            description=f"{version.description}\n(Written by an agent, version {version.version}.)",
            args_schema=dict(version.parameters),
            func=run_sync,
            coroutine=run,
            metadata={
                "written_by": version.author,
                "version": version.version,
                "code_hash": version.code_hash,
            },
        )

    def run(
        self,
        name: str,
        arguments: Mapping[str, Any],
        identity: Identity,
        *,
        tainted: bool = False,
        wait_seconds: float | None = None,
        permit: Permit | None = None,
    ) -> Coroutine[Any, Any, ToolRun]:
        """Run the approved version of a tool. Raises neither for a refusal nor for a database that is away: see the
        status.

        A run is counted in the limit of the rule that fits the tool, and refused where that rule asks for a person's
        yes: `SafeToolsMiddleware` and `safe_tools` ask for one.

        Args:
            tainted: whether the agent has read untrusted text; then the tool's calls count as one level more dangerous.
            wait_seconds: longest wait for the approval of a call; after it the run is put away, and `resume` goes on.
                `None`: that of the library.
            permit: of the executor for this call, which was asked for and counted; `None`: there is none.
        """
        # Looked up here: see `SafeExecutor.execute`.
        inside, names = read_untrusted.get(), untrusted_names.get()
        tainted = tainted or around_tainted.get() or bool(inside and inside[0])
        options: dict[str, Any] = {"untrusted": names, "wait_seconds": wait_seconds, "permit": permit}

        async def run() -> ToolRun:
            ran = await self._runner.run(name, arguments, identity, tainted=tainted, **options)
            if inside is not None and ran.read_untrusted:
                inside[0] = True
            return ran

        return run()

    async def resume(
        self, approval_id: str, identity: Identity, *, wait_seconds: float | None = None
    ) -> ToolRun:
        """Go on with a run that was put away when it waited for this approval, in this or another process.

        Raises:
            ConflictError: the approval is not decided yet.
            NotFound: no run waits for it, or another process has gone on with it.
            Refused: what was put away is not what comes back, or belongs to somebody else.
        """
        return await self._runner.resume(approval_id, identity, wait_seconds=wait_seconds)

    async def result(self, approval_id: str, identity: Identity) -> ToolRun | None:
        """How a run ended that went on after this approval, in this or another process; `None`: it has not, it was not
        this user's, or it was more than 7 days ago.

        Raises:
            NotFound: there is no such approval.
        """
        return await self._runner.result(approval_id, identity)

    # Inside

    async def _tried(
        self,
        definition: ToolDefinition,
        example: Mapping[str, Any],
        number: int,
        granted: Sequence[HostFunction],
        identity: Identity,
    ) -> dict[str, Any]:
        """What an example gives.

        Raises:
            InvalidRequest: it fails, or gives something else than it says.
        """
        recorded = list(example.get("host_results", []))
        # Looked up here: see `SafeExecutor.execute`. What an example read is told, where it is not what was expected.
        around, tainted, names = read_untrusted.get(), around_tainted.get(), untrusted_names.get()

        async def call_host(name: str, arguments: dict[str, Any]) -> HostAnswer:
            if recorded:
                answer = recorded.pop(0)
                if answer["function"] != name:
                    return HostAnswer(
                        error=f"the code calls {name}() where host_results has {answer['function']}()"
                    )
                return HostAnswer(value=answer["result"])
            try:
                found = await self._executor.assess(name, arguments, identity, tainted, measured=False)
            except LearningError as error:
                return HostAnswer(error=str(error))
            if found.risk is not Risk.READ or found.decision != "allow":
                return HostAnswer(
                    error=f"{name}() is not called in examples unless it only reads; give its answer in host_results"
                )
            result = await self._executor.execute(
                name, arguments, identity=identity, tainted=tainted, reason="an example of a new tool"
            )
            if (
                around is not None
                and result.ran
                and gives_untrusted(name, self._executor.registry.get(name), names)
            ):
                around[0] = True
            return answer_of(result)

        result = await self._sandbox.run(
            definition.code, example["arguments"], call_host, host_functions=granted
        )
        if result.status != "done":
            raise InvalidRequest(f"example {number} failed: {result.error}")
        if not is_storable(result.value):
            raise InvalidRequest(
                f"example {number} returns a NUL, half a character or a number of 2**53 or more; "
                "return it as other text"
            )
        if "result" in example and not same_json(result.value, example["result"]):
            raise InvalidRequest(
                f"example {number} gives {_short(result.value)}, not {_short(example['result'])}"
            )
        return {"arguments": example["arguments"], "result": result.value, "host_calls": result.host_calls}

    async def _asked(self, version: ToolVersion, identity: Identity, reason: str) -> Approval:
        """The approval of this version: asked for, or as it stands."""
        arguments = {"name": version.name, "version": version.version, "code_hash": version.code_hash}
        may = ", ".join(version.capabilities) or "nothing"
        found = judged(
            self._executor.policy,
            Appraisal(
                risk=Risk.WRITE,
                shown=version.as_shown(),
                summary=f"Let agents use the new tool {version.name}, version {version.version}, which may call: {may}",
            ),
            tool=CREATE_NEW_TOOL,
            tool_version="1",
            target="",
            kind="execution",
            arguments=arguments,
            identity=identity,
            tainted=False,
            thread_id=None,
            tool_call_id=None,
            rights=CREATE_RIGHTS,
        )
        if found.decision == "deny":
            raise Refused(f"no new tool can be made: {found.why}")
        if len(found.approvers) < found.required_votes:
            raise Refused("no new tool can be made: the policy file names too few people who may approve it")
        key = f"tool_version:{version.name}:{version.version}:{identity.user_id or ''}"
        request = replace(
            # A rule may allow calls, but never that code of an agent becomes a tool.
            request_for(
                self._executor.policy, replace(found, decision="ask"), request_key=key, reason=reason
            ),
            kind="tool_version",
            args_hash=approval_hash(arguments, identity),
            fingerprint=None,
            policy_version=None,
        )
        approval = await self._queue.submit(request, identity)
        while approval.state in ("expired", "cancelled", "failed", "unknown"):
            # The key names what it follows: handing in again is the same question, and a no to it stays a no.
            again = replace(request, request_key=f"{key}:after:{approval.approval_id}")
            approval = await self._queue.submit(again, identity)
        return approval


def _short(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)[:_SHOWN_CHARACTERS_MAX]
