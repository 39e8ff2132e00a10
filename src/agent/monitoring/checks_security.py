"""Checks of what should never be usual: refusals, odd approvals, quarantine, injections, keys, open tables."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Iterable
from datetime import datetime, timedelta
from typing import Any

from agent.database.protocol import Database
from agent.monitoring.app_rights import read_app_rights
from agent.monitoring.checks import Check, Look, a_time
from agent.monitoring.exact_tests import binomial_tail
from agent.monitoring.findings import Finding, Severity, cause_of
from agent.monitoring.text_signs import injections_in, keys_in

_REFUSED_MIN = 3
_REFUSED_CHANCE = 1e-3  # of an hour; hours are not looked at apart, so that a week has 168 of them
_DAY = timedelta(days=1)
_BURST_BATCHES = 5
_BURST = timedelta(seconds=60)
_VOTES_KNOWN_MIN = 20
_HOURS_NEAR = 2
_SCANS_MAX = 20
_OBJECTS_MAX = 20
_UNTRUSTED_ROLES = ("user", "tool", "context")


async def _refused_actions(look: Look) -> list[Finding]:
    found = []
    security = await look.security()
    for one in security["refusals"]:
        usual = (one["earlier_refused"] + 1) / (one["earlier_actions"] + 10)
        chance = binomial_tail(one["refused"], one["actions"], usual)
        if one["refused"] < _REFUSED_MIN or chance >= _REFUSED_CHANCE:
            continue
        found.append(
            Finding(
                cause=cause_of("refused_actions", agent=one["agent_id"], who=one["who"]),
                check="refused_actions",
                severity="critical" if one["forbidden"] >= _REFUSED_MIN else "warning",
                title=(
                    f"Agent {one['agent_id']!r}, acting for one user: {one['refused']} of {one['actions']} "
                    "actions refused"
                ),
                what=(
                    f"{one['forbidden']} of them were forbidden. Before, {one['earlier_refused']} of "
                    f"{one['earlier_actions']} were refused."
                ),
                since=a_time(one["since"], security["now"]),
                evidence={
                    name: one[name]
                    for name in ("agent_id", "who", "actions", "refused", "forbidden", "log_ids")
                }
                | {"chance": chance},
                advice=(
                    "See who and what with `agent log show LOG_ID`. If the agent was talked into it, halt it: "
                    "`agent approvals halt`."
                ),
                tenant_id=look.tenant(one["tenant_id"]),
            )
        )
    return found


async def _odd_approvals(look: Look) -> list[Finding]:
    security = await look.security()
    now = a_time(security["now"], "")
    by_voter: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for vote in security["votes"]:
        by_voter[vote["tenant_id"], vote["voter"]].append(vote | {"at": datetime.fromisoformat(vote["at"])})
    found = []
    for (tenant_id, voter), votes in by_voter.items():
        for kind, severity, odd, words in (
            ("own", "critical", own_votes(votes, now), "decided what was asked for in their own name"),
            ("burst", "warning", burst_votes(votes, now), "approved many calls within a minute"),
            (
                "hours",
                "warning",
                votes_outside_hours(votes, now),
                "decided at an hour at which they never do",
            ),
        ):
            if odd:
                found.append(_odd_votes(look, tenant_id, voter, kind, severity, odd, words))
    return found


def _odd_votes(
    look: Look, tenant_id: str, voter: str, kind: str, severity: Any, odd: list[dict[str, Any]], words: str
) -> Finding:
    return Finding(
        cause=cause_of("odd_approvals", kind=kind, voter=voter),
        check="odd_approvals",
        severity=severity,
        title=f"Reviewer {voter!r} {words}",
        what=(
            f"{len(odd)} votes since {odd[0]['at']:%Y-%m-%d %H:%M} UTC, by "
            f"{', '.join(sorted({vote['channel'] for vote in odd}))}."
        ),
        since=odd[0]["at"],
        evidence={
            "kind": kind, "voter": voter, "votes": len(odd), "approval_ids": [vote["approval_id"] for vote in odd][:20],
        },
        advice=(
            "Ask them whether it was they. If not: take their reviewer out of the policy file, then `agent "
            "approvals halt`."
        ),
        tenant_id=look.tenant(tenant_id),
    )  # fmt: skip


def own_votes(votes: Iterable[dict[str, Any]], now: datetime) -> list[dict[str, Any]]:
    """Votes of the last day on what the voter asked for."""
    return [vote for vote in votes if vote["is_own"] and vote["at"] > now - _DAY]


def burst_votes(votes: Iterable[dict[str, Any]], now: datetime) -> list[dict[str, Any]]:
    """The votes of the largest burst of the last day: yes to five batches or more within a minute; empty: none was.

    A batch is one card, which one click decides as a whole.
    """
    given = sorted(
        (vote for vote in votes if vote["verdict"] == "approve" and vote["at"] > now - _DAY),
        key=lambda vote: vote["at"],
    )
    largest: list[dict[str, Any]] = []
    first = 0
    for last, vote in enumerate(given):
        while vote["at"] - given[first]["at"] > _BURST:
            first += 1
        burst = given[first : last + 1]
        if len({one["batch_id"] for one in burst}) >= _BURST_BATCHES and len(burst) > len(largest):
            largest = burst
    return largest


def votes_outside_hours(votes: Iterable[dict[str, Any]], now: datetime) -> list[dict[str, Any]]:
    """Votes of the last day on more than reads, at an hour around which the voter has none of twenty votes or more on
    three days or more before."""
    votes = list(votes)
    before = [vote for vote in votes if vote["at"] <= now - _DAY]
    if len(before) < _VOTES_KNOWN_MIN or len({vote["at"].date() for vote in before}) < 3:
        return []
    known = {vote["at"].hour for vote in before}
    usual = {(hour + near) % 24 for hour in known for near in range(-_HOURS_NEAR, _HOURS_NEAR + 1)}
    return [
        vote
        for vote in votes
        if vote["at"] > now - _DAY and vote["risk"] != "READ" and vote["at"].hour not in usual
    ]


async def _quarantined_memories(look: Look) -> list[Finding]:
    security = await look.security()
    return [
        Finding(
            cause="quarantined_memories",
            check="quarantined_memories",
            severity="info",
            title=f"{one['memories']} memories came into quarantine in the last day",
            what="They were learned from text that nobody vouches for, and are not recalled.",
            since=a_time(one["since"], security["now"]),
            evidence={"memories": one["memories"], "memory_ids": one["memory_ids"]},
            advice="Read them with `agent memory show`; delete what is wrong. Where did the text come from?",
            tenant_id=look.tenant(one["tenant_id"]),
        )
        for one in security["quarantined"]
    ]


async def scan_texts(database: Database) -> list[dict[str, Any]]:
    """Look through the texts of runs that came in since the last time, in at most twenty rounds; what was seen in the
    last day, as `record_sightings` tells it."""
    seen: list[dict[str, Any]] = []
    for _ in range(_SCANS_MAX):
        batch = await database.call("unscanned_texts")
        # Off the loop that serves everybody's calls: a pattern over megabytes takes its time.
        sightings = await asyncio.to_thread(sightings_in, batch["texts"])
        seen = await database.call("record_sightings", sightings=sightings, scanned_until=batch["until"])
        if not batch["more"]:
            break
    return seen


def sightings_in(texts: Iterable[dict[str, Any]]) -> list[dict[str, str]]:
    """What these texts hold, as `record_sightings` takes it. Answers and errors are looked through for keys alone."""
    found = []
    for text in texts:
        kinds = [f"key:{kind}" for kind in keys_in(text["text"])]
        if text["role"] in _UNTRUSTED_ROLES:
            source = "user" if text["role"] == "user" else "tool"
            kinds += [f"injection:{source}:{kind}" for kind in injections_in(text["text"])]
        found += [
            {"tenant_id": text["tenant_id"], "run_id": text["run_id"], "place": text["place"], "kind": kind}
            for kind in kinds
        ]
    return found


async def _sightings(look: Look, check: str, begins: str) -> list[Finding]:
    seen = await look.once("sightings", lambda: scan_texts(look.database))
    found = []
    for one in seen:
        if not one["kind"].startswith(begins):
            continue
        kind = one["kind"].removeprefix(begins)
        found.append(_sighting(look, check, kind, one))
    return found


def _sighting(look: Look, check: str, kind: str, one: dict[str, Any]) -> Finding:
    is_key = check == "leaked_keys"
    source, _, form = kind.partition(":")
    severity: Severity = "critical" if is_key else ("warning" if source == "tool" else "info")
    what = (
        f"A key of the kind {kind} stands in {one['texts']} recorded texts."
        if is_key
        else f"{one['texts']} texts from {'tools' if source == 'tool' else 'users'} look like {form}."
    )
    return Finding(
        cause=cause_of(check, kind=kind, agent=one["agent_id"]),
        check=check,
        severity=severity,
        title=f"{'Key in' if is_key else 'Possible injection in'} texts of agent {one['agent_id']!r}: {kind}",
        what=what,
        since=a_time(one["since"], ""),
        evidence={
            "kind": kind, "agent_id": one["agent_id"], "texts": one["texts"], "places": one["places"],
        },
        advice=(
            "Revoke the key where it was made and make another; then find out who put it there: `agent runs "
            "show RUN_ID`."
            if is_key
            else "Read the run with `agent runs show RUN_ID`: did the agent do what the text says? "
            "See refused_actions too."
        ),
        tenant_id=look.tenant(one["tenant_id"]),
    )  # fmt: skip


async def _leaked_keys(look: Look) -> list[Finding]:
    return await _sightings(look, "leaked_keys", "key:")


async def _injections(look: Look) -> list[Finding]:
    return await _sightings(look, "injections", "injection:")


async def _app_rights(look: Look) -> list[Finding]:
    rights = await read_app_rights(look.settings)
    now = a_time((await look.security())["now"], "")

    def finding(
        kind: str, name: str, severity: Severity, title: str, advice: str, evidence: dict[str, Any]
    ) -> Finding:
        return Finding(
            cause=cause_of("app_rights", kind=kind, object=name), check="app_rights", severity=severity,
            title=title, what=title + ".", since=now, evidence=evidence, advice=advice,
        )  # fmt: skip

    found = [
        finding(
            "no_rls", one["table"], "critical" if "anon" in one["roles"] else "warning",
            f"Table {one['table']} has no row level security and is open to {', '.join(one['roles'])}",
            "ALTER TABLE … ENABLE ROW LEVEL SECURITY and write policies, or REVOKE the rights.", one,
        )
        for one in rights["tables_without_rls"][:_OBJECTS_MAX]
    ]  # fmt: skip
    found += [
        finding(
            "definer", one["function"], "warning" if one["is_public"] else "info",
            f"Function {one['function']} is SECURITY DEFINER without a pinned search_path",
            "ALTER FUNCTION … SET search_path = '' and name every object with its schema.", one,
        )
        for one in rights["definers"][:_OBJECTS_MAX]
    ]  # fmt: skip
    found += [
        finding(
            "public_write", f"{one['table']} {one['role']}", "critical",
            f"{one['role']} may {', '.join(one['privileges'])} on {one['table']}",
            "REVOKE these rights and GRANT them to the roles that need them.", one,
        )
        for one in rights["public_writes"][:_OBJECTS_MAX]
    ]  # fmt: skip
    return found


CHECKS = (
    Check(name="refused_actions", about="refused and forbidden actions, by who tried", find=_refused_actions),
    Check(name="odd_approvals", about="approvals of one's own, in bursts, at odd hours", find=_odd_approvals),
    Check(name="quarantined_memories", about="memories of external trust", find=_quarantined_memories),
    Check(name="injections", about="texts that look like an injection", find=_injections),
    Check(name="leaked_keys", about="keys in messages and errors", find=_leaked_keys),
    Check(
        name="app_rights",
        about="tables without row security, loose definers, public writes",
        find=_app_rights,
    ),
)
