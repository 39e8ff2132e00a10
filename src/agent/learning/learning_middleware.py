"""Load knowledge before, learn after every execution: the middleware for `create_agent`."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from concurrent.futures import Future
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

from agent.learning.machine import LearningMachine
from agent.learning.run_opening import open_run, with_knowledge
from agent.learning.run_record import (
    OpenRun,
    RunInput,
    RunStatus,
    input_of,
    kept_in,
    messages_of_run,
    run_as_json,
)
from agent.learning.run_watch import Trace, close_trace, inside, open_trace, start_watching, trace_of
from agent.learning.tool_experience_notices import has_failed, with_what_is_known
from agent.portal import portal


def _latest(_before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """Two of these around one agent write the run in one step."""
    return after


class LearningState(AgentState[Any]):
    """What the middleware keeps in the graph's state: no part of input and output, kept over interrupts, and to be
    seen by whoever may read the thread's state or stream its values."""

    learning_run: NotRequired[Annotated[dict[str, Any], PrivateStateAttr, _latest]]
    """`OpenRun.as_state()`; empty for nobody."""


class LearningMiddleware(AgentMiddleware[Any, Any, Any]):
    """Gives an agent what is known of its user and learns from what happens.

    Put it last in the list: then what is known comes after all other text of the system message, which a provider may
    cache. Two database calls a run; learning itself is done by a worker afterwards. It is also the sequence that holds
    only itself, so that `middleware=machine.middleware()` is all that an agent needs.

    Args:
        machine: what to learn and where; `None` makes one of the keywords.
        **options: the keywords of `LearningMachine`, where no machine is given.

    Raises:
        ConfigurationError: as `LearningMachine`.
        TypeError: a machine and keywords at once, or an unknown keyword.
    """

    state_schema = LearningState
    trace_policy = TracePolicy(process_inputs=omit_payload, process_outputs=omit_payload)

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

    def __iter__(self) -> Iterator[LearningMiddleware]:
        yield self

    def __len__(self) -> int:
        return 1

    def __getitem__(self, position: int) -> LearningMiddleware:
        return (self,)[position]

    # Before the run

    def before_agent(  # type: ignore[override]  # LangGraph injects the third argument
        self, state: LearningState, runtime: Any, config: RunnableConfig
    ) -> dict[str, Any]:
        opened = open_run(self.machine, state["messages"], config, runtime)
        if opened is None or opened[0].nested:
            return self._not_own(opened)
        run, started = opened
        if (opening := self._opening(run, started, state)) is not None:
            return opening
        return self._known(portal().run_sync(with_knowledge(self.machine, run, started.question)), state)

    async def abefore_agent(  # type: ignore[override]  # LangGraph injects the third argument
        self, state: LearningState, runtime: Any, config: RunnableConfig
    ) -> dict[str, Any]:
        opened = open_run(self.machine, state["messages"], config, runtime)
        if opened is not None:
            await self.machine.ready_seal()
        if opened is None or opened[0].nested:
            return self._not_own(opened)
        run, started = opened
        if (opening := self._opening(run, started, state)) is not None:
            return opening
        return self._known(await portal().run(with_knowledge(self.machine, run, started.question)), state)

    def _not_own(self, opened: tuple[OpenRun, RunInput] | None) -> dict[str, Any]:
        """The state for nobody's run, or for one that an agent around this one records."""
        return {"learning_run": opened[0].as_state(self.machine.seal) if opened is not None else {}}

    def _opening(self, run: OpenRun, started: RunInput, state: LearningState) -> dict[str, Any] | None:
        """The state while recall goes on beside the graph, for the first model call to wait for; `None` where that call
        would not find it."""
        run = replace(run, recalled=False)
        opening = self._known(run, state)
        trace = trace_of(run.run_id)
        if trace is None or trace.kept is not opening["learning_run"]:  # another run may have the same id
            return None
        # The portal may have to wait for this thread's interpreter lock: so the question is sent from here.
        begun = self.machine.begin_recall(run.identity, started.question)
        trace.recall = portal().submit(with_knowledge(self.machine, run, started.question, begun))
        return opening

    def _known(self, run: OpenRun, state: LearningState) -> dict[str, Any]:
        trace = open_trace(run, self._ended_early, from_start=True)
        trace.see(messages_of_run(state["messages"], run))
        return {"learning_run": self._keep(run, trace)}

    def _keep(self, run: OpenRun, trace: Trace | None) -> dict[str, Any]:
        kept = run.as_state(self.machine.seal)
        if trace is not None:
            trace.run, trace.kept = run, kept
        return kept

    # During the run

    def wrap_model_call(
        self, request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], ModelResponse[Any]]
    ) -> ModelResponse[Any] | ExtendedModelResponse[Any]:
        run = _seen(request.state) or self.machine.run_of(request.state)
        trace = self._trace(run, request.state)
        if run is None or run.recalled:
            response = handler(_informed(request, run))
            _saw(trace, response)
            return response
        recall = self._recall(run, trace, request.state)
        run = recall.result()
        response = handler(_informed(request, run))
        return self._keeping(run, trace, response)

    def awrap_model_call(
        self,
        request: ModelRequest[Any],
        handler: Callable[[ModelRequest[Any]], Awaitable[ModelResponse[Any]]],
    ) -> Coroutine[Any, Any, ModelResponse[Any] | ExtendedModelResponse[Any]]:
        # A function that gives a coroutine, and no coroutine function: LangChain wraps each hook for LangSmith, and
        # around a coroutine function that costs two trips to a thread pool per model call, traced or not.
        return self._awrap_model_call(request, handler)

    async def _awrap_model_call(
        self,
        request: ModelRequest[Any],
        handler: Callable[[ModelRequest[Any]], Awaitable[ModelResponse[Any]]],
    ) -> ModelResponse[Any] | ExtendedModelResponse[Any]:
        run = _seen(request.state) or await self.machine.arun_of(request.state)
        trace = self._trace(run, request.state)
        if run is None or run.recalled:
            response = await handler(_informed(request, run))
            _saw(trace, response)
            return response
        recall = self._recall(run, trace, request.state)
        # Shielded: a call that is given up may be made again, and what is under way must come to its end.
        run = recall.result() if recall.done() else await asyncio.shield(asyncio.wrap_future(recall))
        response = await handler(_informed(request, run))
        return self._keeping(run, trace, response)

    def _recall(self, run: OpenRun, trace: Trace | None, state: Any) -> Future[OpenRun]:
        """The recall that began with the run, or one that begins now: where the run was paused before its first model
        call."""
        if trace is not None and trace.recall is not None:
            return trace.recall
        question = input_of(messages_of_run(state["messages"], run)).question
        recall = portal().submit(with_knowledge(self.machine, run, question))
        if trace is not None:
            trace.recall = recall
        return recall

    def _keeping(
        self, run: OpenRun, trace: Trace | None, response: ModelResponse[Any]
    ) -> ExtendedModelResponse[Any]:
        """The response of the first model call, and what was known for it, kept for the rest of the run."""
        _saw(trace, response)
        return ExtendedModelResponse(
            model_response=response, command=Command(update={"learning_run": self._keep(run, trace)})
        )

    def wrap_tool_call(
        self, request: ToolCallRequest, handler: Callable[[ToolCallRequest], ToolMessage | Command[Any]]
    ) -> ToolMessage | Command[Any]:
        run = _seen(request.state) or self.machine.run_of(request.state)
        if run is None:
            return handler(request)
        trace = self._trace(run, request.state)
        with inside(run):
            result = handler(request)
        if self.machine.settings.tool_warnings and isinstance(result, ToolMessage) and has_failed(result):
            result = portal().run_sync(self._with_what_is_known(run, request, result))
        _saw(trace, result)
        return result

    def awrap_tool_call(
        self,
        request: ToolCallRequest,
        handler: Callable[[ToolCallRequest], Awaitable[ToolMessage | Command[Any]]],
    ) -> Coroutine[Any, Any, ToolMessage | Command[Any]]:
        return self._awrap_tool_call(request, handler)  # as `awrap_model_call`

    async def _awrap_tool_call(
        self,
        request: ToolCallRequest,
        handler: Callable[[ToolCallRequest], Awaitable[ToolMessage | Command[Any]]],
    ) -> ToolMessage | Command[Any]:
        run = _seen(request.state) or await self.machine.arun_of(request.state)
        if run is None:
            return await handler(request)
        trace = self._trace(run, request.state)
        with inside(run):
            result = await handler(request)
        if self.machine.settings.tool_warnings and isinstance(result, ToolMessage) and has_failed(result):
            result = await portal().run(self._with_what_is_known(run, request, result))
        _saw(trace, result)
        return result

    def _with_what_is_known(
        self, run: OpenRun, request: ToolCallRequest, failed: ToolMessage
    ) -> Coroutine[Any, Any, ToolMessage]:
        return with_what_is_known(
            self.machine.database,
            run.identity,
            failed,
            earlier=messages_of_run(request.state["messages"], run),
            wait=self.machine.settings.recall_timeout,
        )

    def _trace(self, run: OpenRun | None, state: Any) -> Trace | None:
        """The open trace of a run that is this agent's to record, opened again where it was resumed elsewhere."""
        if run is None or run.nested:
            return None
        trace = open_trace(run, self._ended_early, from_start=False)
        trace.see(messages_of_run(state["messages"], run))
        return trace

    # After the run

    def after_agent(self, state: LearningState, runtime: Any) -> None:
        if (ended := self._ended(state, _seen(state) or self.machine.run_of(state))) is not None:
            self.machine.finish(*ended)

    async def aafter_agent(self, state: LearningState, runtime: Any) -> None:
        if (ended := self._ended(state, _seen(state) or await self.machine.arun_of(state))) is not None:
            await self.machine.afinish(*ended)

    def _ended(self, state: LearningState, run: OpenRun | None) -> tuple[Any, dict[str, Any]] | None:
        if run is None or run.nested:
            return None
        present = messages_of_run(state["messages"], run)
        trace = close_trace(run)
        status: RunStatus = "completed"
        messages = present
        if trace is not None:
            answers = sum(1 for message in present if isinstance(message, AIMessage)) - run.answers_before
            # An answer that no model gave was put there by a middleware that ended the run.
            if trace.from_start and answers > trace.answers and isinstance(present[-1], AIMessage):
                status = "blocked"
            trace.see(present)
            messages = list(trace.messages.values())
        return run.identity, run_as_json(run, status, messages)

    def _ended_early(self, trace: Trace, status: RunStatus, error: BaseException | None) -> None:
        run = run_as_json(trace.run, status, trace.messages.values(), error=error)
        self.machine.record_later(trace.run.identity, run)


def _seen(state: Any) -> OpenRun | None:
    """The open run in a graph's state, where that holds the very object that was put there: its seal needs no look."""
    kept = kept_in(state)
    trace = trace_of(kept.get("run_id")) if kept else None
    return trace.run if trace is not None and trace.kept is kept else None


def _informed(request: ModelRequest[Any], run: OpenRun | None) -> ModelRequest[Any]:
    """The request with what is known as the last block of its system message."""
    if run is None or not run.knowledge:
        return request
    blocks = list(request.system_message.content_blocks) if request.system_message else []
    lead = "\n\n" if blocks else ""
    blocks.append({"type": "text", "text": lead + run.knowledge})
    return request.override(system_message=SystemMessage(content_blocks=blocks))


def _saw(trace: Trace | None, seen: Any) -> None:
    """Keep what a model or a tool gave."""
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
