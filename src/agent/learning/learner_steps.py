"""The steps of one cycle of the background learner, each by itself: what one of them is, and what they do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

from agent.discovery.pattern_learning import learn_patterns
from agent.errors import NotFound
from agent.identity import Identity
from agent.learning.auto_discover import AutoDiscovery
from agent.learning.machine import living_machines
from agent.learning.tool_experience import learn_tool_experience, list_tool_experience
from agent.portal import portal

if TYPE_CHECKING:
    from agent.database import Database
    from agent.settings import Settings

_WAITED: Final = timedelta(minutes=1)
"""Runs that wait for longer and have no order were forgotten; a run and its order come in one transaction."""
_SESSIONS_MAX: Final = 5000
_TENANTS_MAX: Final = 10_000
_ROWS_MAX: Final = 2000
_OWNERS_MAX: Final = 1000
_KEEP: Final = timedelta(days=90)
"""How long the rows that clocks and learner write about themselves are kept."""


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """What a step did."""

    counts: Mapping[str, int] = field(default_factory=dict)
    """How much of what; shown to people and kept in `learning_analytics`."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """More about it, as plain values; no text of messages."""


@dataclass(frozen=True, kw_only=True)
class StepContext:
    """What a step may lean on."""

    settings: Settings
    database: Database
    identity: Identity
    """The deployment's tenant and nobody in it."""
    deadline: datetime
    """When to end by itself, having done a part; the next cycle does what is left. A tenth of the step's time limit
    later it is cancelled, and has failed."""
    progress: Callable[[str], None]
    """Tells a person who watches what is being done; any number of times."""
    since: datetime | None = None
    """When this step last began and went well; `None`: never."""

    @property
    def has_time(self) -> bool:
        """Whether the deadline has not come."""
        return datetime.now(UTC) < self.deadline


@dataclass(frozen=True, kw_only=True)
class LearnerStep:
    """A part of a cycle that stands by itself: done again after it was cut off, it adds nothing twice."""

    name: str
    run: Callable[[StepContext], Awaitable[StepReport]]
    time_limit: timedelta = timedelta(minutes=10)
    """How long one try may take; then it is cancelled and has failed."""


async def discover(context: StepContext) -> StepReport:
    """Read the application's structure again; only what changed is read in full and learned."""
    discovery = AutoDiscovery(settings=context.settings, database=context.database)
    structure = await discovery.discover_app_structure(patterns=False, progress=context.progress)
    changes = {what: len(structure.changes.get(what, ())) for what in ("added", "removed", "changed")}
    counts = {
        "tables": len(structure.tables),
        "functions": len(structure.functions),
        **changes,
        "problems": len(structure.problems),
    }
    return StepReport(counts=counts, details={"app": structure.app})


async def patterns(context: StepContext) -> StepReport:
    """Sample the application's tables, the longest unsampled first; the rest waits for the next cycle."""
    discovery = AutoDiscovery(settings=context.settings, database=context.database)
    structure = await discovery.get_cached_structure()
    if structure is None:
        raise NotFound("nothing is known of the application's structure yet; the step discover comes first")
    summary = await learn_patterns(
        context.settings,
        context.database,
        structure,
        deadline=context.deadline,
        progress=lambda done, count, name: context.progress(f"{done} of {count}: {name}"),
    )
    counts = {
        "tables": len(summary.patterns),
        "relationships": len(summary.relationships),
        "changes": len(summary.changes),
        "problems": len(summary.problems),
        "waiting": summary.waiting,
    }
    return StepReport(counts=counts, details={"app": summary.app})


async def recent_changes(context: StepContext) -> StepReport:
    """Tell what moved since last time, in structure, rows and patterns; the two steps before have learned it."""
    found = await context.database.call(
        "count_app_changes",
        context.identity,
        since=context.since and context.since.isoformat(),
        change_limit=_ROWS_MAX,
    )
    counts = {
        "changes": found["changes"],
        "of_structure": found["structure"],
        "tables_moved": len(found["tables"]),
    }
    return StepReport(counts=counts, details={"tables": found["tables"]})


async def learn_runs(context: StepContext) -> StepReport:
    """Order the learning of sessions whose runs wait although nothing is ordered, of all tenants."""
    counts = {"sessions_waiting": 0, "ordered": 0, "given_up": 0}
    for identity in await _tenants(context):
        if not context.has_time:
            break
        receipt = await context.database.call(
            "order_waiting_learning",
            identity,
            older_than_seconds=_WAITED.total_seconds(),
            session_limit=_SESSIONS_MAX,
        )
        counts["sessions_waiting"] += receipt["waiting"]
        counts["ordered"] += receipt["ordered"]
        counts["given_up"] += receipt["given_up"]
    return StepReport(counts=counts)


async def tool_experience(context: StepContext) -> StepReport:
    """Learn from the tool calls of runs that are not counted yet which calls fail, of all tenants."""
    counts: Counter[str] = Counter(runs=0, calls=0, errors=0, tools=0)
    for identity in await _tenants(context):
        if not context.has_time:
            break
        learned = await learn_tool_experience(
            context.database,
            identity,
            deadline=lambda: not context.has_time,
            progress=lambda runs: context.progress(f"{runs} runs"),
        )
        counts.update({name: learned[name] for name in ("runs", "calls", "errors", "tools")})
    told = (await list_tool_experience(context.database, context.identity))["warnings"]
    return StepReport(counts=dict(counts), details={"warnings": told, "lines": _lines_of_warnings(told)})


def _lines_of_warnings(told: Mapping[str, int]) -> list[str]:
    """How well the calls of the deployment's own tenant were warned of, each judged before it was learned from."""
    if not told["errors"] and not told["clean"]:
        return []
    lines = [f"Tool errors: {told['errors']} in {told['templates']} templates."]
    for kind, what in (
        ("repeats", "repeated errors that had a warning"),
        ("clean", "clean calls that had one"),
    ):
        if told[kind]:
            warned = told[f"{kind}_warned"]
            lines.append(f"{what.capitalize()}: {warned} of {told[kind]} ({warned / told[kind]:.1%}).")
    return lines


async def curate(context: StepContext) -> StepReport:
    """Retire memories that are past their end, said twice, or too many, of all tenants; index again what a change of a
    tenant's language left; forget our own old rows."""
    counts = {
        "expired": 0,
        "duplicates": 0,
        "over_limit": 0,
        "reindexed": 0,
        "ticks": 0,
        "steps": 0,
        "replicas": 0,
    }
    limits = memory_limits()
    for identity in await _tenants(context):
        if not context.has_time:
            break
        context.progress(f"memories of {identity.tenant_id}")
        retired = await context.database.call("curate_memories", identity, limits=limits, row_limit=_ROWS_MAX)
        for name, number in retired.items():
            counts[name] += number
        while context.has_time:
            indexed = await context.database.call("reindex_words", identity, row_limit=_ROWS_MAX)
            counts["reindexed"] += indexed["reindexed"]
            if not indexed["scopes_waiting"]:
                break
    forgotten = await context.database.call(
        "forget_ticks", context.identity, keep_seconds=_KEEP.total_seconds(), row_limit=_ROWS_MAX
    )
    return StepReport(counts=counts | forgotten)


async def embed(context: StepContext) -> StepReport:
    """Give memories vectors that have none of this process's embedders, of all tenants: what discovery learned, and
    everything where the embedder was changed."""
    counts: Counter[str] = Counter(owners=0, embedded=0)
    machines = {}
    for machine in living_machines():
        if machine.database is context.database and (
            embedder := await portal().run(machine.ready_embedder())
        ):
            machines[embedder.name] = machine
    for identity in await _tenants(context) if machines else []:
        for name, machine in machines.items():
            owners = await context.database.call(
                "owners_without_embedding", identity, model=name, owner_limit=_OWNERS_MAX
            )
            for owner in owners:
                if not context.has_time:
                    return StepReport(counts=dict(counts))
                scope, owner_id = owner["scope"], owner["owner_id"]
                whose = identity.with_(**{f"{scope}_id": owner_id}) if owner_id else identity
                embedded = await portal().run(machine.embed_memories(whose, scope=scope))
                context.progress(f"{embedded} memories of one {scope} by {name}")
                counts.update(owners=1, embedded=embedded)
    return StepReport(counts=dict(counts))


def memory_limits() -> dict[str, int]:
    """The greatest number of memories per store that every machine of this process agrees to; what one of them keeps
    without a limit has none here, and a process without machines knows none."""
    known = [machine.limits for machine in living_machines()]
    if not known:
        return {}
    common = set.intersection(*(set(limits) for limits in known))
    return {store: max(limits[store] for limits in known) for store in sorted(common)}


async def _tenants(context: StepContext) -> list[Identity]:
    """The deployment's own tenant first, then all others that have runs."""
    named = await context.database.call("list_tenants", tenant_limit=_TENANTS_MAX)
    others = [tenant for tenant in named if tenant != context.identity.tenant_id]
    return [context.identity, *(Identity(tenant_id=tenant) for tenant in others)]


LEARNER_STEPS: Final = (
    LearnerStep(name="discover", run=discover),
    LearnerStep(name="patterns", run=patterns),
    LearnerStep(name="recent_changes", run=recent_changes),
    LearnerStep(name="learn_runs", run=learn_runs),
    LearnerStep(name="tool_experience", run=tool_experience),
    LearnerStep(name="curate", run=curate),
    LearnerStep(name="embed", run=embed),
)
"""In the order in which a cycle does them."""
