"""The logins of agents' SQL: what they may do is what the policy file lists, whoever made which mistake before."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from pydantic import SecretStr
from typer.testing import CliRunner

from agent.approval.human_approval import HumanApprovalQueue
from agent.approval.policy_file import PolicyFile, parse_policy
from agent.cli import app
from agent.database.embedded import start_embedded
from agent.database.migrations import migrate
from agent.database.postgres import PostgresDatabase
from agent.errors import ConfigurationError, OperatorError
from agent.events import Event, listening
from agent.execution.sql_logins import address_of, create_logins, logins_file, read_logins
from agent.execution.sql_owner_script import TenantLogins, owner_script, verifier
from agent.execution.sql_policy import SqlScope, classify
from agent.execution.sql_rights import check_rights, excess_rights
from agent.execution.sql_runner import SqlRunner
from agent.portal import portal
from agent.server.app import keeping_approvals
from agent.settings import Settings, current_settings
from agent.testing.throwaway import ThrowawayDatabase
from tests.integration.shop_sql import POLICY, TABLES, Shop, shop
from tests.supabase_layout import SupabaseLayout


@pytest.fixture
def store(learning_database: ThrowawayDatabase) -> Iterator[Shop]:
    with shop(learning_database) as opened:
        yield opened


def excess(opened: Shop, kind: Any = "reader", tenant: str = "acme") -> list[str]:
    url = read_logins(opened.file)[tenant][kind]
    return [what for what, _ in portal().run_sync(excess_rights(url, kind, opened.policy, tenant))]


def login(opened: Shop, kind: str = "reader") -> str:
    [(name,)] = opened.rows(f"SELECT login_name::text FROM agent_private.sql_login WHERE kind = '{kind}'")
    return str(name)


def test_new_logins_have_no_right_too_many(store: Shop) -> None:
    assert excess(store, "reader") == []
    assert excess(store, "writer") == []


@pytest.mark.parametrize(
    ("granted", "told"),
    [
        ("GRANT SELECT ON shop.secrets TO PUBLIC", "may read shop.secrets"),
        ("GRANT SELECT (secret) ON shop.products TO {reader}", "may read secret of shop.products"),
        ("GRANT INSERT ON shop.orders TO {reader}", "may insert into shop.orders"),
        ("GRANT UPDATE (status) ON shop.orders TO {reader}", "may update status of shop.orders"),
        ("GRANT DELETE ON shop.orders TO {reader}", "may delete rows of shop.orders"),
        ("GRANT TRUNCATE ON shop.orders TO {reader}", "may truncate"),
        ("GRANT EXECUTE ON FUNCTION shop.purge() TO PUBLIC", "may call shop.purge()"),
        ("GRANT CREATE ON SCHEMA shop TO {reader}", "may create in shop"),
        ("GRANT TEMPORARY ON DATABASE {database} TO {reader}", "temporary tables"),
        ("GRANT pg_read_all_data TO {reader}", "member of pg_read_all_data"),
        ("GRANT agent_server TO {reader}", "member of agent_server"),
        ("ALTER ROLE {reader} BYPASSRLS", "attribute BYPASSRLS"),
        ("ALTER ROLE {reader} SUPERUSER", "attribute SUPERUSER"),
        ("ALTER ROLE {reader} CREATEROLE", "attribute CREATEROLE"),
        ("GRANT SELECT ON pg_catalog.pg_authid TO {reader}", "may read pg_catalog.pg_authid"),
        ("GRANT USAGE ON SEQUENCE shop.orders_id_seq TO {reader}", "may advance the sequence"),
        ("ALTER TABLE shop.secrets OWNER TO {reader}", "owns something"),
    ],
)
def test_every_right_too_many_is_found_and_nothing_runs_then(store: Shop, granted: str, told: str) -> None:
    store.do(granted.format(reader=f'"{login(store)}"', database=store.database.name))
    try:
        assert any(told in what for what in excess(store)), excess(store)
        with pytest.raises(OperatorError, match="too many rights"):
            portal().run_sync(
                check_rights(read_logins(store.file)["acme"]["reader"], "reader", store.policy, "acme")
            )
    finally:
        store.do(f'ALTER ROLE "{login(store)}" NOSUPERUSER')


def test_functions_that_no_sql_can_call_are_no_right_too_many(store: Shop) -> None:
    [(handlers,)] = store.rows(
        "SELECT count(*) FROM pg_proc WHERE proname IN ('hnswhandler', 'ivfflathandler') AND provolatile = 'v'"
    )
    assert handlers == 2  # of pgvector, whose maker may be a superuser from whom the owner can take nothing
    store.do(
        "GRANT EXECUTE ON FUNCTION public.hnswhandler(internal), public.ivfflathandler(internal) TO PUBLIC"
    )

    assert excess(store) == []


def test_making_them_again_takes_back_what_the_policy_no_longer_lists(store: Shop) -> None:
    store.do(
        f'GRANT SELECT ON shop.secrets TO "{login(store)}"; GRANT INSERT ON shop.orders TO "{login(store)}"'
    )
    smaller = parse_policy(b'[[table]]\nname = "shop.products"\ncolumns = ["id"]\n')

    portal().run_sync(create_logins(store.database.url, smaller, "acme", file=store.file))
    store.policy = smaller

    assert excess(store, "reader") == []
    assert excess(store, "writer") == []
    assert store.rows("SELECT count(*) FROM pg_policy WHERE polname LIKE 'agent_sql_%'") == [(0,)]


def test_making_them_again_keeps_their_passwords(store: Shop) -> None:
    before = read_logins(store.file)
    store.make_logins("acme")

    assert read_logins(store.file) == before


def test_other_roles_keep_what_they_had_through_everybody(store: Shop) -> None:
    [(can_sleep, can_purge, can_temporary)] = store.rows(
        "SELECT has_function_privilege('agent_app', 'pg_catalog.pg_sleep(float8)', 'EXECUTE'), "
        "has_function_privilege('authenticated', 'shop.purge()', 'EXECUTE'), "
        "has_database_privilege('authenticated', current_database(), 'TEMPORARY')"
    )

    assert (can_sleep, can_purge, can_temporary) == (True, True, True)
    with (
        psycopg.connect(read_logins(store.file)["acme"]["reader"]) as connection,
        pytest.raises(psycopg.Error),
    ):
        connection.execute("SELECT pg_catalog.pg_sleep(0)")


def test_the_storage_functions_still_work_after_the_hardening(store: Shop) -> None:
    assert store.ticket()


def test_tenants_are_kept_apart_only_where_row_security_is_on(
    learning_database: ThrowawayDatabase, tmp_path: Path
) -> None:
    with psycopg.connect(learning_database.url, autocommit=True) as connection:
        connection.execute(TABLES.encode())
        connection.execute("ALTER TABLE shop.orders DISABLE ROW LEVEL SECURITY")
    with pytest.raises(OperatorError, match="ENABLE ROW LEVEL SECURITY"):
        portal().run_sync(
            create_logins(
                learning_database.url, parse_policy(POLICY.encode()), "acme", file=tmp_path / "logins.json"
            )
        )
    assert not (tmp_path / "logins.json").exists()


@pytest.mark.parametrize("kind", ["varchar(10)", "char(10)", "shop.short", "name", "integer"])
def test_no_logins_are_made_where_the_column_cannot_hold_the_name_of_the_tenant(
    learning_database: ThrowawayDatabase, tmp_path: Path, kind: str
) -> None:
    with psycopg.connect(learning_database.url, autocommit=True) as connection:
        connection.execute("CREATE SCHEMA shop; CREATE DOMAIN shop.short AS varchar(10)")
        connection.execute(f"CREATE TABLE shop.rows (tenant {kind})".encode())
        connection.execute("ALTER TABLE shop.rows ENABLE ROW LEVEL SECURITY")
    policy = parse_policy(b'[[table]]\nname = "shop.rows"\ntenant_column = "tenant"\n')
    tenant = "customer-10" + "0" * 60

    with pytest.raises(OperatorError, match="cannot hold the name of this tenant"):
        portal().run_sync(create_logins(learning_database.url, policy, tenant, file=tmp_path / "logins.json"))


@pytest.mark.parametrize(
    ("kind", "tenant", "neighbour"),
    [
        ("varchar(10)", "customer-1", "customer-2"),
        ("char(12)", "acme", "other"),
        ("integer", "10", "1"),
        ("uuid", "c0ffee00-0000-0000-0000-000000000000", "c0ffee00-0000-0000-0000-000000000001"),
    ],
)
async def test_a_tenant_column_of_another_type_keeps_tenants_apart(
    learning_database: ThrowawayDatabase, tmp_path: Path, kind: str, tenant: str, neighbour: str
) -> None:
    with psycopg.connect(learning_database.url, autocommit=True) as connection:
        connection.execute("CREATE SCHEMA shop")
        connection.execute(f"CREATE TABLE shop.rows (tenant {kind})".encode())
        connection.execute(f"INSERT INTO shop.rows VALUES ('{tenant}'), ('{neighbour}')".encode())
        connection.execute("ALTER TABLE shop.rows ENABLE ROW LEVEL SECURITY")
        connection.execute("CREATE POLICY everybody ON shop.rows USING (true)")
    policy = parse_policy(b'[[table]]\nname = "shop.rows"\ntenant_column = "tenant"\n')
    settings = learning_database.settings
    await portal().run(create_logins(learning_database.url, policy, tenant, file=logins_file(settings)))
    runner = SqlRunner(settings, policy)
    scope = SqlScope.from_policy(policy.tables, policy.sql, tenant)
    read = await runner.read(classify("SELECT tenant::text FROM shop.rows", scope), tenant)
    await runner.aclose()

    assert read.rows == [[tenant]]


@pytest.mark.parametrize(
    "name",
    ["auth.users", "vault.secrets", "agent_private.sql_login", "pg_catalog.pg_authid", "public.agent_memory",
     "public.human_approval_queue", "public.approval_vote", "information_schema.tables",
     "net.http_request_queue", "cron.job", "storage.objects"],
)  # fmt: skip
def test_no_policy_can_list_secrets_or_what_this_package_decides_by(name: str) -> None:
    policy = parse_policy(f'[[table]]\nname = "{name}"\n'.encode())

    with pytest.raises(ConfigurationError, match=name):
        owner_script(policy, TenantLogins.make("acme", "db"))


def test_a_name_in_the_policy_cannot_become_a_statement(
    learning_database: ThrowawayDatabase, tmp_path: Path
) -> None:
    with psycopg.connect(learning_database.url, autocommit=True) as connection:
        connection.execute("CREATE TABLE public.kept (id integer)")
    policy = parse_policy(b'[[table]]\nname = "public.x;DROP/**/TABLE/**/public"\n')
    with pytest.raises(OperatorError):
        portal().run_sync(
            create_logins(learning_database.url, policy, "a'; DROP TABLE kept; --", file=tmp_path / "l")
        )
    with psycopg.connect(learning_database.url) as connection:
        assert connection.execute("SELECT count(*) FROM public.kept").fetchone() == (0,)


def test_a_tenant_may_have_any_name(store: Shop) -> None:
    name = "Ünïcode 'quoted' \"x\" $agent 😀" + "y" * 200
    store.make_logins(name)

    assert excess(store, "reader", name) == []
    assert store.rows("SELECT count(DISTINCT tenant_id) FROM agent_private.sql_login") == [(2,)]


def test_the_file_is_for_its_owner_alone_and_holds_every_tenant(store: Shop) -> None:
    store.make_logins("other")

    assert stat.S_IMODE(store.file.stat().st_mode) == 0o600
    assert set(read_logins(store.file)) == {"acme", "other"}
    assert list(store.file.parent.glob(".sql_logins*")) == []


def test_a_damaged_file_is_told_and_not_replaced(store: Shop) -> None:
    store.file.write_text("{")

    with pytest.raises(OperatorError, match="damaged"):
        store.make_logins("acme")
    assert store.file.read_text() == "{"


async def test_many_at_once_leave_logins_that_work(store: Shop) -> None:
    await asyncio.gather(
        *(
            portal().run(create_logins(store.database.url, store.policy, f"t{number % 2}", file=store.file))
            for number in range(6)
        )
    )

    for tenant in ("t0", "t1"):
        assert (await store.runner.read(store.judge("SELECT 1", tenant), tenant)).rows == [[1]]


async def test_a_changed_policy_wants_its_logins_made_anew(store: Shop) -> None:
    wider = parse_policy(POLICY.encode() + b'[[table]]\nname = "shop.secrets"\n')

    with pytest.raises(OperatorError, match="has changed since"):
        await SqlRunner(store.settings, wider).read(store.judge("SELECT 1"), "acme")
    # What has nothing to do with SQL does not.
    other = parse_policy(POLICY.encode() + b'[[reviewer]]\nname = "ada"\n')
    runner = SqlRunner(store.settings, other)
    assert (await runner.read(store.judge("SELECT 1"), "acme")).rows == [[1]]
    await runner.aclose()


def test_the_verifier_is_the_one_that_the_server_would_make(learning_database: ThrowawayDatabase) -> None:
    with psycopg.connect(learning_database.url, autocommit=True) as connection:
        connection.execute("CREATE ROLE someone_to_drop LOGIN PASSWORD 'open sesame'")
        try:
            row = connection.execute(
                "SELECT rolpassword FROM pg_authid WHERE rolname = 'someone_to_drop'"
            ).fetchone()
        finally:
            connection.execute("DROP ROLE someone_to_drop")
    assert row is not None
    salt = base64.b64decode(row[0].split("$")[1].split(":")[1])
    assert verifier("open sesame", salt=salt) == row[0]


def test_the_address_keeps_host_and_options_and_names_the_project_to_supabases_pooler() -> None:
    assert (
        address_of("postgresql://me:x@db.example:5432/app?sslmode=require", "agent", "p@w")
        == "postgresql://agent:p%40w@db.example:5432/app?sslmode=require"
    )
    assert address_of(
        "postgresql://postgres.abc:x@eu.pooler.supabase.com:5432/postgres", "agent", "pw"
    ).startswith("postgresql://agent.abc:pw@")


# --- as on Supabase ---------------------------------------------------------------------------------------------


async def test_an_owner_who_is_no_superuser_can_make_them(
    supabase_layout: SupabaseLayout, tmp_path: Path
) -> None:
    await migrate(supabase_layout.url)
    with psycopg.connect(supabase_layout.url, autocommit=True) as connection:
        connection.execute(TABLES.encode())
    policy = parse_policy(POLICY.encode())
    settings = Settings(
        database_url=SecretStr(supabase_layout.url),
        data_dir=tmp_path,
        sql_logins_file=tmp_path / "logins.json",
    )
    await create_logins(supabase_layout.url, policy, "acme", file=tmp_path / "logins.json")
    await create_logins(supabase_layout.url, policy, "acme", file=tmp_path / "logins.json")

    runner = SqlRunner(settings, policy)
    scope = SqlScope.from_policy(policy.tables, policy.sql, "acme")
    read = await runner.read(classify("SELECT DISTINCT tenant_id FROM shop.orders", scope), "acme")
    tried = await runner.try_write(classify("DELETE FROM shop.orders WHERE id = 2", scope), "acme")
    await runner.aclose()

    assert read.rows == [["acme"]]
    assert tried == {"shop.orders": {"inserted": 0, "updated": 0, "deleted": 1}}


# --- the embedded server ----------------------------------------------------------------------------------------


async def test_on_the_embedded_server_they_are_made_at_first_use_and_follow_the_policy(
    data_dir: Path,
) -> None:
    settings = Settings(data_dir=data_dir)
    with start_embedded(data_dir) as server:
        await migrate(server.url())
        with psycopg.connect(server.url(), autocommit=True) as connection:
            connection.execute(TABLES.encode())
        policy = parse_policy(POLICY.encode())
        runner = SqlRunner(settings, policy)
        scope = SqlScope.from_policy(policy.tables, policy.sql, "acme")

        read = await runner.read(classify("SELECT count(*) FROM shop.orders", scope), "acme")
        wider = parse_policy(POLICY.encode() + b'[[table]]\nname = "shop.secrets"\n')
        second = SqlRunner(settings, wider)
        more = await second.read(
            classify("SELECT word FROM shop.secrets", SqlScope.from_policy(wider.tables, wider.sql, "acme")),
            "acme",
        )
        await runner.aclose()
        await second.aclose()

    assert read.rows == [[10]]
    assert more.rows == [["swordfish"]]


# --- the commands -----------------------------------------------------------------------------------------------


@pytest.fixture
def command(
    learning_database: ThrowawayDatabase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Any]:
    with psycopg.connect(learning_database.url, autocommit=True) as connection:
        connection.execute(TABLES.encode())
    (tmp_path / "agent-policy.toml").write_text(POLICY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DATABASE_URL", learning_database.url)
    current_settings.cache_clear()
    yield lambda *arguments: CliRunner().invoke(app, arguments)
    current_settings.cache_clear()


def test_migrate_with_roles_makes_them_and_check_says_that_they_are_right(command: Any) -> None:
    made = command("migrate", "--roles", "--tenant", "acme")
    checked = command("sql", "check", "--tenant", "acme", "--json")

    assert made.exit_code == 0, made.output
    assert "logins agent_reader_acme_" in made.output
    assert checked.exit_code == 0, checked.output
    assert [found["too_many"] for found in json.loads(checked.stdout)] == [[], []]


def test_check_fails_where_a_login_can_do_too_much(
    command: Any, learning_database: ThrowawayDatabase
) -> None:
    command("migrate", "--roles", "--tenant", "acme")
    with psycopg.connect(learning_database.url, autocommit=True) as connection:
        connection.execute("GRANT SELECT ON shop.secrets TO PUBLIC")

    checked = command("sql", "check", "--tenant", "acme")

    assert checked.exit_code == 1
    assert "may read shop.secrets" in checked.output


def test_the_doctor_and_a_starting_server_say_that_a_login_can_do_too_much(
    command: Any, learning_database: ThrowawayDatabase
) -> None:
    def found() -> dict[str, Any]:
        told = json.loads(command("doctor", "--json").stdout)["findings"]
        return {finding["name"]: finding for finding in told}

    async def started() -> list[Event]:
        heard: list[Event] = []
        queue = HumanApprovalQueue(PostgresDatabase(learning_database.url), Settings())
        with listening(heard.append):
            async with keeping_approvals(queue):
                check = next(task for task in asyncio.all_tasks() if task.get_name() == "sql-login-check")
                await asyncio.wait([check])
        await queue.database.close()
        return [event for event in heard if event.name == "sql_login_check_failed"]

    assert (found()["sql logins"]["status"], "there are none" in found()["sql logins"]["message"]) == (
        "note",
        True,
    )
    command("migrate", "--roles", "--tenant", "acme")
    assert found()["sql logins"]["status"] == "ok"
    assert asyncio.run(started()) == []
    with psycopg.connect(learning_database.url, autocommit=True) as connection:
        connection.execute("GRANT SELECT ON shop.secrets TO PUBLIC")

    told = found()["sql logins"]
    assert told["status"] == "problem"
    assert "may read shop.secrets" in told["message"]
    assert ["may read shop.secrets" in event.facts["reason"] for event in asyncio.run(started())] == [
        True,
        True,
    ]


def test_what_is_printed_for_an_owner_makes_the_same_logins_and_tells_no_password(
    command: Any, learning_database: ThrowawayDatabase, tmp_path: Path
) -> None:
    printed = command("migrate", "--roles", "--tenant", "acme", "--print")
    assert printed.exit_code == 0, printed.output
    kept = read_logins(logins_file(current_settings()))["acme"]
    for url in (kept["reader"], kept["writer"]):
        assert psycopg.conninfo.conninfo_to_dict(url)["password"] not in printed.stdout

    with psycopg.connect(learning_database.url, autocommit=True) as connection:
        connection.execute(printed.stdout.encode())

    checked = command("sql", "check", "--tenant", "acme")
    assert checked.exit_code == 0, checked.output


@pytest.mark.parametrize("arguments", [["--print"], ["--tenant", "x"], ["--roles", "--check"]])
def test_options_that_do_not_go_together_are_refused(command: Any, arguments: list[str]) -> None:
    assert command("migrate", *arguments).exit_code == 2


def test_no_file_of_another_user_is_believed(store: Shop) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a file away")
    os.chown(store.file, 12345, 12345)

    with pytest.raises(OperatorError, match="cannot be read"):
        store.make_logins("acme")


def test_an_empty_policy_makes_logins_that_may_touch_nothing(store: Shop) -> None:
    portal().run_sync(create_logins(store.database.url, PolicyFile(), "acme", file=store.file))
    store.policy = PolicyFile()

    assert excess(store) == []
