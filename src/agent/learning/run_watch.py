"""Sees how runs end that no hook sees: paused by an interrupt, failed, cancelled.

`after_agent` is not called then. LangChain calls callback handlers at the end of every graph, whoever started it; this
one is attached to each by LangChain's configure hook and does nothing but look up whether a run of ours is open in it.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.tracers.context import register_configure_hook
from langgraph.errors import GraphBubbleUp

from agent import telemetry
from agent.learning.run_record import OpenRun, RunStatus, key_of

ambient_run: ContextVar[OpenRun | None] = ContextVar("agent_ambient_run", default=None)
"""The run around the code that runs now: set for tools of a learning agent and for the graph inside `with_learning`."""

_inside: list[str] = []
"""Ids of the runs that are some code's ambient run now, once for each block."""

_BLOCKING_ERRORS = frozenset(
    {
        "PIIDetectionError",
        "ModelCallLimitExceededError",
        "ToolCallLimitExceededError",
        "OpenAIModerationError",
    }
)


@contextlib.contextmanager
def inside(run: OpenRun) -> Iterator[None]:
    """Make `run` the ambient run for this block and what it starts."""
    token = ambient_run.set(run)
    _inside.append(run.run_id)
    try:
        with telemetry.within(run.identity, run.run_id):
            yield
    finally:
        _inside.remove(run.run_id)
        ambient_run.reset(token)


def is_inside(run: OpenRun) -> bool:
    """Whether a block of `inside` for this run is still open; a task it left behind may outlive it."""
    return run.run_id in _inside


@dataclass(frozen=True)
class _Root:
    """A graph, or another chain, that runs now and was started from outside."""

    run_id: UUID
    traces: dict[str, Trace] = field(default_factory=dict)


@dataclass(kw_only=True)
class Trace:
    """What was seen of an open run in this process."""

    run: OpenRun
    close: Callable[[Trace, RunStatus, BaseException | None], None]
    """Called once if the graph ends while the run is open."""
    from_start: bool
    """Whether this process saw it start; `False` after a resume."""
    messages: dict[str, BaseMessage] = field(default_factory=dict)
    """By key, in the order they were first seen."""
    answers: int = 0
    """Answers of the model that were seen."""
    recall: Future[OpenRun] | None = None
    """What gives the run with what is known, where recall goes on beside the graph."""
    kept: Mapping[str, Any] | None = None
    """What was put into the graph's state for `run`."""

    def see(self, messages: Iterable[BaseMessage]) -> None:
        """Keep messages; a later one of the same key replaces the earlier."""
        for message in messages:
            self.messages[key_of(message)] = message

    def saw_answer(self, messages: Iterable[BaseMessage]) -> None:
        """Keep what a model answered."""
        for message in messages:
            if isinstance(message, AIMessage):
                self.answers += 1
        self.see(messages)


_ROOTS_MAX = 10_000
"""Roots that are remembered. One whose end nobody tells, such as a stream that was not read out, goes at last."""

_current_root: ContextVar[_Root | None] = ContextVar("agent_current_root", default=None)
_roots: OrderedDict[UUID, _Root] = OrderedDict()
_traces: dict[str, Trace] = {}


class _RunWatch(BaseCallbackHandler):
    """Notices ends; all methods are quick and do no I/O."""

    run_inline = True  # in the caller's context, where the graph's tasks inherit what is set here
    ignore_llm = ignore_chat_model = ignore_agent = ignore_retriever = ignore_retry = ignore_custom_event = (
        True
    )

    def on_chain_start(self, serialized: Any, inputs: Any, *, run_id: UUID, **more: Any) -> None:
        root = _roots[run_id] = _Root(run_id)
        _current_root.set(root)
        if len(_roots) > _ROOTS_MAX:
            _roots.popitem(last=False)

    def on_chain_end(self, outputs: Any, *, run_id: UUID, **more: Any) -> None:
        _close_all(run_id, "interrupted", None)

    def on_chain_error(self, error: BaseException, *, run_id: UUID, **more: Any) -> None:
        _close_all(run_id, status_of(error), error)


def status_of(error: BaseException) -> RunStatus:
    """How a run ended that ended with this."""
    if isinstance(error, GraphBubbleUp):
        return "interrupted"
    if isinstance(error, asyncio.CancelledError | GeneratorExit | KeyboardInterrupt):
        return "cancelled"
    if any(kind.__name__ in _BLOCKING_ERRORS for kind in type(error).__mro__):
        return "blocked"
    return "failed"


def _close_all(run_id: UUID, status: RunStatus, error: BaseException | None) -> None:
    root = _roots.pop(run_id, None)
    if root is None:
        return
    for trace in list(root.traces.values()):
        if _traces.get(trace.run.run_id) is trace:
            del _traces[trace.run.run_id]
        trace.close(trace, status, None if status == "interrupted" else error)
    root.traces.clear()


@functools.cache
def start_watching() -> None:
    """Attach the handler to every graph of this process; once, at the first machine that records."""
    watch = _RunWatch()  # without state of its own, so that one serves all contexts
    register_configure_hook(
        ContextVar[BaseCallbackHandler | None]("agent_run_watch", default=watch), inheritable=False
    )


def open_trace(
    run: OpenRun, close: Callable[[Trace, RunStatus, BaseException | None], None], *, from_start: bool
) -> Trace:
    """The trace of a run: the one that is open here, or a new one tied to the graph that runs now."""
    if not from_start and (found := _open_trace_of(run)) is not None:
        return found
    trace = Trace(run=run, close=close, from_start=from_start)
    root = _root_around(run)
    if root is not None:
        root.traces[run.run_id] = trace
        _traces[run.run_id] = trace
    return trace


def trace_of(run_id: Any) -> Trace | None:
    """The open trace of the run with this id, where it was opened here and its graph is known."""
    return _traces.get(run_id) if isinstance(run_id, str) else None


def _open_trace_of(run: OpenRun) -> Trace | None:
    """The trace that is open for a run. Ids of runs may be a caller's: one of another user with this id is none."""
    root = _root_around(run)
    for trace in (_traces.get(run.run_id), root.traces.get(run.run_id) if root is not None else None):
        if trace is not None and trace.run.identity == run.identity:
            return trace
    return None


def _root_around(run: OpenRun) -> _Root | None:
    """The graph that runs now. A LangGraph server reads the stream of a graph in contexts of its own, to which nothing
    comes that the start of the graph set; there graph and run have one id."""
    root = _current_root.get()
    if root is not None and root.run_id in _roots:
        return root
    try:
        return _roots.get(UUID(run.run_id))
    except ValueError:  # the id of a run may be any text
        return None


def close_trace(run: OpenRun) -> Trace | None:
    """A run ended in the ordinary way: forget it and give back what was seen, or `None`."""
    trace = _open_trace_of(run)
    root = _root_around(run)
    for traces in (_traces, root.traces if root is not None else {}):
        if trace is not None and traces.get(run.run_id) is trace:
            del traces[run.run_id]
    return trace
