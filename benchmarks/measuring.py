"""How runs are timed: interleaved pairs of a bare and a learning run, and what their differences say."""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from benchmarks.agent_under_test import ANSWER, AgentUnderTest
from benchmarks.sample_memories import SEED, question

Run = Callable[[str, str], Awaitable[str]]


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that at least `percent` of the values do not exceed (nearest rank)."""
    ranked = sorted(values)
    return ranked[max(0, math.ceil(len(ranked) * percent / 100) - 1)]


@dataclass(kw_only=True)
class Pairs:
    """Latencies in seconds; the same index is the same question, asked without and with learning."""

    bare_s: list[float] = field(default_factory=list)
    learning_s: list[float] = field(default_factory=list)
    added_cpu_s: float = 0.0
    """Processor time of this process per run, in all its threads: what learning runs took more than bare ones."""

    @property
    def added_s(self) -> list[float]:
        """What learning added to each run; negative where noise was larger."""
        return [learning - bare for bare, learning in zip(self.bare_s, self.learning_s, strict=True)]


async def timed(run: Run, number: int, label: str, *, wait_s: float = 0.0) -> float:
    """Seconds until the answer, in a session of its own that begins after `wait_s`.

    Raises:
        RuntimeError: the answer is not the scripted one.
    """
    await asyncio.sleep(wait_s)
    started = time.perf_counter()
    answer = await run(question(number), f"{label}-{number}")
    elapsed = time.perf_counter() - started
    if answer != ANSWER:
        raise RuntimeError(f"run {label}-{number} answered {answer!r} instead of the script")
    return elapsed


async def paired(
    agent: AgentUnderTest, *, pairs: int, at_once: int, label: str, spread_s: float = 0.0
) -> Pairs:
    """At least `pairs` pairs, in rounds of `at_once` runs whose starts are spread evenly over `spread_s` seconds.

    A round of bare runs and a round of learning runs follow each other, in an order drawn anew each time with a
    fixed seed; the two kinds never run at once, so that neither slows the other.
    """
    chance = random.Random(SEED)
    found = Pairs()
    builds = {"bare": agent.run_bare, "learning": agent.run_learning}
    latencies = {"bare": found.bare_s, "learning": found.learning_s}
    cpu_s = {"bare": 0.0, "learning": 0.0}
    for first in range(0, pairs, at_once):
        for build in chance.sample(sorted(builds), 2):
            cpu_before = time.process_time()
            latencies[build] += await asyncio.gather(
                *(
                    timed(builds[build], first + lane, f"{label}-{build}", wait_s=spread_s * lane / at_once)
                    for lane in range(at_once)
                )
            )
            await agent.handed_over()
            cpu_s[build] += time.process_time() - cpu_before
    found.added_cpu_s = (cpu_s["learning"] - cpu_s["bare"]) / len(found.bare_s)
    return found


async def warmed_up(agent: AgentUnderTest, *, runs: int, at_once: int, label: str) -> None:
    """Runs that nobody measures: connections are opened, statements prepared, modules imported."""
    for build, run in (("bare", agent.run_bare), ("learning", agent.run_learning)):
        for first in range(0, runs, at_once):
            await asyncio.gather(*(timed(run, first + lane, f"{label}-{build}") for lane in range(at_once)))
