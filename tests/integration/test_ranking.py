"""What the ranking puts first: turns by their neighbours, newer statements, any script; and that each part counts."""

from __future__ import annotations

import os
import re
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from agent import Identity
from agent.database.postgres import PostgresDatabase
from agent.testing.throwaway import ThrowawayDatabase, throwaway_database
from benchmarks.locomo import Conversation, conversations
from benchmarks.minilm import MiniLM, is_installed
from benchmarks.retrieval_quality import TUNED_ON, LoadedConversations, judged, spoken
from tests.integration.rows import memory

ADA = Identity(user_id="ada", session_id="now")


@pytest.fixture
async def database(learning_database: ThrowawayDatabase) -> AsyncIterator[PostgresDatabase]:
    """The transport to `learning_database`."""
    database = PostgresDatabase(learning_database.url)
    yield database
    await database.close()


async def said(database: PostgresDatabase, *messages: str, session_id: str = "talk", **more: Any) -> None:
    """Turns of one conversation, of Ada and Bob in turns."""
    for number, content in enumerate(messages, 1):
        learning = {
            "store": "conversation",
            "kind": "user",
            "session_id": session_id,
            "turn": number,
            "speaker": ("Ada", "Bob")[(number - 1) % 2],
            "content": content,
            **more,
        }
        await database.call("upsert_learning", ADA, learning=learning)


async def found(database: PostgresDatabase, question: str, **more: Any) -> list[dict[str, Any]]:
    """What search finds, best first."""
    results: list[dict[str, Any]] = await database.call(
        "match_memories", ADA, question=question, memory_limit=20, **more
    )
    return results


async def test_an_answer_is_found_by_the_question_before_it_and_stands_above_it(
    database: PostgresDatabase,
) -> None:
    await said(database, "What instrument do you play?", "The violin, since I was six.", "Lovely.")
    await said(database, "The train was late.", "Mine too.", session_id="other")

    contents = [result["content"] for result in await found(database, "Which instrument is played?")]

    assert contents[0] == "The violin, since I was six."
    assert "The train was late." not in contents


async def test_neighbours_end_with_the_session(database: PostgresDatabase) -> None:
    await said(database, "My instrument is the violin.")
    await said(database, "It rains.", session_id="other")

    assert [result["content"] for result in await found(database, "instrument")] == [
        "My instrument is the violin."
    ]


async def test_of_two_like_statements_the_newer_stands_first(database: PostgresDatabase) -> None:
    for year, city in ((2021, "Lisbon"), (2023, "Vienna"), (2022, "Prague")):
        await said(
            database,
            f"My home is in {city} at present.",
            session_id=city,
            valid_from=f"{year}-05-01T00:00:00Z",
        )
        await database.call(
            "upsert_learning",
            ADA,
            learning=memory(f"Lives in {city} now", valid_from=f"{year}-05-01T00:00:00Z"),
        )

    turns = await found(database, "Where is the home?", filters={"stores": ["conversation"]})
    memories = await found(database, "Who lives where now?", filters={"stores": ["user_memory"]})

    assert [turn["session_id"] for turn in turns] == ["Vienna", "Prague", "Lisbon"]
    assert [result["content"] for result in memories] == [
        "Lives in Vienna now",
        "Lives in Prague now",
        "Lives in Lisbon now",
    ]


async def test_who_is_named_counts_more_than_who_only_hears_of_it(database: PostgresDatabase) -> None:
    await said(database, "Chess is on today.", "Chess is on today.")

    assert [turn["speaker"] for turn in await found(database, "chess Bob")] == ["Bob", "Ada"]
    assert [turn["speaker"] for turn in await found(database, "chess Ada")] == ["Ada", "Bob"]


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("Где живёт бабушка?", "Моя бабушка живёт в Казани."),
        ("איפה גרה סבתא?", "סבתא שלי גרה בחיפה."),
        ("祖母住在哪里?", "我的祖母住在杭州。"),
    ],
)
async def test_conversations_in_other_scripts_are_ranked_like_others(
    database: PostgresDatabase, question: str, answer: str
) -> None:
    await said(database, "Погода хорошая.", "מזג האוויר נעים.", "天气很好。", "Nice weather.", "Oh.", answer)

    assert (await found(database, question))[0]["content"] == answer


async def test_each_result_tells_its_rank_and_score_in_the_lists_that_found_it(
    database: PostgresDatabase,
) -> None:
    await said(database, "The violin is mine.", "The piano is loud.")

    results = await found(database, "violin")

    assert results[0]["why"]["words"] == {"rank": 1, "score": 1}
    assert results[1]["why"]["words"]["rank"] == 2
    assert 0 < results[1]["why"]["words"]["score"] < 1
    assert results[0]["why"]["session"]["rank"] == 1


# On the conversations that the weights were learned on


def _tuned_on() -> list[Conversation]:
    folder = Path(os.environ.get("LEARNING_DATA") or Path(__file__).parents[3] / "shared" / "data")
    file = folder / "locomo" / "locomo_dev.json"
    if not file.exists():
        reason = f"the conversations are not in {folder}; set LEARNING_DATA to the folder that has locomo/"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return [one for one in conversations([file]) if one.name in TUNED_ON]


class Weighed:
    """The ranking on conversations that stay loaded, under weights that can be changed."""

    def __init__(self, connection: psycopg.Connection[Any]) -> None:
        self._connection = connection
        self._loaded = _tuned_on()
        self._database = LoadedConversations(connection, self._loaded)
        self._vectors: dict[str, list[list[float]]] = {}
        row = connection.execute(
            "SELECT pg_get_functiondef('agent_private.ranking_weights'::regproc)"
        ).fetchone()
        assert row is not None
        self._function = str(row[0])

    def embed(self) -> None:
        """Give everything vectors."""
        if not self._vectors:
            embedder = MiniLM()
            for conversation in self._loaded:
                self._database.embed(conversation, embedder.embed_documents(spoken(conversation)))
                self._vectors[conversation.name] = embedder.embed_documents(
                    [question.text for question in conversation.questions]
                )

    def score(self, *, with_vectors: bool = False, **weights: float) -> float:
        """The mean of R@10 and nDCG@10 over all questions."""
        names = re.findall(r"OUT (\w+)", self._function)
        row = self._connection.execute("SELECT * FROM agent_private.ranking_weights()").fetchone()
        assert row is not None
        values = dict(zip(names, row, strict=True))
        assert set(weights) <= set(names)
        changed = ", ".join(f"{value}::float8" for value in (values | weights).values())
        body = self._function.partition("$function$")[0] + f"$function$ SELECT {changed}; $function$"
        self._connection.execute(body.encode())
        try:
            results = [
                judged(
                    conversation,
                    question,
                    self._database.ask(
                        conversation,
                        question.text,
                        self._vectors[conversation.name][at] if with_vectors else None,
                    ),
                )
                for conversation in self._loaded
                for at, question in enumerate(conversation.questions)
            ]
        finally:
            self._connection.execute(self._function.encode())
        return sum(one.recall + one.gain for one in results) / len(results) / 2


@pytest.fixture(scope="module")
def weighed() -> Iterator[Weighed]:
    """Loaded once for the tests of this file."""
    _tuned_on()
    with throwaway_database() as place, psycopg.connect(place.url, autocommit=True) as connection:
        yield Weighed(connection)


PARTS: dict[str, Callable[[Weighed], float]] = {
    "words of neighbours": lambda ranking: ranking.score(beside=0, near=0, answer=0),
    "turns two places away": lambda ranking: ranking.score(near=0),
    "answers after questions": lambda ranking: ranking.score(answer=0.5),
    "the session": lambda ranking: ranking.score(session=0),
    "the speaker": lambda ranking: ranking.score(speaker=0),
    "questions counting less": lambda ranking: ranking.score(asked=0),
}


@pytest.mark.parametrize("part", PARTS)
def test_the_ranking_is_worse_without_any_of_its_parts(weighed: Weighed, part: str) -> None:
    assert PARTS[part](weighed) < weighed.score()


@pytest.mark.skipif(
    not is_installed() and not os.environ.get("CI"), reason="the group minilm is not installed"
)
def test_vectors_and_those_of_neighbours_make_the_ranking_better(weighed: Weighed) -> None:
    weighed.embed()
    whole = weighed.score(with_vectors=True)

    assert whole > weighed.score()
    assert weighed.score(with_vectors=True, vector_beside=0, vector_near=0, vector_answer=0) < whole
    assert weighed.score(with_vectors=True, certainty=0, session=0) < whole


def test_the_ranking_reaches_what_it_was_made_for(weighed: Weighed) -> None:
    assert weighed.score() > 0.71  # of words alone; plain BM25 of single turns reaches 0.56
