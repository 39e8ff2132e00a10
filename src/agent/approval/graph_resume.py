"""Where approvals meet paused graphs: a card is posted once per pause, and the run goes on when its rows are decided.

What raises the interrupt calls `announce_pause` just before it and puts `approval_batch` into the payload. The graph
has `ApprovalPause` among its callbacks, which hears of the pause after it is saved and ties the batch to it. Then the
keeper delivers the cards and, when no row of the batch is pending any more, hands the batch to a resumer. A run is
resumed by the id of its interrupt with `{"approval_batch": …}` alone: what was decided is read from the rows.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from langchain_core.runnables import RunnableConfig
from langgraph.callbacks import GraphCallbackHandler, GraphInterruptEvent
from langgraph.types import Command, Interrupt

from agent.approval.answers import BATCH
from agent.errors import ConflictError, DatabaseUnavailable, InvalidRequest, LearningError, OperatorError
from agent.events import emit
from agent.identity import Identity
from agent.portal import portal

if TYPE_CHECKING:
    from langgraph_sdk.client import LangGraphClient

    from agent.approval.human_approval import HumanApprovalQueue
    from agent.approval.keeper import ResumeOrder
    from agent.database import Database

_ANNOUNCED_MAX = 10_000
_ATTEMPTS = 8  # with doubled pauses from half a second: about a minute
_THREADS_AT_WORK = ("busy",)


@dataclass(frozen=True, kw_only=True)
class Pause:
    """Where a batch of approvals is waited for."""

    batch_id: str
    identity: Identity
    """Whose run waits, as it was resolved when the run began."""
    thread_id: str | None
    assistant_id: str | None
    graph_id: str | None


_announced: OrderedDict[str, Pause] = OrderedDict()
_guard = threading.Lock()


def announce_pause(batch_id: str, identity: Identity, config: RunnableConfig) -> None:
    """Say that the graph running under `config` is about to pause for a batch. Call it before each `interrupt`.

    The pause itself is heard of by `ApprovalPause`, which knows the interrupt's id but neither identity nor thread.
    """
    configurable: Mapping[str, Any] = config.get("configurable") or {}
    metadata: Mapping[str, Any] = config.get("metadata") or {}

    def known(name: str) -> str | None:
        value = configurable.get(name) or metadata.get(name)
        return None if value is None else str(value)

    pause = Pause(
        batch_id=batch_id,
        identity=identity,
        thread_id=known("thread_id"),
        assistant_id=known("assistant_id"),
        graph_id=known("graph_id"),
    )
    with _guard:
        _announced[batch_id] = pause
        _announced.move_to_end(batch_id)
        while len(_announced) > _ANNOUNCED_MAX:  # graphs without `ApprovalPause` leave theirs here
            _announced.popitem(last=False)


def is_watched(config: RunnableConfig) -> bool:
    """Whether the graph running under `config` has an `ApprovalPause` among its callbacks."""
    callbacks = config.get("callbacks")
    handlers = callbacks if isinstance(callbacks, list) else getattr(callbacks, "handlers", ())
    return any(isinstance(handler, ApprovalPause) for handler in handlers)


def batches_of(interrupts: Iterable[Any]) -> Iterator[tuple[str, str]]:
    """The ids of interrupt and batch of each of these interrupts that waits for approvals."""
    for interrupt in interrupts:
        is_object = isinstance(interrupt, Interrupt)
        value = interrupt.value if is_object else interrupt.get("value")
        interrupt_id = interrupt.id if is_object else interrupt.get("id")
        batch_id = value.get(BATCH) if isinstance(value, Mapping) else None
        if isinstance(batch_id, str) and isinstance(interrupt_id, str):
            yield interrupt_id, batch_id


def schemas_of(value: Any) -> dict[str, Any]:
    """JSON schemas of the arguments in the payload of an interrupt, by approval: for a form on another machine."""
    schemas: dict[str, Any] = {}
    decisions = _at(value, "response_schema", "properties", "decisions", "prefixItems")
    requests = _at(value, "action_requests")
    if not isinstance(decisions, list) or not isinstance(requests, list) or len(decisions) != len(requests):
        return schemas
    for request, decision in zip(requests, decisions, strict=True):
        approval_id = _at(request, "approval_id")
        for variant in _at(decision, "oneOf") or ():
            schema = _at(variant, "properties", "edited_action", "properties", "args")
            if approval_id and isinstance(schema, Mapping) and schema.get("properties"):
                schemas[str(approval_id)] = dict(schema)
    return schemas


def _at(value: Any, *path: str) -> Any:
    for name in path:
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


class ApprovalPause(GraphCallbackHandler):
    """Ties the approvals that a pause waits for to that pause, so that they are posted and the run goes on later.

    `graph = create_agent(…).with_config(callbacks=[ApprovalPause()])`. One serves any number of graphs and runs.

    Args:
        database: where the approvals are; `None`: the database of the settings.
    """

    run_inline = True  # the pause is tied before the caller of the graph has its result

    def __init__(self, database: Database | None = None) -> None:
        super().__init__()
        self._given = database
        self._retries: set[concurrent.futures.Future[None]] = set()

    async def on_interrupt(self, event: GraphInterruptEvent) -> None:
        """A pause was saved. Called once per pause, and again when a stale answer meets it, which changes nothing."""
        values = {interrupt.id: interrupt.value for interrupt in event.interrupts}
        for interrupt_id, batch_id in batches_of(event.interrupts):
            with _guard:
                pause = _announced.pop(batch_id, None)
            if pause is None:  # not raised by us in this run: nobody whose approvals we could open
                continue
            try:
                await self._attach(pause, interrupt_id, values[interrupt_id])
            except DatabaseUnavailable as error:
                emit("approval_pause_failed", batch_id=batch_id, reason=str(error), will_retry=True)
                retry = portal().submit(self._attach_later(pause, interrupt_id, values[interrupt_id]))
                self._retries.add(retry)
                retry.add_done_callback(self._retries.discard)
            except LearningError as error:
                emit("approval_pause_failed", batch_id=batch_id, reason=str(error), will_retry=False)

    async def _attach_later(self, pause: Pause, interrupt_id: str, value: Any) -> None:
        for attempt in range(_ATTEMPTS):
            await asyncio.sleep(0.5 * 2**attempt)
            try:
                await self._attach(pause, interrupt_id, value)
            except DatabaseUnavailable as error:
                is_last = attempt == _ATTEMPTS - 1
                if is_last:
                    emit(
                        "approval_pause_failed", batch_id=pause.batch_id, reason=str(error), will_retry=False
                    )
            except LearningError as error:
                emit("approval_pause_failed", batch_id=pause.batch_id, reason=str(error), will_retry=False)
                return
            else:
                return

    async def _attach(self, pause: Pause, interrupt_id: str, value: Any) -> None:
        interrupt = {
            "interrupt_id": interrupt_id,
            "thread_id": pause.thread_id,
            "assistant_id": pause.assistant_id,
            "graph_id": pause.graph_id,
            "identity": pause.identity.as_json(),
            "schemas": schemas_of(value),
        }
        await self._database().call(
            "attach_interrupt", pause.identity, batch_id=pause.batch_id, interrupt=interrupt
        )

    def _database(self) -> Database:
        if self._given is None:
            from agent.database import open_database
            from agent.settings import current_settings

            self._given = open_database(current_settings())
        return self._given


class LoopbackResumer:
    """Resumes runs of the LangGraph server that this process is, through its own API.

    Make it in the server's event loop: the keeper calls it from another, and the API answers in its own.

    Args:
        client: `None`: the loopback client, which needs no login.
    """

    def __init__(self, client: LangGraphClient | None = None) -> None:
        self._client = client
        self._loop = asyncio.get_running_loop()

    async def __call__(self, order: ResumeOrder) -> None:
        """Start the run again where it paused; a pause that is over is left alone.

        Raises:
            OperatorError: the server refused; the keeper tries again later.
            ConflictError: the thread is at work just now; likewise.
        """
        if asyncio.get_running_loop() is self._loop:
            await self._resume(order.batch_id, order.interrupt)
        else:
            work = self._resume(order.batch_id, order.interrupt)
            await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self._loop))

    async def _resume(self, batch_id: str, interrupt: Mapping[str, Any]) -> None:
        from httpx import HTTPError
        from langgraph_sdk.errors import APIError

        thread_id = interrupt.get("thread_id")
        assistant_id = interrupt.get("assistant_id") or interrupt.get("graph_id")
        if not thread_id or not assistant_id:
            # A graph of somebody's own program, which goes on by `resume_when_decided`.
            emit("run_resume_skipped", batch_id=batch_id, reason="no server's thread")
            return
        client = self._connected()
        try:
            thread = await client.threads.get(thread_id)
            if thread.get("status") in _THREADS_AT_WORK:
                raise ConflictError(f"thread {thread_id!r} is at work; it is resumed when it rests")
            state = await client.threads.get_state(thread_id)
            if interrupt.get("interrupt_id") not in set(_pending(state)):
                emit("run_resume_skipped", batch_id=batch_id, reason="the pause is over")
                return
            await client.runs.create(
                thread_id,
                assistant_id,
                command={"resume": {str(interrupt["interrupt_id"]): {BATCH: batch_id}}},
                config={"configurable": _personal(interrupt.get("identity") or {})},
                multitask_strategy="reject",
            )
        except (APIError, HTTPError) as error:
            status = getattr(getattr(error, "response", None), "status_code", None)
            raise OperatorError(
                f"the run of thread {thread_id!r} could not be resumed: {type(error).__name__}"
                f"{f' {status}' if status else ''}. It is tried again, since it may be another server's"
            ) from error
        emit("run_resumed", batch_id=batch_id, thread_id=thread_id)

    def _connected(self) -> LangGraphClient:
        if self._client is None:
            from langgraph_sdk import get_client

            self._client = get_client()
        return self._client


def _pending(state: Mapping[str, Any]) -> Iterator[str]:
    """Ids of all interrupts that a thread's state waits for."""
    for source in (state, *(state.get("tasks") or ())):
        for interrupt in source.get("interrupts") or ():
            if isinstance(interrupt_id := interrupt.get("id"), str):
                yield interrupt_id


def _personal(identity: Mapping[str, Any]) -> dict[str, str]:
    """What the run said of its user when it began; session, agent and run come from the thread."""
    if not identity.get("user_id"):
        return {}
    return {name: str(identity[name]) for name in ("user_id", "tenant_id") if identity.get(name)}


async def resume_when_decided(
    graph: Any,
    config: RunnableConfig,
    *,
    timeout: float | timedelta | None = None,
    identity: Identity | None = None,
    queue: HumanApprovalQueue | None = None,
    context: Any = None,
) -> Any:
    """Wait until the approvals that a paused thread waits for are decided, resume it, and give back its result.

    For graphs in a program of one's own; a LangGraph server's runs are resumed by the server. A thread that pauses for
    approvals again is waited for again. What is not decided before it expires is a no, which the agent is told.

    Args:
        graph: a compiled graph with a checkpointer.
        config: names the thread, as for the run that paused.
        timeout: longest wait in all, in seconds; `None`: until the approvals expire.
        identity: whose tenant the approvals are in; `None`: the settings' tenant.
        queue: where the approvals are; `None`: those of the settings.
        context: the runtime context of the run, which LangGraph does not keep over a pause.

    Raises:
        InvalidRequest: the thread waits for no approval.
        TimeoutError: not decided in time; the approvals stay open and this may be called again.
    """
    if queue is None:
        from agent.approval.human_approval import human_approval_queue

        queue = human_approval_queue
    if identity is None:
        from agent.settings import current_settings

        identity = Identity(tenant_id=current_settings().tenant)
    seconds = timeout.total_seconds() if isinstance(timeout, timedelta) else timeout
    deadline = None if seconds is None else time.monotonic() + seconds
    result: Any = None
    answered: set[str] = set()
    while True:
        state = await graph.aget_state(config)
        paused = [pair for pair in batches_of(state.interrupts) if pair[0] not in answered]
        if not paused:
            if not answered:
                raise InvalidRequest(
                    "the thread waits for no approval. Call this after a run that ended with an interrupt"
                )
            return result
        answers = {}
        for interrupt_id, batch_id in paused:
            await _decided(queue, batch_id, identity, deadline)
            answers[interrupt_id] = {BATCH: batch_id}
        # An interrupt has a new id each time, so one that is here again would be answered alike for ever.
        answered.update(answers)
        more = {} if context is None else {"context": context}
        result = await graph.ainvoke(Command(resume=answers), config, **more)


async def _decided(
    queue: HumanApprovalQueue, batch_id: str, identity: Identity, deadline: float | None
) -> None:
    """Return when no approval of the batch is pending."""
    approvals = await queue.of_batch(batch_id, identity)
    for approval in approvals:
        while approval.is_open:
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                raise TimeoutError(f"approval {approval.approval_id} was not decided in time; it stays open")
            approval = await queue.wait(  # noqa: PLW2901 - the same approval, later
                approval.approval_id, identity, timedelta(seconds=60 if left is None else min(left, 60))
            )
