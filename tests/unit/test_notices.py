"""What a notice says, in which every character can be seen, and how long it may be."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.chat.posting import retry_after
from agent.chat.slack_blocks import HEADER_LIMIT
from agent.execution.mail import Mail
from agent.monitoring.alert_sinks import mail_subject, slack_message, telegram_message
from agent.monitoring.notices import Notice, bounded, evidence_text
from tests.chat_servers import block_faults, message_faults

SINCE = datetime(2026, 11, 20, 8, 0, tzinfo=UTC)


def notice(**changes: Any) -> Notice:
    given: dict[str, Any] = {
        "notice_id": "n", "kind": "raised", "at": SINCE, "tenant_id": "default", "alert_id": "a", "cause": "c:x=1",
        "check": "c", "severity": "warning", "title": "It fails", "what": "12 of 40.", "advice": "Look.",
        "evidence": {"failed": 12}, "since": SINCE, "resolved_at": None, "times_seen": 1, "times_reopened": 0,
        "link": "https://agents.example.com/alerts/a?tenant=default",
    }  # fmt: skip
    return Notice(**(given | changes))


@pytest.mark.parametrize(
    ("changes", "headline"),
    [
        ({}, "⚠ Warning: It fails"),
        ({"severity": "critical"}, "‼ Critical: It fails"),
        ({"kind": "worsened", "severity": "critical"}, "‼ Worse, now critical: It fails"),
        ({"kind": "reminder", "severity": "info"}, "i Still info: It fails"),
        ({"kind": "resolved"}, "✓ Resolved: It fails"),
        ({"title": "a\nb\u202ec"}, "⚠ Warning: a b\\u{202E}c"),
    ],
)
def test_the_headline_says_what_happened_in_one_line(changes: dict[str, Any], headline: str) -> None:
    assert notice(**changes).headline == headline


def test_what_is_over_says_until_when_and_not_what_to_do() -> None:
    labels = dict(notice(kind="resolved", resolved_at=SINCE + timedelta(hours=1)).facts)
    assert labels["Until"] == "2026-11-20 09:00 UTC"
    assert "What to do" not in labels
    assert "failed: 12" not in notice(kind="resolved").as_text()


def test_a_mail_holds_all_of_it() -> None:
    text = notice(times_reopened=2).as_text()
    for part in (
        "Warning: It fails",
        "12 of 40.",
        "Since: 2026",
        "What to do: Look.",
        "failed: 12",
        "2 times",
        "/alerts/a",
    ):
        assert part in text


def test_evidence_is_one_line_for_each_value() -> None:
    shown = evidence_text({"share": 1 / 3, "a\nb": "x\ny\u202e", "ids": [1, "ü"], "none": None, "yes": True})
    assert shown.split("\n") == [
        "share: 0.3333", "a b: x y\\u{202E}", 'ids: [1, "ü"]', "none: null", "yes: true",
    ]  # fmt: skip
    assert "characters are not shown" in evidence_text({f"k{number}": "v" * 200 for number in range(50)})


@given(
    st.recursive(
        st.none() | st.text() | st.floats() | st.binary(),
        lambda x: st.lists(x) | st.dictionaries(st.text(), x),
    )
)
def test_bounded_evidence_is_plain_json_of_four_levels(value: Any) -> None:
    def depth(found: Any) -> int:
        if isinstance(found, dict):
            return 1 + max((depth(item) for item in found.values()), default=0)
        if isinstance(found, list):
            return 1 + max((depth(item) for item in found), default=0)
        assert found is None or isinstance(found, str | bool | int | float)
        return 0

    kept = bounded({"value": value})
    assert depth(kept) <= 4


_texts = st.text(max_size=3_000)


@given(title=_texts, what=_texts, advice=_texts, evidence=st.dictionaries(_texts, _texts, max_size=3))
def test_every_sink_takes_whatever_is_found(
    title: str, what: str, advice: str, evidence: dict[str, str]
) -> None:
    made = notice(title=title, what=what, advice=advice, evidence=evidence)
    slack, telegram = slack_message(made), telegram_message(made)
    assert [*block_faults(slack["blocks"])] == []
    assert len(slack["blocks"][0]["text"]["text"]) <= HEADER_LIMIT
    assert [*message_faults({"chat_id": 1, **telegram})] == []
    Mail.checked(["ada@example.com"], mail_subject(made), made.as_text())


def test_only_what_is_urgent_rings() -> None:
    silent = [
        telegram_message(notice(**changes))["disable_notification"]
        for changes in ({}, {"severity": "critical"}, {"severity": "info"}, {"kind": "resolved"})
    ]
    assert silent == [False, False, True, True]


@pytest.mark.parametrize(
    ("given", "seconds"),
    [
        ("30", 30),
        ("0", None),
        ("-5", None),
        ("soon", None),
        ("", None),
        ("9" * 40, None),
        ("99999999", 86_400),
    ],
)
def test_a_wait_in_seconds_is_read(given: str, seconds: float | None) -> None:
    found = retry_after(httpx.Response(429, headers={"Retry-After": given}))
    assert (None if found is None else found.total_seconds()) == seconds


def test_a_wait_until_a_moment_is_read() -> None:
    def wait(year: int) -> timedelta | None:
        return retry_after(httpx.Response(503, headers={"Retry-After": f"Wed, 21 Oct {year} 07:28:00 GMT"}))

    assert wait(2015) is None
    assert wait(2999) == timedelta(days=1)
