"""Mail to people that the policy names, over the mail server of the settings."""

from __future__ import annotations

import asyncio
import fnmatch
import re
import smtplib
import ssl
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from email.headerregistry import Address
from email.message import EmailMessage
from email.policy import SMTP
from email.utils import formatdate, make_msgid
from typing import Final
from urllib.parse import unquote, urlsplit

from agent.errors import ConfigurationError, InvalidRequest

RECIPIENTS_MAX: Final = 20
SUBJECT_CHARACTERS_MAX: Final = 200
BODY_CHARACTERS_MAX: Final = 50_000
_TIMEOUT_SECONDS: Final = 20.0
_ADDRESS: Final = re.compile(
    r"[A-Za-z0-9.!#$%&'*+/=?^_`{|}~-]{1,64}"
    r"@[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?(?:\.[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?)*"
)
_ADDRESS_CHARACTERS_MAX: Final = 254
_ON_THE_WIRE: Final = SMTP.clone(cte_type="7bit")
_TAKEN: Final = 200


class MailFailed(Exception):
    """The server did not take the mail."""

    def __init__(self, reason: str, *, unsure: bool) -> None:
        super().__init__(reason)
        self.unsure = unsure
        """Whether it may have been sent all the same."""


@dataclass(frozen=True, kw_only=True)
class Mail:
    """One mail, checked."""

    to: tuple[str, ...]
    subject: str
    body: str

    @classmethod
    def checked(cls, to: Sequence[str], subject: str, body: str) -> Mail:
        """A mail that can be sent.

        Raises:
            InvalidRequest: an address that is none, a subject of several lines, or a part that is too long.
        """
        if not 0 < len(to) <= RECIPIENTS_MAX:
            raise InvalidRequest(f"a mail goes to 1 to {RECIPIENTS_MAX} addresses, not {len(to)}")
        for address in to:
            if not _is_address(address):
                raise InvalidRequest(f"{address!r} is no plain mail address such as ada@example.com")
        if len(subject) > SUBJECT_CHARACTERS_MAX or any(_is_control(letter) for letter in subject):
            raise InvalidRequest(
                f"the subject must be one line of at most {SUBJECT_CHARACTERS_MAX} characters that can all be seen"
            )
        if len(body) > BODY_CHARACTERS_MAX or "\x00" in body or not _is_storable(body + subject):
            raise InvalidRequest(f"the body must be text of at most {BODY_CHARACTERS_MAX} characters")
        return cls(to=tuple(dict.fromkeys(to)), subject=subject, body=body)


def _is_address(address: str) -> bool:
    local = address.partition("@")[0]
    dotted = local.startswith(".") or local.endswith(".") or ".." in local
    return len(address) <= _ADDRESS_CHARACTERS_MAX and not dotted and bool(_ADDRESS.fullmatch(address))


def _is_control(letter: str) -> bool:
    return unicodedata.category(letter) in ("Cc", "Cf", "Zl", "Zp", "Cs")


def _is_storable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def refused_recipients(to: Iterable[str], allowed: Iterable[str]) -> list[str]:
    """The addresses that fit none of the patterns, such as `*@example.com`; case does not count."""
    patterns = [pattern.lower() for pattern in allowed]
    return [
        address
        for address in to
        if not any(fnmatch.fnmatchcase(address.lower(), pattern) for pattern in patterns)
    ]


async def send(mail: Mail, *, smtp_url: str, sender: str) -> str:
    """Send a mail and return its message id. One connection for each; nothing is tried twice.

    Raises:
        ConfigurationError: the sender of the settings is no address.
        MailFailed: the server did not take it, or nobody knows.
    """
    if not _is_address(sender):
        raise ConfigurationError(f"LEARNING_MAIL_FROM={sender!r} must be a plain mail address")
    return await asyncio.to_thread(_send, mail, smtp_url, sender)


def _message(mail: Mail, sender: str) -> EmailMessage:
    message = EmailMessage()
    message["From"] = Address(addr_spec=sender)
    message["To"] = tuple(Address(addr_spec=address) for address in mail.to)
    message["Subject"] = mail.subject
    message["Date"] = formatdate()
    message["Message-ID"] = make_msgid(domain=sender.partition("@")[2])
    message.set_content(mail.body)
    return message


def _send(mail: Mail, smtp_url: str, sender: str) -> str:
    parts = urlsplit(smtp_url)
    host = parts.hostname or "localhost"
    message = _message(mail, sender)
    handed_over = False
    try:
        with _connected(parts.scheme, host, parts.port) as server:
            if parts.scheme == "smtp" and parts.username:
                server.starttls(context=ssl.create_default_context())  # a password goes over no open line
            if parts.username:
                server.login(unquote(parts.username), unquote(parts.password or ""))
            server.ehlo_or_helo_if_needed()
            _expect(server.mail(sender), "the sender")
            for address in mail.to:  # all of them or nobody
                _expect(server.rcpt(address), address)
            handed_over = True
            _expect(server.data(message.as_bytes(policy=_ON_THE_WIRE)), "the text")
    except (smtplib.SMTPException, OSError) as error:
        raise MailFailed(
            f"the mail server could not be used: {type(error).__name__}", unsure=handed_over
        ) from None
    return str(message["Message-ID"])


def _expect(reply: tuple[int, bytes], what: str) -> None:
    """The server's word that it takes this part."""
    if not _TAKEN <= reply[0] < _TAKEN + 100:
        raise MailFailed(f"the mail server refused {what} ({reply[0]})", unsure=False)


def _connected(scheme: str, host: str, port: int | None) -> smtplib.SMTP:
    if scheme == "smtps":
        return smtplib.SMTP_SSL(
            host, port or 465, timeout=_TIMEOUT_SECONDS, context=ssl.create_default_context()
        )
    return smtplib.SMTP(host, port or 25, timeout=_TIMEOUT_SECONDS)
