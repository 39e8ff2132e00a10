"""The sample graphs on a real OpenAI client, with the rule-based model at the other end of the wire."""

from __future__ import annotations

from typing import Any

import pytest
from langchain_core.messages import HumanMessage, convert_to_messages
from langchain_openai import ChatOpenAI
from pydantic import SecretStr

from agent.testing.openai_server import OpenAIServer, openai_server
from graphs.rule_chat import RuleChat
from graphs.shop_agent import shop_agent
from graphs.team import team_builder


def brain(body: dict[str, Any]) -> Any:
    """What `RuleChat` says to this request."""
    return RuleChat().bind_tools(body.get("tools") or []).invoke(convert_to_messages(body["messages"]))


def model_on(server: OpenAIServer, *, streaming: bool) -> ChatOpenAI:
    """OpenAI's client against the server."""
    return ChatOpenAI(
        model="gpt-5-mini",
        base_url=server.url,
        api_key=SecretStr("sk-test"),
        max_retries=0,
        streaming=streaming,
    )


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("said", ["Please refund order A1001", "This is unacceptable, refund order A1005"])
async def test_the_team_answers_the_same_over_the_wire(said: str, streaming: bool) -> None:
    question: Any = {"messages": [HumanMessage(said)]}
    local = team_builder(RuleChat()).compile().invoke(question)

    with openai_server([brain]) as server:
        team = team_builder(model_on(server, streaming=streaming)).compile()
        states = [team.invoke(question), await team.ainvoke(question)]

    for state in states:
        assert [message.text for message in state["messages"]] == [
            message.text for message in local["messages"]
        ]
        assert {key: state[key] for key in state if key != "messages"} == {
            key: local[key] for key in local if key != "messages"
        }


async def test_the_agent_takes_several_turns_over_the_wire() -> None:
    with openai_server([brain]) as server:
        agent = shop_agent(model_on(server, streaming=True))
        state: dict[str, Any] = {"messages": []}
        for said in ("Where is my parcel?", "A1002", "Refund A9999"):
            state = await agent.ainvoke({"messages": [*state["messages"], HumanMessage(said)]})

    tools = [message.name for message in state["messages"] if message.type == "tool"]
    assert tools == ["track_shipment", "refund_order"]
    assert (
        state["messages"][-1].text
        == "That did not work: order A9999 not found; order numbers look like A1001."
    )
