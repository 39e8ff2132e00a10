"""Turns of conversations: what was said in a run is remembered word for word, once, in its order, by its speaker."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain_core.messages import HumanMessage
from langgraph.checkpoint.memory import InMemorySaver

from agent import ConversationConfig, Identity, LearningMachine, LearningMode
from agent.database.postgres import PostgresDatabase
from agent.errors import ConfigurationError
from agent.learning.rendering import CLOSING, OPENING, without_recalled
from agent.settings import WorkerMode
from agent.testing import ScriptedChat, tool_call
from agent.testing.throwaway import ThrowawayDatabase
from tests.integration.rows import a_run, counted_scopes, counts, memory, recounted_scopes, rows, value

ADA = Identity(user_id="ada", session_id="t1")
BOB = Identity(user_id="bob", session_id="t1")


@pytest.fixture
async def database(learning_database: ThrowawayDatabase) -> AsyncIterator[PostgresDatabase]:
    """The transport to `learning_database`."""
    database = PostgresDatabase(learning_database.url)
    yield database
    await database.close()


async def learn(
    database: PostgresDatabase, *runs: dict[str, Any], identity: Identity = ADA, **more: Any
) -> dict[str, Any]:
    """Record these runs and apply their learning in one go, with no operations."""
    for run in runs:
        await database.call("record_run", identity, run=run)
    applied: dict[str, Any] = await database.call(
        "apply_learning",
        identity,
        run_ids=[run["run_id"] for run in runs],
        operations=[],
        expected_version=None,
        **more,
    )
    return applied


async def turns(
    database: PostgresDatabase, identity: Identity = ADA, **wanted: Any
) -> list[tuple[int, str, str]]:
    """Turn, kind and content of what is remembered, in the order of recording."""
    found = await database.call("get_learnings", identity, wanted={"store": "conversation"} | wanted)
    return [(item["turn"], item["kind"], item["content"]) for item in reversed(found)]


def message(role: str, content: str, message_id: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, "message_id": message_id, **more}


# --- what is remembered -----------------------------------------------------------------------------------------


async def test_what_was_said_in_a_run_is_remembered_in_its_order(
    database: PostgresDatabase, learning_database: ThrowawayDatabase
) -> None:
    run = a_run(run_id="r1", started_at="2026-11-20T10:00:00+00:00", finished_at="2026-11-20T10:00:09+00:00")
    run["messages"] = [
        message("user", "Where is my parcel?", "u1", name="Ada"),
        message("assistant", "", "a1", tool_calls=[{"name": "find", "args": {}}]),
        message("tool", "in transit", "x1", name="find", tool_call_id="c1"),
        message("context", "a note of the program", "k1"),
        message("assistant", "It arrives on Monday.", "a2"),
        message("user", " \n\u200b", "u2"),
        message("user", "👍!", "u3"),
        message("user", "謝謝", "u4"),
    ]
    applied = await learn(database, run)

    assert applied["turns"] == 3
    assert await turns(database) == [
        (1, "user", "Where is my parcel?"), (2, "assistant", "It arrives on Monday."), (3, "user", "謝謝"),
    ]  # fmt: skip
    found = rows(
        learning_database.url,
        "SELECT m.speaker, m.trust, m.valid_from, m.source, e.run_id, e.message_id FROM agent_memory m "
        "JOIN agent_memory_evidence e USING (tenant_id, memory_id, version) ORDER BY m.turn",
    )
    asked, answered = (datetime(2026, 11, 20, 10, 0, second, tzinfo=UTC) for second in (0, 9))
    assert found == [
        ("Ada", "user", asked, "verbatim", "r1", "u1"),
        (None, "model", answered, "verbatim", "r1", "a2"),
        (None, "user", asked, "verbatim", "r1", "u4"),
    ]


async def test_later_runs_go_on_where_the_session_ended(database: PostgresDatabase) -> None:
    await learn(database, a_run("I am Ada", run_id="r1"))
    await learn(database, a_run("I like tea", run_id="r2"), identity=ADA.with_(session_id="t2"))
    await learn(database, a_run("I like jazz", run_id="r3"), a_run("I like rain", run_id="r4"))

    assert await turns(database, session_id="t1") == [
        (1, "user", "I am Ada"), (2, "assistant", "Noted."),
        (3, "user", "I like jazz"), (4, "assistant", "Noted."),
        (5, "user", "I like rain"), (6, "assistant", "Noted."),
    ]  # fmt: skip
    assert [number for number, _, _ in await turns(database, session_id="t2")] == [1, 2]


async def test_runs_learned_together_stand_in_the_order_they_finished_in(database: PostgresDatabase) -> None:
    late = a_run("second", run_id="a", finished_at="2026-11-20T10:00:02+00:00")
    early = a_run("first", run_id="b", finished_at="2026-11-20T10:00:01+00:00")
    await learn(database, late, early)
    assert [content for _, kind, content in await turns(database) if kind == "user"] == ["first", "second"]


async def test_a_run_that_is_learned_late_stands_at_the_end_with_its_date(
    database: PostgresDatabase, learning_database: ThrowawayDatabase
) -> None:
    await learn(database, a_run("second", run_id="a", finished_at="2026-11-20T10:00:02+00:00"))
    await learn(
        database,
        a_run(
            "first",
            run_id="b",
            started_at="2026-11-20T10:00:00+00:00",
            finished_at="2026-11-20T10:00:01+00:00",
        ),
    )
    assert [(turn, content) for turn, kind, content in await turns(database) if kind == "user"] == [
        (1, "second"), (3, "first"),
    ]  # fmt: skip
    dated = value(learning_database.url, "SELECT valid_from FROM agent_memory WHERE content = 'first'")
    assert dated == datetime(2026, 11, 20, 10, 0, tzinfo=UTC)


async def test_history_that_a_later_run_tells_again_is_remembered_once(database: PostgresDatabase) -> None:
    history = [message("user", "I am Ada", "m1"), message("assistant", "Hello Ada", "m2")]
    more = [*history, message("user", "I like tea", "m3"), message("assistant", "Hello Ada", "m4")]
    await learn(database, a_run(run_id="r1") | {"messages": history})
    applied = await learn(database, a_run(run_id="r2") | {"messages": more})

    assert applied["turns"] == 2
    assert [content for _, _, content in await turns(database)] == [
        "I am Ada", "Hello Ada", "I like tea", "Hello Ada",
    ]  # fmt: skip


async def test_the_same_words_said_again_are_another_turn(database: PostgresDatabase) -> None:
    """Messages without ids are named after their words."""
    for run_id in ("r1", "r2"):
        await learn(database, a_run(run_id=run_id) | {"messages": [message("user", "Yes", "said-7f")]})
    assert await turns(database) == [(1, "user", "Yes"), (2, "user", "Yes")]


async def test_a_message_that_changed_under_its_id_is_another_turn(database: PostgresDatabase) -> None:
    for run_id, text in (("r1", "one thing"), ("r2", "another thing")):
        await learn(database, a_run(run_id=run_id) | {"messages": [message("user", text, "m1")]})
    assert [content for _, _, content in await turns(database)] == ["one thing", "another thing"]


async def test_what_was_recalled_is_not_remembered_again(database: PostgresDatabase) -> None:
    line = "- Prefers tea. [preference, 2026-11-20, user, id 91bc02de]"
    run = a_run(run_id="r1")
    run["messages"] = [
        message("user", f"Look: {OPENING}\n{line}\n{CLOSING} What is that?", "u1"),
        message("assistant", f"I know:\n{line}\nand no more.", "a1"),
        message("user", f"{OPENING} only this", "u2"),
    ]
    await learn(database, run)
    assert [content for _, _, content in await turns(database)] == [
        "Look:  What is that?", "I know:\n\nand no more.",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "said",
    [
        f"a{OPENING}x{CLOSING}b{OPENING}y{CLOSING}c",
        f"<learned_{OPENING}x{CLOSING}knowledge>- secret{CLOSING}",
        f"only {CLOSING} closes",
        "&lt;LEARNED_knowledge &gt;\n- s\n&lt; / learned_knowledge&gt; after",
        "  spaces stay  ",
        f"  {OPENING}{CLOSING} spaces go  ",
        f"{OPENING}never closed",
        "x\n- a\n- b [fact, 2026-11-20, user, id 0123abcd] \ny",
        "- b [fact, 2026-11-20, user, id 0123abcd]z",
        "the words learned_knowledge, id 0123abcd] alone",
        "",
    ],
)
def test_the_database_takes_recalled_text_out_as_python_does(
    said: str, learning_database: ThrowawayDatabase
) -> None:
    assert value(
        learning_database.url, "SELECT agent_private.without_recalled(%s)", said
    ) == without_recalled(said)


async def test_turns_are_counted_among_the_words_that_are_searched(
    database: PostgresDatabase, learning_database: ThrowawayDatabase
) -> None:
    await database.call("upsert_learning", ADA, learning=memory("Prefers tea"))
    await learn(database, *(a_run(f"I like jazz and rain number {n}", run_id=f"r{n}") for n in range(5)))
    assert counted_scopes(learning_database.url) == recounted_scopes(learning_database.url)
    assert recounted_scopes(learning_database.url)[("default", "ada")][0] == 11


async def test_learning_turns_makes_nobody_read_again(database: PostgresDatabase) -> None:
    """A model that has read what is known is not asked anew because another session was remembered."""
    other = ADA.with_(session_id="t2")
    await database.call("record_run", ADA, run=a_run("I am Ada", run_id="r1"))
    version = (await database.call("pending_learning", ADA))["scope_version"]
    await learn(database, a_run("I like tea", run_id="r2"), identity=other)
    await database.call(
        "apply_learning", ADA, run_ids=["r1"], operations=[memory("Is Ada")], expected_version=version
    )
    assert len(await turns(database)) == 4


async def test_what_is_known_to_a_learning_model_holds_no_turns(database: PostgresDatabase) -> None:
    await learn(database, a_run("My cat is called Zoë", run_id="r1"))
    await database.call("record_run", ADA, run=a_run("What is my cat called?", run_id="r2"))
    pending = await database.call("pending_learning", ADA.with_(session_id="t1"))
    assert [run["run_id"] for run in pending["runs"]] == ["r2"]
    assert pending["memories"] == []


# --- limits and switches ----------------------------------------------------------------------------------------


async def test_the_oldest_turns_above_the_limit_are_retired(
    database: PostgresDatabase, learning_database: ThrowawayDatabase
) -> None:
    applied = await learn(
        database,
        *(a_run(f"thought {n}", run_id=f"r{n}") for n in range(1, 4)),
        limits={"conversation": 3},
    )
    assert applied["retired_over_limit"] == 3
    assert [content for _, _, content in await turns(database)] == ["Noted.", "thought 3", "Noted."]
    await learn(database, a_run("thought 4", run_id="r4"), limits={"conversation": 3})
    assert [turn for turn, _, _ in await turns(database)] == [6, 7, 8]
    assert counted_scopes(learning_database.url) == recounted_scopes(learning_database.url)


async def test_turns_do_not_count_against_the_limit_of_the_user_memory(database: PostgresDatabase) -> None:
    await database.call("upsert_learning", ADA, learning=memory("Prefers tea"))
    applied = await learn(
        database,
        *(a_run(f"thought {n}", run_id=f"r{n}") for n in range(3)),
        limits={"user_memory": 1, "conversation": 100},
    )
    assert applied["retired_over_limit"] == 0


async def test_without_conversations_nothing_that_was_said_is_kept(
    learning_database: ThrowawayDatabase,
) -> None:
    machine = LearningMachine(settings=learning_database.settings, model="none", conversation=False)
    await machine.database.call("record_run", ADA, run=a_run("I like tea"))
    assert await machine.learn_session(ADA) == 1
    assert counts(learning_database.url)["agent_memory"] == 0
    await machine.aclose()


async def test_a_machine_holds_conversations_to_its_limit(learning_database: ThrowawayDatabase) -> None:
    machine = LearningMachine(
        settings=learning_database.settings, model="none", conversation=ConversationConfig(max_turns=1)
    )
    await machine.database.call("record_run", ADA, run=a_run("I like tea"))
    assert await machine.learn_session(ADA) == 1
    kept = await machine.get_learnings(identity=ADA, store="conversation")
    assert [turn["content"] for turn in kept] == ["Noted."]
    await machine.aclose()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"mode": LearningMode.AGENTIC}, ["LearningMode.AGENTIC", "store='conversation'"]),
        ({"mode": LearningMode.PROPOSE}, ["LearningMode.PROPOSE", "store='conversation'"]),
        ({"mode": "always"}, ["mode='always'", "store='conversation'"]),
        ({"max_turns": 0}, ["max_turns=0"]),
        ({"max_turns": 2.5}, ["max_turns=2.5"]),
        ({"max_turns": True}, ["max_turns=True"]),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], named: list[str]) -> None:
    with pytest.raises(ConfigurationError) as refused:
        ConversationConfig(**options)
    assert [part for part in named if part not in str(refused.value)] == []


# --- listing, deleting, erasing ---------------------------------------------------------------------------------


async def test_turns_are_listed_where_they_are_asked_for(database: PostgresDatabase) -> None:
    kept = await database.call("upsert_learning", ADA, learning=memory("Prefers tea"))
    await learn(database, a_run("I like jazz", run_id="r1"))

    assert [m["content"] for m in await database.call("get_learnings", ADA)] == ["Prefers tea"]
    assert len(await turns(database)) == 2
    listed = await database.call("get_learnings", ADA, wanted={"store": "conversation", "kind": "user"})
    begins = listed[0]["memory_id"][:8]
    found = await database.call("get_learnings", ADA, wanted={"begins": begins})
    assert [m["content"] for m in found] == ["I like jazz"]
    found = await database.call("get_learnings", ADA, wanted={"begins": kept["memory_id"][:8]})
    assert [m["content"] for m in found] == ["Prefers tea"]
    assert await database.call("get_learnings", BOB, wanted={"begins": begins}) == []
    users = await database.call("list_users", ADA)
    assert [(user["user_id"], user["memories"], user["turns"]) for user in users] == [("ada", 1, 2)]
    status = await database.call("learning_status", ADA)
    assert (status["memories"], status["turns"]) == (1, 2)


async def test_what_was_learned_from_a_run_does_not_repeat_its_messages(database: PostgresDatabase) -> None:
    await learn(database, a_run("I like jazz", run_id="r1"))
    run = await database.call("get_run", ADA, the_run_id="r1")
    assert run["learned"] == []
    assert len(run["messages"]) == 2


async def test_turns_are_deleted_one_by_one_and_with_all_else(
    database: PostgresDatabase, learning_database: ThrowawayDatabase
) -> None:
    await database.call("upsert_learning", ADA, learning=memory("Prefers tea"))
    await learn(database, a_run(["I like jazz", "I like rain"], run_id="r1"))
    await learn(database, a_run("I am Bob", run_id="r2"), identity=BOB)
    listed = await database.call("get_learnings", ADA, wanted={"store": "conversation"})

    assert await database.call("delete_learning", BOB, the_memory_id=listed[0]["memory_id"]) is False
    assert await database.call("delete_learning", ADA, the_memory_id=listed[0]["memory_id"]) is True
    assert counted_scopes(learning_database.url) == recounted_scopes(learning_database.url)
    assert await database.call("clear_learnings", ADA, the_store="conversation") == 3
    assert await turns(database) == []
    await learn(database, a_run("Back again", run_id="r3"))
    assert await database.call("clear_learnings", ADA) == 3
    assert counts(learning_database.url)["agent_memory"] == 2, "those of the other user"


async def test_erasing_a_user_takes_what_they_said(
    database: PostgresDatabase, learning_database: ThrowawayDatabase
) -> None:
    await learn(database, a_run("My cat is called Zoë", run_id="r1"))
    await learn(database, a_run("My dog is called Rex", run_id="r2"), identity=BOB)
    gone = await database.call("erase_user", ADA)
    assert gone["agent_memory"] == 2
    assert rows(learning_database.url, "SELECT DISTINCT owner_id FROM agent_memory") == [("bob",)]
    assert rows(learning_database.url, "SELECT DISTINCT owner_id FROM agent_memory_term") == [("bob",)]


# --- the whole way ----------------------------------------------------------------------------------------------


async def test_told_in_one_conversation_it_is_known_in_another_with_date_and_origin(
    learning_database: ThrowawayDatabase,
) -> None:
    settings = learning_database.settings.model_copy(update={"worker": WorkerMode.INSIDE})
    machine = LearningMachine(settings=settings, model="none")
    model = ScriptedChat(script=["I noted it for your parcels.", "I see.", "At the neighbour's."])
    agent: Any = create_agent(model, [], middleware=[machine.middleware()], checkpointer=InMemorySaver())

    async def ask(session: str, text: str) -> None:
        config = {"configurable": {"thread_id": session, "user_id": "ada"}}
        await agent.ainvoke({"messages": [HumanMessage(text)]}, config)

    await ask("t1", "My parcels always arrive at the neighbour's.")
    assert await machine.drain()
    await ask("t1", "Where do my parcels arrive?")
    assert await machine.drain()
    await ask("t2", "Where do my parcels arrive?")
    shown = model.calls[2].messages[0].text
    assert (
        "- user: My parcels always arrive at the neighbour's. | assistant: I noted it for your parcels."
        in shown
    )
    assert " [conversation, 20" in shown
    own_session = [message.text for message in model.calls[1].messages if message.type == "system"]
    assert not [text for text in own_session if "neighbour" in text], "it has its own words in its messages"
    await machine.aclose()


async def test_a_model_that_extracts_leaves_what_was_said_as_it_is(
    learning_database: ThrowawayDatabase,
) -> None:
    fact = {"action": "add", "memory_type": "fact", "content": "Has a cat", "evidence": ["r1.m1"]}
    extraction = ScriptedChat(script=[tool_call("Learned", user_memory=[fact])])
    machine = LearningMachine(settings=learning_database.settings, model=extraction)
    await machine.database.call("record_run", ADA, run=a_run("I have a cat", run_id="r1"))
    assert await machine.learn_session(ADA) == 1
    assert [m["content"] for m in await machine.get_learnings(identity=ADA)] == ["Has a cat"]
    kept = await machine.get_learnings(identity=ADA, store="conversation")
    assert {turn["content"] for turn in kept} == {"I have a cat", "Noted."}
    await machine.aclose()
