"""The records that a measurement leaves, and how they read as Markdown."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Times of bare and learning runs in pairs. All in milliseconds but the model's."""

    agent: str
    memories: int
    model_s: float
    at_once: int
    starts: str
    """Of the runs of a round: `together`, or `spread` over the time of a model call."""
    pairs: int
    bare_median_ms: float
    learning_median_ms: float
    added_median_ms: float
    added_p95_ms: float
    added_cpu_ms: float | None
    """Processor time of this process alone, per run; `None` where learning behind the answers blurs it."""
    longest_prompt_characters: int
    """Of any model call so far, answering or extracting."""
    degraded: int
    """Learning runs answered without recall, or not recorded, because that failed or took too long."""
    unlearned: int | None
    """Runs not learned yet two seconds after the last answer; `None` where nobody learns in this process."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one run takes beside time: counted over several runs, one after the other, and divided."""

    agent: str
    model_calls_bare: float
    model_calls_learning: float
    statements_bare: float
    statements_learning: float
    round_trips_bare: float
    round_trips_learning: float


@dataclass(frozen=True, kw_only=True)
class Call:
    """Times of one storage function, from the call in Python to its decoded answer."""

    function: str
    memories: int
    calls: int
    per_run: float
    p50_ms: float
    p95_ms: float


@dataclass(frozen=True, kw_only=True)
class Goal:
    """One goal and what was found; nothing fails where it is missed."""

    name: str
    wanted: str
    found: str
    reached: bool


@dataclass(kw_only=True)
class Report:
    """All that one invocation found."""

    environment: dict[str, str]
    configurations: dict[str, str] = field(default_factory=dict)
    latencies: list[Latency] = field(default_factory=list)
    growth: list[Latency] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    costs: list[Cost] = field(default_factory=list)
    goals: list[Goal] = field(default_factory=list)

    def save(self, folder: Path, name: str) -> None:
        """Write `name.md` and `name.json`, over older ones."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.md").write_text(self.markdown())
        (folder / f"{name}.json").write_text(json.dumps(asdict(self), indent=2) + "\n")

    def markdown(self) -> str:
        """The whole report, goals first."""
        sections = (
            ("# Time that learning adds to a run", ""),
            ("## Goals", _table(("goal", "wanted", "found", ""), map(_goal_row, self.goals))),
            ("## Added time", _table(_LATENCY_HEAD, map(_latency_row, self.latencies))),
            ("## Growth with the number of memories", _table(_LATENCY_HEAD, map(_latency_row, self.growth))),
            ("## Our storage functions alone", _table(_CALL_HEAD, map(_call_row, self.calls))),
            ("## Calls per run", _table(_COST_HEAD, map(_cost_row, self.costs))),
            ("## Agents", "\n".join(f"- **{name}**: {text}" for name, text in self.configurations.items())),
            ("## Environment", "\n".join(f"- {name}: {value}" for name, value in self.environment.items())),
            ("## How to read it", _READING),
        )
        return "\n\n".join(part for section in sections for part in section if part) + "\n"


_LATENCY_HEAD = (
    "agent", "memories", "model", "at once", "pairs", "bare median", "learning median", "added median", "added p95",
    "added CPU", "longest prompt", "degraded", "unlearned",
)  # fmt: skip
_CALL_HEAD = ("function", "memories", "calls", "per run", "p50", "p95")
_COST_HEAD = (
    "agent", "model calls", "of them learning", "statements", "of them learning", "round trips", "of them learning"
)  # fmt: skip
_READING = (
    "Times are milliseconds, the longest prompt is in characters. A pair is the same question asked of the agent "
    "without and with learning, each run in a session of its own; added is the difference within a pair. Rounds of "
    "bare and of learning runs alternate in an order drawn with a fixed seed and never run at once; the runs of a "
    "round start together, or spread evenly over the time of a model call. Added CPU is processor time of the "
    "measuring process per run, without the server's; busy neighbours change it least.\n\n"
    "The model is a script: it takes the time given, in asyncio, and never finds anything worth saving, which is the "
    "least work an extraction can be; an agent that saves something calls the model more often.\n\n"
    "For the first latency table every database was analyzed after it was filled, as autovacuum does within minutes; "
    "for the second it was not. Autovacuum itself is off, so that it does not come in between. Degraded is the number "
    "of learning runs that were answered without recall or not recorded. Unlearned is the number of runs whose "
    "learning was not done two seconds after the last answer. A dash means that nobody learns in this process, or, "
    "for the CPU, that learning behind the answers blurs it.\n\n"
    "Statements leave out BEGIN, COMMIT and the like, round trips include them; both are counted by a proxy in front "
    "of the server, with what goes on behind the answer where that is in the same process."
)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _goal_row(goal: Goal) -> Sequence[str]:
    return goal.name, goal.wanted, goal.found, "reached" if goal.reached else "**missed**"


def _latency_row(line: Latency) -> Sequence[str]:
    return (
        line.agent, f"{line.memories:,}", f"{line.model_s:g} s",
        f"{line.at_once} {line.starts}" if line.at_once > 1 else "1", str(line.pairs),
        f"{line.bare_median_ms:,.2f}", f"{line.learning_median_ms:,.2f}", f"{line.added_median_ms:,.2f}",
        f"{line.added_p95_ms:,.2f}", "-" if line.added_cpu_ms is None else f"{line.added_cpu_ms:,.2f}",
        f"{line.longest_prompt_characters:,}", str(line.degraded),
        "-" if line.unlearned is None else str(line.unlearned),
    )  # fmt: skip


def _call_row(call: Call) -> Sequence[str]:
    return (
        f"`{call.function}`", f"{call.memories:,}", str(call.calls), f"{call.per_run:g}", f"{call.p50_ms:.2f}",
        f"{call.p95_ms:.2f}",
    )  # fmt: skip


def _cost_row(cost: Cost) -> Sequence[str]:
    pairs = (
        (cost.model_calls_bare, cost.model_calls_learning),
        (cost.statements_bare, cost.statements_learning),
        (cost.round_trips_bare, cost.round_trips_learning),
    )
    return cost.agent, *(f"{value:.3g}" for bare, learning in pairs for value in (learning, learning - bare))
