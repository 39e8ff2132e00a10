"""Where Telegram sends what people press: `POST /approvals/telegram`."""

from __future__ import annotations

import hmac
import json
from functools import lru_cache
from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response

from agent.approval.human_approval import HumanApprovalQueue, human_approval_queue
from agent.approval.telegram import TelegramAnswers, TelegramChannel
from agent.events import emit
from agent.server.deliveries import begin
from agent.server.slack_routes import limited_body

router = APIRouter()

_BODY_LIMIT = 256 * 1024


def _tell_failure(error: BaseException) -> None:
    emit("telegram_answer_failed", reason=type(error).__name__)


class TelegramDoor:
    """What the route needs, made from one queue; closed where token or secret are not set."""

    def __init__(self, queue: HumanApprovalQueue, channel: TelegramChannel | None = None) -> None:
        secret, token = queue.settings.telegram_secret, queue.settings.telegram_bot_token
        self.secret = secret.get_secret_value().encode() if secret is not None and token is not None else None
        self.answers = (
            TelegramAnswers(queue, channel or TelegramChannel(queue)) if self.secret is not None else None
        )


@lru_cache(maxsize=1)
def telegram_door() -> TelegramDoor:
    """The door of this process's settings."""
    return TelegramDoor(human_approval_queue)


@router.post("/approvals/telegram", include_in_schema=False)
async def take_update(request: Request, door: Annotated[TelegramDoor, Depends(telegram_door)]) -> Response:
    """Take one update: proven by the secret header, answered at once, worked on afterwards."""
    if door.secret is None or door.answers is None:
        return Response(status_code=404)
    given = request.headers.get("x-telegram-bot-api-secret-token", "")
    # In bytes: compare_digest takes no text beyond ASCII.
    if not hmac.compare_digest(given.encode("utf-8", "surrogatepass"), door.secret):
        emit("telegram_request_refused", reason="the secret is wrong")
        return Response(status_code=401)
    body = await limited_body(request, _BODY_LIMIT)
    try:
        update = json.loads(body or b"")
    except (ValueError, RecursionError):
        return Response(status_code=400)
    if not isinstance(update, dict):
        return Response(status_code=400)
    begin(door.answers.receive(update), failed=_tell_failure)
    return Response(status_code=200)
