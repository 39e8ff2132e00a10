"""Standing rules made from a call that a reviewer was shown: who may, from what, and what then runs unasked."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import pytest

from agent import listening
from agent.approval.human_approval import HumanApprovalQueue
from agent.approval.policy_file import PolicyFile
from agent.approval.records import Approval
from agent.approval.reviewers import Reviewer, Reviewers
from agent.approval.standing_rules import StandingRule, list_rules, make_rule, revoke_rule
from agent.database.postgres import PostgresDatabase
from agent.errors import ConflictError, InvalidRequest, NotFound, Refused
from agent.events import Event
from agent.testing.throwaway import ThrowawayDatabase
from tests.integration.approvals import ADA, BOB, HASH, POLICY, SELF, a_decision, asked, decided

SHAPE: dict[str, Any] = {"fingerprint": "f", "tables": ["t"], "rows": 5}


@pytest.fixture
async def database(learning_database: ThrowawayDatabase) -> AsyncIterator[PostgresDatabase]:
    """The transport to `learning_database`, as a server."""
    database = PostgresDatabase(learning_database.url)
    yield database
    await database.close()


@pytest.fixture
def queue(database: PostgresDatabase, learning_database: ThrowawayDatabase) -> HumanApprovalQueue:
    """A queue whose reviewers are those of `tests.integration.approvals`."""
    return HumanApprovalQueue(database, learning_database.settings, POLICY)


async def rule_of(
    queue: HumanApprovalQueue, approval: dict[str, Any], reviewer: Reviewer = BOB, **changes: Any
) -> StandingRule:
    given = {"max_rows": 5, "max_uses": None, "lasts": timedelta(days=1), **changes}
    return await make_rule(queue, approval["approval_id"], reviewer, **given)


async def test_calls_of_the_shape_that_was_shown_run_unasked_and_this_one_still_waits(
    queue: HumanApprovalQueue, database: PostgresDatabase
) -> None:
    seen = await asked(database, **SHAPE)

    rule = await rule_of(queue, seen, max_uses=2, args_hash=HASH[:16])

    assert (rule.tool, rule.fingerprint, rule.tables) == ("execute_sql", "f", ("t",))
    assert (rule.made_by, rule.max_rows, rule.max_uses) == ("bob", 5, 2)
    assert rule.expires_at - rule.made_at > timedelta(hours=23)
    assert (await queue.get(seen["approval_id"], ADA)).state == "pending"
    others = [await asked(database, **SHAPE) for _ in range(3)]
    assert [one["state"] for one in others] == ["approved", "approved", "pending"]
    assert others[0]["decided_by"] == [f"rule:{rule.rule_id}"]
    for other in ({"fingerprint": "g"}, {"tables": ["t", "u"]}, {"rows": 6}, {"risk": "DESTRUCTIVE"}):
        assert (await asked(database, **SHAPE | other))["state"] == "pending"


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"risk": "DESTRUCTIVE"}, "DESTRUCTIVE"),
        ({"required_votes": 2}, "more than one vote"),
        ({"fingerprint": None}, "no shape"),
        ({"rows": None}, "how many rows"),
        ({"approvers": ["eve"]}, "may not decide"),
    ],
)
async def test_there_is_no_rule_from_such_a_call(
    queue: HumanApprovalQueue, database: PostgresDatabase, changes: dict[str, Any], why: str
) -> None:
    heard: list[Event] = []
    with listening(heard.append), pytest.raises(Refused, match=why):
        await rule_of(queue, await asked(database, **SHAPE | changes))
    assert [event.name for event in heard if event.name.startswith("standing")] == ["standing_rule_refused"]
    assert await list_rules(queue, ADA) == []


async def test_nobody_makes_a_rule_for_themselves_or_against_the_policy_of_now(
    queue: HumanApprovalQueue, database: PostgresDatabase, learning_database: ThrowawayDatabase
) -> None:
    seen = await asked(database, **SHAPE)
    with pytest.raises(Refused, match="themselves"):
        await rule_of(queue, seen, SELF)
    no_more = PolicyFile(reviewers=Reviewers([Reviewer(name="bob", tenants=("elsewhere",))]))
    with pytest.raises(Refused, match="may not decide"):
        await rule_of(HumanApprovalQueue(database, learning_database.settings, no_more), seen)
    with pytest.raises(NotFound):
        await rule_of(queue, seen, identity_tenant="t2")
    with pytest.raises(ConflictError, match="hash"):
        await rule_of(queue, seen, args_hash="0" * 16)
    await decided(database, a_decision(seen, "eve", "reject"))
    with pytest.raises(ConflictError, match="rejected"):
        await rule_of(queue, seen)
    assert await list_rules(queue, ADA) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"max_rows": -1},
        {"max_uses": 0},
        {"lasts": timedelta(0)},
        {"lasts": timedelta(days=91)},
    ],
)
async def test_a_rule_has_bounds(
    queue: HumanApprovalQueue, database: PostgresDatabase, changes: dict[str, Any]
) -> None:
    with pytest.raises(InvalidRequest):
        await rule_of(queue, await asked(database, **SHAPE), **changes)


async def test_a_revoked_rule_fits_nothing(queue: HumanApprovalQueue, database: PostgresDatabase) -> None:
    rule = await rule_of(queue, await asked(database, **SHAPE))
    assert await revoke_rule(queue, rule.rule_id, BOB) is True
    assert await revoke_rule(queue, rule.rule_id, BOB) is False
    after = Approval.from_row(await asked(database, **SHAPE))
    assert after.state == "pending"
    assert [one["holds"] for one in await list_rules(queue, ADA)] == [False]
