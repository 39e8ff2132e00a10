"""Counts what a client really sends to Postgres, from outside: a proxy that reads the wire protocol.

It knows nothing of the client library, so the same meter serves every agent under test, and a call that some
wrapper forgets to count is counted here. Frontend messages: https://www.postgresql.org/docs/current/protocol-message-formats.html
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import struct
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote, urlencode, urlsplit, urlunsplit

_ENCRYPTION_REQUESTS = (80877103, 80877104)  # SSLRequest, GSSENCRequest
_OVERHEAD = ("BEGIN", "START", "COMMIT", "ROLLBACK", "SAVEPOINT", "RELEASE", ";")


@dataclass
class StatementMeter:
    """Where to connect, and what has gone through since the last `reset`."""

    url: str = ""
    """The database's URL with the proxy in place of the server."""
    executions: Counter[str] = field(default_factory=Counter)
    """How often each statement text was executed."""
    round_trips: int = 0
    """How often the client stopped to wait for the server: simple queries and Syncs."""

    def reset(self) -> None:
        self.executions = Counter()
        self.round_trips = 0

    @property
    def statements(self) -> int:
        """Statements executed; transaction control and a pool's empty test query are left out."""
        return sum(
            count for text, count in self.executions.items() if not text.strip().upper().startswith(_OVERHEAD)
        )


class _Frontend:
    """What one client connection sends, message by message."""

    def __init__(self, meter: StatementMeter) -> None:
        self._meter = meter
        self._prepared: dict[bytes, str] = {}
        self._portals: dict[bytes, str] = {}
        self._buffer = b""

    def feed(self, data: bytes) -> None:
        self._buffer += data
        while len(self._buffer) >= 5:
            (length,) = struct.unpack_from("!i", self._buffer, 1)
            if len(self._buffer) < length + 1:
                return
            kind, body = self._buffer[:1], self._buffer[5 : length + 1]
            self._buffer = self._buffer[length + 1 :]
            self._count(kind, body)

    def _count(self, kind: bytes, body: bytes) -> None:
        if kind == b"Q":
            self._meter.executions[body.rstrip(b"\0").decode(errors="replace")] += 1
            self._meter.round_trips += 1
        elif kind == b"P":
            name, text, _ = body.split(b"\0", 2)
            self._prepared[name] = text.decode(errors="replace")
        elif kind == b"B":
            portal, name, _ = body.split(b"\0", 2)
            self._portals[portal] = self._prepared.get(name, "?")
        elif kind == b"E":
            self._meter.executions[self._portals.get(body.split(b"\0", 1)[0], "?")] += 1
        elif kind == b"S":
            self._meter.round_trips += 1


async def _startup(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
    """The start-up packet; encryption is declined so that what follows can be read."""
    while True:
        head = await reader.readexactly(8)
        length, code = struct.unpack("!ii", head)
        if code not in _ENCRYPTION_REQUESTS:
            return head + await reader.readexactly(length - 8)
        writer.write(b"N")
        await writer.drain()


async def _serve(
    meter: StatementMeter,
    upstream: tuple[str, int],
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
) -> None:
    host, port = upstream
    with suppress(asyncio.IncompleteReadError, ConnectionError):
        hello = await _startup(reader, writer)
        if host.startswith("/"):
            server_reader, server_writer = await asyncio.open_unix_connection(f"{host}/.s.PGSQL.{port}")
        else:
            server_reader, server_writer = await asyncio.open_connection(host, port)
        server_writer.write(hello)

        async def to_server() -> None:
            frontend = _Frontend(meter)
            while data := await reader.read(65536):
                frontend.feed(data)
                server_writer.write(data)
                await server_writer.drain()
            server_writer.close()

        async def to_client() -> None:
            while data := await server_reader.read(65536):
                writer.write(data)
                await writer.drain()
            writer.close()

        await asyncio.gather(to_server(), to_client())


@contextmanager
def metered(database_url: str) -> Iterator[StatementMeter]:
    """A meter between a client and this database; the proxy runs in a thread of its own until the block ends."""
    parts = urlsplit(database_url)
    options = {name: values[-1] for name, values in parse_qs(parts.query).items()}
    upstream = (
        options.get("host") or unquote(parts.hostname or "localhost"),
        parts.port or int(options.get("port", 5432)),
    )
    meter = StatementMeter()
    stopping: concurrent.futures.Future[Callable[[], object]] = concurrent.futures.Future()
    with tempfile.TemporaryDirectory(prefix="meter-") as folder:
        options |= {"host": folder, "port": "5432"}
        credentials = parts.netloc.rpartition("@")[0]
        netloc = f"{credentials}@" if credentials else ""
        meter.url = urlunsplit((parts.scheme, netloc, parts.path, urlencode(options, quote_via=quote), ""))

        async def proxy() -> None:
            connections: set[asyncio.Task[None]] = set()
            stopped = asyncio.Event()
            loop = asyncio.get_running_loop()

            def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                task = asyncio.ensure_future(_serve(meter, upstream, reader, writer))
                connections.add(task)
                task.add_done_callback(connections.discard)

            async with await asyncio.start_unix_server(accept, path=str(Path(folder) / ".s.PGSQL.5432")):
                stopping.set_result(partial(loop.call_soon_threadsafe, stopped.set))
                await stopped.wait()
                for task in connections:
                    task.cancel()
                await asyncio.gather(*connections, return_exceptions=True)

        def serve() -> None:
            try:
                asyncio.run(proxy())
            except OSError as error:
                stopping.set_exception(error)

        thread = threading.Thread(target=serve, name="statement-meter")
        thread.start()
        stop = stopping.result(timeout=10)
        try:
            yield meter
        finally:
            stop()
            thread.join()
