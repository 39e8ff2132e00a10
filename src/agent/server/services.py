"""What ticks in the background of a server, once per process."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Hashable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from agent.clock import Service


@dataclass
class _Shared:
    service: Service
    users: int = 0


_shared: dict[Hashable, _Shared] = {}


@asynccontextmanager
async def running(key: Hashable, make: Callable[[], Service]) -> AsyncIterator[Service]:
    """Run a service for the block. Where several applications of this process ask for the same key, it is made and
    started once and ends with the last of them."""
    shared = _shared.get(key) or _shared.setdefault(key, _Shared(make()))
    shared.users += 1
    try:
        await shared.service.start()
        yield shared.service
    finally:
        shared.users -= 1
        if not shared.users:
            del _shared[key]
            await shared.service.stop()
