"""A run as it is recorded: which messages are its own, what becomes of odd ones, and what is left out."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import datetime
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    BaseMessage,
    ChatMessage,
    FunctionMessage,
    HumanMessage,
    HumanMessageChunk,
    SystemMessage,
    ToolMessage,
    ToolMessageChunk,
)

from agent.database.protocol import clean, to_json
from agent.events import Event, listening
from agent.identity import Identity
from agent.learning.rendering import CLOSING, OPENING
from agent.learning.run_record import (
    KNOWLEDGE_MESSAGE_ID,
    OpenRun,
    describe_error,
    input_of,
    key_of,
    message_as_json,
    messages_of_run,
    run_as_json,
    text_of,
    tool_errors_of,
)
from agent.learning.run_seal import RunSeal

ADA = Identity(user_id="ada", session_id="t1", agent_id="shop")
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 5000}}


def open_run(**more: Any) -> OpenRun:
    facts: dict[str, Any] = {
        "identity": ADA,
        "run_id": "r1",
        "started_at": "2026-11-20T12:00:00+00:00",
        "first_message_id": None,
        "knowledge": "",
        **more,
    }
    return OpenRun(**facts)


def recorded(*messages: BaseMessage) -> list[dict[str, Any]]:
    kept: list[dict[str, Any]] = run_as_json(
        open_run(said=[key_of(m) for m in messages]), "completed", messages
    )["messages"]
    return kept


# --- content ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("plain", "plain"),
        ("", ""),
        (None, ""),
        ([], ""),
        (["one", "two"], "one\ntwo"),
        ([{"type": "text", "text": "one"}, "two"], "one\ntwo"),
        ([{"type": "text", "text": "What is this?"}, IMAGE], "What is this?\n[image]"),
        ([{"type": "input_audio", "input_audio": {"data": "A" * 100}}], "[input_audio]"),
        ([{"type": "file", "file": {"filename": "x.pdf"}}], "[file]"),
        ([{"type": "text"}], "[text]"),
        ([{"no": "type"}], "[part]"),
        ([{"type": "text", "text": None}], "[text]"),
        ([{"type": 5}], "[5]"),
        ([{"type": "reasoning", "reasoning": "hidden"}, {"type": "text", "text": "shown"}], "shown"),
        ([{"type": "tool_use", "id": "c", "name": "f", "input": {}}], ""),
        ([42, None], ""),
    ],
)
def test_a_content_of_any_form_gives_its_text(content: Any, text: str) -> None:
    assert text_of(content) == text


def test_an_image_is_named_and_not_copied() -> None:
    (message,) = recorded(HumanMessage([{"type": "text", "text": "Look"}, IMAGE], id="m1"))
    assert message == {"message_id": "m1", "role": "user", "content": "Look\n[image]"}


def test_a_long_message_is_cut() -> None:
    (message,) = recorded(HumanMessage("x" * 3_000_000, id="m1"))
    assert len(message["content"]) == 2_000_000


@pytest.mark.parametrize(
    ("message", "role"),
    [
        (HumanMessage("x"), "user"),
        (AIMessage("x"), "assistant"),
        (AIMessageChunk(content="x"), "assistant"),
        (HumanMessageChunk(content="x"), "user"),
        (ToolMessageChunk(content="x", tool_call_id="c"), "tool"),
        (ToolMessage("x", tool_call_id="c"), "tool"),
        (FunctionMessage(content="x", name="f"), "tool"),
        (ChatMessage(content="x", role="user"), "user"),
        (ChatMessage(content="x", role="human"), "user"),
        (ChatMessage(content="x", role="critic"), "critic"),
    ],
)
def test_every_kind_of_message_has_a_role(message: BaseMessage, role: str) -> None:
    assert recorded(message)[0]["role"] == role


def test_instructions_are_not_recorded() -> None:
    messages = [SystemMessage("You are a shop.", id="s"), HumanMessage("Hi", id="m1")]
    assert [message["message_id"] for message in recorded(*messages)] == ["m1"]


def test_knowledge_is_not_recorded_whatever_it_came_as() -> None:
    known = HumanMessage("You know: secret", id=KNOWLEDGE_MESSAGE_ID)
    assert recorded(known, HumanMessage("Hi", id="m1"))[0]["message_id"] == "m1"
    assert len(recorded(known)) == 0


@pytest.mark.parametrize("kind", [HumanMessage, AIMessage])
def test_a_recalled_block_is_not_recorded(kind: Any) -> None:
    (message,) = recorded(kind(f"Before {OPENING}\n- secret\n{CLOSING} after", id="m1"))
    assert message["content"] == "Before  after"


def test_a_message_that_came_twice_is_recorded_once_as_it_was_last() -> None:
    messages = [HumanMessage("Hi", id="m1"), AIMessage("partial", id="a1"), AIMessage("whole", id="a1")]
    assert [message["content"] for message in recorded(*messages)] == ["Hi", "whole"]


def test_messages_without_ids_are_all_recorded() -> None:
    messages = recorded(HumanMessage("same"), HumanMessage("same"))
    assert [message["content"] for message in messages] == ["same", "same"]
    assert len({message["message_id"] for message in messages}) == 2


def test_tool_calls_and_results_are_recorded_with_what_ties_them() -> None:
    call, answer = recorded(
        AIMessage("", id="a1", tool_calls=[{"id": "c1", "name": "refund", "args": {"order": "A1"}}]),
        ToolMessage("Refused", id="t1", tool_call_id="c1", name="refund", status="error"),
    )
    assert call["tool_calls"] == [{"id": "c1", "name": "refund", "args": {"order": "A1"}}]
    assert answer | {"message_id": "t1"} == {
        "message_id": "t1", "role": "tool", "content": "Refused", "tool_call_id": "c1", "name": "refund",
        "is_error": True,
    }  # fmt: skip


def test_errors_of_tools_are_listed() -> None:
    run = run_as_json(
        open_run(),
        "completed",
        [
            ToolMessage("fine", tool_call_id="c1", name="find"),
            ToolMessage("E" * 5000, tool_call_id="c2", name="refund", status="error"),
            ToolMessage("", tool_call_id="c3", status="error"),
        ],
    )
    assert run["tool_errors"] == [
        {"tool": "refund", "tool_call_id": "c2", "message": "E" * 2000},
        {"tool": "", "tool_call_id": "c3", "message": ""},
    ]
    assert tool_errors_of([{"role": "user", "content": "x", "is_error": True}]) == []


ODD_ARGUMENTS: list[Any] = [
    {"x": float("nan")},
    {"x": float("inf"), "y": [float("-inf")]},
    {"x": datetime(2026, 1, 2)},  # noqa: DTZ001 - whatever a caller puts there
    {"x": {1, 2}},
    {"x": b"\xff"},
    {"x\x00": "y\x00"},
    {"x": "\ud800"},
    {"x": object()},
    {"x": 10**400},
    {"x": [[[[["deep"]]]]]},
    {"x": HumanMessage("inner")},
    {"x": {(1, 2): "key"}},
    {"x": {None: 1, True: 2, 3: 4}},
    {"\ud800": 1},
]


@pytest.mark.parametrize("args", ODD_ARGUMENTS, ids=range(len(ODD_ARGUMENTS)))
def test_arguments_of_a_tool_call_that_are_no_json_do_not_stop_the_recording(args: Any) -> None:
    message = AIMessage("", id="a1")
    message.tool_calls = [{"id": "c1", "name": "f", "args": args, "type": "tool_call"}]
    text = to_json(run_as_json(open_run(), "completed", [message]))
    text.encode()
    assert "\\u0000" not in text
    read = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert read["messages"][0]["tool_calls"][0]["name"] == "f"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None)),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(codec=None)), inner, max_size=3)
    ),
    max_leaves=10,
)


@given(json_values)
def test_whatever_is_cleaned_can_be_stored(value: Any) -> None:
    text = to_json({"value": value})
    text.encode()
    assert "\\u0000" not in text
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


@given(st.text(st.characters(codec="utf-8", exclude_characters="\x00")))
def test_text_that_can_be_stored_is_left_as_it_is(text: str) -> None:
    assert clean(text) == text


@pytest.mark.parametrize("bad", ["\x00", "\ud800"])
def test_what_cannot_be_stored_becomes_the_replacement_character(bad: str) -> None:
    assert clean(f"a{bad}b") == "a\ufffdb"


# --- which messages are this run's ------------------------------------------------------------------------------

HISTORY: list[BaseMessage] = [
    SystemMessage("s", id="s"),
    HumanMessage("first", id="m1"),
    AIMessage("answer", id="a1"),
    HumanMessage("second", id="m2"),
    HumanMessage("and more", id="m3"),
    AIMessage("answer 2", id="a2"),
    ToolMessage("result", id="t2", tool_call_id="c"),
    AIMessage("answer 3", id="a3"),
]


def ids(messages: list[BaseMessage]) -> list[str | None]:
    return [message.id for message in messages]


def test_a_run_begins_with_the_last_group_of_human_messages() -> None:
    assert input_of(HISTORY[:5]).first_message_id == "m2"
    assert input_of(HISTORY[:2]).first_message_id == "m1"
    assert input_of(HISTORY[:5]).question == "second\nand more"


def test_the_messages_of_a_run_are_those_from_its_first_on() -> None:
    assert ids(messages_of_run(HISTORY, open_run(first_message_id="m2"))) == ["m2", "m3", "a2", "t2", "a3"]
    assert ids(messages_of_run(HISTORY, open_run(first_message_id=None))) == [
        "m1",
        "a1",
        "m2",
        "m3",
        "a2",
        "t2",
        "a3",
    ]


def test_where_the_first_was_removed_the_last_turn_is_taken() -> None:
    assert ids(messages_of_run(
        [message for message in HISTORY if message.id != "m2"], open_run(first_message_id="m2")
    )) == [
        "m3", "a2", "t2", "a3",
    ]  # fmt: skip


@pytest.mark.parametrize("messages", [[], [SystemMessage("s")], [AIMessage("a", id="a")]])
def test_a_run_without_a_question_has_none(messages: list[BaseMessage]) -> None:
    assert input_of(messages).question == ""


def test_a_question_is_cut_at_its_end_and_holds_no_recalled_text() -> None:
    question = input_of(
        [HumanMessage(f"{OPENING}\n- secret\n{CLOSING}" + "x" * 9000 + "end", id="m")]
    ).question
    assert len(question) == 4000
    assert question.endswith("end")
    assert "secret" not in question


# --- the state between start and end ----------------------------------------------------------------------------


SEAL = RunSeal("secret")


def test_an_open_run_survives_the_state() -> None:
    run = open_run(first_message_id="m1", knowledge="known", exposures=({"memory_id": "x", "version": 1},))
    kept = json.loads(json.dumps({"learning_run": run.as_state(SEAL)}))
    assert OpenRun.from_state(kept, SEAL) == run
    assert OpenRun.from_state(SimpleNamespace(**kept), RunSeal("secret")) == run
    nested = replace(run, nested=True)
    assert OpenRun.from_state({"learning_run": nested.as_state(SEAL)}, SEAL) == nested


@pytest.mark.parametrize("kept", [{}, None, {"learning_run": {}}, {"learning_run": None}, {"messages": []}])
def test_a_state_without_a_run_is_nobodys(kept: Any) -> None:
    assert OpenRun.from_state(kept, SEAL) is None


@pytest.mark.parametrize(
    "change",
    [
        {"identity": {"tenant_id": "default", "user_id": "somebody else"}},
        {"run_id": "another"},
        {"nested": True},
        {"seal": None},
        {"seal": "0" * 32},
        {"seal": ""},
    ],
)
def test_a_run_that_we_did_not_seal_counts_for_nobody(change: dict[str, Any]) -> None:
    heard: list[Event] = []
    with listening(heard.append):
        assert OpenRun.from_state({"learning_run": open_run().as_state(SEAL) | change}, SEAL) is None
        assert OpenRun.from_state({"learning_run": open_run().as_state(RunSeal(None))}, SEAL) is None
    assert [event.name for event in heard] == ["run_state_refused"] * 2


# --- errors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "could not connect to postgresql://ada:hunter2@db.example.com/x",
        "password=hunter2 host=db",
        "Incorrect API key provided: sk-hunter2hunter2",
        "api_key: hunter2",
        "token = hunter2",
        "Authorization: Bearer hunter2hunter2hunter2",
        "{'api_key': 'hunter2'}",
        '{"password": "hunter2"}',
        "sb_secret_hunter2hunter2",
        "https://x.example/?apikey=hunter2&y=1",
        "Secret: hunter2",
    ],
)
def test_an_error_is_recorded_without_its_secrets(text: str) -> None:
    told = describe_error(RuntimeError(text))
    assert "hunter2" not in told
    assert told.startswith("RuntimeError: ")


def test_an_error_is_recorded_in_few_characters() -> None:
    run = run_as_json(open_run(), "failed", [], error=ValueError("x" * 10_000))
    assert run["error"].startswith("ValueError: xxx")
    assert len(run["error"]) <= 2_000


def test_a_secret_at_the_cut_does_not_show() -> None:
    assert "hunter2" not in describe_error(ValueError("x" * 1980 + " password=hunter2"))


def test_an_ordinary_error_is_recorded_as_it_is() -> None:
    assert describe_error(KeyError("order A1001")) == "KeyError: 'order A1001'"


class _Unprintable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")


def test_an_error_that_cannot_be_printed_is_recorded_by_its_name() -> None:
    assert "_Unprintable" in describe_error(_Unprintable())


def test_a_run_has_what_the_storage_function_takes() -> None:
    run = run_as_json(
        open_run(exposures=[{"memory_id": "x", "version": 2}]), "interrupted", [HumanMessage("Hi", id="m")]
    )
    assert run | {"finished_at": "", "messages": []} == {
        "run_id": "r1",
        "status": "interrupted",
        "messages": [],
        "tool_errors": [],
        "error": None,
        "exposures": [{"memory_id": "x", "version": 2}],
        "started_at": "2026-11-20T12:00:00+00:00",
        "finished_at": "",
    }
    assert datetime.fromisoformat(run["finished_at"]).tzinfo is not None
    assert message_as_json(HumanMessage("Hi"))["message_id"]


def test_a_run_tells_the_tokens_of_its_model_calls_and_of_the_tools_they_called() -> None:
    def answer(total: int, *tools: str) -> AIMessage:
        return AIMessage(
            "",
            usage_metadata={"input_tokens": total - 1, "output_tokens": 1, "total_tokens": total},
            tool_calls=[{"id": f"{total}{tool}", "name": tool, "args": {}} for tool in tools],
        )

    recorded = run_as_json(
        open_run(),
        "completed",
        [HumanMessage("hi"), answer(100, "search", "order"), answer(40, "order"), AIMessage("ok")],
    )

    assert recorded["facts"]["usage"] == {
        "model_calls": 2,
        "input_tokens": 138,
        "output_tokens": 2,
        "total_tokens": 140,
        "tools": {"search": 50, "order": 90},
    }
