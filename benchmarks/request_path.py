"""What learning adds to the time until a user has an answer: ours, Agno's and LangMem's, by the same clock.

    python -m benchmarks.request_path            # about a quarter of an hour
    python -m benchmarks.request_path --quick    # under 90 seconds, rougher

Prints Markdown and saves it, with the same as JSON, under `benchmarks/results/`. Nothing here asserts on time: goals
are reported as reached or missed, and the exit code is 0 unless something broke.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import sys
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TypeVar

import psycopg

from agent.database.embedded import EmbeddedServer
from benchmarks.agent_under_test import AgentUnderTest, ModelScript, Setup
from benchmarks.baselines.agno_agent import AgnoAgent
from benchmarks.baselines.langmem_agent import LangMemAgent
from benchmarks.environment import environment
from benchmarks.learning_agent import LearningAgent
from benchmarks.measuring import paired, percentile, timed, warmed_up
from benchmarks.report import Call, Cost, Goal, Latency, Report
from benchmarks.sample_memories import memories
from benchmarks.server import fresh_database, measuring_server
from benchmarks.statement_meter import StatementMeter, metered

Agent = TypeVar("Agent", bound=AgentUnderTest)

RESULTS = Path(__file__).parent / "results"
MODEL_S = 0.3
MANY = 12
FULL_SIZE = 10_000
SIZES = (100, 1_000, FULL_SIZE)
ADDED_GOAL_MS = 3.0
RATIO_GOAL = 50.0
DATABASE_CALLS_GOAL = 2.0


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of the latency table."""

    model_s: float
    at_once: int
    pairs: int
    spread: bool = False
    """Whether the runs of a round start evenly spread over the time of a model call, instead of together."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is measured. Lines are at 10,000 memories."""

    ours: tuple[Line, ...]
    rivals: tuple[Line, ...]
    queued: tuple[Line, ...]
    """Of Agno's sync door, where three threads do all extraction."""
    growth_pairs: int
    """Pairs of ours per memory size."""
    rival_growth_pairs: int
    """Pairs of a rival per memory size; 0 leaves their growth out."""
    counted_runs: int
    """Runs whose model calls and statements are counted."""


FULL = Plan(
    ours=(
        Line(model_s=0.0, at_once=1, pairs=300),
        Line(model_s=0.0, at_once=MANY, pairs=300),
        Line(model_s=MODEL_S, at_once=1, pairs=200),
        Line(model_s=MODEL_S, at_once=MANY, pairs=204),
        Line(model_s=MODEL_S, at_once=MANY, pairs=204, spread=True),
    ),
    rivals=(
        Line(model_s=MODEL_S, at_once=1, pairs=60),
        Line(model_s=MODEL_S, at_once=MANY, pairs=204),
        Line(model_s=MODEL_S, at_once=MANY, pairs=204, spread=True),
    ),
    queued=(
        Line(model_s=MODEL_S, at_once=1, pairs=20),
        Line(model_s=MODEL_S, at_once=MANY, pairs=60),
    ),
    growth_pairs=200,
    rival_growth_pairs=12,
    counted_runs=20,
)
QUICK = Plan(
    ours=(
        Line(model_s=0.0, at_once=1, pairs=40),
        Line(model_s=MODEL_S, at_once=1, pairs=8),
        Line(model_s=MODEL_S, at_once=MANY, pairs=24),
        Line(model_s=MODEL_S, at_once=MANY, pairs=12, spread=True),
    ),
    rivals=(
        Line(model_s=MODEL_S, at_once=1, pairs=3),
        Line(model_s=MODEL_S, at_once=MANY, pairs=24),
        Line(model_s=MODEL_S, at_once=MANY, pairs=12, spread=True),
    ),
    queued=(),
    growth_pairs=12,
    rival_growth_pairs=0,
    counted_runs=3,
)


def tell(text: str) -> None:
    """Progress, beside the report."""
    print(f"[{perf_counter() - _STARTED:5.0f} s] {text}", file=sys.stderr, flush=True)


_STARTED = perf_counter()


@asynccontextmanager
async def opened(agent: Agent, script: ModelScript, *, url: str, size: int) -> AsyncIterator[Agent]:
    """The agent over this database, filled with `size` memories."""
    tell(f"{agent.name}: filling {size:,} memories")
    script.delay_s = 0.0
    await agent.open(Setup(database_url=url, memories=memories(size), script=script))
    try:
        yield agent
    finally:
        script.delay_s = 0.0
        await agent.close()


class Measurement:
    """One pass over all agents, collected in `report`."""

    def __init__(self, server: EmbeddedServer, plan: Plan, report: Report) -> None:
        self._server = server
        self._plan = plan
        self._report = report

    async def run(self) -> None:
        """Everything that is measured."""
        plan = self._plan
        await self._compare(LearningAgent(worker_inside=False), plan.ours, growth_pairs=plan.growth_pairs)
        await self._compare(LearningAgent(worker_inside=True), plan.ours)
        await self._compare(LangMemAgent(), plan.rivals, growth_pairs=plan.rival_growth_pairs)
        await self._compare(AgnoAgent(), plan.rivals, growth_pairs=plan.rival_growth_pairs)
        if plan.queued:
            await self._compare(AgnoAgent(asynchronous=False), plan.queued)
        self._report.goals += judged(self._report)

    async def _compare(
        self, agent: AgentUnderTest, lines: tuple[Line, ...], *, growth_pairs: int = 0
    ) -> None:
        """Latencies at each size on tables nobody has analyzed, at the full size after that, and costs of a run."""
        self._report.configurations[agent.name] = agent.configuration
        for size in SIZES if growth_pairs else SIZES[-1:]:
            script = ModelScript()
            async with (
                fresh_database(self._server, "measured") as url,
                opened(agent, script, url=url, size=size),
            ):
                if growth_pairs:
                    await self._grow(agent, script, size=size, pairs=growth_pairs)
                if size == FULL_SIZE:
                    with psycopg.connect(url, autocommit=True) as connection:
                        connection.execute("VACUUM ANALYZE")
                    for line in lines:
                        self._report.latencies.append(await measured(agent, script, line, size=size))
        script = ModelScript()
        async with fresh_database(self._server, "counted") as url:
            with metered(url) as meter:
                async with opened(agent, script, url=meter.url, size=SIZES[0]):
                    self._report.costs.append(
                        await counted(agent, script, meter, runs=self._plan.counted_runs)
                    )

    async def _grow(self, agent: AgentUnderTest, script: ModelScript, *, size: int, pairs: int) -> None:
        """Latency at one size, of ours without a model's time so that a millisecond shows, and its functions alone."""
        model_s = 0.0 if isinstance(agent, LearningAgent) else MODEL_S
        line = Line(model_s=model_s, at_once=1, pairs=pairs)
        self._report.growth.append(await measured(agent, script, line, size=size))
        if isinstance(agent, LearningAgent):
            self._report.calls += await our_calls(agent, size=size, runs=pairs)


async def measured(agent: AgentUnderTest, script: ModelScript, line: Line, *, size: int) -> Latency:
    """One line of a latency table, from an agent that is open."""
    starts = "spread" if line.spread else "together"
    label = f"{size}-{uuid.uuid4()}"  # a session of its own for every run, whatever was measured before
    script.delay_s = 0.0
    await warmed_up(agent, runs=max(3, line.at_once), at_once=line.at_once, label=f"warm-up-{label}")
    await agent.settle(patience_s=30)
    script.delay_s = line.model_s
    gc.collect()
    degraded_before = agent.degraded
    tell(f"{agent.name}: {line.pairs} pairs at {size:,}, model {line.model_s:g} s, {line.at_once} at once")
    found = await paired(
        agent,
        pairs=line.pairs,
        at_once=line.at_once,
        label=label,
        spread_s=line.model_s if line.spread else 0.0,
    )
    return Latency(
        agent=agent.name,
        memories=size,
        model_s=line.model_s,
        at_once=line.at_once,
        starts=starts,
        pairs=len(found.bare_s),
        bare_median_ms=1000 * percentile(found.bare_s, 50),
        learning_median_ms=1000 * percentile(found.learning_s, 50),
        added_median_ms=1000 * percentile(found.added_s, 50),
        added_p95_ms=1000 * percentile(found.added_s, 95),
        added_cpu_ms=None if agent.learns_behind else 1000 * found.added_cpu_s,
        longest_prompt_characters=script.longest_prompt_characters,
        degraded=agent.degraded - degraded_before,
        unlearned=await agent.settle(patience_s=2),
    )


async def counted(agent: AgentUnderTest, script: ModelScript, meter: StatementMeter, *, runs: int) -> Cost:
    """Model calls and statements of one run; they do not grow with the number of memories."""
    tell(f"{agent.name}: counting calls over {runs} runs")
    found: dict[str, float] = {}
    await warmed_up(
        agent, runs=20, at_once=4, label="warm-up-counted"
    )  # on all connections that will be used
    for build, run in (("bare", agent.run_bare), ("learning", agent.run_learning)):
        await agent.settle(patience_s=30)
        meter.reset()
        calls_before = script.calls
        for number in range(runs):
            await timed(run, number, f"counted-{build}")
        await agent.settle(patience_s=30)
        found |= {
            f"model_calls_{build}": (script.calls - calls_before) / runs,
            f"statements_{build}": meter.statements / runs,
            f"round_trips_{build}": meter.round_trips / runs,
        }
    return Cost(agent=agent.name, **found)


async def our_calls(agent: LearningAgent, *, size: int, runs: int) -> list[Call]:
    """Times of each storage function on the request path, one run at a time."""
    agent.call_times.clear()
    for number in range(runs):
        await timed(agent.run_learning, number, f"calls-{size}")
    await agent.handed_over()
    return [
        Call(
            function=function,
            memories=size,
            calls=len(seconds),
            per_run=len(seconds) / runs,
            p50_ms=1000 * percentile(seconds, 50),
            p95_ms=1000 * percentile(seconds, 95),
        )
        for function, seconds in sorted(agent.call_times.items())
    ]


def judged(report: Report) -> Iterator[Goal]:
    """The goals, against what was found."""
    lines = {(line.agent, line.model_s, line.at_once, line.starts): line for line in report.latencies}
    agno, apart = AgnoAgent().name, LearningAgent(worker_inside=False).name
    for ours in (apart, LearningAgent(worker_inside=True).name):
        for model_s in (0.0, MODEL_S):
            added_ms = lines[ours, model_s, 1, "together"].added_median_ms
            yield Goal(
                name=f"{ours}: added per run at {FULL_SIZE:,} memories, model {model_s:g} s",
                wanted=f"at most {ADDED_GOAL_MS:g} ms median",
                found=f"{added_ms:.2f} ms",
                reached=added_ms <= ADDED_GOAL_MS,
            )
        for starts in ("together", "spread"):
            added_ms = lines[ours, MODEL_S, MANY, starts].added_median_ms
            agno_ms = lines[agno, MODEL_S, MANY, starts].added_median_ms
            # Below a tenth of a millisecond it is noise, and dividing by it says nothing.
            ratio = agno_ms / max(added_ms, 0.1)
            yield Goal(
                name=f"{ours}: less added than {agno}, {MANY} runs at once, started {starts}",
                wanted=f"at least {RATIO_GOAL:g} times less",
                found=f"{ratio:.0f} times less ({added_ms:.2f} ms against {agno_ms:,.1f} ms)",
                reached=ratio >= RATIO_GOAL,
            )
    wrapped = max(sum(call.per_run for call in report.calls if call.memories == size) for size in SIZES)
    cost = next(cost for cost in report.costs if cost.agent == apart)
    yield Goal(
        name="database calls per run on the request path",
        wanted=f"at most {DATABASE_CALLS_GOAL:g}",
        found=f"{wrapped:g} seen by a wrapper; {cost.statements_learning:g} statements, "
        f"{cost.round_trips_learning:g} round trips seen by a proxy",
        reached=max(wrapped, cost.statements_learning, cost.round_trips_learning) <= DATABASE_CALLS_GOAL,
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.request_path", description="Time that learning adds to a run."
    )
    parser.add_argument("--quick", action="store_true", help="fewer pairs: under 90 seconds, rougher")
    parser.add_argument("--date", help="date to print, such as 2026-11-20; default: today")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    options = parser.parse_args()
    # Telemetry and tracing of the libraries measured would be charged to them, and would leave the machine.
    os.environ |= {"AGNO_TELEMETRY": "false", "LANGSMITH_TRACING": "false", "LANGCHAIN_TRACING_V2": "false"}
    with measuring_server() as server:
        report = Report(environment=environment(server.url(), date=options.date))
        asyncio.run(Measurement(server, QUICK if options.quick else FULL, report).run())
    name = "request_path_quick" if options.quick else "request_path"
    report.save(options.out, name)
    print(report.markdown())
    tell(f"saved as {name}.md and {name}.json in {options.out}")


if __name__ == "__main__":
    main()
