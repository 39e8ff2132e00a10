"""A queue with reviewers over a database of its own, with Slack and Telegram as local servers, and the real routes."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from fastapi import FastAPI
from pydantic import SecretStr

from agent.approval.binding import binding_hash
from agent.approval.human_approval import HumanApprovalQueue
from agent.approval.keeper import ApprovalKeeper
from agent.approval.policy_file import load_policy
from agent.approval.records import Approval, ApprovalRequest
from agent.approval.risk import Risk
from agent.approval.slack import SlackChannel
from agent.approval.telegram import TelegramChannel
from agent.database import open_database
from agent.identity import Identity
from agent.portal import portal
from agent.server import alert_routes, approval_routes, reviewer_pages, slack_routes, telegram_routes
from agent.server.deliveries import finish
from agent.testing.throwaway import ThrowawayDatabase
from tests.chat_servers import (
    SLACK_SECRET,
    SLACK_TOKEN,
    TELEGRAM_SECRET,
    TELEGRAM_TOKEN,
    SlackServer,
    TelegramServer,
    serving,
    slack_press,
    slack_signed,
    telegram_press,
)


def token_of(name: str) -> str:
    """A reviewer's token for the web."""
    return f"token-of-{name}-0123456789"


def _digest(name: str) -> str:
    return hashlib.sha256(token_of(name).encode()).hexdigest()


REVIEWERS = f"""
[[reviewer]]
name = "ada"
user_ids = ["ada-the-user"]
slack = "UADA"
telegram = 1001
token_sha256 = "{_digest("ada")}"
cli = true

[[reviewer]]
name = "eve"
slack = "UEVE"
telegram = 1002
token_sha256 = "{_digest("eve")}"
cli = true

[[reviewer]]
name = "max"
slack = "UMAX"
telegram = 1003
token_sha256 = "{_digest("max")}"
cli = true
tenants = ["other"]
"""
PLACES = """
[approval]
slack_channel = "C111"
slack_escalation_channel = "C999"
telegram_chat = -100
telegram_escalation_chat = -200
"""
BOB = Identity(tenant_id="default", user_id="bob", agent_id="support", session_id="thread-1")


@dataclass
class Desk:
    """What a test of a channel needs."""

    queue: HumanApprovalQueue
    slack: SlackServer
    telegram: TelegramServer
    keeper: ApprovalKeeper
    http: httpx.AsyncClient
    numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    async def ask(
        self,
        arguments: dict[str, Any] | None = None,
        *,
        risk: Risk = Risk.WRITE,
        identity: Identity = BOB,
        seconds: float = 3600,
        escalate: float | None = None,
        batch_id: str | None = None,
        approvers: tuple[str, ...] = ("ada", "eve"),
        votes: int = 1,
        tool: str = "pause_payouts",
    ) -> Approval:
        """Ask for an approval of its own."""
        arguments = {"number": next(self.numbers)} if arguments is None else arguments
        return await self.queue.submit(
            ApprovalRequest(
                request_key=f"key-{next(self.numbers)}",
                tool=tool,
                arguments=arguments,
                arguments_shown=arguments,
                args_hash=binding_hash(tool, arguments, tenant_id=identity.tenant_id),
                risk=risk,
                reason="The customer asked for it.",
                approvers=approvers,
                required_votes=votes,
                expires_in_seconds=seconds,
                escalate_in_seconds=escalate,
                batch_id=batch_id,
            ),
            identity,
        )

    async def deliver(self) -> None:
        """Post and update what is due, once."""
        await portal().run(self.keeper.run_once())

    async def now(self, approval: Approval) -> Approval:
        """The approval as it is now."""
        return await self.queue.get(approval.approval_id, Identity(tenant_id=approval.tenant_id))

    def reassess(self) -> None:
        """Let edits be judged: as the same call with other arguments."""

        async def judge(approval: Approval, arguments: dict[str, Any]) -> ApprovalRequest:
            return ApprovalRequest(
                request_key=f"edit-{next(self.numbers)}",
                tool=approval.tool,
                arguments=arguments,
                args_hash=binding_hash(approval.tool, arguments, tenant_id=approval.tenant_id),
                risk=approval.risk,
                approvers=approval.approvers,
                required_votes=approval.required_votes,
            )

        self.queue.reassess_with("action", judge)

    async def expire(self, approval: Approval) -> None:
        """Wait until its time is over."""
        now = await self.queue.wait(approval.approval_id, BOB, 60)
        assert now.state == "expired"

    # --- Slack

    async def slack_place(self, approval: Approval) -> dict[str, str]:
        """Channel and ts of the approval's first message."""
        post = (await self._posts(approval, "slack"))[0]
        return {"channel": post["channel"], "ts": post["ts"]}

    async def slack_button(self, approval: Approval, text: str) -> tuple[dict[str, Any], dict[str, str]]:
        """A button of the approval's own message, and where that is."""
        place = await self.slack_place(approval)
        button = next(
            one
            for block in self.slack.messages[place["channel"], place["ts"]]["blocks"]
            if block["type"] == "actions"
            for one in block["elements"]
            if one["text"]["text"].startswith(text) and approval.approval_id in one["value"]
        )
        return button, place

    async def _posts(self, approval: Approval, channel: str) -> list[dict[str, Any]]:
        now = await self.now(approval)
        ref = next(message["ref"] for message in now.messages if message["channel"] == channel)
        return list(ref["posts"])

    async def slack_press(
        self, approval: Approval, text: str = "Approve", *, user: str = "UADA", **changes: Any
    ) -> dict[str, Any]:
        """The payload of a press on the approval's message."""
        button, place = await self.slack_button(approval, text)
        return slack_press(button, user=user, **{**place, **changes})

    async def send_slack(
        self, payload: dict[str, Any], *, secret: str = SLACK_SECRET, timestamp: str | None = None
    ) -> httpx.Response:
        """Send it as Slack does, and wait until it is worked on."""
        body, headers = slack_signed(payload, secret=secret, timestamp=timestamp)
        return await self.send("/approvals/slack", body, headers)

    async def send(self, path: str, body: bytes, headers: dict[str, str]) -> httpx.Response:
        """Send these bytes, and wait until they are worked on."""
        response = await self.http.post(path, content=body, headers=headers)
        await finish()
        return response

    # --- Telegram

    async def telegram_places(self, approval: Approval) -> list[dict[str, Any]]:
        """The messages that show the approval."""
        return await self._posts(approval, "telegram")

    async def telegram_data(self, approval: Approval, verdict: str = "a") -> str:
        """The data of the approval's own button, as it was sent."""
        place = (await self.telegram_places(approval))[0]
        expected = TelegramChannel(self.queue).button_data(verdict, [approval])
        return next(
            str(button["callback_data"])
            for row in self.telegram.messages[place["chat"], place["message"]]["reply_markup"][
                "inline_keyboard"
            ]
            for button in row
            if button.get("callback_data") == expected
        )

    async def telegram_press(
        self, approval: Approval, verdict: str = "a", *, user: int = 1001, **changes: Any
    ) -> dict[str, Any]:
        """The update of a press on the approval's first message."""
        place = (await self.telegram_places(approval))[0]
        given = {
            "data": changes.get("data") or await self.telegram_data(approval, verdict),
            "update_id": next(self.numbers),
            "chat": place["chat"],
            "message": place["message"],
            **changes,
        }
        return telegram_press(user=user, **given)

    async def send_telegram(
        self, update: dict[str, Any], *, secret: str | None = TELEGRAM_SECRET
    ) -> httpx.Response:
        """Send it as Telegram does, and wait until it is worked on."""
        headers = {} if secret is None else {"x-telegram-bot-api-secret-token": secret}
        response = await self.http.post("/approvals/telegram", json=update, headers=headers)
        await finish()
        return response


@contextmanager
def desk_settings(database: ThrowawayDatabase, folder: Path, policy: str) -> Iterator[dict[str, Any]]:
    """Changes of settings for both channels, with the servers in `slack` and `telegram`."""
    file = folder / "policy.toml"
    file.write_text(policy, "utf-8")
    slack, telegram = SlackServer(), TelegramServer()
    with serving(slack) as slack_address, serving(telegram) as telegram_address:
        yield {
            "slack": slack,
            "telegram": telegram,
            "settings": database.settings.model_copy(
                update={
                    "policy_file": file,
                    "public_url": "https://agents.example.com",
                    "slack_bot_token": SecretStr(SLACK_TOKEN),
                    "slack_signing_secret": SecretStr(SLACK_SECRET),
                    "slack_api_url": f"{slack_address}/api/",
                    "telegram_bot_token": SecretStr(TELEGRAM_TOKEN),
                    "telegram_secret": SecretStr(TELEGRAM_SECRET),
                    "telegram_api_url": telegram_address,
                }
            ),
        }


@asynccontextmanager
async def open_desk(
    database: ThrowawayDatabase, folder: Path, *, policy: str = REVIEWERS + PLACES
) -> AsyncIterator[Desk]:
    """A desk over this database."""
    with desk_settings(database, folder, policy) as given:
        settings = given["settings"]
        opened = open_database(settings)
        queue = HumanApprovalQueue(opened, settings, load_policy(settings.policy_file))
        slack, telegram = SlackChannel(queue), TelegramChannel(queue)
        app = FastAPI()
        app.include_router(slack_routes.router)
        app.include_router(approval_routes.router)
        app.include_router(alert_routes.router)
        app.dependency_overrides[reviewer_pages.approval_desk] = lambda: web
        app.include_router(telegram_routes.router)
        web = reviewer_pages.ApprovalDesk(queue)
        doors = (slack_routes.SlackDoor(queue, slack), telegram_routes.TelegramDoor(queue, telegram))
        app.dependency_overrides[slack_routes.slack_door] = lambda: doors[0]
        app.dependency_overrides[telegram_routes.telegram_door] = lambda: doors[1]
        transport = httpx.ASGITransport(app)
        try:
            async with httpx.AsyncClient(transport=transport, base_url="https://agents.example.com") as http:
                yield Desk(
                    queue=queue,
                    slack=given["slack"],
                    telegram=given["telegram"],
                    keeper=ApprovalKeeper(queue, [slack, telegram], None),
                    http=http,
                )
        finally:
            await finish()
            await portal().run(opened.close())
