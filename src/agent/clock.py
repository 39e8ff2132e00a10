"""Clocks: work that is done once per interval, however many processes run it (D7).

APScheduler ticks in every replica; the storage function `tick` claims each time slot once and orders its work from the
queue; the worker that gets the job (`clock_worker.py`: one for all clocks of a process) leases the tick. What a dead
worker had begun is begun again by another.
"""

from __future__ import annotations

import asyncio
import os
import re
import secrets
import socket
from collections.abc import Awaitable, Callable
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final, Protocol

from apscheduler.schedulers.asyncio import AsyncIOScheduler

from agent import telemetry
from agent.clock_worker import ClockWorker, clock_workers
from agent.database.supabase import SupabaseDatabase
from agent.errors import ConfigurationError, DatabaseUnavailable, LearningError
from agent.events import emit
from agent.identity import Identity
from agent.jobs import ends_quietly
from agent.portal import forget_in_forked_child, portal

if TYPE_CHECKING:
    from agent.database import Database
    from agent.settings import Settings

_NAME: Final = re.compile("[a-z][a-z_]{0,39}")
_ATTEMPTS_MAX: Final = 5
_RETRY_SECONDS: Final = 5.0
"""After the first failure of a tick; doubled each time, at most a quarter of the interval."""
_CALL_SECONDS: Final = 30.0
_BEAT_SECONDS_MIN: Final = 0.1
_CYCLE_INTERVALS: Final = 3
_CYCLE_TIME_MIN: Final = timedelta(minutes=15)
_CLEANUP_SECONDS: Final = 5.0
_TOLD_MAX: Final = 300


class Service(Protocol):
    """Something that runs in the background of a process until it is stopped."""

    @property
    def is_running(self) -> bool:
        """Whether it was started and not stopped."""

    async def start(self) -> None:
        """Begin; again is no matter."""

    async def stop(self) -> None:
        """End, and wait for the end of what runs just now."""


class HandedBack(Exception):
    """Raised by a cycle that saw `Tick.is_stopping` and stopped half-way: another replica goes on with the tick."""


@dataclass(frozen=True, kw_only=True)
class Tick:
    """One turn of a clock, as its cycle is given it."""

    clock: str
    tenant_id: str
    slot: datetime
    """When the time slot began, by the clock of the database."""
    attempt: int
    """1 at the first try. Later ones may find work that earlier ones did."""
    _stopping: asyncio.Event = field(default_factory=asyncio.Event, repr=False, compare=False)

    @property
    def is_stopping(self) -> bool:
        """Whether this process is to end: finish the step at hand and raise `HandedBack`."""
        return self._stopping.is_set()


class Clock:
    """Calls `cycle` once per interval for all replicas that run a clock of this name and tenant.

    A later tick never runs beside an earlier one. Time in which nobody ticked gives one tick, not many. A cycle that
    raises is tried again, five times in all; one that takes longer than three intervals, and 15 minutes at least, is
    cancelled and counts as failed.

    Over Supabase's web interface alone there is no queue; then the replica that finds an open tick does it.

    Args:
        name: small letters and `_`, at most 40: what replicas have in common.
        interval: time from slot to slot, at least 0.1 seconds; slots begin at its multiples, by the database's clock.
        database: where the ticks are.
        settings: whose tenant the clock is for; `stalled_after` is how long a worker may be silent, `exit_timeout` how
            long a cycle may go on when the clock stops.
        cycle: the work, called in the portal.

    Raises:
        ConfigurationError: a name or an interval that cannot be.
    """

    def __init__(
        self,
        name: str,
        interval: timedelta,
        *,
        database: Database,
        settings: Settings,
        cycle: Callable[[Tick], Awaitable[None]],
    ) -> None:
        if not _NAME.fullmatch(name):
            raise ConfigurationError(f"name={name!r} of a clock must be small letters and _, at most 40")
        if interval < timedelta(seconds=0.1):
            raise ConfigurationError(f"interval={interval!r} of a clock must be at least 0.1 seconds")
        self.name = name
        self.interval = interval
        self._database = database
        self._settings = settings
        self._cycle = cycle
        self._identity = Identity(tenant_id=settings.tenant)
        self.start_anew()
        forget_in_forked_child(self)

    def start_anew(self) -> None:
        """In a forked child: the scheduler and the worker are the parent's."""
        self.replica = f"{socket.gethostname()[:100]}:{os.getpid()}:{secrets.token_hex(3)}"
        self._scheduler: AsyncIOScheduler | None = None
        self._stopping = asyncio.Event()
        self._direct: asyncio.Task[None] | None = None
        self._worker: ClockWorker | None = None
        self._working: set[asyncio.Task[None]] = set()
        self._running: asyncio.Task[None] | None = None
        self._is_told = False

    @property
    def is_running(self) -> bool:
        """Whether it was started and not stopped."""
        return self._scheduler is not None

    async def start(self) -> None:
        """Begin to tick, at once where the slot of now was not done. A database that is away is waited for."""
        await portal().run(self._start())

    async def stop(self) -> None:
        """Stop ticking. A cycle that runs gets `exit_timeout` to end or to hand its tick back, then it is cancelled."""
        await portal().run(self._stop())

    async def work(self) -> None:
        """Do the ticks that are open, oldest first, until none is: what the queue's worker calls. In any event loop."""
        await portal().run(self._work_until_done())

    # --- ticking

    async def _start(self) -> None:
        if self._scheduler is not None:
            return
        self._stopping = asyncio.Event()
        # Several beats per interval: each slot is met, replicas are seen to live, and lost orders are made anew.
        beat = min(self.interval / 2, self._settings.stalled_after / 3).total_seconds()
        self._scheduler = AsyncIOScheduler(timezone="UTC")
        self._scheduler.add_job(
            ends_quietly(self._beat),
            "interval",
            seconds=max(beat, _BEAT_SECONDS_MIN),
            next_run_time=datetime.now(UTC),
            max_instances=1,
            coalesce=True,
            misfire_grace_time=None,
        )
        self._scheduler.start()
        portal().at_exit(self._finish_at_exit)

    async def _beat(self) -> None:
        try:
            async with asyncio.timeout(_CALL_SECONDS):
                ticked = await self._call(
                    "tick", interval_seconds=self.interval.total_seconds(), replica=self.replica
                )
        except (LearningError, TimeoutError) as error:
            if not self._is_told:
                emit("clock_unavailable", clock=self.name, reason=_shortly(error))
            self._is_told = True
            return
        if self._is_told:
            emit("clock_recovered", clock=self.name)
            self._is_told = False
        if ticked["claimed"]:
            emit("clock_ticked", clock=self.name, slot=ticked["slot"])
        if self._stopping.is_set():
            return
        if not isinstance(self._database, SupabaseDatabase):
            self._worker = clock_workers.of(self._database, self._settings.stalled_after)
            self._worker.serve(self._settings.tenant, self.name, ticked["queue"], self.work)
        elif ticked["open"] and not self._working:
            self._direct = asyncio.create_task(self._work_directly())

    async def _work_directly(self) -> None:
        try:
            await self._work_until_done()
        except LearningError as error:
            emit("clock_unavailable", clock=self.name, reason=_shortly(error))

    async def _call(self, function: str, **arguments: Any) -> Any:
        return await self._database.call(function, self._identity, the_clock=self.name, **arguments)

    # --- working

    async def _work_until_done(self) -> None:
        working = asyncio.create_task(self._work())
        self._working.add(working)
        working.add_done_callback(self._working.discard)
        await working

    async def _work(self) -> None:
        while not self._stopping.is_set():
            taken = await self._call(
                "take_tick",
                worker=self.replica,
                lease_seconds=self._settings.stalled_after.total_seconds(),
                attempts_max=_ATTEMPTS_MAX,
            )
            if taken is None:
                return
            if taken["state"] == "failed":
                emit(
                    "tick_failed",
                    clock=self.name,
                    slot=taken["slot"],
                    attempts=taken["attempt"],
                    error=taken["error"] or "each worker that began it went away",
                )
                continue
            tick = Tick(
                clock=self.name,
                tenant_id=self._settings.tenant,
                slot=datetime.fromisoformat(taken["slot"]),
                attempt=taken["attempt"],
                _stopping=self._stopping,
            )
            if not await self._do(tick):
                return

    async def _do(self, tick: Tick) -> bool:
        """Run the cycle and tell how it ended. `False`: the tick is open still, or somebody else's."""
        running = self._running = asyncio.create_task(self._call_cycle(tick))
        keeping = asyncio.create_task(self._keep(tick, running))
        limit = max(self.interval * _CYCLE_INTERVALS, _CYCLE_TIME_MIN)
        try:
            await asyncio.wait({running}, timeout=limit.total_seconds())
            is_late = not running.done()
        except asyncio.CancelledError:  # the worker leaves and has waited long enough
            await _cancel(running)
            if running.done() and not running.cancelled() and running.exception() is None:
                await self._finish(tick, "done")
            else:
                await self._finish(tick, "todo")
            raise
        finally:
            is_ours = not keeping.done()
            await _cancel(keeping)
        await _cancel(running)
        self._running = None
        if not is_ours:
            emit("tick_lost", clock=self.name, slot=tick.slot.isoformat(), attempt=tick.attempt)
            return False
        if is_late:
            return await self._try_again(tick, f"TimeoutError: its cycle took longer than {limit}")
        error = asyncio.CancelledError() if running.cancelled() else running.exception()
        if error is None:
            return await self._finish(tick, "done")
        if isinstance(error, HandedBack | asyncio.CancelledError):
            await self._finish(tick, "todo")
            return False
        return await self._try_again(tick, _shortly(error))

    async def _call_cycle(self, tick: Tick) -> None:
        with telemetry.span(
            f"tick {tick.clock}", {"learning.clock": tick.clock, "learning.attempt": tick.attempt}
        ):
            await self._cycle(tick)

    async def _keep(self, tick: Tick, running: asyncio.Task[None]) -> None:
        """Keep the lease while the cycle runs; where the tick is somebody else's by now, end the cycle and itself."""
        lease = self._settings.stalled_after.total_seconds()
        is_kept = True
        while is_kept:
            await asyncio.sleep(lease / 3)
            try:
                is_kept = await self._call(
                    "keep_tick", slot=tick.slot.isoformat(), attempt=tick.attempt, lease_seconds=lease
                )
            except LearningError:
                continue  # whoever else can reach it takes the tick over, and a later look tells
        running.cancel()

    async def _try_again(self, tick: Tick, error: str) -> bool:
        is_last = tick.attempt >= _ATTEMPTS_MAX
        if is_last:
            emit(
                "tick_failed",
                clock=self.name,
                slot=tick.slot.isoformat(),
                attempts=tick.attempt,
                error=error,
            )
            return await self._finish(tick, "failed", error=error)
        delay = min(_RETRY_SECONDS * 2 ** (tick.attempt - 1), self.interval.total_seconds() / 4)
        emit(
            "tick_attempt_failed",
            clock=self.name,
            slot=tick.slot.isoformat(),
            attempt=tick.attempt,
            next_in_seconds=delay,
            error=error,
        )
        await self._finish(tick, "todo", error=error, delay_seconds=delay)
        return False

    async def _finish(self, tick: Tick, state: str, **details: Any) -> bool:
        """Write how it ended, for as long as the lease holds where the database is away. `False`: it is not ours."""
        end = asyncio.get_running_loop().time() + self._settings.stalled_after.total_seconds()
        while True:
            try:
                is_ours = await self._call(
                    "finish_tick",
                    slot=tick.slot.isoformat(),
                    attempt=tick.attempt,
                    the_state=state,
                    **details,
                )
            except DatabaseUnavailable:
                if self._stopping.is_set() or asyncio.get_running_loop().time() > end:
                    is_ours = False
                else:
                    await asyncio.sleep(1.0)
                    continue
            if not is_ours:
                emit("tick_lost", clock=self.name, slot=tick.slot.isoformat(), attempt=tick.attempt)
            return bool(is_ours)

    # --- stopping

    async def _stop(self) -> None:
        scheduler, self._scheduler = self._scheduler, None
        if scheduler is None:
            return
        self._stopping.set()
        scheduler.shutdown(wait=False)
        running = self._running
        if running is not None and not running.done():
            await asyncio.wait({running}, timeout=self._settings.exit_timeout.total_seconds())
            await _cancel(running)
        if self._working:
            await asyncio.wait(self._working, timeout=_CLEANUP_SECONDS)
        for working in tuple(self._working):
            await _cancel(working)
        worker, self._worker = self._worker, None
        if worker is not None and worker.leave(self._settings.tenant, self.name, self.work):
            await clock_workers.end(worker)
        portal().forget(self._finish_at_exit)
        try:
            async with asyncio.timeout(_CLEANUP_SECONDS):
                await self._call("leave_clock", replica=self.replica)
        except (LearningError, TimeoutError):
            return  # it is not heard of any more, which tells the same a little later

    def _finish_at_exit(self) -> None:
        seconds = self._settings.exit_timeout.total_seconds() + 3 * _CLEANUP_SECONDS
        try:
            portal().submit(self._stop()).result(seconds)
        except FutureTimeoutError:
            emit("clock_unavailable", clock=self.name, reason="it did not end with its process")


async def _cancel(task: asyncio.Task[None]) -> None:
    """Cancel it and wait a little for its end."""
    if not task.done():
        task.cancel()
        await asyncio.wait({task}, timeout=_CLEANUP_SECONDS)


def _shortly(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:_TOLD_MAX]
