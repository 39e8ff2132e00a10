"""The support team with learning around it: each of its agents gets what is known about the customer."""

from __future__ import annotations

from typing import Any

from langchain_core.language_models import BaseChatModel
from langgraph.graph.state import CompiledStateGraph
from langgraph.types import Checkpointer

from agent import LearningMachine, with_learning
from graphs.team import team_builder


def build_support_team(
    model: BaseChatModel | None = None,
    machine: LearningMachine | None = None,
    checkpointer: Checkpointer = None,
) -> CompiledStateGraph[Any, Any, Any, Any]:
    """The nodes `load_knowledge`, `execute` (the team) and `learn`.

    Args:
        model: For everybody in the team; `None` is `graphs.chat_model.chat_model()`.
        machine: What learns; `None` is one by the settings, with all stores on.
        checkpointer: Needed outside a LangGraph server for threads.
    """
    return with_learning(team_builder(model).compile(name="support_team"), machine, checkpointer=checkpointer)


graph = build_support_team()
