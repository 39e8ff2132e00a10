"""Agents' SQL on a real server: reads are rolled back, writes are held to what was approved, and can be undone."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest

from agent.approval.policy_file import parse_policy
from agent.approval.risk import Risk
from agent.errors import (
    ConflictError,
    DatabaseUnavailable,
    InvalidRequest,
    NotFound,
    OperatorError,
    Refused,
)
from agent.events import Event, listening
from agent.execution import sql_connections, sql_runner
from agent.execution.sql_policy import SqlVerdict
from agent.execution.sql_result import Collected
from agent.execution.sql_runner import SqlRunner
from agent.portal import portal
from agent.testing.throwaway import ThrowawayDatabase
from tests.integration.shop_sql import TABLES, Shop, shop


@pytest.fixture
def store(learning_database: ThrowawayDatabase) -> Iterator[Shop]:
    with shop(learning_database, tenants=("acme", "other")) as opened:
        yield opened


def as_read(text: str, *, is_select: bool = True) -> SqlVerdict:
    """As if the gate had let it through."""
    return SqlVerdict(risk=Risk.READ, text=text, command="select", is_select=is_select)


ENTRY: dict[str, Any] = {"arguments_run": {"sql": "…"}}


# --- reading ----------------------------------------------------------------------------------------------------


async def test_a_read_gives_columns_and_values_that_json_can_hold(store: Shop) -> None:
    result = await store.runner.read(
        as_read(
            "SELECT id, price, name, true AS yes, NULL AS none, 1.5::float8 AS f, 'NaN'::float8 AS odd, "
            "'[1]'::jsonb AS j, 9007199254740993::numeric AS large, DATE 'infinity' AS d "
            "FROM shop.products WHERE id < 3 ORDER BY id"
        ),
        "acme",
    )

    assert result.columns == ("id", "price", "name", "yes", "none", "f", "odd", "j", "large", "d")
    assert result.rows[0] == [1, 99.5, "hive", True, None, 1.5, "NaN", [1], 9007199254740993, "infinity"] or (
        result.rows[0][8] == "9007199254740993"
    )
    assert json.loads(json.dumps(result.rows, allow_nan=False)) == result.rows
    assert result.row_count == 2
    assert not result.truncated


async def test_a_read_is_cut_at_the_rows_that_the_policy_allows(store: Shop) -> None:
    result = await store.runner.read(as_read("SELECT i FROM generate_series(1, 1000000) i"), "acme")

    assert [row[0] for row in result.rows] == [1, 2, 3, 4, 5]
    assert result.truncated


async def test_exactly_as_many_rows_as_allowed_are_not_called_truncated(store: Shop) -> None:
    result = await store.runner.read(as_read("SELECT i FROM generate_series(1, 5) i"), "acme")

    assert result.row_count == 5
    assert not result.truncated


async def test_an_error_of_the_server_tells_no_value_of_a_row(store: Shop) -> None:
    with pytest.raises(InvalidRequest, match="invalid input syntax for type integer") as refused:
        await store.runner.read(as_read("SELECT name::integer FROM shop.products WHERE id = 1"), "acme")

    assert "hive" not in str(refused.value)


async def test_a_read_is_cut_at_a_number_of_bytes(store: Shop) -> None:
    result = await store.runner.read(as_read("SELECT repeat('x', 600000) FROM generate_series(1, 3)"), "acme")

    assert result.row_count == 1
    assert result.truncated


async def test_a_login_sees_the_rows_of_its_tenant_whatever_other_policies_let_in(store: Shop) -> None:
    for tenant in ("acme", "other"):
        result = await store.runner.read(as_read("SELECT DISTINCT tenant_id FROM shop.orders"), tenant)
        assert result.rows == [[tenant]]


@pytest.mark.parametrize(
    "text",
    [
        "SELECT secret FROM shop.products",
        "SELECT * FROM shop.products",
        "SELECT p FROM shop.products p",
        "SELECT * FROM shop.secrets",
        "SELECT shop.purge()",
        "SELECT * FROM public.agent_memory",
        "SELECT * FROM public.human_approval_queue",
        "SELECT * FROM agent_private.sql_login",
        "SELECT rolpassword FROM pg_catalog.pg_authid",
        "SELECT pg_read_file('/etc/passwd')",
        "SELECT set_config('role', 'postgres', true)",
        "SELECT pg_sleep(9)",
        "SELECT pg_advisory_lock(1)",
        "SELECT query_to_xml('SELECT 1', true, true, '')",
        "SELECT lo_create(0)",
        "SELECT nextval('shop.orders_id_seq')",
        "SELECT agent_private.enter('{}'::jsonb, 'tenant')",
        "SELECT public.finish_write('x', '{}'::jsonb)",
    ],
)
async def test_the_login_refuses_what_the_gate_would_have_let_through_by_mistake(
    store: Shop, text: str
) -> None:
    told: list[Event] = []
    with listening(told.append), pytest.raises(Refused):
        await store.runner.read(as_read(text), "acme")

    assert [event.name for event in told] == ["sql_by_server_refused"]


@pytest.mark.parametrize(
    "text",
    [
        "INSERT INTO shop.orders (tenant_id) VALUES ('acme')",
        "WITH x AS (DELETE FROM shop.orders RETURNING id) SELECT * FROM x",
        "SELECT 1; DELETE FROM shop.orders",
        "COMMIT",
        "SET TRANSACTION READ WRITE",
        "SELECT id INTO TEMP t FROM shop.orders",
        "SELECT 1) a, (SELECT 2",
        "EXPLAIN ANALYZE DELETE FROM shop.orders",
    ],
)
async def test_the_cursor_takes_one_query_and_nothing_else(store: Shop, text: str) -> None:
    with pytest.raises((Refused, InvalidRequest)):
        await store.runner.read(as_read(text), "acme")

    assert store.rows("SELECT count(*) FROM shop.orders") == [(20,)]


@pytest.mark.parametrize(
    "text",
    [
        "SELECT 1; DELETE FROM shop.orders",
        "SET TRANSACTION READ WRITE",
        "DELETE FROM shop.orders",
        "COMMIT; SELECT 1",
    ],
)
async def test_what_goes_past_the_cursor_is_one_statement_in_a_transaction_that_only_reads(
    store: Shop, text: str
) -> None:
    with pytest.raises((Refused, InvalidRequest)):
        await store.runner.read(as_read(text, is_select=False), "acme")

    assert store.rows("SELECT count(*) FROM shop.orders") == [(20,)]


async def test_explain_and_show_are_answered(store: Shop) -> None:
    plan = await store.runner.read(store.judge("EXPLAIN SELECT id FROM shop.orders"), "acme")
    shown = await store.runner.read(store.judge("SHOW transaction_read_only"), "acme")

    assert "Scan" in plan.rows[0][0]
    assert shown.rows == [["on"]]


async def test_a_nul_is_never_sent_because_the_server_would_see_only_what_is_before_it(store: Shop) -> None:
    with pytest.raises(Refused):
        await store.runner.read(as_read("SELECT 1 \x00; DROP TABLE shop.orders"), "acme")


async def test_a_statement_that_takes_too_long_is_cancelled(store: Shop) -> None:
    with pytest.raises(Refused, match="longer than 2 seconds"):
        await store.runner.read(
            as_read("WITH RECURSIVE t(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM t) SELECT count(*) FROM t"),
            "acme",
        )
    assert (await store.runner.read(as_read("SELECT 1"), "acme")).rows == [[1]]


async def test_nothing_of_a_statement_is_left_in_the_session_for_the_next(store: Shop) -> None:
    await store.runner.read(
        as_read("SET work_mem = '1GB'", is_select=False), "acme"
    )  # as if the gate had let it
    shown = await store.runner.read(store.judge("SHOW work_mem"), "acme")

    assert shown.rows == [["16MB"]]


async def test_many_reads_at_once_stay_below_the_limit_of_the_login(store: Shop) -> None:
    results = await asyncio.gather(
        *(
            store.runner.read(as_read(f"SELECT {number} FROM shop.orders LIMIT 1"), "acme")
            for number in range(20)
        )
    )

    assert [result.rows for result in results] == [[[number]] for number in range(20)]


async def test_a_read_works_after_the_server_closed_the_connection(store: Shop) -> None:
    await store.runner.read(as_read("SELECT 1"), "acme")
    store.rows("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'agent sql'")

    assert (await store.runner.read(as_read("SELECT 2"), "acme")).rows == [[2]]


async def test_a_fault_of_the_statement_is_the_callers(store: Shop) -> None:
    with pytest.raises(InvalidRequest, match="nothing"):
        await store.runner.read(as_read("SELECT nothing FROM shop.orders"), "acme")


async def test_a_tenant_without_logins_runs_nothing(store: Shop) -> None:
    with pytest.raises(OperatorError, match="agent migrate --roles --tenant third"):
        await store.runner.read(as_read("SELECT 1"), "third")


# --- writing ----------------------------------------------------------------------------------------------------


async def test_a_trial_tells_exactly_the_rows_and_changes_none(store: Shop) -> None:
    delta = await store.runner.try_write(
        store.judge(
            "WITH x AS (DELETE FROM shop.orders WHERE amount > 10 RETURNING id) SELECT count(*) FROM x"
        ),
        "acme",
    )

    assert delta == {"shop.orders": {"inserted": 0, "updated": 0, "deleted": 5}}
    assert store.rows("SELECT count(*) FROM shop.orders") == [(20,)]


async def test_a_trial_counts_what_triggers_change_too(store: Shop) -> None:
    store.do(
        """
        CREATE FUNCTION shop.note() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS
            $$ BEGIN INSERT INTO shop.secrets VALUES ('changed'); RETURN NEW; END $$;
        CREATE TRIGGER noted AFTER UPDATE ON shop.orders FOR EACH ROW EXECUTE FUNCTION shop.note();
        """
    )
    verdict = store.judge("UPDATE shop.orders SET status = 'x' WHERE id = 2")

    assert await store.runner.try_write(verdict, "acme") == {
        "shop.orders": {"inserted": 0, "updated": 1, "deleted": 0},
        "shop.secrets": {"inserted": 1, "updated": 0, "deleted": 0},
    }
    assert await store.runner.outside_effects(verdict, "acme") == ("shop.orders: noted",)


async def test_an_approved_write_and_its_log_are_one_transaction(store: Shop) -> None:
    verdict = store.judge("UPDATE shop.orders SET status = 'sent' WHERE id = 2 RETURNING id")
    bounds = await store.runner.try_write(verdict, "acme")

    result = await store.runner.write(verdict, "acme", bounds=bounds, ticket=store.ticket(), entry=ENTRY)

    assert result.rows == [[2]]
    assert result.delta == {"shop.orders": {"inserted": 0, "updated": 1, "deleted": 0}}
    assert store.rows("SELECT status FROM shop.orders WHERE id = 2") == [("sent",)]
    log = store.log(result.log_id)
    assert log["state"] == "executed"
    assert log["rows"] == result.delta
    assert log["pre_image"]["rows"][0]["status"] == "new"


async def test_a_write_beyond_what_was_approved_is_rolled_back(store: Shop) -> None:
    verdict = store.judge("UPDATE shop.orders SET status = 'sent' WHERE amount = 2")
    bounds = await store.runner.try_write(verdict, "acme")
    store.do("INSERT INTO shop.orders (tenant_id, amount) VALUES ('acme', 2)")

    with pytest.raises(Refused, match=r"2 rows of shop\.orders and 1 were approved"):
        await store.runner.write(verdict, "acme", bounds=bounds, ticket=store.ticket(), entry=ENTRY)

    assert store.rows("SELECT count(*) FROM shop.orders WHERE status = 'sent'") == [(0,)]
    assert store.rows("SELECT count(*) FROM public.agent_execution_log") == [(0,)]


async def test_a_ticket_is_good_for_one_write(store: Shop) -> None:
    verdict = store.judge("UPDATE shop.orders SET amount = amount + 1 WHERE id = 2")
    bounds = await store.runner.try_write(verdict, "acme")
    ticket = store.ticket()
    await store.runner.write(verdict, "acme", bounds=bounds, ticket=ticket, entry=ENTRY)

    with pytest.raises((ConflictError, NotFound)):
        await store.runner.write(verdict, "acme", bounds=bounds, ticket=ticket, entry=ENTRY)

    assert store.rows("SELECT amount FROM shop.orders WHERE id = 2") == [(3,)]


async def test_a_write_without_a_ticket_of_an_approval_changes_nothing(store: Shop) -> None:
    verdict = store.judge("DELETE FROM shop.orders WHERE id = 2")
    bounds = await store.runner.try_write(verdict, "acme")

    with pytest.raises(NotFound):
        await store.runner.write(verdict, "acme", bounds=bounds, ticket="0" * 64, entry=ENTRY)

    assert store.rows("SELECT count(*) FROM shop.orders") == [(20,)]


async def test_a_write_cannot_reach_or_make_rows_of_another_tenant(store: Shop) -> None:
    assert await store.runner.try_write(store.judge("DELETE FROM shop.orders WHERE id = 1"), "acme") == {}
    with pytest.raises(Refused):
        await store.runner.try_write(
            store.judge("INSERT INTO shop.orders (tenant_id) VALUES ('other')"), "acme"
        )


async def test_only_the_listed_columns_can_be_changed(store: Shop) -> None:
    forced = SqlVerdict(
        risk=Risk.WRITE, text="UPDATE shop.products SET name = 'x' WHERE id = 1", command="update"
    )

    with pytest.raises(Refused):
        await store.runner.try_write(forced, "acme")


# --- undoing ----------------------------------------------------------------------------------------------------


async def written(store: Shop, text: str, key: str = "k") -> dict[str, Any]:
    verdict = store.judge(text)
    bounds = await store.runner.try_write(verdict, "acme")
    result = await store.runner.write(
        verdict, "acme", bounds=bounds, ticket=store.ticket(key=key), entry=ENTRY
    )
    return store.log(result.log_id)


@pytest.mark.parametrize(
    "text",
    [
        "UPDATE shop.orders SET status = 'sent', amount = amount * 3 WHERE id IN (2, 4, 6)",
        "UPDATE shop.products SET price = 1 WHERE id = 1",
        "DELETE FROM shop.orders WHERE id IN (2, 4)",
        "INSERT INTO shop.orders (tenant_id, amount) VALUES ('acme', 7), ('acme', 8)",
        "INSERT INTO shop.orders AS o (tenant_id) VALUES ('acme') RETURNING o.status",
    ],
)
async def test_a_write_is_undone_exactly(store: Shop, text: str) -> None:
    everything = "SELECT * FROM shop.orders ORDER BY id", "SELECT * FROM shop.products ORDER BY id"
    before = [store.rows(query) for query in everything]
    log = await written(store, text)
    assert [store.rows(query) for query in everything] != before

    bounds = await store.runner.try_undo(log, "acme")
    undone = await store.runner.undo(
        log, "acme", bounds=bounds, ticket=store.ticket(key="undo"), entry={**ENTRY, "undoes": log["log_id"]}
    )

    assert [store.rows(query) for query in everything] == before
    assert store.log(undone.log_id)["undoes"] == log["log_id"]


async def test_what_somebody_changed_since_is_not_overwritten(store: Shop) -> None:
    log = await written(store, "UPDATE shop.orders SET status = 'sent' WHERE id = 2")
    store.do("UPDATE shop.orders SET status = 'paid' WHERE id = 2")

    with pytest.raises(Refused, match="somebody changed"):
        await store.runner.try_undo(log, "acme")

    assert store.rows("SELECT status FROM shop.orders WHERE id = 2") == [("paid",)]


@pytest.mark.parametrize(
    "text",
    [
        "DELETE FROM shop.orders WHERE amount > 0",  # ten rows, and eight are kept
        "WITH x AS (DELETE FROM shop.orders WHERE id = 2 RETURNING id) SELECT id FROM x",
    ],
)
async def test_nothing_is_kept_where_it_would_not_be_all(store: Shop, text: str) -> None:
    log = await written(store, text)

    assert log["pre_image"] is None
    with pytest.raises(Refused, match="nothing was kept"):
        await store.runner.try_undo(log, "acme")


# --- logins -----------------------------------------------------------------------------------------------------


async def test_a_login_with_a_right_too_many_is_not_used(store: Shop) -> None:
    reader = next(
        name
        for (name,) in store.rows(
            "SELECT login_name::text FROM agent_private.sql_login WHERE kind = 'reader' AND tenant_id = 'acme'"
        )
    )
    store.do(f'GRANT SELECT ON shop.secrets TO "{reader}"')

    with pytest.raises(OperatorError, match=r"may read shop\.secrets"):
        await SqlRunner(store.settings, store.policy).read(as_read("SELECT 1"), "acme")


async def test_a_transaction_pooler_is_refused(store: Shop) -> None:
    entries = json.loads(store.file.read_text())
    entries["acme"]["reader"] = "postgresql://agent:pw@127.0.0.1:6543/postgres"
    store.file.write_text(json.dumps(entries))

    with pytest.raises(Exception, match="transaction pooler"):
        await SqlRunner(store.settings, store.policy).read(as_read("SELECT 1"), "acme")


async def test_a_lost_connection_is_not_called_a_failed_write(store: Shop) -> None:
    store.do(
        """
        CREATE FUNCTION shop.kill() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS
            $$ BEGIN PERFORM pg_terminate_backend(pg_backend_pid()); RETURN NEW; END $$;
        CREATE TRIGGER killed BEFORE UPDATE ON shop.orders FOR EACH ROW EXECUTE FUNCTION shop.kill();
        """
    )
    with pytest.raises(DatabaseUnavailable, match="only the log tells"):
        await store.runner.try_write(store.judge("UPDATE shop.orders SET status = 'x' WHERE id = 2"), "acme")


def test_the_password_of_a_login_is_not_what_the_server_is_told(store: Shop) -> None:
    with psycopg.connect(store.database.url) as connection:
        kept = connection.execute(
            "SELECT rolpassword FROM pg_authid WHERE rolname LIKE 'agent_reader_%'"
        ).fetchall()
    assert all(verifier.startswith("SCRAM-SHA-256$") for (verifier,) in kept)


# --- what would reach outside, lie or stay -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        "ALTER TABLE shop.orders DISABLE ROW LEVEL SECURITY",
        (
            "DO $$ DECLARE p name; BEGIN FOR p IN SELECT polname FROM pg_policy WHERE NOT polpermissive LOOP "
            "EXECUTE format('DROP POLICY %I ON shop.orders', p); END LOOP; END $$"
        ),
        (
            "DO $$ DECLARE p name; BEGIN FOR p IN SELECT polname FROM pg_policy WHERE NOT polpermissive LOOP "
            "EXECUTE format('ALTER POLICY %I ON shop.orders USING (true)', p); END LOOP; END $$"
        ),
        (
            "DO $$ DECLARE p name; BEGIN FOR p IN SELECT polname FROM pg_policy WHERE NOT polpermissive LOOP "
            "EXECUTE format('ALTER POLICY %I ON shop.orders WITH CHECK (tenant_id = tenant_id OR tenant_id = "
            "(SELECT agent_private.sql_tenant()))', p); END LOOP; END $$"
        ),
    ],
)
async def test_a_table_that_no_longer_keeps_tenants_apart_is_noticed_at_the_next_statement(
    store: Shop, change: str
) -> None:
    assert (await store.runner.read(as_read("SELECT 1"), "acme")).rows == [[1]]
    store.do(change)

    with pytest.raises(OperatorError, match=r"rows of other|row level security off"):
        await store.runner.read(as_read("SELECT DISTINCT tenant_id FROM shop.orders"), "acme")
    with pytest.raises(OperatorError):
        await store.runner.try_write(store.judge("DELETE FROM shop.orders WHERE id = 1"), "acme")


async def test_a_right_given_later_is_noticed_within_a_minute(
    store: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    await store.runner.read(as_read("SELECT 1"), "acme")
    store.do("GRANT SELECT ON shop.secrets TO PUBLIC")
    monkeypatch.setattr(sql_connections, "_TESTED_SECONDS", 0.0)

    with pytest.raises(OperatorError, match=r"may read shop\.secrets"):
        await store.runner.read(as_read("SELECT 1"), "acme")


async def test_a_read_that_the_server_does_not_end_is_left_and_the_tenant_waits(
    store: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sql_runner, "_READ_GRACE_SECONDS", -1.5)  # as if the server's time-out did nothing
    endless = "WITH RECURSIVE t(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM t) SELECT count(*) FROM t"
    told: list[Event] = []

    with listening(told.append), pytest.raises(Refused, match="could not end it"):
        await store.runner.read(as_read(endless), "acme")

    assert "sql_read_given_up" in [event.name for event in told]
    with pytest.raises(Refused, match="for a minute"):
        await store.runner.read(as_read("SELECT 1"), "acme")
    assert (await store.runner.read(as_read("SELECT 1"), "other")).rows == [[1]]


async def test_large_rows_come_one_at_a_time(store: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    original = vars(Collected)["next_chunk"].fget

    def next_chunk(collected: Collected) -> int:
        seen.append(original(collected))
        return seen[-1]

    monkeypatch.setattr(Collected, "next_chunk", property(next_chunk))
    result = await store.runner.read(
        as_read("SELECT repeat('x', 900000) FROM generate_series(1, 50)"), "acme"
    )

    assert result.row_count == 1
    assert result.truncated
    assert seen == [1, 1]


async def test_a_trial_forgets_what_the_statement_gives_back(store: Shop) -> None:
    delta = await store.runner.try_write(
        store.judge("UPDATE shop.orders SET status = repeat('x', 1000) WHERE id < 9 RETURNING status"), "acme"
    )
    assert delta == {"shop.orders": {"inserted": 0, "updated": 4, "deleted": 0}}


async def test_a_trial_does_not_tell_what_other_tenants_have(store: Shop) -> None:
    with pytest.raises(InvalidRequest, match="break a constraint") as refused:
        await store.runner.try_write(
            store.judge("INSERT INTO shop.orders (id, tenant_id) VALUES (1, 'acme')"), "acme"
        )
    assert "orders_pkey" not in str(refused.value)


async def test_a_write_that_was_never_sent_is_not_unknown(
    store: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    verdict = store.judge("DELETE FROM shop.orders WHERE id = 2")
    bounds = await store.runner.try_write(verdict, "acme")

    async def down(*_: Any, **__: Any) -> Any:
        raise DatabaseUnavailable("db.example:5432 cannot be reached")

    monkeypatch.setattr(sql_connections, "connect", down)
    with pytest.raises(sql_runner.NotRun, match="nothing was run"):
        await store.runner.write(verdict, "acme", bounds=bounds, ticket=store.ticket(), entry=ENTRY)


async def test_a_limit_of_the_server_is_no_lost_connection(store: Shop) -> None:
    login = store.rows("SELECT login_name::text FROM agent_private.sql_login WHERE kind = 'reader'")
    for (name,) in login:
        store.do(f"ALTER ROLE \"{name}\" SET temp_file_limit = '64kB'")
    with pytest.raises(Refused, match="more than the server gives"):
        await store.runner.read(
            as_read("SELECT g FROM generate_series(1, 2000000) g ORDER BY md5(g::text)"), "acme"
        )


async def test_a_login_that_writes_finishes_no_write_of_another_tenant(store: Shop) -> None:
    verdict = store.judge("DELETE FROM shop.orders WHERE id = 2")
    bounds = await store.runner.try_write(verdict, "acme")

    with pytest.raises(NotFound):
        await store.runner.write(verdict, "acme", bounds=bounds, ticket=store.ticket("other"), entry=ENTRY)

    assert store.rows("SELECT count(*) FROM shop.orders") == [(20,)]


# --- undo, exactly --------------------------------------------------------------------------------------------------

KINDS = """
CREATE TABLE shop.kinds (
    id integer PRIMARY KEY, tenant_id text NOT NULL DEFAULT 'acme', note text, many numeric, raw json, doc jsonb,
    list integer[], moment timestamptz, bits bytea, wide varchar(10));
ALTER TABLE shop.kinds ENABLE ROW LEVEL SECURITY;
INSERT INTO shop.kinds VALUES (1, 'acme', 'a', 12345678901234567890.123456789012345678901234567890,
    '{"b" : 1,  "a":2, "a": 3}', '{"x": 1.10, "y": "\\"q\\""}', '[0:2]={1,2,3}',
    '2024-01-02 03:04:05.678901+00', '\\xdead',
    'w  '), (2, 'acme', NULL, repeat('9', 6000)::numeric, '"text"', '"text"', '{}', NULL, NULL, NULL);
CREATE TABLE shop.wide (id integer PRIMARY KEY, tenant_id text NOT NULL DEFAULT 'acme');
ALTER TABLE shop.wide ENABLE ROW LEVEL SECURITY;
DO $$ BEGIN FOR i IN 1..70 LOOP
EXECUTE format('ALTER TABLE shop.wide ADD c%s integer DEFAULT %s', i, i); END LOOP; END $$;
INSERT INTO shop.wide (id) VALUES (1), (2);
CREATE TABLE shop.kept (id integer PRIMARY KEY, tenant_id text NOT NULL DEFAULT 'acme', note text);
ALTER TABLE shop.kept ENABLE ROW LEVEL SECURITY;
INSERT INTO shop.kept VALUES (1, 'acme', 'one');
"""
KINDS_POLICY = """
[[table]]
name = "shop.kinds"
tenant_column = "tenant_id"
insert = true
update = ["note", "many", "raw", "doc", "list", "moment", "bits", "wide"]
delete = true
[[table]]
name = "shop.wide"
tenant_column = "tenant_id"
update = ["c1", "c70"]
[[table]]
name = "shop.kept"
tenant_column = "tenant_id"
insert = true
delete = true
[[table]]
name = "shop.products"
columns = ["id", "name"]
update = ["price", "name"]
[sql]
timeout_seconds = 5
"""


@pytest.fixture
def kinds(learning_database: ThrowawayDatabase) -> Iterator[Shop]:
    with psycopg.connect(learning_database.url, autocommit=True) as connection:
        connection.execute("CREATE SCHEMA shop")
        connection.execute(KINDS.encode())
        connection.execute(TABLES.replace("CREATE SCHEMA shop;", "").encode())
    opened = Shop(learning_database, parse_policy(KINDS_POLICY.encode()))
    opened.make_logins("acme")
    yield opened
    portal().run_sync(opened.runner.aclose())


async def undone(store: Shop, log: dict[str, Any]) -> None:
    bounds = await store.runner.try_undo(log, "acme")
    await store.runner.undo(
        log, "acme", bounds=bounds, ticket=store.ticket(key="undo"), entry={**ENTRY, "undoes": log["log_id"]}
    )


@pytest.mark.parametrize(
    "text",
    [
        (
            "UPDATE shop.kinds SET many = 1, raw = '1', doc = '1', list = '{}', moment = NULL, bits = NULL, wide = 'x' "
            "WHERE id IN (1, 2)"
        ),
        "DELETE FROM shop.kinds WHERE id IN (1, 2)",
        "DELETE FROM shop.kept WHERE id = 1",  # a table where nothing may be updated
        "UPDATE shop.wide SET c1 = 0, c70 = 0 WHERE id = 1",  # more columns than a function takes arguments
        "INSERT INTO shop.kinds (id, many) VALUES (3, 0.10)",
    ],
)
async def test_an_undone_write_gives_back_every_digit_of_every_value(kinds: Shop, text: str) -> None:
    everything = [f"SELECT t::text FROM shop.{name} t ORDER BY id" for name in ("kinds", "wide", "kept")]
    before = [kinds.rows(query) for query in everything]
    log = await written(kinds, text)
    assert [kinds.rows(query) for query in everything] != before

    await undone(kinds, log)

    assert [kinds.rows(query) for query in everything] == before


async def test_a_new_row_that_somebody_edited_since_is_not_deleted(kinds: Shop) -> None:
    log = await written(kinds, "INSERT INTO shop.kinds (id, note) VALUES (3, 'agent')")
    kinds.do("UPDATE shop.kinds SET note = 'a person' WHERE id = 3")

    with pytest.raises(Refused, match="somebody changed"):
        await kinds.runner.try_undo(log, "acme")


async def test_a_row_that_a_trigger_would_put_back_otherwise_is_not_put_back(kinds: Shop) -> None:
    log = await written(kinds, "DELETE FROM shop.kept WHERE id = 1")
    kinds.do(
        """
        CREATE FUNCTION shop.shout() RETURNS trigger LANGUAGE plpgsql AS
            $$ BEGIN NEW.note := upper(NEW.note); RETURN NEW; END $$;
        CREATE TRIGGER shouted BEFORE INSERT ON shop.kept FOR EACH ROW EXECUTE FUNCTION shop.shout();
        """
    )

    with pytest.raises(Refused, match="would not be as they were"):
        await kinds.runner.try_undo(log, "acme")
    assert kinds.rows("SELECT count(*) FROM shop.kept") == [(0,)]


async def test_a_changed_column_that_is_not_readable_is_not_called_undoable(kinds: Shop) -> None:
    log = await written(kinds, "UPDATE shop.products SET price = 1 WHERE id = 1")

    with pytest.raises(Refused, match="not readable"):
        await kinds.runner.try_undo(log, "acme")
