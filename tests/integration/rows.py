"""What the tests of storage share: rows as a superuser sees them, and the shape of a run."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import psycopg
from psycopg import sql

OUR_TABLES = (
    "agent_memory",
    "agent_memory_evidence",
    "agent_memory_term",
    "agent_memory_past_term",
    "agent_term_count",
    "agent_memory_embedding",
    "agent_scope",
    "agent_run",
    "agent_exposure",
    "agent_outcome",
)
# Rows that only large scopes have.
LARGE_SCOPE_TABLES = ("agent_embedding_list",)
# Rows of approvals, executions and tools, which belong to a tenant and not to a user.
TENANT_TABLES = (
    "approval_batch",
    "human_approval_queue",
    "approval_vote",
    "approval_event",
    "agent_chain",
    "approval_delivery",
    "approval_seen",
    "approval_rule",
    "approval_continuation",
    "agent_execution_log",
    "agent_execution_details",
    "agent_execution_budget",
    "agent_execution_halt",
    "agent_execution_result",
    "agent_tool",
    "agent_text_language",
    "agent_app_pattern",
    "agent_app",
    "agent_app_object",
    "agent_tick",
    "agent_clock",
    "agent_tool_run",
    "agent_tool_mark",
    "agent_tool_recount",
    "agent_tool_call",
    "agent_tool_error",
    "agent_tool_weight",
    "agent_tool_condition",
    "agent_alert",
    "agent_alert_notice",
    "agent_alert_delivery",
    "agent_alert_silence",
    "learning_analytics",
    "agent_reading",
    "agent_reading_hour",
    "agent_sighting",
    "agent_monitor_mark",
)


def rows(url: str, query: str, *values: Any) -> list[tuple[Any, ...]]:
    """The rows of a query, past row level security."""
    with psycopg.connect(url, autocommit=True) as connection:
        # The triggers of the queue name their tables without a schema.
        connection.execute("SET search_path = public, extensions, agent_queue")
        cursor = connection.execute(query.encode(), values or None)
        return cursor.fetchall() if cursor.description else []


def value(url: str, query: str, *values: Any) -> Any:
    """The first value of the first row."""
    return rows(url, query, *values)[0][0]


def counts(url: str) -> dict[str, int]:
    """How many rows each table of ours has, and how many jobs the queue."""
    with psycopg.connect(url) as connection:
        found = {}
        for table in (*OUR_TABLES, "agent_queue.procrastinate_jobs"):
            row = connection.execute(
                sql.SQL("SELECT count(*) FROM {}").format(sql.Identifier(*table.split(".")))
            ).fetchone()
            found[table.rpartition(".")[2]] = row[0] if row else 0
        return found


def everything_stored(url: str) -> str:
    """All rows of all tables of the database but Postgres's own, as one text."""
    with psycopg.connect(url) as connection:
        tables = connection.execute(
            """
            SELECT n.nspname, c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
            WHERE c.relkind IN ('r', 'm', 'p') AND n.nspname NOT IN ('pg_catalog', 'information_schema', 'pg_toast')
            """
        ).fetchall()
        texts = []
        for schema, table in tables:
            found = connection.execute(
                sql.SQL("SELECT t::text FROM {} AS t ORDER BY 1").format(sql.Identifier(schema, table))
            ).fetchall()
            texts += [f"{schema}.{table}: {row[0]}" for row in found]
        return "\n".join(texts)


def recounted_scopes(url: str) -> dict[tuple[str, str], tuple[int, int]]:
    """By tenant and user: how many searchable memories and words there are, counted anew from their texts."""
    found = rows(
        url,
        """
        SELECT m.tenant_id, m.owner_id, count(*),
               coalesce(sum((SELECT coalesce(sum(l.occurrences), 0)
                             FROM agent_private.lexemes(agent_private.searched_text(m)) AS l)), 0)
        FROM agent_memory m
        WHERE m.scope = 'user' AND agent_private.is_searched(m.store) AND m.superseded_at IS NULL
        GROUP BY m.tenant_id, m.owner_id
        """,
    )
    return {(tenant, user): (memories, int(words)) for tenant, user, memories, words in found}


def counted_scopes(url: str) -> dict[tuple[str, str], tuple[int, int]]:
    """The same as the counters say; owners without a searchable memory are left out."""
    found = rows(
        url, "SELECT tenant_id, owner_id, memory_count, word_count FROM agent_scope WHERE scope = 'user'"
    )
    return {(tenant, user): (memories, words) for tenant, user, memories, words in found if memories or words}


def a_run(
    said: str | Sequence[str] = "I like tea.",
    *,
    run_id: str | None = None,
    status: str = "completed",
    quiet_seconds: float = 0,
    **more: Any,
) -> dict[str, Any]:
    """A run as `record_run` takes it: what the user said, each answered by a word."""
    run_id = run_id or str(uuid.uuid4())
    messages: list[dict[str, Any]] = []
    for position, text in enumerate([said] if isinstance(said, str) else said):
        messages += [
            {"message_id": f"{run_id}-u{position}", "role": "user", "content": text},
            {"message_id": f"{run_id}-a{position}", "role": "assistant", "content": "Noted."},
        ]
    return {
        "run_id": run_id,
        "status": status,
        "messages": messages,
        "tool_errors": [],
        "error": None,
        "finished_at": datetime.now(UTC).isoformat(),
        "quiet_seconds": quiet_seconds,
        **more,
    }


def memory(content: str, **more: Any) -> dict[str, Any]:
    """A user memory as `upsert_learning` takes it."""
    return {"store": "user_memory", "kind": "fact", "content": content, **more}
