"""Run agents' SQL: reads in a transaction that is always rolled back, writes held to the rows that were approved.

What the gate let through is run as the text that the gate made, by logins that can do no more than the policy file
says, over the extended protocol, which takes one statement and no more.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import psycopg
from psycopg import AsyncConnection

from agent.database.protocol import refusal
from agent.errors import DatabaseUnavailable, InvalidRequest, Refused
from agent.events import emit
from agent.execution.result_text import as_recorded
from agent.execution.sql_connections import CONNECT_SECONDS, SqlConnections
from agent.execution.sql_faults import NotRun, is_lost, refused, refused_write, surely_not_run
from agent.execution.sql_images import image_before, kept_after, put_back
from agent.execution.sql_result import Collected, Delta, SqlResult, last_column
from agent.execution.sql_side_effects import delta_of, outside_effects
from agent.execution.sql_undo import (
    PreImage,
    gives_rows,
    with_images,
)
from agent.portal import forget_in_forked_child, portal

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from agent.approval.policy_file import PolicyFile
    from agent.execution.sql_policy import SqlVerdict
    from agent.settings import Settings

__all__ = ["NotRun", "SqlRunner"]

T = TypeVar("T")
_GRACE_SECONDS = 5.0  # beyond the server's own time-out: then the connection is given up
_READ_GRACE_SECONDS = 3.0  # the same for a read
_PAUSE_SECONDS = 60.0  # without reads of a tenant, after one that the server did not end in time
_Connection = AsyncConnection[tuple[Any, ...]]


class SqlRunner:
    """Runs statements for any tenant. One per process is enough; connections are opened when needed."""

    def __init__(self, settings: Settings, policy: PolicyFile) -> None:
        self._settings = settings
        self._policy = policy
        self._reset()
        forget_in_forked_child(self)

    def _reset(self) -> None:
        self._connections = SqlConnections(self._settings, self._policy)
        self._paused_until: dict[str, float] = {}

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
        return await portal().run(
            self._in_time(self._outside_effects(sorted(verdict.tables_written), tenant_id))
        )

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
        await portal().run(self._connections.close())

    # --- reading ------------------------------------------------------------------------------------------------

    async def _read(self, text: bytes, tenant_id: str, *, is_select: bool) -> SqlResult:
        async with self._connections.reading(tenant_id) as connection:
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
        await self._connections.cut(connection, tenant_id)

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
            raise refused(error, "reader", self._policy.sql.timeout_seconds) from None
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

    # --- writing ------------------------------------------------------------------------------------------------

    async def _try(self, text: bytes, tenant_id: str) -> Delta:
        async with self._connections.writing(tenant_id) as connection:
            try:
                await self._begin(connection)
                if gives_rows(text.decode()):
                    # One row at a time, each forgotten: together they may be large.
                    async for _ in connection.cursor().stream(text):
                        pass
                else:
                    await connection.execute(text, prepare=True)
                return await delta_of(connection)
            except psycopg.Error as error:
                raise refused_write(error, self._policy) from None

    async def _outside_effects(self, tables: Sequence[str], tenant_id: str) -> tuple[str, ...]:
        async with self._connections.reading(tenant_id) as connection:
            return await outside_effects(connection, tables)

    async def _write(
        self,
        text: bytes,
        tenant_id: str,
        bounds: Mapping[str, Any],
        ticket: str,
        entry: Mapping[str, Any],
    ) -> SqlResult:
        async with self._connections.writing(tenant_id, is_for_good=True) as connection:
            began = time.monotonic()
            try:
                await self._begin(connection, is_for_good=True)
                image, why_not = await image_before(connection, text.decode(), tenant_id, self._policy)
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
                delta = await delta_of(connection)
                kept = await kept_after(connection, image, delta, self._policy)
                if kept is None and why_not:
                    kept = {"not_kept": why_not}
                result = collected.result(began)
                return await self._finish(connection, result, delta, bounds, ticket, entry, kept)
            except psycopg.Error as error:
                raise refused_write(error, self._policy) from None

    async def _try_undo(self, image: PreImage, tenant_id: str) -> Delta:
        async with self._connections.writing(tenant_id) as connection:
            try:
                await self._begin(connection)
                return await put_back(connection, image)
            except psycopg.Error as error:
                raise refused_write(error, self._policy) from None

    async def _undo(
        self,
        image: PreImage,
        tenant_id: str,
        bounds: Mapping[str, Any],
        ticket: str,
        entry: Mapping[str, Any],
    ) -> SqlResult:
        async with self._connections.writing(tenant_id, is_for_good=True) as connection:
            began = time.monotonic()
            try:
                await self._begin(connection, is_for_good=True)
                delta = await put_back(connection, image)
                result = SqlResult(
                    row_count=len(image.rows), duration_ms=round((time.monotonic() - began) * 1000, 3)
                )
                return await self._finish(connection, result, delta, bounds, ticket, entry, None)
            except psycopg.Error as error:
                raise refused_write(error, self._policy) from None

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
            if is_lost(error):
                raise
            raise refusal("finish_write", str(error.sqlstate), error.diag.message_primary or "") from None
        await connection.execute("COMMIT")
        told = row[0] if row else None
        log_id = str(told["log_id"]) if isinstance(told, dict) and "log_id" in told else None
        return replace(result, delta=delta, log_id=log_id)

    async def _begin(self, connection: _Connection, *, is_for_good: bool = False) -> None:
        with surely_not_run(is_for_good):
            await connection.execute("BEGIN TRANSACTION ISOLATION LEVEL READ COMMITTED READ WRITE")
            await connection.execute(self._limits())
            row = await (await connection.execute("SHOW track_counts")).fetchone()
        if row != ("on",):
            raise NotRun(
                "track_counts is off on this server, so nobody can tell which rows a write changes. Turn it on to let "
                "agents write"
            )

    async def _in_time(self, work: Coroutine[Any, Any, T]) -> T:
        """The work, given up where even the server's own time-outs do not end it."""
        seconds = 4 * self._policy.sql.timeout_seconds + 3 * CONNECT_SECONDS + _GRACE_SECONDS
        try:
            async with asyncio.timeout(seconds):
                return await work
        except TimeoutError:
            raise DatabaseUnavailable(
                f"the database did not answer within {seconds:.0f} seconds. "
                "Whether a write took place, only the log tells"
            ) from None


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
