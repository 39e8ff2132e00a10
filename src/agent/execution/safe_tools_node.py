"""The executor as a node for any `StateGraph`, in the place of a `ToolNode`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.runnables import Runnable, RunnableConfig, RunnableLambda
from langchain_core.tools import BaseTool
from langgraph.prebuilt import ToolNode
from langgraph.prebuilt.tool_node import ToolCallRequest
from langgraph.runtime import get_runtime
from langgraph.types import Command

from agent.approval.risk import Risk
from agent.errors import ConfigurationError, InvalidRequest
from agent.execution.call_gate import Caller, CallGate, last_calls
from agent.execution.call_running import (
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
from agent.execution.safe_executor import SafeExecutor
from agent.portal import portal


@dataclass(frozen=True, kw_only=True)
class _Decided:
    """What the calls of this node's message are held to."""

    caller: Caller
    calls: Mapping[str, Any]


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

    Args:
        tools: LangChain tools, or functions.
        executor: `None`: `agent.execution.safe_executor.safe_executor`.
        risks: as for `SafeToolsMiddleware`.
        untrusted_tools: likewise.
        messages_key: the key of the state that holds the messages.
        agent_id: likewise.
        name: of the node in traces.

    Raises:
        ConfigurationError: no tools, or a risk that is none.
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
        gate.tools.update(self.node.tools_by_name)

    def run(self, state: Any, config: RunnableConfig) -> Any:
        """Decide, pause where people are asked, run."""
        token = _decided.set(driven(self._decide(state, config)))
        try:
            return self.node.invoke(state, config)
        finally:
            _decided.reset(token)

    async def arun(self, state: Any, config: RunnableConfig) -> Any:
        """The async form of `run`."""
        token = _decided.set(await adriven(self._decide(state, config)))
        try:
            return await self.node.ainvoke(state, config)
        finally:
            _decided.reset(token)

    def _decide(self, state: Any, config: RunnableConfig) -> Steps[_Decided]:
        messages = (
            state[self.messages_key] if isinstance(state, Mapping) else getattr(state, self.messages_key)
        )
        message = last_calls(messages)
        if message is None:
            raise InvalidRequest("the last message calls no tools; send only such messages to this node")
        runtime = get_runtime()
        identity = identity_of_run(self.gate.executor, runtime, config, agent_id=self.agent_id)
        caller = Caller(identity=identity, thread_id=thread_of(config), tainted=self.gate.taints(messages))
        turn = yield from self.gate.turn(
            message, caller, config, user_id=user_of(runtime), paused_before=_answered_before(messages)
        )
        return _Decided(caller=turn.caller, calls=self.gate.frozen(turn))

    def _wrap(
        self, request: ToolCallRequest, handler: Callable[[ToolCallRequest], ToolMessage | Command[Any]]
    ) -> ToolMessage | Command[Any]:
        admitted = portal().run_sync(self._admitted(request, _decided.get()))
        if not isinstance(admitted, Permit):
            return admitted
        return run_call(self.gate, admitted, as_approved(request, admitted), handler)

    async def _awrap(
        self,
        request: ToolCallRequest,
        handler: Callable[[ToolCallRequest], Awaitable[ToolMessage | Command[Any]]],
    ) -> ToolMessage | Command[Any]:
        admitted = await portal().run(self._admitted(request, _decided.get()))
        if not isinstance(admitted, Permit):
            return admitted
        return await arun_call(self.gate, admitted, as_approved(request, admitted), handler)

    async def _admitted(self, request: ToolCallRequest, decided: _Decided | None) -> Permit | ToolMessage:
        call = request.tool_call
        call_id = call.get("id") or ""
        if decided is None:
            raise ConfigurationError("a tool was called outside of the node that decides on it")
        return await self.gate.admitted(
            call["name"], call["args"], call_id, decided.calls.get(call_id), decided.caller
        )


def _answered_before(messages: Sequence[Any]) -> bool:
    """Whether tools were called since the user last spoke, so that there may have been a pause before this one."""
    for message in reversed(messages):
        if isinstance(message, HumanMessage):
            return False
        if isinstance(message, ToolMessage):
            return True
    return False
