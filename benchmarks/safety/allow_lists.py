"""Writes `src/agent/execution/sql_allowed.py` from the catalogs of real servers: the names that the SQL gate lets pass.

`python -m benchmarks.safety.allow_lists postgresql://…15 postgresql://…18` takes empty databases of one or more
Postgres versions. A name is allowed when no server has a reason against it; what only one server knows is judged there.
"""

from __future__ import annotations

import re
import sys
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg

TARGET = Path(__file__).parents[2] / "src" / "agent" / "execution" / "sql_allowed.py"

# Volatile, and yet nothing but a value comes of them.
_HARMLESS_VOLATILE_NAMES = """
    random random_normal gen_random_uuid uuidv4 uuidv7 clock_timestamp timeofday array_shuffle array_sample
"""
_HARMLESS_VOLATILE = frozenset(_HARMLESS_VOLATILE_NAMES.split())

# Stable or immutable by the catalog, and yet they run SQL text, read settings or files, call code by the name of a
# type, tell about other objects and sessions, or make values of any size.
_BARRED = re.compile(
    r"""^(?:
      pg_.* | lo_.* | has_.* | txid_.* | binary_upgrade_.* | inet_(?:client|server)_.* | acl.* | makeaclitem
    | .*_to_xml.* | current_setting | set_config | setseed | ts_stat | ts_rewrite | ts_debug | ts_lexize
    | jsonb?_populate_record(?:set)?(?:_valid)? | to_reg.* | reg(?!exp_|r_).* | row_security_active | currtid.*
    # Paths and polygons: two are compared point by point, which no time limit ends.
    | path | path_.* | poly.* | popen | pclose | isopen | isclosed | npoints | dist_(?:poly.*|.*poly) | .*_ppath
    | dist_pathp | pt_contained_poly | spg_poly.*
    | current_query     | (?:next|curr|set|last)val | icu_.* | system_user | mxid_age | getdatabaseencoding
    | (?:array|record|domain|enum|range|multirange|any.*|cstring|void|trigger|refcursor)_?(?:in|out|recv|send)
    )$""",
    re.VERBOSE,
)
_CATALOG_HARMLESS = frozenset({"pg_typeof", "pg_column_size", "pg_size_pretty", "pg_collation_for"})

# Taken with arguments that bound their result, see `sql_policy`.
_MEASURED = frozenset({"repeat", "lpad", "rpad"})

# A value of one of these is a way to code or to an object.
_BARRED_ARGUMENT_NAMES = """
    internal cstring trigger event_trigger language_handler fdw_handler index_am_handler tsm_handler table_am_handler
    refcursor regclass regproc regprocedure regoper regoperator regtype regrole regnamespace regdictionary aclitem
    _aclitem pg_node_tree pg_ddl_command pg_ndistinct pg_dependencies pg_mcv_list pg_brin_bloom_summary
    pg_brin_minmax_multi_summary pg_snapshot txid_snapshot
"""
_BARRED_ARGUMENTS = frozenset(_BARRED_ARGUMENT_NAMES.split())

_BARRED_TYPES = re.compile(
    r"^(?:reg(?!config$).*|pg_.*|path|polygon|cstring|aclitem|refcursor|gtsvector|txid_snapshot|xid8?|cid|tid|oid|oidvector|int2vector)$"
)

_FUNCTIONS = """
    SELECT p.proname, p.provolatile::text, p.prokind::text,
           ARRAY(SELECT t.typname::text FROM unnest(p.proargtypes) WITH ORDINALITY AS a (id, place)
                 JOIN pg_type t ON t.oid = a.id ORDER BY a.place) AS arguments,
           (SELECT typname::text FROM pg_type WHERE oid = p.prorettype) AS result,
           CASE WHEN p.proargmodes IS NULL THEN '{}'::text[]
                ELSE ARRAY(SELECT n FROM unnest(p.proargnames, p.proargmodes) AS a (n, m)
                           WHERE m IN ('o', 't', 'b')) END
    FROM pg_proc p WHERE p.pronamespace = 'pg_catalog'::regnamespace
"""

_TYPES = """
    SELECT t.typname::text FROM pg_type t
    WHERE t.typnamespace = 'pg_catalog'::regnamespace AND t.typtype IN ('b', 'r', 'm') AND t.typname !~ '^_'
      AND t.typrelid = 0
"""

_OPERATORS = """
    SELECT o.oprname::text, bool_and(p.provolatile <> 'v')
    FROM pg_operator o JOIN pg_proc p ON p.oid = o.oprcode
    WHERE o.oprnamespace = 'pg_catalog'::regnamespace GROUP BY 1
"""


@dataclass
class Names:
    """What was found so far, over all servers."""

    functions: set[str] = field(default_factory=set)
    refused: set[str] = field(default_factory=set)
    function_columns: set[str] = field(default_factory=set)
    types: set[str] = field(default_factory=set)
    operators: set[str] = field(default_factory=set)
    operators_refused: set[str] = field(default_factory=set)


def reason_against(name: str, volatility: str, kind: str, arguments: Iterable[str], result: str) -> bool:
    """Whether this overload keeps its name off the list."""
    if name in _CATALOG_HARMLESS or name in _HARMLESS_VOLATILE:
        return False
    if _BARRED.match(name) or name in _MEASURED or volatility == "v" or kind == "p":
        return True
    # Aggregates such as max(oid) only compare; a plain function of an oid looks something up.
    barred = _BARRED_ARGUMENTS if kind == "a" else _BARRED_ARGUMENTS | {"oid"}
    return bool(barred.intersection(arguments)) or result in _BARRED_ARGUMENTS


def read_server(url: str, names: Names) -> str:
    """Adds what this server has; returns its version."""
    with psycopg.connect(url) as connection:
        rows: list[Any] = connection.execute(_FUNCTIONS).fetchall()
        for name, volatility, kind, arguments, result, columns in rows:
            if reason_against(name, volatility, kind, arguments, result):
                names.refused.add(name)
            else:
                names.functions.add(name)
                names.function_columns.update(column for column in columns if column)
        names.types.update(
            name for (name,) in connection.execute(_TYPES).fetchall() if not _BARRED_TYPES.match(name)
        )
        for name, is_quiet in connection.execute(_OPERATORS).fetchall():
            (names.operators if is_quiet else names.operators_refused).add(name)
        return str(connection.info.server_version // 10000)


def words(values: Iterable[str]) -> str:
    return textwrap.fill(
        " ".join(sorted(values)),
        width=110,
        initial_indent="    ",
        subsequent_indent="    ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def module_text(names: Names, versions: list[str]) -> str:
    functions = names.functions - names.refused
    sections = {
        "FUNCTIONS": ("Functions of pg_catalog whose every form only computes.", functions),
        "FUNCTION_COLUMNS": (
            "Columns that listed functions return: what may follow `(function(…)).`.",
            {name for name in names.function_columns if name not in names.refused},
        ),
        "TYPES": ("Types of pg_catalog that a value may be cast to.", names.types),
        "OPERATORS": ("Operators of pg_catalog.", names.operators - names.operators_refused),
    }
    head = f"""Names that the SQL gate lets pass, from the catalogs of Postgres {" and ".join(versions)}.

Written by `python -m benchmarks.safety.allow_lists`; do not edit.
"""
    parts = [f'"""{head}"""\n\nfrom __future__ import annotations\n']
    for name, (meaning, values) in sections.items():
        parts.append(
            f'_{name} = r"""\n{words(values)}\n"""\n{name} = frozenset(_{name}.split())\n"""{meaning}"""\n'
        )
    return "\n".join(parts)


def main(urls: list[str]) -> None:
    if not urls:
        raise SystemExit("name the databases to read: python -m benchmarks.safety.allow_lists postgresql://…")
    names = Names()
    versions = [read_server(url, names) for url in urls]
    TARGET.write_text(module_text(names, versions))
    sys.stdout.write(
        f"{TARGET.name}: {len(names.functions - names.refused)} functions, {len(names.types)} types\n"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
