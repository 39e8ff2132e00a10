"""Approvals as the storage functions keep them: every refusal, one winner, all or nothing, and nothing of others."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from typing import Any

import psycopg
import pytest

from agent import Identity
from agent.database.postgres import PostgresDatabase
from agent.errors import ConflictError, IdentityError, InvalidLearning, NotFound, OperatorError
from agent.testing.throwaway import ThrowawayDatabase
from tests.integration.approvals import (
    ADA,
    HASH,
    OTHER_HASH,
    a_decision,
    a_request,
    an_entry,
    approved,
    asked,
    claimed,
    decided,
)
from tests.integration.rows import TENANT_TABLES, rows, value


@pytest.fixture
async def database(learning_database: ThrowawayDatabase) -> AsyncIterator[PostgresDatabase]:
    """The transport to `learning_database`, as a server."""
    database = PostgresDatabase(learning_database.url, connections_max=20)
    yield database
    await database.close()


def age(url: str, approval: dict[str, Any], seconds: float) -> None:
    """Let an approval have been asked for, and claimed, so long ago."""
    rows(url, "ALTER TABLE human_approval_queue DISABLE TRIGGER watched")
    rows(
        url,
        "UPDATE human_approval_queue SET requested_at = requested_at - make_interval(secs => %s), "
        "escalate_at = escalate_at - make_interval(secs => %s), expires_at = expires_at - make_interval(secs => %s), "
        "claimed_at = claimed_at - make_interval(secs => %s) WHERE approval_id = %s",
        *[seconds] * 4,
        approval["approval_id"],
    )
    rows(url, "ALTER TABLE human_approval_queue ENABLE TRIGGER watched")


async def get(database: PostgresDatabase, approval: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = await database.call("get_approval", ADA, the_approval_id=approval["approval_id"])
    return found


async def claim(
    database: PostgresDatabase, approval: dict[str, Any], args_hash: str = HASH, identity: Identity = ADA
) -> dict[str, Any]:
    found: dict[str, Any] = await database.call(
        "claim_approval",
        identity,
        the_approval_id=approval["approval_id"],
        args_hash=args_hash,
        claimed_by="test",
    )
    return found


# Asking


async def test_a_request_keeps_who_asks_for_what(database: PostgresDatabase) -> None:
    approval = await asked(database, reason="the customer says so", effects={"t": {"updated": 1}}, rows=1)

    assert approval["state"] == "pending"
    assert approval["requested_by"] == "ada"
    assert (approval["agent_id"], approval["session_id"], approval["run_id"]) == ("shop", "s1", "r1")
    assert approval["arguments_shown"] == approval["arguments"]
    assert (approval["required_votes"], approval["version"], approval["votes"]) == (1, 1, [])
    assert "ticket_hash" not in approval
    assert await get(database, approval) == approval
    assert await database.call("list_approvals", ADA, wanted={"state": "pending"}) == [approval]
    assert await database.call("list_approvals", ADA, wanted={"states": ["approved"]}) == []


async def test_the_same_key_gives_back_the_same_approval_also_to_many_at_once(
    database: PostgresDatabase,
) -> None:
    found = await asyncio.gather(*[asked(database, request_key="k") for _ in range(10)])

    assert len({each["approval_id"] for each in found}) == 1
    others: list[dict[str, Any]] = [{"args_hash": OTHER_HASH}, {"tool": "send_email"}]
    for other in others:
        with pytest.raises(ConflictError, match="another call"):
            await asked(database, request_key="k", **other)
    with pytest.raises(ConflictError, match="another call"):
        await asked(database, ADA.with_(user_id="tom"), request_key="k")
    assert (await asked(database, ADA.with_(tenant_id="t2"), request_key="k"))["tenant_id"] == "t2"


@pytest.mark.parametrize(
    "odd",
    [
        {"risk": "FORBIDDEN"},
        {"risk": None},
        {"risk": "MILD"},
        {"args_hash": "short"},
        {"args_hash": None},
        {"tool": ""},
        {"kind": "party"},
        {"expires_in_seconds": 0},
        {"expires_in_seconds": 10_000_000},
        {"required_votes": 0},
        {"edited_by": "bob"},
        {"approved_by": "bob"},
        {"approved_by": "policy:"},
        {"approved_by": "policy:1", "risk": "DESTRUCTIVE"},
    ],
)
async def test_what_cannot_be_asked_for_is_refused(database: PostgresDatabase, odd: dict[str, Any]) -> None:
    with pytest.raises(InvalidLearning):
        await asked(database, **odd)
    assert await database.call("list_approvals", ADA, wanted={}) == []


async def test_what_is_destructive_needs_two_people_and_fifteen_minutes_unless_told_otherwise(
    database: PostgresDatabase, learning_database: ThrowawayDatabase
) -> None:
    approval = await asked(database, risk="DESTRUCTIVE")

    assert approval["required_votes"] == 2
    lives = value(
        learning_database.url,
        "SELECT extract(epoch FROM expires_at - requested_at)::int FROM human_approval_queue",
    )
    assert lives == 900


# Deciding


async def test_a_yes_approves_and_is_told(database: PostgresDatabase) -> None:
    approval = await asked(database)

    outcome = await decided(database, a_decision(approval, note="go"))

    [after] = outcome["approvals"]
    assert (outcome["outcome"], outcome["why"]) == ("recorded", None)
    assert (after["state"], after["decided_by"], after["note"]) == ("approved", ["bob"], "go")
    assert [(vote["voter"], vote["verdict"], vote["channel"]) for vote in after["votes"]] == [
        ("bob", "approve", "test")
    ]
    assert after["version"] > approval["version"]


@pytest.mark.parametrize(
    ("vote", "why"),
    [
        ({"decided_by": "mallory"}, "mallory may not decide"),
        ({"decided_by": ""}, "names nobody"),
        ({"decided_by": None}, "names nobody"),
        ({"decided_by": "ada"}, "ada may not decide"),
        ({"decided_by": "boss", "user_ids": ["ada"]}, "asked for themselves"),
        ({"args_hash": OTHER_HASH}, "other arguments"),
        ({"args_hash": HASH[:15]}, "other arguments"),
        ({"args_hash": ""}, "other arguments"),
        ({"args_hash": None}, "other arguments"),
        ({"args_hash": HASH.upper()}, "other arguments"),
        ({"verdict": "maybe"}, "neither"),
        ({"verdict": None}, "neither"),
        ({"approval_id": str(uuid.UUID(int=7))}, "no such approval"),
    ],
)
async def test_a_vote_that_must_not_count_changes_nothing(
    database: PostgresDatabase, vote: dict[str, Any], why: str
) -> None:
    approval = await asked(database)

    outcome = await decided(database, a_decision(approval) | vote)

    assert outcome["outcome"] == "refused"
    assert why in outcome["why"]
    assert await get(database, approval) == approval
    assert not (await claim(database, approval))["claimed"]


async def test_nobody_approves_their_own_even_where_they_are_listed(database: PostgresDatabase) -> None:
    approval = await asked(database, approvers=["ada", "bob"])

    assert "asked for themselves" in (await decided(database, a_decision(approval, "ada")))["why"]


async def test_an_empty_list_of_approvers_means_nobody(database: PostgresDatabase) -> None:
    approval = await asked(database, approvers=[])

    assert (await decided(database, a_decision(approval)))["outcome"] == "refused"


async def test_sixteen_digits_of_the_hash_suffice(database: PostgresDatabase) -> None:
    approval = await asked(database)

    assert (await decided(database, a_decision(approval, args_hash=HASH[:16])))["outcome"] == "recorded"


async def test_eight_clicks_of_one_person_are_one_vote(database: PostgresDatabase) -> None:
    approval = await asked(database, required_votes=2)

    outcomes = await asyncio.gather(*[decided(database, a_decision(approval)) for _ in range(8)])

    assert sorted(each["outcome"] for each in outcomes) == ["recorded"] + ["repeated"] * 7
    after = await get(database, approval)
    assert (after["state"], len(after["votes"])) == ("pending", 1)
    assert (await decided(database, a_decision(approval, "eve")))["approvals"][0]["state"] == "approved"
    assert (await decided(database, a_decision(approval, "eve")))["outcome"] == "repeated"


async def test_one_no_wins_over_a_yes_and_a_yes_may_still_become_a_no(database: PostgresDatabase) -> None:
    approval, other = await asked(database, required_votes=2), await asked(database, required_votes=2)
    await decided(database, a_decision(approval), a_decision(other))

    assert (await decided(database, a_decision(approval, "eve", "reject")))["approvals"][0][
        "state"
    ] == "rejected"
    assert (await decided(database, a_decision(other, "bob", "reject")))["approvals"][0][
        "state"
    ] == "rejected"
    late = await decided(database, a_decision(approval, "max"))
    assert (late["outcome"], late["why"]) == ("refused", "it is rejected")


async def test_the_same_click_counts_once_whatever_it_says(database: PostgresDatabase) -> None:
    approval, other = await asked(database), await asked(database)
    first = await decided(database, a_decision(approval, dedup_key="click"))

    assert first["outcome"] == "recorded"
    assert (await decided(database, a_decision(approval, dedup_key="click")))["outcome"] == "repeated"
    replayed = await decided(database, a_decision(other, dedup_key="click"))
    assert (replayed["outcome"], (await get(database, other))["state"]) == ("refused", "pending")
    assert "delivered before" in replayed["why"]


async def test_a_batch_is_decided_whole_or_not_at_all(database: PostgresDatabase) -> None:
    one = await asked(database)
    two = await asked(database, batch_id=one["batch_id"], args_hash=OTHER_HASH)

    refused = await decided(database, a_decision(one), a_decision(two, args_hash=HASH))
    assert refused["outcome"] == "refused"
    assert [each["state"] for each in refused["approvals"]] == ["pending", "pending"]
    with pytest.raises(InvalidLearning):
        await decided(database, a_decision(one), a_decision(one))
    with pytest.raises(InvalidLearning):
        await decided(database)

    recorded = await decided(database, a_decision(one), a_decision(two))
    assert [each["state"] for each in recorded["approvals"]] == ["approved", "approved"]


async def test_batches_in_opposite_order_do_not_block_each_other(database: PostgresDatabase) -> None:
    some = [await asked(database, required_votes=4) for _ in range(6)]

    async def vote(voter: str, *, is_reversed: bool) -> dict[str, Any]:
        ordered = some[::-1] if is_reversed else some
        return await decided(database, *[a_decision(each, voter) for each in ordered])

    outcomes = await asyncio.gather(
        *[
            vote(voter, is_reversed=number % 2 == 0)
            for number, voter in enumerate(["bob", "eve", "max", "boss"])
        ]
    )

    assert {each["outcome"] for each in outcomes} == {"recorded"}
    assert {(await get(database, each))["state"] for each in some} == {"approved"}


async def test_what_has_expired_is_no_yes_before_anybody_has_said_so(
    database: PostgresDatabase, learning_database: ThrowawayDatabase
) -> None:
    pending, yes = await asked(database), await approved(database)
    for each in (pending, yes):
        age(learning_database.url, each, 4000)

    assert (await get(database, pending))["state"] == "expired"
    assert (await decided(database, a_decision(pending)))["why"] == "it is expired"
    assert (await claim(database, yes))["why"] == "it is expired"
    assert await database.call("list_approvals", ADA, wanted={"state": "pending"}) == []
    assert await database.call("tend_approvals", executing_seconds=60.0) == 2
    assert await database.call("tend_approvals", executing_seconds=60.0) == 0
    assert {state for (state,) in rows(learning_database.url, "SELECT state FROM human_approval_queue")} == {
        "expired"
    }


# Editing


async def test_an_edit_is_another_request_with_the_editors_yes(database: PostgresDatabase) -> None:
    old = await asked(database)

    new = await asked(
        database,
        Identity(),
        replaces=old["approval_id"],
        edited_by="bob",
        args_hash=OTHER_HASH,
        arguments={"sql": "less"},
        note="smaller",
    )

    assert (new["state"], new["decided_by"], new["edited_by"]) == ("approved", ["bob"], "bob")
    assert (new["requested_by"], new["batch_id"]) == ("ada", old["batch_id"])
    before = await get(database, old)
    assert (before["state"], before["replaced_by"], before["note"]) == (
        "cancelled",
        new["approval_id"],
        "smaller",
    )
    assert not (await claim(database, old))["claimed"]
    assert not (await claim(database, new, HASH))["claimed"]
    assert (await claim(database, new, OTHER_HASH))["claimed"]


async def test_who_edits_something_destructive_does_not_approve_it(database: PostgresDatabase) -> None:
    old = await asked(database)

    new = await asked(
        database, replaces=old["approval_id"], edited_by="bob", risk="DESTRUCTIVE", required_votes=1
    )

    assert new["state"] == "pending"
    assert "does not approve it" in (await decided(database, a_decision(new, "bob")))["why"]
    assert (await decided(database, a_decision(new, "eve")))["approvals"][0]["state"] == "approved"


@pytest.mark.parametrize(
    "looser",
    [
        {"required_votes": 1},
        {"required_votes": None},
        {"approvers": ["bob", "eve", "carl"]},
        {"risk": "READ"},
        {"approved_by": "policy:1"},
    ],
)
async def test_an_edit_is_never_less_strict_than_what_it_replaces(
    database: PostgresDatabase, looser: dict[str, Any]
) -> None:
    strict: dict[str, Any] = {"required_votes": 2, "approvers": ["bob", "eve"], "tainted": True}
    old = await asked(database, **strict)
    edit: dict[str, Any] = {
        "replaces": old["approval_id"],
        "edited_by": "bob",
        **strict,
        "args_hash": OTHER_HASH,
    }

    with pytest.raises(InvalidLearning, match="as many votes, of the same people"):
        await asked(database, **edit | looser)

    assert (await get(database, old))["state"] == "pending"
    new = await asked(database, **edit | {"tainted": False})
    assert (new["state"], [vote["voter"] for vote in new["votes"]]) == ("pending", ["bob"])
    assert new["tainted"] is True
    assert (await decided(database, a_decision(new, "eve")))["approvals"][0]["decided_by"] == ["bob", "eve"]


async def test_only_who_may_decide_may_edit_and_only_what_waits(database: PostgresDatabase) -> None:
    old = await asked(database)
    for more in (
        {"edited_by": "mallory"},
        {"edited_by": None},
        {"edited_by": "boss", "edited_user_ids": ["ada"]},
    ):
        with pytest.raises(IdentityError):
            await asked(database, replaces=old["approval_id"], **more)
    with pytest.raises(NotFound):
        await asked(database, replaces=str(uuid.UUID(int=7)), edited_by="bob")
    with pytest.raises(NotFound):
        await asked(database, ADA.with_(tenant_id="t2"), replaces=old["approval_id"], edited_by="bob")
    await decided(database, a_decision(old))
    with pytest.raises(ConflictError, match="no longer be edited"):
        await asked(database, replaces=old["approval_id"], edited_by="bob")


async def test_a_batch_of_another_tenant_cannot_be_joined(database: PostgresDatabase) -> None:
    foreign = await asked(database, ADA.with_(tenant_id="t2"))

    with pytest.raises(NotFound, match="no batch"):
        await asked(database, batch_id=foreign["batch_id"])


# Claiming and finishing


async def test_one_of_twenty_claims_at_once_wins(database: PostgresDatabase) -> None:
    approval = await approved(database)

    found = await asyncio.gather(*[claim(database, approval) for _ in range(20)])

    assert [each["claimed"] for each in found].count(True) == 1
    assert len({each["ticket"] for each in found if each["ticket"]}) == 1
    assert {each["state"] for each in found} == {"executing"}


async def test_what_is_not_approved_for_this_call_is_not_claimed(database: PostgresDatabase) -> None:
    pending, yes = await asked(database), await approved(database)
    rejected = await asked(database)
    await decided(database, a_decision(rejected, verdict="reject"))

    assert not (await claim(database, pending))["claimed"]
    assert not (await claim(database, rejected))["claimed"]
    assert not (await claim(database, yes, OTHER_HASH))["claimed"]
    assert not (await claim(database, yes, HASH[:16]))["claimed"]
    assert not (await claim(database, yes, identity=ADA.with_(tenant_id="t2")))["claimed"]
    assert not (await claim(database, {"approval_id": str(uuid.UUID(int=7))}))["claimed"]
    assert (await claim(database, yes))["claimed"]


async def test_an_execution_ends_once_and_is_logged_with_it(database: PostgresDatabase) -> None:
    approval, ticket = await claimed(database)
    entry = an_entry(state="executed", rows={"t": {"inserted": 0, "updated": 2, "deleted": 0}})

    ended = await database.call("finish_execution", ADA, ticket=ticket, entry=entry)

    assert await database.call("finish_execution", ADA, ticket=ticket, entry=entry) == ended
    with pytest.raises(ConflictError):
        await database.call("finish_execution", ADA, ticket=ticket, entry=entry | {"state": "failed"})
    after = await get(database, approval)
    assert (after["state"], after["log_id"]) == ("executed", ended["log_id"])
    logged = await database.call("get_execution", ADA, the_log_id=ended["log_id"])
    assert (logged["tool"], logged["decision"], logged["user_id"]) == ("execute_sql", "approved", "ada")
    assert (logged["approval_id"], logged["decided_by"]) == (approval["approval_id"], ["policy:1"])
    assert logged["rows"]["t"]["updated"] == 2


@pytest.mark.parametrize("ticket", ["", "0" * 64, None])
async def test_without_the_ticket_nothing_is_finished(database: PostgresDatabase, ticket: str | None) -> None:
    await claimed(database)

    with pytest.raises(NotFound):
        await database.call("finish_execution", ADA, ticket=ticket, entry=an_entry())


async def test_a_ticket_is_of_no_use_in_another_tenant_and_ends_nothing_in_another_state(
    database: PostgresDatabase,
) -> None:
    _, ticket = await claimed(database)

    with pytest.raises(NotFound):
        await database.call("finish_execution", ADA.with_(tenant_id="t2"), ticket=ticket, entry=an_entry())
    with pytest.raises(InvalidLearning):
        await database.call("finish_execution", ADA, ticket=ticket, entry=an_entry(state="approved"))


async def test_what_nobody_finished_becomes_unknown_and_never_runs_again(
    database: PostgresDatabase, learning_database: ThrowawayDatabase
) -> None:
    approval, ticket = await claimed(database)
    age(learning_database.url, approval, 1000)

    assert await database.call("tend_approvals", executing_seconds=900.0) == 1

    after = await get(database, approval)
    assert after["state"] == "unknown"
    assert (await database.call("get_execution", ADA, the_log_id=after["log_id"]))["state"] == "unknown"
    assert not (await claim(database, approval))["claimed"]
    with psycopg.connect(learning_database.url) as connection:
        connection.execute("SET ROLE agent_sql_writer")
        with pytest.raises(psycopg.Error) as late:
            connection.execute('SELECT public.finish_write(%s, \'{"state": "executed"}\')', (ticket,))
        assert late.value.sqlstate == "PT409"
    told = await database.call("finish_execution", ADA, ticket=ticket, entry=an_entry(state="executed"))
    assert told["state"] == "unknown", "what became of it is logged, and somebody looks"
    assert (await database.call("get_execution", ADA, the_log_id=told["log_id"]))["state"] == "executed"


async def test_the_login_that_writes_finishes_in_its_own_transaction(
    database: PostgresDatabase, learning_database: ThrowawayDatabase
) -> None:
    approval, ticket = await claimed(database)
    call = 'SELECT public.finish_write(%s, \'{"state": "executed"}\')'
    with psycopg.connect(learning_database.url) as connection:
        connection.execute("SET ROLE agent_sql_writer")
        connection.execute(call, (ticket,))
        connection.rollback()
    assert (await get(database, approval))["state"] == "executing", "with the write its log is undone"
    with psycopg.connect(learning_database.url) as connection:
        connection.execute("SET ROLE agent_sql_writer")
        connection.execute(call, (ticket,))
        for table in TENANT_TABLES:
            with pytest.raises(psycopg.errors.InsufficientPrivilege), connection.transaction():
                connection.execute(f"SELECT FROM public.{table}".encode())
    assert (await get(database, approval))["state"] == "executed"
    with psycopg.connect(learning_database.url) as connection:
        connection.execute("SET ROLE agent_sql_writer")
        with pytest.raises(psycopg.Error) as again:
            connection.execute(call, (ticket,))
        assert again.value.sqlstate == "PT409"


async def test_the_kill_switch_stops_claims_and_reservations_of_what_it_names(
    database: PostgresDatabase,
) -> None:
    yes, other = await approved(database), await approved(database, tool="send_email")
    halt = await database.call(
        "halt_executions", ADA, halt={"tool": "execute_sql", "reason": "odd", "halted_by": "bob"}
    )

    assert (await claim(database, yes))["why"] == "execution is halted"
    assert (await claim(database, other))["claimed"]
    arguments = {"the_tool": "execute_sql", "limit_key": "k", "per_hour": 5}
    reserved = await database.call("reserve_execution", ADA, **arguments)
    assert (reserved["allowed"], reserved["halted"]["reason"], reserved["used"]) == (False, "odd", 0)
    assert (await database.call("reserve_execution", ADA.with_(tenant_id="t2"), **arguments))["allowed"]

    assert await database.call("resume_executions", ADA, halt_id=halt["halt_id"], resumed_by="bob") is True
    assert await database.call("resume_executions", ADA, halt_id=halt["halt_id"], resumed_by="bob") is False
    assert (await claim(database, yes))["claimed"]
    [listed] = await database.call("list_halts", ADA)
    assert (listed["halted_by"], listed["resumed_by"]) == ("bob", "bob")


async def test_a_budget_holds_for_many_at_once_and_for_an_hour(
    database: PostgresDatabase, learning_database: ThrowawayDatabase
) -> None:
    arguments = {"the_tool": "execute_sql", "limit_key": "k", "per_hour": 3}
    found = await asyncio.gather(*[database.call("reserve_execution", ADA, **arguments) for _ in range(10)])

    assert [each["allowed"] for each in found].count(True) == 3
    unlimited = await database.call(
        "reserve_execution", ADA, the_tool="execute_sql", limit_key="k", per_hour=None
    )
    assert unlimited["allowed"]
    rows(learning_database.url, "UPDATE agent_execution_budget SET minute = minute - interval '61 minutes'")
    assert (await database.call("reserve_execution", ADA, **arguments))["used"] == 1


# Standing rules


RULE: dict[str, Any] = {
    "tool": "execute_sql",
    "fingerprint": "f",
    "tables": ["t"],
    "max_rows": 5,
    "expires_at": "2999-01-01T00:00:00Z",
    "made_by": "bob",
}
FITS: dict[str, Any] = {"fingerprint": "f", "tables": ["t"], "rows": 5}


async def test_a_standing_rule_says_yes_to_what_has_its_shape_and_is_counted(
    database: PostgresDatabase,
) -> None:
    rule = await database.call("save_standing_rule", ADA, rule=RULE | {"max_uses": 2})

    found = await asyncio.gather(*[asked(database, **FITS) for _ in range(5)])

    assert sorted(each["state"] for each in found) == ["approved"] * 2 + ["pending"] * 3
    assert {tuple(each["decided_by"]) for each in found} == {(f"rule:{rule['rule_id']}",), ()}
    [listed] = await database.call("list_standing_rules", ADA)
    assert (listed["uses"], listed["holds"]) == (2, False)


@pytest.mark.parametrize(
    "other",
    [
        {"fingerprint": "g"},
        {"fingerprint": None},
        {"tables": ["t", "u"]},
        {"rows": 6},
        {"rows": None},
        {"risk": "DESTRUCTIVE"},
        {"required_votes": 2},
        {"tool": "send_email"},
        {"approvers": ["eve"]},
    ],
)
async def test_a_standing_rule_fits_nothing_else(database: PostgresDatabase, other: dict[str, Any]) -> None:
    await database.call("save_standing_rule", ADA, rule=RULE)

    assert (await asked(database, **FITS | other))["state"] == "pending"


async def test_a_standing_rule_is_not_for_its_maker_nor_another_tenant_nor_when_it_is_over(
    database: PostgresDatabase, learning_database: ThrowawayDatabase
) -> None:
    rule = await database.call("save_standing_rule", ADA, rule=RULE)
    assert (await asked(database, ADA.with_(user_id="bob"), **FITS))["state"] == "pending"
    assert (await asked(database, ADA.with_(tenant_id="t2"), **FITS))["state"] == "pending"
    assert (await asked(database, **FITS))["state"] == "approved"
    rows(
        learning_database.url,
        "UPDATE approval_rule SET made_at = now() - interval '2 days', expires_at = now() - interval '1 day'",
    )
    assert (await asked(database, **FITS))["state"] == "pending"

    other = await database.call("save_standing_rule", ADA, rule=RULE)
    arguments = {"the_rule_id": other["rule_id"], "revoked_by": "eve"}
    assert await database.call("revoke_standing_rule", ADA, **arguments) is True
    assert await database.call("revoke_standing_rule", ADA, **arguments) is False
    assert (await asked(database, **FITS))["state"] == "pending"
    with pytest.raises(NotFound):
        await database.call("revoke_standing_rule", ADA.with_(tenant_id="t2"), **arguments)
    assert rule["rule_id"] != other["rule_id"]


@pytest.mark.parametrize("lacking", ["tool", "fingerprint", "max_rows", "expires_at", "made_by"])
async def test_a_standing_rule_without_bounds_is_refused(database: PostgresDatabase, lacking: str) -> None:
    with pytest.raises(InvalidLearning):
        await database.call("save_standing_rule", ADA, rule={k: v for k, v in RULE.items() if k != lacking})


async def test_approvals_are_listed_from_either_end_page_by_page_and_by_the_beginning_of_an_id(
    database: PostgresDatabase,
) -> None:
    made = [await asked(database) for _ in range(3)]
    ids = [each["approval_id"] for each in made]

    async def listed(**wanted: Any) -> list[str]:
        found = await database.call("list_approvals", ADA, wanted=wanted)
        return [each["approval_id"] for each in found]

    assert await listed() == ids[::-1]
    assert await listed(oldest_first=True, state="pending") == ids
    middle = {name: made[1][name] for name in ("requested_at", "approval_id")}
    assert await listed(after=middle) == ids[:1]
    assert await listed(after=middle, oldest_first=True) == ids[2:]
    assert await listed(begins=ids[1][:13]) == [ids[1]]
    assert await listed(begins=ids[1], oldest_first=True) == [ids[1]]
    assert await database.call("count_waiting", tenants=None) == {"default": 3}
    assert await database.call("count_waiting", tenants=["other"]) == {}


@pytest.mark.parametrize(
    "call",
    [
        """list_approvals('{"tenant_id": "default"}', '{"state": "pending", "limit": 1000}')""",
        """list_approvals('{"tenant_id": "default"}', '{"state": "pending", "oldest_first": true}')""",
        """list_approvals('{"tenant_id": "default"}', '{"begins": "7d1c7"}')""",
        "take_deliveries('{slack}', 60)",
        "count_waiting(NULL)",
    ],
)
async def test_what_is_over_is_not_read_again_and_again(
    database: PostgresDatabase, learning_database: ThrowawayDatabase, call: str
) -> None:
    await asked(database)
    with psycopg.connect(learning_database.url) as connection:
        connection.execute("ALTER TABLE human_approval_queue DISABLE TRIGGER USER")
        connection.execute(
            """
            WITH old AS (INSERT INTO approval_batch (tenant_id, batch_id, opened_at)
                         SELECT 'default', gen_random_uuid(), now() FROM generate_series(1, 5000) RETURNING *),
                 told AS (INSERT INTO approval_delivery (tenant_id, batch_id, channel, ref, delivered_version)
                          SELECT tenant_id, batch_id, 'slack', '{}', 1 FROM old)
            INSERT INTO human_approval_queue (tenant_id, batch_id, request_key, kind, tool, args_hash, risk, state,
                                              requested_at, expires_at, escalate_at, changed_at)
            SELECT tenant_id, batch_id, batch_id::text, 'action', 't', repeat('a', 64), 'WRITE', 'rejected', d, d, d, d
            FROM old CROSS JOIN LATERAL (SELECT now() - interval '10 days' AS d) AS dated
            """
        )
        connection.commit()
        connection.execute("ANALYZE")
    with psycopg.connect(learning_database.url) as connection:
        connection.execute(f"SELECT {call}".encode())
        read = connection.execute(
            "SELECT relname, seq_tup_read + coalesce(idx_tup_fetch, 0) FROM pg_stat_xact_user_tables "
            "WHERE relname IN ('human_approval_queue', 'approval_batch', 'approval_delivery')"
        ).fetchall()
    assert len(read) == 3
    assert all(count < 500 for _, count in read), read


# Messages and resumes


async def take(database: PostgresDatabase, *channels: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = await database.call(
        "take_deliveries", channels=[*(channels or ("slack",))], lease_seconds=60.0
    )
    return found


async def done(database: PostgresDatabase, delivery: dict[str, Any], ref: Any = None) -> None:
    await database.call(
        "delivery_done",
        the_batch_id=delivery["batch_id"],
        channel=delivery["channel"],
        delivered_version=delivery["version"],
        ref=ref or {"ts": "1"},
    )


async def test_a_batch_has_one_message_per_channel_that_follows_its_state(database: PostgresDatabase) -> None:
    one = await asked(database)
    two = await asked(database, batch_id=one["batch_id"])

    at_once = await asyncio.gather(*[take(database, "slack", "telegram") for _ in range(4)])
    taken = [delivery for each in at_once for delivery in each]
    assert sorted((each["channel"], each["ref"], len(each["approvals"])) for each in taken) == [
        ("slack", None, 2),
        ("telegram", None, 2),
    ]
    assert await take(database, "slack", "telegram") == [], "both are leased"
    for each in taken:
        await done(database, each)
    assert await take(database, "slack", "telegram") == []

    await decided(database, a_decision(two))
    [update] = await take(database)
    assert update["ref"] == {"ts": "1"}
    assert {each["approval_id"]: each["state"] for each in update["approvals"]} == {
        one["approval_id"]: "pending",
        two["approval_id"]: "approved",
    }
    await decided(database, a_decision(one))  # while that update is on its way
    await done(database, update)
    [again] = await take(database)
    assert {each["state"] for each in again["approvals"]} == {"approved"}
    assert (await get(database, one))["messages"] == [
        {"channel": "slack", "ref": {"ts": "1"}},
        {"channel": "telegram", "ref": {"ts": "1"}},
    ]


async def test_a_message_that_failed_is_due_again_later(
    database: PostgresDatabase, learning_database: ThrowawayDatabase
) -> None:
    await asked(database)
    [delivery] = await take(database)
    arguments = {"the_batch_id": delivery["batch_id"], "channel": "slack", "error": "no"}

    assert await database.call("delivery_failed", **arguments) == 1
    assert await take(database) == []
    rows(learning_database.url, "UPDATE approval_delivery SET deliver_after = '-infinity'")
    [again] = await take(database)
    assert again["batch_id"] == delivery["batch_id"]
    assert await database.call("delivery_failed", **arguments) == 2


async def test_a_lease_that_nobody_ended_is_over_one_day(
    database: PostgresDatabase, learning_database: ThrowawayDatabase
) -> None:
    await asked(database)
    assert len(await take(database)) == 1
    rows(learning_database.url, "UPDATE approval_delivery SET deliver_after = now() - interval '1 second'")
    assert len(await take(database)) == 1


async def test_what_needs_nobody_or_is_held_is_not_posted(database: PostgresDatabase) -> None:
    await approved(database)
    held = await asked(database, held=True)
    decided_early = await asked(database)
    await decided(database, a_decision(decided_early))
    assert await take(database) == []

    await database.call("attach_interrupt", ADA, batch_id=held["batch_id"], interrupt={"interrupt_id": "i"})
    [delivery] = await take(database)
    assert delivery["batch_id"] == held["batch_id"]


async def test_an_escalation_is_told_once_before_the_end(
    database: PostgresDatabase, learning_database: ThrowawayDatabase
) -> None:
    approval = await asked(database)
    [delivery] = await take(database)
    await done(database, delivery)
    age(learning_database.url, approval, 1300)

    assert await database.call("tend_approvals", executing_seconds=60.0) == 1
    assert await database.call("tend_approvals", executing_seconds=60.0) == 0
    [update] = await take(database)
    assert update["escalated"] is True
    assert (await get(database, approval))["state"] == "pending"


async def resumes(database: PostgresDatabase) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = await database.call("take_resumes", lease_seconds=60.0)
    return found


async def test_a_paused_run_is_resumed_once_all_its_approvals_are_decided(
    database: PostgresDatabase, learning_database: ThrowawayDatabase
) -> None:
    one = await asked(database, held=True)
    two = await asked(database, batch_id=one["batch_id"], held=True)
    await asked(database)  # of a run that is not paused
    pause = {"thread_id": "t", "interrupt_id": "i"}
    arguments = {"batch_id": one["batch_id"], "interrupt": pause}
    assert await database.call("attach_interrupt", ADA, **arguments) == 2
    with pytest.raises(NotFound):
        await database.call("attach_interrupt", ADA.with_(tenant_id="t2"), **arguments)

    await decided(database, a_decision(one))
    assert await resumes(database) == []
    await decided(database, a_decision(two, verdict="reject"))
    at_once = await asyncio.gather(*[resumes(database) for _ in range(4)])
    [order] = [order for each in at_once for order in each]
    assert (order["interrupt"], order["tenant_id"]) == (pause, "default")
    assert [each["state"] for each in order["approvals"]] == ["approved", "rejected"]

    assert await database.call("resume_failed", batch_id=one["batch_id"], error="busy") == 1
    assert await resumes(database) == []
    rows(learning_database.url, "UPDATE approval_batch SET resume_after = '-infinity'")
    assert len(await resumes(database)) == 1
    assert await database.call("resume_done", batch_id=one["batch_id"]) is True
    rows(learning_database.url, "UPDATE approval_batch SET resume_after = '-infinity'")
    assert await resumes(database) == []
    await database.call("attach_interrupt", ADA, **arguments)
    assert await resumes(database) == [], "the same pause told again"


async def test_what_expired_resumes_its_run_too(
    database: PostgresDatabase, learning_database: ThrowawayDatabase
) -> None:
    approval = await asked(database, held=True)
    await database.call(
        "attach_interrupt", ADA, batch_id=approval["batch_id"], interrupt={"interrupt_id": "i"}
    )
    age(learning_database.url, approval, 4000)
    await database.call("tend_approvals", executing_seconds=60.0)

    [order] = await resumes(database)
    assert order["approvals"][0]["state"] == "expired"


async def test_a_delivery_is_remembered_for_a_day(
    database: PostgresDatabase, learning_database: ThrowawayDatabase
) -> None:
    arguments = {"channel": "slack", "delivery_key": "k"}
    found = await asyncio.gather(*[database.call("remember_delivery", **arguments) for _ in range(5)])
    assert found.count(True) == 1
    assert await database.call("remember_delivery", channel="telegram", delivery_key="k") is True

    rows(learning_database.url, "UPDATE approval_seen SET seen_at = now() - interval '25 hours'")
    await database.call("tend_approvals", executing_seconds=60.0)
    assert await database.call("remember_delivery", **arguments) is True


async def test_each_change_is_notified(
    database: PostgresDatabase, learning_database: ThrowawayDatabase
) -> None:
    with psycopg.connect(learning_database.url, autocommit=True) as connection:
        connection.execute("LISTEN agent_approval")
        approval = await asked(database)
        await decided(database, a_decision(approval))
        await claim(database, approval)
        told = [notice.payload for notice in connection.notifies(timeout=5, stop_after=3)]
    assert told == [approval["approval_id"]] * 3


# Paused programs


async def test_a_paused_program_is_taken_up_once(database: PostgresDatabase) -> None:
    approval = await asked(database)
    arguments = {"the_approval_id": approval["approval_id"]}
    assert await database.call("save_continuation", ADA, **arguments, payload="p", mac="m") is True
    assert await database.call("save_continuation", ADA, **arguments, payload="other", mac="m") is False
    assert await database.call("take_continuation", ADA.with_(tenant_id="t2"), **arguments) is None

    found = await asyncio.gather(*[database.call("take_continuation", ADA, **arguments) for _ in range(8)])
    assert [each for each in found if each] == [{"payload": "p", "mac": "m"}]


# Tools


CODE = {
    "name": "vat",
    "description": "d",
    "code": "1",
    "code_hash": HASH,
    "author": "ada",
    "capabilities": ["q"],
}


async def ticket_for(database: PostgresDatabase, **more: Any) -> str:
    arguments = {"name": "vat", "version": 1, "code_hash": HASH} | more
    _, ticket = await claimed(database, kind="tool_version", tool="create_new_tool", arguments=arguments)
    return ticket


async def test_a_version_of_a_tool_is_saved_once_and_never_changes(
    database: PostgresDatabase, learning_database: ThrowawayDatabase
) -> None:
    found = await asyncio.gather(*[database.call("save_tool_version", ADA, tool=CODE) for _ in range(5)])
    assert {(each["version"], each["state"]) for each in found} == {(1, "draft")}
    second = await database.call("save_tool_version", ADA, tool=CODE | {"code": "2", "code_hash": OTHER_HASH})
    assert second["version"] == 2
    with pytest.raises(psycopg.errors.CheckViolation, match="does not change"):
        rows(learning_database.url, "UPDATE agent_tool SET code = 'evil'")
    with pytest.raises(psycopg.errors.CheckViolation):
        rows(learning_database.url, "UPDATE agent_tool SET state = 'approved' WHERE version = 1")


async def test_only_the_approved_version_runs_and_it_replaces_the_one_before(
    database: PostgresDatabase,
) -> None:
    await database.call("save_tool_version", ADA, tool=CODE)
    await database.call("save_tool_version", ADA, tool=CODE | {"code": "2", "code_hash": OTHER_HASH})
    first = {
        "ticket": await ticket_for(database),
        "tool_name": "vat",
        "version": 1,
        "code_hash": HASH,
    }
    second = {
        "ticket": await ticket_for(database, version=2, code_hash=OTHER_HASH),
        "tool_name": "vat",
        "version": 2,
        "code_hash": OTHER_HASH,
    }

    assert (await database.call("approve_tool_version", ADA, **first))["state"] == "approved"
    assert (await database.call("approve_tool_version", ADA, **first))["state"] == "approved"
    assert (await database.call("get_tool", ADA, tool_name="vat", version=None))["version"] == 1
    await database.call("approve_tool_version", ADA, **second)
    assert (await database.call("get_tool", ADA, tool_name="vat", version=None))["version"] == 2
    assert [each["state"] for each in await database.call("list_tools", ADA, wanted={})] == [
        "approved",
        "retired",
    ]
    with pytest.raises(ConflictError):
        await database.call("approve_tool_version", ADA, **first)
    assert await database.call("retire_tool", ADA, tool_name="vat", version=None, by="bob") == 1
    assert await database.call("list_tools", ADA, wanted={"state": "approved"}) == []


@pytest.mark.parametrize(
    "other",
    [{"tool_name": "tax"}, {"version": 2}, {"code_hash": OTHER_HASH}, {"ticket": "0" * 64}],
)
async def test_a_tool_is_not_approved_by_a_ticket_for_something_else(
    database: PostgresDatabase, other: dict[str, Any]
) -> None:
    await database.call("save_tool_version", ADA, tool=CODE)
    await database.call("save_tool_version", ADA, tool=CODE | {"code_hash": OTHER_HASH})
    await database.call("save_tool_version", ADA, tool=CODE | {"name": "tax"})
    right = {"ticket": await ticket_for(database), "tool_name": "vat", "version": 1, "code_hash": HASH}

    with pytest.raises(IdentityError):
        await database.call("approve_tool_version", ADA, **right | other)
    assert await database.call("list_tools", ADA, wanted={"state": "approved"}) == []


async def test_a_tool_is_not_approved_by_a_ticket_of_another_kind(database: PostgresDatabase) -> None:
    await database.call("save_tool_version", ADA, tool=CODE)
    _, ticket = await claimed(database, arguments={"name": "vat", "version": 1, "code_hash": HASH})

    with pytest.raises(IdentityError):
        await database.call(
            "approve_tool_version", ADA, ticket=ticket, tool_name="vat", version=1, code_hash=HASH
        )


# Tenants


async def test_a_tenant_sees_and_touches_nothing_of_another(database: PostgresDatabase) -> None:
    approval = await asked(database, reason="zq secret")
    await database.call("record_execution", ADA, entry=an_entry(arguments_shown={"zq": 1}))
    await database.call("save_tool_version", ADA, tool=CODE | {"code": "zq"})
    await database.call("save_standing_rule", ADA, rule=RULE | {"fingerprint": "zq"})
    await database.call("halt_executions", ADA, halt={"reason": "zq", "halted_by": "bob"})
    stranger = ADA.with_(tenant_id="t2")

    the_id = {"the_approval_id": approval["approval_id"]}
    assert await database.call("get_approval", stranger, **the_id) is None
    for function in ("list_approvals", "list_executions", "list_standing_rules", "list_halts", "list_tools"):
        assert await database.call(function, stranger) == [], function
        assert "zq" in str(await database.call(function, ADA)), function
    assert await database.call("get_execution", stranger, the_log_id=1) is None
    assert (await database.call("verify_executions", stranger))["rows"] == 0
    refused = await decided(database, a_decision(approval), identity=stranger)
    assert (refused["outcome"], refused["approvals"]) == ("refused", [])
    with pytest.raises(NotFound):
        await database.call("close_approval", stranger, **the_id, the_state="cancelled", closed_by="x")
    assert await get(database, approval) == approval


async def test_a_bare_select_sees_the_rows_of_one_tenant_and_none_without(
    database: PostgresDatabase, learning_database: ThrowawayDatabase
) -> None:
    for tenant in ("t1", "t2"):
        who = ADA.with_(tenant_id=tenant)
        _, ticket = await claimed(database, who)
        await database.call("finish_execution", who, ticket=ticket, entry=an_entry(result="1"))
        pending = await asked(database, who, required_votes=2)
        await decided(database, a_decision(pending), identity=who)
        await database.call(
            "save_continuation", who, the_approval_id=pending["approval_id"], payload="p", mac="m"
        )
        await database.call("save_standing_rule", who, rule=RULE)
        await database.call("reserve_execution", who, the_tool="t", limit_key="k", per_hour=1)
        await database.call("halt_executions", who, halt={"reason": "r", "halted_by": "bob"})
        await database.call("save_tool_version", who, tool=CODE)
    await take(database)
    # Tables of later subjects have tests of their own, and `approval_seen` has no tenant.
    ours = TENANT_TABLES[: TENANT_TABLES.index("agent_tool") + 1]
    of_executions = [table for table in ours if table != "approval_seen"]

    def seen(settings: dict[str, str]) -> dict[str, set[str]]:
        with psycopg.connect(learning_database.url) as connection:
            connection.execute("SET ROLE agent_app")
            for name, item in settings.items():
                connection.execute("SELECT set_config(%s, %s, true)", (f"agent.{name}", item))
            return {
                table: {row[0] for row in connection.execute(f"SELECT tenant_id FROM {table}".encode())}
                for table in of_executions
            }

    assert seen({"tenant_id": "t1", "reach": "tenant"}) == {table: {"t1"} for table in of_executions}
    for settings in (
        {},
        {"tenant_id": "t1"},
        {"tenant_id": "t1", "user_id": "ada", "reach": "user"},
        {"tenant_id": "t1", "user_id": "ada", "reach": "claims"},
        {"tenant_id": "", "reach": "tenant"},
    ):
        assert all(found == set() for found in seen(settings).values()), settings


async def test_no_step_leads_where_none_leads_not_even_for_a_superuser(
    database: PostgresDatabase, learning_database: ThrowawayDatabase
) -> None:
    approval = await asked(database)
    await decided(database, a_decision(approval, verdict="reject"))
    for change in (
        "state = 'approved'",
        "state = 'executing', ticket_hash = 'x'",
        "args_hash = repeat('b', 64)",
        "risk = 'READ'",
        "approvers = '{mallory}'",
        "required_votes = 5",
        "expires_at = expires_at + interval '1 day'",
    ):
        with pytest.raises(psycopg.errors.CheckViolation):
            rows(learning_database.url, f"UPDATE human_approval_queue SET {change}")


async def test_who_acts_for_a_user_may_call_nothing_that_serves_all_tenants(
    learning_database: ThrowawayDatabase,
) -> None:
    with psycopg.connect(learning_database.url, autocommit=True) as connection:
        connection.execute("SELECT set_config('request.jwt.claims', '{\"role\": \"authenticated\"}', false)")
        for call in (
            "tend_approvals(60)",
            "take_deliveries('{slack}', 60)",
            "take_resumes(60)",
            "remember_delivery('slack', 'k')",
        ):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                connection.execute(f"SELECT public.{call}".encode())


async def test_a_request_that_is_no_document_is_an_error_and_leaves_nothing(
    database: PostgresDatabase,
) -> None:
    with pytest.raises((InvalidLearning, OperatorError)):
        await database.call("request_approval", ADA, request=a_request(batch_id="no uuid"))
    assert await database.call("list_approvals", ADA, wanted={}) == []
