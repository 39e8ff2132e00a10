"""What runs teach about tools, in a real database: counted once, warned of in time, kept apart, erased."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from agent import Identity
from agent.database.postgres import PostgresDatabase
from agent.learning.run_import import ImportReport, import_runs
from agent.learning.tool_experience import learn_tool_experience, list_tool_experience, warnings_for
from agent.learning.tool_experience_calls import read_calls
from agent.learning.tool_experience_warnings import evaluate_warnings
from agent.learning.transcripts import read_run
from agent.testing.throwaway import ThrowawayDatabase
from tests.integration.rows import rows, value

OPERATOR = Identity()
ADA = Identity(user_id="ada", session_id="s1")
NOT_FOUND = "order <argument> not found"


@pytest.fixture
async def database(learning_database: ThrowawayDatabase) -> AsyncIterator[PostgresDatabase]:
    database = PostgresDatabase(learning_database.url)
    yield database
    await database.close()


def a_run(
    run_id: str, *calls: tuple[str, dict[str, Any], str], status: str = "completed", **more: Any
) -> dict[str, Any]:
    """A run of these calls: tool, arguments, result."""
    messages: list[dict[str, Any]] = [{"message_id": "m0", "role": "user", "content": "Please."}]
    for number, (tool, arguments, result) in enumerate(calls):
        call = {"id": f"c{number}", "name": tool, "args": arguments}
        messages += [
            {"message_id": f"a{number}", "role": "assistant", "content": "", "tool_calls": [call]},
            {"message_id": f"t{number}", "role": "tool", "content": result, "tool_call_id": f"c{number}", "name": tool,
             "is_error": result.startswith("Error")},
        ]  # fmt: skip
    return {"run_id": run_id, "status": status, "messages": messages, **more}


def refund(order: str) -> tuple[str, dict[str, Any], str]:
    """A refund, which fails for orders whose number does not begin with a hash."""
    fails = not order.startswith("#")
    return "refund", {"order_id": order}, f"Error: order {order} not found" if fails else "done"


async def import_all(
    database: PostgresDatabase, *runs: dict[str, Any], identity: Identity = OPERATOR
) -> None:
    await database.call("import_runs", identity, runs=list(runs))


async def errors(database: PostgresDatabase, identity: Identity = OPERATOR) -> dict[tuple[str, str], int]:
    known = await list_tool_experience(database, identity)
    return {(error["tool"], error["template"]): error["failures"] for error in known["errors"]}


async def test_an_error_is_warned_of_before_a_call_like_those_that_failed(database: PostgresDatabase) -> None:
    for number in range(6):
        await import_all(database, a_run(f"r{number}", refund(f"#W{number}"), refund(f"W{number}")))

    learned = await learn_tool_experience(database, OPERATOR)
    warned = await warnings_for(database, OPERATOR, "refund", {"order_id": "W99"})

    assert learned == {"runs": 6, "calls": 12, "errors": 6, "tools": 1, "left": False}
    assert [(warning.template, warning.failures) for warning in warned] == [("order <id> not found", 6)]
    assert "order_id looks like W<n>" in warned[0].reasons
    assert await warnings_for(database, OPERATOR, "refund", {"order_id": "#W99"}) == []
    assert await warnings_for(database, OPERATOR, "other", {"order_id": "W99"}) == []


async def test_an_error_of_the_run_itself_is_warned_of_when_the_call_is_repeated(
    database: PostgresDatabase,
) -> None:
    earlier = a_run("r", refund("W1"))["messages"]

    warned = await warnings_for(database, OPERATOR, "refund", {"order_id": "W1"}, earlier=earlier)

    assert [(warning.template, warning.failures) for warning in warned] == [("order <id> not found", 0)]
    assert await warnings_for(database, OPERATOR, "refund", {"order_id": "W1"}) == []


async def test_learning_again_and_at_once_counts_each_run_once(database: PostgresDatabase) -> None:
    for number in range(12):
        await import_all(database, a_run(f"r{number}", refund(f"W{number}"), refund(f"#W{number}")))

    first = await asyncio.gather(*(learn_tool_experience(database, OPERATOR) for _ in range(3)))
    again = await learn_tool_experience(database, OPERATOR)

    assert sum(learned["runs"] for learned in first) == 12
    assert again == {"runs": 0, "calls": 0, "errors": 0, "tools": 0, "left": False}
    assert await errors(database) == {("refund", "order <id> not found"): 12}


async def test_a_learner_that_runs_out_of_time_goes_on_where_it_was(database: PostgresDatabase) -> None:
    await import_all(database, *(a_run(f"r{number}", refund(f"W{number}")) for number in range(5)))
    counted: list[int] = []

    cut = await learn_tool_experience(
        database, OPERATOR, deadline=lambda: len(counted) == 2, progress=counted.append
    )
    rest = await learn_tool_experience(database, OPERATOR)

    assert (cut["runs"], cut["left"]) == (2, True)
    assert (rest["runs"], rest["left"]) == (3, False)
    assert await errors(database) == {("refund", "order <id> not found"): 5}


async def test_a_run_that_is_delivered_again_is_counted_anew(database: PostgresDatabase) -> None:
    failed = a_run("r", refund("W1"), status="failed")
    await database.call("record_run", ADA, run=failed)
    await learn_tool_experience(database, OPERATOR)
    await database.call("record_run", ADA, run=a_run("r", refund("W1"), refund("W2")))

    learned = await learn_tool_experience(database, OPERATOR)

    assert learned["runs"] == 1
    assert await errors(database) == {("refund", "order <id> not found"): 2}


_LONG_AGO = (
    "UPDATE agent_run SET recorded_at = now() - interval '1 day' - interval '1 minute' * length(run_id)"
)


async def _to_learn(database: PostgresDatabase, **wanted: Any) -> list[str]:
    return [run["run_id"] for run in await database.call("tool_runs_to_learn", OPERATOR, **wanted)]


async def test_runs_that_were_counted_long_ago_are_not_looked_at_again(
    database: PostgresDatabase, learning_database: ThrowawayDatabase
) -> None:
    url = learning_database.url
    await import_all(database, a_run("counted", refund("W1")), a_run("too", refund("W2")))
    rows(url, _LONG_AGO)
    await learn_tool_experience(database, OPERATOR)
    assert value(url, "SELECT counted_until > now() - interval '10 minutes' FROM agent_tool_mark")
    rows(url, "DELETE FROM agent_tool_run")  # who looked at all runs would find these
    assert await _to_learn(database) == []

    await import_all(database, a_run("new", refund("W3")))
    assert await _to_learn(database) == ["new"]
    assert await _to_learn(database) == ["new"], "until it is counted"


async def test_the_mark_stays_before_the_first_run_that_is_not_counted(
    database: PostgresDatabase, learning_database: ThrowawayDatabase
) -> None:
    url = learning_database.url
    await import_all(database, *(a_run("r" * n, refund(f"W{n}")) for n in range(1, 6)))
    rows(url, _LONG_AGO)  # the longest name is the oldest
    assert await _to_learn(database, run_limit=2) == ["rrrrr", "rrrr"]
    assert (
        value(url, "SELECT run_id FROM agent_run, agent_tool_mark WHERE recorded_at = counted_until")
        == "rrrrr"
    )
    assert (await learn_tool_experience(database, OPERATOR))["runs"] == 5


@pytest.mark.parametrize("change", ["ended", "given"])
async def test_a_run_that_changes_long_after_it_was_passed_over_is_counted(
    database: PostgresDatabase, learning_database: ThrowawayDatabase, change: str
) -> None:
    url = learning_database.url
    if change == "ended":
        await database.call("record_run", ADA, run=a_run("r", refund("W1"), status="interrupted"))
    else:
        await import_all(database, a_run("r", refund("W1")))
    rows(url, _LONG_AGO)
    await learn_tool_experience(database, OPERATOR)
    assert await _to_learn(database) == []

    if change == "ended":
        await database.call("record_run", ADA, run=a_run("r", refund("W1"), refund("W2")))
    else:
        await import_all(database, a_run("r", refund("W1")), identity=Identity(user_id="bob"))

    assert await _to_learn(database) == ["r"]
    assert (await learn_tool_experience(database, OPERATOR))["runs"] == 1
    assert rows(url, "SELECT run_id FROM agent_tool_recount") == []
    assert await _to_learn(database) == []


async def test_what_is_learned_is_a_memory_of_the_tenant_that_changes_when_it_says_more(
    database: PostgresDatabase, learning_database: ThrowawayDatabase
) -> None:
    query = """
        SELECT version, content, trust, scope, kind FROM agent_memory
        WHERE store = 'learned_knowledge' AND superseded_at IS NULL
    """
    versions = []
    for number in range(6):
        await import_all(database, a_run(f"r{number}", refund(f"W{number}")))
        await learn_tool_experience(database, OPERATOR)
        ((version, content, *rest),) = rows(learning_database.url, query)
        versions.append(version)

    assert content.startswith("refund fails with 'order <id> not found'")
    assert rest == ["tool", "tenant", "tool_error"]
    assert versions[-1] < 6
    evidence = rows(
        learning_database.url, "SELECT DISTINCT run_id FROM agent_memory_evidence WHERE scope = 'tenant'"
    )
    assert {run_id for (run_id,) in evidence} <= {f"r{number}" for number in range(6)}
    assert evidence


async def test_tenants_do_not_learn_from_each_other(database: PostgresDatabase) -> None:
    other = Identity(tenant_id="other")
    await import_all(database, a_run("r1", refund("W1")))
    await import_all(database, a_run("r1", ("pay", {"amount": 1}, "Error: no money")), identity=other)

    await learn_tool_experience(database, OPERATOR)
    await learn_tool_experience(database, other)

    assert await errors(database) == {("refund", "order <id> not found"): 1}
    assert await errors(database, other) == {("pay", "no money"): 1}
    assert await warnings_for(database, other, "refund", {"order_id": "W1"}) == []


async def test_a_user_who_is_erased_leaves_nothing_in_what_was_learned(
    database: PostgresDatabase, learning_database: ThrowawayDatabase
) -> None:
    lost = ("find", {"name": "Adalbert"}, "Error: nobody is called Adalbert here, says Zacharias")
    await database.call("record_run", ADA, run=a_run("hers", refund("W1"), lost))
    await database.call(
        "record_run", Identity(user_id="bob", session_id="s2"), run=a_run("his", refund("W2"))
    )
    await learn_tool_experience(database, OPERATOR)
    assert len(await errors(database)) == 2

    counts = await database.call("erase_user", ADA)

    assert counts["agent_tool_call"] == 2
    assert await errors(database) == {("refund", "order <id> not found"): 1}
    for table in ("agent_tool_run", "agent_tool_call", "agent_tool_error", "agent_tool_condition", "agent_memory",
                  "agent_memory_evidence"):  # fmt: skip
        found = str(rows(learning_database.url, f"SELECT t::text FROM {table} AS t"))
        assert "Zacharias" not in found, table
        assert "hers" not in found, table
    assert (await learn_tool_experience(database, OPERATOR))["runs"] == 0


async def test_values_of_one_person_are_not_stored_and_those_of_two_may_be(
    database: PostgresDatabase, learning_database: ThrowawayDatabase
) -> None:
    def a_search(run_id: str, **arguments: Any) -> dict[str, Any]:
        return a_run(run_id, ("find", arguments, "Error: nothing found"))

    await import_all(database, a_search("r1", city="Gotham", mail="a@example.com"), identity=ADA)
    await import_all(
        database,
        a_search("r2", city="Arkham", mail="a@example.com"),
        identity=Identity(user_id="bob", session_id="s2"),
    )
    await import_all(
        database, a_search("r3", city="Gotham"), identity=Identity(user_id="bob", session_id="s3")
    )
    await learn_tool_experience(database, OPERATOR)

    stored = "".join(
        str(rows(learning_database.url, f"SELECT t::text FROM {table} AS t"))
        for table in ("agent_tool_call", "agent_tool_condition", "agent_tool_error", "agent_tool_weight")
    )
    assert "Gotham" in stored
    assert "Arkham" not in stored
    assert "example.com" not in stored


async def test_garbage_is_counted_and_stays_bounded(database: PostgresDatabase) -> None:
    for run in range(11):
        calls = [
            ("noisy", {"n": number}, f"Error: {_word(run * 110 + number)} is wrong") for number in range(110)
        ]
        await import_all(database, a_run(f"r{run}", *calls))
    await import_all(
        database,
        a_run("long", ("big", {"text": "x" * 1_000_000}, "Error: " + "y" * 1_000_000)),
        a_run("text", ("odd", "not an object", "Error: cannot read")),  # type: ignore[arg-type]
        a_run("nul", ("nul", {"text": "a\0b"}, "Error: \0")),
        a_run("none", ("none", None, "Error")),  # type: ignore[arg-type]
    )

    learned = await learn_tool_experience(database, OPERATOR)

    assert learned["errors"] == 11 * 110 + 4
    known = await errors(database)
    assert len(known) == 1000
    assert max(len(template) for _, template in known) <= 300


def _word(number: int) -> str:
    return "w" + "".join(chr(ord("a") + int(digit)) for digit in str(number))


async def test_sequences_and_slow_tools_are_listed_with_their_counts(
    database: PostgresDatabase, learning_database: ThrowawayDatabase
) -> None:
    steps: tuple[tuple[str, dict[str, Any], str], ...] = (
        ("find", {}, "x"),
        ("check", {}, "x"),
        ("pay", {}, "x"),
    )
    for number in range(4):
        outcome = {"kind": "reward", "score": 1.0, "succeeded": True, "details": {}}
        await import_all(database, a_run(f"good{number}", *steps, outcomes=[outcome]))
        await import_all(
            database,
            a_run(
                f"bad{number}", steps[0], steps[2], outcomes=[outcome | {"score": 0.0, "succeeded": False}]
            ),
        )
    for number in range(60):
        entry = {
            "tool": "report",
            "state": "executed",
            "decision": "allowed",
            "risk": "READ",
            "duration_ms": 10 if number < 40 else 50,
        }
        await database.call("record_execution", ADA, entry=entry)
    await learn_tool_experience(database, OPERATOR)

    known = await list_tool_experience(database, OPERATOR)

    found = {tuple(sequence["tools"]): sequence for sequence in known["sequences"]}
    assert found["find", "check", "pay"] == {
        "tools": ["find", "check", "pay"],
        "runs": 4,
        "succeeded": 4,
        "lift": 2.0,
    }
    assert found["find", "pay"]["lift"] == 0
    assert [(slow["tool"], slow["median_ms"], slow["latest_median_ms"]) for slow in known["slow"]] == [
        ("report", 10, 50)
    ]


async def test_the_airline_log_is_learned_as_counted_by_hand(
    database: PostgresDatabase, learning_database: ThrowawayDatabase
) -> None:
    folder = Path(os.environ.get("LEARNING_DATA") or Path(__file__).parents[3] / "shared" / "data")
    log = folder / "trajectories" / "tau_airline_dev.jsonl"
    if not log.exists():
        pytest.skip(
            f"the airline runs are not in {folder}; set LEARNING_DATA to the folder that has trajectories/"
        )

    def store(runs: list[dict[str, Any]]) -> dict[str, int]:
        return asyncio.run(_import(learning_database.url, runs))

    with log.open("rb") as lines:
        await asyncio.to_thread(import_runs, lines, store, ImportReport())
    learned = await learn_tool_experience(database, OPERATOR)
    known = await list_tool_experience(database, OPERATOR)

    assert (learned["runs"], learned["calls"], learned["errors"]) == (100, 621, 63)
    assert await errors(database) == BY_HAND
    warnings = known["warnings"]
    assert warnings["repeats_warned"] / warnings["repeats"] >= 0.95
    assert warnings["clean_warned"] / warnings["clean"] < 0.05
    texts = (await asyncio.to_thread(log.read_text)).splitlines()
    in_memory = evaluate_warnings(list(read_calls(read_run(text)["messages"])) for text in texts)
    assert warnings == vars(in_memory)
    assert value(learning_database.url, "SELECT count(*) FROM agent_memory WHERE kind = 'tool_error'") == 9
    json.dumps(known)


async def _import(url: str, runs: list[dict[str, Any]]) -> dict[str, int]:
    database = PostgresDatabase(url, connections_max=1)
    try:
        counts: dict[str, int] = await database.call("import_runs", OPERATOR, runs=runs)
    finally:
        await database.close()
    return counts


# Read off the 63 results that begin with "Error:", one after the other.
BY_HAND = {
    ("book_reservation", "payment amount does not add up, total price is <number>, but paid <number>"): 19,
    ("book_reservation", "payment method <id> not found"): 3,
    ("book_reservation", "not enough balance in payment method <id>"): 1,
    ("update_reservation_flights", "flight <id> not available on date <date>"): 14,
    ("update_reservation_flights", "gift card balance is not enough"): 11,
    ("update_reservation_flights", "not enough seats on flight <id>"): 8,
    ("update_reservation_flights", "certificate cannot be used to update reservation"): 4,
    ("update_reservation_flights", "payment method not found"): 2,
    ("update_reservation_baggages", "gift card balance is not enough"): 1,
}
