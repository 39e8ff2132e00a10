"""The right to run one call once: counted in its limits, asked for where people decide, claimed where they did."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final

from langchain_core.messages import BaseMessage

from agent.approval.records import WARNING, Approval
from agent.approval.risk import Risk
from agent.errors import Refused
from agent.execution.call_judging import request_for
from agent.execution.execution_records import Assessment, Permit
from agent.identity import Identity
from agent.learning.tool_experience_notices import likely_failures

if TYPE_CHECKING:
    from agent.approval.human_approval import HumanApprovalQueue
    from agent.approval.policy_file import PolicyFile
    from agent.database.protocol import Database

_EXPIRY_SECONDS_MIN: Final = 1.0
running_permit: ContextVar[Permit | None] = ContextVar("agent_running_permit", default=None)
"""The permit of the LangChain tool that runs around this code."""


class CallPermits:
    """Gives permits for assessed calls.

    Args:
        database: where calls are counted.
        queue: the approvals.
        policy: how long they may wait.
        look_up: longest time for finding out whether a call that people are asked about is likely to fail.
    """

    def __init__(
        self, database: Database, queue: HumanApprovalQueue, policy: PolicyFile, *, look_up: timedelta
    ) -> None:
        self._database = database
        self._queue = queue
        self._policy = policy
        self._look_up = look_up

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
        earlier: Sequence[BaseMessage] = (),
    ) -> Approval:
        """Ask for an approval of this call, or enter the yes of a rule; the same key gives the same approval.

        Args:
            earlier: the messages of the thread so far, for the warning that people are shown.

        Raises:
            Refused: the kill switch is on or the budget is used up.
            ConflictError: another call was asked for under this key.
        """
        await self.count(found, identity)
        if found.decision == "ask":
            found = await self.warned(found, identity, earlier=earlier)
        request = request_for(self._policy, found, request_key=request_key, batch_id=batch_id, reason=reason)
        if expires_in_seconds is not None:
            seconds = max(
                _EXPIRY_SECONDS_MIN, min(expires_in_seconds, request.expires_in_seconds or expires_in_seconds)
            )
            request = replace(request, expires_in_seconds=seconds, escalate_in_seconds=seconds / 3)
        return await self._queue.submit(replace(request, held=held), identity)

    async def warned(
        self, found: Assessment, identity: Identity, *, earlier: Sequence[BaseMessage] = ()
    ) -> Assessment:
        """The assessment with the known errors, among its effects, that the call is likely to run into."""
        told = await likely_failures(
            self._database, identity, found.tool, found.arguments, earlier=earlier, wait=self._look_up
        )
        return replace(found, effects={**found.effects, WARNING: told}) if told else found

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
            await self.count(found, identity)
            return Permit(assessment=found, identity=identity, reason=reason)
        if (approval.tool, approval.args_hash) != (found.tool, found.args_hash):
            raise Refused("the approval is for another call")
        claimed = await self._queue.claim(
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

    async def count(self, found: Assessment, identity: Identity) -> frozenset[str]:
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
            answer = await self._database.call(
                "reserve_execution",
                identity,
                the_tool=found.tool,
                limit_key=key,
                per_hour=None if key in found.counted else per_hour,
            )
            require_no_halt(answer, found.tool)
            if not answer.get("allowed"):
                raise Refused(
                    f"{found.tool} was called {answer.get('used')} times in the last hour, and {per_hour} are allowed"
                )
        return frozenset(key for key, _ in limits)


@contextmanager
def running_with(permit: Permit) -> Iterator[None]:
    """Let the code of a LangChain tool know by which permit it runs."""
    token = running_permit.set(permit)
    try:
        yield
    finally:
        running_permit.reset(token)


def require_no_halt(reserved: Mapping[str, Any], tool: str) -> None:
    """Nothing, if the kill switch is off in what `reserve_execution` answered.

    Raises:
        Refused: it is on.
    """
    if (halted := reserved.get("halted")) is not None:
        raise Refused(f"{tool} is stopped by {halted.get('by')}: {halted.get('reason')}")
