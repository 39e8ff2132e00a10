"""What the routes of health and metrics look at: the database, the clocks and the counters of this process."""

from __future__ import annotations

from functools import cache

from agent.approval.human_approval import HumanApprovalQueue, human_approval_queue
from agent.clock import Service
from agent.server.house_state import HouseState
from agent.server.server_metrics import ServerMetrics


class House:
    """One process with its database.

    Args:
        queue: whose settings and database these are.
    """

    def __init__(self, queue: HumanApprovalQueue) -> None:
        self.settings = queue.settings
        self.state = HouseState(queue.database)
        self.metrics = ServerMetrics()
        self.clocks: dict[str, Service | None] = {}
        """Those that the server's lifespan started, by name; `None` for one that is switched off."""


@cache
def house() -> House:
    """That of this process; tests put another in its place as a FastAPI dependency."""
    return House(human_approval_queue)
