"""The executor as a node for any `StateGraph`, in the place of a `ToolNode`."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, Final, cast
from weakref import WeakKeyDictionary

from langchain_core.messages import BaseMessage, HumanMessage, ToolMessage
from langchain_core.runnables import Runnable, RunnableConfig, RunnableLambda
from langchain_core.tools import BaseTool
from langgraph.prebuilt import ToolNode
from langgraph.prebuilt.tool_node import ToolCallRequest
from langgraph.runtime import get_runtime
from langgraph.types import Command

from agent.approval.risk import Risk
from agent.errors import ConfigurationError, IdentityError, InvalidRequest, LearningError
from agent.events import emit
from agent.execution.call_gate import CallGate
from agent.execution.call_running import (
    Result,
    Steps,
    adriven,
    arun_call,
    as_approved,
    driven,
    identity_of_run,
    run_call,
    thread_of,
    user_of,
)
from agent.execution.execution_records import Permit
from agent.execution.foreign_messages import changed_messages
from agent.execution.gated_turn import Caller, Turn, last_calls
from agent.execution.safe_executor import SafeExecutor
from agent.execution.state_seal import DatabaseSeal
from agent.execution.taint import around_tainted, read_untrusted
from agent.identity import Identity
from agent.portal import portal

KEPT: Final = "safe_turn"
"""Key of the state, if the graph has it, for whom the turn is for and whether the thread is tainted."""
_TURN: Final = "agent_turn"
"""Where the same is in the messages of tools."""
_PURPOSE: Final = "agent safe turn"
_RESUMING: Final = "__pregel_resuming"
"""Key of the configuration by which LangGraph says that a run goes on after a pause."""
_THREADS_KEPT: Final = 10_000


@dataclass(frozen=True, kw_only=True)
class _Record:
    """What is known of a thread: whom its turn is for."""

    turn: str | None
    """Id of the user's message that began it."""
    identity: Identity | None
    """`None`: none of its calls may run."""
    tainted: bool


_records: WeakKeyDictionary[SafeExecutor, OrderedDict[str, _Record]] = WeakKeyDictionary()
"""By thread, for graphs that keep neither the key nor the messages."""
_records_lock = threading.Lock()


@dataclass(frozen=True, kw_only=True)
class _Decided:
    """What the calls of this node's message are held to."""

    caller: Caller
    calls: Mapping[str, Any]
    record: _Record


_decided: ContextVar[_Decided | None] = ContextVar("agent_decided_calls", default=None)


def safe_tools(
    tools: Sequence[BaseTool | Callable[..., Any]],
    executor: SafeExecutor | None = None,
    *,
    risks: Mapping[str, Risk | str] | None = None,
    untrusted_tools: Collection[str] = (),
    messages_key: str = "messages",
    agent_id: str | None = None,
    name: str = "tools",
) -> Runnable[Any, Any]:
    """A node that runs the tool calls of the last message, each only as policy and people allow.

    All calls that need a yes are in one interrupt, which the node raises before it runs anything. The graph needs a
    checkpointer, and `with_config(callbacks=[ApprovalPause()])` to be resumed by itself.

    Whom a turn is for is said once, when its first tools are called; whoever resumes it later does not become them, and
    another tenant is refused. That, and whether the thread has read untrusted text, is kept under seal in the messages
    of tools. A graph that removes messages should have the key `safe_turn: NotRequired[dict]` in its state: without it
    this is known in one process only.

    Args:
        tools: LangChain tools, or functions.
        executor: `None`: `agent.execution.safe_executor.safe_executor`.
        risks: as for `SafeToolsMiddleware`.
        untrusted_tools: likewise.
        messages_key: the key of the state that holds the messages.
        agent_id: likewise.
        name: of the node in traces.

    Raises:
        ConfigurationError: no tools, a risk that is none, a name that none of the tools has, or an executor that is
            none.
    """
    if not tools:
        raise ConfigurationError("safe_tools needs at least one tool")
    if executor is None:
        from agent.execution import safe_executor as home

        executor = home.safe_executor
    node = _SafeTools(
        tools,
        CallGate(executor, risks=risks, untrusted_tools=untrusted_tools),
        messages_key=messages_key,
        agent_id=agent_id,
    )
    made: Runnable[Any, Any] = RunnableLambda(node.run, afunc=node.arun, name=name)
    return made


class _SafeTools:
    """The node, in both colours."""

    def __init__(
        self,
        tools: Sequence[BaseTool | Callable[..., Any]],
        gate: CallGate,
        *,
        messages_key: str,
        agent_id: str | None,
    ) -> None:
        self.gate = gate
        self.messages_key = messages_key
        self.agent_id = agent_id
        self.node = ToolNode(
            list(tools), wrap_tool_call=self._wrap, awrap_tool_call=self._awrap, messages_key=messages_key
        )
        gate.tools.by_name.update(self.node.tools_by_name)
        gate.tools.were_seen = True
        if unknown := gate.tools.unknown_names():
            raise ConfigurationError(
                f"risks or untrusted_tools name {', '.join(map(repr, unknown))}, but the tools of this node are "
                f"{', '.join(sorted(gate.tools.by_name))}"
            )
        gate.executor.take_names(
            tool.name for tool in gate.tools.by_name.values() if "code_hash" not in (tool.metadata or {})
        )
        self._seal = DatabaseSeal(lambda: self.gate.executor.database, _PURPOSE)

    def run(self, state: Any, config: RunnableConfig) -> Any:
        """Decide, pause where people are asked, run."""
        decided = driven(self._decide(state, config))
        token = _decided.set(decided)
        try:
            return self._kept(self.node.invoke(state, config), decided)
        finally:
            _decided.reset(token)

    async def arun(self, state: Any, config: RunnableConfig) -> Any:
        """The async form of `run`."""
        decided = await adriven(self._decide(state, config))
        token = _decided.set(decided)
        try:
            return self._kept(await self.node.ainvoke(state, config), decided)
        finally:
            _decided.reset(token)

    def _decide(self, state: Any, config: RunnableConfig) -> Steps[_Decided]:
        messages = self._messages(state)
        message = last_calls(messages)
        if message is None:
            raise InvalidRequest("the last message calls no tools; send only such messages to this node")
        runtime = get_runtime()
        resolved = identity_of_run(self.gate.executor, runtime, config, agent_id=self.agent_id)
        thread_id = thread_of(config)
        yield self.gate.ready()
        start, turn_id = _start_of_turn(messages)
        resumes = bool((config.get("configurable") or {}).get(_RESUMING, True))
        known = self._known(state, messages, thread_id)
        owner = _owner(known, start=start, turn_id=turn_id, resumes=resumes)
        outer = read_untrusted.get()
        tainted = (
            self.gate.tools.taints(messages)
            or any(record.tainted for _, record in known)
            or around_tainted.get()
            or bool(outer and outer[0])
        )
        identity: Identity | None = owner.identity if owner is not None else resolved
        if identity is not None and identity.tenant_id != resolved.tenant_id:
            identity = None
        caller = Caller(identity=identity or resolved, thread_id=thread_id, tainted=tainted)
        if identity is not None and owner is None and resumes:
            try:
                is_anothers = yield self.gate.is_anothers(message, caller)
            except LearningError:  # each call says for itself that it cannot be allowed
                is_anothers = False
            if is_anothers:
                identity = None
        record = _Record(turn=turn_id, identity=identity, tainted=tainted)
        turn: Turn
        if identity is None:
            emit("tool_turn_refused", thread_id=thread_id)
            why = "the turn belongs to another tenant than the one that goes on with it"
            turn = self.gate.refused(message, caller, why, "refused")
        else:
            self._remember(thread_id, record)
            turn = yield from self.gate.turn(
                message,
                caller,
                config,
                user_id=user_of(runtime),
                paused_before=_answered_before(messages),
                earlier=messages,
            )
            record = _Record(turn=turn_id, identity=turn.caller.identity, tainted=tainted)
        return _Decided(caller=turn.caller, calls=self.gate.decided.frozen(turn), record=record)

    def _messages(self, state: Any) -> Any:
        return state[self.messages_key] if isinstance(state, Mapping) else getattr(state, self.messages_key)

    # Whom a turn is for

    def _known(
        self, state: Any, messages: Sequence[Any], thread_id: str | None
    ) -> list[tuple[int | None, _Record]]:
        """All that we said of this thread, with the place of the message where it stands in one, the surest first."""
        found: list[tuple[int | None, _Record]] = []
        for place, message in enumerate(messages):
            if isinstance(message, BaseMessage):
                record = self._opened(message.additional_kwargs.get(_TURN), thread_id)
                found += [(place, record)] if record is not None else []
        kept = state.get(KEPT) if isinstance(state, Mapping) else getattr(state, KEPT, None)
        if (record := self._opened(kept, thread_id)) is not None:
            found.append((None, record))
        with _records_lock:
            record = _records.get(self.gate.executor, OrderedDict()).get(thread_id or "")
        if record is not None:
            found.append((None, record))
        return found

    def _opened(self, kept: Any, thread_id: str | None) -> _Record | None:
        """What was sealed, if we did it for this thread."""
        if not kept or not self._seal.now.holds(kept) or kept.get("thread_id") != thread_id:
            return None
        try:
            identity = Identity.from_json(kept["identity"]) if kept["identity"] is not None else None
        except (IdentityError, KeyError):
            return None
        return _Record(turn=kept.get("turn"), identity=identity, tainted=bool(kept.get("tainted")))

    def _remember(self, thread_id: str | None, record: _Record) -> None:
        if thread_id is None:
            return
        with _records_lock:
            threads = _records.setdefault(self.gate.executor, OrderedDict())
            threads[thread_id] = record
            threads.move_to_end(thread_id)
            while len(threads) > _THREADS_KEPT:
                threads.popitem(last=False)

    def _kept(self, result: Any, decided: _Decided) -> Any:
        """The node's result with what is known of the thread under seal."""
        record, thread_id = decided.record, decided.caller.thread_id
        told: list[BaseMessage] = []

        def see(message: BaseMessage) -> BaseMessage:
            told.append(message)
            return message

        changed_messages(result, see)
        tainted = record.tainted or self.gate.tools.taints(told)
        if tainted and (outer := read_untrusted.get()) is not None:
            outer[0] = True
        if record.identity is not None:
            self._remember(thread_id, replace(record, tainted=tainted))
        try:
            sealed = self._seal.now.sealed(
                {
                    "thread_id": thread_id,
                    "turn": record.turn,
                    "identity": record.identity.as_json() if record.identity is not None else None,
                    "tainted": tainted,
                }
            )
        except InvalidRequest:  # an id that cannot be written
            return result

        def stamped(message: BaseMessage) -> BaseMessage:
            if not isinstance(message, ToolMessage):
                return message
            return message.model_copy(
                update={"additional_kwargs": {**message.additional_kwargs, _TURN: sealed}}
            )

        result = changed_messages(result, stamped)
        if isinstance(result, dict):
            return {**result, KEPT: sealed}
        if isinstance(result, list) and any(isinstance(item, Command) for item in result):
            return [*result, {KEPT: sealed}]
        return result

    def _wrap(
        self, request: ToolCallRequest, handler: Callable[[ToolCallRequest], ToolMessage | Command[Any]]
    ) -> ToolMessage | Command[Any]:
        decided = _decided.get()
        result: Any = portal().run_sync(self._admitted(request, decided))
        if isinstance(result, Permit):
            approved = as_approved(request, result)
            result = run_call(self.gate, result, approved, handler, tainted=_is_tainted(decided))
        if decided is not None and self.gate.may_be_told(result):
            result = portal().run_sync(self._told(request, decided, result))
        return cast(Result, result)

    async def _awrap(
        self,
        request: ToolCallRequest,
        handler: Callable[[ToolCallRequest], Awaitable[ToolMessage | Command[Any]]],
    ) -> ToolMessage | Command[Any]:
        decided = _decided.get()
        result: Any = await portal().run(self._admitted(request, decided))
        if isinstance(result, Permit):
            approved = as_approved(request, result)
            result = await arun_call(self.gate, result, approved, handler, tainted=_is_tainted(decided))
        if decided is not None and self.gate.may_be_told(result):
            result = await portal().run(self._told(request, decided, result))
        return cast(Result, result)

    async def _told(self, request: ToolCallRequest, decided: _Decided, failed: ToolMessage) -> ToolMessage:
        return await self.gate.told(failed, decided.caller.identity, self._messages(request.state))

    async def _admitted(self, request: ToolCallRequest, decided: _Decided | None) -> Permit | ToolMessage:
        call = request.tool_call
        call_id = call.get("id") or ""
        if decided is None:
            raise ConfigurationError("a tool was called outside of the node that decides on it")
        return await self.gate.decided.admitted(
            call["name"], call["args"], call_id, decided.calls.get(call_id), decided.caller
        )


def _is_tainted(decided: _Decided | None) -> bool:
    return decided is None or decided.record.tainted


def _start_of_turn(messages: Sequence[Any]) -> tuple[int | None, str | None]:
    """Place and id of the user's last message; `None` where it is not in the state, or has no id."""
    for place in range(len(messages) - 1, -1, -1):
        if isinstance(messages[place], HumanMessage):
            return place, messages[place].id
    return None, None


def _owner(
    known: Sequence[tuple[int | None, _Record]], *, start: int | None, turn_id: str | None, resumes: bool
) -> _Record | None:
    """What was said first of the turn that goes on here; `None` where it begins here."""
    if start is None:  # the user's message was removed; a run that is no resume speaks for itself
        return known[-1][1] if known and resumes else None
    for place, record in known:
        if (turn_id is not None and record.turn == turn_id) or (place is not None and place > start):
            return record
    return None


def _answered_before(messages: Sequence[Any]) -> bool:
    """Whether tools were called since the user last spoke, so that there may have been a pause before this one."""
    for message in reversed(messages):
        if isinstance(message, HumanMessage):
            return False
        if isinstance(message, ToolMessage):
            return True
    return False
