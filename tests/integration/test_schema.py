"""The schema as files and as a database has it: one says the other, and each function is told about and pinned."""

from __future__ import annotations

import re
import shutil
import subprocess
from importlib import resources
from pathlib import Path

import psycopg
import pytest

from agent import Identity
from agent.database.migrations import migrate
from agent.database.postgres import PostgresDatabase
from agent.testing.throwaway import ThrowawayDatabase
from tests.integration.rows import rows
from tests.supabase_layout import SupabaseLayout

_SUPABASE = Path(__file__).parents[2] / "supabase"
_SCHEMAS = sorted((_SUPABASE / "schemas").glob("*.sql"))
_OURS = [path for path in _SCHEMAS if "queue" not in path.name]
# What may write to the queue, which agent_app has no rights on.
_BRIDGES = {
    "enqueue_learning",
    "enqueue_tick",
    "expedite_jobs",
    "forget_jobs",
    "order_sessions",
    "queue_state",
    "queue_status",
    "queue_totals",
    "reorder_learning",
    "rescue_jobs",
    "retry_failed_jobs",
    "watched_server",
}
# What reads the application's tables does so with the rights of who calls.
_WITH_OWN_RIGHTS = {"code_of_others", "discover_app_structure", "match_app_values", "sample_app_table"}
# Expressions, read once, when they are made, and put in the place of their call.
_INLINED = {
    "fits", "impact", "is_question", "place_of", "are_looked_up", "postings", "hits",
    "as_vector", "vector_dimensions", "unit_vector", "divergence", "sign_code", "code_distance",
}  # fmt: skip
_CREATE = re.compile(r"^CREATE (?:OR REPLACE )?FUNCTION (?P<name>[\w.]+)\(", re.MULTILINE)


def test_the_migrations_are_what_the_schema_files_give(tmp_path: Path) -> None:
    copy = tmp_path / "supabase"
    shutil.copytree(_SUPABASE, copy)
    made = sorted((copy / "migrations").glob("*.sql"))
    for path in made:
        path.unlink()
    subprocess.run(["sh", "build_migrations.sh"], cwd=copy, check=True)

    assert sorted((copy / "migrations").glob("*.sql")) == made
    for path in made:
        assert path.read_bytes() == (_SUPABASE / "migrations" / path.name).read_bytes(), (
            "run supabase/build_migrations.sh"
        )
    text = "".join(path.read_text() for path in made)
    positions = [text.index(f"-- ---- schemas/{path.name}\n") for path in _SCHEMAS]
    assert positions == sorted(positions)


def test_the_queue_is_the_schema_of_the_installed_procrastinate() -> None:
    ours = (_SUPABASE / "schemas" / "05_queue.sql").read_text()
    theirs = resources.files("procrastinate").joinpath("sql", "schema.sql").read_text().strip()

    assert theirs in ours
    around = ours.replace(theirs, "")
    code = [line for line in around.splitlines() if line.strip() and not line.startswith("--")]
    assert not [line for line in code if re.search(r"CREATE (TABLE|FUNCTION|TYPE|TRIGGER|INDEX)", line)]


@pytest.mark.parametrize("path", _OURS, ids=lambda path: path.name)
def test_every_function_is_told_about_in_the_lines_above_it(path: Path) -> None:
    text = path.read_text()
    found = list(_CREATE.finditer(text))
    assert found or path.name in ("60_grants.sql", "85_execution_grants.sql")
    for match in found:
        above = text[: match.start()].rstrip("\n").rsplit("\n", 1)[-1]
        assert above.startswith("-- "), f"{path.name}: no sentence above {match['name']}"


def test_every_function_of_the_files_is_in_the_database_and_no_other(
    learning_database: ThrowawayDatabase,
) -> None:
    in_files = {name for path in _OURS for name in _CREATE.findall(path.read_text())}
    there = rows(
        learning_database.url,
        """
        SELECT n.nspname || '.' || p.proname FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace
        WHERE n.nspname IN ('public', 'agent_private')
          AND NOT EXISTS (SELECT FROM pg_depend d WHERE d.objid = p.oid AND d.deptype = 'e')
        """,
    )
    assert {name for (name,) in there} == in_files
    assert len(there) == len(in_files), "no function has two forms: PostgREST could not tell them apart"


def test_every_function_has_a_pinned_search_path_that_ends_with_the_temporary_schema(
    learning_database: ThrowawayDatabase,
) -> None:
    found = rows(
        learning_database.url,
        """
        SELECT p.proname::text, p.prosecdef, p.proconfig FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace
        WHERE n.nspname IN ('public', 'agent_private')
          AND NOT EXISTS (SELECT FROM pg_depend d WHERE d.objid = p.oid AND d.deptype = 'e')
        """,
    )
    assert len(found) > 30
    for name, _, options in found:
        paths = [option for option in options or () if option.startswith("search_path=")]
        if name in _INLINED:
            assert paths == [], f"{name} cannot be inlined"
            continue
        assert len(paths) == 1, f"{name} has no pinned search_path"
        # First where the temporary schema is not named: then a caller's table could stand in for ours. No schema where
        # others may create things; the functions of the queue name their own tables without a schema.
        allowed = {"search_path=pg_catalog, pg_temp"}
        if name in _BRIDGES:
            allowed.add("search_path=pg_catalog, agent_queue, pg_temp")
        assert paths[0] in allowed, name


def test_functions_run_as_agent_app_and_only_the_bridges_to_the_queue_as_its_owner(
    learning_database: ThrowawayDatabase,
) -> None:
    found = rows(
        learning_database.url,
        """
        SELECT n.nspname::text, p.proname::text, p.prosecdef, pg_get_userbyid(p.proowner)::text
        FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace
        WHERE n.nspname IN ('public', 'agent_private')
          AND NOT EXISTS (SELECT FROM pg_depend d WHERE d.objid = p.oid AND d.deptype = 'e')
        """,
    )
    by_others = {name for _, name, _, owner in found if owner != "agent_app"}
    assert by_others == _BRIDGES | {"publish", "guard", "own_scope"}
    definers = {name for schema, name, definer, _ in found if definer and schema == "agent_private"}
    assert definers == _BRIDGES | {"sql_tenant"}, (
        "row policies call it for logins that can read no table of ours"
    )
    assert {
        name for schema, name, definer, _ in found if schema == "public" and not definer
    } == _WITH_OWN_RIGHTS


def test_every_definer_that_is_not_agent_app_gives_its_reason() -> None:
    text = "\n".join(path.read_text() for path in _OURS)
    for name in _BRIDGES:
        start = text.index(f"CREATE FUNCTION agent_private.{name}(")
        header = text[:start].rstrip("\n").rpartition("\n\n")[2]
        assert "agent_app has no rights on the queue" in " ".join(
            line.removeprefix("-- ") for line in header.splitlines()
        ), name


def test_every_table_and_every_column_a_reader_would_ask_about_has_a_comment(
    learning_database: ThrowawayDatabase,
) -> None:
    silent = rows(
        learning_database.url,
        """
        SELECT c.relname::text FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
        WHERE n.nspname = 'public' AND c.relkind = 'r' AND obj_description(c.oid, 'pg_class') IS NULL
        """,
    )
    assert silent == []


def test_every_foreign_key_and_scope_is_found_by_an_index(learning_database: ThrowawayDatabase) -> None:
    unindexed = rows(
        learning_database.url,
        """
        SELECT c.conrelid::regclass::text, c.conname::text FROM pg_constraint c
        JOIN pg_namespace n ON n.oid = c.connamespace
        WHERE c.contype = 'f' AND n.nspname = 'public'
          AND NOT EXISTS (
              SELECT FROM pg_index i WHERE i.indrelid = c.conrelid AND i.indpred IS NULL
                AND (i.indkey::int2[])[0:cardinality(c.conkey) - 1] @> c.conkey)
        """,
    )
    assert unindexed == []


def test_no_text_builds_a_statement_from_what_a_caller_says() -> None:
    for path in _OURS:
        for function in re.split(r"(?m)^CREATE (?:OR REPLACE )?FUNCTION ", path.read_text())[1:]:
            name = function.partition("(")[0]
            body = function.split("$$")[1] if "$$" in function else ""
            if re.search(r"\bEXECUTE\s+(format|'|\w+\s*\|\|)", body):
                samplers = {f"public.{sampler}" for sampler in _WITH_OWN_RIGHTS}  # identifiers alone, by %I
                helpers = {f"agent_private.{helper}" for helper in ("publish", "guard", "own_scope")}
                assert name in helpers | samplers, name


def test_the_expressions_over_pgvector_are_put_in_the_place_of_their_call(
    learning_database: ThrowawayDatabase,
) -> None:
    with psycopg.connect(learning_database.url) as connection:
        connection.execute("SET ROLE agent_app")
        connection.execute("SET search_path = pg_catalog, pg_temp")
        plan = connection.execute(
            """
            EXPLAIN (VERBOSE, COSTS OFF)
            SELECT agent_private.divergence(e.embedding, agent_private.unit_vector(agent_private.as_vector('[1]'))),
                   agent_private.code_distance(e.code, agent_private.sign_code(e.embedding)),
                   agent_private.vector_dimensions(agent_private.as_vector(e.model))
            FROM public.agent_memory_embedding e
            """
        ).fetchall()
    text = "\n".join(line for (line,) in plan)
    assert "<#>" in text
    assert "<~>" in text
    assert "agent_private" not in text


async def test_vectors_are_compared_where_pgvector_is_in_a_schema_of_its_own(
    supabase_layout: SupabaseLayout,
) -> None:
    await migrate(supabase_layout.url)
    database = PostgresDatabase(supabase_layout.url)
    ada = Identity(user_id="ada")
    learning = {"store": "user_memory", "content": "Owns a feline"}
    number = (await database.call("upsert_learning", ada, learning=learning))["memory_number"]
    embeddings = [{"memory_number": number, "embedding": "[1,0]"}]
    assert await database.call("store_embeddings", ada, model="m", embeddings=embeddings) == 1
    found = await database.call(
        "match_memories", ada, question="cat?", question_embedding="[0.9,0.1]", embedding_model="m"
    )
    await database.close()
    assert [item["content"] for item in found] == ["Owns a feline"]
