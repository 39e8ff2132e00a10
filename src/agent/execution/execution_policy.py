"""What the policy says about a call: allow, ask or deny, and how many in an hour. Pure: no I/O."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

from agent.approval.risk import Risk

if TYPE_CHECKING:
    from agent.approval.policy_file import Grant, Rule

Decision = Literal["allow", "ask", "deny"]

_STRICTNESS: Final[dict[Decision, int]] = {"allow": 0, "ask": 1, "deny": 2}


@dataclass(frozen=True, kw_only=True)
class Ruling:
    """What holds for one call."""

    decision: Decision
    why: str
    per_hour: int | None = None
    """Calls in an hour; `None`: no limit."""
    per_agent: bool = False
    """Whether each agent has this limit for itself."""
    rule: str | None = None
    """Which rule of the file it was, counted from 1; `None`: none fits and the rule of the house holds."""


def rule_on(rules: Iterable[Rule], *, tool: str, agent_id: str | None, tenant_id: str, risk: Risk) -> Ruling:
    """The first rule that fits, else the rule of the house: READ runs, WRITE and DESTRUCTIVE ask.

    FORBIDDEN is never run, whatever a rule says, and DESTRUCTIVE never without asking.
    """
    if risk is Risk.FORBIDDEN:
        return Ruling(decision="deny", why="what is FORBIDDEN never runs, approved or not")
    for number, rule in enumerate(rules, start=1):
        if not (
            _fits(rule.tool, tool)
            and _fits(rule.agent, agent_id or "")
            and _fits(rule.tenant, tenant_id)
            and rule.risk in (None, risk)
        ):
            continue
        decision: Decision = rule.decision
        if decision == "allow" and risk is Risk.DESTRUCTIVE:
            decision = "ask"
        return Ruling(
            decision=decision,
            why=f"rule {number} of the policy file says {decision} for {risk} calls of this tool",
            per_hour=rule.per_hour,
            per_agent=rule.counts_per_agent,
            rule=str(number),
        )
    if risk is Risk.READ:
        return Ruling(decision="allow", why="it only reads")
    return Ruling(decision="ask", why=f"{risk} calls are approved by a person")


def lacking(
    grants: Sequence[Grant], rights: Iterable[str], *, agent_id: str | None, tenant_id: str
) -> list[str]:
    """Those of the rights that nothing in the policy file grants. Without any grant in it, all are granted."""
    if not grants:
        return []
    granted = [
        pattern
        for grant in grants
        if _fits(grant.agent, agent_id or "") and _fits(grant.tenant, tenant_id)
        for pattern in grant.rights
    ]
    return sorted({right for right in rights if not any(_fits(pattern, right) for pattern in granted)})


def why_lacking(tool: str, missing: Sequence[str], *, agent_id: str | None, tenant_id: str) -> str:
    """For model and log: which rights a call needs and has not."""
    return (
        f"{tool} needs the {'right' if len(missing) == 1 else 'rights'} {', '.join(missing)}, which the policy file "
        f"does not grant to agent {agent_id or 'without a name'} of tenant {tenant_id}"
    )


def stricter(one: Decision, other: Decision) -> Decision:
    """The stricter of two decisions."""
    return one if _STRICTNESS[one] >= _STRICTNESS[other] else other


def _fits(pattern: str, name: str) -> bool:
    return fnmatch.fnmatchcase(name, pattern)
