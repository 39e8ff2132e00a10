"""How the database and the work on it stand, read once for all who ask within a short time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import Any, Final

from agent.database.protocol import Database
from agent.portal import portal

_READING_SECONDS_MAX: Final = 10.0
_JOBS_MAX: Final = 100_000
"""Jobs that are counted: where more wait, the number does not matter any more, and the time does."""


class StateUnread(Exception):
    """The database gave no answer in time."""


class HouseState:
    """Reads `server_state` of a database, one call at a time, whoever asks from whichever event loop."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._reading: asyncio.Task[Mapping[str, Any]] | None = None
        self._read: asyncio.Task[Mapping[str, Any]] | None = None
        self._read_at = 0.0

    async def read(self, *, max_age_seconds: float, wait_seconds: float) -> Mapping[str, Any]:
        """What the database says, at most so old.

        Who gives up waiting leaves the call to those who come next.

        Raises:
            StateUnread: no answer within `wait_seconds`.
            LearningError: what the call raised.
        """
        return await portal().run(self._read_in_portal(max_age_seconds, wait_seconds))

    async def _read_in_portal(self, max_age_seconds: float, wait_seconds: float) -> Mapping[str, Any]:
        if self._read is not None and time.monotonic() - self._read_at <= max_age_seconds:
            return self._read.result()
        if self._reading is None:
            self._reading = asyncio.create_task(self._call())
            self._reading.add_done_callback(self._keep)
        reading = self._reading
        await asyncio.wait([reading], timeout=wait_seconds)
        if not reading.done():
            raise StateUnread
        return reading.result()

    async def _call(self) -> Mapping[str, Any]:
        try:
            async with asyncio.timeout(_READING_SECONDS_MAX):
                found: Mapping[str, Any] = await self._database.call("server_state", job_limit=_JOBS_MAX)
        except TimeoutError:
            raise StateUnread from None
        return found

    def _keep(self, done: asyncio.Task[Mapping[str, Any]]) -> None:
        self._reading = None
        if not done.cancelled():
            done.exception()  # an error is kept too: a database that is away is not asked by every probe
            self._read, self._read_at = done, time.monotonic()
