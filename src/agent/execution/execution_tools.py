"""The executor's own tools, for code and, as LangChain tools, for agents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Final

from langchain_core.tools import BaseTool, StructuredTool
from pydantic import Field

from agent.approval.risk import Risk
from agent.errors import ConfigurationError, InvalidRequest
from agent.execution import mail as mail_service
from agent.execution import sql_building
from agent.execution.sql_policy import SqlScope, SqlVerdict, classify
from agent.execution.tool_library import CREATE_NEW_TOOL
from agent.execution.tool_registry import Appraisal, CallContext, ToolArguments, ToolOutcome, ToolSpec
from agent.portal import portal

if TYPE_CHECKING:
    from agent.execution.safe_executor import SafeExecutor

Value = str | int | float | bool | None

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
            run=sql.run_text,
            target="sql",
            rights=("database",),
        ),
        ToolSpec(
            name="query_data",
            description="Read rows of one table: columns, filters, order and limit. No SQL is needed.",
            arguments=QueryArguments,
            risk=sql.appraise_query,
            run=sql.run_query,
            target="sql",
            rights=("database",),
        ),
        ToolSpec(
            name="update_client_status",
            description=(
                "Change columns of the rows that a key names, at most max_rows of them. Waits for a person's approval."
            ),
            arguments=UpdateArguments,
            risk=sql.appraise_update,
            run=sql.run_update,
            target="sql",
            rights=("database",),
        ),
        ToolSpec(
            name="send_email",
            description="Send a mail in plain text to addresses that the policy allows. Waits for a person's approval.",
            arguments=MailArguments,
            risk=mail.appraise,
            run=mail.run,
            rights=("mail",),
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
            rights=("sandbox",),
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

    async def run_text(self, arguments: SqlArguments, context: CallContext) -> ToolOutcome:
        return await self._run(arguments.sql, context)

    async def appraise_query(self, arguments: QueryArguments, context: CallContext) -> Appraisal:
        return await self._appraise(self._query(arguments), context)

    async def run_query(self, arguments: QueryArguments, context: CallContext) -> ToolOutcome:
        return await self._run(self._query(arguments), context)

    async def appraise_update(self, arguments: UpdateArguments, context: CallContext) -> Appraisal:
        appraisal = await self._appraise(
            sql_building.update(arguments.table, key=arguments.key, values=arguments.values), context
        )
        if appraisal.rows is not None and appraisal.rows > arguments.max_rows:
            raise InvalidRequest(
                f"{appraisal.rows} rows would change and max_rows is {arguments.max_rows}: make the key narrower"
            )
        return appraisal

    async def run_update(self, arguments: UpdateArguments, context: CallContext) -> ToolOutcome:
        return await self._run(
            sql_building.update(arguments.table, key=arguments.key, values=arguments.values), context
        )

    def _query(self, arguments: QueryArguments) -> str:
        columns = arguments.columns
        if columns is None:
            listed = next(
                (table for table in self._executor.policy.tables if table.name == arguments.table), None
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
        """What the gate says; of a write also what a trial run changed, unless an approval says it already."""
        verdict = self._judged(sql, context)
        why = "; ".join(verdict.reasons)
        if verdict.risk is Risk.FORBIDDEN:
            return Appraisal(
                risk=Risk.FORBIDDEN,
                why=f"this statement is never run: {why}",
                shown={"sql": sql},
                summary=f"{verdict.command or 'SQL'}: FORBIDDEN",
            )
        effects: dict[str, Any] = {}
        rows = None
        if verdict.risk is not Risk.READ:
            if context.bounds:
                effects = {table: dict(changed) for table, changed in context.bounds.items()}
            else:
                effects = await self._executor.sql.try_write(verdict, context.identity.tenant_id)
                effects = effects or dict.fromkeys(sorted(verdict.tables_written), _NOTHING)
            rows = sum(sum(changed.values()) for changed in effects.values())
        tables = sorted(verdict.tables_read | verdict.tables_written)
        return Appraisal(
            risk=verdict.risk,
            why=why,
            shown={"sql": verdict.text},
            summary=f"{verdict.command.upper()} {', '.join(tables)}"[:_SUMMARY_CHARACTERS_MAX],
            effects=effects,
            bounds=effects,
            fingerprint=verdict.fingerprint or None,
            tables=tables,
            rows=rows,
        )

    async def _run(self, sql: str, context: CallContext) -> ToolOutcome:
        verdict = self._judged(sql, context)
        runner = self._executor.sql
        tenant_id = context.identity.tenant_id
        if verdict.risk is Risk.READ:
            result = await runner.read(verdict, tenant_id)
            effects: dict[str, Any] = {}
        else:
            if context.ticket is None:
                raise InvalidRequest("a write needs an approval")
            result = await runner.write(
                verdict, tenant_id, bounds=context.bounds, ticket=context.ticket, entry=context.entry
            )
            effects = dict(result.delta)
        rows = [dict(zip(result.columns, row, strict=True)) for row in result.rows]
        value: dict[str, Any] = {"rows": rows, "row_count": result.row_count}
        if len(set(result.columns)) != len(result.columns):  # two columns of one name would become one
            value = {"columns": list(result.columns), "rows": result.rows, "row_count": result.row_count}
        if result.truncated:
            value["truncated"] = True
        if effects:
            value["changed"] = effects
        return ToolOutcome(
            value=value,
            rows=value["rows"],
            row_count=result.row_count,
            result_bytes=result.result_bytes,
            effects=effects,
            log_id=result.log_id,
        )


_NOTHING: Final = {"inserted": 0, "updated": 0, "deleted": 0}


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
