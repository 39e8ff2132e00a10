"""Load knowledge before, learn after every execution: the middleware for `create_agent`."""

from __future__ import annotations

import uuid
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Annotated, Any, NotRequired

from langchain.agents.middleware import (
    AgentMiddleware,
    AgentState,
    ExtendedModelResponse,
    ModelRequest,
    ModelResponse,
    TracePolicy,
    omit_payload,
)
from langchain.agents.middleware.types import PrivateStateAttr
from langchain_core.messages import AIMessage, BaseMessage, SystemMessage, ToolMessage
from langchain_core.runnables import RunnableConfig
from langgraph.prebuilt.tool_node import ToolCallRequest
from langgraph.types import Command

from agent.events import emit
from agent.learning.machine import LearningMachine
from agent.learning.run_identity import resolve_identity
from agent.learning.run_record import (
    OpenRun,
    RunStatus,
    first_of_input,
    messages_of_run,
    now,
    question_of,
    run_as_json,
)
from agent.learning.run_watch import Trace, ambient_run, close_trace, inside, open_trace, start_watching
from agent.portal import portal


class LearningState(AgentState[Any]):
    """What the middleware keeps in the graph's state; hidden from input and output, kept over interrupts."""

    learning_run: NotRequired[Annotated[dict[str, Any], PrivateStateAttr]]
    """`OpenRun.as_state()`; empty for nobody."""


class LearningMiddleware(AgentMiddleware[LearningState, Any]):
    """Gives an agent what is known of its user and learns from what happens.

    Put it first in the list, so that it sees every answer of the model. Two database calls a run; learning itself is
    done by a worker afterwards.

    Args:
        machine: what to learn and where; `None` makes one of the keywords.
        **options: the keywords of `LearningMachine`, where no machine is given.

    Raises:
        ConfigurationError: as `LearningMachine`.
        TypeError: a machine and keywords at once, or an unknown keyword.
    """

    state_schema = LearningState
    trace_policy = TracePolicy(process_inputs=omit_payload)

    def __init__(self, machine: LearningMachine | None = None, **options: Any) -> None:
        super().__init__()
        if machine is not None and options:
            raise TypeError(
                f"LearningMiddleware takes a machine or its keywords, not both: {', '.join(options)}"
            )
        if machine is not None and not isinstance(machine, LearningMachine):
            raise TypeError(f"LearningMiddleware(machine={machine!r}) must be a LearningMachine")
        self.machine = machine or LearningMachine(**options)
        self.tools = self.machine.tools
        start_watching()

    # Before the run

    def before_agent(  # type: ignore[override]  # LangGraph injects the third argument
        self, state: LearningState, runtime: Any, config: RunnableConfig
    ) -> dict[str, Any]:
        begun = self._begin(state, runtime, config)
        if isinstance(begun, dict):
            return begun
        return self._opened(begun, portal().run_sync(self._recall(begun, state["messages"])), state)

    async def abefore_agent(  # type: ignore[override]  # LangGraph injects the third argument
        self, state: LearningState, runtime: Any, config: RunnableConfig
    ) -> dict[str, Any]:
        begun = self._begin(state, runtime, config)
        if isinstance(begun, dict):
            return begun
        return self._opened(begun, await portal().run(self._recall(begun, state["messages"])), state)

    def _begin(self, state: LearningState, runtime: Any, config: RunnableConfig) -> OpenRun | dict[str, Any]:
        """The run that starts, or the state update that settles it without recall."""
        around = ambient_run.get()
        if around is not None:
            return {"learning_run": replace(around, nested=True).as_state(self.machine.seal)}
        identity = resolve_identity(
            self.machine.settings,
            config,
            runtime,
            agent_id=self.machine.agent_id,
            claimed=self.machine.claimed_identity,
        )
        if not identity.is_somebody:
            emit(
                "run_skipped",
                reason="nobody: no user_id in context or configurable",
                agent_id=identity.agent_id,
            )
            return {"learning_run": {}}
        run_id = getattr(runtime.execution_info, "run_id", None) or config.get("run_id") or uuid.uuid4()
        return OpenRun(
            identity=identity,
            run_id=str(run_id),
            started_at=now(),
            first_message_id=first_of_input(state["messages"]),
            knowledge="",
        )

    async def _recall(self, run: OpenRun, messages: Sequence[BaseMessage]) -> OpenRun:
        return await with_knowledge(self.machine, run, question_of(messages))

    def _opened(self, run: OpenRun, known: OpenRun, state: LearningState) -> dict[str, Any]:
        trace = open_trace(known, self._ended_early, from_start=True)
        trace.see(messages_of_run(state["messages"], known.first_message_id))
        return {"learning_run": known.as_state(self.machine.seal)}

    # During the run

    def wrap_model_call(
        self, request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], ModelResponse[Any]]
    ) -> ModelResponse[Any]:
        response = handler(self._informed(request))
        self._saw(request.state, response)
        return response

    async def awrap_model_call(
        self,
        request: ModelRequest[Any],
        handler: Callable[[ModelRequest[Any]], Awaitable[ModelResponse[Any]]],
    ) -> ModelResponse[Any]:
        response = await handler(self._informed(request))
        self._saw(request.state, response)
        return response

    def _informed(self, request: ModelRequest[Any]) -> ModelRequest[Any]:
        """The request with what is known as the last block of its system message, after all that may be cached."""
        run = self._run(request.state)
        if run is None:
            return request
        self._trace(request.state)
        if not run.knowledge:
            return request
        blocks = list(request.system_message.content_blocks) if request.system_message else []
        lead = "\n\n" if blocks else ""
        blocks.append({"type": "text", "text": lead + run.knowledge})
        return request.override(system_message=SystemMessage(content_blocks=blocks))

    def wrap_tool_call(
        self, request: ToolCallRequest, handler: Callable[[ToolCallRequest], ToolMessage | Command[Any]]
    ) -> ToolMessage | Command[Any]:
        run = self._run(request.state)
        if run is None:
            return handler(request)
        with inside(run):
            result = handler(request)
        self._saw(request.state, result)
        return result

    async def awrap_tool_call(
        self,
        request: ToolCallRequest,
        handler: Callable[[ToolCallRequest], Awaitable[ToolMessage | Command[Any]]],
    ) -> ToolMessage | Command[Any]:
        run = self._run(request.state)
        if run is None:
            return await handler(request)
        with inside(run):
            result = await handler(request)
        self._saw(request.state, result)
        return result

    def _run(self, state: Any) -> OpenRun | None:
        """The run in a state, or `None` for nobody."""
        return OpenRun.from_state(state, self.machine.seal)

    def _own_run(self, state: Any) -> OpenRun | None:
        """The run in a state if it is this agent's to record."""
        run = self._run(state)
        return None if run is None or run.nested else run

    def _trace(self, state: Any) -> Trace | None:
        """The open trace of this run, opened again where it was resumed in another process."""
        run = self._own_run(state)
        if run is None:
            return None
        trace = open_trace(run, self._ended_early, from_start=False)
        trace.see(messages_of_run(state["messages"], run.first_message_id))
        return trace

    def _saw(self, state: Any, seen: Any) -> None:
        trace = self._trace(state)
        if trace is None:
            return
        if isinstance(seen, ExtendedModelResponse):
            seen = seen.model_response
        if isinstance(seen, ModelResponse):
            trace.saw_answer(seen.result)
        elif isinstance(seen, AIMessage):
            trace.saw_answer([seen])
        elif isinstance(seen, BaseMessage):
            trace.see([seen])

    # After the run

    def after_agent(self, state: LearningState, runtime: Any) -> None:
        if (ended := self._ended(state)) is not None:
            portal().run_sync(self.machine.record(*ended))

    async def aafter_agent(self, state: LearningState, runtime: Any) -> None:
        if (ended := self._ended(state)) is not None:
            await portal().run(self.machine.record(*ended))

    def _ended(self, state: LearningState) -> tuple[Any, dict[str, Any]] | None:
        run = self._own_run(state)
        if run is None:
            return None
        present = messages_of_run(state["messages"], run.first_message_id)
        trace = close_trace(run)
        status: RunStatus = "completed"
        messages = present
        if trace is not None:
            answers = sum(1 for message in present if isinstance(message, AIMessage))
            # An answer that no model gave was put there by a middleware that ended the run.
            if trace.from_start and answers > trace.answers and isinstance(present[-1], AIMessage):
                status = "blocked"
            trace.see(present)
            messages = list(trace.messages.values())
        return run.identity, run_as_json(run, status, messages)

    def _ended_early(self, trace: Trace, status: RunStatus, error: BaseException | None) -> None:
        run = run_as_json(trace.run, status, trace.messages.values(), error=error)
        self.machine.record_later(trace.run.identity, run)


async def with_knowledge(machine: LearningMachine, run: OpenRun, question: str) -> OpenRun:
    """The run with what is known that bears on its question. Runs in the portal."""
    rendered = await machine.recall(run.identity, question)
    return OpenRun(
        identity=run.identity,
        run_id=run.run_id,
        started_at=run.started_at,
        first_message_id=run.first_message_id,
        knowledge=rendered.text,
        exposures=[{"memory_id": memory.memory_id, "version": memory.version} for memory in rendered.shown],
    )
