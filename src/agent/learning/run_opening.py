"""How a run is opened, by the middleware and by `with_learning`: whose it is, what it starts with, what is known."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from langchain_core.messages import BaseMessage
from langchain_core.runnables import RunnableConfig

from agent import telemetry
from agent.database.protocol import Begun
from agent.events import emit
from agent.learning.machine import LearningMachine
from agent.learning.run_identity import resolve_identity
from agent.learning.run_record import OpenRun, RunInput, input_of, now
from agent.learning.run_watch import ambient_run, is_inside

_NOBODY = (
    "no user is named, so nothing is recalled or learned: pass context={'user_id': …} or "
    "config={'configurable': {'user_id': …}}, or set LEARNING_DEFAULT_USER for one person on one machine"
)


def open_run(
    machine: LearningMachine,
    messages: Sequence[BaseMessage],
    config: RunnableConfig,
    runtime: Any,
    *,
    agent_id: str | None = None,
) -> tuple[OpenRun, RunInput] | None:
    """The run that starts now and what it starts with; `None` for nobody's, from which nothing is learned.

    Inside another run of the same user it is nested: it shares that run's knowledge and is recorded with it. For
    another user, or when the run around it has ended, it is a run of its own.

    Raises:
        IdentityError: an id that cannot be, such as one with a NUL.
    """

    def who(*, default: bool) -> Any:
        return resolve_identity(
            machine.settings,
            config,
            runtime,
            agent_id=machine.agent_id or agent_id,
            claimed=machine.claimed_identity,
            use_default=default,
        )

    started = input_of(messages)
    around = ambient_run.get()
    if around is not None and is_inside(around):
        named = who(default=False)
        same = (named.tenant_id, named.user_id) == (around.identity.tenant_id, around.identity.user_id)
        if same or not named.is_somebody:
            return replace(around, nested=True), started
    identity = who(default=True)
    if not identity.is_somebody:
        emit("run_skipped", agent_id=identity.agent_id, reason=_NOBODY)
        return None
    run_id = (
        getattr(getattr(runtime, "execution_info", None), "run_id", None)
        or config.get("run_id")
        or uuid.uuid4()
    )
    run = OpenRun(
        identity=identity,
        run_id=str(run_id),
        traceparent=telemetry.open_run(identity, str(run_id)),
        started_at=now(),
        first_message_id=started.first_message_id,
        start=started.start,
        said=tuple(started.said),
        answers_before=started.answers_before,
    )
    return run, started


async def with_knowledge(
    machine: LearningMachine, run: OpenRun, question: str, begun: Begun | None = None
) -> OpenRun:
    """The run with what is known that bears on its question. Runs in the portal.

    Args:
        machine: of the run.
        run: whose knowledge is not known yet.
        question: what the user says.
        begun: what `machine.begin_recall` gave for them.
    """
    attributes = {
        telemetry.OPERATION: "retrieval",
        telemetry.DATA_SOURCE_ID: "agent_memory",
        telemetry.AGENT_NAME: run.identity.agent_id,
        telemetry.CONVERSATION_ID: run.identity.session_id,
    }
    around = telemetry.around(run.identity, run.run_id)
    with telemetry.span("retrieval agent_memory", attributes, parent=around) as recall:
        rendered = await machine.recall(run.identity, question, begun)
        recall.set_attribute("learning.recall.memories", len(rendered.shown))
    return replace(
        run,
        recalled=True,
        knowledge=rendered.text,
        exposures=tuple(
            {"memory_id": memory.memory_id, "version": memory.version} for memory in rendered.shown
        ),
    )
