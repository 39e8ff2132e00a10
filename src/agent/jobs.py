"""The queue and its workers (procrastinate) and the clock beside them (APScheduler) (D7)."""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, LiteralString

import procrastinate
import procrastinate.worker
import psycopg
from apscheduler.schedulers.asyncio import AsyncIOScheduler

from agent.errors import ConfigurationError, ConflictError, DatabaseUnavailable, LearningError, ModelError
from agent.events import emit
from agent.identity import Identity

if TYPE_CHECKING:
    from agent.database import Database
    from agent.learning.machine import LearningMachine

ClockWork = Mapping[tuple[str, str], Callable[[], Awaitable[None]]]
"""By tenant and name of a clock: does its open ticks."""

LEARN_SESSION = "agent.learn_session"
TICK = "agent.tick"
DEFAULT_QUEUE = "learning"
_ATTEMPTS_MAX = 6
_RETRY_SECONDS = 10.0
_OTHERS_CLOCK_SECONDS = 2
_HEARTBEATS_BEFORE_STALLED = 3
_SPOOL_INTERVAL = timedelta(seconds=15)
_FETCH_INTERVAL_SECONDS = 1.0
_REGISTERED_SECONDS = 0.02  # how often to look whether the queue knows a new worker
_CANCEL_AGAIN_SECONDS = 0.2
_CONNECTIONS_MAX = 4
_CONNECTION_SECONDS_MAX = 10.0  # without one for so long the database is away
_GRACE = timedelta(seconds=60)


async def learn_session(
    machine: LearningMachine, identity: Identity, attempt: int, queue: str | None = None
) -> None:
    """Learn what waits in one session; order it again, later, where that failed for a reason that may pass.

    Raises:
        LearningError: it failed for good; the runs go on waiting for the next run of their session.
    """
    try:
        await machine.learn_session(identity)
    except (ModelError, ConflictError, DatabaseUnavailable) as error:
        if attempt >= _ATTEMPTS_MAX:
            emit("learning_failed", **identity.as_json(), attempts=attempt, error=str(error))
            raise
        # Those that met in a conflict must not come back together.
        delay = _RETRY_SECONDS * 2 ** (attempt - 1) * random.uniform(1.0, 1.5)  # noqa: S311 - no secret
        emit(
            "learning_attempt_failed",
            **identity.as_json(),
            attempt=attempt,
            next_in_seconds=delay,
            error=str(error),
        )
        await machine.database.call(
            "retry_learning",
            identity,
            the_queue=queue or machine.queue,
            delay_seconds=delay,
            attempt=attempt + 1,
        )
    except LearningError as error:
        emit("learning_failed", **identity.as_json(), attempts=attempt, error=str(error))
        raise
    except Exception as error:  # a fault of ours or of a store: the queue only logs it
        emit(
            "learning_failed",
            **identity.as_json(),
            attempts=attempt,
            error=f"{type(error).__name__}: {error}",
        )
        raise


class _Connector(procrastinate.PsycopgConnector):
    """Says once more what a lost connection may have kept from the queue: that a job is done, or that a worker lives.

    Without it the job would stay with a worker that lives on and never looks at it again.
    """

    async def execute_query_async(self, query: LiteralString, **arguments: Any) -> None:
        try:
            await super().execute_query_async(query, **arguments)
        except procrastinate.exceptions.ConnectorException as error:
            if not isinstance(error.__cause__, psycopg.OperationalError):
                raise
            await super().execute_query_async(query, **arguments)


def ends_quietly(work: Callable[[], Awaitable[None]]) -> Callable[[], Awaitable[None]]:
    """For APScheduler, which cancels what runs when it is shut down and would log that as an error."""

    async def run() -> None:
        with contextlib.suppress(asyncio.CancelledError):
            await work()

    return run


class _OthersClock(Exception):
    """The job is for a clock of other processes: a worker of all queues took it and gives it back."""


@contextlib.asynccontextmanager
async def queue_app(
    url: str, machines: Sequence[LearningMachine], clocks: ClockWork | None = None
) -> AsyncIterator[procrastinate.App]:
    """The queue of a database, with the task that learns and the one that does ticks.

    A session goes to the machine of its queue, else to the first.
    """
    by_queue = {machine.queue: machine for machine in machines}

    async def configure(connection: psycopg.AsyncConnection[Any]) -> None:
        # Only what is Postgres's and the queue's own: who may create things elsewhere must not run them as the worker.
        await connection.execute("SET search_path = pg_catalog, agent_queue, pg_temp")
        await connection.commit()

    connector = _Connector(
        conninfo=url,
        configure=configure,
        min_size=1,
        max_size=_CONNECTIONS_MAX if machines else 1,
        timeout=_CONNECTION_SECONDS_MAX,
        kwargs={"connect_timeout": 5, "fallback_application_name": "agent-queue"},
        name="agent-queue",
    )
    app = procrastinate.App(connector=connector)

    @app.task(name=LEARN_SESSION, queue=DEFAULT_QUEUE, pass_context=True)
    async def learn(
        context: procrastinate.JobContext, identity: dict[str, str], first_at: str = "", attempt: int = 1
    ) -> None:
        machine = by_queue.get(context.job.queue) or machines[0]
        await learn_session(machine, Identity.from_json(identity), attempt, context.job.queue)

    gives_back = procrastinate.RetryStrategy(wait=_OTHERS_CLOCK_SECONDS, retry_exceptions=[_OthersClock])

    @app.task(name=TICK, retry=gives_back)
    async def tick(identity: dict[str, str], clock: str) -> None:
        work = None if clocks is None else clocks.get((identity["tenant_id"], clock))
        if work is None:
            raise _OthersClock(clock)
        await work()

    async with app.open_async():
        yield app


class Worker:
    """Takes jobs of some queues and does them with the machines and clocks given, until it is stopped.

    Beside it a clock gives the jobs of dead workers to the living and delivers spooled runs.

    One without machines does ticks alone: minutes lie between them, so it listens for no notifications, looks once a
    second, and needs one connection.

    Args:
        url: the Postgres that holds the queue.
        machines: who learns sessions.
        queues: those to work on; `None`: all.
        concurrency: jobs at the same time.
        stalled_after: a worker without a heartbeat for so long is taken for dead.
        database: the same database, where there are clocks and no machines.
        clocks: who does ticks.
    """

    def __init__(
        self,
        url: str,
        machines: Sequence[LearningMachine],
        *,
        queues: Sequence[str] | None,
        concurrency: int,
        stalled_after: timedelta,
        database: Database | None = None,
        clocks: ClockWork | None = None,
    ) -> None:
        if database is None:
            if not machines:
                raise ConfigurationError("a worker needs at least one LearningMachine, or a database")
            database = machines[0].database
        if concurrency < 1:
            raise ConfigurationError(f"concurrency={concurrency!r} must be at least 1")
        self._url = url
        self._machines = machines
        self._database = database
        self._clocks = clocks
        self._queues = None if queues is None else list(queues)
        self._queues_changed = asyncio.Event()
        self._concurrency = concurrency
        self._stalled_after = stalled_after
        self._stopping = asyncio.Event()
        self._grace = timedelta(seconds=1)

    def stop(self, grace: timedelta) -> None:
        """Take no more jobs; those at hand get this long, then are left to be rescued. For the worker's own loop."""
        self._grace = grace
        self._stopping.set()

    def serve(self, queue: str) -> None:
        """Work on this queue too, within a second; one of all queues does already. For the worker's own loop."""
        if self._queues is not None and queue not in self._queues:
            self._queues.append(queue)
            self._queues_changed.set()

    def leave(self, queue: str) -> None:
        """Take no more jobs of this queue."""
        if self._queues is not None and queue in self._queues:
            self._queues.remove(queue)
            self._queues_changed.set()

    @property
    def stopping(self) -> bool:
        """Whether it was asked to stop."""
        return self._stopping.is_set()

    async def rest(self, seconds: float) -> None:
        """Wait so long, or until asked to stop."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._stopping.wait(), seconds)

    async def run(self) -> None:
        """Work until asked to stop, or until the queue cannot be worked on, and raise why."""
        heartbeat = self._stalled_after.total_seconds() / _HEARTBEATS_BEFORE_STALLED
        async with queue_app(self._url, self._machines, self._clocks) as app:
            clock = AsyncIOScheduler(timezone="UTC")
            interval = max(self._stalled_after.total_seconds() / 2, 0.5)
            clock.add_job(
                ends_quietly(self._rescue), "interval", seconds=interval, max_instances=1, coalesce=True
            )
            clock.add_job(
                ends_quietly(self._deliver),
                "interval",
                seconds=_SPOOL_INTERVAL.total_seconds(),
                max_instances=1,
                coalesce=True,
            )
            await self._rescue()
            await self._retry_failed()
            await self._deliver()
            worker = procrastinate.worker.Worker(
                app,
                queues=self._queues,
                concurrency=self._concurrency,
                install_signal_handlers=False,
                fetch_job_polling_interval=_FETCH_INTERVAL_SECONDS,
                update_heartbeat_interval=heartbeat,
                stalled_worker_timeout=self._stalled_after.total_seconds(),
                listen_notify=bool(self._machines),
                delete_jobs="successful",
            )
            working = asyncio.create_task(worker.run())  # type: ignore[no-untyped-call]
            asked = asyncio.create_task(self._stopping.wait())
            saying = asyncio.create_task(self._say_queues(app, worker))
            clock.start()
            try:
                await asyncio.wait({working, asked, saying}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                clock.shutdown(wait=False)
                asked.cancel()
                while not saying.done():  # a query that ends just then keeps a cancellation to itself
                    saying.cancel()
                    await asyncio.wait({saying}, timeout=_CANCEL_AGAIN_SECONDS)
                # The first cancellation lets jobs at hand finish, the second does not; one may come too early to count.
                while not working.done():
                    working.cancel()
                    await asyncio.wait({working}, timeout=self._grace.total_seconds())
            if not self.stopping:
                if not saying.cancelled():
                    saying.result()
                working.result()

    async def _say_queues(self, app: procrastinate.App, worker: procrastinate.worker.Worker) -> None:
        """Let others see for which queues this worker lives, as long as it does."""
        while worker.worker_id is None:  # noqa: ASYNC110 - nobody is told when the queue knows it
            await asyncio.sleep(_REGISTERED_SECONDS)
        while self._queues is not None:
            self._queues_changed.clear()
            await app.connector.execute_query_async(
                "INSERT INTO agent_queue.agent_worker (worker_id, queues) VALUES (%(worker_id)s, %(queues)s) "
                "ON CONFLICT (worker_id) DO UPDATE SET queues = excluded.queues",
                worker_id=worker.worker_id,
                queues=list(self._queues),
            )
            await self._queues_changed.wait()
        await asyncio.Event().wait()

    async def _rescue(self) -> None:
        try:
            rescued = await self._database.call(
                "rescue_learning", stalled_seconds=self._stalled_after.total_seconds()
            )
        except DatabaseUnavailable:
            return  # the next tick tries again
        if rescued:
            emit("jobs_rescued", jobs=rescued)

    async def _retry_failed(self) -> None:
        queues = list(self._queues) if self._queues is not None else None
        again = await self._database.call("retry_failed_learning", the_queues=queues)
        if again:
            emit("jobs_retried", jobs=again)

    async def _deliver(self) -> None:
        for machine in self._machines:
            await machine.recorder.deliver_spooled()


async def run_forever(worker: Worker) -> None:
    """Run a worker until it is asked to stop; start it again when the database comes back after it was away."""
    pause = 1.0
    while not worker.stopping:
        started = asyncio.get_running_loop().time()
        try:
            await worker.run()
            reason = "it stopped by itself"
        except (
            psycopg.OperationalError,
            procrastinate.exceptions.ConnectorException,
            DatabaseUnavailable,
        ) as error:
            reason = type(error).__name__
        if worker.stopping:
            return
        if asyncio.get_running_loop().time() - started > 60:
            pause = 1.0
        emit("worker_database_unavailable", reason=reason, again_in_seconds=pause)
        await worker.rest(pause)
        pause = min(pause * 2, 30.0)


async def run_workers(
    machines: Sequence[LearningMachine], *, concurrency: int = 4, clocks: ClockWork | None = None
) -> None:
    """What `agent worker` does: work for all queues until SIGTERM or SIGINT, finish the jobs at hand, leave.

    A worker of all queues also takes the ticks of `clocks`; those of other clocks it gives back after a moment.

    Raises:
        ConfigurationError: the machines have no Postgres to work on.
    """
    machine = machines[0]
    worker = Worker(
        await machine.queue_url(),
        machines,
        queues=None,
        concurrency=concurrency,
        stalled_after=machine.settings.stalled_after,
        clocks=clocks,
    )
    loop = asyncio.get_running_loop()
    signals = (signal.SIGTERM, signal.SIGINT)
    for number in signals:
        loop.add_signal_handler(number, worker.stop, _GRACE)
    try:
        await run_forever(worker)
    finally:
        for number in signals:
            loop.remove_signal_handler(number)
