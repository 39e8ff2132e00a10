"""What a sample tells of a table: shares, ranges, statuses, growth, changes; of personal data its shape."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.discovery.pattern_text import describe_column, describe_table, patterns_worth_knowing
from agent.discovery.recent_changes import recent_changes
from agent.discovery.sampling import Sample, SampleError, plan_sample, reason_of
from agent.discovery.statuses import OTHER
from agent.discovery.table_patterns import (
    Neighbours,
    TableKnowledge,
    growth_per_day,
    table_pattern,
    told_of_parent,
)

NOW = datetime(2026, 5, 1, 12, tzinfo=UTC)
SECRET = "known to servers"


def table(name: str = "orders", /, **columns: str | list[str]) -> dict[str, Any]:
    """A structure document: by name the type of a column, or the labels of an enum. The first is the primary key."""
    return {
        "schema": "public",
        "name": name,
        "kind": "table",
        "columns": [
            {
                "name": column,
                "type": kind if isinstance(kind, str) else "public.label",
                "enum": None if isinstance(kind, str) else kind,
                "readable": True,
            }
            for column, kind in columns.items()
        ],
        "primary_key": [next(iter(columns))],
        "unique": [],
        "foreign_keys": [],
        "indexes": [],
        "partitions": 0,
        "readable": True,
        "row_estimate": None,
    }


def learned(
    document: dict[str, Any],
    rows: Sequence[Sequence[str | None]],
    before: TableKnowledge | None = None,
    *,
    is_whole: bool = True,
    now: datetime = NOW,
    **more: Any,
) -> TableKnowledge:
    sample = Sample(
        columns=tuple(column["name"] for column in document["columns"]),
        rows=[list(row) for row in rows],
        is_whole=is_whole,
    )
    return table_pattern(document, sample, now, before or TableKnowledge(), secret=SECRET, **more)


def column_of(
    values: Sequence[str | None], kind: str | list[str] = "text", name: str = "thing", **more: Any
) -> Any:
    """The pattern of one column beside a key."""
    known = learned(
        table("orders", **{"id": "bigint", name: kind}),
        [(str(i), value) for i, value in enumerate(values)],
        **more,
    )
    return known.pattern["columns"][name]


# Columns


def test_shares_and_values_of_a_column_with_few() -> None:
    column = column_of(["open"] * 6 + ["paid"] * 3 + [None])

    assert (column["nulls"], column["distinct"], column["distinct_is_exact"]) == (0.1, 2, True)
    assert column["top"] == [["open", 0.6667], ["paid", 0.3333]]


def test_a_value_that_occurs_once_or_twice_is_not_shown() -> None:
    assert column_of(["open"] * 20 + ["odd"] * 2)["top"] == [["open", 0.9091]]


def test_labels_of_an_enum_and_flags_are_always_shown() -> None:
    assert column_of(["a"] * 9 + ["b"], ["a", "b"])["top"] == [["a", 0.9], ["b", 0.1]]
    assert column_of(["true"] * 3 + ["false"], "boolean")["top"] == [["true", 0.75], ["false", 0.25]]


def test_text_that_somebody_wrote_is_never_shown() -> None:
    said = "The customer called and asked for a refund of the order"

    assert column_of([said] * 50)["top"] == []
    assert column_of(["yes"] * 50 + [said * 2] * 5)["top"] == []


@pytest.mark.parametrize("name", ["notes", "customer_comment", "cancelReason", "bemerkung"])
def test_what_repeats_in_a_column_for_free_text_is_no_label(name: str) -> None:
    assert column_of(["diabetic"] * 50, name=name)["top"] == []


def test_ranges_of_numbers_and_times() -> None:
    assert column_of(["3", "10", "-2"], "integer")["minimum"] == -2
    assert column_of(["3.50", "10.25"], "numeric(10,2)")["maximum"] == 10.25
    column = column_of(["2020-01-01", "2021-06-30", "infinity"], "date")
    assert (column["minimum"], column["maximum"]) == ("2020-01-01", "2021-06-30")


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "$1,000.00"])
def test_numbers_that_json_has_not_are_passed_over(value: str) -> None:
    column = column_of([value, "1", "2"], "numeric")

    assert (column["minimum"], column["maximum"]) == (1, 2)
    json.dumps(column, allow_nan=False)


def test_large_numbers_that_hardly_repeat_have_no_range() -> None:
    assert column_of([str(4_912_345_678 + i * 7919) for i in range(50)], "bigint")["minimum"] is None


def test_a_time_moves_where_it_is_near_now_or_further_than_last_time() -> None:
    def times(*days: int) -> list[str]:
        return [str(NOW - timedelta(days=day)) for day in days]

    assert column_of(times(1, 30), "timestamp with time zone")["moves"]
    assert not column_of(times(20, 30), "timestamp with time zone")["moves"]
    assert not column_of(times(-300, 30), "timestamp with time zone")["moves"]
    document = table(id="bigint", due="date")
    first = learned(document, [("1", "2030-01-01")])
    assert learned(document, [("1", "2030-01-02")], first).pattern["columns"]["due"]["moves"]
    assert not learned(document, [("1", "2030-01-01")], first).pattern["columns"]["due"]["moves"]


def test_distinct_values_are_counted_in_a_whole_table_and_estimated_else() -> None:
    values = [str(i % 7) for i in range(70)]
    assert (column_of(values)["distinct"], column_of(values)["distinct_is_exact"]) == (7, True)

    document = table(id="bigint", thing="text") | {"row_estimate": 10_000}
    rows = [(str(i), value) for i, value in enumerate(values)]
    for estimate, expected in ((25.0, 25), (-0.5, 5000), (3.0, 7)):
        known = learned(document, rows, is_whole=False, distinct={"thing": estimate}).pattern["columns"]
        assert (known["thing"]["distinct"], known["thing"]["distinct_is_exact"]) == (expected, False)
    assert learned(document, rows, is_whole=False).pattern["columns"]["id"]["distinct"] == 10_000


def test_an_empty_table_has_a_pattern() -> None:
    known = learned(table(id="bigint", status="text"), [])

    assert known.pattern["row_estimate"] == 0
    assert known.pattern["columns"]["status"]["nulls"] is None
    assert describe_table(known.pattern) == "public.orders: about 0 rows"


@pytest.mark.parametrize(
    ("name", "kind", "value"),
    [
        ("email", "text", "zq7secret@example.com"),
        ("phone", "text", "+49 30 7771234"),
        ("first_name", "text", "Zqseven"),
        ("password", "text", "zq7secret"),
        ("card_number", "text", "4111111111111111"),
        ("date_of_birth", "date", "1977-07-07"),
        ("ssn", "bigint", "777001234"),
        ("last_ip", "inet", "10.77.7.7"),
        ("anything", "inet", "10.77.7.7"),
        ("anything", "text", "zq7secret@example.com"),
        ("anything", "text", "sk-live_zq7secret1234567"),
        ("gender", ["zq7m", "zq7f"], "zq7m"),
        ("salary", "numeric", "77701"),
    ],
)
@pytest.mark.parametrize("times", [1, 50])
def test_of_personal_data_the_shape_alone_is_kept(
    name: str, kind: str | list[str], value: str, times: int
) -> None:
    document = table("orders", **{"id": "bigint", "status": "text", name: kind})
    rows = [(str(i), "open", value) for i in range(times)]
    known = learned(document, rows)
    again = learned(document, [(str(i), "paid", value) for i in range(times)], known)

    column = known.pattern["columns"][name]
    assert column["personal"] is not None
    assert (column["top"], column["minimum"], column["maximum"], column["moves"]) == ([], None, None, False)
    assert column["nulls"] == 0.0
    for stored in (known, again):
        assert value not in json.dumps([stored.pattern, stored.seen, stored.estimates])


@given(
    st.lists(st.tuples(st.text(max_size=30), st.text(max_size=30) | st.none()), max_size=30),
    st.sampled_from(
        ["text", "numeric", "date", "timestamp with time zone", "public.odd", "integer[]", "jsonb"]
    ),
)
def test_any_rows_have_a_pattern_of_plain_json_that_shows_no_rare_value(
    rows: list[tuple[str, str | None]], kind: str
) -> None:
    known = learned(table(id="text", thing=kind), rows)

    json.dumps([known.pattern, known.seen], allow_nan=False)
    counts = Counter(value for _, value in rows)
    assert all(counts[value] >= 3 for value, _ in known.pattern["columns"]["thing"]["top"])
    assert known.pattern["columns"]["id"]["top"] == []


# Statuses


def orders(*statuses: str) -> list[tuple[str, str]]:
    return [(str(number), status) for number, status in enumerate(statuses)]


ORDERS = table(id="bigint", status="text")


def test_rows_that_are_met_again_tell_transitions() -> None:
    first = learned(ORDERS, orders(*["open"] * 5, *["paid"] * 5))
    second = learned(ORDERS, orders(*["open"] * 3, *["paid"] * 7), first)
    third = learned(ORDERS, orders(*["paid"] * 10), second)

    (status,) = first.pattern["status_columns"]
    assert (status["values"], status["transitions"]) == ({"open": 0.5, "paid": 0.5}, [])
    (status,) = third.pattern["status_columns"]
    assert status["transitions"] == [{"from": "open", "to": "paid", "count": 5, "source": "rows"}]


def test_rows_are_known_by_a_keyed_hash() -> None:
    known = learned(ORDERS, [("4711", "open")] * 5)
    other_key = table_pattern(
        ORDERS,
        Sample(columns=("id", "status"), rows=[["4711", "open"]] * 5, is_whole=True),
        NOW,
        TableKnowledge(),
        secret="another",
    )

    assert "4711" not in json.dumps(known.seen)
    assert set(known.seen["status"]).isdisjoint(other_key.seen["status"])


def test_a_status_that_is_not_shown_has_no_name_in_transitions() -> None:
    first = learned(ORDERS, orders(*["open"] * 5, "zq7secret"))
    second = learned(ORDERS, orders(*["open"] * 4, "zq7secret", "open"), first)

    assert "zq7secret" not in json.dumps([first.pattern, first.seen, second.pattern, second.seen])
    (status,) = second.pattern["status_columns"]
    assert {(step["from"], step["to"]) for step in status["transitions"]} == {
        ("open", OTHER),
        (OTHER, "open"),
    }


def test_a_table_of_history_tells_transitions() -> None:
    history = table("order_history", id="bigint", order_id="bigint", old_status="text", new_status="text")
    rows = [(str(i), str(i), "open", "paid") for i in range(4)] + [
        (str(i), str(i), "paid", "void") for i in range(4, 7)
    ]

    known = learned(history, rows)

    for status in known.pattern["status_columns"]:
        assert [(step["from"], step["to"], step["count"]) for step in status["transitions"]] == [
            ("open", "paid", 4),
            ("paid", "void", 3),
        ]
    again = learned(history, rows, known)
    assert again.pattern["status_columns"] == known.pattern["status_columns"], "read anew and not added up"


def test_a_history_of_single_statuses_tells_transitions_in_the_order_of_time() -> None:
    log = table("order_events", id="bigint", order_id="bigint", status="text", at="timestamp with time zone")
    rows = [
        (str(10 * order + step), str(order), status, f"2026-01-01 10:{step:02}:00+00")
        for order in range(5)
        for step, status in enumerate(("new", "paid", "shipped"))
    ]

    known = learned(log, list(reversed(rows)), neighbours=Neighbours(parent_column="order_id"))

    (status,) = known.pattern["status_columns"]
    assert {(step["from"], step["to"], step["count"]) for step in status["transitions"]} == {
        ("new", "paid", 5),
        ("paid", "shipped", 5),
    }


def test_an_audit_of_all_fields_tells_of_statuses_alone() -> None:
    audit = table("audit_log", id="bigint", field_name="text", old_value="text", new_value="text")
    rows = [(str(i), "status", "open", "paid") for i in range(4)]
    rows += [(str(i), "note", "zq7secret", "zq8secret") for i in range(4, 12)]
    sample = Sample(columns=("id", "field_name", "old_value", "new_value"), rows=[list(row) for row in rows])

    known = learned(audit, rows)

    assert "zq" not in json.dumps(known.pattern)
    assert told_of_parent(audit, sample, None, known.pattern["columns"]) == {("open", "paid"): 4}


def test_the_state_of_an_address_is_no_status() -> None:
    document = table("shops", id="bigint", city="text", state="text")

    assert learned(document, [(str(i), "Austin", "TX") for i in range(9)]).pattern["status_columns"] == []


# Growth and changes


def test_growth_is_of_the_estimates_over_time() -> None:
    def at(hours: float, rows: int) -> list[Any]:
        return [(NOW + timedelta(hours=hours)).isoformat(), rows]

    assert growth_per_day([]) is None
    assert growth_per_day([at(0, 5)]) is None
    assert growth_per_day([at(0, 100), at(12, 150)]) == 100.0
    assert growth_per_day([at(0, 100), at(24, 90)]) == -10.0


def changes_of(before: TableKnowledge, after: TableKnowledge) -> list[str]:
    return [change["kind"] for change in recent_changes(before.pattern, after.pattern, after.estimates)]


def test_what_did_not_move_is_no_change() -> None:
    first = learned(ORDERS, orders(*["open"] * 50, *["paid"] * 50))

    assert recent_changes({}, first.pattern, first.estimates) == []
    assert changes_of(first, learned(ORDERS, orders(*["open"] * 49, *["paid"] * 51), first)) == []


def test_a_new_status_and_a_new_transition_are_changes() -> None:
    first = learned(ORDERS, orders(*["open"] * 50, *["paid"] * 50))
    second = learned(ORDERS, orders(*["open"] * 45, *["paid"] * 55), first)
    third = learned(ORDERS, orders(*["open"] * 45, *["paid"] * 50, *["void"] * 5), second)

    told = recent_changes(second.pattern, third.pattern, third.estimates)
    assert [change["kind"] for change in told] == ["status_new", "transition_new"]
    assert told[0]["what"] == "public.orders.status has a new status void (5.0% of rows)"
    assert (told[1]["after"], told[1]["column"]) == (["paid", "void"], "status")


def test_a_jump_of_empty_values_is_a_change_where_chance_does_not_explain_it() -> None:
    document = table(id="bigint", thing="text")

    def with_empty(empty: int, of: int) -> list[tuple[str, str | None]]:
        return [(str(i), None if i < empty else f"value {i}") for i in range(of)]

    assert changes_of(learned(document, with_empty(5, 100)), learned(document, with_empty(60, 100))) == [
        "nulls"
    ]
    assert changes_of(learned(document, with_empty(1, 10)), learned(document, with_empty(3, 10))) == []


def test_a_new_format_and_a_time_that_stopped_are_changes() -> None:
    document = table(id="bigint", code="text", seen_at="timestamp with time zone")
    first = learned(document, [("1", "EUR", str(NOW))])
    second = learned(document, [("1", "https://x.org", str(NOW))], first, now=NOW + timedelta(days=9))

    assert sorted(changes_of(first, second)) == ["format", "stopped"]


def test_a_jump_of_growth_is_a_change_and_the_usual_is_none() -> None:
    document = table(id="bigint") | {"row_estimate": 0}
    known = TableKnowledge()
    kinds = []
    for hours, rows in enumerate((100_000, 100_100, 100_200, 100_300, 110_000, 20_000)):
        document["row_estimate"] = rows
        after = learned(document, [("1",)], known, is_whole=False, now=NOW + timedelta(hours=hours))
        kinds.append(changes_of(known, after))
        known = after

    assert kinds == [[], [], [], [], ["growth"], ["shrunk"]]


# Words


def test_a_column_is_described_in_short_words() -> None:
    first = learned(ORDERS, orders(*["open"] * 62, *["paid"] * 36, *["void"] * 2, *["void"] * 1))
    second = learned(ORDERS, orders(*["open"] * 60, *["paid"] * 38, *["void"] * 3), first)

    assert describe_column(second.pattern, "status") == "status: open 59 %, paid 38 %, void 3 %; open→paid"
    assert describe_column(second.pattern, "missing") == ""
    assert patterns_worth_knowing(second.pattern) == (
        "Table public.orders: status is open (about 60 %), paid (about 40 %), void (few); rows go open→paid."
    )


def test_the_range_of_a_sample_is_told_as_about() -> None:
    rows = [(str(number), str(number * 3)) for number in range(1, 40)]
    known = learned(table("things", id="bigint", amount="integer"), rows).pattern

    assert describe_column(known | {"is_whole": True}, "amount") == "amount: 3 to 117"
    assert describe_column(known | {"is_whole": False}, "amount") == "amount: about 3 to 117"


def test_a_personal_column_is_described_by_its_class() -> None:
    known = learned(table("people", id="bigint", email="text"), [("1", "ada@example.com"), ("2", None)])

    assert describe_column(known.pattern, "email") == "email: personal (email); 50 % empty"
    assert patterns_worth_knowing(known.pattern) == ""


# Plans


def test_a_small_table_is_read_from_its_beginning_and_a_large_one_by_blocks() -> None:
    plan = plan_sample(ORDERS | {"row_estimate": 500})
    assert (plan.percent, plan.rows, plan.newest_by) == (None, 1000, None)
    plan = plan_sample(ORDERS | {"row_estimate": 8_000_000})
    assert (plan.percent, plan.spread, plan.key) == (0.1, 8, "id")
    plan = plan_sample(ORDERS | {"row_estimate": 2500})
    assert (plan.percent, plan.spread) == (80.0, 2)


def test_the_newest_rows_come_by_an_index_on_a_time() -> None:
    document = table(id="bigint", made="timestamp with time zone", updated_at="timestamp with time zone")
    document |= {"row_estimate": 10_000}
    index = {"definition": "CREATE INDEX i ON public.orders USING btree (updated_at DESC, id)"}
    partial = {"definition": "CREATE INDEX i ON public.orders USING btree (made) WHERE (id > 3)"}

    assert plan_sample(document).newest_by is None
    assert plan_sample(document | {"indexes": [partial]}).newest_by is None
    plan = plan_sample(document | {"indexes": [index, partial]})
    assert (plan.newest_by, plan.rows, plan.newest_rows) == ("updated_at", 500, 500)


def test_a_wide_table_gives_fewer_rows_and_documents_are_not_read() -> None:
    wide = table(id="bigint", **{f"c{i}": "text" for i in range(999)})
    assert plan_sample(wide).rows == 100
    plan = plan_sample(table(id="bigint", a="jsonb", b="bytea", c="text[]", d="public.odd", e="text"))
    assert plan.how_read == ("text", "null", "null", "null", "small", "text")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"kind": "view"}, "a view is not sampled"),
        ({"kind": "foreign_table"}, "a foreign table is not sampled"),
        ({"readable": False}, "this login may not read it"),
        ({"partitions": 1_000_000}, "its 1000000 partitions are too many to be opened for a sample"),
        ({"columns": []}, "it has no column that this login may read"),
    ],
)
def test_what_is_not_sampled_says_why(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(SampleError) as caught:
        plan_sample(ORDERS | change)
    assert caught.value.reason == reason


def test_reasons_hold_nothing_of_the_rows() -> None:
    assert (
        reason_of("22P02", "InvalidTextRepresentation")
        == "reading it failed (22P02, InvalidTextRepresentation)"
    )
    assert reason_of("57014", "QueryCanceled") == "it took longer than discovery may take"
