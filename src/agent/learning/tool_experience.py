"""What runs teach about tools: their errors, and warnings before calls that are likely to run into them.

Templates come from our own masking and not from a log miner: on the 63 errors of the airline log Drain3 finds the
same 8 texts, but leaves the id in the one that it saw once, and it pins old packages.
"""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any

from agent.learning.tool_experience_calls import ToolCall, conditions_before, read_calls
from agent.learning.tool_experience_model import Model, weigh
from agent.learning.tool_experience_warnings import (
    CLEAN_KEPT,
    RISK_MIN,
    Experience,
    Limit,
    believed,
    errors_in_run,
    likely,
)

if TYPE_CHECKING:
    from agent.database import Database
    from agent.identity import Identity

_BATCH_RUNS = 50
_WEIGHTS_MAX = 5_000
_WEIGHT_MIN = 0.005
_REASONS_MAX = 3
_REASON_WEIGHT_MIN = 0.05
_TELLING = frozenset(
    {
        "value",
        "shape",
        "params",
        "type",
        "length",
        "compare",
        "unseen",
        "link",
        "total",
        "retry",
        "changed",
        "again",
        "size",
        "unheeded",
    }
)


@dataclass(frozen=True, kw_only=True)
class ToolWarning:
    """A known error that a call is likely to run into."""

    tool: str
    template: str
    """The error, with what changes from call to call masked."""
    risk: float
    """Probability, 0 to 1."""
    failures: int
    """How often it was met; 0 where only this run has met it so far."""
    reasons: list[str] = field(default_factory=list)
    """What calls that fail with it have in common, the most telling first."""

    def __str__(self) -> str:
        because = f" when {'; '.join(self.reasons)}" if self.reasons else ""
        return f"{self.tool} is likely to fail with '{self.template}'{because}"


async def warnings_for(
    database: Database,
    identity: Identity,
    tool: str,
    arguments: Mapping[str, Any],
    *,
    earlier: Sequence[Mapping[str, Any]] = (),
) -> list[ToolWarning]:
    """The errors to warn of before a call, the most likely first. One call to the database.

    Args:
        database: holds what was learned.
        identity: whose tenant it is.
        tool: name of the tool.
        arguments: those of the call to be made.
        earlier: the messages of the run so far, as `agent_run` has them: what they show counts, too.
    """
    conditions = conditions_before(tool, arguments, earlier)
    values = weigh(conditions, identity.tenant_id)
    known = await _known_errors(database, identity, tool, values)
    found = [
        ToolWarning(
            tool=tool,
            template=error["template"],
            risk=error["risk"],
            failures=error["failures"],
            reasons=[reason["text"] for reason in error["reasons"]],
        )
        for error in known["risks"]
    ]
    names = {warning.template for warning in found}
    for template in errors_in_run(conditions):
        if template not in names:
            risk = Model(weights=believed(template, identity.tenant_id)).risk(values)
            found.append(ToolWarning(tool=tool, template=template, risk=risk, failures=0))
    found.sort(key=lambda warning: (-warning.risk, warning.template))
    limit = RISK_MIN if known["limit"] is None else known["limit"]
    warned = likely({warning.template: warning.risk for warning in found}, limit)
    return [warning for warning in found if warning.template in warned]


async def common_in_failures(
    database: Database, identity: Identity, failed: ToolCall
) -> list[dict[str, Any]]:
    """What calls that ran into the error of this one have in common: `{text, failures, calls}`, the most telling first.

    Only what holds of this call, where some of it does; empty where the error is new or they have nothing in common.
    One call to the database.
    """
    known = await _known_errors(database, identity, failed.tool, weigh(failed.conditions, identity.tenant_id))
    reasons: list[dict[str, Any]] = next(
        (error["reasons"] for error in known["risks"] if error["template"] == failed.template), []
    )
    own = {condition.opened or condition.shown for condition in failed.conditions}
    return [reason for reason in reasons if reason["text"] in own] or reasons


async def learn_tool_experience(
    database: Database,
    identity: Identity,
    *,
    since: datetime | None = None,
    deadline: Callable[[], bool] | None = None,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Count the tool calls of runs that are not counted yet, and fit the models of the tools they called.

    Safe to stop at any moment, to run again and to run beside another: each run is counted once, in one transaction;
    what a stopped one has counted and not fitted is fitted by the next.

    Args:
        database: holds the runs and takes what is learned.
        identity: whose tenant it is.
        since: leaves out runs that were recorded earlier.
        deadline: asked between runs; `True` ends the work.
        progress: told after each run how many were counted.

    Returns:
        runs, calls, errors, tools: counts of what was new; left: whether the deadline ended it.
    """
    experience, seen = await _load(database, identity)
    counts = Counter({"runs": 0, "calls": 0, "errors": 0, "tools": 0})
    left = False
    while not left:
        runs = await database.call(
            "tool_runs_to_learn",
            identity,
            since=since.isoformat() if since else None,
            run_limit=_BATCH_RUNS,
        )
        stored = 0
        for run in runs:
            if left := deadline is not None and deadline():
                break
            calls = list(read_calls(run["messages"]))
            judged = _judge(experience, seen, calls)
            is_new = await database.call(
                "store_tool_calls",
                identity,
                run=_as_stored(run, calls, judged, identity) | {"risk_limit": experience.limit.value},
            )
            stored += 1
            if not is_new:
                continue
            for call in calls:
                experience.learn(call.tool, weigh(call.conditions, identity.tenant_id), call.template)
            await asyncio.to_thread(
                experience.refit
            )  # seconds of computing, which would hold up the event loop
            counts.update(runs=1, calls=len(calls), errors=sum(call.template is not None for call in calls))
            if progress is not None:
                progress(counts["runs"])
        if not stored:
            break
    for tool in (await database.call("tool_examples", identity))["stale"]:
        if left := deadline is not None and deadline():
            break
        await _fit(database, identity, tool)
        counts["tools"] += 1
    return {**counts, "left": left}


async def list_tool_experience(
    database: Database, identity: Identity, *, tool: str | None = None
) -> dict[str, Any]:
    """What is known of tools: `errors`, `warnings` (how well past calls were warned of), `slow` tools, `sequences`."""
    found: dict[str, Any] = await database.call(
        "list_tool_experience", identity, wanted={"tool": tool} if tool else {}
    )
    return found


async def _known_errors(
    database: Database, identity: Identity, tool: str, values: Mapping[int, float]
) -> dict[str, Any]:
    known: dict[str, Any] = await database.call(
        "match_tool_warnings",
        identity,
        the_tool=tool,
        conditions={str(key): value for key, value in values.items()},
    )
    return known


# --- parts of learning ------------------------------------------------------------------------------------------


async def _load(database: Database, identity: Identity) -> tuple[Experience, set[tuple[str, str]]]:
    experience = Experience(identity.tenant_id)
    known = await database.call("tool_examples", identity, call_limit=CLEAN_KEPT)
    experience.limit = Limit((risk, was_warned) for risk, was_warned in known["clean"])
    for tool in known["tools"]:
        for values, template in _examples(await database.call("tool_examples", identity, the_tool=tool)):
            experience.learn(tool, values, template)
    await asyncio.to_thread(experience.refit, always=True)
    listed = await database.call("list_tool_experience", identity, wanted={"errors_only": True})
    return experience, {(error["tool"], error["template"]) for error in listed["errors"]}


def _examples(known: Mapping[str, Any]) -> list[tuple[dict[int, float], str | None]]:
    return [
        ({int(key): value for key, value in call["conditions"].items()}, call["template"])
        for call in known["calls"]
    ]


@dataclass(frozen=True, slots=True)
class _Judged:
    risk: float
    is_repeat: bool
    was_warned: bool


def _judge(experience: Experience, seen: set[tuple[str, str]], calls: Sequence[ToolCall]) -> list[_Judged]:
    """What was known before each call would have said of it."""
    judged = []
    for call in calls:
        risks = experience.risks(call.tool, call.conditions)
        risk = max(risks.values(), default=0.0)
        template = call.template
        warned = likely(risks, experience.limit.value)
        if template is None:
            judged.append(_Judged(risk, False, bool(warned)))
            experience.limit.add(risk)
        else:
            is_repeat = (call.tool, template) in seen
            judged.append(_Judged(risk, is_repeat, template in warned))
            seen.add((call.tool, template))
    return judged


def _as_stored(
    run: Mapping[str, Any], calls: Sequence[ToolCall], judged: Sequence[_Judged], identity: Identity
) -> dict[str, Any]:
    words = {
        (call.tool, condition.key(identity.tenant_id)): condition
        for call in calls
        if call.template is not None
        for condition in call.conditions
        if condition.kind in _TELLING
    }
    return {
        **{
            name: run[name]
            for name in ("run_id", "user_id", "session_id", "status", "started_at", "finished_at")
        },
        "calls": [
            {
                "tool": call.tool,
                "template": call.template,
                "tool_call_id": call.tool_call_id,
                "message_id": call.message_id,
                "conditions": {
                    str(key): value for key, value in weigh(call.conditions, identity.tenant_id).items()
                },
                "risk": before.risk,
                "is_repeat": before.is_repeat,
                "was_warned": before.was_warned,
            }
            for call, before in zip(calls, judged, strict=True)
        ],
        "words": [
            {
                "tool": tool,
                "condition": key,
                "kind": condition.kind,
                "shown": condition.shown,
                "opened": condition.opened,
            }
            for (tool, key), condition in sorted(words.items(), key=lambda item: item[0])
        ],
    }


async def _fit(database: Database, identity: Identity, tool: str) -> None:
    """Fit and store the models of a tool by the calls that the database has, those of other learners included."""
    known = await database.call("tool_examples", identity, the_tool=tool)
    experience = Experience(identity.tenant_id)
    examples = _examples(known)
    for values, template in examples:
        experience.learn(tool, values, template)
    await asyncio.to_thread(experience.refit, always=True)
    known_errors = await database.call(
        "list_tool_experience", identity, wanted={"tool": tool, "errors_only": True}
    )
    listed = {error["template"]: error for error in known_errors["errors"]}
    models = []
    for template, model in sorted(experience.models(tool).items()):
        if template not in listed:
            continue
        weights = sorted(model.weights.items(), key=lambda item: (-abs(item[1]), item[0]))[:_WEIGHTS_MAX]
        reasons = _reasons(model, template, examples, known["words"])
        error = listed[template]
        models.append(
            {
                "template": template,
                "base": model.base,
                "weights": {str(key): weight for key, weight in weights if abs(weight) >= _WEIGHT_MIN},
                "reasons": reasons,
                "memory": _memory(error, reasons),
                "said": "\n".join(
                    [str(int(math.log2(error["failures"]))), *(reason["text"] for reason in reasons)]
                ),
            }
        )
    await database.call("store_tool_models", identity, the_tool=tool, models=models, last=known["last"])


def _reasons(
    model: Model,
    template: str,
    examples: Sequence[tuple[Mapping[int, float], str | None]],
    words: Mapping[str, Mapping[str, str]],
) -> list[dict[str, Any]]:
    failed = Counter(key for values, found in examples if found == template for key in values)
    calls = Counter(key for values, found in examples if found in (template, None) for key in values)
    telling = sorted(
        (
            key
            for key, weight in model.weights.items()
            if weight >= _REASON_WEIGHT_MIN and str(key) in words and failed[key]
        ),
        key=lambda key: (-model.weights[key] * failed[key] / calls[key] * math.log1p(failed[key]), key),
    )
    reasons: dict[str, dict[str, Any]] = {}
    for key in telling:
        text = words[str(key)]["text"]
        reasons.setdefault(text, {"text": text, "failures": failed[key], "calls": calls[key]})
        if len(reasons) == _REASONS_MAX:
            break
    return list(reasons.values())


def _memory(error: Mapping[str, Any], reasons: Sequence[Mapping[str, Any]]) -> str:
    text = f"{error['tool']} fails with '{error['template']}'"
    if reasons:
        text += " when " + "; or ".join(
            f"{r['text']} ({r['failures']} of {r['calls']} calls)" for r in reasons
        )
    first, last = error["first_seen_at"][:10], error["last_seen_at"][:10]
    if error["failures"] == 1:
        return f"{text}. Seen once, {last}."
    return f"{text}. Seen {error['failures']} times, first {first}, last {last}."
