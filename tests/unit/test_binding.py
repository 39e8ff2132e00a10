"""One hash per call: whatever of it changes needs another approval."""

from __future__ import annotations

import math
from typing import Any

import pytest

from agent.approval.binding import binding_hash, canonical_json, shown
from agent.approval.risk import Risk
from agent.errors import InvalidRequest

CALL: dict[str, Any] = {
    "tool": "send_email",
    "arguments": {"to": "ada@example.com", "text": "hi"},
    "version": "1",
    "tenant_id": "t1",
    "target": "smtp",
    "thread_id": "th",
    "tool_call_id": "tc",
    "bounds": {"rows": 1},
    "policy_version": "p",
}


def hash_of(**changes: Any) -> str:
    call = CALL | changes
    return binding_hash(call.pop("tool"), call.pop("arguments"), **call)


def test_the_hash_is_the_same_whatever_the_order_of_the_keys() -> None:
    assert hash_of() == hash_of(arguments={"text": "hi", "to": "ada@example.com"})
    assert len(hash_of()) == 64


@pytest.mark.parametrize(
    "change",
    [
        {"tool": "send_mail"},
        {"arguments": {"to": "eve@example.com", "text": "hi"}},
        {"arguments": {"to": "ada@example.com", "text": "hi", "cc": None}},
        {"arguments": {"to": "ada@example.com", "text": "hi\u200b"}},
        {"version": "2"},
        {"tenant_id": "t2"},
        {"target": "other"},
        {"thread_id": None},
        {"tool_call_id": "other"},
        {"bounds": {"rows": 2}},
        {"bounds": None},
        {"bounds": {}},
        {"policy_version": "q"},
    ],
)
def test_whatever_changes_changes_the_hash(change: dict[str, Any]) -> None:
    assert hash_of(**change) != hash_of()


@pytest.mark.parametrize(
    "arguments",
    [{"a": "x\0y"}, {"a\0": 1}, {"a": [{"b": "\ud800"}]}, {"a": 2**64}, {"a": [-(2**63) - 1]}],
)
def test_what_the_log_could_not_keep_as_it_runs_is_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match=r"NUL|surrogate|64 bits"):
        hash_of(arguments=arguments)


def test_values_of_different_kinds_are_different_values() -> None:
    alike = [1, 1.0, "1", True, [1], {"1": 1}, None, "", "null", [], {}, 0, False, "true"]

    assert len({canonical_json({"value": value}) for value in alike}) == len(alike)


def test_text_is_taken_as_it_is_and_not_normalised() -> None:
    assert canonical_json("é") != canonical_json("e\u0301")


@pytest.mark.parametrize(
    "odd",
    [math.nan, math.inf, {1: "a"}, {"a": {1, 2}}, b"bytes", object(), "\ud800", {"\udfff": 1}, {"a": 1j}],
)
def test_what_json_has_no_word_for_cannot_be_approved(odd: Any) -> None:
    with pytest.raises(InvalidRequest):
        canonical_json(odd)


def test_endless_nesting_is_refused() -> None:
    deep: list[Any] = []
    for _ in range(1000):
        deep = [deep]

    with pytest.raises(InvalidRequest, match="nested"):
        canonical_json(deep)


def test_people_see_every_character() -> None:
    assert shown("pay\u202eeve\u200b\x00") == "pay\\u{202E}eve\\u{200B}\\u{0000}"
    assert shown("two\nlines\tand é") == "two\nlines\tand é"
    assert shown({"a": "\u2066"}) == '{"a": "\\u{2066}"}'


@pytest.mark.parametrize(
    ("text", "risk"),
    [
        ("read", "READ"),
        (" LOW ", "WRITE"),
        ("Medium", "WRITE"),
        ("high", "DESTRUCTIVE"),
        ("CRITICAL", "DESTRUCTIVE"),
    ],
)
def test_a_risk_goes_by_several_names(text: str, risk: str) -> None:
    assert Risk.of(text) is Risk(risk)


@pytest.mark.parametrize("text", ["", "none", "SAFE", "READ WRITE"])
def test_an_unknown_risk_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest, match="READ"):
        Risk.of(text)


def test_one_level_stricter_ends_at_forbidden() -> None:
    assert [risk.stricter for risk in Risk] == [Risk.WRITE, Risk.DESTRUCTIVE, Risk.FORBIDDEN, Risk.FORBIDDEN]
    assert sorted(Risk, key=lambda risk: risk.rank) == list(Risk)
