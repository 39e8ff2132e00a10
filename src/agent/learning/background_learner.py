"""The background learner: once per interval, for all replicas, it looks at what changed and curates what is known.

A cycle is a row of steps (`learner_steps.py`). Each is a row of `learning_analytics`, so that a cycle that was cut off
goes on with what was not done.
"""

from __future__ import annotations

import asyncio
import contextvars
import os
import secrets
import socket
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

from agent import telemetry
from agent.clock import Clock, HandedBack, Tick
from agent.errors import ConfigurationError, DatabaseUnavailable, LearningError
from agent.events import emit
from agent.identity import Identity
from agent.portal import portal, workbench

if TYPE_CHECKING:
    from agent.database import Database
    from agent.learning.learner_steps import LearnerStep
    from agent.settings import Settings

CLOCK_NAME: Final = "learner"
_ATTEMPTS_MAX: Final = 3
_RETRY_SECONDS: Final = 2.0
"""Before failed steps are tried again; doubled for the third try."""
_BUSY_SECONDS: Final = 0.5  # how often to look whether a step that runs elsewhere is over
_TOLD_MAX: Final = 300

Progress = Callable[[str, str], None]
"""Is told the step and what it does."""


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What became of one step of a cycle."""

    step: str
    state: str
    """`done`; `failed`; or `busy`, where it ran in another cycle all the time that it might have taken here."""
    attempts: int
    seconds: float = 0.0
    """How long the last try took here; 0 where it was done before."""
    counts: dict[str, int] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class CycleReport:
    """What a cycle did."""

    cycle: str
    steps: tuple[StepResult, ...]

    @property
    def failed(self) -> tuple[StepResult, ...]:
        """The steps that failed for good."""
        return tuple(step for step in self.steps if step.state == "failed")

    def as_json(self) -> dict[str, Any]:
        """The report as plain values."""
        return {"cycle": self.cycle, "steps": [asdict(step) for step in self.steps]}


class BackgroundLearner:
    """Rediscovers, learns and curates once per interval, in one of the replicas that run it.

    Nothing is read or contacted before it is started or run. The methods may be called in any event loop; each has a
    sync door with `_sync` behind its name.

    Args:
        interval_hours: time between two cycles; `None` is `settings.learner_interval`.
        settings: by default those of the environment.
        database: by default that of the settings.
        steps: what a cycle does; by default `LEARNER_STEPS`.
    """

    def __init__(
        self,
        interval_hours: float | None = None,
        *,
        settings: Settings | None = None,
        database: Database | None = None,
        steps: Sequence[LearnerStep] | None = None,
    ) -> None:
        if interval_hours is not None and not interval_hours > 0:
            raise ConfigurationError(f"interval_hours={interval_hours!r} must be more than 0")
        self._interval_hours = interval_hours
        self._given_settings = settings
        self._given_database = database
        self._given_steps = steps
        self._worker = f"{socket.gethostname()[:100]}:{os.getpid()}:{secrets.token_hex(3)}"

    @cached_property
    def settings(self) -> Settings:
        """The settings, read when first asked for."""
        from agent.settings import current_settings

        return self._given_settings or current_settings()

    @cached_property
    def database(self) -> Database:
        """The database, opened when first called."""
        from agent.database import open_database

        return self._given_database or open_database(self.settings)

    @cached_property
    def clock(self) -> Clock:
        """What starts the cycles."""
        hours = self._interval_hours
        interval = self.settings.learner_interval if hours is None else timedelta(hours=hours)
        return Clock(
            CLOCK_NAME, interval, database=self.database, settings=self.settings, cycle=self._do_tick
        )

    @property
    def steps(self) -> Sequence[LearnerStep]:
        """What a cycle does, in this order."""
        from agent.learning.learner_steps import LEARNER_STEPS

        return LEARNER_STEPS if self._given_steps is None else self._given_steps

    @property
    def is_running(self) -> bool:
        """Whether it was started and not stopped."""
        return "clock" in vars(self) and self.clock.is_running

    async def start(self) -> None:
        """Begin: a cycle at once where this hour's was not done, then one per interval."""
        await self.clock.start()

    async def stop(self) -> None:
        """End. A step that runs gets `exit_timeout`; what was not done another replica does. Settings are read anew at
        the next start."""
        if "clock" in vars(self):
            await self.clock.stop()
        for read in ("clock", "database", "settings"):
            vars(self).pop(read, None)

    async def run_once(self, progress: Progress | None = None) -> CycleReport:
        """Do one cycle now, beside the clock's, and tell what each step did.

        Raises:
            DatabaseUnavailable: the database cannot be reached.
        """
        cycle = f"once {secrets.token_hex(8)}"
        return await portal().run(self._run(cycle, lambda: False, progress))

    def start_sync(self) -> None:
        """`start` from a thread without an event loop."""
        portal().run_sync(self.start())

    def stop_sync(self) -> None:
        """`stop` from a thread without an event loop."""
        portal().run_sync(self.stop())

    def run_once_sync(self, progress: Progress | None = None) -> CycleReport:
        """`run_once` from a thread without an event loop."""
        return portal().run_sync(self.run_once(progress))

    async def _do_tick(self, tick: Tick) -> None:
        await self._run(tick.slot.astimezone(UTC).isoformat(), lambda: tick.is_stopping, None)

    async def _run(
        self, cycle: str, is_stopping: Callable[[], bool], progress: Progress | None
    ) -> CycleReport:
        run = _Cycle(self, cycle, is_stopping, progress or (lambda step, told: None), self._worker)
        return await run.run()


class _Cycle:
    """One cycle at work, in the portal."""

    def __init__(
        self,
        learner: BackgroundLearner,
        cycle: str,
        is_stopping: Callable[[], bool],
        progress: Progress,
        worker: str,
    ) -> None:
        self._settings = learner.settings
        self._database = learner.database
        self._steps = learner.steps
        self._identity = Identity(tenant_id=learner.settings.tenant)
        self._cycle = cycle
        self._is_stopping = is_stopping
        self._progress = progress
        self._worker = worker
        self._lease_seconds = learner.settings.stalled_after.total_seconds()

    async def run(self) -> CycleReport:
        """All steps in order, then again those that failed; one that fails keeps no other from being done."""
        results: dict[str, StepResult] = {}
        open_steps = list(self._steps)
        for attempt in range(1, _ATTEMPTS_MAX + 1):
            for step in open_steps:
                results[step.name] = await self._do(step)
            open_steps = [step for step in open_steps if results[step.name].state == "todo"]
            if not open_steps:
                break
            await self._rest(_RETRY_SECONDS * attempt)
        report = CycleReport(cycle=self._cycle, steps=tuple(results[step.name] for step in self._steps))
        emit(
            "learning_cycle_done",
            cycle=self._cycle,
            tenant_id=self._identity.tenant_id,
            steps={result.step: result.state for result in report.steps},
        )
        return report

    async def _rest(self, seconds: float) -> None:
        end = asyncio.get_running_loop().time() + seconds
        while asyncio.get_running_loop().time() < end:
            self._hand_back_if_asked()
            await asyncio.sleep(min(_BUSY_SECONDS, seconds))

    def _hand_back_if_asked(self) -> None:
        if self._is_stopping():
            raise HandedBack

    async def _do(self, step: LearnerStep) -> StepResult:
        limit = asyncio.get_running_loop().time() + step.time_limit.total_seconds()
        while True:
            self._hand_back_if_asked()
            begun = await self._call(
                "begin_step",
                step,
                worker=self._worker,
                lease_seconds=self._lease_seconds,
                attempts_max=_ATTEMPTS_MAX,
            )
            if begun["state"] != "busy":
                break
            if asyncio.get_running_loop().time() > limit:
                return StepResult(step=step.name, state="busy", attempts=0)
            self._progress(step.name, "waits: it runs in another process")
            await self._rest(_BUSY_SECONDS)
        if begun["state"] == "doing":
            return await self._try(step, begun)
        return StepResult(
            step=step.name,
            state=begun["state"],
            attempts=begun["attempt"],
            counts=begun["counts"],
            details=begun["details"],
            error=begun["error"],
        )

    async def _try(self, step: LearnerStep, begun: dict[str, Any]) -> StepResult:
        from agent.learning.learner_steps import StepContext

        attempt: int = begun["attempt"]
        context = StepContext(
            settings=self._settings,
            database=self._database,
            identity=self._identity,
            deadline=datetime.now(UTC) + 0.9 * step.time_limit,
            progress=lambda told: self._progress(step.name, told),
            since=datetime.fromisoformat(begun["since"]) if begun["since"] else None,
        )
        self._progress(step.name, "begins")
        begun_at = asyncio.get_running_loop().time()
        # Beside the portal's loop: comparing and fitting take time that the calls of agents would wait for.
        work = _traced(step.name, step.run(context))
        running = asyncio.wrap_future(workbench().submit(work, context=contextvars.copy_context()))
        keeping = asyncio.create_task(self._keep(step, attempt, running))
        try:
            async with asyncio.timeout(step.time_limit.total_seconds()):
                report = await running
        except asyncio.CancelledError:
            if keeping.done():
                return self._lost(step, attempt)
            await self._finish_quietly(step, attempt)
            raise
        except Exception as error:  # noqa: BLE001 - a step is others' code, and the other steps go on
            return await self._failed(step, attempt, error)
        finally:
            keeping.cancel()
            await asyncio.gather(keeping, return_exceptions=True)
        counts, details = dict(report.counts), dict(report.details)
        if not await self._finish(step, attempt, "done", {"counts": counts, "details": details}):
            return self._lost(step, attempt)
        emit(
            "learning_step_done",
            cycle=self._cycle,
            tenant_id=self._identity.tenant_id,
            step=step.name,
            counts=counts,
        )
        return StepResult(
            step=step.name,
            state="done",
            attempts=attempt,
            seconds=asyncio.get_running_loop().time() - begun_at,
            counts=counts,
            details=details,
        )

    async def _failed(self, step: LearnerStep, attempt: int, error: Exception) -> StepResult:
        told = f"{type(error).__name__}: {error}".removesuffix(": ")[:_TOLD_MAX]
        if isinstance(error, TimeoutError):
            told = f"{told} (it may take {step.time_limit})"
        is_last = attempt >= _ATTEMPTS_MAX
        await self._finish(step, attempt, "failed" if is_last else "todo", {"error": told})
        if is_last:
            emit(
                "learning_step_failed",
                cycle=self._cycle,
                tenant_id=self._identity.tenant_id,
                step=step.name,
                attempts=attempt,
                error=told,
            )
        else:
            emit(
                "learning_step_attempt_failed",
                cycle=self._cycle,
                tenant_id=self._identity.tenant_id,
                step=step.name,
                attempt=attempt,
                error=told,
            )
        return StepResult(step=step.name, state="failed" if is_last else "todo", attempts=attempt, error=told)

    def _lost(self, step: LearnerStep, attempt: int) -> StepResult:
        """Another process has taken the step over, because nothing was heard of this one."""
        return StepResult(step=step.name, state="busy", attempts=attempt)

    async def _keep(self, step: LearnerStep, attempt: int, running: asyncio.Future[Any]) -> None:
        is_kept = True
        while is_kept:
            await asyncio.sleep(self._lease_seconds / 3)
            try:
                is_kept = await self._call(
                    "keep_step", step, attempt=attempt, lease_seconds=self._lease_seconds
                )
            except LearningError:
                continue  # a later look tells
        running.cancel()

    async def _finish(self, step: LearnerStep, attempt: int, state: str, report: dict[str, Any]) -> bool:
        return bool(await self._call("finish_step", step, attempt=attempt, the_state=state, report=report))

    async def _finish_quietly(self, step: LearnerStep, attempt: int) -> None:
        """Hand a step back while its process ends; where the database is away, its lease runs out."""
        try:
            await self._finish(step, attempt, "todo", {})
        except DatabaseUnavailable:
            return

    async def _call(self, function: str, step: LearnerStep, **arguments: Any) -> Any:
        return await self._database.call(
            function, self._identity, the_cycle=self._cycle, the_step=step.name, **arguments
        )


async def _traced(name: str, work: Awaitable[Any]) -> Any:
    with telemetry.span(f"learner_step {name}", {"learning.step": name}):
        return await work


background_learner: Final = BackgroundLearner()
"""The learner of this process, with the settings of the environment."""
