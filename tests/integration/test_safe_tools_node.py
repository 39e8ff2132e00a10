"""The node for plain graphs: the same rules as the middleware's."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any, TypedDict

import pytest
from langchain_core.messages import AIMessage
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import END, START, StateGraph, add_messages
from langgraph.types import Command

from agent import ConfigurationError, LearningMachine
from agent.execution import execution_tools
from agent.execution.safe_executor import SafeExecutor
from agent.execution.safe_tools_node import safe_tools
from agent.testing.throwaway import ThrowawayDatabase
from tests.integration.agents import ASYNC_AND_SYNC, as_user, call, said
from tests.integration.safe_agents import (
    Deeds,
    MakeExecutor,
    answers_of_tools,
    approvals,
    calls,
    decide,
    executors_on,
    log_of,
    pauses,
)

colours = pytest.mark.parametrize("colour", ASYNC_AND_SYNC)
HERE = as_user("carol", "thread-1")


class State(TypedDict):
    messages: Annotated[list[Any], add_messages]


@pytest.fixture
def make(learning_database: ThrowawayDatabase) -> Iterator[MakeExecutor]:
    with executors_on(learning_database) as made:
        yield made


@pytest.fixture
def deeds() -> Deeds:
    return Deeds()


def builder(
    message: AIMessage, tools: Any, executor: SafeExecutor, **options: Any
) -> StateGraph[Any, Any, Any, Any]:
    """A graph that says one message and runs its calls."""
    graph: StateGraph[Any, Any, Any, Any] = StateGraph(State)
    graph.add_node("say", lambda state: {"messages": [message]})
    graph.add_node("tools", safe_tools(tools, executor, **options))
    graph.add_edge(START, "say")
    graph.add_edge("say", "tools")
    graph.add_edge("tools", END)
    return graph


def graph_of(message: AIMessage, deeds: Deeds, executor: SafeExecutor, **options: Any) -> Any:
    made = builder(message, deeds.tools(), executor, risks={"look_up": "READ"}, **options)
    return made.compile(checkpointer=InMemorySaver())


@colours
def test_calls_of_a_message_pause_once_and_run_as_decided(
    colour: str, make: MakeExecutor, deeds: Deeds
) -> None:
    executor = make()
    turn = calls(
        ("delete_user", {"user_id": 1}), ("look_up", {"name": "Mimi"}), ("delete_user", {"user_id": 2})
    )
    graph = graph_of(turn, deeds, executor)
    (pause,) = pauses(call(colour, graph, said("Go"), HERE))
    assert len(pause.value["action_requests"]) == 2
    assert deeds.done == []

    answer = {"decisions": [{"type": "reject", "message": "no"}, {"type": "approve"}]}
    result = call(colour, graph, Command(resume={pause.id: answer}), HERE)

    assert sorted(map(str, deeds.done)) == ["2", "Mimi"]
    assert [message.status for message in answers_of_tools(result)] == ["error", "success", "success"]
    assert {row["state"] for row in log_of(executor)} == {"executed", "rejected"}


@colours
def test_whoever_resumes_does_not_become_who_asked(colour: str, make: MakeExecutor, deeds: Deeds) -> None:
    executor = make()
    graph = graph_of(calls(("delete_user", {"user_id": 1})), deeds, executor)
    (pause,) = pauses(call(colour, graph, said("Go"), HERE))
    decide(executor, approvals(executor)[0], "approve", "bob")

    ours = {"approval_batch": pause.value["approval_batch"]}
    call(colour, graph, Command(resume={pause.id: ours}), as_user("mallory", "thread-1"))

    assert deeds.done == [1]
    assert log_of(executor)[0]["user_id"] == "carol"


@colours
def test_tools_of_the_executor_are_run_by_it(colour: str, make: MakeExecutor, deeds: Deeds) -> None:
    executor = make(registry=deeds.registry())
    graph = builder(
        calls(("look", {"user_id": 1}), ("delete", {"user_id": 2}), ("never", {"user_id": 3})),
        execution_tools.tools(executor),
        executor,
    ).compile(checkpointer=InMemorySaver())
    (pause,) = pauses(call(colour, graph, said("Go"), HERE))
    result = call(colour, graph, Command(resume={pause.id: True}), HERE)
    assert sorted(deeds.done) == [1, 2]
    assert "never runs" in answers_of_tools(result)[2].text


def test_changed_calls_and_stale_answers_run_nothing(make: MakeExecutor, deeds: Deeds) -> None:
    executor = make()
    graph = graph_of(calls(("delete_user", {"user_id": 1})), deeds, executor)
    first = call("sync", graph, said("Go"), HERE)
    (pause,) = pauses(first)
    message = first["messages"][-1]
    changed = message.model_copy(update={"tool_calls": [{**message.tool_calls[0], "args": {"user_id": 999}}]})
    graph.update_state(HERE, {"messages": [changed]}, as_node="say")
    for resume in ({pause.id: True}, True):
        call("sync", graph, Command(resume=resume), HERE)
    assert deeds.done == []


def test_five_resumes_at_once_run_it_once(make: MakeExecutor, deeds: Deeds) -> None:
    graph = graph_of(calls(("delete_user", {"user_id": 1})), deeds, make())
    (pause,) = pauses(call("sync", graph, said("Go"), HERE))
    with ThreadPoolExecutor(5) as threads:
        list(threads.map(lambda _: graph.invoke(Command(resume={pause.id: True}), HERE), range(5)))
    assert deeds.done == [1]


@colours
def test_untrusted_text_in_the_thread_makes_calls_more_dangerous(
    colour: str, make: MakeExecutor, deeds: Deeds
) -> None:
    executor = make()
    options = {"untrusted_tools": ["look_up"]}
    saver = InMemorySaver()
    for turn in (calls(("look_up", {"name": "Mimi"})), calls(("delete_user", {"user_id": 1}))):
        made = builder(turn, deeds.tools(), executor, risks={"look_up": "READ"}, **options)
        result = call(colour, made.compile(checkpointer=saver), said("Go"), HERE)
    assert pauses(result)
    assert approvals(executor)[0].risk == "DESTRUCTIVE"


def test_inside_a_learning_graph_the_call_is_for_the_user_of_the_run(
    learning_database: ThrowawayDatabase, make: MakeExecutor, deeds: Deeds
) -> None:
    executor = make()
    machine = LearningMachine(settings=learning_database.settings)
    inner = builder(calls(("delete_user", {"user_id": 1})), deeds.tools(), executor)
    graph = machine.wrap(inner, checkpointer=InMemorySaver())
    (pause,) = pauses(call("async", graph, said("Go"), HERE))
    assert approvals(executor)[0].requested_by == "carol"
    call("async", graph, Command(resume={pause.id: True}), {"configurable": {"thread_id": "thread-1"}})
    assert deeds.done == [1]
    import asyncio

    asyncio.run(machine.aclose())


def test_a_node_without_tools_is_refused(make: MakeExecutor) -> None:
    with pytest.raises(ConfigurationError, match="at least one"):
        safe_tools([], make())
