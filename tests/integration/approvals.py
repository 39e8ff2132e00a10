"""What the tests of approvals share: people, requests, and a queue over a database."""

from __future__ import annotations

import hashlib
from typing import Any

from agent import Identity
from agent.approval.policy_file import PolicyFile
from agent.approval.reviewers import Reviewer, Reviewers
from agent.approval.risk import Risk
from agent.database.protocol import Database

ADA = Identity(user_id="ada", session_id="s1", agent_id="shop", run_id="r1")
"""Whose agent asks."""
HASH = hashlib.sha256(b"one").hexdigest()
OTHER_HASH = hashlib.sha256(b"other").hexdigest()
BOB = Reviewer(name="bob", user_ids=("bob@x.org",))
EVE = Reviewer(name="eve")
MAX = Reviewer(name="max", risks=(Risk.WRITE,))
SELF = Reviewer(name="boss", user_ids=("ada",))
"""The same person as who asks."""
POLICY = PolicyFile(reviewers=Reviewers([BOB, EVE, MAX, SELF]))


def a_request(**more: Any) -> dict[str, Any]:
    """A request for an approval as `request_approval` takes it."""
    return {
        "tool": "execute_sql",
        "kind": "execution",
        "arguments": {"sql": "UPDATE t SET a = 1 WHERE id = 1"},
        "args_hash": HASH,
        "risk": "WRITE",
        "approvers": ["bob", "eve", "max", "boss"],
        **more,
    }


async def asked(database: Database, identity: Identity = ADA, **more: Any) -> dict[str, Any]:
    """An approval that was just asked for."""
    found: dict[str, Any] = await database.call("request_approval", identity, request=a_request(**more))
    return found


def a_decision(
    approval: dict[str, Any], voter: str = "bob", verdict: str = "approve", **more: Any
) -> dict[str, Any]:
    """A vote as `decide_approvals` takes it."""
    return {
        "approval_id": approval["approval_id"],
        "verdict": verdict,
        "decided_by": voter,
        "user_ids": [],
        "channel": "test",
        "args_hash": approval["args_hash"],
        **more,
    }


async def decided(database: Database, *decisions: dict[str, Any], identity: Identity = ADA) -> dict[str, Any]:
    """What became of these decisions."""
    found: dict[str, Any] = await database.call("decide_approvals", identity, decisions=[*decisions])
    return found


async def approved(database: Database, identity: Identity = ADA, **more: Any) -> dict[str, Any]:
    """An approval with a yes."""
    return await asked(database, identity, approved_by="policy:1", **more)


async def claimed(database: Database, identity: Identity = ADA, **more: Any) -> tuple[dict[str, Any], str]:
    """An approval that is being executed, and its ticket."""
    approval = await approved(database, identity, **more)
    found = await database.call(
        "claim_approval",
        identity,
        the_approval_id=approval["approval_id"],
        args_hash=approval["args_hash"],
        claimed_by="test",
    )
    return approval, found["ticket"]


def an_entry(**more: Any) -> dict[str, Any]:
    """A row of the log as `record_execution` takes it."""
    return {
        "tool": "query_data",
        "risk": "READ",
        "decision": "allowed",
        "state": "executed",
        "arguments_shown": {"table": "t"},
        "arguments_run": {"table": "t"},
        "row_count": 3,
        "result_bytes": 40,
        "duration_ms": 1.25,
        **more,
    }
