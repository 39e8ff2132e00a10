"""Patterns of a real database: what samples tell, what they never tell, and that nothing stops the rest."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest
from psycopg import sql
from pydantic import SecretStr

from agent import Event, Identity, listening
from agent.database.postgres import PostgresDatabase
from agent.database.supabase import SupabaseDatabase
from agent.discovery.pattern_learning import PatternSummary, learn_patterns, open_sampler, stored_patterns
from agent.discovery.sampling import SampleError, Sampler, plan_sample
from agent.discovery.storage_sampling import StorageSampler
from agent.discovery.structure import AppStructure
from agent.learning.auto_discover import AutoDiscovery
from agent.settings import Settings
from agent.testing.throwaway import ThrowawayDatabase
from tests.integration.rows import everything_stored, rows, value
from tests.supabase_lite import SupabaseLite

SHOP = """
CREATE TYPE order_status AS ENUM ('open', 'paid', 'void');
CREATE TABLE customers (
    id integer PRIMARY KEY GENERATED ALWAYS AS IDENTITY, name text, email text, country text,
    created_at timestamptz DEFAULT now());
INSERT INTO customers (name, email, country)
SELECT 'Customer ' || i, 'c' || i || '@example.com', (ARRAY['DE', 'FR', 'US'])[1 + i % 3]
FROM generate_series(1, 300) i;
CREATE TABLE orders (
    id bigint PRIMARY KEY, customer_id integer, status order_status, currency text, total numeric(10, 2),
    details jsonb, updated_at timestamptz);
CREATE INDEX ON orders (updated_at);
INSERT INTO orders SELECT i, 1 + i % 300, (ARRAY['open', 'paid', 'paid', 'void'])[1 + i % 4]::order_status,
    (ARRAY['EUR', 'USD'])[1 + i % 2], i / 100.0, '{"a": 1}', now() - make_interval(mins => i)
FROM generate_series(1, 20000) i;
CREATE TABLE order_status_history (
    id bigint PRIMARY KEY, order_id bigint, old_status order_status, new_status order_status, at timestamptz);
INSERT INTO order_status_history SELECT i, i, 'open', 'paid', now() FROM generate_series(1, 40) i;
CREATE VIEW open_orders AS SELECT * FROM orders WHERE status = 'open';
ANALYZE;
"""


@pytest.fixture
async def database(learning_database: ThrowawayDatabase) -> AsyncIterator[PostgresDatabase]:
    """The transport to `learning_database`, as a server."""
    database = PostgresDatabase(learning_database.url)
    yield database
    await database.close()


async def structure_of(settings: Settings, database: PostgresDatabase) -> AppStructure:
    return await AutoDiscovery(settings=settings, database=database).discover_app_structure(patterns=False)


async def patterns_of(settings: Settings, database: PostgresDatabase, **more: Any) -> PatternSummary:
    return await learn_patterns(settings, database, await structure_of(settings, database), **more)


def by_table(summary: PatternSummary) -> dict[str, dict[str, Any]]:
    return {pattern["table"]: pattern for pattern in summary.patterns}


async def test_the_patterns_of_a_shop(
    database: PostgresDatabase, learning_database: ThrowawayDatabase
) -> None:
    rows(learning_database.url, SHOP)

    found = by_table(await patterns_of(learning_database.settings, database))

    assert set(found) == {"public.customers", "public.orders", "public.order_status_history"}
    customers = found["public.customers"]
    assert (customers["is_whole"], customers["row_estimate"], customers["rows_sampled"]) == (True, 300, 300)
    assert customers["columns"]["country"]["top"] == [["DE", 0.3333], ["FR", 0.3333], ["US", 0.3333]]
    assert customers["columns"]["email"]["format"] == "email"
    assert {name: column["personal"] for name, column in customers["columns"].items()} == {
        "id": None, "name": "name", "email": "email", "country": None, "created_at": None,
    }  # fmt: skip
    orders = found["public.orders"]
    assert (orders["is_whole"], orders["row_estimate"]) == (False, 20_000)
    assert 600 <= orders["rows_sampled"] <= 1000
    columns = orders["columns"]
    shares = dict(columns["status"]["top"])
    assert set(shares) == {"open", "paid", "void"}
    assert 0.35 < shares["paid"] < 0.65
    assert columns["updated_at"]["moves"]
    assert (
        columns["updated_at"]["maximum"][:13]
        == value(learning_database.url, "SELECT max(updated_at) AT TIME ZONE 'UTC' FROM orders").isoformat(
            " "
        )[:13]
    ), "the newest rows are among those that are read"
    assert columns["currency"]["format"] == "currency"
    assert (columns["customer_id"]["distinct"], columns["id"]["distinct"]) == (300, 20_000)
    assert (columns["details"]["format"], columns["details"]["top"]) == ("json", [])


@pytest.mark.node
async def test_the_patterns_of_a_supabase_project_are_learned_by_its_key_alone(
    supabase_lite: SupabaseLite, learning_database: ThrowawayDatabase
) -> None:
    rows(
        learning_database.url,
        SHOP + "GRANT SELECT ON customers, orders, order_status_history TO service_role;",
    )
    settings = learning_database.settings.model_copy(
        update={
            "database_url": None,
            "supabase_url": supabase_lite.url,
            "supabase_service_role_key": SecretStr(supabase_lite.secret_key),
        }
    )
    database = SupabaseDatabase(supabase_lite.url, supabase_lite.secret_key)

    structure = await AutoDiscovery(settings=settings, database=database).discover_app_structure(
        patterns=False
    )
    learned = await learn_patterns(settings, database, structure)

    found = by_table(learned)
    assert set(found) == {"public.customers", "public.orders", "public.order_status_history"}
    customers = found["public.customers"]
    assert (customers["is_whole"], customers["row_estimate"]) == (True, 300)
    assert customers["columns"]["country"]["top"] == [["DE", 0.3333], ["FR", 0.3333], ["US", 0.3333]]
    assert customers["columns"]["email"]["personal"] == "email"
    orders = found["public.orders"]
    assert not orders["is_whole"]
    assert 600 <= orders["rows_sampled"] <= 1000
    assert set(dict(orders["columns"]["status"]["top"])) == {"open", "paid", "void"}
    assert orders["columns"]["updated_at"]["moves"]
    assert ("public.orders", "customer_id", "public.customers") in {
        (one["from_table"], *one["from_columns"], one["to_table"]) for one in learned.relationships
    }, "values are compared over the key, too"
    stored = await stored_patterns(settings, database, learned.app)
    assert {pattern["table"]: pattern for pattern in stored.patterns} == found
    assert "@example.com" not in json.dumps(list(stored.patterns))
    await database.close()


async def test_what_is_learned_is_stored_and_found_by_search(
    database: PostgresDatabase, learning_database: ThrowawayDatabase
) -> None:
    rows(learning_database.url, SHOP)
    events: list[Event] = []
    with listening(events.append):
        summary = await patterns_of(learning_database.settings, database)

    stored = await stored_patterns(learning_database.settings, database, summary.app)
    assert by_table(summary) == {pattern["table"]: pattern for pattern in stored.patterns}
    assert stored.relationships == summary.relationships
    (event,) = [event for event in events if event.name == "patterns_learned"]
    assert (event.facts["tables"], event.facts["problems"], event.facts["waiting"]) == (3, 0, 0)
    memories = rows(
        learning_database.url,
        "SELECT content, scope, trust FROM agent_memory WHERE store = 'application' AND kind = 'pattern'",
    )
    assert {(scope, trust) for _, scope, trust in memories} == {("tenant", "tool")}
    assert any(content.startswith("Table public.orders: status is paid") for content, _, _ in memories)

    before = rows(learning_database.url, "SELECT count(*) FROM agent_memory WHERE kind = 'pattern'")
    again = await patterns_of(learning_database.settings, database)
    assert (again.changes, again.waiting) == ([], 0)
    assert (
        rows(learning_database.url, "SELECT count(*) FROM agent_memory WHERE kind = 'pattern'") == before
    ), "the same words are not written again"


async def test_references_that_nobody_declared_are_inferred_with_their_evidence(
    database: PostgresDatabase, learning_database: ThrowawayDatabase
) -> None:
    rows(learning_database.url, SHOP)

    summary = await patterns_of(learning_database.settings, database)

    assert {
        (item["from_table"], *item["from_columns"], item["to_table"], *item["to_columns"], item["declared"])
        for item in summary.relationships
    } == {
        ("public.orders", "customer_id", "public.customers", "id", False),
        ("public.order_status_history", "order_id", "public.orders", "id", False),
    }
    assert summary.relationships[0]["evidence"]["share"] == 1.0
    rows(learning_database.url, "UPDATE orders SET customer_id = customer_id + 1000 WHERE id % 2 = 0")
    again = await patterns_of(learning_database.settings, database)
    assert [item["from_table"] for item in again.relationships] == ["public.order_status_history"]


async def test_statuses_and_how_rows_go_through_them(
    database: PostgresDatabase, learning_database: ThrowawayDatabase
) -> None:
    rows(learning_database.url, SHOP)
    settings = learning_database.settings
    first = by_table(await patterns_of(settings, database))["public.orders"]["status_columns"]
    assert [
        (step["from"], step["to"], step["count"], step["source"]) for step in first[0]["transitions"]
    ] == [("open", "paid", 40, "history")]

    changed = rows(
        learning_database.url,
        "UPDATE orders SET status = 'void' WHERE status = 'paid' AND updated_at > now() - interval '5 hours' "
        "RETURNING id",
    )
    summary = await patterns_of(settings, database)

    (status,) = by_table(summary)["public.orders"]["status_columns"]
    steps = {(step["from"], step["to"], step["source"]): step["count"] for step in status["transitions"]}
    assert steps["open", "paid", "history"] == 40
    assert 0 < steps["paid", "void", "rows"] <= len(changed)
    assert [(change["table"], change["kind"]) for change in summary.changes] == [
        ("public.orders", "transition_new")
    ]
    (content,) = rows(
        learning_database.url, "SELECT content FROM agent_memory WHERE kind = 'change' AND value ? 'kind'"
    )
    assert content[0].endswith("public.orders.status went from paid to void, which was not seen before")


async def test_growth_is_of_stored_estimates(
    database: PostgresDatabase, learning_database: ThrowawayDatabase
) -> None:
    rows(learning_database.url, "CREATE TABLE things (id bigint PRIMARY KEY); INSERT INTO things VALUES (1)")
    settings = learning_database.settings
    assert by_table(await patterns_of(settings, database))["public.things"]["growth_per_day"] is None
    rows(
        learning_database.url,
        "UPDATE agent_app_pattern SET estimates = jsonb_build_array(jsonb_build_array(now() - interval '2 days', 1))",
    )
    rows(learning_database.url, "INSERT INTO things SELECT generate_series(2, 101)")

    growth = by_table(await patterns_of(settings, database))["public.things"]["growth_per_day"]

    assert growth == pytest.approx(50, rel=0.01)


async def test_a_prompt_is_told_of_patterns_and_of_inferred_references(
    database: PostgresDatabase, learning_database: ThrowawayDatabase
) -> None:
    rows(learning_database.url, SHOP)
    discovery = AutoDiscovery(settings=learning_database.settings, database=database)
    structure = await discovery.discover_app_structure()
    assert {pattern["table"] for pattern in structure.patterns} == {
        "public.customers", "public.orders", "public.order_status_history",
    }  # fmt: skip

    told = await discovery.render("which customers have open orders?", 2000)

    assert "customer_id integer references public.customers as its values say" in told
    assert "email text (personal (email))" in told
    assert any("open→paid" in line for line in told.splitlines() if line.startswith("  status "))
    again = await discovery.discover_app_structure(patterns=True)
    assert again.patterns[0]["sampled_at"] > structure.patterns[0]["sampled_at"]


# What is never told

PERSONAL = """
CREATE SCHEMA vault;
CREATE TABLE vault.things (id bigint PRIMARY KEY, colour text, made date, status text);
CREATE TABLE people (
    id bigint PRIMARY KEY, first_name text, email text, phone text, street text, date_of_birth date, ssn bigint,
    last_ip inet, password_hash text, api_key text, iban text, card_number text, gender text, salary numeric,
    notes text, owner text, document jsonb, raw bytea, tags text[], status text, anything text, code varchar(80));
CREATE TABLE people_history (
    id bigint PRIMARY KEY, person_id bigint, field_name text, old_value text, new_value text, at timestamptz);
"""


@pytest.mark.parametrize("times", [1, 40])
async def test_no_personal_value_is_in_anything_that_is_stored_or_told(
    database: PostgresDatabase, learning_database: ThrowawayDatabase, times: int
) -> None:
    """Planted in every kind of column, once and often, and looked for in all our tables, events and answers."""
    url, settings = learning_database.url, learning_database.settings
    mark = secrets.token_hex(4)
    planted = {
        "first_name": f"Zq{mark}", "email": f"zq{mark}@example.com", "phone": "+49 30 77123987",
        "street": f"{mark} Street 5",
        "date_of_birth": "1977-07-17", "ssn": "771239871", "last_ip": "10.77.123.98", "password_hash": f"zq{mark}",
        "api_key": f"sk_live_{mark}{mark}", "iban": "DE89370400440532013000", "card_number": "4111111111111111",
        "gender": f"zqg{mark}", "salary": "77123.98",
        "notes": f"She said {mark} on the telephone yesterday evening, twice",
        "owner": f"Zqo{mark}", "document": json.dumps({"k": f"zqd{mark}"}), "raw": f"zqr{mark}",
        "tags": f"{{zqt{mark}}}",
        "anything": f"call Zq zq{mark}@example.org", "code": f"eyJhbGciOiJIUzI1NiJ9.eyJ6{mark}.abcdefgh",
    }  # fmt: skip
    rows(url, PERSONAL)
    names = sql.SQL(", ").join(map(sql.Identifier, planted))
    places = sql.SQL(", ").join(sql.Placeholder() for _ in planted)
    with psycopg.connect(url) as connection:
        for number in range(times):
            insert = sql.SQL("INSERT INTO people (id, status, {}) VALUES (%s, 'open', {})").format(
                names, places
            )
            connection.execute(insert, [77_123_981 + number, *planted.values()])
            connection.execute(
                "INSERT INTO vault.things VALUES (%s, %s, '1966-06-16', %s)",
                (number, f"zqv{mark}", f"zqw{mark}"),
            )
            connection.execute(
                "INSERT INTO people_history VALUES (%s, %s, 'email', %s, %s, now())",
                (number, 77_123_981 + number, f"zqh{mark}", planted["email"]),
            )
    told: list[str] = []
    with listening(lambda event: told.append(json.dumps(event.facts, default=str))):
        first = await patterns_of(settings, database)
        rows(
            url,
            f"UPDATE vault.things SET status = 'zqx{mark}'; UPDATE people SET status = 'paid', anything = 'zqy{mark}'",
        )
        second = await patterns_of(settings, database)
    for table in ("people", "people_history", "vault.things"):
        rows(url, f"DROP TABLE {table}")

    stored = everything_stored(url) + "".join(told) + json.dumps([vars(first), vars(second)])

    assert "agent_app_pattern" in stored
    assert "public.people" in stored
    for needle in (
        mark,
        "77123987",
        "1977-07",
        "771239871",
        "10.77.123",
        "DE893704",
        "41111111",
        "77123.98",
        "1966-06",
    ):
        assert needle not in stored, needle
    columns = by_table(first)["public.people"]["columns"]
    assert {name for name in planted if columns[name]["personal"] is None} <= {
        "notes",
        "document",
        "raw",
        "tags",
    }
    assert all(
        column["personal"] == "restricted" for column in by_table(first)["vault.things"]["columns"].values()
    )


# What fails


async def test_tables_that_cannot_be_read_are_reported_and_the_others_are_learned(
    database: PostgresDatabase, learning_database: ThrowawayDatabase
) -> None:
    url = learning_database.url
    rows(
        url,
        """
        CREATE TABLE fine (id bigint PRIMARY KEY); INSERT INTO fine VALUES (1);
        CREATE TABLE gone (id bigint PRIMARY KEY);
        CREATE TABLE changed (id bigint PRIMARY KEY, was text);
        CREATE TABLE locked (id bigint PRIMARY KEY);
        CREATE TABLE "Odd ""Table"" é" ("select" text, "Sp ace" integer, "a%s{}" text);
        INSERT INTO "Odd ""Table"" é" VALUES ('x', 1, 'y');
        CREATE TABLE empty ();
        CREATE FUNCTION slow() RETURNS boolean LANGUAGE sql VOLATILE AS 'SELECT pg_catalog.pg_sleep(30) IS NOT NULL';
        CREATE FUNCTION broken(x bigint) RETURNS boolean LANGUAGE plpgsql AS
            $$ BEGIN RETURN ('secret-of-row-' || x)::integer = 1; END $$;
        CREATE TABLE slow_rows (id bigint PRIMARY KEY); INSERT INTO slow_rows VALUES (1);
        CREATE TABLE broken_rows (id bigint PRIMARY KEY); INSERT INTO broken_rows VALUES (1);
        ALTER TABLE slow_rows ENABLE ROW LEVEL SECURITY; CREATE POLICY p ON slow_rows USING (slow());
        ALTER TABLE broken_rows ENABLE ROW LEVEL SECURITY; CREATE POLICY p ON broken_rows USING (broken(id));
        """,
    )
    role = f"reader_{secrets.token_hex(4)}"
    rows(
        url,
        f"CREATE ROLE {role} LOGIN PASSWORD 'x'; GRANT USAGE ON SCHEMA public TO {role}; "
        f"GRANT SELECT ON ALL TABLES IN SCHEMA public TO {role}; CREATE TABLE hidden (id bigint);",
    )
    reader = psycopg.conninfo.make_conninfo(learning_database.tcp_url, user=role, password="x")
    parts = psycopg.conninfo.conninfo_to_dict(reader)
    address = f"postgresql://{role}:x@{parts['host']}:{parts['port']}/{parts['dbname']}"
    settings = Settings.model_validate(
        {
            **dict(learning_database.settings),
            "app_database_url": address,
            "discovery_timeout": timedelta(seconds=0.5),
        }
    )
    try:
        structure = await structure_of(settings, database)
        rows(url, "DROP TABLE gone; ALTER TABLE changed DROP COLUMN was")
        with psycopg.connect(url) as holder:
            holder.execute("LOCK TABLE locked IN ACCESS EXCLUSIVE MODE")
            summary = await learn_patterns(settings, database, structure)
    finally:
        rows(url, f"DROP OWNED BY {role}; DROP ROLE {role}")

    assert set(by_table(summary)) == {"public.fine", 'public."Odd ""Table"" é"'}
    reasons = {problem["object"]: problem["reason"] for problem in summary.problems}
    assert reasons.pop("public.locked") in (
        "somebody else holds a lock on it",
        "it took longer than discovery may take",
    )
    assert reasons == {
        "public.gone": "it was dropped or changed meanwhile",
        "public.changed": "it was dropped or changed meanwhile",
        "public.slow_rows": "it took longer than discovery may take",
        "public.broken_rows": "reading it failed (22P02, InvalidTextRepresentation)",
        "public.hidden": "this login may not read it",
        "public.empty": "it has no column that this login may read",
    }


async def test_a_deadline_stops_between_tables_and_the_next_round_begins_with_the_rest(
    database: PostgresDatabase, learning_database: ThrowawayDatabase
) -> None:
    rows(learning_database.url, "".join(f"CREATE TABLE t{i} (id bigint PRIMARY KEY);" for i in range(6)))
    settings = learning_database.settings
    structure = await structure_of(settings, database)
    calls = []

    def progress(done: int, count: int, table: str) -> None:
        calls.append((done, count, table))

    none = await learn_patterns(settings, database, structure, deadline=datetime.now(UTC), progress=progress)
    assert (none.patterns, none.waiting, calls) == ([], 6, [])

    await learn_patterns(settings, database, replace(structure, tables=structure.tables[:4]))
    await learn_patterns(settings, database, structure, progress=progress)
    assert {table for _, _, table in calls[:2]} == {f"public.{t['name']}" for t in structure.tables[4:]}
    assert [done for done, _, _ in calls] == [1, 2, 3, 4, 5, 6]


async def test_patterns_of_tables_that_are_gone_are_forgotten_with_their_memories(
    database: PostgresDatabase, learning_database: ThrowawayDatabase
) -> None:
    rows(learning_database.url, SHOP)
    settings = learning_database.settings
    await patterns_of(settings, database)
    rows(learning_database.url, "DROP TABLE orders CASCADE")

    await patterns_of(settings, database)

    assert rows(learning_database.url, "SELECT table_name FROM agent_app_pattern ORDER BY 1") == [
        ("public.customers",),
        ("public.order_status_history",),
    ]
    current = rows(
        learning_database.url,
        "SELECT value ->> 'table' FROM agent_memory WHERE kind = 'pattern' AND superseded_at IS NULL ORDER BY 1",
    )
    assert ("public.orders",) not in current


async def test_samples_of_a_table_take_no_large_value_over_the_wire(
    database: PostgresDatabase, learning_database: ThrowawayDatabase
) -> None:
    rows(
        learning_database.url,
        "CREATE TABLE big (id bigint PRIMARY KEY, said text, document jsonb, raw bytea, list text[], place point)",
    )
    rows(
        learning_database.url,
        "INSERT INTO big SELECT i, repeat('x', 5000000), jsonb_build_object('k', repeat('y', 5000000)), "
        "convert_to(repeat('z', 5000000), 'UTF8'), ARRAY[repeat('l', 5000000)], point(1, 2) "
        "FROM generate_series(1, 3) i",
    )
    structure = await structure_of(learning_database.settings, database)
    async with open_sampler(learning_database.settings, database) as sampler:
        sample = await sampler.sample(plan_sample(structure.tables[0]))

    assert [len(item or "") for item in sample.rows[0]] == [1, 200, 0, 0, 0, 0]


async def test_two_rounds_at_once_leave_one_row_for_each_table(
    database: PostgresDatabase, learning_database: ThrowawayDatabase
) -> None:
    rows(learning_database.url, SHOP)
    structure = await structure_of(learning_database.settings, database)

    await asyncio.gather(*(learn_patterns(learning_database.settings, database, structure) for _ in range(4)))

    assert value(learning_database.url, "SELECT count(*) FROM agent_app_pattern") == 3


async def test_tenants_know_nothing_of_each_others_patterns(
    database: PostgresDatabase, learning_database: ThrowawayDatabase
) -> None:
    rows(learning_database.url, SHOP)
    await patterns_of(learning_database.settings, database)

    other = learning_database.settings.model_copy(update={"tenant": "other"})
    assert (await stored_patterns(other, database, "default")).patterns == []
    assert await database.call("read_app_patterns", Identity(tenant_id="other"), the_app="default") == []


# Over the storage functions alone


async def test_samples_over_the_storage_functions_are_the_same(
    database: PostgresDatabase, learning_database: ThrowawayDatabase
) -> None:
    rows(learning_database.url, SHOP)
    structure = await structure_of(learning_database.settings, database)
    over_storage = StorageSampler(database, timedelta(seconds=2))

    async def samples(sampler: Sampler) -> list[tuple[Any, ...]]:
        now = await sampler.now()
        assert abs(now - datetime.now(UTC)) < timedelta(minutes=1)
        found: list[tuple[Any, ...]] = []
        for table in structure.tables:
            if table["kind"] == "table":
                sample = await sampler.sample(plan_sample(table))
                found.append(
                    (table["name"], sample.columns, sorted(sample.rows), sample.newest, sample.is_whole)
                )
        reference = {
            "from_schema": "public", "from_table": "orders", "from_column": "customer_id",
            "to_schema": "public", "to_table": "customers", "to_column": "id",
        }  # fmt: skip
        found.append(await sampler.match(reference, 100, None))
        return found

    async with open_sampler(learning_database.settings, database) as direct:
        assert await samples(over_storage) == await samples(direct)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"table": "missing"}, "it was dropped or changed meanwhile"),
        ({"columns": ("missing",)}, "it was dropped or changed meanwhile"),
        ({"table": 'orders"; DROP TABLE customers; --'}, "it was dropped or changed meanwhile"),
    ],
)
async def test_the_storage_function_samples_what_is_there_and_nothing_else(
    database: PostgresDatabase, learning_database: ThrowawayDatabase, change: dict[str, Any], reason: str
) -> None:
    rows(learning_database.url, SHOP)
    structure = await structure_of(learning_database.settings, database)
    (orders,) = [table for table in structure.tables if table["name"] == "orders"]
    plan = replace(plan_sample(orders), columns=("id",), how_read=("text",), newest_by=None)

    with pytest.raises(SampleError) as caught:
        await StorageSampler(database, timedelta(seconds=2)).sample(replace(plan, **change))

    assert caught.value.reason == reason
    assert value(learning_database.url, "SELECT count(*) FROM customers") == 300
