"""A run pauses under `langgraph dev`; people decide in Chromium or by command; it ends as they decided."""

from __future__ import annotations

import asyncio
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from langgraph_sdk import get_client

from tests.browser import chromium, needs_chromium
from tests.dev_project import DevProject, dev_project

if TYPE_CHECKING:
    from playwright.async_api import Browser, Page

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

TOKENS = {name: f"token-of-{name}" for name in ("ada", "grace")}
POLICY = "\n".join(
    f"""
[[reviewer]]
name = "{name}"
user_ids = ["{name}@example.com"]
token_sha256 = "{hashlib.sha256(token.encode()).hexdigest()}"
cli = true
"""
    for name, token in TOKENS.items()
)
GRAPH = '''
import re
from pathlib import Path

from langchain.agents import create_agent
from langchain_core.messages import AIMessage, ToolMessage
from langchain_core.tools import tool

from agent.approval.graph_resume import ApprovalPause
from agent.execution.safe_tools_middleware import SafeToolsMiddleware
from agent.testing import ScriptedChat


@tool
def refund(order: str, amount: float, note: str = "") -> str:
    """Refund an order."""
    with (Path(__file__).parent / "refunds.txt").open("a") as book:
        book.write(f"{order} {amount} {note}\\n")
    return f"refunded {amount} for {order}"


@tool
def close_account(name: str) -> str:
    """Close an account for good."""
    with (Path(__file__).parent / "refunds.txt").open("a") as book:
        book.write(f"closed {name}\\n")
    return f"closed {name}"


def answer(messages):
    if isinstance(messages[-1], ToolMessage):
        return AIMessage(f"Done: {messages[-1].text}")
    words = messages[-1].text.split()
    if words[0] == "close":
        return AIMessage("", tool_calls=[{"name": "close_account", "args": {"name": words[1]}, "id": "c1"}])
    args = {"order": words[1], "amount": float(words[2]), "note": "<script>alert(1)</script> \\u202eabc"}
    return AIMessage("", tool_calls=[{"name": "refund", "args": args, "id": "c1"}])


graph = create_agent(
    ScriptedChat(script=[answer]),
    [refund, close_account],
    middleware=[SafeToolsMiddleware(risks={"refund": "WRITE", "close_account": "DESTRUCTIVE"})],
).with_config(callbacks=[ApprovalPause()])
'''


@needs_chromium
async def test_people_decide_and_the_runs_end_as_they_decided(data_dir: Path) -> None:
    with dev_project(data_dir, graph=GRAPH, policy=POLICY) as project:
        async with get_client(url=project.url) as client, chromium() as browser:
            await _approve_edit_and_reject(project, client, browser)
            await _two_people_for_what_destroys(project, client, browser)
            await _on_the_command_line(project, client)
    log = project.log.read_text()
    assert "BlockingError" not in log
    assert "Traceback" not in log, log


async def _approve_edit_and_reject(project: DevProject, client: Any, browser: Browser) -> None:
    # Without scripts, on a phone, in the dark.
    context = await browser.new_context(
        java_script_enabled=False, viewport={"width": 390, "height": 844}, color_scheme="dark"
    )
    page = await context.new_page()
    approved, edited, rejected = [await _pause(client, f"refund {order} 5") for order in ("A1", "B2", "C3")]
    await page.goto(f"{project.url}/approvals")
    await _log_in(page, "nobodys-token")
    assert "No reviewer has this token" in await page.inner_text("body")
    await _log_in(page, TOKENS["ada"])
    assert await page.locator("ul.rows a.row").count() == 3

    await _open(page, project, approved)
    text = await page.inner_text("article")
    assert '"A1"' in text
    assert "<script>alert(1)</script> \\u{202E}abc" in text
    await page.fill("#note", "as discussed")
    await _press(page, "Approve")
    assert "Your approval is recorded" in await page.inner_text("body")
    assert "Done: " in await _end(client, approved)
    assert _refunds(project) == ["A1 5.0"]

    await _open(page, project, edited)
    await page.click("summary")
    await page.fill("label:text-is('amount') + input", "2.5")
    await _press(page, "Ask for this instead")
    assert "a hash of its own" in await page.inner_text("body")
    assert "Done: " in await _end(client, edited)
    assert _refunds(project) == ["A1 5.0", "B2 2.5"]

    await _open(page, project, rejected)
    await page.locator("#note").fill("not this customer")
    await _press(page, "Reject")
    assert "not this customer" in await _end(client, rejected)
    assert _refunds(project) == ["A1 5.0", "B2 2.5"]

    await page.goto(f"{project.url}/approvals")
    assert "Nothing waits" in await page.inner_text("body")
    assert "executed" in (await page.inner_text("body")).lower()
    await _press(page, "Log out")
    await page.goto(f"{project.url}/approvals")
    assert await page.locator("#credential").count() == 1


async def _two_people_for_what_destroys(project: DevProject, client: Any, browser: Browser) -> None:
    thread = await _pause(client, "close bob")
    for name in ("ada", "grace"):
        context = await browser.new_context(viewport={"width": 390, "height": 844})
        page = await context.new_page()
        messages, dialogs = _heard(page)
        await page.goto(f"{project.url}/approvals")
        await _log_in(page, TOKENS[name])
        await _open(page, project, thread)
        assert await page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), (
            "it fits on a phone"
        )
        await _press(page, "Approve")
        assert "tick that you have read" in await page.inner_text("[role=alert]")
        assert "closed bob" not in _refunds(project)
        await page.check("input[name=confirmed]")
        await _press(page, "Approve")
        assert "Your approval is recorded" in await page.inner_text("body")
        assert [one for one in messages if "Content Security Policy" in one] == []
        assert dialogs == [], "no script of an agent ran"
        await context.close()
    assert "Done: " in await _end(client, thread)
    assert _refunds(project)[-1] == "closed bob"


async def _on_the_command_line(project: DevProject, client: Any) -> None:
    thread = await _pause(client, "refund D4 1")
    listed = await asyncio.to_thread(project.agent, "approvals", "list", "--json")
    [approval] = json.loads(listed.stdout)
    what = (approval["approval_id"], "--as", "grace", "--hash", approval["args_hash"][:16])
    decided = await asyncio.to_thread(project.agent, "approvals", "approve", *what)
    assert decided.stdout == "grace approved it. It is approved now.\n", decided.stderr
    assert "Done: " in await _end(client, thread)
    assert _refunds(project)[-1] == "D4 1.0"
    logged = json.loads((await asyncio.to_thread(project.agent, "log", "list", "--json")).stdout)
    assert [(row["tool"], row["state"], row["decided_by"], row["user_id"]) for row in logged[:2]] == [
        ("refund", "executed", ["grace"], "bob@example.com"),
        ("close_account", "executed", ["ada", "grace"], "bob@example.com"),
    ]
    verified = await asyncio.to_thread(project.agent, "log", "verify")
    assert verified.returncode == 0, verified.stdout


async def _pause(client: Any, text: str) -> str:
    """A run that waits for people; its thread."""
    thread = (await client.threads.create())["thread_id"]
    state = await client.runs.wait(
        thread,
        "shop",
        input={"messages": [{"role": "user", "content": text}]},
        config={"configurable": {"user_id": "bob@example.com"}},
    )
    assert len(state["__interrupt__"]) == 1, state
    return str(thread)


async def _end(client: Any, thread: str) -> str:
    """The last words of a run, once it has ended by itself."""
    for _ in range(300):
        state = await client.threads.get_state(thread)
        if not state["next"]:
            return str(state["values"]["messages"][-1]["content"])
        await asyncio.sleep(0.1)
    raise AssertionError(f"the run did not go on: {state}")


def _heard(page: Page) -> tuple[list[str], list[str]]:
    """What the page's console and its dialogs will say."""
    messages: list[str] = []
    dialogs: list[str] = []
    page.on("console", lambda message: messages.append(message.text))
    page.on("dialog", lambda dialog: dialogs.append(dialog.message))
    return messages, dialogs


async def _log_in(page: Page, token: str) -> None:
    await page.fill("#credential", token)
    await _press(page, "Log in")


async def _press(page: Page, button: str) -> None:
    await page.click(f"button:text-is('{button}')")


async def _open(page: Page, project: DevProject, thread: str) -> None:
    """Follow the list to the request of this thread."""
    await page.goto(f"{project.url}/approvals")
    links = [await row.get_attribute("href") for row in await page.locator("ul.rows a.row").all()]
    for link in links:
        await page.goto(f"{project.url}{link}")
        if thread in await page.inner_text("article") and await page.locator("#note").count():
            return
    raise AssertionError(f"no request of thread {thread} waits on the page")


def _refunds(project: DevProject) -> list[str]:
    book = project.folder / "refunds.txt"
    return [line.split(" <")[0].strip() for line in book.read_text().splitlines()] if book.exists() else []
