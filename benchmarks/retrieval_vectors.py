"""Vectors: how many of the truly nearest ten are found, and how long it takes, in scopes of very different sizes.

The vectors are those of all-MiniLM-L6-v2 for turns of recorded conversations, each mixed with two others and moved by
the difference of two more, so that their directions are as uneven as those of real text; the questions are the
recordings' own. One tenant has 2 % of the rows, one 0.2 %, a third the rest, all in random order in one table. What is
nearest is computed with numpy in single precision. Each search is one statement as `agent_app`, held to row level
security; tables are vacuumed and in memory before.

Baselines: one HNSW index over all tenants, as pgvector searches it by default, and with iterative scan in relaxed
order, on a table with a row policy on its tenant; and comparing every vector of the scope.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psycopg

from benchmarks.measuring import percentile
from benchmarks.minilm import MiniLM
from benchmarks.retrieval_report import Row, Section, table
from benchmarks.server import fresh_database, measuring_server

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float32]

ROWS, QUICK_ROWS = 1_000_000, 100_000
RECALL_GOAL, P95_GOAL_MS = 0.99, 10.0
OURS, EXACT = "agent_private.nearest", "every vector of the scope"
HNSW, HNSW_ITERATIVE = "shared HNSW, default", "shared HNSW, iterative scan, relaxed order"

_MODEL, _WIDTH, _SEED = "all-MiniLM-L6-v2", 384, 20251120
_SHARES = {"two_percent": 0.02, "two_per_mille": 0.002}
_REST = "rest"
_TURNS, _QUESTIONS, _CHUNK, _NEAREST = 1500, 200, 20_000, 10
_METHOD = (__doc__ or "").partition("\n")[2].strip()


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One way of searching in one tenant."""

    way: str
    tenant: str
    in_scope: int
    in_all: int
    recall: float
    p50_ms: float
    p95_ms: float


def recorded_vectors(files: Sequence[Path]) -> tuple[Array, Array]:
    """Vectors of turns and of questions of conversations in LoCoMo's form."""
    turns, questions = [], []
    for file in files:
        for recorded in json.loads(file.read_text()):
            for name, messages in recorded["conversation"].items():
                if name.startswith("session_") and isinstance(messages, list):
                    turns += [f"{one['speaker']}: {one['text']}" for one in messages if one.get("text")]
            questions += [one["question"] for one in recorded["qa"]]
    chance = np.random.default_rng(_SEED)
    model = MiniLM()
    return tuple(
        model.vectors([texts[index] for index in chance.permutation(len(texts))[:count]])
        for texts, count in ((turns, _TURNS), (questions, _QUESTIONS))
    )  # type: ignore[return-value]


def made_vectors(turns: Array, rows: int) -> Iterator[Array]:
    """So many vectors in chunks, the same for the same arguments."""
    chance = np.random.default_rng(_SEED)
    for start in range(0, rows, _CHUNK):
        count = min(_CHUNK, rows - start)
        one, other, to, away = (turns[chance.integers(0, len(turns), count)] for _ in range(4))
        mixed = one + chance.uniform(0.2, 0.8, (count, 1)).astype(np.float32) * other + 0.3 * (to - away)
        yield mixed / np.linalg.norm(mixed, axis=1, keepdims=True)


def _load(
    connection: psycopg.Connection[Any],
    turns: Array,
    questions: Array,
    rows: int,
    tell: Callable[[str], None],
) -> tuple[dict[str, int], dict[str, NDArray[np.int64]]]:
    """Fill the tables; how many vectors each tenant has, and the numbers of the nearest by question."""
    chance = np.random.default_rng(_SEED + 1)
    names = np.array([*_SHARES, _REST])
    best = {name: np.full((len(questions), _NEAREST), -2.0) for name in names}
    numbers = {name: np.zeros((len(questions), _NEAREST), np.int64) for name in names}
    sizes = dict.fromkeys(map(str, names), 0)
    connection.execute(
        "CREATE TABLE shared (tenant text, number bigint, embedding halfvec(384));"
        "ALTER TABLE shared ALTER embedding SET STORAGE PLAIN; GRANT SELECT ON shared TO agent_app;"
        "ALTER TABLE shared ENABLE ROW LEVEL SECURITY; CREATE POLICY own ON shared TO agent_app"
        " USING (tenant = (SELECT current_setting('agent.tenant_id', true)))"
    )
    first = 1
    for vectors in made_vectors(turns, rows):
        tenants = names[
            np.searchsorted(np.cumsum([*_SHARES.values()]), chance.random(len(vectors)), side="right")
        ]
        with connection.cursor().copy(
            "COPY agent_memory (tenant_id, memory_id, version, memory_number, store, owner_id, content, content_hash,"
            " trust) FROM STDIN"
        ) as memories:
            for place, tenant in enumerate(tenants):
                number = first + place
                memories.write_row(
                    (
                        tenant,
                        f"{number:032x}",
                        1,
                        number,
                        "user_memory",
                        "ada",
                        str(number),
                        b"%d" % number,
                        "user",
                    )
                )
        with connection.cursor().copy("COPY shared FROM STDIN") as shared:
            for place, (tenant, vector) in enumerate(zip(tenants, vectors, strict=True)):
                shared.write_row((tenant, first + place, _text(vector)))
        for name in map(str, names):
            chosen = np.flatnonzero(tenants == name)
            sizes[name] += len(chosen)
            scores = np.hstack([best[name], questions @ vectors[chosen].T])
            known = np.hstack([numbers[name], np.tile(first + chosen, (len(questions), 1))])
            top = np.argsort(-scores, axis=1)[:, :_NEAREST]
            best[name] = np.take_along_axis(scores, top, 1)
            numbers[name] = np.take_along_axis(known, top, 1)
        first += len(vectors)
        tell(f"vectors: {first - 1:,} of {rows:,} loaded")
    connection.execute(
        "INSERT INTO agent_memory_embedding (tenant_id, scope, owner_id, memory_number, model, dimensions, embedding)"
        " SELECT tenant, 'user', 'ada', number, %s, 384, embedding FROM shared",
        (_MODEL,),
    )
    for name, size in sizes.items():
        connection.execute(
            "INSERT INTO agent_scope (tenant_id, scope, owner_id, memory_count, word_count)"
            " VALUES (%s, 'user', 'ada', %s, %s)",
            (name, size, size),
        )
    return sizes, numbers


def _text(vector: Array) -> str:
    return "[" + ",".join(f"{number:.6f}" for number in vector.tolist()) + "]"


def _arrange(connection: psycopg.Connection[Any], tell: Callable[[str], None]) -> None:
    """What the background does after vectors came."""
    started, moved, limit = time.perf_counter(), 0, 5000
    while True:
        row = connection.execute(
            "SELECT arrange_embeddings(%s, %s, %s, 'user', %s)",
            (json.dumps({"tenant_id": _REST, "user_id": "ada"}), _MODEL, _WIDTH, limit),
        ).fetchone()
        assert row is not None
        moved += row[0]
        if row[0] < limit:
            break
    tell(f"vectors: {moved:,} put into lists in {time.perf_counter() - started:.0f} s")


_EXACT_QUERY = """
    SELECT e.memory_number FROM agent_memory_embedding e
    WHERE e.tenant_id = current_setting('agent.tenant_id') AND e.scope = 'user' AND e.owner_id = 'ada'
      AND e.model = 'all-MiniLM-L6-v2' AND e.dimensions = 384
    ORDER BY e.embedding <#> %s::halfvec LIMIT 10"""
_WAYS = {
    OURS: "SELECT memory_number FROM agent_private.nearest('user', 'ada', %s::vector, 'all-MiniLM-L6-v2', 10)",
    EXACT: _EXACT_QUERY,
    HNSW: "SELECT number FROM shared ORDER BY embedding <#> %s::halfvec(384) LIMIT 10",
    HNSW_ITERATIVE: "SELECT number FROM shared ORDER BY embedding <#> %s::halfvec(384) LIMIT 10",
}
_SETTINGS = {
    HNSW: "SET enable_sort = off; SET enable_seqscan = off",
    HNSW_ITERATIVE: "SET enable_sort = off; SET enable_seqscan = off; SET hnsw.iterative_scan = relaxed_order",
}


def _search(
    connection: psycopg.Connection[Any],
    way: str,
    tenant: str,
    questions: Array,
    numbers: NDArray[np.int64],
    sizes: dict[str, int],
) -> Measured:
    connection.execute("RESET ALL; SET max_parallel_workers_per_gather = 0; SET ROLE agent_app")
    connection.execute(_SETTINGS.get(way, "SELECT 1"))
    connection.execute(
        "SELECT set_config('agent.tenant_id', %s, false), set_config('agent.user_id', 'ada', false),"
        " set_config('agent.reach', 'user', false)",
        (tenant,),
    )
    times, found = [], []
    for number, question in enumerate([*questions[:20], *questions]):  # the first twenty warm up
        given = (_text(question),)
        started = time.perf_counter()
        rows = connection.execute(_WAYS[way].encode(), given).fetchall()
        if number >= 20:
            times.append((time.perf_counter() - started) * 1000)
            found.append(len({row[0] for row in rows} & set(numbers[number - 20].tolist())) / _NEAREST)
    connection.execute("RESET ROLE")
    return Measured(
        way=way,
        tenant=tenant,
        in_scope=sizes[tenant],
        in_all=sum(sizes.values()),
        recall=float(np.mean(found)),
        p50_ms=percentile(times, 50),
        p95_ms=percentile(times, 95),
    )


async def measure(rows: int, files: Sequence[Path], tell: Callable[[str], None]) -> list[Measured]:
    """All ways in all tenants, of so many vectors made from these recordings.

    Args:
        rows: how many vectors.
        files: conversations in LoCoMo's form.
        tell: is told what is being done.
    """
    tell("vectors: embedding turns and questions")
    turns, questions = recorded_vectors(files)
    with measuring_server() as server:
        async with fresh_database(server, "vectors") as url:
            with psycopg.connect(url, autocommit=True) as connection:
                sizes, numbers = _load(connection, turns, questions, rows, tell)
                _arrange(connection, tell)
                connection.execute(
                    "SET maintenance_work_mem = '2GB'; SET max_parallel_maintenance_workers = 2"
                )
                for name in ("agent_memory_embedding", "agent_embedding_list", "shared"):
                    connection.execute(f"VACUUM ANALYZE {name}".encode())
                measured = [
                    _search(connection, way, tenant, questions, numbers[tenant], sizes)
                    for way in (OURS, EXACT)
                    for tenant in sizes
                ]
                tell("vectors: building the shared HNSW index of the baselines")
                started = time.perf_counter()
                connection.execute(
                    "SET maintenance_work_mem = '2GB'; SET max_parallel_maintenance_workers = 2"
                )
                connection.execute("CREATE INDEX ON shared USING hnsw (embedding halfvec_ip_ops)")
                tell(f"vectors: built in {time.perf_counter() - started:.0f} s")
                measured += [
                    _search(connection, way, tenant, questions, numbers[tenant], sizes)
                    for way in (HNSW, HNSW_ITERATIVE)
                    for tenant in sizes
                ]
    return measured


def rows_of(measured: Sequence[Measured]) -> list[Row]:
    """The goals of recall and time for the two tenants that have a small share."""

    def of(way: str, tenant: str) -> Measured:
        return next(one for one in measured if (one.way, one.tenant) == (way, tenant))

    lines = []
    for tenant in (*_SHARES, _REST):
        ours, default, iterative = (of(way, tenant) for way in (OURS, HNSW, HNSW_ITERATIVE))
        has_goal = tenant in _SHARES
        lines.append(
            Row(
                measure=f"vector recall@10 and p95, {ours.in_scope:,} of {ours.in_all:,} vectors, row level security",
                baseline=f"shared HNSW {_told(default)}; iterative scan {_told(iterative)}",
                goal=f"≥ {RECALL_GOAL:g} at < {P95_GOAL_MS:g} ms" if has_goal else "",
                ours=_told(ours),
                reached=ours.recall >= RECALL_GOAL and ours.p95_ms < P95_GOAL_MS if has_goal else None,
            )
        )
    return lines


def _told(one: Measured) -> str:
    return f"{one.recall:.3f} at {one.p95_ms:.1f} ms"


def section(measured: Sequence[Measured]) -> Section:
    """Goals, and all that was measured."""
    lines = [
        [
            one.way, f"{one.in_scope:,}", f"{one.in_all:,}", f"{one.recall:.4f}",
            f"{one.p50_ms:.2f}", f"{one.p95_ms:.2f}",
        ]
        for one in measured
    ]  # fmt: skip
    head = ("way", "in scope", "in all", "recall@10", "p50 ms", "p95 ms")
    return Section(title="Vectors", rows=rows_of(measured), text=f"{table(head, lines)}\n\n{_METHOD}")
