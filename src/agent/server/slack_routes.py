"""Where Slack sends what people press: `POST /approvals/slack`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Annotated, Any
from urllib.parse import parse_qs

from fastapi import APIRouter, Depends, Request, Response
from slack_sdk.signature import SignatureVerifier

from agent.approval.human_approval import HumanApprovalQueue, human_approval_queue
from agent.approval.slack import SlackAnswers, SlackChannel, form_fault
from agent.events import emit
from agent.server.deliveries import begin

router = APIRouter()

_BODY_LIMIT = 256 * 1024


def _tell_failure(error: BaseException) -> None:
    emit("slack_answer_failed", reason=type(error).__name__)


class SlackDoor:
    """What the route needs, made from one queue."""

    def __init__(self, queue: HumanApprovalQueue, channel: SlackChannel | None = None) -> None:
        secret = queue.settings.slack_signing_secret
        self.verifier = SignatureVerifier(secret.get_secret_value()) if secret is not None else None
        self.answers = SlackAnswers(queue, channel or SlackChannel(queue))


@lru_cache(maxsize=1)
def slack_door() -> SlackDoor:
    """The door of this process's settings."""
    return SlackDoor(human_approval_queue)


@router.post("/approvals/slack", include_in_schema=False)
async def take_interaction(request: Request, door: Annotated[SlackDoor, Depends(slack_door)]) -> Response:
    """Take one interaction: proven by its signature, answered at once, worked on afterwards."""
    if door.verifier is None:
        return Response(status_code=404)
    body = await limited_body(request, _BODY_LIMIT)
    signature = request.headers.get("x-slack-signature", "")
    if body is None or not _is_signed(door.verifier, request, body, signature):
        emit("slack_request_refused", reason="the signature or its time is wrong")
        return Response(status_code=401)
    payload = _payload(body)
    if payload is None:
        return Response(status_code=400)
    fault = form_fault(payload)
    if fault is not None:
        return Response(json.dumps(fault), media_type="application/json")
    # A copy has the same signature, because that covers time and body.
    key = hashlib.sha256(signature.encode()).hexdigest()
    begin(door.answers.receive(payload, delivery_key=key), failed=_tell_failure)
    return Response(status_code=200)


def _is_signed(verifier: SignatureVerifier, request: Request, body: bytes, signature: str) -> bool:
    # One header of each: what is read here must be what is remembered.
    if len(request.headers.getlist("x-slack-signature")) != 1:
        return False
    try:
        return verifier.is_valid(body, request.headers.get("x-slack-request-timestamp"), signature)
    except (ValueError, TypeError, OverflowError):  # a time that is no number, a body that is no text
        return False


def _payload(body: bytes) -> Mapping[str, Any] | None:
    try:
        fields = parse_qs(body.decode("utf-8"), strict_parsing=True, max_num_fields=4)
        payload = json.loads(fields["payload"][0])
    except (ValueError, KeyError, RecursionError):
        return None
    return payload if isinstance(payload, Mapping) else None


async def limited_body(request: Request, limit: int) -> bytes | None:
    """The body as it came; `None` where it is longer than the limit."""
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > limit:
            return None
    return body
