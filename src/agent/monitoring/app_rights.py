"""Who may do what in the application's database: what Supabase's advisors report, for any Postgres."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, LiteralString

from agent.discovery.structure import full_name, open_app_database
from agent.settings import Settings

if TYPE_CHECKING:
    from psycopg import AsyncConnection

# Of whoever needs no account of their own: everybody in the database, and Supabase's public roles. Objects of
# extensions and
# of the system are their makers' affair.
_TABLES: LiteralString = """
WITH others AS (
    SELECT 0::oid AS role_id, 'PUBLIC' AS role_name
    UNION ALL SELECT r.oid, r.rolname::text FROM pg_roles r WHERE r.rolname IN ('anon', 'authenticated')
), rights AS (
    SELECT c.oid, o.role_name, array_agg(DISTINCT a.privilege_type ORDER BY a.privilege_type) AS privileges
    FROM pg_class c
    CROSS JOIN LATERAL aclexplode(coalesce(c.relacl, acldefault('r', c.relowner))) AS a
    JOIN others o ON o.role_id = a.grantee
    WHERE c.relkind IN ('r', 'p')
      AND has_schema_privilege(CASE o.role_id WHEN 0 THEN 'public' ELSE o.role_name END::name, c.relnamespace, 'USAGE')
    GROUP BY c.oid, o.role_name)
SELECT n.nspname AS schema, c.relname AS name, c.relrowsecurity AS rls, g.role_name AS role, g.privileges
FROM rights g JOIN pg_class c ON c.oid = g.oid JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE n.nspname NOT LIKE 'pg\\_%' AND n.nspname <> 'information_schema' AND NOT c.relispartition
  AND NOT EXISTS (SELECT FROM pg_depend d
                  WHERE d.classid = 'pg_class'::regclass AND d.objid = c.oid AND d.deptype = 'e')
ORDER BY 1, 2, 4 LIMIT 500
"""
_FUNCTIONS: LiteralString = """
SELECT n.nspname AS schema, p.proname AS name, pg_get_function_identity_arguments(p.oid) AS arguments,
       EXISTS (SELECT FROM aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) AS a
               LEFT JOIN pg_roles r ON r.oid = a.grantee
               WHERE a.privilege_type = 'EXECUTE'
                 AND (a.grantee = 0 OR r.rolname IN ('anon', 'authenticated'))) AS is_public
FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace
WHERE p.prosecdef AND n.nspname NOT LIKE 'pg\\_%' AND n.nspname <> 'information_schema'
  AND NOT EXISTS (SELECT FROM unnest(p.proconfig) AS o (setting) WHERE o.setting LIKE 'search\\_path=%')
  AND NOT EXISTS (SELECT FROM pg_depend d WHERE d.classid = 'pg_proc'::regclass AND d.objid = p.oid AND d.deptype = 'e')
ORDER BY 1, 2, 3 LIMIT 500
"""
_WRITES = {"INSERT", "UPDATE", "DELETE", "TRUNCATE"}


async def read_app_rights(settings: Settings) -> dict[str, list[dict[str, Any]]]:
    """What is open in the application's database, by kind; each at most 500 objects.

    `tables_without_rls`: others may use them and no row policy holds them. `definers`: functions that run with their
    owner's rights and look names up where their caller says. `public_writes`: tables that PUBLIC or `anon` may write.

    Raises:
        LearningError: the database is away, or refuses.
    """
    async with open_app_database(settings) as connection:
        tables = await _rows(connection, _TABLES)
        functions = await _rows(connection, _FUNCTIONS)
    open_tables: dict[str, dict[str, Any]] = {}
    writes = []
    for row in tables:
        name = full_name(row["schema"], row["name"])
        if not row["rls"]:
            one = open_tables.setdefault(name, {"table": name, "roles": []})
            one["roles"].append(row["role"])
        can_write = sorted(_WRITES & set(row["privileges"]))
        # Supabase grants everything to anon and leaves it to row policies.
        if can_write and (row["role"] == "PUBLIC" or (row["role"] == "anon" and not row["rls"])):
            writes.append({"table": name, "role": row["role"], "privileges": can_write, "rls": row["rls"]})
    return {
        "tables_without_rls": list(open_tables.values()),
        "definers": [
            {
                "function": f"{full_name(row['schema'], row['name'])}({row['arguments']})",
                "is_public": row["is_public"],
            }
            for row in functions
        ],
        "public_writes": writes,
    }


async def _rows(connection: AsyncConnection[Any], query: LiteralString) -> list[dict[str, Any]]:
    cursor = await connection.execute(query)
    names = [column.name for column in cursor.description or ()]
    return [dict(zip(names, row, strict=True)) for row in await cursor.fetchall()]
