"""The benign queries of the safety benchmark are real: each one runs, as the gate prints it, over Pagila's schema."""

from __future__ import annotations

import os
import re
from pathlib import Path

import psycopg
import pytest

from agent.execution.sql_policy import classify
from agent.testing.throwaway import throwaway_database
from benchmarks.safety.benign import benign_queries, pagila_scope

SCHEMA = Path(os.environ.get("LEARNING_DATA", "../shared/data")) / "schemas" / "pagila_schema.sql"


@pytest.mark.skipif(not SCHEMA.exists(), reason="Pagila's schema is not here")
def test_every_query_runs_over_the_schema() -> None:
    # The dump's own statements about owners and about its session are not for this server.
    schema = re.sub(
        r"^(?:ALTER .* OWNER TO .*|COMMENT ON .*);$", "", SCHEMA.read_text("utf-8"), flags=re.MULTILINE
    )
    failed = []
    with (
        throwaway_database(migrated=False) as database,
        psycopg.connect(database.url, autocommit=True) as connection,
    ):
        connection.execute(schema.encode())
        connection.execute("SET search_path = ''")
        # What plainto_tsquery(text) takes is the cluster's own choice.
        connection.execute("SET default_text_search_config = 'pg_catalog.english'")
        version = connection.info.server_version // 10_000
        queries = [query for query in benign_queries() if query.first_version <= version]
        for query in queries:
            try:
                connection.execute(classify(query.sql, pagila_scope()).text.encode())
            except psycopg.Error as error:
                failed.append(f"{query.sql}: {error}")
    assert len(queries) >= 190
    assert failed == []
