"""Slack and Telegram as local servers: they take what the real ones take, refuse what those refuse, and remember it."""

from __future__ import annotations

import hashlib
import hmac
import itertools
import json
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar
from urllib.parse import parse_qs, urlencode

SLACK_TOKEN = "xoxb-test"
SLACK_APP_TOKEN = "xapp-test"
SLACK_SECRET = "8f742231b10e8888abcd99yyyzzz85a5"
SLACK_APP, SLACK_TEAM, SLACK_CHANNEL, SLACK_ESCALATION = "A111", "T111", "C111", "C999"
TELEGRAM_TOKEN = "4711:test-token"
TELEGRAM_SECRET = "a-secret-of-24-characters"
TELEGRAM_GROUP = -100


class ChatServer:
    """What a chat server was told, by method, in order."""

    prefix: ClassVar[str]

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.refuse: dict[str, str] = {}
        """Method -> error with which it is refused."""
        self.numbers = itertools.count(1)
        self.messages: dict[tuple[Any, Any], dict[str, Any]] = {}
        """Chat and message -> what it shows now."""
        self.address = ""

    def of(self, method: str) -> list[dict[str, Any]]:
        """The arguments of each call of a method."""
        return [arguments for name, arguments in list(self.calls) if name == method]

    def answer(self, method: str, arguments: dict[str, Any], authorization: str) -> dict[str, Any]:
        """The document that the method answers."""
        raise NotImplementedError


class SlackServer(ChatServer):
    """The part of Slack's Web API that approvals use, with its limits."""

    prefix = "/api/"
    socket_url = ""

    def answer(self, method: str, arguments: dict[str, Any], authorization: str) -> dict[str, Any]:
        token = SLACK_APP_TOKEN if method == "apps.connections.open" else SLACK_TOKEN
        if authorization != f"Bearer {token}":
            return {"ok": False, "error": "invalid_auth"}
        if method in self.refuse:
            return {"ok": False, "error": self.refuse[method]}
        fault = next(
            block_faults(arguments.get("blocks") or arguments.get("view", {}).get("blocks") or []), None
        )
        if fault is not None:
            return {"ok": False, "error": f"invalid_blocks: {fault}"}
        match method:
            case "auth.test":
                return {"ok": True, "team_id": SLACK_TEAM, "user_id": "UBOT", "bot_id": "BBOT"}
            case "bots.info":
                return {"ok": True, "bot": {"id": "BBOT", "app_id": SLACK_APP}}
            case "chat.postMessage":
                stamp = f"1700000000.{next(self.numbers):06}"
                self.messages[arguments["channel"], stamp] = arguments
                return {"ok": True, "channel": arguments["channel"], "ts": stamp, "message": {"ts": stamp}}
            case "chat.update":
                self.messages[arguments["channel"], arguments["ts"]] = arguments
                return {"ok": True, "channel": arguments["channel"], "ts": arguments["ts"]}
            case "chat.postEphemeral":
                return {"ok": True, "message_ts": "1700000000.999999"}
            case "views.open":
                return {"ok": True, "view": {"id": "V1"}}
            case "apps.connections.open":
                return {"ok": True, "url": self.socket_url}
        return {"ok": False, "error": "unknown_method"}


class TelegramServer(ChatServer):
    """The part of the Bot API that approvals use, with its limits."""

    prefix = f"/bot{TELEGRAM_TOKEN}/"

    def __init__(self) -> None:
        super().__init__()
        self.parameters: dict[str, Any] = {}
        """What goes with a refusal, such as `retry_after`."""

    def answer(self, method: str, arguments: dict[str, Any], authorization: str) -> dict[str, Any]:
        if method in self.refuse:
            why = {"ok": False, "error_code": 400, "description": self.refuse[method]}
            return why | ({"parameters": self.parameters} if self.parameters else {})
        if fault := next(message_faults(arguments), None):
            return {"ok": False, "error_code": 400, "description": fault}
        match method:
            case "sendMessage":
                chat = int(arguments["chat_id"])
                kind = "private" if chat > 0 else "supergroup"
                result = {"message_id": next(self.numbers), "chat": {"id": chat, "type": kind}}
                self.messages[chat, result["message_id"]] = arguments
                return {"ok": True, "result": result}
            case "editMessageText":
                self.messages[int(arguments["chat_id"]), arguments["message_id"]] = arguments
                return {"ok": True, "result": True}
            case "answerCallbackQuery" | "setWebhook" | "deleteWebhook":
                return {"ok": True, "result": True}
        return {"ok": False, "error_code": 404, "description": "Not Found"}


@contextmanager
def serving(server: ChatServer) -> Iterator[str]:
    """The address of the server, while the block runs."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            method = self.path.removeprefix(server.prefix) if self.path.startswith(server.prefix) else ""
            if "json" in (self.headers.get("content-type") or ""):
                arguments = json.loads(body)
            else:
                arguments = {name: values[0] for name, values in parse_qs(body.decode()).items()}
            server.calls.append((method, arguments))
            answer = server.answer(method, arguments, self.headers.get("authorization") or "")
            written = json.dumps(answer).encode()
            self.send_response(int(answer.get("error_code", 200)))
            self.send_header("content-type", "application/json; charset=utf-8")
            self.send_header("content-length", str(len(written)))
            self.end_headers()
            self.wfile.write(written)

        def log_message(self, *_: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    server.address = f"http://127.0.0.1:{http.server_address[1]}"
    try:
        yield server.address
    finally:
        http.shutdown()
        thread.join()
        http.server_close()


# --- what the two send ------------------------------------------------------------------------------------------


def slack_press(
    button: Mapping[str, Any],
    *,
    ts: str,
    user: str,
    channel: str = SLACK_CHANNEL,
    block_id: str = "",
    **changes: Any,
) -> dict[str, Any]:
    """The payload of a press of a button of a message."""
    return {
        "type": "block_actions",
        "api_app_id": SLACK_APP,
        "team": {"id": SLACK_TEAM, "domain": "test"},
        "user": {"id": user, "username": "somebody", "team_id": SLACK_TEAM},
        "channel": {"id": channel, "name": "approvals"},
        "container": {"type": "message", "message_ts": ts, "channel_id": channel, "is_ephemeral": False},
        "message": {"ts": ts, "app_id": SLACK_APP},
        "trigger_id": "13345224609.738474920.8088930838d88f008e0",
        "response_url": "https://hooks.slack.com/actions/T111/1/x",
        "actions": [
            {
                "type": "button",
                "action_id": button["action_id"],
                "block_id": block_id,
                "value": button["value"],
                "action_ts": f"{time.time():.6f}",
            }
        ],
        **changes,
    }


def slack_form(view: Mapping[str, Any], written: str, *, user: str, **changes: Any) -> dict[str, Any]:
    """The payload of a form that was sent."""
    return {
        "type": "view_submission",
        "api_app_id": SLACK_APP,
        "team": {"id": SLACK_TEAM, "domain": "test"},
        "user": {"id": user, "username": "somebody", "team_id": SLACK_TEAM},
        "view": {
            "id": "V1",
            "type": "modal",
            "callback_id": view["callback_id"],
            "private_metadata": view["private_metadata"],
            "state": {"values": {"arguments": {"json": {"type": "plain_text_input", "value": written}}}},
        },
        **changes,
    }


def slack_signed(
    payload: Mapping[str, Any], *, secret: str = SLACK_SECRET, timestamp: str | None = None
) -> tuple[bytes, dict[str, str]]:
    """Body and headers as Slack sends them."""
    body = urlencode({"payload": json.dumps(payload)}).encode()
    timestamp = str(int(time.time())) if timestamp is None else timestamp
    digest = hmac.new(secret.encode(), f"v0:{timestamp}:".encode() + body, hashlib.sha256).hexdigest()
    return body, {
        "content-type": "application/x-www-form-urlencoded",
        "x-slack-request-timestamp": timestamp,
        "x-slack-signature": f"v0={digest}",
    }


def telegram_press(
    data: str, *, update_id: int, user: int, chat: int, message: int, **changes: Any
) -> dict[str, Any]:
    """The update of a press of a button of a message."""
    return {
        "update_id": update_id,
        "callback_query": {
            "id": f"q{update_id}",
            "from": {"id": user, "is_bot": False, "first_name": "Somebody"},
            "message": {
                "message_id": message,
                "chat": {"id": chat, "type": "private" if chat > 0 else "supergroup"},
                "date": 1,
                "text": "…",
            },
            "chat_instance": "1",
            "data": data,
            **changes,
        },
    }


# --- limits of the two, by their documentation ------------------------------------------------------------------


def block_faults(blocks: list[dict[str, Any]]) -> Iterator[str]:
    """What Slack would refuse in these blocks."""
    if len(blocks) > 50:
        yield "more than 50 blocks"
    ids = [block["block_id"] for block in blocks if "block_id" in block]
    if len(set(ids)) != len(ids):
        yield "a block_id is there twice"
    for block in blocks:
        if len(block.get("block_id", "")) > 255:
            yield "block_id longer than 255"
        match block["type"]:
            case "header":
                if not 1 <= len(block["text"]["text"]) <= 150:
                    yield "header text"
            case "section":
                if not 1 <= len(block["text"]["text"]) <= 3000:
                    yield "section text"
            case "rich_text":
                if not block["elements"]:
                    yield "rich_text without elements"
                for element in block["elements"]:
                    if not element["elements"] or any(not part["text"] for part in element["elements"]):
                        yield "an empty text"
            case "actions":
                if not 1 <= len(block["elements"]) <= 25:
                    yield "number of elements"
                names = [one["action_id"] for one in block["elements"]]
                if len(set(names)) != len(names):
                    yield "an action_id is there twice"
                for one in block["elements"]:
                    yield from _button_faults(one)
            case "input":
                if len(block["element"].get("initial_value", "")) > 3000:
                    yield "initial_value"
            case other:
                yield f"unknown type {other}"


def _button_faults(button: dict[str, Any]) -> Iterator[str]:
    if len(button["text"]["text"]) > 75 or len(button["value"]) > 2000 or len(button["action_id"]) > 255:
        yield "a button's limits"
    confirm = button.get("confirm")
    if confirm and any(
        not 1 <= len(confirm[name]["text"]) <= limit
        for name, limit in (("title", 100), ("text", 300), ("confirm", 30), ("deny", 30))
    ):
        yield "a confirm dialog's limits"


def message_faults(arguments: dict[str, Any]) -> Iterator[str]:
    """What Telegram would refuse in these arguments."""
    text = arguments.get("text")
    if text is not None and "chat_id" in arguments:
        units = len(text.encode("utf-16-le")) // 2
        if not 1 <= units <= 4096:
            yield "Bad Request: message is too long"
        if any(e["length"] < 1 or e["offset"] + e["length"] > units for e in arguments.get("entities", ())):
            yield "Bad Request: entity beyond the text"
    if "callback_query_id" in arguments and len(arguments.get("text", "")) > 200:
        yield "Bad Request: text is too long"
    for row in arguments.get("reply_markup", {}).get("inline_keyboard", ()):
        for button in row:
            if len(button.get("callback_data", "x").encode()) > 64:
                yield "Bad Request: BUTTON_DATA_INVALID"
