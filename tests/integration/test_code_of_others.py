"""Whoever owns a table has no code run by sampling it: not by expressions, casts, policies nor views."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator

import psycopg
import pytest

from agent.database.postgres import PostgresDatabase
from agent.discovery.pattern_learning import learn_patterns
from agent.discovery.sampling import SampleError, plan_sample
from agent.discovery.storage_sampling import StorageSampler
from agent.discovery.structure import AppStructure
from agent.learning.auto_discover import AutoDiscovery
from agent.testing.throwaway import ThrowawayDatabase
from tests.integration.discovered import execute, table
from tests.integration.rows import rows

_TELLS = """
CREATE FUNCTION theirs.tell() RETURNS void LANGUAGE sql VOLATILE
    AS $$ SELECT pg_notify('code_of_others', current_user::text) $$;
CREATE FUNCTION theirs.same(x text) RETURNS text LANGUAGE plpgsql IMMUTABLE AS $$
BEGIN IF current_user <> '{owner}' THEN PERFORM theirs.tell(); END IF; RETURN x; END $$;
"""
_CAST = """
CREATE FUNCTION theirs.shown(x theirs.{type}) RETURNS text LANGUAGE plpgsql IMMUTABLE
    AS $$ BEGIN RETURN theirs.same('x'); END $$;
CREATE CAST (theirs.{type} AS text) WITH FUNCTION theirs.shown(theirs.{type});
CREATE TABLE theirs.things (id integer PRIMARY KEY, a theirs.{type});
"""
_PLAIN = "CREATE TABLE theirs.things (id integer PRIMARY KEY, a text);"
_WAYS = {
    "expression of an index": _PLAIN + "CREATE INDEX ON theirs.things ((a || theirs.same('x')));",
    "predicate of an index": _PLAIN + "CREATE INDEX ON theirs.things (a) WHERE a <> theirs.same('x');",
    "operator": _PLAIN
    + "CREATE FUNCTION theirs.twice(x text, y text) RETURNS text LANGUAGE plpgsql IMMUTABLE AS"
    " $$ BEGIN RETURN theirs.same(x); END $$;"
    "CREATE OPERATOR theirs.### (FUNCTION = theirs.twice, LEFTARG = text, RIGHTARG = text);"
    "CREATE INDEX ON theirs.things ((a || ('x'::text OPERATOR(theirs.###) 'y'::text)));",
    "statistics": _PLAIN + "CREATE STATISTICS theirs.s ON (a || theirs.same('x')), id FROM theirs.things;",
    "partition key": "CREATE TABLE theirs.things (id integer, a text) PARTITION BY RANGE ((a || theirs.same('x')));"
    "CREATE TABLE theirs.rest PARTITION OF theirs.things DEFAULT;",
    "index of a partition": "CREATE TABLE theirs.things (id integer, a text) PARTITION BY RANGE (id);"
    "CREATE TABLE theirs.rest PARTITION OF theirs.things DEFAULT;"
    "CREATE INDEX ON theirs.rest ((a || theirs.same('x')));",
    "cast of an enum": "CREATE TYPE theirs.mood AS ENUM ('x');" + _CAST.format(type="mood"),
    "cast of a composite": "CREATE TYPE theirs.pair AS (one integer);" + _CAST.format(type="pair"),
    "cast under a domain": "CREATE TYPE theirs.mood AS ENUM ('x');"
    + _CAST.format(type="mood")
    + "CREATE DOMAIN theirs.feeling AS theirs.mood; ALTER TABLE theirs.things ALTER a TYPE theirs.feeling;",
}


@pytest.fixture
async def database(learning_database: ThrowawayDatabase) -> AsyncIterator[PostgresDatabase]:
    database = PostgresDatabase(learning_database.url)
    yield database
    await database.close()


def make_theirs(url: str, statements: str) -> None:
    """A schema whose owner may nothing else, with the table `things` that this makes."""
    owner = f"owner_{secrets.token_hex(4)}"
    execute(
        url,
        f"CREATE ROLE {owner}; CREATE SCHEMA theirs AUTHORIZATION {owner}",
        f"SET ROLE {owner};"
        + _TELLS.replace("{owner}", owner)
        + statements
        + "INSERT INTO theirs.things (id) VALUES (1); RESET ROLE;",
    )


async def structure_of(learning_database: ThrowawayDatabase, database: PostgresDatabase) -> AppStructure:
    discovery = AutoDiscovery(settings=learning_database.settings, database=database)
    return await discovery.discover_app_structure(patterns=False)


@pytest.mark.parametrize("way", _WAYS)
async def test_sampling_runs_no_code_of_the_owner_of_a_table(
    way: str, learning_database: ThrowawayDatabase, database: PostgresDatabase
) -> None:
    make_theirs(learning_database.url, _WAYS[way])
    structure = await structure_of(learning_database, database)
    things = table(structure, "theirs.things")
    with psycopg.connect(learning_database.url, autocommit=True) as listener:
        listener.execute("LISTEN code_of_others")

        learned = await learn_patterns(learning_database.settings, database, structure)
        with pytest.raises(SampleError, match="of another role"):
            await StorageSampler(database, learning_database.settings.discovery_timeout).sample(
                plan_sample(things)
            )

        assert [told.payload for told in listener.notifies(timeout=0.2)] == []
    (problem,) = [problem for problem in learned.problems if problem["object"] == "theirs.things"]
    assert problem["reason"].startswith("reading it would run the function theirs.")


async def test_code_of_ones_own_is_no_reason_to_leave_a_table_out(
    learning_database: ThrowawayDatabase, database: PostgresDatabase
) -> None:
    execute(
        learning_database.url,
        "CREATE FUNCTION plain(x text) RETURNS text LANGUAGE sql IMMUTABLE AS 'SELECT lower(x)';"
        "CREATE TABLE ours (a text); CREATE INDEX ON ours (public.plain(a)); INSERT INTO ours VALUES ('x')",
    )

    learned = await learn_patterns(
        learning_database.settings, database, await structure_of(learning_database, database)
    )

    assert [pattern["table"] for pattern in learned.patterns] == ["public.ours"]


def test_a_policy_with_code_of_others_is_told_to_whom_it_holds(learning_database: ThrowawayDatabase) -> None:
    reader = f"reader_{secrets.token_hex(4)}"
    make_theirs(
        learning_database.url,
        _PLAIN
        + "ALTER TABLE theirs.things ENABLE ROW LEVEL SECURITY;"
        + "CREATE POLICY mine ON theirs.things USING (theirs.same(a) = 'x');",
    )
    rows(learning_database.url, f"CREATE ROLE {reader}; GRANT agent_server TO {reader}")
    with psycopg.connect(learning_database.url, autocommit=True) as connection:
        asked = b"SELECT public.code_of_others('theirs', 'things')"
        past_policies = connection.execute(asked).fetchone()
        connection.execute(f"SET ROLE {reader}".encode())
        by_them = connection.execute(asked).fetchone()

    assert (past_policies, by_them) == ((None,), ("theirs.same",))
