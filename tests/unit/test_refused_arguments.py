"""What the log keeps of calls that do not run: bounded, and without keys."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from agent.execution.refused_arguments import as_logged

KEY = "sk_live_" + "4eC39HqLyjWDarjtT1zdp7dc"


def test_keys_are_masked_by_their_form_and_by_the_name_they_stand_under() -> None:
    kept = as_logged(
        {
            "sql": f"SELECT 1 -- {KEY}",
            "accessToken": "abc",
            "headers": [{"Authorization": "Basic abc"}, {"api_key": 7}],
            "url": "postgresql://ada:hunter2@h/d",
            "pem": "-----BEGIN PRIVATE KEY-----\nabc\n-----END PRIVATE KEY-----",
            "order_id": 7,
        }
    )
    assert kept == {
        "sql": "SELECT 1 -- …",
        "accessToken": "…",
        "headers": [{"Authorization": "…"}, {"api_key": "…"}],
        "url": "postgresql://…@h/d",
        "pem": "…",
        "order_id": 7,
    }


def test_what_is_long_is_cut_and_says_how_long_it_was() -> None:
    kept = as_logged({"body": "x" * 5_000, "ids": list(range(80))})
    assert kept["body"] == "x" * 2_000 + "… (5,000 characters)"
    assert kept["ids"][50:] == ["… 30 more"]
    assert len(json.dumps(as_logged([["y" * 1_999] * 50] * 50))) < 150_000


def test_a_key_across_the_cut_is_masked_too() -> None:
    assert KEY[:12] not in as_logged("x" * 1_990 + " " + KEY)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=30,
)


@given(_JSON)
def test_whatever_is_given_can_be_written(value: object) -> None:
    assert json.loads(json.dumps(as_logged(value))) == as_logged(value)


def test_what_is_nested_without_end_is_cut() -> None:
    endless: list[object] = []
    endless.append(endless)
    assert json.dumps(as_logged(endless)).count("[") == 6
