"""Waiting in the code of a program for people to decide on a call; who stops waiting withdraws the question."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from agent.approval.binding import canonical_json
from agent.approval.records import Approval
from agent.errors import LearningError, Refused
from agent.execution.execution_records import Assessment
from agent.identity import Identity
from agent.portal import portal

if TYPE_CHECKING:
    from agent.approval.human_approval import HumanApprovalQueue


async def asked_now(
    asking: Coroutine[Any, Any, Approval], queue: HumanApprovalQueue, identity: Identity
) -> Approval:
    """The approval that is being asked for; where the caller is cancelled meanwhile, it is withdrawn."""
    at_work = portal().submit(asking)
    try:
        return await asyncio.shield(asyncio.wrap_future(at_work))
    except asyncio.CancelledError:  # what is asked by now must not go on asking
        at_work.add_done_callback(lambda asked: _withdraw_asked(asked, queue, identity))
        raise


async def asked_earlier(
    approval_id: str, found: Assessment, queue: HumanApprovalQueue, identity: Identity
) -> Approval:
    """An approval that was asked for before.

    Raises:
        Refused: it is for another call, or was asked for by another user.
    """
    approval = await queue.get(approval_id, identity)
    if approval.requested_by != identity.user_id:
        raise Refused("the approval was asked for by another user")
    if approval.tool != found.tool or canonical_json(approval.arguments) != canonical_json(found.arguments):
        raise Refused("the approval is for another call")
    return approval


async def decided(
    approval: Approval, queue: HumanApprovalQueue, identity: Identity, seconds: float
) -> Approval:
    """The approval once it is decided, or what replaced it after an edit; expired where nobody answers in time."""
    deadline = time.monotonic() + seconds
    while True:
        if approval.is_open:
            left = max(0.0, deadline - time.monotonic())
            try:
                approval = await queue.wait(approval.approval_id, identity, left)
            except asyncio.CancelledError:  # nobody waits any more, so nobody need be asked
                portal().submit(_withdraw(approval.approval_id, queue, identity))
                raise
        if approval.is_open:
            approval = await queue.cancel(approval.approval_id, identity, state="expired")
        if approval.replaced_by is None:
            return approval
        approval = await queue.get(approval.replaced_by, identity)


def _withdraw_asked(asked: Future[Approval], queue: HumanApprovalQueue, identity: Identity) -> None:
    if not asked.cancelled() and asked.exception() is None:
        portal().submit(_withdraw(asked.result().approval_id, queue, identity))


async def _withdraw(approval_id: str, queue: HumanApprovalQueue, identity: Identity) -> None:
    with contextlib.suppress(LearningError):  # the clock will expire it
        await queue.cancel(approval_id, identity)
