"""Search by words in the storage functions: what is written to be found, what is found, and why."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from agent import Identity
from agent.database.postgres import PostgresDatabase
from agent.errors import InvalidLearning
from agent.testing.throwaway import ThrowawayDatabase
from tests.integration.rows import counted_scopes, memory, recounted_scopes, rows, value

ADA = Identity(user_id="ada", session_id="s1")


@pytest.fixture
async def database(learning_database: ThrowawayDatabase) -> AsyncIterator[PostgresDatabase]:
    """The transport to `learning_database`."""
    database = PostgresDatabase(learning_database.url)
    yield database
    await database.close()


def turn(content: str, number: int, **more: Any) -> dict[str, Any]:
    """A turn of a conversation as `upsert_learning` takes it."""
    return {
        "store": "conversation",
        "kind": "user",
        "session_id": "talk",
        "turn": number,
        "content": content,
        **more,
    }


# What is written


async def test_equal_messages_of_a_conversation_stay_apart(database: PostgresDatabase) -> None:
    receipts = [
        await database.call("upsert_learning", ADA, learning=learning)
        for learning in (turn("Yes", 1), turn("Yes", 3), turn("Yes", 1, session_id="other"), turn("Yes", 1))
    ]

    assert [receipt["status"] for receipt in receipts] == ["created", "created", "created", "unchanged"]
    assert len({receipt["memory_id"] for receipt in receipts}) == 3


async def test_a_turn_with_another_text_is_a_new_version_that_stays_in_its_place(
    database: PostgresDatabase, learning_database: ThrowawayDatabase
) -> None:
    first = await database.call("upsert_learning", ADA, learning=turn("I fly to Rome", 2, speaker="Ada"))
    second = await database.call("upsert_learning", ADA, learning=turn("I fly to Oslo", 2))
    by_id = {"store": "conversation", "memory_id": first["memory_id"], "content": "I fly to Bern"}
    third = await database.call("upsert_learning", ADA, learning=by_id)

    assert [second["status"], third["status"]] == ["updated", "updated"]
    assert {first["memory_id"], second["memory_id"], third["memory_id"]} == {first["memory_id"]}
    assert rows(
        learning_database.url,
        "SELECT session_id, turn, speaker, content FROM agent_memory WHERE superseded_at IS NULL",
    ) == [("talk", 2, "Ada", "I fly to Bern")]


async def test_turns_that_follow_each_other_have_places_that_differ_by_one(
    database: PostgresDatabase, learning_database: ThrowawayDatabase
) -> None:
    for learning in (
        turn("alpha", 1),
        turn("beta", 2),
        turn("gamma", 2, session_id="other"),
        memory("delta"),
    ):
        await database.call("upsert_learning", ADA, learning=learning)

    place = dict(rows(learning_database.url, "SELECT lexeme, place FROM agent_memory_term"))
    assert place["beta"] - place["alpha"] == 1
    assert place["beta"] >> 20 != place["gamma"] >> 20
    assert place["beta"] & 0xFFFFF == place["gamma"] & 0xFFFFF == 2
    assert place["delta"] is None


async def test_a_turn_is_found_by_the_name_of_its_speaker(
    database: PostgresDatabase, learning_database: ThrowawayDatabase
) -> None:
    await database.call("upsert_learning", ADA, learning=turn("I like tea", 1, speaker="Melanie"))

    words = rows(learning_database.url, "SELECT lexeme FROM agent_memory_term ORDER BY 1")
    assert words == [("like",), ("melani",), ("tea",)]
    assert counted_scopes(learning_database.url) == recounted_scopes(learning_database.url)


@pytest.mark.parametrize(
    "wrong",
    [
        turn("Yes", 0),
        turn("Yes", 2**20),
        turn("Yes", 1, session_id=None),
        turn("Yes", 1, session_id="s" * 1001),
        turn("Yes", 1, store="user_memory"),
        turn("Yes", 1, field="name"),
        turn("Yes", 1) | {"turn": None},
        memory("Yes", tags=["x" * 101]),
        memory("Yes", tags=[""]),
        memory("Yes", tags=[1]),
        memory("Yes", tags="work"),
        memory("Yes", tags=[str(number) for number in range(33)]),
    ],
)
async def test_turns_and_tags_that_are_none_are_refused(
    database: PostgresDatabase, learning_database: ThrowawayDatabase, wrong: dict[str, Any]
) -> None:
    with pytest.raises(InvalidLearning):
        await database.call("upsert_learning", ADA, learning=wrong)
    assert value(learning_database.url, "SELECT count(*) FROM agent_memory") == 0


async def test_tags_are_kept_by_a_change_that_names_none_and_a_change_of_tags_is_a_new_version(
    database: PostgresDatabase, learning_database: ThrowawayDatabase
) -> None:
    first = await database.call("upsert_learning", ADA, learning=memory("Likes tea", tags=["b", "a", "b"]))
    for change in (memory("Likes chai"), memory("Likes chai", tags=["c"])):
        change["memory_id"] = first["memory_id"]
        await database.call("upsert_learning", ADA, learning=change)

    assert rows(learning_database.url, "SELECT tags FROM agent_memory ORDER BY version") == [
        (["a", "b"],),
        (["a", "b"],),
        (["c"],),
    ]


# Filters, time and reasons


async def test_filters_keep_what_fits_all_of_them(database: PostgresDatabase) -> None:
    for learning in (
        memory("Tea one", tags=["home", "drink"], kind="preference", valid_from="2024-01-01T00:00:00Z"),
        memory("Tea two", tags=["drink"], kind="fact", valid_from="2024-02-01T00:00:00Z", trust="tool"),
        memory("Tea three", session_id="other", valid_from="2024-03-01T00:00:00Z"),
        turn("Tea four", 1, valid_from="2024-04-01T00:00:00Z", speaker="Ada"),
    ):
        await database.call("upsert_learning", ADA, learning=learning)

    async def found(**filters: Any) -> set[str]:
        hits = await database.call("match_memories", ADA, question="tea", filters=filters)
        return {hit["content"].removeprefix("Tea ") for hit in hits}

    everything = {"one", "two", "three", "four"}
    assert await found() == everything
    assert await found(stores=["conversation"]) == {"four"}
    assert await found(stores=["user_memory"]) == everything - {"four"}
    assert await found(kinds=["fact", "preference"]) == {"one", "two", "three"}
    assert await found(tags=["drink"]) == {"one", "two"}
    assert await found(tags=["drink", "home"]) == {"one"}
    assert await found(trust=["tool"]) == {"two"}
    assert await found(session_id="talk") == {"four"}
    assert await found(since="2024-02-01T00:00:00Z") == {"two", "three", "four"}
    assert await found(until="2024-02-01T00:00:00Z") == {"one"}
    assert await found(since="2024-02-01T00:00:00+02:00", until="2024-03-15", kinds=None) == {"two", "three"}
    assert await found(stores=["user_memory"], tags=["drink"], trust=["user"]) == {"one"}
    assert await found(stores=[]) == set()


@pytest.mark.parametrize(
    "wrong",
    [
        {"store": ["user_memory"]},
        {"stores": "user_memory"},
        {"tags": [1]},
        {"session_id": 1},
        {"since": "yesterday-ish"},
        {"until": 5},
        {"since": "2024-13-45"},
        [],
        ["stores"],
    ],
)
async def test_filters_that_are_none_are_refused(database: PostgresDatabase, wrong: Any) -> None:
    with pytest.raises(InvalidLearning):
        await database.call("match_memories", ADA, question="tea", filters=wrong)


async def test_each_result_says_where_it_comes_from_and_why_it_was_found(database: PostgresDatabase) -> None:
    await database.call("upsert_learning", ADA, learning=memory("Likes green tea", tags=["drink"]))
    said = turn("Green tea for Melanie", 7, speaker="Melanie", valid_from="2024-05-01T00:00:00Z")
    await database.call("upsert_learning", ADA, learning=said)

    hits = await database.call("match_memories", ADA, question="Melanie and green tea")

    assert [hit["content"] for hit in hits] == ["Green tea for Melanie", "Likes green tea"]
    assert {key: hits[0][key] for key in ("store", "kind", "speaker", "session_id", "turn", "tags")} == {
        "store": "conversation",
        "kind": "user",
        "speaker": "Melanie",
        "session_id": "talk",
        "turn": 7,
        "tags": [],
    }
    assert hits[0]["valid_from"].startswith("2024-05-01")
    assert hits[1]["tags"] == ["drink"]
    assert [hit["why"]["words"]["rank"] for hit in hits] == [1, 2]
    assert hits[0]["why"]["words"]["score"] == 1 > hits[1]["why"]["words"]["score"] > 0
