"""What would make the gate lie is found, each with the code that it runs."""

from __future__ import annotations

import json
from typing import Any

import psycopg
import pytest
from typer.testing import CliRunner

from agent.cli import app
from agent.execution.sql_inventory import Finding, inventory
from agent.portal import portal
from agent.settings import current_settings
from agent.testing.throwaway import ThrowawayDatabase

TRAPS = """
CREATE SCHEMA app;
CREATE TABLE app.notes (body text, made_by text);
CREATE FUNCTION app.log(t text) RETURNS text LANGUAGE plpgsql VOLATILE AS
    $$ BEGIN INSERT INTO app.notes VALUES (t); RETURN t; END $$;
CREATE FUNCTION app.lie(i integer) RETURNS integer LANGUAGE plpgsql IMMUTABLE AS
    $$ BEGIN PERFORM app.log('lie'); RETURN i; END $$;
CREATE FUNCTION app.run_sql(q text) RETURNS text LANGUAGE plpgsql SECURITY DEFINER AS
    $$ BEGIN EXECUTE q; RETURN 'ok'; END $$;
CREATE FUNCTION app.plus(a integer, b integer) RETURNS integer LANGUAGE plpgsql AS $$ BEGIN RETURN a + b; END $$;
CREATE OPERATOR app.### (leftarg = integer, rightarg = integer, function = app.plus);
CREATE TYPE app.pair AS (x text);
CREATE FUNCTION app.to_int(p app.pair) RETURNS integer LANGUAGE plpgsql AS $$ BEGIN RETURN 1; END $$;
CREATE CAST (app.pair AS integer) WITH FUNCTION app.to_int(app.pair);
CREATE DOMAIN app.logged AS text CHECK (app.log(VALUE) IS NOT NULL);
CREATE VIEW app.v_audit AS SELECT app.log('view') AS l;
CREATE TABLE app.held (id integer, tenant text DEFAULT app.log('default'));
ALTER TABLE app.held ENABLE ROW LEVEL SECURITY;
CREATE POLICY checked ON app.held USING (app.log(tenant) IS NOT NULL);
CREATE VIEW app.v_held AS SELECT id FROM app.held;
CREATE VIEW app.v_invoker WITH (security_invoker = true) AS SELECT id FROM app.held;
CREATE FUNCTION app.touched() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN NEW; END $$;
CREATE TRIGGER touch BEFORE INSERT ON app.held FOR EACH ROW EXECUTE FUNCTION app.touched();
CREATE FUNCTION app.harmless(i integer) RETURNS integer LANGUAGE sql IMMUTABLE AS $$ SELECT i + 1 $$;
CREATE VIEW app.v_plain AS SELECT app.harmless(1) AS one;
"""


def found(database: ThrowawayDatabase) -> list[Finding]:
    return portal().run_sync(inventory(database.url))


def test_a_database_with_nothing_but_this_package_has_nothing_to_tell(
    learning_database: ThrowawayDatabase,
) -> None:
    assert [finding for finding in found(learning_database) if not finding.name.startswith("auth.")] == []


@pytest.mark.parametrize(
    ("kind", "name", "why"),
    [
        ("definer", "app.run_sql(q text)", "everybody may call it"),
        ("function", "app.lie(i integer)", "declared immutable"),
        ("operator", "app.### (integer, integer)", "calls app.plus"),
        ("cast", "app.pair as integer", "calls app.to_int"),
        ("domain", "app.logged", "calls app.log"),
        ("view", "app.v_audit", "calls app.log"),
        ("view", "app.v_held", "past row level security"),
        ("policy", "checked on app.held", "calls app.log"),
        ("trigger", "touch on app.held", "calls app.touched"),
        ("default", "app.held.tenant", "calls app.log"),
        ("setting", "app.jwt_secret", "every login can read"),
    ],
)
def test_each_way_to_run_code_unseen_is_found(
    learning_database: ThrowawayDatabase, kind: str, name: str, why: str
) -> None:
    with psycopg.connect(learning_database.url, autocommit=True) as connection:
        connection.execute(TRAPS.encode())
        connection.execute(f"ALTER DATABASE {learning_database.name} SET app.jwt_secret = 'x'".encode())

    [finding] = [each for each in found(learning_database) if (each.kind, each.name) == (kind, name)]

    assert why in finding.why
    assert finding.what_to_do


def test_what_is_harmless_is_not_told(learning_database: ThrowawayDatabase) -> None:
    with psycopg.connect(learning_database.url, autocommit=True) as connection:
        connection.execute(TRAPS.encode())

    told = {finding.name for finding in found(learning_database)}

    assert not told & {"app.v_plain", "app.v_invoker", "app.harmless(i integer)"}


def test_the_command_tells_the_same(
    learning_database: ThrowawayDatabase, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    with psycopg.connect(learning_database.url, autocommit=True) as connection:
        connection.execute(TRAPS.encode())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DATABASE_URL", learning_database.url)
    current_settings.cache_clear()
    answer = CliRunner().invoke(app, ["sql", "inventory", "--json"])
    current_settings.cache_clear()

    assert answer.exit_code == 0, answer.output
    assert {each["name"] for each in json.loads(answer.stdout)} >= {"app.v_audit", "app.run_sql(q text)"}
