"""`/metrics` for Prometheus, and who may read it.

A LangGraph server has a `/metrics` of its own that no route can take the place of. `MetricsBesideLangGraph` appends
ours to it; `/learning/metrics` gives ours alone.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Callable, Mapping
from contextlib import suppress
from ipaddress import ip_address
from typing import Annotated, Any, Final

from fastapi import APIRouter, Depends
from fastapi.responses import PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from agent.errors import LearningError
from agent.server.house import House, house
from agent.server.house_state import StateUnread

router = APIRouter()

_CACHED_SECONDS: Final = 5.0
_WAIT_SECONDS: Final = 2.0
_FORWARDED: Final = ("forwarded", "x-forwarded-for", "x-real-ip", "via")
"""Headers of proxies: behind one, everybody seems to be on this machine."""


@router.get("/learning/metrics", include_in_schema=False)
async def learning_metrics(request: Request, here: Annotated[House, Depends(house)]) -> Response:
    """The metrics of this process and its database."""
    refused = refusal(request, here)
    return refused if refused is not None else Response(await rendered(here), media_type=CONTENT_TYPE_LATEST)


async def rendered(here: House) -> bytes:
    """The metrics as text, with the gauges of a database that answers in time."""
    state: Mapping[str, Any] | None = None
    with suppress(LearningError, StateUnread):  # the gauge agent_database_up says so, and /readyz why
        state = await here.state.read(max_age_seconds=_CACHED_SECONDS, wait_seconds=_WAIT_SECONDS)
    return await asyncio.to_thread(here.metrics.render, state)


def refusal(request: Request, here: House) -> Response | None:
    """Why this caller may not read them; `None`: they may."""
    token = here.settings.metrics_token
    if token is not None:
        given = request.headers.get("authorization", "")
        if hmac.compare_digest(given.encode(), f"Bearer {token.get_secret_value()}".encode()):
            return None
        return PlainTextResponse(
            "The metrics need the token of LEARNING_METRICS_TOKEN, as Authorization: Bearer.\n",
            status_code=401,
            headers={"WWW-Authenticate": "Bearer"},
        )
    if _is_on_this_machine(request):
        return None
    return PlainTextResponse(
        "Without LEARNING_METRICS_TOKEN the metrics are for programs on the server's own machine.\n",
        status_code=403,
    )


def _is_on_this_machine(request: Request) -> bool:
    if request.client is None or any(name in request.headers for name in _FORWARDED):
        return False
    try:
        address = ip_address(request.client.host)
    except ValueError:
        return False
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


class MetricsBesideLangGraph:
    """Answers `GET /metrics` with what the server says there and ours; with ours alone where it says nothing.

    Who may not read ours gets the server's alone. All other requests go through untouched.

    Args:
        app: the application around which it stands.
        house_of: gives what the metrics are of.
    """

    def __init__(self, app: ASGIApp, house_of: Callable[[], House] = house) -> None:
        self._app = app
        self._house_of = house_of

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http" or scope["path"] != "/metrics" or scope["method"] != "GET":
            await self._app(scope, receive, send)
            return
        theirs = _Answer()
        await self._app(scope, receive, theirs.take)
        here = self._house_of()
        refused = refusal(Request(scope), here)
        answer = theirs.as_response()
        if theirs.status == 404:
            answer = refused or Response(await rendered(here), media_type=CONTENT_TYPE_LATEST)
        elif theirs.is_text and refused is None:
            body = bytes(theirs.body)
            if body and not body.endswith(b"\n"):
                body += b"\n"
            answer = Response(body + await rendered(here), media_type=CONTENT_TYPE_LATEST)
        await answer(scope, receive, send)


class _Answer:
    """What an application answered, kept."""

    def __init__(self) -> None:
        self.status = 500
        self.headers = Headers()
        self.body = bytearray()

    async def take(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = Headers(raw=message.get("headers", []))
        elif message["type"] == "http.response.body":
            self.body += message.get("body", b"")

    @property
    def is_text(self) -> bool:
        return self.status == 200 and self.headers.get("content-type", "").startswith("text/plain")

    def as_response(self) -> Response:
        given = Response(bytes(self.body), status_code=self.status)
        given.raw_headers = self.headers.raw
        return given
