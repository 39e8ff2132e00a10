"""What clients are shown of a pause, and what their answers mean. Whatever cannot be read is a no."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.approval.answers import UNREADABLE, Answer, BatchAnswer, Proposed, payload, read_answers

ONE = Proposed(
    tool_call_id="c1", tool="pay", arguments={"amount": 5, "to": "x", "now": True}, description="pay 5"
)
TWO = Proposed(tool_call_id="c2", tool="send", arguments={"text": "hi"}, description="send hi")
BOTH = [ONE, TWO]


def read(value: Any, calls: list[Proposed] | None = None) -> list[Answer]:
    found = read_answers(value, calls or [ONE])
    assert isinstance(found, list)
    return found


@pytest.mark.parametrize(
    "value",
    [
        {"decisions": [{"type": "approve"}]},
        [{"type": "accept", "args": None}],
        {"type": "accept"},
        {"type": "approve"},
        [True],
        True,
        "approve",
        " OK. ",
        '{"type": "approve"}',
        '[{"type": "accept", "args": null}]',
        [{"type": "accept", "args": {"action": "pay", "args": {"amount": "5", "to": "x", "now": "true"}}}],
    ],
)
def test_a_yes(value: Any) -> None:
    assert read(value) == [Answer(verdict="approve")]


@pytest.mark.parametrize(
    "value",
    [
        None, 1, 0, 1.0, b"approve", [], {}, {"approve": True}, {"type": "Approve"}, {"type": True}, {"type": None},
        {"decisions": None}, {"decisions": {}}, {"decisions": [None]}, {"decisions": [{"type": "approve"}], "x": 1},
        [{"type": "approve"}, {"type": "approve"}], {"approval_batch": 5}, {"approval_batch": "b", "more": 1},
        {"type": "accept", "args": "pay"}, {"type": "accept", "args": {"action": "send", "args": {}}},
        {"type": "accept", "args": {"action": "pay", "args": {"amount": 6, "to": "x", "now": True}}},
        {"type": "accept", "args": {"action": "pay", "args": {"amount": 5, "to": "x", "now": 1}}},
        {"type": "edit"}, {"type": "edit", "edited_action": {"name": "send", "args": {}}},
        {"type": "edit", "edited_action": {"name": "pay", "args": [5]}},
        {"type": "edit", "edited_action": {"args": {"amount": 5}}},
        {"__agui_resume_map__": {"a": True}}, "[" * 50_000, "{",
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_a_no(value: Any) -> None:
    (answer,) = read(value)
    assert answer.verdict == "reject"
    assert answer.note in (UNREADABLE, str(value)[:2_000])


def test_a_no_keeps_what_was_written() -> None:
    assert read({"decisions": [{"type": "reject", "message": " wait "}]})[0].note == "wait"
    assert read([{"type": "response", "args": "wait"}])[0].note == "wait"
    assert read("not on a Friday")[0] == Answer(verdict="reject", note="not on a Friday")
    assert read({"__agui_cancelled__": True})[0] == Answer(verdict="reject", note="cancelled")


def test_an_edit_gets_back_the_types_that_a_client_took_away() -> None:
    edited = {"type": "edit", "args": {"action": "pay", "args": {"amount": "6", "to": "7", "now": "false"}}}
    (answer,) = read([edited])
    assert answer == Answer(verdict="edit", arguments={"amount": 6, "to": "7", "now": False})
    odd = {
        "type": "edit",
        "edited_action": {"name": "pay", "args": {"amount": "six", "now": "1", "new": "x"}},
    }
    assert read(odd)[0].arguments == {"amount": "six", "now": "1", "new": "x"}


def test_an_edit_that_is_not_offered_is_a_no() -> None:
    fixed = Proposed(
        tool_call_id="c", tool="pay", arguments={}, description="", allowed=("approve", "reject")
    )
    assert not read({"type": "edit", "edited_action": {"name": "pay", "args": {}}}, [fixed])[0].readable


def test_answers_go_to_their_calls_in_order() -> None:
    mixed = {"decisions": [{"type": "approve"}, {"type": "reject"}]}
    assert [answer.verdict for answer in read(mixed, BOTH)] == ["approve", "reject"]
    with_junk = {"decisions": [{"type": "approve"}, 5]}
    assert [answer.readable for answer in read(with_junk, BOTH)] == [True, False]


@pytest.mark.parametrize("value", [True, "yes", [{"type": "accept"}], {"decisions": [{"type": "approve"}]}])
def test_one_yes_is_not_for_several_calls_but_one_no_is(value: Any) -> None:
    assert {answer.verdict for answer in read(value, BOTH)} == {"reject"}
    assert [answer.note for answer in read([{"type": "response", "args": "no!"}], BOTH)] == ["no!", "no!"]


def test_the_rows_of_a_batch_are_named_by_our_own_answer() -> None:
    assert read_answers({"approval_batch": "b1"}, BOTH) == BatchAnswer(batch_id="b1")
    assert read_answers('{"approval_batch": "b1"}', BOTH) == BatchAnswer(batch_id="b1")


def test_the_payload_has_what_each_client_looks_for() -> None:
    value = payload(BOTH, batch_id="b1", message="m", expires_at="2030-01-01T00:00:00+00:00")
    json.dumps(value)
    assert value["approval_batch"] == "b1"
    assert value["tool_call_id"] == "c1"
    assert [one["args"] == one["arguments"] for one in value["action_requests"]] == [True, True]
    assert [one["action_name"] for one in value["review_configs"]] == ["pay", "send"]
    assert value["response_schema"]["properties"]["decisions"]["minItems"] == 2


junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["type", "args", "decisions", "edited_action", "name", "action", "message", "approval_batch"]
            ),
            inner | st.sampled_from(["approve", "accept", "edit", "pay"]),
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(junk)
def test_nothing_makes_it_fail_and_every_call_has_an_answer(value: Any) -> None:
    found = read_answers(value, BOTH)
    assert isinstance(found, BatchAnswer) or len(found) == 2
