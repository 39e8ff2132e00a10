"""What search finds in conversations and memories made up by a seed, so that nothing is fitted to a published data set.

Knowledge updates: facts of twenty people, each stated two or three times with another value and phrased in ways drawn
anew, so that words alone favour neither; all statements stay current, and the newest must stand above the older ones.
Question and statements have the name and one word in common, or the name alone. A long chat: thirty statements made
once among 500,000 tokens. One word: of a question's words one alone is in the answer and the others in many messages.
Pictures: the caption alone answers. Four languages: short memories in Russian, Hebrew, Chinese and Japanese. A token
is counted as 0.75 words. Everything is written by `upsert_learnings`, no language model takes part. Where
all-MiniLM-L6-v2 is installed, the English texts are searched a second time, with its vectors.

The baseline searches the same texts by OR and `ts_rank`, the newest first among equals.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Any

import psycopg

from agent.testing.throwaway import async_throwaway_database
from benchmarks.made_conversations import NEEDLES, ONE_WORD, Collection, Probe, captions, long_chat, updates
from benchmarks.made_languages import LANGUAGES, short_texts
from benchmarks.minilm import MiniLM
from benchmarks.retrieval_report import Row, Section

LONG_CHAT_MESSAGES, QUICK_CHAT_MESSAGES = 20_000, 4_000
_LIMIT = 50
_BATCH = 200
_METHOD = (__doc__ or "").partition("\n")[2].strip()


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Of one collection."""

    name: str
    baseline: Score
    words: Score
    """Ours, without an embedder."""
    vectors: Score | None
    """Ours, with one; `None` where there is none or the texts are not English."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """What one way to search reached on one collection."""

    recall_5: float
    """Share of questions whose answer is among the first 5."""
    recall_10: float
    newest_first: float | None
    """Share of questions whose answer was found and stands above all outdated ones; `None` where nothing changed."""


Search = Callable[[str], Sequence[int]]
"""The numbers of the texts that were found for a question, best first."""


def score(probes: Sequence[Probe], search: Search) -> Score:
    """Ask everything once."""
    places = []
    newest_first = []
    for probe in probes:
        found = list(search(probe.question))
        place = found.index(probe.answer) if probe.answer in found else None
        places.append(place)
        if probe.outdated:
            above = found[:place] if place is not None else []
            newest_first.append(place is not None and not set(above) & set(probe.outdated))
    return Score(
        recall_5=fmean(place is not None and place < 5 for place in places),
        recall_10=fmean(place is not None and place < 10 for place in places),
        newest_first=fmean(newest_first) if newest_first else None,
    )


def collections(*, quick: bool) -> Iterator[Collection]:
    """Everything that is asked for."""
    messages = QUICK_CHAT_MESSAGES if quick else LONG_CHAT_MESSAGES
    memories = 2_000 if quick else 6_000
    yield updates(memories, name="knowledge updates, in memories")
    yield updates(memories // 2, name="knowledge updates, in messages", as_messages=True)
    yield updates(memories, name="knowledge updates, only the name in common", in_other_words=True)
    yield long_chat(messages, NEEDLES, name="a few statements in a long chat")
    yield long_chat(messages // 4, ONE_WORD, name="one word in common")
    yield captions(messages // 4)
    for language in LANGUAGES:
        yield short_texts(language, 1_000)


class _Searched:
    """One collection in a database, and both ways to search it."""

    def __init__(self, connection: psycopg.Connection[Any], collection: Collection) -> None:
        self._connection = connection
        self._collection = collection
        self._identity = json.dumps(
            {"tenant_id": collection.name, "user_id": "user", "agent_id": "a", "session_id": ""}
        )
        self._owner = collection.name
        self._number: dict[str, int] = {}
        self._memory_number: dict[int, int] = {}
        for begin in range(0, len(collection.texts), _BATCH):
            self._load(range(begin, min(begin + _BATCH, len(collection.texts))))
        connection.execute("ANALYZE")

    def _load(self, numbers: range) -> None:
        learnings: list[dict[str, Any]] = []
        for number in numbers:
            said = self._collection.texts[number]
            learning: dict[str, Any] = {"store": "user_memory", "kind": "fact", "content": said.text}
            if said.turn is not None:
                learning |= {
                    "store": "conversation", "kind": said.speaker, "session_id": f"session-{said.session}",
                    "turn": said.turn, "speaker": said.speaker, "trust": "user" if said.speaker == "user" else "model",
                }  # fmt: skip
            learnings.append(learning | {"valid_from": said.at.isoformat()})
        receipts = self._ask("SELECT public.upsert_learnings(%s, %s)", self._identity, json.dumps(learnings))
        for number, receipt in zip(numbers, receipts, strict=True):
            # Said twice in the very same words it is one memory; the later place counts.
            self._number[receipt["memory_id"]] = number
            self._memory_number[receipt["memory_number"]] = number
        self._connection.execute(
            "INSERT INTO public.plain_memory (owner, number, content) "
            "SELECT %s, * FROM unnest(%s::integer[], %s::text[])",
            (self._owner, list(numbers), [self._collection.texts[number].text for number in numbers]),
        )

    def ours(self, question: str, vector: str | None = None, model: str | None = None) -> list[int]:
        """By `match_memories`."""
        statement = "SELECT public.match_memories(%s, %s, %s, %s, %s)"
        found = self._ask(statement, self._identity, question, _LIMIT, vector, model)
        return [self._number[memory["memory_id"]] for memory in found]

    def embed(self, embedder: MiniLM) -> None:
        """Store a vector of every text."""
        numbers = list(self._memory_number)
        for begin in range(0, len(numbers), _BATCH):
            batch = numbers[begin : begin + _BATCH]
            vectors = embedder.embed_documents(
                [self._collection.texts[self._memory_number[n]].text for n in batch]
            )
            embeddings = [
                {"memory_number": n, "embedding": str(v)} for n, v in zip(batch, vectors, strict=True)
            ]
            statement = "SELECT public.store_embeddings(%s, %s, %s)"
            self._ask(statement, self._identity, embedder.model, json.dumps(embeddings))
        self._connection.execute("ANALYZE")

    def plain(self, question: str) -> list[int]:
        """By the baseline."""
        query = """
            SELECT coalesce(array_agg(b.number), '{}') FROM (
                SELECT m.number
                FROM (SELECT replace(plainto_tsquery('english', %s)::text, '&', '|')::tsquery) AS q (query),
                     public.plain_memory m
                WHERE m.words @@ q.query AND m.owner = %s
                ORDER BY ts_rank(m.words, q.query) DESC, m.number DESC LIMIT %s) AS b"""
        return list(self._ask(query, question, self._owner, _LIMIT))

    def _ask(self, statement: str, *arguments: Any) -> Any:
        row = self._connection.execute(statement.encode(), arguments).fetchone()
        return row[0] if row else []


async def measure(*, quick: bool, embedder: MiniLM | None, tell: Callable[[str], None]) -> list[Scores]:
    """What all collections reach."""
    found = []
    async with async_throwaway_database() as place:
        with psycopg.connect(place.url, autocommit=True) as connection:
            connection.execute(
                """CREATE TABLE public.plain_memory (
                       owner text NOT NULL, number integer NOT NULL, content text NOT NULL,
                       words tsvector GENERATED ALWAYS AS (to_tsvector('english', content)) STORED)"""
            )
            for collection in collections(quick=quick):
                searched = _Searched(connection, collection)
                baseline, words = (
                    score(collection.probes, searched.plain),
                    score(collection.probes, searched.ours),
                )
                vectors = None
                if embedder is not None and collection.is_english:
                    searched.embed(embedder)
                    vectors = score(collection.probes, partial(_by_vectors, searched, embedder))
                name = f"{collection.name} ({len(collection.texts):,} texts)"
                found.append(Scores(name=name, baseline=baseline, words=words, vectors=vectors))
                tell(str(found[-1]))
    return found


def _by_vectors(searched: _Searched, embedder: MiniLM, question: str) -> list[int]:
    return searched.ours(question, str(embedder.embed_query(question)), embedder.model)


def section(found: Sequence[Scores]) -> Section:
    """One goal, that what is newest stands first, and what was found."""
    rows = []
    for scores in found:
        ways = [(scores.name, scores.words)]
        if scores.vectors is not None:
            ways.append((f"{scores.name}, all-MiniLM-L6-v2", scores.vectors))
        for name, ours in ways:
            if ours.newest_first is not None and scores.baseline.newest_first is not None:
                rows.append(
                    Row(
                        measure=f"newest statement above the old ones: {name}",
                        baseline=f"{scores.baseline.newest_first:.3f}",
                        goal="all",
                        ours=f"{ours.newest_first:.3f}",
                        reached=ours.newest_first == 1,
                    )
                )
            rows.append(
                Row(
                    measure=f"R@5, R@10: {name}",
                    baseline=f"{scores.baseline.recall_5:.3f}, {scores.baseline.recall_10:.3f}",
                    goal="",
                    ours=f"{ours.recall_5:.3f}, {ours.recall_10:.3f}",
                    reached=None,
                )
            )
    return Section(title="Made-up conversations", rows=rows, text=_METHOD)
