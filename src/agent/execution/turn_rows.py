"""What the database knows of the calls of a turn: their approvals, and what was seen of the turn before."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Final

from agent.approval.records import Approval
from agent.identity import Identity

if TYPE_CHECKING:
    from agent.execution.safe_executor import SafeExecutor

CHANNEL: Final = "interrupt"


class TurnRows:
    """Reads the rows of turns.

    Args:
        executor: on whose database.
    """

    def __init__(self, executor: SafeExecutor) -> None:
        self._executor = executor

    async def approvals(self, batch_id: str, identity: Identity) -> list[Approval]:
        """All approvals of a batch."""
        found = await self._executor.database.call(
            "list_approvals", identity, wanted={"batch_id": batch_id, "limit": 1000}
        )
        return [Approval.from_row(row) for row in found]

    async def first_time(self, key: str) -> bool:
        """Whether nobody has come by with this key before; the next who asks has a no."""
        return bool(
            await self._executor.database.call("remember_delivery", channel=CHANNEL, delivery_key=key)
        )

    async def was_asked_by_others(self, place: str, tenant_id: str) -> bool:
        """Enter that this tenant came by. Whether another was here first, and this one never."""
        is_first = await self.first_time(f"{place}:asked")
        is_first_of_tenant = await self.first_time(f"{place}:asked:{_tenant_mark(tenant_id)}")
        return is_first_of_tenant and not is_first


def _tenant_mark(tenant_id: str) -> str:
    return hashlib.sha256(tenant_id.encode()).hexdigest()
