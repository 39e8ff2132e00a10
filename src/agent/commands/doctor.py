"""`agent doctor`: what is set, whether it works, and what to do."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agent.commands.doctor_finding import Finding, Status
from agent.commands.doctor_safety import safety_findings
from agent.commands.options import JsonOption, settings
from agent.commands.output import inert, is_terminal, one_line, say, say_json
from agent.errors import AccessRefused, ConfigurationError, DatabaseUnavailable, LearningError, MigrationError

if TYPE_CHECKING:
    from agent.database import Database
    from agent.database.opening import EmbeddedDatabase
    from agent.database.postgres import PostgresDatabase
    from agent.database.supabase import SupabaseDatabase
    from agent.settings import Settings

_KEYS = {
    "DATABASE_URL": "database_url",
    "SUPABASE_SERVICE_ROLE_KEY": "supabase_service_role_key",
    "SUPABASE_ANON_KEY": "supabase_anon_key",
    "SUPABASE_ACCESS_TOKEN": "supabase_access_token",
    "OPENAI_API_KEY": "openai_api_key",
}
_EPILOG = "Exit codes: 0 nothing has to be done, 1 something has to, 2 wrong usage."
_WAIT_SECONDS = 30.0


def doctor(
    call_model: Annotated[
        bool,
        typer.Option(
            "--call-model", help="Also call the model and the embedder once; this may cost a little."
        ),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Say what is configured, reachable and migrated, and what to do."""
    findings = asyncio.run(_collect(call_model=call_model))
    is_well = all(finding.status != "problem" for finding in findings)
    if as_json:
        say_json({"is_well": is_well, "findings": [asdict(finding) for finding in findings]})
    else:
        _print(findings)
    if not is_well:
        raise typer.Exit(1)


async def _collect(*, call_model: bool) -> list[Finding]:
    return [finding async for finding in _findings(call_model=call_model)]


async def _findings(*, call_model: bool) -> AsyncIterator[Finding]:
    try:
        chosen = settings()
    except ConfigurationError as error:
        yield Finding(
            name="settings",
            status="problem",
            message=str(error),
            what_to_do="Correct it in .env or the environment.",
        )
        return
    yield _settings(chosen)
    async for finding in _database(chosen):
        yield finding
    async for finding in _models(chosen, call_model=call_model):
        yield finding
    yield _spool(chosen)
    async for finding in safety_findings(chosen):
        yield finding


def _settings(chosen: Settings) -> Finding:
    keys = ", ".join(
        f"{variable} {'set' if getattr(chosen, name) else 'not set'}" for variable, name in _KEYS.items()
    )
    whom = f"user {chosen.default_user!r}" if chosen.default_user else "no user"
    return Finding(
        name="settings",
        status="ok",
        message=f"{keys}; runs that name nobody count for {whom} of tenant {chosen.tenant!r}",
    )


# --- the database -----------------------------------------------------------------------------------------------


async def _database(chosen: Settings) -> AsyncIterator[Finding]:
    from agent.database import open_database
    from agent.database.opening import EmbeddedDatabase
    from agent.database.postgres import PostgresDatabase
    from agent.database.supabase import SupabaseDatabase

    try:
        database = open_database(chosen)
    except ConfigurationError as error:
        yield Finding(
            name="database", status="problem", message=str(error), what_to_do="Set what is missing."
        )
        return
    yield _choice(chosen)
    try:
        findings: list[AsyncIterator[Finding]] = []
        if isinstance(database, SupabaseDatabase):
            findings.append(_supabase(chosen, database))
        elif isinstance(database, EmbeddedDatabase | PostgresDatabase):
            findings.append(_postgres(chosen, database))
        for found in findings:
            async for finding in found:
                yield finding
    finally:
        await database.close()


def _choice(chosen: Settings) -> Finding:
    if chosen.database_url is not None:
        from agent.database.connection_errors import plain_address

        besides = "; SUPABASE_URL is set too and not used" if chosen.supabase_url else ""
        where = plain_address(chosen.database_url.get_secret_value())
        message = f"Postgres at {where}, because DATABASE_URL is set{besides}"
    elif chosen.supabase_url is not None:
        way = "a service key" if chosen.supabase_service_role_key else "one user's access token"
        message = f"Supabase at {chosen.supabase_url} with {way}, because SUPABASE_URL is set and DATABASE_URL is not"
    else:
        message = (
            f"the embedded Postgres in {str(chosen.data_dir / 'postgres')!r}, because neither DATABASE_URL nor "
            "SUPABASE_URL is set"
        )
    return Finding(name="database", status="ok", message=message)


async def _postgres(
    chosen: Settings, database: EmbeddedDatabase | PostgresDatabase
) -> AsyncIterator[Finding]:
    from agent.database.inspection import inspect
    from agent.database.postgres import PostgresDatabase

    try:
        url = database.url if isinstance(database, PostgresDatabase) else await database.url()
        facts = await inspect(url)
    except LearningError as error:
        yield _unreachable(error)
        return
    yield Finding(
        name="reachable",
        status="ok",
        message=f"it answers: Postgres {facts.server_version}, login {facts.login!r}",
    )
    if facts.vector_version:
        yield Finding(name="vector", status="ok", message=f"pgvector {facts.vector_version} is there")
    elif facts.vector_available:
        yield Finding(name="vector", status="note", message="pgvector is on the server; migrating makes it")
    else:
        yield Finding(
            name="vector",
            status="problem",
            message="the server lacks pgvector",
            what_to_do="Install it: the package postgresql-<version>-pgvector on Debian and Ubuntu, `brew install "
            "pgvector` on macOS, the image pgvector/pgvector for Docker; a managed server offers it in its console.",
        )
    migrated = await _migrated(chosen, database, url)
    yield migrated
    if migrated.status == "problem":
        return
    faults = []
    if not facts.has_restricted_role:
        faults.append("the role agent_app is missing or is not held by row level security")
    if facts.open_tables:
        faults.append(f"without forced row level security: {', '.join(facts.open_tables)}")
    if facts.open_functions:
        faults.append(f"open to everybody: {', '.join(facts.open_functions)}")
    if faults:
        yield Finding(
            name="isolated",
            status="problem",
            message="; ".join(faults),
            what_to_do="Somebody changed this after the migration. Undo it, or migrate a fresh database and move over.",
        )
    elif not facts.is_server:
        yield Finding(
            name="isolated",
            status="problem",
            message=f"the login {facts.login!r} is no member of agent_server, so it may act for nobody",
            what_to_do=f'Run as the owner: GRANT agent_server TO "{facts.login}"',
        )
    else:
        yield Finding(
            name="isolated",
            status="ok",
            message=f"row level security is forced on every table, and {facts.login!r} is a member of agent_server",
        )
    yield await _queue(chosen, database)
    logins = await _logins(chosen, database, url)
    if logins is not None:
        yield logins


async def _logins(
    chosen: Settings, database: EmbeddedDatabase | PostgresDatabase, url: str
) -> Finding | None:
    """The logins of agents' SQL; `None` where there need be none."""
    from agent.approval.policy_file import load_policy
    from agent.database.postgres import PostgresDatabase
    from agent.execution.sql_login_check import check_logins

    owner_url = None if isinstance(database, PostgresDatabase) else url
    try:
        policy = load_policy(chosen.policy_file)
        checked = await check_logins(chosen, policy, owner_url=owner_url)
    except LearningError as error:
        return Finding(
            name="sql logins", status="problem", message=str(error), what_to_do="Put the file right."
        )
    if not checked:
        if (
            owner_url is not None or not policy.tables
        ):  # those of the embedded server are made at their first use
            return None
        return Finding(
            name="sql logins",
            status="note",
            message=f"there are none, so agents run no SQL, though the policy file lists {len(policy.tables)} tables",
            what_to_do="Run `agent migrate --roles --tenant TENANT` for each tenant whose agents shall use SQL.",
        )
    faults = [
        f"{one.login} (tenant {one.tenant_id!r}): {one.failure or '; '.join(one.too_many[:4])}"
        for one in checked
        if one.failure or one.too_many
    ]
    if faults:
        return Finding(
            name="sql logins",
            status="problem",
            message=f"agents run no SQL with these: {'; '.join(faults)}",
            what_to_do="`agent migrate --roles --tenant TENANT` puts it right where the owner's login may; "
            "`agent sql check --tenant TENANT` tells every right too many.",
        )
    return Finding(
        name="sql logins",
        status="ok",
        message=f"none of {len(checked)} logins can do more than the policy file lists",
    )


async def _migrated(chosen: Settings, database: Database, url: str) -> Finding:
    from agent.database.migrations import read_state
    from agent.identity import Identity

    try:
        state = await read_state(url)
        if not state.applied:
            # Either nothing is there, or this login may not read the list of migrations: the functions tell.
            await database.call("learning_status", Identity(tenant_id=chosen.tenant))
            return Finding(
                name="migrated", status="ok", message="the storage functions of this version are there"
            )
    except AccessRefused as error:
        return Finding(name="migrated", status="note", message=f"cannot be told with this login: {error}")
    except MigrationError as error:
        return Finding(
            name="migrated", status="problem", message=str(error), what_to_do="Run `agent migrate`."
        )
    except LearningError as error:
        return _unreachable(error)
    if state.is_current:
        return Finding(name="migrated", status="ok", message=f"all {len(state.applied)} migrations are there")
    if state.edited or state.unknown:
        return Finding(
            name="migrated",
            status="problem",
            message=f"not as this package has it: changed since {list(state.edited)}, from a newer version "
            f"{list(state.unknown)}",
            what_to_do="Use the version of the package that migrated it; `agent migrate` says more.",
        )
    return Finding(
        name="migrated",
        status="problem",
        message=f"{len(state.pending)} migrations are missing: {', '.join(state.pending)}",
        what_to_do="Run `agent migrate`.",
    )


def _unreachable(error: LearningError) -> Finding:
    todo = (
        "Start the database or correct its address; agents answer without memory until then."
        if isinstance(error, DatabaseUnavailable)
        else "Correct the address, the login or the key; agents answer without memory until then."
    )
    return Finding(name="reachable", status="problem", message=str(error), what_to_do=todo)


async def _supabase(chosen: Settings, database: SupabaseDatabase) -> AsyncIterator[Finding]:
    from agent.identity import Identity

    try:
        claimed = database.claimed_identity
        identity = claimed or Identity(tenant_id=chosen.tenant)
        if claimed is None:
            await database.call("learning_status", identity)
        else:
            await database.call("get_learnings", identity, memory_limit=1)
    except MigrationError as error:
        yield Finding(name="reachable", status="ok", message="it answers")
        yield Finding(
            name="migrated",
            status="problem",
            message=str(error),
            what_to_do="Apply supabase/migrations with the Supabase command line, or set DATABASE_URL once and run "
            "`agent migrate`.",
        )
        return
    except AccessRefused as error:
        yield Finding(name="reachable", status="ok", message="it answers")
        yield Finding(
            name="isolated",
            status="problem",
            message=str(error),
            what_to_do="Take the key from the project's settings.",
        )
        return
    except LearningError as error:
        yield _unreachable(error)
        return
    yield Finding(name="reachable", status="ok", message="it answers, and the key is accepted")
    yield Finding(name="migrated", status="ok", message="the storage functions of this version are there")
    whom = (
        f"user {claimed.user_id!r} of tenant {claimed.tenant_id!r}"
        if claimed
        else "any user the server names"
    )
    yield Finding(name="isolated", status="ok", message=f"this key acts for {whom}")
    if claimed is None:
        yield await _queue(chosen, database)
    else:
        yield Finding(
            name="queue",
            status="note",
            message="a user's token may not see the queue; a server with a key learns",
        )


async def _queue(chosen: Settings, database: Database) -> Finding:
    from agent.identity import Identity
    from agent.settings import WorkerMode

    try:
        status: dict[str, Any] = await database.call("learning_status", Identity(tenant_id=chosen.tenant))
    except LearningError as error:
        return Finding(
            name="queue", status="problem", message=str(error), what_to_do="See the findings above."
        )
    message = (
        f"{status['memories']} memories, {status['turns']} turns of conversations and {status['runs']} runs of "
        f"tenant {chosen.tenant!r}, "
        f"{status['runs_waiting']} of them wait to be learned; "
        f"jobs: {status['jobs_waiting']} waiting, {status['jobs_running']} running, "
        f"{status['jobs_failed']} failed; workers: {status['workers']} (LEARNING_WORKER={chosen.worker.value})"
    )
    if status["jobs_waiting"] and not status["workers"] and chosen.worker is WorkerMode.OFF:
        return Finding(
            name="queue", status="problem", message=message, what_to_do="Start a worker: `agent worker`."
        )
    if status["jobs_failed"]:
        return Finding(
            name="queue",
            status="note",
            message=message,
            what_to_do="What failed is tried again with the next run of its session; the worker's log says why.",
        )
    return Finding(name="queue", status="ok", message=message)


# --- the rest ---------------------------------------------------------------------------------------------------


async def _models(chosen: Settings, *, call_model: bool) -> AsyncIterator[Finding]:
    if chosen.extraction_model is None:
        yield Finding(
            name="model",
            status="note",
            message="none: what is said is remembered word for word",
            what_to_do="For facts drawn from it set OPENAI_API_KEY, or LEARNING_MODEL=provider:model.",
        )
    else:
        yield await _try(_try_model, "model", chosen.extraction_model, chosen, call_model=call_model)
    if chosen.embedding_model is None:
        yield Finding(name="embeddings", status="note", message="none: memories are found by their words")
    else:
        yield await _try(_try_embedder, "embeddings", chosen.embedding_model, chosen, call_model=call_model)


async def _try(attempt: Any, name: str, model: str, chosen: Settings, *, call_model: bool) -> Finding:
    try:
        async with asyncio.timeout(_WAIT_SECONDS):
            result = await attempt(model, chosen, call_model=call_model)
    except ConfigurationError as error:
        return Finding(
            name=name,
            status="problem",
            message=str(error),
            what_to_do="Install the provider's package or set its key.",
        )
    except TimeoutError:
        return Finding(
            name=name, status="problem", message=f"{model} gave no answer in {_WAIT_SECONDS:g} seconds",
            what_to_do="Is the service reachable from here?",
        )  # fmt: skip
    except Exception as error:  # noqa: BLE001 - a provider's client may raise anything, and the doctor goes on
        reason = one_line(error, 200) if getattr(error, "status_code", None) != 401 else "the key was refused"
        return Finding(
            name=name, status="problem", message=f"{model} failed: {type(error).__name__}: {reason}",
            what_to_do="Check its key and its name.",
        )  # fmt: skip
    return Finding(name=name, status="ok", message=f"{model} {result}")


async def _try_model(named: str, chosen: Settings, *, call_model: bool) -> str:
    from agent.learning.models import chat_model

    model = await asyncio.to_thread(chat_model, named, chosen)
    if not call_model:
        return "can be loaded; not called (--call-model does)"
    await model.ainvoke("Answer with the one word: ready")
    return "answers"


async def _try_embedder(named: str, chosen: Settings, *, call_model: bool) -> str:
    from agent.learning.models import embedder

    made = await asyncio.to_thread(embedder, named, chosen)
    if not call_model:
        return "can be loaded; not called (--call-model does)"
    return f"answers with {len(await made.aembed_query('ready'))} dimensions"


def _spool(chosen: Settings) -> Finding:
    from agent.learning.spool import Spool

    folder = chosen.data_dir / "spool"
    waiting, refused = Spool(folder).count(), Spool(folder / "refused").count()
    message = f"{waiting} runs wait on this disk for the database, {refused} were refused by it (in {str(folder)!r})"
    if waiting:
        todo = "They go in as soon as an agent or a worker runs with the database reachable."
    elif refused:
        todo = f"Look at them in {str(folder / 'refused')!r}; delete what is of no use."
    else:
        return Finding(name="spool", status="ok", message="no run waits on this disk for the database")
    return Finding(name="spool", status="note", message=message, what_to_do=todo)


def _print(findings: list[Finding]) -> None:
    if not is_terminal():
        for finding in findings:
            say("\t".join(part for part in (finding.status, finding.name, one_line(finding.message)) if part))
            if finding.what_to_do:
                say(f"\t\t-> {one_line(finding.what_to_do)}")
        return
    from rich.console import Console
    from rich.padding import Padding
    from rich.text import Text

    console = Console()
    styles: dict[Status, tuple[str, str]] = {
        "ok": ("ok  ", "green"),
        "note": ("note", "yellow"),
        "problem": ("BAD ", "bold red"),
    }
    for finding in findings:
        mark, style = styles[finding.status]
        line = Text.assemble((mark, style), " ", (f"{finding.name:<11}", "bold"))
        console.print(line)
        console.print(Padding(Text(inert(finding.message)), (0, 0, 0, 5)))
        if finding.what_to_do:
            console.print(Padding(Text(f"→ {inert(finding.what_to_do)}", style="cyan"), (0, 0, 0, 5)))
    problems = sum(finding.status == "problem" for finding in findings)
    console.print()
    if problems:
        console.print(Text(f"Problems: {problems}.", style="bold red"))
    else:
        console.print(Text("All is well.", style="green"))


def add_to(app: typer.Typer) -> None:
    """Register this command."""
    app.command(epilog=_EPILOG)(doctor)
