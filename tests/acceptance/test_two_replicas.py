"""Two replicas of the learner, one killed at work, the database restarted: every tick's work is done once."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
from pydantic import SecretStr

from agent import Settings
from agent.database.embedded import start_embedded
from agent.database.migrations import migrate
from agent.learning.background_learner import BackgroundLearner
from agent.learning.learner_steps import LEARNER_STEPS, LearnerStep, StepContext, StepReport
from agent.settings import WorkerMode
from tests.integration.rows import rows, value

_INTERVAL_SECONDS = 2.0
# Notes each time that something is done, so that a second time would be seen.
_AUDIT = """
CREATE TABLE public.audit (what text NOT NULL);
CREATE FUNCTION public.audit() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$
BEGIN
    IF TG_TABLE_NAME = 'agent_tick' THEN
        INSERT INTO public.audit VALUES (format('tick %s', NEW.slot));
    ELSE
        INSERT INTO public.audit VALUES (format('step %s of %s', NEW.step, NEW.cycle));
    END IF;
    RETURN NULL;
END $$;
CREATE TRIGGER audit AFTER UPDATE ON public.agent_tick
    FOR EACH ROW WHEN (NEW.state = 'done') EXECUTE FUNCTION public.audit();
CREATE TRIGGER audit AFTER UPDATE ON public.learning_analytics
    FOR EACH ROW WHEN (NEW.state = 'done') EXECUTE FUNCTION public.audit();
"""


async def _take_time(context: StepContext) -> StepReport:
    """Longer than a look at the tables takes, so that a kill meets it."""
    await asyncio.sleep(0.3)
    return StepReport()


def _replicate(settings: Settings) -> None:
    """A replica's process, until SIGTERM."""

    async def run() -> None:
        asked = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, asked.set)
        steps = [LearnerStep(name="slow", run=_take_time), *LEARNER_STEPS]
        learner = BackgroundLearner(_INTERVAL_SECONDS / 3600, settings=settings, steps=steps)
        await learner.start()
        await asked.wait()
        await learner.stop()

    asyncio.run(run())


def _wait(condition: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + 60
    while not (found := condition()):
        assert time.monotonic() < deadline, f"did not come: {what}"
        time.sleep(0.05)
    return found


def _process_of(worker: str) -> int:
    return int(worker.split(":")[1])


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_a_killed_replica_and_a_restarted_database_lose_no_tick_and_double_none(data_dir: Path) -> None:
    server = start_embedded(data_dir)
    url = server.url()
    asyncio.run(migrate(url))
    rows(url, _AUDIT)
    settings = Settings(
        database_url=SecretStr(url),
        data_dir=data_dir,
        worker=WorkerMode.OFF,
        stalled_after=timedelta(seconds=2),
        exit_timeout=timedelta(seconds=2),
    )
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    replicas: dict[int, Any] = {}

    def start() -> int:
        process = context.Process(target=_replicate, args=(settings,), daemon=True)
        process.start()
        assert process.pid is not None
        replicas[process.pid] = process
        return process.pid

    def done() -> int:
        found: int = value(url, "SELECT count(*) FROM agent_tick WHERE state = 'done'")
        return found

    def at_work() -> list[tuple[str, Any]]:
        return rows(
            url,
            "SELECT t.worker, t.slot FROM agent_tick t, learning_analytics a "
            "WHERE t.state = 'doing' AND a.state = 'doing' AND a.step = 'slow'",
        )

    try:
        first, second = start(), start()
        _wait(lambda: done() >= 3, "work of both")
        [(worker, slot)] = _wait(at_work, "a tick at work")
        killed = _process_of(worker)
        assert killed in (first, second)
        os.kill(killed, signal.SIGKILL)
        replicas.pop(killed).join(30)
        [survivor] = replicas
        _wait(
            lambda: rows(url, "SELECT 1 FROM agent_tick WHERE slot = %s AND state = 'done'", slot),
            "the taking over",
        )
        [(taker, attempts)] = rows(url, "SELECT worker, attempts FROM agent_tick WHERE slot = %s", slot)
        assert (_process_of(taker), attempts) == (survivor, 2)

        _wait(at_work, "a tick at work when the database ends")
        ended_at = time.time()
        server.release()
        with pytest.raises(psycopg.OperationalError):
            psycopg.connect(url, connect_timeout=5)
        server = start_embedded(data_dir)
        assert server.url() == url
        before, slots = done(), value(url, "SELECT count(*) FROM agent_tick")
        reborn = start()
        _wait(lambda: value(url, "SELECT count(*) FROM agent_tick") > slots, "a tick after the restart")
        ticked_again_at = time.time()
        _wait(lambda: done() >= before + 4, "work after the restart")
        alive = "SELECT replica FROM agent_clock WHERE seen_at > now() - interval '3 s'"
        _wait(
            lambda: {_process_of(name) for (name,) in rows(url, alive)} == {survivor, reborn}, "both replicas"
        )
    finally:
        for process in replicas.values():
            process.terminate()
        for process in replicas.values():
            process.join(30)
        codes = [process.exitcode for process in replicas.values()]
        for process in replicas.values():
            process.kill()
        if replicas and codes == [0] * len(codes):
            found = {
                "ticks": rows(url, "SELECT state, attempts FROM agent_tick ORDER BY slot"),
                "cycles": rows(url, "SELECT cycle, array_agg(state) FROM learning_analytics GROUP BY cycle"),
                "twice": rows(url, "SELECT what, count(*) FROM audit GROUP BY what HAVING count(*) > 1"),
                "jobs": rows(url, "SELECT lock FROM agent_queue.procrastinate_jobs WHERE status = 'failed'"),
                "clocks": rows(url, "SELECT replica FROM agent_clock"),
                "lost": rows(url, _LOST, _INTERVAL_SECONDS, ended_at - _INTERVAL_SECONDS, ticked_again_at),
            }
        server.release()

    assert codes == [0, 0], "both leave when they are asked to"
    open_ticks = [state for state, _ in found["ticks"] if state == "todo"]
    assert len(open_ticks) <= 1, "only the last may have been handed back"
    assert {state for state, _ in found["ticks"]} <= {"done", "todo"}
    all_done = ["done"] * (1 + len(LEARNER_STEPS))
    whole = [cycle for cycle, states in found["cycles"] if states == all_done]
    assert len(whole) >= len(found["ticks"]) - len(open_ticks) >= 8
    assert found["twice"] == []
    assert found["jobs"] == []
    assert found["lost"] == []
    assert found["clocks"] == [(name,) for (name,) in found["clocks"] if _process_of(name) == killed]


# The slots between the first tick and the last that have none, unless an earlier one waited to be begun, which then did
# for them too, or nobody could tick.
_LOST = """
SELECT s.slot
FROM generate_series((SELECT min(slot) FROM agent_tick), (SELECT max(slot) FROM agent_tick), make_interval(secs => %s))
    AS s (slot)
WHERE NOT EXISTS (SELECT 1 FROM agent_tick t WHERE t.slot = s.slot)
  AND NOT EXISTS (SELECT 1 FROM agent_tick t WHERE t.slot < s.slot AND t.started_at >= s.slot)
  AND s.slot NOT BETWEEN to_timestamp(%s) AND to_timestamp(%s)
"""
