"""Approvals in Slack: Slack's own SDK against a local server, the real route, the real queue."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from aiohttp import WSMsgType, web
from pydantic import SecretStr

from agent.approval.records import Approval
from agent.approval.risk import Risk
from agent.approval.slack import SlackChannel, SlackSocket, slack_channel
from agent.errors import DatabaseUnavailable, OperatorError
from agent.events import Event, listening
from agent.identity import Identity
from agent.portal import portal
from agent.server.deliveries import finish
from agent.testing.throwaway import ThrowawayDatabase
from tests.approval_desk import BOB, Desk, open_desk
from tests.chat_servers import SLACK_APP_TOKEN, slack_form, slack_signed


@pytest.fixture
async def desk(learning_database: ThrowawayDatabase, tmp_path: Path) -> AsyncIterator[Desk]:
    async with open_desk(learning_database, tmp_path) as opened:
        yield opened


async def posted(desk: Desk, **given: Any) -> Approval:
    """An approval whose card is in Slack."""
    approval = await desk.ask(**given)
    await desk.deliver()
    return approval


def notes(desk: Desk) -> list[str]:
    """What was told to one person only."""
    return [call["text"] for call in desk.slack.of("chat.postEphemeral")]


# --- the card ---------------------------------------------------------------------------------------------------


async def test_a_card_is_posted_once_and_follows_the_row(desk: Desk) -> None:
    approval = await posted(desk)
    await desk.deliver()
    assert len(desk.slack.of("chat.postMessage")) == 1
    assert desk.slack.of("chat.postMessage")[0]["channel"] == "C111"

    await desk.send_slack(await desk.slack_press(approval))
    await desk.deliver()

    [update] = desk.slack.of("chat.update")
    assert "Approved" in json.dumps(update["blocks"])
    assert "ada" in json.dumps(update["blocks"])
    assert not [block for block in update["blocks"] if block["type"] == "actions"]


async def test_a_decision_elsewhere_takes_the_buttons_away(desk: Desk) -> None:
    approval = await posted(desk)

    await desk.send_telegram(await desk.telegram_press(approval, "r"))
    await desk.deliver()

    [update] = desk.slack.of("chat.update")
    assert "Rejected" in json.dumps(update["blocks"])
    assert not [block for block in update["blocks"] if block["type"] == "actions"]


async def test_what_nobody_decides_is_escalated_once(desk: Desk) -> None:
    await posted(desk, seconds=600, escalate=0.0)
    await desk.deliver()
    await desk.deliver()

    channels = [call["channel"] for call in desk.slack.of("chat.postMessage")]
    assert sorted(channels) == ["C111", "C999"]


async def test_the_result_is_told_in_the_thread_once(desk: Desk) -> None:
    approval = await posted(desk)
    await desk.send_slack(await desk.slack_press(approval))
    claim = await desk.queue.claim(approval.approval_id, BOB, args_hash=approval.args_hash, claimed_by="test")
    entry = {"state": "executed", "rows": {"shop.orders": {"inserted": 0, "updated": 2, "deleted": 0}}}
    await desk.queue.finish(claim["ticket"], BOB, entry)
    await desk.deliver()
    await desk.deliver()

    replies = [call for call in desk.slack.of("chat.postMessage") if "thread_ts" in call]
    assert [call["thread_ts"] for call in replies] == [(await desk.slack_place(approval))["ts"]]
    assert "shop.orders: 2 updated" in replies[0]["text"]


async def test_slack_away_is_an_error_that_is_tried_again(desk: Desk) -> None:
    desk.slack.refuse["chat.postMessage"] = "not_in_channel"
    approval = await desk.ask()
    with pytest.raises(OperatorError, match="not_in_channel"):
        await portal().run(SlackChannel(desk.queue).post([approval], escalated=False))

    await desk.deliver()
    now = await desk.now(approval)

    assert now.state == "pending"
    assert not [message for message in now.messages if message["channel"] == "slack"]


async def test_a_message_that_somebody_deleted_holds_nothing_up(desk: Desk) -> None:
    approval = await posted(desk)
    desk.slack.refuse["chat.update"] = "message_not_found"

    await desk.send_slack(await desk.slack_press(approval))
    await desk.deliver()
    await desk.deliver()

    assert (await desk.now(approval)).state == "approved"
    assert len(desk.slack.of("chat.update")) == 1


def test_the_channel_is_there_when_it_is_set(desk: Desk) -> None:
    assert slack_channel(desk.queue) is not None


# --- decisions --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("button", "state"), [("Approve", "approved"), ("Reject", "rejected")])
async def test_a_press_of_a_reviewer_decides(desk: Desk, button: str, state: str) -> None:
    approval = await posted(desk)

    response = await desk.send_slack(await desk.slack_press(approval, button))

    now = await desk.now(approval)
    assert response.status_code == 200
    assert response.content == b""
    assert now.state == state
    assert [vote["voter"] for vote in now.votes] == ["ada"]
    assert now.votes[0]["channel"] == "slack"


async def test_destroying_needs_two_people(desk: Desk) -> None:
    approval = await posted(desk, risk=Risk.DESTRUCTIVE, votes=2)

    await desk.send_slack(await desk.slack_press(approval))
    await desk.send_slack(await desk.slack_press(approval))
    assert (await desk.now(approval)).state == "pending"
    assert "decided already" in notes(desk)[-1]

    await desk.send_slack(await desk.slack_press(approval, user="UEVE"))
    assert (await desk.now(approval)).state == "approved"


async def test_all_of_a_batch_are_decided_at_once_or_none(desk: Desk) -> None:
    first = await desk.ask()
    second = await desk.ask(batch_id=first.batch_id)
    await desk.deliver()
    press = await desk.slack_press(first, "Approve all 2")

    await desk.send_slack(await desk.slack_press(second, "Reject"))
    await desk.send_slack(press)
    assert [(await desk.now(one)).state for one in (first, second)] == ["pending", "rejected"]

    await desk.deliver()
    await desk.send_slack(await desk.slack_press(first, "Approve"))
    assert (await desk.now(first)).state == "approved"


async def test_the_answer_does_not_wait_for_the_work(
    desk: Desk, learning_database: ThrowawayDatabase
) -> None:
    approval = await posted(desk)
    body, headers = slack_signed(await desk.slack_press(approval))
    async with await psycopg.AsyncConnection.connect(learning_database.url) as connection:
        await connection.execute(
            "SELECT FROM human_approval_queue WHERE approval_id = %s FOR UPDATE", [approval.approval_id]
        )
        response = await desk.http.post("/approvals/slack", content=body, headers=headers)
        assert response.status_code == 200
        assert (await desk.now(approval)).state == "pending"
        await connection.rollback()

    await finish()
    assert (await desk.now(approval)).state == "approved"


# --- refusals: each leaves the approval as it is ------------------------------------------------------------------


async def refused(desk: Desk, approval: Approval, payload: dict[str, Any], told: str) -> None:
    """It is answered, decides nothing, and says why."""
    heard: list[Event] = []
    with listening(heard.append):
        response = await desk.send_slack(payload)
    assert response.status_code == 200
    now = await desk.now(approval)
    assert now.state == "pending"
    assert now.votes == approval.votes
    assert [event.name for event in heard if event.name == "slack_answer_refused"]
    assert told in " ".join(str(event.facts.get("reason")) for event in heard)


async def test_somebody_who_is_not_listed(desk: Desk) -> None:
    approval = await posted(desk)
    await refused(desk, approval, await desk.slack_press(approval, user="UNOBODY"), "not listed")
    assert "not listed" in notes(desk)[-1]


async def test_a_reviewer_of_another_tenant(desk: Desk) -> None:
    approval = await posted(desk)
    await refused(desk, approval, await desk.slack_press(approval, user="UMAX"), "max may not decide")


@pytest.mark.parametrize("asker", ["ada", "ada-the-user"])
async def test_ones_own_request(desk: Desk, asker: str) -> None:
    approval = await posted(desk, identity=Identity(tenant_id="default", user_id=asker))
    await refused(desk, approval, await desk.slack_press(approval), "themselves")


async def test_other_arguments_than_those_of_the_card(desk: Desk) -> None:
    approval = await posted(desk)
    press = await desk.slack_press(approval)
    value = json.loads(press["actions"][0]["value"])
    value["approvals"][approval.approval_id] = "0" * 16
    press["actions"][0]["value"] = json.dumps(value)
    await refused(desk, approval, press, "arguments are not those")


@pytest.mark.parametrize("key", ["", "a", 7, None])
async def test_a_hash_that_is_too_short(desk: Desk, key: Any) -> None:
    approval = await posted(desk)
    press = await desk.slack_press(approval)
    shortened = approval.args_hash[:15] if key == "a" else key
    press["actions"][0]["value"] = json.dumps(
        {"tenant": "default", "approvals": {approval.approval_id: shortened}}
    )
    await refused(desk, approval, press, "arguments are not those")


async def test_the_button_of_one_card_on_another(desk: Desk) -> None:
    first, second = await posted(desk), await posted(desk)
    one, other = await desk.slack_press(first), await desk.slack_press(second)
    one["container"] = other["container"]
    await refused(desk, first, one, "not the card")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"api_app_id": "A999"}, "not the card"),
        ({"api_app_id": None}, "not the card"),
        ({"team": {"id": "T999"}}, "another workspace"),
        ({"team": None}, "another workspace"),
        ({"channel": {"id": "C777"}}, "two channels"),
        ({"container": {"type": "message", "channel_id": "C111", "message_ts": "1.1"}}, "not the card"),
        ({"container": {}}, "two channels"),
        ({"actions": []}, "no single button"),
        ({"user": {"id": "UADA", "team_id": "T999"}}, "another workspace"),
        ({"user": None}, "not listed"),
    ],
)
async def test_a_press_from_elsewhere(desk: Desk, changes: dict[str, Any], told: str) -> None:
    approval = await posted(desk)
    await refused(desk, approval, {**await desk.slack_press(approval), **changes}, told)


@pytest.mark.parametrize(
    "value", ["", "x", "[]", "{}", '{"tenant":"default","approvals":{}}', '{"tenant":1}', None, 7]
)
async def test_a_button_that_cannot_be_read(desk: Desk, value: Any) -> None:
    approval = await posted(desk)
    press = await desk.slack_press(approval)
    press["actions"][0]["value"] = value
    await refused(desk, approval, press, "does not say what it is about")


async def test_a_tenant_that_has_no_such_approval(desk: Desk) -> None:
    approval = await posted(desk)
    press = await desk.slack_press(approval)
    press["actions"][0]["value"] = press["actions"][0]["value"].replace("default", "other")
    await refused(desk, approval, press, "no such approval")


@pytest.mark.parametrize("function", ["remember_delivery", "get_approval", "decide_approvals"])
async def test_a_press_while_the_database_is_away_says_so_and_can_be_repeated(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    approval = await posted(desk)
    press = await desk.slack_press(approval)
    call = desk.queue.database.call

    async def away(named: str, *given: Any, **arguments: Any) -> Any:
        if named == function:
            raise DatabaseUnavailable("the database is away")
        return await call(named, *given, **arguments)

    with monkeypatch.context() as patch:
        patch.setattr(desk.queue.database, "call", away)
        await desk.send_slack(press)
    [note] = notes(desk)
    assert "nothing was decided" in note
    assert "Press again" in note
    assert (await desk.now(approval)).state == "pending"

    await desk.send_slack(press, timestamp=stamp(1))
    assert (await desk.now(approval)).state == "approved"


async def test_a_copy_of_a_delivery(desk: Desk) -> None:
    approval = await posted(desk, votes=2)
    body, headers = slack_signed(await desk.slack_press(approval))
    heard: list[Event] = []
    with listening(heard.append):
        for _ in range(3):
            await desk.send("/approvals/slack", body, headers)

    assert len((await desk.now(approval)).votes) == 1
    assert sum(event.name == "slack_answer_refused" for event in heard) == 2


async def test_twenty_presses_at_once_are_one_vote(desk: Desk) -> None:
    approval = await posted(desk, votes=2)
    presses = [await desk.slack_press(approval) for _ in range(20)]

    await asyncio.gather(
        *(desk.send_slack({**press, "trigger_id": str(n)}) for n, press in enumerate(presses))
    )
    await finish()

    now = await desk.now(approval)
    assert now.state == "pending"
    assert len(now.votes) == 1


async def test_a_press_after_the_time_is_over(desk: Desk) -> None:
    approval = await posted(desk, seconds=1.0)
    press = await desk.slack_press(approval)
    await desk.expire(approval)

    await desk.send_slack(press)

    now = await desk.now(approval)
    assert now.state == "expired"
    assert not now.votes
    assert "expired" in notes(desk)[-1]


# --- requests that Slack did not send -----------------------------------------------------------------------------


def stamp(seconds: float) -> str:
    return str(int(time.time() + seconds))


@pytest.mark.parametrize("sent", [-400, 4000, "", "soon", "-1", "9" * 400, "1e9", "nan"])
async def test_a_time_that_is_not_now_is_refused(desk: Desk, sent: int | str) -> None:
    approval = await posted(desk)
    timestamp = sent if isinstance(sent, str) else stamp(sent)

    response = await desk.send_slack(await desk.slack_press(approval), timestamp=timestamp)

    assert response.status_code == 401
    assert (await desk.now(approval)).state == "pending"


@pytest.mark.parametrize("fault", ["secret", "body", "none", "empty", "unicode", "no time", "twice"])
async def test_a_signature_that_is_not_slacks_is_refused(desk: Desk, fault: str) -> None:
    approval = await posted(desk)
    payload = await desk.slack_press(approval)
    body, headers = slack_signed(payload, secret="another" if fault == "secret" else desk_secret(desk))
    sent = [(name.encode(), value.encode()) for name, value in headers.items()]
    name, signature = b"x-slack-signature", headers["x-slack-signature"].encode()
    other = {"none": [], "empty": [b""], "unicode": ["v0=é".encode()], "twice": [signature] * 2}
    if fault == "body":
        body += b"&x=1"
    elif fault in other:
        sent = [header for header in sent if header[0] != name] + [(name, value) for value in other[fault]]
    elif fault == "no time":
        sent = [header for header in sent if header[0] != b"x-slack-request-timestamp"]

    response = await desk.http.post("/approvals/slack", content=body, headers=sent)
    await finish()

    assert response.status_code == 401
    assert (await desk.now(approval)).state == "pending"


def desk_secret(desk: Desk) -> str:
    secret = desk.queue.settings.slack_signing_secret
    assert secret is not None
    return secret.get_secret_value()


@pytest.mark.parametrize(
    "body", [b"", b"payload=", b"payload=x", b"payload=[]", b"other=1", b"\xff\xfe", b"payload=%7B"]
)
async def test_a_body_that_cannot_be_read_is_refused(desk: Desk, body: bytes) -> None:
    now = stamp(0)
    digest = hmac.new(desk_secret(desk).encode(), f"v0:{now}:".encode() + body, hashlib.sha256).hexdigest()
    response = await desk.send(
        "/approvals/slack", body, {"x-slack-request-timestamp": now, "x-slack-signature": f"v0={digest}"}
    )

    assert response.status_code in {400, 401}


async def test_a_huge_body_is_refused(desk: Desk) -> None:
    body, headers = slack_signed({"type": "block_actions", "x": "y" * 400_000})
    assert (await desk.send("/approvals/slack", body, headers)).status_code == 401


async def test_no_address_that_comes_with_a_press_is_called(desk: Desk) -> None:
    approval = await posted(desk)
    calls = len(desk.telegram.calls)
    press = await desk.slack_press(approval, user="UNOBODY", response_url=f"{desk.telegram.address}/stolen")

    await desk.send_slack(press)

    assert len(desk.telegram.calls) == calls


# --- editing ------------------------------------------------------------------------------------------------------


async def form_of(desk: Desk, approval: Approval) -> dict[str, Any]:
    await desk.send_slack(await desk.slack_press(approval, "Edit"))
    view: dict[str, Any] = desk.slack.of("views.open")[-1]["view"]
    return view


async def test_edit_opens_a_form_and_sending_it_is_a_new_approval(desk: Desk) -> None:
    desk.reassess()
    approval = await posted(desk, arguments={"card": "1234"})
    view = await form_of(desk, approval)
    assert json.loads(view["blocks"][1]["element"]["initial_value"]) == {"card": "1234"}

    response = await desk.send_slack(slack_form(view, '{"card": "9999"}', user="UADA"))

    old = await desk.now(approval)
    assert response.status_code == 200
    assert old.state == "cancelled"
    assert old.replaced_by is not None
    new = await desk.queue.get(old.replaced_by, BOB)
    assert new.arguments == {"card": "9999"}
    assert new.args_hash != old.args_hash
    assert (new.state, new.edited_by) == ("approved", "ada")


async def test_who_edits_what_destroys_does_not_approve_it(desk: Desk) -> None:
    desk.reassess()
    approval = await posted(desk, risk=Risk.DESTRUCTIVE, arguments={"card": "1234"})

    await desk.send_slack(slack_form(await form_of(desk, approval), '{"card": "9"}', user="UADA"))
    await desk.deliver()
    replaced_by = (await desk.now(approval)).replaced_by
    assert replaced_by is not None
    new = await desk.queue.get(replaced_by, BOB)
    assert new.state == "pending"
    assert not new.votes

    await desk.send_slack(await desk.slack_press(new))
    assert (await desk.now(new)).state == "pending"
    await desk.send_slack(await desk.slack_press(new, user="UEVE"))
    assert (await desk.now(new)).state == "approved"


@pytest.mark.parametrize("written", ["", "x", "[1]", "3", "null", '{"a": NaN}', "[" * 20_000])
async def test_a_form_that_is_no_json_object_says_so(desk: Desk, written: str) -> None:
    desk.reassess()
    approval = await posted(desk)
    view = await form_of(desk, approval)

    response = await desk.send_slack(slack_form(view, written, user="UADA"))

    assert response.json()["response_action"] == "errors"
    assert (await desk.now(approval)).state == "pending"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"user": {"id": "UNOBODY"}}, "not listed"),
        ({"api_app_id": "A999"}, "not the card"),
        ({"team": {"id": "T999"}}, "another workspace"),
    ],
)
async def test_a_form_from_elsewhere(desk: Desk, changes: dict[str, Any], told: str) -> None:
    desk.reassess()
    approval = await posted(desk)
    view = await form_of(desk, approval)
    await refused(desk, approval, {**slack_form(view, "{}", user="UADA"), **changes}, told)


async def test_an_edit_that_nobody_can_check_is_refused(desk: Desk) -> None:
    desk.reassess()
    approval = await posted(desk)
    view = await form_of(desk, approval)
    desk.queue._reassessors.clear()
    await refused(desk, approval, slack_form(view, "{}", user="UADA"), "the edit was not taken")


async def test_what_nobody_can_check_has_no_button_to_edit(desk: Desk) -> None:
    approval = await posted(desk)
    place = await desk.slack_place(approval)
    assert "Edit" not in json.dumps(desk.slack.messages[place["channel"], place["ts"]]["blocks"])


# --- Socket Mode ----------------------------------------------------------------------------------------------------


async def test_presses_come_over_a_connection_of_ours(desk: Desk) -> None:
    approval = await posted(desk)
    press = await desk.slack_press(approval)
    acknowledged: list[str] = []
    is_done = asyncio.Event()

    async def socket(request: web.Request) -> web.WebSocketResponse:
        connection = web.WebSocketResponse()
        await connection.prepare(request)
        await connection.send_json({"type": "hello", "num_connections": 1, "debug_info": {}})
        for _ in range(2):  # Slack sends again what it takes for lost
            await connection.send_json(
                {
                    "type": "interactive",
                    "envelope_id": "e1",
                    "accepts_response_payload": True,
                    "payload": press,
                }
            )
        async for message in connection:
            if message.type is WSMsgType.TEXT:
                acknowledged.append(json.loads(message.data)["envelope_id"])
                if len(acknowledged) == 2:
                    is_done.set()
        return connection

    application = web.Application()
    application.router.add_get("/socket", socket)
    runner = web.AppRunner(application)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    desk.slack.socket_url = f"ws://127.0.0.1:{runner.addresses[0][1]}/socket"
    desk.queue.settings = desk.queue.settings.model_copy(
        update={"slack_app_token": SecretStr(SLACK_APP_TOKEN)}
    )

    async def open_socket() -> SlackSocket:
        opened = SlackSocket(desk.queue, SlackChannel(desk.queue))
        await opened.start()
        return opened

    client = await portal().run(open_socket())
    try:
        await asyncio.wait_for(is_done.wait(), 30)
    finally:
        await portal().run(client.stop())
        await runner.cleanup()

    now = await desk.now(approval)
    assert acknowledged == ["e1", "e1"]
    assert now.state == "approved"
    assert len(now.votes) == 1


async def test_socket_mode_without_its_token_says_what_to_set(desk: Desk) -> None:
    with pytest.raises(OperatorError, match="SLACK_APP_TOKEN"):
        await portal().run(SlackSocket(desk.queue, SlackChannel(desk.queue)).start())
