"""The shop's operations agent: reads and changes tables by SQL, sends mail, writes tools; a person says yes first."""

from __future__ import annotations

from typing import Any

from langchain.agents import create_agent
from langchain_core.language_models import BaseChatModel
from langgraph.types import Checkpointer

from agent import LearningMachine
from agent.approval.graph_resume import ApprovalPause
from agent.execution import execution_tools
from agent.execution.safe_executor import SafeExecutor
from agent.execution.safe_tools_middleware import SafeToolsMiddleware
from agent.learning.auto_discover import AutoDiscovery, find_in_application_tool
from graphs.chat_model import chat_model

PROMPT = (
    "You look after the database of a small shop: the tables shop.customers (email, name, status, joined_on) and "
    "shop.orders (order_id, email, item, paid_cents, status, ordered_on). Use your tools (find_in_application "
    "tells what else there is), write table names with their schema, and tell plainly what was refused or rejected."
)


def build_operations(
    model: BaseChatModel | None = None,
    machine: LearningMachine | None = None,
    executor: SafeExecutor | None = None,
    checkpointer: Checkpointer = None,
    discovery: AutoDiscovery | None = None,
) -> Any:
    """An agent whose every tool passes the safe executor.

    Args:
        model: `None` is `graphs.chat_model.chat_model()`.
        machine: `None` is one with the usual stores.
        executor: `None` is one by the settings and their policy file.
        checkpointer: Needed outside a LangGraph server, to pause for a person.
        discovery: What is known of the database's structure; `None` is that of the settings.
    """
    executor = executor or SafeExecutor()
    machine = machine or LearningMachine()
    agent = create_agent(
        model or chat_model(),
        [*execution_tools.tools(executor), find_in_application_tool(discovery)],
        system_prompt=PROMPT,
        middleware=[
            SafeToolsMiddleware(executor, agent_id="operations", risks={"find_in_application": "READ"}),
            *machine.middleware(),
        ],
        checkpointer=checkpointer,
        name="operations",
    )
    return agent.with_config(callbacks=[ApprovalPause(executor.database)])


graph = build_operations()
