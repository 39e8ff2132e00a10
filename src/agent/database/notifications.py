"""What the database tells by NOTIFY, where the connection lets us hear it. Elsewhere callers look again."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import psycopg
from psycopg import sql

from agent.errors import LearningError
from agent.portal import forget_in_forked_child

if TYPE_CHECKING:
    from agent.database.protocol import Database

_TRANSACTION_POOLER_PORT = 6543  # Supabase's: LISTEN is lost with each transaction
_CONNECT_SECONDS = 5
_AGAIN_SECONDS = 5.0


class Notifications:
    """Everybody who waits for one channel of one database shares one connection, open while somebody waits.

    Use it in the portal.

    Args:
        database: where to listen. One that is reached over Supabase's keys or its transaction pooler tells nothing.
        channel: what to listen to.
    """

    def __init__(self, database: Database, channel: str) -> None:
        self._database = database
        self._channel = channel
        self._waiting: set[_Bell] = set()
        self._task: asyncio.Task[None] | None = None
        self.is_listening = False
        """Whether notifications are heard right now."""
        forget_in_forked_child(self)

    def start_anew(self) -> None:
        """In a forked child: connection and tasks are the parent's."""
        self._waiting = set()
        self._task = None
        self.is_listening = False

    @contextlib.asynccontextmanager
    async def heard(self, payload: str | None = None) -> AsyncIterator[_Bell]:
        """A bell that rings at notifications with this payload; `None`: at all."""
        bell = _Bell(payload)
        self._waiting.add(bell)
        if self._task is None:
            self._task = asyncio.create_task(self._listen())
        try:
            yield bell
        finally:
            self._waiting.discard(bell)
            if not self._waiting and self._task is not None:
                task, self._task = self._task, None
                task.cancel()
                self.is_listening = False

    async def _listen(self) -> None:
        while True:
            with contextlib.suppress(psycopg.Error, LearningError, OSError):
                url = await _session_address(self._database)
                if url is None:
                    return
                await self._listen_at(url)
            self._tell(listening=False)
            await asyncio.sleep(_AGAIN_SECONDS)

    async def _listen_at(self, url: str) -> None:
        connection = await psycopg.AsyncConnection.connect(
            url, autocommit=True, connect_timeout=_CONNECT_SECONDS, application_name="agent approvals"
        )
        try:
            await connection.execute(sql.SQL("LISTEN {}").format(sql.Identifier(self._channel)))
            # What happened before LISTEN was not told: everybody looks once more.
            self._tell(listening=True)
            async for notice in connection.notifies():
                self._ring(notice.payload)
        finally:
            await connection.close()

    def _ring(self, payload: str) -> None:
        for bell in self._waiting:
            if bell.payload in (None, payload):
                bell.ring()

    def _tell(self, *, listening: bool) -> None:
        self.is_listening = listening
        for bell in self._waiting:
            bell.ring()


class _Bell:
    """Rings when something was told."""

    def __init__(self, payload: str | None) -> None:
        self.payload = payload
        self._rung = asyncio.Event()

    def ring(self) -> None:
        self._rung.set()

    async def wait(self, seconds: float) -> None:
        """Wait until it rings, or has rung since the last wait, or the time is over."""
        with contextlib.suppress(TimeoutError):  # `wait_for` loses a cancellation that comes with the ring
            async with asyncio.timeout(seconds):
                await self._rung.wait()
        self._rung.clear()


async def _session_address(database: Any) -> str | None:
    """Address of a connection that stays ours; `None` where this database is reached in another way."""
    address = getattr(database, "url", None)
    if callable(address):  # the embedded server, which is started for it
        address = await address()
    if not isinstance(address, str) or not address.startswith(("postgresql://", "postgres://")):
        return None
    return None if urlsplit(address).port == _TRANSACTION_POOLER_PORT else address
