"""The shop's agent with learning: the profile is kept by a tool (AGENTIC), memories come from every run (ALWAYS)."""

from __future__ import annotations

from typing import Any

from langchain_core.language_models import BaseChatModel
from langgraph.graph.state import CompiledStateGraph
from langgraph.types import Checkpointer

from agent import LearningMachine, LearningMode, UserProfileConfig
from graphs.shop_agent import shop_agent


def build_assistant(
    model: BaseChatModel | None = None,
    machine: LearningMachine | None = None,
    checkpointer: Checkpointer = None,
) -> CompiledStateGraph[Any, Any, Any, Any]:
    """The agent of `shop_agent` with learning as its outermost middleware.

    Args:
        model: `None` is `graphs.chat_model.chat_model()`.
        machine: `None` is one whose profile is AGENTIC and whose other stores are as usual.
        checkpointer: Needed outside a LangGraph server for threads and for the approval of `delete_account`.
    """
    machine = machine or LearningMachine(user_profile=UserProfileConfig(mode=LearningMode.AGENTIC))
    return shop_agent(model, [machine.middleware()], checkpointer)


graph = build_assistant()
