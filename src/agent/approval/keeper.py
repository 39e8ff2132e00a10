"""What looks after approvals in the background: expires and reminds, keeps messages true, and resumes paused runs.

Any number may run, in any number of processes: what one has taken is leased to it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from langgraph.errors import GraphBubbleUp

from agent.approval.human_approval import HumanApprovalQueue
from agent.approval.records import Approval
from agent.errors import DatabaseUnavailable, NotFound
from agent.events import emit
from agent.identity import Identity
from agent.portal import portal

_EVERY_SECONDS: Final = 2.0
_REST_SECONDS: Final = 5.0
_LEASE_SECONDS: Final = 60.0
_WORK_SECONDS: Final = 45.0  # less than the lease: nobody else begins the same meanwhile
_TOOL_SECONDS: Final = 600.0
"""Longest time of a run of a tool that goes on; less than the 900 seconds for which it is its taker's."""
_AT_ONCE: Final = 8
"""Cards that are delivered to one channel, and runs that are resumed, at the same time."""
_TOLD_MAX: Final = 300


class Channel(Protocol):
    """Where cards are shown."""

    name: str

    async def post(self, card_of: Sequence[Approval], *, escalated: bool) -> dict[str, Any]:
        """Post the card of a batch; returns where it is."""

    async def update(self, approvals: Sequence[Approval], ref: Mapping[str, Any]) -> dict[str, Any]:
        """Make the posted card say what the rows say; returns where it is."""


@dataclass(frozen=True, kw_only=True)
class ResumeOrder:
    """A paused run whose approvals are all decided."""

    batch_id: str
    tenant_id: str
    interrupt: Mapping[str, Any]
    """`{thread_id, interrupt_id, assistant_id, graph_id, identity}`."""
    approvals: tuple[Approval, ...]


@dataclass(frozen=True, kw_only=True)
class ToolResumeOrder:
    """A run of a tool that an agent wrote, put away in the middle of its work, whose approval is decided."""

    approval_id: str
    identity: Identity
    """Whose run it is."""


class ApprovalKeeper:
    """Tends the approvals of a queue until it is stopped. Channels and `resume` are called in the portal, up to eight
    times at once each; a slow one holds nothing else up.

    Args:
        queue: whose approvals these are.
        channels: where cards go; none: people look on the web page or the command line.
        resume: starts a paused run again; `None`: this process resumes nothing.
        resume_tool: goes on with a paused run of an agent-written tool, and gives it back where it cannot; `None`: this
            process goes on with none.
        executing_seconds: what has been executing for longer, because its process died, becomes `unknown`.
    """

    def __init__(
        self,
        queue: HumanApprovalQueue,
        channels: Sequence[Channel] = (),
        resume: Callable[[ResumeOrder], Awaitable[None]] | None = None,
        *,
        resume_tool: Callable[[ToolResumeOrder], Awaitable[object]] | None = None,
        executing_seconds: float = 900.0,
    ) -> None:
        self._queue = queue
        self._channels = {channel.name: channel for channel in channels}
        self._resume = resume
        self._resume_tool = resume_tool
        self._executing_seconds = executing_seconds
        self._task: asyncio.Task[None] | None = None
        # Each channel works at its own pace, and so do resumes: a slow one makes nobody else wait.
        self._lanes = {name: _Lane() for name in self._channels}
        self._resumes = _Lane()
        self._tools = _Lane()

    async def start(self) -> None:
        """Begin to tend; settings and policy are read now.

        Raises:
            ConfigurationError: settings or policy file are malformed.
        """
        _ = (self._queue.settings, self._queue.policy)
        await portal().run(self._start())

    async def stop(self) -> None:
        """End. What was being delivered or resumed is taken up by another keeper when its lease is over."""
        await portal().run(self._stop())

    async def run_once(self) -> None:
        """Tend, deliver and resume what is due now.

        Raises:
            DatabaseUnavailable: the database cannot be reached.
        """
        await portal().run(self._run_once())

    async def _start(self) -> None:
        if self._task is None:
            self._task = asyncio.create_task(self._keep())

    async def _stop(self) -> None:
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        under_way = [
            each for lane in (*self._lanes.values(), self._resumes, self._tools) for each in lane.under_way
        ]
        for each in under_way:
            each.cancel()
        await asyncio.gather(*under_way, return_exceptions=True)

    async def _keep(self) -> None:
        is_told = False
        async with self._queue.notifications.heard() as bell:
            while True:
                try:
                    await self._begin()
                    is_told = False
                    await bell.wait(_EVERY_SECONDS)
                except Exception as error:  # noqa: BLE001 - without a keeper nothing expires, so it goes on
                    if not is_told:
                        emit("keeper_work_failed", reason=_shortly(error), again_in_seconds=_REST_SECONDS)
                    is_told = True
                    await asyncio.sleep(_REST_SECONDS)

    async def _run_once(self) -> None:
        failed = [each for each in await asyncio.gather(*await self._begin(), return_exceptions=True) if each]
        if failed:
            raise failed[0]

    async def _begin(self) -> list[asyncio.Task[None]]:
        """Tend, and begin to resume and deliver what is due; the leases keep it from being begun twice."""
        database = self._queue.database
        await database.call("tend_approvals", executing_seconds=self._executing_seconds)
        begun: list[asyncio.Task[None]] = []
        if self._resume is not None and self._resumes.has_room:
            orders = await database.call("take_resumes", lease_seconds=_LEASE_SECONDS)
            begun += [self._resumes.begin(self._resume_one(order, self._resume)) for order in orders]
        if self._resume_tool is not None and self._tools.has_room:
            paused = await database.call("take_tool_resumes", lease_seconds=_LEASE_SECONDS)
            begun += [self._tools.begin(self._resume_one_tool(each, self._resume_tool)) for each in paused]
        if free := [name for name, lane in self._lanes.items() if lane.has_room]:
            deliveries = await database.call("take_deliveries", channels=free, lease_seconds=_LEASE_SECONDS)
            begun += [self._lanes[each["channel"]].begin(self._deliver(each)) for each in deliveries]
        return begun

    async def _deliver(self, delivery: Mapping[str, Any]) -> None:
        channel = self._channels[delivery["channel"]]
        where = {"the_batch_id": delivery["batch_id"], "channel": channel.name}
        try:
            approvals = [Approval.from_row(row) for row in delivery["approvals"]]
            async with asyncio.timeout(_WORK_SECONDS), self._lanes[channel.name].place:
                if delivery["ref"] is None:
                    ref = await channel.post(approvals, escalated=bool(delivery["escalated"]))
                else:
                    ref = await channel.update(approvals, delivery["ref"])
        except (GraphBubbleUp, DatabaseUnavailable):
            raise
        except Exception as error:  # noqa: BLE001 - a channel is foreign code and must not stop the others
            reason = _shortly(error)
            emit(
                "approval_delivery_failed", batch_id=delivery["batch_id"], channel=channel.name, reason=reason
            )
            await self._queue.database.call("delivery_failed", **where, error=reason)
        else:
            await self._queue.database.call(
                "delivery_done", **where, delivered_version=delivery["version"], ref=ref
            )

    async def _resume_one(
        self, order: Mapping[str, Any], resume: Callable[[ResumeOrder], Awaitable[None]]
    ) -> None:
        try:
            async with asyncio.timeout(_WORK_SECONDS), self._resumes.place:
                await resume(
                    ResumeOrder(
                        batch_id=order["batch_id"],
                        tenant_id=order["tenant_id"],
                        interrupt=order["interrupt"],
                        approvals=tuple(Approval.from_row(row) for row in order["approvals"]),
                    )
                )
        except GraphBubbleUp:
            raise
        except Exception as error:  # noqa: BLE001 - one run that cannot go on must not stop the others
            reason = _shortly(error)
            emit("approval_resume_failed", batch_id=order["batch_id"], reason=reason)
            await self._queue.database.call("resume_failed", batch_id=order["batch_id"], error=reason)
        else:
            await self._queue.database.call("resume_done", batch_id=order["batch_id"])

    async def _resume_one_tool(
        self, order: Mapping[str, Any], resume: Callable[[ToolResumeOrder], Awaitable[object]]
    ) -> None:
        known = {name: order[name] for name in ("tenant_id", "user_id", "agent_id", "session_id")}
        try:
            async with asyncio.timeout(_TOOL_SECONDS), self._tools.place:
                await resume(
                    ToolResumeOrder(approval_id=order["approval_id"], identity=Identity.from_json(known))
                )
        except GraphBubbleUp:
            raise
        except NotFound:  # somebody else has gone on with it meanwhile
            return
        except Exception as error:  # noqa: BLE001 - one run that cannot go on must not stop the others
            emit("tool_resume_failed", approval_id=order["approval_id"], reason=_shortly(error))


class _Lane:
    """Work of one kind that is under way in the portal, some of it waiting for its place."""

    def __init__(self) -> None:
        self.place = asyncio.Semaphore(_AT_ONCE)
        self.under_way: set[asyncio.Task[None]] = set()

    @property
    def has_room(self) -> bool:
        """Whether more can be taken without waiting; what is taken and waits uses up its lease."""
        return len(self.under_way) < _AT_ONCE

    def begin(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Start it; it is held here until it is done."""
        task = asyncio.create_task(work)
        self.under_way.add(task)
        task.add_done_callback(self._end)
        return task

    def _end(self, task: asyncio.Task[None]) -> None:
        self.under_way.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            emit("keeper_work_failed", reason=_shortly(error), again_in_seconds=_LEASE_SECONDS)


def _shortly(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:_TOLD_MAX]
