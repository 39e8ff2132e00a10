"""Keeps a statement to the listed columns of tables that list them, without knowing any table's columns.

A name counts as safe only where something proves it: the table lists it, or a subquery beside it makes it. A name that
could be a hidden column, the whole row or a function of the row is refused; most are settled by writing alias.column.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from agent.execution.sql_tree import children, kind, strings, unwrap


class HiddenColumn(Exception):
    """A column is not listed, or may not be; the message says which, and what to write instead."""


@dataclass(frozen=True)
class _Item:
    """Something in FROM."""

    columns: frozenset[str] = frozenset()
    """Columns it surely has."""
    table: str = ""
    """`schema.table` when it lists its columns: no others may be read."""


@dataclass(frozen=True)
class _Level:
    """What one query offers to the names in it."""

    items: Mapping[str, _Item] = field(default_factory=dict)
    is_partial: bool = False
    """Not all of it may be visible (LATERAL), so that a name found here may still mean something outside."""


_Chain = tuple[_Level, ...]
_Expressions = Mapping[str, frozenset[str]]
_NOTHING: Final[frozenset[str]] = frozenset()


def check_columns(statement: Any, limits: Mapping[str, frozenset[str]]) -> None:
    """Raises `HiddenColumn` unless every column read of the tables in `limits` is listed there."""
    _Columns(limits).statement(statement, (), {})


class _Columns:
    def __init__(self, limits: Mapping[str, frozenset[str]]) -> None:
        self._limits = limits

    # Statements: each returns names of columns that its result surely has

    def statement(self, node: Any, chain: _Chain, ctes: _Expressions) -> frozenset[str]:
        if node.HasField("with_clause"):
            ctes = self._expressions(node.with_clause, chain, ctes)
        name = kind(node)
        if name == "SelectStmt":
            return self._select(node, chain, ctes)
        target = self._table_item(node.relation)
        own = {_alias(node.relation): target}
        if name == "InsertStmt":
            return self._insert(node, own, chain, ctes)
        if name == "MergeStmt":
            others = self._from([node.source_relation], chain, ctes)
        else:
            others = self._from(node.from_clause if name == "UpdateStmt" else node.using_clause, chain, ctes)
        items = _together(others, own)
        inner = (_Level(items), *chain)
        returning = node.returning_clause
        self._rest(node, inner, ctes, but={"with_clause", "relation", "source_relation", "from_clause", "using_clause",
                                           "returning_clause"})  # fmt: skip
        return self._returning(returning, items, target, chain, ctes)

    def _insert(self, node: Any, own: dict[str, _Item], chain: _Chain, ctes: _Expressions) -> frozenset[str]:
        target = next(iter(own.values()))
        if node.HasField("select_stmt"):
            self.statement(unwrap(node.select_stmt), chain, ctes)
        if node.HasField("on_conflict_clause"):
            conflict = node.on_conflict_clause
            for item in conflict.infer.index_elems:
                column = unwrap(item).name
                if column and target.table and column not in target.columns:
                    raise _hidden(target.table, column)
            self._rest(conflict, (_Level(_together(own, {"excluded": target})), *chain), ctes, but=set())
        return self._returning(node.returning_clause, own, target, chain, ctes)

    def _returning(
        self, clause: Any, items: dict[str, _Item], target: _Item, chain: _Chain, ctes: _Expressions
    ) -> frozenset[str]:
        names = {"old", "new"} | {unwrap(item).value for item in clause.options}
        level = _Level(_together(dict.fromkeys(names, target), items))
        return self._targets(clause.exprs, (level, *chain), ctes)

    def _expressions(self, clause: Any, chain: _Chain, ctes: _Expressions) -> _Expressions:
        known = dict(ctes)
        expressions = [unwrap(item) for item in clause.ctes]
        if clause.recursive:
            known.update(dict.fromkeys([expression.ctename for expression in expressions], _NOTHING))
        for expression in expressions:
            made = self.statement(unwrap(expression.ctequery), chain, known)
            named = frozenset(strings(expression.aliascolnames))
            known[expression.ctename] = named or made
        return known

    def _select(self, node: Any, chain: _Chain, ctes: _Expressions) -> frozenset[str]:
        if node.HasField("larg"):
            made = self.statement(node.larg, chain, ctes)
            self.statement(node.rarg, chain, ctes)
            self._rest(node, (_Level({"": _Item(made)}), *chain), ctes, but={"larg", "rarg", "with_clause"})
            return made
        items = self._from(node.from_clause, chain, ctes)
        inner = (_Level(items), *chain)
        made = self._targets(node.target_list, inner, ctes)
        self._sorting(node.sort_clause, made, inner, ctes)
        self._rest(node, inner, ctes, but={"from_clause", "target_list", "sort_clause", "with_clause"})
        return made

    def _targets(self, targets: Iterable[Any], chain: _Chain, ctes: _Expressions) -> frozenset[str]:
        names = set()
        for item in targets:
            target = unwrap(item)
            value = unwrap(target.val)
            if (
                kind(value) == "ColumnRef"
                and len(value.fields) == 1
                and kind(unwrap(value.fields[0])) == "A_Star"
            ):
                for source in chain[0].items.values():
                    if source.table:
                        raise HiddenColumn(
                            f"name the columns of {source.table} instead of *: {_listed(source)}"
                        )
                continue
            self._visit(value, chain, ctes)
            if target.name:
                names.add(target.name)
            elif kind(value) == "ColumnRef" and kind(unwrap(value.fields[-1])) == "String":
                names.add(unwrap(value.fields[-1]).sval)
        return frozenset(names)

    def _sorting(
        self, clause: Iterable[Any], made: frozenset[str], chain: _Chain, ctes: _Expressions
    ) -> None:
        for item in clause:
            value = unwrap(unwrap(item).node)
            # ORDER BY looks among the results first; GROUP BY does not.
            if not (
                kind(value) == "ColumnRef" and len(value.fields) == 1 and strings(value.fields)[0] in made
            ):
                self._visit(value, chain, ctes)

    # FROM

    def _from(self, nodes: Sequence[Any], chain: _Chain, ctes: _Expressions) -> dict[str, _Item]:
        items: dict[str, _Item] = {}
        for node in nodes:
            items = _together(items, self._source(unwrap(node), items, chain, ctes))
        return items

    def _source(
        self, node: Any, before: Mapping[str, _Item], chain: _Chain, ctes: _Expressions
    ) -> dict[str, _Item]:
        """The items of one entry of FROM; `before` is what stands left of it."""
        lateral = (_Level(before, is_partial=True), *chain)
        name = kind(node)
        if name == "JoinExpr":
            return self._join(node, before, chain, ctes)
        if name == "RangeVar":
            if not node.schemaname:
                named = frozenset(strings(node.alias.colnames))
                return {_alias(node): _Item(named or ctes.get(node.relname, _NOTHING))}
            return {_alias(node): self._table_item(node)}
        if name == "RangeSubselect":
            made = self.statement(unwrap(node.subquery), lateral if node.lateral else chain, ctes)
            return {_alias(node): _Item(frozenset(strings(node.alias.colnames)) or made)}
        if name == "RangeTableSample":
            self._rest(node, lateral, ctes, but={"relation"})
            return self._source(unwrap(node.relation), before, chain, ctes)
        self._rest(node, lateral, ctes, but=set())
        return {_alias(node) or f" {len(before)}": _Item(frozenset(strings(node.alias.colnames)))}

    def _table_item(self, node: Any) -> _Item:
        table = f"{node.schemaname}.{node.relname}"
        columns = self._limits.get(table)
        if columns is None:
            return _Item()
        if node.alias.colnames:
            raise HiddenColumn(f"leave the names of columns out of the alias of {table}")
        return _Item(columns, table)

    def _join(
        self, node: Any, before: Mapping[str, _Item], chain: _Chain, ctes: _Expressions
    ) -> dict[str, _Item]:
        left = self._source(unwrap(node.larg), before, chain, ctes)
        right = self._source(unwrap(node.rarg), _together(before, left), chain, ctes)
        items = _together(left, right)
        limited = next((item for item in items.values() if item.table), None)
        if limited is not None:
            if node.is_natural:
                raise HiddenColumn(f"NATURAL JOIN may compare hidden columns of {limited.table}; write ON")
            if node.HasField("alias") or node.HasField("join_using_alias"):
                raise HiddenColumn(f"leave the alias out of the join with {limited.table}")
            for column in strings(node.using_clause):
                for side in (left, right):
                    self._find(column, (_Level(side),))
        if node.HasField("quals"):
            self._visit(unwrap(node.quals), (_Level(items), *chain), ctes)
        if node.HasField("alias"):
            return {node.alias.aliasname: _Item(frozenset(strings(node.alias.colnames)))}
        return items

    # Expressions

    def _rest(self, node: Any, chain: _Chain, ctes: _Expressions, *, but: set[str]) -> None:
        for field_name, child in children(node):
            if field_name not in but:
                self._visit(child, chain, ctes)

    def _visit(self, node: Any, chain: _Chain, ctes: _Expressions) -> None:
        name = kind(node)
        if name == "ColumnRef":
            self._column(node, chain)
        elif name == "SelectStmt":
            self.statement(node, chain, ctes)
        else:
            self._rest(node, chain, ctes, but=set())

    def _column(self, node: Any, chain: _Chain) -> None:
        parts = [unwrap(item) for item in node.fields]
        is_star = kind(parts[-1]) == "A_Star"
        if len(parts) == 1:
            if is_star:
                raise HiddenColumn("* may only stand alone after SELECT")
            self._find(parts[0].sval, chain)
            return
        alias = parts[-2].sval
        if len(parts) > 2:
            # With a schema it is this table of whichever query around has it, past nearer things of the same name.
            table = f"{parts[-3].sval}.{alias}"
            if table in self._limits:
                self._check_listed(_Item(self._limits[table], table), parts[-1], table)
            return
        for level in chain:
            item = level.items.get(alias)
            if item is None:
                continue
            if item.table:
                self._check_listed(item, parts[-1], alias)
            if not level.is_partial:
                return

    @staticmethod
    def _check_listed(item: _Item, last: Any, prefix: str) -> None:
        if kind(last) == "A_Star":
            raise HiddenColumn(f"name the columns of {item.table} instead of {prefix}.*: {_listed(item)}")
        if last.sval not in item.columns:
            raise _hidden(item.table, last.sval)

    def _find(self, column: str, chain: _Chain) -> None:
        for level in chain:
            is_known = any(column in item.columns for item in level.items.values())
            if not is_known:
                for item in level.items.values():
                    if item.table:
                        raise _hidden(item.table, column)
            elif not level.is_partial:
                return


def _together(one: Mapping[str, _Item], other: Mapping[str, _Item]) -> dict[str, _Item]:
    """Both; Postgres takes two tables of one name when their schemas differ, and then a name means either."""
    for name in one.keys() & other.keys():
        if one[name] is not other[name] and (table := one[name].table or other[name].table):
            raise HiddenColumn(f"two things are named {name!r}; give {table} an alias of its own")
    return {**one, **other}


def _alias(node: Any) -> str:
    if node.HasField("alias"):
        return str(node.alias.aliasname)
    return str(node.relname) if kind(node) == "RangeVar" else ""


def _listed(item: _Item) -> str:
    return ", ".join(sorted(item.columns)) or "none may be read"


def _hidden(table: str, column: str) -> HiddenColumn:
    return HiddenColumn(
        f"{column!r} is not a readable column of {table}; if it belongs to another table write alias.{column},"
        " and group by the expression itself instead of its name"
    )
