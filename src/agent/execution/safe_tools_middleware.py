"""The executor around the tools of `create_agent`: nothing dangerous without a yes."""

from __future__ import annotations

import secrets
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Collection, Coroutine, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, NotRequired, cast

from langchain.agents.middleware import (
    AgentMiddleware,
    AgentState,
    ModelRequest,
    ModelResponse,
    TracePolicy,
    omit_payload,
)
from langchain.agents.middleware.types import PrivateStateAttr
from langchain_core.messages import ToolMessage
from langchain_core.runnables import RunnableConfig
from langchain_core.tools import BaseTool
from langgraph.prebuilt.tool_node import ToolCallRequest
from langgraph.types import Command

from agent.approval.risk import Risk
from agent.errors import IdentityError, LearningError
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
from agent.execution.gated_turn import Caller, last_calls
from agent.execution.safe_executor import SafeExecutor
from agent.execution.state_seal import DatabaseSeal
from agent.execution.taint import around_tainted, read_untrusted
from agent.identity import Identity
from agent.portal import portal

_RUNS_KEPT = 200


class SafeState(AgentState[Any]):
    """What the middleware keeps in the graph's state; sealed, because clients of a server may write it."""

    safe_run: NotRequired[Annotated[dict[str, Any], PrivateStateAttr]]
    """Identity, thread, taint and what was decided on each call of the last message."""


class SafeToolsMiddleware(AgentMiddleware[Any, Any, Any]):
    """Runs the tools of an agent only as policy and people allow.

    Calls that need a yes are put together into one interrupt after the model's answer; who may give it is said by the
    policy file, and it may come from any channel or as the answer to the interrupt. What was decided is held to when a
    tool is called. The agent needs a checkpointer, and `with_config(callbacks=[ApprovalPause()])` to be resumed by
    itself. A tool that pauses the graph itself should be listed as READ: what was approved is not run a second time.

    A call of a tool that there is not, or with arguments that the tool would not get as they are written, is refused
    and nobody is asked. So middleware that adds tools to single calls of a model stands before this one.

    Args:
        executor: `None`: `agent.execution.safe_executor.safe_executor`.
        risks: how dangerous each tool is, by name: `"READ"`, `"WRITE"`, `"DESTRUCTIVE"`, `"FORBIDDEN"`. A tool that is
            not named is WRITE and asks. Tools of the executor say it themselves for each call.
        untrusted_tools: names of tools whose results hold text of strangers, such as a web search; `"*"` among them
            means all. After one has answered, every call of the thread counts as one level more dangerous.
        agent_id: the agent's name in records and rules; `None`: the graph's name on its server, else `"agent"`. The
            `name` of `create_agent` is not taken: it comes in metadata, which clients may write.

    Raises:
        ConfigurationError: a risk that is none, names that are no collection, or an executor that is none.
    """

    state_schema = SafeState
    trace_policy = TracePolicy(process_inputs=omit_payload)

    def __init__(
        self,
        executor: SafeExecutor | None = None,
        *,
        risks: Mapping[str, Risk | str] | None = None,
        untrusted_tools: Collection[str] = (),
        agent_id: str | None = None,
    ) -> None:
        super().__init__()
        if executor is None:
            from agent.execution import safe_executor as home

            executor = home.safe_executor
        self.executor = executor
        self.gate = CallGate(executor, risks=risks, untrusted_tools=untrusted_tools)
        self.agent_id = agent_id
        self.tools = []
        self._has_named_unknown = False
        self._seal = DatabaseSeal(lambda: self.executor.database)
        self._written: OrderedDict[str, list[BaseTool]] = OrderedDict()

    # Before the run

    def before_agent(  # type: ignore[override]  # LangGraph injects the third argument
        self, state: SafeState, runtime: Any, config: RunnableConfig
    ) -> dict[str, Any]:
        return driven(self._begin(state, runtime, config))

    async def abefore_agent(  # type: ignore[override]  # LangGraph injects the third argument
        self, state: SafeState, runtime: Any, config: RunnableConfig
    ) -> dict[str, Any]:
        return await adriven(self._begin(state, runtime, config))

    def _begin(self, state: SafeState, runtime: Any, config: RunnableConfig) -> Steps[dict[str, Any]]:
        identity = identity_of_run(self.executor, runtime, config, agent_id=self.agent_id)
        yield self.gate.ready()
        kept = self._kept(state, config, identity) or {}
        outer = read_untrusted.get()
        tainted = (
            bool(kept.get("tainted"))
            or bool(outer and outer[0])
            or around_tainted.get()
            or self.gate.tools.taints(state.get("messages") or ())
        )
        return {
            "safe_run": self._seal.now.sealed(
                {
                    "identity": identity.as_json(),
                    "thread_id": thread_of(config),
                    "tainted": tainted,
                    "pauses": 0,
                    "number": secrets.token_hex(8),
                    "calls": {},
                }
            )
        }

    def _kept(
        self, state: Any, config: RunnableConfig, identity: Identity | None = None
    ) -> dict[str, Any] | None:
        """What the state holds, if we wrote it, for this thread and, where one is given, for this tenant."""
        kept = state.get("safe_run") if isinstance(state, Mapping) else getattr(state, "safe_run", None)
        if not kept:
            return None
        if not self._seal.now.holds(kept) or kept.get("thread_id") != thread_of(config):
            emit("tool_state_refused", thread_id=thread_of(config))
            return None
        if identity is not None and kept["identity"].get("tenant_id") != identity.tenant_id:
            return None
        return dict(kept)

    def _caller(self, kept: Mapping[str, Any]) -> Caller | None:
        try:
            identity = Identity.from_json(kept["identity"])
        except (IdentityError, KeyError):
            return None
        return Caller(identity=identity, thread_id=kept.get("thread_id"), tainted=bool(kept.get("tainted")))

    # The model's answer

    def wrap_model_call(
        self, request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], ModelResponse[Any]]
    ) -> ModelResponse[Any]:
        return handler(self._equipped(request, portal().run_sync(self._written_tools(request.state))))

    def awrap_model_call(
        self,
        request: ModelRequest[Any],
        handler: Callable[[ModelRequest[Any]], Awaitable[ModelResponse[Any]]],
    ) -> Coroutine[Any, Any, ModelResponse[Any]]:
        # A function that gives a coroutine, and no coroutine function: around one LangChain's wrapping for LangSmith
        # takes two trips to a thread pool per call, traced or not.
        return self._awrap_model_call(request, handler)

    async def _awrap_model_call(
        self,
        request: ModelRequest[Any],
        handler: Callable[[ModelRequest[Any]], Awaitable[ModelResponse[Any]]],
    ) -> ModelResponse[Any]:
        return await handler(self._equipped(request, await portal().run(self._written_tools(request.state))))

    def _equipped(self, request: ModelRequest[Any], written: list[BaseTool]) -> ModelRequest[Any]:
        """The request with the tools that agents wrote and people approved."""
        present = {tool.name for tool in request.tools if isinstance(tool, BaseTool)}
        self.gate.tools.by_name.update(
            {tool.name: tool for tool in request.tools if isinstance(tool, BaseTool)}
        )
        self.executor.take_names(
            tool.name for tool in self.gate.tools.by_name.values() if "code_hash" not in (tool.metadata or {})
        )
        self.gate.tools.were_seen = True
        if not self._has_named_unknown and (
            unknown := self.gate.tools.unknown_names([one.name for one in written])
        ):
            self._has_named_unknown = True
            emit("tool_names_unknown", names=unknown)
        more = [tool for tool in written if tool.name not in present]
        return request.override(tools=[*request.tools, *more]) if more else request

    async def _written_tools(self, state: Any) -> list[BaseTool]:
        """Tools that agents wrote, as they were when the run first called its model."""
        await self.gate.ready()
        kept = state.get("safe_run") if isinstance(state, Mapping) else None
        if (
            not kept
            or not self._seal.now.holds(kept)
            or self.executor.registry.get("create_new_tool") is None
        ):
            return []
        identity = Identity.from_json(kept["identity"])
        # The id of a run is known on a server only; the number is this run's wherever it goes on.
        key = "\x1f".join(
            map(str, (identity.tenant_id, identity.session_id, identity.run_id, kept.get("number")))
        )
        if key not in self._written:
            try:
                self._written[key] = list(await self.executor.library.tools(identity))
            except LearningError as error:
                emit("tool_library_unavailable", reason=str(error))
                return []
            while len(self._written) > _RUNS_KEPT:
                self._written.popitem(last=False)
        return self._written[key]

    def _written_names(self, written: Sequence[BaseTool], called: BaseTool | None = None) -> frozenset[str]:
        """Names of the tools that agents wrote, without those that a tool of the developer has too."""
        own = {**self.gate.tools.by_name, **({called.name: called} if called is not None else {})}
        return frozenset(tool.name for tool in written if own.get(tool.name, tool) is tool)

    def after_model(  # type: ignore[override]  # LangGraph injects the third argument
        self, state: SafeState, runtime: Any, config: RunnableConfig
    ) -> dict[str, Any] | None:
        return driven(self._decide(state, runtime, config))

    async def aafter_model(  # type: ignore[override]  # LangGraph injects the third argument
        self, state: SafeState, runtime: Any, config: RunnableConfig
    ) -> dict[str, Any] | None:
        return await adriven(self._decide(state, runtime, config))

    def _decide(self, state: SafeState, runtime: Any, config: RunnableConfig) -> Steps[dict[str, Any] | None]:
        yield self.gate.ready()
        message = last_calls(state["messages"])
        kept = self._kept(state, config)
        caller = self._caller(kept) if kept is not None else None
        if message is None or kept is None or caller is None:
            return None
        written = yield self._written_tools(state)
        caller = replace(
            caller,
            tainted=caller.tainted or self.gate.tools.taints(state["messages"]),
            written=self._written_names(written),
        )
        if caller.tainted and (outer := read_untrusted.get()) is not None:
            outer[0] = True
        turn = yield from self.gate.turn(
            message,
            caller,
            config,
            user_id=user_of(runtime),
            paused_before=bool(kept.get("pauses")),
            earlier=state["messages"],
        )
        pauses = int(kept.get("pauses", 0)) + (1 if turn.asked else 0)
        changed = kept | {
            "tainted": caller.tainted,
            "pauses": pauses,
            "calls": self.gate.decided.frozen(turn),
        }
        return {"safe_run": self._seal.now.sealed(changed)}

    # The tools

    def wrap_tool_call(
        self, request: ToolCallRequest, handler: Callable[[ToolCallRequest], ToolMessage | Command[Any]]
    ) -> ToolMessage | Command[Any]:
        result: Any = portal().run_sync(self._admitted(request))
        if isinstance(result, Permit):
            approved, tainted = as_approved(request, result), self._is_tainted(request)
            result = run_call(self.gate, result, approved, handler, tainted=tainted)
        if self.gate.may_be_told(result):
            result = portal().run_sync(self._told(request, result))
        return cast(Result, result)

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
        result: Any = await portal().run(self._admitted(request))
        if isinstance(result, Permit):
            approved, tainted = as_approved(request, result), self._is_tainted(request)
            result = await arun_call(self.gate, result, approved, handler, tainted=tainted)
        if self.gate.may_be_told(result):
            result = await portal().run(self._told(request, result))
        return cast(Result, result)

    async def _told(self, request: ToolCallRequest, failed: ToolMessage) -> ToolMessage:
        """The message of a failed call with what is known of its error."""
        kept = self._kept(request.state, request.runtime.config)
        caller = self._caller(kept) if kept is not None else None
        if caller is None:
            return failed
        return await self.gate.told(failed, caller.identity, request.state["messages"])

    def _is_tainted(self, request: ToolCallRequest) -> bool:
        """Whether the run has read untrusted text, also since its last decision."""
        kept = self._kept(request.state, request.runtime.config)
        state = request.state
        messages = state.get("messages") if isinstance(state, Mapping) else getattr(state, "messages", None)
        return kept is None or bool(kept.get("tainted")) or self.gate.tools.taints(messages or ())

    async def _admitted(self, request: ToolCallRequest) -> Permit | ToolMessage:
        """The permit for a LangChain tool, or the message of a call that did not run or that the executor ran."""
        call = request.tool_call
        call_id = call.get("id") or ""
        await self.gate.ready()
        kept = self._kept(request.state, request.runtime.config)
        caller = self._caller(kept) if kept is not None else None
        if kept is None or caller is None:
            nobody = Identity(tenant_id=self.executor.settings.tenant)
            why = "the private state of the run is not ours"
            turned = await self.executor.refusals.turn_away(
                call["name"], call["args"], nobody, "refused", why
            )
            return self.gate.decided.message(turned, call_id)
        decided = (kept.get("calls") or {}).get(call_id)
        written = await self._written_tools(request.state)
        if request.tool is not None:  # a process in which a run goes on may have called no model yet
            self.gate.tools.by_name[request.tool.name] = request.tool
        caller = replace(caller, written=self._written_names(written, request.tool))
        return await self.gate.decided.admitted(call["name"], call["args"], call_id, decided, caller)
