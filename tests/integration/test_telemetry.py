"""Spans of real runs, as an exporter of OpenTelemetry gets them."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain_core.messages import AIMessage
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.types import Command
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes
from opentelemetry.semconv.attributes import error_attributes
from opentelemetry.trace import StatusCode

from agent import telemetry, with_learning
from agent.clock import Clock, Tick
from agent.execution.safe_tools_middleware import SafeToolsMiddleware
from agent.identity import Identity
from agent.portal import portal
from agent.settings import telemetry_endpoint
from agent.testing import ScriptedChat, tool_call
from agent.testing.throwaway import ThrowawayDatabase
from tests.integration.agents import ASYNC_AND_SYNC, all_recorded, as_user, call, machine_on, said
from tests.integration.safe_agents import Deeds, approvals, decide, executors_on, pauses
from tests.otlp_collector import Collector, collecting

colours = pytest.mark.parametrize("colour", ASYNC_AND_SYNC)
SECRET = "my cat is called Xanthippe"
ADA = as_user("ada@example.com", "thread-1")


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemorySpanExporter]:
    """What is exported; the process's own provider can be set only once, so another stands in its place."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", provider)
    monkeypatch.setattr(telemetry, "_tracer", provider.get_tracer("agent"))
    yield exporter
    provider.shutdown()
    assert not telemetry._runs, "a run's span was never ended"


def named(exporter: InMemorySpanExporter, name: str) -> list[ReadableSpan]:
    """The spans that begin so, in the order they began."""
    found = [span for span in exporter.get_finished_spans() if span.name.startswith(name)]
    return sorted(found, key=lambda span: span.start_time or 0)


def told(exporter: InMemorySpanExporter) -> str:
    """Everything that was exported, as one text."""
    return "\n".join(span.to_json() for span in exporter.get_finished_spans())


def attributes(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


def is_child(child: ReadableSpan, parent: ReadableSpan) -> bool:
    assert parent.context is not None
    return child.parent is not None and child.parent.span_id == parent.context.span_id


def traces_of(found: list[ReadableSpan]) -> set[int]:
    return {span.context.trace_id for span in found if span.context is not None}


@colours
def test_a_run_is_a_span_with_its_recall_inside_and_no_text(
    colour: str, spans: InMemorySpanExporter, learning_database: ThrowawayDatabase
) -> None:
    machine = machine_on(learning_database)
    agent = create_agent(
        ScriptedChat(script=["Hello."]), middleware=[machine.middleware()], name="receptionist"
    )
    with telemetry.span("the application's own"):
        call(colour, agent, said(SECRET), ADA)
    all_recorded(machine)
    portal().run_sync(machine.aclose())

    [around] = named(spans, "the application's own")
    [run] = named(spans, "invoke_agent")
    [recall] = named(spans, "retrieval")
    assert run.name == "invoke_agent receptionist"
    assert attributes(run) == {
        "gen_ai.operation.name": "invoke_agent",
        "gen_ai.agent.name": "receptionist",
        "gen_ai.conversation.id": "thread-1",
        "learning.run.id": attributes(run)["learning.run.id"],
        "learning.run.status": "completed",
    }
    assert attributes(recall)["gen_ai.operation.name"] == "retrieval"
    assert attributes(recall)["gen_ai.data_source.id"] == "agent_memory"
    assert attributes(recall)["learning.recall.memories"] == 0
    assert is_child(recall, run)
    assert is_child(run, around)
    for text in (SECRET, "Xanthippe", "Hello", "ada@example.com"):
        assert text not in told(spans)


@colours
def test_a_graph_with_learning_is_a_span_that_ends_as_the_graph_does(
    colour: str, spans: InMemorySpanExporter, learning_database: ThrowawayDatabase
) -> None:
    def node(state: MessagesState) -> dict[str, Any]:
        with telemetry.span("inside the node"):
            pass
        if "fail" in state["messages"][-1].text:
            raise ValueError(SECRET)
        return {"messages": [AIMessage("done")]}

    machine = machine_on(learning_database)
    builder = StateGraph(MessagesState)
    builder.add_node("node", node)
    builder.add_edge(START, "node")
    graph = with_learning(builder, machine)
    call(colour, graph, said("go"), ADA)
    with pytest.raises(ValueError, match="Xanthippe"):
        call(colour, graph, said("fail"), ADA)
    all_recorded(machine)
    portal().run_sync(machine.aclose())

    good, bad = named(spans, "invoke_agent")
    assert attributes(good)["learning.run.status"] == "completed"
    assert good.status.status_code is StatusCode.UNSET
    assert attributes(bad)["learning.run.status"] == attributes(bad)["error.type"] == "failed"
    assert bad.status.status_code is StatusCode.ERROR
    first, second = named(spans, "inside the node")
    assert is_child(first, good)
    assert is_child(second, bad)
    assert "Xanthippe" not in told(spans)


@colours
def test_a_paused_run_goes_on_in_its_trace_with_the_wait_and_the_call(
    colour: str, spans: InMemorySpanExporter, learning_database: ThrowawayDatabase
) -> None:
    deeds = Deeds()
    with executors_on(learning_database) as make:
        executor = make()
        machine = machine_on(learning_database)
        agent = create_agent(
            ScriptedChat(
                script=[tool_call("look_up", name=SECRET), tool_call("delete_user", user_id=7), "done"]
            ),
            deeds.tools(),
            middleware=[SafeToolsMiddleware(executor, risks={"look_up": "READ"}), machine.middleware()],
            checkpointer=InMemorySaver(),
            name="clerk",
        )
        paused = call(colour, agent, said("Delete 7"), ADA)
        [pause] = pauses(paused)
        [asked] = approvals(executor)
        assert decide(executor, asked, "approve") == "recorded"
        all_recorded(machine)
        assert attributes(named(spans, "invoke_agent")[0])["learning.run.status"] == "interrupted"
        answer = {"decisions": [{"type": "approve"}]}
        call(colour, agent, Command(resume={pause.id: answer}), ADA)
        all_recorded(machine)
        portal().run_sync(machine.aclose())

    assert deeds.done == [SECRET, 7]
    before, after = named(spans, "invoke_agent")
    looked, deleted = named(spans, "execute_tool")
    [waited] = named(spans, "await_approval")
    assert attributes(after)["learning.run.status"] == "completed"
    assert attributes(after)["learning.run.resumed"] is True
    assert attributes(before)["learning.run.id"] == attributes(after)["learning.run.id"]
    assert len(traces_of([before, after, looked, deleted, waited])) == 1
    assert is_child(looked, before)
    assert is_child(deleted, after)
    assert looked.name == "execute_tool look_up"
    found = attributes(deleted)
    assert (found["gen_ai.operation.name"], found["gen_ai.tool.name"]) == ("execute_tool", "delete_user")
    assert (found["learning.tool.risk"], found["learning.tool.decision"]) == ("WRITE", "approved")
    assert (found["learning.tool.status"], found["learning.approval.id"]) == ("succeeded", asked.approval_id)
    assert (attributes(looked)["learning.tool.risk"], attributes(looked)["learning.tool.decision"]) == (
        "READ",
        "allowed",
    )
    assert attributes(waited)["learning.approval.state"] == "approved"
    assert (waited.end_time or 0) > (waited.start_time or 0)
    assert "Xanthippe" not in told(spans)


async def test_a_call_that_is_turned_away_and_a_program_that_waits_are_spans_too(
    spans: InMemorySpanExporter, learning_database: ThrowawayDatabase
) -> None:
    with executors_on(learning_database) as make:
        executor = make(registry=Deeds().registry())
        ada = Identity(user_id="ada", session_id="s")
        await executor.execute("never", {"user_id": 1}, identity=ada)
        await executor.execute("delete", {"user_id": 1}, identity=ada, timeout=0.1)
    refused, expired = named(spans, "execute_tool")
    assert attributes(refused)["learning.tool.risk"] == "FORBIDDEN"
    assert attributes(refused)["error.type"] == attributes(refused)["learning.tool.status"] == "refused"
    assert attributes(expired)["learning.tool.status"] == "expired"
    waits = named(spans, "await_approval")
    assert attributes(waits[-1])["gen_ai.tool.name"] == "delete"
    assert attributes(waits[-1])["learning.approval.state"] in ("pending", "expired")


async def test_learning_is_a_span_with_the_models_call_and_its_tokens(
    spans: InMemorySpanExporter, learning_database: ThrowawayDatabase
) -> None:
    model = ScriptedChat(script=[ValueError(SECRET), AIMessage("no structure")])
    machine = machine_on(learning_database, model=model)
    ada = Identity(user_id="ada", session_id="s")
    run = {
        "run_id": "r1",
        "status": "completed",
        "messages": [{"message_id": "m1", "role": "user", "content": SECRET}],
        "started_at": "2026-01-01T00:00:00Z",
        "finished_at": "2026-01-01T00:00:01Z",
    }
    await machine.database.call("record_run", ada, run=run | {"queue": "nobody", "quiet_seconds": 60})
    for _ in range(2):
        with pytest.raises(Exception, match="extraction model"):
            await machine.learn_session(ada)
    await machine.aclose()

    failed, answered = named(spans, "chat")
    sessions = named(spans, "learn_session")
    assert attributes(failed)["error.type"] == "ValueError"
    assert attributes(answered)["gen_ai.operation.name"] == "chat"
    assert attributes(answered)["gen_ai.usage.input_tokens"] > 0
    assert attributes(answered)["gen_ai.usage.output_tokens"] > 0
    assert [is_child(one, two) for one, two in zip((failed, answered), sessions, strict=True)] == [True, True]
    assert attributes(sessions[0])["error.type"] == "ModelError"
    assert "Xanthippe" not in told(spans)


async def test_a_cycle_of_a_clock_is_a_span(
    spans: InMemorySpanExporter, learning_database: ThrowawayDatabase
) -> None:
    from datetime import timedelta

    from agent.database.opening import open_database

    done = asyncio.Event()
    loop = asyncio.get_running_loop()

    async def cycle(tick: Tick) -> None:
        loop.call_soon_threadsafe(done.set)

    database = open_database(learning_database.settings)
    clock = Clock(
        "sample", timedelta(hours=1), database=database, settings=learning_database.settings, cycle=cycle
    )
    await clock.start()
    await asyncio.wait_for(done.wait(), 30)
    await clock.stop()
    await database.close()
    [tick] = named(spans, "tick sample")
    assert attributes(tick) == {"learning.clock": "sample", "learning.attempt": 1}


def test_every_name_of_the_conventions_is_one_of_theirs() -> None:
    theirs = {value for name, value in vars(gen_ai_attributes).items() if name.startswith("GEN_AI_")}
    ours = {value for name, value in vars(telemetry).items() if name.isupper() and isinstance(value, str)}
    assert {name for name in ours if name.startswith("gen_ai.")} <= theirs
    assert telemetry.ERROR_TYPE == error_attributes.ERROR_TYPE
    operations = {value.value for value in gen_ai_attributes.GenAiOperationNameValues}
    assert {"invoke_agent", "execute_tool", "retrieval", "chat", "embeddings"} <= operations
    providers = {value.value for value in gen_ai_attributes.GenAiProviderNameValues}
    assert set(telemetry._PROVIDERS.values()) <= providers


def test_nothing_is_collected_or_kept_without_a_provider(learning_database: ThrowawayDatabase) -> None:
    machine = machine_on(learning_database)
    agent = create_agent(ScriptedChat(script=["Hello."]), middleware=[machine.middleware()])
    state = call("sync", agent, said(SECRET), ADA)
    assert not telemetry.is_on()
    assert not telemetry._runs
    assert state["messages"][-1].text == "Hello."
    portal().run_sync(machine.aclose())


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, None),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://a"}, "http://a"),
        (
            {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://a", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://b"},
            "http://b",
        ),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://a", "OTEL_SDK_DISABLED": "TRUE"}, None),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://a", "OTEL_TRACES_EXPORTER": "none"}, None),
    ],
)
def test_opentelemetrys_variables_say_whether_there_is_an_exporter(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: str | None
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert telemetry_endpoint() == expected


# --- the exporter -----------------------------------------------------------------------------------------------


@pytest.fixture
def collector() -> Iterator[Collector]:
    with collecting() as running:
        yield running


_PROGRAM = """
import asyncio, json, sys
from opentelemetry import trace
from agent import telemetry

async def main():
    async with telemetry.exporting() as is_on:
        first = trace.get_tracer_provider()
        with telemetry.span("first", {telemetry.TOOL_NAME: "x"}):
            pass
    async with telemetry.exporting():  # a server that is started again in its process
        with telemetry.span("second"):
            pass
    print(json.dumps([is_on, first is trace.get_tracer_provider(), type(first).__name__]))

asyncio.run(main())
"""


def run_program(tmp_path: Path, **variables: str) -> list[Any]:
    import os

    environment = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", _PROGRAM],
        cwd=tmp_path,
        env=environment | variables,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    result: list[Any] = json.loads(done.stdout)
    return result


def test_spans_go_to_the_endpoint_of_the_variables(collector: Collector, tmp_path: Path) -> None:
    given = run_program(tmp_path, OTEL_EXPORTER_OTLP_ENDPOINT=collector.url)
    assert given == [True, True, "TracerProvider"]
    found = collector.spans()
    assert [span.name for span in found] == ["first", "second"]
    assert collector.services() == {"langchain-learning-machine"}
    assert {item.key: item.value.string_value for item in found[0].attributes} == {"gen_ai.tool.name": "x"}


def test_the_name_of_the_service_is_opentelemetrys_to_say(collector: Collector, tmp_path: Path) -> None:
    run_program(tmp_path, OTEL_EXPORTER_OTLP_ENDPOINT=collector.url, OTEL_SERVICE_NAME="shop")
    assert collector.services() == {"shop"}


def test_without_an_endpoint_no_provider_is_made(tmp_path: Path) -> None:
    assert run_program(tmp_path) == [False, True, "ProxyTracerProvider"]


def test_an_endpoint_that_nobody_listens_at_holds_nothing_up(tmp_path: Path) -> None:
    given = run_program(
        tmp_path, OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:1", OTEL_EXPORTER_OTLP_TIMEOUT="1"
    )
    assert given == [True, True, "TracerProvider"]
