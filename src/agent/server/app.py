"""The FastAPI application that `langgraph.json` mounts: the routes of approvals, on the web and for chats, and those of
probes and metrics.

Its lifespan runs the workers of this process's graphs, the keeper of approvals, the background learner and the monitor,
and sends traces where OpenTelemetry's variables say where to.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING

from fastapi import FastAPI

from agent.approval.graph_resume import LoopbackResumer
from agent.approval.human_approval import HumanApprovalQueue, human_approval_queue
from agent.approval.keeper import ApprovalKeeper, ToolResumeOrder
from agent.approval.slack import SlackChannel, SlackSocket, slack_channel
from agent.approval.telegram import telegram_channel
from agent.clock import Service
from agent.database.opening import EmbeddedDatabase
from agent.errors import LearningError
from agent.events import emit, listening
from agent.learning.machine import living_machines
from agent.portal import portal
from agent.server import (
    alert_routes,
    approval_routes,
    health_routes,
    metrics_routes,
    services,
    slack_routes,
    telegram_routes,
)
from agent.server.deliveries import finish
from agent.server.house import House, house
from agent.telemetry import exporting

if TYPE_CHECKING:
    from agent.database import Database

_SOCKET_RETRY_SECONDS = 30.0


@asynccontextmanager
async def lifespan(application: FastAPI) -> AsyncIterator[None]:
    """Start a worker for each machine that the graphs made, the keeper of approvals and the clocks, and stop them in
    order.

    What was left to learn when the server stopped last is learned without waiting for a new run, and what was decided
    meanwhile is resumed.

    Raises:
        ConfigurationError: settings or policy file are malformed: a server must know who may approve.
    """
    here = house()
    async with AsyncExitStack() as running:
        await running.enter_async_context(exporting())
        running.enter_context(listening(here.metrics.count))
        for machine in living_machines():
            running.push_async_callback(machine.aclose)
            await machine.start_worker()
        await running.enter_async_context(keeping_approvals(human_approval_queue))
        await running.enter_async_context(keeping_time(here, human_approval_queue.database))
        yield


@asynccontextmanager
async def keeping_time(here: House, database: Database) -> AsyncIterator[None]:
    """Run the learner and the monitor, unless the settings switch them off. A database that is away is waited for."""
    from agent.learning.background_learner import BackgroundLearner
    from agent.monitoring.continuous_monitor import ContinuousMonitor

    settings = here.settings
    wanted: dict[str, tuple[bool, Callable[[], Service]]] = {
        "learner": (settings.learner, lambda: BackgroundLearner(settings=settings, database=database)),
        "monitor": (settings.monitor, lambda: ContinuousMonitor(settings=settings, database=database)),
    }
    async with AsyncExitStack() as running:
        for name, (is_on, make) in wanted.items():
            here.clocks[name] = None
            if is_on:
                key = (name, id(database), settings.tenant)
                here.clocks[name] = await running.enter_async_context(services.running(key, make))
        yield


@asynccontextmanager
async def keeping_approvals(queue: HumanApprovalQueue) -> AsyncIterator[None]:
    """Deliver, expire and resume this queue's approvals, through the channels that its settings name."""
    from agent.execution.safe_executor import safe_executor

    # What reviewers edit on any channel is assessed as if an agent had asked for it.
    for kind in ("execution", "action"):
        queue.reassess_with(kind, safe_executor.reassess)
        queue.describe_with(kind, safe_executor.schema_of)
    slack = slack_channel(queue)
    channels = [channel for channel in (slack, telegram_channel(queue)) if channel is not None]

    async def resume_tool(order: ToolResumeOrder) -> None:
        await safe_executor.library.resume(order.approval_id, order.identity, wait_seconds=0)

    keeper = ApprovalKeeper(queue, channels, LoopbackResumer(), resume_tool=resume_tool)
    socket = _SocketHolder(queue, slack) if slack is not None and queue.settings.slack_app_token else None
    await keeper.start()
    # No statement runs under a login with rights too many; an operator should hear of it before an agent does.
    checking = asyncio.create_task(_check_logins(queue), name="sql-login-check")
    try:
        if socket is not None:
            socket.start()
        yield
    finally:
        checking.cancel()
        await asyncio.gather(checking, return_exceptions=True)
        # First what takes answers in, then what was taken, then what tells of it.
        if socket is not None:
            await socket.stop()
        await finish()
        await keeper.stop()


async def _check_logins(queue: HumanApprovalQueue) -> None:
    from agent.execution.sql_login_check import warn_of_logins
    from agent.execution.sql_logins import logins_file

    try:
        if not await asyncio.to_thread(logins_file(queue.settings).exists):
            return
        database = queue.database
        owner_url = await database.url() if isinstance(database, EmbeddedDatabase) else None
    except (LearningError, OSError) as error:
        emit("sql_login_check_failed", tenant_id=None, login=None, reason=str(error))
        return
    await portal().run(warn_of_logins(queue.settings, queue.policy, owner_url=owner_url))


class _SocketHolder:
    """Holds the connection of Socket Mode; where Slack cannot be reached it is tried again."""

    def __init__(self, queue: HumanApprovalQueue, slack: SlackChannel) -> None:
        self._socket = SlackSocket(queue, slack)
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to connect."""
        self._task = asyncio.create_task(self._connect(), name="slack-socket")

    async def _connect(self) -> None:
        while True:
            try:
                await portal().run(self._socket.start())
            except LearningError as error:
                emit("slack_socket_failed", reason=str(error))
                await asyncio.sleep(_SOCKET_RETRY_SECONDS)
            else:
                return

    async def stop(self) -> None:
        """Disconnect, or give up connecting."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        await portal().run(self._socket.stop())


app = FastAPI(title="Learning layer", lifespan=lifespan)
app.add_middleware(metrics_routes.MetricsBesideLangGraph)
for _routes in (slack_routes, telegram_routes, approval_routes, alert_routes, health_routes, metrics_routes):
    app.include_router(_routes.router)
