"""The one way by which a tool runs: validate, classify, count, ask, claim, run, log."""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import time
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from datetime import timedelta
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final, Literal

from langgraph.errors import GraphBubbleUp

from agent.approval.binding import binding_hash, canonical_json, shown
from agent.approval.records import Approval, ApprovalRequest
from agent.approval.risk import Risk
from agent.database.opening import open_database
from agent.errors import (
    ConfigurationError,
    ConflictError,
    DatabaseUnavailable,
    InvalidRequest,
    LearningError,
    Refused,
)
from agent.events import emit
from agent.execution.call_report import report_call, report_wait
from agent.execution.execution_policy import lacking, rule_on, stricter, why_lacking
from agent.execution.execution_records import (
    Assessment,
    ExecutionResult,
    Permit,
    Status,
    call_key,
    call_of,
    failure_of,
    not_approved,
    told,
    waiting,
)
from agent.execution.result_text import as_recorded, fenced, inert
from agent.execution.tool_registry import Appraisal, CallContext, ToolOutcome, ToolRegistry, ToolSpec
from agent.identity import Identity
from agent.portal import portal
from agent.settings import Settings, current_settings

if TYPE_CHECKING:
    from pydantic import BaseModel

    from agent.approval.human_approval import HumanApprovalQueue
    from agent.approval.policy_file import PolicyFile
    from agent.database.protocol import Database
    from agent.execution.sql_runner import SqlRunner
    from agent.execution.tool_library import ToolLibrary

_FINISH_ATTEMPTS: Final = 4
_EXPIRY_SECONDS_MIN: Final = 1.0
_ENDINGS: Final[Mapping[str, Status]] = {"executed": "succeeded", "failed": "failed"}


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
        from agent.execution.call_gate import around_tainted, read_untrusted

        # Looked up here, because work that is handed to the portal leaves the caller's context behind.
        return self._tainting(
            read_untrusted.get(),
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
        self, around: list[bool] | None, tool: str, args: Mapping[str, Any], *, tainted: bool, **options: Any
    ) -> ExecutionResult:
        """A call inside another: taint goes in with it, and comes out of it."""
        tainted = tainted or bool(around and around[0])
        result = await self._execute(tool, args, tainted=tainted, **options)
        spec = self.registry.get(tool)
        ran = result.status in ("succeeded", "failed", "unknown")
        if around is not None and spec is not None and spec.untrusted and ran:
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
            return await self.turn_away(tool, args, who, "refused", str(error))
        except Refused as error:
            return await self.turn_away(tool, args, who, "denied", str(error))
        except LearningError as error:
            return await self.turn_away(tool, args, who, "failed", str(error), risk=Risk.WRITE)
        if require_approval is True and found.risk is not Risk.READ:
            found = replace(found, decision=stricter(found.decision, "ask"))
        if found.decision == "deny":
            status: Status = "refused" if found.risk is Risk.FORBIDDEN else "denied"
            return await self.turn_down(found, who, status, found.why)
        try:
            if found.decision == "allow" and found.risk is Risk.READ and approval_id is None:
                return await self.run(await self.admit(found, who, reason=reason))
            seconds = timeout.total_seconds() if isinstance(timeout, timedelta) else float(timeout)
            if approval_id is None:
                asking = portal().submit(
                    self.propose(
                        found,
                        who,
                        request_key=call_key(None, None, call_id),
                        reason=reason,
                        expires_in_seconds=seconds if wait else None,
                    )
                )
                try:
                    approval = await asyncio.shield(asyncio.wrap_future(asking))
                except asyncio.CancelledError:  # what is asked by now must not go on asking
                    asking.add_done_callback(lambda asked: self._forsake_asked(asked, who))
                    raise
            else:
                approval = await self._asked_earlier(approval_id, found, who)
            if approval.is_open and not wait:
                return waiting(approval)
            return await self._run_when_approved(approval, who, seconds)
        except Refused as error:
            return await self.turn_down(found, who, "denied", str(error))
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
            return await self.turn_down(found, who, "failed", str(error))

    async def _asked_earlier(self, approval_id: str, found: Assessment, identity: Identity) -> Approval:
        """An approval that was asked for before, if it was for this call."""
        approval = await self.queue.get(approval_id, identity)
        if approval.tool != found.tool or canonical_json(approval.arguments) != canonical_json(
            found.arguments
        ):
            raise Refused("the approval is for another call")
        return approval

    async def _run_when_approved(
        self, approval: Approval, identity: Identity, seconds: float
    ) -> ExecutionResult:
        deadline = time.monotonic() + seconds
        while True:
            if approval.is_open:
                left = max(0.0, deadline - time.monotonic())
                try:
                    approval = await self.queue.wait(approval.approval_id, identity, left)
                except asyncio.CancelledError:  # nobody waits any more, so nobody need be asked
                    portal().submit(self._forsake(approval.approval_id, identity))
                    raise
            if approval.is_open:
                approval = await self.queue.cancel(approval.approval_id, identity, state="expired")
            if approval.replaced_by is None:
                break
            approval = await self.queue.get(approval.replaced_by, identity)
        return await self.run_approved(approval, identity)

    def _forsake_asked(self, asked: Future[Approval], identity: Identity) -> None:
        if not asked.cancelled() and asked.exception() is None:
            portal().submit(self._forsake(asked.result().approval_id, identity))

    async def _forsake(self, approval_id: str, identity: Identity) -> None:
        with contextlib.suppress(LearningError):  # the clock will expire it
            await self.queue.cancel(approval_id, identity)

    async def run_approved(self, approval: Approval, identity: Identity) -> ExecutionResult:
        """Run the call of a decided approval, if the answer was yes and nobody runs it already."""
        if approval.state != "approved":
            return await self.not_run(approval, identity)
        try:
            found = await self.approved_call(approval, identity)
            permit = await self.admit(found, identity, approval)
        except LearningError as error:
            if isinstance(error, DatabaseUnavailable):
                raise
            turned = await self.turn_away(
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

        def judged(appraisal: Appraisal) -> Assessment:
            return self.judged(
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

        found = judged(appraisal)
        if spec.measure is None or not measured or appraisal.risk is Risk.READ or found.decision == "deny":
            return found
        counted = frozenset[str]() if bounds else await self._reserve(found, identity)
        return replace(judged(await spec.measure(checked, context, appraisal)), counted=counted)

    def judged(
        self,
        appraisal: Appraisal,
        *,
        tool: str,
        tool_version: str,
        target: str,
        kind: Literal["execution", "action"],
        arguments: Mapping[str, Any],
        identity: Identity,
        tainted: bool,
        thread_id: str | None,
        tool_call_id: str | None,
        per_hour: int | None = None,
        rights: Sequence[str] | None = None,
    ) -> Assessment:
        """What the policy says about a call that its tool has appraised. Pure.

        Args:
            rights: that its tool needs; `None`: the right of the tool's name.
        """
        risk = appraisal.risk.stricter if tainted else appraisal.risk
        ruling = rule_on(
            self.policy.rules,
            tool=tool,
            agent_id=identity.agent_id,
            tenant_id=identity.tenant_id,
            risk=risk,
        )
        decision, why = ruling.decision, appraisal.why or ruling.why
        if appraisal.forbidden_because is not None:
            decision, why = "deny", appraisal.forbidden_because
        elif risk is Risk.FORBIDDEN and appraisal.risk is not Risk.FORBIDDEN:
            why = "the run has read untrusted text, after which what is DESTRUCTIVE is FORBIDDEN"
        elif decision == "deny":
            why = appraisal.why if risk is Risk.FORBIDDEN and appraisal.why else ruling.why
        needed = ((tool,) if rights is None else tuple(rights)) + tuple(appraisal.rights)
        if risk is not Risk.FORBIDDEN and (missing := self._lacking(needed, identity)):
            decision = "deny"
            why = why_lacking(tool, missing, agent_id=identity.agent_id, tenant_id=identity.tenant_id)
        approvers = self._approvers(identity, risk)
        votes = self.policy.approval.votes(risk)
        if decision == "ask" and len(approvers) < votes:
            decision = "deny"
            why = (
                f"{votes} {'person' if votes == 1 else 'people'} would have to approve it, and the policy file names "
                f"{len(approvers)} who may"
            )
        return Assessment(
            tool=tool,
            tool_version=tool_version,
            kind=kind,
            risk=risk,
            decision=decision,
            why=why,
            arguments=arguments,
            arguments_shown=dict(appraisal.shown) if appraisal.shown is not None else dict(arguments),
            args_hash=binding_hash(
                tool,
                arguments,
                version=tool_version,
                tenant_id=identity.tenant_id,
                target=target,
                thread_id=thread_id,
                tool_call_id=tool_call_id,
                bounds=dict(appraisal.bounds),
                policy_version=self.policy.version,
            ),
            effects=dict(appraisal.effects),
            bounds=dict(appraisal.bounds),
            fingerprint=appraisal.fingerprint,
            tables=tuple(appraisal.tables),
            rows=appraisal.rows,
            summary=appraisal.summary or f"{tool}({', '.join(sorted(arguments))})",
            per_hour=per_hour,
            rule_per_hour=ruling.per_hour,
            counted_agent=(identity.agent_id or "") if ruling.per_agent else None,
            rights=needed,
            rule=ruling.rule,
            approvers=approvers,
            required_votes=votes,
            tainted=tainted,
            thread_id=thread_id,
            tool_call_id=tool_call_id,
        )

    def _lacking(self, rights: Iterable[str], identity: Identity) -> list[str]:
        return lacking(self.policy.grants, rights, agent_id=identity.agent_id, tenant_id=identity.tenant_id)

    def require_rights(self, tool: str, rights: Iterable[str], identity: Identity) -> None:
        """Nothing, if the policy grants these rights to tenant and agent.

        Raises:
            Refused: it does not.
        """
        if missing := self._lacking(rights, identity):
            raise Refused(
                why_lacking(tool, missing, agent_id=identity.agent_id, tenant_id=identity.tenant_id)
            )

    def _approvers(self, identity: Identity, risk: Risk) -> list[str]:
        """Who may decide on a call of this risk, without whom the call is for."""
        reviewers = self.policy.reviewers
        return [
            reviewer.name
            for reviewer in reviewers
            if reviewer.may_decide(identity.tenant_id, risk) and not reviewer.is_user(identity.user_id)
        ]

    async def propose(
        self,
        found: Assessment,
        identity: Identity,
        *,
        request_key: str,
        batch_id: str | None = None,
        held: bool = False,
        reason: str = "",
        expires_in_seconds: float | None = None,
    ) -> Approval:
        """Ask for an approval of this call, or enter the yes of a rule; the same key gives the same approval.

        Raises:
            Refused: the kill switch is on or the budget is used up.
            ConflictError: another call was asked for under this key.
        """
        await self._reserve(found, identity)
        request = self.request_for(found, request_key=request_key, batch_id=batch_id, reason=reason)
        if expires_in_seconds is not None:
            seconds = max(
                _EXPIRY_SECONDS_MIN, min(expires_in_seconds, request.expires_in_seconds or expires_in_seconds)
            )
            request = replace(request, expires_in_seconds=seconds, escalate_in_seconds=seconds / 3)
        return await self.queue.submit(replace(request, held=held), identity)

    def request_for(
        self, found: Assessment, *, request_key: str, batch_id: str | None = None, reason: str = ""
    ) -> ApprovalRequest:
        """The request for an approval of this call."""
        seconds = self.policy.approval.ttl_seconds(found.risk)
        return ApprovalRequest(
            request_key=request_key,
            kind=found.kind,
            tool=found.tool,
            tool_version=found.tool_version,
            arguments=dict(found.arguments),
            arguments_shown=found.arguments_shown,
            args_hash=found.args_hash,
            risk=found.risk,
            summary=found.summary,
            reason=shown(reason),
            effects=dict(found.effects),
            bounds=dict(found.bounds),
            approvers=list(found.approvers),
            required_votes=found.required_votes,
            expires_in_seconds=seconds,
            escalate_in_seconds=seconds / 3,
            batch_id=batch_id,
            fingerprint=found.fingerprint,
            tables=list(found.tables),
            rows=found.rows,
            tainted=found.tainted,
            policy_version=self.policy.version,
            approved_by=f"policy:{found.rule}" if found.decision == "allow" and found.rule else None,
        )

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
        return self.still_approved(found, approval)

    def still_approved(self, found: Assessment, approval: Approval) -> Assessment:
        """The assessment, where the approval covers it.

        Raises:
            Refused: it does not.
        """
        if found.args_hash != approval.args_hash:
            raise Refused(
                "the call, its tool or the policy file has changed since it was approved; propose it again"
            )
        approved = approval.risk
        if found.risk is Risk.FORBIDDEN or found.risk.rank > approved.rank:
            raise Refused(f"the call counts as {found.risk} now, and was approved as {approved}")
        if found.decision == "deny":
            raise Refused(found.why)
        return replace(found, risk=approved)

    async def admit(
        self, found: Assessment, identity: Identity, approval: Approval | None = None, *, reason: str = ""
    ) -> Permit:
        """The right to run this call once: counted where nothing was asked, claimed where something was.

        Raises:
            Refused: the kill switch is on, the budget is used up, the approval is not for this call, or somebody else
                has claimed it.
        """
        if approval is None:
            if found.decision != "allow" or found.risk is not Risk.READ:
                raise Refused(f"{found.tool} is {found.risk}: it runs with an approval only")
            await self._reserve(found, identity)
            return Permit(assessment=found, identity=identity, reason=reason)
        if (approval.tool, approval.args_hash) != (found.tool, found.args_hash):
            raise Refused("the approval is for another call")
        claimed = await self.queue.claim(
            approval.approval_id, identity, args_hash=found.args_hash, claimed_by=secrets.token_hex(8)
        )
        if not claimed.get("claimed"):
            raise Refused(f"{claimed.get('why')}; an approval is good for one run")
        return Permit(
            assessment=found,
            identity=identity,
            approval=approval,
            ticket=str(claimed["ticket"]),
            reason=approval.reason,
        )

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
        spec = self.registry.get(found.tool)
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
                    receipt = await self.database.call("record_execution", permit.identity, entry=dict(entry))
                    return str(receipt["log_id"]), str(entry["state"])
                receipt = await self.queue.finish(permit.ticket, permit.identity, entry)
                return str(receipt["log_id"]), str(receipt["state"])
            except DatabaseUnavailable:
                if attempt == _FINISH_ATTEMPTS - 1:
                    raise
                await asyncio.sleep(0.2 * 2**attempt)
            except ConflictError:
                if permit.approval is None:
                    raise
                approval = await self.queue.get(permit.approval.approval_id, permit.identity)
                return str(approval.log_id), approval.state
        raise AssertionError("unreachable")

    async def not_run(self, approval: Approval, identity: Identity) -> ExecutionResult:
        """Enter that a call does not run because of the state of its approval, and say so; of a keyed tool's call that
        ran, give the result that was recorded."""
        if (before := await self._recorded(approval, identity)) is not None:
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

    async def _recorded(self, approval: Approval, identity: Identity) -> ExecutionResult | None:
        """What a keyed tool's call gave when it ran, for the one who asked for it; `None`: it is not known, or not
        theirs."""
        spec = self.registry.get(approval.tool)
        if approval.state != "executed" or spec is None or spec.idempotency != "keyed":
            return None
        kept = await self.database.call("get_execution_result", identity, the_key=approval.approval_id)
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
            "arguments_shown": arguments_shown if arguments_shown is not None else arguments,
            "arguments_run": None,
            "error": why,
        }
        log_id = None
        try:
            log_id = str((await self.database.call("record_execution", identity, entry=entry))["log_id"])
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

    async def _reserve(self, found: Assessment, identity: Identity) -> frozenset[str]:
        """Count this call in the limit of its tool and in that of its rule, once, unless the kill switch is on or one
        of them is used up. Returns where it is counted.

        Raises:
            Refused: the kill switch is on, or a limit is used up.
        """
        limits = [(found.tool, found.per_hour)]
        if found.rule is not None and found.rule_per_hour is not None:
            of_agent = "" if found.counted_agent is None else f":agent:{found.counted_agent}"
            limits.insert(0, (f"rule:{found.rule}:{found.tool}{of_agent}", found.rule_per_hour))
        for key, per_hour in limits:
            answer = await self.database.call(
                "reserve_execution",
                identity,
                the_tool=found.tool,
                limit_key=key,
                per_hour=None if key in found.counted else per_hour,
            )
            if (halted := answer.get("halted")) is not None:
                raise Refused(f"{found.tool} is stopped by {halted.get('by')}: {halted.get('reason')}")
            if not answer.get("allowed"):
                raise Refused(
                    f"{found.tool} was called {answer.get('used')} times in the last hour, and {per_hour} are allowed"
                )
        return frozenset(key for key, _ in limits)

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
        identity = Identity(
            tenant_id=approval.tenant_id,
            user_id=approval.requested_by,
            session_id=approval.session_id,
            agent_id=approval.agent_id,
            run_id=approval.run_id,
        )
        thread_id, tool_call_id = call_of(approval.request_key)
        found = await self._edited(approval, arguments, identity, thread_id, tool_call_id)
        if found.decision == "deny":
            raise Refused(found.why)
        risk = _higher(found.risk, approval.risk)
        found = replace(
            found,
            decision="ask",
            risk=risk,
            approvers=self._approvers(identity, risk),
            required_votes=self.policy.approval.votes(risk),
        )
        request = self.request_for(
            found,
            request_key=f"edit:{secrets.token_hex(6)}:{approval.request_key}",
            batch_id=approval.batch_id,
            reason=approval.reason,
        )
        return replace(request, replaces=approval.approval_id)

    def schema_of(self, approval: Approval) -> Mapping[str, Any] | None:
        """JSON schema of the arguments of an approval's call, for a form; `None` for a tool not known here."""
        spec = self.registry.get(approval.tool)
        return None if spec is None else spec.arguments.model_json_schema()

    async def _edited(
        self,
        approval: Approval,
        arguments: Mapping[str, Any],
        identity: Identity,
        thread_id: str | None,
        tool_call_id: str | None,
    ) -> Assessment:
        if self.registry.get(approval.tool) is not None:
            return await self.assess(
                approval.tool,
                arguments,
                identity,
                approval.tainted,
                thread_id=thread_id,
                tool_call_id=tool_call_id,
            )
        if approval.kind != "action":
            raise InvalidRequest(f"there is no tool {approval.tool!r} here; reject the request instead")
        return self.judged(
            Appraisal(risk=approval.risk, summary=approval.summary),
            tool=approval.tool,
            tool_version=approval.tool_version,
            target="",
            kind="action",
            arguments=dict(arguments),
            identity=identity,
            tainted=False,
            thread_id=thread_id,
            tool_call_id=tool_call_id,
        )


async def _attempted(spec: ToolSpec, checked: BaseModel, context: CallContext) -> ToolOutcome:
    """What came of running a tool; what it raises is a failure, but for a pause of the graph."""
    try:
        return await spec.run(checked, context)
    except GraphBubbleUp:
        raise
    except Exception as error:  # noqa: BLE001 - a tool is foreign code: it fails alone, and that is entered
        return failure_of(error)


def _higher(one: Risk, other: Risk) -> Risk:
    return one if one.rank >= other.rank else other


def __getattr__(name: str) -> Any:
    if name == "safe_executor":
        made = globals()["safe_executor"] = SafeExecutor()
        return made
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


if TYPE_CHECKING:
    safe_executor: SafeExecutor
