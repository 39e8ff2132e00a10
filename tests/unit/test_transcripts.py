"""Reading runs from logs in OpenAI's message format."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent.database.protocol import to_json
from agent.learning.transcripts import UnreadableRun, error_in, read_run


def line_of(*messages: Any, **more: Any) -> str:
    return json.dumps({"messages": list(messages), **more})


def read(*messages: Any, **more: Any) -> dict[str, Any]:
    return read_run(line_of(*messages, **more))


def tool(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": "c1", "name": "lookup", "content": content, **more}


USER = {"role": "user", "content": "Where is order A1?"}


# --- the run ----------------------------------------------------------------------------------------------------


def test_a_run_has_messages_errors_outcome_and_facts() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "lookup", "arguments": '{"order": "A1"}'}}
    run = read_run(
        line_of(
            {"role": "system", "content": "Be kind."},
            USER,
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c1", "content": "Error: order A1 not found"},
            {"role": "assistant", "content": "I cannot find it."},
            task_id=7,
            trial=2,
            reward=0.0,
            info={"anything": "else"},
        ),
        source_file="log.jsonl",
        agent_id="shop",
    )
    assert [(m["message_id"], m["role"]) for m in run["messages"]] == [
        ("m1", "system"), ("m2", "user"), ("m3", "assistant"), ("m4", "tool"), ("m5", "assistant"),
    ]  # fmt: skip
    assert run["messages"][2] == {
        "message_id": "m3",
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "c1", "name": "lookup", "args": {"order": "A1"}}],
    }
    assert run["messages"][3]["is_error"] is True
    assert run["messages"][3]["name"] == "lookup", "a result without a name has that of its call"
    assert run["tool_errors"] == [
        {"tool": "lookup", "tool_call_id": "c1", "message": "Error: order A1 not found"}
    ]
    assert run["outcomes"] == [{"kind": "reward", "score": 0.0, "succeeded": False, "details": {}}]
    assert run["facts"] == {"task_id": 7, "trial": 2, "source_file": "log.jsonl"}
    assert (run["status"], run["agent_id"]) == ("completed", "shop")
    assert "session_id" not in run


def test_a_trajectory_may_be_called_traj() -> None:
    run = read_run(json.dumps({"traj": [USER]}))
    assert run["messages"] == [{"message_id": "m1", "role": "user", "content": "Where is order A1?"}]


@pytest.mark.parametrize(
    ("reward", "succeeded"),
    [
        (1, True),
        (1.0, True),
        (0.9999999, True),
        (0.999, False),
        (0, False),
        (-1, False),
        (2.5, True),
        (True, True),
    ],
)
def test_a_reward_of_one_is_success(reward: float, succeeded: bool) -> None:
    assert [outcome["succeeded"] for outcome in read(USER, reward=reward)["outcomes"]] == [succeeded]


def test_without_a_reward_there_is_no_outcome() -> None:
    assert read(USER)["outcomes"] == []
    assert read(USER, reward=None)["outcomes"] == []


def test_the_id_is_that_of_the_content() -> None:
    one = read_run('{"messages": [{"role": "user", "content": "hi"}], "trial": 1}')
    reordered = read_run(
        '{"trial":1,"messages":[{"content":"hi","role":"user"}]}', source_file="elsewhere.jsonl"
    )
    other = read_run('{"messages": [{"role": "user", "content": "hi"}], "trial": 2}')
    assert one["run_id"] == reordered["run_id"]
    assert one["run_id"] != other["run_id"]


def test_session_and_agent_of_the_line_win() -> None:
    run = read_run(line_of(USER, session_id=12, agent_id="its own"), agent_id="default", session_id="s")
    assert (run["session_id"], run["agent_id"]) == ("12", "its own")


# --- bad lines --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"messages": [', "is not JSON"),
        ("[1, 2]", "a list, not an object"),
        ("null", "null, not an object"),
        ('"text"', "text, not an object"),
        ("{}", "neither 'messages' nor 'traj'"),
        ('{"messages": "hi"}', "'messages' is text, not a list"),
        ('{"traj": {}}', "'traj' is an object, not a list"),
        ('{"messages": []}', "'messages' is empty"),
        ('{"messages": ["hi"]}', "message 1 is text, not an object"),
        ('{"messages": [{"role": "user"}, {"content": "x"}]}', "message 2 has no role"),
        ('{"messages": [{"role": " "}]}', "message 1 has no role"),
        ('{"messages": [{"role": "assistant", "tool_calls": {}, "content": ""}], "reward": "x"}', "'reward' is text"),
        ('{"messages": [{"role": "assistant", "tool_calls": "f"}]}', "'tool_calls' is text"),
        ('{"messages": [{"role": "assistant", "tool_calls": ["f"]}]}', "a tool call is text"),
        ('{"messages": [{"role": "user"}], "reward": NaN}', "NaN is not JSON"),
        ('{"messages": [{"role": "user"}], "reward": 1e999}', "too large"),
        ('{"messages": [{"role": "user"}], "reward": 1' + "0" * 400 + "}", "too large"),
        ('{"messages": [{"role": "user"}], "session_id": []}', "'session_id' is a list"),
        ('{"messages": [{"role": "user"}], "session_id": "' + "x" * 600 + '"}', "600 characters"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a": ' * 900 + "1" + "}" * 900, "neither"),
        ("1" * 5000, "cannot be read"),
        ('{"messages": [{"role": "user"}, {"role": "user", "content": ' + "[" * 21 + "]" * 21 + "}]}", "2.* than 20"),
        ('{"messages": [{"role": "user", "content": ' + "[" * 400 + '"x"' + "]" * 400 + "}]}", "nested too deeply"),
        ('{"messages": [{"role": "user", "content": ' + '{"a":' * 900 + "1" + "}" * 900 + "}]}", "nested too deeply"),
    ],
)  # fmt: skip
def test_a_bad_line_says_why(line: str, reason: str) -> None:
    with pytest.raises(UnreadableRun, match=reason):
        read_run(line)


@settings(deadline=None)
@given(st.text(max_size=200))
def test_no_line_breaks_the_reader(line: str) -> None:
    with suppress(UnreadableRun):
        assert read_run(line)["messages"]


_SCALARS = st.none() | st.booleans() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8)
_PARTS = st.dictionaries(
    st.sampled_from(
        ["type", "text", "url", "image_url", "function", "name", "arguments", "id", "data", "source"]
    ),
    _SCALARS | st.dictionaries(st.sampled_from(["url", "name", "arguments", "data"]), _SCALARS, max_size=2),
    max_size=3,
)
_VALUES = _SCALARS | _PARTS | st.lists(_SCALARS | _PARTS, max_size=2)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(
        st.fixed_dictionaries(
            {"role": st.sampled_from(["user", "assistant", "tool", "function"])},
            optional={
                "content": _VALUES,
                "tool_calls": _VALUES,
                "name": _VALUES,
                "tool_call_id": _VALUES,
                "function_call": _VALUES,
            },
        ),
        min_size=1,
        max_size=2,
    )
)
def test_whatever_is_read_can_be_stored(messages: list[dict[str, Any]]) -> None:
    try:
        run = read(*messages)
    except UnreadableRun:
        return
    assert json.loads(to_json(run))["messages"]
    assert all(isinstance(message["content"], str) for message in run["messages"])


# --- contents ---------------------------------------------------------------------------------------------------


def test_content_may_be_text_null_or_missing() -> None:
    run = read({"role": "user", "content": ""}, {"role": "user", "content": None}, {"role": "user"})
    assert [message["content"] for message in run["messages"]] == ["", "", ""]


def test_parts_keep_their_text_and_name_the_rest() -> None:
    picture = "iVBORw0KGgo" + "A" * 200_000
    run = read(
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "What is this?"},
                {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}},
                {"type": "image_url", "image_url": {"url": "https://example.com/cat.jpg"}},
                {"type": "input_image", "image_url": f"data:image/jpeg;base64,{picture}"},
                {"type": "input_audio", "input_audio": {"data": picture, "format": "wav"}},
                {
                    "type": "file",
                    "file": {"filename": "a.pdf", "file_data": f"data:application/pdf;base64,{picture}"},
                },
                {"type": "image", "source": {"type": "base64", "media_type": "image/gif", "data": picture}},
                "and a bare text",
            ],
        }
    )
    content = run["messages"][0]["content"]
    assert content.splitlines() == [
        "What is this?",
        "[image image/png, 150 kB]",
        "[image https://example.com/cat.jpg]",
        "[image image/jpeg, 150 kB]",
        "[audio wav 150 kB]",
        "[file a.pdf 150 kB]",
        "[image image/gif 150 kB]",
        "and a bare text",
    ]


def test_a_picture_inside_a_text_is_named_and_not_copied() -> None:
    run = read({"role": "user", "content": f"look: data:image/png;base64,{'A' * 40_000} nice?"})
    assert run["messages"][0]["content"] == "look: [image/png, 30 kB] nice?"


def test_content_may_be_lists_inside_lists() -> None:
    content: Any = "hi"
    for _ in range(20):
        content = [content]
    assert read({"role": "user", "content": content})["messages"][0]["content"] == "hi"


@pytest.mark.parametrize("levels", [60, 400, 900])
def test_a_tool_result_that_is_nested_deeply_is_read(levels: int) -> None:
    content = '{"error": true, "trace": ' + "[" * levels + "]" * levels + "}"
    assert read(tool(content))["tool_errors"][0]["message"] == content[:2_000]


@pytest.mark.parametrize("levels", [21, 400, 900])
def test_a_type_of_a_part_that_is_no_text_is_none(levels: int) -> None:
    part = '{"type": ' + "[" * levels + "]" * levels + "}"
    with pytest.raises(UnreadableRun, match="nested too deeply"):
        read_run('{"messages": [{"role": "user", "content": [' + part + "]}]}")
    assert read({"role": "user", "content": [{"type": ["x"]}]})["messages"][0]["content"] == "[part]"


@pytest.mark.parametrize(
    "text",
    [
        "base64, data:a/" + "a" * 1_000_000,
        "base64," + "data:" * 200_000,
        "base64," + "data:" + "a/a;" * 250_000,
        ";base64," * 125_000,
        (";base64," + "A" * 255) * 4_000,
        ("data:a/" + "a" * 180 + "!;base64," + "A" * 256) * 2_000,
    ],
    ids=["one head", "heads", "parameters", "marks", "short payloads", "broken heads"],
)
def test_a_text_made_to_look_like_files_is_read_as_it_is(text: str) -> None:
    """In time that grows with its length: where it grows with the square, these do not end before the time limit."""
    assert read({"role": "user", "content": text})["messages"][0]["content"] == text


def test_each_file_in_a_text_is_named() -> None:
    file = "base64," + "A" * 400
    text = f"data:{file} data:;{file} data:text/plain;charset=utf-8;{file}|data:a/b;{file} no:;{file} data:a b;{file}"
    assert read({"role": "user", "content": text})["messages"][0]["content"] == (
        f"data:{file} [data, 300 bytes] [text/plain, 300 bytes]|[a/b, 300 bytes] no:;{file} data:a b;{file}"
    )


def test_a_message_of_a_megabyte_stays_whole() -> None:
    text = "word " * 210_000
    assert read({"role": "user", "content": text})["messages"][0]["content"] == text


def test_nul_and_lone_surrogates_can_be_stored() -> None:
    run = read_run('{"messages": [{"role": "user", "content": "a\\u0000b \\ud800 c"}]}')
    assert json.loads(to_json(run))["messages"][0]["content"] == "a\ufffdb \ufffd c"


def test_arguments_that_are_no_object_stay_text() -> None:
    def args(arguments: Any) -> Any:
        call = {"id": "c", "function": {"name": "f", "arguments": arguments}}
        return read({"role": "assistant", "tool_calls": [call]})["messages"][0]["tool_calls"][0]["args"]

    assert args('{"a": [1]}') == {"a": [1]}
    assert args('{"a": 1') == '{"a": 1'
    assert args("") == ""
    assert args("[1, 2]") == "[1, 2]"
    assert args('{"a": 1e999}') == '{"a": 1e999}'
    assert args(None) == {}
    assert args({"already": "parsed"}) == {"already": "parsed"}
    deep = '{"a":' * 200 + "1" + "}" * 200
    assert args(deep) == deep


def test_the_old_form_of_calls_is_read_too() -> None:
    run = read(
        {"role": "assistant", "content": None, "function_call": {"name": "lookup", "arguments": "{}"}},
        {"role": "function", "name": "lookup", "content": "Error: nothing there"},
    )
    assert run["messages"][0]["tool_calls"] == [{"id": "", "name": "lookup", "args": {}}]
    assert run["messages"][1]["role"] == "tool"
    assert run["tool_errors"] == [{"tool": "lookup", "tool_call_id": "", "message": "Error: nothing there"}]


# --- tool errors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("Error: no such order", "Error: no such order"),
        ("  error: no such order\n", "error: no such order"),
        ("ERROR 404 Not Found", "ERROR 404 Not Found"),
        ("Error", "Error"),
        ("Error. Try again later.", "Error. Try again later."),
        ("Error - no such order", "Error - no such order"),
        ("Error executing tool lookup: boom", "Error executing tool lookup: boom"),
        ("Error while reading file", "Error while reading file"),
        ("Exception: boom", "Exception: boom"),
        ("Exception in thread main", "Exception in thread main"),
        ("ValueError: invalid literal", "ValueError: invalid literal"),
        ("requests.exceptions.HTTPError: 404 Client Error", "requests.exceptions.HTTPError: 404 Client Error"),
        ("KeyError('order')", "KeyError('order')"),
        ("Traceback (most recent call last):\n  File x\nKeyError: 1",
         "Traceback (most recent call last):\n  File x\nKeyError: 1"),
        ("<tool_use_error>File has not been read yet</tool_use_error>",
         "<tool_use_error>File has not been read yet</tool_use_error>"),
        ('"Error: in a JSON string"', "Error: in a JSON string"),
        ('{"error": "no such order"}', "no such order"),
        ('{"error": {"code": 404, "message": "not found"}}', "not found"),
        ('{"error": true, "detail": "locked"}', "locked"),
        ('{"error": 404}', '{"error": 404}'),
        ('{"status": "error", "message": "locked"}', "locked"),
        ('{"success": false, "reason": "out of stock"}', "out of stock"),
        ('{"isError": true, "content": "no access"}', "no access"),
    ],
)  # fmt: skip
def test_a_failed_tool_call_is_found(content: str, message: str) -> None:
    assert error_in(content) == message
    assert [error["message"] for error in read(tool(content))["tool_errors"]] == [message]


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "12.0",
        "Order A1 is shipped.",
        "No errors found.",
        "0 errors, 3 warnings",
        "Errors: 0",
        "Error rate: 0.1 percent",
        "Error handling, a guide",
        "Error-free for 12 days",
        "Errors and how to avoid them",
        "The log says: Error: disk full",
        "Exceptional service!",
        "Exceptions to the rule are listed below",
        "Terror at midnight (film)",
        "Traceback analysis is a chapter of the book",
        "ErrorBudget is at 80 percent",
        '{"error": null, "order": "A1"}',
        '{"error": "", "order": "A1"}',
        '{"error": "none"}',
        '{"error": false}',
        '{"error": 0}',
        '{"error": 0.02, "mean": 3.1}',
        '{"errors": 0, "status": "ok"}',
        '{"success": true, "error": {"previous": "healed"}}',
        '{"status": "failed", "payment": "P1"}',
        '{"log": ["Error: disk full"]}',
        '{"message": "Error: disk full"}',
        '[{"error": "an entry of a list"}]',
        '{"broken json',
        '"a JSON string about an Error: code"',
    ],
)
def test_a_clean_result_that_mentions_errors_is_none(content: str) -> None:
    assert error_in(content) is None
    run = read(tool(content))
    assert run["tool_errors"] == []
    assert "is_error" not in run["messages"][0]


@pytest.mark.parametrize("flag", [{"is_error": True}, {"isError": True}, {"status": "error"}])
def test_a_mark_on_the_message_is_believed(flag: dict[str, Any]) -> None:
    run = read(tool("no such order", **flag))
    assert run["tool_errors"] == [{"tool": "lookup", "tool_call_id": "c1", "message": "no such order"}]


def test_only_tool_messages_are_looked_at() -> None:
    run = read(
        {"role": "user", "content": "Error: it does not work"},
        {"role": "assistant", "content": "Error: sorry"},
    )
    assert run["tool_errors"] == []


def test_parts_of_a_tool_result_are_looked_at_as_text() -> None:
    run = read(tool([{"type": "text", "text": "Error: no such order"}]))
    assert [error["message"] for error in run["tool_errors"]] == ["Error: no such order"]


def test_a_long_error_is_shortened() -> None:
    run = read(tool("Error: " + "x" * 10_000))
    assert len(run["tool_errors"][0]["message"]) == 2_000
    assert len(run["messages"][0]["content"]) == 10_007
