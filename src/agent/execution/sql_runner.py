"""Run agents' SQL: reads in a transaction that is always rolled back, writes held to the rows that were approved.

What the gate let through is run as the text that the gate made, by logins that can do no more than the policy file
says, over the extended protocol, which takes one statement and no more.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import psycopg
from psycopg import AsyncConnection, sql

from agent.database.connection_errors import check_address, explain
from agent.database.opening import EmbeddedDatabase, open_database
from agent.database.protocol import refusal
from agent.errors import DatabaseUnavailable, InvalidRequest, LearningError, OperatorError, Refused
from agent.events import emit
from agent.execution.sql_logins import (
    CONNECTIONS_MAX,
    address_of,
    create_logins,
    login_of,
    logins_file,
    read_logins,
)
from agent.execution.sql_owner_script import Kind, policy_digest
from agent.execution.sql_result import Collected, Delta, SqlResult
from agent.execution.sql_rights import check_rights, refuse_pooler
from agent.execution.sql_undo import (
    PreImage,
    after_image_query,
    insert_with_keys,
    pre_image_query,
    undo_statement,
)
from agent.portal import forget_in_forked_child, portal

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from agent.approval.policy_file import PolicyFile
    from agent.execution.sql_policy import SqlVerdict
    from agent.settings import Settings

T = TypeVar("T")
_CONNECT_SECONDS = 10
_IDLE_MAX = 2
_IDLE_SECONDS = 30.0
_GRACE_SECONDS = 5.0  # beyond the server's own time-out: then the connection is given up
_LOST = ("08", "53", "57P")
_Connection = AsyncConnection[tuple[Any, ...]]

_DELTA = """
SELECT s.schemaname || '.' || s.relname, s.n_tup_ins, s.n_tup_upd, s.n_tup_del
FROM pg_catalog.pg_stat_xact_user_tables s
WHERE s.n_tup_ins + s.n_tup_upd + s.n_tup_del > 0
"""


class SqlRunner:
    """Runs statements for any tenant. One per process is enough; connections are opened when needed."""

    def __init__(self, settings: Settings, policy: PolicyFile) -> None:
        self._settings = settings
        self._policy = policy
        self._reset()
        forget_in_forked_child(self)

    def _reset(self) -> None:
        self._idle: dict[str, list[_Connection]] = {}
        self._turns: dict[str, asyncio.Semaphore] = {}
        self._addresses: dict[tuple[str, Kind], str] = {}
        self._finding: asyncio.Lock | None = None
        self._embedded: EmbeddedDatabase | None = None

    def start_anew(self) -> None:
        """In a forked child: the connections are the parent's."""
        self._reset()

    # --- the ways in --------------------------------------------------------------------------------------------

    async def read(self, verdict: SqlVerdict, tenant_id: str) -> SqlResult:
        """Run what the gate called a READ, and roll it back.

        Raises:
            Refused: the server did not let this login do it, or it took too long.
            InvalidRequest: the statement has a fault, such as an unknown column.
            OperatorError: there are no logins for this tenant, or they have rights too many.
        """
        text = _text_of(verdict)
        return await portal().run(self._in_time(self._read(text, tenant_id, is_select=verdict.is_select)))

    async def try_write(self, verdict: SqlVerdict, tenant_id: str) -> Delta:
        """Run a write and roll it back: exactly which rows of which tables it changes, however it is written.

        Not free of effects: sequences advance, and what a trigger does outside the database stays done;
        `outside_effects` tells which triggers there are.

        Raises: as `read`.
        """
        text = _text_of(verdict)
        return await portal().run(self._in_time(self._try(text, tenant_id)))

    async def outside_effects(self, verdict: SqlVerdict, tenant_id: str) -> tuple[str, ...]:
        """Triggers of the tables written, by name: code that a trial runs too."""
        return await portal().run(self._in_time(self._triggers(sorted(verdict.tables_written), tenant_id)))

    async def write(
        self,
        verdict: SqlVerdict,
        tenant_id: str,
        *,
        bounds: Mapping[str, Mapping[str, int]],
        ticket: str,
        entry: Mapping[str, Any],
    ) -> SqlResult:
        """Run an approved write, and finish its approval and its log row in the same transaction.

        Args:
            bounds: At most so many rows of these tables, as `try_write` told; of other tables none.
            ticket: Of the claimed approval.
            entry: The log row; what the run itself tells is put in.

        Raises:
            Refused: more rows than approved; nothing was changed.
            DatabaseUnavailable: the connection was lost. Only the log tells whether the write took place.
            Others: as `read`; nothing was changed.
        """
        text = _text_of(verdict)
        return await portal().run(self._in_time(self._write(text, tenant_id, bounds, ticket, entry)))

    async def try_undo(self, log: Mapping[str, Any], tenant_id: str) -> Delta:
        """Run the undoing of a logged write and roll it back.

        Raises:
            Refused: nothing was kept to undo it by, or the rows have changed since.
        """
        return await portal().run(self._in_time(self._try_undo(PreImage.of_log(log), tenant_id)))

    async def undo(
        self,
        log: Mapping[str, Any],
        tenant_id: str,
        *,
        bounds: Mapping[str, Mapping[str, int]],
        ticket: str,
        entry: Mapping[str, Any],
    ) -> SqlResult:
        """Undo a logged write, approved as any other write. Rows that changed since are not overwritten.

        Args and Raises: as `write`.
        """
        image = PreImage.of_log(log)
        return await portal().run(self._in_time(self._undo(image, tenant_id, bounds, ticket, entry)))

    async def aclose(self) -> None:
        """Close the connections."""
        await portal().run(self._close())

    # --- reading ------------------------------------------------------------------------------------------------

    async def _read(self, text: bytes, tenant_id: str, *, is_select: bool) -> SqlResult:
        async with self._reading(tenant_id) as connection:
            began = time.monotonic()
            try:
                # One statement of the agent's in each transaction, and never the first: that one could still make it
                # READ WRITE.
                await connection.execute("BEGIN TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY")
                await connection.execute(self._limits() + b"; SELECT 1")
                collected = Collected(rows_max=self._policy.sql.max_rows)
                cursor = connection.cursor()
                if is_select:
                    # A cursor takes a query and nothing else. Binary: the way to the extended protocol without a name.
                    await cursor.execute(b"DECLARE agent_rows NO SCROLL CURSOR FOR " + text, binary=True)
                    while collected.wants_more:
                        await self._remaining(connection, began)
                        await cursor.execute(f"FETCH {collected.next_chunk} FROM agent_rows".encode())
                        if not collected.add(cursor):
                            break
                else:
                    await cursor.execute(text, binary=True)
                    collected.add(cursor)
            except psycopg.Error as error:
                raise _refused(error, "reader", self._policy.sql.timeout_seconds) from None
            return collected.result(began)

    async def _remaining(self, connection: _Connection, began: float) -> None:
        left = self._policy.sql.timeout_seconds - (time.monotonic() - began)
        await connection.execute(f"SET LOCAL statement_timeout = {max(int(left * 1000), 1)}".encode())

    def _limits(self) -> bytes:
        milliseconds = int(self._policy.sql.timeout_seconds * 1000)
        return (
            f"SET LOCAL statement_timeout = {milliseconds}; SET LOCAL lock_timeout = 500; "
            "SET LOCAL idle_in_transaction_session_timeout = 10000; SET LOCAL search_path = ''; "
            "SET LOCAL work_mem = '16MB'; SET LOCAL max_parallel_workers_per_gather = 0"
        ).encode()

    @asynccontextmanager
    async def _reading(self, tenant_id: str) -> AsyncIterator[_Connection]:
        """A connection of the reader. It is used again if it could be made as new, else closed."""
        url = await self._address(tenant_id, "reader")
        async with self._turns.setdefault(url, asyncio.Semaphore(CONNECTIONS_MAX - 1)):
            connection = await self._idle_or_new(url)
            is_clean = False
            try:
                try:
                    yield connection
                except (psycopg.Error, LearningError):
                    is_clean = await _as_new(connection)
                    raise
                is_clean = await _as_new(connection)
            finally:
                idle = self._idle.setdefault(url, [])
                if is_clean and len(idle) < _IDLE_MAX:
                    idle.append(connection)
                    asyncio.get_running_loop().call_later(_IDLE_SECONDS, self._let_go, url, connection)
                else:
                    await connection.close()

    def _let_go(self, url: str, connection: _Connection) -> None:
        """Close a connection that nobody needs; what is in use comes back and is given its time anew."""
        idle = self._idle.get(url, [])
        if connection in idle:
            idle.remove(connection)
            connection.pgconn.finish()

    async def _idle_or_new(self, url: str) -> _Connection:
        idle = self._idle.setdefault(url, [])
        while idle:
            connection = idle.pop()
            try:
                await connection.execute("SELECT 1")
            except psycopg.Error:  # the server was restarted meanwhile
                await connection.close()
            else:
                return connection
        # Without names for statements: DISCARD ALL takes them, and the client would go on using them.
        return await _connect(url, prepare_threshold=None)

    # --- writing ------------------------------------------------------------------------------------------------

    async def _try(self, text: bytes, tenant_id: str) -> Delta:
        async with self._writing(tenant_id) as connection:
            try:
                await self._begin(connection)
                await connection.execute(text, prepare=True)
                return await _delta(connection)
            except psycopg.Error as error:
                raise _refused(error, "writer", self._policy.sql.timeout_seconds) from None

    async def _triggers(self, tables: Sequence[str], tenant_id: str) -> tuple[str, ...]:
        async with self._reading(tenant_id) as connection:
            cursor = await connection.execute(
                """
                SELECT n.nspname || '.' || c.relname || ': ' || t.tgname FROM pg_catalog.pg_trigger t
                JOIN pg_catalog.pg_class c ON c.oid = t.tgrelid JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
                WHERE NOT t.tgisinternal AND t.tgenabled <> 'D' AND n.nspname || '.' || c.relname = ANY (%s) ORDER BY 1
                """,
                (list(tables),),
            )
            return tuple(name for (name,) in await cursor.fetchall())

    async def _write(
        self,
        text: bytes,
        tenant_id: str,
        bounds: Mapping[str, Mapping[str, int]],
        ticket: str,
        entry: Mapping[str, Any],
    ) -> SqlResult:
        async with self._writing(tenant_id) as connection:
            began = time.monotonic()
            try:
                await self._begin(connection)
                image = await self._before(connection, text.decode(), tenant_id)
                statement = image.statement.encode() if image is not None and image.statement else text
                cursor = connection.cursor()
                await cursor.execute(statement, prepare=True)
                collected = Collected(rows_max=self._policy.sql.max_rows)
                collected.add(cursor)
                if image is not None and image.kind == "insert":
                    image = image.with_keys_of(collected.take_last(len(image.key)))
                delta = await _delta(connection)
                kept = await self._after(connection, image, delta)
                result = collected.result(began)
                return await self._finish(connection, result, delta, bounds, ticket, entry, kept)
            except psycopg.Error as error:
                raise _refused(error, "writer", self._policy.sql.timeout_seconds) from None

    async def _before(self, connection: _Connection, text: str, tenant_id: str) -> PreImage | None:
        """The rows that the statement is about to change, as they are; `None` where that cannot be told from it."""
        limit = self._policy.sql.undo_rows
        readable = {
            table.name: table.columns
            for table in self._policy.tables
            if "*" in table.tenants or tenant_id in table.tenants
        }
        query = pre_image_query(text, readable, rows_max=limit)
        if query is None:
            return None
        key = await _primary_key(connection, query.table)
        columns = readable.get(query.table)
        if not key or (columns is not None and not set(key) <= set(columns)):
            return None
        if query.kind == "insert":
            return PreImage(kind="insert", table=query.table, key=key, statement=insert_with_keys(text, key))
        if query.kind == "delete" and columns is not None:
            return None  # a row could not be put back without what must not be read
        try:
            async with connection.transaction():
                found = await (await connection.execute(query.text.encode())).fetchall()
        except psycopg.Error as error:
            if error.sqlstate is None or error.sqlstate.startswith(_LOST):
                raise
            return None  # a view, or a right that is missing: the write itself may still be in order
        if len(found) > limit:
            return None
        return PreImage(kind=query.kind, table=query.table, key=key).with_rows([row for (row,) in found])

    async def _after(
        self, connection: _Connection, image: PreImage | None, delta: Delta
    ) -> dict[str, Any] | None:
        """What is kept for undo, if the rows known are all the rows changed."""
        if image is None or set(delta) != {image.table} or len(image.rows) > self._policy.sql.undo_rows:
            return None
        changed = delta[image.table]
        counted = {"insert": "inserted", "update": "updated", "delete": "deleted"}[image.kind]
        if changed[counted] != len(image.rows) or sum(changed.values()) != len(image.rows):
            return None
        if image.kind == "update":
            query = after_image_query(image)
            found = await (await connection.execute(query, (json.dumps(image.rows),))).fetchall()
            if len(found) != len(image.rows):
                return None  # the statement changed a key: nothing says which row was which
            image = image.with_after([row for (row,) in found])
        return image.as_json()

    async def _try_undo(self, image: PreImage, tenant_id: str) -> Delta:
        async with self._writing(tenant_id) as connection:
            try:
                await self._begin(connection)
                return await self._run_undo(connection, image)
            except psycopg.Error as error:
                raise _refused(error, "writer", self._policy.sql.timeout_seconds) from None

    async def _undo(
        self,
        image: PreImage,
        tenant_id: str,
        bounds: Mapping[str, Mapping[str, int]],
        ticket: str,
        entry: Mapping[str, Any],
    ) -> SqlResult:
        async with self._writing(tenant_id) as connection:
            began = time.monotonic()
            try:
                await self._begin(connection)
                delta = await self._run_undo(connection, image)
                result = SqlResult(
                    row_count=len(image.rows), duration_ms=round((time.monotonic() - began) * 1000, 3)
                )
                return await self._finish(connection, result, delta, bounds, ticket, entry, None)
            except psycopg.Error as error:
                raise _refused(error, "writer", self._policy.sql.timeout_seconds) from None

    async def _run_undo(self, connection: _Connection, image: PreImage) -> Delta:
        generated = await (
            await connection.execute(
                "SELECT a.attname::text FROM pg_catalog.pg_attribute a "
                "WHERE a.attrelid = pg_catalog.to_regclass(%s) AND a.attgenerated <> ''",
                (_identifier(image.table).as_string(None),),
            )
        ).fetchall()
        statement = undo_statement(image, without={name for (name,) in generated})
        cursor = await connection.execute(statement, image.arguments())
        if cursor.rowcount != len(image.rows):
            raise Refused(
                f"{len(image.rows)} rows of {image.table} were changed by that write and only {cursor.rowcount} of "
                "them are still as it left them: somebody changed or removed the others since. Nothing was undone"
            )
        return await _delta(connection)

    async def _finish(
        self,
        connection: _Connection,
        result: SqlResult,
        delta: Delta,
        bounds: Mapping[str, Mapping[str, int]],
        ticket: str,
        entry: Mapping[str, Any],
        pre_image: dict[str, Any] | None,
    ) -> SqlResult:
        """Hold the write to its bounds, write the log row, commit."""
        for table, changed in delta.items():
            for what, count in changed.items():
                allowed = int((bounds.get(table) or {}).get(what, 0))
                if count > allowed:
                    raise Refused(
                        f"the write {what} {count} rows of {table} and {allowed} were approved, so it was rolled back: "
                        "the data has changed since it was tried. Ask again, for an approval of what it does now"
                    )
        whole = {
            **entry,
            "state": "executed",
            "rows": delta,
            "row_count": result.row_count,
            "result_bytes": result.result_bytes,
            "duration_ms": result.duration_ms,
            "pre_image": pre_image,
        }
        try:
            cursor = await connection.execute(
                "SELECT public.finish_write(%s, %s::pg_catalog.jsonb)",
                (ticket, json.dumps(whole, allow_nan=False)),
            )
            row = await cursor.fetchone()
        except psycopg.Error as error:
            if error.sqlstate is None or error.sqlstate.startswith(_LOST):
                raise
            raise refusal("finish_write", error.sqlstate, error.diag.message_primary or "") from None
        await connection.execute("COMMIT")
        told = row[0] if row else None
        return SqlResult(
            columns=result.columns,
            rows=result.rows,
            truncated=result.truncated,
            row_count=result.row_count,
            result_bytes=result.result_bytes,
            duration_ms=result.duration_ms,
            delta=delta,
            log_id=str(told["log_id"]) if isinstance(told, dict) and "log_id" in told else None,
        )

    @asynccontextmanager
    async def _writing(self, tenant_id: str) -> AsyncIterator[_Connection]:
        """A connection of the writer, for one transaction: whatever was not committed is undone by closing it."""
        url = await self._address(tenant_id, "writer")
        async with self._turns.setdefault(url, asyncio.Semaphore(CONNECTIONS_MAX - 1)):
            connection = await _connect(url, prepare_threshold=5)
            try:
                yield connection
            finally:
                await connection.close()

    async def _begin(self, connection: _Connection) -> None:
        await connection.execute("BEGIN TRANSACTION ISOLATION LEVEL READ COMMITTED READ WRITE")
        await connection.execute(self._limits())
        row = await (await connection.execute("SHOW track_counts")).fetchone()
        if row != ("on",):
            raise OperatorError(
                "track_counts is off on this server, so nobody can tell which rows a write changes. Turn it on to let "
                "agents write"
            )

    # --- logins -------------------------------------------------------------------------------------------------

    async def _address(self, tenant_id: str, kind: Kind) -> str:
        """The address of a login whose rights were tested once in this process."""
        known = self._addresses.get((tenant_id, kind))
        if known is not None:
            return known
        self._finding = self._finding or asyncio.Lock()
        async with self._finding:
            if (tenant_id, kind) not in self._addresses:
                url = await self._found_address(tenant_id, kind)
                check_address(url)
                refuse_pooler(url)
                only_gate = await check_rights(url, kind, self._policy, tenant_id)
                if only_gate:
                    emit("sql_rights_beyond_policy", tenant_id=tenant_id, login=kind, rights=list(only_gate))
                self._addresses[tenant_id, kind] = url
        return self._addresses[tenant_id, kind]

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

    async def _in_time(self, work: Coroutine[Any, Any, T]) -> T:
        """The work, given up where even the server's own time-outs do not end it."""
        seconds = 4 * self._policy.sql.timeout_seconds + 3 * _CONNECT_SECONDS + _GRACE_SECONDS
        try:
            async with asyncio.timeout(seconds):
                return await work
        except TimeoutError:
            raise DatabaseUnavailable(
                f"the database did not answer within {seconds:.0f} seconds. "
                "Whether a write took place, only the log tells"
            ) from None

    async def _close(self) -> None:
        idle, self._idle = self._idle, {}
        for connections in idle.values():
            for connection in connections:
                await connection.close()
        self._addresses.clear()
        self._embedded = None  # shared with whoever else asked for it, and closed by them


async def _as_new(connection: _Connection) -> bool:
    """Whether nothing of the last statement is left in the session."""
    try:
        await connection.execute("ROLLBACK")
        await connection.execute("DISCARD ALL")
    except psycopg.Error:
        return False
    return True


async def _connect(url: str, *, prepare_threshold: int | None) -> _Connection:
    try:
        return await AsyncConnection.connect(
            url,
            autocommit=True,
            connect_timeout=_CONNECT_SECONDS,
            prepare_threshold=prepare_threshold,
            client_encoding="utf8",
            application_name="agent sql",
        )
    except psycopg.Error as error:
        raise explain(error, url) from None


def _text_of(verdict: SqlVerdict) -> bytes:
    """What runs, as the server takes it.

    Raises:
        Refused: the gate let nothing through.
        InvalidRequest: text that cannot be sent whole.
    """
    if not verdict.text or "\x00" in verdict.text:
        raise Refused(f"the statement was not let through: {'; '.join(verdict.reasons) or 'it has no text'}")
    try:
        return verdict.text.encode()
    except UnicodeEncodeError:
        raise InvalidRequest("the statement holds half a character (a lone surrogate)") from None


async def _delta(connection: _Connection) -> Delta:
    await connection.execute(
        "SET CONSTRAINTS ALL IMMEDIATE"
    )  # triggers that wait for the end change rows too
    found = await (await connection.execute(_DELTA)).fetchall()
    return {
        table: {"inserted": inserted, "updated": updated, "deleted": deleted}
        for table, inserted, updated, deleted in sorted(found)
    }


async def _primary_key(connection: _Connection, table: str) -> tuple[str, ...]:
    cursor = await connection.execute(
        """
        SELECT a.attname::text FROM pg_catalog.pg_index i
        JOIN pg_catalog.pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = ANY (i.indkey)
        WHERE i.indrelid = pg_catalog.to_regclass(%s) AND i.indisprimary ORDER BY a.attnum
        """,
        (_identifier(table).as_string(None),),
    )
    return tuple(name for (name,) in await cursor.fetchall())


def _identifier(table: str) -> sql.Identifier:
    return sql.Identifier(*table.split(".", 1))


def _refused(error: psycopg.Error, kind: Kind, seconds: float) -> LearningError:
    """Our error for what the server said to an agent's statement."""
    said = (error.diag.message_primary or str(error) or type(error).__name__)[:300]
    state = error.sqlstate
    if state is None or state.startswith(_LOST):
        return DatabaseUnavailable(
            f"the connection to the database was lost ({said}). Whether a write took place, only the log tells"
        )
    if state == "57014":
        return Refused(f"the statement took longer than {seconds:g} seconds and was cancelled. Ask for less")
    if state == "55P03":
        return Refused(
            "rows or a table that the statement needs are locked by somebody else. Try again later"
        )
    if state in ("42501", "25006"):
        # The gate let it through and the server did not: one of the two is wrong.
        emit("sql_by_server_refused", login=kind, sqlstate=state)
        return Refused(
            f"the database did not let this login do that: {said}. Only what the policy file lists may be touched; "
            "functions that row policies, defaults and triggers need are listed in its [sql] functions"
        )
    if state in ("40001", "40P01"):
        return Refused(f"somebody else changed the same rows at the same time ({said}). Try again")
    return InvalidRequest(f"the database refused the statement: {said} (SQLSTATE {state})")
