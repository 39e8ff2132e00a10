"""The sample graphs with learning around them, on the rule-based model and a real database."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
from langchain_core.messages import HumanMessage
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.types import Command

from agent import Identity, LearningMachine, LearningMode, UserProfileConfig
from agent.settings import WorkerMode
from agent.testing.throwaway import ThrowawayDatabase
from graphs import assistant, support_team
from graphs.assistant import build_assistant
from graphs.rule_chat import REVIEWER, RuleChat
from graphs.support_team import build_support_team

ADA = Identity(user_id="ada@example.com")
CONCISE = "I prefer concise answers and I work on billing."


@pytest.fixture
async def machine(learning_database: ThrowawayDatabase) -> AsyncIterator[LearningMachine]:
    """As the assistant has it: profile by tool, the rest from every run; learns in this process."""
    settings = learning_database.settings.model_copy(update={"worker": WorkerMode.INSIDE})
    machine = LearningMachine(user_profile=UserProfileConfig(mode=LearningMode.AGENTIC), settings=settings)
    yield machine
    await machine.aclose()


async def say(
    graph: Any, thread: str, said: Any, *, user: str | None = ADA.user_id, is_async: bool = True
) -> Any:
    """One turn on a thread; returns the state."""
    configurable = {"thread_id": thread} | ({"user_id": user} if user else {})
    given = {"messages": [HumanMessage(said)]} if isinstance(said, str) else said
    config = {"configurable": configurable}
    return await graph.ainvoke(given, config) if is_async else graph.invoke(given, config)


@pytest.mark.parametrize("is_async", [False, True])
async def test_the_assistant_is_told_in_one_conversation_and_knows_in_another(
    machine: LearningMachine, is_async: bool
) -> None:
    graph = build_assistant(RuleChat(), machine, InMemorySaver())

    told = await say(graph, "one", CONCISE, is_async=is_async)
    asked = await say(graph, "two", "What do you know about me?", is_async=is_async)
    stranger = await say(graph, "three", "What do you know about me?", user="bob", is_async=is_async)

    assert "Saved: preferences = concise answers" in told["messages"][-1].text
    assert "preferences: concise answers" in asked["messages"][-1].text
    assert "role: works on billing" in asked["messages"][-1].text
    assert "I know nothing about you yet" in stranger["messages"][-1].text


async def test_the_assistant_answers_briefly_because_it_knows(machine: LearningMachine) -> None:
    graph = build_assistant(RuleChat(), machine, InMemorySaver())

    before = await say(graph, "one", "Status of A1001?")
    await say(graph, "one", CONCISE)
    after = await say(graph, "two", "Status of A1001?")

    closing = "Is there anything else I can do for you?"
    assert before["messages"][-1].text.endswith(closing)
    assert not after["messages"][-1].text.endswith(closing)


async def test_what_no_tool_kept_is_learned_from_the_run(machine: LearningMachine) -> None:
    graph = build_assistant(RuleChat(), machine, InMemorySaver())

    await say(graph, "one", "My parcels always arrive at the neighbour's.")
    await machine.drain()
    asked = await say(graph, "two", "What do you know about me?")

    assert "My parcels always arrive at the neighbour's." in asked["messages"][-1].text


async def test_an_approval_without_a_user_belongs_to_the_one_who_asked(machine: LearningMachine) -> None:
    graph = build_assistant(RuleChat(), machine, InMemorySaver())

    paused = await say(graph, "one", "Please delete my account ada@example.com")
    request = paused["__interrupt__"][0]
    resumed: Command[Any] = Command(resume={request.id: {"decisions": [{"type": "approve"}]}})
    done = await say(graph, "one", resumed, user=None)
    await machine.drain()

    assert "has been deleted" in done["messages"][-1].text
    learned = await machine.get_learnings(identity=ADA, store="conversation", kind="user")
    assert ["Please delete my account" in memory["content"] for memory in learned].count(True) == 1


async def test_without_a_user_the_assistant_works_and_keeps_nothing(machine: LearningMachine) -> None:
    graph = build_assistant(RuleChat(), machine, InMemorySaver())

    state = await say(graph, "one", "Status of A1001?", user=None)
    again = await say(graph, "two", "What do you know about me?", user=None)

    assert "is delivered" in state["messages"][-1].text
    assert "I know nothing about you yet" in again["messages"][-1].text


async def test_without_a_user_a_wish_to_be_remembered_is_refused_and_the_run_goes_on(
    machine: LearningMachine,
) -> None:
    graph = build_assistant(RuleChat(), machine, InMemorySaver())

    state = await say(graph, "one", "My name is Ada", user=None)

    assert "Saved" not in state["messages"][-1].text
    assert "Nothing was saved" in state["messages"][-1].text


@pytest.mark.parametrize("is_async", [False, True])
async def test_every_specialist_of_the_team_goes_by_what_was_learned(
    machine: LearningMachine, is_async: bool
) -> None:
    graph = build_support_team(RuleChat(), machine, InMemorySaver())

    await say(graph, "one", CONCISE, is_async=is_async)
    await machine.drain()
    answers = {}
    for number, said in enumerate(
        (
            "Where is the parcel of A1002?",
            "I need the invoice of A1001",
            "Cancel S3001",
            "The kettle of A1006 is broken",
        )
    ):
        state = await say(graph, f"later-{number}", said, is_async=is_async)
        answers[state["category"]] = state["messages"][-1].text

    assert set(answers) == {"shipping", "billing", "retention", "quality"}
    assert not [text for text in answers.values() if "Is there anything else" in text]


async def test_the_teams_own_talk_is_neither_kept_nor_learned(machine: LearningMachine) -> None:
    graph = build_support_team(RuleChat(), machine, InMemorySaver())

    state = await say(graph, "one", "This is unacceptable, refund order A1005")
    await machine.drain()

    assert (state["qa_returns"], state["escalated"]) == (1, True)
    assert [message.type for message in state["messages"]] == ["human", "ai", "tool", "ai"]
    assert not [message for message in state["messages"] if message.name == REVIEWER]
    learned = await machine.get_learnings(identity=ADA, store="conversation", kind="user")
    assert [memory["content"] for memory in learned] == ["This is unacceptable, refund order A1005"]


def test_the_graphs_of_the_server_are_there() -> None:
    assert assistant.graph.name == "assistant"
    assert {"load_knowledge", "execute", "learn"} <= set(support_team.graph.nodes)
