"""Texts of a catalog without keys and without what names a person, and otherwise as they are."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from agent.discovery.masking import masked, masked_document, masked_expression

KEY = "ghp_" + "abcdefghijklmnopqrstuvwxyz0123456789"


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("Ask ada@example.com", "Ask <email>"),
        ("Password is hunter2, please", "Password is <key>, please"),
        (f"with {KEY}.", "with <key>"),
        ('{"Authorization": "Bearer abcdefgh.ijkl"}', '{"Authorization": "Bearer <key>"}'),
        ("postgres://ada:secret@db/shop", "<key>"),
        ("-----BEGIN PRIVATE KEY-----\nMIIE\n-----END PRIVATE KEY----- ends", "<key> ends"),
        ("call +49 170 1234567", "call <phone>"),
        ("paid with 4111 1111 1111 1111", "paid with <number>"),
        ("to DE89370400440532013000", "to <number>"),
        ("the token of a session, since 2024-01-01 12:00", "the token of a session, since 2024-01-01 12:00"),
        ("one of order_items_2024, OrderItems", "one of order_items_2024, OrderItems"),
    ],
)
def test_what_is_masked_in_a_text(text: str, kept: str) -> None:
    assert masked(text) == kept


@given(
    st.lists(
        st.sampled_from(
            ["a@b.co", f"{KEY} ", "password: x1y2", "+49 170 1234567", "Bearer abcdefgh", "it's", " ", "\n"]
        )
        | st.text(max_size=20)
    ).map("".join)
)
@example("+49 170 1234567+49 170 1234567")
def test_what_is_masked_stays_as_it_is_when_it_is_masked_again(text: str) -> None:
    assert masked(masked(text)) == masked(text)
    assert masked(masked("a@b.co " * 700)) == masked("a@b.co " * 700)


def test_names_in_expressions_stay() -> None:
    definition = "CREATE INDEX ON app.\"IX_Orders_2024_Q2Abc\" (k) WHERE (k = 'ada@example.com'::text)"

    assert masked_expression(definition) == definition.replace("ada@example.com", "<email>")


def test_every_place_of_a_document_is_masked() -> None:
    document = {
        "name": "ada@example.com",
        "comment": "ada@example.com",
        "columns": [{"name": "k", "default": "'ada@example.com'", "comment": None, "enum": ["ok", "ada@example.com"]}],
        "checks": [{"name": "c", "definition": "CHECK (k <> 'ada@example.com')"}],
        "policies": [{"using": "k = 'ada@example.com'", "check": None, "roles": ["public"]}],
        "triggers": [{"definition": f"EXECUTE FUNCTION hook('{KEY}')", "enabled": True}],
        "rls": {"enabled": True},
    }  # fmt: skip

    assert masked_document(document) == {
        "name": "ada@example.com",
        "comment": "<email>",
        "columns": [{"name": "k", "default": "'<email>'", "comment": None, "enum": ["ok", "<email>"]}],
        "checks": [{"name": "c", "definition": "CHECK (k <> '<email>')"}],
        "policies": [{"using": "k = '<email>'", "check": None, "roles": ["public"]}],
        "triggers": [{"definition": "EXECUTE FUNCTION hook('<key>')", "enabled": True}],
        "rls": {"enabled": True},
    }
