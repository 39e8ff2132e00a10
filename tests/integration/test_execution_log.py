"""The log of what agents did: only added to, chained, and found out where somebody tampered with it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import psycopg
import pytest

from agent.database.postgres import PostgresDatabase
from agent.errors import ConflictError, InvalidLearning
from agent.testing.throwaway import ThrowawayDatabase
from tests.integration.approvals import ADA, OTHER_HASH, a_decision, an_entry, asked, claimed, decided
from tests.integration.rows import everything_stored, rows, value

TAMPERED_WITH = "SET session_replication_role = replica; ALTER TABLE {table} DISABLE TRIGGER ALL; {change}"


@pytest.fixture
async def database(learning_database: ThrowawayDatabase) -> AsyncIterator[PostgresDatabase]:
    """The transport to `learning_database`, as a server."""
    database = PostgresDatabase(learning_database.url, connections_max=20)
    yield database
    await database.close()


async def record(database: PostgresDatabase, **more: Any) -> int:
    return int((await database.call("record_execution", ADA, entry=an_entry(**more)))["log_id"])


async def verified(database: PostgresDatabase) -> dict[str, Any]:
    found: dict[str, Any] = await database.call("verify_executions", ADA)
    return found


async def test_a_row_tells_who_did_what_and_what_became_of_it(database: PostgresDatabase) -> None:
    log_id = await record(
        database, arguments_run={"table": "t", "limit": 5}, error="cut off", pre_image={"t": []}
    )

    found = await database.call("get_execution", ADA, the_log_id=log_id)
    assert (found["user_id"], found["agent_id"], found["session_id"], found["run_id"]) == (
        "ada",
        "shop",
        "s1",
        "r1",
    )
    assert (found["tool"], found["risk"], found["decision"], found["state"]) == (
        "query_data",
        "READ",
        "allowed",
        "executed",
    )
    assert (found["row_count"], found["result_bytes"], found["duration_ms"]) == (3, 40, 1.25)
    assert found["arguments_run"] == {"table": "t", "limit": 5}
    assert (found["error"], found["pre_image"], found["erased"], found["undone_by"]) == (
        "cut off",
        {"t": []},
        False,
        None,
    )
    [listed] = await database.call("list_executions", ADA)
    assert listed["log_id"] == log_id
    assert "pre_image" not in listed
    assert "arguments_run" not in listed


async def test_the_log_is_read_newest_first_by_what_is_wanted(database: PostgresDatabase) -> None:
    for tool in ("a", "b", "a"):
        await record(database, tool=tool)
    await record(database, tool="c", state="refused", decision="refused", risk="FORBIDDEN")

    async def ids(**wanted: Any) -> list[int]:
        return [each["log_id"] for each in await database.call("list_executions", ADA, wanted=wanted)]

    assert await ids() == [4, 3, 2, 1]
    assert await ids(limit=2) == [4, 3]
    assert await ids(tool="a") == [3, 1]
    assert await ids(state="refused") == [4]
    assert await ids(user_id="bob") == []
    assert await ids(since="2999-01-01T00:00:00Z") == []


@pytest.mark.parametrize(
    "odd",
    [
        {"tool": None},
        {"risk": "MILD"},
        {"decision": "perhaps"},
        {"state": "pending"},
        {"rows": [1]},
        {"decision": "approved"},
    ],
)
async def test_what_cannot_be_is_not_logged(database: PostgresDatabase, odd: dict[str, Any]) -> None:
    with pytest.raises(InvalidLearning):
        await record(database, **odd)
    assert (await verified(database))["rows"] == 0


@pytest.mark.parametrize("table", ["agent_execution_log", "approval_event"])
@pytest.mark.parametrize(
    "change", ["UPDATE {} SET tenant_id = tenant_id", "DELETE FROM {}", "TRUNCATE {} CASCADE"]
)
async def test_nobody_changes_a_row_not_even_a_superuser(
    database: PostgresDatabase, learning_database: ThrowawayDatabase, table: str, change: str
) -> None:
    await record(database)
    await asked(database)
    for role in ("agent_app", None):
        with psycopg.connect(learning_database.url) as connection:
            if role is not None:
                connection.execute(f"SET ROLE {role}".encode())
                connection.execute(
                    "SELECT set_config('agent.tenant_id', 'default', true), set_config('agent.reach', 'tenant', true)"
                )
            else:
                connection.execute("SET session_replication_role = replica")
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                connection.execute(change.format(table).encode())


async def test_many_at_once_make_one_chain(database: PostgresDatabase) -> None:
    async def whole(number: int) -> None:
        _, ticket = await claimed(database)
        await database.call("finish_execution", ADA, ticket=ticket, entry=an_entry())
        approval = await asked(database)
        await decided(database, a_decision(approval))
        await record(database, tool=f"t{number}")

    await asyncio.gather(*[whole(number) for number in range(15)])

    found = await verified(database)
    assert (found["rows"], found["intact"], found["first_broken"]) == (30, True, None)
    listed = await database.call("list_executions", ADA)
    assert [each["log_id"] for each in listed] == list(range(30, 0, -1))


async def test_each_tenant_has_a_chain_of_its_own(database: PostgresDatabase) -> None:
    await record(database)
    other = ADA.with_(tenant_id="t2")
    assert (await database.call("record_execution", other, entry=an_entry()))["log_id"] == 1
    assert (await database.call("verify_executions", other))["rows"] == 1


@pytest.mark.parametrize(
    ("table", "change", "first_broken"),
    [
        ("agent_execution_log", "UPDATE agent_execution_log SET risk = 'READ' WHERE log_id = 2", 2),
        ("agent_execution_log", "UPDATE agent_execution_log SET user_id = 'eve' WHERE log_id = 3", 3),
        (
            "agent_execution_log",
            "UPDATE agent_execution_log SET at = at - interval '1 ms' WHERE log_id = 2",
            2,
        ),
        (
            "agent_execution_log",
            "UPDATE agent_execution_log SET row_hash = repeat('0', 64) WHERE log_id = 3",
            3,
        ),
        ("agent_execution_log", "DELETE FROM agent_execution_log WHERE log_id = 2", 2),
        ("agent_execution_log", "DELETE FROM agent_execution_log WHERE log_id = 4", 4),
        ("agent_execution_log", "DELETE FROM agent_execution_log", 1),
        (
            "agent_execution_log",
            """
            UPDATE agent_execution_log SET log_id = 9 WHERE log_id = 2;
            UPDATE agent_execution_log SET log_id = 2 WHERE log_id = 3;
            UPDATE agent_execution_log SET log_id = 3 WHERE log_id = 9
            """,
            2,
        ),
        (
            "agent_execution_details",
            "UPDATE agent_execution_details SET arguments_run = '{}' WHERE log_id = 2",
            2,
        ),
        ("agent_execution_details", "UPDATE agent_execution_details SET error = NULL WHERE log_id = 3", 3),
        ("agent_execution_details", "DELETE FROM agent_execution_details WHERE log_id = 2", 2),
        ("agent_chain", "DELETE FROM agent_chain WHERE chain = 'agent_execution_log'", 5),
    ],
)
async def test_who_tampers_with_all_rights_is_found_out(
    database: PostgresDatabase,
    learning_database: ThrowawayDatabase,
    table: str,
    change: str,
    first_broken: int,
) -> None:
    for number in range(4):
        await record(database, risk="WRITE", error=f"e{number}")
    assert (await verified(database))["intact"]

    rows(learning_database.url, TAMPERED_WITH.format(table=table, change=change))

    found = await verified(database)
    assert (found["intact"], found["first_broken"]) == (False, first_broken)


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE human_approval_queue SET decided_by = '{eve}' WHERE state = 'approved'",
        "UPDATE human_approval_queue SET requested_by = 'eve' WHERE state = 'approved'",
        "UPDATE human_approval_queue SET arguments = '{\"sql\": \"SELECT 1\"}' WHERE state = 'approved'",
        "UPDATE human_approval_queue SET arguments_shown = '{}' WHERE state = 'approved'",
        "UPDATE human_approval_queue SET arguments = '{}', arguments_shown = NULL WHERE state = 'approved'",
        "UPDATE human_approval_queue SET required_votes = 1, approvers = '{eve}' WHERE state = 'approved'",
        "UPDATE approval_vote SET voter = 'max' WHERE voter = 'eve'",
        "UPDATE approval_vote SET verdict = 'reject' WHERE voter = 'eve'",
        "DELETE FROM approval_vote WHERE voter = 'eve'",
        "DELETE FROM approval_vote; DELETE FROM human_approval_queue WHERE state = 'approved'",
    ],
)
async def test_rows_that_say_something_else_than_the_history_are_found_out(
    database: PostgresDatabase, learning_database: ThrowawayDatabase, change: str
) -> None:
    await asked(database)
    approval = await asked(database, required_votes=2)
    await decided(database, a_decision(approval))
    await decided(database, a_decision(approval, "eve"))
    assert (await verified(database))["approvals"] == {"rows": 5, "first_broken": None}

    rows(
        learning_database.url,
        TAMPERED_WITH.format(table="human_approval_queue", change=change),
    )

    found = await verified(database)
    assert (found["intact"], found["approvals"]["first_broken"]) == (False, 2)


async def test_an_approval_that_nobody_gave_is_found_out(
    database: PostgresDatabase, learning_database: ThrowawayDatabase
) -> None:
    await asked(database)

    rows(learning_database.url, "UPDATE human_approval_queue SET state = 'approved', decided_at = now()")

    assert (await verified(database))["approvals"]["first_broken"] == 1


async def test_the_history_is_whole_after_edits_refusals_and_the_erasing_of_a_user(
    database: PostgresDatabase,
) -> None:
    old = await asked(database)
    await asked(database, replaces=old["approval_id"], edited_by="bob", args_hash=OTHER_HASH)
    approval = await asked(database, required_votes=2)
    await decided(database, a_decision(approval))
    await decided(database, a_decision(approval, "bob", "reject"))
    _, ticket = await claimed(database)
    await database.call("finish_execution", ADA, ticket=ticket, entry=an_entry())
    assert (await verified(database))["intact"]

    await database.call("erase_user", ADA)
    await database.call("erase_user", ADA)

    assert (await verified(database))["intact"]


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE approval_event SET actor = 'eve' WHERE what = 'voted'",
        "UPDATE approval_event SET details = '{}' WHERE what = 'voted'",
        "DELETE FROM approval_event WHERE number = (SELECT max(number) FROM approval_event)",
        "DELETE FROM approval_event WHERE number = 1",
    ],
)
async def test_a_history_of_approvals_that_was_tampered_with_is_found_out(
    database: PostgresDatabase, learning_database: ThrowawayDatabase, change: str
) -> None:
    approval = await asked(database)
    await decided(database, a_decision(approval))
    assert (await verified(database))["intact"]

    rows(learning_database.url, TAMPERED_WITH.format(table="approval_event", change=change))

    found = await verified(database)
    assert (found["intact"], found["first_broken"]) == (False, None)
    assert found["approvals"]["first_broken"] is not None


async def test_the_history_tells_what_happened_without_arguments(
    database: PostgresDatabase, learning_database: ThrowawayDatabase
) -> None:
    approval = await asked(database, arguments={"zq": "private"}, reason="zq", required_votes=2)
    await decided(database, a_decision(approval, note="zq"))
    await decided(database, a_decision(approval, "mallory"))
    await decided(database, a_decision(approval, "eve"))
    told = rows(learning_database.url, "SELECT what, actor FROM approval_event ORDER BY number")

    assert told == [
        ("requested", "ada"),
        ("voted", "bob"),
        ("decision_refused", "mallory"),
        ("voted", "eve"),
        ("approved", "eve"),
    ]
    assert "zq" not in str(rows(learning_database.url, "SELECT e::text FROM approval_event e"))


async def test_an_execution_is_undone_once(database: PostgresDatabase) -> None:
    log_id = await record(database, risk="WRITE")
    undone = await record(database, risk="WRITE", decision="undone", undoes=log_id)

    assert (await database.call("get_execution", ADA, the_log_id=log_id))["undone_by"] == undone
    with pytest.raises(ConflictError):
        await record(database, risk="WRITE", decision="undone", undoes=log_id)
    assert (await verified(database))["intact"]


async def test_a_user_who_is_erased_leaves_no_arguments_and_a_whole_chain(
    database: PostgresDatabase, learning_database: ThrowawayDatabase
) -> None:
    bob = ADA.with_(user_id="bob")
    secret = {"sql": "SELECT 'zqzq'"}
    await record(
        database, arguments_shown=secret, arguments_run=secret, error="zqzq", pre_image={"t": ["zqzq"]}
    )
    approval, ticket = await claimed(database, arguments=secret, reason="zqzq", summary="zqzq")
    await database.call("finish_execution", ADA, ticket=ticket, entry=an_entry(arguments_run=secret))
    pending = await asked(database, arguments=secret)
    await database.call(
        "save_continuation", ADA, the_approval_id=pending["approval_id"], payload="zqzq", mac="m"
    )
    await database.call("record_execution", bob, entry=an_entry(arguments_run={"kept": 1}))
    assert "zqzq" in everything_stored(learning_database.url)

    gone = await database.call("erase_user", ADA)

    assert gone["agent_execution_details"] == 2
    assert (gone["human_approval_queue"], gone["approval_continuation"]) == (2, 1)
    assert "zqzq" not in everything_stored(learning_database.url)
    found = await verified(database)
    assert (found["rows"], found["intact"]) == (3, True)
    assert (await database.call("get_execution", ADA, the_log_id=1))["erased"] is True
    assert (await database.call("get_execution", ADA, the_log_id=3))["arguments_run"] == {"kept": 1}
    assert (await database.call("get_approval", ADA, the_approval_id=pending["approval_id"]))[
        "state"
    ] == "cancelled"
    assert approval["approval_id"] != pending["approval_id"]

    rows(
        learning_database.url,
        TAMPERED_WITH.format(
            table="agent_execution_details", change="DELETE FROM agent_execution_details WHERE log_id = 3"
        ),
    )
    assert (await verified(database))["first_broken"] == 3, (
        "only what was erased with its user may be missing"
    )


@pytest.mark.parametrize("state", ["executed", "failed", "unknown"])
async def test_a_user_who_is_erased_while_a_call_runs_leaves_nothing_of_it_either(
    database: PostgresDatabase, learning_database: ThrowawayDatabase, state: str
) -> None:
    secret = {"sql": "SELECT 'zqzq'"}
    approval, ticket = await claimed(database, arguments=secret)
    await database.call("erase_user", ADA)
    entry = an_entry(
        state=state, arguments_run=secret, error="zqzq", pre_image={"t": ["zqzq"]}, result='"zqzq"'
    )

    ended = await database.call("finish_execution", ADA, ticket=ticket, entry=entry)

    assert ended["state"] == state
    assert "zqzq" not in everything_stored(learning_database.url)
    assert (await database.call("get_execution", ADA, the_log_id=ended["log_id"]))["erased"] is True
    found = await verified(database)
    assert (found["rows"], found["intact"]) == (1, True)
    assert (await database.call("get_approval", ADA, the_approval_id=approval["approval_id"]))[
        "state"
    ] == state


async def test_what_was_erased_cannot_be_guessed_from_what_stays(
    database: PostgresDatabase, learning_database: ThrowawayDatabase
) -> None:
    await record(database)
    await record(database)

    assert value(learning_database.url, "SELECT count(DISTINCT salt) FROM agent_execution_details") == 2
