"""What a write does beyond its words: rows changed by table, and code of the database that runs along with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from psycopg import AsyncConnection

from agent.execution.sql_result import Delta

_DELTA = """
SELECT s.schemaname || '.' || s.relname, s.n_tup_ins, s.n_tup_upd, s.n_tup_del
FROM pg_catalog.pg_stat_xact_user_tables s
WHERE s.n_tup_ins + s.n_tup_upd + s.n_tup_del > 0
"""

_OUTSIDE = """
WITH RECURSIVE reached AS (
    SELECT c.oid FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
    WHERE n.nspname || '.' || c.relname = ANY (%s)
    UNION
    SELECT next.oid FROM reached r CROSS JOIN LATERAL (
        SELECT k.conrelid FROM pg_catalog.pg_constraint k
        WHERE k.contype = 'f' AND k.confrelid = r.oid
          AND (k.confdeltype IN ('c', 'n', 'd') OR k.confupdtype IN ('c', 'n', 'd'))
        UNION ALL SELECT i.inhrelid FROM pg_catalog.pg_inherits i WHERE i.inhparent = r.oid
        UNION ALL SELECT i.inhparent FROM pg_catalog.pg_inherits i WHERE i.inhrelid = r.oid
        UNION ALL SELECT d.refobjid FROM pg_catalog.pg_rewrite w JOIN pg_catalog.pg_depend d ON d.objid = w.oid
        WHERE w.ev_class = r.oid AND d.classid = 'pg_catalog.pg_rewrite'::pg_catalog.regclass
          AND d.refclassid = 'pg_catalog.pg_class'::pg_catalog.regclass
    ) AS next (oid)
),
foreign_code AS (
    SELECT p.oid FROM pg_catalog.pg_proc p JOIN pg_catalog.pg_namespace n ON n.oid = p.pronamespace
    WHERE p.provolatile = 'v' AND n.nspname NOT IN ('pg_catalog', 'information_schema')
      AND NOT EXISTS (SELECT FROM pg_catalog.pg_depend d JOIN pg_catalog.pg_extension e ON e.oid = d.refobjid
                      WHERE d.objid = p.oid AND d.classid = 'pg_catalog.pg_proc'::pg_catalog.regclass
                        AND d.deptype = 'e' AND e.extname IN ('uuid-ossp', 'pgcrypto'))
)
SELECT n.nspname || '.' || c.relname || ': ' || f.name
FROM reached r JOIN pg_catalog.pg_class c ON c.oid = r.oid JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
CROSS JOIN LATERAL (
    SELECT t.tgname::pg_catalog.text FROM pg_catalog.pg_trigger t
    WHERE t.tgrelid = r.oid AND NOT t.tgisinternal AND t.tgenabled <> 'D'
    UNION SELECT w.rulename::pg_catalog.text FROM pg_catalog.pg_rewrite w WHERE w.ev_class = r.oid AND w.ev_type <> '1'
    UNION SELECT a.attname::pg_catalog.text FROM pg_catalog.pg_attrdef b
    JOIN pg_catalog.pg_attribute a ON a.attrelid = b.adrelid AND a.attnum = b.adnum
    JOIN pg_catalog.pg_depend d ON d.classid = 'pg_catalog.pg_attrdef'::pg_catalog.regclass AND d.objid = b.oid
         AND d.refclassid = 'pg_catalog.pg_proc'::pg_catalog.regclass
    JOIN foreign_code p ON p.oid = d.refobjid WHERE b.adrelid = r.oid
    UNION SELECT k.conname::pg_catalog.text FROM pg_catalog.pg_constraint k
    JOIN pg_catalog.pg_depend d ON d.classid = 'pg_catalog.pg_constraint'::pg_catalog.regclass AND d.objid = k.oid
         AND d.refclassid = 'pg_catalog.pg_proc'::pg_catalog.regclass
    JOIN foreign_code p ON p.oid = d.refobjid WHERE k.conrelid = r.oid
) AS f (name)
ORDER BY 1
"""


async def delta_of(connection: AsyncConnection[tuple[Any, ...]]) -> Delta:
    """Rows that the transaction has changed so far, by table; triggers that wait for its end are run first."""
    await connection.execute(
        "SET CONSTRAINTS ALL IMMEDIATE"
    )  # triggers that wait for the end change rows too
    found = await (await connection.execute(_DELTA)).fetchall()
    return {
        table: {"inserted": inserted, "updated": updated, "deleted": deleted}
        for table, inserted, updated, deleted in sorted(found)
    }


async def outside_effects(
    connection: AsyncConnection[tuple[Any, ...]], tables: Sequence[str]
) -> tuple[str, ...]:
    """Triggers, rules, defaults and checks of these tables, and of those that they lead to, as `schema.table: name`."""
    cursor = await connection.execute(_OUTSIDE, (list(tables),))
    return tuple(name for (name,) in await cursor.fetchall())
