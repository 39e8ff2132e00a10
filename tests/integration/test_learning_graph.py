"""`with_learning` around graphs of all kinds."""

from __future__ import annotations

import asyncio
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, TypedDict

import pytest
from langchain.agents import create_agent
from langchain.agents.middleware import SummarizationMiddleware
from langchain_core.messages import AIMessage, AnyMessage, HumanMessage, RemoveMessage
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import END, START, MessagesState, StateGraph, add_messages
from langgraph.types import Command, interrupt
from pydantic import BaseModel

from agent import (
    ConfigurationError,
    Identity,
    LearningMachine,
    LearningMiddleware,
    current_knowledge,
    with_learning,
)
from agent.learning.rendering import OPENING
from agent.testing import ScriptedChat
from agent.testing.throwaway import ThrowawayDatabase
from tests.integration.agents import (
    ASYNC_AND_SYNC,
    all_recorded,
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

    states = [graph.get_state(as_user("x", "1")).values for graph in (bare, learning)]
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
    assert [message["role"] for message in run_of(machine, run["run_id"])["messages"]] == [
        "user",
        "assistant",
    ]


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

    assert call(colour, graph, {"question": "I sail a yawl"}, as_user("ada", "1")) == {
        "answer": "nothing known"
    }
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
def test_states_that_are_models_or_dataclasses_work(
    colour: str, schema: type, machine: LearningMachine
) -> None:
    def reply(state: Any) -> dict[str, Any]:
        assert isinstance(state, schema)
        return {"messages": [AIMessage("ok")], "colour": "red"}

    builder: StateGraph[Any, Any, Any, Any] = StateGraph(schema)
    builder.add_node("reply", reply)
    builder.add_edge(START, "reply")
    result = call(colour, with_learning(builder, machine), said("hello"), as_user("ada", "1"))

    assert result["messages"][-1].text == "ok"
    assert result["colour"] == "red"
    assert [run["status"] for run in runs_of(machine)] == ["completed"]


@colours
def test_an_agent_that_learns_itself_inside_is_one_run(colour: str, machine: LearningMachine) -> None:
    inner = create_agent(
        ScriptedChat(script=["ok"]), [], middleware=[LearningMiddleware(machine)], name="inner"
    )
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
        said("hello"),
        as_user("ada", "1"),
        stream_mode=["updates", "messages"],
        subgraphs=True,
    ):
        if mode == "updates":
            steps += part
        else:
            tokens += str(part[0].text)  # type: ignore[union-attr]
    assert steps == ["load_knowledge", "intake", "model", "billing", "execute", "learn"]
    assert "You do billing." in tokens


def test_what_cannot_be_wrapped_is_refused(machine: LearningMachine) -> None:
    with pytest.raises(ConfigurationError, match="must be a StateGraph"):
        with_learning("graph", machine)  # type: ignore[arg-type]
    single_value: Any = Annotated[list[Any], operator.add]
    root: StateGraph[Any, Any, Any, Any] = StateGraph(single_value)
    root.add_node("same", lambda state: [])
    root.add_edge(START, "same")
    with pytest.raises(ConfigurationError, match="single value"):
        with_learning(root, machine)
    with pytest.raises(ConfigurationError, match="learns already"):
        with_learning(with_learning(team(), machine), machine)
    with pytest.raises(TypeError, match="not both"):
        with_learning(team(), machine, user_memory=False)


class Added(TypedDict):
    messages: Annotated[list[Any], operator.add]


class Plain(TypedDict):
    messages: list[Any]


def latest(old: list[Any], new: list[Any]) -> list[Any]:
    return new


class Latest(TypedDict):
    messages: Annotated[list[AnyMessage], add_messages]
    steps: Annotated[list[str], latest]


FORMS: dict[str, Callable[[int], Any]] = {
    "message": lambda turn: HumanMessage("hi"),
    "message with id": lambda turn: HumanMessage("hi", id=f"h{turn}"),
    "tuple": lambda turn: ("user", "hi"),
    "dict": lambda turn: {"role": "user", "content": "hi"},
    "text": lambda turn: "hi",
}


@colours
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("schema", [MessagesState, Added, Plain, Latest])
def test_a_graph_answers_the_same_with_learning_whatever_its_reducers(
    colour: str, schema: Any, form: str, checkpointed: bool, machine: LearningMachine
) -> None:
    def add(text: str) -> Any:
        def node(state: Any) -> dict[str, Any]:
            new = [AIMessage(text)]
            changes: dict[str, Any] = {"messages": [*state["messages"], *new] if schema is Plain else new}
            return changes | ({"steps": [text, "step"]} if schema is Latest else {})

        return node

    builder = StateGraph(schema)
    builder.add_node("a", add("from a"))
    builder.add_node("b", add("from b"))
    builder.add_edge(START, "a")
    builder.add_edge("a", "b")
    results = []
    asyncio.run(
        machine.upsert_learning(
            identity=Identity(user_id="ada"), store="user_memory", content="Says hi a lot"
        )
    )
    for number, graph in enumerate(
        (
            builder.compile(checkpointer=InMemorySaver() if checkpointed else None),
            with_learning(builder, machine, checkpointer=InMemorySaver() if checkpointed else None),
        )
    ):
        for turn in range(3):
            result = call(colour, graph, {"messages": [FORMS[form](turn)]}, as_user("ada", str(number)))
        results.append(result)
    shown = [[getattr(message, "content", message) for message in result["messages"]] for result in results]
    assert shown[0] == shown[1]
    assert results[0].get("steps") == results[1].get("steps")
    contents = [run_of(machine, run["run_id"])["messages"] for run in runs_of(machine)]
    assert [[message["content"] for message in messages] for messages in contents] == [
        ["hi", "from a", "from b"]
    ] * 3


@colours
def test_a_summary_inside_leaves_the_order_of_messages_as_it_is(
    colour: str, machine: LearningMachine
) -> None:
    def graph(learning: bool) -> Any:
        inner = create_agent(
            ScriptedChat(script=["a1", "a2", "a3"]),
            [],
            middleware=[
                SummarizationMiddleware(
                    ScriptedChat(script=["They talked."]), trigger=("messages", 4), keep=("messages", 2)
                )
            ],
            checkpointer=InMemorySaver(),
        )
        return with_learning(inner, machine) if learning else inner

    shown = []
    for learning in (False, True):
        agent = graph(learning)
        for turn in ("q1", "q2", "q3"):
            result = call(colour, agent, said(turn), as_user("ada", f"{learning}"))
        shown.append([message.text for message in result["messages"]])
    assert shown[0] == shown[1]
    assert machine.drain_sync()
    assert sorted(memories_of(machine, "ada")) == ["q1", "q2", "q3"]


class Dialogue(TypedDict, total=False):
    question: str
    answer: str


@colours
def test_an_answer_of_a_graph_without_messages_is_not_taken_for_the_users_words(
    colour: str, machine: LearningMachine
) -> None:
    builder = StateGraph(Dialogue)
    builder.add_node("reply", lambda state: {"answer": f"The assistant says: {state['question'][::-1]}"})
    builder.add_edge(START, "reply")
    graph = with_learning(builder, machine, checkpointer=InMemorySaver())
    call(colour, graph, {"question": "I live in Rome"}, as_user("ada", "1"))
    all_recorded(machine)  # before the next one
    call(colour, graph, {"question": "I like tea"}, as_user("ada", "1"))

    assert machine.drain_sync()
    assert sorted(memories_of(machine, "ada")) == ["I like tea", "I live in Rome"]
    [second, first] = runs_of(machine)
    assert [m["role"] for m in run_of(machine, first["run_id"])["messages"]] == ["user", "assistant"]
    assert [m["content"] for m in run_of(machine, second["run_id"])["messages"]] == [
        "I like tea",
        "The assistant says: aet ekil I",
    ]
