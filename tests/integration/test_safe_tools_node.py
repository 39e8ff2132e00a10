"""The node for plain graphs: the same rules as the middleware's."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any, NotRequired, TypedDict

import pytest
from langchain_core.messages import AIMessage, HumanMessage, RemoveMessage
from langchain_core.tools import tool
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import END, START, StateGraph, add_messages
from langgraph.types import Command

from agent import ConfigurationError, LearningMachine
from agent.execution import execution_tools
from agent.execution.safe_executor import SafeExecutor
from agent.execution.safe_tools_node import safe_tools
from agent.identity import Identity
from agent.portal import portal
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
def test_a_tool_that_an_agent_wrote_is_asked_for_and_counted_once(
    colour: str, make: MakeExecutor, deeds: Deeds
) -> None:
    rules = '[[rule]]\ntool = "add_up"\nrisk = "READ"\ndecision = "ask"\nper_hour = 2\n'
    executor = make(rules)
    who = Identity(tenant_id=executor.settings.tenant, user_id="carol")
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    code = "def run(a: int) -> int:\n    return a + 1\n"
    portal().run_sync(
        executor.library.create(
            "add_up", "Adds one to a number.", code, schema, [{"arguments": {"a": 1}}], who
        )
    )
    decide(executor, approvals(executor)[0], "approve")
    written = portal().run_sync(executor.library.tools(who))
    graph = builder(
        calls(("add_up", {"a": 1}), ("add_up", {"a": 2})), written, executor, risks={"add_up": "READ"}
    ).compile(checkpointer=InMemorySaver())
    (pause,) = pauses(call(colour, graph, said("Go"), HERE))

    answer = {"decisions": [{"type": "approve"}, {"type": "approve"}]}
    result = call(colour, graph, Command(resume={pause.id: answer}), HERE)

    told = answers_of_tools(result)
    assert [(message.status, "not executed" in message.text) for message in told] == [("success", False)] * 2
    assert ["2" in told[0].text, "3" in told[1].text] == [True, True]


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


# Whoever goes on with a turn


TWO_REVIEWERS = """
[[reviewer]]
name = "ada"
user_ids = ["ada-user"]
interrupt = true
[[reviewer]]
name = "bob"
user_ids = ["bob-user"]
interrupt = true
"""


class Login(dict[str, Any]):
    """Whom a LangGraph server authenticated."""

    is_authenticated = True
    permissions = ()

    def __init__(self, identity: str, tenant_id: str | None) -> None:
        super().__init__(identity=identity, tenant_id=tenant_id)
        self.identity = self.display_name = identity
        self.tenant_id = tenant_id


def logged_in(user_id: str, tenant_id: str | None = None) -> dict[str, Any]:
    """The configuration of a run that a server started for this user."""
    login = Login(user_id, tenant_id)
    return {
        "configurable": {
            "thread_id": "thread-1",
            "langgraph_auth_user": login,
            "assistant_id": "a",
            "graph_id": "g",
        }
    }


class StateWithTurn(State):
    safe_turn: NotRequired[dict[str, Any]]


def loop_of(
    script: list[AIMessage],
    tools: Any,
    executor: SafeExecutor,
    *,
    forgets: bool = False,
    saver: Any = None,
    schema: Any = State,
    **options: Any,
) -> Any:
    """A graph that says one message after the other, and runs the calls of each."""
    graph: StateGraph[Any, Any, Any, Any] = StateGraph(schema)

    def say(state: Any) -> Any:
        spoken = sum(isinstance(message, AIMessage) for message in state["messages"])
        return {"messages": [script[spoken]]}

    def forget(state: Any) -> Any:
        removed = [RemoveMessage(id=message.id) for message in state["messages"]]
        return {"messages": [*removed, AIMessage("A summary.")]}

    graph.add_node("say", say)
    graph.add_node("tools", safe_tools(tools, executor, **options))
    graph.add_node("forget", forget if forgets else lambda state: {})
    graph.add_edge(START, "say")
    graph.add_conditional_edges(
        "say", lambda state: "tools" if state["messages"][-1].tool_calls else END, ["tools", END]
    )
    graph.add_edge("tools", "forget")
    graph.add_edge("forget", "say")
    return graph.compile(checkpointer=saver or InMemorySaver())


def named_calls(number: int, *given: tuple[str, dict[str, Any]]) -> AIMessage:
    """As `calls`, with ids of their own in each message."""
    message = calls(*given)
    for one in message.tool_calls:
        one["id"] = f"{number}-{one['id']}"
    return message


@pytest.mark.parametrize("forgets", [False, True])
def test_who_resumes_a_turn_does_not_become_who_asks_next(
    forgets: bool, make: MakeExecutor, deeds: Deeds
) -> None:
    executor = make(base=TWO_REVIEWERS)
    script = [
        named_calls(1, ("delete_user", {"user_id": 1})),
        named_calls(2, ("delete_user", {"user_id": 2})),
    ]
    graph = loop_of([*script, AIMessage("done")], deeds.tools(), executor, forgets=forgets)
    (pause,) = pauses(graph.invoke(said("Go"), logged_in("bob-user")))
    (pause,) = pauses(graph.invoke(Command(resume={pause.id: True}), logged_in("ada-user")))

    assert [one.requested_by for one in approvals(executor)] == ["bob-user", "bob-user"]
    result = graph.invoke(Command(resume={pause.id: True}), logged_in("bob-user"))
    assert pauses(result)
    assert deeds.done == [1]


@pytest.mark.parametrize("is_other_process", [False, True])
def test_another_tenant_that_resumes_a_turn_asks_and_runs_nothing(
    is_other_process: bool, make: MakeExecutor, deeds: Deeds
) -> None:
    executor, saver = make(base=TWO_REVIEWERS), InMemorySaver()
    script = [
        named_calls(1, ("delete_user", {"user_id": 1})),
        named_calls(2, ("look_up", {"name": "Mimi"})),
        AIMessage("done"),
    ]
    options: dict[str, Any] = {"risks": {"look_up": "READ"}, "saver": saver}
    graph = loop_of(script, deeds.tools(), executor, **options)
    (pause,) = pauses(graph.invoke(said("Go"), logged_in("carol", "acme")))
    if is_other_process:
        graph = loop_of(script, deeds.tools(), make(base=TWO_REVIEWERS), **options)

    result = graph.invoke(Command(resume={pause.id: True}), logged_in("ada-user", "hq"))

    assert deeds.done == []
    assert not pauses(result)
    assert all("another tenant" in message.text for message in answers_of_tools(result))
    queue = executor.queue
    assert portal().run_sync(queue.list(Identity(tenant_id="hq"))) == []
    assert [one.state for one in portal().run_sync(queue.list(Identity(tenant_id="acme")))] == ["pending"]


def test_a_new_message_of_the_user_begins_a_turn_of_whoever_sends_it(
    make: MakeExecutor, deeds: Deeds
) -> None:
    executor = make(base=TWO_REVIEWERS)
    script = [
        named_calls(1, ("look_up", {"name": "Mimi"})),
        AIMessage("done"),
        named_calls(2, ("delete_user", {"user_id": 2})),
    ]
    graph = loop_of(script, deeds.tools(), executor, risks={"look_up": "READ"})
    graph.invoke(said("Go"), logged_in("bob-user"))
    assert pauses(graph.invoke(said("Go on"), logged_in("carol")))
    assert approvals(executor)[0].requested_by == "carol"


@pytest.mark.parametrize("is_other_process", [False, True])
def test_taint_outlives_the_messages(is_other_process: bool, make: MakeExecutor, deeds: Deeds) -> None:
    executor, saver = make(), InMemorySaver()
    script = [named_calls(1, ("look_up", {"name": "web"})), AIMessage("done")]
    options: dict[str, Any] = {
        "risks": {"look_up": "READ"}, "untrusted_tools": ["look_up"], "saver": saver, "schema": StateWithTurn,
    }  # fmt: skip
    loop_of(script, deeds.tools(), executor, forgets=True, **options).invoke(said("Go"), HERE)
    other = make() if is_other_process else executor
    script = [named_calls(2, ("delete_user", {"user_id": 2}))] * 9
    result = loop_of(script, deeds.tools(), other, **options).invoke(said("Go on"), HERE)
    assert pauses(result)
    assert approvals(executor)[0].risk == "DESTRUCTIVE"


def test_taint_outlives_the_messages_of_one_process_in_any_graph(make: MakeExecutor, deeds: Deeds) -> None:
    executor = make()
    script = [named_calls(1, ("look_up", {"name": "web"})), named_calls(2, ("delete_user", {"user_id": 2}))]
    graph = loop_of(
        [*script, AIMessage("done")], deeds.tools(), executor,
        forgets=True, risks={"look_up": "READ"}, untrusted_tools=["look_up"],
    )  # fmt: skip
    assert pauses(graph.invoke(said("Go"), HERE))
    assert approvals(executor)[0].risk == "DESTRUCTIVE"


def test_a_graph_inside_a_call_tells_of_the_untrusted_text_it_read(make: MakeExecutor, deeds: Deeds) -> None:
    executor = make()
    inner = loop_of(
        [named_calls(1, ("look_up", {"name": "web"})), AIMessage("done")],
        deeds.tools(), executor, risks={"look_up": "READ"}, untrusted_tools=["look_up"],
    )  # fmt: skip

    @tool
    def ask_helper(task: str) -> str:
        """Ask the helper."""
        inner.invoke(said(task), as_user("carol", "inner"))
        return "ok"

    script = [named_calls(2, ("ask_helper", {"task": "x"})), named_calls(3, ("delete_user", {"user_id": 1}))]
    outer = loop_of(script, [*deeds.tools(), ask_helper], executor, risks={"ask_helper": "READ"})
    assert pauses(outer.invoke(said("Go"), HERE))
    assert approvals(executor)[0].risk == "DESTRUCTIVE"


def test_without_a_thread_the_calls_of_two_users_are_two(make: MakeExecutor, deeds: Deeds) -> None:
    class Plain(TypedDict):
        messages: Annotated[list[Any], operator.add]

    executor = make('[[rule]]\ntool="delete_user"\ndecision="allow"\nrisk="WRITE"\n')
    for user_id in ("carol", "dave"):
        graph: StateGraph[Any, Any, Any, Any] = StateGraph(Plain)
        graph.add_node("say", lambda state: {"messages": [calls(("delete_user", {"user_id": 1}))]})
        graph.add_node("tools", safe_tools(deeds.tools(), executor))
        graph.add_edge(START, "say")
        graph.add_edge("say", "tools")
        graph.compile().invoke({"messages": [HumanMessage("Go")]}, {"configurable": {"user_id": user_id}})
    assert [row["user_id"] for row in log_of(executor)] == ["carol", "dave"]
    assert deeds.done == [1, 1]


@tool
def send_money(to: str, cents: int) -> str:
    """Send money."""
    raise AssertionError("nothing is sent here")


@colours
def test_calls_that_no_tool_would_get_as_they_are_written_are_refused_and_nobody_is_asked(
    colour: str, make: MakeExecutor
) -> None:
    executor = make()
    turn = calls(
        ("send_money", {"to": "eve", "cents": 5, "dry_run": True}),
        ("send_money", {"to": "eve"}),
        ("send_gold", {"to": "eve"}),
    )
    graph = builder(turn, [send_money], executor).compile(checkpointer=InMemorySaver())

    result = call(colour, graph, said("Pay"), HERE)

    assert not pauses(result)
    assert approvals(executor) == []
    told = answers_of_tools(result)
    assert [message.status for message in told] == ["error"] * 3
    for message, word in zip(told, ("dry_run", "cents", "send_gold"), strict=True):
        assert word in message.text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"executor": "x"}, "executor='x'"),
        ({"risks": ["x"]}, "risks="),
        ({"risks": {"nonexistent": "READ"}}, "'nonexistent'"),
        ({"untrusted_tools": ["nope"]}, "'nope'"),
    ],
)
def test_options_that_fit_no_tool_are_named(options: dict[str, Any], words: str, make: MakeExecutor) -> None:
    with pytest.raises(ConfigurationError, match=words):
        safe_tools([send_money], **{"executor": make(), **options})
