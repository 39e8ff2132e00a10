"""Approvals in Telegram: the Bot API's protocol against a local server, the real route, the real queue."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from agent.approval.records import Approval
from agent.approval.risk import Risk
from agent.approval.telegram import TelegramChannel, telegram_channel
from agent.commands.telegram import app
from agent.errors import ConfigurationError, OperatorError
from agent.events import Event, listening
from agent.identity import Identity
from agent.portal import portal
from agent.server.deliveries import finish
from agent.settings import current_settings
from agent.testing.throwaway import ThrowawayDatabase
from tests.approval_desk import REVIEWERS, Desk, open_desk
from tests.chat_servers import TELEGRAM_SECRET, TELEGRAM_TOKEN, TelegramServer, serving, telegram_press


@pytest.fixture
async def desk(learning_database: ThrowawayDatabase, tmp_path: Path) -> AsyncIterator[Desk]:
    async with open_desk(learning_database, tmp_path) as opened:
        yield opened


async def posted(desk: Desk, **given: Any) -> Approval:
    """An approval whose card is in Telegram."""
    approval = await desk.ask(**given)
    await desk.deliver()
    return approval


def sent_to(desk: Desk) -> list[int]:
    return [call["chat_id"] for call in desk.telegram.of("sendMessage")]


def said(desk: Desk) -> str:
    return str(desk.telegram.of("answerCallbackQuery")[-1]["text"])


# --- the card -----------------------------------------------------------------------------------------------------


async def test_a_card_goes_to_the_group_and_follows_the_row(desk: Desk) -> None:
    approval = await posted(desk)
    await desk.deliver()
    assert sent_to(desk) == [-100]

    await desk.send_telegram(await desk.telegram_press(approval))
    await desk.deliver()

    [edit] = desk.telegram.of("editMessageText")
    assert "Approved" in edit["text"]
    assert edit["reply_markup"] == {"inline_keyboard": []}


async def test_what_destroys_goes_to_each_reviewer_in_private(desk: Desk) -> None:
    await posted(desk, risk=Risk.DESTRUCTIVE)

    assert sorted(sent_to(desk)) == [1001, 1002]


async def test_without_a_group_each_reviewer_is_written_to(
    learning_database: ThrowawayDatabase, tmp_path: Path
) -> None:
    async with open_desk(learning_database, tmp_path, policy=REVIEWERS) as desk:
        await posted(desk)
        assert sorted(sent_to(desk)) == [1001, 1002]


async def test_a_card_that_reaches_nobody_is_an_error(desk: Desk) -> None:
    desk.telegram.refuse["sendMessage"] = "Forbidden: bot can't initiate conversation with a user"
    approval = await desk.ask()

    with pytest.raises(OperatorError, match="reached nobody"):
        await portal().run(TelegramChannel(desk.queue).post([approval], escalated=False))


async def test_what_nobody_decides_is_escalated_once(desk: Desk) -> None:
    await posted(desk, seconds=600, escalate=0.0)
    await desk.deliver()
    await desk.deliver()

    assert sorted(sent_to(desk)) == [-200, -100]


async def test_the_token_is_in_no_error(desk: Desk) -> None:
    desk.queue.settings = desk.queue.settings.model_copy(update={"telegram_api_url": "http://127.0.0.1:9"})
    heard: list[Event] = []
    approval = await desk.ask()
    with listening(heard.append), pytest.raises(OperatorError) as caught:
        await portal().run(TelegramChannel(desk.queue).post([approval], escalated=False))

    assert "test-token" not in str(caught.value) + str(heard)


@pytest.mark.parametrize(
    ("tenant", "fits"),
    [
        ("default", True),
        ("a" * 26, True),
        ("a" * 27, False),
        ("b2f5c9a0-6a51-4a1e-9c93-0a4f5f0d7b11", True),
        ("~odd", False),
        ("a:b:c", True),
        ("Zürich", True),
    ],
)
async def test_a_buttons_data_fits_or_there_is_no_button(desk: Desk, tenant: str, fits: bool) -> None:
    identity = Identity(tenant_id=tenant, user_id="bob")
    approval = await posted(desk, identity=identity)

    if fits:
        assert len((await desk.telegram_data(approval)).encode()) <= 64
        await desk.send_telegram(await desk.telegram_press(approval))
        assert (await desk.now(approval)).state == "approved"
    else:
        [[link]] = desk.telegram.of("sendMessage")[-1]["reply_markup"]["inline_keyboard"]
        assert "url" in link


# --- decisions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("verdict", "state"), [("a", "approved"), ("r", "rejected")])
async def test_a_press_of_a_reviewer_decides(desk: Desk, verdict: str, state: str) -> None:
    approval = await posted(desk)

    response = await desk.send_telegram(await desk.telegram_press(approval, verdict))

    now = await desk.now(approval)
    assert response.status_code == 200
    assert now.state == state
    assert [(vote["voter"], vote["channel"]) for vote in now.votes] == [("ada", "telegram")]
    assert len(desk.telegram.of("answerCallbackQuery")) == 1


async def test_what_the_message_does_not_show_is_not_approved_in_it(desk: Desk) -> None:
    filler = "-- nothing to see\n" * 200
    approval = await posted(desk, arguments={"sql": f"SELECT 1;\n{filler}DELETE FROM a;\n{filler}SELECT 2"})
    place = (await desk.telegram_places(approval))[0]
    message = desk.telegram.messages[place["chat"], place["message"]]

    buttons = [button for row in message["reply_markup"]["inline_keyboard"] for button in row]
    assert "DELETE" not in message["text"]
    assert [button["text"] for button in buttons if "callback_data" in button] == ["❌ Reject"]
    assert [button["url"].partition("?")[0] for button in buttons if "url" in button] == [
        f"https://agents.example.com/approvals/{approval.approval_id}"
    ]


async def test_two_people_in_their_private_chats_approve_what_destroys(desk: Desk) -> None:
    approval = await posted(desk, risk=Risk.DESTRUCTIVE, votes=2)
    places = {place["chat"]: place["message"] for place in await desk.telegram_places(approval)}

    for user in (1001, 1002):
        assert (await desk.now(approval)).state == "pending"
        await desk.send_telegram(
            await desk.telegram_press(approval, user=user, chat=user, message=places[user])
        )

    assert (await desk.now(approval)).state == "approved"


async def test_all_of_a_batch_are_decided_at_once_or_none(desk: Desk) -> None:
    first = await desk.ask()
    second = await desk.ask(batch_id=first.batch_id)
    await desk.deliver()
    both = TelegramChannel(desk.queue).button_data("A", [first, second])
    keyboard = desk.telegram.of("sendMessage")[-1]["reply_markup"]["inline_keyboard"]
    assert both in [button.get("callback_data") for row in keyboard for button in row]

    await desk.send_telegram(await desk.telegram_press(second, "r"))
    await desk.send_telegram(await desk.telegram_press(first, data=both))
    assert [(await desk.now(one)).state for one in (first, second)] == ["pending", "rejected"]
    assert "as it is now" in said(desk)


async def test_a_whole_batch_is_approved(desk: Desk) -> None:
    first = await desk.ask()
    second = await desk.ask(batch_id=first.batch_id)
    await desk.deliver()
    both = TelegramChannel(desk.queue).button_data("A", [first, second])

    await desk.send_telegram(await desk.telegram_press(first, data=both))

    assert [(await desk.now(one)).state for one in (first, second)] == ["approved", "approved"]


# --- refusals: each leaves the approval as it is ----------------------------------------------------------------------


async def refused(desk: Desk, approval: Approval, update: dict[str, Any], told: str) -> None:
    """It is answered, decides nothing, and says why."""
    heard: list[Event] = []
    with listening(heard.append):
        response = await desk.send_telegram(update)
    assert response.status_code == 200
    now = await desk.now(approval)
    assert now.state == "pending"
    assert now.votes == approval.votes
    assert told in " ".join(str(e.facts["reason"]) for e in heard if e.name == "telegram_answer_refused")


async def test_somebody_who_is_not_listed(desk: Desk) -> None:
    approval = await posted(desk)
    await refused(desk, approval, await desk.telegram_press(approval, user=666), "not listed")


async def test_being_in_the_right_chat_is_not_enough(desk: Desk) -> None:
    approval = await posted(desk, risk=Risk.DESTRUCTIVE)
    await refused(desk, approval, await desk.telegram_press(approval, user=666), "not listed")


async def test_a_reviewer_of_another_tenant(desk: Desk) -> None:
    approval = await posted(desk)
    await refused(desk, approval, await desk.telegram_press(approval, user=1003), "max may not decide")


@pytest.mark.parametrize("asker", ["ada", "ada-the-user"])
async def test_ones_own_request(desk: Desk, asker: str) -> None:
    approval = await posted(desk, identity=Identity(tenant_id="default", user_id=asker))
    await refused(desk, approval, await desk.telegram_press(approval), "themselves")


async def test_a_verdict_that_was_changed(desk: Desk) -> None:
    approval = await posted(desk)
    data = await desk.telegram_data(approval, "r")
    await refused(desk, approval, await desk.telegram_press(approval, data=f"a{data[1:]}"), "as it is now")


async def test_the_mac_of_another_approval(desk: Desk) -> None:
    first, second = await posted(desk), await posted(desk)
    one, other = [(await desk.telegram_data(approval)).split(":") for approval in (first, second)]
    mixed = ":".join([one[0], one[1], other[2], one[3]])
    await refused(desk, first, await desk.telegram_press(first, data=mixed), "as it is now")


@pytest.mark.parametrize(
    "data",
    [
        "",
        "a",
        "a:b",
        "a:b:c:d",
        "x:" + "A" * 22 + ":m:default",
        "a:" + "é" * 22 + ":m:default",
        "a:::",
        None,
        7,
    ],
)
async def test_data_that_cannot_be_read(desk: Desk, data: Any) -> None:
    approval = await posted(desk)
    await refused(desk, approval, await desk.telegram_press(approval, data=data), "not one of ours")


async def test_a_mac_that_is_no_ascii(desk: Desk) -> None:
    approval = await posted(desk)
    verdict, target, _, tenant = (await desk.telegram_data(approval)).split(":")
    odd = await desk.telegram_press(approval, data=f"{verdict}:{target}:ééé:{tenant}")
    await refused(desk, approval, odd, "as it is now")


async def test_another_tenants_name_on_the_button(desk: Desk) -> None:
    approval = await posted(desk)
    data = (await desk.telegram_data(approval)).replace("default", "other")
    await refused(desk, approval, await desk.telegram_press(approval, data=data), "as it is now")


async def test_another_message_or_chat(desk: Desk) -> None:
    approval = await posted(desk)
    place = (await desk.telegram_places(approval))[0]
    await refused(
        desk, approval, await desk.telegram_press(approval, message=place["message"] + 1), "not the card"
    )
    await refused(desk, approval, await desk.telegram_press(approval, chat=-101), "not the card")
    bare = await desk.telegram_press(approval)
    del bare["callback_query"]["message"]
    await refused(desk, approval, bare, "not the card")


async def test_what_destroys_is_not_decided_in_the_chat_of_somebody_else(desk: Desk) -> None:
    approval = await posted(desk, risk=Risk.DESTRUCTIVE)
    places = {place["chat"]: place["message"] for place in await desk.telegram_places(approval)}
    press = await desk.telegram_press(approval, user=1002, chat=1001, message=places[1001])
    await refused(desk, approval, press, "private chat")


async def test_a_copy_of_an_update(desk: Desk) -> None:
    approval = await posted(desk, votes=2)
    press = await desk.telegram_press(approval)
    for _ in range(3):
        await desk.send_telegram(press)

    assert len((await desk.now(approval)).votes) == 1
    assert "received before" in said(desk)


@pytest.mark.parametrize("update_id", [None, "7", True, 1.5])
async def test_an_update_without_a_number(desk: Desk, update_id: Any) -> None:
    approval = await posted(desk)
    press = {**await desk.telegram_press(approval), "update_id": update_id}
    await refused(desk, approval, press, "no number")


async def test_twenty_presses_at_once_are_one_vote(desk: Desk) -> None:
    approval = await posted(desk, votes=2)
    presses = [await desk.telegram_press(approval) for _ in range(20)]

    await asyncio.gather(*(desk.send_telegram(press) for press in presses))
    await finish()

    assert len((await desk.now(approval)).votes) == 1


async def test_a_press_after_the_time_is_over(desk: Desk) -> None:
    approval = await posted(desk, seconds=1.0)
    press = await desk.telegram_press(approval)
    await desk.expire(approval)

    await desk.send_telegram(press)

    assert not (await desk.now(approval)).votes
    assert "expired" in said(desk)


# --- requests that Telegram did not send ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "secret", [None, "", "wrong", TELEGRAM_SECRET[:-1], TELEGRAM_SECRET + "x", TELEGRAM_SECRET.upper()]
)
async def test_another_secret_is_refused(desk: Desk, secret: str | None) -> None:
    approval = await posted(desk)

    response = await desk.send_telegram(await desk.telegram_press(approval), secret=secret)

    assert response.status_code == 401
    assert (await desk.now(approval)).state == "pending"


@pytest.mark.parametrize(
    "body", [b"", b"x", b"[]", b"\xff", b"[" * 100_000, b'{"a": "' + b"b" * 400_000 + b'"}']
)
async def test_a_body_that_cannot_be_read_is_refused(desk: Desk, body: bytes) -> None:
    response = await desk.send(
        "/approvals/telegram", body, {"x-telegram-bot-api-secret-token": TELEGRAM_SECRET}
    )

    assert response.status_code == 400


@pytest.mark.parametrize(
    "update", [{}, {"message": {"text": "hi"}}, {"callback_query": 7}, {"callback_query": {}}]
)
async def test_other_updates_do_nothing(desk: Desk, update: dict[str, Any]) -> None:
    approval = await posted(desk)

    response = await desk.send_telegram({"update_id": 1, **update})

    assert response.status_code == 200
    assert (await desk.now(approval)).state == "pending"


async def test_without_its_settings_the_route_is_not_there(desk: Desk) -> None:
    from agent.server.telegram_routes import TelegramDoor, telegram_door

    settings = desk.queue.settings.model_copy(update={"telegram_secret": None})
    desk.queue.settings = settings
    application = desk.http._transport.app  # type: ignore[attr-defined]
    application.dependency_overrides[telegram_door] = lambda: TelegramDoor(desk.queue)

    update = telegram_press("x", update_id=1, user=1, chat=1, message=1)
    assert (await desk.send_telegram(update, secret="")).status_code == 404
    assert telegram_channel(desk.queue) is None


# --- the webhook ------------------------------------------------------------------------------------------------------


@pytest.fixture
def bot(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    server = TelegramServer()
    monkeypatch.chdir(tmp_path)
    with serving(server) as address:
        monkeypatch.setenv("TELEGRAM_API_URL", address)
        monkeypatch.setenv("TELEGRAM_BOT_TOKEN", TELEGRAM_TOKEN)
        monkeypatch.setenv("TELEGRAM_SECRET", TELEGRAM_SECRET)
        current_settings.cache_clear()
        yield server
    current_settings.cache_clear()


def test_the_command_line_sets_the_webhook_with_the_secret(bot: TelegramServer) -> None:
    result = CliRunner().invoke(app, ["set-webhook", "--url", "https://agents.example.com/"])

    assert result.exit_code == 0, result.output
    [call] = bot.of("setWebhook")
    assert call["url"] == "https://agents.example.com/approvals/telegram"
    assert call["secret_token"] == TELEGRAM_SECRET
    assert call["allowed_updates"] == ["callback_query"]
    assert TELEGRAM_SECRET not in result.output


@pytest.mark.parametrize("options", [["--url", "http://agents.example.com"], []])
def test_an_address_that_telegram_does_not_take_is_refused(bot: TelegramServer, options: list[str]) -> None:
    result = CliRunner().invoke(app, ["set-webhook", *options])

    assert isinstance(result.exception, ConfigurationError)
    assert not bot.calls


def test_the_command_line_deletes_the_webhook(bot: TelegramServer) -> None:
    assert CliRunner().invoke(app, ["delete-webhook"]).exit_code == 0
    assert bot.of("deleteWebhook")


def test_a_channel_without_a_token_says_what_to_set(desk: Desk) -> None:
    desk.queue.settings = desk.queue.settings.model_copy(update={"telegram_bot_token": None})
    with pytest.raises(ConfigurationError, match="TELEGRAM_BOT_TOKEN"):
        TelegramChannel(desk.queue)
