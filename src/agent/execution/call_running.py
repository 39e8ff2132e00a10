"""How middleware and node run what the gate let through, in both colours."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine, Generator
from concurrent.futures import Future
from typing import Any, TypeAlias, TypeVar

from langchain_core.messages import ToolMessage
from langchain_core.runnables import RunnableConfig
from langgraph.prebuilt.tool_node import ToolCallRequest
from langgraph.types import Command

from agent.database.supabase import SupabaseDatabase
from agent.execution.call_gate import CallGate
from agent.execution.call_permits import running_with
from agent.execution.execution_records import Permit
from agent.execution.safe_executor import SafeExecutor
from agent.execution.taint import call_around
from agent.identity import Identity
from agent.learning.run_identity import DEFAULT_AGENT, graph_of, resolve_identity
from agent.learning.run_watch import ambient_run, is_inside
from agent.portal import portal

T = TypeVar("T")
Steps: TypeAlias = Generator[Coroutine[Any, Any, Any], Any, T]
"""Work of a node: what is yielded is done in the portal, all else in the node's own context, where LangGraph wants its
interrupts to be raised."""
Result: TypeAlias = ToolMessage | Command[Any]


def driven(steps: Steps[T]) -> T:
    """Run steps from a thread."""
    try:
        work = next(steps)
        while True:
            work = steps.send(portal().run_sync(work))
    except StopIteration as done:
        result: T = done.value
        return result


async def adriven(steps: Steps[T]) -> T:
    """Run steps from a loop."""
    try:
        work = next(steps)
        while True:
            work = steps.send(await portal().run(work))
    except StopIteration as done:
        result: T = done.value
        return result


def as_approved(request: ToolCallRequest, permit: Permit) -> ToolCallRequest:
    """The call with the arguments that were allowed or approved."""
    arguments = dict(permit.assessment.arguments)
    return request.override(tool_call={**request.tool_call, "args": arguments})


def run_call(
    gate: CallGate,
    permit: Permit,
    request: ToolCallRequest,
    handler: Callable[[ToolCallRequest], Result],
    *,
    tainted: bool,
) -> Result:
    """Run a LangChain tool with a permit, and enter how it ended.

    Args:
        tainted: whether the caller has read untrusted text; agents inside the tool start with that.
    """
    around = call_around(tainted=tainted, names=gate.tools.untrusted_tools)
    with around as inside, running_with(permit):
        try:
            result = handler(request)
        except BaseException as error:  # entered as it ended, and raised on, interrupts included
            portal().run_sync(gate.decided.settle_error(permit, error))
            raise
    return portal().run_sync(gate.decided.settle_foreign(permit, result, read=inside[0]))


async def arun_call(
    gate: CallGate,
    permit: Permit,
    request: ToolCallRequest,
    handler: Callable[[ToolCallRequest], Awaitable[Result]],
    *,
    tainted: bool,
) -> Result:
    """The async form of `run_call`."""
    around = call_around(tainted=tainted, names=gate.tools.untrusted_tools)
    with around as inside, running_with(permit):
        try:
            result = await handler(request)
        except Exception as error:  # entered as it ended, and raised on, interrupts included
            await portal().run(gate.decided.settle_error(permit, error))
            raise
        except BaseException as error:  # a cancelled task cannot wait any more, so the entry is handed over
            portal().submit(gate.decided.settle_error(permit, error)).add_done_callback(_retrieve)
            raise
    return await portal().run(gate.decided.settle_foreign(permit, result, read=inside[0]))


def _retrieve(future: Future[None]) -> None:
    if not future.cancelled():
        future.exception()


def thread_of(config: RunnableConfig) -> str | None:
    """The thread that a graph runs in."""
    thread_id = (config.get("configurable") or {}).get("thread_id")
    return str(thread_id) if thread_id else None


def user_of(runtime: Any) -> str | None:
    """Whom the LangGraph server authenticated for this very run, which may be a resume by somebody else."""
    user = getattr(getattr(runtime, "server_info", None), "user", None)
    identity = getattr(user, "identity", None)
    return str(identity) if identity else None


def identity_of_run(
    executor: SafeExecutor, runtime: Any, config: RunnableConfig, *, agent_id: str | None
) -> Identity:
    """Whom a run that starts now is for: as said by server, context or configuration, else as the run around it.

    Rules, budgets and the kill switch go by the agent's name. So it is the one that the developer gave, or the graph's
    on its server, and never one from the metadata of a run, where clients may write.
    """
    agent_id = agent_id or graph_of(runtime, config) or DEFAULT_AGENT
    database = executor.database
    claimed = database.claimed_identity if isinstance(database, SupabaseDatabase) else None

    def named(*, default: bool) -> Identity:
        return resolve_identity(
            executor.settings, config, runtime, agent_id=agent_id, claimed=claimed, use_default=default
        )

    around = ambient_run.get()
    if around is not None and is_inside(around):
        own = named(default=False)
        if not own.is_somebody:
            return around.identity.with_(
                session_id=own.session_id, agent_id=own.agent_id, run_id=around.run_id
            )
    identity = named(default=True)
    run_id = getattr(getattr(runtime, "execution_info", None), "run_id", None) or config.get("run_id")
    return identity.with_(run_id=str(run_id)) if run_id else identity
