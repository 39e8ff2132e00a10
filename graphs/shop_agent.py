"""The agent of a small shop, without learning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from langchain.agents import create_agent
from langchain.agents.middleware import AgentMiddleware, HumanInTheLoopMiddleware
from langchain_core.language_models import BaseChatModel
from langgraph.graph.state import CompiledStateGraph
from langgraph.types import Checkpointer

from graphs import shop
from graphs.chat_model import chat_model

PROMPT = (
    "You are the assistant of a small shop. Answer with the help of your tools and never invent order data. Tell the "
    "customer plainly when something did not work."
)


def shop_agent(
    model: BaseChatModel | None = None,
    middleware: Sequence[AgentMiddleware[Any, Any, Any]] = (),
    checkpointer: Checkpointer = None,
) -> CompiledStateGraph[Any, Any, Any, Any]:
    """The agent with all tools of the shop; `delete_account` waits for a person.

    Args:
        model: `None` is `graphs.chat_model.chat_model()`.
        middleware: What else to put around it, such as learning.
        checkpointer: Needed outside a LangGraph server for threads and for the approval of `delete_account`.
    """
    approval = HumanInTheLoopMiddleware(
        interrupt_on={"delete_account": {"allowed_decisions": ["approve", "reject"]}},
        description_prefix="This deletes the account with all its orders and cannot be undone",
    )
    return create_agent(
        model or chat_model(),
        list(shop.ALL_TOOLS),
        system_prompt=PROMPT,
        middleware=[*middleware, approval],
        checkpointer=checkpointer,
        name="assistant",
    )
