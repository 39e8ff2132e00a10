"""The one way by which a tool runs: validate, classify, count, ask, claim, run, log."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Coroutine, Iterable, Mapping
from dataclasses import replace
from datetime import timedelta
from functools import cached_property
from typing import TYPE_CHECKING, Any

from langgraph.errors import GraphBubbleUp

from agent.approval.records import Approval, ApprovalRequest
from agent.approval.risk import Risk
from agent.database.opening import open_database
from agent.errors import (
    ConfigurationError,
    DatabaseUnavailable,
    InvalidRequest,
    LearningError,
    Refused,
)
from agent.events import emit
from agent.execution.call_ending import CallEnding
from agent.execution.call_judging import judged, still_approved
from agent.execution.call_permits import CallPermits
from agent.execution.call_refusals import CallRefusals
from agent.execution.call_waiting import asked_earlier, asked_now, decided
from agent.execution.execution_policy import stricter
from agent.execution.execution_records import (
    Assessment,
    ExecutionResult,
    Permit,
    Status,
    call_key,
    call_of,
    failure_of,
    waiting,
)
from agent.execution.taint import around_tainted, gives_untrusted, read_untrusted, untrusted_names
from agent.execution.tool_registry import Appraisal, CallContext, ToolOutcome, ToolRegistry, ToolSpec
from agent.identity import Identity
from agent.settings import Settings, current_settings

if TYPE_CHECKING:
    from pydantic import BaseModel

    from agent.approval.human_approval import HumanApprovalQueue
    from agent.approval.policy_file import PolicyFile
    from agent.database.protocol import Database
    from agent.execution.sql_runner import SqlRunner
    from agent.execution.tool_library import ToolLibrary


class SafeExecutor:
    """Runs tools for agents: only what the policy allows, or what the right people said yes to, and each yes once.

    Works from any event loop. Nothing is opened before the first call.

    Args:
        database: where approvals and log are; `None`: the database of the settings.
        settings: `None`: the environment's.
        policy: who may approve and what tools may do; `None`: the policy file of the settings.
        queue: the approvals; `None`: a queue on this database.
        registry: the tools; `None`: those of `agent.execution.execution_tools`.
    """

    def __init__(
        self,
        database: Database | None = None,
        settings: Settings | None = None,
        policy: PolicyFile | None = None,
        queue: HumanApprovalQueue | None = None,
        registry: ToolRegistry | None = None,
    ) -> None:
        if database is not None and not callable(getattr(database, "call", None)):
            raise ConfigurationError(
                f"SafeExecutor: database must be an open Database, such as `open_database()` gives, or None; "
                f"it is {type(database).__name__}"
            )
        if settings is not None and not isinstance(settings, Settings):
            raise ConfigurationError(
                f"SafeExecutor: settings must be Settings or None; it is {type(settings).__name__}"
            )
        self._given_database = database
        self._given_settings = settings
        self._given_policy = policy
        self._given_queue = queue
        self._given_registry = registry
        self._taken_names: set[str] = set()

    @cached_property
    def settings(self) -> Settings:
        """The settings it works by."""
        return self._given_settings or current_settings()

    @cached_property
    def database(self) -> Database:
        """Where approvals and log are."""
        return self._given_database or open_database(self.settings)

    @cached_property
    def policy(self) -> PolicyFile:
        """Who may approve and what tools may do."""
        from agent.approval.policy_file import load_policy

        return (
            self._given_policy if self._given_policy is not None else load_policy(self.settings.policy_file)
        )

    @cached_property
    def queue(self) -> HumanApprovalQueue:
        """The approvals. Edits of calls are assessed anew by this executor."""
        from agent.approval.human_approval import HumanApprovalQueue

        queue = self._given_queue or HumanApprovalQueue(self.database, self.settings, self.policy)
        queue.reassess_with("execution", self.reassess)
        queue.reassess_with("action", self.reassess)
        queue.describe_with("execution", self.schema_of)
        return queue

    @cached_property
    def registry(self) -> ToolRegistry:
        """The tools it knows."""
        from agent.execution.execution_tools import default_tools

        return self._given_registry if self._given_registry is not None else ToolRegistry(default_tools(self))

    @cached_property
    def sql(self) -> SqlRunner:
        """Runs SQL with the agent's own logins."""
        from agent.execution.sql_runner import SqlRunner

        return SqlRunner(self.settings, self.policy)

    @cached_property
    def library(self) -> ToolLibrary:
        """The tools that agents wrote."""
        from agent.execution.tool_library import ToolLibrary

        return ToolLibrary(self.database, self.queue, executor=self)

    @cached_property
    def permits(self) -> CallPermits:
        """Gives the right to run a call."""
        return CallPermits(self.database, self.queue, self.policy, look_up=self.settings.recall_timeout)

    @cached_property
    def refusals(self) -> CallRefusals:
        """Enters calls that do not run."""
        return CallRefusals(self.database, self.registry)

    @cached_property
    def _ending(self) -> CallEnding:
        return CallEnding(self.database, self.queue, self.registry)

    async def aclose(self) -> None:
        """Give back connections; a call after it opens new ones. A database that was given, or that a machine of this
        process uses, stays open."""
        from agent.learning.machine import living_machines

        if "sql" in vars(self):
            await self.sql.aclose()
        in_use = any(machine.in_use and machine.database is self.database for machine in living_machines())
        if self._given_database is None and not in_use:
            await self.database.close()

    def somebody(self, identity: Identity | None) -> Identity:
        """The identity given, or that of the run around the caller, or the settings' own."""
        from agent.learning.run_watch import ambient_run, is_inside

        if identity is not None:
            return identity
        around = ambient_run.get()
        if around is not None and is_inside(around):
            return around.identity.with_(run_id=around.run_id)
        return Identity(tenant_id=self.settings.tenant, user_id=self.settings.default_user)

    def take_names(self, names: Iterable[str]) -> None:
        """Make known how the tools are called that an agent has besides those of the registry: no agent may write a
        tool of such a name."""
        self._taken_names.update(names)

    @property
    def taken_names(self) -> frozenset[str]:
        """Names that a tool written by an agent may not have."""
        return frozenset(self._taken_names).union(spec.name for spec in self.registry)

    # One call from beginning to end

    def execute(
        self,
        tool: str,
        args: Mapping[str, Any],
        *,
        require_approval: bool | None = None,
        identity: Identity | None = None,
        timeout: float | timedelta = 300,
        reason: str = "",
        tainted: bool = False,
        approval_id: str | None = None,
        request_key: str | None = None,
        wait: bool = True,
    ) -> Coroutine[Any, Any, ExecutionResult]:
        """Run a tool, after a person's yes where one is needed. Never raises for a refusal: see the result's `status`.

        Called by the code of a tool that an agent has called, it counts as tainted where the agent's run is, and what
        it reads of strangers taints that run.

        Args:
            tool: its name in the registry.
            args: its arguments; unknown names and other types are refused.
            require_approval: `True`: ask for all that changes something, even where a rule of the policy allows it.
                `False` and `None` leave it to the policy: an approval that is needed is never left out.
            identity: for whom; `None`: the run around the caller, else the settings' default user.
            timeout: longest wait for an approval in seconds. No answer is a no.
            reason: what the model says it is for; shown to people as a claim.
            tainted: whether the run has read untrusted text; then the call counts as one level more dangerous.
            approval_id: of an approval asked for earlier for this very call; then that is waited for.
            request_key: names this call: a second one under the same key never runs a second time.
            wait: `False`: where an approval is needed, ask for it and return at once; the result's `waits_for` names
                it, and `run_approved` runs the call once it is decided.
        """
        # Looked up here, because work that is handed to the portal leaves the caller's context behind.
        return self._tainting(
            read_untrusted.get(),
            untrusted_names.get(),
            tool,
            args,
            require_approval=require_approval,
            identity=identity,
            timeout=timeout,
            reason=reason,
            tainted=tainted or around_tainted.get(),
            approval_id=approval_id,
            request_key=request_key,
            wait=wait,
        )

    async def _tainting(
        self,
        around: list[bool] | None,
        names: frozenset[str],
        tool: str,
        args: Mapping[str, Any],
        *,
        tainted: bool,
        **options: Any,
    ) -> ExecutionResult:
        """A call inside another: taint goes in with it, and comes out of it."""
        tainted = tainted or bool(around and around[0])
        result = await self._execute(tool, args, tainted=tainted, **options)
        if around is not None and result.ran and gives_untrusted(tool, self.registry.get(tool), names):
            around[0] = True
        return result

    async def _execute(
        self,
        tool: str,
        args: Mapping[str, Any],
        *,
        require_approval: bool | None,
        identity: Identity | None,
        timeout: float | timedelta,
        reason: str,
        tainted: bool,
        approval_id: str | None,
        request_key: str | None,
        wait: bool,
    ) -> ExecutionResult:
        who = self.somebody(identity)
        call_id = request_key or secrets.token_hex(16)
        try:
            found = await self.assess(tool, args, who, tainted=tainted, tool_call_id=call_id)
        except InvalidRequest as error:
            return await self.refusals.turn_away(tool, args, who, "refused", str(error))
        except Refused as error:
            return await self.refusals.turn_away(tool, args, who, "denied", str(error))
        except LearningError as error:
            return await self.refusals.turn_away(tool, args, who, "failed", str(error), risk=Risk.WRITE)
        if require_approval is True and found.risk is not Risk.READ:
            found = replace(found, decision=stricter(found.decision, "ask"))
        if found.decision == "deny":
            status: Status = "refused" if found.risk is Risk.FORBIDDEN else "denied"
            return await self.refusals.turn_down(found, who, status, found.why)
        try:
            if found.decision == "allow" and found.risk is Risk.READ and approval_id is None:
                return await self.run(await self.permits.admit(found, who, reason=reason))
            seconds = timeout.total_seconds() if isinstance(timeout, timedelta) else float(timeout)
            if approval_id is None:
                asking = self.permits.propose(
                    found,
                    who,
                    request_key=call_key(None, None, call_id),
                    reason=reason,
                    expires_in_seconds=seconds if wait else None,
                )
                approval = await asked_now(asking, self.queue, who)
            else:
                approval = await asked_earlier(approval_id, found, self.queue, who)
            if approval.is_open and not wait:
                return waiting(approval)
            return await self.run_approved(await decided(approval, self.queue, who, seconds), who)
        except Refused as error:
            return await self.refusals.turn_down(found, who, "denied", str(error))
        except DatabaseUnavailable as error:
            emit("tool_call_unavailable", tool=tool, risk=str(found.risk), reason=str(error))
            return ExecutionResult(
                status="failed",
                tool=tool,
                risk=found.risk,
                error=str(error),
                text=f"{tool} was not executed: the database of approvals cannot be reached.",
            )
        except LearningError as error:
            return await self.refusals.turn_down(found, who, "failed", str(error))

    async def run_approved(self, approval: Approval, identity: Identity) -> ExecutionResult:
        """Run the call of a decided approval, if the answer was yes and nobody runs it already."""
        if approval.state != "approved":
            return await self.refusals.not_run(approval, identity)
        try:
            found = await self.approved_call(approval, identity)
            permit = await self.permits.admit(found, identity, approval)
        except LearningError as error:
            if isinstance(error, DatabaseUnavailable):
                raise
            turned = await self.refusals.turn_away(
                approval.tool,
                approval.arguments,
                identity,
                "refused",
                str(error),
                risk=approval.risk,
                approval_id=approval.approval_id,
            )
            return replace(turned, approval_id=approval.approval_id)
        return await self.run(permit)

    # The steps

    async def assess(
        self,
        tool: str,
        args: Mapping[str, Any],
        identity: Identity,
        tainted: bool = False,
        *,
        thread_id: str | None = None,
        tool_call_id: str | None = None,
        bounds: Mapping[str, Any] | None = None,
        measured: bool = True,
    ) -> Assessment:
        """What code says about this call of a registered tool: how dangerous it is, what the policy says, and what it
        would do.

        What it would do is measured last, and only of a call that may be asked for and is counted in its limits: for
        SQL that writes this runs it and takes it back.

        Args:
            bounds: of an approval that there is already; then nothing is tried and these hold.
            measured: `False`: leave out what it would do.

        Raises:
            InvalidRequest: unknown tool, or arguments that it does not take.
            Refused: before it was measured: the kill switch is on, or a limit is used up.
            LearningError: it cannot be tried, such as SQL that the database refuses.
        """
        spec = self.registry.get(tool)
        if spec is None:
            raise InvalidRequest(
                f"there is no tool {tool!r}; known are {', '.join(sorted(known.name for known in self.registry))}"
            )
        checked = spec.checked(args)
        context = CallContext(
            identity=identity,
            tainted=tainted,
            thread_id=thread_id,
            tool_call_id=tool_call_id,
            bounds=bounds or {},
        )
        appraisal = (
            Appraisal(risk=spec.risk) if isinstance(spec.risk, Risk) else await spec.risk(checked, context)
        )

        def judge(appraisal: Appraisal) -> Assessment:
            return judged(
                self.policy,
                appraisal,
                tool=spec.name,
                tool_version=spec.version,
                target=spec.target,
                kind=spec.kind,
                arguments=checked.model_dump(mode="json"),
                identity=identity,
                tainted=tainted,
                thread_id=thread_id,
                tool_call_id=tool_call_id,
                per_hour=spec.per_hour,
                rights=spec.needed_rights,
            )

        found = judge(appraisal)
        if spec.measure is None or not measured or appraisal.risk is Risk.READ or found.decision == "deny":
            return found
        counted = frozenset[str]() if bounds else await self.permits.count(found, identity)
        return replace(judge(await spec.measure(checked, context, appraisal)), counted=counted)

    async def approved_call(self, approval: Approval, identity: Identity) -> Assessment:
        """The call that an approval is for, assessed once more under the policy of now.

        Raises:
            Refused: it is more dangerous than what was approved, or forbidden, or not the same call any more.
        """
        thread_id, tool_call_id = call_of(approval.request_key)
        found = await self.assess(
            approval.tool,
            approval.arguments,
            identity,
            approval.tainted,
            thread_id=thread_id,
            tool_call_id=tool_call_id,
            bounds=approval.bounds or {},
        )
        return still_approved(found, approval)

    async def run(self, permit: Permit) -> ExecutionResult:
        """Run a registered tool with a permit, and enter it in the log."""
        found = permit.assessment
        spec = self.registry.get(found.tool)
        if spec is None:
            raise InvalidRequest(f"there is no tool {found.tool!r}")
        checked = spec.checked(found.arguments)
        context = CallContext(
            identity=permit.identity,
            tainted=found.tainted,
            thread_id=found.thread_id,
            tool_call_id=found.tool_call_id,
            reason=permit.reason,
            bounds=found.bounds,
            ticket=permit.ticket,
            entry=permit.entry,
        )
        outcome = ToolOutcome()
        try:
            for _ in range(2 if spec.idempotency == "idempotent" else 1):
                outcome = await _attempted(spec, checked, context)
                if not outcome.unsure:
                    break
        except GraphBubbleUp:
            await self.settle(
                permit, ToolOutcome(error="the tool paused in the middle of its work", unsure=True)
            )
            raise
        except asyncio.CancelledError:
            await asyncio.shield(
                self.settle(permit, ToolOutcome(error="it was cancelled while it ran", unsure=True))
            )
            raise
        return await self.settle(permit, outcome)

    async def settle(self, permit: Permit, outcome: ToolOutcome) -> ExecutionResult:
        """Enter how a call ended, and make its result."""
        return await self._ending.settle(permit, outcome)

    # Undo

    async def undo(self, log_id: int, *, identity: Identity) -> ExecutionResult:
        """Put back the rows that a logged write changed, on the word of a reviewer.

        Args:
            log_id: of the write, in the log.
            identity: tenant, and as user the name of the reviewer.

        Raises:
            NotFound: this tenant has no such entry.
            Refused: the reviewer may not, more people would have to agree, nothing was kept to undo it by, or the rows
                have changed since.
        """
        from agent.execution.undoing import undo

        return await undo(self, log_id, identity=identity)

    # Edits

    async def reassess(self, approval: Approval, arguments: Mapping[str, Any]) -> ApprovalRequest:
        """The request for an edited call: checked and classified like a new one, never less strict than the old.

        Raises:
            InvalidRequest: arguments that the tool does not take.
            Refused: what the edit makes of it is forbidden.
        """
        from agent.execution.call_editing import reassess

        return await reassess(self, approval, arguments)

    def schema_of(self, approval: Approval) -> Mapping[str, Any] | None:
        """JSON schema of the arguments of an approval's call, for a form; `None` for a tool not known here."""
        spec = self.registry.get(approval.tool)
        return None if spec is None else spec.arguments.model_json_schema()


async def _attempted(spec: ToolSpec, checked: BaseModel, context: CallContext) -> ToolOutcome:
    """What came of running a tool; what it raises is a failure, but for a pause of the graph."""
    try:
        return await spec.run(checked, context)
    except GraphBubbleUp:
        raise
    except Exception as error:  # noqa: BLE001 - a tool is foreign code: it fails alone, and that is entered
        return failure_of(error)


def __getattr__(name: str) -> Any:
    if name == "safe_executor":
        made = globals()["safe_executor"] = SafeExecutor()
        return made
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


if TYPE_CHECKING:
    safe_executor: SafeExecutor
