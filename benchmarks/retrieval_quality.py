"""What search finds in real conversations: turns and sessions with the evidence of labelled questions.

`python -m benchmarks.retrieval_quality FILE…` for files in LoCoMo's format. Every conversation is a user of its own in
a throw-away database, written by `upsert_learnings`; every question is asked once by `match_memories`, and once by
`get_relevant_context` with 1,000 tokens. R@10 is the mean share of a question's evidence among the first ten; nDCG@10
counts each turn of it as 1; sessions are in the order of their first turn among 100. Evidence is within 1,000 tokens
where the turn's text is in the context word for word. The weights of the ranking were learned on the first two
conversations of the development file alone; "held out" are all others.

Baselines, computed here on the same texts: BM25 of single turns (k1 1.2, b 0.75), and the sum of the scores of a turn,
of it with one neighbour and with two neighbours on each side, each divided by its best, and of half its session's.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import psycopg
from numpy.typing import NDArray

from agent import Identity
from agent.learning.rendering import inert
from agent.learning.semantic_search import SemanticSearch
from agent.testing.throwaway import ThrowawayDatabase, async_throwaway_database
from benchmarks.locomo import CATEGORIES, Conversation, Question, conversations
from benchmarks.minilm import MiniLM, is_installed
from benchmarks.retrieval_report import Row, row_table

TUNED_ON = frozenset({"conv-26", "conv-30"})
"""The conversations that the weights were learned on."""
TOKENS = 1_000
_TENANT = "quality"
_LIMIT = 100
_BATCH = 200
_MODEL = MiniLM.model

Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Found:
    """One question and what one method found for it, best first."""

    conversation: str
    category: int
    recall: float
    gain: float
    """nDCG@10."""
    sessions: float
    within_tokens: float | None
    """Share of the evidence in the context; `None` where the method makes none."""


def judged(
    conversation: Conversation, question: Question, turns: Sequence[int], context: str | None = None
) -> Found:
    """How well places in `conversation.turns` answer a question."""
    evidence = question.evidence
    sessions = list(dict.fromkeys(conversation.turns[place].session for place in turns))
    wanted = {conversation.turns[place].session for place in evidence}
    gain = sum(1 / math.log2(rank + 2) for rank, place in enumerate(turns[:10]) if place in evidence)
    best = sum(1 / math.log2(rank + 2) for rank in range(min(10, len(evidence))))
    return Found(
        conversation=conversation.name,
        category=question.category,
        recall=len(evidence & set(turns[:10])) / len(evidence),
        gain=gain / best,
        sessions=len(wanted & set(sessions[:10])) / len(wanted),
        within_tokens=None
        if context is None
        else fmean(inert(conversation.turns[place].text) in context for place in evidence),
    )


class LoadedConversations:
    """Conversations in a database, each of a user of its own; what it writes and asks is what users write and ask."""

    def __init__(self, connection: psycopg.Connection[Any], loaded: Iterable[Conversation]) -> None:
        self._connection = connection
        self._places: dict[str, dict[str, int]] = {}
        for conversation in loaded:
            self._load(conversation)
        connection.execute("ANALYZE")

    def ask(
        self, conversation: Conversation, question: str, vector: Sequence[float] | None = None
    ) -> list[int]:
        """The places of the turns that are found."""
        arguments = (
            _identity(conversation), question, _LIMIT, None if vector is None else str(list(vector)),
            None if vector is None else _MODEL,
        )  # fmt: skip
        found = self._call("SELECT public.match_memories(%s, %s, %s, %s, %s)", *arguments)
        return [self._places[conversation.name][memory["memory_id"]] for memory in found]

    def embed(self, conversation: Conversation, vectors: Sequence[Sequence[float]]) -> None:
        """Store a vector for every turn."""
        numbers = self._connection.execute(
            "SELECT memory_id::text, memory_number FROM agent_memory WHERE tenant_id = %s AND owner_id = %s",
            (_TENANT, conversation.name),
        ).fetchall()
        embeddings = [
            {
                "memory_number": number,
                "embedding": str(list(vectors[self._places[conversation.name][memory_id]])),
            }
            for memory_id, number in numbers
        ]
        for start in range(0, len(embeddings), _BATCH):
            self._call(
                "SELECT public.store_embeddings(%s, %s, %s)",
                _identity(conversation), _MODEL, json.dumps(embeddings[start : start + _BATCH]),
            )  # fmt: skip
        self._connection.execute("ANALYZE")

    def _load(self, conversation: Conversation) -> None:
        places = self._places[conversation.name] = {}
        for start in range(0, len(conversation.turns), _BATCH):
            learnings = [turn.learning() for turn in conversation.turns[start : start + _BATCH]]
            receipts = self._call(
                "SELECT public.upsert_learnings(%s, %s)", _identity(conversation), json.dumps(learnings)
            )
            places |= {receipt["memory_id"]: start + offset for offset, receipt in enumerate(receipts)}

    def _call(self, statement: str, *arguments: Any) -> Any:
        row = self._connection.execute(statement.encode(), arguments, prepare=True).fetchone()
        return row[0] if row else None


def _identity(conversation: Conversation) -> str:
    return json.dumps({"tenant_id": _TENANT, "user_id": conversation.name})


def spoken(conversation: Conversation) -> list[str]:
    """The turns as an embedder is given them: with the name of who said it."""
    return [f"{turn.speaker}: {turn.text}" for turn in conversation.turns]


class Baseline:
    """BM25 in numpy, over single turns and over windows and sessions. Words are those of the storage functions."""

    def __init__(self, connection: psycopg.Connection[Any], conversation: Conversation) -> None:
        self._connection = connection
        sessions = np.array([turn.session for turn in conversation.turns])
        words = self._words(spoken(conversation))
        self._column = {word: at for at, word in enumerate(sorted(set().union(*words)))}
        counts = np.zeros((len(words), len(self._column)))
        for line, those in enumerate(words):
            for word, times in those.items():
                counts[line, self._column[word]] = times
        distance = np.abs(np.arange(len(words))[:, None] - np.arange(len(words)))
        together = sessions[:, None] == sessions
        self._units = [counts] + [((distance <= reach) & together) @ counts for reach in (1, 2)]
        names = np.unique(sessions)
        self._units.append((names[:, None] == sessions) @ counts)
        self._session_of = np.searchsorted(names, sessions)

    def single(self, question: str) -> list[int]:
        """Turns by their own words."""
        return _best(self._scores(self._units[0], self._words([question])[0]))

    def summed(self, question: str) -> list[int]:
        """Turns by the sum of the scores of turn, windows and half the session."""
        asked = self._words([question])[0]
        turn, near, far, session = (self._scores(unit, asked) for unit in self._units)
        windows = [scores / (scores.max() or 1) for scores in (turn, near, far)]
        return _best(sum(windows) + 0.5 * (session / (session.max() or 1))[self._session_of])

    def _scores(self, counts: Array, asked: Iterable[str]) -> Array:
        columns = [self._column[word] for word in asked if word in self._column]
        length = counts.sum(1, keepdims=True)
        frequency = (counts[:, columns] > 0).sum(0)
        weight = np.log(1 + (len(counts) - frequency + 0.5) / (frequency + 0.5))
        times = counts[:, columns]
        parts: Array = weight * times * 2.2 / (times + 1.2 * (0.25 + 0.75 * length / length.mean()))
        scores: Array = parts.sum(1)
        return scores

    def _words(self, texts: Sequence[str]) -> list[Counter[str]]:
        found = self._connection.execute(
            """SELECT t.at, l.lexeme, l.occurrences FROM unnest(%s::text[]) WITH ORDINALITY AS t (text, at)
               CROSS JOIN LATERAL agent_private.lexemes(t.text) AS l""",
            (list(texts),),
        )
        words: list[Counter[str]] = [Counter() for _ in texts]
        for at, word, times in found:
            words[at - 1][word] = times
        return words


def _best(scores: Array | int) -> list[int]:
    return [int(place) for place in np.argsort(-np.asarray(scores), kind="stable")[:_LIMIT]]


async def measure(
    loaded: Sequence[Conversation], embedder: MiniLM | None, tell: Callable[[str], None] = print
) -> dict[str, list[Found]]:
    """By method, what it found for all questions."""
    found: dict[str, list[Found]] = defaultdict(list)
    async with async_throwaway_database(tenant=_TENANT) as place:
        await asyncio.to_thread(_search_all, place, loaded, embedder, found, tell)
    return found


def _search_all(
    place: ThrowawayDatabase,
    loaded: Sequence[Conversation],
    embedder: MiniLM | None,
    found: dict[str, list[Found]],
    tell: Callable[[str], None],
) -> None:
    search = SemanticSearch(settings=place.settings)
    with psycopg.connect(place.url, autocommit=True) as connection:
        database = LoadedConversations(connection, loaded)
        for conversation in loaded:
            baseline = Baseline(connection, conversation)
            who = Identity(tenant_id=_TENANT, user_id=conversation.name)
            for question in conversation.questions:
                context = search.get_relevant_context_sync(question.text, identity=who, token_budget=TOKENS)
                ours = database.ask(conversation, question.text)
                found["ours"].append(judged(conversation, question, ours, context))
                for name, method in (("BM25", baseline.single), ("summed BM25", baseline.summed)):
                    found[name].append(judged(conversation, question, method(question.text)))
            tell(f"{conversation.name}: asked by words")
        if embedder is None:
            return
        for conversation in loaded:
            database.embed(conversation, embedder.embed_documents(spoken(conversation)))
            vectors = embedder.embed_documents([question.text for question in conversation.questions])
            for question, vector in zip(conversation.questions, vectors, strict=True):
                ours = database.ask(conversation, question.text, vector)
                found["with vectors"].append(judged(conversation, question, ours))
            tell(f"{conversation.name}: asked with vectors")


def table_rows(found: dict[str, list[Found]]) -> list[Row]:
    """The lines of the goals for all conversations, for those tuned on, those held out, and by category."""
    rows = []
    everything = found["ours"]
    parts: list[tuple[str, Callable[[Found], bool]]] = [("", lambda _: True)]
    if any(one.conversation in TUNED_ON for one in everything):
        parts += [
            (" (held out)", lambda one: one.conversation not in TUNED_ON),
            (" (tuned on)", lambda one: one.conversation in TUNED_ON),
        ]
    parts += [
        (f" ({name})", lambda one, number=number: one.category == number)  # type: ignore[misc]
        for number, name in CATEGORIES.items()
    ]
    goals = {"ours": (0.80, 0.61), "with vectors": (0.83, 0.63)}
    for method, name in (("ours", "no embedder"), ("with vectors", _MODEL)):
        for suffix, belongs in parts:
            ours, single, summed = (
                [one for one in found.get(which, []) if belongs(one)]
                for which in (method, "BM25", "summed BM25")
            )
            if not ours:
                continue
            recall, gain = _means(ours)
            baseline = " ".join(
                f"{label} {_means(those)[0]:.3f} / {_means(those)[1]:.3f}"
                for label, those in (("BM25", single), ("summed", summed))
            )
            multi_hop = suffix == " (multi-hop)" and method == "with vectors"
            rows.append(
                Row(
                    measure=f"turn R@10 / nDCG@10, {name}{suffix}",
                    baseline=baseline,
                    goal="≥ .80 / ≥ .61"
                    if not suffix and method == "ours"
                    else "≥ .83 / ≥ .63"
                    if not suffix
                    else "≥ .50"
                    if multi_hop
                    else "",
                    ours=f"{recall:.3f} / {gain:.3f}",
                    reached=(recall >= goals[method][0] and gain >= goals[method][1])
                    if not suffix
                    else recall >= 0.5
                    if multi_hop
                    else None,
                )
            )
    sessions = fmean(one.sessions for one in everything)
    rows.append(
        Row(
            measure="session R@10, no embedder",
            baseline=f"summed {fmean(one.sessions for one in found['summed BM25']):.3f}",
            goal="≥ .95",
            ours=f"{sessions:.3f}",
            reached=sessions >= 0.95,
        )
    )
    within = fmean(one.within_tokens or 0 for one in everything)
    rows.append(
        Row(
            measure="evidence within 1,000 tokens",
            baseline=".666 (BM25 turns, ten conversations)",
            goal="≥ .75",
            ours=f"{within:.3f}",
            reached=within >= 0.75,
        )
    )
    return rows


def _means(found: Sequence[Found]) -> tuple[float, float]:
    return fmean(one.recall for one in found), fmean(one.gain for one in found)


def quality(files: Sequence[Path], embedder: MiniLM | None, tell: Callable[[str], None] = print) -> list[Row]:
    """The lines of the table for files in LoCoMo's format."""
    return table_rows(asyncio.run(measure(conversations(files), embedder, tell)))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="in LoCoMo's format")
    parser.add_argument("--words", action="store_true", help="without an embedder, though there is one")
    options = parser.parse_args()
    embedder = MiniLM() if is_installed() and not options.words else None
    print(row_table(quality(options.files, embedder)))


if __name__ == "__main__":
    main()
