"""Connections of the agents' logins, whose rights are tested before they are used."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any

import psycopg
from psycopg import AsyncConnection

from agent.database.connection_errors import check_address, explain
from agent.database.opening import EmbeddedDatabase, open_database
from agent.errors import LearningError, OperatorError
from agent.events import emit
from agent.execution.sql_faults import surely_not_run
from agent.execution.sql_logins import (
    CONNECTIONS_MAX,
    address_of,
    create_logins,
    login_of,
    logins_file,
    read_logins,
)
from agent.execution.sql_owner_script import Kind, policy_digest
from agent.execution.sql_rights import check_rights, open_rows, refuse_pooler

if TYPE_CHECKING:
    from agent.approval.policy_file import PolicyFile
    from agent.settings import Settings

CONNECT_SECONDS = 10
_IDLE_MAX = 2
_IDLE_SECONDS = 30.0
_CUT_SECONDS = 5.0  # for the server to end what was left
_TESTED_SECONDS = 60.0  # for which a test of a login's rights holds
Connection = AsyncConnection[tuple[Any, ...]]


class SqlConnections:
    """Connections for any tenant, opened when needed.

    Args:
        settings: where the database is.
        policy: what the logins may do.
    """

    def __init__(self, settings: Settings, policy: PolicyFile) -> None:
        self._settings = settings
        self._policy = policy
        self.idle: dict[str, list[Connection]] = {}
        """Connections made as new, by address."""
        self._turns: dict[str, asyncio.Semaphore] = {}
        self._addresses: dict[tuple[str, Kind], tuple[str, float]] = {}
        self._finding: asyncio.Lock | None = None
        self._embedded: EmbeddedDatabase | None = None

    @asynccontextmanager
    async def reading(self, tenant_id: str) -> AsyncIterator[Connection]:
        """A connection of the reader. It is used again if it could be made as new, else closed."""
        url = await self.address(tenant_id, "reader")
        async with self._turns.setdefault(url, asyncio.Semaphore(CONNECTIONS_MAX - 1)):
            connection = await self._idle_or_new(url, tenant_id)
            is_clean = False
            try:
                try:
                    yield connection
                except (psycopg.Error, LearningError):
                    is_clean = await _as_new(connection)
                    raise
                is_clean = await _as_new(connection)
            finally:
                idle = self.idle.setdefault(url, [])
                if is_clean and len(idle) < _IDLE_MAX:
                    idle.append(connection)
                    asyncio.get_running_loop().call_later(_IDLE_SECONDS, self._let_go, url, connection)
                else:
                    await connection.close()

    @asynccontextmanager
    async def writing(self, tenant_id: str, *, is_for_good: bool = False) -> AsyncIterator[Connection]:
        """A connection of the writer, for one transaction: whatever was not committed is undone by closing it.

        Raises:
            NotRun: of a write for good there was no connection, so nobody needs to ask whether it took place.
        """
        with surely_not_run(is_for_good):
            url = await self.address(tenant_id, "writer")
        async with self._turns.setdefault(url, asyncio.Semaphore(CONNECTIONS_MAX - 1)):
            with surely_not_run(is_for_good):
                connection = await self._connect_checked(url, tenant_id, prepare_threshold=5)
            try:
                yield connection
            finally:
                await connection.close()

    async def cut(self, connection: Connection, tenant_id: str) -> None:
        """Leave a reader's connection whose statement does not end, and have the server end it where it lets us."""
        pid = connection.info.backend_pid
        with suppress(OSError), socket.socket(fileno=os.dup(connection.fileno())) as line:
            line.shutdown(socket.SHUT_RDWR)  # whoever waits on it sees its end
        with suppress(psycopg.Error, LearningError, TimeoutError):  # most servers let only an owner do it
            async with asyncio.timeout(_CUT_SECONDS):
                url = await self.address(tenant_id, "reader")
                async with await connect(url, prepare_threshold=None) as other:
                    await other.execute("SELECT pg_catalog.pg_terminate_backend(%s)", (pid,))

    async def close(self) -> None:
        """Close the connections that nobody uses."""
        idle, self.idle = self.idle, {}
        for connections in idle.values():
            for connection in connections:
                await connection.close()
        self._addresses.clear()
        self._embedded = None  # shared with whoever else asked for it, and closed by them

    def _let_go(self, url: str, connection: Connection) -> None:
        """Close a connection that nobody needs; what is in use comes back and is given its time anew."""
        idle = self.idle.get(url, [])
        if connection in idle:
            idle.remove(connection)
            connection.pgconn.finish()

    async def _idle_or_new(self, url: str, tenant_id: str) -> Connection:
        idle = self.idle.setdefault(url, [])
        while idle:
            connection = idle.pop()
            try:
                await self._check_rows(connection, tenant_id)
            except psycopg.Error:  # the server was restarted meanwhile
                await connection.close()
            except BaseException:
                await connection.close()
                raise
            else:
                return connection
        # Without names for statements: DISCARD ALL takes them, and the client would go on using them.
        return await self._connect_checked(url, tenant_id, prepare_threshold=None)

    async def _connect_checked(
        self, url: str, tenant_id: str, *, prepare_threshold: int | None
    ) -> Connection:
        connection = await connect(url, prepare_threshold=prepare_threshold)
        try:
            await self._check_rows(connection, tenant_id)
        except psycopg.Error as error:
            await connection.close()
            raise explain(error, url) from None
        except BaseException:
            await connection.close()
            raise
        return connection

    async def _check_rows(self, connection: Connection, tenant_id: str) -> None:
        """See that rows of other tenants are kept from this connection still, whatever was changed since."""
        await connection.execute("SET search_path = ''")  # functions are printed with their schema
        found = await open_rows(connection, self._policy, tenant_id)
        if found:
            raise OperatorError(
                f"the logins of tenant {tenant_id!r} would see rows of others: {'; '.join(found)}. Nothing is run. "
                f"Turn row level security on, then run `agent migrate --roles --tenant {tenant_id}`"
            )

    async def address(self, tenant_id: str, kind: Kind) -> str:
        """The address of a login whose rights were tested within the last minute."""
        known = self._addresses.get((tenant_id, kind))
        if known is not None and time.monotonic() - known[1] < _TESTED_SECONDS:
            return known[0]
        self._finding = self._finding or asyncio.Lock()
        async with self._finding:
            known = self._addresses.get((tenant_id, kind))
            if known is None or time.monotonic() - known[1] >= _TESTED_SECONDS:
                self._addresses.pop((tenant_id, kind), None)
                url = await self._found_address(tenant_id, kind)
                check_address(url)
                refuse_pooler(url)
                only_gate = await check_rights(url, kind, self._policy, tenant_id)
                if only_gate and known is None:
                    emit("sql_rights_beyond_policy", tenant_id=tenant_id, login=kind, rights=list(only_gate))
                self._addresses[tenant_id, kind] = known = (url, time.monotonic())
        return known[0]

    async def _found_address(self, tenant_id: str, kind: Kind) -> str:
        file = logins_file(self._settings)
        digest = policy_digest(self._policy, tenant_id)
        entry = (await asyncio.to_thread(read_logins, file)).get(tenant_id)
        if self._settings.database_url is None and self._settings.supabase_url is None:
            if self._embedded is None:
                database = open_database(self._settings)
                if not isinstance(database, EmbeddedDatabase):
                    raise OperatorError(
                        "the settings name no Postgres and the database is not the embedded one"
                    )
                self._embedded = database
            owner_url = await self._embedded.url()
            if entry is None or entry.get("policy") != digest:
                await create_logins(owner_url, self._policy, tenant_id, file=file)
                entry = (await asyncio.to_thread(read_logins, file))[tenant_id]
            return address_of(owner_url, *login_of(entry[kind]))  # its port may be another today
        if entry is None or kind not in entry:
            raise OperatorError(
                f"there are no database logins for the SQL of tenant {tenant_id!r} in {str(file)!r}. Make them with "
                f"`agent migrate --roles --tenant {tenant_id}`"
            )
        if entry.get("policy") != digest:
            raise OperatorError(
                f"what the policy file says of SQL has changed since the logins of tenant {tenant_id!r} were made. Run "
                f"`agent migrate --roles --tenant {tenant_id}`"
            )
        return entry[kind]


async def _as_new(connection: Connection) -> bool:
    """Whether nothing of the last statement is left in the session."""
    try:
        await connection.execute("ROLLBACK")
        await connection.execute("DISCARD ALL")
    except psycopg.Error:
        return False
    return True


async def connect(url: str, *, prepare_threshold: int | None) -> Connection:
    """A new connection; `prepare_threshold` as of psycopg.

    Raises:
        DatabaseUnavailable: there is none to be had.
        OperatorError: the login or its address is wrong.
    """
    try:
        return await AsyncConnection.connect(
            url,
            autocommit=True,
            connect_timeout=CONNECT_SECONDS,
            prepare_threshold=prepare_threshold,
            client_encoding="utf8",
            application_name="agent sql",
        )
    except psycopg.Error as error:
        raise explain(error, url) from None
