"""`agent migrate` and `agent worker`."""

from __future__ import annotations

import asyncio
import importlib
import logging
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from agent.commands.options import EXIT_CODES, JsonOption, TenantOption, settings
from agent.commands.output import remark, say, say_json

if TYPE_CHECKING:
    from agent.database.migrations import MigrationState
    from agent.execution.sql_owner_script import Kind, TenantLogins
    from agent.learning.machine import LearningMachine

KINDS: tuple[Kind, ...] = ("reader", "writer")
_MIGRATE_EPILOG = (
    "Exit codes: 0 the database is at the level of this package, 1 it is not or cannot be brought there, "
    "2 wrong usage."
)


@asynccontextmanager
async def postgres_url() -> AsyncIterator[str]:
    """Address of the Postgres of the settings; the embedded one is started, and held until the end.

    Raises:
        ConfigurationError: only Supabase's web address is known.
    """
    from agent.errors import ConfigurationError

    chosen = settings()
    if chosen.database_url is not None:
        yield chosen.database_url.get_secret_value()
    elif chosen.supabase_url is not None:
        raise ConfigurationError(
            "this needs a connection to Postgres and only SUPABASE_URL is set: the web interface runs storage "
            "functions and no others. Set DATABASE_URL to the project's connection string (Connect in Supabase's "
            "dashboard: direct or session mode, port 5432)"
        )
    else:
        from agent.database.embedded import start_embedded

        server = await asyncio.to_thread(start_embedded, chosen.data_dir)
        try:
            yield server.url()
        finally:
            await asyncio.to_thread(server.release)


def migrate(
    check: Annotated[bool, typer.Option("--check", help="Change nothing, only tell.")] = False,
    roles: Annotated[
        bool, typer.Option("--roles", help="Also make the logins of agents' SQL what the policy file says.")
    ] = False,
    tenant: TenantOption = None,
    only_print: Annotated[
        bool,
        typer.Option(
            "--print",
            help="With --roles: change nothing, print what the owner of the tables must run instead.",
        ),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Bring the database's schema to the level of this package. Again, or from many places at once, does no harm."""
    if (only_print or tenant is not None) and not roles:
        raise typer.BadParameter("goes with --roles", param_hint="'--print'" if only_print else "'--tenant'")
    if roles and check:
        raise typer.BadParameter(
            "cannot be with --roles; `agent sql check` tests the logins", param_hint="'--check'"
        )
    if only_print:
        _print_roles(tenant)
        return
    if check:
        _check(asyncio.run(_read_state(raises=not as_json)), as_json=as_json)
        return

    async def work() -> tuple[tuple[str, ...], tuple[str, ...], TenantLogins | None]:
        from agent.database.migrations import migrate as apply

        async with postgres_url() as url:
            report = await apply(url)
            made = await _make_roles(url, tenant) if roles else None
            return report.applied, report.already_there, made

    applied, already_there, logins = asyncio.run(work())
    names = [logins.reader, logins.writer] if logins is not None else []
    if as_json:
        say_json({"applied": applied, "already_there": already_there} | ({"logins": names} if names else {}))
    elif applied:
        for name in applied:
            say(f"applied {name}")
    else:
        say(f"Nothing to do: all {len(already_there)} migrations are there.")
    if names and not as_json:
        say(f"logins {', '.join(names)}")


async def _make_roles(url: str, tenant: str | None) -> TenantLogins:
    from agent.approval.policy_file import load_policy
    from agent.execution.sql_logins import create_logins, logins_file, read_logins
    from agent.execution.sql_rights import check_rights

    chosen = settings()
    tenant_id = chosen.tenant if tenant is None else tenant
    policy = load_policy(chosen.policy_file)
    file = logins_file(chosen)
    logins = await create_logins(url, policy, tenant_id, file=file)
    for kind in KINDS:
        for right in await check_rights(read_logins(file)[tenant_id][kind], kind, policy, tenant_id):
            remark(f"{right}: only the provider can take this away, so the gate alone refuses it")
    return logins


def _print_roles(tenant: str | None) -> None:
    from agent.approval.policy_file import load_policy
    from agent.errors import ConfigurationError
    from agent.execution.sql_logins import database_of, keep_addresses, logins_file, read_logins
    from agent.execution.sql_owner_script import TenantLogins, owner_script

    chosen = settings()
    if chosen.database_url is None:
        raise ConfigurationError(
            "whose database? Set DATABASE_URL to its address: host and database are where the logins will be, the user "
            "need not be the owner"
        )
    url = chosen.database_url.get_secret_value()
    tenant_id = chosen.tenant if tenant is None else tenant
    policy = load_policy(chosen.policy_file)
    file = logins_file(chosen)
    logins = TenantLogins.make(tenant_id, database_of(url), kept=read_logins(file).get(tenant_id))
    say(owner_script(policy, logins))
    keep_addresses(file, url, policy, logins)
    remark(f"The passwords are in {str(file)!r}; the script holds what the server checks them by.")


async def _read_state(*, raises: bool) -> MigrationState:
    from agent.database import migrations

    async with postgres_url() as url:
        return await (migrations.check(url) if raises else migrations.read_state(url))


def _check(state: MigrationState, *, as_json: bool) -> None:
    if as_json:
        say_json(
            {
                "is_current": state.is_current,
                "applied": state.applied,
                "pending": state.pending,
                "edited": state.edited,
                "unknown": state.unknown,
            }
        )
    else:
        say(f"All {len(state.applied)} migrations are there.")
    if not state.is_current:
        raise typer.Exit(1)


def worker(
    machine: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MODULE:NAME",
            help="A LearningMachine of yours, where it differs from the default; may be given again. The first also "
            "learns what no other claims.",
        ),
    ] = None,
    concurrency: Annotated[int, typer.Option(min=1, max=100, help="Sessions learned at the same time.")] = 4,
) -> None:
    """Learn what agents record, until SIGTERM or Ctrl-C; the sessions at hand are finished first.

    Any number of workers may run, on any number of machines. They need a connection to Postgres.
    """
    from agent.jobs import run_workers
    from agent.learning.background_learner import CLOCK_NAME, BackgroundLearner
    from agent.learning.machine import LearningMachine
    from agent.telemetry import exporting

    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", stream=sys.stderr)
    logging.getLogger("agent.events").setLevel(logging.INFO)
    machines = [_machine(named) for named in machine or ()] or [LearningMachine(settings=settings())]

    async def work() -> None:
        await machines[0].queue_url()  # refused here where there is no Postgres
        # Refused here, in one line, where the schema is missing or the login may not work on it.
        await _first_call(machines[0])
        remark(f"Working with {len(machines)} machine(s), {concurrency} sessions at a time. Ctrl-C ends it.")
        try:
            learner = BackgroundLearner(settings=machines[0].settings, database=machines[0].database)
            clocks = {(machines[0].settings.tenant, CLOCK_NAME): learner.clock.work}
            async with exporting():
                await run_workers(machines, concurrency=concurrency, clocks=clocks)
        finally:
            for one in machines:
                await one.aclose()
        remark("The worker has left.")

    asyncio.run(work())


async def _first_call(machine: LearningMachine) -> None:
    from agent.portal import portal

    await portal().run(machine.database.call("queue_state", the_queue=machine.queue))


def _machine(named: str) -> LearningMachine:
    from agent.learning.machine import LearningMachine

    module_name, _, attribute = named.partition(":")
    if not module_name or not attribute:
        raise typer.BadParameter(f"{named!r} is not of the form module:name", param_hint="'--machine'")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # theirs, and their traceback says where
        raise typer.BadParameter(
            f"there is no module {module_name!r} in {here!r} or among the installed packages",
            param_hint="'--machine'",
        ) from None
    found = getattr(module, attribute, None)
    if not isinstance(found, LearningMachine):
        raise typer.BadParameter(
            f"{attribute!r} of {module_name!r} is {type(found).__name__}, not a LearningMachine",
            param_hint="'--machine'",
        )
    return found


def add_to(app: typer.Typer) -> None:
    """Register these commands."""
    app.command(epilog=_MIGRATE_EPILOG)(migrate)
    app.command(epilog=EXIT_CODES)(worker)
