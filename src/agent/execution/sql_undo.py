"""What is kept to undo a write: the rows as they were before an UPDATE or DELETE, and those that came new.

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
_FORM = 2  # of what is kept: values as texts
_MODIFYING = {"insert_stmt", "update_stmt", "delete_stmt", "merge_stmt"}


@dataclass(frozen=True, kw_only=True)
class WrittenTable:
    """What a statement changes, if that is the rows of one listed table."""

    kind: Kind
    table: str
    """`schema.name`"""
    targets: frozenset[str]
    """Columns that an UPDATE sets."""


@dataclass(frozen=True, kw_only=True)
class PreImage:
    """The rows of one write, before and after: each value as Postgres prints it, which loses nothing."""

    kind: Kind
    table: str
    key: tuple[str, ...]
    """Columns of the primary key."""
    columns: tuple[str, ...] = ()
    """What is kept of each row."""
    rows: list[dict[str, str | None]] = field(default_factory=list)
    """Before the write; of an INSERT the new rows."""
    after: list[dict[str, str | None]] = field(default_factory=list)
    """The same rows after an UPDATE."""
    targets: tuple[str, ...] = ()
    """Columns that an UPDATE set."""

    def with_rows(self, rows: Sequence[dict[str, str | None]]) -> Self:
        """The same with these rows, each once."""
        return replace(self, rows=list({_key_of(self, row): row for row in rows}.values()))

    def with_after(self, rows: list[dict[str, str | None]]) -> Self:
        """The same with the rows as they are after an UPDATE."""
        return replace(self, after=rows)

    def as_json(self) -> dict[str, Any]:
        """As the execution log keeps it."""
        return {
            "form": _FORM,
            "kind": self.kind,
            "table": self.table,
            "key": list(self.key),
            "columns": list(self.columns),
            "rows": self.rows,
            "after": self.after,
            "targets": list(self.targets),
        }

    @classmethod
    def of_log(cls, log: Mapping[str, Any]) -> Self:
        """From a row of the execution log.

        Raises:
            Refused: nothing was kept.
        """
        kept = log.get("pre_image")
        if isinstance(kept, dict) and kept.get("not_kept"):
            raise Refused(f"nothing was kept to undo that by: {kept['not_kept']}")
        if not isinstance(kept, dict) or not kept.get("rows") or kept.get("form") != _FORM:
            raise Refused(
                "nothing was kept to undo that by: only one INSERT, UPDATE or DELETE of one table with a primary key "
                "can be undone, of at most as many rows as undo_rows of the policy file says, and not if triggers "
                "changed more"
            )
        return cls(
            kind=kept["kind"],
            table=str(kept["table"]),
            key=tuple(kept["key"]),
            columns=tuple(kept["columns"]),
            rows=list(kept["rows"]),
            after=list(kept["after"]),
            targets=tuple(kept["targets"]),
        )

    def argument(self, documents: Collection[str]) -> str:
        """For the placeholder of `undo_statement` and of `image_by_key`: for each row what it was, and what it must be.

        Args:
            documents: Columns of type json or jsonb, whose text stands there as it is.
        """
        after = {_key_of(self, row): row for row in self.after}
        pairs = [
            f'{{"row": {_record(row, documents)}, "left": {json.dumps(after.get(_key_of(self, row), row))}}}'
            for row in self.rows
        ]
        return f"[{', '.join(pairs)}]"

    def expected(self) -> list[dict[str, str | None]]:
        """The rows there must be once it is undone."""
        return [] if self.kind == "insert" else self.rows

    def is_same(self, one: Sequence[dict[str, str | None]], other: Sequence[dict[str, str | None]]) -> bool:
        """Whether these are the same rows, in whatever order."""
        return sorted(map(_whole, one)) == sorted(map(_whole, other))


def _record(row: Mapping[str, str | None], documents: Collection[str]) -> str:
    parts = (
        f"{json.dumps(name)}: {value if name in documents and value is not None else json.dumps(value)}"
        for name, value in row.items()
    )
    return f"{{{', '.join(parts)}}}"


def _whole(row: Mapping[str, str | None]) -> str:
    return json.dumps(row, sort_keys=True)


def written_table(text: str, readable: Mapping[str, Collection[str] | None]) -> WrittenTable | None:
    """What this statement changes; `None` where its rows cannot be told from it.

    Args:
        text: As the gate made it: tables are named with their schema.
        readable: The listed tables.
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
    table = f"{statement.relation.schemaname}.{statement.relation.relname}"
    # A statement that changes rows elsewhere too, in a WITH, runs twice if it is made a query.
    if table not in readable or _count(whole) > 1:
        return None
    kind = cast("Kind", name.removesuffix("_stmt"))
    if kind == "insert" and statement.on_conflict_clause.action == postgast.pg_query_pb2.ONCONFLICT_UPDATE:
        return None
    targets = [item.res_target.name for item in statement.target_list] if kind == "update" else []
    return WrittenTable(kind=kind, table=table, targets=frozenset(targets))


def gives_rows(text: str) -> bool:
    """Whether this statement that changes rows also gives some back."""
    try:
        statement = postgast.parse(text).stmts[0].stmt
    except Exception:  # noqa: BLE001 - the parser has errors of several kinds; the server tells what is wrong
        return False
    node = getattr(statement, statement.WhichOneof("node"))
    returning = getattr(node, "returning_clause", None)
    return returning is None or bool(returning.exprs)


def _image(called: str, columns: Sequence[str]) -> sql.Composed:
    """A row as an object of texts. An array takes as many columns as a table has, a function does not."""
    return sql.SQL(
        "pg_catalog.jsonb_object(ARRAY[{}]::pg_catalog.text[], ARRAY[{}]::pg_catalog.text[])"
    ).format(
        sql.SQL(", ").join(map(sql.Literal, columns)),
        sql.SQL(", ").join(
            sql.SQL("{}::pg_catalog.text").format(sql.Identifier(called, column)) for column in columns
        ),
    )


def probe(table: str, columns: Sequence[str]) -> sql.Composed:
    """Gives no row, and fails where the rows of this table cannot be kept."""
    return sql.SQL("SELECT {image} FROM {table} AS t LIMIT 0").format(
        image=_image("t", columns), table=_identifier(table)
    )


def pre_image_query(text: str, columns: Sequence[str], *, rows_max: int) -> str:
    """The rows that this UPDATE is about to change, each as an object of texts, and locked; a join may give one twice.

    Args:
        rows_max: One row more than these is asked for.
    """
    statement = postgast.parse(text).stmts[0].stmt.update_stmt
    relation = statement.relation
    called = relation.alias.aliasname or relation.relname
    asked = sql.SQL("SELECT {row} FROM {place} LIMIT {limit} FOR UPDATE OF {place}")
    template = postgast.parse(
        asked.format(
            place=sql.Identifier(called), row=_image(called, columns), limit=sql.Literal(rows_max + 1)
        ).as_string(None)
    )
    query = template.stmts[0].stmt.select_stmt
    del query.from_clause[:]
    query.from_clause.add().range_var.CopyFrom(relation)
    query.from_clause.extend(statement.from_clause)
    if statement.HasField("where_clause"):
        query.where_clause.CopyFrom(statement.where_clause)
    if statement.HasField("with_clause"):
        query.with_clause.CopyFrom(statement.with_clause)
    return str(postgast.deparse(template))


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


def with_images(text: str, kind: Kind, columns: Sequence[str]) -> str:
    """The same INSERT or DELETE, giving each row in the last column of its result."""
    whole = postgast.parse(text)
    statement = getattr(whole.stmts[0].stmt, f"{kind}_stmt")
    called = statement.relation.alias.aliasname or statement.relation.relname
    extra = postgast.parse(f"SELECT {_image(called, columns).as_string(None)}")
    statement.returning_clause.exprs.extend(extra.stmts[0].stmt.select_stmt.target_list)
    return str(postgast.deparse(whole))


_KEPT = sql.SQL(
    "pg_catalog.json_array_elements(%s::pg_catalog.json) AS e(pair) "
    "CROSS JOIN LATERAL pg_catalog.json_populate_record(NULL::{table}, e.pair -> 'row') AS r"
)


def image_by_key(image: PreImage) -> sql.Composed:
    """The rows of this write as they are now, by their keys; one placeholder, for `PreImage.argument`."""
    return sql.SQL("SELECT {image} FROM {kept} JOIN {table} AS t ON {same}").format(
        image=_image("t", image.columns),
        kept=_KEPT.format(table=_table(image)),
        table=_table(image),
        same=_same_key(image, "t", "r"),
    )


def undo_statement(image: PreImage, *, without: Collection[str] = ()) -> sql.Composed:
    """The reverse of a write, in one statement; it touches only rows that are exactly as the write left them.

    Args:
        without: Generated columns, which nobody writes.

    Raises:
        Refused: the rows kept are not the rows of such a write.
    """
    table = _table(image)
    kept = _KEPT.format(table=table)
    untouched = sql.SQL("{same} AND {image} = (e.pair ->> 'left')::pg_catalog.jsonb").format(
        same=_same_key(image, "t", "r"), image=_image("t", image.columns)
    )
    if image.kind == "insert":
        return sql.SQL("DELETE FROM {table} AS t USING {kept} WHERE {untouched}").format(
            table=table, kept=kept, untouched=untouched
        )
    if image.kind == "delete":
        columns = [sql.Identifier(name) for name in image.columns if name not in without]
        return sql.SQL(
            "INSERT INTO {table} ({columns}) OVERRIDING SYSTEM VALUE SELECT {values} FROM {kept}"
        ).format(
            table=table,
            columns=sql.SQL(", ").join(columns),
            values=sql.SQL(", ").join(sql.SQL("r.{}").format(column) for column in columns),
            kept=kept,
        )
    after = {_key_of(image, row): row for row in image.after}
    before = {_key_of(image, row): row for row in image.rows}
    if after.keys() != before.keys():
        raise Refused("what was kept of that write is damaged: the rows before and after it differ")
    changed = sorted(
        {name for key, row in before.items() for name in row if row[name] != after[key].get(name)}
        - set(without)
    ) or sorted(set(image.targets) - set(without))
    return sql.SQL("UPDATE {table} AS t SET {values} FROM {kept} WHERE {untouched}").format(
        table=table,
        values=sql.SQL(", ").join(sql.SQL("{0} = r.{0}").format(sql.Identifier(name)) for name in changed),
        kept=kept,
        untouched=untouched,
    )


def _table(image: PreImage) -> sql.Identifier:
    return _identifier(image.table)


def _identifier(table: str) -> sql.Identifier:
    return sql.Identifier(*table.split(".", 1))


def _same_key(image: PreImage, one: str, other: str) -> sql.Composed:
    return sql.SQL(" AND ").join(
        sql.SQL("{} = {}").format(sql.Identifier(one, name), sql.Identifier(other, name))
        for name in image.key
    )


def _key_of(image: PreImage, row: Mapping[str, Any]) -> str:
    return json.dumps([row.get(name) for name in image.key])
