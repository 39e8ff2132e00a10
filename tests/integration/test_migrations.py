"""Migrations: applied once by whomever, refused in plain words, and alike on every kind of Postgres."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from agent.database import migrations
from agent.database.embedded_place import find_place, postgres_programs
from agent.database.migrations import check, migrate, read_state
from agent.errors import AccessRefused, ConfigurationError, DatabaseUnavailable, MigrationError
from agent.testing import throwaway_database
from tests.supabase_layout import SupabaseLayout, supabase_layout_database

_PACKAGED = Path(__file__).parents[2] / "supabase" / "migrations"

_FIRST = """
CREATE TABLE IF NOT EXISTS public.agent_migration (
    name text PRIMARY KEY, checksum text, applied_at timestamptz NOT NULL DEFAULT now()
);
CREATE TABLE fruit (name text);
INSERT INTO fruit VALUES ('apple %s 100%');
INSERT INTO public.agent_migration (name, checksum) VALUES ('1_fruit.sql', NULL) ON CONFLICT DO NOTHING;
"""
_SECOND = """
ALTER TABLE fruit ADD COLUMN weight_g integer;
INSERT INTO fruit VALUES ('pear', 180);
INSERT INTO public.agent_migration (name, checksum) VALUES ('2_weight.sql', NULL) ON CONFLICT DO NOTHING;
"""


@pytest.fixture
def empty_url() -> Iterator[str]:
    """Address of a database without any table of ours."""
    with throwaway_database(migrated=False) as database:
        yield database.url


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder with two small migrations."""
    (tmp_path / "2_weight.sql").write_text(_SECOND)
    (tmp_path / "1_fruit.sql").write_text(_FIRST)
    (tmp_path / "README.md").write_text("no migration")
    return tmp_path


def _rows(url: str, query: str) -> list[tuple[Any, ...]]:
    with psycopg.connect(url) as connection:
        return connection.execute(query.encode()).fetchall()


def _run_by_hand(url: str, *names: Path) -> None:
    """As `psql -f` does it: each file as it is, no transaction around it."""
    with psycopg.connect(url, autocommit=True) as connection:
        for name in names:
            connection.execute(name.read_bytes())


# --- applying -----------------------------------------------------------------------------------------------------


async def test_files_are_applied_in_the_order_of_their_names(empty_url: str, files: Path) -> None:
    report = await migrate(empty_url, directory=files)
    assert report.applied == ("1_fruit.sql", "2_weight.sql")
    assert report.already_there == ()
    assert _rows(empty_url, "SELECT * FROM fruit ORDER BY name") == [("apple %s 100%", None), ("pear", 180)]


async def test_a_second_run_changes_nothing(empty_url: str, files: Path) -> None:
    await migrate(empty_url, directory=files)
    before = _rows(empty_url, "SELECT *, xmin::text FROM agent_migration ORDER BY name")
    report = await migrate(empty_url, directory=files)
    assert report.applied == ()
    assert report.already_there == ("1_fruit.sql", "2_weight.sql")
    assert _rows(empty_url, "SELECT *, xmin::text FROM agent_migration ORDER BY name") == before


async def test_only_what_is_missing_is_applied(empty_url: str, files: Path) -> None:
    later = (files / "2_weight.sql").rename(files.parent / "2_weight.sql")
    await migrate(empty_url, directory=files)
    later.rename(files / "2_weight.sql")
    report = await migrate(empty_url, directory=files)
    assert (report.applied, report.already_there) == (("2_weight.sql",), ("1_fruit.sql",))


async def test_twenty_runners_at_once_apply_each_file_once(empty_url: str, files: Path) -> None:
    reports = await asyncio.gather(*(migrate(empty_url, directory=files) for _ in range(20)))
    applied = sorted(name for report in reports for name in report.applied)
    assert applied == ["1_fruit.sql", "2_weight.sql"]
    assert _rows(empty_url, "SELECT count(*) FROM fruit") == [(2,)]


async def test_runners_in_other_processes_wait_for_their_turn(empty_url: str, files: Path) -> None:
    program = (
        "import asyncio, sys; from pathlib import Path; from agent.database.migrations import migrate;"
        "print(*asyncio.run(migrate(sys.argv[1], directory=Path(sys.argv[2]))).applied)"
    )
    runners = [
        await asyncio.create_subprocess_exec(
            sys.executable, "-c", program, empty_url, str(files), stdout=subprocess.PIPE
        )
        for _ in range(4)
    ]
    said = [(await runner.communicate())[0].decode().split() for runner in runners]
    assert [runner.returncode for runner in runners] == [0] * 4
    assert sorted(name for names in said for name in names) == ["1_fruit.sql", "2_weight.sql"]


async def test_a_failing_file_leaves_nothing_and_says_where(empty_url: str, files: Path) -> None:
    (files / "2_weight.sql").write_text("CREATE TABLE half_done ();\n\nSELEC 1;\n")
    with pytest.raises(MigrationError, match=r"2_weight.sql line 3 failed: syntax error"):
        await migrate(empty_url, directory=files)
    assert _rows(empty_url, "SELECT to_regclass('half_done')::text, to_regclass('fruit')::text") == [
        (None, "fruit")
    ]
    (files / "2_weight.sql").write_text(_SECOND)
    assert (await migrate(empty_url, directory=files)).applied == ("2_weight.sql",)


async def test_a_file_that_commits_by_itself_is_refused(empty_url: str, files: Path) -> None:
    (files / "1_fruit.sql").write_text("BEGIN; CREATE TABLE fruit (); COMMIT;")
    with pytest.raises(MigrationError, match="ends its transaction itself"):
        await migrate(empty_url, directory=files)


async def test_what_a_file_sets_does_not_reach_the_next_one(empty_url: str, files: Path) -> None:
    (files / "1_fruit.sql").write_text("CREATE SCHEMA other; SET search_path = other;" + _FIRST)
    (files / "2_weight.sql").write_text(
        "CREATE TABLE public_one ();" + _SECOND.replace(" fruit", " other.fruit")
    )
    await migrate(empty_url, directory=files)
    assert _rows(empty_url, "SELECT to_regclass('public.public_one') IS NOT NULL") == [(True,)]


async def test_a_table_held_by_somebody_else_ends_the_wait_in_plain_words(
    empty_url: str, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(migrations, "_LOCK_WAIT", "200ms")
    later = (files / "2_weight.sql").rename(files.parent / "2_weight.sql")
    await migrate(empty_url, directory=files)
    later.rename(files / "2_weight.sql")
    with psycopg.connect(empty_url) as holder:
        holder.execute("SELECT * FROM fruit")
        with pytest.raises(MigrationError, match="busy for 200ms"):
            await migrate(empty_url, directory=files)
    assert (await migrate(empty_url, directory=files)).applied == ("2_weight.sql",)


# --- by hand, and by the Supabase command line ----------------------------------------------------------------------


async def test_files_applied_by_hand_count_and_get_their_checksum_later(empty_url: str, files: Path) -> None:
    _run_by_hand(empty_url, files / "1_fruit.sql", files / "2_weight.sql")
    assert (await check(empty_url, directory=files)).is_current
    assert _rows(empty_url, "SELECT count(checksum) FROM agent_migration") == [(0,)]
    assert (await migrate(empty_url, directory=files)).applied == ()
    assert _rows(empty_url, "SELECT count(checksum) FROM agent_migration") == [(2,)]
    assert _rows(empty_url, "SELECT count(*) FROM fruit") == [(2,)]


async def test_one_file_by_hand_and_the_rest_by_migrate(empty_url: str, files: Path) -> None:
    _run_by_hand(empty_url, files / "1_fruit.sql")
    assert (await migrate(empty_url, directory=files)).applied == ("2_weight.sql",)


async def test_line_ends_of_another_system_are_not_an_edit(empty_url: str, files: Path) -> None:
    await migrate(empty_url, directory=files)
    (files / "1_fruit.sql").write_bytes(_FIRST.replace("\n", "\r\n").encode())
    assert (await migrate(empty_url, directory=files)).applied == ()


# --- refusals -----------------------------------------------------------------------------------------------------


async def test_an_edited_migration_is_refused_by_both(empty_url: str, files: Path) -> None:
    await migrate(empty_url, directory=files)
    (files / "1_fruit.sql").write_text(_FIRST + "CREATE TABLE later ();")
    for refuses in (migrate, check):
        with pytest.raises(MigrationError, match=r"1_fruit.sql was edited after .*Restore the file"):
            await refuses(empty_url, directory=files)
    assert (await read_state(empty_url, directory=files)).edited == ("1_fruit.sql",)
    assert _rows(empty_url, "SELECT to_regclass('later')") == [(None,)]


async def test_a_database_of_a_newer_package_is_refused_by_both(empty_url: str, files: Path) -> None:
    await migrate(empty_url, directory=files)
    (files / "2_weight.sql").unlink()
    for refuses in (migrate, check):
        with pytest.raises(MigrationError, match=r"newer than this package: it has 2_weight.sql.*Upgrade"):
            await refuses(empty_url, directory=files)


async def test_a_database_of_an_older_package_is_told_to_migrate(empty_url: str, files: Path) -> None:
    with pytest.raises(
        MigrationError, match=r"lacks 2 of 2 migrations: 1_fruit.sql, 2_weight.sql.*agent migrate"
    ):
        await check(empty_url, directory=files)
    assert _rows(empty_url, "SELECT to_regclass('agent_migration')") == [(None,)], "checking changes nothing"
    await migrate(empty_url, directory=files)
    (files / "3_more.sql").write_text("SELECT 1;")
    with pytest.raises(MigrationError, match=r"lacks 1 of 3 migrations: 3_more.sql"):
        await check(empty_url, directory=files)
    assert (await read_state(empty_url, directory=files)).pending == ("3_more.sql",)


async def test_an_old_server_is_refused_before_anything_is_done(
    empty_url: str, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(migrations, "OLDEST_SERVER", 990000)
    for refuses in (migrate, check):
        with pytest.raises(MigrationError, match=r"runs Postgres 18.\d+, and 99 or newer is needed"):
            await refuses(empty_url, directory=files)
    assert _rows(empty_url, "SELECT to_regclass('agent_migration')") == [(None,)]


async def test_an_extension_that_is_not_installed_is_explained(empty_url: str, files: Path) -> None:
    (files / "1_fruit.sql").write_text("CREATE EXTENSION hamster;")
    with pytest.raises(
        MigrationError, match=r"hamster.*not installed on the server.*postgresql-<version>-pgvector"
    ):
        await migrate(empty_url, directory=files)


async def test_an_extension_that_only_a_superuser_may_make_is_explained(data_dir: Path) -> None:
    with supabase_layout_database(data_dir, with_vector=False) as layout:
        with pytest.raises(MigrationError, match=r"superuser run.*CREATE EXTENSION IF NOT EXISTS vector"):
            await migrate(layout.url)
        with psycopg.connect(layout.superuser_url) as connection:
            connection.execute("CREATE EXTENSION vector WITH SCHEMA extensions")
        assert (await migrate(layout.url)).applied


async def test_no_files_at_all_is_a_broken_installation(empty_url: str, tmp_path: Path) -> None:
    with pytest.raises(MigrationError, match="no migration files"):
        await migrate(empty_url, directory=tmp_path / "nothing")


async def test_a_user_without_rights_is_told_so(empty_url: str, files: Path) -> None:
    await migrate(empty_url, directory=files)
    with psycopg.connect(empty_url, autocommit=True) as connection:
        name = connection.info.dbname
        connection.execute(f"CREATE ROLE guest_{name} LOGIN PASSWORD 'guest'".encode())
    guest = f"postgresql://guest_{name}:guest@" + empty_url.partition("@")[2]
    for refuses in (migrate, check):
        with pytest.raises(AccessRefused, match="permission denied"):
            await refuses(guest, directory=files)


# --- addresses ----------------------------------------------------------------------------------------------------

_SECRET = "correct-horse"


def _with_password(url: str, password: str) -> str:
    return f"postgresql://postgres:{password}@{url.partition('@')[2]}"


async def test_a_wrong_password_is_the_developers_to_correct(empty_url: str) -> None:
    with pytest.raises(ConfigurationError, match="refused the password") as caught:
        await check(_with_password(empty_url, _SECRET))
    assert _SECRET not in str(caught.value)


async def test_an_unknown_database_is_named(empty_url: str) -> None:
    with pytest.raises(ConfigurationError, match=r"no such database: postgres@.*/nowhere"):
        await check(re.sub(r"/throwaway_\w+", "/nowhere", empty_url))


@pytest.mark.parametrize(
    "where",
    ["localhost:1/db", "no-such-host.invalid/db", "127.0.0.1:1/db?sslmode=require", "/db?host=/nowhere"],
)
async def test_a_server_that_is_not_there_is_unavailable(where: str) -> None:
    with pytest.raises(DatabaseUnavailable) as caught:
        await migrate(f"postgresql://ada:{_SECRET}@{where}")
    assert _SECRET not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        f"postgresql://ada:{_SECRET}@x@localhost:1/db",
        f"postgresql://ada:{_SECRET}/y@localhost:1/db",
        f"postgresql://ada:a@{_SECRET}/y@localhost:1/db",
        f"postgresql://ada:{_SECRET}@localhost:port/db",
        f"postgresql://ada:{_SECRET}%zz@localhost:1/db",
        f"postgresql://ada:{_SECRET}@[::1/db",
        f"postgresql://ada:{_SECRET}@localhost:1/db?sslmode=bogus",
        f"postgresql://ada:{_SECRET}@localhost:1/db?no_such_option=1",
        f"mysql://ada:{_SECRET}@localhost/db",
        f"ada:{_SECRET}@localhost/db",
        "",
    ],
)
async def test_a_malformed_address_is_refused_without_the_password(url: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        await check(url)
    assert _SECRET not in str(caught.value)
    assert caught.value.__cause__ is None or _SECRET not in str(caught.value.__cause__)


# --- our own files, everywhere --------------------------------------------------------------------------------------


async def _schema_of(url: str) -> list[tuple[Any, ...]]:
    """What the migrations made, without what differs from one database to the next for other reasons."""
    return _rows(
        url,
        """
        SELECT 'column', c.relname::text, a.attname::text, format_type(a.atttypid, a.atttypmod), a.attnotnull::text,
               pg_get_expr(d.adbin, d.adrelid)
        FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid JOIN pg_namespace n ON n.oid = c.relnamespace
        LEFT JOIN pg_attrdef d ON d.adrelid = c.oid AND d.adnum = a.attnum
        WHERE n.nspname IN ('public', 'agent_private', 'agent_queue') AND c.relkind IN ('r', 'p', 'v') AND a.attnum > 0
        UNION ALL
        SELECT 'table', c.relname::text, c.relkind::text, c.relrowsecurity::text, c.relforcerowsecurity::text, ''
        FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
        WHERE n.nspname IN ('public', 'agent_private', 'agent_queue') AND c.relkind IN ('r', 'p', 'v')
        UNION ALL
        SELECT 'constraint', conrelid::regclass::text, conname::text, pg_get_constraintdef(k.oid), '', ''
        FROM pg_constraint k JOIN pg_namespace n ON n.oid = connamespace
        WHERE n.nspname IN ('public', 'agent_private', 'agent_queue') AND conrelid <> 0
        UNION ALL
        SELECT 'function', p.proname::text, pg_get_function_identity_arguments(p.oid), md5(p.prosrc),
               p.prosecdef::text, coalesce(array_to_string(p.proconfig, ';'), '')
        FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace
        LEFT JOIN pg_depend e ON e.objid = p.oid AND e.deptype = 'e'
        WHERE n.nspname IN ('public', 'agent_private', 'agent_queue') AND e.objid IS NULL
        UNION ALL
        SELECT 'policy', tablename::text, policyname::text, cmd, qual, with_check FROM pg_policies
        UNION ALL
        SELECT 'index', tablename::text, indexname::text, indexdef, '', '' FROM pg_indexes
        WHERE schemaname IN ('public', 'agent_private', 'agent_queue')
        ORDER BY 1, 2, 3, 4
        """,
    )


async def test_our_files_apply_to_a_plain_postgres_and_again_change_nothing(empty_url: str) -> None:
    names = tuple(sorted(path.name for path in _PACKAGED.glob("*.sql")))
    assert (await migrate(empty_url)).applied == names
    assert (await migrate(empty_url)).applied == ()
    assert (await check(empty_url)).applied == names


async def test_our_files_apply_once_with_twenty_runners(empty_url: str) -> None:
    reports = await asyncio.gather(*(migrate(empty_url) for _ in range(20)))
    assert sorted(name for report in reports for name in report.applied) == sorted(
        path.name for path in _PACKAGED.glob("*.sql")
    )


async def test_our_files_apply_as_the_owner_of_a_supabase_project(supabase_layout: SupabaseLayout) -> None:
    assert (await migrate(supabase_layout.url)).applied
    assert (await check(supabase_layout.url)).is_current
    assert (await migrate(supabase_layout.url)).applied == ()


async def test_on_supabase_the_public_key_may_touch_nothing_of_ours(supabase_layout: SupabaseLayout) -> None:
    await migrate(supabase_layout.url)
    open_tables = _rows(
        supabase_layout.superuser_url,
        """
        SELECT c.oid::regclass::text, r.rolname::text
        FROM pg_class c, pg_roles r
        WHERE c.relnamespace IN ('public'::regnamespace, 'agent_private'::regnamespace) AND c.relkind IN ('r', 'p', 'v')
          AND r.rolname IN ('anon', 'authenticated')
          AND has_table_privilege(r.oid, c.oid, 'SELECT, INSERT, UPDATE, DELETE, TRUNCATE')
        """,
    )
    assert open_tables == []
    open_functions = _rows(
        supabase_layout.superuser_url,
        """
        SELECT p.oid::regprocedure::text
        FROM pg_proc p LEFT JOIN pg_depend d ON d.objid = p.oid AND d.deptype = 'e'
        WHERE p.pronamespace IN ('public'::regnamespace, 'agent_private'::regnamespace) AND d.objid IS NULL
          AND has_function_privilege('anon', p.oid, 'EXECUTE')
        """,
    )
    assert open_functions == []


async def test_by_hand_and_by_migrate_give_the_same_schema(empty_url: str) -> None:
    with throwaway_database(migrated=False) as other:
        await migrate(empty_url)
        _run_by_hand(other.url, *sorted(_PACKAGED.glob("*.sql")))
        assert await _schema_of(other.url) == await _schema_of(empty_url)
        assert (await migrate(other.url)).applied == ()
        unsigned = _rows(other.url, "SELECT name FROM agent_migration WHERE checksum IS NULL")
        assert unsigned == []


async def test_our_files_apply_with_psql(supabase_layout: SupabaseLayout, data_dir: Path) -> None:
    psql = postgres_programs(find_place(data_dir).account) / "psql"
    if not psql.exists():
        psql = Path(shutil.which("psql") or pytest.skip("no psql here"))
    for name in sorted(_PACKAGED.glob("*.sql")):
        ran = await asyncio.create_subprocess_exec(
            psql, supabase_layout.url, "-X", "-q", "-v", "ON_ERROR_STOP=1", "-f", str(name),
            env={"PATH": os.environ["PATH"], "LC_ALL": "C"}, stderr=subprocess.PIPE,
        )  # fmt: skip
        _, said = await ran.communicate()
        assert ran.returncode == 0, said.decode()
    assert (await check(supabase_layout.url)).is_current
    assert (await migrate(supabase_layout.url)).applied == ()


async def test_the_bookkeeping_is_closed_to_the_api(supabase_layout: SupabaseLayout, files: Path) -> None:
    await migrate(supabase_layout.url, directory=files)
    query = """
        SELECT relrowsecurity, has_table_privilege('anon', oid, 'SELECT'),
               has_table_privilege('authenticated', oid, 'SELECT, INSERT, UPDATE, DELETE')
        FROM pg_class WHERE oid = 'public.agent_migration'::regclass
    """
    assert _rows(supabase_layout.superuser_url, query) == [(True, False, False)]
