"""LangMem 0.0.30: its background manager behind a LangGraph agent, on LangGraph's Postgres store."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from contextlib import AsyncExitStack
from typing import Any

from langchain.agents import create_agent
from langchain.agents.middleware import AgentMiddleware, AgentState, ModelRequest, ModelResponse
from langchain_core.messages import SystemMessage
from langgraph.runtime import Runtime
from langgraph.store.base import BaseStore, PutOp
from langgraph.store.postgres.aio import AsyncPostgresStore
from langmem import ReflectionExecutor, create_memory_store_manager

from benchmarks.agent_under_test import USER_ID, Setup, TimedChat

_NAMESPACE = ("memories", USER_ID)
_RECALL_LIMIT = 5


class _RecallAndReflect(AgentMiddleware[AgentState[Any], None, Any]):
    """Its documented pattern: search the store before the model call, submit the conversation after the answer."""

    def __init__(self, store: BaseStore, executor: Any) -> None:
        super().__init__()
        self._store = store
        self._executor = executor
        self.reflections: list[Future[Any]] = []

    async def awrap_model_call(
        self,
        request: ModelRequest[None],
        handler: Callable[[ModelRequest[None]], Awaitable[ModelResponse[Any]]],
    ) -> ModelResponse[Any]:
        found = await self._store.asearch(
            _NAMESPACE, query=str(request.messages[-1].text), limit=_RECALL_LIMIT
        )
        lines = "\n".join(f"- {item.value['content']['content']}" for item in found)
        return await handler(
            request.override(system_message=SystemMessage(f"<memories>\n{lines}\n</memories>"))
        )

    async def aafter_agent(self, state: AgentState[Any], runtime: Runtime[None]) -> None:
        self.reflections.append(self._executor.submit({"messages": state["messages"]}, after_seconds=0))


class LangMemAgent:
    """`create_agent` with recall from the store, and a `ReflectionExecutor` around the memory store manager."""

    name = "LangMem 0.0.30"
    learns_behind = True
    degraded = 0  # a failing search fails the run
    configuration = (
        "`create_agent` with a middleware that searches `AsyncPostgresStore` (limit 5) before the model call and "
        "submits the conversation to `ReflectionExecutor(create_memory_store_manager(model, store=store), "
        "store=store)` after the answer; bare: `create_agent` alone. One row per memory. Without an embedder its "
        "search ignores the question and returns the newest rows. Reflections wait in memory for one thread, one at "
        "a time."
    )

    async def open(self, setup: Setup) -> None:
        self._resources = AsyncExitStack()
        self._store = await self._resources.enter_async_context(
            AsyncPostgresStore.from_conn_string(
                setup.database_url, pool_config={"min_size": 2, "max_size": 10}
            )
        )
        await self._store.setup()
        for start in range(0, len(setup.memories), 500):
            await self._store.abatch(
                PutOp(_NAMESPACE, str(uuid.uuid4()), {"kind": "Memory", "content": {"content": memory}})
                for memory in setup.memories[start : start + 500]
            )
        model = TimedChat(script=setup.script)
        manager = create_memory_store_manager(
            model, namespace=("memories", "{langgraph_user_id}"), store=self._store
        )
        self._executor = ReflectionExecutor(manager, store=self._store)
        self._middleware = _RecallAndReflect(self._store, self._executor)
        self._bare = create_agent(model)
        self._learning = create_agent(model, middleware=[self._middleware])

    async def run_bare(self, question: str, session_id: str) -> str:
        return await self._run(self._bare, question, session_id)

    async def run_learning(self, question: str, session_id: str) -> str:
        return await self._run(self._learning, question, session_id)

    async def _run(self, agent: Any, question: str, session_id: str) -> str:
        output = await agent.ainvoke(
            {"messages": [("user", question)]},
            {"configurable": {"thread_id": session_id, "langgraph_user_id": USER_ID}},
        )
        return str(output["messages"][-1].text)

    async def handed_over(self) -> None:
        pass  # a run waits for all that it stores itself

    async def settle(self, *, patience_s: float) -> int:
        waiting = [
            asyncio.wrap_future(future) for future in self._middleware.reflections if not future.done()
        ]
        if waiting:
            await asyncio.wait(waiting, timeout=patience_s)
        failed = [f for f in self._middleware.reflections if f.done() and not f.cancelled() and f.exception()]
        if failed:
            raise RuntimeError(f"{len(failed)} reflections failed, the first with {failed[0].exception()!r}")
        return sum(not future.done() for future in self._middleware.reflections)

    async def close(self) -> None:
        # This works through the whole queue, cancelled or not: the script should have no delay by now.
        await asyncio.to_thread(self._executor.shutdown, wait=True)
        await self._resources.aclose()
