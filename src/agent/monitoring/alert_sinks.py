"""Where alerts are told: log, Slack, Telegram, any webhook, mail. The database has every notice anyway."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final, Protocol

from agent.chat.posting import post_json, retry_after
from agent.chat.slack_blocks import TEXT_LIMIT, escaped, header, labelled, link, preformatted, rich, section
from agent.chat.telegram_bot import TelegramBot, TelegramRefused
from agent.chat.telegram_text import MessageText
from agent.errors import ConfigurationError, InvalidRequest, OperatorError
from agent.events import emit
from agent.execution.mail import SUBJECT_CHARACTERS_MAX, Mail, MailFailed, send
from agent.monitoring.notices import Notice

if TYPE_CHECKING:
    import httpx
    from pydantic import SecretStr

    from agent.settings import Settings

_TOO_LONG: Final = "\n⟨Cut: the rest is on the alert's page.⟩"


class DeliveryFailed(Exception):
    """A sink did not take a notice. The words are stored and shown: no address and no token is in them."""

    def __init__(self, reason: str, *, wait: timedelta | None = None) -> None:
        super().__init__(reason)
        self.wait = wait
        """How long the sink wants to be left alone; `None`: it does not say."""


class Sink(Protocol):
    """One place where alerts are told. Told again after a failure, so a notice may come twice."""

    @property
    def name(self) -> str:
        """Stable, and different for each sink of a deployment: what waits for it is stored under it."""

    async def send(self, notice: Notice) -> None:
        """Tell it.

        Raises:
            DeliveryFailed: it was not taken, or nobody knows.
        """


def configured_sinks(settings: Settings) -> list[Sink]:
    """The log, and each sink that the settings name.

    Raises:
        ConfigurationError: a sink is named and what it needs is not there.
    """
    sinks: list[Sink] = [LogSink()]
    if settings.alert_slack_webhook is not None:
        sinks.append(SlackSink(settings.alert_slack_webhook))
    if settings.alert_telegram_chat is not None:
        if settings.telegram_bot_token is None:
            raise ConfigurationError(
                f"LEARNING_ALERT_TELEGRAM_CHAT={settings.alert_telegram_chat!r} needs TELEGRAM_BOT_TOKEN"
            )
        bot = TelegramBot(settings.telegram_api_url, settings.telegram_bot_token)
        sinks.append(TelegramSink(bot, settings.alert_telegram_chat))
    if settings.alert_webhook is not None:
        sinks.append(WebhookSink(settings.alert_webhook))
    if settings.alert_mail is not None:
        if settings.smtp_url is None or settings.mail_from is None:
            raise ConfigurationError(
                f"LEARNING_ALERT_MAIL={settings.alert_mail!r} needs LEARNING_SMTP_URL and LEARNING_MAIL_FROM"
            )
        sinks.append(MailSink(settings.alert_mail, settings.smtp_url, settings.mail_from))
    return sinks


class LogSink:
    """Events, and with them lines of the logger `agent.events`."""

    name = "log"

    async def send(self, notice: Notice) -> None:
        """Emit the event of this kind of notice."""
        match notice.kind:
            case "raised":
                emit("alert_raised", alert_id=notice.alert_id, tenant_id=notice.tenant_id, cause=notice.cause,
                     severity=notice.severity, title=notice.title)  # fmt: skip
            case "worsened":
                emit("alert_worsened", alert_id=notice.alert_id, tenant_id=notice.tenant_id, cause=notice.cause,
                     severity=notice.severity, title=notice.title)  # fmt: skip
            case "reminder":
                emit("alert_reminded", alert_id=notice.alert_id, tenant_id=notice.tenant_id, cause=notice.cause,
                     severity=notice.severity, title=notice.title)  # fmt: skip
            case "resolved":
                emit("alert_resolved", alert_id=notice.alert_id, tenant_id=notice.tenant_id, cause=notice.cause,
                     severity=notice.severity, title=notice.title)  # fmt: skip


class SlackSink:
    """A Slack incoming webhook.

    Args:
        address: of the webhook.
        client: that makes the requests; by default one for each.
    """

    name = "slack"

    def __init__(self, address: SecretStr, client: httpx.AsyncClient | None = None) -> None:
        self._address = address
        self._client = client

    async def send(self, notice: Notice) -> None:
        """Post the message."""
        response = await _posted(self._address, slack_message(notice), self._client)
        # Slack's reason is one word, such as invalid_blocks or no_service; anything else is nobody's business here.
        word = response.text.strip() if re.fullmatch(r"\s*[a-z_]{2,60}\s*", response.text[:100]) else ""
        if response.status_code != 200:
            raise DeliveryFailed(
                f"Slack answered {response.status_code}{f': {word}' if word else ''}",
                wait=retry_after(response),
            )


class TelegramSink:
    """A chat of the Telegram bot.

    Args:
        bot: which writes.
        chat: number of a person, group or channel, or `@name` of a public one.
    """

    name = "telegram"

    def __init__(self, bot: TelegramBot, chat: str) -> None:
        self._bot = bot
        self._chat = chat

    async def send(self, notice: Notice) -> None:
        """Send the message."""
        try:
            await self._bot.call("sendMessage", {"chat_id": self._chat, **telegram_message(notice)})
        except TelegramRefused as refused:
            raise DeliveryFailed(str(refused), wait=refused.retry_after) from None
        except OperatorError as error:
            raise DeliveryFailed(str(error)) from None


class WebhookSink:
    """Any address that takes JSON.

    Args:
        address: where it goes.
        client: that makes the requests; by default one for each.
    """

    name = "webhook"

    def __init__(self, address: SecretStr, client: httpx.AsyncClient | None = None) -> None:
        self._address = address
        self._client = client

    async def send(self, notice: Notice) -> None:
        """Post the notice."""
        # Told again after a lost answer, it has the same key.
        headers = {"Idempotency-Key": notice.notice_id}
        response = await _posted(self._address, notice.as_json(), self._client, headers)
        if not 200 <= response.status_code < 300:
            raise DeliveryFailed(f"the webhook answered {response.status_code}", wait=retry_after(response))


class MailSink:
    """Mail over the mail server of the settings.

    Args:
        receivers: addresses, separated by commas.
        smtp_url: of the mail server.
        sender: as LEARNING_MAIL_FROM.

    Raises:
        ConfigurationError: a receiver is no address.
    """

    name = "mail"

    def __init__(self, receivers: str, smtp_url: SecretStr, sender: str) -> None:
        self._to = [one.strip() for one in receivers.split(",") if one.strip()]
        self._smtp_url = smtp_url
        self._sender = sender
        try:
            Mail.checked(self._to, "subject", "body")
        except InvalidRequest as error:
            raise ConfigurationError(f"LEARNING_ALERT_MAIL={receivers!r}: {error}") from None

    async def send(self, notice: Notice) -> None:
        """Send the mail. Where nobody knows whether it was sent it is sent again."""
        mail = Mail.checked(self._to, mail_subject(notice), notice.as_text())
        try:
            await send(mail, smtp_url=self._smtp_url.get_secret_value(), sender=self._sender)
        except (MailFailed, ConfigurationError) as error:
            raise DeliveryFailed(str(error)) from None


async def _posted(
    address: SecretStr,
    document: Mapping[str, Any],
    client: httpx.AsyncClient | None,
    headers: Mapping[str, str] | None = None,
) -> httpx.Response:
    import httpx

    try:
        return await post_json(address.get_secret_value(), document, client=client, headers=headers)
    except (
        httpx.HTTPError,
        httpx.InvalidURL,
    ) as error:  # whose words may hold the address, which is a secret
        raise DeliveryFailed(f"it could not be reached: {type(error).__name__}") from None


# --- what is shown ----------------------------------------------------------------------------------------------


def slack_message(notice: Notice) -> dict[str, Any]:
    """The message in Block Kit."""
    elements = [labelled(label, text) for label, text in notice.facts]
    if notice.evidence_text:
        elements += [section("Evidence", bold=True), preformatted(notice.evidence_text)]
    if notice.link:
        elements.append(link(notice.link, "Open the alert"))
    return {
        "text": escaped(notice.headline)[:TEXT_LIMIT],
        "blocks": [header(notice.headline), rich(elements)],
        "unfurl_links": False,
        "unfurl_media": False,
    }


def telegram_message(notice: Notice) -> dict[str, Any]:
    """The arguments of `sendMessage`, chat aside."""
    text = MessageText(_TOO_LONG)
    text.add(f"{notice.headline}\n", "bold")
    if notice.link:  # first, so that it is there when the rest is cut
        text.add(f"{notice.link}\n")
    for label, value in notice.facts:
        text.add(f"{label}:", "bold")
        text.add(" ")
        text.add(value, "code" if label == "Cause" else None)
        text.add("\n")
    if notice.evidence_text:
        text.add("Evidence:\n", "bold")
        text.add(notice.evidence_text, "pre")
    shown, entities, _ = text.finished()
    return {
        "text": shown,
        "entities": entities,
        "link_preview_options": {"is_disabled": True},
        "disable_notification": notice.severity == "info" or notice.kind == "resolved",
    }


def mail_subject(notice: Notice) -> str:
    """One line that a mail takes as its subject."""
    return notice.headline[:SUBJECT_CHARACTERS_MAX]
