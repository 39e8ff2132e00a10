"""The policy file: who may approve, what tools may do, what agents' SQL may touch. Checked whole when it is read."""

from __future__ import annotations

import difflib
import hashlib
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from agent.approval.reviewers import Reviewer, Reviewers
from agent.approval.risk import Risk
from agent.errors import ConfigurationError, InvalidRequest

DEFAULT_NAME: Final = "agent-policy.toml"
"""The file in the working folder that is read where the settings name none."""

_BYTES_MAX: Final = 1_000_000
_QUALIFIED: Final = re.compile(r"[^\s.\"']+\.[^\s.\"']+")
_OPERATOR: Final = re.compile(r"[^\s.\"']+\.[-+*/<>=~!@#%^&|`?]+")


def _risk(value: Any) -> Any:
    if isinstance(value, str):
        try:
            return Risk.of(value)
        except InvalidRequest as error:
            raise ValueError(str(error)) from None
    return value


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


Name = Annotated[str, Field(min_length=1, max_length=512)]
Names = Annotated[tuple[Name, ...], BeforeValidator(_tuple)]
RiskName = Annotated[Risk, BeforeValidator(_risk)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class _ReviewerPart(_Part):
    name: Name
    user_ids: Names = ()
    slack: Name | None = None
    telegram: int | None = None
    jwt_subject: Name | None = None
    token_sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    interrupt: bool = False
    interrupt_without_login: bool = False
    cli: bool = False
    tenants: Names = ("*",)
    risks: Annotated[tuple[RiskName, ...], BeforeValidator(_tuple)] = (Risk.WRITE, Risk.DESTRUCTIVE)

    @field_validator("name")
    @classmethod
    def _is_no_rule(cls, name: str) -> str:
        if name.startswith(("rule:", "policy:")):
            raise ValueError("a name that begins with rule: or policy: would look like a rule's decision")
        return name

    @field_validator("risks")
    @classmethod
    def _not_forbidden(cls, risks: tuple[Risk, ...]) -> tuple[Risk, ...]:
        if Risk.FORBIDDEN in risks:
            raise ValueError("nobody decides on FORBIDDEN: it never runs")
        return risks


class ApprovalPart(_Part):
    """`[approval]`: votes, times, and where cards go."""

    write_votes: int = Field(default=1, ge=1, le=20)
    """People who must approve a WRITE."""
    destructive_votes: int = Field(default=2, ge=1, le=20)
    """People who must approve what is DESTRUCTIVE."""
    write_ttl_seconds: float = Field(default=3600, gt=0, le=604_800, strict=False)
    """How long a WRITE waits for its votes."""
    destructive_ttl_seconds: float = Field(default=900, gt=0, le=604_800, strict=False)
    """How long what is DESTRUCTIVE waits for its votes."""
    slack_channel: Name | None = None
    slack_escalation_channel: Name | None = None
    telegram_chat: int | None = None
    telegram_escalation_chat: int | None = None

    def votes(self, risk: Risk) -> int:
        """People who must approve a call of this risk."""
        return self.destructive_votes if risk is Risk.DESTRUCTIVE else self.write_votes

    def ttl_seconds(self, risk: Risk) -> float:
        """How long a call of this risk waits for its votes."""
        return self.destructive_ttl_seconds if risk is Risk.DESTRUCTIVE else self.write_ttl_seconds


class Rule(_Part):
    """`[[rule]]`: what happens to calls that it fits; the first that fits holds."""

    tool: Name = "*"
    """Name or pattern."""
    agent: Name = "*"
    tenant: Name = "*"
    risk: RiskName | None = None
    """`None`: any."""
    decision: Literal["allow", "ask", "deny"]
    per_hour: int | None = Field(default=None, ge=0)
    """Calls in an hour; `None`: no limit."""
    per: Literal["tenant", "agent"] | None = None
    """Whose calls are counted; `None`: each agent's where the rule names agents, else those of the tenant."""

    @property
    def counts_per_agent(self) -> bool:
        """Whether each agent has the limit for itself."""
        return self.per == "agent" or (self.per is None and self.agent != "*")

    @model_validator(mode="after")
    def _is_safe(self) -> Self:
        if self.per is not None and self.per_hour is None:
            raise ValueError(f"per={self.per!r} says whose calls are counted, and without per_hour none are")
        if self.risk is Risk.FORBIDDEN and self.decision != "deny":
            raise ValueError("FORBIDDEN can be neither allowed nor asked: it never runs")
        if self.risk is Risk.DESTRUCTIVE and self.decision == "allow":
            raise ValueError("DESTRUCTIVE cannot be allowed without asking: decision must be ask or deny")
        return self


class Grant(_Part):
    """`[[grant]]`: rights of agents. Without any, all rights are granted."""

    rights: Names
    """Names or patterns, such as `sql.read`, `sql.*`, `crm_*`."""
    agent: Name = "*"
    tenant: Name = "*"


class MailPart(_Part):
    """`[[mail]]`: whom agents may write to."""

    allowed: Names = ()
    """Addresses or patterns such as `*@example.com`."""
    dry_run: bool = True
    """Whether mail is only shown and not sent."""
    tenants: Names = ("*",)


class Table(_Part):
    """`[[table]]`: what agents' SQL may do with one table or view."""

    name: str
    """`schema.table`."""
    columns: Names | None = None
    """Readable columns; `None`: all."""
    tenant_column: Name | None = None
    """Only rows of the login's tenant; `None`: all tenants share the rows."""
    insert: bool = False
    update: Names = ()
    """Columns that may be changed."""
    delete: bool = False
    tenants: Names = ("*",)

    @field_validator("name")
    @classmethod
    def _is_qualified(cls, name: str) -> str:
        if not _QUALIFIED.fullmatch(name):
            raise ValueError("a table is named schema.table, without quotes")
        return name

    @field_validator("columns")
    @classmethod
    def _has_some(cls, columns: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if columns == ():
            raise ValueError("no column at all; leave columns out for all of them, or the table for none")
        return columns


class SqlPart(_Part):
    """`[sql]`: limits of agents' SQL."""

    functions: Mapping[str, RiskName] = Field(default_factory=dict)
    """Functions of yours that may be called, `schema.name`, and what calling them is."""
    types: Names = ()
    """Enums, and types of extensions, that values may be cast to: `schema.name`. A cast runs the type's own code."""
    operators: Names = ()
    """Operators of extensions that only compute: `schema.operator`."""
    max_rows: int = Field(default=1000, ge=1, le=100_000)
    """Rows of a result; more are cut off."""
    timeout_seconds: float = Field(default=5, gt=0, le=300, strict=False)
    undo_rows: int = Field(default=1000, ge=0, le=100_000)
    """Rows that are kept as they were before, so that a write can be undone."""
    trusted_triggers: Names = ()
    """`schema.table.trigger`: triggers that do nothing outside the database, so that a write may be tried with them."""

    @field_validator("functions")
    @classmethod
    def _are_qualified(cls, functions: Mapping[str, Risk]) -> Mapping[str, Risk]:
        for name in functions:
            if not _QUALIFIED.fullmatch(name):
                raise ValueError(f"{name!r}: a function is named schema.name, without quotes")
        return functions

    @field_validator("types")
    @classmethod
    def _have_a_schema(cls, types: tuple[str, ...]) -> tuple[str, ...]:
        for name in types:
            if not _QUALIFIED.fullmatch(name):
                raise ValueError(f"{name!r}: a type is named schema.name, without quotes")
        return types

    @field_validator("operators")
    @classmethod
    def _are_operators(cls, operators: tuple[str, ...]) -> tuple[str, ...]:
        for name in operators:
            if not _OPERATOR.fullmatch(name):
                raise ValueError(f"{name!r}: an operator is named schema.operator, such as extensions.<=>")
        return operators


class _Whole(_Part):
    reviewer: Annotated[tuple[_ReviewerPart, ...], BeforeValidator(_tuple)] = ()
    approval: ApprovalPart = ApprovalPart()
    rule: Annotated[tuple[Rule, ...], BeforeValidator(_tuple)] = ()
    grant: Annotated[tuple[Grant, ...], BeforeValidator(_tuple)] = ()
    mail: Annotated[tuple[MailPart, ...], BeforeValidator(_tuple)] = ()
    table: Annotated[tuple[Table, ...], BeforeValidator(_tuple)] = ()
    sql: SqlPart = SqlPart()

    @model_validator(mode="after")
    def _names_once(self) -> Self:
        seen: set[tuple[str, str]] = set()
        for table in self.table:
            for tenant in table.tenants:
                if (table.name, tenant) in seen or (tenant != "*" and (table.name, "*") in seen):
                    raise ValueError(f"table {table.name!r} stands there twice for tenant {tenant!r}")
            if "*" in table.tenants and any(name == table.name for name, _ in seen):
                raise ValueError(f"table {table.name!r} stands there twice")
            seen |= {(table.name, tenant) for tenant in table.tenants}
        return self


@dataclass(frozen=True, kw_only=True)
class PolicyFile:
    """All that the file says. Empty: nobody may approve, nothing may be touched."""

    reviewers: Reviewers = field(default_factory=Reviewers)
    approval: ApprovalPart = field(default_factory=ApprovalPart)
    rules: tuple[Rule, ...] = ()
    grants: tuple[Grant, ...] = ()
    """Empty: every agent has every right."""
    mail: tuple[MailPart, ...] = ()
    tables: tuple[Table, ...] = ()
    sql: SqlPart = field(default_factory=SqlPart)
    version: str = hashlib.sha256(b"").hexdigest()
    """sha256 of the file: approvals hold under the policy that they were judged by."""


def load_policy(path: Path | None = None) -> PolicyFile:
    """Read and check a policy file.

    Args:
        path: `None`: `agent-policy.toml` in the working folder, and an empty policy where there is none.

    Raises:
        ConfigurationError: the file named is missing, is no TOML, or says something that cannot be.
    """
    place = Path(DEFAULT_NAME) if path is None else path
    try:
        contents = place.read_bytes()
    except FileNotFoundError:
        if path is None:
            return PolicyFile()
        raise ConfigurationError(
            f"the policy file {str(place)!r} does not exist. Correct LEARNING_POLICY_FILE, or write the file"
        ) from None
    except OSError as error:
        raise ConfigurationError(
            f"the policy file {str(place)!r} cannot be read: {error.strerror}. Nothing is approved without it"
        ) from None
    return parse_policy(contents, str(place))


def parse_policy(contents: bytes, name: str = DEFAULT_NAME) -> PolicyFile:
    """The policy that this text is; `name` is for messages.

    Raises:
        ConfigurationError: it is no TOML, or says something that cannot be.
    """
    if len(contents) > _BYTES_MAX:
        raise ConfigurationError(f"{name} has {len(contents)} bytes; at most {_BYTES_MAX} are read")
    try:
        document = tomllib.loads(contents.decode("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{name} is no TOML: {error}") from None
    try:
        whole = _Whole.model_validate(document)
    except ValidationError as error:
        raise ConfigurationError(f"{name}: {'; '.join(_fault(each) for each in error.errors())}") from None
    try:
        reviewers = Reviewers(Reviewer(**dict(one)) for one in whole.reviewer)
    except ConfigurationError as error:
        raise ConfigurationError(f"{name}: {error}") from None
    return PolicyFile(
        reviewers=reviewers,
        approval=whole.approval,
        rules=whole.rule,
        grants=whole.grant,
        mail=whole.mail,
        tables=whole.table,
        sql=whole.sql,
        version=hashlib.sha256(contents).hexdigest(),
    )


_PARTS: Final[dict[str, type[BaseModel]]] = {
    "reviewer": _ReviewerPart,
    "approval": ApprovalPart,
    "rule": Rule,
    "grant": Grant,
    "mail": MailPart,
    "table": Table,
    "sql": SqlPart,
}


def _fault(error: Any) -> str:
    """What is wrong where: `[[rule]] 2, decision='maybe': …`."""
    where = [str(part) if not isinstance(part, int) else str(part + 1) for part in error["loc"]]
    place = " ".join([f"[{where[0]}]", *where[1:]]) if where else "the file"
    if error["type"] == "extra_forbidden":
        part = _PARTS.get(where[0]) if len(where) > 1 else _Whole
        known = list(part.model_fields) if part is not None else []
        near = difflib.get_close_matches(where[-1], known, n=1)
        step = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
        return f"{place}: unknown; {step}"
    said = str(error["msg"]).removeprefix("Value error, ")
    value = error.get("input")
    # Who writes a token where its hash belongs must not find it in a log.
    shows = isinstance(value, str | int | float) and not place.endswith("token_sha256")
    return f"{place}={value!r}: {said}" if shows else f"{place}: {said}"
