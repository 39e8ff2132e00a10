"""Which rows a change can hit, as far as constants in it tell."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import postgast

from agent.execution.sql_tree import children, kind, strings, unwrap

_LIST_LIMIT: Final = 100
# System columns with one value for many rows.
_SHARED_BY_ROWS: Final = frozenset({"tableoid", "xmin", "xmax", "cmin", "cmax"})
# What a boolean column takes for true and false.
_BOOLEAN_TEXTS: Final = frozenset({
    "", "0", "1", "f", "fa", "fal", "fals", "false", "n", "no", "of", "off", "on", "t", "tr", "tru", "true", "y", "ye",
    "yes",
})  # fmt: skip
# Functions of which a VALUES list may be made that overwrites: one value each, known from what is written.
_ONE_VALUE: Final = frozenset({
    "abs", "concat", "convert_to", "date", "decode", "gen_random_uuid", "jsonb_build_array", "jsonb_build_object",
    "lower", "make_date", "make_interval", "make_timestamp", "make_timestamptz", "now", "round", "timezone",
    "to_date", "to_json", "to_jsonb", "to_timestamp", "to_tsvector", "trim", "btrim", "upper",
})  # fmt: skip
_NAMING: Final = frozenset({"funcname", "name", "type_name"})


def is_of_constants(source: Any) -> bool:
    """Whether an INSERT's rows are a VALUES list that makes one row of each entry, with values that it tells."""
    return bool(source.values_lists) and all(
        _is_of_constant(unwrap(value)) for row in source.values_lists for value in unwrap(row).items
    )


def _is_of_constant(node: Any) -> bool:
    """Constants, and what is made of them by operators and functions that return one value."""
    name = kind(node)
    if name in {"A_Const", "SetToDefault", "SQLValueFunction"}:
        return True
    if name == "FuncCall":
        parts = strings(node.funcname)
        if parts[-1] not in _ONE_VALUE or parts[:-1] not in ([], ["pg_catalog"]):
            return False
    elif name not in {"A_ArrayExpr", "A_Expr", "CoalesceExpr", "List", "RowExpr", "TypeCast"}:
        return False
    return all(_is_of_constant(child) for field_name, child in children(node) if field_name not in _NAMING)


def is_bounded(node: Any, others: Sequence[Any]) -> bool:
    """Whether the WHERE of a change demands that a column of the changed table equals a constant.

    The row count of a trial run is what a person decides on; this only tells the plain cases from the rest.
    """
    if not node.HasField("where_clause"):
        return False
    relation = node.relation
    name = relation.alias.aliasname if relation.HasField("alias") else relation.relname
    return _bounding_column(unwrap(node.where_clause), name, is_alone=not others) is not None


def _bounding_column(node: Any, table: str, *, is_alone: bool) -> str | None:
    """The column that this condition ties to constants, or None when it does not."""
    if kind(node) == "BoolExpr":
        columns = [_bounding_column(unwrap(item), table, is_alone=is_alone) for item in node.args]
        if node.boolop == postgast.pg_query_pb2.BoolExprType.AND_EXPR:
            return next((column for column in columns if column is not None), None)
        if node.boolop == postgast.pg_query_pb2.BoolExprType.OR_EXPR and len(set(columns)) == 1:
            return columns[0]
        return None
    if kind(node) != "A_Expr" or strings(node.name) != ["="]:
        return None
    kinds = postgast.pg_query_pb2.A_Expr_Kind
    left, right = unwrap(node.lexpr), unwrap(node.rexpr)
    if node.kind == kinds.AEXPR_IN:
        items = [unwrap(item) for item in right.items]
    elif node.kind == kinds.AEXPR_OP_ANY and kind(right) == "A_ArrayExpr":
        items = [unwrap(item) for item in right.elements]
    elif node.kind == kinds.AEXPR_OP:
        if kind(left) != "ColumnRef":
            left, right = right, left
        items = [right]
    else:
        return None
    if kind(left) != "ColumnRef" or len(items) > _LIST_LIMIT or not all(map(_is_selective, items)):
        return None
    parts = [unwrap(item) for item in left.fields]
    if any(kind(part) != "String" for part in parts) or parts[-1].sval in _SHARED_BY_ROWS:
        return None
    if len(parts) == 1:
        return str(parts[0].sval) if is_alone else None
    return str(parts[-1].sval) if parts[-2].sval == table else None


def _is_selective(node: Any) -> bool:
    """A constant that a column can have in few rows: neither NULL nor true or false, in whatever spelling."""
    if kind(node) == "TypeCast":
        names = strings(node.type_name.names)
        return names[-1] != "bool" and not node.type_name.array_bounds and _is_selective(unwrap(node.arg))
    if kind(node) != "A_Const" or node.isnull or node.HasField("boolval"):
        return False
    return not node.HasField("sval") or node.sval.sval.strip().lower() not in _BOOLEAN_TEXTS
