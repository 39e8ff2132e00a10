"""The storage functions through the Postgres transport: what they answer and what is in the tables afterwards."""

from __future__ import annotations

import json
import random
import string
import uuid
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest

from agent import Identity
from agent.database.postgres import PostgresDatabase
from agent.errors import CallerError, ConflictError, IdentityError, InvalidLearning, LearningError, NotFound
from agent.testing.throwaway import ThrowawayDatabase
from tests.integration.rows import (
    OUR_TABLES,
    a_run,
    counted_scopes,
    counts,
    everything_stored,
    memory,
    recounted_scopes,
    rows,
    value,
)

ADA = Identity(user_id="ada@example.com", session_id="s1")
BOB = Identity(user_id="bob", session_id="s1")
NOBODY = Identity(session_id="s1")


@pytest.fixture
async def database(learning_database: ThrowawayDatabase) -> AsyncIterator[PostgresDatabase]:
    """The transport to `learning_database`."""
    database = PostgresDatabase(learning_database.url)
    yield database
    await database.close()


async def _upsert(
    database: PostgresDatabase, learning: dict[str, Any], identity: Identity = ADA, **more: Any
) -> Any:
    return await database.call("upsert_learning", identity, learning=learning, **more)


async def _contents(database: PostgresDatabase, identity: Identity = ADA, **wanted: Any) -> list[str]:
    found = await database.call("get_learnings", identity, wanted=wanted)
    return [item["content"] for item in found]


# Receipts, versions, fields


async def test_a_new_memory_is_created_at_version_one(database: PostgresDatabase) -> None:
    receipt = await _upsert(database, memory("Prefers tea"))

    assert receipt["status"] == "created"
    assert receipt["version"] == 1
    assert receipt["content"] == "Prefers tea"
    assert receipt["store"] == "user_memory"
    assert receipt["kind"] == "fact"
    assert uuid.UUID(receipt["memory_id"])
    assert await _contents(database) == ["Prefers tea"]


@pytest.mark.parametrize(
    "again",
    [
        "Prefers tea",
        "PREFERS TEA",
        "  prefers\n\ttea  ",
        "Prefers  tea.",
        "prefers tea!",
        "Prefers\u00a0tea",
        "\uff30refers tea",  # a full-width P
    ],
)
async def test_an_equal_text_is_the_same_memory(
    database: PostgresDatabase, learning_database: ThrowawayDatabase, again: str
) -> None:
    first = await _upsert(database, memory("Prefers tea"))
    second = await _upsert(database, memory(again))

    assert second["status"] == "unchanged"
    assert (second["memory_id"], second["version"]) == (first["memory_id"], 1)
    assert second["content"] == "Prefers tea"
    assert counts(learning_database.url)["agent_memory"] == 1


@pytest.mark.parametrize(
    "other", ["Prefers teas", "Prefers te a", "Préfers tea", "Prefers tea?", "prefers tea 🍵"]
)
async def test_a_text_that_says_something_else_is_another_memory(
    database: PostgresDatabase, other: str
) -> None:
    await _upsert(database, memory("Prefers tea"))
    receipt = await _upsert(database, memory(other))

    assert receipt["status"] == "created"
    assert set(await _contents(database)) == {"Prefers tea", other}


@pytest.mark.parametrize(("one", "other"), [("...", "!!!"), (".", "! !")])
async def test_texts_of_stops_alone_are_told_apart(database: PostgresDatabase, one: str, other: str) -> None:
    await _upsert(database, memory(one))
    receipt = await _upsert(database, memory(other))
    assert receipt["status"] == "created"


async def test_a_change_is_a_new_version_and_the_old_one_is_history(
    database: PostgresDatabase, learning_database: ThrowawayDatabase
) -> None:
    first = await _upsert(database, memory("Lives in Rome"))
    second = await _upsert(
        database, memory("Lives in Bern", memory_id=first["memory_id"], expected_version=1)
    )
    third = await _upsert(database, memory("Lives in Oslo", memory_id=first["memory_id"], expected_version=2))

    assert [second["status"], second["version"], third["version"]] == ["updated", 2, 3]
    assert await _contents(database) == ["Lives in Oslo"]
    found = await database.call("get_learning", ADA, the_memory_id=first["memory_id"])
    assert [(v["version"], v["content"], v["superseded_reason"]) for v in found["versions"]] == [
        (1, "Lives in Rome", "updated"),
        (2, "Lives in Bern", "updated"),
        (3, "Lives in Oslo", None),
    ]
    ended = [v["superseded_at"] for v in found["versions"]]
    assert ended[0] < ended[1]
    assert ended[2] is None
    words = rows(learning_database.url, "SELECT lexeme FROM agent_memory_term ORDER BY 1")
    assert words == [("live",), ("oslo",)]


async def test_a_change_of_kind_alone_is_a_new_version(database: PostgresDatabase) -> None:
    first = await _upsert(database, memory("Learns Greek"))
    receipt = await _upsert(database, memory("Learns Greek", kind="goal", memory_id=first["memory_id"]))

    assert (receipt["status"], receipt["version"], receipt["kind"]) == ("updated", 2, "goal")


async def test_a_change_to_a_text_that_is_known_already_merges_the_two(
    database: PostgresDatabase, learning_database: ThrowawayDatabase
) -> None:
    kept = await _upsert(database, memory("Lives in Bern", evidence=[{"run_id": "r1"}]))
    gone = await _upsert(database, memory("Lives in Rome", evidence=[{"run_id": "r2"}]))
    receipt = await _upsert(
        database, memory("lives in bern", memory_id=gone["memory_id"], evidence=[{"run_id": "r3"}])
    )

    assert (receipt["status"], receipt["memory_id"]) == ("unchanged", kept["memory_id"])
    assert await _contents(database) == ["Lives in Bern"]
    found = await database.call("get_learning", ADA, the_memory_id=kept["memory_id"])
    assert {item["run_id"] for item in found["evidence"]} == {"r1", "r3"}
    merged = await database.call("get_learning", ADA, the_memory_id=gone["memory_id"])
    assert merged["superseded_reason"] == f"merged into {kept['memory_id']}"
    assert counted_scopes(learning_database.url) == recounted_scopes(learning_database.url)


async def test_a_field_has_one_answer(
    database: PostgresDatabase, learning_database: ThrowawayDatabase
) -> None:
    field = {"store": "user_profile", "field": "name"}
    statuses = [
        (await _upsert(database, field | {"content": name, "value": name}))["status"]
        for name in ("Ada", "Ada", "Ada Lovelace", "Ada")
    ]

    assert statuses == ["created", "unchanged", "updated", "updated"]
    assert await _contents(database, store="user_profile") == ["Ada"]
    memory_ids = rows(learning_database.url, "SELECT DISTINCT memory_id FROM agent_memory")
    assert len(memory_ids) == 1, "the versions of a field are one memory"


async def test_fields_of_different_stores_and_sessions_do_not_meet(database: PostgresDatabase) -> None:
    await _upsert(database, {"store": "user_profile", "field": "summary", "content": "profile"})
    for session in ("s1", "s2"):
        await _upsert(
            database,
            {
                "store": "session_context",
                "field": "summary",
                "session_id": session,
                "content": f"of {session}",
            },
        )

    assert set(await _contents(database)) == {"profile", "of s1", "of s2"}
    known = await database.call("recall_context", ADA, question="")
    assert [item["content"] for item in known["session"]] == ["of s1"]
    assert [item["content"] for item in known["profile"]] == ["profile"]


@pytest.mark.parametrize(
    "given", [0, 1, -3.5, True, False, [], ["a", "b"], {"street": "Main", "number": 1}, "", None]
)
async def test_the_type_of_a_value_is_kept(database: PostgresDatabase, given: Any) -> None:
    receipt = await _upsert(
        database, {"store": "user_profile", "field": "age", "content": "shown", "value": given}
    )

    assert receipt["value"] == given
    assert type(receipt["value"]) is type(given)
    known = await database.call("recall_context", ADA, question="")
    assert known["profile"][0]["value"] == given


async def test_a_value_of_another_type_is_a_change_even_where_it_looks_the_same(
    database: PostgresDatabase,
) -> None:
    field = {"store": "user_profile", "field": "answer", "content": "1"}
    statuses = [
        (await _upsert(database, field | {"value": given}))["status"] for given in (1, 1, "1", None, None)
    ]

    assert statuses == ["created", "unchanged", "updated", "updated", "unchanged"]


async def test_a_field_is_cleared_and_can_be_set_again(database: PostgresDatabase) -> None:
    field = {"store": "user_profile", "field": "name"}
    await _upsert(database, field | {"content": "Ada", "value": "Ada"})

    cleared, again = await database.call(
        "upsert_learnings", ADA, learnings=[field | {"action": "retire"}, field | {"action": "retire"}]
    )
    assert (cleared["status"], cleared["content"]) == ("retired", "Ada")
    assert again["status"] == "absent"
    assert await _contents(database) == []

    receipt = await _upsert(database, field | {"content": "Ada", "value": "Ada"})
    assert receipt["status"] == "created"
    assert await _contents(database) == ["Ada"]


async def test_a_retired_memory_is_history_and_its_text_may_come_again(
    database: PostgresDatabase, learning_database: ThrowawayDatabase
) -> None:
    first = await _upsert(database, memory("Has a cat"))
    retire = {
        "action": "retire",
        "store": "user_memory",
        "memory_id": first["memory_id"],
        "reason": "it ran away",
    }
    (receipt,) = await database.call(
        "upsert_learnings", ADA, learnings=[retire | {"evidence": [{"run_id": "r9", "quote": "gone"}]}]
    )

    assert receipt["status"] == "retired"
    assert (await database.call("recall_context", ADA, question="cat"))["memories"] == []
    history = await database.call("get_learning", ADA, the_memory_id=first["memory_id"])
    assert history["superseded_reason"] == "it ran away"
    assert [item["run_id"] for item in history["evidence"]] == ["r9"]
    again = await _upsert(database, memory("Has a cat"))
    assert again["status"] == "created"
    assert again["memory_id"] != first["memory_id"]
    assert counted_scopes(learning_database.url) == recounted_scopes(learning_database.url)


async def test_evidence_grows_with_every_run_that_says_so_and_stays_with_its_version(
    database: PostgresDatabase,
) -> None:
    one = [{"run_id": "r1", "message_id": "m1", "quote": "I drink tea"}]
    two = [{"run_id": "r2", "message_id": "m1", "tool_call_id": "c1", "quote": "x" * 3000}]
    first = await _upsert(database, memory("Drinks tea", evidence=one))
    await _upsert(database, memory("drinks tea", evidence=one + two))
    await _upsert(
        database, memory("Drinks green tea", memory_id=first["memory_id"], evidence=[{"run_id": "r3"}])
    )

    found = await database.call("get_learning", ADA, the_memory_id=first["memory_id"])
    assert [(e["version"], e["run_id"], e["message_id"], e["tool_call_id"]) for e in found["evidence"]] == [
        (1, "r1", "m1", ""),
        (1, "r2", "m1", "c1"),
        (2, "r3", "", ""),
    ]
    assert found["evidence"][0]["quote"] == "I drink tea"
    assert len(found["evidence"][1]["quote"]) == 1000


async def test_several_learnings_are_written_together_or_not_at_all(
    database: PostgresDatabase, learning_database: ThrowawayDatabase
) -> None:
    before = counts(learning_database.url)
    with pytest.raises(NotFound):
        await database.call(
            "upsert_learnings",
            ADA,
            learnings=[memory("one"), memory("two"), memory("three", memory_id=str(uuid.uuid4()))],
        )
    assert counts(learning_database.url) == before

    receipts = await database.call(
        "upsert_learnings", ADA, learnings=[memory("one"), memory("two"), memory("One")]
    )
    assert [receipt["status"] for receipt in receipts] == ["created", "created", "unchanged"]
    assert await database.call("upsert_learnings", ADA, learnings=[]) == []


async def test_an_action_that_does_not_exist_is_refused(
    database: PostgresDatabase, learning_database: ThrowawayDatabase
) -> None:
    with pytest.raises(InvalidLearning, match="forget"):
        await database.call("upsert_learnings", ADA, learnings=[memory("one", action="forget")])
    with pytest.raises(InvalidLearning, match="forget"):
        await database.call(
            "apply_learning", ADA, run_ids=[], operations=[memory("one", action="forget")], expected_version=0
        )
    assert counts(learning_database.url)["agent_memory"] == 0


# Conflicts and absence


async def test_a_write_on_an_old_version_is_refused_and_changes_nothing(
    database: PostgresDatabase, learning_database: ThrowawayDatabase
) -> None:
    first = await _upsert(database, memory("Lives in Rome"))
    await _upsert(database, memory("Lives in Bern", memory_id=first["memory_id"], expected_version=1))
    before = everything_stored(learning_database.url)

    for learning in (
        memory("Lives in Oslo", memory_id=first["memory_id"], expected_version=1),
        memory("Lives in Oslo", memory_id=first["memory_id"], expected_version=3),
        memory("x", action="retire", memory_id=first["memory_id"], expected_version=1),
        {"store": "user_profile", "field": "name", "content": "Ada", "expected_version": 1},
    ):
        with pytest.raises(ConflictError):
            await database.call("upsert_learnings", ADA, learnings=[learning])
    assert everything_stored(learning_database.url) == before


async def test_only_one_of_two_writers_who_read_the_same_version_wins(database: PostgresDatabase) -> None:
    first = await _upsert(database, memory("Lives in Rome"))
    outcomes = []
    for city in ("Bern", "Oslo"):
        learning = memory(f"Lives in {city}", memory_id=first["memory_id"], expected_version=1)
        try:
            outcomes.append((await _upsert(database, learning))["status"])
        except ConflictError:
            outcomes.append("refused")
    assert outcomes == ["updated", "refused"]
    assert await _contents(database) == ["Lives in Bern"]


async def test_an_invented_memory_is_not_found_and_not_made(
    database: PostgresDatabase, learning_database: ThrowawayDatabase
) -> None:
    mine = await _upsert(database, memory("Mine"))
    retired = await _upsert(database, memory("Retired"))
    await database.call(
        "upsert_learnings",
        ADA,
        learnings=[{"action": "retire", "store": "user_memory", "memory_id": retired["memory_id"]}],
    )
    theirs = await _upsert(database, memory("Theirs"), BOB)
    before = everything_stored(learning_database.url)

    for memory_id in (str(uuid.uuid4()), theirs["memory_id"], retired["memory_id"]):
        with pytest.raises(NotFound):
            await _upsert(database, memory("Changed", memory_id=memory_id))
        with pytest.raises(NotFound):
            await database.call(
                "upsert_learnings",
                ADA,
                learnings=[{"action": "retire", "store": "user_memory", "memory_id": memory_id}],
            )
    with pytest.raises(NotFound):
        await _upsert(
            database, {"store": "other_store", "content": "Changed", "memory_id": mine["memory_id"]}
        )
    for malformed in ("no-uuid", "1; DROP TABLE agent_memory", "\u0000"):
        with pytest.raises(InvalidLearning):
            await _upsert(database, memory("Changed", memory_id=malformed))
    assert everything_stored(learning_database.url) == before
    assert await database.call("get_learning", ADA, the_memory_id=theirs["memory_id"]) is None
    assert await database.call("delete_learning", ADA, the_memory_id=str(uuid.uuid4())) is False


# Texts and ids of all kinds


@pytest.mark.parametrize("content", ["", " ", "\n\t ", "\u00a0\u2003", None])
async def test_a_memory_without_content_is_refused(
    database: PostgresDatabase, learning_database: ThrowawayDatabase, content: str | None
) -> None:
    for learning in (
        {"store": "user_memory", "content": content},
        {"store": "user_profile", "field": "name", "content": content},
        {"store": "user_memory"},
        {"content": "no store"},
        {"store": "", "content": "no store"},
    ):
        with pytest.raises(InvalidLearning):
            await _upsert(database, learning)
    assert counts(learning_database.url)["agent_memory"] == 0
    assert counts(learning_database.url)["agent_scope"] == 0


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("nul\x00here", "nul\ufffdhere"),
        ("half \ud83d a pair", "half \ufffd a pair"),
        ("\udc80 other half", "\ufffd other half"),
        ("tab\tand\nline", "tab\tand\nline"),
        ("\"quotes\" \\ and 'more' %s %(x)s {y} $1 ; --", "\"quotes\" \\ and 'more' %s %(x)s {y} $1 ; --"),
        ("日本語 العربية 🍵🏴\u200d☠️", "日本語 العربية 🍵🏴\u200d☠️"),
    ],
)
async def test_any_text_is_kept_or_has_a_mark_where_postgres_cannot_keep_it(
    database: PostgresDatabase, given: str, kept: str
) -> None:
    await _upsert(database, memory(given, evidence=[{"run_id": given, "message_id": given, "quote": given}]))
    await database.call("record_run", ADA, run=a_run(given, run_id="r1", facts={given: given}, error=given))
    found = await database.call("match_memories", ADA, question=given)
    assert await _contents(database) == [kept]
    assert all(item["content"] == kept for item in found)
    run = await database.call("get_run", ADA, the_run_id="r1")
    assert run["messages"][0]["content"] == kept
    assert run["facts"] == {kept: kept}
    assert run["error"] == kept


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
async def test_numbers_that_json_does_not_know_do_not_keep_a_run_out(
    database: PostgresDatabase, number: float
) -> None:
    run = a_run(run_id="r1")
    run["messages"][1]["tool_calls"] = [
        {"id": "c1", "name": "add", "args": {"a": number, "b": [number, 1.5]}}
    ]
    receipt = await database.call("record_run", ADA, run=run)

    assert receipt["recorded"]
    kept = await database.call("get_run", ADA, the_run_id="r1")
    assert kept["messages"][1]["tool_calls"][0]["args"] == {"a": str(number), "b": [str(number), 1.5]}


async def test_arguments_with_keys_that_are_no_text_do_not_keep_a_run_out(database: PostgresDatabase) -> None:
    run = a_run(run_id="r1", facts={1: "one", (2, 3): "pair", None: "none"})
    assert (await database.call("record_run", ADA, run=run))["recorded"]
    assert (await database.call("get_run", ADA, the_run_id="r1"))["facts"] == {
        "1": "one",
        "(2, 3)": "pair",
        "null": "none",
    }


async def test_a_message_of_a_megabyte_is_recorded_and_learned_in_part(
    database: PostgresDatabase, learning_database: ThrowawayDatabase
) -> None:
    words = " ".join(f"word{number}" for number in range(105_000))
    assert len(words) > 1_000_000
    assert (await database.call("record_run", ADA, run=a_run(words, run_id="r1")))["recorded"]
    run = await database.call("get_run", ADA, the_run_id="r1")
    assert run["messages"][0]["content"] == words

    first = await _upsert(database, memory(words))
    again = await _upsert(database, memory(words))
    assert (first["status"], again["status"]) == ("created", "unchanged")
    assert len(first["content"]) == 20_000
    assert counted_scopes(learning_database.url) == recounted_scopes(learning_database.url)
    found = await database.call("match_memories", ADA, question="What about word17?")
    assert [item["memory_id"] for item in found] == [first["memory_id"]]
    await database.call("match_memories", ADA, question=words)
    await database.call("delete_learning", ADA, the_memory_id=first["memory_id"])
    assert counted_scopes(learning_database.url) == {}


def _noise(characters: int, seed: int, alphabet: str = string.ascii_letters + string.digits) -> str:
    """Text that cannot be compressed, so that it is as long in an index as it looks."""
    return "".join(random.Random(seed).choices(alphabet, k=characters))


async def test_a_word_too_long_for_an_index_does_not_keep_a_memory_out(
    database: PostgresDatabase, learning_database: ThrowawayDatabase
) -> None:
    identity = Identity(tenant_id=_noise(512, 1), user_id=_noise(512, 2), session_id=_noise(512, 3))
    longest = _noise(2000, 4)
    other_end = longest[:1500] + _noise(500, 5)
    receipt = await _upsert(database, memory(f"The key {longest} opens {other_end} and {longest}"), identity)

    found = await database.call("match_memories", identity, question=f"what opens {longest}?")
    assert [item["memory_id"] for item in found] == [receipt["memory_id"]]
    assert counted_scopes(learning_database.url) == recounted_scopes(learning_database.url)


async def test_evidence_of_very_long_ids_does_not_keep_a_memory_out(database: PostgresDatabase) -> None:
    # Gateways put whole signatures into tool call ids.
    evidence = [
        {"run_id": _noise(512, 1), "message_id": _noise(4000, n), "tool_call_id": _noise(4000, n + 10)}
        for n in (1, 2)
    ]
    identity = Identity(tenant_id=_noise(512, 1), user_id=_noise(512, 2))
    receipt = await _upsert(database, memory("Owns a boat", evidence=evidence), identity)

    found = await database.call("get_learning", identity, the_memory_id=receipt["memory_id"])
    assert len(found["evidence"]) == 2, "they are told apart"
    again = await _upsert(database, memory("Owns a boat", evidence=evidence), identity)
    assert again["status"] == "unchanged"
    found = await database.call("get_learning", identity, the_memory_id=receipt["memory_id"])
    assert len(found["evidence"]) == 2


@pytest.mark.parametrize(
    "odd",
    [
        "ada.lovelace@example.com",
        "o'brien",
        'say "hi"',
        "100%",
        "under_score",
        "a\\b",
        "../../etc",
        "🍵👩‍🚀",
        " leading",
        "trailing ",
        "null",
        "{}",
        "a\nb",
        _noise(512, 7),
        "é" * 400,
        _noise(266, 8, "".join(map(chr, range(0x4E00, 0x9FA0)))),
        _noise(200, 9, "".join(map(chr, range(0x1F300, 0x1F600)))),
    ],
)
async def test_any_id_works_everywhere_and_meets_no_other(
    database: PostgresDatabase, learning_database: ThrowawayDatabase, odd: str
) -> None:
    identity = Identity(tenant_id=odd, user_id=odd, session_id=odd, agent_id=odd)
    near = [identity.with_(user_id=odd[:-1] + "x"), identity.with_(tenant_id="x" + odd[1:])]
    content = "Collects stamps from Peru"

    assert (await database.call("record_run", identity, run=a_run("Hello", run_id=odd)))["recorded"]
    await _upsert(database, memory(content, evidence=[{"run_id": odd, "message_id": "m"}]), identity)
    await _upsert(
        database,
        {"store": "session_context", "field": "summary", "session_id": odd, "content": "Stamps"},
        identity,
    )
    pending = await database.call("pending_learning", identity)
    assert [run["run_id"] for run in pending["runs"]] == [odd]
    known = await database.call("recall_context", identity, question="stamps")
    assert [item["content"] for item in known["memories"]] == [content]
    assert [item["content"] for item in known["session"]] == ["Stamps"]
    assert (await database.call("get_run", identity, the_run_id=odd))["user_id"] == odd
    for other in near:
        known = await database.call("recall_context", other, question="stamps")
        assert known == {"profile": [], "session": [], "memories": []}
        assert await _contents(database, other) == []
    queued = rows(learning_database.url, "SELECT args -> 'identity' FROM agent_queue.procrastinate_jobs")
    assert [Identity.from_json(job) for (job,) in queued] == [identity]
    assert (await database.call("expedite_learning", sessions=[identity.as_json()]))["waiting"] == 1
    assert (await database.call("erase_user", identity))["agent_memory"] == 2
    assert sum(counts(learning_database.url).values()) == 0


async def test_an_id_too_long_for_an_index_is_refused_in_plain_words(database: PostgresDatabase) -> None:
    long = _noise(512, 8, "".join(map(chr, range(0x4E00, 0x9FA0))))
    with pytest.raises(IdentityError, match="800"):
        Identity(user_id=long)
    with pytest.raises(InvalidLearning):
        await database.call("record_run", identity={"tenant_id": long, "user_id": long}, run=a_run())


async def test_ids_that_read_alike_when_joined_are_different_people(database: PostgresDatabase) -> None:
    pairs = [("a", "b,c"), ("a,b", "c"), ('a","b', "c"), ("a", 'b","c'), ("a|b", "c"), ("a", "b|c")]
    identities = [
        Identity(tenant_id=tenant, user_id=user, session_id=session)
        for tenant, user in pairs
        for session in ("1", "1 ", "2")
    ]
    for number, identity in enumerate(identities):
        await database.call("record_run", identity, run=a_run(f"I am {number}", quiet_seconds=60))
        await _upsert(database, memory(f"Is number {number}"), identity)
    for number, identity in enumerate(identities):
        pending = await database.call("pending_learning", identity)
        assert [run["messages"][0]["content"] for run in pending["runs"]] == [f"I am {number}"]
        assert f"Is number {number}" in await _contents(database, identity)
        assert (await database.call("expedite_learning", sessions=[identity.as_json()]))["waiting"] == 1


# Nobody


async def test_for_nobody_nothing_is_found(database: PostgresDatabase) -> None:
    receipt = await _upsert(database, memory("Secret"))
    assert await database.call("get_learnings", NOBODY) == []
    assert await database.call("match_memories", NOBODY, question="secret") == []
    assert await database.call("get_learning", NOBODY, the_memory_id=receipt["memory_id"]) is None
    assert await database.call("recall_context", NOBODY, question="secret") == {
        "profile": [],
        "session": [],
        "memories": [],
    }
    assert await database.call("memories_without_embedding", NOBODY, model="m") == []


async def test_for_nobody_nothing_is_written(
    database: PostgresDatabase, learning_database: ThrowawayDatabase
) -> None:
    receipt = await _upsert(database, memory("Mine"))
    before = everything_stored(learning_database.url)
    attempts: list[tuple[str, dict[str, Any]]] = [
        ("upsert_learning", {"learning": memory("x")}),
        ("upsert_learnings", {"learnings": [memory("x")]}),
        ("delete_learning", {"the_memory_id": receipt["memory_id"]}),
        ("delete_learnings", {"the_memory_ids": [receipt["memory_id"]]}),
        ("clear_learnings", {}),
        ("record_run", {"run": a_run()}),
        ("pending_learning", {}),
        (
            "apply_learning",
            {"run_ids": [], "operations": [memory("x", action="write")], "expected_version": 0},
        ),
        ("store_embeddings", {"model": "m", "embeddings": []}),
        ("erase_user", {}),
    ]
    for function, arguments in attempts:
        with pytest.raises(IdentityError):
            await database.call(function, NOBODY, **arguments)
    assert everything_stored(learning_database.url) == before


# Runs


async def test_a_run_is_recorded_once_and_ordered_once(
    database: PostgresDatabase, learning_database: ThrowawayDatabase
) -> None:
    exposed = await _upsert(database, memory("Shown"))
    run = a_run(
        run_id="r1",
        exposures=[{"memory_id": exposed["memory_id"], "version": 1}],
        outcomes=[{"kind": "reward", "succeeded": True, "score": 1.0}],
        quiet_seconds=60,
    )
    receipts = [await database.call("record_run", ADA, run=run) for _ in range(3)]

    assert [receipt["recorded"] for receipt in receipts] == [True, False, False]
    assert {receipt["status"] for receipt in receipts} == {"completed"}
    found = counts(learning_database.url)
    assert (found["agent_run"], found["agent_exposure"], found["agent_outcome"]) == (1, 1, 1)
    assert found["procrastinate_jobs"] == 1
    kept = await database.call("get_run", ADA, the_run_id="r1")
    assert kept["exposures"] == [{"memory_id": exposed["memory_id"], "version": 1, "content": "Shown"}]
    assert kept["outcomes"][0]["succeeded"] is True
    assert (kept["session_id"], kept["user_id"], kept["source"]) == ("s1", ADA.user_id, "live")


async def test_an_interrupted_run_is_completed_later_with_the_messages_of_both(
    database: PostgresDatabase, learning_database: ThrowawayDatabase
) -> None:
    def message(number: int, content: str) -> dict[str, Any]:
        return {"message_id": f"m{number}", "role": "user", "content": content}

    first = a_run(run_id="r1", status="interrupted", facts={"a": 1}) | {
        "messages": [message(1, "one"), message(2, "two")],
        "tool_errors": [{"tool": "t", "tool_call_id": "c1", "message": "bad"}],
    }
    second = a_run(run_id="r1", facts={"b": 2}) | {
        "messages": [message(2, "two, known better"), message(3, "three")],
        "tool_errors": [
            {"tool": "t", "tool_call_id": "c1", "message": "bad"},
            {"tool": "t", "tool_call_id": "c2", "message": "worse"},
        ],
    }
    assert (await database.call("record_run", ADA, run=first))["recorded"]
    assert counts(learning_database.url)["procrastinate_jobs"] == 0
    assert (await database.call("pending_learning", ADA))["runs"] == []
    again = await database.call("record_run", ADA, run=first)
    assert again["recorded"] is False
    completed = await database.call("record_run", ADA, run=second)

    assert (completed["recorded"], completed["status"]) == (True, "completed")
    run = await database.call("get_run", ADA, the_run_id="r1")
    assert [m["content"] for m in run["messages"]] == ["one", "two, known better", "three"]
    assert {e["tool_call_id"] for e in run["tool_errors"]} == {"c1", "c2"}
    assert run["facts"] == {"a": 1, "b": 2, "paused": True}
    assert counts(learning_database.url)["procrastinate_jobs"] == 1
    assert [r["run_id"] for r in (await database.call("pending_learning", ADA))["runs"]] == ["r1"]


@pytest.mark.parametrize(
    ("before", "after", "kept"),
    [
        ("completed", "completed", "completed"),
        ("completed", "failed", "completed"),
        ("completed", "interrupted", "completed"),
        ("completed", "cancelled", "completed"),
        ("blocked", "completed", "blocked"),
        ("blocked", "failed", "blocked"),
        ("failed", "interrupted", "failed"),
        ("failed", "cancelled", "failed"),
        ("failed", "completed", "completed"),
        ("cancelled", "completed", "completed"),
        ("cancelled", "blocked", "blocked"),
        ("interrupted", "failed", "failed"),
        ("interrupted", "blocked", "blocked"),
        ("interrupted", "cancelled", "cancelled"),
        ("interrupted", "interrupted", "interrupted"),
    ],
)
async def test_what_is_final_stays(
    database: PostgresDatabase, learning_database: ThrowawayDatabase, before: str, after: str, kept: str
) -> None:
    await database.call("record_run", ADA, run=a_run("first", run_id="r1", status=before, error="e1"))
    receipt = await database.call(
        "record_run", ADA, run=a_run("second", run_id="r1", status=after, error="e2")
    )

    run = await database.call("get_run", ADA, the_run_id="r1")
    assert (run["status"], receipt["status"]) == (kept, kept)
    assert receipt["recorded"] is (kept != before)
    is_changed = kept != before or before == "interrupted"
    assert run["error"] == ("e2" if is_changed else "e1")
    assert run["messages"][0]["content"] == ("second" if is_changed else "first")
    jobs = counts(learning_database.url)["procrastinate_jobs"]
    assert jobs == (1 if "completed" in (before, kept) else 0)


async def test_a_run_id_of_another_user_is_refused_and_their_run_untouched(
    database: PostgresDatabase, learning_database: ThrowawayDatabase
) -> None:
    await database.call("record_run", ADA, run=a_run("Ada's", run_id="r1", status="interrupted"))
    before = everything_stored(learning_database.url)
    with pytest.raises(CallerError, match="somebody else"):
        await database.call("record_run", BOB, run=a_run("Bob's", run_id="r1"))
    assert everything_stored(learning_database.url) == before

    elsewhere = BOB.with_(tenant_id="other")
    assert (await database.call("record_run", elsewhere, run=a_run("Bob's", run_id="r1")))["recorded"]
    assert (await database.call("get_run", ADA, the_run_id="r1"))["messages"][0]["content"] == "Ada's"


@pytest.mark.parametrize(
    "fault",
    [
        {"run_id": ""},
        {"run_id": None},
        {"status": None},
        {"status": "happy"},
        {"messages": {"no": "list"}},
        {"messages": ["text"]},
        {"messages": [{"role": "user", "content": "no id"}]},
        {"messages": [{"message_id": "m1", "content": "no role"}]},
        {"tool_errors": "text"},
        {"finished_at": "no date"},
        {"exposures": [{"memory_id": "no-uuid", "version": 1}]},
        {"exposures": [{"memory_id": str(uuid.UUID(int=1))}]},
        {"outcomes": [{"kind": ""}]},
        {"outcomes": [{"succeeded": True}]},
        {"quiet_seconds": "soon"},
        {"quiet_seconds": 1e300},
        {"facts": [1]},
        {"facts": "text"},
        {"facts": None},
        {"messages": "text"},
        {"messages": [["m1", "user"]]},
        {"messages": [{"message_id": "m1", "role": "user"}]},
        {"messages": [{"message_id": "m1", "role": "user", "content": None}]},
        {"messages": [{"message_id": "m1", "role": "user", "content": [{"type": "text"}]}]},
        {"messages": [{"message_id": 1, "role": "user", "content": "x"}]},
        {"messages": [{"message_id": "m1", "role": {"x": 1}, "content": "x"}]},
        {"messages": [{"message_id": "m1", "role": "tool", "content": "x", "name": {"x": 1}}]},
        {"messages": [{"message_id": "m1", "role": "tool", "content": "x", "tool_call_id": [1]}]},
        {"messages": [{"message_id": "m1", "role": "assistant", "content": "", "tool_calls": None}]},
        {"messages": [{"message_id": "m1", "role": "assistant", "content": "", "tool_calls": {"name": "t"}}]},
        {"messages": [{"message_id": "m1", "role": "assistant", "content": "", "tool_calls": ["t"]}]},
        {
            "messages": [
                {"message_id": "m1", "role": "assistant", "content": "", "tool_calls": [{"id": "c1"}]}
            ]
        },
        {"messages": [{"message_id": str(n), "role": "user", "content": ""} for n in range(20_001)]},
        {"tool_errors": [1]},
        {"tool_errors": [{"message": "no tool"}]},
        {"tool_errors": [{"tool": "t", "message": {"no": "text"}}]},
        {"outcomes": [1]},
        {"exposures": {"memory_id": str(uuid.UUID(int=1)), "version": 1}},
        {"run_id": "r" * 513},
        {"run_id": " "},
        {"run_id": "\u4e00" * 400},
    ],
    ids=lambda fault: str(fault)[:60],
)
async def test_a_malformed_run_is_the_callers_fault_and_leaves_nothing(
    database: PostgresDatabase, learning_database: ThrowawayDatabase, fault: dict[str, Any]
) -> None:
    with pytest.raises(InvalidLearning):
        await database.call("record_run", ADA, run=a_run(run_id="r1") | fault)
    assert sum(counts(learning_database.url).values()) == 0


@pytest.mark.parametrize("name", ["session_id", "agent_id"])
async def test_ids_that_no_identity_can_have_are_not_recorded(
    database: PostgresDatabase, learning_database: ThrowawayDatabase, name: str
) -> None:
    for odd in ("x" * 513, "\u4e00" * 400):
        with pytest.raises(InvalidLearning, match=f"the {name} of a run has at most 512 characters"):
            await database.call("record_run", Identity(user_id="ada"), run=a_run() | {name: odd})
    assert sum(counts(learning_database.url).values()) == 0
    longest = "x" * 512
    await database.call("record_run", Identity(user_id="ada"), run=a_run(run_id="r1") | {name: longest})
    assert (await database.call("get_run", ADA, the_run_id="r1"))[name] == longest


async def test_a_malformed_run_among_imported_ones_is_refused(database: PostgresDatabase) -> None:
    with pytest.raises(InvalidLearning, match="facts"):
        await database.call("import_runs", NOBODY, runs=[a_run(), a_run(facts=[1])])
    assert await database.call("list_runs", NOBODY) == []


async def test_the_messages_of_two_deliveries_keep_their_order_and_their_doubles(
    database: PostgresDatabase,
) -> None:
    def message(name: str, content: str) -> dict[str, Any]:
        return {"message_id": name, "role": "user", "content": content}

    first = [message("b", "1"), message("a", "2"), message("b", "3"), message("c", "4")]
    second = [message("z", "5"), message("b", "6"), message("b", "7"), message("y", "8"), message("z", "9")]
    await database.call("record_run", ADA, run=a_run(run_id="r1", status="interrupted") | {"messages": first})
    await database.call("record_run", ADA, run=a_run(run_id="r1") | {"messages": second})

    kept = (await database.call("get_run", ADA, the_run_id="r1"))["messages"]
    assert [m["message_id"] + m["content"] for m in kept] == ["b6", "a2", "b6", "c4", "z5", "y8", "z9"]


async def test_messages_of_two_deliveries_are_joined_without_comparing_each_with_each(
    learning_database: ThrowawayDatabase,
) -> None:
    messages = [{"message_id": f"m{n}", "role": "user", "content": "x"} for n in range(20_000)]
    with psycopg.connect(learning_database.url) as connection:
        # Comparing each with each takes seconds per thousand; a limit that only such a plan can meet.
        connection.execute("SET statement_timeout = '8s'")
        found = connection.execute(
            "SELECT jsonb_array_length(agent_private.merge_messages(d.messages, d.messages)) "
            "FROM (SELECT %s::jsonb) AS d (messages)",
            (json.dumps(messages),),
        ).fetchone()
    assert found == (20_000,)


async def test_a_run_does_not_grow_past_its_limit_by_many_deliveries(database: PostgresDatabase) -> None:
    def part(name: str, count: int) -> dict[str, Any]:
        messages = [{"message_id": f"{name}{n}", "role": "user", "content": ""} for n in range(count)]
        return a_run(run_id="r1", status="interrupted") | {"messages": messages}

    await database.call("record_run", ADA, run=part("a", 20_000))
    await database.call("record_run", ADA, run=part("a", 20_000))
    with pytest.raises(InvalidLearning, match="20,000"):
        await database.call("record_run", ADA, run=part("b", 1))
    assert len((await database.call("get_run", ADA, the_run_id="r1"))["messages"]) == 20_000


async def test_runs_are_listed_newest_first_and_by_what_is_wanted(database: PostgresDatabase) -> None:
    error = [{"tool": "t", "tool_call_id": "c", "message": "bad"}]
    for number, status in enumerate(("completed", "failed", "blocked", "completed", "cancelled")):
        run = a_run(run_id=f"r{number}", status=status) | {"tool_errors": error if number == 3 else []}
        await database.call("record_run", ADA, run=run)
    await database.call(
        "record_run", BOB, run=a_run(run_id="b1", outcomes=[{"kind": "reward", "succeeded": False}])
    )

    async def listed(identity: Identity = ADA, **arguments: Any) -> list[str]:
        return [run["run_id"] for run in await database.call("list_runs", identity, **arguments)]

    assert await listed() == ["b1", "r4", "r3", "r2", "r1", "r0"]
    assert await listed(wanted={"failed": True}) == ["b1", "r3", "r2", "r1"]
    assert await listed(wanted={"user_id": BOB.user_id}) == ["b1"]
    assert await listed(wanted={"status": "completed", "user_id": ADA.user_id}) == ["r3", "r0"]
    assert await listed(run_limit=2, run_offset=1) == ["r4", "r3"]
    assert await listed(ADA.with_(tenant_id="other")) == []
    with pytest.raises(InvalidLearning):
        await listed(run_limit=-1)
    with pytest.raises(InvalidLearning):
        await database.call("get_learnings", ADA, memory_limit=-1)


async def test_imported_runs_are_idempotent_and_may_have_no_user(
    database: PostgresDatabase, learning_database: ThrowawayDatabase
) -> None:
    operator = Identity()
    runs = [a_run(run_id=f"i{number}") for number in range(3)]
    assert await database.call("import_runs", operator, runs=runs) == {"recorded": 3, "known": 0}
    assert await database.call("import_runs", operator, runs=[*runs, a_run(run_id="i3")]) == {
        "recorded": 1,
        "known": 3,
    }
    assert counts(learning_database.url)["procrastinate_jobs"] == 0, "runs of nobody teach nobody"
    with pytest.raises(InvalidLearning):
        await database.call(
            "import_runs", operator, runs=[a_run(run_id="i4"), a_run(run_id="i5", status="odd")]
        )
    assert counts(learning_database.url)["agent_run"] == 4


# Learning


async def test_what_was_learned_is_applied_with_its_runs_in_one_step(database: PostgresDatabase) -> None:
    for run_id in ("r1", "r2"):
        await database.call("record_run", ADA, run=a_run(run_id=run_id))
    pending = await database.call("pending_learning", ADA)
    old = await _upsert(database, memory("Old"), BOB)
    applied = await database.call(
        "apply_learning",
        ADA,
        run_ids=["r1", "r2"],
        operations=[
            memory("Drinks tea", action="write", run_id="r1", evidence=[{"run_id": "r1", "message_id": "m"}]),
            {"action": "write", "store": "user_profile", "field": "name", "content": "Ada", "value": "Ada"},
        ],
        expected_version=pending["scope_version"],
    )

    assert [receipt["status"] for receipt in applied["receipts"]] == ["created", "created"]
    assert (await database.call("pending_learning", ADA))["runs"] == []
    run = await database.call("get_run", ADA, the_run_id="r1")
    assert run["learned_at"] is not None
    assert [item["content"] for item in run["learned"]] == ["Drinks tea"]
    assert (await database.call("get_learning", BOB, the_memory_id=old["memory_id"]))["content"] == "Old"


async def test_learning_is_all_or_nothing(
    database: PostgresDatabase, learning_database: ThrowawayDatabase
) -> None:
    await database.call("record_run", ADA, run=a_run(run_id="r1"))
    known = await _upsert(database, memory("Known"))
    version = (await database.call("pending_learning", ADA))["scope_version"]
    before = everything_stored(learning_database.url)
    good = memory("Good", action="write")
    bad: list[tuple[dict[str, Any], type[LearningError]]] = [
        (memory("x", action="write", memory_id=str(uuid.uuid4())), NotFound),
        (memory("x", action="write", memory_id=known["memory_id"], expected_version=7), ConflictError),
        (memory("", action="write"), InvalidLearning),
        (memory("x", action="write", trust="saint"), InvalidLearning),
        (memory("x", action="write", scope="galaxy"), CallerError),
        ({"action": "retire", "store": "user_memory", "memory_id": str(uuid.uuid4())}, NotFound),
        (memory("x", action="write", valid_from="no date"), InvalidLearning),
    ]
    for operation, error in bad:
        with pytest.raises(error):
            await database.call(
                "apply_learning",
                ADA,
                run_ids=["r1"],
                operations=[good, operation, good],
                expected_version=version,
            )
        assert everything_stored(learning_database.url) == before, operation
    assert [run["run_id"] for run in (await database.call("pending_learning", ADA))["runs"]] == ["r1"]


async def test_learning_on_what_has_changed_since_is_refused(
    database: PostgresDatabase, learning_database: ThrowawayDatabase
) -> None:
    await database.call("record_run", ADA, run=a_run(run_id="r1"))
    version = (await database.call("pending_learning", ADA))["scope_version"]
    known = await _upsert(database, memory("Meanwhile"))
    learn = {"run_ids": ["r1"], "operations": [memory("Stale", action="write")]}

    with pytest.raises(ConflictError):
        await database.call("apply_learning", ADA, **learn, expected_version=version)
    version = (await database.call("pending_learning", ADA))["scope_version"]
    await database.call("delete_learning", ADA, the_memory_id=known["memory_id"])
    with pytest.raises(ConflictError):
        await database.call("apply_learning", ADA, **learn, expected_version=version)
    assert await _contents(database) == []

    version = (await database.call("pending_learning", ADA))["scope_version"]
    await _upsert(database, memory("Of another"), BOB)
    await database.call("apply_learning", ADA, **learn, expected_version=version)
    assert await _contents(database) == ["Stale"]
    assert value(learning_database.url, "SELECT count(*) FROM agent_run WHERE learned_at IS NULL") == 0


async def test_a_run_is_not_learned_twice(
    database: PostgresDatabase, learning_database: ThrowawayDatabase
) -> None:
    for run_id in ("r1", "r2"):
        await database.call("record_run", ADA, run=a_run(run_id=run_id))
    await database.call("record_run", BOB, run=a_run(run_id="b1"))

    async def apply(*run_ids: str) -> Any:
        version = (await database.call("pending_learning", ADA))["scope_version"]
        return await database.call(
            "apply_learning", ADA, run_ids=list(run_ids), operations=[], expected_version=version
        )

    await apply("r1")
    before = everything_stored(learning_database.url)
    for run_ids in (["r1"], ["r1", "r2"], ["r2", "b1"], ["r2", "invented"], ["r2", "r2"]):
        with pytest.raises(LearningError):
            await apply(*run_ids)
        assert everything_stored(learning_database.url) == before
    await apply("r2")
    assert value(learning_database.url, "SELECT count(*) FROM agent_run WHERE learned_at IS NULL") == 1


async def test_learning_after_an_erasure_writes_nothing(
    database: PostgresDatabase, learning_database: ThrowawayDatabase
) -> None:
    await database.call("record_run", ADA, run=a_run("My secret is 7", run_id="r1"))
    pending = await database.call("pending_learning", ADA)
    await database.call("erase_user", ADA)
    with pytest.raises(ConflictError):
        await database.call(
            "apply_learning",
            ADA,
            run_ids=["r1"],
            operations=[memory("Secret is 7", action="write")],
            expected_version=pending["scope_version"],
        )
    assert "Secret" not in everything_stored(learning_database.url)


async def test_pending_learning_gives_the_oldest_runs_of_the_session_first(
    database: PostgresDatabase,
) -> None:
    start = datetime.now(UTC)
    for number in (3, 1, 2):
        finished = (start + timedelta(seconds=number)).isoformat()
        await database.call("record_run", ADA, run=a_run(run_id=f"r{number}", finished_at=finished))
    await database.call("record_run", ADA.with_(session_id="s2"), run=a_run(run_id="elsewhere"))
    await database.call("record_run", ADA, run=a_run(run_id="f1", status="failed"))
    await database.call("record_run", BOB, run=a_run(run_id="b1"))

    async def pending(**more: Any) -> list[str]:
        return [run["run_id"] for run in (await database.call("pending_learning", ADA, **more))["runs"]]

    assert await pending() == ["r1", "r2", "r3"]
    assert await pending(run_limit=2) == ["r1", "r2"]


# Limits


async def test_the_oldest_memories_above_the_limit_are_retired(
    database: PostgresDatabase, learning_database: ThrowawayDatabase
) -> None:
    for number in range(5):
        await _upsert(database, memory(f"Fact number {number}"), memory_limit=3)
    await _upsert(database, memory("fact number 4"), memory_limit=3)
    await _upsert(database, memory("Of Bob"), BOB, memory_limit=3)
    await _upsert(database, {"store": "user_profile", "field": "name", "content": "Ada"}, memory_limit=3)

    assert await _contents(database, store="user_memory") == [f"Fact number {number}" for number in (4, 3, 2)]
    assert await _contents(database, BOB) == ["Of Bob"]
    assert await _contents(database, store="user_profile") == ["Ada"]
    reasons = rows(
        learning_database.url,
        "SELECT content, superseded_reason FROM agent_memory WHERE superseded_at IS NOT NULL ORDER BY content",
    )
    assert reasons == [("Fact number 0", "over max_memories"), ("Fact number 1", "over max_memories")]
    assert counted_scopes(learning_database.url) == recounted_scopes(learning_database.url)


async def test_a_limit_holds_for_many_at_once_and_for_learning(database: PostgresDatabase) -> None:
    await database.call(
        "upsert_learnings", ADA, learnings=[memory(f"Fact {n}") for n in range(10)], limits={"user_memory": 4}
    )
    assert await _contents(database) == [f"Fact {n}" for n in (9, 8, 7, 6)]
    version = (await database.call("pending_learning", ADA))["scope_version"]
    applied = await database.call(
        "apply_learning",
        ADA,
        run_ids=[],
        operations=[memory(f"Fact {n}", action="write") for n in (10, 11)],
        expected_version=version,
        limits={"user_memory": 3},
    )
    assert applied["retired_over_limit"] == 3
    assert await _contents(database) == [f"Fact {n}" for n in (11, 10, 9)]
    with pytest.raises(InvalidLearning):
        await database.call("upsert_learnings", ADA, learnings=[], limits={"user_memory": "many"})


# Recall


async def test_recall_ranks_by_words_and_fills_up_with_the_newest(database: PostgresDatabase) -> None:
    for content in ("Plays the cello on Sundays", "Works on billing", "Has two cats"):
        await _upsert(database, memory(content))
    known = await database.call("recall_context", ADA, question="Who plays a cello?")
    assert [item["content"] for item in known["memories"]] == [
        "Plays the cello on Sundays",
        "Has two cats",
        "Works on billing",
    ]
    matched = await database.call("match_memories", ADA, question="Who plays a cello?")
    assert [item["content"] for item in matched] == ["Plays the cello on Sundays"]
    assert await database.call("match_memories", ADA, question="the of and") == []
    limited = await database.call("recall_context", ADA, question="", memory_limit=1)
    assert [item["content"] for item in limited["memories"]] == ["Has two cats"]


async def test_recall_leaves_out_what_is_external_over_or_of_this_very_session(
    database: PostgresDatabase, learning_database: ThrowawayDatabase
) -> None:
    await _upsert(database, memory("Tea from outside", trust="external"))
    await _upsert(database, memory("Tea said here", session_id="s1"))
    await _upsert(database, memory("Tea said there", session_id="s2"))
    over = await _upsert(database, memory("Tea that is over"))
    rows(
        learning_database.url,
        "UPDATE agent_memory SET valid_from = now() - interval '2 days', valid_to = now() - interval '1 day' "
        "WHERE memory_id = %s",
        over["memory_id"],
    )
    known = await database.call("recall_context", ADA, question="tea")
    assert [item["content"] for item in known["memories"]] == ["Tea said there"]
    nothing = await database.call("recall_context", ADA, question="tea", stores=[])
    assert nothing == {"profile": [], "session": [], "memories": []}


async def test_vectors_find_what_words_do_not(database: PostgresDatabase) -> None:
    first = await _upsert(database, memory("Owns a feline"))
    second = await _upsert(database, memory("Drives a lorry"))
    await database.call(
        "store_embeddings",
        ADA,
        model="m",
        embeddings=[
            {"memory_number": first["memory_number"], "embedding": "[1,0,0]"},
            {"memory_number": second["memory_number"], "embedding": "[0,1,0]"},
        ],
    )
    asked = {"question": "cat?", "question_embedding": "[0.9,0.1,0]", "embedding_model": "m"}
    found = await database.call("match_memories", ADA, **asked)
    assert found[0]["content"] == "Owns a feline"
    assert await database.call("match_memories", ADA, **(asked | {"embedding_model": "other"})) == []
    assert await database.call("match_memories", ADA, **(asked | {"question_embedding": "[1,0]"})) == []
    for wrong in ("[]", "[NaN,1,0]", "text", "[1,"):
        with pytest.raises(InvalidLearning):
            await database.call("match_memories", ADA, **(asked | {"question_embedding": wrong}))


async def test_a_vector_of_zeros_spoils_no_ranking(database: PostgresDatabase) -> None:
    near = await _upsert(database, memory("Owns a feline"))
    zero = await _upsert(database, memory("Drives a lorry"))
    await database.call(
        "store_embeddings",
        ADA,
        model="m",
        embeddings=[
            {"memory_number": near["memory_number"], "embedding": "[1,0]"},
            {"memory_number": zero["memory_number"], "embedding": "[0,0]"},
        ],
    )
    for vector in ("[1,0]", "[0,0]"):
        found = await database.call(
            "recall_context", ADA, question="feline", question_embedding=vector, embedding_model="m"
        )
        assert found["memories"][0]["memory_id"] == near["memory_id"]
        hits = await database.call(
            "match_memories", ADA, question="feline", question_embedding=vector, embedding_model="m"
        )
        assert hits[0]["memory_id"] == near["memory_id"]
        assert all(isinstance(hit["score"], int | float) for hit in hits)
        assert all(hit["score"] == hit["score"] for hit in hits)


async def test_vectors_go_with_their_memory_and_are_not_stored_for_others(
    database: PostgresDatabase, learning_database: ThrowawayDatabase
) -> None:
    mine = await _upsert(database, memory("Mine"))
    theirs = await _upsert(database, memory("Theirs"), BOB)
    stored = await database.call(
        "store_embeddings",
        ADA,
        model="m",
        embeddings=[
            {"memory_number": receipt["memory_number"], "embedding": "[1,2]"} for receipt in (mine, theirs)
        ],
    )
    assert stored == 1
    assert await database.call("memories_without_embedding", ADA, model="m") == []
    waiting = await database.call("memories_without_embedding", BOB, model="m")
    assert [item["content"] for item in waiting] == ["Theirs"]
    await _upsert(database, memory("Mine, changed", memory_id=mine["memory_id"]))
    assert counts(learning_database.url)["agent_memory_embedding"] == 0


async def test_a_clock_that_is_set_back_keeps_no_write_out(
    database: PostgresDatabase, learning_database: ThrowawayDatabase
) -> None:
    receipt = await _upsert(database, memory("Lives in Rome"))
    rows(learning_database.url, "UPDATE agent_memory SET recorded_at = now() + interval '1 hour'")
    changed = await _upsert(database, memory("Lives in Bern", memory_id=receipt["memory_id"]))
    assert changed["status"] == "updated"


# Deleting


async def _fill(database: PostgresDatabase, identity: Identity, word: str) -> dict[str, Any]:
    """One of everything that may be kept about somebody, each with a word in it that can be looked for."""
    profile = await _upsert(
        database,
        {"store": "user_profile", "field": "name", "content": word, "value": word},
        identity.with_(run_id=f"{word}-r1"),
    )
    first = await _upsert(
        database, memory(f"{word} one", evidence=[{"run_id": f"{word}-r1", "quote": word}]), identity
    )
    await _upsert(database, memory(f"{word} two", memory_id=first["memory_id"]), identity)
    await _upsert(database, memory(f"{word} three"), identity)
    await _upsert(
        database,
        {"store": "session_context", "field": "summary", "session_id": identity.session_id, "content": word},
        identity,
    )
    waiting = await database.call("memories_without_embedding", identity, model="m")
    await database.call(
        "store_embeddings",
        identity,
        model="m",
        embeddings=[{"memory_number": item["memory_number"], "embedding": "[1,2]"} for item in waiting],
    )
    run = a_run(
        f"{word} said",
        run_id=f"{word}-r1",
        exposures=[{"memory_id": first["memory_id"], "version": 2}],
        outcomes=[{"kind": "reward", "succeeded": False, "details": {"why": word}}],
        tool_errors=[{"tool": "t", "tool_call_id": "c", "message": word}],
        quiet_seconds=600,
    )
    await database.call("record_run", identity, run=run)
    return {"profile": profile, "first": first}


async def test_a_deleted_memory_leaves_no_version_word_vector_or_evidence(
    database: PostgresDatabase, learning_database: ThrowawayDatabase
) -> None:
    first = await _upsert(database, memory("Zanzibar one", evidence=[{"run_id": "r1", "quote": "Zanzibar"}]))
    await _upsert(database, memory("Zanzibar two", memory_id=first["memory_id"], evidence=[{"run_id": "r2"}]))
    kept = await _upsert(database, memory("Something else"))
    waiting = await database.call("memories_without_embedding", ADA, model="m")
    await database.call(
        "store_embeddings",
        ADA,
        model="m",
        embeddings=[{"memory_number": item["memory_number"], "embedding": "[1,2]"} for item in waiting],
    )

    assert await database.call("delete_learning", BOB, the_memory_id=first["memory_id"]) is False
    assert await database.call("delete_learning", ADA, the_memory_id=first["memory_id"]) is True
    assert await database.call("delete_learning", ADA, the_memory_id=first["memory_id"]) is False

    assert await database.call("get_learning", ADA, the_memory_id=first["memory_id"]) is None
    stored = everything_stored(learning_database.url)
    assert "zanzibar" not in stored.lower()
    assert first["memory_id"] not in stored
    assert kept["memory_id"] in stored
    found = counts(learning_database.url)
    assert (found["agent_memory"], found["agent_memory_evidence"], found["agent_memory_embedding"]) == (
        1,
        0,
        1,
    )
    assert counted_scopes(learning_database.url) == recounted_scopes(learning_database.url)


async def test_deleting_several_passes_over_those_of_others(
    database: PostgresDatabase, learning_database: ThrowawayDatabase
) -> None:
    mine = [await _upsert(database, memory(f"Mine {number}")) for number in range(3)]
    theirs = await _upsert(database, memory("Theirs"), BOB)
    ids = [receipt["memory_id"] for receipt in [*mine[:2], mine[0], theirs]] + [str(uuid.uuid4())]

    assert await database.call("delete_learnings", ADA, the_memory_ids=ids) == 2
    assert await _contents(database) == ["Mine 2"]
    assert await _contents(database, BOB) == ["Theirs"]
    assert await database.call("delete_learnings", ADA, the_memory_ids=[]) == 0
    assert counted_scopes(learning_database.url) == recounted_scopes(learning_database.url)


async def test_clearing_takes_one_store_or_all_of_one_user(
    database: PostgresDatabase, learning_database: ThrowawayDatabase
) -> None:
    await _fill(database, ADA, "quokka")
    await _fill(database, BOB, "wombat")

    assert await database.call("clear_learnings", ADA, the_store="user_profile") == 1
    assert await _contents(database, store="user_profile") == []
    assert len(await _contents(database, store="user_memory")) == 2
    assert await database.call("clear_learnings", ADA, the_store=None) == 3
    assert await database.call("clear_learnings", ADA) == 0
    for table in OUR_TABLES[:4]:
        left = rows(learning_database.url, f"SELECT t::text FROM {table} t")
        assert left, table
        assert not any("quokka" in row for (row,) in left), table
    scopes = rows(
        learning_database.url,
        "SELECT memory_count, word_count FROM agent_scope WHERE owner_id = %s", ADA.user_id,
    )  # fmt: skip
    assert scopes == [(0, 0)]
    assert counted_scopes(learning_database.url) == recounted_scopes(learning_database.url)


async def test_an_erased_user_leaves_nothing_in_any_table(
    database: PostgresDatabase, learning_database: ThrowawayDatabase
) -> None:
    before = counts(learning_database.url)
    await _fill(database, BOB, "wombat")
    with_bob = counts(learning_database.url)
    bobs = everything_stored(learning_database.url)
    await _fill(database, ADA, "quokka")
    await database.call("record_run", ADA.with_(session_id="s2"), run=a_run("quokka", run_id="quokka-2"))
    assert all(count > before[table] for table, count in with_bob.items())

    gone = await database.call("erase_user", ADA)

    assert all(gone[table] > 0 for table in OUR_TABLES), gone
    assert gone["procrastinate_jobs"] == 2
    stored = everything_stored(learning_database.url)
    assert "quokka" not in stored
    assert "ada@" not in stored
    assert stored == bobs, "nobody else lost anything"
    again = await database.call("erase_user", ADA)
    assert all(count == 0 for table, count in again.items() if table != "agent_scope")
    assert everything_stored(learning_database.url) == bobs


async def test_an_erased_user_starts_anew(
    database: PostgresDatabase, learning_database: ThrowawayDatabase
) -> None:
    await _fill(database, ADA, "quokka")
    await database.call("erase_user", ADA)
    await _fill(database, ADA, "numbat")

    assert set(await _contents(database)) == {"numbat", "numbat two", "numbat three"}
    assert counted_scopes(learning_database.url) == recounted_scopes(learning_database.url)


# The counters


@pytest.mark.parametrize("seed", range(3))
async def test_the_counters_of_a_scope_are_right_after_any_operations(
    database: PostgresDatabase, learning_database: ThrowawayDatabase, seed: int
) -> None:
    chance = random.Random(seed)
    vocabulary = [
        "tea",
        "Teas",
        "rome",
        "run",
        "running",
        "the",
        "日本",
        "x1",
        "foo-bar",
        "a@b.com",
        "...",
        "http://x.y/z",
    ]
    people = [ADA, BOB, ADA.with_(tenant_id="other")]

    async def some_id(identity: Identity) -> str:
        found = await database.call("get_learnings", identity)
        return (
            str(chance.choice(found)["memory_id"]) if found and chance.random() < 0.9 else str(uuid.uuid4())
        )

    for _ in range(120):
        identity = chance.choice(people)
        content = " ".join(chance.choices(vocabulary, k=chance.randint(1, 6)))
        store = chance.choice(["user_memory", "user_memory", "user_memory", "user_profile", "notes"])
        learning: dict[str, Any] = {"store": store, "content": content}
        if store == "user_profile":
            learning["field"] = chance.choice(["name", "role"])
        elif chance.random() < 0.4:
            learning["memory_id"] = await some_id(identity)
        try:
            match chance.randrange(12):
                case 0 | 1 | 2 | 3:
                    await _upsert(database, learning, identity)
                case 4:
                    await _upsert(database, learning, identity, memory_limit=chance.randint(1, 6))
                case 5:
                    await database.call(
                        "upsert_learnings",
                        identity,
                        learnings=[learning, {"store": "user_memory", "content": content + " more"}],
                        limits={"user_memory": chance.randint(1, 8), "notes": 2},
                    )
                case 6 | 7:
                    retire = {"action": "retire", "store": store, "memory_id": await some_id(identity)}
                    await database.call("upsert_learnings", identity, learnings=[retire])
                case 8 | 9:
                    await database.call("delete_learning", identity, the_memory_id=await some_id(identity))
                case 10:
                    version = (await database.call("pending_learning", identity))["scope_version"]
                    await database.call(
                        "apply_learning",
                        identity,
                        run_ids=[],
                        operations=[learning | {"action": "write"}],
                        expected_version=version,
                        limits={"user_memory": 7},
                    )
                case 11 if chance.random() < 0.2:
                    await database.call(chance.choice(["clear_learnings", "erase_user"]), identity)
        except (NotFound, InvalidLearning):
            pass  # an id that is of no current memory of this store
    counted = counted_scopes(learning_database.url)
    assert counted == recounted_scopes(learning_database.url)
    assert counted, "something is left to count"
    words = rows(
        learning_database.url,
        "SELECT tenant_id, owner_id, count(DISTINCT memory_number), coalesce(sum(occurrences), 0) "
        "FROM agent_memory_term GROUP BY 1, 2",
    )
    assert {(t, u): w for t, u, _, w in words} == {key: w for key, (_, w) in counted.items() if w}
    one_each = rows(
        learning_database.url,
        "SELECT count(*) FROM agent_memory WHERE superseded_at IS NULL GROUP BY tenant_id, memory_id "
        "HAVING count(*) > 1",
    )
    assert one_each == []


async def test_what_a_tenant_shares_is_found_in_its_scope_and_no_other(database: PostgresDatabase) -> None:
    shared = {
        "store": "application",
        "scope": "tenant",
        "content": "Table public.refunds holds refunds.",
        "trust": "tool",
    }
    await database.call("upsert_learnings", ADA, learnings=[shared], limits={})
    await database.call(
        "upsert_learnings",
        ADA,
        learnings=[{"store": "user_memory", "content": "Asked for refunds."}],
        limits={},
    )
    nobody = Identity(tenant_id=ADA.tenant_id)
    elsewhere = Identity(tenant_id="another")

    async def found(identity: Identity, scope: str) -> list[str]:
        matched = await database.call("match_memories", identity, question="refunds?", the_scope=scope)
        return [memory["content"] for memory in matched]

    assert await found(nobody, "tenant") == await found(ADA, "tenant") == [shared["content"]]
    assert await found(ADA, "user") == ["Asked for refunds."]
    assert await found(nobody, "agent") == await found(elsewhere, "tenant") == []
    with pytest.raises(InvalidLearning, match="scope world is not user, agent or tenant"):
        await found(ADA, "world")
