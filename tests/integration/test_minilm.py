"""Recall by meaning with a real model, all-MiniLM-L6-v2, of the dependency group `minilm`; required where CI is set."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from datetime import timedelta

import numpy as np
import pytest

from agent import Identity, LearningMachine
from agent.portal import portal
from agent.testing.throwaway import ThrowawayDatabase
from benchmarks.minilm import MiniLM, is_installed

if not is_installed() and not os.environ.get("CI"):
    pytest.skip("the packages of the dependency group minilm are not installed", allow_module_level=True)

ADA = Identity(user_id="ada@example.com", session_id="t1")
FACTS = (
    "She asked support to terminate the subscription before it renews",
    "Her sister plays the violin in an orchestra",
    "The invoice of March was paid twice",
    "He is allergic to peanuts",
    "They are moving to Lisbon in autumn",
)
# No question shares a word with what it should find.
QUESTIONS = (
    ("How do I cancel?", FACTS[0]),
    ("Which musical instruments are in our family?", FACTS[1]),
    ("a duplicate payment", FACTS[2]),
    ("What must I not cook for dinner with nuts?", FACTS[3]),
    ("Where will we live next year, which city?", FACTS[4]),
)


@pytest.fixture
async def machine(learning_database: ThrowawayDatabase) -> AsyncIterator[LearningMachine]:
    settings = learning_database.settings.model_copy(
        update={"recall_timeout": timedelta(seconds=30), "embedding_timeout": timedelta(seconds=30)}
    )
    made = LearningMachine(embeddings=MiniLM(), settings=settings)
    yield made
    await made.aclose()


@pytest.mark.parametrize(("question", "fact"), QUESTIONS)
async def test_a_question_finds_what_shares_no_word_with_it(
    machine: LearningMachine, question: str, fact: str
) -> None:
    for content in FACTS:
        await machine.upsert_learning(identity=ADA, store="user_memory", content=content)
    assert [hit["content"] for hit in await machine.search(question, identity=ADA)] == []
    assert await portal().run(machine.embed_memories(ADA)) == len(FACTS)
    assert (await machine.search(question, identity=ADA))[0]["content"] == fact
    recalled = await portal().run(machine.recall(ADA, question))
    assert recalled.shown[0].content == fact


def test_vectors_are_those_of_the_model() -> None:
    """Checked once against `sentence-transformers` 6.2.0 on PyTorch 2.13.0, to six digits, for 205 texts."""
    vectors = MiniLM().vectors(["How do I cancel?", "terminate the subscription", "", "日本語", "a " * 2000])
    assert vectors.shape == (5, 384)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert vectors[0] @ vectors[1] == pytest.approx(0.575587, abs=1e-5)


def test_a_text_has_the_same_vector_in_any_company() -> None:
    model = MiniLM()
    texts = [fact + " again" * times for fact in FACTS for times in range(8)]  # more than a batch
    together = model.vectors(texts)
    assert np.allclose(together[3], model.vectors([texts[3]])[0], atol=1e-5)
    assert np.allclose(together[7], asyncio.run(model.aembed_query(texts[7])), atol=1e-5)
