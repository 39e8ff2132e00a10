"""Refuses what Postgres computes in one go, without looking up whether it was told to stop, when it could take long.

A time limit ends a query at its next look. Some functions compare every part of one value with every part of another
and look never: seconds for two values of a megabyte. So one of the two must be small or come from a row as it is, and
neither may be put together by the statement: by an aggregate, an array of a query, long repetition or recursion.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, Final

import postgast

from agent.execution.sql_tree import children, kind, strings, unwrap


class UnendingWork(Exception):
    """It may outlast the time limit; the message says what, and what to write instead."""


# Compared part by part with each other, whichever side is which.
_EITHER_OPERATORS: Final = frozenset({"&&", "@>", "<@", "?|", "?&"})
# The right side is looked for in the left one.
_RIGHT_OPERATORS: Final = frozenset({"~~", "~~*", "!~~", "!~~*", "~", "~*", "!~", "!~*"})
_EITHER_FUNCTIONS: Final = frozenset({
    "arraycontained", "arraycontains", "arrayoverlap", "jsonb_contained", "jsonb_contains", "jsonb_delete",
    "jsonb_exists_all", "jsonb_exists_any",
})  # fmt: skip
_RIGHT_FUNCTIONS: Final = frozenset({
    "btrim", "bpchariclike", "bpcharicnlike", "bpcharicregexeq", "bpcharicregexne", "bpcharlike", "bpcharnlike",
    "bpcharregexeq", "bpcharregexne", "bytealike", "byteanlike", "like", "ltrim", "nameiclike", "nameicnlike",
    "nameicregexeq", "nameicregexne", "namelike", "namenlike", "nameregexeq", "nameregexne", "notlike", "position",
    "regexp_count", "regexp_instr", "regexp_like", "regexp_match", "regexp_matches", "regexp_replace",
    "regexp_split_to_array", "regexp_split_to_table", "regexp_substr", "replace", "rtrim", "split_part",
    "string_to_array", "string_to_table", "strpos", "substring", "texticlike", "texticnlike", "texticregexeq",
    "texticregexne", "textlike", "textnlike", "textregexeq", "textregexne", "translate",
})  # fmt: skip
_XML_FUNCTIONS: Final = frozenset({"xmlexists", "xpath", "xpath_exists"})
OPERATORS: Final = _EITHER_OPERATORS | _RIGHT_OPERATORS | {"-"}
FUNCTIONS: Final = _EITHER_FUNCTIONS | _RIGHT_FUNCTIONS | _XML_FUNCTIONS
"""What `check_effort` wants to see."""

# What makes one value of many, or a long one of a short one.
_BUILDERS: Final = frozenset({
    "array_agg", "array_fill", "json_agg", "json_agg_strict", "json_object_agg", "json_object_agg_strict",
    "json_object_agg_unique", "json_object_agg_unique_strict", "jsonb_agg", "jsonb_agg_strict", "jsonb_object_agg",
    "jsonb_object_agg_strict", "jsonb_object_agg_unique", "jsonb_object_agg_unique_strict", "range_agg", "string_agg",
    "xmlagg",
})  # fmt: skip
_POWERS: Final = frozenset(
    {"dexp", "dpow", "exp", "factorial", "numeric_exp", "numeric_power", "pow", "power"}
)
_BUILDING_NODES: Final = frozenset({"JsonArrayAgg", "JsonArrayQueryConstructor", "JsonObjectAgg"})
# What makes a value longer than its parts, by a factor, each time it is used.
_GROWING: Final = frozenset({
    "array_append", "array_cat", "array_prepend", "array_replace", "array_to_string", "concat", "concat_ws", "encode",
    "format", "json_build_array", "json_build_object", "jsonb_build_array", "jsonb_build_object", "jsonb_concat",
    "jsonb_insert", "jsonb_set", "overlay", "quote_ident", "quote_literal", "quote_nullable", "regexp_replace",
    "replace", "textcat", "to_json", "to_jsonb", "xmlconcat2",
})  # fmt: skip
_PLAIN: Final = frozenset({"concat", "like_escape", "lower", "similar_to_escape", "upper"})
# Of one size, whatever they are made of.
_SMALL_VALUES: Final = frozenset({
    "box", "circle", "daterange", "int4range", "int8range", "line", "lseg", "numrange", "point", "tsrange", "tstzrange",
})  # fmt: skip
_ANY_OR_ALL: Final = frozenset({
    postgast.pg_query_pb2.A_Expr_Kind.AEXPR_OP_ANY, postgast.pg_query_pb2.A_Expr_Kind.AEXPR_OP_ALL,
})  # fmt: skip
_PLAIN_NODES: Final = frozenset({"A_ArrayExpr", "A_Const", "CollateClause", "ColumnRef", "List", "TypeCast"})

_REPEAT_LIMIT: Final = 100
"""Length up to which repeat, lpad and rpad are no building."""
_SHORT_TEXT: Final = 3
_SHORT_LIST: Final = 10
"""Characters, and elements, that may be looked for in a value that was built."""
_MENTION_LIMIT: Final = 6
"""Columns in an operation whose sides are both no constant."""
_GROWTH_LIMIT: Final = 8
"""Parts that subqueries put together: each subquery can multiply what the one before made."""
_UNKNOWN_GROWTH: Final = 100
_LONG_NUMBER: Final = re.compile(r"\d[eE]\+?\d{4}")
_SUBQUERIES: Final = frozenset({"CommonTableExpr", "RangeSubselect"})
_SOURCES: Final = _SUBQUERIES | {"JsonTable", "RangeFunction", "RangeTableFunc"}

_XPATH_LIMIT: Final = 200
_STEP = r"(?:@?[\w-]+(?::[\w-]+)?|@?\*|text\(\))"
_TEST = rf"\[\s*(?:\d+|last\(\)|(?:{_STEP}|\.)\s*=\s*(?:'[^']*'|\"[^\"]*\"|\d+))\s*\]"
_XPATH: Final = re.compile(
    rf"\.|(?:\./{{1,2}}|(?:\.\./)+|/{{1,2}})?{_STEP}(?:{_TEST}){{0,3}}(?://?{_STEP}(?:{_TEST}){{0,3}})*"
)


def check_effort(statement: Any, costly: Sequence[Any]) -> None:
    """Raises `UnendingWork` when one of `costly`, nodes of the statement, may run on when it is told to stop."""
    if costly:
        _Effort(statement).check(costly)


def check_path(path: Any) -> None:
    """Raises `UnendingWork` unless an XPath is constant, short and goes over the document once."""
    text = path.sval.sval if kind(path) == "A_Const" and path.HasField("sval") else None
    if text is None or len(text) > _XPATH_LIMIT or text.count("//") > 1 or not _XPATH.fullmatch(text):
        raise UnendingWork(
            "an XPath must be a constant of plain steps such as '/a/b[@c=\"d\"]/text()', with // at most once"
        )


class _Effort:
    def __init__(self, statement: Any) -> None:
        nodes = list(_all(statement))
        self._sources = [node for node in nodes if kind(node) in _SOURCES]
        self._built_names: set[str] = set()
        weights = [weight for source in self._sources if (weight := sum(map(_growth, _own(source))))]
        self._growing = len(weights)
        is_building = any(_is_building(node) for source in self._sources for node in _all(source))
        # What a change puts in is read back by RETURNING, under the name of a column.
        is_stored = kind(statement) != "SelectStmt" and any(map(_is_building, nodes))
        is_recursive = any(kind(node) == "WithClause" and node.recursive for node in nodes)
        self._all_built = (
            is_stored
            or (is_recursive and (is_building or self._growing > 0))
            or (self._growing > 1 and sum(weights) > _GROWTH_LIMIT)
        )
        if is_building and not self._all_built:
            self._name_built(nodes)

    def _name_built(self, nodes: Sequence[Any]) -> None:
        """Finds the names under which what a subquery builds may be reached."""
        if any(kind(node) == "Alias" and node.colnames for node in nodes) or any(
            map(self._is_renaming, self._sources)
        ):
            self._all_built = True
            return
        # The name of a subquery is its whole row.
        self._built_names |= {node.aliasname for node in nodes if kind(node) == "Alias"}
        self._built_names |= {node.ctename for node in self._sources if kind(node) == "CommonTableExpr"}
        targets = [
            node
            for source in self._sources
            for node in _all(source)
            if kind(node) == "ResTarget" and node.HasField("val")
        ]
        known = -1
        while known != len(self._built_names):
            known = len(self._built_names)
            for target in targets:
                value = unwrap(target.val)
                if not _is_star(value) and self._is_built(value):
                    self._built_names |= {target.name} if target.name else _implied_names(value)
        self._all_built = any(
            self._is_built(source) for source in self._sources if kind(source) not in _SUBQUERIES
        )

    @staticmethod
    def _is_renaming(source: Any) -> bool:
        """Whether its columns may have other names than the expressions in it."""
        below = list(_all(source))
        if kind(source) == "CommonTableExpr" and (
            source.aliascolnames or kind(unwrap(source.ctequery)) != "SelectStmt"
        ):
            return True
        return any(
            kind(node) == "SelectStmt" and (node.HasField("larg") or node.values_lists) for node in below
        )

    def _is_built(self, node: Any) -> bool:
        parts = list(_all(node))
        if any(_is_building(part) or self._names_built(part) for part in parts):
            return True
        return sum(_growth(part) for part in parts if not _is_joining(part)) > _GROWTH_LIMIT

    def _names_built(self, node: Any) -> bool:
        if kind(node) != "ColumnRef":
            return False
        if self._all_built:
            return True
        last = unwrap(node.fields[-1])
        return bool(self._built_names) and (kind(last) != "String" or last.sval in self._built_names)

    def check(self, costly: Sequence[Any]) -> None:
        for node in costly:
            if kind(node) == "FuncCall":
                self._function(node)
            elif kind(node) == "SubLink":
                self._compare(strings(node.oper_name)[-1], unwrap(node.testexpr), unwrap(node.subselect))
            elif kind(node) == "A_Expr" and node.HasField("lexpr") and node.HasField("rexpr"):
                left, right = unwrap(node.lexpr), unwrap(node.rexpr)
                # x LIKE ANY (ARRAY[…])
                is_any = node.kind in _ANY_OR_ALL and kind(right) == "A_ArrayExpr"
                for item in right.elements if is_any else [right]:
                    self._compare(strings(node.name)[-1], left, unwrap(item))

    def _function(self, node: Any) -> None:
        name = strings(node.funcname)[-1]
        arguments = [unwrap(item) for item in node.args]
        if name in _XML_FUNCTIONS:
            if not arguments:
                raise UnendingWork(f"{name} needs a path")
            check_path(arguments[0])
            return
        if len(arguments) < 2:
            if node.func_variadic:
                raise UnendingWork(f"{name} may not be VARIADIC")
            return
        if any(kind(item) == "NamedArgExpr" for item in arguments):
            raise UnendingWork(f"write the arguments of {name} without their names")
        if name == "substring" and _is_number(arguments[1]):
            return
        self._compare(name, arguments[0], arguments[1])

    def _compare(self, name: str, left: Any, right: Any) -> None:
        is_either = name in _EITHER_OPERATORS | _EITHER_FUNCTIONS | {"-"}
        if _is_short(right, may_be_list=is_either) or (is_either and _is_short(left, may_be_list=True)):
            return
        if name in {"~~", "~~*", "!~~", "!~~*"} and _is_prefix(right):
            return
        built = [self._is_built(left), self._is_built(right)]
        if all(built) if name == "-" else any(built):
            raise UnendingWork(
                f"{name} over a value that the statement puts together itself could outlast the time limit;"
                " filter the rows before they are put together"
            )
        if name == "-" or _is_fixed(right) or (is_either and _is_fixed(left)):
            return
        if kind(right) == "SelectStmt":
            wanted = [unwrap(unwrap(item).val) for item in right.target_list]
            if len(wanted) == 1 and kind(wanted[0]) == "ColumnRef" and not self._growing:
                return
        # What follows only checks: a column as it is, or a few put together.
        sides = [right, left] if is_either else [right]
        mentions = sum(kind(part) == "ColumnRef" for side in (left, right) for part in _all(side))
        if mentions > _MENTION_LIMIT or self._growing or not any(_is_plain(side) for side in sides):
            raise UnendingWork(
                f"{name} needs a constant or a column to look for; anything else could outlast the time limit"
            )


def _all(node: Any) -> Iterator[Any]:
    """The node and everything below it, without recursion."""
    waiting = [node]
    while waiting:
        one = waiting.pop()
        yield one
        waiting.extend(child for _, child in children(one))


def _own(source: Any) -> Iterator[Any]:
    """What is below, without that of other sources below."""
    waiting = [child for _, child in children(source)]
    while waiting:
        one = waiting.pop()
        if kind(one) not in _SOURCES:
            yield one
            waiting.extend(child for _, child in children(one))


def _is_building(node: Any) -> bool:
    name = kind(node)
    if name == "FuncCall":
        function, arguments = strings(node.funcname)[-1], [unwrap(item) for item in node.args]
        if function in {"repeat", "lpad", "rpad"}:
            return len(arguments) < 2 or not _is_number_to(arguments[1], _REPEAT_LIMIT)
        if function in _POWERS:
            return not _is_number_to(arguments[-1], _REPEAT_LIMIT) or any(map(_is_power, arguments))
        return function in _BUILDERS
    if name == "A_Expr":
        return _is_power(node) and (
            not _is_number_to(unwrap(node.rexpr), _REPEAT_LIMIT)
            or any(map(_is_power, _all(unwrap(node.lexpr))))
        )
    if name == "A_Const":
        text = node.fval.fval if node.HasField("fval") else node.sval.sval
        return _LONG_NUMBER.search(text) is not None
    if name == "SubLink":
        return bool(node.sub_link_type == postgast.pg_query_pb2.SubLinkType.ARRAY_SUBLINK)
    return name in _BUILDING_NODES


def _is_power(node: Any) -> bool:
    if kind(node) == "FuncCall":
        return strings(node.funcname)[-1] in _POWERS
    return kind(node) == "A_Expr" and strings(node.name)[-1:] == ["^"]


def _is_joining(node: Any) -> bool:
    """Puts values one after the other."""
    if kind(node) == "FuncCall":
        return strings(node.funcname)[-1] in {"array_cat", "concat", "concat_ws", "jsonb_concat", "textcat"}
    return kind(node) == "A_Expr" and strings(node.name)[-1:] == ["||"]


def _growth(node: Any) -> int:
    """How much longer than its parts this makes a value, roughly."""
    if kind(node) in {"JsonArrayConstructor", "JsonObjectConstructor", "XmlExpr"} or _is_joining(node):
        return sum(1 for _ in children(node)) if kind(node) != "FuncCall" else len(node.args)
    if kind(node) != "FuncCall" or (name := strings(node.funcname)[-1]) not in _GROWING:
        return 0
    arguments = [unwrap(item) for item in node.args]
    if name == "format":
        return len(arguments) + len(_text(arguments[0]) or "") // 2 if arguments else 0
    place = {"replace": 2, "regexp_replace": 2, "array_to_string": 1}.get(name)
    if place is None:
        return max(1, len(arguments))
    put = _text(arguments[place]) if len(arguments) > place else None
    if put is None:
        return _UNKNOWN_GROWTH
    if name == "replace" and len(put) <= len(_text(arguments[1]) or ""):
        return 0
    return len(put)


def _text(node: Any) -> str | None:
    return str(node.sval.sval) if kind(node) == "A_Const" and not node.isnull else None


def _is_star(node: Any) -> bool:
    return kind(node) == "ColumnRef" and kind(unwrap(node.fields[-1])) == "A_Star"


def _implied_names(node: Any) -> set[str]:
    """Names that Postgres may give a result without AS."""
    names = {"array", "case", "coalesce", "greatest", "least", "nullif", "row"}
    for part in _all(node):
        if kind(part) in {"FuncCall", "TypeName", "ColumnRef"}:
            field = {"FuncCall": "funcname", "TypeName": "names", "ColumnRef": "fields"}[kind(part)]
            names.add(strings(getattr(part, field))[-1])
        elif kind(part).startswith(("Json", "Xml")):
            names |= {"json_arrayagg", "json_objectagg", "json_array", "json_object", "json", "json_scalar",
                      "json_serialize", "json_value", "json_query", "xmlconcat", "xmlelement", "xmlforest",
                      "xmlparse", "xmlpi", "xmlroot", "xmlserialize"}  # fmt: skip
    return names


def _is_number(node: Any) -> bool:
    return kind(node) == "A_Const" and (
        node.HasField("ival") or not (node.HasField("sval") or node.HasField("fval"))
    )


def _is_number_to(node: Any, limit: int) -> bool:
    """A constant number from 0 to this."""
    return _is_number(node) and 0 <= node.ival.ival <= limit


def _is_short(node: Any, *, may_be_list: bool) -> bool:
    """A number, or a constant so small that looking for it is like reading the other side once."""
    name = kind(node)
    if name in {"TypeCast", "CollateClause"}:
        return _is_short(unwrap(node.arg), may_be_list=may_be_list)
    if name == "A_ArrayExpr":
        items = [unwrap(item) for item in node.elements]
        return may_be_list and len(items) <= _SHORT_LIST and all(map(_is_fixed, items))
    if name == "FuncCall":
        return may_be_list and strings(node.funcname)[-1] in _SMALL_VALUES
    if name != "A_Const" or _is_building(node):
        return False
    if not node.HasField("sval"):
        return True
    text = node.sval.sval
    is_list = may_be_list and text[:1] in {"{", "[", "("} and text.count(",") < _SHORT_LIST
    return len(text) <= _SHORT_TEXT or is_list


def _is_prefix(node: Any) -> bool:
    """A pattern of LIKE that is tried once: nothing but its end is open."""
    return kind(node) == "A_Const" and node.HasField("sval") and "%" not in node.sval.sval[:-1]


def _is_fixed(node: Any) -> bool:
    """Constant, and no longer than it is written."""
    return _is_plain(node) and not any(kind(part) == "ColumnRef" for part in _all(node))


def _is_plain(node: Any) -> bool:
    """Constants and columns, at most put one after the other."""
    name = kind(node)
    if name == "FuncCall":
        if strings(node.funcname)[-1] not in _PLAIN:
            return False
        return all(_is_plain(unwrap(item)) for item in node.args)
    if name == "A_Expr":
        is_joining = strings(node.name)[-1:] == ["||"] and node.HasField("lexpr")
        return is_joining and _is_plain(unwrap(node.lexpr)) and _is_plain(unwrap(node.rexpr))
    if name not in _PLAIN_NODES or _is_building(node):
        return False
    if name in {"TypeCast", "CollateClause"}:
        return _is_plain(unwrap(node.arg))
    return name == "ColumnRef" or all(_is_plain(child) for _, child in children(node) if name != "A_Const")
