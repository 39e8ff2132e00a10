"""Bring a database's schema to the level of this package: apply `supabase/migrations/*.sql` once each, in order.

The same files work with `psql -f` and the Supabase command line: each ends by registering itself without a checksum,
which the next `migrate` fills in.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import psycopg
from psycopg import AsyncConnection
from psycopg.pq import TransactionStatus

from agent.database.connection_errors import check_address, explain, plain_address
from agent.errors import DatabaseUnavailable, MigrationError

OLDEST_SERVER = 150000
"""`server_version_num` of Postgres 15: `security_invoker` views and `UNIQUE NULLS NOT DISTINCT` begin there."""

_LOCK_KEY = int.from_bytes(
    hashlib.sha256(b"langchain-learning-machine migrations").digest()[:8], "big", signed=True
)
_CONNECT_SECONDS = 10
_LOCK_WAIT = "120s"  # for the other runner, and for tables that a busy application holds


@dataclass(frozen=True, kw_only=True)
class MigrationReport:
    """What one `migrate` did."""

    applied: tuple[str, ...]
    """Files applied by this call, in order."""
    already_there: tuple[str, ...]
    """Files that the database had."""


@dataclass(frozen=True, kw_only=True)
class MigrationState:
    """Where a database stands against this package's files. All are file names, in order."""

    applied: tuple[str, ...]
    """The database has them."""
    pending: tuple[str, ...]
    """The package has them and the database does not."""
    edited: tuple[str, ...]
    """Applied, and different in the package now."""
    unknown: tuple[str, ...]
    """The database has them and the package does not: a newer version applied them."""

    @property
    def is_current(self) -> bool:
        return not (self.pending or self.edited or self.unknown)


async def migrate(url: str, *, directory: Path | None = None) -> MigrationReport:
    """Apply what is missing, each file in a transaction of its own. Any number may run at once; a file is applied once.

    Args:
        url: `postgresql://…` of a user who owns the schema.
        directory: Other files than the package's.

    Raises:
        MigrationError: a file failed or was edited, the database is newer, its server is too old, or lacks pgvector.
        ConfigurationError: the address, the user, the password or the database name is wrong.
        DatabaseUnavailable: the server cannot be reached.
    """
    files = _files(directory)
    applied = []
    async with _connected(url) as connection:
        async with _migrating(connection):
            await _make_table(connection)
            state = await _state(connection, files)
            _refuse_foreign(state, url)
            await _fill_checksums(connection, files)
        for name in state.pending:
            async with _migrating(connection):
                if await _has(connection, name):  # another runner was faster
                    continue
                await _apply(connection, name, files[name])
            applied.append(name)
    return MigrationReport(
        applied=tuple(applied), already_there=tuple(name for name in files if name not in applied)
    )


async def check(url: str, *, directory: Path | None = None) -> MigrationState:
    """Make sure that the database is exactly at the level of this package. Changes nothing.

    Raises:
        MigrationError: it is older, newer, or an applied file was edited; or the server is too old.
        ConfigurationError, DatabaseUnavailable: as `migrate`.
    """
    state = await read_state(url, directory=directory)
    _refuse_foreign(state, url)
    if state.pending:
        raise MigrationError(
            f"{plain_address(url)} lacks {len(state.pending)} of {len(state.pending) + len(state.applied)} migrations: "
            f"{', '.join(state.pending)}. Run `agent migrate`."
        )
    return state


async def read_state(url: str, *, directory: Path | None = None) -> MigrationState:
    """Where the database stands, good or not. Changes nothing.

    Raises:
        MigrationError: the server is too old.
        ConfigurationError, DatabaseUnavailable: as `migrate`.
    """
    files = _files(directory)
    async with _connected(url) as connection:
        return await _state(connection, files)


@functools.cache
def migration_names() -> frozenset[str]:
    """The files of this package; read from disk once."""
    return frozenset(_files(None))


def body_of(function: str) -> str:
    """The body of a storage function as the migrations have it, for a query that must also run in databases without it.

    Raises:
        MigrationError: there is no such function.
    """
    head = re.escape(f"CREATE FUNCTION public.{function}(")
    for contents in reversed(_files(None).values()):
        found = re.search(head + r".*?AS (\$\w*\$)(.*?)\1;", contents.decode(), re.DOTALL)
        if found is not None:
            return found[2]
    raise MigrationError(f"the migration files have no function {function!r}; reinstall the package")


def _files(directory: Path | None) -> dict[str, bytes]:
    """Name and contents, in order. Line ends are made alike, so that a checkout on Windows is not an edit."""
    if directory is None:
        packaged = resources.files("agent.database").joinpath("migrations_sql")
        checkout = Path(__file__).parents[3] / "supabase" / "migrations"
        place = packaged if packaged.is_dir() else checkout
    else:
        place = directory
    found = {}
    if place.is_dir():
        found = {
            entry.name: entry.read_bytes().replace(b"\r\n", b"\n")
            for entry in place.iterdir()
            if entry.name.endswith(".sql")
        }
    if not found:
        raise MigrationError(f"there are no migration files in {str(place)!r}; reinstall the package")
    return dict(sorted(found.items()))


def _checksum(contents: bytes) -> str:
    return hashlib.sha256(contents).hexdigest()


@asynccontextmanager
async def _connected(url: str) -> AsyncIterator[AsyncConnection[tuple[Any, ...]]]:
    check_address(url)
    connection = None
    try:
        connection = await AsyncConnection.connect(
            url,
            autocommit=True,
            connect_timeout=_CONNECT_SECONDS,
            prepare_threshold=None,  # a pooler between us and the server would mix them up
            application_name="agent migrate",
        )
        if connection.info.server_version < OLDEST_SERVER:
            raise MigrationError(
                f"{plain_address(url)} runs Postgres {_version(connection.info.server_version)}, and "
                f"{_version(OLDEST_SERVER)} or newer is needed. Upgrade the server, or use another."
            )
        yield connection
    except psycopg.errors.LockNotAvailable as error:
        raise MigrationError(
            f"{plain_address(url)} was busy for {_LOCK_WAIT}: another migration, or an application that holds the "
            "tables. Let it finish, or stop it, and run `agent migrate` again; nothing is half applied."
        ) from error
    except psycopg.Error as error:
        raise explain(error, url) from error
    finally:
        if connection is not None:
            await connection.close()


@asynccontextmanager
async def _migrating(connection: AsyncConnection[tuple[Any, ...]]) -> AsyncIterator[None]:
    """A transaction of the one runner whose turn it is."""
    async with connection.transaction():
        await connection.execute(f"SET LOCAL lock_timeout = '{_LOCK_WAIT}'")
        await connection.execute("SET LOCAL statement_timeout = 0")  # some servers cut off what takes long
        await connection.execute("SELECT pg_advisory_xact_lock(%s)", (_LOCK_KEY,))
        yield


async def _make_table(connection: AsyncConnection[tuple[Any, ...]]) -> None:
    if not await _has_table(connection):
        await connection.execute(
            resources.files("agent.database").joinpath("migration_table.sql").read_bytes()
        )


async def _has_table(connection: AsyncConnection[tuple[Any, ...]]) -> bool:
    row = await (
        await connection.execute("SELECT to_regclass('public.agent_migration') IS NOT NULL")
    ).fetchone()
    return row is not None and bool(row[0])


async def _has(connection: AsyncConnection[tuple[Any, ...]], name: str) -> bool:
    query = "SELECT FROM public.agent_migration WHERE name = %s"
    return await (await connection.execute(query, (name,))).fetchone() is not None


async def _recorded(connection: AsyncConnection[tuple[Any, ...]]) -> dict[str, str | None]:
    if not await _has_table(connection):
        return {}
    rows = await (await connection.execute("SELECT name, checksum FROM public.agent_migration")).fetchall()
    return dict(rows)


async def _state(connection: AsyncConnection[tuple[Any, ...]], files: dict[str, bytes]) -> MigrationState:
    recorded = await _recorded(connection)
    return MigrationState(
        applied=tuple(name for name in files if name in recorded),
        pending=tuple(name for name in files if name not in recorded),
        edited=tuple(name for name in files if recorded.get(name) not in (None, _checksum(files[name]))),
        unknown=tuple(sorted(recorded.keys() - files.keys())),
    )


async def _fill_checksums(connection: AsyncConnection[tuple[Any, ...]], files: dict[str, bytes]) -> None:
    unsigned = [name for name, checksum in (await _recorded(connection)).items() if checksum is None]
    for name in unsigned:
        await _sign(connection, name, files[name])


async def _sign(connection: AsyncConnection[tuple[Any, ...]], name: str, contents: bytes) -> None:
    await connection.execute(
        "INSERT INTO public.agent_migration (name, checksum) VALUES (%s, %s) "
        "ON CONFLICT (name) DO UPDATE SET checksum = excluded.checksum WHERE agent_migration.checksum IS NULL",
        (name, _checksum(contents)),
    )


async def _apply(connection: AsyncConnection[tuple[Any, ...]], name: str, contents: bytes) -> None:
    try:
        await connection.execute(contents)
        if connection.info.transaction_status != TransactionStatus.INTRANS:
            raise MigrationError(
                f"migration {name} ends its transaction itself; take BEGIN and COMMIT out of the file"
            )
        await connection.execute("RESET ALL")  # what a file sets must not reach the next one
        await _sign(connection, name, contents)
    except psycopg.errors.LockNotAvailable:
        raise
    except psycopg.Error as error:
        if connection.broken:
            raise DatabaseUnavailable(
                f"the connection was lost while {name} was applied; the database undoes it. Run `agent migrate` again."
            ) from error
        raise MigrationError(_failure(name, contents, error)) from error


def _failure(name: str, contents: bytes, error: psycopg.Error) -> str:
    said = error.diag.message_primary or str(error)
    where = name
    if error.diag.statement_position:
        before = contents.decode("utf-8", errors="replace")[: int(error.diag.statement_position) - 1]
        where = f"{name} line {before.count(chr(10)) + 1}"
    extension = re.search(r'extension "?([\w-]+)"?', said)
    if extension and (error.sqlstate in ("0A000", "58P01") or "is not available" in said):
        step = (
            f"The extension {extension[1]} is not installed on the server. For pgvector: the package "
            "postgresql-<version>-pgvector on Debian and Ubuntu, `brew install pgvector` on macOS, the image "
            "pgvector/pgvector for Docker; a managed server offers it in its console. Then run `agent migrate` again."
        )
    elif extension and error.sqlstate == "42501":
        step = (
            f"This user may not create extensions. Have a superuser run, in this database: "
            f"CREATE EXTENSION IF NOT EXISTS {extension[1]}; then run `agent migrate` again."
        )
    elif error.sqlstate == "42501":
        step = (
            "This user lacks a right. Run `agent migrate` as the owner of the database (on Supabase: user postgres), "
            "who needs CREATEROLE and CREATE on schema public."
        )
    elif error.sqlstate in ("42P07", "42710", "42723"):
        step = (
            "Something of that name is there already and was not made by these migrations. Use another database, or "
            "remove it if it is a leftover."
        )
    else:
        step = "Nothing of this file was applied."
    return f"migration {where} failed: {said}. {step}"


def _refuse_foreign(state: MigrationState, url: str) -> None:
    if state.edited:
        raise MigrationError(
            f"{', '.join(state.edited)} was edited after {plain_address(url)} had applied it (its checksum differs). "
            "Restore the file as it was released, and put the change into a new migration."
        )
    if state.unknown:
        raise MigrationError(
            f"{plain_address(url)} is newer than this package: it has {', '.join(state.unknown)}, which it does not "
            "know. Upgrade langchain-learning-machine here, or use the version that migrated it."
        )


def _version(number: int) -> str:
    return f"{number // 10000}.{number % 10000}" if number % 10000 else str(number // 10000)
