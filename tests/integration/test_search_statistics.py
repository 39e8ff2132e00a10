"""The statistics of search are those of a recount, whatever was written by however many at once."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg
from psycopg.types.json import Jsonb

from agent.testing.throwaway import ThrowawayDatabase
from tests.integration.rows import rows

_WRITES = 10_000
_WRITERS = 8
_WORDS = [f"word{number}" for number in range(40)] + ["кошка", "猫", "חתול", "🐈"]
_USERS = ("ada", "bob", "eve")


def _learning(chance: random.Random) -> dict[str, Any]:
    """A memory of few words, so that texts, fields and turns meet those that are there."""
    scope = chance.choice(["user", "user", "user", "agent", "tenant"])
    store = "user_memory" if scope == "user" else "application"
    content = " ".join(chance.choices(_WORDS, k=chance.randint(1, 6)))
    match chance.randrange(6):
        case 0:
            return {"store": store, "scope": scope, "content": content, "field": f"f{chance.randrange(8)}"}
        case 1:
            return {"store": "user_profile", "content": content, "field": f"f{chance.randrange(3)}"}
        case 2 | 3:
            number = chance.randint(1, 40)
            return {"store": "conversation", "session_id": "s", "turn": number, "content": content}
        case 4:
            return {"action": "retire", "store": store, "scope": scope, "field": f"f{chance.randrange(8)}"}
        case _:
            return {"store": store, "scope": scope, "content": content}


def _ids(connection: psycopg.Connection[Any], identity: Jsonb) -> list[str]:
    """The newest memories of a user."""
    row = connection.execute("SELECT public.get_learnings(%s, '{}', 4)", (identity,)).fetchone()
    return [item["memory_id"] for item in row[0]] if row else []


def _write(url: str, seed: int) -> int:
    """One writer's share of the writes. Returns how many there were."""
    chance = random.Random(seed)
    done = 0
    with psycopg.connect(url, autocommit=True) as connection:
        while done < _WRITES // _WRITERS:
            identity = Jsonb({"tenant_id": "t", "user_id": chance.choice(_USERS), "agent_id": "a"})
            kind = chance.randrange(40)
            # Ids that another writer may have removed meanwhile: nothing happens then.
            ids = _ids(connection, identity) if kind < 12 else []
            if kind == 0:
                connection.execute("SELECT public.erase_user(%s)", (identity,))
            elif kind == 1:
                connection.execute("SELECT public.clear_learnings(%s)", (identity,))
            elif kind < 6:
                connection.execute("SELECT public.delete_learnings(%s, %s::uuid[])", (identity, ids[:2]))
            elif kind < 12 and ids:
                change = {"store": "user_memory", "memory_id": ids[0], "content": chance.choice(_WORDS)}
                try:
                    connection.execute("SELECT public.upsert_learning(%s, %s)", (identity, Jsonb(change)))
                except psycopg.Error as refused:
                    if refused.sqlstate != "PT404":
                        raise
            else:
                learnings = [_learning(chance) for _ in range(chance.randint(1, 12))]
                connection.execute(
                    "SELECT public.upsert_learnings(%s, %s, %s)",
                    (identity, Jsonb(learnings), Jsonb({"user_memory": 60} if kind == 39 else {})),
                )
                done += len(learnings) - 1
            done += 1
    return done


def test_statistics_equal_a_recount_after_ten_thousand_writes_by_eight_writers(
    learning_database: ThrowawayDatabase,
) -> None:
    url = learning_database.url
    with ThreadPoolExecutor(_WRITERS) as pool:
        assert sum(pool.map(lambda seed: _write(url, seed), range(_WRITERS))) >= _WRITES

    recounted = rows(
        url,
        """
        SELECT m.tenant_id, m.scope, m.owner_id, m.memory_number, m.superseded_at IS NULL, l.lexeme, l.occurrences
        FROM agent_memory m CROSS JOIN LATERAL agent_private.lexemes(agent_private.searched_text(m)) AS l
        WHERE agent_private.is_searched(m.store)
        """,
    )
    postings = "SELECT tenant_id, scope, owner_id, memory_number, lexeme, occurrences FROM "
    for is_current, table in ((True, "agent_memory_term"), (False, "agent_memory_past_term")):
        texts = sorted((*row[:4], *row[5:]) for row in recounted if row[4] == is_current)
        assert sorted(rows(url, postings + table)) == texts
        assert texts, "something is left to count"
    frequencies: dict[tuple[str, ...], int] = {}
    words: dict[tuple[str, ...], int] = {}
    for tenant, scope, owner, _, is_current, lexeme, occurrences in recounted:
        if is_current:
            key = (tenant, scope, owner, lexeme)
            frequencies[key] = frequencies.get(key, 0) + 1
            words[key[:3]] = words.get(key[:3], 0) + occurrences
    counted = rows(url, "SELECT tenant_id, scope, owner_id, lexeme, memory_count FROM agent_term_count")
    assert {row[:4]: row[4] for row in counted} == frequencies
    of_scopes = rows(
        url, "SELECT tenant_id, scope, owner_id, word_count FROM agent_scope WHERE word_count <> 0"
    )
    assert {row[:3]: row[3] for row in of_scopes} == words
    memories = """
        SELECT tenant_id, scope, owner_id, count(*)::integer FROM agent_memory
        WHERE superseded_at IS NULL AND agent_private.is_searched(store) GROUP BY 1, 2, 3
    """
    of_scopes = rows(
        url, "SELECT tenant_id, scope, owner_id, memory_count FROM agent_scope WHERE memory_count <> 0"
    )
    assert set(of_scopes) == set(rows(url, memories))
