"""The small worker inside a process, so that one line of code is enough to learn."""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import weakref
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from agent.database.supabase import SupabaseDatabase
from agent.errors import DatabaseUnavailable, LearningError
from agent.events import emit
from agent.identity import Identity
from agent.portal import portal
from agent.settings import WorkerMode

if TYPE_CHECKING:
    from agent.jobs import Worker
    from agent.learning.machine import LearningMachine

_OVERDUE_SECONDS = 10.0
"""In `auto` mode: how late the worker elsewhere may be before this process helps itself."""
_LOOK_SECONDS = 5.0
_RECORDING_SECONDS_MAX = 15.0  # a run that is not recorded in ten is on disk then
_SESSIONS_MAX = 10_000  # noted at once: where another process learns, this one is not told when they are done
_POLL_SECONDS = 0.05


class InProcessWorker:
    """Learns what this process recorded, unless another worker is alive and does. Runs in the portal.

    Over Supabase's web interface there is no queue to work on: what this process recorded is then learned by it
    directly, and the orders in the queue are found done by whatever worker comes along.
    """

    def __init__(self, machine: LearningMachine) -> None:
        self._machine = machine
        self._users: weakref.WeakSet[LearningMachine] = weakref.WeakSet()
        self._sessions: dict[tuple[str, str | None, str | None], Identity] = {}
        self._generations: dict[tuple[str, str | None, str | None], int] = {}
        self._timers: dict[tuple[str, str | None, str | None], asyncio.TimerHandle] = {}
        self._watching: asyncio.Task[None] | None = None
        self._working: asyncio.Task[None] | None = None
        self._learning: set[asyncio.Task[None]] = set()
        self._registered = False
        self._worker: Worker | None = None
        self._leaving = False

    def used_by(self, machine: LearningMachine) -> None:
        """Count a machine among those whose runs are learned here, until it leaves or is gone."""
        self._users.add(machine)

    async def left_by(self, machine: LearningMachine) -> None:
        """Stop when the last machine leaves."""
        self._users.discard(machine)
        if not self._users:
            await self.stop()

    async def _recorded_all(self) -> None:
        for machine in {self._machine, *self._users}:
            await machine.recorded_all()

    async def recorded(self, identity: Identity) -> None:
        """Take note of a run that was recorded or spooled here."""
        key = _key(identity)
        self._sessions[key] = identity
        self._generations[key] = self._generations.get(key, 0) + 1
        if len(self._sessions) > _SESSIONS_MAX:
            oldest = next(iter(self._sessions))
            del self._sessions[oldest], self._generations[oldest]
        if self._machine.settings.worker is WorkerMode.OFF:
            return
        await self.start()
        # A user's token may not learn: then a server's worker does.
        if isinstance(self._machine.database, SupabaseDatabase) and self._machine.claimed_identity is None:
            self._learn_after_quiet(key)

    async def start(self) -> None:
        """Be ready to learn, and start working where nobody else does."""
        if self._machine.settings.worker is WorkerMode.OFF:
            return
        self.register()
        if not isinstance(self._machine.database, SupabaseDatabase) and (
            self._watching is None or self._watching.done()
        ):
            self._watching = asyncio.create_task(self._watch())

    def register(self) -> None:
        """Have the end of the process wait for what is under way here."""
        if not self._registered:
            self._registered = True
            portal().at_exit(self._finish)

    def generation(self, identity: Identity) -> int:
        """How often something of this session was recorded here; to be handed to `learned`."""
        return self._generations.get(_key(identity), 0)

    def learned(self, identity: Identity, generation: int) -> None:
        """A session has nothing left to learn, unless more was recorded since that generation was read."""
        if self.generation(identity) == generation:
            self._sessions.pop(_key(identity), None)
            self._generations.pop(_key(identity), None)

    def _learn_after_quiet(self, key: tuple[str, str | None, str | None]) -> None:
        if key in self._timers:
            self._timers[key].cancel()
        quiet = self._machine.settings.quiet_period.total_seconds()
        self._timers[key] = asyncio.get_running_loop().call_later(quiet, self._start_learning, key)

    def _start_learning(self, key: tuple[str, str | None, str | None]) -> None:
        self._timers.pop(key, None)
        task = asyncio.create_task(self._learn_directly(key))
        self._learning.add(task)
        task.add_done_callback(self._learning.discard)

    async def _learn_directly(self, key: tuple[str, str | None, str | None]) -> None:
        identity = self._sessions.get(key)
        if identity is None:
            return
        try:
            await self._machine.recorder.deliver_spooled()
            await self._machine.learn_session(identity)
        except LearningError as error:
            emit("learning_failed", **identity.as_json(), error=str(error))

    async def _watch(self) -> None:
        """Start working when nobody else does; look again from time to time."""
        while self._working is None or self._working.done():
            if self._machine.settings.worker is WorkerMode.INSIDE or not await self._another_works():
                if self._working is None or self._working.done():  # `drain` may have been quicker
                    self._working = asyncio.create_task(self._work())
                return
            await asyncio.sleep(_LOOK_SECONDS)

    async def _another_works(self) -> bool:
        try:
            state = await self._machine.database.call("queue_state", the_queue=self._machine.queue)
        except LearningError:
            return True  # not now; the next look may tell
        return bool(state["workers"] > 0 and state["overdue_seconds"] < _OVERDUE_SECONDS)

    async def _work(self) -> None:
        from agent.jobs import Worker, run_forever

        try:
            url = await self._machine.queue_url()
            self._worker = Worker(
                url,
                [self._machine],
                queues=[self._machine.queue],
                concurrency=2,
                stalled_after=self._machine.settings.stalled_after,
            )
            if self._leaving:
                return
            await run_forever(self._worker)
        except Exception as error:  # noqa: BLE001 - the owner of this task is nobody's caller: it must be heard
            emit("worker_failed", error=f"{type(error).__name__}: {error}")

    async def drain(self, timeout: timedelta) -> bool:
        """See `LearningMachine.drain`."""
        try:
            async with asyncio.timeout(timeout.total_seconds()):
                await self._recorded_all()
                if isinstance(self._machine.database, SupabaseDatabase):
                    return await self._drain_directly()
                return await self._drain_queue()
        except TimeoutError:
            return False

    async def _drain_directly(self) -> bool:
        if self._machine.claimed_identity is not None:
            await self._machine.recorder.deliver_spooled()
            return not self._sessions
        for key in list(self._sessions):
            if key in self._timers:
                self._timers.pop(key).cancel()
            await self._learn_directly(key)
        await asyncio.gather(*self._learning)
        return not self._sessions

    async def _drain_queue(self) -> bool:
        while True:
            try:
                await self._machine.recorder.deliver_spooled()
                sessions = [identity.as_json() for identity in self._sessions.values()]
                if not sessions and not self._machine.recorder.spool.count():
                    return True
                state = await self._machine.database.call("expedite_learning", sessions=sessions)
                if state["waiting"] == state["delayed"] and not self._machine.recorder.spool.count():
                    return not state["waiting"] and await self._nothing_waits()
                if self._machine.settings.worker is not WorkerMode.OFF and (
                    self._working is None or self._working.done()
                ):
                    self._working = asyncio.create_task(self._work())
            except DatabaseUnavailable:
                await asyncio.sleep(1.0)
            await asyncio.sleep(_POLL_SECONDS)

    async def _nothing_waits(self) -> bool:
        """Whether all sessions noted here are learned; a job that failed for good leaves its runs waiting."""
        for identity in list(self._sessions.values()):
            generation = self.generation(identity)
            pending = await self._machine.database.call(
                "pending_learning", identity, run_limit=1, memory_limit=1
            )
            if pending["runs"]:
                return False
            self.learned(identity, generation)
        return True

    async def stop(self) -> None:
        """Leave: take no more jobs; those at hand get a few seconds, then they are left to be rescued."""
        self._leaving = True
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
        for task in (self._watching, *self._learning):
            if task is not None:
                task.cancel()
        # Asked and not cancelled: a queue that is cancelled while it opens leaves connections behind.
        if self._worker is not None:
            self._worker.stop(self._machine.settings.exit_timeout)
        tasks = [task for task in (self._watching, self._working, *self._learning) if task is not None]
        await asyncio.gather(*tasks, return_exceptions=True)
        self._watching = self._working = self._worker = None
        self._leaving = False
        portal().forget(self._finish)
        self._registered = False

    async def _close_all(self) -> None:
        await self.stop()
        await self._machine.database.close()

    def _finish(self) -> None:
        """At exit of the process: record what is to be recorded, learn what can be learned in the time given, leave."""
        seconds = self._machine.settings.exit_timeout.total_seconds()
        try:
            portal().submit(self._recorded_all()).result(_RECORDING_SECONDS_MAX)
            if seconds and self._machine.settings.worker is not WorkerMode.OFF:
                portal().submit(self.drain(timedelta(seconds=seconds))).result(seconds + 1)
            portal().submit(self._close_all()).result(5)
        except (concurrent.futures.TimeoutError, concurrent.futures.CancelledError, LearningError):
            emit("exit_before_learned", sessions=len(self._sessions))


_shared: weakref.WeakValueDictionary[tuple[Any, ...], InProcessWorker] = weakref.WeakValueDictionary()


def shared_worker(machine: LearningMachine, learns_like: tuple[Any, ...]) -> InProcessWorker:
    """The worker of this process for machines on one database and queue that learn alike."""
    # A forked child has workers of its own.
    key = (os.getpid(), id(machine.database), machine.queue, machine.settings, *learns_like)
    worker = _shared.get(key)
    if worker is None:
        worker = _shared[key] = InProcessWorker(machine)
    return worker


def _key(identity: Identity) -> tuple[str, str | None, str | None]:
    return (identity.tenant_id, identity.user_id, identity.session_id)
