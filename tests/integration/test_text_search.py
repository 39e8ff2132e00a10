# ruff: noqa: RUF001 -- texts of other scripts
"""Search by words in the storage functions: what is written to be found, what is found, and why."""

from __future__ import annotations

import random
import string
from collections.abc import AsyncIterator
from typing import Any

import psycopg
import pytest

from agent import Identity
from agent.database.postgres import PostgresDatabase
from agent.errors import InvalidLearning
from agent.learning.semantic_search import SemanticSearch
from agent.portal import portal
from agent.testing.throwaway import ThrowawayDatabase
from tests.integration.rows import counted_scopes, memory, recounted_scopes, rows, value

ADA = Identity(user_id="ada", session_id="s1")
BOB = Identity(user_id="bob", session_id="s1")


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
        {"tags": ["a" * 50] * 400},
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


# What was believed


async def _now(learning_database: ThrowawayDatabase) -> str:
    return str(value(learning_database.url, "SELECT clock_timestamp()"))


async def test_an_earlier_time_is_answered_with_what_was_believed_then(
    database: PostgresDatabase, learning_database: ThrowawayDatabase
) -> None:
    times = [await _now(learning_database)]
    first = await database.call("upsert_learning", ADA, learning=memory("Lives in Rome", tags=["home"]))
    times.append(await _now(learning_database))
    change = memory("Lives in Bern", memory_id=first["memory_id"])
    await database.call("upsert_learning", ADA, learning=change)
    times.append(await _now(learning_database))
    retire = {"action": "retire", "store": "user_memory", "memory_id": first["memory_id"]}
    await database.call("upsert_learnings", ADA, learnings=[retire])
    times.append(await _now(learning_database))

    async def believed(as_of: str | None, question: str = "Who lives in Rome?", **filters: Any) -> list[str]:
        hits = await database.call("match_memories", ADA, question=question, as_of=as_of, filters=filters)
        return [hit["content"] for hit in hits]

    answers = [await believed(time) for time in [*times, None]]
    assert answers == [[], ["Lives in Rome"], ["Lives in Bern"], [], []]
    assert await believed(times[1], "Rome") == ["Lives in Rome"], "a word of history alone"
    assert await believed(times[1], "Rome", tags=["home"]) == ["Lives in Rome"]
    assert await believed(times[1], "Rome", tags=["work"]) == []
    await database.call("delete_learning", ADA, the_memory_id=first["memory_id"])
    assert await believed(times[1]) == [], "what was deleted is nowhere"
    assert value(learning_database.url, "SELECT count(*) FROM agent_memory_past_term") == 0


async def test_an_earlier_time_sees_what_had_not_ended_yet(
    database: PostgresDatabase, learning_database: ThrowawayDatabase
) -> None:
    await database.call("upsert_learning", ADA, learning=memory("Works at Acme"))
    while_true = value(
        learning_database.url,
        "UPDATE agent_memory SET valid_to = clock_timestamp(), valid_from = '2020-01-01' RETURNING recorded_at::text",
    )

    assert await database.call("match_memories", ADA, question="Acme") == []
    hits = await database.call("match_memories", ADA, question="Acme", as_of=while_true)
    assert [hit["content"] for hit in hits] == ["Works at Acme"]


# Languages


@pytest.mark.parametrize(
    ("text", "question"),
    [
        ("Я читаю интересные книги о Москве", "Какую книгу?"),
        ("МОСКВА", "москва"),
        ("Ещё ёлка", "елка"),
        ("אני גר בבית ליד הים", "איפה הבית?"),
        ("וכשהלכתי לים בערב", "ים"),
        ("שָׁלוֹם לכולם", "שלום"),
        ("我住在北京，喜欢喝绿茶。", "北京"),
        ("我住在北京，喜欢喝绿茶。", "茶"),
        ("私は東京に住んでいます。", "東京のどこ?"),
        ("ﾐｶﾝが好き", "ミカン"),
        ("저는 커피를 좋아해요", "커피"),
        ("ฉันชอบดื่มชาเขียว", "ชาเขียว"),
        ("Μένω στην Αθήνα", "αθήνα"),
        ("Nice café in Zürich", "cafe zurich"),
        ("Cafe\u0301 noir", "café"),
        ("Ｆｕｌｌ ｗｉｄｔｈ", "width"),
        ("My cat 🐈 sleeps", "🐈"),
        ("👍🏽 for the plan", "👍"),
        ("“Quoted”—dashed…words", "quoted dashed words"),
        ("I moved to Москва with 猫 and חתול", "москва"),
        ("I moved to Москва with 猫 and חתול", "moving"),
        ("I moved to Москва with 猫 and חתול", "猫"),
        ("I moved to Москва with 猫 and חתול", "החתול"),
        ("أحب القهوة العربية", "قهوة"),
        ("मुझे किताबें पसंद हैं", "किताब"),
    ],
)
async def test_texts_are_found_in_their_script(database: PostgresDatabase, text: str, question: str) -> None:
    await database.call("upsert_learning", ADA, learning=memory(text))
    await database.call("upsert_learning", ADA, learning=memory("Something else altogether"))
    hits = await database.call("match_memories", ADA, question=question)
    assert [hit["content"] for hit in hits] == [text]


async def test_a_change_of_language_is_searched_by_both_until_all_is_indexed_again(
    database: PostgresDatabase, learning_database: ThrowawayDatabase
) -> None:
    nobody = Identity(tenant_id=ADA.tenant_id)

    async def found(question: str) -> set[str]:
        hits = await database.call("match_memories", ADA, question=question)
        return {hit["content"] for hit in hits}

    for text in ("Running houses", "Die Häuser am See", "Das Haus"):
        await database.call("upsert_learning", ADA, learning=memory(text))
    assert await found("house") == {"Running houses"}
    assert await found("Häusern") == set(), "English knows no German endings"

    receipt = await database.call("set_text_language", nobody, the_language=" German ")
    assert receipt == {"language": "german", "scopes_waiting": 1}
    later = await database.call("upsert_learning", ADA, learning=memory("Viele Häuser"))
    assert await found("house") == {"Running houses"}
    assert await found("Häusern") == {"Viele Häuser", "Das Haus"}

    first = await database.call("reindex_words", nobody, row_limit=2)
    assert first == {"reindexed": 2, "scopes_waiting": 1}
    assert await found("Häusern") == {"Viele Häuser", "Das Haus", "Die Häuser am See"}
    assert await found("Haus") == {"Viele Häuser", "Die Häuser am See", "Das Haus"}
    second = await database.call("reindex_words", nobody, row_limit=10)
    assert second["scopes_waiting"] == 0
    assert await database.call("reindex_words", nobody) == {"reindexed": 0, "scopes_waiting": 0}
    words = rows(
        learning_database.url,
        "SELECT t.lexeme FROM agent_memory_term t EXCEPT SELECT l.lexeme "
        "FROM agent_memory m, agent_private.lexemes(m.content, 'german') AS l",
    )
    assert words == []
    counted = rows(learning_database.url, "SELECT lexeme, memory_count FROM agent_term_count ORDER BY 1")
    assert counted == rows(
        learning_database.url,
        "SELECT lexeme, count(*)::integer FROM agent_memory_term GROUP BY lexeme ORDER BY 1",
    )
    await database.call("delete_learning", ADA, the_memory_id=later["memory_id"])
    assert (await database.call("set_text_language", nobody, the_language="klingon"))["language"] == "simple"


# Large scopes


async def test_a_filter_that_keeps_little_of_a_large_scope_still_gets_its_best(
    database: PostgresDatabase, learning_database: ThrowawayDatabase
) -> None:
    await database.call("upsert_learning", ADA, learning=memory("seed"))
    # More than what is read of all words: the common ones are bounded, and one memory in 400 has the tag.
    fill = """
        WITH written AS (
            INSERT INTO agent_memory
                (tenant_id, memory_id, version, store, scope, owner_id, content, content_hash, trust, tags)
            SELECT 'default', gen_random_uuid(), 1, 'user_memory', 'user', 'ada', 'common word number ' || n
                   || CASE WHEN n % 400 = 0 THEN ' for the rarest of all the readers who read' ELSE '' END,
                   sha256(n::text::bytea), 'user', CASE WHEN n % 400 = 0 THEN ARRAY['rare'] ELSE '{}' END
            FROM generate_series(1, 12000) AS n
            RETURNING memory_number)
        SELECT set_config('agent.tenant_id', 'default', false),
               agent_private.index_memories('user', 'ada', array_agg(w.memory_number)) FROM written w
    """
    rows(learning_database.url, fill)

    hits = await database.call(
        "match_memories", ADA, question="common word number", filters={"tags": ["rare"]}, memory_limit=10
    )
    assert len(hits) == 10
    assert all(hit["tags"] == ["rare"] for hit in hits)
    assert (
        len(await database.call("match_memories", ADA, question="common word number", memory_limit=10)) == 10
    )
    exact = await database.call("match_memories", ADA, question="common word number 7777", memory_limit=1)
    assert exact[0]["content"] == "common word number 7777"


# Bad input

_QUERIES = [
    "",
    " \n\t",
    "the of and",
    "🦑🦑 🎻",
    "\u200b\u0301",
    "q" * 100_000,
    "tea " * 25_000,
    "茶" * 33_000,
    "tea & !rome | (cello <-> billing:*)",
    "'; DROP TABLE agent_memory; --",
    '"tea\'s \\" %s {0} $1 :name',
    "\\u0000 \\",
    "tea\x00rome",
    "\ud800tea",
    "Что? 何？ מה?",
    "﷽" * 500,
    "a" * 99 + "é" * 99,
    "\x01\x02\x1f\x7f",
    "http://example.com/?q=tea&x=<b> user@example.com -1.5e10",
]


@pytest.mark.parametrize("function", ["match_memories", "recall_context"])
async def test_any_question_gives_a_list_of_ones_own(database: PostgresDatabase, function: str) -> None:
    await database.call("upsert_learning", ADA, learning=memory("Ada likes tea and Rome"))
    await database.call("upsert_learning", BOB, learning=memory("Bob likes tea and Rome"))
    for question in _QUERIES:
        for vector in ({}, {"question_embedding": "[1,2,3]", "embedding_model": "other"}):
            answer = await database.call(function, ADA, question=question, **vector)
            found = answer if isinstance(answer, list) else answer["memories"]
            assert {hit["content"] for hit in found} <= {"Ada likes tea and Rome"}, question[:40]
    assert len(await database.call("match_memories", ADA, question="tea\x00 'Rome' & |!")) == 1


def test_any_question_gives_a_list_over_the_sync_door_too(learning_database: ThrowawayDatabase) -> None:
    search = SemanticSearch(settings=learning_database.settings)
    database = PostgresDatabase(learning_database.url)
    for person, text in ((ADA, "Ada likes tea"), (BOB, "Bob likes tea")):
        portal().run_sync(database.call("upsert_learning", person, learning=memory(text)))
    for question in _QUERIES:
        found = search.search_memories_sync(question, identity=ADA)
        assert {hit["content"] for hit in found} <= {"Ada likes tea"}, question[:40]
        assert "Bob" not in search.get_relevant_context_sync(question, identity=ADA)
    assert [hit["content"] for hit in search.search_memories_sync("tea & !", identity=ADA)] == [
        "Ada likes tea"
    ]
    portal().run_sync(database.close())


def test_any_text_has_words_each_of_them_once(learning_database: ThrowawayDatabase) -> None:
    alphabet = (
        string.printable
        + "éüßñçÅøİıſ"
        + "абвгёйъ"
        + "אבגדהושלם\u05b0"
        + "ابتثجةى\u064b\u0640"
        + "αβγς"
        + "中文字典猫日本語カナひらがな"
        "한국어"
        + "ไทยภาษา"
        + "हिन्दी"
        + "🐈👍🏽❤️🇮🇹"
        + "“”—…、。・"
        + "\u200b\u200d\ufe0f\u0301\u00ad"
        + "ﬁ①ｋＡ½"
    )
    chance = random.Random(5)
    texts = sorted({"".join(chance.choices(alphabet, k=chance.randint(1, 60))) for _ in range(3000)})
    with psycopg.connect(learning_database.url) as connection:
        for language in ("english", "german", "simple", "serbian"):
            found = connection.execute(
                """
                SELECT t, l.lexeme, l.occurrences FROM unnest(%s::text[]) AS t
                LEFT JOIN LATERAL agent_private.lexemes(t, %s) AS l ON true
                """,
                (texts, language),
            ).fetchall()
            words = [(lexeme, times) for _, lexeme, times in found if lexeme is not None]
            assert all(0 < len(lexeme) <= 100 and times > 0 for lexeme, times in words)
            assert len(words) > len(texts)
            pairs = [(text, lexeme) for text, lexeme, _ in found if lexeme is not None]
            assert len(set(pairs)) == len(pairs), "each word of a text once"


def test_long_runs_without_a_space_and_of_accents_are_taken_in_pieces(
    learning_database: ThrowawayDatabase,
) -> None:
    chance = random.Random(7)
    run = "".join(chance.choices("a_é-.字", k=20_000))
    accents = "e" + "\u0301\u0316" * 9_000
    with psycopg.connect(learning_database.url) as connection:
        row = connection.execute("SELECT agent_private.spaced(%s)", (run,)).fetchone()
        assert row is not None
        assert max(map(len, row[0].split())) <= 255
        assert row[0].replace(" ", "") == run
        row = connection.execute(
            "SELECT agent_private.composed(%s), agent_private.plain_text(%s), agent_private.composed(%s)",
            (accents, "É" * 1_001 + " ", "cafe\u0301 ①"),
        ).fetchone()
        assert row is not None
        assert row[0].count("\u0316") == 9_000
        assert row[0].count("\u0301\u0316") > 10  # they are put in order within each piece, not over all
        assert row[1:] == ("é" * 1_001, "café 1")
        words = connection.execute(
            "SELECT array_agg(lexeme) FROM agent_private.lexemes(%s)", ("blue_" * 3_000 + " bees",)
        ).fetchone()
        assert words is not None
        assert {"blue", "bee"} <= set(words[0])
