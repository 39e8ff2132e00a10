"""Nobody sees, changes or erases what belongs to somebody else, whoever calls and whatever our own code forgets."""

from __future__ import annotations

import json
import random
import secrets
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from typing import Any, LiteralString
from urllib.parse import urlsplit, urlunsplit

import psycopg
import pytest
from psycopg import sql

from agent import Identity, LearningMachine
from agent.database.migrations import migrate
from agent.database.postgres import PostgresDatabase
from agent.database.protocol import CASTS, JSON_ARGUMENTS, to_json
from agent.errors import LearningError
from agent.jobs import queue_app
from agent.portal import portal
from agent.testing.throwaway import ThrowawayDatabase
from tests.integration.rows import (
    LARGE_SCOPE_TABLES,
    OUR_TABLES,
    TENANT_TABLES,
    a_run,
    everything_stored,
    memory,
    rows,
)
from tests.supabase_layout import SupabaseLayout

SOME_ID = str(uuid.UUID(int=7))
# Every storage function with arguments that it takes, identity aside.
FOR_USERS: dict[str, dict[str, Any]] = {
    "recall_context": {"question": "tea"},
    "match_memories": {"question": "tea"},
    "record_run": {"run": a_run(run_id="of-the-call")},
    "upsert_learning": {"learning": memory("Written by the call")},
    "upsert_learnings": {"learnings": [memory("Written by the call")]},
    "get_learning": {"the_memory_id": SOME_ID},
    "get_learnings": {},
    "delete_learning": {"the_memory_id": SOME_ID},
    "delete_learnings": {"the_memory_ids": [SOME_ID]},
    "clear_learnings": {},
    "add_turns": {
        "the_session": "s1",
        "turns": [{"turn": 1, "kind": "user", "content": "Written by the call"}],
    },
}
FOR_SERVERS: dict[str, dict[str, Any]] = {
    "pending_learning": {},
    "apply_learning": {"run_ids": [], "operations": [], "expected_version": None},
    "memories_without_embedding": {"model": "m"},
    "store_embeddings": {"model": "m", "embeddings": []},
    "arrange_embeddings": {"model": "m", "dimensions": 2},
    "owners_without_embedding": {"model": "m"},
    "import_runs": {"runs": [a_run(run_id="imported-by-the-call")]},
    "list_runs": {},
    "get_run": {"the_run_id": "r1"},
    "list_users": {},
    "erase_user": {},
    "learning_status": {},
    "retry_learning": {"the_queue": "learning", "delay_seconds": 60.0, "attempt": 2},
    "request_approval": {
        "request": {
            "tool": "pay",
            "arguments": {},
            "args_hash": "a" * 64,
            "risk": "WRITE",
            "approvers": ["eve"],
        }
    },
    "get_approval": {"the_approval_id": SOME_ID},
    "list_approvals": {},
    "decide_approvals": {"decisions": [{"approval_id": SOME_ID}]},
    "close_approval": {"the_approval_id": SOME_ID, "the_state": "cancelled", "closed_by": "eve"},
    "attach_interrupt": {"batch_id": SOME_ID, "interrupt": {}},
    "save_standing_rule": {"rule": {}},
    "list_standing_rules": {},
    "revoke_standing_rule": {"the_rule_id": SOME_ID, "revoked_by": "eve"},
    "save_continuation": {"the_approval_id": SOME_ID, "payload": "p", "mac": "m"},
    "take_continuation": {"the_approval_id": SOME_ID},
    "release_continuation": {"the_approval_id": SOME_ID, "error": "e"},
    "finish_continuation": {
        "the_approval_id": SOME_ID,
        "the_key": "k",
        "entry": {"state": "executed", "decision": "allowed", "tool": "pay", "risk": "READ"},
    },
    "claim_approval": {"the_approval_id": SOME_ID, "args_hash": "a" * 64, "claimed_by": "p"},
    "finish_execution": {"ticket": "t", "entry": {"state": "executed"}},
    "record_execution": {
        "entry": {"state": "refused", "decision": "refused", "tool": "pay", "risk": "FORBIDDEN"}
    },
    "reserve_execution": {"the_tool": "pay", "limit_key": "pay", "per_hour": 1},
    "halt_executions": {"halt": {"halted_by": "eve", "reason": "r"}},
    "resume_executions": {"halt_id": SOME_ID, "resumed_by": "eve"},
    "list_halts": {},
    "list_executions": {},
    "get_execution": {"the_log_id": 1},
    "get_execution_result": {"the_key": SOME_ID},
    "verify_executions": {},
    "save_tool_version": {"tool": {"name": "t", "code": "1", "code_hash": "a" * 64, "author": "eve"}},
    "approve_tool_version": {"ticket": "t", "tool_name": "t", "version": 1, "code_hash": "a" * 64},
    "retire_tool": {"tool_name": "t", "version": None, "by": "eve"},
    "list_tools": {},
    "get_tool": {"tool_name": "t", "version": None},
    "save_app_patterns": {"the_app": "default", "patterns": [{"table": "public.t", "document": {}}]},
    "read_app_patterns": {"the_app": "default"},
    "forget_app_patterns": {"the_app": "default", "kept_tables": []},
    "save_app_structure": {"the_app": "default", "discovery": {"discovery_id": "d", "objects": []}},
    "get_app_structure": {"the_app": "default"},
    "tick": {"the_clock": "c", "interval_seconds": 3600.0, "replica": "r"},
    "take_tick": {"the_clock": "c", "worker": "w", "lease_seconds": 60.0, "attempts_max": 5},
    "keep_tick": {"the_clock": "c", "slot": "2026-01-01T00:00:00Z", "attempt": 1, "lease_seconds": 60.0},
    "finish_tick": {"the_clock": "c", "slot": "2026-01-01T00:00:00Z", "attempt": 1, "the_state": "done"},
    "leave_clock": {"the_clock": "c", "replica": "r"},
    "clock_status": {},
    "tool_runs_to_learn": {},
    "store_tool_calls": {"run": {"run_id": "r1", "calls": [], "words": []}},
    "tool_examples": {},
    "store_tool_models": {"the_tool": "t", "models": [], "last": 0},
    "match_tool_warnings": {"the_tool": "t", "conditions": {}},
    "list_tool_experience": {},
    "report_findings": {
        "findings": [], "checked": [], "sinks": [], "cooldown_seconds": 60.0, "reminder_seconds": 60.0,
    },
    "take_alert_delivery": {"sinks": ["log"], "lease_seconds": 60.0},
    "finish_alert_delivery": {
        "the_notice_id": SOME_ID, "sink": "log", "attempt": 1, "error": "e", "retry_seconds": None,
    },
    "list_alerts": {},
    "get_alert": {"the_alert_id": SOME_ID},
    "silence_alerts": {"silence": {"pattern": "*", "seconds": 60, "made_by": "eve"}},
    "end_alert_silence": {"the_silence_id": SOME_ID, "ended_by": "eve"},
    "list_alert_silences": {},
    "begin_step": {
        "the_cycle": "c",
        "the_step": "s",
        "worker": "w",
        "lease_seconds": 60.0,
        "attempts_max": 3,
    },
    "keep_step": {"the_cycle": "c", "the_step": "s", "attempt": 1, "lease_seconds": 60.0},
    "finish_step": {"the_cycle": "c", "the_step": "s", "attempt": 1, "the_state": "done", "report": {}},
    "list_cycles": {},
    "count_app_changes": {"since": None, "change_limit": 10},
    "order_waiting_learning": {"older_than_seconds": 0.0, "session_limit": 10},
    "curate_memories": {"limits": {}, "row_limit": 10},
    "set_text_language": {"the_language": "german"},
    "reindex_words": {"row_limit": 10},
    "forget_ticks": {"keep_seconds": 0.0, "row_limit": 10},
    "record_outcomes": {"the_run_id": "r1", "outcomes": [{"kind": "resolution", "succeeded": True}]},
}  # fmt: skip
WITHOUT_IDENTITY: dict[str, dict[str, Any]] = {
    "server_secret": {"purpose": "seal"},
    "discover_app_structure": {"wanted": {}},
    "server_state": {"job_limit": 1000},
    "list_tenants": {"tenant_limit": 10},
    "expedite_learning": {"sessions": []},
    "queue_state": {"the_queue": "learning"},
    "rescue_learning": {"stalled_seconds": 30.0},
    "retry_failed_learning": {},
    "count_waiting": {"tenants": None},
    "take_deliveries": {"channels": ["slack"], "lease_seconds": 60.0},
    "delivery_done": {"the_batch_id": SOME_ID, "channel": "slack", "delivered_version": 1, "ref": {}},
    "delivery_failed": {"the_batch_id": SOME_ID, "channel": "slack", "error": "e"},
    "take_resumes": {"lease_seconds": 60.0},
    "take_tool_resumes": {"lease_seconds": 60.0},
    "resume_done": {"batch_id": SOME_ID},
    "resume_failed": {"batch_id": SOME_ID, "error": "e"},
    "remember_delivery": {"channel": "slack", "delivery_key": "k"},
    "tend_approvals": {"executing_seconds": 60.0},
    "code_of_others": {"the_schema": "public", "the_table": "agent_migration"},
    "sample_app_table": {
        "the_schema": "public",
        "the_table": "agent_migration",
        "the_columns": ["name"],
        "how_read": ["text"],
        "row_limit": 5,
    },
    "match_app_values": {
        "from_schema": "public",
        "from_table": "agent_migration",
        "from_column": "name",
        "to_schema": "public",
        "to_table": "agent_migration",
        "to_column": "name",
        "row_limit": 5,
    },
    "refresh_readings": {"target_ms": 10_000.0},
    "monitor_readings": {"recent_hours": 12, "history_days": 14, "series_limit": 10},
    "monitor_state": {"paused_seconds": 60.0},
    "monitor_security": {"history_days": 14},
    "monitor_errors": {"recent_hours": 3},
    "unscanned_texts": {"run_limit": 10},
    "record_sightings": {"sightings": [], "scanned_until": None},
}
ALL = FOR_USERS | FOR_SERVERS | WITHOUT_IDENTITY
ADA = Identity(user_id="ada", session_id="s1", agent_id="a1")
BOB = Identity(user_id="bob", session_id="s1", agent_id="a1")


@pytest.fixture
async def database(learning_database: ThrowawayDatabase) -> AsyncIterator[PostgresDatabase]:
    """The transport to `learning_database`, as a server."""
    database = PostgresDatabase(learning_database.url)
    yield database
    await database.close()


def _call(
    connection: psycopg.Connection[Any], function: str, identity: Identity | None, **arguments: Any
) -> Any:
    """Call a storage function on this very connection."""
    values = dict(arguments)
    if function not in WITHOUT_IDENTITY:
        values["identity"] = None if identity is None else identity.as_json()
    parts = [
        sql.SQL("{} => {}{}").format(
            sql.Identifier(name), sql.Placeholder(name), sql.SQL(CASTS.get(name, _CASTS.get(name, "")))
        )
        for name in values
    ]
    row = connection.execute(
        sql.SQL("SELECT {}({})").format(sql.Identifier("public", function), sql.SQL(", ").join(parts)),
        {name: to_json(item) if name in JSON_ARGUMENTS else item for name, item in values.items()},
    ).fetchone()
    return row[0] if row else None


_CASTS: dict[str, LiteralString] = {
    "delay_seconds": "::double precision",
    "stalled_seconds": "::double precision",
    "lease_seconds": "::double precision",
    "executing_seconds": "::double precision",
}


@contextmanager
def _as_role(
    url: str, role: str, claims: dict[str, Any] | str | None = None
) -> Iterator[psycopg.Connection[Any]]:
    """A connection as PostgREST makes it: logged in as `authenticator`, then the role, and the claims of the token."""
    password = secrets.token_hex(8)
    rows(url, f"ALTER ROLE authenticator PASSWORD '{password}'")
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    login = urlunsplit(parts._replace(netloc=f"authenticator:{password}@{host}"))
    with psycopg.connect(login, autocommit=True) as connection:
        connection.execute(sql.SQL("SET ROLE {}").format(sql.Identifier(role)))
        if claims is not None:
            text = claims if isinstance(claims, str) else json.dumps(claims)
            connection.execute("SELECT set_config('request.jwt.claims', %s, false)", (text,))
        yield connection


def _claims(user_id: str, tenant_id: str | None = None) -> dict[str, Any]:
    more = {} if tenant_id is None else {"app_metadata": {"tenant_id": tenant_id}}
    return {"sub": user_id, "role": "authenticated", **more}


# What the catalogue says, on a plain Postgres and on Supabase's layout


@pytest.fixture(params=["plain", "supabase"])
async def catalogue(request: pytest.FixtureRequest) -> str:
    """Address of a migrated database, as a superuser."""
    if request.param == "plain":
        return str(request.getfixturevalue("learning_database").url)
    layout: SupabaseLayout = request.getfixturevalue("supabase_layout")
    await migrate(layout.url)
    return layout.superuser_url


async def test_every_table_has_forced_row_level_security_and_lets_in_agent_app_alone(catalogue: str) -> None:
    tables = {
        name: (enabled, forced)
        for name, enabled, forced in rows(
            catalogue,
            """
            SELECT c.relname::text, c.relrowsecurity, c.relforcerowsecurity FROM pg_class c
            JOIN pg_namespace n ON n.oid = c.relnamespace
            WHERE n.nspname IN ('public', 'agent_private') AND c.relkind IN ('r', 'p', 'v', 'm', 'f')
            """,
        )
    }
    # The owner of the bookkeeping reads it without an identity; no policy lets anybody else in.
    assert tables.pop("agent_migration") == (True, False)
    # Written by the owner alone; agent_app reads it to tell a login its own tenant.
    assert tables.pop("sql_login") == (False, False)
    # Read by one function, for servers.
    assert tables.pop("server_secret") == (True, True)
    assert set(tables) == {*OUR_TABLES, *LARGE_SCOPE_TABLES, *TENANT_TABLES}
    assert set(tables.values()) == {(True, True)}
    policies = rows(
        catalogue,
        "SELECT tablename::text, roles::text[], permissive FROM pg_policies WHERE schemaname = 'public'",
    )
    assert {table for table, _, _ in policies} == {*OUR_TABLES, *LARGE_SCOPE_TABLES, *TENANT_TABLES}
    assert all(roles == ["agent_app"] for _, roles, _ in policies)


async def test_no_role_of_the_api_has_a_right_on_any_table_or_sequence(catalogue: str) -> None:
    granted = rows(
        catalogue,
        """
        SELECT r.rolname::text, n.nspname || '.' || c.relname, p
        FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace,
             (VALUES ('anon'), ('authenticated'), ('service_role'), ('authenticator')) AS r (rolname),
             unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'DELETE', 'TRUNCATE', 'REFERENCES', 'TRIGGER']) AS p
        WHERE n.nspname IN ('public', 'agent_private', 'agent_queue') AND c.relkind IN ('r', 'p', 'v', 'm')
          AND has_table_privilege(r.rolname, c.oid, p)
        """,
    )
    # A server's key may look after the queue and read which migrations are there, and nothing else.
    beyond = [
        (role, table, right)
        for role, table, right in granted
        if not (role == "service_role" and table.startswith(("agent_queue.", "public.agent_migration")))
    ]
    assert beyond == []
    by_column = rows(
        catalogue,
        """
        SELECT a.attrelid::regclass::text, a.attname::text FROM pg_attribute a
        JOIN pg_class c ON c.oid = a.attrelid JOIN pg_namespace n ON n.oid = c.relnamespace
        WHERE n.nspname IN ('public', 'agent_private', 'agent_queue') AND a.attacl IS NOT NULL
        """,
    )
    assert by_column == []
    schemas = rows(
        catalogue,
        """
        SELECT r.rolname::text, s.name::text
        FROM (VALUES ('anon'), ('authenticated')) AS r (rolname),
             (VALUES ('agent_private'), ('agent_queue')) AS s (name)
        WHERE has_schema_privilege(r.rolname, s.name, 'USAGE, CREATE')
        """,
    )
    assert schemas == []


async def test_each_role_may_execute_what_is_meant_for_it_and_nothing_else(catalogue: str) -> None:
    executable = rows(
        catalogue,
        """
        SELECT r.rolname::text, n.nspname::text, p.proname::text
        FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace,
             (VALUES ('anon'), ('authenticated'), ('service_role'), ('agent_server'), ('agent_sql_writer'))
             AS r (rolname)
        WHERE n.nspname IN ('public', 'agent_private', 'agent_queue')
          AND NOT EXISTS (SELECT FROM pg_depend d WHERE d.objid = p.oid AND d.deptype = 'e')
          AND has_function_privilege(r.rolname, p.oid, 'EXECUTE') AND has_schema_privilege(r.rolname, n.oid, 'USAGE')
        """,
    )

    def of(role: str, *schemas: str) -> set[str]:
        return {name for who, schema, name in executable if who == role and schema in schemas}

    assert of("anon", "public", "agent_private", "agent_queue") == set()
    assert of("authenticated", "public", "agent_private", "agent_queue") == set(FOR_USERS)
    for role in ("service_role", "agent_server"):
        assert of(role, "public", "agent_private") == set(ALL)
    assert of("agent_sql_writer", "public", "agent_private", "agent_queue") == {"finish_write"}


async def test_agent_app_is_nobody_to_log_in_as_and_is_held_by_row_level_security(catalogue: str) -> None:
    rights = rows(
        catalogue,
        "SELECT rolcanlogin, rolsuper, rolbypassrls, rolcreaterole, rolcreatedb, rolinherit "
        "FROM pg_roles WHERE rolname = 'agent_app'",
    )
    assert rights == [(False,) * 6]
    members = rows(
        catalogue,
        "SELECT r.rolname::text FROM pg_roles r WHERE NOT r.rolsuper AND r.rolname <> 'agent_app' "
        "AND pg_has_role(r.rolname, 'agent_app', 'MEMBER')",
    )
    assert members in ([], [("project_owner",)]), "only who migrates may become agent_app"


# Our own filters taken away


async def _fill(database: PostgresDatabase, identity: Identity, mark: str) -> None:
    """A row in every table, each with the mark in it or beside it."""
    earlier = await database.call("upsert_learning", identity, learning=memory(f"{mark} coffee"))
    changed = memory(f"{mark} tea", memory_id=earlier["memory_id"], evidence=[{"run_id": f"{mark}-run"}])
    receipt = await database.call("upsert_learning", identity, learning=changed)
    await database.call(
        "store_embeddings",
        identity,
        model="m",
        embeddings=[{"memory_number": receipt["memory_number"], "embedding": "[1,2]"}],
    )
    await database.call(
        "record_run",
        identity,
        run=a_run(
            f"{mark} said",
            run_id=f"{mark}-run",
            exposures=[{"memory_id": receipt["memory_id"], "version": receipt["version"]}],
            outcomes=[{"kind": "reward", "succeeded": True}],
        ),
    )


_OWNER = {"agent_run": "user_id", "agent_exposure": "user_id", "agent_outcome": "user_id"}


async def test_a_bare_select_sees_the_rows_of_the_identity_alone_and_none_without(
    database: PostgresDatabase, learning_database: ThrowawayDatabase
) -> None:
    people = [
        Identity(tenant_id=tenant, user_id=user, session_id="s")
        for tenant in ("t1", "t2")
        for user in ("ada", "bob")
    ]
    for person in people:
        await _fill(database, person, f"{person.tenant_id}-{person.user_id}")
    await database.call("import_runs", Identity(tenant_id="t1"), runs=[a_run(run_id="of-nobody")])

    def seen(settings: dict[str, str]) -> dict[str, set[tuple[str, str]]]:
        with psycopg.connect(learning_database.url) as connection:
            connection.execute("SET ROLE agent_app")
            for name, item in settings.items():
                connection.execute("SELECT set_config(%s, %s, true)", (f"agent.{name}", item))
            found = {}
            for table in OUR_TABLES:
                owner = sql.Identifier(_OWNER.get(table, "owner_id"))
                query = sql.SQL("SELECT tenant_id, coalesce({}, '') FROM {}").format(
                    owner, sql.Identifier(table)
                )
                found[table] = set(connection.execute(query).fetchall())
            return found

    for person in people:
        assert person.user_id is not None
        own = {"tenant_id": person.tenant_id, "user_id": person.user_id, "reach": "user"}
        assert seen(own) == {table: {(person.tenant_id, person.user_id)} for table in OUR_TABLES}
        assert seen(own | {"reach": "claims"}) == seen(own)
    nothing: dict[str, set[tuple[str, str]]] = {table: set() for table in OUR_TABLES}
    for settings in (
        {},
        {"tenant_id": "t1"},
        {"user_id": "ada"},
        {"tenant_id": "", "user_id": "ada"},
        {"tenant_id": "t1", "user_id": ""},
        {"tenant_id": "t1", "user_id": "", "agent_id": "", "reach": "user"},
        {"tenant_id": "t1", "user_id": "%", "reach": "user"},
        {"tenant_id": "t3", "user_id": "ada", "reach": "tenant"},
        {"tenant_id": "", "user_id": "", "reach": "tenant"},
        {"user_id": "ada", "reach": "tenant"},
    ):
        assert seen(settings) == nothing, settings
    whole = seen({"tenant_id": "t1", "reach": "tenant"})
    assert whole["agent_memory"] == {("t1", "ada"), ("t1", "bob")}
    assert whole["agent_run"] == {("t1", "ada"), ("t1", "bob"), ("t1", "")}


async def test_bare_writes_reach_no_row_of_others(
    database: PostgresDatabase, learning_database: ThrowawayDatabase
) -> None:
    for person in (ADA, BOB, BOB.with_(tenant_id="t2")):
        await _fill(database, person, f"{person.tenant_id}-{person.user_id}")
    before = {row for (row,) in rows(learning_database.url, "SELECT m::text FROM agent_memory m")}

    def as_bob(statement: str) -> int:
        with psycopg.connect(learning_database.url) as connection:
            connection.execute("SET ROLE agent_app")
            connection.execute(
                "SELECT set_config('agent.tenant_id', 'default', true), set_config('agent.user_id', 'bob', true)"
            )
            count = connection.execute(statement.encode()).rowcount
            connection.rollback()
            return count

    for table in OUR_TABLES:
        assert as_bob(f"DELETE FROM {table} WHERE true") == len(
            rows(
                learning_database.url,
                f"SELECT 1 FROM {table} WHERE tenant_id = 'default' AND {_OWNER.get(table, 'owner_id')} = 'bob'",
            )
        ), table
        assert as_bob(f"UPDATE {table} SET tenant_id = tenant_id") > 0
        for theft in ("tenant_id = 't2'", f"{_OWNER.get(table, 'owner_id')} = 'ada'"):
            with pytest.raises(psycopg.errors.InsufficientPrivilege, match="row-level security"):
                as_bob(f"UPDATE {table} SET {theft}")
    with pytest.raises(psycopg.errors.InsufficientPrivilege, match="row-level security"):
        as_bob("INSERT INTO agent_scope (tenant_id, scope, owner_id) VALUES ('default', 'user', 'eve')")
    for statement in ("TRUNCATE agent_memory CASCADE", "ALTER TABLE agent_memory DISABLE ROW LEVEL SECURITY"):
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            as_bob(statement)
    assert {row for (row,) in rows(learning_database.url, "SELECT m::text FROM agent_memory m")} == before


# With no identity


async def test_with_no_identity_every_function_finds_nothing_or_refuses(
    database: PostgresDatabase, learning_database: ThrowawayDatabase
) -> None:
    for person in (ADA, BOB):
        await _fill(database, person, f"zq{person.user_id}")
    stored = everything_stored(learning_database.url)
    silent: dict[str, Any] = {
        "recall_context": {"profile": [], "session": [], "memories": []},
        "match_memories": [],
        "get_learning": None,
        "get_learnings": [],
        "memories_without_embedding": [],
        "owners_without_embedding": [],
        "arrange_embeddings": 0,
        "list_runs": [],
        "get_run": None,
        "list_users": [],
        "get_approval": None,
        "list_approvals": [],
        "list_standing_rules": [],
        "list_halts": [],
        "list_executions": [],
        "get_execution": None,
        "get_execution_result": None,
        "list_tools": [],
        "get_tool": None,
        "get_app_structure": None,
        "list_alerts": [],
        "get_alert": None,
        "list_alert_silences": [],
        "read_app_patterns": [],
        "tool_runs_to_learn": [],
        "tool_examples": {},
        "match_tool_warnings": {"risks": [], "limit": None},
        "list_tool_experience": {"errors": [], "warnings": {}, "slow": [], "sequences": []},
    }
    nobodies: list[dict[str, Any] | None] = [
        None,
        {},
        {"tenant_id": "", "user_id": ""},
        {"tenant_id": None, "user_id": None},
        {"user_id": "ada"},  # of no tenant
        {"tenant_id": "", "user_id": "ada"},
    ]
    with psycopg.connect(learning_database.url, autocommit=True) as connection:
        for nobody in nobodies:
            for function, arguments in (FOR_USERS | FOR_SERVERS).items():
                if function == "retry_learning":
                    continue  # an order without a person is learned as nobody's: see below
                values = arguments | {"identity": nobody}
                parts = sql.SQL(", ").join(
                    sql.SQL("{} => {}{}").format(
                        sql.Identifier(name), sql.Placeholder(name), sql.SQL(CASTS.get(name, ""))
                    )
                    for name in values
                )
                statement = sql.SQL("SELECT {}({})").format(sql.Identifier("public", function), parts)
                given = {
                    n: to_json(v) if n in JSON_ARGUMENTS and v is not None else v for n, v in values.items()
                }
                if function in silent:
                    row = connection.execute(statement, given).fetchone()
                    assert row == (silent[function],), (function, nobody)
                else:
                    with pytest.raises(psycopg.Error) as refused:
                        connection.execute(statement, given)
                    assert refused.value.sqlstate == "PT403", (function, nobody)
    assert everything_stored(learning_database.url) == stored


# Random operations


async def test_no_random_operation_ever_gives_a_row_of_somebody_else(
    database: PostgresDatabase, learning_database: ThrowawayDatabase
) -> None:
    chance = random.Random(20261120)
    people = [
        Identity(tenant_id=f"t{tenant}", user_id=f"u{user}", session_id=f"s{session}")
        for tenant in range(20)
        for user in range(2)
        for session in range(2)
    ]
    memory_ids: list[str] = [SOME_ID]
    run_ids: list[str] = ["r0"]
    began = datetime.now(UTC)
    answered = 0

    def mark(person: Identity) -> str:
        return f"zq{person.tenant_id}{person.user_id}qz"

    def text(person: Identity) -> str:
        return " ".join([mark(person), *chance.choices(["tea", "rome", "cello", "billing"], k=2)])

    def learning(person: Identity) -> dict[str, Any]:
        made: dict[str, Any] = {"store": chance.choice(["user_memory", "user_memory", "user_profile"])}
        made["content"] = text(person)
        if made["store"] == "user_profile":
            made["field"] = chance.choice(["name", "role"])
        if chance.random() < 0.3:
            made["memory_id"] = chance.choice(memory_ids)
        made["evidence"] = [{"run_id": chance.choice(run_ids), "quote": mark(person)}]
        made["tags"] = chance.choice([[], ["home"], ["home", "work"]])
        return made

    def turn(person: Identity) -> dict[str, Any]:
        where = {"session_id": chance.choice(["s0", "s1"]), "turn": chance.randint(1, 6)}
        return {"store": "conversation", "content": text(person), "speaker": mark(person)} | where

    def wanted() -> dict[str, Any]:
        filters = chance.choice([
            {}, {}, {"stores": ["conversation"]}, {"tags": ["home"]}, {"session_id": "s1"}, {"trust": ["user"]},
            {"kinds": ["", "user"], "until": "2100-01-01"}, {"since": "2000-01-01", "stores": ["user_memory"]},
        ])  # fmt: skip
        as_of = chance.choice([None, None, began + timedelta(seconds=chance.random() * 10)])
        return {"filters": filters, "as_of": as_of}

    def operation(person: Identity) -> tuple[str, dict[str, Any]]:
        any_memory, any_run = chance.choice(memory_ids), chance.choice(run_ids)
        run = a_run(
            text(person),
            run_id=any_run if chance.random() < 0.2 else f"r{len(run_ids)}",
            exposures=[{"memory_id": any_memory, "version": 1}],
            outcomes=[{"kind": "reward", "succeeded": chance.random() < 0.5}],
        )
        question = chance.choice(["zq", "tea", mark(chance.choice(people)), "cello rome billing"])
        vector = chance.choice([{}, {"question_embedding": "[1,0]", "embedding_model": "m"}])
        choices: list[tuple[str, dict[str, Any]]] = [
            ("upsert_learning", {"learning": learning(person), "memory_limit": chance.choice([None, 5])}),
            ("upsert_learnings", {"learnings": [learning(person), learning(person)]}),
            ("upsert_learnings", {"learnings": [learning(person) | {"action": "retire", "memory_id": any_memory}]}),
            ("record_run", {"run": run}),
            ("recall_context", {"question": question, **vector}),
            ("upsert_learning", {"learning": turn(person)}),
            ("upsert_learnings", {"learnings": [turn(person), learning(person)]}),
            ("recall_context", {"question": question, "stores": ["user_memory", "conversation"]}),
            ("match_memories", {"question": question, "memory_limit": 50, **vector}),
            ("match_memories", {"question": question, "memory_limit": 50, **vector, **wanted()}),
            ("get_learning", {"the_memory_id": any_memory}),
            ("get_learnings", {"wanted": chance.choice([{}, {"store": "user_memory"}, {"session_id": "s1"}])}),
            ("pending_learning", {}),
            ("memories_without_embedding", {"model": "m"}),
            ("store_embeddings", {"model": "m", "embeddings": [
                {"memory_number": chance.randrange(1, 500), "embedding": "[1,0]"}]}),
            ("apply_learning", {"run_ids": [any_run], "operations": [learning(person)],
                                "expected_version": chance.randrange(5)}),
            ("get_run", {"the_run_id": any_run}),
            ("list_runs", {"wanted": chance.choice([{}, {"user_id": "u1"}, {"failed": True}])}),
            ("list_users", {}),
            ("learning_status", {}),
        ]  # fmt: skip
        if chance.random() < 0.15:
            choices = [
                ("delete_learning", {"the_memory_id": any_memory}),
                ("delete_learnings", {"the_memory_ids": chance.choices(memory_ids, k=3)}),
                ("clear_learnings", {"the_store": "user_profile"}),
                ("erase_user", {}),
                ("import_runs", {"runs": [run]}),
            ]
        return chance.choice(choices)

    of_the_tenant = {"get_run", "list_runs", "list_users", "learning_status", "import_runs", "erase_user"}
    for _ in range(6000):
        person = chance.choice(people)
        function, arguments = operation(person)
        try:
            answer = await database.call(function, person, **arguments)
        except LearningError as error:
            answer = str(error)
        said = json.dumps(answer)
        seen = set(said.split("zq")[1:])
        allowed = (
            f"{person.tenant_id}u" if function in of_the_tenant else f"{person.tenant_id}{person.user_id}qz"
        )
        if function != "erase_user":
            assert all(part.startswith(allowed) for part in seen), (function, person, said[:2000])
        answered += bool(seen)
        if function.startswith("upsert") and not isinstance(answer, str):
            memory_ids += [r["memory_id"] for r in (answer if isinstance(answer, list) else [answer])]
        if function == "record_run" and not isinstance(answer, str):
            run_ids.append(answer["run_id"])
    assert answered > 500, "the answers must show something to leak"
    for table, owner in (("agent_memory", "owner_id"), ("agent_run", "user_id")):
        strangers = rows(
            learning_database.url,
            f"SELECT t::text FROM {table} t WHERE position('zq' IN t::text) > 0 "
            f"AND position('zq' || tenant_id || {owner} || 'qz' IN t::text) = 0",
        )
        assert strangers == [], table
    crossed = rows(
        learning_database.url,
        "SELECT 1 FROM agent_memory_evidence e JOIN agent_memory m USING (tenant_id, memory_id, version) "
        "WHERE e.owner_id <> m.owner_id",
    )
    assert crossed == []


# Callers with a user's token, and with the public key


async def test_a_users_token_is_its_own_identity_whatever_it_says(
    database: PostgresDatabase, learning_database: ThrowawayDatabase
) -> None:
    await _fill(database, ADA, "zqada")
    await _fill(database, BOB, "zqbob")
    await _fill(database, BOB.with_(tenant_id="t2"), "zqforeign")
    adas = await database.call("get_learnings", ADA)

    with _as_role(learning_database.url, "authenticated", _claims("bob")) as connection:
        for told in (ADA, BOB, BOB.with_(tenant_id="t2"), ADA.with_(tenant_id="t2"), None):
            known = _call(connection, "recall_context", told, question="zqada zqbob zqforeign tea")
            assert [item["content"] for item in known["memories"]] == ["zqbob tea"], told
            listed = _call(connection, "get_learnings", told)
            assert [(item["tenant_id"], item["owner_id"]) for item in listed] == [("default", "bob")]
            matched = _call(connection, "match_memories", told, question="tea")
            assert [item["content"] for item in matched] == ["zqbob tea"]
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                _call(connection, "match_memories", told, question="tea", the_scope="tenant")
            assert _call(connection, "get_learning", told, the_memory_id=adas[0]["memory_id"]) is None
            assert _call(connection, "delete_learning", told, the_memory_id=adas[0]["memory_id"]) is False
        assert _call(connection, "upsert_learning", ADA, learning=memory("zqnew"))["status"] == "created"
        assert _call(connection, "record_run", ADA, run=a_run(run_id="of-token"))["recorded"]
        assert _call(connection, "clear_learnings", ADA) == 2
    assert await database.call("get_learnings", ADA) == adas
    assert await database.call("get_learnings", BOB) == []
    assert (await database.call("get_run", ADA, the_run_id="of-token"))["user_id"] == "bob"
    assert [m["content"] for m in await database.call("get_learnings", BOB.with_(tenant_id="t2"))] == [
        "zqforeign tea"
    ]

    with _as_role(learning_database.url, "authenticated", _claims("bob", "t2")) as connection:
        known = _call(connection, "recall_context", ADA, question="tea")
        assert [item["content"] for item in known["memories"]] == ["zqforeign tea"]


@pytest.mark.parametrize(
    "claims",
    [
        None,
        "",
        {},
        {"role": "authenticated"},
        {"sub": "", "role": "authenticated"},
        {"sub": None, "app_metadata": {"tenant_id": "default"}},
        {"user_metadata": {"sub": "ada"}},
    ],
)
async def test_a_token_that_names_nobody_is_nobody(
    database: PostgresDatabase, learning_database: ThrowawayDatabase, claims: dict[str, Any] | str | None
) -> None:
    await _fill(database, ADA, "zqada")
    before = everything_stored(learning_database.url)
    with _as_role(learning_database.url, "authenticated", claims) as connection:
        assert _call(connection, "get_learnings", ADA) == []
        assert _call(connection, "recall_context", ADA, question="tea")["memories"] == []
        for function in ("upsert_learning", "record_run", "clear_learnings"):
            with pytest.raises(psycopg.Error) as refused:
                _call(connection, function, ADA, **FOR_USERS[function])
            assert refused.value.sqlstate == "PT403"
    assert everything_stored(learning_database.url) == before


async def test_a_token_that_calls_itself_a_server_is_still_a_user(
    database: PostgresDatabase, learning_database: ThrowawayDatabase
) -> None:
    await _fill(database, ADA, "zqada")
    for role in ("service_role", "agent_server", "postgres"):
        claims = _claims("bob") | {"role": role}
        with _as_role(learning_database.url, "authenticated", claims) as connection:
            assert _call(connection, "get_learnings", ADA) == []


@pytest.mark.parametrize("role", ["authenticated", "anon"])
async def test_a_servers_key_with_a_users_claims_acts_for_that_user(
    database: PostgresDatabase, learning_database: ThrowawayDatabase, role: str
) -> None:
    await _fill(database, ADA, "zqada")
    await _fill(database, BOB, "zqbob")
    with _as_role(learning_database.url, "service_role", _claims("bob") | {"role": role}) as connection:
        listed = _call(connection, "get_learnings", ADA)
        assert [item["content"] for item in listed] == ["zqbob tea"]
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            _call(connection, "list_users", ADA)
    with _as_role(learning_database.url, "service_role", {"role": "service_role"}) as connection:
        listed = _call(connection, "get_learnings", ADA)
        assert [item["content"] for item in listed] == ["zqada tea"]


async def test_a_user_may_not_call_what_is_for_servers(learning_database: ThrowawayDatabase) -> None:
    with _as_role(learning_database.url, "authenticated", _claims("ada")) as connection:
        for function, arguments in (FOR_SERVERS | WITHOUT_IDENTITY).items():
            with pytest.raises(psycopg.errors.InsufficientPrivilege, match="permission denied for function"):
                _call(connection, function, ADA, **arguments)


async def test_the_public_key_may_call_nothing_and_touch_no_table(
    database: PostgresDatabase, learning_database: ThrowawayDatabase
) -> None:
    await _fill(database, ADA, "zqada")
    for role, claims in (("anon", None), ("anon", {"role": "anon"}), ("anon", _claims("ada"))):
        with _as_role(learning_database.url, role, claims) as connection:
            for function, arguments in ALL.items():
                with pytest.raises(psycopg.errors.InsufficientPrivilege):
                    _call(connection, function, ADA, **arguments)
    for role in ("anon", "authenticated", "service_role"):
        with _as_role(learning_database.url, role, _claims("ada")) as connection:
            for table in OUR_TABLES:
                with pytest.raises(psycopg.errors.InsufficientPrivilege):
                    connection.execute(sql.SQL("SELECT FROM {}").format(sql.Identifier(table)))
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                connection.execute("SELECT agent_private.enter('{}')")
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                connection.execute("SET ROLE agent_app")


async def test_a_user_may_not_write_for_more_than_themselves(
    database: PostgresDatabase, learning_database: ThrowawayDatabase
) -> None:
    everywhere = await database.call("upsert_learning", ADA, learning=memory("zqtenant", scope="tenant"))
    agents = await database.call("upsert_learning", ADA, learning=memory("zqagent", scope="agent"))
    query = "SELECT m::text FROM agent_memory m ORDER BY memory_number"
    before = rows(learning_database.url, query)
    with _as_role(learning_database.url, "authenticated", _claims("bob")) as connection:
        for scope in ("tenant", "agent"):
            with pytest.raises(psycopg.Error):
                _call(connection, "upsert_learning", ADA, learning=memory("zqmine", scope=scope))
            memory_id = (everywhere if scope == "tenant" else agents)["memory_id"]
            retire = {"action": "retire", "store": "user_memory", "scope": scope, "memory_id": memory_id}
            with pytest.raises(psycopg.Error):
                _call(connection, "upsert_learnings", ADA, learnings=[retire])
        assert _call(connection, "delete_learning", ADA, the_memory_id=everywhere["memory_id"]) is False
        assert _call(connection, "get_learning", ADA, the_memory_id=agents["memory_id"]) is None
    assert rows(learning_database.url, query) == before


async def test_tables_of_the_callers_own_do_not_stand_in_for_ours(
    database: PostgresDatabase, learning_database: ThrowawayDatabase
) -> None:
    await _fill(database, BOB, "zqbob")
    with _as_role(learning_database.url, "authenticated", _claims("bob")) as connection:
        connection.execute("CREATE TEMP TABLE agent_memory AS SELECT 'zqfake'::text AS content")
        connection.execute("CREATE TEMP TABLE agent_scope AS SELECT 'zqfake'::text AS owner_id")
        connection.execute(
            "CREATE FUNCTION pg_temp.current_setting(text, boolean) RETURNS text LANGUAGE sql AS $$ SELECT 'ada' $$"
        )
        connection.execute("SET search_path = pg_temp, public")
        listed = _call(connection, "get_learnings", ADA)
        assert [item["content"] for item in listed] == ["zqbob tea"]
        known = _call(connection, "recall_context", ADA, question="tea")
        assert [item["content"] for item in known["memories"]] == ["zqbob tea"]


@contextmanager
def _who_may_create_in(url: str, schema: str) -> Iterator[psycopg.Connection[Any]]:
    """A connection of a role that has nothing but the right to make things in a schema."""
    role = sql.Identifier(f"maker_{secrets.token_hex(4)}")
    with psycopg.connect(url, autocommit=True) as owner:
        owner.execute(sql.SQL("CREATE ROLE {} NOLOGIN").format(role))
        owner.execute(sql.SQL("GRANT CREATE, USAGE ON SCHEMA {} TO {}").format(sql.Identifier(schema), role))
        try:
            with psycopg.connect(url, autocommit=True) as connection:
                connection.execute(sql.SQL("SET ROLE {}").format(role))
                yield connection
        finally:
            owner.execute(sql.SQL("DROP OWNED BY {} CASCADE").format(role))
            owner.execute(sql.SQL("DROP ROLE {}").format(role))


async def test_an_operator_of_somebody_who_may_create_in_public_is_not_run_by_our_functions(
    database: PostgresDatabase, learning_database: ThrowawayDatabase
) -> None:
    await _fill(database, ADA, "zqada")
    with _who_may_create_in(learning_database.url, "public") as maker:
        for left, right, result in (("int", "float8", "$1::float8"), ("bigint", "float8", "$1::float8")):
            maker.execute(
                f"CREATE FUNCTION public.planted({left}, {right}) RETURNS float8 LANGUAGE plpgsql AS "
                f"$$ BEGIN RAISE EXCEPTION 'planted code runs as %', current_user; RETURN {result}; END $$"
            )
            for operator in ("+", "-", "*", "/"):
                maker.execute(
                    f"CREATE OPERATOR public.{operator} (LEFTARG = {left}, RIGHTARG = {right}, "
                    "FUNCTION = public.planted)"
                )
        known = await database.call("recall_context", ADA, question="zqada tea")
        assert [item["content"] for item in known["memories"]] == ["zqada tea"]
        found = await database.call(
            "match_memories", ADA, question="tea", question_embedding="[1,2]", embedding_model="m"
        )
        assert [item["content"] for item in found] == ["zqada tea"]


async def test_a_function_of_somebody_who_may_create_in_public_is_not_run_by_the_worker(
    database: PostgresDatabase, learning_database: ThrowawayDatabase
) -> None:
    await database.call("record_run", ADA, run=a_run("I like tea."))
    machine = LearningMachine(settings=learning_database.settings)
    with _who_may_create_in(learning_database.url, "public") as maker:
        maker.execute(
            "CREATE FUNCTION public.now() RETURNS timestamptz LANGUAGE plpgsql AS "
            "$$ BEGIN RAISE EXCEPTION 'planted code runs as %', current_user; END $$"
        )
        async with queue_app(learning_database.url, [machine]) as app:
            await app.run_worker_async(wait=False, install_signal_handlers=False)
    await machine.aclose()
    assert await database.call("get_learnings", ADA, wanted={"store": "conversation"}) != []
    assert rows(learning_database.url, "SELECT status::text FROM agent_queue.procrastinate_jobs") in (
        [],
        [("succeeded",)],
    )


async def test_the_public_key_cannot_set_the_numbers_of_memories_back(catalogue: str) -> None:
    rights = rows(
        catalogue,
        """
        SELECT r.rolname::text, c.relname::text
        FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace,
             (VALUES ('public'), ('anon'), ('authenticated'), ('service_role')) AS r (rolname)
        WHERE n.nspname IN ('public', 'agent_private') AND c.relkind = 'S'
          AND has_sequence_privilege(r.rolname, c.oid, 'USAGE, SELECT, UPDATE')
        """,
    )
    assert rights == []


async def test_a_user_cannot_claim_to_have_been_shown_what_is_somebody_elses(
    database: PostgresDatabase, learning_database: ThrowawayDatabase
) -> None:
    secret = await database.call("upsert_learning", ADA, learning=memory("zqsecret of Ada"))
    own = await database.call("upsert_learning", BOB, learning=memory("Bob's own"))
    shown = [
        {"memory_id": own["memory_id"], "version": 1},
        {"memory_id": secret["memory_id"], "version": 1},
        {"memory_id": own["memory_id"], "version": 2},
        {"memory_id": SOME_ID, "version": 1},
    ]
    with _as_role(learning_database.url, "authenticated", _claims("bob")) as connection:
        _call(connection, "record_run", None, run=a_run(run_id="spy", exposures=shown))
    await database.call("record_run", BOB, run=a_run(run_id="told", exposures=shown))
    await database.call("import_runs", BOB, runs=[a_run(run_id="imported", exposures=shown)])

    for run_id in ("spy", "told", "imported"):
        run = await database.call("get_run", ADA, the_run_id=run_id)
        assert run["exposures"] == [{"memory_id": own["memory_id"], "version": 1, "content": "Bob's own"}], (
            run_id
        )
    # A row that is there all the same shows no content of another user.
    rows(
        learning_database.url,
        "INSERT INTO agent_exposure VALUES ('default', 'spy', 'bob', %s::uuid, 1, 9)",
        secret["memory_id"],
    )
    run = await database.call("get_run", ADA, the_run_id="spy")
    assert [item["content"] for item in run["exposures"]] == ["Bob's own", None]


async def test_evidence_does_not_name_runs_of_others(
    database: PostgresDatabase, learning_database: ThrowawayDatabase
) -> None:
    await database.call("record_run", ADA, run=a_run(run_id="adas"))
    await database.call("record_run", BOB, run=a_run(run_id="bobs"))
    await database.call("import_runs", Identity(), runs=[a_run(run_id="nobodys")])
    await database.call("record_run", ADA.with_(tenant_id="t2"), run=a_run(run_id="of-another-tenant"))
    evidence = [{"run_id": name} for name in ("adas", "bobs", "nobodys", "goes-on", "of-another-tenant")]
    with _as_role(learning_database.url, "authenticated", _claims("bob")) as connection:
        written = _call(connection, "upsert_learning", None, learning=memory("zqforged", evidence=evidence))

    kept = await database.call("get_learning", BOB, the_memory_id=written["memory_id"])
    assert {item["run_id"] for item in kept["evidence"]} == {"bobs", "goes-on", "of-another-tenant"}
    # What was named before it was recorded is not shown as learned from it either.
    await database.call("record_run", ADA, run=a_run(run_id="goes-on"))
    for run_id in ("adas", "nobodys", "goes-on"):
        assert (await database.call("get_run", ADA, the_run_id=run_id))["learned"] == []
    assert [m["content"] for m in (await database.call("get_run", ADA, the_run_id="bobs"))["learned"]] == [
        "zqforged"
    ]


async def test_a_users_token_says_nothing_about_the_queue_and_the_outcome(
    database: PostgresDatabase, learning_database: ThrowawayDatabase
) -> None:
    asked = {
        "queue": "of-somebody",
        "quiet_seconds": 100_000,
        "outcomes": [{"kind": "reward", "succeeded": True}],
    }
    with _as_role(learning_database.url, "authenticated", _claims("bob")) as connection:
        _call(connection, "record_run", None, run=a_run(run_id="r1") | asked)

    ((queue, is_soon),) = rows(
        learning_database.url,
        "SELECT queue_name, scheduled_at < now() + interval '60 seconds' FROM procrastinate_jobs",
    )
    assert (queue, is_soon) == ("learning", True)
    assert (await database.call("get_run", BOB, the_run_id="r1"))["outcomes"] == []


# The identity of a call ends with it

_SETTINGS = ("agent.tenant_id", "agent.user_id", "agent.agent_id", "agent.reach", "role")


def _settings(connection: psycopg.Connection[Any]) -> list[str]:
    row = connection.execute(
        "SELECT ARRAY(SELECT coalesce(current_setting(name, true), '') FROM unnest(%s::text[]) AS name)",
        (list(_SETTINGS),),
    ).fetchone()
    assert row is not None
    return list(row[0])


@pytest.mark.parametrize("is_set_before", [False, True])
async def test_the_identity_does_not_outlive_its_call(
    learning_database: ThrowawayDatabase, is_set_before: bool
) -> None:
    with psycopg.connect(learning_database.url) as connection:
        existing = _existing(connection)
        connection.commit()
        for function, arguments in (existing | ALL | existing).items():  # those first: one of ALL erases
            if is_set_before:
                for name in _SETTINGS[:4]:
                    connection.execute("SELECT set_config(%s, 'before', true)", (name,))
            before = _settings(connection)
            assert before == (["before"] * 4 if is_set_before else [""] * 4) + ["none"]

            _call(connection, function, ADA, **arguments)
            assert _settings(connection) == before, f"{function}, in the same transaction"
            if function not in WITHOUT_IDENTITY and function != "retry_learning":
                with pytest.raises(psycopg.Error), connection.transaction():
                    _call(connection, function, ADA, **_broken(function))
                assert _settings(connection) == before, f"{function}, after an error"
            connection.commit()
            assert _settings(connection)[:4] == [""] * 4, function


def _existing(connection: psycopg.Connection[Any]) -> dict[str, dict[str, Any]]:
    """Arguments for the functions that raise where the row they name does not exist."""

    def ask(**more: Any) -> dict[str, Any]:
        request = FOR_SERVERS["request_approval"]["request"] | more
        found: dict[str, Any] = _call(connection, "request_approval", ADA, request=request)
        return found

    def ticket(**more: Any) -> str:
        made = ask(approved_by="policy:1", **more)
        claimed = _call(
            connection,
            "claim_approval",
            ADA,
            the_approval_id=made["approval_id"],
            args_hash="a" * 64,
            claimed_by="p",
        )
        return str(claimed["ticket"])

    code = {"name": "t", "code": "1", "code_hash": "a" * 64, "author": "eve"}
    _call(connection, "save_tool_version", ADA, tool=code)
    rule = {
        "tool": "t",
        "fingerprint": "f",
        "tables": [],
        "max_rows": 1,
        "made_by": "eve",
        "expires_at": "2999-01-01",
    }
    refused = {"state": "refused", "decision": "refused", "tool": "t", "risk": "READ"}
    made = _call(connection, "save_standing_rule", ADA, rule=rule)
    approval = ask()
    the_id = approval["approval_id"]
    paused = ask()["approval_id"]
    _call(connection, "save_continuation", ADA, the_approval_id=paused, payload="p", mac="m")
    _call(connection, "record_run", ADA, run=a_run(run_id="judged"))
    return {
        "finish_continuation": {"the_approval_id": paused, "the_key": "k", "entry": refused},
        "record_outcomes": {"the_run_id": "judged", "outcomes": [{"kind": "k"}]},
        "close_approval": {"the_approval_id": the_id, "the_state": "cancelled", "closed_by": "eve"},
        "attach_interrupt": {"batch_id": approval["batch_id"], "interrupt": {}},
        "save_standing_rule": {"rule": rule},
        "revoke_standing_rule": {"the_rule_id": made["rule_id"], "revoked_by": "eve"},
        "save_continuation": {"the_approval_id": the_id, "payload": "p", "mac": "m"},
        "claim_approval": {"the_approval_id": the_id, "args_hash": "a" * 64, "claimed_by": "p"},
        "finish_execution": {"ticket": ticket(), "entry": {"state": "executed"}},
        "approve_tool_version": {
            "ticket": ticket(
                kind="tool_version", arguments={"name": "t", "version": 1, "code_hash": "a" * 64}
            ),
            "tool_name": "t",
            "version": 1,
            "code_hash": "a" * 64,
        },
    }


def _broken(function: str) -> dict[str, Any]:
    """Arguments that make it fail after it has taken on the identity."""
    broken: dict[str, dict[str, Any]] = {
        "recall_context": {"question": "tea", "question_embedding": "no vector", "embedding_model": "m"},
        "match_memories": {"question": "tea", "question_embedding": "no vector", "embedding_model": "m"},
        "record_run": {"run": a_run(status="no status")},
        "upsert_learning": {"learning": memory("")},
        "upsert_learnings": {"learnings": [memory("fine"), memory("")]},
        "get_learnings": {"wanted": {}, "memory_limit": -1},
        "pending_learning": {"run_limit": -1},
        "apply_learning": {"run_ids": [], "operations": [memory("")], "expected_version": 0},
        "memories_without_embedding": {"model": "m", "memory_limit": -1},
        "store_embeddings": {"model": "m", "embeddings": {"no": "list"}},
        "arrange_embeddings": {"model": "m", "dimensions": 2, "the_scope": "nowhere"},
        "owners_without_embedding": {"model": "m", "owner_limit": -1},
        "import_runs": {"runs": [a_run(status="no status")]},
        "list_runs": {"run_limit": -1},
    }
    return broken.get(function, {"the_memory_id": "no uuid", "the_memory_ids": "no list", "nobody": 1})


async def test_an_error_caught_inside_a_transaction_leaves_no_identity(
    learning_database: ThrowawayDatabase,
) -> None:
    with psycopg.connect(learning_database.url) as connection:
        connection.execute("""
            DO $$
            BEGIN
                PERFORM public.upsert_learning('{"tenant_id": "t", "user_id": "u"}', '{"store": "s", "content": ""}');
            EXCEPTION WHEN OTHERS THEN NULL;
            END
            $$
        """)
        assert _settings(connection)[:4] == [""] * 4
        connection.execute("SET ROLE agent_app")
        assert connection.execute("SELECT count(*) FROM agent_scope").fetchone() == (0,)


async def test_connections_go_back_to_the_pool_without_an_identity(
    database: PostgresDatabase, learning_database: ThrowawayDatabase
) -> None:
    await _fill(database, ADA, "zqada")
    for person in (ADA, BOB, Identity()):
        for function, arguments in FOR_USERS.items():
            with suppress(LearningError):
                await database.call(function, person, **arguments)
            assert await database.call("get_learnings", Identity()) == []
    pool = database._pool
    assert pool is not None

    async def look() -> list[Any]:
        connection = await pool.take(timeout=10)
        try:
            query = "SELECT coalesce(current_setting(name, true), '') FROM unnest(%s::text[]) AS name"
            return await (await connection.execute(query, (list(_SETTINGS[:4]),))).fetchall()
        finally:
            await pool.give_back(connection)

    assert await portal().run(look()) == [("",)] * 4
