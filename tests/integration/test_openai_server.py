"""The OpenAI-protocol server against the real clients of `langchain_openai`."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from threading import Event
from typing import Any

import httpx
import openai
import pytest
from langchain.agents import create_agent
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from pydantic import BaseModel, SecretStr

from agent.errors import ConfigurationError
from agent.testing import tool_call
from agent.testing.openai_server import CutOff, Hang, OpenAIServer, Refusal, Slow, openai_server


class Person(BaseModel):
    """A person."""

    name: str
    age: int


@tool
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


def _chat(server: OpenAIServer, **options: Any) -> ChatOpenAI:
    settings: dict[str, Any] = {
        "model": "gpt-5-mini",
        "max_retries": 0,
        "timeout": 30,
        "api_key": "sk-test",
        **options,
    }
    return ChatOpenAI(base_url=server.url, **settings)


def _embedder(server: OpenAIServer, **options: Any) -> OpenAIEmbeddings:
    # Without the length check, which fetches a tokenizer from the network.
    return OpenAIEmbeddings(
        model="text-embedding-3-small",
        base_url=server.url,
        api_key=SecretStr("sk-test"),
        check_embedding_ctx_length=False,
        max_retries=0,
        **options,
    )


async def test_text_arrives_plain_and_streamed_sync_and_async() -> None:
    with openai_server(["two words"]) as server:
        model = _chat(server, stream_usage=True)
        streamed = list(model.stream("hi"))
        answers = [
            model.invoke("hi").content,
            (await model.ainvoke("hi")).content,
            "".join(str(chunk.content) for chunk in streamed),
            "".join([str(chunk.content) async for chunk in model.astream("hi")]),
        ]

    assert answers == ["two words"] * 4
    assert len([chunk for chunk in streamed if chunk.content]) == 2
    assert any(chunk.usage_metadata for chunk in streamed)
    assert [request.body.get("stream", False) for request in server.chat_requests].count(True) == 2
    assert server.chat_requests[0].api_key == "sk-test"


@pytest.mark.parametrize("streaming", [False, True])
async def test_an_agent_calls_tools_over_the_wire(streaming: bool) -> None:
    both = AIMessage(
        "", tool_calls=[*tool_call("add", a=1, b=2).tool_calls, *tool_call("add", a=3, b=4).tool_calls]
    )
    with openai_server(
        [both, lambda body: f"sums: {body['messages'][-2]['content']}, {body['messages'][-1]['content']}"]
    ) as server:
        agent = create_agent(_chat(server, streaming=streaming), [add])
        state = await agent.ainvoke({"messages": [HumanMessage("1+2? 3+4?")]})

    assert state["messages"][-1].content == "sums: 3, 7"
    assert server.chat_requests[0].body["tools"][0]["function"]["name"] == "add"


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
async def test_structured_output_in_both_methods(method: Any) -> None:
    with openai_server([Person(name="Ada", age=36)]) as server:
        model = _chat(server).with_structured_output(Person, method=method)
        answers = [model.invoke("who?"), await model.ainvoke("who?")]

    assert answers == [Person(name="Ada", age=36)] * 2
    assert ("response_format" in server.chat_requests[0].body) == (method == "json_schema")


@pytest.mark.parametrize(
    ("status", "error"),
    [(401, openai.AuthenticationError), (429, openai.RateLimitError), (500, openai.InternalServerError)],
)
def test_a_refusal_is_the_clients_own_error(status: int, error: type[Exception]) -> None:
    with (
        openai_server([Refusal(status=status, message="not today")]) as server,
        pytest.raises(error, match="not today"),
    ):
        _chat(server).invoke("hi")


def test_a_client_that_retries_gets_the_next_item() -> None:
    with openai_server([Refusal(status=429, retry_after=timedelta(0)), "second try"]) as server:
        assert _chat(server, max_retries=1).invoke("hi").content == "second try"
        assert len(server.chat_requests) == 2


def test_only_the_right_key_is_taken() -> None:
    with openai_server(api_key="sk-right") as server:
        assert _chat(server, api_key="sk-right").invoke("hi").content
        with pytest.raises(openai.AuthenticationError) as refused:
            _chat(server, api_key="sk-wrong-and-long").invoke("hi")

    assert "sk-wrong-and-long" not in str(refused.value)


def test_a_hanging_request_is_ended_by_the_clients_time_out_and_the_next_works() -> None:
    with openai_server([Hang(), "awake"]) as server:
        with pytest.raises(openai.APITimeoutError):
            _chat(server, timeout=0.2).invoke("hi")
        assert _chat(server).invoke("hi").content == "awake"


def test_leaving_the_block_ends_a_hanging_request() -> None:
    arrived = Event()

    def hang(_: dict[str, Any]) -> Hang:
        arrived.set()
        return Hang()

    with ThreadPoolExecutor(1) as pool:
        with openai_server([hang]) as server:
            waiting = pool.submit(_chat(server).invoke, "hi")
            assert arrived.wait(30)
        with pytest.raises(openai.APIConnectionError):
            waiting.result(30)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_cut_off_body_is_an_error_and_never_half_an_answer(streaming: bool) -> None:
    with (
        openai_server([CutOff("a long answer " * 20)]) as server,
        pytest.raises(Exception, match=r"(?i)connection|closed"),
    ):
        _chat(server, streaming=streaming).invoke("hi")


def test_a_slow_answer_arrives() -> None:
    with openai_server([Slow(timedelta(milliseconds=20), "late")], delay=timedelta(milliseconds=5)) as server:
        assert _chat(server).invoke("hi").content == "late"


async def test_vectors_have_length_one_and_near_texts_are_near() -> None:
    texts = ["the parcel is late", "the parcel is very late", "espresso cups"]
    with openai_server(dimensions=256) as server:
        vectors = _embedder(server).embed_documents(texts)
        again = await _embedder(server).aembed_documents(texts)
        query = await _embedder(server).aembed_query(texts[0])

    def nearness(one: list[float], other: list[float]) -> float:
        return sum(a * b for a, b in zip(one, other, strict=True))

    assert [len(vector) for vector in vectors] == [256] * 3
    assert nearness(vectors[0], vectors[0]) == pytest.approx(1)
    assert nearness(vectors[0], vectors[1]) > 0.8 > nearness(vectors[0], vectors[2])
    assert vectors == again
    assert query == vectors[0]
    assert server.embedding_requests[0].body["input"] == texts


def test_vectors_travel_in_both_encodings_and_in_the_length_asked_for() -> None:
    with openai_server() as server:
        client = openai.OpenAI(base_url=server.url, api_key="sk-test")
        packed = client.embeddings.create(model="m", input="some text", dimensions=8)
        plain = client.embeddings.create(model="m", input="some text", dimensions=8, encoding_format="float")
        tokens = client.embeddings.create(model="m", input=[[1, 2], [3]])

    assert server.embedding_requests[0].body["encoding_format"] == "base64"
    assert packed.data[0].embedding == pytest.approx(plain.data[0].embedding)
    assert [len(entry.embedding) for entry in (packed.data[0], *tokens.data)] == [8, 1536, 1536]


def test_embedding_faults_meet_their_request_and_then_it_works() -> None:
    with openai_server(embedding_faults=[None, Refusal(status=500), CutOff()], dimensions=64) as server:
        embedder = _embedder(server)
        assert embedder.embed_query("a")
        with pytest.raises(openai.InternalServerError):
            embedder.embed_query("a")
        with pytest.raises(openai.APIConnectionError):
            embedder.embed_query("a")
        assert len(embedder.embed_query("a")) == 64


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ({"messages": []}, "at least one message"),
        (
            {"messages": [{"role": "tool", "tool_call_id": "x", "content": ""}]},
            "must answer a preceding message",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": "hi"},
                    {"role": "assistant", "tool_calls": [{"id": "c1", "type": "function", "function": {}}]},
                    {"role": "user", "content": "well?"},
                ]
            },
            "without an answer: c1",
        ),
        (
            {"messages": [{"role": "user", "content": "hi"}], "tool_choice": "required"},
            "only allowed when 'tools'",
        ),
    ],
)
def test_what_openai_refuses_is_refused(body: dict[str, Any], told: str) -> None:
    with openai_server() as server:
        client = openai.OpenAI(base_url=server.url, api_key="sk-test", max_retries=0)
        with pytest.raises(openai.BadRequestError, match=told):
            client.post("/chat/completions", body=body, cast_to=object)


def test_an_empty_text_is_not_embedded() -> None:
    with openai_server() as server, pytest.raises(openai.BadRequestError, match="none of them empty"):
        openai.OpenAI(base_url=server.url, api_key="k", max_retries=0).embeddings.create(
            model="m", input=["a", ""]
        )


def test_other_addresses_and_a_failing_script_are_told_plainly() -> None:
    def fails(_: dict[str, Any]) -> str:
        raise LookupError("nothing prepared")

    with openai_server([fails]) as server:
        client = openai.OpenAI(base_url=server.url, api_key="k", max_retries=0)
        with pytest.raises(openai.NotFoundError, match="/v1/responses is not spoken here"):
            client.responses.create(model="m", input="hi")
        with pytest.raises(openai.InternalServerError, match="nothing prepared"):
            _chat(server).invoke("hi")
        broken = httpx.post(f"{server.url}/embeddings", content=b"{")
        assert (broken.status_code, broken.json()["error"]["message"]) == (400, "the body is not JSON")


def test_two_hundred_requests_at_once_are_all_answered_and_recorded() -> None:
    with openai_server([lambda body: body["messages"][-1]["content"]]) as server:
        model = _chat(server)
        with ThreadPoolExecutor(50) as pool:
            answers = list(pool.map(lambda number: model.invoke(str(number)).content, range(200)))

    assert answers == [str(number) for number in range(200)]
    assert len(server.requests) == 200


@pytest.mark.parametrize(
    "options", [{"script": []}, {"script": [7]}, {"script": [TimeoutError()]}, {"dimensions": 0}]
)
def test_what_cannot_be_served_is_refused_on_construction(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError), openai_server(**options):
        pass
