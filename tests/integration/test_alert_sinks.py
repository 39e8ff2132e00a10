"""Alerts on their way out: Slack, Telegram, any webhook and mail against local servers that hold to the real limits."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from pydantic import SecretStr

from agent.chat.telegram_bot import TelegramBot
from agent.errors import ConfigurationError
from agent.events import Event, listening
from agent.monitoring.alert_sinks import (
    DeliveryFailed,
    LogSink,
    MailSink,
    SlackSink,
    TelegramSink,
    WebhookSink,
    configured_sinks,
)
from agent.monitoring.notices import Notice
from agent.settings import Settings
from agent.testing.throwaway import ThrowawayDatabase
from tests.chat_servers import TELEGRAM_TOKEN, TelegramServer, block_faults, serving
from tests.integration.alert_office import AlertOffice, alert_office, finding
from tests.mail_server import mailbox

NASTY = "<!channel> *bold* <https://evil.example|click> \u202egnp.exe & `code` 😀"


def long(letter: str, **changes: Any) -> dict[str, Any]:
    """Changes of a finding by which all of it is too long."""
    evidence = {f"k{number}": letter * 999 for number in range(99)}
    return {
        "title": letter * 5000,
        "what": letter * 9000,
        "advice": letter * 9000,
        "evidence": evidence,
    } | changes


@pytest.fixture
async def office(learning_database: ThrowawayDatabase) -> AsyncIterator[AlertOffice]:
    async with alert_office(learning_database) as opened:
        yield opened


async def notice(office: AlertOffice, **changes: Any) -> Notice:
    """A notice as the database hands it out."""
    alerts = office.alerts(public_url="https://agents.example.com")
    [made] = await alerts.report([finding(**changes)], set())
    return made


class Hook:
    """A web server that takes JSON, refuses what Slack refuses, and remembers."""

    def __init__(self) -> None:
        self.got: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        self.status = 200
        self.answer = "ok"
        self.headers: dict[str, str] = {}
        self.address = ""


@contextmanager
def hooked(*, checks_blocks: bool = False) -> Iterator[Hook]:
    """The server, while the block runs."""
    hook = Hook()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            hook.got.append((self.path, {name.lower(): text for name, text in self.headers.items()}, body))
            faults = [*block_faults(body["blocks"])] if checks_blocks else []
            written = (f"invalid_blocks: {faults[0]}" if faults else hook.answer).encode()
            self.send_response(400 if faults else hook.status)
            for name, text in hook.headers.items():
                self.send_header(name, text)
            self.send_header("content-length", str(len(written)))
            self.end_headers()
            self.wfile.write(written)

        def do_GET(self) -> None:
            hook.got.append((self.path, {}, {}))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    hook.address = f"http://127.0.0.1:{server.server_address[1]}/services/T1/B1/secret"
    try:
        yield hook
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


# --- Slack --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"title": NASTY, "what": NASTY, "advice": NASTY, "evidence": {NASTY: NASTY}},
        {
            "title": "x" * 5000,
            "what": "y" * 9000,
            "advice": "z\n" * 900,
            "evidence": {f"k{i}": "v" * 999 for i in range(99)},
        },
        {"title": "😀" * 200, "what": " ", "advice": "", "evidence": {}},
    ],
)
async def test_slack_takes_every_message_and_reads_no_markup_in_it(
    office: AlertOffice, changes: dict[str, Any]
) -> None:
    with hooked(checks_blocks=True) as hook:
        await SlackSink(SecretStr(hook.address)).send(await notice(office, **changes))
    [(path, _, body)] = hook.got
    assert path == "/services/T1/B1/secret"
    assert "<" not in body["text"]
    assert len(json.dumps(body)) < 12_000
    assert {block["type"] for block in body["blocks"]} == {"header", "rich_text"}, "neither is read as mrkdwn"
    assert "\u202e" not in json.dumps(body, ensure_ascii=False)


async def test_a_message_says_what_since_when_why_and_what_to_do(office: AlertOffice) -> None:
    made = await notice(office, severity="critical")
    with hooked() as hook:
        await SlackSink(SecretStr(hook.address)).send(made)
    text = json.dumps(hook.got[0][2], ensure_ascii=False)
    for part in (
        "Critical: Agent support fails twice", "12 of 40 runs failed", "2026-11-20 08:00 UTC", "failed: 12",
        "Look at `agent runs list --failed`.", f"https://agents.example.com/alerts/{made.alert_id}?tenant=default",
    ):  # fmt: skip
        assert part in text


async def test_slack_says_why_it_refuses_and_how_long_to_wait_and_the_address_is_told_to_nobody(
    office: AlertOffice, caplog: pytest.LogCaptureFixture
) -> None:
    made = await notice(office)
    caplog.set_level(logging.DEBUG)
    with hooked() as hook:
        sink = SlackSink(SecretStr(hook.address))
        hook.status, hook.answer, hook.headers = 429, "rate_limited", {"Retry-After": "30"}
        with pytest.raises(DeliveryFailed, match="Slack answered 429: rate_limited") as failed:
            await sink.send(made)
        assert failed.value.wait == timedelta(seconds=30)
        hook.status, hook.answer, hook.headers = 404, f"<html>{hook.address}</html>", {}
        with pytest.raises(DeliveryFailed, match=r"^Slack answered 404$"):
            await sink.send(made)
    with pytest.raises(DeliveryFailed, match=r"^it could not be reached: ConnectError$"):
        await sink.send(made)
    assert "B1/secret" not in caplog.text


async def test_no_redirect_is_followed(office: AlertOffice) -> None:
    made = await notice(office)
    with hooked() as hook, hooked() as elsewhere:
        hook.status, hook.headers = 307, {"Location": elsewhere.address}
        for sink in (SlackSink(SecretStr(hook.address)), WebhookSink(SecretStr(hook.address))):
            with pytest.raises(DeliveryFailed, match="answered 307"):
                await sink.send(made)
    assert elsewhere.got == []


# --- Telegram -----------------------------------------------------------------------------------------------------


def telegram(address: str, chat: str = "-100") -> TelegramSink:
    return TelegramSink(TelegramBot(address, SecretStr(TELEGRAM_TOKEN)), chat)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"title": NASTY, "what": NASTY, "advice": NASTY, "evidence": {NASTY: NASTY}},
        {
            "title": "😀" * 5000,
            "what": "😀" * 9000,
            "advice": "😀" * 9000,
            "evidence": {f"k{i}": "😀" * 999 for i in range(99)},
        },
    ],
)
async def test_telegram_takes_every_message_with_its_link(
    office: AlertOffice, changes: dict[str, Any]
) -> None:
    server = TelegramServer()
    with serving(server) as address:
        await telegram(address).send(await notice(office, **changes))
    [sent] = server.of("sendMessage")
    assert sent["chat_id"] == "-100"
    assert "parse_mode" not in sent
    assert "https://agents.example.com/alerts/" in sent["text"]
    assert "\u202e" not in sent["text"]


async def test_telegrams_reason_and_wait_are_told_and_its_token_is_not(
    office: AlertOffice, caplog: pytest.LogCaptureFixture
) -> None:
    made = await notice(office)
    caplog.set_level(logging.DEBUG)
    server = TelegramServer()
    with serving(server) as address:
        await telegram(address).send(made)
        server.refuse["sendMessage"] = "Too Many Requests: retry after 7"
        server.parameters = {"retry_after": 7}
        with pytest.raises(DeliveryFailed, match="Too Many Requests") as failed:
            await telegram(address).send(made)
        assert failed.value.wait == timedelta(seconds=7)
    with pytest.raises(DeliveryFailed, match="could not be reached"):
        await telegram(address).send(made)
    assert TELEGRAM_TOKEN not in caplog.text


# --- any webhook, mail, log ---------------------------------------------------------------------------------------


async def test_a_webhook_gets_the_whole_notice_as_json_with_a_key_that_stays_the_same(
    office: AlertOffice,
) -> None:
    made = await notice(office)
    with hooked() as hook:
        sink = WebhookSink(SecretStr(hook.address.replace("//", "//ada:pass%40word@")))
        hook.status = 503
        with pytest.raises(DeliveryFailed, match="the webhook answered 503"):
            await sink.send(made)
        hook.status = 204
        await sink.send(made)
    (_, first, _), (_, second, body) = hook.got
    assert first["idempotency-key"] == second["idempotency-key"] == made.notice_id
    assert second["authorization"].startswith("Basic ")
    assert body == made.as_json()
    assert set(body) == {
        "notice_id", "kind", "at", "tenant_id", "alert_id", "cause", "check", "severity", "title", "what", "advice",
        "evidence", "since", "resolved_at", "times_seen", "times_reopened", "link", "silences",
    }  # fmt: skip


async def test_a_mail_goes_to_all_receivers_and_has_one_line_as_its_subject(office: AlertOffice) -> None:
    made = await notice(office, title="Grüße\r\nBcc: mallory@evil.com")
    with mailbox() as server:
        url = SecretStr(f"smtp://127.0.0.1:{server.server_address[1]}")
        await MailSink("ada@example.com, bob@example.com", url, "agent@example.com").send(made)
    [mail] = server.mails
    assert len(mail["to"]) == 2
    assert "\nBcc" not in mail["text"]
    with pytest.raises(DeliveryFailed, match="could not be used"):
        await MailSink("ada@example.com", url, "agent@example.com").send(made)


async def test_the_log_has_an_event_for_each_kind_of_notice(office: AlertOffice) -> None:
    events: list[Event] = []
    alerts = office.alerts(LogSink())
    with listening(events.append):
        for severity, age in (("warning", 0), ("critical", 0), ("critical", 5)):
            office.age(age)
            await alerts.report([finding(severity=severity)], set())
            await alerts.deliver(patience=timedelta(0))
        await alerts.report([], {"error_rate"})
        await alerts.deliver(patience=timedelta(0))
    assert [event.name for event in events] == [
        "alert_raised", "alert_worsened", "alert_reminded", "alert_resolved",
    ]  # fmt: skip
    assert events[0].facts["cause"] == "error_rate:agent=support"


# --- together -----------------------------------------------------------------------------------------------------


async def test_a_sink_that_recovers_gets_what_it_missed_and_the_others_had_it_at_once(
    office: AlertOffice,
) -> None:
    server = TelegramServer()
    server.refuse["sendMessage"] = "Bad Gateway"
    with hooked(checks_blocks=True) as hook, serving(server) as address:
        alerts = office.alerts(SlackSink(SecretStr(hook.address)), telegram(address))
        await alerts.report([finding()], {"error_rate"})
        await alerts.deliver(patience=timedelta(0))
        assert (len(hook.got), office.deliveries()) == (1, [("slack", "sent", 1), ("telegram", "failed", 1)])
        del server.refuse["sendMessage"]
        office.age(1)
        await alerts.deliver(patience=timedelta(0))
    assert (len(hook.got), len(server.messages)) == (1, 1)


def test_the_settings_name_the_sinks() -> None:
    settings = Settings(
        alert_slack_webhook=SecretStr("https://hooks.slack.com/services/x"),
        alert_telegram_chat="-1",
        telegram_bot_token=SecretStr(TELEGRAM_TOKEN),
        alert_webhook=SecretStr("https://hooks.example.com"),
        alert_mail="ada@example.com",
        smtp_url=SecretStr("smtp://localhost"),
        mail_from="agent@example.com",
    )
    assert [sink.name for sink in configured_sinks(settings)] == [
        "log",
        "slack",
        "telegram",
        "webhook",
        "mail",
    ]
    assert [sink.name for sink in configured_sinks(Settings())] == ["log"]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"alert_telegram_chat": "-1"}, "TELEGRAM_BOT_TOKEN"),
        ({"alert_mail": "ada@example.com"}, "LEARNING_SMTP_URL"),
        (
            {"alert_mail": "Ada <ada@x.org>", "smtp_url": SecretStr("smtp://x"), "mail_from": "a@x.org"},
            "no plain mail address",
        ),
    ],
)
def test_a_sink_without_what_it_needs_is_a_fault_of_the_settings(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        configured_sinks(Settings(**given))
