"""Answers from Slack over Socket Mode."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from agent.approval.slack_answers import SlackAnswers, form_fault
from agent.approval.slack_posting import SlackChannel
from agent.errors import OperatorError
from agent.events import emit

if TYPE_CHECKING:
    from slack_sdk.socket_mode.aiohttp import SocketModeClient

    from agent.approval.human_approval import HumanApprovalQueue


class SlackSocket:
    """Socket Mode: answers come over a connection of ours, and the server needs no public address."""

    def __init__(self, queue: HumanApprovalQueue, channel: SlackChannel) -> None:
        self._queue = queue
        self._channel = channel
        self._answers = SlackAnswers(queue, channel)
        self._socket: SocketModeClient | None = None
        self._at_work: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Connect, and stay connected until `stop`; both in the portal's loop.

        Raises:
            OperatorError: SLACK_APP_TOKEN is not set, or Slack did not take it.
        """
        import aiohttp
        from slack_sdk.errors import SlackClientError
        from slack_sdk.socket_mode.aiohttp import SocketModeClient

        token = self._queue.settings.slack_app_token
        if token is None:
            raise OperatorError("Socket Mode needs SLACK_APP_TOKEN (xapp-…), and it is not set")
        self._socket = SocketModeClient(app_token=token.get_secret_value(), web_client=self._channel.client)
        self._socket.socket_mode_request_listeners.append(self._listen)
        try:
            await self._socket.connect()  # type: ignore[no-untyped-call]
        except (SlackClientError, aiohttp.ClientError, TimeoutError, OSError) as error:
            await self.stop()
            raise OperatorError(
                f"Socket Mode could not start: {type(error).__name__}. Is Socket Mode on in the app, and "
                "SLACK_APP_TOKEN an app-level token with the scope connections:write?"
            ) from None

    async def stop(self) -> None:
        """Disconnect, and finish what has been received."""
        if self._socket is not None:
            await self._socket.close()  # type: ignore[no-untyped-call]
            self._socket = None
        if self._at_work:
            await asyncio.gather(*self._at_work, return_exceptions=True)

    async def _listen(self, client: Any, request: Any) -> None:
        from slack_sdk.socket_mode.response import SocketModeResponse

        payload = request.payload if isinstance(request.payload, Mapping) else {}
        fault = form_fault(payload) if request.type == "interactive" else None
        await client.send_socket_mode_response(SocketModeResponse(request.envelope_id, payload=fault))
        if request.type == "interactive" and fault is None:
            task = asyncio.create_task(
                self._answers.receive(payload, delivery_key=f"socket:{request.envelope_id}")
            )
            self._at_work.add(task)
            task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._at_work.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            emit("slack_answer_failed", reason=type(error).__name__)
