"""What a statement of one tenant may name, as the policy file says it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from agent.approval.risk import Risk


class PolicyTable(Protocol):
    """What `SqlScope.from_policy` needs of a `[[table]]` in the policy file."""

    @property
    def name(self) -> str: ...
    @property
    def columns(self) -> Sequence[str] | None: ...
    @property
    def insert(self) -> bool: ...
    @property
    def update(self) -> Sequence[str]: ...
    @property
    def delete(self) -> bool: ...
    @property
    def tenants(self) -> Sequence[str]: ...


class PolicySql(Protocol):
    """What `SqlScope.from_policy` needs of `[sql]` in the policy file."""

    @property
    def functions(self) -> Mapping[str, Any]: ...
    @property
    def types(self) -> Sequence[str]: ...
    @property
    def operators(self) -> Sequence[str]: ...


@dataclass(frozen=True, kw_only=True)
class TableRule:
    """What an agent may do with one table or view."""

    columns: frozenset[str] | None = None
    """Readable columns; None: all."""
    insert: bool = False
    update: frozenset[str] = frozenset()
    """Columns that may be changed; empty: none."""
    delete: bool = False


@dataclass(frozen=True)
class SqlScope:
    """Everything outside `pg_catalog` and `information_schema` that a statement may name."""

    tables: Mapping[str, TableRule] = field(default_factory=dict)
    """By "schema.table"."""
    functions: Mapping[str, Risk] = field(default_factory=dict)
    """By "schema.name", with what calling it is."""
    types: frozenset[str] = frozenset()
    """Types that values may be cast to, by "schema.name"."""
    operators: frozenset[str] = frozenset()
    """Operators that only compute, by "schema.operator"."""

    @classmethod
    def from_policy(cls, tables: Sequence[PolicyTable], sql: PolicySql, tenant_id: str) -> SqlScope:
        """The scope of one tenant."""
        return cls(
            tables={
                table.name: TableRule(
                    columns=None if table.columns is None else frozenset(table.columns),
                    insert=table.insert,
                    update=frozenset(table.update),
                    delete=table.delete,
                )
                for table in tables
                if "*" in table.tenants or tenant_id in table.tenants
            },
            functions={name: Risk.of(str(risk)) for name, risk in sql.functions.items()},
            types=frozenset(sql.types),
            operators=frozenset(sql.operators),
        )
