"""The rows of a write as they were: kept when it runs, where they can be, and put back when it is undone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import psycopg
from psycopg import AsyncConnection, sql

from agent.errors import Refused
from agent.execution.sql_faults import is_lost
from agent.execution.sql_result import Delta
from agent.execution.sql_side_effects import delta_of
from agent.execution.sql_undo import (
    PreImage,
    image_by_key,
    pre_image_query,
    probe,
    undo_statement,
    written_table,
)

if TYPE_CHECKING:
    from agent.approval.policy_file import PolicyFile

_Connection = AsyncConnection[tuple[Any, ...]]


async def image_before(
    connection: _Connection, text: str, tenant_id: str, policy: PolicyFile
) -> tuple[PreImage | None, str | None]:
    """What undo needs to know before the statement runs, or `None` and, where it is worth telling, why not."""
    limit = policy.sql.undo_rows
    readable = {
        table.name: table.columns
        for table in policy.tables
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
        or await _has_triggers(connection, written.table)
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


async def kept_after(
    connection: _Connection, image: PreImage | None, delta: Delta, policy: PolicyFile
) -> dict[str, Any] | None:
    """What is kept for undo, if the rows known are all the rows changed."""
    if image is None or set(delta) != {image.table} or len(image.rows) > policy.sql.undo_rows:
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


async def put_back(connection: _Connection, image: PreImage) -> Delta:
    """Put back the rows of a logged write, exactly. Returns what that changed.

    Raises:
        Refused: they were changed since, or would not be as they were.
    """
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
    delta = await delta_of(connection)
    found = await (await connection.execute(image_by_key(image), (argument,))).fetchall()
    if not image.is_same([row for (row,) in found], image.expected()):
        raise Refused(
            f"the rows of {image.table} would not be as they were: a trigger, a default or a rounding changes what "
            "is put back. Nothing was undone"
        )
    return delta


async def _has_triggers(connection: _Connection, table: str) -> bool:
    cursor = await connection.execute(
        "SELECT FROM pg_catalog.pg_trigger t WHERE t.tgrelid = pg_catalog.to_regclass(%s) "
        "AND NOT t.tgisinternal AND t.tgenabled <> 'D' LIMIT 1",
        (_identifier(table).as_string(None),),
    )
    return await cursor.fetchone() is not None


async def _or_none(connection: _Connection, query: Any, arguments: tuple[Any, ...]) -> list[Any] | None:
    """The first column of a query that only undo needs; `None` where it fails: then there is no undo."""
    try:
        async with connection.transaction():
            found = await (await connection.execute(query, arguments or None)).fetchall()
    except (psycopg.Error, ValueError) as error:
        if isinstance(error, psycopg.OperationalError) and is_lost(error):
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
