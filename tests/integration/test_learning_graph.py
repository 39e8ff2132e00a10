"""`with_learning` around graphs of all kinds."""

from __future__ import annotations

import asyncio
import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, TypedDict

import pytest
from langchain.agents import create_agent
from langchain_core.messages import AIMessage, AnyMessage, RemoveMessage
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import END, START, MessagesState, StateGraph, add_messages
from langgraph.types import Command, interrupt
from pydantic import BaseModel

from agent import ConfigurationError, LearningMachine, LearningMiddleware, current_knowledge, with_learning
from agent.learning.rendering import OPENING
from agent.testing import ScriptedChat
from agent.testing.throwaway import ThrowawayDatabase
from tests.integration.agents import (
    ASYNC_AND_SYNC,
    as_user,
    call,
    machine_on,
    memories_of,
    run_of,
    runs_of,
    said,
    tell_knowledge,
)

colours = pytest.mark.parametrize("colour", ASYNC_AND_SYNC)


@pytest.fixture
def machine(learning_database: ThrowawayDatabase) -> Iterator[LearningMachine]:
    made = machine_on(learning_database)
    yield made
    asyncio.run(made.aclose())


class TeamState(MessagesState):
    log: Annotated[list[str], operator.add]
    visits: int


def team(*, asks: bool = False) -> StateGraph[Any, Any, Any, Any]:
    """Intake, then an agent that knows nothing of learning, then perhaps a question to a person."""

    def intake(state: TeamState) -> dict[str, Any]:
        return {"log": ["intake"], "visits": state.get("visits", 0) + 1}

    def ask(state: TeamState) -> dict[str, Any]:
        return {"log": [f"answered {interrupt('go on?')}"]}

    builder = StateGraph(TeamState)
    builder.add_node("intake", intake)
    builder.add_node(
        "billing", create_agent(ScriptedChat(script=[tell_knowledge]), [], system_prompt="You do billing.")
    )
    builder.add_edge(START, "intake")
    builder.add_edge("intake", "billing")
    if asks:
        builder.add_node("ask", ask)
        builder.add_edge("billing", "ask")
        builder.add_edge("ask", END)
    else:
        builder.add_edge("billing", END)
    return builder


@colours
@pytest.mark.parametrize("compiled", [True, False])
def test_inner_agents_know_without_code_of_their_own(
    colour: str, compiled: bool, machine: LearningMachine
) -> None:
    graph = with_learning(team().compile() if compiled else team(), machine)
    call(colour, graph, said("My invoice number is 4711"), as_user("ada", "1"))
    assert machine.drain_sync()

    result = call(colour, graph, said("Which invoice?"), as_user("ada", "2"))

    assert "4711" in result["messages"][-1].text
    assert result["messages"][-1].text.startswith("You do billing.")
    assert [message.type for message in result["messages"]] == ["human", "ai"]
    assert (result["log"], result["visits"]) == (["intake"], 1)
    assert "learning_run" not in result


def test_the_three_nodes_and_the_graph_inside_are_visible(machine: LearningMachine) -> None:
    graph = with_learning(team(), machine)
    assert [node for node in graph.get_graph().nodes if not node.startswith("__")] == [
        "load_knowledge",
        "execute",
        "learn",
    ]
    assert any("billing" in node for node in graph.get_graph(xray=1).nodes)


@colours
def test_state_and_history_of_a_thread_are_those_of_the_graph_itself(
    colour: str, machine: LearningMachine
) -> None:
    bare = team().compile(checkpointer=InMemorySaver())
    learning = with_learning(team().compile(checkpointer=InMemorySaver()), machine)
    for number, graph in enumerate((bare, learning)):
        for turn in ("one", "two", "three"):
            call(colour, graph, said(turn) | {"log": [turn]}, as_user(f"user {number}", "1"))

    states = [graph.get_state(as_user("x", "1")).values for graph in (bare, learning)]  # type: ignore[arg-type]
    assert states[0]["log"] == states[1]["log"] == ["one", "intake", "two", "intake", "three", "intake"]
    assert states[0]["visits"] == states[1]["visits"] == 3
    assert [m.type for m in states[0]["messages"]] == [m.type for m in states[1]["messages"]]
    assert OPENING not in str(states[1]["messages"][:1])


@colours
def test_interrupt_and_resume_without_a_user_keep_the_identity(colour: str, machine: LearningMachine) -> None:
    graph = with_learning(team(asks=True), machine, checkpointer=InMemorySaver())
    paused = call(colour, graph, said("hello"), as_user("ada", "1"))
    assert [run["status"] for run in runs_of(machine)] == ["interrupted"]

    result = call(
        colour,
        graph,
        Command(resume={paused["__interrupt__"][0].id: "yes"}),
        {"configurable": {"thread_id": "1"}},
    )

    assert result["log"] == ["intake", "answered yes"]
    [run] = runs_of(machine)
    assert (run["status"], run["user_id"]) == ("completed", "ada")
    assert [message["role"] for message in run_of(machine, run["run_id"])["messages"]] == ["user", "assistant"]


@colours
def test_a_failure_inside_is_recorded_and_raised(colour: str, machine: LearningMachine) -> None:
    def fail(state: MessagesState) -> None:
        raise ZeroDivisionError("no")

    builder = StateGraph(MessagesState)
    builder.add_node("fail", fail)
    builder.add_edge(START, "fail")
    with pytest.raises(ZeroDivisionError):
        call(colour, with_learning(builder, machine), said("hello"), as_user("ada", "1"))

    [run] = runs_of(machine)
    assert (run["status"], run["error"]) == ("failed", "ZeroDivisionError: no")


@colours
def test_a_graph_without_messages_is_learned_from_its_texts(colour: str, machine: LearningMachine) -> None:
    class Question(TypedDict):
        question: str

    class Answer(TypedDict):
        answer: str

    class Both(Question, Answer):
        pass

    def reply(state: Both) -> dict[str, Any]:
        return {"answer": current_knowledge() or "nothing known"}

    builder = StateGraph(Both, input_schema=Question, output_schema=Answer)
    builder.add_node("reply", reply)
    builder.add_edge(START, "reply")
    graph = with_learning(builder, machine)

    assert call(colour, graph, {"question": "I sail a yawl"}, as_user("ada", "1")) == {"answer": "nothing known"}
    assert machine.drain_sync()
    known = call(colour, graph, {"question": "What do I sail?"}, as_user("ada", "2"))

    assert "I sail a yawl" in known["answer"]
    assert "I sail a yawl" in memories_of(machine, "ada")


@colours
def test_messages_that_the_graph_removes_or_replaces_are_removed_and_replaced(
    colour: str, machine: LearningMachine
) -> None:
    def tidy(state: MessagesState) -> dict[str, Any]:
        first, *_ = [message for message in state["messages"] if message.type == "human"]
        return {
            "messages": [
                RemoveMessage(id=str(first.id)),
                AIMessage("draft", id="answer"),
                AIMessage("final", id="answer"),
            ]
        }

    builder = StateGraph(MessagesState)
    builder.add_node("tidy", tidy)
    builder.add_edge(START, "tidy")
    result = call(colour, with_learning(builder, machine), said("hello"), as_user("ada", "1"))

    assert [message.text for message in result["messages"]] == ["final"]


class Form(BaseModel):
    messages: Annotated[list[AnyMessage], add_messages] = []
    colour: str = "blue"


@dataclass
class Sheet:
    messages: Annotated[list[AnyMessage], add_messages] = field(default_factory=list)
    colour: str = "blue"


@colours
@pytest.mark.parametrize("schema", [Form, Sheet])
def test_states_that_are_models_or_dataclasses_work(colour: str, schema: type, machine: LearningMachine) -> None:
    def reply(state: Any) -> dict[str, Any]:
        assert isinstance(state, schema)
        return {"messages": [AIMessage("ok")], "colour": "red"}

    builder = StateGraph(schema)
    builder.add_node("reply", reply)
    builder.add_edge(START, "reply")
    result = call(colour, with_learning(builder, machine), said("hello"), as_user("ada", "1"))

    assert result["messages"][-1].text == "ok"
    assert result["colour"] == "red"
    assert [run["status"] for run in runs_of(machine)] == ["completed"]


@colours
def test_an_agent_that_learns_itself_inside_is_one_run(colour: str, machine: LearningMachine) -> None:
    inner = create_agent(ScriptedChat(script=["ok"]), [], middleware=[LearningMiddleware(machine)], name="inner")
    builder = StateGraph(MessagesState)
    builder.add_node("inner", inner)
    builder.add_edge(START, "inner")
    call(colour, with_learning(builder, machine), said("hello"), as_user("ada", "1"))

    assert len(runs_of(machine)) == 1


def test_streaming_shows_the_steps_and_tokens_of_inner_agents(machine: LearningMachine) -> None:
    graph = with_learning(team(), machine)
    steps: list[str] = []
    tokens = ""
    for _, mode, part in graph.stream(
        said("hello"),  # type: ignore[arg-type]
        as_user("ada", "1"),  # type: ignore[arg-type]
        stream_mode=["updates", "messages"],
        subgraphs=True,
    ):
        if mode == "updates":
            steps += part
        else:
            tokens += part[0].text
    assert steps == ["load_knowledge", "intake", "model", "billing", "execute", "learn"]
    assert "You do billing." in tokens


def test_what_cannot_be_wrapped_is_refused(machine: LearningMachine) -> None:
    with pytest.raises(ConfigurationError, match="must be a StateGraph"):
        with_learning("graph", machine)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="single value"):
        root = StateGraph(Annotated[list[Any], operator.add])  # type: ignore[type-var]
        root.add_node("same", lambda state: [])
        root.add_edge(START, "same")
        with_learning(root, machine)
    with pytest.raises(ConfigurationError, match="learns already"):
        with_learning(with_learning(team(), machine), machine)
    with pytest.raises(TypeError, match="not both"):
        with_learning(team(), machine, user_memory=False)
