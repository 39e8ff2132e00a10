"""Workers killed at random points, fifty times, while runs keep coming: each run is learned exactly once."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import random
import signal
import threading
import time
from datetime import timedelta
from typing import Any

import pytest

from agent import Identity, LearningMachine
from agent.database.postgres import PostgresDatabase
from agent.jobs import run_workers
from agent.portal import portal
from agent.settings import Settings
from agent.testing.throwaway import ThrowawayDatabase
from tests.integration.rows import a_run, counted_scopes, recounted_scopes, rows, value

_KILLS = 50
_WORKERS = 3
_SESSIONS = [Identity(user_id=f"user {n % 4}", session_id=f"session {n}") for n in range(12)]


class _SlowDatabase(PostgresDatabase):
    """Takes its time around every call, so that a kill meets a job before, between and after its steps."""

    async def _call(self, function: str, identity: Identity | None = None, /, **arguments: Any) -> Any:
        await asyncio.sleep(random.uniform(0, 0.02))
        answer = await super()._call(function, identity, **arguments)
        await asyncio.sleep(random.uniform(0, 0.02))
        return answer


def _work(settings: Settings, url: str) -> None:
    """A worker process."""
    random.seed(os.getpid())
    machine = LearningMachine(settings=settings, database=_SlowDatabase(url))
    asyncio.run(run_workers([machine], concurrency=2))


class _Recording(threading.Thread):
    """Records runs, each with a text of its own, until it is told to stop."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self._machine = LearningMachine(settings=settings)
        self._enough = threading.Event()
        self.recorded: list[str] = []
        self.spooled = 0

    def run(self) -> None:
        chance = random.Random(7)
        while not self._enough.wait(chance.uniform(0, 0.06)):
            run = a_run(f"Fact number {len(self.recorded)}")
            done = portal().run_sync(self._machine.record(chance.choice(_SESSIONS), run))
            self.recorded.append(run["run_id"])
            self.spooled += not done
        portal().run_sync(self._machine.close_in_portal())

    def stop(self) -> None:
        self._enough.set()
        self.join()


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_fifty_kills_lose_no_run_and_double_none(learning_database: ThrowawayDatabase) -> None:
    settings = learning_database.settings.model_copy(
        update={"stalled_after": timedelta(seconds=1.5), "quiet_period": timedelta(seconds=0.05)}
    )
    url = learning_database.url
    # Forked from a process that has read the code already: fifty starts cost little, and none shares a connection.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["agent.jobs", "agent.learning.machine", "agent.database.postgres", __name__]
    )

    def start() -> Any:
        process = context.Process(target=_work, args=(settings, url), daemon=True)
        process.start()
        return process

    chance = random.Random(20261120)
    recording = _Recording(settings)
    recording.start()
    workers = [start() for _ in range(_WORKERS)]
    killed_at_work = 0
    try:
        for _ in range(_KILLS):
            time.sleep(chance.uniform(0.02, 0.7))
            victim = workers.pop(chance.randrange(_WORKERS))
            assert victim.pid is not None
            os.kill(victim.pid, signal.SIGKILL)
            victim.join(30)
            assert victim.exitcode == -signal.SIGKILL, "it was at work until then"
            killed_at_work += _jobs_of_the_dead(url)
            workers.append(start())
        recording.stop()
        deadline = time.monotonic() + 90
        while _waiting(url) or value(url, "SELECT count(*) FROM agent_queue.procrastinate_jobs"):
            assert time.monotonic() < deadline, rows(
                url, "SELECT status, args FROM agent_queue.procrastinate_jobs"
            )
            time.sleep(0.2)
    finally:
        recording.stop()
        for worker in workers:
            worker.kill()
            worker.join(30)

    assert killed_at_work > 5, "kills must meet jobs"
    assert recording.spooled == 0
    runs = len(recording.recorded)
    assert runs > 100
    assert value(url, "SELECT count(*) FROM agent_run") == runs
    assert value(url, "SELECT count(*) FROM agent_run WHERE learned_at IS NOT NULL") == runs
    said = "SELECT count(*) FROM agent_memory WHERE kind = 'user'"
    assert value(url, said) == runs
    assert value(url, f"{said} AND superseded_at IS NULL AND version = 1") == runs
    learned = rows(
        url,
        """
        SELECT e.run_id, m.content = r.messages -> 0 ->> 'content', m.owner_id = r.user_id, m.session_id = r.session_id
        FROM agent_memory_evidence e
        JOIN agent_memory m ON m.tenant_id = e.tenant_id AND m.memory_id = e.memory_id AND m.version = e.version
        JOIN agent_run r ON r.tenant_id = e.tenant_id AND r.run_id = e.run_id
        WHERE m.kind = 'user'
        """,
    )
    assert sorted(run_id for run_id, *_ in learned) == sorted(recording.recorded), "each run is evidence once"
    assert all(all(fits) for _, *fits in learned)
    assert counted_scopes(url) == recounted_scopes(url)
    assert sum(memories for memories, _ in counted_scopes(url).values()) == value(
        url, "SELECT count(*) FROM agent_memory"
    )


def _waiting(url: str) -> int:
    found: int = value(url, "SELECT count(*) FROM agent_run WHERE learned_at IS NULL")
    return found


def _jobs_of_the_dead(url: str) -> int:
    """Jobs at hand that the worker just killed leaves behind, or none."""
    found: int = value(
        url,
        """
        SELECT count(*) FROM agent_queue.procrastinate_jobs j
        JOIN agent_queue.procrastinate_workers w ON w.id = j.worker_id
        WHERE j.status = 'doing' AND w.last_heartbeat < now() - interval '1 second'
        """,
    )
    return found
