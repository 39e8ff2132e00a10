"""A database laid out as Supabase lays out a project's: what differs from a plain Postgres and has broken migrations.

- Extensions, `vector` among them, are in the schema `extensions`, made by somebody else.
- The owner is no superuser, but may make roles and databases and bypasses row level security.
- `anon`, `authenticated`, `service_role` and `authenticator` are there already, and the owner may grant them.
- Default privileges give every new table, function and sequence of `public` to the first three.
- `auth` belongs to somebody else.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import psycopg
from psycopg import sql

from agent.database.embedded import start_embedded

_NAME = "supabase"
_OWNER = "project_owner"


@dataclass(frozen=True, kw_only=True)
class SupabaseLayout:
    """The database, from both sides. Each has a server of its own, since roles belong to a server."""

    url: str
    """As its owner sees it, over the socket: `DATABASE_URL` of a project."""
    tcp_url: str
    superuser_url: str
    """For looking from outside; no project has this."""


@contextmanager
def supabase_layout_database(folder: Path, *, with_vector: bool = True) -> Iterator[SupabaseLayout]:
    """Such a database in an empty folder. `with_vector=False`: the extension is not made, and the owner may not."""
    fast = {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"}
    with start_embedded(folder, tcp_port=0, server_settings=fast) as server:
        password = secrets.token_hex(16)
        owner = sql.Identifier(_OWNER)
        with psycopg.connect(server.url(), autocommit=True) as connection:
            connection.execute(
                sql.SQL(
                    "CREATE ROLE {} LOGIN NOSUPERUSER CREATEROLE CREATEDB REPLICATION BYPASSRLS PASSWORD {}"
                ).format(owner, password)
            )
            connection.execute(
                sql.SQL(
                    "GRANT anon, authenticated, service_role, authenticator TO {} WITH ADMIN OPTION"
                ).format(owner)
            )
            connection.execute(sql.SQL("CREATE DATABASE {} OWNER {}").format(sql.Identifier(_NAME), owner))
            connection.execute(
                sql.SQL('ALTER ROLE {} SET search_path = "$user", public, extensions').format(owner)
            )
        with psycopg.connect(server.url(_NAME), autocommit=True) as connection:
            connection.execute("CREATE SCHEMA extensions")
            connection.execute("GRANT USAGE ON SCHEMA extensions TO anon, authenticated, service_role")
            connection.execute("GRANT USAGE ON SCHEMA public TO anon, authenticated, service_role")
            if with_vector:
                connection.execute("CREATE EXTENSION vector WITH SCHEMA extensions")
            connection.execute(sql.SQL("GRANT ALL ON SCHEMA extensions, auth TO {}").format(owner))
            for kind in ("TABLES", "FUNCTIONS", "SEQUENCES"):
                connection.execute(
                    sql.SQL(
                        "ALTER DEFAULT PRIVILEGES FOR ROLE {owner} IN SCHEMA public "
                        "GRANT ALL ON {kind} TO {owner}, anon, authenticated, service_role"
                    ).format(owner=owner, kind=sql.SQL(kind))
                )
        yield SupabaseLayout(
            url=_as(server.url(_NAME, over_tcp=False), password),
            tcp_url=_as(server.url(_NAME, over_tcp=True), password),
            superuser_url=server.url(_NAME, over_tcp=False),
        )


def _as(url: str, password: str) -> str:
    parts = urlsplit(url)
    where = parts.netloc.rpartition("@")[2]
    return urlunsplit(parts._replace(netloc=f"{_OWNER}:{password}@{where}"))
