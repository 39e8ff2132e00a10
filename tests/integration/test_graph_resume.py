"""Paused graphs and their approvals: tied once per pause, resumed once decided, by the id of the interrupt."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any, TypedDict

import psycopg
import pytest
from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import END, START, StateGraph
from langgraph.types import Command, interrupt
from pydantic import SecretStr

from agent.approval.answers import BATCH, Proposed, payload
from agent.approval.binding import binding_hash
from agent.approval.graph_resume import (
    ApprovalPause,
    LoopbackResumer,
    announce_pause,
    is_watched,
    resume_when_decided,
)
from agent.approval.human_approval import HumanApprovalQueue
from agent.approval.keeper import ResumeOrder
from agent.approval.policy_file import PolicyFile
from agent.approval.records import Approval, ApprovalRequest
from agent.approval.reviewers import Reviewer, Reviewers
from agent.approval.risk import Risk
from agent.database import Database, open_database
from agent.errors import ConflictError, InvalidRequest, OperatorError
from agent.events import Event, listening
from agent.identity import Identity
from agent.portal import portal
from agent.testing.throwaway import ThrowawayDatabase

BOB = Identity(user_id="bob", session_id="t1")
ADA = Reviewer(name="ada")
THREAD: RunnableConfig = {
    "configurable": {"thread_id": "t1"},
    "metadata": {"assistant_id": "a1", "graph_id": "shop"},
}
SCHEMA = {"type": "object", "properties": {"amount": {"type": "number"}}, "required": ["amount"]}


class State(TypedDict, total=False):
    asks: list[float]
    """Amounts to be refunded, one pause each."""
    told: list[str]


class Shop:
    """A graph that asks before each refund and reads the answer from the rows."""

    def __init__(self, database: ThrowawayDatabase) -> None:
        self.url = database.url
        self.settings = database.settings
        self.database: Database = open_database(database.settings)
        self.queue = HumanApprovalQueue(
            self.database, database.settings, PolicyFile(reviewers=Reviewers([ADA]))
        )
        self.watched: list[bool] = []
        self.pause = ApprovalPause(self.database)

    def graph(self, *callbacks: Any, saver: Any = None) -> Any:
        builder = StateGraph(State)
        builder.add_node("refund", self._refund)
        builder.add_edge(START, "refund")
        builder.add_conditional_edges("refund", lambda state: "refund" if state["asks"] else END)
        return builder.compile(checkpointer=saver or InMemorySaver()).with_config(callbacks=list(callbacks))

    async def _refund(self, state: State, config: RunnableConfig) -> State:
        amount, *rest = state["asks"]
        self.watched.append(is_watched(config))
        approval = await self.submit(amount)
        announce_pause(approval.batch_id, BOB, config)
        call = Proposed(
            tool_call_id=f"c{amount}", tool="refund", arguments={"amount": amount}, description="Refund",
            approval_id=approval.approval_id, arguments_schema=SCHEMA,
        )  # fmt: skip
        answer = interrupt(payload([call], batch_id=approval.batch_id, message="Refund?"))
        assert answer == {BATCH: approval.batch_id}
        found = await self.queue.get(approval.approval_id, BOB)
        return {"asks": rest, "told": [*state.get("told", []), found.state]}

    async def submit(self, amount: float, **more: Any) -> Approval:
        arguments = {"amount": amount}
        request = ApprovalRequest(
            tool="refund", arguments=arguments, args_hash=binding_hash("refund", arguments, tenant_id="default"),
            risk=Risk.WRITE, approvers=("ada",), request_key=f"refund {amount}", held=True, **more,
        )  # fmt: skip
        return await self.queue.submit(request, BOB)

    async def pending(self) -> list[Approval]:
        found: list[Approval] = await self.queue.get_pending_approvals(BOB)
        return found

    async def decide(self, approval: Approval, verdict: str = "approve") -> None:
        outcome = await self.queue.decide(
            [approval.approval_id], verdict, ADA, channel="test", hashes={approval.approval_id: approval.args_hash},
            identity_tenant="default",
        )  # fmt: skip
        assert outcome.outcome == "recorded"

    def batches(self) -> list[dict[str, Any]]:
        with psycopg.connect(self.url) as connection:
            query = "SELECT interrupt, opened_at IS NOT NULL FROM public.approval_batch ORDER BY made_at"
            return [{"interrupt": pause, "is_open": is_open} for pause, is_open in connection.execute(query)]

    async def asked(self) -> Approval:
        """What waits for a decision, once something does."""
        for _ in range(500):
            if pending := await self.pending():
                return pending[0]
            await asyncio.sleep(0.02)
        raise AssertionError("nobody asked")


@pytest.fixture
def shop(learning_database: ThrowawayDatabase) -> Iterator[Shop]:
    shop = Shop(learning_database)
    yield shop
    portal().run_sync(shop.database.close())


async def test_a_pause_is_tied_to_its_batch_with_whose_run_it_is(shop: Shop) -> None:
    graph = shop.graph(shop.pause)
    result = await graph.ainvoke({"asks": [5.0]}, THREAD)
    [pause] = result["__interrupt__"]
    [approval] = await shop.pending()
    [batch] = shop.batches()
    assert batch == {
        "is_open": True,
        "interrupt": {
            "interrupt_id": pause.id, "thread_id": "t1", "assistant_id": "a1", "graph_id": "shop",
            "identity": BOB.as_json(), "schemas": {approval.approval_id: SCHEMA},
        },
    }  # fmt: skip


def test_a_pause_is_tied_by_a_graph_that_runs_without_a_loop_too(shop: Shop) -> None:
    async def submit() -> Approval:
        return await shop.submit(5.0)

    def refund(state: State, config: RunnableConfig) -> State:
        approval = portal().run_sync(submit())
        announce_pause(approval.batch_id, BOB, config)
        interrupt({BATCH: approval.batch_id})
        return {"told": ["done"]}

    builder = StateGraph(State)
    builder.add_node("refund", refund)
    builder.add_edge(START, "refund")
    graph = builder.compile(checkpointer=InMemorySaver()).with_config(callbacks=[shop.pause])
    result = graph.invoke({"asks": [5.0]}, THREAD)
    [batch] = shop.batches()
    assert batch["interrupt"]["interrupt_id"] == result["__interrupt__"][0].id


async def test_a_pause_inside_a_subgraph_is_tied_to_the_outer_thread(shop: Shop) -> None:
    inner = shop.graph(saver=None)
    builder = StateGraph(State)
    builder.add_node("inner", inner)
    builder.add_edge(START, "inner")
    graph = builder.compile(checkpointer=InMemorySaver()).with_config(callbacks=[shop.pause])
    await graph.ainvoke({"asks": [5.0]}, THREAD)
    state = await graph.aget_state(THREAD)
    assert [batch["interrupt"]["interrupt_id"] for batch in shop.batches()] == [
        one.id for one in state.interrupts
    ]
    assert shop.batches()[0]["interrupt"]["thread_id"] == "t1"


async def test_a_node_can_tell_whether_its_pauses_are_heard_of(shop: Shop) -> None:
    await shop.graph().ainvoke({"asks": [5.0]}, THREAD)
    await shop.graph(shop.pause).ainvoke({"asks": [6.0]}, THREAD)
    assert shop.watched == [False, True]
    assert [batch["is_open"] for batch in shop.batches()] == [False, True]


async def test_a_batch_that_no_code_of_ours_announced_is_not_tied(shop: Shop) -> None:
    approval = await shop.submit(5.0)

    async def forged(state: State) -> State:
        interrupt({BATCH: approval.batch_id})
        return {}

    builder = StateGraph(State)
    builder.add_node("forged", forged)
    builder.add_edge(START, "forged")
    graph = builder.compile(checkpointer=InMemorySaver()).with_config(callbacks=[shop.pause])
    await graph.ainvoke({"asks": []}, THREAD)
    assert shop.batches() == [{"interrupt": None, "is_open": False}]


async def test_a_stale_answer_does_not_open_anything_again(shop: Shop) -> None:
    graph = shop.graph(shop.pause)
    result = await graph.ainvoke({"asks": [5.0, 6.0]}, THREAD)
    [first] = result["__interrupt__"]
    [approval] = await shop.pending()
    await shop.decide(approval)
    answer = {first.id: {BATCH: approval.batch_id}}
    for _ in range(2):  # the second is about a pause that is over
        result = await graph.ainvoke(Command(resume=answer), THREAD)
    [second] = result["__interrupt__"]
    assert second.id != first.id
    assert len(shop.batches()) == 2
    assert [approval.arguments for approval in await shop.pending()] == [{"amount": 6.0}]


async def test_a_database_that_is_away_is_tried_again(shop: Shop) -> None:
    lost = shop.settings.model_copy(update={"database_url": SecretStr("postgresql://ada@127.0.0.1:1/away")})
    pause = ApprovalPause(open_database(lost))
    seen: list[Event] = []
    with listening(seen.append):
        await shop.graph(pause).ainvoke({"asks": [5.0]}, THREAD)
        assert shop.batches()[0]["is_open"] is False
        pause._given = shop.database  # it is back
        for _ in range(200):
            if shop.batches()[0]["is_open"]:
                break
            await asyncio.sleep(0.05)
    assert shop.batches()[0]["is_open"] is True
    assert [event.facts["will_retry"] for event in seen if event.name == "approval_pause_failed"] == [True]


# --- in a program of one's own ----------------------------------------------------------------------------------


async def test_a_run_goes_on_when_all_its_pauses_are_decided(shop: Shop) -> None:
    graph = shop.graph(shop.pause)
    await graph.ainvoke({"asks": [5.0, 6.0]}, THREAD)

    async def person() -> None:
        for verdict in ("approve", "reject"):
            await shop.decide(await shop.asked(), verdict)

    _, result = await asyncio.gather(
        person(), resume_when_decided(graph, THREAD, timeout=30, queue=shop.queue, identity=BOB)
    )
    assert result["told"] == ["approved", "rejected"]


async def test_what_expires_is_a_no_that_the_run_is_told(shop: Shop) -> None:
    graph = shop.graph(shop.pause)
    await shop.submit(5.0, expires_in_seconds=0.2)
    await graph.ainvoke({"asks": [5.0]}, THREAD)
    result = await resume_when_decided(graph, THREAD, timeout=30, queue=shop.queue, identity=BOB)
    assert result["told"] == ["expired"]


async def test_what_is_not_decided_in_time_stays_open_and_may_be_waited_for_again(shop: Shop) -> None:
    graph = shop.graph(shop.pause)
    await graph.ainvoke({"asks": [5.0]}, THREAD)
    with pytest.raises(TimeoutError, match="stays open"):
        await resume_when_decided(graph, THREAD, timeout=0.1, queue=shop.queue, identity=BOB)
    [approval] = await shop.pending()
    await shop.decide(approval)
    result = await resume_when_decided(graph, THREAD, timeout=30, queue=shop.queue, identity=BOB)
    assert result["told"] == ["approved"]


async def test_a_thread_that_waits_for_nothing_is_refused(shop: Shop) -> None:
    with pytest.raises(InvalidRequest, match="waits for no approval"):
        await resume_when_decided(shop.graph(shop.pause), THREAD, queue=shop.queue, identity=BOB)


# --- on a LangGraph server --------------------------------------------------------------------------------------


class Server:
    """A LangGraph server's API, as far as a resume needs it, over a graph of this process."""

    def __init__(self, graph: Any) -> None:
        self.graph = graph
        self.status = "interrupted"
        self.started: list[dict[str, Any]] = []
        self.loops: set[Any] = set()
        self.threads = SimpleNamespace(get=self._thread, get_state=self._state)
        self.runs = SimpleNamespace(create=self._run)

    async def _thread(self, thread_id: str) -> Mapping[str, Any]:
        self.loops.add(asyncio.get_running_loop())
        return {"thread_id": thread_id, "status": self.status}

    async def _state(self, thread_id: str) -> Mapping[str, Any]:
        state = await self.graph.aget_state({"configurable": {"thread_id": thread_id}})
        return {"interrupts": [{"id": one.id, "value": one.value} for one in state.interrupts]}

    async def _run(self, thread_id: str, assistant_id: str, **given: Any) -> None:
        self.started.append({"thread_id": thread_id, "assistant_id": assistant_id, **given})
        config = {"configurable": {"thread_id": thread_id, **given["config"]["configurable"]}}
        await self.graph.ainvoke(Command(resume=given["command"]["resume"]), config)


async def paused(shop: Shop) -> tuple[Server, ResumeOrder]:
    """A run that paused and whose approval is decided since, as the keeper hands it over."""
    graph = shop.graph(shop.pause)
    await graph.ainvoke({"asks": [5.0]}, THREAD)
    [approval] = await shop.pending()
    await shop.decide(approval)
    [order] = await shop.database.call("take_resumes", lease_seconds=60)
    known = {name: order[name] for name in ("batch_id", "tenant_id", "interrupt")}
    approvals = tuple(Approval.from_row(row) for row in order["approvals"])
    return Server(graph), ResumeOrder(**known, approvals=approvals)


async def test_a_decided_run_is_resumed_by_its_interrupt_as_whom_it_began(shop: Shop) -> None:
    server, order = await paused(shop)
    await LoopbackResumer(server)(order)  # type: ignore[arg-type]
    [run] = server.started
    assert run["thread_id"] == "t1"
    assert run["assistant_id"] == "a1"
    assert run["command"] == {"resume": {order.interrupt["interrupt_id"]: {BATCH: order.batch_id}}}
    assert run["config"] == {"configurable": {"user_id": "bob", "tenant_id": "default"}}
    assert run["multitask_strategy"] == "reject"
    state = await server.graph.aget_state(THREAD)
    assert state.values["told"] == ["approved"]


async def test_a_pause_that_is_over_is_left_alone(shop: Shop) -> None:
    server, order = await paused(shop)
    resumer = LoopbackResumer(server)  # type: ignore[arg-type]
    seen: list[Event] = []
    with listening(seen.append):
        await resumer(order)
        await resumer(order)
    assert len(server.started) == 1
    assert [event.name for event in seen if event.name.startswith("run_res")] == [
        "run_resumed",
        "run_resume_skipped",
    ]


async def test_a_thread_at_work_is_resumed_later(shop: Shop) -> None:
    server, order = await paused(shop)
    resumer = LoopbackResumer(server)  # type: ignore[arg-type]
    server.status = "busy"
    with pytest.raises(ConflictError, match="is at work"):
        await resumer(order)
    assert server.started == []
    server.status = (
        "error"  # so a server calls a thread whose last answer was malformed, though it still waits
    )
    await resumer(order)
    assert len(server.started) == 1


async def test_the_api_is_called_in_the_servers_loop_whoever_calls(shop: Shop) -> None:
    server, order = await paused(shop)
    resumer = LoopbackResumer(server)  # type: ignore[arg-type]
    await portal().run(resumer(order))
    assert server.loops == {asyncio.get_running_loop()}


async def test_a_thread_of_another_server_and_refusals_are_tried_again(shop: Shop) -> None:
    import httpx
    from langgraph_sdk.errors import InternalServerError
    from langgraph_sdk.errors import NotFoundError as Gone

    server, order = await paused(shop)
    request = httpx.Request("GET", "http://api/threads/t1")

    def failing(kind: Any, status: int) -> Any:
        async def fail(thread_id: str) -> Any:
            raise kind("no", response=httpx.Response(status, request=request), body=None)

        return fail

    for kind, status in ((Gone, 404), (InternalServerError, 500)):
        server.threads.get = failing(kind, status)
        with pytest.raises(OperatorError, match="tried again"):
            await LoopbackResumer(server)(order)  # type: ignore[arg-type]
    assert server.started == []


async def test_a_pause_outside_a_server_is_no_servers_business(shop: Shop) -> None:
    server, order = await paused(shop)
    elsewhere = ResumeOrder(
        batch_id=order.batch_id, tenant_id=order.tenant_id, approvals=order.approvals,
        interrupt={**order.interrupt, "assistant_id": None, "graph_id": None},
    )  # fmt: skip
    await LoopbackResumer(server)(elsewhere)  # type: ignore[arg-type]
    assert server.started == []
