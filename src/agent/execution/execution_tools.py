"""The executor's own tools, for code and, as LangChain tools, for agents."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Final

from langchain_core.tools import BaseTool, StructuredTool
from pydantic import Field

from agent.approval.risk import Risk
from agent.errors import ConfigurationError, DatabaseUnavailable, InvalidRequest, OperatorError, Refused
from agent.events import emit
from agent.execution import mail as mail_service
from agent.execution import sql_building
from agent.execution.sql_faults import NotRun
from agent.execution.sql_logins import LoginsNotMade
from agent.execution.sql_policy import SqlScope, SqlVerdict, classify
from agent.execution.tool_library import CREATE_NEW_TOOL, CREATE_RIGHTS
from agent.execution.tool_registry import Appraisal, CallContext, ToolArguments, ToolOutcome, ToolSpec
from agent.portal import portal

if TYPE_CHECKING:
    from agent.execution.safe_executor import SafeExecutor

Value = str | int | float | bool | None

READ_RIGHT: Final = "sql.read"
WRITE_RIGHT: Final = "sql.write"
_ROWS_MAX: Final = 100
_SUMMARY_CHARACTERS_MAX: Final = 200


class SqlArguments(ToolArguments):
    """What `execute_sql` takes."""

    sql: Annotated[
        str,
        Field(
            min_length=1,
            max_length=10_000,
            description="one PostgreSQL statement, tables written schema.table",
        ),
    ]


class Filter(ToolArguments):
    """One comparison of a column."""

    column: str
    op: sql_building.Comparison = "="
    value: Value | list[Value] = None


class Order(ToolArguments):
    """One column to sort by."""

    column: str
    descending: bool = False


class QueryArguments(ToolArguments):
    """What `query_data` takes."""

    table: Annotated[str, Field(max_length=130, description="schema.table")]
    columns: Annotated[
        list[str] | None,
        Field(max_length=200, description="columns to give back; all that may be read if left out"),
    ] = None
    filters: Annotated[list[Filter], Field(max_length=20, description="all of them must hold")] = Field(
        default_factory=list
    )
    order: Annotated[list[Order], Field(max_length=10)] = Field(default_factory=list)
    limit: Annotated[int, Field(ge=1, le=1000)] = 100


class UpdateArguments(ToolArguments):
    """What `update_client_status` takes."""

    table: Annotated[str, Field(max_length=130, description="schema.table")] = "public.clients"
    key: Annotated[
        dict[str, Value],
        Field(
            min_length=1,
            max_length=10,
            description="columns and values that name the rows, such as {'id': 7}",
        ),
    ]
    values: Annotated[
        dict[str, Value],
        Field(
            min_length=1,
            max_length=50,
            description="columns and their new values, such as {'status': 'active'}",
        ),
    ]
    max_rows: Annotated[
        int, Field(ge=1, le=_ROWS_MAX, description="if more rows than this would change, nothing is done")
    ] = 1


class MailArguments(ToolArguments):
    """What `send_email` takes."""

    to: Annotated[list[str], Field(min_length=1, max_length=mail_service.RECIPIENTS_MAX)]
    subject: Annotated[str, Field(max_length=mail_service.SUBJECT_CHARACTERS_MAX)]
    body: Annotated[str, Field(max_length=mail_service.BODY_CHARACTERS_MAX)]


class NewToolArguments(ToolArguments):
    """What `create_new_tool` takes."""

    name: str
    description: str
    code: str
    parameters: dict[str, Any]
    examples: list[dict[str, Any]]


def default_tools(executor: SafeExecutor) -> list[ToolSpec]:
    """The tools of an executor that is given no registry."""
    sql = _SqlTools(executor)
    mail = _MailTool(executor)
    return [
        ToolSpec(
            name="execute_sql",
            description=(
                "Run one PostgreSQL statement. Reading runs at once; INSERT, UPDATE and DELETE wait for a person who "
                "sees how many rows change; other statements are refused."
            ),
            arguments=SqlArguments,
            risk=sql.appraise_text,
            measure=sql.measure_text,
            run=sql.run_text,
            rights=(READ_RIGHT,),
            idempotency="keyed",
            target="sql",
        ),
        ToolSpec(
            name="query_data",
            description="Read rows of one table: columns, filters, order and limit. No SQL is needed.",
            arguments=QueryArguments,
            risk=sql.appraise_query,
            run=sql.run_query,
            rights=(READ_RIGHT,),
            idempotency="idempotent",
            target="sql",
        ),
        ToolSpec(
            name="update_client_status",
            description=(
                "Change columns of the rows that a key names, at most max_rows of them. Waits for a person's approval."
            ),
            arguments=UpdateArguments,
            risk=sql.appraise_update,
            measure=sql.measure_update,
            run=sql.run_update,
            rights=(WRITE_RIGHT,),
            idempotency="keyed",
            target="sql",
        ),
        ToolSpec(
            name="send_email",
            description="Send a mail in plain text to addresses that the policy allows. Waits for a person's approval.",
            arguments=MailArguments,
            risk=mail.appraise,
            run=mail.run,
            rights=("mail.send",),
            idempotency="keyed",
        ),
        ToolSpec(
            name=CREATE_NEW_TOOL,
            description=(
                "Make a new tool out of Python code. Its examples are run, a person approves it, and it is there from "
                "the next run on."
            ),
            arguments=NewToolArguments,
            risk=_appraise_new_tool,
            run=_NewTool(executor).run,
            rights=CREATE_RIGHTS,
            idempotency="idempotent",  # the same tool handed in again is the same version
            for_agent_tools=False,
        ),
    ]


class _SqlTools:
    """The three tools that make SQL of their arguments, or take it; all of it goes through the gate."""

    def __init__(self, executor: SafeExecutor) -> None:
        self._executor = executor

    def _judged(self, sql: str, context: CallContext) -> SqlVerdict:
        policy = self._executor.policy
        return classify(sql, SqlScope.from_policy(policy.tables, policy.sql, context.identity.tenant_id))

    async def appraise_text(self, arguments: SqlArguments, context: CallContext) -> Appraisal:
        return await self._appraise(arguments.sql, context)

    async def measure_text(
        self, arguments: SqlArguments, context: CallContext, appraisal: Appraisal
    ) -> Appraisal:
        return await self._measured(arguments.sql, context, appraisal)

    async def run_text(self, arguments: SqlArguments, context: CallContext) -> ToolOutcome:
        return await self._run(arguments.sql, context)

    async def appraise_query(self, arguments: QueryArguments, context: CallContext) -> Appraisal:
        return await self._appraise(self._query(arguments, context.identity.tenant_id), context)

    async def run_query(self, arguments: QueryArguments, context: CallContext) -> ToolOutcome:
        return await self._run(self._query(arguments, context.identity.tenant_id), context)

    async def appraise_update(self, arguments: UpdateArguments, context: CallContext) -> Appraisal:
        return await self._appraise(self._update(arguments), context)

    async def measure_update(
        self, arguments: UpdateArguments, context: CallContext, appraisal: Appraisal
    ) -> Appraisal:
        appraisal = await self._measured(self._update(arguments), context, appraisal)
        if appraisal.rows is not None and appraisal.rows > arguments.max_rows:
            raise InvalidRequest(
                f"{appraisal.rows} rows would change and max_rows is {arguments.max_rows}: make the key narrower"
            )
        if _NOT_TRIED in appraisal.bounds:
            held = {**appraisal.bounds, arguments.table: {"updated": arguments.max_rows}}
            return replace(appraisal, bounds=held)
        return appraisal

    async def run_update(self, arguments: UpdateArguments, context: CallContext) -> ToolOutcome:
        return await self._run(self._update(arguments), context)

    @staticmethod
    def _update(arguments: UpdateArguments) -> str:
        return sql_building.update(arguments.table, key=arguments.key, values=arguments.values)

    def _query(self, arguments: QueryArguments, tenant_id: str) -> str:
        columns = arguments.columns
        if columns is None:
            listed = next(
                (
                    table
                    for table in self._executor.policy.tables
                    if table.name == arguments.table and ("*" in table.tenants or tenant_id in table.tenants)
                ),
                None,
            )
            columns = list(listed.columns) if listed is not None and listed.columns is not None else []
        return sql_building.select(
            arguments.table,
            columns=columns,
            filters=[(each.column, each.op, each.value) for each in arguments.filters],
            order=[(each.column, each.descending) for each in arguments.order],
            limit=arguments.limit,
        )

    async def _appraise(self, sql: str, context: CallContext) -> Appraisal:
        """What the gate says; the database is not asked."""
        verdict = self._judged(sql, context)
        why = "; ".join(verdict.reasons)
        if verdict.risk is Risk.FORBIDDEN:
            return Appraisal(
                risk=Risk.FORBIDDEN,
                why=f"this statement is never run: {why}",
                shown={"sql": sql},
                summary=f"{verdict.command or 'SQL'}: FORBIDDEN",
            )
        tables = sorted(verdict.tables_read | verdict.tables_written)
        return Appraisal(
            risk=verdict.risk,
            why=why,
            shown={"sql": verdict.text},
            summary=f"{verdict.command.upper()} {', '.join(tables)}"[:_SUMMARY_CHARACTERS_MAX],
            fingerprint=verdict.fingerprint or None,
            tables=tables,
            rights=() if verdict.risk is Risk.READ else (WRITE_RIGHT,),
        )

    async def _measured(self, sql: str, context: CallContext, appraisal: Appraisal) -> Appraisal:
        """The appraisal of a write with what a trial run changed, unless an approval says it already."""
        effects, bounds = await self._tried(self._judged(sql, context), context)
        if _NOT_TRIED not in bounds:
            rows = sum(sum(changed.values()) for changed in bounds.values())
            return replace(appraisal, effects=effects, bounds=bounds, rows=rows)
        return replace(
            appraisal,
            # Nobody knows how much it does. What two people must agree to stays that.
            risk=max(appraisal.risk, Risk.DESTRUCTIVE, key=lambda one: one.rank),
            why="; ".join(filter(None, (appraisal.why, "it was not tried, because a trial would do it"))),
            effects=effects,
            bounds=bounds,
        )

    async def _tried(
        self, verdict: SqlVerdict, context: CallContext
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """What a write would do, by a trial where one is harmless, and what an approval of it is held to."""
        if context.bounds:
            told = {name: dict(of) if isinstance(of, Mapping) else of for name, of in context.bounds.items()}
            return (_unknown(told) if _NOT_TRIED in told else told), told
        tenant_id = context.identity.tenant_id
        with _fit_for_a_model(tenant_id):
            untried, trusted = await self._beside(verdict, tenant_id)
            if untried:
                held = {_NOT_TRIED: untried, "rows": "any number"}
                return _unknown(held), held
            changed: dict[str, Any] = dict(await self._executor.sql.try_write(verdict, tenant_id))
        changed = changed or dict.fromkeys(sorted(verdict.tables_written), _NOTHING)
        if trusted:
            note = f"{', '.join(trusted)} ran in the trial; a TRUNCATE in them is not counted"
            return {"rows": changed, "triggers": note}, changed
        return changed, changed

    async def _beside(self, verdict: SqlVerdict, tenant_id: str) -> tuple[list[str], list[str]]:
        """What runs along with a write that may reach outside the database, and the triggers that the policy trusts."""
        sql = self._executor.policy.sql
        risky = [
            f"function {name}"
            for name in sorted(verdict.functions)
            if Risk.of(str(sql.functions.get(name, Risk.WRITE))) is not Risk.READ
        ]
        found = [
            name.replace(": ", ".") for name in await self._executor.sql.outside_effects(verdict, tenant_id)
        ]
        trusted = [name for name in found if name in sql.trusted_triggers]
        return risky + [f"trigger {name}" for name in found if name not in trusted], trusted

    async def _run(self, sql: str, context: CallContext) -> ToolOutcome:
        verdict = self._judged(sql, context)
        runner = self._executor.sql
        tenant_id = context.identity.tenant_id
        effects: dict[str, Any] = {}
        if verdict.risk is Risk.READ:
            with _fit_for_a_model(tenant_id):
                result = await runner.read(verdict, tenant_id)
        else:
            if context.ticket is None:
                raise InvalidRequest("a write needs an approval")
            with _fit_for_a_model(tenant_id, is_sent=False):
                untried, _ = await self._beside(verdict, tenant_id)
            if new := sorted(set(untried) - set(context.bounds.get(_NOT_TRIED, ()))):
                raise Refused(
                    f"{', '.join(new)} would run too and was not there when this was approved, so nothing was run. Ask "
                    "again"
                )
            with _fit_for_a_model(tenant_id):
                result = await runner.write(
                    verdict, tenant_id, bounds=context.bounds, ticket=context.ticket, entry=context.entry
                )
            effects = dict(result.delta)
        value = result.value
        return ToolOutcome(
            value=value,
            rows=value["rows"],
            row_count=result.row_count,
            result_bytes=result.result_bytes,
            effects=effects,
            log_id=result.log_id,
        )


_NOTHING: Final = {"inserted": 0, "updated": 0, "deleted": 0}
_NOT_TRIED: Final = "not_tried"
"""Key of what kept a write from being tried; no name of a table, for it has no schema."""


def _unknown(bounds: Mapping[str, Any]) -> dict[str, Any]:
    """For the card: no number of rows, and why."""
    return {"rows": "row count not known: it was not tried", _NOT_TRIED: bounds[_NOT_TRIED]}


@contextmanager
def _fit_for_a_model(tenant_id: str, *, is_sent: bool = True) -> Iterator[None]:
    """Keep addresses, logins and paths from the model; who listens to events is told them.

    Args:
        is_sent: Whether a statement may have reached the database.
    """
    try:
        yield
    except NotRun:
        raise
    except (OperatorError, ConfigurationError) as error:
        emit("sql_not_ready", tenant_id=tenant_id, reason=str(error))
        if isinstance(error, DatabaseUnavailable):
            if not is_sent:
                raise NotRun(
                    "the database could not be reached, so nothing was run. Try again later"
                ) from None
            raise DatabaseUnavailable(
                "the database could not be reached or did not answer. Whether a write took place, only the log tells"
            ) from None
        if isinstance(error, LoginsNotMade) and error.sqlstate in ("42P01", "3F000"):
            raise NotRun(
                "a table that the policy file lists does not exist; an operator must make it, or correct the file"
            ) from None
        raise NotRun(
            "the database logins for SQL are not ready; an operator must run `agent migrate --roles`, and `agent sql "
            "check` to see why"
        ) from None


class _MailTool:
    """`send_email`."""

    def __init__(self, executor: SafeExecutor) -> None:
        self._executor = executor

    def _parts(self, context: CallContext) -> list[Any]:
        tenant_id = context.identity.tenant_id
        return [
            part for part in self._executor.policy.mail if "*" in part.tenants or tenant_id in part.tenants
        ]

    def _is_dry(self, mail: mail_service.Mail, context: CallContext) -> bool:
        """Whether it is only shown: unless every recipient is in a part of the policy that says otherwise."""
        allowed = [pattern for part in self._parts(context) if not part.dry_run for pattern in part.allowed]
        return bool(mail_service.refused_recipients(mail.to, allowed))

    async def appraise(self, arguments: MailArguments, context: CallContext) -> Appraisal:
        mail = mail_service.Mail.checked(arguments.to, arguments.subject, arguments.body)
        allowed = [pattern for part in self._parts(context) for pattern in part.allowed]
        refused = mail_service.refused_recipients(mail.to, allowed)
        dry = self._is_dry(mail, context)
        settings = self._executor.settings
        if not refused and not dry and (settings.smtp_url is None or settings.mail_from is None):
            raise ConfigurationError("send_email needs LEARNING_SMTP_URL and LEARNING_MAIL_FROM")
        return Appraisal(
            risk=Risk.WRITE,
            forbidden_because=(
                f"the policy does not allow mail to {', '.join(refused)}" if refused else None
            ),
            summary=f"{'rehearse a mail' if dry else 'send a mail'} to {', '.join(mail.to)}",
            # What is sent and whether it is sent are both approved.
            bounds={"dry_run": dry},
            effects={"dry_run": dry},
        )

    async def run(self, arguments: MailArguments, context: CallContext) -> ToolOutcome:
        mail = mail_service.Mail.checked(arguments.to, arguments.subject, arguments.body)
        allowed = [pattern for part in self._parts(context) for pattern in part.allowed]
        if refused := mail_service.refused_recipients(mail.to, allowed):
            return ToolOutcome(error=f"the policy does not allow mail to {', '.join(refused)}")
        value: dict[str, Any] = {
            "to": list(mail.to),
            "subject": mail.subject,
            "dry_run": self._is_dry(mail, context),
        }
        if value["dry_run"]:
            return ToolOutcome(value=value | {"sent": False})
        settings = self._executor.settings
        if settings.smtp_url is None or settings.mail_from is None:
            return ToolOutcome(error="send_email needs LEARNING_SMTP_URL and LEARNING_MAIL_FROM")
        try:
            message_id = await mail_service.send(
                mail, smtp_url=settings.smtp_url.get_secret_value(), sender=settings.mail_from
            )
        except mail_service.MailFailed as error:
            return ToolOutcome(error=str(error), unsure=error.unsure)
        return ToolOutcome(value=value | {"sent": True, "message_id": message_id})


async def _appraise_new_tool(arguments: NewToolArguments, context: CallContext) -> Appraisal:
    """A draft changes nothing: that it may be used is approved for itself, with its code and its examples."""
    return Appraisal(risk=Risk.READ, summary=f"hand in the tool {arguments.name}")


class _NewTool:
    """`create_new_tool`."""

    def __init__(self, executor: SafeExecutor) -> None:
        self._executor = executor

    async def run(self, arguments: NewToolArguments, context: CallContext) -> ToolOutcome:
        version = await self._executor.library.create(
            arguments.name,
            arguments.description,
            arguments.code,
            arguments.parameters,
            arguments.examples,
            context.identity,
            reason=context.reason,
        )
        waits = version.approval_id if version.state == "draft" else None
        value = {"name": version.name, "version": version.version, "state": version.state}
        if waits is not None:
            value |= {
                "approval_id": waits,
                "next": "a person decides on it; once approved it is there in the next run",
            }
        return ToolOutcome(value=value, approval_id=waits)


def tools(executor: SafeExecutor | None = None) -> list[BaseTool]:
    """The executor's tools as LangChain tools.

    With `SafeToolsMiddleware` or `safe_tools` a call that needs a yes pauses the graph; without, the tool waits for it.
    """
    if executor is None:
        from agent.execution import safe_executor as home

        executor = home.safe_executor
    return [as_langchain_tool(spec, executor) for spec in executor.registry]


def as_langchain_tool(spec: ToolSpec, executor: SafeExecutor) -> BaseTool:
    """One tool of an executor as a LangChain tool that runs by the executor."""
    name = spec.name
    description = executor.library.guide() if name == CREATE_NEW_TOOL else spec.description

    async def acall(**arguments: Any) -> str:
        return (await executor.execute(name, arguments)).text

    def call(**arguments: Any) -> str:
        # Whose run it is is asked here: the portal works in a context of its own.
        return portal().run_sync(executor.execute(name, arguments, identity=executor.somebody(None))).text

    return StructuredTool(
        name=name,
        description=description,
        args_schema=spec.arguments.model_json_schema(),
        func=call,
        coroutine=acall,
        metadata={"agent_safe_tool": name},
    )


_NAMES: Final = ("execute_sql", "query_data", "update_client_status", "send_email", "create_new_tool")


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        found: Sequence[BaseTool] = [tool for tool in tools() if tool.name == name]
        if found:
            made = globals()[name] = found[0]
            return made
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
