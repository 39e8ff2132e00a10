"""What a person is shown before they decide."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest
from slack_sdk.models.blocks import Block

from agent.approval.card import ITEMS_LIMIT, cut, make_card, result_text, visible
from agent.approval.records import Approval
from agent.approval.risk import Risk
from agent.approval.slack import EDIT, blocks, edit_view, summary
from agent.approval.telegram import message_text
from agent.chat.slack_blocks import escaped

HASH = hashlib.sha256(b"1").hexdigest()
STATEMENT = "UPDATE shop.orders SET status = 'paid' WHERE id = 7"


def document(**changes: Any) -> dict[str, Any]:
    """An approval as the storage functions give it."""
    return {
        "tenant_id": "default",
        "approval_id": "11111111-1111-4111-8111-111111111111",
        "batch_id": "22222222-2222-4222-8222-222222222222",
        "request_key": "key",
        "kind": "execution",
        "tool": "execute_sql",
        "tool_version": "1",
        "arguments": {"sql": STATEMENT},
        "arguments_shown": {"sql": STATEMENT},
        "args_hash": HASH,
        "risk": "WRITE",
        "summary": "",
        "reason": "The customer says it is paid.",
        "effects": {"rows": {"shop.orders": {"inserted": 0, "updated": 3, "deleted": 0}}},
        "bounds": None,
        "approvers": ["ada"],
        "required_votes": 1,
        "state": "pending",
        "requested_by": "bob",
        "agent_id": "support",
        "session_id": "thread-1",
        "run_id": None,
        "requested_at": "2026-11-20T10:00:00+00:00",
        "expires_at": "2026-11-20T13:00:00+02:00",
        "escalate_at": "2026-11-20T10:20:00+00:00",
        "escalated_at": None,
        "decided_at": None,
        "decided_by": [],
        "note": "",
        "votes": [],
        "version": 1,
        "changed_at": "2026-11-20T10:00:00+00:00",
        "interrupt": None,
        "messages": [],
        "replaces": None,
        "replaced_by": None,
        "edited_by": None,
        "fingerprint": None,
        "tables": [],
        "rows": 3,
        "claimed_by": None,
        "claimed_at": None,
        "finished_at": None,
        "log_id": None,
        **changes,
    }


def approval(**changes: Any) -> Approval:
    return Approval.from_row(document(**changes))


def numbered(count: int, **changes: Any) -> list[Approval]:
    return [approval(approval_id=f"{n:08}-1111-4111-8111-111111111111", **changes) for n in range(count)]


def every_text(built: Any) -> list[str]:
    """Every text in blocks that a person sees."""
    if isinstance(built, dict):
        own = [built["text"]] if isinstance(built.get("text"), str) else []
        return own + [text for name, value in built.items() if name != "value" for text in every_text(value)]
    if isinstance(built, list):
        return [text for one in built for text in every_text(one)]
    return []


def test_a_card_says_risk_call_effect_asker_expiry_and_state_and_the_reason_last() -> None:
    text = make_card([approval()], public_url="https://agents.example.com/").as_text()

    parts = [
        "WRITE",
        "execute_sql",
        STATEMENT,
        "shop.orders: 3 updated",
        "Waiting",
        "bob",
        "2026-11-20 11:00 UTC",
    ]
    places = [text.index(part) for part in [*parts, "The customer says it is paid."]]
    assert places == sorted(places)
    assert "claim" in text[places[-2] : places[-1]]
    assert "support" in text
    assert "thread-1" in text
    assert "default" in text


def test_what_is_shown_is_the_call_and_never_the_models_summary() -> None:
    text = make_card([approval(summary="harmless look-up", reason="")]).as_text()

    assert "harmless look-up" not in text
    assert "claim" not in text


@pytest.mark.parametrize(
    "hidden",
    [
        "\u202e",
        "\u200b",
        "\u2066",
        "\x1b",
        "\xad",
        "\ufeff",
        "\u3164",
        "\u2028",
        "\U000e0041",
        "\x00",
        "\ufe0f",
    ],
)
def test_characters_that_cannot_be_seen_are_written_out(hidden: str) -> None:
    card = make_card(
        [
            approval(
                tool=f"to{hidden}ol",
                arguments_shown={f"sq{hidden}l": f"SELECT {hidden}1", "n": {"deep": [hidden]}},
                reason=f"be{hidden}cause",
                requested_by=f"b{hidden}ob",
            )
        ]
    )
    told = f"\\u{{{ord(hidden):04X}}}"

    everything = [card.as_text(), *every_text(blocks(card)), message_text(card)[0], summary(card)]
    assert all(hidden not in text for text in everything)
    assert card.as_text().count(told) >= 4


def test_line_ends_and_letters_of_all_languages_stay() -> None:
    assert visible("SELECT 1\n\t-- Zürich, 東京, שלום, é") == "SELECT 1\n\t-- Zürich, 東京, שלום, é"


@pytest.mark.parametrize("gap", [" " * 500, "\n" * 60, "\t" * 200, "\n \n" * 40])
def test_blanks_do_not_push_the_rest_out_of_sight(gap: str) -> None:
    shown = visible(f"SELECT 1{gap}; DROP TABLE x")

    assert len(shown) < 100
    assert "⟨" in shown
    assert shown.endswith("; DROP TABLE x")


def test_a_long_statement_shows_both_ends_how_much_is_missing_its_hash_and_where_the_whole_is() -> None:
    statement = "SELECT " + ", ".join(f"column_{n}" for n in range(1_000)) + " FROM secrets"
    one = approval(arguments_shown={"sql": statement})
    card = make_card([one], public_url="https://agents.example.com")
    text = card.as_text()

    assert "SELECT column_0" in text
    assert "FROM secrets" in text
    assert hashlib.sha256(statement.encode()).hexdigest() in text
    assert f"https://agents.example.com/approvals/{one.approval_id}" in text
    assert f"agent approvals show {one.approval_id}" in text
    assert card.needs_confirmation
    hidden = card.items[0].hidden_characters
    assert f"{hidden:,} characters are not shown" in text
    assert hidden > len(statement) - 3_000


def test_cutting_keeps_what_it_says() -> None:
    text = "\n".join(f"line {n}" for n in range(100))
    shown, hidden = cut(text, characters=10_000, lines=12)

    head, _, tail = shown.partition("\n⟨")
    assert text.startswith(head)
    assert text.endswith(tail.partition("⟩\n")[2])
    assert len(head) + len(tail.partition("⟩\n")[2]) + hidden == len(text)
    assert cut("short", characters=5, lines=1) == ("short", 0)


def test_the_strictest_risk_is_that_of_the_card() -> None:
    card = make_card([*numbered(2), approval(risk="DESTRUCTIVE")])

    assert card.risk is Risk.DESTRUCTIVE
    assert card.title == "DESTRUCTIVE: 3 actions"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"required_votes": 2, "votes": [{"voter": "ada", "verdict": "approve"}]}, "1 of 2 votes"),
        ({"state": "approved", "decided_by": ["ada", "eve"]}, "decided by ada, eve"),
        (
            {
                "state": "rejected",
                "votes": [{"voter": "ada", "verdict": "reject", "note": "no!"}],
            },
            "ada: “no!”",
        ),
        ({"state": "expired"}, "Expired"),
        ({"state": "cancelled"}, "Withdrawn"),
        ({"state": "executed", "log_id": 12}, "log entry 12"),
        ({"state": "unknown"}, "not known"),
        ({"replaces": "33333333-3333-4333-8333-333333333333", "edited_by": "ada"}, "were written by ada"),
    ],
)
def test_each_state_is_told(changes: dict[str, Any], told: str) -> None:
    assert told in make_card([approval(**changes)]).as_text()


def test_a_text_argument_is_told_from_a_number() -> None:
    text = make_card([approval(arguments_shown={"a": "3", "b": 3, "c": True, "d": "true"})]).as_text()

    assert 'a: "3"' in text
    assert "b: 3" in text
    assert "c: true" in text
    assert 'd: "true"' in text


def test_the_result_tells_rows_and_error() -> None:
    done = approval(state="executed", log_id=5)

    told = result_text(
        done, {"rows": {"shop.orders": {"updated": 3}}, "duration_ms": 12.4, "error": "a\u202eb"}
    )

    assert "shop.orders: 3 updated" in told
    assert "12 ms" in told
    assert "a\\u{202E}b" in told
    assert "log entry 5" in result_text(done, None)


def test_a_yes_that_nobody_took_up_is_not_told_as_too_few_votes() -> None:
    late = approval(state="expired", required_votes=1, decided_by=["ada"])

    assert "Approved, but not taken up in time" in result_text(late, None)
    assert "without enough votes" in result_text(approval(state="expired"), None)


# --- Slack ------------------------------------------------------------------------------------------------------


def buttons(built: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [one for block in built if block["type"] == "actions" for one in block["elements"]]


def test_slack_buttons_carry_ids_and_hashes_and_no_arguments() -> None:
    waiting = approval()
    built = blocks(make_card([waiting]), editable={waiting.approval_id})

    assert [button["text"]["text"] for button in buttons(built)] == ["Approve", "Reject", "Edit…"]
    for button in buttons(built):
        assert json.loads(button["value"]) == {
            "tenant": "default",
            "approvals": {waiting.approval_id: HASH[:16]},
        }


def test_slack_takes_no_markup_from_anybody() -> None:
    bad = "<!channel> <https://evil.example|click> *x* ```"
    card = make_card(
        [approval(tool=bad, arguments_shown={"sql": bad, "a": bad}, reason=bad, requested_by=bad)]
    )

    def kinds(built: Any) -> set[str]:
        if isinstance(built, dict):
            found = {built["type"]} if isinstance(built.get("type"), str) else set()
            return found.union(*(kinds(value) for value in built.values()))
        return set().union(*(kinds(one) for one in built)) if isinstance(built, list) else set()

    assert "mrkdwn" not in kinds(blocks(card))
    assert "link" not in kinds(blocks(card))
    assert "<" not in summary(card)
    assert escaped("<@U1> & co") == "&lt;@U1&gt; &amp; co"


@pytest.mark.parametrize("risk", ["WRITE", "DESTRUCTIVE"])
def test_slack_asks_again_before_data_is_destroyed(risk: str) -> None:
    approve, reject = buttons(blocks(make_card([approval(risk=risk)])))

    assert ("confirm" in approve) == (risk == "DESTRUCTIVE")
    assert "confirm" not in reject


def test_a_decided_card_has_no_buttons() -> None:
    for state in (
        "approved",
        "rejected",
        "expired",
        "cancelled",
        "executing",
        "executed",
        "failed",
        "unknown",
    ):
        card = make_card([approval(state=state)])
        assert buttons(blocks(card)) == []


def test_a_batch_has_buttons_for_each_and_for_all_that_wait() -> None:
    waiting = numbered(2)
    built = blocks(make_card([*waiting, approval(state="rejected")]), editable={waiting[0].approval_id})

    texts = [one["text"]["text"] for one in buttons(built)]
    assert texts == ["Approve", "Reject", "Edit…", "Approve", "Reject", "Approve all 2", "Reject all 2"]


def test_a_batch_that_a_message_cannot_show_is_not_approved_at_once() -> None:
    card = make_card(numbered(ITEMS_LIMIT + 3))

    texts = [one["text"]["text"] for one in buttons(blocks(card))]
    assert f"Approve all {ITEMS_LIMIT + 3}" not in texts
    assert f"Reject all {ITEMS_LIMIT + 3}" in texts
    assert "3 more" in " ".join(every_text(blocks(card)))


@pytest.mark.parametrize("count", [1, 3, ITEMS_LIMIT, 30])
def test_slacks_own_models_take_the_blocks(count: int) -> None:
    long = "SELECT '" + "x" * 20_000 + "'"
    many = {f"argument_{n}": "y" * 5_000 for n in range(12)}
    built = blocks(make_card(numbered(count, arguments_shown={"sql": long, **many}, tenant_id="t" * 400)))

    parsed = Block.parse_all(built)
    assert len(parsed) == len(built) <= 50
    for block in parsed:
        block.validate_json()
    assert sum(len(text) for text in every_text(built)) < 14_000


def test_the_form_holds_the_arguments_in_letters_that_can_be_seen() -> None:
    view = edit_view(approval(arguments={"sql": "SELECT '\u202e'"}), {"channel": "C1", "ts": "1.2"})

    written = view["blocks"][1]["element"]["initial_value"]
    assert json.loads(written) == {"sql": "SELECT '\u202e'"}
    assert "\u202e" not in written
    assert json.loads(view["private_metadata"])["hash"] == HASH[:16]
    assert view["callback_id"] == EDIT


# --- Telegram ---------------------------------------------------------------------------------------------------


def test_telegrams_entities_are_counted_as_telegram_counts() -> None:
    statement = "SELECT '😀😀'"
    text, entities, is_whole = message_text(
        make_card([approval(arguments_shown={"sql": statement}, reason="😀")])
    )

    units = text.encode("utf-16-le")
    parts = [units[e["offset"] * 2 : (e["offset"] + e["length"]) * 2].decode("utf-16-le") for e in entities]
    assert statement in parts
    assert parts[0].startswith("WRITE")
    assert is_whole


def test_a_card_that_does_not_fit_telegram_says_so() -> None:
    many = {f"argument_{n}": "y" * 300 for n in range(16)}
    text, _, is_whole = message_text(make_card(numbered(8, arguments_shown=many)))

    assert not is_whole
    assert "cannot show all" in text
    assert len(text.encode("utf-16-le")) // 2 <= 4_096
