"""Formats of texts: what fits, what only looks like it, and that any text has an answer."""

from __future__ import annotations

import uuid
from datetime import date, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.discovery.formats import format_of, is_card_number, is_iban, is_ip, is_phone


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["ada@example.com", "b.c+d@mail.example.co.uk", "jürgen@müller.de"], "email"),
        (["https://example.com/a?b=c", "http://user:pw@host.example/"], "url"),
        (["ftp://files.example.com/x"], "url"),
        (["+49 30 123456", "(030) 123-456", "001 555 010 9999", "+1-202-555-0147 ext. 12"], "phone"),
        (["2024-02-29", "1999-12-31"], "iso_date"),
        (["2024-02-29T10:00:00Z", "2024-02-29 10:00:00.123+02"], "iso_datetime"),
        (["EUR", "USD", "JPY"], "currency"),
        (['{"a": 1}', "[1, 2]", "{}"], "json"),
        (["10.0.0.1", "2001:db8::1", "192.168.0.0/16"], "ip"),
        (["00:1a:2b:3c:4d:5e"], "mac"),
        (["DE89 3704 0044 0532 0130 00", "GB82WEST12345698765432"], "iban"),
        (["4111 1111 1111 1111", "5500005555555559"], "card_number"),
        (["d41d8cd98f00b204e9800998ecf8427e"], "hex"),
        (["1", "20", "-3"], "integer"),
        (["1.5", "2", "-3e4"], "number"),
        (["example.com", "sub.example.co.uk"], "domain"),
        (["open", "paid"], None),
        (["", "  "], None),
        ([], None),
    ],
)
def test_the_format_of_values_is_named(values: list[str], expected: str | None) -> None:
    assert format_of(values)[0] == expected


def test_a_format_needs_most_of_the_values_and_says_how_many_fit() -> None:
    emails = [f"a{number}@example.com" for number in range(9)]

    assert format_of([*emails, "none"]) == ("email", 0.9)
    assert format_of([*emails[:7], "none", "unknown", "?"]) == (None, 0.0)


def test_a_document_that_was_cut_is_still_json() -> None:
    assert format_of(['{"a": "' + "x" * 193])[0] == "json"
    assert format_of(['{"a": "x'])[0] is None


@pytest.mark.parametrize(
    "text", ["2024-01-05", "12345678", "1.234.567", "10.0.0.1", "12-34", "abc 1234567", "3.14159265"]
)
def test_what_has_digits_is_not_a_telephone_number_for_that(text: str) -> None:
    assert not is_phone(text)


@pytest.mark.parametrize("text", ["DE88 3704 0044 0532 0130 00", "GB82", "XX00AAAAAAAAAAAAAA"])
def test_an_account_number_needs_right_check_digits(text: str) -> None:
    assert not is_iban(text)


@pytest.mark.parametrize("text", ["4111 1111 1111 1112", "0000000000000000", "1234567890123", "411111111111"])
def test_a_card_number_needs_a_network_and_a_right_check_digit(text: str) -> None:
    assert not is_card_number(text)


@given(st.ip_addresses())
def test_every_address_of_a_network_is_one(address: object) -> None:
    assert is_ip(str(address))


@given(st.uuids())
def test_every_uuid_is_one(value: uuid.UUID) -> None:
    assert format_of([str(value)]) == ("uuid", 1.0)


@given(st.dates(min_value=date(1000, 1, 1)), st.datetimes(min_value=datetime(1000, 1, 1)))  # noqa: DTZ001
def test_dates_and_times_as_they_are_written(day: date, moment: datetime) -> None:
    assert format_of([day.isoformat()])[0] == "iso_date"
    assert format_of([moment.isoformat(" ")])[0] == "iso_datetime"


@given(st.lists(st.text(max_size=200), max_size=20))
def test_any_text_has_an_answer(values: list[str]) -> None:
    name, share = format_of(values)

    assert (name is None) == (share == 0.0)
    assert 0 <= share <= 1
