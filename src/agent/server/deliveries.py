"""Work that goes on in the portal after a request was answered: chats want their answer within seconds."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Callable, Coroutine
from typing import Any

from agent.portal import portal

_under_way: set[concurrent.futures.Future[None]] = set()
_guard = threading.Lock()


def begin(work: Coroutine[Any, Any, None], *, failed: Callable[[BaseException], None]) -> None:
    """Start the work in the portal and return at once; `failed` is told of an error."""
    future = portal().submit(work)

    def finished(done: concurrent.futures.Future[None]) -> None:
        with _guard:
            _under_way.discard(done)
        if not done.cancelled() and (error := done.exception()) is not None:
            failed(error)

    with _guard:
        _under_way.add(future)
    future.add_done_callback(finished)


async def finish(timeout: float = 10.0) -> None:
    """Wait until what was begun is done, at most this many seconds."""
    with _guard:
        waiting = list(_under_way)
    if waiting:
        await asyncio.wait([asyncio.wrap_future(future) for future in waiting], timeout=timeout)
