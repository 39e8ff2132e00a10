"""The queue of approvals: ask a person, wait for the answer, decide, and take up what was decided.

The rows in the database are the truth. Whatever is unclear, late or unreachable is a no.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from datetime import timedelta
from functools import cached_property
from typing import Any, Final, Literal, TypeAlias
from uuid import UUID

from agent import telemetry
from agent.approval.binding import binding_hash
from agent.approval.policy_file import PolicyFile, load_policy
from agent.approval.records import Approval, ApprovalRequest, DecisionOutcome, State
from agent.approval.reviewers import Reviewer
from agent.approval.risk import Risk
from agent.database.notifications import Notifications
from agent.database.opening import open_database
from agent.database.protocol import Database
from agent.errors import ConflictError, DatabaseUnavailable, InvalidRequest, LearningError, NotFound, Refused
from agent.events import emit
from agent.identity import Identity
from agent.portal import portal
from agent.settings import Settings, current_settings

Approvals: TypeAlias = list[Approval]
Approvers: TypeAlias = list[str]
Reassess: TypeAlias = Callable[[Approval, dict[str, Any]], Awaitable[ApprovalRequest]]
SchemaOf: TypeAlias = Callable[[Approval], Mapping[str, Any] | None]

NOTIFICATIONS: Final = "agent_approval"
"""Channel of NOTIFY on which the database tells the id of each approval that changed."""
DEFAULT_TIMEOUT_SECONDS: Final = 300.0
_POLL_SECONDS: Final = 1.0
_LOOK_AGAIN_SECONDS: Final = 10.0  # while notifications are heard: one may be lost with its connection
_LIST_MAX: Final = 1000


class HumanApprovalQueue:
    """Approvals of one database, under one policy. Works from any event loop; nothing is opened before the first call.

    Args:
        database: where the rows are; `None`: the database of the settings.
        settings: `None`: the environment's.
        policy: who may decide; `None`: the policy file of the settings. Without one nobody may.
    """

    def __init__(
        self,
        database: Database | None = None,
        settings: Settings | None = None,
        policy: PolicyFile | None = None,
    ) -> None:
        self._given = (database, settings, policy)
        self._reassessors: dict[str, Reassess] = {}
        self._schemas: dict[str, SchemaOf] = {}

    @cached_property
    def settings(self) -> Settings:
        """The settings it works by."""
        return self._given[1] or current_settings()

    @cached_property
    def database(self) -> Database:
        """Where the rows are."""
        return self._given[0] or open_database(self.settings)

    @cached_property
    def policy(self) -> PolicyFile:
        """Who may decide."""
        return self._given[2] if self._given[2] is not None else load_policy(self.settings.policy_file)

    @cached_property
    def notifications(self) -> Notifications:
        """Changes of approvals, for those who wait in the portal."""
        return Notifications(self.database, NOTIFICATIONS)

    # --- asking -------------------------------------------------------------------------------------------------

    async def request_approval(
        self,
        action: str,
        args: Mapping[str, Any],
        *,
        risk_level: Risk | str = Risk.WRITE,
        timeout: float | timedelta = DEFAULT_TIMEOUT_SECONDS,
        identity: Identity | None = None,
        reason: str = "",
        required_votes: int | None = None,
        approvers: Iterable[str] | None = None,
    ) -> dict[str, Any]:
        """Ask for an action of your own code and wait for the answer. Do it only where `approved` is true, once, and
        with the `arguments` of the answer: a reviewer may have edited them.

        Args:
            action: its name, for people.
            args: what it will be done with; plain values.
            risk_level: `READ`, `WRITE`, `DESTRUCTIVE`, or `LOW` to `CRITICAL`.
            timeout: seconds to wait; then the request is expired and the answer is no.
            identity: for whom; `None`: nobody in the tenant of the settings.
            reason: why, as the model says it; shown as a claim.
            required_votes: `None`: as the policy says; never fewer than that.
            approvers: who may decide, of those whom the policy lets; `None`: all of them.

        Returns:
            `{approved, state, decided_by, approval_id, arguments, note, log_id}`. `state` is `unavailable` where the
            database went away while waiting, and then the answer is no too. It is `refused` at once where fewer people
            may approve it than would have to; `note` says so, and `approval_id` is `None`.

        Raises:
            InvalidRequest: the risk is FORBIDDEN or unknown, the action has no name, the arguments are no plain values,
                or the time-out is none.
            DatabaseUnavailable: nothing could be asked.
        """
        risk = risk_level if isinstance(risk_level, Risk) else Risk.of(risk_level)
        if risk is Risk.FORBIDDEN:
            raise InvalidRequest(f"{action!r} is FORBIDDEN: nobody can approve it")
        if not isinstance(action, str) or not action.strip():
            raise InvalidRequest(f"action={action!r} must be a text that names the action for people")
        if not isinstance(args, Mapping):
            raise InvalidRequest(
                f"{action!r}: args must be an object of plain values ({{}} for none), not {type(args).__name__}"
            )
        if not isinstance(timeout, int | float | timedelta) or isinstance(timeout, bool):
            raise InvalidRequest(f"timeout={timeout!r} must be a number of seconds or a timedelta")
        seconds = _seconds(timeout)
        if not (math.isfinite(seconds) and seconds >= 0):
            raise InvalidRequest(f"timeout={timeout!r} must be 0 seconds or more, and finite")
        who = identity or Identity(tenant_id=self.settings.tenant)
        allowed = self.policy.reviewers.allowed(who.tenant_id, risk)
        asked_of = tuple(allowed if approvers is None else [name for name in approvers if name in allowed])
        votes = max(required_votes or 1, self.policy.approval.votes(risk))
        if len(able := self._able(asked_of, who)) < votes:
            return await self._asked_nobody(action, args, risk, who, able=len(able), votes=votes)
        lives = max(seconds, 1.0)
        request = ApprovalRequest(
            tool=action,
            arguments=dict(args),
            args_hash=binding_hash(
                action,
                args,
                tenant_id=who.tenant_id,
                thread_id=who.session_id,
                policy_version=self.policy.version,
            ),
            risk=risk,
            approvers=asked_of,
            required_votes=votes,
            reason=reason,
            expires_in_seconds=lives,
            escalate_in_seconds=lives / 3,
        )
        asking = portal().submit(self.submit(request, who))
        try:
            asked = await asyncio.shield(asyncio.wrap_future(asking))
        except asyncio.CancelledError:  # what is asked by now must not go on asking
            asking.add_done_callback(lambda done: self._forsake_asked(done, who))
            raise
        try:
            return await self._answer(asked, who, time.monotonic() + seconds)
        except asyncio.CancelledError:
            # Nobody waits any more; the row must not go on asking.
            portal().submit(self._forsake(asked.approval_id, who))
            raise

    def _able(self, approvers: Iterable[str], identity: Identity) -> Approvers:
        """Those of them who can vote: nobody decides on what they asked for themselves."""
        known = {name: self.policy.reviewers.by_name(name) for name in dict.fromkeys(approvers)}
        return [name for name, one in known.items() if one is not None and not one.is_user(identity.user_id)]

    async def _asked_nobody(
        self, action: str, args: Mapping[str, Any], risk: Risk, identity: Identity, *, able: int, votes: int
    ) -> dict[str, Any]:
        """The answer to what nobody could ever approve: entered as refused."""
        people = f"{votes} {'person' if votes == 1 else 'people'}"
        why = f"{people} would have to approve it, and {able or 'nobody'} of those whom the policy file names may"
        binding_hash(action, args, tenant_id=identity.tenant_id)  # plain values only, here as well
        entry = {
            "state": "refused",
            "approval_id": None,
            "tool": action[:200],
            "tool_version": "1",
            "risk": str(risk),
            "decision": "refused",
            "arguments_shown": dict(args),
            "arguments_run": None,
            "error": why,
        }
        logged = await self.database.call("record_execution", identity, entry=entry)
        emit(
            "tool_call_refused",
            tool=action[:200],
            risk=str(risk),
            status="refused",
            log_id=str(logged["log_id"]),
            **identity.as_json(),
        )
        return {
            "approved": False,
            "state": "refused",
            "decided_by": [],
            "approval_id": None,
            "arguments": dict(args),
            "note": why,
            "log_id": str(logged["log_id"]),
        }

    async def _answer(self, approval: Approval, identity: Identity, deadline: float) -> dict[str, Any]:
        try:
            while True:
                approval = await self.wait(
                    approval.approval_id, identity, max(deadline - time.monotonic(), 0)
                )
                if approval.is_open:
                    approval = await self.cancel(approval.approval_id, identity, state="expired")
                if approval.replaced_by is None:
                    break
                approval = await self.get(approval.replaced_by, identity)
            if approval.state != "approved":
                return _told(approval, approved=False)
            claimed = await self.claim(
                approval.approval_id, identity, args_hash=approval.args_hash, claimed_by=approval.tool
            )
            if not claimed["claimed"]:
                return _told(approval, approved=False) | {"state": claimed["state"], "note": claimed["why"]}
            # The yes is handed over, and with it what happens: that is all this queue can know of it.
            entry = {
                "state": "executed",
                "arguments_shown": approval.arguments_shown,
                "arguments_run": approval.arguments,
            }
            ended = await self.finish(claimed["ticket"], identity, entry)
        except DatabaseUnavailable as error:
            emit("approval_wait_unavailable", approval_id=approval.approval_id, reason=str(error))
            return _told(approval, approved=False) | {"state": "unavailable", "decided_by": []}
        return _told(approval, approved=True) | {"log_id": ended["log_id"]}

    def _forsake_asked(self, asked: Future[Approval], identity: Identity) -> None:
        if not asked.cancelled() and asked.exception() is None:
            portal().submit(self._forsake(asked.result().approval_id, identity))

    async def _forsake(self, approval_id: str, identity: Identity) -> None:
        with contextlib.suppress(LearningError):  # the clock will expire it
            await self.cancel(approval_id, identity)

    async def submit(self, request: ApprovalRequest, identity: Identity) -> Approval:
        """Ask, and do not wait. The same `request_key` gives back the same approval.

        Raises:
            ConflictError: another call was asked for under this key, or what is to be replaced is decided.
            InvalidRequest: what cannot be asked for, such as FORBIDDEN.
        """
        if request.risk is Risk.FORBIDDEN:
            raise InvalidRequest(f"{request.tool!r} is FORBIDDEN: nobody can approve it")
        approval = Approval.from_row(
            await self.database.call("request_approval", identity, request=request.as_json())
        )
        emit(
            "approval_requested",
            **identity.as_json(),
            approval_id=approval.approval_id,
            tool=approval.tool,
            risk=str(approval.risk),
            state=approval.state,
        )
        return approval

    # --- waiting ------------------------------------------------------------------------------------------------

    async def wait(self, approval_id: str, identity: Identity, timeout: float | timedelta) -> Approval:
        """The approval once it is decided, or as it is when the time is over; it stays open then.

        Raises:
            NotFound: this tenant has no such approval.
            DatabaseUnavailable: the database was away when the time was over.
        """
        attributes = {telemetry.APPROVAL_ID: approval_id, telemetry.CONVERSATION_ID: identity.session_id}
        with telemetry.span("await_approval", attributes, parent=telemetry.around(identity)) as waiting:
            approval = await portal().run(
                self._wait(approval_id, identity, time.monotonic() + _seconds(timeout))
            )
            waiting.set_attributes(
                {telemetry.APPROVAL_STATE: approval.state, telemetry.TOOL_NAME: approval.tool[:200]}
            )
            return approval

    async def _wait(self, approval_id: str, identity: Identity, deadline: float) -> Approval:
        async with self.notifications.heard(_id(approval_id)) as bell:
            while True:
                left = deadline - time.monotonic()
                try:
                    approval = await self.get(approval_id, identity)
                    if not approval.is_open or left <= 0:
                        return approval
                    # It expires by the clock, which nobody tells.
                    left = min(left, max((approval.expires_at.timestamp() - time.time()) + 0.05, 0.05))
                except DatabaseUnavailable:
                    if left <= 0:
                        raise
                again = _LOOK_AGAIN_SECONDS if self.notifications.is_listening else _POLL_SECONDS
                await bell.wait(min(left, again))

    # --- reading ------------------------------------------------------------------------------------------------

    async def get(self, approval_id: str, identity: Identity) -> Approval:
        """One approval.

        Raises:
            NotFound: this tenant has no such approval.
        """
        row = await self.database.call("get_approval", identity, the_approval_id=_id(approval_id))
        if row is None:
            raise NotFound(f"there is no approval {approval_id!r} in tenant {identity.tenant_id!r}")
        return Approval.from_row(row)

    async def list(
        self,
        identity: Identity,
        *,
        state: State | None = None,
        states: Sequence[str] | None = None,
        batch_id: str | None = None,
        session_id: str | None = None,
        approval_ids: Sequence[str] | None = None,
        limit: int = 100,
    ) -> Approvals:
        """Approvals of a tenant, newest first, at most 1,000."""
        wanted = {
            "approval_ids": None if approval_ids is None else [*map(_id, approval_ids)],
            "state": state,
            "states": None if states is None else [*states],
            "batch_id": None if batch_id is None else _id(batch_id),
            "session_id": session_id,
            "limit": min(limit, _LIST_MAX),
        }
        rows = await self.database.call(
            "list_approvals",
            identity,
            wanted={name: value for name, value in wanted.items() if value is not None},
        )
        return [Approval.from_row(row) for row in rows]

    async def of_batch(self, batch_id: str, identity: Identity) -> Approvals:
        """The approvals of a batch, oldest first."""
        found = await self.list(identity, batch_id=batch_id, limit=_LIST_MAX)
        return sorted(found, key=lambda one: (one.requested_at, one.approval_id))

    async def get_pending_approvals(self, identity: Identity | None = None) -> Approvals:
        """What waits for a decision, newest first; `None`: in the tenant of the settings."""
        who = identity or Identity(tenant_id=self.settings.tenant)
        return await self.list(who, state="pending", limit=_LIST_MAX)

    # --- deciding -----------------------------------------------------------------------------------------------

    async def decide(
        self,
        approval_ids: Sequence[str],
        verdict: str,
        reviewer: Reviewer,
        *,
        channel: str,
        hashes: Mapping[str, str],
        identity_tenant: str | None = None,
        note: str = "",
        dedup_key: str | None = None,
    ) -> DecisionOutcome:
        """The vote of one person on some approvals: on all of them or on none.

        Args:
            approval_ids: of one tenant.
            verdict: `approve` or `reject`.
            reviewer: who the channel made sure it is.
            channel: where they decided.
            hashes: by id, the hash of what they saw, or its first 16 digits or more.
            identity_tenant: `None`: the tenant of the settings.
            note: what they wrote.
            dedup_key: of this very click: the second one with it changes nothing.
        """
        identity = Identity(tenant_id=identity_tenant or self.settings.tenant)
        ids = [_id(approval_id) for approval_id in approval_ids]
        by_id = {_id(approval_id): digits for approval_id, digits in hashes.items()}
        try:
            approvals = [await self.get(approval_id, identity) for approval_id in ids]
        except NotFound as error:
            return self._refused(str(error), ids, reviewer, channel)
        for approval in approvals:
            # The row has who might decide when it was asked; the policy says who still may.
            if not self._may(reviewer.name, approval):
                why = f"{reviewer.name} may not decide on {approval.risk} in tenant {approval.tenant_id}"
                return self._refused(why, ids, reviewer, channel, approvals)
        decisions = [
            {
                "approval_id": approval_id,
                "verdict": verdict,
                "decided_by": reviewer.name,
                "user_ids": [*reviewer.user_ids],
                "channel": channel,
                "args_hash": by_id.get(approval_id, ""),
                "note": note,
                "dedup_key": dedup_key,
            }
            for approval_id in ids
        ]
        row = await self.database.call("decide_approvals", identity, decisions=decisions)
        outcome = DecisionOutcome(
            outcome=row["outcome"],
            why=row["why"] or "",
            approvals=tuple(Approval.from_row(each) for each in row["approvals"]),
        )
        if outcome.outcome == "refused":
            return self._refused(outcome.why, ids, reviewer, channel, outcome.approvals)
        for approval in outcome.approvals:
            emit(
                "approval_decided",
                tenant_id=approval.tenant_id,
                approval_id=approval.approval_id,
                outcome=outcome.outcome,
                verdict=verdict,
                reviewer=reviewer.name,
                channel=channel,
                state=approval.state,
            )
        return outcome

    def outdated_because(self, approval: Approval) -> str | None:
        """Why a yes to it would not be carried out here: the policy file was edited since it was asked for. `None`: it
        was not, or there is nothing to carry out any more."""
        if approval.state not in ("pending", "approved"):
            return None
        if approval.policy_version in (None, self.policy.version):
            return None
        return (
            "The policy file was edited since this was asked for, so what has read the new file will not run it, "
            "approved or not; it has to be asked for again."
        )

    @staticmethod
    def _refused(
        why: str, ids: Sequence[str], reviewer: Reviewer, channel: str, approvals: Sequence[Approval] = ()
    ) -> DecisionOutcome:
        emit("decision_refused", approval_ids=[*ids], reviewer=reviewer.name, channel=channel, reason=why)
        return DecisionOutcome(outcome="refused", why=why, approvals=tuple(approvals))

    def _may(self, name: str, approval: Approval) -> bool:
        return name in self.policy.reviewers.allowed(approval.tenant_id, approval.risk)

    async def edit(
        self,
        approval_id: str,
        arguments: Mapping[str, Any],
        reviewer: Reviewer,
        *,
        channel: str,
        reassess: Reassess | None = None,
        identity_tenant: str | None = None,
        note: str = "",
    ) -> Approval:
        """Ask for the same with other arguments, in place of what was asked. The editor's yes counts at once as one
        vote, except for what is DESTRUCTIVE: that is approved by others. It needs as many votes as before, or more, and
        nobody decides on it who might not decide before.

        Args:
            approval_id: what is pending.
            arguments: all of them, as they shall be run.
            reviewer: who the channel made sure it is.
            channel: where they edited.
            reassess: makes the new request; `None`: what was given to `reassess_with` for this kind.
            identity_tenant: `None`: the tenant of the settings.
            note: what they wrote.

        Raises:
            InvalidRequest: nobody can reassess this kind here, or the arguments cannot be.
            Refused: this person may not, or what the edit makes of it is forbidden.
            ConflictError: it was decided meanwhile.
        """
        identity = Identity(tenant_id=identity_tenant or self.settings.tenant)
        old = await self.get(approval_id, identity)
        if not old.is_open:
            raise ConflictError(f"the approval is {old.state}: it can no longer be edited")
        if reviewer.name not in old.approvers or not self._may(reviewer.name, old):
            raise Refused(f"{reviewer.name} may not decide on this, nor edit it")
        if reviewer.is_user(old.requested_by):
            raise Refused("nobody edits and approves what they asked for themselves")
        function = reassess or self._reassessors.get(old.kind)
        if function is None:
            raise InvalidRequest(
                f"what is of kind {old.kind!r} cannot be edited here: nothing can check the new arguments. Reject it, "
                "and say in the note what to do instead"
            )
        request = await function(old, dict(arguments))
        if (request.tool, request.kind) != (old.tool, old.kind):
            raise Refused("an edit changes arguments, never the tool")
        if request.risk.rank < old.risk.rank:
            request = replace(request, risk=old.risk)
        votes = request.required_votes or self.policy.approval.votes(request.risk)
        return await self.submit(
            replace(
                request,
                required_votes=max(old.required_votes, votes),
                approvers=[name for name in request.approvers if name in old.approvers],
                tainted=old.tainted or request.tainted,
                batch_id=old.batch_id,
                replaces=old.approval_id,
                edited_by=reviewer.name,
                edited_user_ids=reviewer.user_ids,
                approved_by=None,
                channel=channel,
                note=note,
            ),
            identity,
        )

    def reassess_with(self, kind: str, function: Reassess) -> None:
        """Let edits of approvals of this kind be checked and classified by this function."""
        self._reassessors[kind] = function

    def can_edit(self, approval: Approval) -> bool:
        """Whether an edit of it could be checked here."""
        return approval.is_open and approval.kind in self._reassessors

    def describe_with(self, kind: str, function: SchemaOf) -> None:
        """Let forms for approvals of this kind be made from the JSON schema that this function gives."""
        self._schemas[kind] = function

    def schema_of(self, approval: Approval) -> Mapping[str, Any] | None:
        """JSON schema of its arguments, where this process knows the tool."""
        function = self._schemas.get(approval.kind)
        return None if function is None else function(approval)

    # --- taking up ----------------------------------------------------------------------------------------------

    async def claim(
        self, approval_id: str, identity: Identity, *, args_hash: str, claimed_by: str
    ) -> dict[str, Any]:
        """Take what was approved to execute it: `{claimed, ticket, state, why}`. One of any number of callers gets the
        ticket. Those who approved it must still be allowed to."""
        approval = await self.get(approval_id, identity)
        gone = [
            name
            for name in approval.decided_by
            if not name.startswith(("rule:", "policy:")) and not self._may(name, approval)
        ]
        if approval.state == "approved" and gone:
            why = f"{', '.join(gone)} may no longer decide on it"
            emit("approval_claim_refused", approval_id=approval.approval_id, reason=why)
            return {"claimed": False, "ticket": None, "state": approval.state, "why": why}
        claimed: dict[str, Any] = await self.database.call(
            "claim_approval",
            identity,
            the_approval_id=approval.approval_id,
            args_hash=args_hash,
            claimed_by=claimed_by,
        )
        if not claimed["claimed"]:
            emit("approval_claim_refused", approval_id=approval.approval_id, reason=claimed["why"])
        return claimed

    async def finish(
        self, ticket: str | None, identity: Identity, entry: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Tell how the execution of a claimed approval ended and log it: `{log_id, state}`. `entry["state"]` is
        `executed`, `failed` or `unknown`.

        Raises:
            NotFound: there is no execution of this ticket.
            ConflictError: it ended otherwise before.
        """
        ended: dict[str, Any] = await self.database.call(
            "finish_execution", identity, ticket=ticket or "", entry=dict(entry)
        )
        return ended

    async def cancel(
        self,
        approval_id: str,
        identity: Identity,
        *,
        state: Literal["cancelled", "expired"] = "cancelled",
        by: str = "",
    ) -> Approval:
        """End what nobody waits for any more. What is decided already stays as it is; a yes that was not taken up
        expires."""
        row = await self.database.call(
            "close_approval", identity, the_approval_id=_id(approval_id), the_state=state, closed_by=by
        )
        return Approval.from_row(row)


def _told(approval: Approval, *, approved: bool) -> dict[str, Any]:
    return {
        "approved": approved,
        "state": approval.state,
        "decided_by": [*approval.decided_by],
        "approval_id": approval.approval_id,
        "arguments": approval.arguments,
        "note": approval.note,
        "log_id": None,
    }


def _seconds(timeout: float | timedelta) -> float:
    return timeout.total_seconds() if isinstance(timeout, timedelta) else float(timeout)


def _id(approval_id: Any) -> str:
    """The id as Postgres writes it.

    Raises:
        NotFound: it is no UUID, so nothing has it.
    """
    try:
        return str(UUID(str(approval_id)))
    except ValueError:
        raise NotFound(f"{str(approval_id)[:80]!r} is no id of an approval (a UUID)") from None


human_approval_queue = HumanApprovalQueue()
"""The queue of this process's settings, opened at its first call."""
