"""The middleware inside `create_agent`: recall, recording, identity, ends that no hook sees."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import pytest
from langchain.agents import create_agent
from langchain.agents.middleware import (
    AgentMiddleware,
    HumanInTheLoopMiddleware,
    ModelCallLimitMiddleware,
    ModelRetryMiddleware,
    PIIMiddleware,
    SummarizationMiddleware,
    hook_config,
)
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_core.tools import tool
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.types import Command, interrupt

from agent import (
    ConfigurationError,
    Identity,
    LearningMachine,
    LearningMiddleware,
    LearningMode,
    UserMemoryConfig,
    UserProfileConfig,
    current_knowledge,
    listening,
)
from agent.events import Event
from agent.learning.rendering import OPENING
from agent.testing import ScriptedChat, tool_call
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


class CountingThreads(ThreadPoolExecutor):
    """A thread pool that knows how often it was used."""

    used = 0

    def submit(self, *arguments: Any, **named: Any) -> Any:
        self.used += 1
        return super().submit(*arguments, **named)


def test_an_async_run_takes_no_trip_to_a_thread_pool(machine: LearningMachine) -> None:
    """LangChain's wrapping of a hook for LangSmith would take two for each call of a model or a tool."""

    @tool
    async def look_up() -> str:
        """Look something up."""
        return "found"

    agent = create_agent(
        ScriptedChat(script=[tool_call("look_up"), "hello"]),
        [look_up],
        middleware=[LearningMiddleware(machine)],
    )
    threads = CountingThreads()

    async def run() -> None:
        asyncio.get_running_loop().set_default_executor(threads)
        await agent.ainvoke(said("hello"), as_user("ada", "1"))

    asyncio.run(run())

    assert len(runs_of(machine)) == 1
    assert threads.used == 0


async def test_a_pause_is_recorded_where_a_stream_is_read_in_contexts_of_its_own(
    machine: LearningMachine,
) -> None:
    """As a LangGraph server reads it: nothing that the start of the graph set is there in its nodes."""

    @tool
    def ask_somebody(question: str) -> str:
        """Ask a person."""
        return str(interrupt(question))

    script = [tool_call("ask_somebody", question="May I?"), "done"]
    agent = create_agent(
        ScriptedChat(script=script),
        [ask_somebody],
        middleware=[LearningMiddleware(machine)],
        checkpointer=InMemorySaver(),
    )
    run_id = uuid4()
    stream = agent.astream(
        said("hello"), as_user("ada", "1") | {"run_id": run_id}, stream_mode=["values", "updates"]
    )
    before = copy_context()

    async def read_one() -> Any:
        return await anext(stream, None)

    while await asyncio.create_task(read_one(), context=before.copy()) is not None:
        pass

    assert [(run["run_id"], run["status"]) for run in await asyncio.to_thread(runs_of, machine)] == [
        (str(run_id), "interrupted")
    ]


@tool
def delete_account(account: str) -> str:
    """Delete an account."""
    return f"deleted {account}"


@colours
def test_what_is_said_in_one_conversation_is_known_in_the_next(colour: str, machine: LearningMachine) -> None:
    agent = create_agent(ScriptedChat(script=[tell_knowledge]), [], middleware=[LearningMiddleware(machine)])
    told = "I prefer concise answers and I work on billing"
    call(colour, agent, said(told), as_user("ada", "1"))
    assert machine.drain_sync()

    answer = call(colour, agent, said("What do you know about me?"), as_user("ada", "2"))["messages"][-1].text

    assert told in answer
    assert answer.count(OPENING) == 1


@colours
def test_the_knowledge_is_the_last_block_of_the_system_message_and_stays_out_of_the_state(
    colour: str, machine: LearningMachine
) -> None:
    model = ScriptedChat(script=["ok"])
    agent = create_agent(model, [], system_prompt="You are terse.", middleware=[LearningMiddleware(machine)])
    call(colour, agent, said("My cat is called Mimi"), as_user("ada", "1"))
    machine.drain_sync()

    result = call(colour, agent, said("What is my cat called?"), as_user("ada", "2"))

    system = model.calls[-1].messages[0]
    assert isinstance(system, SystemMessage)
    blocks = system.content_blocks
    assert blocks[0] == {"type": "text", "text": "You are terse."}
    assert "Mimi" in str(blocks[-1])
    assert OPENING not in str(result)
    assert set(result) == {"messages"}


@colours
def test_another_user_and_nobody_know_nothing(colour: str, machine: LearningMachine) -> None:
    agent = create_agent(ScriptedChat(script=[tell_knowledge]), [], middleware=[LearningMiddleware(machine)])
    call(colour, agent, said("My secret number is 7421"), as_user("ada", "1"))
    machine.drain_sync()

    other = call(colour, agent, said("What is the secret number?"), as_user("bob", "2"))
    nobody = call(colour, agent, said("What is the secret number?"), {"configurable": {"thread_id": "3"}})

    assert other["messages"][-1].text == nobody["messages"][-1].text == "nothing"
    assert {run["user_id"] for run in runs_of(machine)} == {"ada", "bob"}


@dataclass
class Context:
    user_id: str
    tenant_id: str | None = None


@colours
@pytest.mark.parametrize("user_id", ["a.b@example.com", "o'brien", "🙂", "a/b%2E_c", "x" * 512])
def test_any_text_is_a_user_id(colour: str, user_id: str, machine: LearningMachine) -> None:
    agent = create_agent(
        ScriptedChat(script=[tell_knowledge]),
        [],
        middleware=[LearningMiddleware(machine)],
        context_schema=Context,
    )
    call(
        colour, agent, said("I live in Haifa"), {"configurable": {"thread_id": "1"}}, context=Context(user_id)
    )
    machine.drain_sync()

    known = call(colour, agent, said("Where do I live?"), {}, context=Context(user_id))
    elsewhere = call(colour, agent, said("Where do I live?"), {}, context=Context(user_id, "other tenant"))

    assert "Haifa" in known["messages"][-1].text
    assert elsewhere["messages"][-1].text == "nothing"


@colours
def test_the_identity_survives_an_interrupt_and_a_resume_that_names_nobody(
    colour: str, machine: LearningMachine
) -> None:
    agent = create_agent(
        ScriptedChat(script=[tool_call("delete_account", account="7"), "done"]),
        [delete_account],
        middleware=[LearningMiddleware(machine), HumanInTheLoopMiddleware({"delete_account": True})],
        checkpointer=InMemorySaver(),
        context_schema=Context,
    )
    thread = {"configurable": {"thread_id": "1"}}
    paused = call(colour, agent, said("delete account 7"), thread, context=Context("ada"))

    [run] = runs_of(machine)
    assert (run["status"], run["user_id"]) == ("interrupted", "ada")

    answer = {paused["__interrupt__"][0].id: {"decisions": [{"type": "approve"}]}}
    call(colour, agent, Command(resume=answer), thread)

    [run] = runs_of(machine)
    assert (run["status"], run["user_id"], run["message_count"]) == ("completed", "ada", 4)
    recorded = run_of(machine, run["run_id"])["messages"]
    assert [message["role"] for message in recorded] == ["user", "assistant", "tool", "assistant"]


@colours
def test_an_interrupt_inside_a_tool_passes_through_and_the_run_is_interrupted(
    colour: str, machine: LearningMachine
) -> None:
    @tool
    def ask(question: str) -> str:
        """Ask a person."""
        return str(interrupt(question))

    agent = create_agent(
        ScriptedChat(script=[tool_call("ask", question="sure?"), "done"]),
        [ask],
        middleware=[LearningMiddleware(machine)],
        checkpointer=InMemorySaver(),
    )
    paused = call(colour, agent, said("go"), as_user("ada", "1"))
    assert paused["__interrupt__"][0].value == "sure?"
    assert [run["status"] for run in runs_of(machine)] == ["interrupted"]

    ended = call(
        colour,
        agent,
        Command(resume={paused["__interrupt__"][0].id: "yes"}),
        {"configurable": {"thread_id": "1"}},
    )

    assert ended["messages"][-2].text == "yes"
    assert [(run["status"], run["user_id"]) for run in runs_of(machine)] == [("completed", "ada")]


@colours
def test_a_failed_run_is_recorded_as_failed_without_secrets_and_teaches_nothing(
    colour: str, machine: LearningMachine
) -> None:
    agent = create_agent(
        ScriptedChat(script=[RuntimeError("api_key=sk-0123456789abcdef refused")]),
        [],
        middleware=[LearningMiddleware(machine)],
    )
    with pytest.raises(RuntimeError, match="refused"):
        call(colour, agent, said("I live on the moon"), as_user("ada", "1"))

    [run] = runs_of(machine)
    assert run["status"] == "failed"
    assert run["error"].startswith("RuntimeError: ")
    assert "0123456789" not in run["error"]
    assert machine.drain_sync()
    assert memories_of(machine, "ada") == []


@colours
def test_a_failure_after_a_resume_is_recorded(colour: str, machine: LearningMachine) -> None:
    agent = create_agent(
        ScriptedChat(script=[tool_call("delete_account", account="7"), ValueError("broken")]),
        [delete_account],
        middleware=[LearningMiddleware(machine), HumanInTheLoopMiddleware({"delete_account": True})],
        checkpointer=InMemorySaver(),
    )
    paused = call(colour, agent, said("delete account 7"), as_user("ada", "1"))
    answer = {paused["__interrupt__"][0].id: {"decisions": [{"type": "approve"}]}}
    with pytest.raises(ValueError, match="broken"):
        call(colour, agent, Command(resume=answer), {"configurable": {"thread_id": "1"}})

    assert [(run["status"], run["user_id"]) for run in runs_of(machine)] == [("failed", "ada")]


def test_a_cancelled_run_is_recorded_as_cancelled(machine: LearningMachine) -> None:
    from datetime import timedelta

    model = ScriptedChat(script=["late"], delay=timedelta(seconds=30))
    agent = create_agent(model, [], middleware=[LearningMiddleware(machine)])

    async def give_up() -> None:
        task = asyncio.create_task(agent.ainvoke(said("hurry"), as_user("ada", "1")))
        while not model.calls:  # noqa: ASYNC110 - the model tells nobody else
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(give_up())

    assert [run["status"] for run in runs_of(machine)] == ["cancelled"]


@colours
def test_a_run_ended_by_another_middleware_is_blocked_and_teaches_nothing(
    colour: str, machine: LearningMachine
) -> None:
    class Guard(AgentMiddleware[Any, Any]):
        @hook_config(can_jump_to=["end"])
        def before_model(self, state: Any, runtime: Any) -> dict[str, Any]:
            return {"messages": [AIMessage("I cannot help with that.")], "jump_to": "end"}

        @hook_config(can_jump_to=["end"])
        async def abefore_model(self, state: Any, runtime: Any) -> dict[str, Any]:
            return self.before_model(state, runtime)

    agent = create_agent(
        ScriptedChat(script=["never"]), [], middleware=[LearningMiddleware(machine), Guard()]
    )
    call(colour, agent, said("I live on Mars"), as_user("ada", "1"))

    assert [run["status"] for run in runs_of(machine)] == ["blocked"]
    machine.drain_sync()
    assert memories_of(machine, "ada") == []


def test_limits_and_pii_guards_of_langchain_count_as_blocked(machine: LearningMachine) -> None:
    limited = create_agent(
        ScriptedChat(script=[tool_call("delete_account", account="1")]),
        [delete_account],
        middleware=[LearningMiddleware(machine), ModelCallLimitMiddleware(run_limit=1)],
    )
    limited.invoke(said("go"), as_user("ada", "1"))
    guarded = create_agent(
        ScriptedChat(script=["never"]),
        [],
        middleware=[LearningMiddleware(machine), PIIMiddleware("email", strategy="block")],
    )
    with pytest.raises(Exception, match=r"(?i)email"):
        guarded.invoke(said("I am ada@example.com"), as_user("ada", "2"))

    assert [run["status"] for run in runs_of(machine)] == ["blocked", "blocked"]


@colours
def test_messages_that_a_summary_removed_are_still_recorded(colour: str, machine: LearningMachine) -> None:
    summariser = SummarizationMiddleware(
        ScriptedChat(script=["They talked."]), trigger=("messages", 3), keep=("messages", 1)
    )
    agent = create_agent(
        ScriptedChat(
            script=[
                tool_call("delete_account", account="1"),
                tool_call("delete_account", account="2"),
                "done",
            ]
        ),
        [delete_account],
        middleware=[LearningMiddleware(machine), summariser],
    )
    call(colour, agent, said("delete accounts 1 and 2"), as_user("ada", "1"))

    [run] = runs_of(machine)
    messages = run_of(machine, run["run_id"])["messages"]
    assert run["status"] == "completed"
    assert [m["content"] for m in messages if m["role"] == "tool"] == ["deleted 1", "deleted 2"]
    assert any(m["content"] == "delete accounts 1 and 2" for m in messages)


@colours
def test_only_the_messages_of_a_run_are_recorded_with_it(colour: str, machine: LearningMachine) -> None:
    agent = create_agent(
        ScriptedChat(script=["one", "two"]),
        [],
        middleware=[LearningMiddleware(machine)],
        checkpointer=InMemorySaver(),
    )
    call(colour, agent, said("first"), as_user("ada", "1"))
    call(colour, agent, said("second"), as_user("ada", "1"))

    contents = [
        [message["content"] for message in run_of(machine, run["run_id"])["messages"]]
        for run in runs_of(machine)
    ]
    assert sorted(contents) == [["first", "one"], ["second", "two"]]


@colours
def test_tools_answer_from_the_receipt(colour: str, learning_database: ThrowawayDatabase) -> None:
    machine = machine_on(
        learning_database,
        user_profile=UserProfileConfig(mode=LearningMode.AGENTIC),
        user_memory=UserMemoryConfig(mode=LearningMode.AGENTIC),
    )
    agent = create_agent(
        ScriptedChat(
            script=[
                tool_call("update_user_profile", name="Ada", preferences="concise"),
                tool_call("save_user_memory", content="Works on billing"),
                tool_call("save_user_memory", content="works on  BILLING."),
                tool_call("update_user_profile", clear_fields=["name"]),
                "done",
            ]
        ),
        [],
        middleware=[LearningMiddleware(machine)],
    )
    result = call(colour, agent, said("hello"), as_user("ada", "1"))

    answers = [message for message in result["messages"] if message.type == "tool"]
    assert answers[0].text == "Saved: name = Ada; Saved: preferences = concise"
    assert answers[1].text.startswith("Saved (memory ")
    assert answers[2].text.startswith("Already known (memory ")
    assert answers[3].text == "Forgot: name"
    assert {message.status for message in answers} == {"success"}
    learned = asyncio.run(machine.get_learnings(identity=Identity(user_id="ada")))
    assert {memory["content"] for memory in learned} == {"concise", "Works on billing"}
    assert {memory["trust"] for memory in learned} == {"model"}
    [run] = runs_of(machine)
    assert {memory["run_id"] for memory in learned} == {run["run_id"]}
    asyncio.run(machine.aclose())


@colours
def test_a_tool_that_saved_nothing_says_so(colour: str, learning_database: ThrowawayDatabase) -> None:
    away = learning_database.settings.model_copy(update={"database_url": _closed_port()})
    machine = LearningMachine(settings=away, user_memory=UserMemoryConfig(mode=LearningMode.AGENTIC))
    agent = create_agent(
        ScriptedChat(script=[tool_call("save_user_memory", content="Works on billing"), "sorry"]),
        [],
        middleware=[LearningMiddleware(machine)],
    )
    result = call(colour, agent, said("remember billing"), as_user("ada", "1"))

    answer = result["messages"][-2]
    assert (answer.text, answer.status) == (
        "Nothing was saved: the memory cannot be reached right now.",
        "error",
    )
    assert result["messages"][-1].text == "sorry"


def _closed_port() -> Any:
    import socket

    from pydantic import SecretStr

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return SecretStr(f"postgresql://nobody:hidden@127.0.0.1:{port}/none")


@colours
def test_the_agent_answers_while_the_database_is_away_and_the_run_is_kept(
    colour: str, learning_database: ThrowawayDatabase
) -> None:
    settings = learning_database.settings
    machine = LearningMachine(settings=settings.model_copy(update={"database_url": _closed_port()}))
    agent = create_agent(ScriptedChat(script=["hello"]), [], middleware=[LearningMiddleware(machine)])
    events: list[Event] = []
    with listening(events.append):
        result = call(colour, agent, said("I live in Haifa"), as_user("ada", "1"))
        all_recorded(machine)

    assert result["messages"][-1].text == "hello"
    assert [event.name for event in events] == ["recall_failed", "run_spooled"]
    assert "hidden" not in str(events)

    back = machine_on(learning_database)
    assert back.drain_sync()
    assert back.drain_sync()
    assert memories_of(back, "ada") == ["I live in Haifa"]
    assert [run["status"] for run in runs_of(back)] == ["completed"]
    asyncio.run(back.aclose())


@colours
def test_an_agent_inside_a_tool_shares_knowledge_and_run_of_the_agent_around_it(
    colour: str, machine: LearningMachine
) -> None:
    seen: list[str] = []
    inner = create_agent(ScriptedChat(script=[tell_knowledge]), [], middleware=[LearningMiddleware(machine)])

    @tool
    async def ask_specialist(question: str) -> str:
        """Ask a specialist."""
        seen.append(current_knowledge())
        answer = await inner.ainvoke({"messages": [HumanMessage(question)]})
        return str(answer["messages"][-1].text)

    @tool("ask_specialist")
    def ask_specialist_sync(question: str) -> str:
        """Ask a specialist."""
        seen.append(current_knowledge())
        return str(inner.invoke({"messages": [HumanMessage(question)]})["messages"][-1].text)

    outer = create_agent(
        ScriptedChat(script=["noted", tool_call("ask_specialist", question="who?"), "done"]),
        [ask_specialist if colour == "async" else ask_specialist_sync],
        middleware=[LearningMiddleware(machine)],
    )
    call(colour, outer, said("My dog is called Rex"), as_user("ada", "1"))
    machine.drain_sync()
    result = call(colour, outer, said("Ask about my dog"), as_user("ada", "2"))

    assert "Rex" in result["messages"][-2].text
    assert "Rex" in seen[0]
    assert current_knowledge() == ""
    assert len(runs_of(machine)) == 2  # the inner agent's work belongs to the outer run


@colours
def test_two_storage_calls_a_run(
    colour: str, machine: LearningMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[str] = []
    original = machine.database.call

    async def counting(function: str, *arguments: Any, **named: Any) -> Any:
        called.append(function)
        return await original(function, *arguments, **named)

    monkeypatch.setattr(machine.database, "call", counting)
    agent = create_agent(
        ScriptedChat(script=[tool_call("delete_account", account="1"), "done"]),
        [delete_account],
        middleware=[LearningMiddleware(machine)],
    )
    call(colour, agent, said("go"), as_user("ada", "1"))
    all_recorded(machine)

    # What the worker beside it calls is not the run's.
    assert [name for name in called if name in ("recall_context", "record_run", "upsert_learnings")] == [
        "recall_context",
        "record_run",
    ]


def test_many_concurrent_runs_of_many_users_keep_apart(machine: LearningMachine) -> None:
    agent = create_agent(ScriptedChat(script=[tell_knowledge]), [], middleware=[LearningMiddleware(machine)])

    async def talk(number: int, turn: str) -> str:
        text = f"My favourite number is {number}" if turn == "tell" else "What is my favourite number?"
        result = await agent.ainvoke(said(text), as_user(f"user {number}", f"{turn} {number}"))
        return str(result["messages"][-1].text)

    async def crowd(turn: str) -> list[str]:
        return list(await asyncio.gather(*(talk(number, turn) for number in range(40))))

    asyncio.run(crowd("tell"))
    assert machine.drain_sync()
    for number, answer in enumerate(asyncio.run(crowd("ask"))):
        assert f"number is {number} |" in answer
        assert answer.count("favourite number is") == 1


@pytest.mark.parametrize("form", ["tuple", "text", "dict", "message", "message with id"])
@colours
def test_inside_a_deep_agent(colour: str, form: str, machine: LearningMachine) -> None:
    from deepagents import create_deep_agent

    def input_of(text: str) -> Any:
        return {
            "messages": {
                "tuple": [("user", text)],
                "text": text,
                "dict": [{"role": "user", "content": text}],
                "message": [HumanMessage(text)],
                "message with id": [HumanMessage(text, id=text)],
            }[form]
        }

    agent = create_deep_agent(
        ScriptedChat(script=[tell_knowledge]),
        middleware=[LearningMiddleware(machine)],
        checkpointer=InMemorySaver(),
    )
    for text in ("I keep bees", "I sail a yawl"):
        call(colour, agent, input_of(text), as_user("ada", "1"))
    assert [run["status"] for run in runs_of(machine)] == ["completed", "completed"]
    assert [run["message_count"] for run in runs_of(machine)] == [2, 2]
    machine.drain_sync()

    answer = call(colour, agent, input_of("What do I keep?"), as_user("ada", "2"))["messages"][-1].text

    assert "I keep bees" in answer
    assert "I sail a yawl" in answer


def test_the_middleware_of_a_machine_is_all_that_an_agent_needs(machine: LearningMachine) -> None:
    forms: list[Any] = [machine.middleware(), [machine.middleware()]]
    for middleware in forms:
        agent = create_agent(ScriptedChat(script=["ok"]), [], middleware=middleware)
        agent.invoke(said("hello"), as_user("ada", "1"))
    assert len(runs_of(machine)) == 2


@colours
def test_a_summary_that_a_model_wrote_is_not_the_users_word(colour: str, machine: LearningMachine) -> None:
    summariser = SummarizationMiddleware(
        ScriptedChat(script=["All invoices go to account 666."]),
        trigger=("messages", 3),
        keep=("messages", 1),
    )
    agent = create_agent(
        ScriptedChat(
            script=[
                tool_call("delete_account", account="1"),
                tool_call("delete_account", account="2"),
                "done",
            ]
        ),
        [delete_account],
        middleware=[LearningMiddleware(machine), summariser],
        checkpointer=InMemorySaver(),
    )
    for turn in ("delete accounts 1 and 2", "thank you kindly"):
        call(colour, agent, said(turn), as_user("ada", "1"))
    assert machine.drain_sync()
    assert sorted(memories_of(machine, "ada")) == ["delete accounts 1 and 2", "thank you kindly"]


@colours
def test_what_was_answered_before_an_agent_began_does_not_make_its_run_blocked(
    colour: str, machine: LearningMachine
) -> None:
    agent = create_agent(ScriptedChat(script=["ok"]), [], middleware=[LearningMiddleware(machine)])
    prefilled = {"messages": [HumanMessage("I keep bees"), AIMessage("Let me think.")]}
    call(colour, agent, prefilled, as_user("ada", "1"))

    assert [run["status"] for run in runs_of(machine)] == ["completed"]


@colours
def test_an_agent_called_for_another_user_inside_a_tool_knows_that_user_alone(
    colour: str, machine: LearningMachine
) -> None:
    inner = create_agent(ScriptedChat(script=[tell_knowledge]), [], middleware=[LearningMiddleware(machine)])
    plain = create_agent(ScriptedChat(script=["ok"]), [], middleware=[LearningMiddleware(machine)])
    call(colour, plain, said("My dog is called Rex"), as_user("ada", "1"))
    call(colour, plain, said("My cat is called Mimi"), as_user("bob", "2"))
    machine.drain_sync()

    @tool
    def ask_for_bob(question: str) -> str:
        """Ask as Bob."""
        answer = inner.invoke(said(question), as_user("bob", "3"))["messages"][-1].text
        all_recorded(machine)  # before the run around it
        return str(answer)

    outer = create_agent(
        ScriptedChat(script=[tool_call("ask_for_bob", question="Which pet?"), "done"]),
        [ask_for_bob],
        middleware=[LearningMiddleware(machine)],
    )
    answer = call(colour, outer, said("Ask for Bob"), as_user("ada", "4"))["messages"][-2].text

    assert "Mimi" in answer
    assert "Rex" not in answer
    assert [(run["user_id"], run["session_id"]) for run in runs_of(machine)][:2] == [
        ("ada", "4"),
        ("bob", "3"),
    ]


@pytest.mark.parametrize(
    "options",
    [
        {"user_memory": "yes"},
        {"user_profile": UserMemoryConfig()},
        {"model": 7},
    ],
)
def test_wrong_arguments_are_refused_on_construction(
    options: dict[str, Any], learning_database: ThrowawayDatabase
) -> None:
    with pytest.raises(ConfigurationError, match=f"{next(iter(options))}="):
        LearningMiddleware(settings=learning_database.settings, **options)


def test_machine_and_keywords_at_once_are_refused(machine: LearningMachine) -> None:
    with pytest.raises(TypeError, match="not both: user_memory"):
        LearningMiddleware(machine, user_memory=False)
    with pytest.raises(TypeError, match="unknown_option"):
        LearningMiddleware(unknown_option=1)


@colours
@pytest.mark.parametrize(
    "content",
    [
        "",
        "NUL \x00 and a lone surrogate \ud800",
        [
            {"type": "text", "text": "look"},
            {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
        ],
        "x" * 1_000_000,
    ],
    ids=["empty", "nul", "image", "1 MB"],
)
def test_odd_messages_are_recorded_and_hurt_nobody(
    colour: str, content: Any, machine: LearningMachine
) -> None:
    agent = create_agent(ScriptedChat(script=["ok"]), [], middleware=[LearningMiddleware(machine)])
    result = call(colour, agent, {"messages": [HumanMessage(content)]}, as_user("ada", "1"))

    assert result["messages"][-1].text == "ok"
    [run] = runs_of(machine)
    assert run["status"] == "completed"
    assert machine.drain_sync()
    assert "AAAA" not in str(run_of(machine, run["run_id"]))


def test_the_exposures_of_a_run_are_what_was_rendered(machine: LearningMachine) -> None:
    agent = create_agent(ScriptedChat(script=["ok"]), [], middleware=[LearningMiddleware(machine)])
    agent.invoke(said("I keep bees"), as_user("ada", "1"))
    machine.drain_sync()
    agent.invoke(said("Bees?"), as_user("ada", "2"))

    newest = runs_of(machine)[0]
    assert [shown["content"] for shown in run_of(machine, newest["run_id"])["exposures"]] == [
        "I keep bees",
        "ok",  # what the agent answered then
    ]


@colours
def test_who_writes_the_state_of_a_thread_does_not_become_somebody_else(
    colour: str, machine: LearningMachine
) -> None:
    agent = create_agent(
        ScriptedChat(script=[tool_call("delete_account", account="7"), "done"]),
        [delete_account],
        middleware=[LearningMiddleware(machine), HumanInTheLoopMiddleware({"delete_account": True})],
        checkpointer=InMemorySaver(),
    )
    thread = as_user("mallory", "1")
    paused = call(colour, agent, said("delete account 7") | {"learning_run": {"run_id": "x"}}, thread)
    kept = agent.get_state(thread).values["learning_run"]
    assert kept["identity"]["user_id"] == "mallory"
    forged = kept | {"identity": kept["identity"] | {"user_id": "ada"}}
    agent.update_state(thread, {"learning_run": forged})

    pending = agent.get_state(thread).interrupts
    answer = {(pending or paused["__interrupt__"])[0].id: {"decisions": [{"type": "approve"}]}}
    call(colour, agent, Command(resume=answer), thread)

    assert {run["user_id"] for run in runs_of(machine)} == {"mallory"}
    assert machine.drain_sync()
    assert memories_of(machine, "ada") == []


class Asking(AgentMiddleware[Any, Any, Any]):
    """Asks a person before the first model call."""

    def before_model(self, state: Any, runtime: Any) -> None:
        if len(state["messages"]) == 1:
            interrupt("May I?")

    async def abefore_model(self, state: Any, runtime: Any) -> None:
        self.before_model(state, runtime)


@colours
@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_run_that_pauses_before_its_first_model_call_knows_its_user_when_it_goes_on(
    colour: str, elsewhere: bool, machine: LearningMachine, learning_database: ThrowawayDatabase
) -> None:
    create_agent(ScriptedChat(script=["ok"]), [], middleware=[LearningMiddleware(machine)]).invoke(
        said("I keep bees"), as_user("ada", "1")
    )
    assert machine.drain_sync()
    saver = InMemorySaver()
    other = machine_on(learning_database) if elsewhere else machine

    def agent(learns: LearningMachine) -> Any:
        return create_agent(
            ScriptedChat(script=[tell_knowledge]),
            [],
            middleware=[Asking(), LearningMiddleware(learns)],
            checkpointer=saver,
        )

    paused = call(colour, agent(machine), said("Bees?"), as_user("ada", "2"))
    answer: Any = Command(resume={paused["__interrupt__"][0].id: "yes"})
    result = call(colour, agent(other), answer, {"configurable": {"thread_id": "2"}})

    assert "I keep bees" in result["messages"][-1].text
    newest = runs_of(other)[0]
    assert (newest["user_id"], newest["status"]) == ("ada", "completed")
    assert [shown["content"] for shown in run_of(other, newest["run_id"])["exposures"]] == [
        "I keep bees",
        "ok",  # what the agent answered then
    ]
    asyncio.run(other.aclose())


class Meeting(AgentMiddleware[Any, Any, Any]):
    """Holds runs before their first model call until so many of them are there."""

    def __init__(self, runs: int) -> None:
        super().__init__()
        self.everybody = asyncio.Barrier(runs)

    async def abefore_model(self, state: Any, runtime: Any) -> None:
        async with asyncio.timeout(30):
            await self.everybody.wait()


async def test_two_users_at_once_under_one_run_id_know_and_teach_what_is_theirs(
    machine: LearningMachine,
) -> None:
    first = create_agent(ScriptedChat(script=["ok"] * 3), [], middleware=[LearningMiddleware(machine)])
    for user in ("ada", "bob", "zoe"):
        await first.ainvoke(said(f"I am {user} and keep bees"), as_user(user, f"{user} 1"))
    assert await machine.drain()
    agent = create_agent(
        ScriptedChat(script=[tell_knowledge] * 3), [], middleware=[Meeting(3), LearningMiddleware(machine)]
    )
    run_id = uuid4()

    async def ask(user: str) -> str:
        asked = as_user(user, f"{user} 2") | {"run_id": run_id}
        return str((await agent.ainvoke(said(f"Bees of {user}?"), asked))["messages"][-1].text)

    users = ("ada", "bob", "zoe")
    answers = await asyncio.gather(*(ask(user) for user in users))

    for user, answer in zip(users, answers, strict=True):
        assert f"I am {user}" in answer
        assert not [other for other in users if other != user and other in answer]
    await machine.recorded_all()
    recorded = await asyncio.to_thread(run_of, machine, str(run_id))
    asked = {message["content"] for message in recorded["messages"] if message["role"] == "user"}
    assert len(asked) == 1


@colours
def test_what_was_recalled_for_the_first_model_call_serves_all_others_of_the_run(
    colour: str, machine: LearningMachine
) -> None:
    create_agent(ScriptedChat(script=["ok"]), [], middleware=[LearningMiddleware(machine)]).invoke(
        said("I keep bees"), as_user("ada", "1")
    )
    assert machine.drain_sync()

    @tool
    def look_up() -> str:
        """Look something up."""
        return current_knowledge()

    def fail(messages: Any) -> str:
        raise ConnectionError("the model is away")

    saver = InMemorySaver()
    agent = create_agent(
        ScriptedChat(script=[fail, tool_call("look_up"), tell_knowledge]),
        [look_up],
        middleware=[ModelRetryMiddleware(initial_delay=0), LearningMiddleware(machine)],
        checkpointer=saver,
    )
    result = call(colour, agent, said("Bees?"), as_user("ada", "2"))

    assert all("I keep bees" in message.text for message in result["messages"][-2:])
    assert "I keep bees" in agent.get_state(as_user("ada", "2")).values["learning_run"]["knowledge"]
    assert [run["status"] for run in runs_of(machine)] == ["completed", "completed"]
