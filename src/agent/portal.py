"""One event loop of our own per process, in a thread of its own, where all our I/O is done (D14).

Hooks come from any loop and from no loop: from `asyncio.run` called twice, from worker threads, from the loops of
`langgraph dev`. Pools and clients belong to one loop, so ours live here; sync and async callers both hand work over.
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures.thread  # registers its own exit first: see portal()
import contextlib
import contextvars
import os
import threading
import weakref
from collections.abc import Callable, Coroutine
from typing import Any, Protocol, TypeVar

T = TypeVar("T")

_GIVE_UP_SECONDS = 1.0


class Portal:
    """A running event loop in a daemon thread."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.loop = asyncio.new_event_loop()
        self._at_exit: list[Callable[[], None]] = []
        self._thread = threading.Thread(target=self._run, name="agent-learning", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()

    def submit(
        self, work: Coroutine[Any, Any, T], *, context: contextvars.Context | None = None
    ) -> concurrent.futures.Future[T]:
        """Start the work in the portal and return at once.

        It runs in a fresh context unless one is given: a caller's LangChain callbacks and configuration must not reach
        our own calls. Cancelling the future cancels the work.
        """
        result: concurrent.futures.Future[T] = concurrent.futures.Future()

        def start() -> None:
            task = self.loop.create_task(work)

            def deliver(done: asyncio.Task[T]) -> None:
                if result.cancelled():
                    if not done.cancelled():
                        done.exception()  # retrieved, so that the loop does not report it
                    return
                if done.cancelled():
                    result.cancel()
                elif (error := done.exception()) is not None:
                    result.set_exception(error)
                else:
                    result.set_result(done.result())

            def withdraw(future: concurrent.futures.Future[T]) -> None:
                if future.cancelled():
                    self.loop.call_soon_threadsafe(task.cancel)

            task.add_done_callback(deliver)
            result.add_done_callback(withdraw)

        self.loop.call_soon_threadsafe(start, context=context or contextvars.Context())
        return result

    async def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Do the work in the portal and await it here, in whatever loop this is."""
        if asyncio.get_running_loop() is self.loop:
            return await work
        return await asyncio.wrap_future(self.submit(work))

    def run_sync(self, work: Coroutine[Any, Any, T], *, context: contextvars.Context | None = None) -> T:
        """Do the work in the portal and wait for it in this thread."""
        if threading.current_thread() is self._thread:
            work.close()
            raise RuntimeError("the sync door was used inside the portal, where it would wait for itself")
        return self.submit(work, context=context).result()

    def at_exit(self, finish: Callable[[], None]) -> None:
        """Call `finish` when the interpreter exits, while the portal still runs."""
        self._at_exit.append(finish)

    def forget(self, finish: Callable[[], None]) -> None:
        """Do not call `finish` any more."""
        if finish in self._at_exit:
            self._at_exit.remove(finish)

    def leave(self) -> None:
        """Finish what is to be finished; called once, by the interpreter."""
        if self.pid != os.getpid():
            return
        for finish in list(reversed(self._at_exit)):
            finish()
        self._at_exit.clear()

    def give_up(self) -> None:
        """Cancel what runs here still, when the interpreter exits: left as it is, the loop would complain of it."""
        if self.pid != os.getpid():
            return

        async def cancel() -> None:
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)

        with contextlib.suppress(
            concurrent.futures.TimeoutError
        ):  # it computes: then it ends with the process
            self.submit(cancel()).result(_GIVE_UP_SECONDS)


class Forkable(Protocol):
    """What holds connections, tasks or locks of a portal."""

    def start_anew(self) -> None:
        """Forget them, in a child that was forked: they are the parent's, and so are their sockets."""


_portals: dict[int, Portal] = {}
_workbenches: dict[int, Portal] = {}
_lock = threading.Lock()
_forkable: weakref.WeakSet[Forkable] = weakref.WeakSet()
_of_the_parent: list[Any] = []


def forget_in_forked_child(owner: Forkable) -> None:
    """Call `start_anew` of this object in every child that is forked from now on."""
    _forkable.add(owner)


def _leave_to_the_parent() -> None:
    """In a forked child: touch nothing that the parent goes on using.

    What it has is kept and never used: a coroutine or a connection that is collected would close or unregister a
    socket that both have.
    """
    global _lock  # noqa: PLW0603 - another thread of the parent may have held it
    _lock = threading.Lock()
    for found in (*_portals.values(), *_workbenches.values()):
        _of_the_parent.append(found)
        # The child's own copy of the selector: from here on nothing can be unregistered in the parent's.
        getattr(found.loop, "_selector", found.loop).close()
    _portals.clear()
    _workbenches.clear()
    for owner in list(_forkable):
        _of_the_parent.append(dict(vars(owner)))
        owner.start_anew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_to_the_parent)


def portal() -> Portal:
    """The portal of this process; a forked child gets one of its own."""
    found = _portals.get(os.getpid())
    if found is None:
        with _lock:
            found = _portals.get(os.getpid())
            if found is None:
                found = _portals[os.getpid()] = Portal()
                # Before the thread pools stop: without them no host name is resolved and no model is called. What is
                # registered last runs first, and `atexit` would be too late.
                getattr(threading, "_register_atexit", atexit.register)(found.leave)
    return found


def workbench() -> Portal:
    """A second loop of this process, for background work that computes for long: in the portal the calls of agents
    would wait for it.

    Nothing is finished in it when the interpreter exits: who hands work over waits for its end in the portal, and what
    nobody waits for is cancelled after that.
    """
    found = _workbenches.get(os.getpid())
    if found is None:
        with _lock:
            found = _workbenches.get(os.getpid())
            if found is None:
                found = _workbenches[os.getpid()] = Portal()
                atexit.register(found.give_up)  # later than the portal's `leave`
    return found
