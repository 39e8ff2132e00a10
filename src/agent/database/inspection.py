"""What an operator wants to know of a Postgres: its version, pgvector, and whether users are kept apart (D4)."""

from __future__ import annotations

from dataclasses import dataclass

import psycopg
from psycopg import AsyncConnection
from psycopg.rows import dict_row

from agent.database.connection_errors import check_address, explain

_CONNECT_SECONDS = 10

_INSPECT = """
SELECT
    current_setting('server_version') AS server_version,
    current_user::text AS login,
    (SELECT e.extversion FROM pg_extension e WHERE e.extname = 'vector') AS vector_version,
    EXISTS (SELECT FROM pg_available_extensions a WHERE a.name = 'vector') AS vector_available,
    EXISTS (SELECT FROM pg_roles r WHERE r.rolname = 'agent_server' AND pg_has_role(current_user, r.oid, 'MEMBER'))
        AS is_server,
    EXISTS (SELECT FROM pg_roles r WHERE r.rolname = 'agent_app' AND NOT r.rolsuper AND NOT r.rolbypassrls)
        AS has_restricted_role,
    ARRAY(SELECT c.relname::text FROM pg_class c
          WHERE c.relnamespace = 'public'::regnamespace AND c.relkind = 'r' AND c.relname LIKE 'agent\\_%'
            AND c.relname <> 'agent_migration' AND NOT (c.relrowsecurity AND c.relforcerowsecurity)
          ORDER BY 1) AS open_tables,
    ARRAY(SELECT DISTINCT p.proname::text FROM pg_proc p
          JOIN pg_roles o ON o.oid = p.proowner AND o.rolname = 'agent_app'
          CROSS JOIN LATERAL aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) AS granted
          WHERE granted.privilege_type = 'EXECUTE'
            AND (granted.grantee = 0 OR granted.grantee IN (SELECT r.oid FROM pg_roles r WHERE r.rolname = 'anon'))
          ORDER BY 1) AS open_functions
"""


@dataclass(frozen=True, kw_only=True)
class DatabaseFacts:
    """One look at a database. Before the first migration there are no roles, tables or functions of ours."""

    server_version: str
    """Such as `18.1`."""
    login: str
    """The user of the connection."""
    vector_version: str | None
    """Version of pgvector in this database, or `None` where it is not made yet."""
    vector_available: bool
    """Whether the server could make it."""
    is_server: bool
    """Whether the login may say for whom it acts: it is a member of `agent_server`."""
    has_restricted_role: bool
    """Whether `agent_app`, which the storage functions run as, is there and is held by row level security."""
    open_tables: list[str]
    """Our tables without forced row level security; there must be none."""
    open_functions: list[str]
    """Our functions that everybody, or the public key of Supabase, may call; there must be none."""


async def inspect(url: str) -> DatabaseFacts:
    """Look at a database. Changes nothing.

    Raises:
        ConfigurationError: the address, the user, the password or the database name is wrong.
        DatabaseUnavailable: the server cannot be reached.
    """
    check_address(url)
    try:
        async with await AsyncConnection.connect(
            url,
            autocommit=True,
            connect_timeout=_CONNECT_SECONDS,
            prepare_threshold=None,
            row_factory=dict_row,
        ) as connection:
            row = await (await connection.execute(_INSPECT)).fetchone()
    except psycopg.Error as error:
        raise explain(error, url) from None
    return DatabaseFacts(**(row or {}))  # a SELECT without FROM has one row
