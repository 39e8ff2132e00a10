"""What in a database would make the SQL gate lie: code that runs without being called by a name.

The gate reads a statement. It cannot see that an operator, a cast, a domain, a view, a row policy or a trigger calls a
function, nor what a function does with its owner's rights. Logins hold where the gate is wrong; this says where it is.
"""

from __future__ import annotations

from dataclasses import dataclass

import psycopg
from psycopg import AsyncConnection
from psycopg.rows import dict_row

from agent.database.connection_errors import check_address, explain

_CONNECT_SECONDS = 10


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing to look at."""

    kind: str
    """`function`, `definer`, `operator`, `cast`, `domain`, `view`, `policy`, `trigger`, `default` or `setting`."""
    name: str
    why: str
    """What it may do unseen."""
    what_to_do: str


async def inventory(url: str) -> list[Finding]:
    """Look through a database, as its owner. Changes nothing; parts of extensions and of this package are left out.

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
            found = await (await connection.execute(_INVENTORY)).fetchall()
    except psycopg.Error as error:
        raise explain(error, url) from None
    return [Finding(**row) for row in found]


# A function counts where it can change or reach something: it is volatile, or runs with the rights of its owner, or is
# declared stable or immutable in a language in which nothing holds it to that.
_INVENTORY = """
WITH ours AS (
    SELECT p.oid FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace
    WHERE n.nspname IN ('agent_private', 'agent_queue') OR pg_get_userbyid(p.proowner) = 'agent_app'
),
risky AS (
    SELECT p.oid, n.nspname || '.' || p.proname || '(' || pg_get_function_identity_arguments(p.oid) || ')' AS name,
           p.provolatile, p.prosecdef, p.proacl, p.proowner, p.prorettype, l.lanname,
           CASE p.provolatile WHEN 'v' THEN 'volatile' WHEN 's' THEN 'declared stable' ELSE 'declared immutable' END
             || CASE WHEN p.prosecdef THEN ', with the rights of ' || pg_get_userbyid(p.proowner) ELSE '' END
             || ', in ' || l.lanname AS told
    FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace JOIN pg_language l ON l.oid = p.prolang
    WHERE n.nspname NOT IN ('pg_catalog', 'information_schema') AND n.nspname !~ '^pg_'
      AND (p.provolatile = 'v' OR p.prosecdef OR l.lanname NOT IN ('internal', 'c', 'sql'))
      AND p.oid NOT IN (SELECT oid FROM ours)
      AND NOT EXISTS (SELECT FROM pg_depend d
                      WHERE d.objid = p.oid AND d.classid = 'pg_proc'::regclass AND d.deptype = 'e')
),
rewritten AS (
    SELECT DISTINCT c.oid, n.nspname || '.' || c.relname AS name, r.name AS function, r.told
    FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace JOIN pg_rewrite w ON w.ev_class = c.oid
    JOIN pg_depend d ON d.classid = 'pg_rewrite'::regclass AND d.objid = w.oid AND d.refclassid = 'pg_proc'::regclass
    JOIN risky r ON r.oid = d.refobjid
    WHERE c.relkind IN ('v', 'm')
)
SELECT * FROM (
    SELECT 'definer' AS kind, r.name, r.told || CASE
               WHEN EXISTS (SELECT FROM aclexplode(coalesce(r.proacl, acldefault('f', r.proowner))) a
                            WHERE a.grantee = 0)
               THEN '; everybody may call it' ELSE '' END AS why,
           'see that it does not run text it is given; take EXECUTE from PUBLIC' AS what_to_do
    FROM risky r WHERE r.prosecdef AND r.prorettype NOT IN ('trigger'::regtype, 'event_trigger'::regtype)
    UNION ALL
    SELECT 'function', r.name, r.told || '; nothing keeps it from changing data',
           'declare it volatile if it changes or reaches anything; the gate refuses it unless [sql] functions lists it'
    FROM risky r WHERE NOT r.prosecdef AND r.provolatile <> 'v'
      AND r.prorettype NOT IN ('trigger'::regtype, 'event_trigger'::regtype)
    UNION ALL
    SELECT 'operator', n.nspname || '.' || o.oprname || ' (' || format_type(o.oprleft, NULL) || ', '
           || format_type(o.oprright, NULL) || ')', 'calls ' || r.name || ', ' || r.told,
           'the gate refuses operators outside pg_catalog; keep it out of pg_catalog'
    FROM pg_operator o JOIN pg_namespace n ON n.oid = o.oprnamespace JOIN risky r ON r.oid = o.oprcode
    UNION ALL
    SELECT 'cast', format_type(c.castsource, NULL) || ' as ' || format_type(c.casttarget, NULL)
           || CASE c.castcontext WHEN 'i' THEN ' (implicit)' WHEN 'a' THEN ' (on assignment)' ELSE '' END,
           'calls ' || r.name || ', ' || r.told, 'take it away, or do not list tables with columns of these types'
    FROM pg_cast c JOIN risky r ON r.oid = c.castfunc
    UNION ALL
    SELECT 'domain', t.typnamespace::regnamespace || '.' || t.typname,
           'its CHECK ' || k.conname || ' calls ' || r.name || ', ' || r.told,
           'do not list tables with columns of this type for writing'
    FROM pg_constraint k JOIN pg_type t ON t.oid = k.contypid
    JOIN pg_depend d ON d.classid = 'pg_constraint'::regclass AND d.objid = k.oid AND d.refclassid = 'pg_proc'::regclass
    JOIN risky r ON r.oid = d.refobjid
    UNION ALL
    SELECT 'view', w.name, 'calls ' || w.function || ', ' || w.told, 'do not list it; list the tables it is made of'
    FROM rewritten w
    UNION ALL
    SELECT DISTINCT 'view', n.nspname || '.' || c.relname, 'reads ' || t.oid::regclass || ' with the rights of '
           || pg_get_userbyid(c.relowner) || ', past row level security',
           'make it WITH (security_invoker = true), or list it only if all tenants may see all of it'
    FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace JOIN pg_rewrite w ON w.ev_class = c.oid
    JOIN pg_depend d ON d.classid = 'pg_rewrite'::regclass AND d.objid = w.oid AND d.refclassid = 'pg_class'::regclass
    JOIN pg_class t ON t.oid = d.refobjid AND t.oid <> c.oid AND t.relrowsecurity
    WHERE c.relkind IN ('v', 'm') AND n.nspname NOT IN ('pg_catalog', 'information_schema')
      AND NOT coalesce(c.reloptions && ARRAY['security_invoker=true', 'security_invoker=on'], false)
      AND NOT EXISTS (SELECT FROM pg_depend e
                      WHERE e.objid = c.oid AND e.classid = 'pg_class'::regclass AND e.deptype = 'e')
    UNION ALL
    SELECT DISTINCT 'policy', p.polname || ' on ' || p.polrelid::regclass, 'calls ' || r.name || ', ' || r.told,
           'list the function in [sql] functions, or reading the table fails for want of EXECUTE'
    FROM pg_policy p
    JOIN pg_depend d ON d.classid = 'pg_policy'::regclass AND d.objid = p.oid AND d.refclassid = 'pg_proc'::regclass
    JOIN risky r ON r.oid = d.refobjid
    UNION ALL
    SELECT 'trigger', t.tgname || ' on ' || t.tgrelid::regclass, 'calls ' || r.name || ', ' || r.told,
           'a trial of a write runs it too: see that it reaches nothing outside the database'
    FROM pg_trigger t JOIN risky r ON r.oid = t.tgfoid WHERE NOT t.tgisinternal AND t.tgenabled <> 'D'
    UNION ALL
    SELECT DISTINCT 'default', b.adrelid::regclass || '.' || a.attname, 'calls ' || r.name || ', ' || r.told,
           'list the function in [sql] functions, or inserting fails for want of EXECUTE'
    FROM pg_attrdef b JOIN pg_attribute a ON a.attrelid = b.adrelid AND a.attnum = b.adnum
    JOIN pg_depend d ON d.classid = 'pg_attrdef'::regclass AND d.objid = b.oid AND d.refclassid = 'pg_proc'::regclass
    JOIN risky r ON r.oid = d.refobjid
    UNION ALL
    SELECT 'setting', split_part(option, '=', 1), 'is kept in a setting, which every login can read',
           'keep secrets in a table that nobody is granted, and take the setting away: ALTER DATABASE … RESET …'
    FROM pg_db_role_setting s CROSS JOIN LATERAL unnest(s.setconfig) AS option
    WHERE s.setdatabase IN (0, (SELECT oid FROM pg_database WHERE datname = current_database()))
      AND split_part(option, '=', 1) LIKE '%.%' AND split_part(option, '=', 1) ~* '(secret|key|token|passw)'
) AS found
ORDER BY kind, name, why
"""
