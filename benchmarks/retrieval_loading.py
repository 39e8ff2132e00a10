"""Many memories at once, for measuring: written as the storage functions write them, without their checks."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import psycopg
from psycopg import sql

# What is written belongs to nobody in particular, and is gone with its server: it need not reach the disk at once.
_QUICKER = {"fsync": "off", "full_page_writes": "off", "max_wal_size": "4GB"}
# What differs between two scopes that hold the same.
_OWN = ("tenant_id", "owner_id", "memory_id", "memory_number", "recorded_at", "valid_from", "version")


def identity_of(owner: str) -> str:
    """The identity that owns a scope, as JSON."""
    return json.dumps(
        {"tenant_id": f"tenant-{owner}", "user_id": owner, "agent_id": "agent", "session_id": "now"}
    )


def learning(text: str) -> dict[str, Any]:
    """A memory as extraction writes it: with the two messages it was learned from."""
    evidence = [{"run_id": "run-1", "message_id": message, "quote": text[:60]} for message in ("m-1", "m-2")]
    return {"store": "user_memory", "kind": "fact", "content": text, "trust": "user", "evidence": evidence}


class BulkLoader:
    """Writes to both sides: our tables, and the table of the baseline, which it makes."""

    def __init__(self, connection: psycopg.Connection[Any]) -> None:
        self._connection = connection
        connection.execute(
            """CREATE TABLE public.plain_memory (
                   number bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, owner text NOT NULL, content text NOT NULL,
                   words tsvector GENERATED ALWAYS AS (to_tsvector('english', content)) STORED)"""
        )

    @contextmanager
    def loading(self) -> Iterator[None]:
        """While it lasts the server hurries; at its end all is on disk and has its indexes."""
        for name, value in _QUICKER.items():
            self._connection.execute(sql.SQL("ALTER SYSTEM SET {} = {}").format(sql.Identifier(name), value))
        self._connection.execute("SELECT pg_reload_conf()")
        # Foreign keys are right by making; a look-up per word would be half of the time.
        self._connection.execute("SET session_replication_role = replica")
        self._connection.execute("DROP INDEX IF EXISTS public.plain_words, public.plain_owner")
        yield
        self._connection.execute("CREATE INDEX plain_words ON public.plain_memory USING gin (words)")
        self._connection.execute("CREATE INDEX plain_owner ON public.plain_memory (owner)")
        self._connection.execute("RESET session_replication_role")
        for name in _QUICKER:
            self._connection.execute(sql.SQL("ALTER SYSTEM RESET {}").format(sql.Identifier(name)))
        self._connection.execute("SELECT pg_reload_conf()")
        self._connection.execute("CHECKPOINT")

    def load(self, identity: str, texts: Sequence[str]) -> None:
        """Memories that are new in their scope, as `learning` makes them, in one transaction."""
        owner = json.loads(identity)["user_id"]
        with self._connection.transaction():
            self._connection.execute(
                "SELECT agent_private.enter(%s::jsonb), agent_private.touch_scope('user')", (identity,)
            )
            numbers = self._connection.execute(_WRITE, (owner, list(texts))).fetchone()
            # What write_memory calls for one memory.
            index = "SELECT agent_private.index_memories('user', %s, %s::bigint[])"
            self._connection.execute(index, (owner, *(numbers or [])))
            self._connection.execute(
                "INSERT INTO public.plain_memory (owner, content) SELECT %s, unnest(%s::text[])",
                (owner, list(texts)),
            )

    def verify(self, texts: Sequence[str]) -> None:
        """Load the same texts by this and by `upsert_learnings`, and compare.

        Raises:
            RuntimeError: they leave different rows; the tables are named.
        """
        with self.loading():
            self.load(identity_of("verified-bulk"), texts)
        learnings = json.dumps([learning(text) for text in texts])
        self._connection.execute(
            "SELECT public.upsert_learnings(%s, %s)", (identity_of("verified-upsert"), learnings)
        )
        different = [
            table
            for table in self._owned_tables()
            if self._rows(table, "verified-bulk") != self._rows(table, "verified-upsert")
        ]
        if different:
            raise RuntimeError(
                f"bulk loading leaves other rows than upsert_learnings in {', '.join(different)}"
            )

    def _owned_tables(self) -> list[str]:
        found = self._connection.execute(
            """SELECT c.relname FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid
               WHERE c.relnamespace = 'public'::regnamespace AND c.relkind = 'r' AND a.attname = 'owner_id'
               ORDER BY 1"""
        )
        return [name for (name,) in found]

    def _rows(self, table: str, owner: str) -> list[str]:
        query = sql.SQL(
            "SELECT (to_jsonb(t) - %s::text[])::text FROM {} AS t WHERE t.owner_id = %s ORDER BY 1"
        ).format(sql.Identifier("public", table))
        return [row for (row,) in self._connection.execute(query, (list(_OWN), owner))]


_WRITE = """
    WITH written AS (
        INSERT INTO public.agent_memory
            (tenant_id, memory_id, version, store, kind, scope, owner_id, content, content_hash, trust, source)
        SELECT current_setting('agent.tenant_id'), gen_random_uuid(), 1, 'user_memory', 'fact', 'user', %s, x.content,
               agent_private.content_hash(x.content), 'user', 'api'
        FROM unnest(%s::text[]) AS x (content)
        RETURNING *
    ), evidence AS (
        INSERT INTO public.agent_memory_evidence
            (tenant_id, memory_id, version, scope, owner_id, run_id, message_id, quote)
        SELECT w.tenant_id, w.memory_id, w.version, w.scope, w.owner_id, 'run-1', m.id, left(w.content, 60)
        FROM written w CROSS JOIN unnest(ARRAY['m-1', 'm-2']) AS m (id)
    )
    SELECT array_agg(memory_number) FROM written"""
