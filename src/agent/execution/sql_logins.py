"""The database logins of agents' SQL: made by the owner's script, kept in a private file.

Each tenant has two. The reader runs what the gate calls a read, the writer what somebody approved. What a login may
do is what stands in the policy file, and nothing else: the login is the boundary that holds where the gate is wrong.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote, urlsplit, urlunsplit

import psycopg
from psycopg import AsyncConnection
from psycopg.conninfo import conninfo_to_dict

from agent.database.connection_errors import check_address, explain, plain_address
from agent.database.private_files import make_private_folder, read_private
from agent.errors import OperatorError
from agent.execution.sql_owner_script import TenantLogins, owner_script, policy_digest

if TYPE_CHECKING:
    from agent.approval.policy_file import PolicyFile
    from agent.settings import Settings

CONNECTIONS_MAX = 5
"""Connections that the server allows each login."""

_CONNECT_SECONDS = 10
_FILE_BYTES_MAX = 10_000_000
_LOCK = int.from_bytes(hashlib.sha256(b"agent sql logins").digest()[:8], "big", signed=True)


# --- the file ---------------------------------------------------------------------------------------------------


def logins_file(settings: Settings) -> Path:
    """Where the addresses of the logins are kept."""
    return settings.sql_logins_file or settings.data_dir / "sql_logins.json"


def read_logins(path: Path) -> dict[str, dict[str, str]]:
    """Tenant -> `reader`, `writer` (addresses with passwords) and `policy` (digest of what they were made for).

    Raises:
        OperatorError: the file is damaged, or somebody else can have written it.
    """
    try:
        contents = read_private(path, bytes_max=_FILE_BYTES_MAX)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise OperatorError(
            f"the logins of agents' SQL in {str(path)!r} cannot be read: {error.strerror}. Put the file right, or "
            "remove it and run `agent migrate --roles`"
        ) from None
    try:
        found = json.loads(contents)
        if isinstance(found, dict) and all(
            isinstance(one, dict) and all(isinstance(value, str) for value in one.values())
            for one in found.values()
        ):
            return found
    except ValueError:
        pass
    raise OperatorError(f"{str(path)!r} is damaged. Remove it and run `agent migrate --roles`")


def _keep_logins(path: Path, tenant_id: str, entry: dict[str, str]) -> None:
    all_logins = {**read_logins(path), tenant_id: entry}
    if not path.parent.exists():
        make_private_folder(path.parent, parents=True)
    descriptor, unfinished = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")  # of mode 0600
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(all_logins, file, indent=2)
            file.flush()
            os.fsync(file.fileno())
        Path(unfinished).replace(path)
    except BaseException:
        Path(unfinished).unlink(missing_ok=True)
        raise


def address_of(owner_url: str, login: str, password: str) -> str:
    """The owner's address with another user: the same host, database and options."""
    parts = urlsplit(owner_url)
    host = parts.netloc.rpartition("@")[2]
    owner = unquote(parts.username or "")
    if "." in owner and (parts.hostname or "").endswith(".pooler.supabase.com"):
        login = f"{login}.{owner.partition('.')[2]}"  # the pooler finds the project by it
    return urlunsplit(parts._replace(netloc=f"{quote(login, safe='')}:{quote(password, safe='')}@{host}"))


def database_of(url: str) -> str:
    """The name of the database in an address, as libpq reads it.

    Raises:
        ConfigurationError: the address cannot be read.
    """
    check_address(url)
    parts = conninfo_to_dict(url)
    return str(parts.get("dbname") or parts.get("user") or "postgres")


def login_of(url: str) -> tuple[str, str]:
    """User and password of an address."""
    parts = urlsplit(url)
    return unquote(parts.username or ""), unquote(parts.password or "")


class LoginsNotMade(OperatorError):
    """The server refused the owner's script; `sqlstate` says why."""

    def __init__(self, message: str, sqlstate: str | None) -> None:
        super().__init__(message)
        self.sqlstate = sqlstate


# --- making them ------------------------------------------------------------------------------------------------


async def create_logins(owner_url: str, policy: PolicyFile, tenant_id: str, *, file: Path) -> TenantLogins:
    """Make the logins of this tenant what the policy says, and keep their addresses in the file.

    Call it in the portal or in a loop of your own; from many processes at once does no harm.

    Raises:
        ConfigurationError: the policy lists what cannot be listed.
        OperatorError: this user may not do that, or a table is not such that tenants would be kept apart.
    """
    check_address(owner_url)
    try:
        async with await AsyncConnection.connect(
            owner_url,
            connect_timeout=_CONNECT_SECONDS,
            prepare_threshold=None,
            application_name="agent sql logins",
        ) as connection:
            # Whoever comes second finds the passwords of the first in the file.
            await connection.execute("SELECT pg_advisory_xact_lock(%s)", (_LOCK,))
            kept = (await asyncio.to_thread(read_logins, file)).get(tenant_id)
            logins = TenantLogins.make(tenant_id, connection.info.dbname, kept=kept)
            await connection.execute(owner_script(policy, logins).encode())
            await asyncio.to_thread(keep_addresses, file, owner_url, policy, logins)
    except psycopg.Error as error:
        if error.sqlstate is None or error.sqlstate.startswith(("08", "28", "53", "57")):
            raise explain(error, owner_url) from None
        raise LoginsNotMade(_why_not_made(error, owner_url, tenant_id), error.sqlstate) from None
    return logins


def keep_addresses(file: Path, owner_url: str, policy: PolicyFile, logins: TenantLogins) -> None:
    """Write the addresses of these logins, at the owner's host, into the file."""
    _keep_logins(
        file,
        logins.tenant_id,
        {
            "reader": address_of(owner_url, logins.reader, logins.reader_password),
            "writer": address_of(owner_url, logins.writer, logins.writer_password),
            "policy": policy_digest(policy, logins.tenant_id),
        },
    )


def _why_not_made(error: psycopg.Error, url: str, tenant_id: str) -> str:
    said = error.diag.message_primary or type(error).__name__
    if error.sqlstate == "42501":
        step = (
            "Run it as the owner of the tables, who needs CREATEROLE (on Supabase: user postgres), or have the owner "
            "run what `agent migrate --roles --print` prints"
        )
    elif error.sqlstate in ("42P01", "3F000"):
        step = "Correct the name in the policy file, or run `agent migrate` first if it is a table of ours"
    elif error.sqlstate in ("42883", "42704"):
        step = "Run `agent migrate` first"
    else:
        step = "Nothing was changed"
    if error.diag.message_hint:
        step = error.diag.message_hint
    return f"the logins of tenant {tenant_id!r} at {plain_address(url)} were not made: {said}. {step}."
