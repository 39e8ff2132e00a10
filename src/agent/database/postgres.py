"""The transport to a Postgres: psycopg 3 and a pool."""

from __future__ import annotations

import asyncio
import time
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import psycopg
from psycopg import sql
from psycopg_pool import AsyncConnectionPool, PoolClosed, PoolTimeout

from agent.database.connection_errors import check_address, explain, plain_address
from agent.database.connections import Connection, Connections
from agent.database.protocol import CASTS, JSON_ARGUMENTS, Begun, Database, clean, refusal, to_json
from agent.errors import DatabaseUnavailable, LearningError
from agent.identity import Identity
from agent.portal import forget_in_forked_child, portal

_CONNECT_SECONDS = 5
_POOLER_PORT = 6543  # Supabase's transaction pooler: a prepared statement would meet another connection
_REST_AFTER_FAILURE_SECONDS = 1.0
_LOST = (
    "08",
    "53",
    "57P",
)  # SQLSTATE: connection, resources, shutdown. Whatever else a server answers, it is there


class PostgresDatabase(Database):
    """Storage functions over a pool of connections, opened at the first call.

    While the server is away calls fail at once: after a failure the next attempt to connect is made one second
    later. A call cut off by a lost connection is repeated once, which is safe because every storage function is
    idempotent by run id, version or text.
    """

    def __init__(self, url: str, *, connections_max: int = 10) -> None:
        self._url = url
        self._prepares = True
        self._connections_max = connections_max
        self._pool: Connections | None = None
        self._opening: asyncio.Lock | None = None
        self._down_until = 0.0
        self._down_because = ""
        self._leave: Callable[[], None] | None = None
        self._forgotten: weakref.finalize[..., PostgresDatabase] | None = None
        self._statements: dict[tuple[str, tuple[str, ...]], bytes] = {}
        forget_in_forked_child(self)

    def start_anew(self) -> None:
        """In a forked child: the pool is the parent's."""
        self._pool = None
        self._leave = None
        if self._forgotten is not None:
            self._forgotten.detach()
        self._opening = None
        self._reading_secret = None
        self._down_until = 0.0

    @property
    def url(self) -> str:
        """Where it is, password included: for workers, never for messages."""
        return self._url

    async def _call(self, function: str, identity: Identity | None = None, /, **arguments: Any) -> Any:
        values = _values(identity, arguments)
        return await self._answer(function, self._statement(function, tuple(values)), values)

    def begin(self, function: str, identity: Identity, /, **arguments: Any) -> Begun | None:
        pool = self._pool
        connection = pool.take_at_hand() if pool is not None else None
        if pool is None or connection is None:
            return None
        values = _values(identity, arguments)
        statement = self._statement(function, tuple(values))
        try:
            sent = connection.sent(statement, values.values())
        except (psycopg.Error, UnicodeError):  # the call says so when it is made in the ordinary way
            sent = False
        if sent:
            return lambda: self._answer(function, statement, values, (pool, connection))
        portal().submit(pool.give_back(connection))
        return None

    async def _answer(
        self,
        function: str,
        statement: bytes,
        values: dict[str, Any],
        sent: tuple[Connections, Connection] | None = None,
    ) -> Any:
        """What the server answers; `sent`: on this connection the call is on its way already."""
        lost = 0
        while True:
            pool, connection = sent or (await self._open_pool(), None)
            try:
                if connection is not None:
                    answer = connection.received()
                else:
                    connection = await pool.take(timeout=_CONNECT_SECONDS)
                    answer = connection.value_of(statement, values.values(), prepare=self._prepares)
                sent = None
                try:
                    return await answer
                except psycopg.errors.InvalidSqlStatementName:  # nothing was run
                    connection.forget_prepared()
                    self._prepares = False
                    return await connection.value_of(statement, values.values(), prepare=False)
                finally:
                    await pool.give_back(connection)
            except PoolTimeout:
                raise self._away(
                    f"No connection to {plain_address(self._url)} became free or could be made."
                ) from None
            except PoolClosed:
                continue  # another call lost its connection and dropped the pool before this one had any
            except psycopg.OperationalError as error:
                if error.sqlstate is not None and not error.sqlstate.startswith(_LOST):
                    raise refusal(function, error.sqlstate, error.diag.message_primary or "") from None
                await self._drop_pool(pool)
                lost += 1
                if lost == 2:
                    raise self._explained(error) from None
            except psycopg.Error as error:
                raise refusal(
                    function, error.sqlstate, error.diag.message_primary or type(error).__name__
                ) from None

    def _statement(self, function: str, names: tuple[str, ...]) -> bytes:
        """`SELECT public.f(a => $1)`; made once per function and set of arguments."""
        statement = self._statements.get((function, names))
        if statement is None:
            parts = [
                sql.SQL("{} => {}").format(sql.Identifier(name), sql.SQL(f"${number}{CASTS.get(name, '')}"))
                for number, name in enumerate(names, start=1)
            ]
            whole = sql.SQL("SELECT {}({})").format(
                sql.Identifier("public", function), sql.SQL(", ").join(parts)
            )
            statement = whole.as_bytes()
            self._statements[function, names] = statement
        return statement

    async def _open_pool(self) -> Connections:
        if self._pool is not None:
            return self._pool
        if time.monotonic() < self._down_until:
            raise DatabaseUnavailable(self._down_because)
        self._opening = self._opening or asyncio.Lock()
        async with self._opening:
            if self._pool is None:
                if time.monotonic() < self._down_until:
                    raise DatabaseUnavailable(self._down_because)
                await self._try_connection()
                self._prepares = urlsplit(self._url).port != _POOLER_PORT
                connecting = AsyncConnectionPool(
                    self._url,
                    connection_class=Connection,
                    min_size=1,
                    max_size=self._connections_max,
                    open=False,
                    kwargs={"autocommit": True, "connect_timeout": _CONNECT_SECONDS},
                    name="agent-learning",
                )
                await connecting.open()
                pool = self._pool = Connections(connecting)
                if self._leave is None:
                    self._leave = partial(_close_at_exit, weakref.ref(self))
                    portal().at_exit(self._leave)
                self._forgotten = weakref.finalize(self, _give_back, pool, self._leave)
                self._forgotten.atexit = False
        return self._pool

    async def _try_connection(self) -> None:
        """A pool hides why it cannot connect; one plain connection says it."""
        check_address(self._url)
        try:
            async with await psycopg.AsyncConnection.connect(self._url, connect_timeout=_CONNECT_SECONDS):
                pass
        except psycopg.Error as error:
            raise self._explained(error) from None

    def _explained(self, error: psycopg.Error) -> LearningError:
        told = explain(error, self._url)
        return self._away(str(told)) if isinstance(told, DatabaseUnavailable) else told

    def _away(self, because: str) -> DatabaseUnavailable:
        self._down_until = time.monotonic() + _REST_AFTER_FAILURE_SECONDS
        self._down_because = f"{because} `agent doctor` tries it."
        return DatabaseUnavailable(self._down_because)

    async def _drop_pool(self, failed: Connections | None = None) -> None:
        """Close the pool, or only this one: another call may have put a good one in its place."""
        if failed is not None and self._pool is not failed:
            return
        pool, self._pool = self._pool, None
        if self._leave is not None:
            portal().forget(self._leave)
            self._leave = None
        if self._forgotten is not None:
            self._forgotten.detach()
        if pool is not None:
            await pool.close()

    async def _close(self) -> None:
        await self._drop_pool()


def _values(identity: Identity | None, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a storage function as they are sent."""
    if identity is not None:
        arguments["identity"] = identity.as_json()
    return {
        name: to_json(value) if name in JSON_ARGUMENTS and value is not None else clean(value)
        for name, value in arguments.items()
    }


def _close_at_exit(database: weakref.ref[PostgresDatabase]) -> None:
    """Close the pool of a database that nobody closed, while its loop still runs."""
    found = database()
    if found is not None:
        portal().run_sync(found.close())


def _give_back(pool: Connections, leave: Callable[[], None]) -> None:
    """Close the pool of a database that nobody has any more."""
    portal().forget(leave)
    portal().submit(pool.close())
