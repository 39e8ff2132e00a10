"""Whether a login of agents' SQL can do more than the policy file lists: asked of the server, as that login."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import psycopg
from psycopg import AsyncConnection
from psycopg.rows import dict_row

from agent.approval.risk import Risk
from agent.database.connection_errors import check_address, explain, plain_address
from agent.errors import ConfigurationError, OperatorError
from agent.execution.sql_logins import login_of
from agent.execution.sql_owner_script import Kind, tables_of

if TYPE_CHECKING:
    from agent.approval.policy_file import PolicyFile, Table

POOLER_PORT = 6543
"""Supabase's transaction pooler, where what one statement leaves in a session reaches somebody else."""

_CONNECT_SECONDS = 10


async def check_rights(url: str, kind: Kind, policy: PolicyFile, tenant_id: str) -> tuple[str, ...]:
    """Log in as the reader or the writer and see that it can do no more than the policy says.

    Returns:
        What it could do beyond and nobody but the provider can take away: objects of extensions on Supabase. The gate
        alone refuses those.

    Raises:
        OperatorError: it has other rights too many; the message names the first of them.
        ConfigurationError, DatabaseUnavailable: it cannot log in.
    """
    excess = await excess_rights(url, kind, policy, tenant_id)
    beyond = [what for what, is_providers in excess if not is_providers]
    if beyond:
        more = f" and {len(beyond) - 8} more" if len(beyond) > 8 else ""
        raise OperatorError(
            f"the login {login_of(url)[0]!r} of agents' SQL has too many rights: {'; '.join(beyond[:8])}{more}. No "
            "statement is run with it. `agent migrate --roles` puts it right where the owner's login may; "
            "`agent sql check` tells them all"
        )
    return tuple(what for what, _ in excess)


async def excess_rights(url: str, kind: Kind, policy: PolicyFile, tenant_id: str) -> list[tuple[str, bool]]:
    """Each right too many, and whether nobody but the provider can take it away.

    Raises:
        ConfigurationError, DatabaseUnavailable: it cannot log in.
    """
    check_address(url)
    refuse_pooler(url)
    try:
        async with await AsyncConnection.connect(
            url,
            autocommit=True,
            connect_timeout=_CONNECT_SECONDS,
            prepare_threshold=None,
            row_factory=dict_row,
        ) as connection:
            # The names of types and tables are shown with their schemas.
            await connection.execute("SET search_path = ''")
            role = await (await connection.execute(_ROLE_FACTS)).fetchone() or {}
            relations = await (await connection.execute(_RELATION_FACTS)).fetchall()
            routines = await (await connection.execute(_ROUTINE_FACTS)).fetchall()
            apart = await open_rows(connection, policy, tenant_id)
    except psycopg.Error as error:
        raise explain(error, url) from None
    return [
        *_excess_of_role(role, kind),
        *_excess_of_relations(relations, kind, {table.name: table for table in tables_of(policy, tenant_id)}),
        *_excess_of_routines(routines, kind, policy.sql.functions),
        *((what, False) for what in apart),
    ]


async def open_rows(connection: AsyncConnection[Any], policy: PolicyFile, tenant_id: str) -> list[str]:
    """Where nothing keeps the rows of other tenants from the login of this connection; one query of the catalog.

    Raises:
        psycopg.Error: the connection is lost.
    """
    tables = [table for table in tables_of(policy, tenant_id) if table.tenant_column]
    names = [table.name for table in tables]
    columns = [table.tenant_column for table in tables]
    cursor = connection.cursor(row_factory=dict_row)
    found = await (await cursor.execute(_ROW_FACTS, (names, columns))).fetchall()
    told: list[str] = []
    for table in found:
        name = table["name"]
        if not table["is_on"]:
            told.append(f"it sees {name} with row level security off")
        elif not table["is_exact"] or not table["is_held"]:
            told.append(
                f"it sees rows of other tenants in {name}: the policy that keeps them apart is not as made"
            )
    return told


def refuse_pooler(url: str) -> None:
    """Refuse an address where sessions are shared between clients.

    Raises:
        ConfigurationError: it is one of Supabase's transaction pooler.
    """
    if urlsplit(url).port == POOLER_PORT:
        raise ConfigurationError(
            f"{plain_address(url)} is a transaction pooler: what a statement leaves in its session would reach other "
            "clients. Use the direct connection or the session pooler, port 5432, for agents' SQL"
        )


def _excess_of_role(role: dict[str, Any], kind: Kind) -> Iterable[tuple[str, bool]]:
    for attribute in ("superuser", "bypassrls", "createrole", "createdb", "replication"):
        if role.get(attribute, True):
            yield f"it has the attribute {attribute.upper()}", False
    for group in role.get("groups") or ():
        if group != f"agent_sql_{kind}":
            yield f"it is a member of {group}", False
    for what in role.get("creates") or ():
        yield f"it may create in {what}", False
    if role.get("temporary", True):
        yield "it may make temporary tables", False
    if role.get("owns", True):
        yield "it owns something", False
    for name in role.get("sequences") or ():
        if kind == "reader":
            yield f"it may advance the sequence {name}", False


def _excess_of_relations(
    relations: Sequence[dict[str, Any]], kind: Kind, listed: Mapping[str, Table]
) -> Iterable[tuple[str, bool]]:
    for relation in relations:
        name, is_providers = relation["name"], relation["is_providers"]
        table = listed.get(name)
        read = set(relation["readable"])
        if table is None:
            if read:
                yield f"it may read {name}, which is not listed", is_providers
        elif table.columns is not None and (hidden := read - set(table.columns)):
            yield f"it may read {', '.join(sorted(hidden))} of {name}", is_providers
        changed = table if kind == "writer" else None
        if relation["insert"] and not (changed is not None and changed.insert):
            yield f"it may insert into {name}", is_providers
        if relation["delete"] and not (changed is not None and changed.delete):
            yield f"it may delete rows of {name}", is_providers
        if relation["other"]:
            yield f"it may truncate, reference or put triggers on {name}", is_providers
        changeable = set(relation["changeable"]) - (set(changed.update) if changed is not None else set())
        if changeable:
            yield f"it may update {', '.join(sorted(changeable))} of {name}", is_providers


def _excess_of_routines(
    routines: Sequence[dict[str, Any]], kind: Kind, registered: Mapping[str, Risk]
) -> Iterable[tuple[str, bool]]:
    ours = {"agent_private.sql_tenant", *(("public.finish_write",) if kind == "writer" else ())}
    allowed = {
        name for name, risk in registered.items() if kind == "writer" or Risk.of(str(risk)) is Risk.READ
    }
    for routine in routines:
        if routine["name"] not in ours | allowed:
            yield f"it may call {routine['signature']}", routine["is_providers"]


_ROLE_FACTS = """
SELECT r.rolname::text AS login, r.rolsuper AS superuser, r.rolbypassrls AS bypassrls, r.rolcreaterole AS createrole,
       r.rolcreatedb AS createdb, r.rolreplication AS replication,
       ARRAY(SELECT g.rolname::text FROM pg_roles g
             WHERE g.oid <> r.oid AND pg_has_role(r.oid, g.oid, 'MEMBER')) AS groups,
       ARRAY(SELECT n.nspname::text FROM pg_namespace n WHERE has_schema_privilege(n.oid, 'CREATE'))
         || CASE WHEN has_database_privilege(current_database(), 'CREATE') THEN ARRAY['the database'] ELSE '{}' END
         AS creates,
       has_database_privilege(current_database(), 'TEMPORARY') AS temporary,
       EXISTS (SELECT FROM pg_shdepend d WHERE d.refclassid = 'pg_authid'::regclass AND d.refobjid = r.oid
               AND d.deptype = 'o') AS owns,
       ARRAY(SELECT c.oid::regclass::text FROM pg_class c
             WHERE CASE WHEN c.relkind = 'S' THEN has_sequence_privilege(c.oid, 'USAGE, UPDATE') END) AS sequences
FROM pg_roles r WHERE r.rolname = session_user
"""

_RELATION_FACTS = """
SELECT * FROM (
    SELECT n.nspname || '.' || c.relname AS name,
           ARRAY(SELECT a.attname::text FROM pg_attribute a WHERE a.attrelid = c.oid AND a.attnum > 0
                 AND NOT a.attisdropped AND has_column_privilege(c.oid, a.attnum, 'SELECT')) AS readable,
           ARRAY(SELECT a.attname::text FROM pg_attribute a WHERE a.attrelid = c.oid AND a.attnum > 0
                 AND NOT a.attisdropped AND has_column_privilege(c.oid, a.attnum, 'UPDATE')) AS changeable,
           has_any_column_privilege(c.oid, 'INSERT') AS insert, has_table_privilege(c.oid, 'DELETE') AS delete,
           has_table_privilege(c.oid, 'TRUNCATE, TRIGGER') OR has_any_column_privilege(c.oid, 'REFERENCES') AS other,
           EXISTS (SELECT FROM pg_depend d JOIN pg_extension e ON e.oid = d.refobjid
                   WHERE d.objid = c.oid AND d.classid = 'pg_class'::regclass AND d.deptype = 'e'
                     AND pg_get_userbyid(e.extowner) = 'supabase_admin') AS is_providers
    FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE c.relkind IN ('r', 'p', 'v', 'm', 'f') AND has_schema_privilege(n.oid, 'USAGE')
      AND CASE WHEN n.nspname = 'pg_catalog' THEN c.relname IN (
                   'pg_authid', 'pg_shadow', 'pg_statistic', 'pg_largeobject', 'pg_user_mapping',
                   'pg_file_settings', 'pg_hba_file_rules', 'pg_statistic_ext_data')
               ELSE n.nspname <> 'information_schema' AND n.nspname !~ '^pg_' END
) AS found
WHERE cardinality(readable) > 0 OR cardinality(changeable) > 0 OR insert OR delete OR other
ORDER BY name
"""

# The strict comparison stands alone, or last in an AND: printed, each inner condition is in parentheses of its own.
_ROW_FACTS = """
SELECT w.name, coalesce(c.relrowsecurity, false) AS is_on,
       coalesce(coalesce(o.collisdeterministic, true) AND a.attnum IS NOT NULL, false) AS is_exact,
       EXISTS (SELECT FROM pg_catalog.pg_policy p
               CROSS JOIN LATERAL (SELECT pg_catalog.pg_get_expr(p.polqual, p.polrelid) AS seen,
                                          pg_catalog.pg_get_expr(p.polwithcheck, p.polrelid) AS made) AS e
               CROSS JOIN LATERAL (SELECT pg_catalog.format(
                   CASE a.atttypid WHEN 'pg_catalog.text'::pg_catalog.regtype THEN '(%%I = %%s)'
                                   ELSE '((%%I)::text = %%s)' END,
                   w.tenant_column, '( SELECT agent_private.sql_tenant() AS sql_tenant)') AS strict) AS s
               WHERE p.polrelid = c.oid AND NOT p.polpermissive AND p.polcmd = '*' AND r.oid = ANY (p.polroles)
                 AND p.polname = 'agent_sql_only_' || pg_catalog.substr(r.rolname::text, 14)
                 AND (e.seen = s.strict OR e.seen LIKE '(%%'
                      AND pg_catalog.right(e.seen, pg_catalog.length(s.strict) + 6) = ' AND ' || s.strict || ')')
                 AND (e.made = s.strict OR e.made LIKE '(%%'
                      AND pg_catalog.right(e.made, pg_catalog.length(s.strict) + 6) = ' AND ' || s.strict || ')')
       ) AS is_held
FROM ROWS FROM (pg_catalog.unnest(%s::pg_catalog.text[]), pg_catalog.unnest(%s::pg_catalog.text[]))
     AS w(name, tenant_column)
JOIN pg_catalog.pg_roles r ON r.rolname = session_user
LEFT JOIN (pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace)
       ON n.nspname || '.' || c.relname = w.name
LEFT JOIN pg_catalog.pg_attribute a ON a.attrelid = c.oid AND a.attname = w.tenant_column AND NOT a.attisdropped
LEFT JOIN pg_catalog.pg_collation o ON o.oid = a.attcollation
"""

_ROUTINE_FACTS = """
SELECT n.nspname || '.' || p.proname AS name, p.oid::regprocedure::text AS signature,
       EXISTS (SELECT FROM pg_depend d JOIN pg_extension e ON e.oid = d.refobjid
                   WHERE d.objid = p.oid AND d.classid = 'pg_proc'::regclass AND d.deptype = 'e'
                     AND pg_get_userbyid(e.extowner) = 'supabase_admin') AS is_providers
FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace
WHERE n.nspname <> 'pg_catalog' AND n.nspname <> 'information_schema' AND n.nspname !~ '^pg_'
  AND (p.provolatile = 'v' OR p.prosecdef) AND p.prorettype NOT IN ('trigger'::regtype, 'event_trigger'::regtype)
  AND 'internal'::regtype <> ALL (p.proargtypes::oid[])  -- such an argument no SQL can make
  AND has_schema_privilege(n.oid, 'USAGE') AND has_function_privilege(p.oid, 'EXECUTE')
ORDER BY signature
"""
