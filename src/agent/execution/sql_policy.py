"""Decides what one SQL statement is: READ, WRITE, DESTRUCTIVE or FORBIDDEN. Pure: nothing is run or looked up.

A statement is FORBIDDEN until everything in it is on a list: kinds of syntax, functions, operators, types, tables. What
runs later is `SqlVerdict.text`, printed from the tree that was judged, never the agent's own text, so that nothing can
be read one way here and another way by the server. Run it with `search_path` set to nothing: a function or operator
without a schema is then the one of `pg_catalog` that was judged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import postgast

from agent.approval.risk import Risk
from agent.execution.sql_allowed import FUNCTION_COLUMNS, FUNCTIONS, OPERATORS, TYPES
from agent.execution.sql_bounds import is_bounded, is_of_constants
from agent.execution.sql_columns import HiddenColumn, check_columns
from agent.execution.sql_effort import FUNCTIONS as COSTLY_FUNCTIONS
from agent.execution.sql_effort import OPERATORS as COSTLY_OPERATORS
from agent.execution.sql_effort import UnendingWork, check_effort, check_path
from agent.execution.sql_scope import SqlScope, TableRule
from agent.execution.sql_sizes import TooLarge, check_format, check_series, check_size
from agent.execution.sql_text import UnreadableSql, check_text
from agent.execution.sql_tree import children, kind, same_tree, strings, unwrap

SHOWN_SETTINGS: Final = frozenset({
    "client_encoding", "datestyle", "default_transaction_isolation", "default_transaction_read_only",
    "extra_float_digits", "integer_datetimes", "intervalstyle", "lc_collate", "lc_ctype", "lc_messages",
    "lc_monetary", "lc_numeric", "lc_time", "lock_timeout", "max_connections", "max_identifier_length",
    "search_path", "server_encoding", "server_version", "server_version_num", "standard_conforming_strings",
    "statement_timeout", "timezone", "transaction_isolation", "transaction_read_only", "work_mem",
})  # fmt: skip
"""What SHOW may name: nothing that could hold a secret or a path."""

CATALOG_VIEWS: Final = frozenset({
    "character_sets", "check_constraints", "collations", "column_domain_usage", "columns",
    "constraint_column_usage", "constraint_table_usage", "domain_constraints", "domains",
    "information_schema_catalog_name", "key_column_usage", "parameters", "referential_constraints",
    "routines", "schemata", "sequences", "sql_features", "table_constraints", "tables", "triggers",
    "view_column_usage", "view_table_usage", "views",
})  # fmt: skip
"""Readable relations of `information_schema`. They show what the login has rights on."""

__all__ = ["CATALOG_VIEWS", "SHOWN_SETTINGS", "SqlScope", "SqlVerdict", "TableRule", "classify"]

_CROSS_JOIN_LIMIT: Final = 3

_PLAIN_NODES: Final = frozenset({
    "A_ArrayExpr", "A_Const", "A_Indices", "A_Star", "Alias", "BitString", "BoolExpr", "Boolean",
    "BooleanTest", "CTECycleClause", "CTESearchClause", "CaseExpr", "CaseWhen", "CoalesceExpr",
    "CommonTableExpr", "Float", "GroupingFunc", "GroupingSet", "InferClause", "Integer", "JoinExpr",
    "JsonAggConstructor", "JsonArgument", "JsonArrayAgg", "JsonArrayConstructor",
    "JsonArrayQueryConstructor", "JsonBehavior", "JsonFormat", "JsonFuncExpr", "JsonIsPredicate",
    "JsonKeyValue", "JsonObjectAgg", "JsonObjectConstructor", "JsonOutput", "JsonParseExpr",
    "JsonReturning", "JsonScalarExpr", "JsonSerializeExpr", "JsonTable", "JsonTableColumn",
    "JsonTablePathSpec", "JsonValueExpr", "List", "MergeSupportFunc", "MergeWhenClause", "MinMaxExpr",
    "MultiAssignRef", "NamedArgExpr", "NullTest", "OnConflictClause", "RangeSubselect",
    "RangeTableFuncCol", "ResTarget", "ReturningClause", "ReturningOption", "RowExpr", "SQLValueFunction",
    "SetToDefault", "String", "WindowDef", "WithClause", "XmlExpr", "XmlSerialize",
})  # fmt: skip
"""Syntax that holds other syntax and does nothing by itself. All else is judged by a method, or refused."""

_EXPLAIN_OPTIONS: Final = frozenset({
    "analyze", "buffers", "costs", "format", "generic_plan", "memory", "settings", "summary", "timing", "verbose",
    "wal",
})  # fmt: skip
_BETWEEN: Final = frozenset({"BETWEEN", "NOT BETWEEN", "BETWEEN SYMMETRIC", "NOT BETWEEN SYMMETRIC"})
_ALWAYS: Final = "without a WHERE that compares a column of the table with a constant, it may hit every row"

_Names = frozenset[str]


@dataclass(frozen=True, kw_only=True)
class SqlVerdict:
    """What a statement is, and the text to run for it."""

    risk: Risk
    text: str = ""
    """Printed from the judged tree, tables with their schema. Empty when FORBIDDEN."""
    command: str = ""
    """`select`, `insert`, `update`, `delete`, `merge`, `explain`, `show`, or what was refused."""
    reasons: tuple[str, ...] = ()
    tables_read: frozenset[str] = frozenset()
    tables_written: frozenset[str] = frozenset()
    functions: frozenset[str] = frozenset()
    """Functions of the scope that it calls: they can do what no row count of a trial run shows."""
    fingerprint: str = ""
    """The same for statements that differ in constants only."""
    is_select: bool = False
    """A query that writes nothing by itself: a cursor can read it."""


class _Forbidden(Exception):
    """Stops the walk; the message is the reason."""


def classify(sql: str, scope: SqlScope) -> SqlVerdict:
    """Judges `sql`. Never raises: what cannot be judged is FORBIDDEN."""
    gate = _Gate(scope)
    try:
        check_text(sql)
        return gate.judge(sql)
    except (_Forbidden, HiddenColumn, TooLarge, UnendingWork, UnreadableSql) as refusal:
        reason = str(refusal)
    except postgast.PgQueryError as error:
        reason = f"it is not SQL that Postgres understands: {error}"
    except Exception as error:  # noqa: BLE001 - pure code, no graph inside: whatever fails here is a no
        reason = f"it could not be read ({type(error).__name__}); write it simpler"
    return SqlVerdict(risk=Risk.FORBIDDEN, command=gate.command, reasons=(reason,))


class _Gate:
    """One walk over one statement. Names of common table expressions are handed down as `seen`."""

    def __init__(self, scope: SqlScope) -> None:
        self._scope = scope
        self._tables_by_name: dict[str, list[str]] = {}
        for name in scope.tables:
            self._tables_by_name.setdefault(name.partition(".")[2], []).append(name)
        self._columns_listed: set[str] = set()
        for rule in scope.tables.values():
            self._columns_listed |= rule.update | (rule.columns or frozenset())
        self._function_aliases: dict[str, set[str]] = {}
        self._dotted: list[tuple[str, str]] = []
        self._costly: list[Any] = []
        self._is_explained = False
        self._reasons: list[str] = []
        self.risk = Risk.READ
        self.command = ""
        self.read: set[str] = set()
        self.written: set[str] = set()
        self.called: set[str] = set()
        self._judges: dict[str, Callable[[Any, _Names], None]] = {
            "SelectStmt": self._select,
            "InsertStmt": self._insert,
            "UpdateStmt": self._update,
            "DeleteStmt": self._delete,
            "MergeStmt": self._merge,
            "RangeVar": self._relation,
            "RangeFunction": self._function_in_from,
            "RangeTableSample": self._sample,
            "RangeTableFunc": self._xml_table,
            "FuncCall": self._call,
            "A_Expr": self._operation,
            "SubLink": self._sublink,
            "TypeCast": self._generic,
            "TypeName": self._type,
            "ColumnRef": self._column,
            "A_Indirection": self._indirection,
            "SortBy": self._sorting,
            "CollateClause": self._collation,
            "ColumnDef": self._column_definition,
            "IndexElem": self._index_element,
        }

    def judge(self, sql: str) -> SqlVerdict:
        tree = postgast.parse(sql)
        if len(tree.stmts) != 1:
            raise _Forbidden(f"there must be one statement, and there are {len(tree.stmts)}")
        statement = unwrap(tree.stmts[0].stmt)
        self.command = kind(statement).removesuffix("Stmt").lower()
        if self.command == "variableshow":
            self.command = "show"
            self._show(statement)
        elif self.command == "explain":
            self._explain(statement)
        elif self.command in {"select", "insert", "update", "delete", "merge"}:
            self._visit(statement, frozenset())
        else:
            raise _Forbidden(self._why_not(self.command))
        self._check_dotted()
        judged = unwrap(statement.query) if self.command == "explain" else statement
        check_effort(judged, self._costly)
        if any(self._scope.tables[name].columns is not None for name in self._touched()):
            limits = {
                name: rule.columns for name, rule in self._scope.tables.items() if rule.columns is not None
            }
            check_columns(judged, limits)
        tree.stmts[0].stmt_location = tree.stmts[0].stmt_len = 0
        text = postgast.deparse(tree)
        if not same_tree(tree, postgast.parse(text)):
            raise _Forbidden("it does not mean the same when it is printed anew; write it simpler")
        return SqlVerdict(
            risk=self.risk,
            text=text,
            command=self.command,
            reasons=tuple(dict.fromkeys(self._reasons)),
            tables_read=frozenset(self.read),
            tables_written=frozenset(self.written),
            functions=frozenset(self.called),
            fingerprint=postgast.fingerprint(text).hex,
            is_select=self.command == "select" and not self.written,
        )

    def _touched(self) -> Iterator[str]:
        return (name for name in self.read | self.written if name in self._scope.tables)

    @staticmethod
    def _why_not(command: str) -> str:
        if command == "truncate":
            return "TRUNCATE empties a table past row security and row counts; use DELETE"
        return f"statements of the kind {command.upper()!r} never run here"

    def _raise_to(self, risk: Risk, reason: str) -> None:
        if risk is Risk.FORBIDDEN:
            raise _Forbidden(reason)
        self.risk = max(self.risk, risk, key=lambda one: one.rank)
        if risk is not Risk.READ:
            self._reasons.append(reason)

    # Walking

    def _visit(self, node: Any, seen: _Names) -> None:
        name = kind(node)
        judge = self._judges.get(name)
        if judge is not None:
            judge(node, seen)
        elif name in _PLAIN_NODES:
            self._generic(node, seen)
        elif name == "ParamRef":
            raise _Forbidden("it has a parameter ($1); write the value itself")
        else:
            raise _Forbidden(f"the syntax {name} is not allowed")

    def _generic(self, node: Any, seen: _Names, *, but: _Names = frozenset()) -> None:
        for field_name, child in children(node):
            if field_name not in but:
                self._visit(child, seen)

    def _with(self, node: Any, seen: _Names) -> _Names:
        """Visits the WITH of a statement; what the statement itself may name."""
        if not node.HasField("with_clause"):
            return seen
        clause = node.with_clause
        expressions = [unwrap(item) for item in clause.ctes]
        for expression in expressions:
            if expression.ctename.startswith("pg_"):
                raise _Forbidden(f"{expression.ctename!r} is named like a catalog; name it otherwise")
        if clause.recursive:
            seen |= {expression.ctename for expression in expressions}
        for expression in expressions:
            if clause.recursive:
                self._check_recursion(expression, node)
            self._visit(expression, seen)
            seen |= {expression.ctename}
        return seen

    @staticmethod
    def _check_recursion(expression: Any, outer: Any) -> None:
        query = unwrap(expression.ctequery)
        if kind(query) != "SelectStmt" or not query.HasField("rarg"):
            return
        step = query.rarg
        is_alone = len(step.from_clause) == 1 and kind(unwrap(step.from_clause[0])) == "RangeVar"
        names_itself = is_alone and unwrap(step.from_clause[0]).relname == expression.ctename
        is_bounded = (
            step.HasField("where_clause") or query.HasField("limit_count") or outer.HasField("limit_count")
        )
        if names_itself and not is_bounded:
            raise _Forbidden(f"the recursion of {expression.ctename!r} has no end; give it a WHERE")

    # Statements

    def _show(self, node: Any) -> None:
        if node.name.lower() not in SHOWN_SETTINGS:
            raise _Forbidden(f"SHOW {node.name} is not allowed")

    def _explain(self, node: Any) -> None:
        for item in node.options:
            option = unwrap(item)
            if option.defname not in _EXPLAIN_OPTIONS or option.defnamespace:
                raise _Forbidden(f"EXPLAIN with {option.defname!r} is not allowed")
            if option.defname == "analyze" and not _is_off(option):
                raise _Forbidden(
                    "EXPLAIN ANALYZE runs the statement; use EXPLAIN without it, or run the statement"
                )
        statement = unwrap(node.query)
        if kind(statement) not in {"SelectStmt", "InsertStmt", "UpdateStmt", "DeleteStmt", "MergeStmt"}:
            raise _Forbidden(f"EXPLAIN of {kind(statement).removesuffix('Stmt').upper()!r} is not allowed")
        self._is_explained = True
        self._visit(statement, frozenset())
        if self.risk is not Risk.READ:
            raise _Forbidden("EXPLAIN may call functions that write; it is only for what reads")

    def _select(self, node: Any, seen: _Names) -> None:
        if node.HasField("into_clause"):
            raise _Forbidden("SELECT INTO makes a table")
        if node.locking_clause:
            raise _Forbidden("row locks (FOR UPDATE, FOR SHARE) are not allowed")
        if len(node.from_clause) > _CROSS_JOIN_LIMIT and not node.HasField("where_clause"):
            raise _Forbidden("it combines every row of many tables with every other; give it a WHERE")
        self._generic(node, self._with(node, seen), but=frozenset({"with_clause"}))

    def _target(self, node: Any, seen: _Names) -> tuple[str, TableRule]:
        """The table that a statement changes, with its rule, noted and named with its schema."""
        relation = node.relation
        if not relation.schemaname and relation.relname in seen:
            raise _Forbidden(f"{relation.relname!r} is both a table and a name of WITH; write schema.table")
        name = self._qualified(relation)
        rule = self._scope.tables.get(name)
        if rule is None:
            raise _Forbidden(f"{name} may not be changed")
        if relation.HasField("alias"):
            self._visit(relation.alias, seen)
        (self.read if self._is_explained else self.written).add(name)
        return name, rule

    def _change(self, risk: Risk, reason: str) -> None:
        if not self._is_explained:
            self._raise_to(risk, reason)

    def _allow(self, may: bool, verb: str, name: str) -> None:
        if not may and not self._is_explained:
            raise _Forbidden(f"{verb} {name} is not allowed by the policy")

    def _insert(self, node: Any, seen: _Names) -> None:
        seen = self._with(node, seen)
        name, rule = self._target(node, seen)
        self._allow(rule.insert, "INSERT into", name)
        self._change(Risk.WRITE, f"it adds rows to {name}")
        conflict = node.on_conflict_clause
        if conflict.target_list:
            self._check_set(name, rule, conflict.target_list)
            source = unwrap(node.select_stmt) if node.HasField("select_stmt") else None
            if source is not None and not is_of_constants(source):
                self._change(
                    Risk.DESTRUCTIVE, f"it may overwrite any row of {name}: its rows are not all constants"
                )
            else:
                self._change(Risk.WRITE, f"it overwrites rows of {name} that are there already")
        self._generic(node, seen, but=frozenset({"with_clause", "relation"}))

    def _check_set(self, name: str, rule: TableRule, targets: Any) -> None:
        for item in targets:
            column = unwrap(item).name
            self._allow(column in rule.update, f"UPDATE of column {column!r} of", name)

    def _update(self, node: Any, seen: _Names) -> None:
        seen = self._with(node, seen)
        name, rule = self._target(node, seen)
        self._check_set(name, rule, node.target_list)
        bounds_rows = is_bounded(node, node.from_clause)
        self._change(
            Risk.WRITE if bounds_rows else Risk.DESTRUCTIVE,
            f"it changes rows of {name}" if bounds_rows else f"it changes {name}: {_ALWAYS}",
        )
        self._generic(node, seen, but=frozenset({"with_clause", "relation"}))

    def _delete(self, node: Any, seen: _Names) -> None:
        seen = self._with(node, seen)
        name, rule = self._target(node, seen)
        self._allow(rule.delete, "DELETE from", name)
        bounds_rows = is_bounded(node, node.using_clause)
        self._change(
            Risk.WRITE if bounds_rows else Risk.DESTRUCTIVE,
            f"it deletes rows of {name}" if bounds_rows else f"it deletes from {name}: {_ALWAYS}",
        )
        self._generic(node, seen, but=frozenset({"with_clause", "relation"}))

    def _merge(self, node: Any, seen: _Names) -> None:
        seen = self._with(node, seen)
        name, rule = self._target(node, seen)
        commands = postgast.pg_query_pb2.CmdType
        for item in node.merge_when_clauses:
            clause = unwrap(item)
            if clause.command_type == commands.CMD_INSERT:
                self._allow(rule.insert, "INSERT into", name)
                self._change(Risk.WRITE, f"it adds rows to {name}")
            elif clause.command_type == commands.CMD_UPDATE:
                self._check_set(name, rule, clause.target_list)
                self._change(Risk.DESTRUCTIVE, f"it may change every row of {name}")
            elif clause.command_type == commands.CMD_DELETE:
                self._allow(rule.delete, "DELETE from", name)
                self._change(Risk.DESTRUCTIVE, f"it may delete every row of {name}")
            elif clause.command_type != commands.CMD_NOTHING:
                raise _Forbidden("MERGE with this action is not allowed")
            self._change(Risk.WRITE, f"it merges into {name}")
        self._generic(node, seen, but=frozenset({"with_clause", "relation"}))

    # Names

    def _qualified(self, relation: Any) -> str:
        """`schema.table` of a relation, completed in the tree where only one listed table has the name."""
        if relation.catalogname:
            raise _Forbidden(f"leave the database out of {relation.schemaname}.{relation.relname}")
        if "." in relation.schemaname or "." in relation.relname:
            raise _Forbidden("names with a dot in them are not allowed")
        if relation.relpersistence not in {"", "p"}:
            raise _Forbidden("temporary tables are not allowed")
        if not relation.schemaname:
            found = self._tables_by_name.get(relation.relname, [])
            if len(found) != 1:
                why = "is not a table that may be used" if not found else "is the name of several tables"
                raise _Forbidden(f"{relation.relname!r} {why}; write schema.table")
            relation.schemaname = found[0].partition(".")[0]
        return f"{relation.schemaname}.{relation.relname}"

    def _relation(self, node: Any, seen: _Names) -> None:
        if node.schemaname or node.relname not in seen:
            name = self._qualified(node)
            is_catalog = node.schemaname == "information_schema" and node.relname in CATALOG_VIEWS
            if not is_catalog and name not in self._scope.tables:
                raise _Forbidden(f"{name} is not a table that may be read")
            self.read.add(name)
        if node.HasField("alias"):
            self._visit(node.alias, seen)

    def _call(self, node: Any, seen: _Names) -> None:
        parts = strings(node.funcname)
        name = parts[-1]
        if len(parts) == 1 or (len(parts) == 2 and parts[0] == "pg_catalog"):
            if name in {"repeat", "lpad", "rpad"}:
                check_size(node, name)
            elif name not in FUNCTIONS:
                hint = _with_schema(name, self._scope.functions)
                raise _Forbidden(
                    f"the function {'.'.join(parts)} is not allowed" + (hint and f"; write {hint}")
                )
            if name in COSTLY_FUNCTIONS:
                self._costly.append(node)
            if name == "generate_series":
                check_series(node)
            elif name == "format":
                check_format(node)
        else:
            is_plain = len(parts) == 2 and not any("." in part for part in parts)
            risk = self._scope.functions.get(".".join(parts)) if is_plain else None
            if risk is None:
                raise _Forbidden(f"the function {'.'.join(parts)} is not listed in the policy")
            self._raise_to(risk, f"the function {'.'.join(parts)} is listed as {risk}")
            self.called.add(".".join(parts))
        self._generic(node, seen, but=frozenset({"funcname"}))

    def _function_in_from(self, node: Any, seen: _Names) -> None:
        """A function's alias may stand for its plain value, and then `alias.name` calls the function `name` with it."""
        called: list[str] = []
        for item in node.functions:
            parts = unwrap(item).items
            function = unwrap(parts[0])
            called.extend(strings(function.funcname)[-1:] if kind(function) == "FuncCall" else [""])
        alias = node.alias.aliasname if node.HasField("alias") else called[0]
        if not alias:
            raise _Forbidden("an expression in FROM needs a name: write AS name")
        columns = set(strings(node.alias.colnames)) if node.HasField("alias") else set()
        columns |= {unwrap(item).colname for item in node.coldeflist}
        columns = columns or {alias}
        # The same name twice: only what both allow.
        self._function_aliases[alias] = self._function_aliases.get(alias, columns) & columns
        self._generic(node, seen)

    def _column(self, node: Any, seen: _Names) -> None:
        parts = [unwrap(item) for item in node.fields]
        if len(parts) > 3:
            raise _Forbidden("leave the database out of the name of a column")
        if len(parts) > 1 and kind(parts[-1]) == "String":
            self._dotted.append((parts[-2].sval, parts[-1].sval))
        self._generic(node, seen)

    def _check_dotted(self) -> None:
        for alias, name in self._dotted:
            allowed = self._function_aliases.get(alias)
            if allowed is not None and name not in allowed and name not in FUNCTION_COLUMNS | {"ordinality"}:
                raise _Forbidden(
                    f"{alias}.{name} could call a function; name the columns: AS {alias}({name})"
                )

    def _indirection(self, node: Any, seen: _Names) -> None:
        for item in node.indirection:
            part = unwrap(item)
            if kind(part) == "String" and not (
                part.sval in FUNCTION_COLUMNS or part.sval in self._columns_listed or _is_row_field(part.sval)
            ):
                raise _Forbidden(
                    f"(…).{part.sval} could call a function; write alias.{part.sval} or {part.sval}(…)"
                )
        self._generic(node, seen)

    def _operation(self, node: Any, seen: _Names) -> None:
        parts = strings(node.name)
        self._check_operator(parts[:-1] if parts[-1:] and parts[-1] in _BETWEEN else parts)
        if parts[-1:] and parts[-1] in COSTLY_OPERATORS:
            self._costly.append(node)
        self._generic(node, seen, but=frozenset({"name"}))

    def _check_operator(self, parts: Sequence[str]) -> None:
        is_ours = len(parts) == 1 or (len(parts) == 2 and parts[0] == "pg_catalog")
        is_listed = len(parts) == 2 and ".".join(parts) in self._scope.operators
        if parts and not is_listed and not (is_ours and parts[-1] in OPERATORS):
            hint = _with_schema(parts[-1], self._scope.operators)
            raise _Forbidden(
                f"the operator {'.'.join(parts)} is not allowed" + (hint and f"; write OPERATOR({hint})")
            )

    def _sublink(self, node: Any, seen: _Names) -> None:
        parts = strings(node.oper_name)
        self._check_operator(parts)
        if parts and parts[-1] in COSTLY_OPERATORS:
            self._costly.append(node)
        self._generic(node, seen, but=frozenset({"oper_name"}))

    def _type(self, node: Any, seen: _Names) -> None:
        parts = strings(node.names)
        is_ours = len(parts) == 1 or (len(parts) == 2 and parts[0] == "pg_catalog")
        is_listed = len(parts) == 2 and ".".join(parts) in self._scope.types
        if not (is_listed or (is_ours and parts[-1] in TYPES)) or node.setof or node.pct_type:
            hint = _with_schema(parts[-1], self._scope.types)
            raise _Forbidden(f"the type {'.'.join(parts)} is not allowed" + (hint and f"; write {hint}"))
        self._generic(node, seen, but=frozenset({"names"}))

    def _sample(self, node: Any, seen: _Names) -> None:
        if strings(node.method) not in (["bernoulli"], ["system"]):
            raise _Forbidden("TABLESAMPLE is limited to BERNOULLI and SYSTEM")
        self._generic(node, seen, but=frozenset({"method"}))

    def _xml_table(self, node: Any, seen: _Names) -> None:
        check_path(unwrap(node.rowexpr))
        for item in node.columns:
            column = unwrap(item)
            if column.HasField("colexpr"):
                check_path(unwrap(column.colexpr))
        self._generic(node, seen)

    def _sorting(self, node: Any, seen: _Names) -> None:
        if node.use_op:
            raise _Forbidden("ORDER BY USING is not allowed; write ASC or DESC")
        self._generic(node, seen)

    def _collation(self, node: Any, seen: _Names) -> None:
        parts = strings(node.collname)
        if len(parts) != 1 and parts[0] != "pg_catalog":
            raise _Forbidden(f"the collation {'.'.join(parts)} is not allowed")
        self._generic(node, seen, but=frozenset({"collname"}))

    def _column_definition(self, node: Any, seen: _Names) -> None:
        for field_name, _ in children(node):
            if field_name not in {"type_name", "coll_clause"}:
                raise _Forbidden(f"a column in FROM with {field_name} is not allowed")
        self._generic(node, seen)

    def _index_element(self, node: Any, seen: _Names) -> None:
        if node.opclass or node.opclassopts or node.collation:
            raise _Forbidden("ON CONFLICT with an operator class or a collation is not allowed")
        self._generic(node, seen)


def _with_schema(name: str, listed: Iterable[str]) -> str:
    """The listed name that this one is without its schema, or ""."""
    return next((full for full in listed if full.partition(".")[2] == name), "")


def _is_row_field(name: str) -> bool:
    return name[:1] == "f" and name[1:].isdecimal() and name.isascii()


def _is_off(option: Any) -> bool:
    """Whether an option of EXPLAIN is switched off in a way that leaves no doubt."""
    if not option.HasField("arg"):
        return False
    value = unwrap(option.arg)
    if kind(value) == "Integer":
        return bool(value.ival == 0)
    if kind(value) == "Boolean":
        return not value.boolval
    return kind(value) == "String" and value.sval.lower() in {"false", "off"}
