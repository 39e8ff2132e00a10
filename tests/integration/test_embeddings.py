"""Recall by meaning: that vectors are used where there are any, and that embedders that fail cost nothing but that."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import psycopg
import pytest
from hypothesis import given
from hypothesis import strategies as st
from langchain_core.embeddings import Embeddings
from numpy.typing import NDArray

from agent import Identity, LearningMachine, listening
from agent.database import Database, open_database
from agent.errors import ModelError
from agent.events import Event
from agent.learning.embedding import Embedder, as_vector
from agent.learning.learner_steps import StepContext, embed
from agent.learning.machine import embedder_name
from agent.learning.semantic_search import SemanticSearch
from agent.portal import portal
from agent.testing.throwaway import ThrowawayDatabase
from tests.integration.test_extraction import said

ADA = Identity(user_id="ada@example.com", session_id="t1")
BOB = Identity(user_id="bob", session_id="t1")
_MEANINGS = (
    ("cat", "cats", "kitten", "feline", "pet", "tomcat"),
    ("car", "automobile", "vehicle", "sedan"),
    ("doctor", "physician", "surgeon"),
    ("sea", "ocean", "sailing", "boat"),
)
FAR = ("I adopted a kitten", "She bought a sedan", "Her brother is a surgeon", "They went sailing")


class Meanings(Embeddings):
    """Texts of the same meanings are near, whatever words they use; `dimensions` pads with zeros."""

    def __init__(self, dimensions: int = 8, model: str = "meanings") -> None:
        self.dimensions = dimensions
        self.model = model
        self.questions: list[str] = []
        self.documents: list[str] = []

    def vector(self, text: str) -> list[float]:
        words = [word.strip("?.,!") for word in text.lower().split()]
        found = [float(sum(word in meaning for word in words)) for meaning in _MEANINGS]
        return ([*found, 0.01] + [0.0] * self.dimensions)[: self.dimensions]

    def embed_query(self, text: str) -> list[float]:
        raise AssertionError("the async form is the one to be used")

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        raise AssertionError("the async form is the one to be used")

    async def aembed_query(self, text: str) -> list[float]:
        self.questions.append(text)
        return self.vector(text)

    async def aembed_documents(self, texts: list[str]) -> list[list[float]]:
        self.documents += texts
        return [self.vector(text) for text in texts]


class Broken(Meanings):
    """Works for memories; for questions it does what it is given."""

    def __init__(self, answer: Any) -> None:
        super().__init__()
        self.answer = answer

    async def aembed_query(self, text: str) -> list[float]:
        self.questions.append(text)
        if isinstance(self.answer, Exception):
            raise self.answer
        if callable(self.answer):
            await self.answer()
        return self.answer  # type: ignore[no-any-return]


class BrokenForMemories(Meanings):
    """Does what it is given for memories, until it is mended."""

    def __init__(self, answer: Any) -> None:
        super().__init__()
        self.answer = answer

    async def aembed_documents(self, texts: list[str]) -> list[list[float]]:
        if self.answer is None:
            return await super().aembed_documents(texts)
        if isinstance(self.answer, Exception):
            raise self.answer
        if callable(self.answer):
            await self.answer()
        return self.answer  # type: ignore[no-any-return]


async def never() -> None:
    await asyncio.sleep(60)


@pytest.fixture
def heard() -> Iterator[list[Event]]:
    events: list[Event] = []
    with listening(events.append):
        yield events


Make = Callable[..., LearningMachine]


@pytest.fixture
async def make(learning_database: ThrowawayDatabase) -> AsyncIterator[Make]:
    made: list[LearningMachine] = []

    def machine(embeddings: Any, **changes: Any) -> LearningMachine:
        settings = learning_database.settings.model_copy(
            update={
                "recall_timeout": timedelta(seconds=20),
                "embedding_timeout": timedelta(seconds=5),
                **changes,
            }
        )
        made.append(LearningMachine(embeddings=embeddings, settings=settings))
        return made[-1]

    yield machine
    for one in made:
        await one.aclose()


async def tell(machine: LearningMachine, *texts: str, identity: Identity = ADA) -> None:
    """Runs that are learned word for word."""
    await record(machine, *texts, identity=identity)
    assert await portal().run(machine.learn_session(identity)) == len(texts)


async def record(machine: LearningMachine, *texts: str, identity: Identity = ADA) -> None:
    """A run for each text, each on a day of its own: turns of one day are shown as one line, in their order."""
    for number, text in enumerate(texts):
        moment = f"2026-03-{number + 1:02}T10:00:00Z"
        run = {
            "run_id": f"{identity.user_id}-{hash(texts)}-{number}", "status": "completed", "exposures": [],
            "started_at": moment, "finished_at": moment,
            "messages": [said(text, f"m{number}")], "tool_errors": [],
        }  # fmt: skip
        assert await portal().run(machine.record(identity, run))


async def recall(machine: LearningMachine, question: str, identity: Identity = ADA) -> list[str]:
    """What is shown, the most relevant first."""
    rendered = await portal().run(machine.recall(identity.with_(session_id="now"), question))
    return [memory.content for memory in rendered.shown]


def vectors(database: ThrowawayDatabase) -> list[tuple[str, str, int]]:
    """Content, model and dimensions of each vector that is kept."""
    with psycopg.connect(database.url) as connection:
        return connection.execute(
            "SELECT m.content, e.model, e.dimensions FROM public.agent_memory_embedding e "
            "JOIN public.agent_memory m USING (memory_number) ORDER BY m.memory_number, e.model, e.dimensions"
        ).fetchall()


# --- vectors are used -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("question", "best"),
    [
        ("Have you met my tomcat?", "I adopted a kitten"),
        ("automobile", "She bought a sedan"),
        ("Which physician?", "Her brother is a surgeon"),
        ("ocean", "They went sailing"),
    ],
)
async def test_a_question_without_a_common_word_finds_the_memory(
    make: Make, question: str, best: str
) -> None:
    machine = make(Meanings())
    await tell(machine, *FAR)
    assert (await recall(machine, question))[0] == best
    hits = await machine.search(question, identity=ADA)
    assert (hits[0]["content"], hits[0]["why"]) == (best, {"vector": {"rank": 1, "score": 1}})


async def test_without_vectors_the_same_question_finds_nothing(make: Make) -> None:
    machine = make("none")
    await tell(machine, *FAR)
    assert await machine.search("automobile", identity=ADA) == []


async def test_words_and_vectors_count_together(make: Make) -> None:
    machine = make(Meanings())
    await tell(machine, "The kitten sleeps", "Invoice A1001 is open", "The kitten likes A1001")
    assert (await recall(machine, "feline A1001"))[0] == "The kitten likes A1001"


async def test_vectors_of_others_are_never_met(make: Make) -> None:
    machine = make(Meanings())
    await tell(machine, *FAR, identity=BOB)
    await tell(machine, *FAR, identity=ADA.with_(tenant_id="acme"))
    await tell(machine, "I like tea")
    assert await recall(machine, "tomcat") == ["I like tea"]


async def test_a_question_is_embedded_once_and_a_memory_once(make: Make) -> None:
    embeddings = Meanings()
    machine = make(embeddings)
    await tell(machine, *FAR)
    for _ in range(3):
        await recall(machine, "tomcat")
    await portal().run(machine.embed_memories(ADA))
    assert embeddings.questions == ["tomcat"]
    assert sorted(embeddings.documents) == sorted(FAR)


async def test_a_turn_is_embedded_with_who_said_it(make: Make, learning_database: ThrowawayDatabase) -> None:
    embedder = Meanings()
    machine = make(embedder)
    search = SemanticSearch(settings=learning_database.settings, database=machine.database)
    turns = [{"role": "user", "name": "Ada", "content": "I adopted a kitten"}]
    await search.add_conversation(turns, session_id="chat", identity=ADA)
    assert await portal().run(machine.embed_memories(ADA)) == 1
    assert embedder.documents == ["Ada: I adopted a kitten"]


async def test_an_empty_question_is_not_embedded(make: Make) -> None:
    embeddings = Meanings()
    machine = make(embeddings)
    await tell(machine, *FAR)
    assert len(await recall(machine, " \n")) == len(FAR)
    assert embeddings.questions == []


async def test_long_texts_are_cut_before_they_are_embedded(make: Make) -> None:
    embeddings = Meanings()
    machine = make(embeddings)
    await tell(machine, "kitten " * 1500)
    await recall(machine, "cat " * 100_000)
    assert max(len(text) for text in embeddings.questions + embeddings.documents) <= 8_000


async def test_profile_and_session_need_no_vectors(make: Make, learning_database: ThrowawayDatabase) -> None:
    machine = make(Meanings())
    await machine.upsert_learning(identity=ADA, store="user_profile", field="name", content="Ada")
    await machine.upsert_learning(identity=ADA, store="session_context", field="summary", content="Cats")
    await tell(machine, "I like tea")
    assert [content for content, _, _ in vectors(learning_database)] == ["I like tea"]


# --- what is written otherwise ----------------------------------------------------------------------------------


async def test_what_a_tool_or_a_program_wrote_gets_its_vector_with_the_next_learning(make: Make) -> None:
    machine = make(Meanings())
    await machine.upsert_learning(identity=ADA, store="user_memory", content="I adopted a kitten")
    assert await machine.search("tomcat", identity=ADA) == []
    await tell(machine, "I like tea")
    assert (await machine.search("tomcat", identity=ADA))[0]["content"] == "I adopted a kitten"


async def test_a_changed_memory_is_found_by_its_new_meaning(
    make: Make, learning_database: ThrowawayDatabase
) -> None:
    machine = make(Meanings())
    receipt = await machine.upsert_learning(identity=ADA, store="user_memory", content="I adopted a kitten")
    await portal().run(machine.embed_memories(ADA))
    await machine.upsert_learning(
        identity=ADA, store="user_memory", content="I bought a sedan", memory_id=receipt["memory_id"]
    )
    await portal().run(machine.embed_memories(ADA))
    assert [content for content, _, _ in vectors(learning_database)] == ["I bought a sedan"]
    assert (await machine.search("vehicle", identity=ADA))[0]["content"] == "I bought a sedan"


async def test_another_model_makes_vectors_of_its_own_and_meets_no_others(
    make: Make, learning_database: ThrowawayDatabase
) -> None:
    first = make(Meanings(model="first"))
    await tell(first, *FAR)
    second_embeddings = Meanings(dimensions=6, model="second")
    second = make(second_embeddings)
    assert await second.search("tomcat", identity=ADA) == []
    assert len(await recall(second, "tomcat")) == len(FAR)
    await tell(second, "I like tea")
    assert (await recall(second, "tomcat"))[0] == "I adopted a kitten"
    assert sorted(second_embeddings.documents) == sorted([*FAR, "I like tea"])
    assert {(model, dimensions) for _, model, dimensions in vectors(learning_database)} == {
        ("Meanings:first", 8),
        ("Meanings:second", 6),
    }
    assert (await recall(first, "tomcat"))[0] == "I adopted a kitten"


async def test_the_same_model_in_another_dimension_is_made_anew(
    make: Make, learning_database: ThrowawayDatabase
) -> None:
    """Behind one name a server may put another model: its vectors cannot be compared with the old ones."""
    await tell(make(Meanings(dimensions=8)), *FAR)
    shorter = make(Meanings(dimensions=6))
    assert len(await recall(shorter, "tomcat")) == len(FAR)
    await tell(shorter, "I like tea")
    assert (await recall(shorter, "tomcat"))[0] == "I adopted a kitten"
    assert {content for content, _, dimensions in vectors(learning_database) if dimensions == 6} == {
        *FAR, "I like tea",
    }  # fmt: skip


# --- what is shared, what was said, and many -------------------------------------------------------------------


async def shared_by_the_tenant(database: Database, content: str) -> None:
    learning = {"store": "application", "scope": "tenant", "content": content}
    await database.call("upsert_learning", ADA, learning=learning)


async def test_what_a_tenant_shares_is_found_by_meaning(make: Make) -> None:
    machine = make(Meanings())
    await shared_by_the_tenant(machine.database, "Table feline_owners holds each kitten")
    assert await portal().run(machine.embed_memories(Identity(tenant_id="default"), scope="tenant")) == 1
    found = await machine.search("my tomcat", identity=ADA, scope="tenant")
    assert [hit["content"] for hit in found] == ["Table feline_owners holds each kitten"]
    assert await machine.search("my tomcat", identity=ADA) == []


async def test_turns_of_conversations_are_found_by_meaning(make: Make) -> None:
    machine = make(Meanings())
    turn = {
        "store": "conversation", "kind": "user", "content": "Yes, a kitten!", "session_id": "s7", "turn": 3,
        "speaker": "Ada",
    }  # fmt: skip
    await machine.database.call("upsert_learning", ADA, learning=turn)
    assert await portal().run(machine.embed_memories(ADA)) == 1
    assert [hit["content"] for hit in await machine.search("tomcat", identity=ADA)] == ["Yes, a kitten!"]


async def test_the_background_embeds_for_all_what_a_new_model_has_not(
    make: Make, learning_database: ThrowawayDatabase
) -> None:
    old = make(Meanings(model="old"))
    await tell(old, *FAR)
    await tell(old, "I like tea", identity=BOB.with_(tenant_id="acme"))
    await shared_by_the_tenant(old.database, "A table of boats")
    machine = make(Meanings(model="new"))
    context = StepContext(
        settings=machine.settings, database=machine.database, identity=Identity(tenant_id="default"),
        deadline=datetime.now(UTC) + timedelta(minutes=5), progress=lambda told: None,
    )  # fmt: skip
    await old.aclose()
    report = await embed(context)
    assert report.counts["embedded"] >= 6
    assert sum(model == "Meanings:new" for _, model, _ in vectors(learning_database)) == 6
    assert (await recall(machine, "tomcat"))[0] == "I adopted a kitten"
    assert (await embed(context)).counts["embedded"] == 0


async def test_vectors_go_with_their_memory_and_lists_with_their_user(
    learning_database: ThrowawayDatabase,
) -> None:
    database = open_database(learning_database.settings)
    with psycopg.connect(learning_database.url, autocommit=True) as connection:
        many_vectors(connection, 300, memories=100_000)
        await database.call("arrange_embeddings", ADA, model="m", dimensions=128)
        counted = "SELECT (SELECT count(*) FROM agent_memory_embedding), (SELECT count(*) FROM agent_embedding_list)"
        vectors_kept, lists = connection.execute(counted).fetchone() or (0, 0)
        assert (vectors_kept, lists > 10) == (300, True)
        with connection.transaction(force_rollback=True):  # a bare look, without our functions' own filters
            connection.execute("SELECT set_config('agent.tenant_id', 'default', true)")
            connection.execute("SELECT set_config('agent.user_id', 'bob', true)")
            connection.execute("SET LOCAL ROLE agent_app")
            assert connection.execute(counted).fetchone() == (0, 0)
        memory_id = connection.execute("SELECT memory_id FROM agent_memory LIMIT 1").fetchone()
        assert memory_id is not None
        await database.call("delete_learning", ADA, the_memory_id=str(memory_id[0]))
        assert connection.execute(counted).fetchone() == (299, lists)
        await database.call("erase_user", ADA)
        assert connection.execute(counted).fetchone() == (0, 0)


def many_vectors(connection: psycopg.Connection[Any], count: int, *, memories: int) -> NDArray[np.float64]:
    """Ada gets so many memories with vectors of 128 dimensions around forty directions; her scope is said to have
    `memories`, for the paths of large scopes."""
    chance = np.random.default_rng(7)
    made = chance.normal(size=(40, 128))[chance.integers(0, 40, count)] + 0.6 * chance.normal(
        size=(count, 128)
    )
    connection.execute(
        "INSERT INTO agent_memory (tenant_id, memory_id, version, store, owner_id, content, content_hash, trust)"
        " SELECT 'default', gen_random_uuid(), 1, 'user_memory', %s, n::text, n::text::bytea, 'user'"
        " FROM generate_series(1, %s) AS n",
        (ADA.user_id, count),
    )
    given = [str(vector) for vector in made.round(5).tolist()]
    connection.execute(
        "INSERT INTO agent_memory_embedding (tenant_id, scope, owner_id, memory_number, model, dimensions, embedding)"
        " SELECT m.tenant_id, 'user', m.owner_id, m.memory_number, 'm', 128, agent_private.unit_vector(v::vector)"
        " FROM agent_memory m JOIN unnest(%s::text[]) WITH ORDINALITY AS g (v, n) ON m.content = n::text",
        (given,),
    )
    connection.execute(
        "INSERT INTO agent_scope (tenant_id, scope, owner_id, memory_count) VALUES ('default', 'user', %s, %s)",
        (ADA.user_id, memories),
    )
    return made


def nearest(connection: psycopg.Connection[Any], question: NDArray[np.float64]) -> list[int]:
    """The ten nearest of Ada's, as numbers of `many_vectors`, under row level security."""
    with connection.transaction(force_rollback=True):
        connection.execute(
            "SELECT set_config('agent.tenant_id', 'default', true), set_config('agent.user_id', %s, true),"
            " set_config('agent.reach', 'user', true)",
            (ADA.user_id,),
        )
        connection.execute("SET LOCAL ROLE agent_app")
        return [
            int(content) - 1
            for (content,) in connection.execute(
                "SELECT m.content FROM agent_private.nearest('user', %s, %s::vector, 'm', 10) n"
                " JOIN agent_memory m USING (memory_number) ORDER BY n.similarity DESC",
                (ADA.user_id, str(question.tolist())),
            )
        ]


def recall_at_ten(connection: psycopg.Connection[Any], made: NDArray[np.float64]) -> float:
    """The share of the truly nearest that is found, for thirty questions near what is there."""
    chance = np.random.default_rng(8)
    units = made / np.linalg.norm(made, axis=1, keepdims=True)
    found = []
    for number in chance.integers(0, len(made), 30):
        question = made[number] + 0.5 * chance.normal(size=128)
        exact = set(np.argsort(-units @ question)[:10].tolist())
        found.append(len(exact & set(nearest(connection, question))) / 10)
    return float(np.mean(found))


@pytest.mark.parametrize(
    ("memories", "at_least"),
    [(2_000, 0.99), (6_000, 0.97)],
    ids=["small: every vector", "larger: by their codes"],
)
def test_the_nearest_are_found(learning_database: ThrowawayDatabase, memories: int, at_least: float) -> None:
    with psycopg.connect(learning_database.url, autocommit=True) as connection:
        made = many_vectors(connection, 3_000, memories=memories)
        assert recall_at_ten(connection, made) >= at_least


async def test_a_large_scope_is_searched_by_lists_while_they_are_made_too(
    learning_database: ThrowawayDatabase,
) -> None:
    database = open_database(learning_database.settings)
    arrange = {"model": "m", "dimensions": 128, "row_limit": 1_500}
    with psycopg.connect(learning_database.url, autocommit=True) as connection:
        made = many_vectors(connection, 3_000, memories=100_000)
        moved = [await database.call("arrange_embeddings", ADA, **arrange)]
        assert recall_at_ten(connection, made) >= 0.95
        moved += [await database.call("arrange_embeddings", ADA, **arrange) for _ in range(2)]
        assert moved == [1_500, 1_500, 0]
        assert recall_at_ten(connection, made) >= 0.95
        # It grew more than fourfold: lists of a second generation take over, and the first ones go at the end.
        connection.execute("UPDATE agent_scope SET memory_count = 600000")
        counted = "SELECT count(DISTINCT generation), count(*) FROM agent_embedding_list"
        assert await database.call("arrange_embeddings", ADA, **arrange) == 1_500
        assert (connection.execute(counted).fetchone() or (0,))[0] == 2
        assert recall_at_ten(connection, made) >= 0.9
        assert await database.call("arrange_embeddings", ADA, **{**arrange, "row_limit": 2_000}) == 1_500
        generations, lists = connection.execute(counted).fetchone() or (0, 0)
        assert (generations, lists > 300) == (1, True)
        assert recall_at_ten(connection, made) >= 0.9


# --- embedders that fail ----------------------------------------------------------------------------------------

NO_VECTOR: dict[str, Any] = {
    "an error": RuntimeError("the text was: my cat"),
    "silence": never,
    "no numbers": [float("nan")] * 8,
    "one that is none": [1.0] * 7 + [float("nan")],
    "without end": [float("inf")] * 8,
    "zeros": [0.0] * 8,
    "too large for the database": [1e30] * 8,
    "too small for the database": [1e-30] * 8,
    "too many": [0.1] * 16_001,
    "empty": [],
    "none at all": None,
    "words": ["a", "b"],
    "a list in a list": [[0.1] * 8],
}


@pytest.mark.parametrize("kind", NO_VECTOR)
async def test_a_question_without_a_vector_is_answered_by_words(
    make: Make, heard: list[Event], kind: str
) -> None:
    machine = make(Broken(NO_VECTOR[kind]), embedding_timeout=timedelta(milliseconds=150))
    await tell(machine, *FAR)
    heard.clear()
    assert (await recall(machine, "What of the kitten of my cat"))[0] == "I adopted a kitten"
    assert [event.name for event in heard] == ["embedding_failed", "knowledge_recalled"]
    assert heard[0].facts["model"] == "Broken:meanings"
    assert "my cat" not in str(heard[0].facts)
    assert (await machine.search("kitten", identity=ADA))[0]["content"] == "I adopted a kitten"


async def test_a_vector_of_another_dimension_finds_by_words(make: Make) -> None:
    machine = make(Broken([0.5] * 5))
    await tell(machine, *FAR)
    assert (await recall(machine, "What of the kitten"))[0] == "I adopted a kitten"


async def test_a_failure_is_not_remembered(make: Make) -> None:
    embeddings = Broken(RuntimeError("down"))
    machine = make(embeddings)
    await tell(machine, *FAR)
    await recall(machine, "tomcat")
    embeddings.answer = embeddings.vector("tomcat")
    assert (await recall(machine, "tomcat"))[0] == "I adopted a kitten"


NO_ANSWER: dict[str, Any] = {
    "an error": RuntimeError("down"),
    "silence": never,
    "too few": [],
    "fewer": [[0.1] * 8],
    "more": [[0.1] * 8] * 5,
}
NO_VECTORS: dict[str, Any] = {
    "no numbers": [[math.nan] * 8] * 4,
    "zeros": [[0.0] * 8] * 4,
    "none": [None] * 4,
    "too large": [[1e30] * 8] * 4,
    "text": "text",
    "empty": [[]] * 4,
}


@pytest.mark.parametrize("kind", NO_ANSWER)
async def test_memories_without_vectors_are_learned_and_get_them_later(
    make: Make, learning_database: ThrowawayDatabase, kind: str
) -> None:
    embeddings = BrokenForMemories(NO_ANSWER[kind])
    machine = make(embeddings, model_timeout=timedelta(milliseconds=200))
    await record(machine, *FAR)
    with pytest.raises(ModelError):
        await portal().run(machine.learn_session(ADA))
    assert len(await machine.get_learnings(identity=ADA, store="conversation")) == len(FAR)
    assert (await recall(machine, "What of the kitten"))[0] == "I adopted a kitten"
    assert vectors(learning_database) == []

    embeddings.answer = None
    assert await portal().run(machine.learn_session(ADA)) == 0
    assert len(vectors(learning_database)) == len(FAR)
    assert (await recall(machine, "tomcat"))[0] == "I adopted a kitten"


@pytest.mark.parametrize("kind", NO_VECTORS)
async def test_vectors_that_cannot_be_used_are_told_and_left_out(
    make: Make, learning_database: ThrowawayDatabase, heard: list[Event], kind: str
) -> None:
    embeddings = BrokenForMemories(NO_VECTORS[kind])
    machine = make(embeddings)
    await tell(machine, *FAR)
    assert vectors(learning_database) == []
    (event,) = [event for event in heard if event.name == "embedding_failed"]
    assert (event.facts["model"], event.facts["memories"]) == ("BrokenForMemories:meanings", 4)
    assert (await recall(machine, "What of the kitten"))[0] == "I adopted a kitten"

    embeddings.answer = None
    await tell(machine, "I like tea")
    assert len(vectors(learning_database)) == len(FAR) + 1


@pytest.mark.parametrize("bad", [[math.nan] * 8, [1.0] * 3, None])
async def test_one_vector_that_cannot_be_used_does_not_hold_up_the_others(
    make: Make, learning_database: ThrowawayDatabase, bad: Any
) -> None:
    class OneBad(Meanings):
        def vector(self, text: str) -> list[float]:
            return bad if "poison" in text else super().vector(text)

    machine = make(OneBad())
    await tell(machine, "I like tea", "poison", *FAR)
    await tell(machine, "More poison")
    assert {content for content, _, dimensions in vectors(learning_database) if dimensions == 8} == {
        "I like tea", *FAR,
    }  # fmt: skip
    assert (await recall(machine, "tomcat"))[0] == "I adopted a kitten"


async def test_an_embedder_that_changes_its_mind_about_dimensions_is_not_asked_for_ever(make: Make) -> None:
    class Fickle(Meanings):
        def vector(self, text: str) -> list[float]:
            return [1.0] * (1 + len(self.documents) % 7)

        async def aembed_documents(self, texts: list[str]) -> list[list[float]]:
            assert len(self.documents) < 100
            return await super().aembed_documents(texts)

    machine = make(Fickle())
    await tell(machine, *FAR)
    await tell(machine, "I like tea")


def test_embedders_are_told_apart_by_class_and_model() -> None:
    assert embedder_name("openai:small") == "openai:small"
    assert embedder_name(Meanings(model="one")) != embedder_name(Meanings(model="two"))
    assert embedder_name(Meanings()) != embedder_name(Broken(None))


# --- vectors as text --------------------------------------------------------------------------------------------


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True), max_size=20))
def test_a_vector_is_text_that_the_database_reads_or_is_refused(values: list[float]) -> None:
    try:
        text = as_vector(values).text
    except ModelError:
        return
    read = [float(number) for number in text.strip("[]").split(",")]
    assert len(read) == len(values)
    assert any(read)
    assert sum(number * number for number in read) < 3.4e38


def test_numbers_of_any_kind_are_numbers() -> None:
    class Numpy(float):
        """As libraries give them."""

    assert as_vector([Numpy(1), 2, True]).text == "[1.0,2.0,1.0]"
    assert as_vector((0.5,)).dimensions == 1


async def test_the_cache_of_questions_has_an_end() -> None:
    embeddings = Meanings()
    embedder = Embedder(embeddings, name="x", timeout=timedelta(seconds=5))
    texts: Sequence[str] = [f"question {number}" for number in range(600)]
    for text in texts:
        await embedder.embed_question(text)
    await embedder.embed_question(texts[-1])
    assert len(embeddings.questions) == 600
    await embedder.embed_question(texts[0])
    assert len(embeddings.questions) == 601
