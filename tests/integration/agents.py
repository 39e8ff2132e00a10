"""What the tests of agents share: a machine that learns at once, and ways to call an agent in both colours."""

from __future__ import annotations

import asyncio
from typing import Any

from langchain_core.messages import BaseMessage

from agent import Identity, LearningMachine
from agent.portal import portal
from agent.settings import WorkerMode
from agent.testing.throwaway import ThrowawayDatabase

ASYNC_AND_SYNC = ("async", "sync")


def machine_on(database: ThrowawayDatabase, **options: Any) -> LearningMachine:
    """A machine whose worker learns in this process as soon as something is recorded."""
    settings = database.settings.model_copy(update={"worker": WorkerMode.INSIDE})
    return LearningMachine(settings=settings, **options)


def call(
    colour: str, graph: Any, given: Any, config: dict[str, Any] | None = None, **more: Any
) -> dict[str, Any]:
    """Invoke a graph by its sync or its async door."""
    if colour == "sync":
        result: dict[str, Any] = graph.invoke(given, config, **more)
        return result
    return asyncio.run(graph.ainvoke(given, config, **more))


def said(text: str) -> Any:
    """The input of a user's turn."""
    return {"messages": [{"role": "user", "content": text}]}


def as_user(user_id: str, thread_id: str) -> Any:
    """A configuration that names user and thread."""
    return {"configurable": {"user_id": user_id, "thread_id": thread_id}}


def all_recorded(machine: LearningMachine) -> None:
    """Wait until every run that this machine was handed is in the database or on disk; answers do not wait for it."""
    portal().run_sync(machine.recorded_all())


def runs_of(machine: LearningMachine) -> list[dict[str, Any]]:
    """The recorded runs, newest first, once all that is under way is recorded."""
    all_recorded(machine)
    found: list[dict[str, Any]] = portal().run_sync(machine.database.call("list_runs", Identity(), wanted={}))
    return found


def run_of(machine: LearningMachine, run_id: str) -> dict[str, Any]:
    """One recorded run with its messages."""
    found: dict[str, Any] = portal().run_sync(machine.database.call("get_run", Identity(), the_run_id=run_id))
    return found


def memories_of(machine: LearningMachine, user_id: str) -> list[str]:
    """What is known of a user, newest first, and what they said."""
    who = Identity(user_id=user_id)
    found = asyncio.run(machine.get_learnings(identity=who))
    found += asyncio.run(machine.get_learnings(identity=who, store="conversation", kind="user"))
    return [memory["content"] for memory in found]


def tell_knowledge(messages: list[BaseMessage]) -> str:
    """A script for a model that says what its system message says."""
    return "\n".join(message.text for message in messages if message.type == "system") or "nothing"
