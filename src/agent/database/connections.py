"""Connections to one Postgres: a pool, connections kept at hand, and calls that take one round trip each."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import Collection
from typing import Any, Final

import orjson
import psycopg
from psycopg import pq
from psycopg.adapt import Transformer
from psycopg.errors import error_from_result
from psycopg.pq.abc import PGresult
from psycopg_pool import AsyncConnectionPool

_KEPT_SECONDS: Final = 300.0
"""How long a connection stays out of the pool, which replaces the old and closes what is too many, before it goes
back once."""
_CANCEL_SECONDS: Final = 5.0
_JSON: Final = (114, 3802)  # json, jsonb
_FAILED: Final = (pq.ExecStatus.FATAL_ERROR, pq.ExecStatus.BAD_RESPONSE)


class Connection(psycopg.AsyncConnection[Any]):
    """A connection that calls prepared statements without cursors: those cost more than all else of a call."""

    taken_at = 0.0
    """When it left the pool, by `time.monotonic`."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._names: dict[bytes, bytes] = {}
        self._named = 0
        # Of this connection alone: through a transaction pooler the name of another client's statement would run that.
        self._prefix = secrets.token_hex(8).encode()
        self._loaders: dict[int, Any] = {}
        named = self.info.encoding
        # As psycopg does: to a database without an encoding text goes in UTF-8.
        self._encoding = named if named != "ascii" else "utf-8"

    async def value_of(self, statement: bytes, values: Collection[Any], *, prepare: bool) -> Any:
        """The one value that a statement gives; `None` for NULL and for no row.

        Args:
            statement: with parameters `$1`, `$2`, ….
            values: text, truth, numbers, lists of these, or `None`.
            prepare: whether to keep it prepared; that is done in the round trip of its first execution.

        Raises:
            psycopg.Error: as from a cursor.
        """
        if self.sent(statement, values):
            return await self.received()
        parameters = [_as_text(value, self._encoding) for value in values]
        try:
            if prepare:
                results = await self._prepared_first(statement, parameters)
            else:
                self.pgconn.send_query_params(statement, parameters)
                results = await self._results()
        except BaseException:
            await self._calm()
            raise
        return self._value_in(results)

    def sent(self, statement: bytes, values: Collection[Any]) -> bool:
        """Send the call of a statement that is prepared; `False` where it is not. `received` gives its value.

        It does not wait, and serves any thread that has the connection.
        """
        name = self._names.get(statement)
        if name is None:
            return False
        self.pgconn.send_query_prepared(name, [_as_text(value, self._encoding) for value in values])
        self.pgconn.flush()
        return True

    async def received(self) -> Any:
        """What `value_of` gives, for the call that was sent."""
        try:
            results = await self._results()
        except BaseException:
            await self._calm()
            raise
        return self._value_in(results)

    def forget_prepared(self) -> None:
        """Prepare all anew: the server has nothing of what was prepared, after a DISCARD ALL or behind a pooler."""
        self._names.clear()

    def _value_in(self, results: list[PGresult]) -> Any:
        for result in results:
            if result.status in _FAILED:
                raise error_from_result(result, encoding=self.info.encoding)
        last = results[-1]
        if last.status != pq.ExecStatus.TUPLES_OK or not last.ntuples:
            return None
        return self._loaded(last.get_value(0, 0), last.ftype(0))

    async def _prepared_first(self, statement: bytes, parameters: list[bytes | None]) -> list[PGresult]:
        connection = self.pgconn
        self._named += 1  # one that was given up may be prepared all the same
        name = b"agent_%b_%d" % (self._prefix, self._named)
        connection.enter_pipeline_mode()
        connection.send_prepare(name, statement)
        connection.send_query_prepared(name, parameters)
        connection.pipeline_sync()
        results = await self._results()
        connection.exit_pipeline_mode()
        if results[0].status not in _FAILED:
            self._names[statement] = name
        return results

    async def _results(self) -> list[PGresult]:
        """What the server answers to what was sent, until it has said all."""
        connection = self.pgconn
        while connection.flush():
            await self._until_ready(writing=True)
            connection.consume_input()  # a server that is not read from may stop reading
        in_pipeline = connection.pipeline_status != pq.PipelineStatus.OFF
        results: list[PGresult] = []
        while True:
            await self._until_ready()
            connection.consume_input()
            while not connection.is_busy():
                result = connection.get_result()
                if result is None:
                    if not in_pipeline:
                        return results
                elif result.status == pq.ExecStatus.PIPELINE_SYNC:
                    return results
                else:
                    results.append(result)

    async def _until_ready(self, *, writing: bool = False) -> None:
        loop = asyncio.get_running_loop()
        ready = loop.create_future()
        socket = self.pgconn.socket
        loop.add_reader(socket, _wake, ready)
        if writing:
            loop.add_writer(socket, _wake, ready)
        try:
            await ready
        finally:
            loop.remove_reader(socket)
            if writing:
                loop.remove_writer(socket)

    async def _calm(self) -> None:
        """After a call that was given up: end what the server does for it; a connection that stays busy is closed."""
        connection = self.pgconn
        if connection.status != pq.ConnStatus.OK:
            return
        try:
            if connection.transaction_status == pq.TransactionStatus.ACTIVE:
                async with asyncio.timeout(_CANCEL_SECONDS):
                    await self.cancel_safe(timeout=_CANCEL_SECONDS)
                    await self._results()
            if connection.pipeline_status != pq.PipelineStatus.OFF:
                connection.exit_pipeline_mode()
        except (psycopg.Error, TimeoutError):
            await self.close()

    def _loaded(self, value: bytes | None, type_id: int) -> Any:
        if value is None:
            return None
        if type_id in _JSON:
            return _read_json(value)
        load = self._loaders.get(type_id)
        if load is None:
            load = self._loaders[type_id] = Transformer(self).get_loader(type_id, pq.Format.TEXT).load
        return load(value)


def _wake(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_result(None)


class Connections:
    """A pool, and those of its connections that are kept at hand, so that few calls need the pool.

    For one event loop.
    """

    def __init__(self, pool: AsyncConnectionPool[Connection]) -> None:
        self._pool = pool
        self._at_hand: list[Connection] = []  # the one that was used last is last
        self._asking = 0
        self._closed = False

    async def take(self, *, timeout: float) -> Connection:
        """A connection, to be given back.

        Raises:
            psycopg_pool.PoolTimeout: none became free or could be made within `timeout` seconds.
            psycopg_pool.PoolClosed: it was closed.
        """
        if (connection := self.take_at_hand()) is not None:
            return connection
        self._asking += 1
        try:
            connection = await self._pool.getconn(timeout=timeout)
        finally:
            self._asking -= 1
        connection.taken_at = time.monotonic()
        return connection

    def take_at_hand(self) -> Connection | None:
        """A connection, where one is at hand; from any thread."""
        try:
            return self._at_hand.pop()
        except IndexError:
            return None

    async def give_back(self, connection: Connection) -> None:
        """Take a connection back, in whatever state."""
        waited_for = self._asking or self._closed
        if waited_for or connection.pgconn.transaction_status != pq.TransactionStatus.IDLE:
            await self._pool.putconn(connection)
            return
        self._at_hand.append(connection)
        if self._at_hand[0].taken_at + _KEPT_SECONDS < time.monotonic():
            await self._pool.putconn(self._at_hand.pop(0))

    async def close(self) -> None:
        """Close all connections; those that are in use when they come back."""
        self._closed = True
        while (connection := self.take_at_hand()) is not None:
            await self._pool.putconn(connection)
        await self._pool.close(timeout=1)


def _read_json(document: str | bytes) -> Any:
    """A document as JSON; one number that the quick reader has no room for must not hide all others."""
    try:
        return orjson.loads(document)
    except orjson.JSONDecodeError:
        return json.loads(document)


def _as_text(value: Any, encoding: str) -> bytes | None:
    """A parameter in Postgres' text form."""
    if value is None:
        return None
    if isinstance(value, str):
        return value.encode(encoding)
    if isinstance(value, list | tuple):
        return b"{%b}" % b",".join(_element(item, encoding) for item in value)
    return _plain(value, encoding)


def _element(value: Any, encoding: str) -> bytes:
    if value is None:
        return b"NULL"
    return b'"%b"' % _plain(value, encoding).replace(b"\\", b"\\\\").replace(b'"', b'\\"')


def _plain(value: Any, encoding: str) -> bytes:
    if isinstance(value, str):
        return value.encode(encoding)
    if isinstance(value, bool):
        return b"t" if value else b"f"
    if isinstance(value, int | float):
        return repr(value).encode()
    raise psycopg.ProgrammingError(f"a parameter of type {type(value).__name__} has no text form")
