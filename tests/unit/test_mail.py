"""Which mail can be sent, and to whom."""

from __future__ import annotations

import pytest

from agent.errors import ConfigurationError, InvalidRequest
from agent.execution.mail import Mail, refused_recipients, send


@pytest.mark.parametrize(
    "address",
    [
        "", "ada", "@x.org", "ada@", "a@b@c.org", "ada@x.org\n", "ada@x.org\r\nBcc: e@evil.com", "Ada <ada@x.org>",
        "ada@x.org,eve@evil.com", "ada@x..org", ".ada@x.org", "ada.@x.org", "a..b@x.org", "ada@-x.org", "ada @x.org",
        '"ada"@x.org', "ada@[127.0.0.1]", "ädä@x.org", "a" * 65 + "@x.org", "a@" + "x" * 260 + ".org", "ada@x.org\x00",
    ],
)  # fmt: skip
def test_what_is_no_plain_address_is_refused(address: str) -> None:
    with pytest.raises(InvalidRequest):
        Mail.checked([address], "s", "b")


@pytest.mark.parametrize("address", ["ada@x.org", "a.b+c@mail.example.co.uk", "o'neil@x.org", "x@localhost"])
def test_plain_addresses_are_taken(address: str) -> None:
    assert Mail.checked([address, address], "s", "b").to == (address,)


@pytest.mark.parametrize("subject", ["a\nb", "a\rb", "a\u2028b", "a\u202eb", "x" * 201, "a\x00"])
def test_a_subject_is_one_line_that_can_be_seen(subject: str) -> None:
    with pytest.raises(InvalidRequest):
        Mail.checked(["ada@x.org"], subject, "b")


@pytest.mark.parametrize("body", ["a\x00", "x" * 50_001, "\ud800"])
def test_a_body_is_text(body: str) -> None:
    with pytest.raises(InvalidRequest):
        Mail.checked(["ada@x.org"], "s", body)


def test_the_number_of_recipients_is_limited() -> None:
    for to in ([], [f"a{number}@x.org" for number in range(21)]):
        with pytest.raises(InvalidRequest):
            Mail.checked(to, "s", "b")


def test_recipients_must_fit_a_pattern() -> None:
    allowed = ["*@example.com", "boss@x.org"]
    to = ["A@Example.COM", "boss@x.org", "boss@y.org", "a@example.com.evil.org", "a@sub.example.com"]
    assert refused_recipients(to, allowed) == to[2:]
    assert refused_recipients(to, []) == to


async def test_a_sender_that_is_no_address_is_a_fault_of_the_settings() -> None:
    mail = Mail.checked(["ada@x.org"], "s", "b")
    with pytest.raises(ConfigurationError, match="LEARNING_MAIL_FROM"):
        await send(mail, smtp_url="smtp://127.0.0.1:1", sender="Agent <a@x.org>")
