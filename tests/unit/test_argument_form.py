"""The form of a call's arguments: what it asks for, and what comes back from what was sent."""

from __future__ import annotations

from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as some
from pydantic import BaseModel, Field

from agent.server.argument_form import fields_of, read_form, read_json


class Order(BaseModel):
    city: str


class Refund(BaseModel):
    order: str = Field(description="Number of the order")
    amount: float
    times: int = 1
    urgent: bool = False
    currency: Literal["EUR", "USD"] = "EUR"
    note: str | None = None
    lines: list[int] = []
    to: Order = Order(city="Ulm")


SCHEMA = Refund.model_json_schema()
ARGUMENTS: dict[str, Any] = {
    "order": "A1", "amount": 3.5, "times": 2, "urgent": True, "currency": "USD", "note": None, "lines": [1],
    "to": {"city": "Bern"},
}  # fmt: skip


def sent_unchanged(schema: Any, arguments: dict[str, Any]) -> dict[str, str]:
    """What a browser sends of an untouched form; text areas change line ends."""
    sent = {}
    for field in fields_of(schema, arguments):
        sent[field.key] = field.value.replace("\r\n", "\n").replace("\n", "\r\n")
        if field.is_left_out:
            sent[f"{field.key}.out"] = "yes"
    return sent


def test_each_argument_has_a_control_of_its_kind() -> None:
    kinds = {field.name: field.kind for field in fields_of(SCHEMA, ARGUMENTS)}
    assert kinds == {
        "order": "line", "amount": "number", "times": "integer", "urgent": "choice", "currency": "choice",
        "note": "json", "lines": "json", "to": "json",
    }  # fmt: skip


def test_a_form_says_what_the_schema_says() -> None:
    order, *_, currency = [
        field for field in fields_of(SCHEMA, ARGUMENTS) if field.name in {"order", "currency"}
    ]
    assert (order.description, order.is_optional) == ("Number of the order", False)
    assert (currency.choices, currency.value, currency.is_optional) == (
        (('"EUR"', "EUR"), ('"USD"', "USD")), '"USD"', True,
    )  # fmt: skip


@pytest.mark.parametrize("schema", [SCHEMA, None], ids=["with a schema", "without"])
def test_a_form_that_nobody_touched_gives_the_same_arguments(schema: Any) -> None:
    read, _ = read_form(schema, ARGUMENTS, sent_unchanged(schema, ARGUMENTS))
    assert read == ARGUMENTS
    assert [type(value) for value in read.values()] == [type(value) for value in ARGUMENTS.values()]


_JSON = some.recursive(
    some.none() | some.booleans() | some.text() | some.integers(-(10**20), 10**20)
    | some.floats(allow_nan=False, allow_infinity=False),
    lambda inner: some.lists(inner, max_size=3) | some.dictionaries(some.text(), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


@given(some.dictionaries(some.text(), _JSON, max_size=5))
def test_any_arguments_come_back_as_they_were(arguments: dict[str, Any]) -> None:
    read, _ = read_form(None, arguments, sent_unchanged(None, arguments))
    assert read == arguments
    assert repr(read) == repr(arguments)  # tells 1 from 1.0 and from True


def test_arguments_that_do_not_fit_the_schema_are_shown_as_they_are() -> None:
    arguments = {"order": 7, "amount": "much", "extra": {"a": 1}}
    fields = {field.name: field for field in fields_of(SCHEMA, arguments)}
    assert (fields["order"].kind, fields["order"].value) == ("json", "7")
    assert (fields["amount"].kind, fields["amount"].value) == ("json", '"much"')
    assert "extra" in fields, "nothing that would run is left out of the form"


def test_what_is_left_out_stays_out() -> None:
    arguments = {"order": "A1", "amount": 1.0}
    read, _ = read_form(SCHEMA, arguments, sent_unchanged(SCHEMA, arguments))
    assert read == arguments
    times = next(field for field in fields_of(SCHEMA, arguments) if field.name == "times")
    sent = sent_unchanged(SCHEMA, arguments)
    del sent[f"{times.key}.out"]
    read, _ = read_form(SCHEMA, arguments, sent)
    assert read == {**arguments, "times": 1}


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("amount", "3,5", "must be a number"),
        ("amount", "NaN", "must be a number"),
        ("amount", "true", "must be a number"),
        ("times", "2.0", "must be a whole number"),
        ("times", "9" * 40, "must be a whole number"),
        ("currency", '"BTC"', "must be one of the choices"),
        ("urgent", "1", "must be one of the choices"),
        ("lines", "[1,", "is not JSON"),
        ("to", '{"city": "Ulm", "city": "Bern"}', "a name is given twice"),
    ],
)
def test_what_cannot_be_read_is_refused_and_shown_again(name: str, text: str, problem: str) -> None:
    field = next(field for field in fields_of(SCHEMA, ARGUMENTS) if field.name == name)
    read, shown = read_form(SCHEMA, ARGUMENTS, {**sent_unchanged(SCHEMA, ARGUMENTS), field.key: text})
    assert read is None
    [wrong] = [one for one in shown if one.problem]
    assert (wrong.name, wrong.value) == (name, text)
    assert problem in wrong.problem


def test_a_control_that_was_not_sent_is_no_default() -> None:
    sent = sent_unchanged(SCHEMA, ARGUMENTS)
    del sent["arg.0"]
    read, shown = read_form(SCHEMA, ARGUMENTS, sent)
    assert read is None
    assert shown[0].problem == "is missing"


def test_json_too_deep_to_read_is_refused() -> None:
    with pytest.raises(ValueError, match=r"deep|JSON"):
        read_json("[" * 200_000)
