"""The worker of the clocks of a process: one per database, from the first clock that starts to the last that stops."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Final

from agent.database.opening import queue_url
from agent.events import emit
from agent.jobs import Worker, run_forever
from agent.portal import forget_in_forked_child

if TYPE_CHECKING:
    from agent.database import Database

_GRACE: Final = timedelta(seconds=3)
"""How long jobs at hand get when the last clock stops; by then their cycles are over."""
_CLEANUP_SECONDS: Final = 5.0
_CONCURRENCY: Final = 1000  # no clock waits for another; of each clock there is one job at a time
_TOLD_MAX: Final = 300

DoTicks = Callable[[], Awaitable[None]]
"""Does the open ticks of a clock."""


class ClockWorker:
    """Takes the jobs of the clocks of a process on one database, over one connection. All of it in the portal."""

    def __init__(self, database: Database, stalled_after: timedelta) -> None:
        self._database = database
        self._stalled_after = stalled_after
        self._served: dict[tuple[str, str], list[DoTicks]] = {}
        # Here the worker looks up whose job it has: of clocks with one name and tenant the first does it.
        self._first: dict[tuple[str, str], DoTicks] = {}
        self._queues: dict[tuple[str, str], str] = {}
        self._worker: Worker | None = None
        self._working: asyncio.Task[None] | None = None
        self._is_leaving = False

    def serve(self, tenant: str, clock: str, queue: str, do_ticks: DoTicks) -> None:
        """Take a clock's jobs; again is no matter, and begins anew where the worker failed."""
        key = (tenant, clock)
        served = self._served.setdefault(key, [])
        if do_ticks not in served:
            served.append(do_ticks)
        self._first[key] = served[0]
        self._queues[key] = queue
        if self._working is None or self._working.done():
            self._worker = None
            self._working = asyncio.create_task(self._work())
        elif self._worker is not None:
            self._worker.serve(queue)

    def leave(self, tenant: str, clock: str, do_ticks: DoTicks) -> bool:
        """Take no more jobs for this one. Returns whether nobody is left to work for."""
        key = (tenant, clock)
        served = self._served.get(key, [])
        if do_ticks in served:
            served.remove(do_ticks)
        if served:
            self._first[key] = served[0]
        elif self._served.pop(key, None) is not None:
            del self._first[key]
            queue = self._queues.pop(key)
            if self._worker is not None:
                self._worker.leave(queue)
        return not self._served

    async def stop(self) -> None:
        """End, and unregister from the queue where it can be reached."""
        self._is_leaving = True
        if self._working is None:
            return
        # Asked and not cancelled: a queue that is cancelled while it opens leaves connections behind.
        if self._worker is not None:
            self._worker.stop(_GRACE)
        await asyncio.wait({self._working}, timeout=_GRACE.total_seconds() + _CLEANUP_SECONDS)
        if not self._working.done():
            self._working.cancel()
            await asyncio.wait({self._working}, timeout=_CLEANUP_SECONDS)

    async def _work(self) -> None:
        try:
            url = await queue_url(self._database)
            if self._is_leaving:
                return
            self._worker = Worker(
                url,
                [],
                queues=list(self._queues.values()),
                concurrency=_CONCURRENCY,
                stalled_after=self._stalled_after,
                database=self._database,
                clocks=self._first,
            )
            await run_forever(self._worker)
        except Exception as error:  # noqa: BLE001 - nobody awaits it while clocks run; a later beat of them begins anew
            emit("worker_failed", error=f"{type(error).__name__}: {error}"[:_TOLD_MAX])


class ClockWorkers:
    """The workers of the clocks of this process."""

    def __init__(self) -> None:
        self.start_anew()
        forget_in_forked_child(self)

    def start_anew(self) -> None:
        """In a forked child: they are the parent's."""
        self._workers: dict[tuple[int, timedelta], ClockWorker] = {}

    def of(self, database: Database, stalled_after: timedelta) -> ClockWorker:
        """The worker for clocks on this database, made where there is none."""
        key = (id(database), stalled_after)  # the worker holds the database, so that no other has its id
        found = self._workers.get(key)
        if found is None:
            found = self._workers[key] = ClockWorker(database, stalled_after)
        return found

    async def end(self, worker: ClockWorker) -> None:
        """End one that has nobody left to work for; a clock that starts meanwhile gets a new one."""
        self._workers = {key: found for key, found in self._workers.items() if found is not worker}
        await worker.stop()


clock_workers: Final = ClockWorkers()
