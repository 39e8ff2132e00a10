"""`ScriptedChat`: what users' tests rest on."""

from __future__ import annotations

import asyncio
import copy
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage, SystemMessage
from langchain_core.runnables import Runnable
from langchain_core.tools import tool
from langgraph.checkpoint.memory import InMemorySaver
from pydantic import BaseModel, ValidationError

from agent.errors import ConfigurationError
from agent.testing import ScriptedChat, tool_call


class Person(BaseModel):
    """A person."""

    name: str
    age: int = 0


@tool
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


async def _invoke(model: Runnable[Any, Any], prompt: Any) -> Any:
    return model.invoke(prompt)


async def _ainvoke(model: Runnable[Any, Any], prompt: Any) -> Any:
    return await model.ainvoke(prompt)


async def _stream(model: Runnable[Any, Any], prompt: Any) -> Any:
    return _joined(list(model.stream(prompt)))


async def _astream(model: Runnable[Any, Any], prompt: Any) -> Any:
    return _joined([chunk async for chunk in model.astream(prompt)])


def _joined(chunks: list[AIMessageChunk]) -> AIMessageChunk:
    message = chunks[0]
    for chunk in chunks[1:]:
        message = message + chunk
    return message


type_of_form = Callable[[Runnable[Any, Any], Any], Awaitable[Any]]
every_form = pytest.mark.parametrize("ask", [_invoke, _ainvoke, _stream, _astream])


@every_form
async def test_items_are_given_in_order_and_the_last_one_repeats(ask: type_of_form) -> None:
    model = ScriptedChat(
        script=["one two", AIMessage("three"), lambda messages: f"you said {messages[-1].text}"]
    )

    answers = [(await ask(model, said)).content for said in ("a", "b", "c", "d")]

    assert answers == ["one two", "three", "you said c", "you said d"]


@every_form
async def test_a_strict_script_that_has_run_out_says_how_many_items_it_has(ask: type_of_form) -> None:
    model = ScriptedChat(script=["only"], strict=True)
    await ask(model, "a")

    with pytest.raises(ConfigurationError, match=r"called 2 times and its script has 1 item"):
        await ask(model, "b")


@every_form
@pytest.mark.parametrize("item", [TimeoutError("too slow"), TimeoutError, lambda _: TimeoutError("too slow")])
async def test_an_exception_in_the_script_is_raised_and_the_next_call_goes_on(
    ask: type_of_form, item: Any
) -> None:
    model = ScriptedChat(script=[item, "recovered"])

    with pytest.raises(TimeoutError):
        await ask(model, "a")

    assert (await ask(model, "a")).content == "recovered"


@every_form
async def test_tool_calls_arrive_with_arguments_and_usage(ask: type_of_form) -> None:
    model = ScriptedChat(script=[AIMessage("Let me see.", tool_calls=tool_call("add", a=1, b=2).tool_calls)])

    message = await ask(model.bind_tools([add]), "1+2?")

    assert message.content == "Let me see."
    assert [(call["name"], call["args"]) for call in message.tool_calls] == [("add", {"a": 1, "b": 2})]
    usage = message.usage_metadata
    assert usage["output_tokens"] > 0
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]


@every_form
async def test_each_call_records_prompt_tools_and_tool_choice(ask: type_of_form) -> None:
    model = ScriptedChat(script=["ok"])
    prompt = [SystemMessage("Be kind."), HumanMessage("Hi")]

    await ask(model, prompt)
    await ask(model.bind_tools([add, Person], tool_choice="any"), prompt)

    bare, bound = model.calls
    assert (bare.tools, bare.tool_choice) == ((), None)
    assert bound.system_text == "Be kind."
    assert [message.text for message in bound.messages] == ["Be kind.", "Hi"]
    assert (bound.tools, bound.tool_choice) == (("add", "Person"), "any")
    assert bound.tool_schemas[0]["function"]["parameters"]["required"] == ["a", "b"]


@every_form
async def test_a_repeated_message_has_fresh_ids_each_time(ask: type_of_form) -> None:
    fixed = AIMessage("", id="fixed", tool_calls=[{"name": "add", "args": {}, "id": "kept"}])
    model = ScriptedChat(script=[tool_call("add", a=1, b=2), tool_call("add", a=1, b=2), fixed, fixed])

    messages = [await ask(model, "again") for _ in range(4)]

    assert len({message.id for message in messages} - {"fixed"}) == 4
    assert len({message.tool_calls[0]["id"] for message in messages[:2]}) == 2
    assert messages[2].tool_calls[0]["id"] == "kept"


async def test_a_script_item_is_not_changed_by_being_given_out() -> None:
    item = tool_call("add", a=1, b=2)

    await ScriptedChat(script=[item]).ainvoke("go")

    assert item.tool_calls[0]["id"] is None
    assert item.usage_metadata is None


def test_only_the_last_chunk_of_a_stream_has_tool_calls_and_usage() -> None:
    model = ScriptedChat(script=[AIMessage("a few words", tool_calls=tool_call("add", a=1, b=2).tool_calls)])

    chunks = list(model.stream("go"))

    assert [chunk.content for chunk in chunks] == ["a ", "few ", "words"]
    assert [bool(chunk.tool_call_chunks) for chunk in chunks] == [False, False, True]
    assert [bool(chunk.usage_metadata) for chunk in chunks] == [False, False, True]
    assert chunks[-1].chunk_position == "last"


@pytest.mark.parametrize("text", ["", "  ", "line one\n\n  indented\ttab ", "émoji 🦉 ok"])
def test_a_stream_keeps_every_character(text: str) -> None:
    assert _joined(list(ScriptedChat(script=[text]).stream("go"))).content == text


def test_broken_tool_arguments_and_blocks_survive_a_stream() -> None:
    broken = AIMessage("", invalid_tool_calls=[{"name": "add", "args": '["a', "id": "x", "error": None}])
    blocks = AIMessage([{"type": "text", "text": "seen"}, {"type": "image", "url": "http://localhost/i.png"}])
    model = ScriptedChat(script=[broken, blocks])

    assert _joined(list(model.stream("go"))).invalid_tool_calls[0]["args"] == '["a'
    assert _joined(list(model.stream("go"))).content == blocks.content


async def test_structured_output_gives_the_object_in_both_forms() -> None:
    model = ScriptedChat(script=[Person(name="Ada", age=36)]).with_structured_output(Person)

    assert model.invoke("who?") == Person(name="Ada", age=36)
    assert await model.ainvoke("who?") == Person(name="Ada", age=36)


async def test_structured_output_with_raw_tells_nonsense_from_an_answer() -> None:
    script = [Person(name="Ada"), "no idea", tool_call("Person", age="many")]
    model = ScriptedChat(script=script).with_structured_output(Person, include_raw=True)

    good, text, wrong = [await model.ainvoke("who?") for _ in script]

    assert isinstance(good, dict)
    assert isinstance(text, dict)
    assert isinstance(wrong, dict)
    assert (good["parsed"], good["parsing_error"]) == (Person(name="Ada"), None)
    assert (text["parsed"], text["parsing_error"]) == (None, None)
    assert wrong["parsed"] is None
    assert isinstance(wrong["parsing_error"], ValidationError)


def test_an_object_is_json_text_where_no_tool_is_bound() -> None:
    assert ScriptedChat(script=[Person(name="Ada")]).invoke("who?").content == '{"name":"Ada","age":0}'


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"script": []}, r"script=\[\]"),
        ({"script": ["ok", 3]}, r"script\[1\]=3"),
        ({"script": [HumanMessage("I am no answer")]}, r"script\[0\]=HumanMessage"),
        ({"script": ["ok"], "delay": timedelta(seconds=-1)}, "is negative"),
    ],
)
def test_what_cannot_be_played_is_refused_on_construction(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(ValidationError, match=named):
        ScriptedChat(**arguments)


def test_a_function_that_gives_no_answer_is_named() -> None:
    with pytest.raises(ValueError, match="what a function of the script gave=7"):
        ScriptedChat(script=[lambda _: 7]).invoke("go")


async def test_the_delay_is_slept_by_the_task_in_async_forms_and_by_the_thread_in_sync_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slept: list[tuple[str, float]] = []

    async def sleep_of_task(seconds: float) -> None:
        slept.append(("task", seconds))

    model = ScriptedChat(script=["ok"], delay=timedelta(seconds=30))
    with monkeypatch.context() as patched:
        patched.setattr(time, "sleep", lambda seconds: slept.append(("thread", seconds)))
        patched.setattr(asyncio, "sleep", sleep_of_task)
        for ask in (_invoke, _ainvoke, _stream, _astream):
            await ask(model, "go")

    assert slept == [("thread", 30), ("task", 30), ("thread", 30), ("task", 30)]


async def test_a_call_that_times_out_is_on_record() -> None:
    model = ScriptedChat(script=["too late"], delay=timedelta(hours=1))

    with pytest.raises(TimeoutError):
        await asyncio.wait_for(model.ainvoke("go"), timeout=0.01)

    assert [call.messages[-1].text for call in model.calls] == ["go"]


def test_two_hundred_threads_get_each_item_once() -> None:
    model = ScriptedChat(script=[str(number) for number in range(200)], strict=True)

    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(lambda number: model.invoke(f"q{number}").content, range(200)))

    assert sorted(map(int, map(str, answers))) == list(range(200))
    assert len({call.messages[-1].text for call in model.calls}) == 200


def test_a_function_may_give_the_text_of_a_message() -> None:
    """`.text` of a message is text that can be called."""
    model = ScriptedChat(script=[lambda messages: messages[-1].text])
    assert model.invoke("echo").text == "echo"


def test_copies_share_the_script_position_and_the_record() -> None:
    model = ScriptedChat(script=["one", "two"])

    copy.deepcopy(model).invoke("a")
    second = model.bind_tools([add]).invoke("b")

    assert second.content == "two"
    assert len(model.calls) == 2


async def test_an_agent_with_tools_keeps_all_turns_of_a_thread() -> None:
    model = ScriptedChat(script=[tool_call("add", a=1, b=2), "It is 3.", "It is 3."])
    agent = create_agent(model, [add], checkpointer=InMemorySaver())
    thread: Any = {"configurable": {"thread_id": "t"}}

    agent.invoke({"messages": [HumanMessage("1+2?")]}, thread)
    state = await agent.ainvoke({"messages": [HumanMessage("Again?")]}, thread)

    assert [message.type for message in state["messages"]] == ["human", "ai", "tool", "ai", "human", "ai"]
    assert state["messages"][2].content == "3"


async def test_an_agent_gives_structured_answers_and_streams_tokens() -> None:
    model = ScriptedChat(script=[Person(name="Ada"), "it is Ada"])

    state = await create_agent(model, [], response_format=Person).ainvoke(
        {"messages": [HumanMessage("Who?")]}
    )
    stream: Any = create_agent(model, []).astream(
        {"messages": [HumanMessage("Who?")]}, stream_mode="messages"
    )
    tokens = [token.content async for token, _ in stream]

    assert state["structured_response"] == Person(name="Ada")
    assert tokens == ["it ", "is ", "Ada"]
