"""How an application tells what became of a run, so that the monitor can hold it against its targets."""

from __future__ import annotations

from typing import Any

from agent.database.protocol import Database
from agent.errors import InvalidLearning
from agent.identity import Identity


async def record_outcome(
    database: Database,
    identity: Identity,
    run_id: str,
    *,
    resolved: bool | None = None,
    escalated: bool | None = None,
    confidence: float | None = None,
    category: str | None = None,
    right_category: str | None = None,
) -> int:
    """Judge a recorded run; how many judgements were kept. What is `None` is not judged; a later judgement replaces an
    earlier one of the same kind.

    Args:
        database: such as `machine.database`.
        identity: its tenant counts.
        run_id: of a run that is recorded: LangGraph's run id, or the one in the config's `metadata`.
        resolved: whether the user's matter is settled. Kept as kind `resolution`.
        escalated: whether it was handed to a person. Kept as kind `escalation`, succeeded where it was not.
        confidence: what the agent says of its own answer, 0 to 1. Kept as kind `confidence`.
        category: what the agent took the request for; needs `right_category`.
        right_category: what it was. Together kept as kind `category`, succeeded where they are the same.

    Raises:
        InvalidLearning: nothing to judge, a confidence outside 0 to 1, or one category without the other.
        NotFound: no such run in this tenant (yet).
    """
    if confidence is not None and not 0 <= confidence <= 1:
        raise InvalidLearning(f"confidence={confidence!r} must be between 0 and 1")
    if (category is None) != (right_category is None):
        raise InvalidLearning(
            f"category={category!r} and right_category={right_category!r} must be given together"
        )
    outcomes: list[dict[str, Any]] = []
    if resolved is not None:
        outcomes.append({"kind": "resolution", "succeeded": resolved})
    if escalated is not None:
        outcomes.append({"kind": "escalation", "succeeded": not escalated})
    if confidence is not None:
        outcomes.append({"kind": "confidence", "score": confidence})
    if category is not None:
        outcomes.append(
            {
                "kind": "category",
                "succeeded": category == right_category,
                "details": {"category": category, "right": right_category},
            }
        )
    if not outcomes:
        raise InvalidLearning(
            f"nothing is judged of run {run_id!r}: give resolved, escalated, confidence or category"
        )
    return int(await database.call("record_outcomes", identity, the_run_id=run_id, outcomes=outcomes))
