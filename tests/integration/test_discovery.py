"""Discovery of an application's structure, on real databases."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import psycopg
import pytest
from langgraph.checkpoint.memory import InMemorySaver
from pydantic import SecretStr

from agent import Identity, LearningMachine, SafeExecutor
from agent.database.postgres import PostgresDatabase
from agent.discovery.structure import AppStructure, app_name, open_app_database, quoted
from agent.errors import DatabaseUnavailable, NotFound
from agent.events import Event, listening
from agent.learning.auto_discover import AutoDiscovery, find_in_application_tool
from agent.learning.rendering import tokens
from agent.learning.semantic_search import SemanticSearch
from agent.testing import ScriptedChat, tool_call
from agent.testing.throwaway import ThrowawayDatabase, async_throwaway_database
from graphs.operations import build_operations
from tests.integration.discovered import SHOP, a_login, execute, function, names, over, pagila, table
from tests.integration.rows import everything_stored, rows
from tests.supabase_lite import SupabaseLite

NOBODY = Identity()


@pytest.fixture
async def shop(learning_database: ThrowawayDatabase) -> AsyncIterator[AutoDiscovery]:
    """Discovery of a database with a shop in it."""
    execute(learning_database.url, SHOP)
    discovery = over(learning_database)
    yield discovery
    await discovery.database.close()


async def applications_memories(discovery: AutoDiscovery, question: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = await discovery.database.call(
        "match_memories", NOBODY, question=question, the_scope="tenant", memory_limit=20
    )
    return found


# What is found


async def test_tables_are_found_with_all_that_belongs_to_them(shop: AutoDiscovery) -> None:
    found = await shop.discover_app_structure()

    assert set(found) == {
        "app", "discovered_at", "tables", "functions", "relationships", "patterns", "extensions", "problems", "changes",
    }  # fmt: skip
    assert found["tables"] is found.tables
    assert names(found) == [
        "shop.customers", "shop.open_orders", "shop.orders", "shop.refunds", "shop.sales",
    ]  # fmt: skip
    customers, orders = table(found, "shop.customers"), table(found, "shop.orders")
    assert customers["comment"] == "Who buys here"
    assert customers["primary_key"] == ["customer_id"]
    assert customers["unique"] == [{"name": "customers_email_key", "columns": ["email"]}]
    columns = {column["name"]: column for column in [*customers["columns"], *orders["columns"]]}
    assert columns["email"]["comment"] == "Where bills go"
    assert columns["shout"]["generated"] == "upper(email)"
    assert columns["shout"]["default"] is None
    assert columns["joined_on"]["default"] == "CURRENT_DATE"
    assert columns["paid"]["type"] == "shop.cents"
    assert columns["paid"]["base_type"] == "bigint"
    assert columns["state"]["enum"] == columns["states"]["enum"] == ["new", "paid", "refunded"]
    assert [name for name, column in columns.items() if column["nullable"]] == ["shout", "states", "paid"]
    assert [c["identity"] for c in customers["columns"]] == ["always", None, None, None]
    assert orders["foreign_keys"] == [
        {
            "name": "orders_customer_id_fkey",
            "columns": ["customer_id"],
            "to_schema": "shop",
            "to_table": "customers",
            "to_columns": ["customer_id"],
            "on_delete": "cascade",
        }
    ]
    assert [check["name"] for check in orders["checks"]] == ["paid_in_full"]
    assert {index["name"]: index["unique"] for index in orders["indexes"]} == {
        "orders_by_state": False,
        "orders_pkey": True,
    }
    (trigger,) = orders["triggers"]
    assert (trigger["name"], trigger["function"], trigger["enabled"]) == ("note", "shop.noted", True)
    refunds = table(found, "shop.refunds")
    assert refunds["rls"] == {"enabled": True, "forced": False}
    (policy,) = refunds["policies"]
    assert (policy["command"], policy["roles"], policy["check"]) == ("select", ["public"], None)
    assert table(found, "shop.open_orders")["kind"] == "view"
    assert table(found, "shop.open_orders")["reads"] == ["shop.customers", "shop.orders"]
    assert table(found, "shop.sales")["kind"] == "materialized_view"
    assert all(item["readable"] and item["fingerprint"] for item in found.tables)
    assert customers["size_bytes"] > 0


async def test_functions_are_found_and_whether_they_write(shop: AutoDiscovery) -> None:
    found = await shop.discover_app_structure(["shop"])

    assert {item["name"]: item["writes"] for item in found.functions} == {
        "any_sql": "unknown",
        "noted": "no",
        "pay": "yes",
        "pay_twice": "yes",
        "standard": "yes",
        "tidy": "yes",
        "total": "no",
    }
    assert function(found, "shop.pay")["arguments"] == "the_order bigint, cents bigint DEFAULT 1"
    total = function(found, "shop.total")
    assert (total["kind"], total["result"], total["volatility"]) == ("function", "bigint", "stable")
    assert (total["security"], total["search_path_pinned"], total["language"]) == ("definer", True, "sql")
    assert function(found, "shop.tidy")["kind"] == "procedure"
    assert function(found, "shop.pay")["security"] == "invoker"


async def test_what_was_saved_before_it_was_masked_is_read_and_saved_anew(
    shop: AutoDiscovery, learning_database: ThrowawayDatabase
) -> None:
    await shop.discover_app_structure()
    execute(
        learning_database.url,
        """
        UPDATE agent_app_object SET document = jsonb_set(document, '{comment}', '"ask ada@example.com"')
        WHERE name = 'shop.customers'
        """,
    )
    later = over(learning_database)

    await later.discover_app_structure()
    again = await later.discover_app_structure()

    stored = "SELECT document ->> 'comment' FROM agent_app_object WHERE name = 'shop.customers'"
    assert rows(learning_database.url, stored) == [("Who buys here",)]
    assert again.changes == {"added": [], "changed": [], "removed": []}
    told = rows(
        learning_database.url, "SELECT count(*) FROM agent_memory WHERE content LIKE '%ada@example.com%'"
    )
    assert told == [(0,)]
    await later.database.close()


async def test_our_stand_ins_for_functions_of_supabase_are_none_of_the_applications(
    shop: AutoDiscovery, learning_database: ThrowawayDatabase
) -> None:
    execute(
        learning_database.url,
        "CREATE FUNCTION auth.of_the_application() RETURNS integer LANGUAGE sql AS 'SELECT 1'",
    )
    found = await shop.discover_app_structure()

    assert [one["name"] for one in found.functions if one["schema"] == "auth"] == ["of_the_application"]


async def test_declared_keys_are_relationships(shop: AutoDiscovery) -> None:
    found = await shop.discover_app_structure()

    assert [(item["from_table"], item["from_columns"], item["to_table"]) for item in found.relationships] == [
        ("shop.orders", ["customer_id"], "shop.customers"),
        ("shop.refunds", ["order_id"], "shop.orders"),
    ]
    assert all(item["declared"] and item["evidence"] is None for item in found.relationships)


async def test_a_sample_application_is_found_as_information_schema_has_it(
    learning_database: ThrowawayDatabase,
) -> None:
    execute(learning_database.url, pagila())
    discovery = over(learning_database)

    found = await discovery.discover_app_structure(["public"], patterns=False)

    def read(query: str) -> set[tuple[Any, ...]]:
        return set(rows(learning_database.url, query))

    others = (
        "(SELECT c.relname FROM pg_class c "
        "WHERE c.relacl::text LIKE '%agent_app%' OR c.relname = 'agent_migration' OR c.relispartition)"
    )
    those = f"table_schema = 'public' AND table_name NOT IN {others}"
    tables = read(f"SELECT table_name::text FROM information_schema.tables WHERE {those}")
    tables |= read("SELECT matviewname::text FROM pg_matviews WHERE schemaname = 'public'")
    assert {(item["name"],) for item in found.tables} == tables
    assert len(tables) > 20
    listed = read(
        f"SELECT table_name::text, column_name::text, is_nullable FROM information_schema.columns WHERE {those}"
    )
    assert {
        (item["name"], column["name"], "YES" if column["nullable"] else "NO")
        for item in found.tables
        if item["kind"] != "materialized_view"
        for column in item["columns"]
    } == listed
    keys = read(
        f"SELECT table_name::text, constraint_type::text, constraint_name::text "
        f"FROM information_schema.table_constraints WHERE {those} "
        "AND constraint_type IN ('PRIMARY KEY', 'FOREIGN KEY', 'UNIQUE')"
    )
    assert {
        (item["name"], "FOREIGN KEY", key["name"]) for item in found.tables for key in item["foreign_keys"]
    } == {key for key in keys if key[1] == "FOREIGN KEY"}
    assert {item["name"] for item in found.tables if item["primary_key"]} == {
        name for name, kind, _ in keys if kind == "PRIMARY KEY"
    }
    assert {(item["name"], key["name"]) for item in found.tables for key in item["unique"]} == {
        (name, key) for name, kind, key in keys if kind == "UNIQUE"
    }
    functions = read(
        "SELECT p.proname::text, pg_get_function_identity_arguments(p.oid) FROM pg_proc p "
        "WHERE p.pronamespace = 'public'::regnamespace AND pg_get_userbyid(p.proowner) <> 'agent_app' "
        "AND NOT EXISTS (SELECT FROM pg_depend d WHERE d.objid = p.oid AND d.deptype = 'e')"
    )
    assert {(item["name"], item["identity_arguments"]) for item in found.functions} == functions
    assert len(found.relationships) == len([key for key in keys if key[1] == "FOREIGN KEY"])
    (payment,) = [item for item in found.tables if item["name"] == "payment"]
    partitions = rows(
        learning_database.url, "SELECT count(*) FROM pg_inherits WHERE inhparent = 'public.payment'::regclass"
    )
    assert [(payment["partitions"],)] == partitions
    assert found.problems == []
    await discovery.database.close()


async def test_partitions_of_any_depth_are_one_table(learning_database: ThrowawayDatabase) -> None:
    execute(
        learning_database.url,
        "CREATE TABLE log (day date, part integer) PARTITION BY RANGE (day)",
        "CREATE TABLE log_1 PARTITION OF log FOR VALUES FROM ('2026-01-01') TO ('2026-02-01')",
        "CREATE TABLE log_2 PARTITION OF log FOR VALUES FROM ('2026-02-01') TO ('2026-03-01') PARTITION BY LIST (part)",
        "CREATE TABLE log_2_a PARTITION OF log_2 FOR VALUES IN (1)",
        "CREATE TABLE log_2_b PARTITION OF log_2 FOR VALUES IN (2)",
        "CREATE TABLE log_3 PARTITION OF log FOR VALUES FROM ('2026-03-01') TO ('2026-04-01') PARTITION BY LIST (part)",
        "INSERT INTO log SELECT '2026-02-01', 1 + i % 2 FROM generate_series(1, 500) i",
        "ANALYZE",
    )
    discovery = over(learning_database)

    found = await discovery.discover_app_structure()

    assert names(found) == ["public.log"]
    log = table(found, "public.log")
    assert (log["kind"], log["partitions"], log["partition_by"]) == ("partitioned_table", 3, "RANGE (day)")
    assert log["row_estimate"] == 500
    assert log["size_bytes"] > 0
    await discovery.database.close()


async def test_odd_names_are_found_under_the_names_that_postgres_quotes(
    learning_database: ThrowawayDatabase,
) -> None:
    odd = [
        "select",
        'With "quotes"',
        "Größe",
        "a.b",
        "semi;colon --",
        "表",
        "x" * 63,
        "new\nline",
        "%s {0}",
        "user",
    ]
    for name in odd:
        execute(
            learning_database.url,
            f"CREATE TABLE {quoted(name)} ({quoted(name)} integer PRIMARY KEY)",
            f"CREATE FUNCTION {quoted(name)}() RETURNS integer LANGUAGE sql AS 'SELECT 1'",
        )
    discovery = over(learning_database)

    found = await discovery.discover_app_structure(["public"])
    again = await discovery.discover_app_structure(["public"])

    assert {item["name"] for item in found.tables} == set(odd)
    assert {item["columns"][0]["name"] for item in found.tables} == set(odd)
    quoted_by_postgres = {f"public.{name}" for (name,) in rows(
        learning_database.url, "SELECT quote_ident(x) FROM unnest(%s::text[]) AS x", odd)}  # fmt: skip
    assert set(names(found)) == quoted_by_postgres
    assert again.changes == {"added": [], "changed": [], "removed": []}
    assert [item["writes"] for item in found.functions] == ["no"] * len(odd)
    await discovery.database.close()


async def test_keywords_are_quoted_as_postgres_quotes_them(learning_database: ThrowawayDatabase) -> None:
    words = rows(learning_database.url, "SELECT word, quote_ident(word) FROM pg_get_keywords()")

    assert {word: quoted(word) for word, _ in words} == dict(words)


# What is left out


async def test_a_new_database_holds_nothing_of_ours_and_a_table_that_is_named_alike_is_the_applications(
    learning_database: ThrowawayDatabase,
) -> None:
    execute(
        learning_database.url,
        "CREATE TABLE public.agent_orders (id integer)",
        "CREATE FUNCTION public.agent_total() RETURNS integer LANGUAGE sql AS 'SELECT 1'",
        "CREATE TEMPORARY TABLE passing (id integer)",
    )
    discovery = over(learning_database)

    found = await discovery.discover_app_structure()

    assert names(found) == ["public.agent_orders"]
    assert {item["name"] for item in found.functions if item["schema"] != "auth"} == {"agent_total"}
    assert "vector" in {item["name"] for item in found.extensions}
    await discovery.database.close()


async def test_what_the_settings_exclude_is_left_out(learning_database: ThrowawayDatabase) -> None:
    execute(
        learning_database.url,
        SHOP,
        "CREATE TABLE public.tmp_1 (id integer)",
        "CREATE TABLE public.tmpx1 (id integer)",
        "CREATE TABLE public.keep (id integer)",
    )
    discovery = over(learning_database, discovery_exclude=("shop.*", "public.tmp_?"))

    found = await discovery.discover_app_structure(["public", "shop"])

    assert names(found) == ["public.keep", "public.tmpx1"]
    assert found.functions == []
    await discovery.database.close()


async def test_a_schema_alone_leaves_what_is_known_of_others(shop: AutoDiscovery) -> None:
    await shop.discover_app_structure()
    execute(shop.settings.database_url.get_secret_value(), "CREATE TABLE public.more (id integer)")  # type: ignore[union-attr]

    found = await shop.discover_app_structure(["public"])

    assert found.changes == {"added": ["public.more"], "changed": [], "removed": []}
    assert "shop.orders" in names(found)


# What cannot be seen


async def test_a_table_that_is_locked_is_reported_and_the_rest_found_without_waiting(
    shop: AutoDiscovery,
) -> None:
    await shop.discover_app_structure()
    url = shop.settings.database_url.get_secret_value()  # type: ignore[union-attr]
    with psycopg.connect(url) as other:
        other.execute("LOCK TABLE shop.orders IN ACCESS EXCLUSIVE MODE")
        found = await shop.discover_app_structure()

    assert found.problems == [{"object": "shop.orders", "reason": "another session has locked it for itself"}]
    assert found.changes["removed"] == []
    assert "shop.orders" in names(found), "it is known from before"
    assert (await shop.discover_app_structure()).problems == []


async def test_an_object_whose_catalog_is_broken_is_reported_and_the_rest_found(
    learning_database: ThrowawayDatabase,
) -> None:
    execute(
        learning_database.url,
        SHOP,
        "CREATE FUNCTION public.two() RETURNS integer LANGUAGE sql AS 'SELECT 2'",
        "CREATE TABLE public.broken (id integer DEFAULT public.two())",
        "SET allow_system_table_mods = on; DELETE FROM pg_proc WHERE proname = 'two'",
    )
    discovery = over(learning_database)

    found = await discovery.discover_app_structure()

    assert names(found) == [
        "shop.customers", "shop.open_orders", "shop.orders", "shop.refunds", "shop.sales",
    ]  # fmt: skip
    (problem,) = found.problems
    assert problem["object"] == "public.broken"
    assert "cache lookup failed for function" in problem["reason"]
    assert len(found.functions) > 5
    await discovery.database.close()


async def test_a_view_that_fails_when_it_is_read_is_found(learning_database: ThrowawayDatabase) -> None:
    execute(
        learning_database.url, "CREATE VIEW public.never AS SELECT 1 / (random() * 0)::integer AS impossible"
    )
    discovery = over(learning_database)

    found = await discovery.discover_app_structure()

    assert [column["name"] for column in table(found, "public.never")["columns"]] == ["impossible"]
    assert found.problems == []
    await discovery.database.close()


async def test_tables_that_come_and_go_meanwhile_do_not_stop_it(shop: AutoDiscovery) -> None:
    url = shop.settings.database_url.get_secret_value()  # type: ignore[union-attr]
    stop = asyncio.Event()

    async def come_and_go() -> int:
        count = 0
        async with await psycopg.AsyncConnection.connect(url, autocommit=True) as connection:
            while not stop.is_set():
                count += 1
                await connection.execute(
                    "CREATE TABLE shop.passing (id integer PRIMARY KEY DEFAULT 1, CHECK (id > 0)); "
                    "CREATE VIEW shop.seen AS SELECT * FROM shop.passing"
                )
                await connection.execute("DROP TABLE shop.passing CASCADE")
        return count

    going = asyncio.create_task(come_and_go())
    for _ in range(15):
        found = await shop.discover_app_structure()
        assert {"shop.orders", "shop.customers"} <= set(names(found))
    stop.set()
    assert await going > 5
    found = await shop.discover_app_structure()
    assert not {"shop.passing", "shop.seen"} & set(names(found))
    assert found.problems == []


async def test_a_login_with_few_rights_sees_the_structure_and_is_told_what_it_may_not_read(
    learning_database: ThrowawayDatabase,
) -> None:
    execute(learning_database.url, SHOP)
    login = f"reader_{secrets.token_hex(4)}"
    address = a_login(
        learning_database.url,
        login,
        "USAGE ON SCHEMA shop",
        "SELECT ON shop.orders",
        "SELECT (email) ON shop.customers",
    )
    discovery = over(learning_database, app_database_url=SecretStr(address))
    try:
        found = await discovery.discover_app_structure(["shop"])
    finally:
        await discovery.database.close()
        execute(learning_database.url, f"DROP OWNED BY {login}", f"DROP ROLE {login}")

    assert {item["name"]: item["readable"] for item in found.tables} == {
        "customers": False, "open_orders": False, "orders": True, "refunds": False, "sales": False,
    }  # fmt: skip
    assert [c["readable"] for c in table(found, "shop.customers")["columns"]] == [False, True, False, False]
    assert {problem["object"] for problem in found.problems} == {
        "shop.customers", "shop.open_orders", "shop.refunds", "shop.sales",
    }  # fmt: skip


# Another database


async def test_another_database_is_read_without_anything_of_ours_in_it_by_a_login_that_can_only_read(
    learning_database: ThrowawayDatabase,
) -> None:
    login = f"reader_{secrets.token_hex(4)}"
    async with async_throwaway_database(migrated=False) as other:
        execute(other.url, SHOP, "CREATE TABLE public.agent_migration (name text)")
        address = a_login(other.tcp_url, login, "USAGE ON SCHEMA shop", "pg_read_all_data")
        execute(other.url, f"ALTER ROLE {login} SET default_transaction_read_only = on")
        discovery = over(learning_database, app_database_url=SecretStr(address))

        found = await discovery.discover_app_structure()
        again = await discovery.discover_app_structure()
        execute(other.url, "DROP TABLE shop.refunds CASCADE")
        third = await discovery.discover_app_structure()

        assert app_name(discovery.settings) == found.app == address.rpartition("@")[2]
        assert "reader" not in found.app
        assert names(found)[0] == "public.agent_migration", "nothing of ours is here"
        assert function(found, "shop.pay_twice")["writes"] == "yes"
        assert again.changes == {"added": [], "changed": [], "removed": []}
        assert third.changes["removed"] == ["shop.refunds", "shop.standard(a bigint)"]
        assert await over(learning_database).get_cached_structure() is None, "that is another app"
        async with open_app_database(discovery.settings) as connection:
            with pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
                await connection.execute("CREATE TABLE public.mine (id integer)")
        await discovery.database.close()
        execute(other.url, f"DROP OWNED BY {login}", f"DROP ROLE {login}")


async def test_an_application_that_is_away_is_said_to_be(learning_database: ThrowawayDatabase) -> None:
    discovery = over(learning_database, app_database_url=SecretStr("postgresql://u:secret@127.0.0.1:1/app"))

    with pytest.raises(DatabaseUnavailable) as told:
        await discovery.discover_app_structure()

    assert "secret" not in str(told.value)
    assert await discovery.get_cached_structure() is None
    await discovery.database.close()


async def test_statements_end_at_the_time_out(learning_database: ThrowawayDatabase) -> None:
    settings = learning_database.settings.model_copy(
        update={"discovery_timeout": timedelta(milliseconds=200)}
    )
    async with open_app_database(settings) as connection:
        with pytest.raises(psycopg.errors.QueryCanceled):
            await connection.execute("SELECT pg_sleep(5)")


# What is learned


async def test_recall_finds_which_table_holds_refunds(shop: AutoDiscovery) -> None:
    await shop.discover_app_structure()

    best = (await applications_memories(shop, "Which table holds refunds?"))[0]

    assert (best["store"], best["kind"], best["trust"]) == ("application", "table", "tool")
    assert best["content"].startswith("Table shop.refunds: refunds.")
    whole = rows(
        shop.settings.database_url.get_secret_value(),  # type: ignore[union-attr]
        "SELECT m.scope, m.owner_id, e.run_id LIKE 'discovery-%%', e.quote = left(m.content, 1000) FROM agent_memory m "
        "JOIN agent_memory_evidence e USING (tenant_id, memory_id, version) WHERE m.memory_id = %s",
        best["memory_id"],
    )
    assert whole == [("tenant", "", True, True)]


async def test_a_second_discovery_finds_no_difference_and_writes_nothing(shop: AutoDiscovery) -> None:
    first = await shop.discover_app_structure()
    url = shop.settings.database_url.get_secret_value()  # type: ignore[union-attr]
    before = rows(url, "SELECT xmin::text, object_key FROM agent_app_object ORDER BY 2")
    memories = rows(url, "SELECT count(*) FROM agent_memory")

    second = await over_again(shop).discover_app_structure()

    assert second.changes == {"added": [], "changed": [], "removed": []}
    assert second.discovered_at > first.discovered_at
    assert second.tables == first.tables
    assert second.functions == first.functions
    assert second.relationships == first.relationships
    assert rows(url, "SELECT xmin::text, object_key FROM agent_app_object ORDER BY 2") == before
    assert rows(url, "SELECT count(*) FROM agent_memory") == memories


def over_again(discovery: AutoDiscovery) -> AutoDiscovery:
    """Discovery that knows nothing but what is saved."""
    return AutoDiscovery(settings=discovery.settings, database=discovery.database)


async def test_what_changes_is_found_and_learned(shop: AutoDiscovery) -> None:
    await shop.discover_app_structure()
    execute(
        shop.settings.database_url.get_secret_value(),  # type: ignore[union-attr]
        "ALTER TABLE shop.customers ADD COLUMN nickname text",
        "CREATE TABLE shop.vouchers (code text PRIMARY KEY)",
        "DROP TABLE shop.refunds CASCADE",
        "CREATE OR REPLACE FUNCTION shop.total() RETURNS bigint LANGUAGE sql STABLE AS 'SELECT 0::bigint'",
    )

    found = await shop.discover_app_structure()

    assert found.changes == {
        "added": ["shop.vouchers"],
        "changed": ["shop.customers", "shop.total()"],
        "removed": ["shop.refunds", "shop.standard(a bigint)"],
    }
    change = next(m for m in await applications_memories(shop, "What changed?") if m["kind"] == "change")
    assert "new column nickname text" in change["content"]
    assert "added table shop.vouchers (code)" in change["content"]
    assert "removed table shop.refunds" in change["content"]
    assert (await applications_memories(shop, "nickname"))[0]["kind"] in ("table", "change")
    tables = [m["content"] for m in await applications_memories(shop, "refunds") if m["kind"] == "table"]
    assert not [content for content in tables if content.startswith("Table shop.refunds")], "it is retired"


async def test_a_renamed_column_of_a_referenced_table_changes_the_referring_one(shop: AutoDiscovery) -> None:
    await shop.discover_app_structure()
    url = shop.settings.database_url.get_secret_value()  # type: ignore[union-attr]
    execute(url, "ALTER TABLE shop.customers RENAME COLUMN customer_id TO id")

    found = await shop.discover_app_structure()

    assert {"shop.customers", "shop.orders"} <= set(found.changes["changed"])
    assert table(found, "shop.orders")["foreign_keys"][0]["to_columns"] == ["id"]


async def test_discoveries_at_once_learn_everything_once(shop: AutoDiscovery) -> None:
    url = shop.settings.database_url.get_secret_value()  # type: ignore[union-attr]

    found = await asyncio.gather(*(over_again(shop).discover_app_structure() for _ in range(8)))

    assert len({tuple(names(structure)) for structure in found}) == 1
    doubled = rows(
        url,
        "SELECT field FROM agent_memory WHERE store = 'application' AND superseded_at IS NULL GROUP BY field "
        "HAVING count(*) > 1",
    )
    assert doubled == []
    assert rows(url, "SELECT count(*) FROM agent_memory WHERE store = 'application' AND version > 1") == [
        (0,)
    ]
    assert rows(url, "SELECT count(*) FROM agent_memory WHERE kind = 'change'") == [(0,)]


async def test_tenants_know_their_own(shop: AutoDiscovery) -> None:
    await shop.discover_app_structure()
    elsewhere = AutoDiscovery(
        settings=shop.settings.model_copy(update={"tenant": "another"}), database=shop.database
    )

    assert await elsewhere.get_cached_structure() is None
    with pytest.raises(NotFound, match="agent discover"):
        await elsewhere.render("refunds?")


async def test_a_discovery_says_so(shop: AutoDiscovery) -> None:
    told: list[Event] = []
    with listening(told.append):
        await shop.discover_app_structure(["shop"])

    (event,) = [event for event in told if event.name == "structure_discovered"]
    assert event.facts == {
        "app": "default", "objects": 14, "added": 12, "changed": 0, "removed": 0, "problems": 0,
    }  # fmt: skip


# Its use


async def test_what_is_known_is_given_without_the_application(shop: AutoDiscovery) -> None:
    assert await shop.get_cached_structure() is None
    found = await shop.discover_app_structure()
    execute(shop.settings.database_url.get_secret_value(), "DROP SCHEMA shop CASCADE")  # type: ignore[union-attr]

    known = await over_again(shop).get_cached_structure()

    assert isinstance(known, AppStructure)
    assert known.tables == found.tables
    assert known.discovered_at == found.discovered_at


def test_the_doors_without_an_event_loop_do_the_same(learning_database: ThrowawayDatabase) -> None:
    execute(learning_database.url, SHOP)
    discovery = over(learning_database)

    found = discovery.discover_app_structure_sync()

    assert discovery.get_cached_structure_sync() == found
    assert "table shop.refunds" in discovery.render_sync("refunds", 400)


async def test_an_agent_finds_the_table_with_its_tool(shop: AutoDiscovery) -> None:
    tool = find_in_application_tool(shop)
    unknown = await tool.ainvoke({"question": "Which table holds refunds?"})
    await shop.discover_app_structure()

    answer = await tool.ainvoke({"question": "Which table holds refunds?"})

    assert "nothing is known" in unknown
    first = next(line for line in answer.splitlines() if line.startswith("table "))
    assert first.startswith("table shop.refunds")
    assert "order_id bigint references shop.orders" in answer
    assert tool.name == "find_in_application"


@pytest.mark.node
async def test_a_supabase_project_is_discovered_by_its_key_alone(
    supabase_lite: SupabaseLite, learning_database: ThrowawayDatabase
) -> None:
    execute(learning_database.url, SHOP, "GRANT USAGE ON SCHEMA shop TO service_role")
    settings = learning_database.settings.model_copy(
        update={
            "database_url": None,
            "supabase_url": supabase_lite.url,
            "supabase_service_role_key": SecretStr(supabase_lite.secret_key),
        }
    )
    discovery = AutoDiscovery(settings=settings)

    found = await discovery.discover_app_structure(["shop"])
    again = await discovery.discover_app_structure(["shop"])

    assert "shop.refunds" in names(found)
    assert function(found, "shop.pay_twice")["writes"] == "yes"
    assert again.changes == {"added": [], "changed": [], "removed": []}
    assert (await applications_memories(discovery, "refunds?"))[0]["content"].startswith("Table shop.refunds")
    await discovery.database.close()


async def test_search_finds_what_a_user_said_and_what_the_application_has(shop: AutoDiscovery) -> None:
    await shop.discover_app_structure()
    ada = Identity(user_id="ada")
    said = {"store": "user_memory", "content": "Wants refunds by Friday."}
    await shop.database.call("upsert_learnings", ada, learnings=[said], limits={})
    search = SemanticSearch(settings=shop.settings, database=shop.database)

    of_nobody = await search.search_memories("Which table holds refunds?")
    of_ada = await search.search_memories("Which table holds refunds?", 20, identity=ada)
    context = await search.get_relevant_context("Which table holds refunds?", identity=ada, token_budget=150)

    assert {memory["scope"] for memory in of_nobody} == {"tenant"}
    assert of_nobody[0]["content"].startswith("Table shop.refunds")
    assert ("user", said["content"]) in {(memory["scope"], memory["content"]) for memory in of_ada}
    assert "Table shop.refunds" in context
    assert tokens(context) <= 150


async def test_the_operations_agent_looks_up_a_table_without_asking_anybody(shop: AutoDiscovery) -> None:
    await shop.discover_app_structure()
    model = ScriptedChat(
        script=[
            tool_call("find_in_application", question="Which table holds refunds?"),
            "It is shop.refunds.",
        ]
    )
    executor = SafeExecutor(settings=shop.settings)
    machine = LearningMachine(settings=shop.settings)
    graph = build_operations(model, machine, executor, InMemorySaver(), shop)

    state = await graph.ainvoke(
        {"messages": [("user", "Which table holds refunds?")]},
        {"configurable": {"thread_id": "t1", "user_id": "ada"}},
    )

    assert "__interrupt__" not in state
    answer = next(message for message in state["messages"] if message.type == "tool")
    assert "table shop.refunds" in answer.text
    await machine.aclose()


async def test_no_key_and_no_person_of_the_catalog_is_stored_or_told(
    learning_database: ThrowawayDatabase,
) -> None:
    key = "ghp_" + "abcdefghijklmnopqrstuvwxyz0123456789"
    execute(
        learning_database.url,
        f"""
        CREATE SCHEMA app;
        CREATE TYPE app.state AS ENUM ('open', 'ada@example.com');
        CREATE FUNCTION app.hook() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; /* ada@example.com */ END';
        CREATE FUNCTION app.f(a text DEFAULT 'ada@example.com') RETURNS text LANGUAGE sql AS 'SELECT ''{key}''';
        COMMENT ON FUNCTION app.f IS 'ask ada@example.com';
        CREATE TABLE app.things (id integer PRIMARY KEY, a text DEFAULT '{key}', state app.state,
            CHECK (a <> 'ada@example.com'));
        COMMENT ON TABLE app.things IS 'ask ada@example.com with {key}';
        COMMENT ON COLUMN app.things.a IS 'as ada@example.com says';
        CREATE INDEX ON app.things (a) WHERE a = 'ada@example.com';
        ALTER TABLE app.things ENABLE ROW LEVEL SECURITY;
        CREATE POLICY hers ON app.things USING (a = 'ada@example.com');
        CREATE TRIGGER tell AFTER INSERT ON app.things FOR EACH ROW EXECUTE FUNCTION app.hook('{key}');
        CREATE VIEW app.shown AS SELECT '{key}' AS a;
        """,
    )
    database = PostgresDatabase(learning_database.url)
    discovery = AutoDiscovery(settings=learning_database.settings, database=database)

    structure = await discovery.discover_app_structure(patterns=True)

    with psycopg.connect(learning_database.url) as connection:
        connection.execute("DROP SCHEMA app CASCADE")
        connection.commit()
    told = json.dumps(dict(structure)) + await discovery.render("things state", 4000)
    for text in (told, everything_stored(learning_database.url)):
        assert "things" in text
        assert "ada@example.com" not in text
        assert key not in text
    await database.close()


async def test_names_without_an_encoding_are_not_seen_and_the_rest_is(
    learning_database: ThrowawayDatabase,
) -> None:
    url = learning_database.url
    name = f"{learning_database.name}_bytes"
    other = url.replace(learning_database.name, name)
    execute(url, f"CREATE DATABASE {name} TEMPLATE template0 ENCODING 'SQL_ASCII' LOCALE 'C'")
    try:
        with psycopg.connect(other, autocommit=True, client_encoding="SQL_ASCII") as connection:
            connection.execute(b'CREATE TABLE "gr\xf6\xdfe" (a int)')
            connection.execute(b"CREATE TABLE sizes (a int)")
        discovery = over(learning_database, app_database_url=SecretStr(other))

        found = await discovery.discover_app_structure(patterns=False)
        await discovery.database.close()
    finally:
        execute(url, f"DROP DATABASE {name} WITH (FORCE)")

    assert "public.sizes" in names(found)
    assert [problem["object"] for problem in found.problems] == ['public."gr??e"']
