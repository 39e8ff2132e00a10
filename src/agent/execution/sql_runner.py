"""Run agents' SQL: reads in a transaction that is always rolled back, writes held to the rows that were approved.

What the gate let through is run as the text that the gate made, by logins that can do no more than the policy file
says, over the extended protocol, which takes one statement and no more.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import psycopg
from psycopg import AsyncConnection, sql

from agent.database.connection_errors import check_address, explain
from agent.database.opening import EmbeddedDatabase, open_database
from agent.database.protocol import refusal
from agent.errors import DatabaseUnavailable, InvalidRequest, LearningError, OperatorError, Refused
from agent.events import emit
from agent.execution.result_text import as_recorded
from agent.execution.sql_logins import (
    CONNECTIONS_MAX,
    address_of,
    create_logins,
    login_of,
    logins_file,
    read_logins,
)
from agent.execution.sql_owner_script import Kind, policy_digest
from agent.execution.sql_result import Collected, Delta, SqlResult, last_column
from agent.execution.sql_rights import check_rights, open_rows, refuse_pooler
from agent.execution.sql_undo import (
    PreImage,
    gives_rows,
    image_by_key,
    pre_image_query,
    probe,
    undo_statement,
    with_images,
    written_table,
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
_READ_GRACE_SECONDS = 3.0  # the same for a read
_PAUSE_SECONDS = 60.0  # without reads of a tenant, after one that the server did not end in time
_TESTED_SECONDS = 60.0  # for which a test of a login's rights holds
_LOST = ("08", "57P", "53300")
_QUOTED = re.compile(r'".*"', re.DOTALL)
_Connection = AsyncConnection[tuple[Any, ...]]

_DELTA = """
SELECT s.schemaname || '.' || s.relname, s.n_tup_ins, s.n_tup_upd, s.n_tup_del
FROM pg_catalog.pg_stat_xact_user_tables s
WHERE s.n_tup_ins + s.n_tup_upd + s.n_tup_del > 0
"""

_OUTSIDE = """
WITH RECURSIVE reached AS (
    SELECT c.oid FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
    WHERE n.nspname || '.' || c.relname = ANY (%s)
    UNION
    SELECT next.oid FROM reached r CROSS JOIN LATERAL (
        SELECT k.conrelid FROM pg_catalog.pg_constraint k
        WHERE k.contype = 'f' AND k.confrelid = r.oid
          AND (k.confdeltype IN ('c', 'n', 'd') OR k.confupdtype IN ('c', 'n', 'd'))
        UNION ALL SELECT i.inhrelid FROM pg_catalog.pg_inherits i WHERE i.inhparent = r.oid
        UNION ALL SELECT i.inhparent FROM pg_catalog.pg_inherits i WHERE i.inhrelid = r.oid
        UNION ALL SELECT d.refobjid FROM pg_catalog.pg_rewrite w JOIN pg_catalog.pg_depend d ON d.objid = w.oid
        WHERE w.ev_class = r.oid AND d.classid = 'pg_catalog.pg_rewrite'::pg_catalog.regclass
          AND d.refclassid = 'pg_catalog.pg_class'::pg_catalog.regclass
    ) AS next (oid)
),
foreign_code AS (
    SELECT p.oid FROM pg_catalog.pg_proc p JOIN pg_catalog.pg_namespace n ON n.oid = p.pronamespace
    WHERE p.provolatile = 'v' AND n.nspname NOT IN ('pg_catalog', 'information_schema')
      AND NOT EXISTS (SELECT FROM pg_catalog.pg_depend d JOIN pg_catalog.pg_extension e ON e.oid = d.refobjid
                      WHERE d.objid = p.oid AND d.classid = 'pg_catalog.pg_proc'::pg_catalog.regclass
                        AND d.deptype = 'e' AND e.extname IN ('uuid-ossp', 'pgcrypto'))
)
SELECT n.nspname || '.' || c.relname || ': ' || f.name
FROM reached r JOIN pg_catalog.pg_class c ON c.oid = r.oid JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
CROSS JOIN LATERAL (
    SELECT t.tgname::pg_catalog.text FROM pg_catalog.pg_trigger t
    WHERE t.tgrelid = r.oid AND NOT t.tgisinternal AND t.tgenabled <> 'D'
    UNION SELECT w.rulename::pg_catalog.text FROM pg_catalog.pg_rewrite w WHERE w.ev_class = r.oid AND w.ev_type <> '1'
    UNION SELECT a.attname::pg_catalog.text FROM pg_catalog.pg_attrdef b
    JOIN pg_catalog.pg_attribute a ON a.attrelid = b.adrelid AND a.attnum = b.adnum
    JOIN pg_catalog.pg_depend d ON d.classid = 'pg_catalog.pg_attrdef'::pg_catalog.regclass AND d.objid = b.oid
         AND d.refclassid = 'pg_catalog.pg_proc'::pg_catalog.regclass
    JOIN foreign_code p ON p.oid = d.refobjid WHERE b.adrelid = r.oid
    UNION SELECT k.conname::pg_catalog.text FROM pg_catalog.pg_constraint k
    JOIN pg_catalog.pg_depend d ON d.classid = 'pg_catalog.pg_constraint'::pg_catalog.regclass AND d.objid = k.oid
         AND d.refclassid = 'pg_catalog.pg_proc'::pg_catalog.regclass
    JOIN foreign_code p ON p.oid = d.refobjid WHERE k.conrelid = r.oid
) AS f (name)
ORDER BY 1
"""


class NotRun(OperatorError):
    """A statement that was surely not run, for a reason that a model may read."""


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
        self._addresses: dict[tuple[str, Kind], tuple[str, float]] = {}
        self._paused_until: dict[str, float] = {}
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
        if time.monotonic() < self._paused_until.get(tenant_id, 0.0):
            raise Refused(
                "the database could not end an earlier statement of this tenant in time, so nothing is read for a "
                "minute. Ask for less then"
            )
        return await portal().run(self._in_time(self._read(text, tenant_id, is_select=verdict.is_select)))

    async def try_write(self, verdict: SqlVerdict, tenant_id: str) -> Delta:
        """Run a write and roll it back: exactly which rows of which tables it changes, however it is written.

        Not free of effects: sequences advance, and what a trigger or a function does outside the database stays done.
        Ask `outside_effects` first: where it names something that nobody trusts, a trial does what only an approval
        allows. A TRUNCATE in a trigger is not counted.

        Raises: as `read`.
        """
        text = _text_of(verdict)
        return await portal().run(self._in_time(self._try(text, tenant_id)))

    async def outside_effects(self, verdict: SqlVerdict, tenant_id: str) -> tuple[str, ...]:
        """Code that runs along with a write, as `schema.table: name`: triggers, rules, defaults and checks.

        Of the tables written and of those that a foreign key, a partition or a view leads to.
        """
        return await portal().run(self._in_time(self._triggers(sorted(verdict.tables_written), tenant_id)))

    async def write(
        self,
        verdict: SqlVerdict,
        tenant_id: str,
        *,
        bounds: Mapping[str, Any],
        ticket: str,
        entry: Mapping[str, Any],
    ) -> SqlResult:
        """Run an approved write, and finish its approval and its log row in the same transaction.

        Args:
            bounds: At most so many rows of these tables, as `try_write` told; of other tables none. With the key
                `not_tried` only what it names is held.
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
        bounds: Mapping[str, Any],
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
            work = asyncio.create_task(self._read_on(connection, text, is_select=is_select))
            try:
                done, _ = await asyncio.wait(
                    {work}, timeout=self._policy.sql.timeout_seconds + _READ_GRACE_SECONDS
                )
                if not done:
                    await self._give_up(connection, tenant_id)
                    await asyncio.wait({work}, timeout=1.0)
                    raise Refused(
                        f"the statement took longer than {self._policy.sql.timeout_seconds:g} seconds and the database "
                        "could not end it. Nothing is read for a minute; ask for less then"
                    )
                return work.result()
            finally:
                if not work.done():
                    work.cancel()
                elif not work.cancelled():
                    work.exception()  # else it is told as never looked at

    async def _give_up(self, connection: _Connection, tenant_id: str) -> None:
        """Leave a statement that goes on past its time: some of Postgres's own functions never look up from work."""
        self._paused_until[tenant_id] = time.monotonic() + _PAUSE_SECONDS
        pid = connection.info.backend_pid
        emit("sql_read_given_up", tenant_id=tenant_id, backend_pid=pid, pause_seconds=_PAUSE_SECONDS)
        with suppress(OSError), socket.socket(fileno=os.dup(connection.fileno())) as line:
            line.shutdown(socket.SHUT_RDWR)  # whoever waits on it sees its end
        with suppress(psycopg.Error, LearningError, TimeoutError):  # most servers let only an owner do it
            async with asyncio.timeout(_GRACE_SECONDS):
                url = await self._address(tenant_id, "reader")
                async with await _connect(url, prepare_threshold=None) as other:
                    await other.execute("SELECT pg_catalog.pg_terminate_backend(%s)", (pid,))

    async def _read_on(self, connection: _Connection, text: bytes, *, is_select: bool) -> SqlResult:
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

    async def _idle_or_new(self, url: str, tenant_id: str) -> _Connection:
        idle = self._idle.setdefault(url, [])
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
    ) -> _Connection:
        connection = await _connect(url, prepare_threshold=prepare_threshold)
        try:
            await self._check_rows(connection, tenant_id)
        except psycopg.Error as error:
            await connection.close()
            raise explain(error, url) from None
        except BaseException:
            await connection.close()
            raise
        return connection

    async def _check_rows(self, connection: _Connection, tenant_id: str) -> None:
        """See that rows of other tenants are kept from this connection still, whatever was changed since."""
        await connection.execute("SET search_path = ''")  # functions are printed with their schema
        found = await open_rows(connection, self._policy, tenant_id)
        if found:
            raise OperatorError(
                f"the logins of tenant {tenant_id!r} would see rows of others: {'; '.join(found)}. Nothing is run. "
                f"Turn row level security on, then run `agent migrate --roles --tenant {tenant_id}`"
            )

    # --- writing ------------------------------------------------------------------------------------------------

    async def _try(self, text: bytes, tenant_id: str) -> Delta:
        async with self._writing(tenant_id) as connection:
            try:
                await self._begin(connection)
                if gives_rows(text.decode()):
                    # One row at a time, each forgotten: together they may be large.
                    async for _ in connection.cursor().stream(text):
                        pass
                else:
                    await connection.execute(text, prepare=True)
                return await _delta(connection)
            except psycopg.Error as error:
                raise self._refused_write(error) from None

    def _refused_write(self, error: psycopg.Error) -> LearningError:
        """As `_refused`; of a table of many tenants it is not told which value somebody else has already."""
        if error.sqlstate in ("23505", "23503", "23P01"):
            name = f"{error.diag.schema_name}.{error.diag.table_name}"
            shared = {table.name for table in self._policy.tables if table.tenant_column is None}
            if name not in shared:
                return InvalidRequest(
                    "the database refused the statement: the rows break a constraint of the table (unique, foreign key "
                    "or exclusion)"
                )
        return _refused(error, "writer", self._policy.sql.timeout_seconds)

    async def _triggers(self, tables: Sequence[str], tenant_id: str) -> tuple[str, ...]:
        async with self._reading(tenant_id) as connection:
            cursor = await connection.execute(_OUTSIDE, (list(tables),))
            return tuple(name for (name,) in await cursor.fetchall())

    async def _write(
        self,
        text: bytes,
        tenant_id: str,
        bounds: Mapping[str, Any],
        ticket: str,
        entry: Mapping[str, Any],
    ) -> SqlResult:
        async with self._writing(tenant_id, is_for_good=True) as connection:
            began = time.monotonic()
            try:
                await self._begin(connection, is_for_good=True)
                image, why_not = await self._before(connection, text.decode(), tenant_id)
                has_images = image is not None and image.kind != "update"
                statement = text
                if image is not None and has_images:
                    statement = with_images(text.decode(), image.kind, image.columns).encode()
                cursor = connection.cursor()
                await cursor.execute(statement, prepare=True)
                collected = Collected(rows_max=self._policy.sql.max_rows)
                collected.add(cursor, hidden=1 if has_images else 0)
                if image is not None and has_images:
                    rows = last_column(cursor, rows_max=self._policy.sql.undo_rows)
                    image = None if rows is None else image.with_rows(rows)
                delta = await _delta(connection)
                kept = await self._after(connection, image, delta)
                if kept is None and why_not:
                    kept = {"not_kept": why_not}
                result = collected.result(began)
                return await self._finish(connection, result, delta, bounds, ticket, entry, kept)
            except psycopg.Error as error:
                raise self._refused_write(error) from None

    async def _before(
        self, connection: _Connection, text: str, tenant_id: str
    ) -> tuple[PreImage | None, str | None]:
        """What undo needs to know before the statement runs, or `None` and, where it is worth telling, why not."""
        limit = self._policy.sql.undo_rows
        readable = {
            table.name: table.columns
            for table in self._policy.tables
            if "*" in table.tenants or tenant_id in table.tenants
        }
        written = written_table(text, readable)
        if written is None:
            return None, None
        key = await _primary_key(connection, written.table)
        there = await _columns(connection, written.table)
        listed = readable[written.table]
        columns = tuple(name for name in there if listed is None or name in listed)
        hidden = [name for name in there if name not in columns]
        if not key or not set(key) <= set(columns) or "%" in written.table + "".join(columns):
            return None, None
        if hidden and (
            written.kind != "update"
            or written.targets & set(hidden)
            or await self._has_triggers(connection, written.table)
        ):
            # What cannot be read can neither be put back nor seen to be as it was.
            return None, "columns of the table that it may have changed are not readable for this login"
        image = PreImage(
            kind=written.kind,
            table=written.table,
            key=key,
            columns=columns,
            targets=tuple(sorted(written.targets)),
        )
        query = (
            pre_image_query(text, columns, rows_max=limit).encode()
            if written.kind == "update"
            else probe(written.table, columns)
        )
        found = await _or_none(connection, query, ())
        if found is None or len(found) > limit:
            return None, None
        return (image.with_rows(found) if written.kind == "update" else image), None

    async def _has_triggers(self, connection: _Connection, table: str) -> bool:
        cursor = await connection.execute(
            "SELECT FROM pg_catalog.pg_trigger t WHERE t.tgrelid = pg_catalog.to_regclass(%s) "
            "AND NOT t.tgisinternal AND t.tgenabled <> 'D' LIMIT 1",
            (_identifier(table).as_string(None),),
        )
        return await cursor.fetchone() is not None

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
        if image.kind == "delete":
            return image.as_json()
        found = await _or_none(
            connection, image_by_key(image), (image.argument(await _documents(connection, image.table)),)
        )
        if found is None or len(found) != len(image.rows):
            return None  # the statement changed a key: nothing says which row was which
        # Triggers may have changed again what came new.
        return (image.with_rows(found) if image.kind == "insert" else image.with_after(found)).as_json()

    async def _try_undo(self, image: PreImage, tenant_id: str) -> Delta:
        async with self._writing(tenant_id) as connection:
            try:
                await self._begin(connection)
                return await self._run_undo(connection, image)
            except psycopg.Error as error:
                raise self._refused_write(error) from None

    async def _undo(
        self,
        image: PreImage,
        tenant_id: str,
        bounds: Mapping[str, Any],
        ticket: str,
        entry: Mapping[str, Any],
    ) -> SqlResult:
        async with self._writing(tenant_id, is_for_good=True) as connection:
            began = time.monotonic()
            try:
                await self._begin(connection, is_for_good=True)
                delta = await self._run_undo(connection, image)
                result = SqlResult(
                    row_count=len(image.rows), duration_ms=round((time.monotonic() - began) * 1000, 3)
                )
                return await self._finish(connection, result, delta, bounds, ticket, entry, None)
            except psycopg.Error as error:
                raise self._refused_write(error) from None

    async def _run_undo(self, connection: _Connection, image: PreImage) -> Delta:
        generated = await (
            await connection.execute(
                "SELECT a.attname::text FROM pg_catalog.pg_attribute a "
                "WHERE a.attrelid = pg_catalog.to_regclass(%s) AND a.attgenerated <> ''",
                (_identifier(image.table).as_string(None),),
            )
        ).fetchall()
        argument = image.argument(await _documents(connection, image.table))
        statement = undo_statement(image, without={name for (name,) in generated})
        cursor = await connection.execute(statement, (argument,))
        if cursor.rowcount != len(image.rows):
            raise Refused(
                f"{len(image.rows)} rows of {image.table} were changed by that write and only {cursor.rowcount} of "
                "them are still as it left them: somebody changed or removed the others since. Nothing was undone"
            )
        delta = await _delta(connection)
        found = await (await connection.execute(image_by_key(image), (argument,))).fetchall()
        if not image.is_same([row for (row,) in found], image.expected()):
            raise Refused(
                f"the rows of {image.table} would not be as they were: a trigger, a default or a rounding changes what "
                "is put back. Nothing was undone"
            )
        return delta

    async def _finish(
        self,
        connection: _Connection,
        result: SqlResult,
        delta: Delta,
        bounds: Mapping[str, Any],
        ticket: str,
        entry: Mapping[str, Any],
        pre_image: dict[str, Any] | None,
    ) -> SqlResult:
        """Hold the write to its bounds, write the log row, commit."""
        is_loose = "not_tried" in bounds
        for table, changed in delta.items():
            for what, count in changed.items():
                if is_loose and what not in (bounds.get(table) or {}):
                    continue
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
            "result": as_recorded(replace(result, delta=delta).value),
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
        log_id = str(told["log_id"]) if isinstance(told, dict) and "log_id" in told else None
        return replace(result, delta=delta, log_id=log_id)

    @asynccontextmanager
    async def _writing(self, tenant_id: str, *, is_for_good: bool = False) -> AsyncIterator[_Connection]:
        """A connection of the writer, for one transaction: whatever was not committed is undone by closing it.

        Raises:
            NotRun: of a write for good there was no connection, so nobody needs to ask whether it took place.
        """
        with _surely_not_run(is_for_good):
            url = await self._address(tenant_id, "writer")
        async with self._turns.setdefault(url, asyncio.Semaphore(CONNECTIONS_MAX - 1)):
            with _surely_not_run(is_for_good):
                connection = await self._connect_checked(url, tenant_id, prepare_threshold=5)
            try:
                yield connection
            finally:
                await connection.close()

    async def _begin(self, connection: _Connection, *, is_for_good: bool = False) -> None:
        with _surely_not_run(is_for_good):
            await connection.execute("BEGIN TRANSACTION ISOLATION LEVEL READ COMMITTED READ WRITE")
            await connection.execute(self._limits())
            row = await (await connection.execute("SHOW track_counts")).fetchone()
        if row != ("on",):
            raise NotRun(
                "track_counts is off on this server, so nobody can tell which rows a write changes. Turn it on to let "
                "agents write"
            )

    # --- logins -------------------------------------------------------------------------------------------------

    async def _address(self, tenant_id: str, kind: Kind) -> str:
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


@contextmanager
def _surely_not_run(is_for_good: bool) -> Iterator[None]:
    """Before a write is sent, a connection that fails means that nothing took place."""
    try:
        yield
    except (DatabaseUnavailable, psycopg.Error) as error:
        if not is_for_good:
            raise
        emit("sql_write_not_begun", reason=str(error))
        raise NotRun("the database could not be reached, so nothing was run. Try again later") from None


async def _or_none(connection: _Connection, query: Any, arguments: tuple[Any, ...]) -> list[Any] | None:
    """The first column of a query that only undo needs; `None` where it fails: then there is no undo."""
    try:
        async with connection.transaction():
            found = await (await connection.execute(query, arguments or None)).fetchall()
    except (psycopg.Error, ValueError) as error:
        state = getattr(error, "sqlstate", None)
        if isinstance(error, psycopg.OperationalError) and (state is None or state.startswith(_LOST)):
            raise
        return None  # a view, or a right that is missing: the write itself may still be in order
    return [value for (value,) in found]


async def _columns(connection: _Connection, table: str) -> tuple[str, ...]:
    cursor = await connection.execute(
        "SELECT a.attname::text FROM pg_catalog.pg_attribute a WHERE a.attrelid = pg_catalog.to_regclass(%s) "
        "AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attnum",
        (_identifier(table).as_string(None),),
    )
    return tuple(name for (name,) in await cursor.fetchall())


async def _documents(connection: _Connection, table: str) -> set[str]:
    """Columns of type json or jsonb, or of a domain of them."""
    cursor = await connection.execute(
        """
        WITH RECURSIVE kinds AS (
            SELECT t.oid FROM pg_catalog.pg_type t
            WHERE t.oid IN ('pg_catalog.json'::pg_catalog.regtype, 'pg_catalog.jsonb'::pg_catalog.regtype)
            UNION SELECT t.oid FROM pg_catalog.pg_type t JOIN kinds k ON t.typbasetype = k.oid)
        SELECT a.attname::text FROM pg_catalog.pg_attribute a JOIN kinds k ON k.oid = a.atttypid
        WHERE a.attrelid = pg_catalog.to_regclass(%s) AND a.attnum > 0 AND NOT a.attisdropped
        """,
        (_identifier(table).as_string(None),),
    )
    return {name for (name,) in await cursor.fetchall()}


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


def _without_values(error: psycopg.Error) -> str:
    """The server's first sentence; what it quotes of rows, or what triggers say, is left out."""
    said = error.diag.message_primary or str(error) or type(error).__name__
    kind = (error.sqlstate or "")[:2]
    if kind == "P0":
        return "a function or trigger refused it"
    if kind == "22":  # data that cannot be is quoted, and may itself hold quotes
        said = _QUOTED.sub('"…"', said)
    return said[:300]


def _refused(error: psycopg.Error, kind: Kind, seconds: float) -> LearningError:
    """Our error for what the server said to an agent's statement."""
    said = _without_values(error)
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
    if state.startswith("53"):
        return Refused(f"the statement needs more than the server gives ({said}). Ask for less")
    if state in ("40001", "40P01"):
        return Refused(f"somebody else changed the same rows at the same time ({said}). Try again")
    return InvalidRequest(f"the database refused the statement: {said} (SQLSTATE {state})")
