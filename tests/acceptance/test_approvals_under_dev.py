"""A run pauses under `langgraph dev` and ends once a person has said yes: in Slack, in Telegram, in a browser and on
the command line."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import httpx
import psycopg
import pytest
from langgraph_sdk import get_client

from agent import Identity, LearningMachine
from agent.portal import portal
from graphs.shop_tables import make_shop_tables
from tests.acceptance.dev_servers import DevServer, dev_server
from tests.browser import chromium, needs_chromium
from tests.chat_servers import (
    SLACK_CHANNEL,
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

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240), needs_chromium]

T = TypeVar("T")
_WEB_TOKEN = "a-token-for-the-web"
_POLICY = f"""
[[reviewer]]
name = "grace"
user_ids = ["grace"]
slack = "U1"
telegram = 4242
token_sha256 = "{hashlib.sha256(_WEB_TOKEN.encode()).hexdigest()}"
cli = true

[approval]
slack_channel = "{SLACK_CHANNEL}"
telegram_chat = 4242

[[table]]
name = "shop.orders"
update = ["status"]
"""


class _Shop:
    """The shop's tables in the database of the server, seen from outside."""

    def __init__(self, url: str) -> None:
        self._url = url

    def status_of(self, order_id: str) -> str:
        with psycopg.connect(self._url) as connection:
            [status] = connection.execute(
                "SELECT status FROM shop.orders WHERE order_id = %s", [order_id]
            ).fetchone() or [""]
        return str(status)


async def _until(look: Callable[[], T | None]) -> T:
    """What is there at last, looked for ten times a second for half a minute."""
    for _ in range(300):
        found = await asyncio.to_thread(look)
        if found:
            return found
        await asyncio.sleep(0.1)
    raise AssertionError("it did not come about within half a minute")


async def _paused(client: Any, order_id: str) -> tuple[str, str]:
    """A thread that waits for a yes to a change of this order, and the id of the approval's batch."""
    thread = (await client.threads.create())["thread_id"]
    state = await client.runs.wait(
        thread,
        "operations",
        input={"messages": [{"role": "user", "content": f"Mark order {order_id} as refunded"}]},
        config={"configurable": {"user_id": "ada"}},
    )
    [pause] = state["__interrupt__"]
    return thread, str(pause["value"]["approval_batch"])


async def _ended(client: Any, thread: str) -> str:
    """The last answer on a thread, once nothing runs or waits on it any more."""
    for _ in range(300):
        state = await client.threads.get_state(thread)
        last = state["values"]["messages"][-1]
        if not state["next"] and last["type"] == "ai" and not last["tool_calls"]:
            return str(last["content"])
        await asyncio.sleep(0.1)
    raise AssertionError("the run was not resumed within half a minute")


def _button(message: dict[str, Any], label: str) -> tuple[dict[str, Any], str]:
    """A button of a Slack message by what is on it, and the id of its block."""
    for block in message["blocks"]:
        for element in block.get("elements", ()):
            if element.get("type") == "button" and element["text"]["text"] == label:
                return element, block["block_id"]
    raise AssertionError(f"no button {label!r}")


async def _by_slack(server: DevServer, slack: SlackServer) -> None:
    message = await _until(lambda: next((m for m in slack.of("chat.postMessage") if "A1003" in str(m)), None))
    ts = next(ts for (_, ts), shown in slack.messages.items() if "A1003" in str(shown))
    button, block_id = _button(message, "Approve")
    body, headers = slack_signed(slack_press(button, ts=ts, user="U1", block_id=block_id))
    async with httpx.AsyncClient(base_url=server.url) as http:
        forged = await http.post(
            "/approvals/slack", content=body, headers={**headers, "x-slack-signature": "v0=" + "0" * 64}
        )
        assert forged.status_code == 401
        assert (await http.post("/approvals/slack", content=body, headers=headers)).is_success


async def _by_telegram(server: DevServer, telegram: TelegramServer) -> None:
    await _until(lambda: any("A1004" in str(m) for m in telegram.of("sendMessage")))
    [(chat, number, message)] = [
        (chat, number, shown)
        for (chat, number), shown in telegram.messages.items()
        if "A1004" in str(shown) and chat == 4242
    ]
    data = next(
        button["callback_data"]
        for row in message["reply_markup"]["inline_keyboard"]
        for button in row
        if "Approve" in button["text"]
    )
    update = telegram_press(data, update_id=1, user=4242, chat=chat, message=number)
    async with httpx.AsyncClient(base_url=server.url) as http:
        forged = await http.post("/approvals/telegram", json=update)
        assert forged.status_code in (401, 403)
        told = await http.post(
            "/approvals/telegram", json=update, headers={"x-telegram-bot-api-secret-token": TELEGRAM_SECRET}
        )
        assert told.is_success


async def _by_browser(server: DevServer) -> None:
    async with chromium() as browser:
        page = await browser.new_page()
        await page.goto(f"{server.url}/approvals")
        await page.fill("#credential", _WEB_TOKEN)
        await page.click("text=Log in")
        await page.click("a.row >> nth=0")  # the newest
        assert "A1005" in await page.inner_text("article")
        await page.click("button:has-text('Approve')")
        await page.wait_for_load_state()


async def _by_command(server: DevServer, batch: str, policy: Path) -> None:
    environment = os.environ | {
        "LEARNING_DATA_DIR": str(server.settings.data_dir),
        "LEARNING_POLICY_FILE": str(policy),
    }
    program = str(Path(sys.executable).with_name("agent"))

    async def run(*arguments: str) -> str:
        process = await asyncio.create_subprocess_exec(
            program,
            *arguments,
            env=environment,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        said, _ = await process.communicate()
        assert process.returncode == 0, said.decode()
        return said.decode()

    [waiting] = json.loads(await run("approvals", "list", "--json"))
    assert waiting["batch_id"] == batch
    await run("approvals", "approve", waiting["approval_id"], "--as", "grace", "--yes")


async def test_a_yes_in_slack_telegram_a_browser_or_a_terminal_lets_the_run_end(data_dir: Path) -> None:
    policy = data_dir / "policy.toml"
    policy.write_text(_POLICY)
    slack, telegram = SlackServer(), TelegramServer()
    with serving(slack) as slack_url, serving(telegram) as telegram_url:
        variables = {
            "LEARNING_POLICY_FILE": str(policy),
            "SLACK_BOT_TOKEN": SLACK_TOKEN,
            "SLACK_SIGNING_SECRET": SLACK_SECRET,
            "SLACK_API_URL": f"{slack_url}/api/",
            "TELEGRAM_BOT_TOKEN": TELEGRAM_TOKEN,
            "TELEGRAM_SECRET": TELEGRAM_SECRET,
            "TELEGRAM_API_URL": telegram_url,
        }
        with dev_server(data_dir, variables) as server:
            machine = LearningMachine(settings=server.settings)
            shop_url = await machine.queue_url()
            await asyncio.to_thread(make_shop_tables, shop_url)
            shop = _Shop(shop_url)
            async with get_client(url=server.url) as client:
                ways: dict[str, Callable[[str], Any]] = {
                    "A1003": lambda batch: _by_slack(server, slack),
                    "A1004": lambda batch: _by_telegram(server, telegram),
                    "A1005": lambda batch: _by_browser(server),
                    "A1006": lambda batch: _by_command(server, batch, policy),
                }
                for order_id, say_yes in ways.items():
                    thread, batch = await _paused(client, order_id)
                    assert shop.status_of(order_id) != "refunded"
                    await say_yes(batch)
                    assert "updated" in await _ended(client, thread)
                    assert shop.status_of(order_id) == "refunded"
            # The cards say what became of it.
            await _until(lambda: any("grace" in str(m) for m in slack.of("chat.update")))
            await _until(lambda: any("grace" in str(m) for m in telegram.of("editMessageText")))
            checked = await portal().run(
                machine.database.call("verify_executions", Identity(tenant_id=server.settings.tenant))
            )
            assert checked["intact"]
            await machine.aclose()
    log = server.log.read_text()
    assert "BlockingError" not in log
    assert "Traceback" not in log
