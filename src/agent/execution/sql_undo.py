"""What is kept to undo a write: the rows as they were before an UPDATE or DELETE, the keys of rows that came new.

Only statements whose rows can be told from the statement are undone: one UPDATE, DELETE or INSERT of one table with a
primary key. Everything here is pure; `sql_runner` runs it.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Self, cast

import postgast
from google.protobuf.message import Message
from psycopg import sql

from agent.errors import Refused

Kind = Literal["insert", "update", "delete"]
_MODIFYING = {"insert_stmt", "update_stmt", "delete_stmt", "merge_stmt"}


@dataclass(frozen=True, kw_only=True)
class PreImageQuery:
    """How to see what a statement is about to change."""

    kind: Kind
    table: str
    """`schema.name`"""
    text: str
    """Gives each row as JSON, and locks it; a join may give it twice. Empty for an INSERT."""


@dataclass(frozen=True, kw_only=True)
class PreImage:
    """The rows of one write, before and after."""

    kind: Kind
    table: str
    key: tuple[str, ...]
    """Columns of the primary key."""
    rows: list[dict[str, Any]] = field(default_factory=list)
    """Before the write; of an INSERT only the keys of the new rows."""
    after: list[dict[str, Any]] = field(default_factory=list)
    """The same rows after an UPDATE."""
    statement: str | None = None
    """What to run in place of an INSERT, so that it tells the keys."""

    def with_rows(self, rows: Sequence[dict[str, Any]]) -> Self:
        """The same with these rows, each once."""
        return replace(self, rows=list({_key_of(self, row): row for row in rows}.values()))

    def with_keys_of(self, values: Sequence[Sequence[Any]]) -> Self:
        """The same with the keys of the rows that came new."""
        return replace(self, rows=[dict(zip(self.key, row, strict=True)) for row in values])

    def with_after(self, rows: list[dict[str, Any]]) -> Self:
        """The same with the rows as they are after an UPDATE."""
        return replace(self, after=rows)

    def as_json(self) -> dict[str, Any]:
        """As the execution log keeps it."""
        return {
            "kind": self.kind,
            "table": self.table,
            "key": list(self.key),
            "rows": self.rows,
            "after": self.after,
        }

    @classmethod
    def of_log(cls, log: Mapping[str, Any]) -> Self:
        """From a row of the execution log.

        Raises:
            Refused: nothing was kept.
        """
        kept = log.get("pre_image")
        if not isinstance(kept, dict) or not kept.get("rows"):
            raise Refused(
                "nothing was kept to undo that by: only one INSERT, UPDATE or DELETE of one table with a primary key "
                "can be undone, of at most as many rows as undo_rows of the policy file says, and not if triggers "
                "changed more"
            )
        return cls(
            kind=kept["kind"],
            table=str(kept["table"]),
            key=tuple(kept["key"]),
            rows=list(kept["rows"]),
            after=list(kept["after"]),
        )

    def arguments(self) -> tuple[str, ...]:
        """For the placeholders of `undo_statement`."""
        rows = json.dumps(self.rows)
        return (rows, json.dumps(self.after)) if self.kind == "update" else (rows,)


def pre_image_query(
    text: str, readable: Mapping[str, Collection[str] | None], *, rows_max: int
) -> PreImageQuery | None:
    """How to see what this statement is about to change; `None` where it cannot be told from it.

    Args:
        text: As the gate made it: tables are named with their schema.
        readable: The listed tables, and their readable columns where not all are.
        rows_max: One row more than these is asked for.
    """
    try:
        whole = postgast.parse(text)
    except Exception:  # noqa: BLE001 - the parser has errors of several kinds, and without it there is just no undo
        return None
    if len(whole.stmts) != 1:
        return None
    name = whole.stmts[0].stmt.WhichOneof("node")
    if name not in ("insert_stmt", "update_stmt", "delete_stmt"):
        return None
    statement = getattr(whole.stmts[0].stmt, name)
    relation = statement.relation
    table = f"{relation.schemaname}.{relation.relname}"
    # A statement that changes rows elsewhere too, in a WITH, runs twice if it is made a query.
    if table not in readable or _count(whole) > 1:
        return None
    kind = cast("Kind", name.removesuffix("_stmt"))
    if kind == "insert":
        is_upsert = statement.on_conflict_clause.action == postgast.pg_query_pb2.ONCONFLICT_UPDATE
        return None if is_upsert else PreImageQuery(kind=kind, table=table, text="")
    called = relation.alias.aliasname or relation.relname
    columns = readable[table]
    row = (
        sql.SQL("pg_catalog.to_jsonb({}.*)").format(sql.Identifier(called))
        if columns is None
        else sql.SQL("pg_catalog.jsonb_build_object({})").format(
            sql.SQL(", ").join(
                sql.SQL("{}, {}").format(sql.Literal(column), sql.Identifier(called, column))
                for column in sorted(columns)
            )
        )
    )
    asked = sql.SQL("SELECT {row} FROM {place} LIMIT {limit} FOR UPDATE OF {place}")
    template = postgast.parse(
        asked.format(place=sql.Identifier(called), row=row, limit=sql.Literal(rows_max + 1)).as_string(None)
    )
    query = template.stmts[0].stmt.select_stmt
    del query.from_clause[:]
    query.from_clause.add().range_var.CopyFrom(relation)
    query.from_clause.extend(statement.from_clause if kind == "update" else statement.using_clause)
    if statement.HasField("where_clause"):
        query.where_clause.CopyFrom(statement.where_clause)
    if statement.HasField("with_clause"):
        query.with_clause.CopyFrom(statement.with_clause)
    return PreImageQuery(kind=kind, table=table, text=postgast.deparse(template))


def _count(message: Message) -> int:
    """How many parts of this tree change rows."""
    found, to_do = 0, [message]
    while to_do:
        for descriptor, value in to_do.pop().ListFields():
            if descriptor.message_type is None:
                continue
            found += descriptor.name in _MODIFYING
            to_do += [value] if isinstance(value, Message) else list(value)
    return found


def insert_with_keys(text: str, key: Sequence[str]) -> str:
    """The same INSERT, giving the key of each new row in the last columns of its result."""
    whole = postgast.parse(text)
    statement = whole.stmts[0].stmt.insert_stmt
    called = statement.relation.alias.aliasname or statement.relation.relname
    wanted = sql.SQL(", ").join(sql.Identifier(called, column) for column in key).as_string(None)
    extra = postgast.parse(f"SELECT {wanted}").stmts[0].stmt.select_stmt.target_list
    statement.returning_clause.exprs.extend(extra)
    return str(postgast.deparse(whole))


def after_image_query(image: PreImage) -> sql.Composed:
    """The rows of this UPDATE by their keys, with the same columns; one placeholder, for the rows before."""
    columns = sorted(image.rows[0]) if image.rows else []
    pairs = sql.SQL(", ").join(
        sql.SQL("{}, t.{}").format(sql.Literal(column), sql.Identifier(column)) for column in columns
    )
    return sql.SQL(
        "SELECT pg_catalog.jsonb_build_object({pairs}) FROM {table} AS t JOIN "
        "pg_catalog.jsonb_populate_recordset(NULL::{table}, %s::pg_catalog.jsonb) AS r ON {same}"
    ).format(pairs=pairs, table=_table(image), same=_same_key(image, "t", "r"))


def undo_statement(image: PreImage, *, without: Collection[str] = ()) -> sql.Composed:
    """The reverse of a write, in one statement; it touches only rows that are still as the write left them.

    Args:
        without: Generated columns, which nobody writes.

    Raises:
        Refused: the rows kept are not the rows of such a write.
    """
    table = _table(image)
    if image.kind == "insert":
        return sql.SQL(
            "DELETE FROM {table} AS t USING "
            "pg_catalog.jsonb_populate_recordset(NULL::{table}, %s::pg_catalog.jsonb) AS r WHERE {same}"
        ).format(table=table, same=_same_key(image, "t", "r"))
    if image.kind == "delete":
        columns = [sql.Identifier(name) for name in sorted(image.rows[0]) if name not in without]
        return sql.SQL(
            "INSERT INTO {table} ({columns}) OVERRIDING SYSTEM VALUE SELECT {values} FROM "
            "pg_catalog.jsonb_populate_recordset(NULL::{table}, %s::pg_catalog.jsonb) AS r"
        ).format(
            table=table,
            columns=sql.SQL(", ").join(columns),
            values=sql.SQL(", ").join(sql.SQL("r.{}").format(column) for column in columns),
        )
    after = {_key_of(image, row): row for row in image.after}
    before = {_key_of(image, row): row for row in image.rows}
    if after.keys() != before.keys():
        raise Refused("what was kept of that write is damaged: the rows before and after it differ")
    changed = sorted(
        {name for key, row in before.items() for name in row if row[name] != after[key].get(name)}
        - set(without)
    ) or sorted(set(image.rows[0]) - set(image.key) - set(without))
    return sql.SQL(
        "UPDATE {table} AS t SET {values} FROM "
        "pg_catalog.jsonb_populate_recordset(NULL::{table}, %s::pg_catalog.jsonb) AS r JOIN "
        "pg_catalog.jsonb_populate_recordset(NULL::{table}, %s::pg_catalog.jsonb) AS a ON {pair} "
        "WHERE {same} AND {untouched}"
    ).format(
        table=table,
        values=sql.SQL(", ").join(sql.SQL("{0} = r.{0}").format(sql.Identifier(name)) for name in changed),
        pair=_same_key(image, "r", "a"),
        same=_same_key(image, "t", "r"),
        # As text: not every type has an equality.
        untouched=sql.SQL(" AND ").join(
            sql.SQL("t.{0}::text IS NOT DISTINCT FROM a.{0}::text").format(sql.Identifier(name))
            for name in changed
        ),
    )


def _table(image: PreImage) -> sql.Identifier:
    return sql.Identifier(*image.table.split(".", 1))


def _same_key(image: PreImage, one: str, other: str) -> sql.Composed:
    return sql.SQL(" AND ").join(
        sql.SQL("{} = {}").format(sql.Identifier(one, name), sql.Identifier(other, name))
        for name in image.key
    )


def _key_of(image: PreImage, row: Mapping[str, Any]) -> str:
    return json.dumps([row.get(name) for name in image.key])
