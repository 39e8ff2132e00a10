"""Who may decide, by each channel. Nobody listed means nobody."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest

from agent.approval.reviewers import Reviewer, Reviewers
from agent.approval.risk import Risk
from agent.errors import ConfigurationError

TOKEN = "correct horse"
ADA = Reviewer(
    name="ada",
    user_ids=("ada@x.org", "a1"),
    slack="U1",
    telegram=42,
    jwt_subject="sub-1",
    token_sha256=hashlib.sha256(TOKEN.encode()).hexdigest(),
    interrupt=True,
)
BOB = Reviewer(name="bob", tenants=("t1",), risks=(Risk.WRITE,))
STUDIO = Reviewer(name="studio", interrupt_without_login=True)


def test_each_channel_knows_a_person_by_its_own_id() -> None:
    reviewers = Reviewers([BOB, ADA])

    assert reviewers.by_name("ada") is ADA
    assert reviewers.by_slack("U1") is ADA
    assert reviewers.by_telegram(42) is ADA
    assert reviewers.by_subject("sub-1") is ADA
    assert reviewers.by_token(TOKEN) is ADA
    assert reviewers.for_interrupt("a1") is ADA


@pytest.mark.parametrize("odd", ["", "x", "ada", "None"])
def test_an_unknown_or_empty_id_is_nobody(odd: str) -> None:
    reviewers = Reviewers([BOB, ADA])  # Bob has no id on any channel

    assert reviewers.by_slack(odd) is None
    assert reviewers.by_subject(odd) is None
    assert reviewers.by_token(odd) is None
    assert reviewers.for_interrupt(odd) is None
    unknown: list[Any] = [0, 43, True, "42", None]
    assert [reviewers.by_telegram(each) for each in unknown] == [None] * 5


def test_a_hash_is_no_token() -> None:
    assert Reviewers([ADA]).by_token(str(ADA.token_sha256)) is None


def test_interrupts_without_a_login_count_as_the_one_who_is_named_for_it_or_nobody() -> None:
    assert Reviewers([ADA, STUDIO]).for_interrupt(None) is STUDIO
    assert Reviewers([ADA, BOB]).for_interrupt(None) is None
    assert Reviewers([ADA, STUDIO]).for_interrupt("studio") is None
    with pytest.raises(ConfigurationError, match="at most one"):
        Reviewers([STUDIO, Reviewer(name="other", interrupt_without_login=True)])


def test_nobody_listed_means_nobody() -> None:
    assert Reviewers().allowed("t1", Risk.WRITE) == []
    assert Reviewers().for_interrupt(None) is None


def test_a_reviewer_decides_on_their_risks_in_their_tenants() -> None:
    reviewers = Reviewers([ADA, BOB])

    assert reviewers.allowed("t1", Risk.WRITE) == ["ada", "bob"]
    assert reviewers.allowed("t1", Risk.READ) == ["ada", "bob"]
    assert reviewers.allowed("t2", Risk.WRITE) == ["ada"]
    assert reviewers.allowed("t1", Risk.DESTRUCTIVE) == ["ada"]
    assert reviewers.allowed("t1", Risk.FORBIDDEN) == []


@pytest.mark.parametrize(
    "other",
    [
        {"name": "ada"},
        {"slack": "U1"},
        {"telegram": 42},
        {"jwt_subject": "sub-1"},
        {"token_sha256": ADA.token_sha256},
        {"user_ids": ("a1",)},
        {"user_ids": ("ada",)},
        {"name": "a1"},
    ],
)
def test_one_person_under_two_names_could_vote_twice(other: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="vote twice"):
        Reviewers([ADA, Reviewer(**{"name": "second", **other})])


def test_a_token_is_never_in_a_message() -> None:
    with pytest.raises(ConfigurationError) as error:
        Reviewers([ADA, Reviewer(name="second", token_sha256=ADA.token_sha256)])
    assert str(ADA.token_sha256) not in str(error.value)


def test_a_person_is_known_as_a_user_by_name_and_ids() -> None:
    assert ADA.is_user("ada")
    assert ADA.is_user("a1")
    assert not ADA.is_user("a2")
    assert not ADA.is_user(None)
