"""What every channel of approvals asks of the database."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from agent.approval.records import Approval
from agent.errors import LearningError
from agent.identity import Identity

if TYPE_CHECKING:
    from agent.approval.human_approval import HumanApprovalQueue


async def remember_delivery(queue: HumanApprovalQueue, channel: str, delivery_key: str) -> bool:
    """Whether this delivery comes for the first time."""
    return bool(
        await queue.database.call("remember_delivery", None, channel=channel, delivery_key=delivery_key)
    )


async def log_entry(queue: HumanApprovalQueue, approval: Approval) -> dict[str, Any] | None:
    """The entry of the execution log of an action that ran; `None` where there is none or it cannot be read now."""
    if not approval.log_id:
        return None
    try:
        entry = await queue.database.call(
            "get_execution", Identity(tenant_id=approval.tenant_id), the_log_id=approval.log_id
        )
    except LearningError:
        return None  # the card says the state, and where to look
    return dict(entry) if isinstance(entry, Mapping) else None
