"""The shipped graphs under `langgraph dev`, driven by the SDK: an embedded Postgres, a worker inside, no model key."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest
from langgraph_sdk import get_client
from prometheus_client.parser import text_string_to_metric_families

from agent import Identity, LearningMachine
from agent.portal import portal
from tests.acceptance.dev_servers import dev_server
from tests.otlp_collector import Collector, collecting

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

TOLD = "I prefer concise answers and I work on billing"
ASKED = "What do you know about me?"


async def ask(client: Any, graph: str, text: str, *, user: str, thread: str | None = None) -> dict[str, Any]:
    """One turn of a user on a thread, a new one where none is named."""
    thread = thread or (await client.threads.create())["thread_id"]
    state: dict[str, Any] = await client.runs.wait(
        thread,
        graph,
        input={"messages": [{"role": "user", "content": text}]},
        config={"configurable": {"user_id": user}},
    )
    return state | {"thread": thread}


def answer_of(state: dict[str, Any]) -> str:
    """The last message."""
    return str(state["messages"][-1]["content"])


async def ask_until_known(client: Any, graph: str, *, user: str, wanted: str) -> str:
    """Ask on new threads until the worker has learned what is wanted."""
    answer = ""
    for _ in range(30):
        answer = answer_of(await ask(client, graph, ASKED, user=user))
        if wanted in answer:
            break
        await asyncio.sleep(0.5)
    return answer


async def test_two_conversations_an_approval_and_a_team(data_dir: Path) -> None:
    with collecting() as collector:
        traced = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url, "OTEL_BSP_SCHEDULE_DELAY": "200"}
        with dev_server(data_dir, traced) as server:
            async with get_client(url=server.url) as client:
                paused_thread = await _converse(client)
            await _look_at_the_server(server.url)
    _check_traces(collector, paused_thread)

    # Once the server has left, all that it was told is recorded.
    machine = LearningMachine(settings=server.settings)
    runs = await portal().run(machine.database.call("list_runs", Identity(), wanted={}, run_limit=200))
    of_pause = [run for run in runs if run["session_id"] == paused_thread]
    assert [(run["user_id"], run["status"]) for run in of_pause] == [("ada@example.com", "completed")]
    assert {run["agent_id"] for run in runs} >= {"assistant", "support_team"}
    assert {run["status"] for run in runs} == {"completed"}
    await machine.aclose()

    log = server.log.read_text()
    assert "BlockingError" not in log
    assert "recall_failed" not in log
    assert "Traceback" not in log


async def _look_at_the_server(url: str) -> None:
    """Probes and metrics, beside LangGraph's own routes."""
    async with httpx.AsyncClient(base_url=url, timeout=10) as http:
        assert (await http.get("/ok")).json()["ok"] is True
        assert (await http.get("/healthz")).json() == {"alive": True}
        ready = await http.get("/readyz")
        assert (ready.status_code, ready.json()["ready"]) == (200, True), ready.text
        assert {"database", "learner", "monitor"} == ready.json()["checks"].keys()
        for path, theirs in (("/learning/metrics", False), ("/metrics", True)):
            text = (await http.get(path)).text
            families = {family.name: family for family in text_string_to_metric_families(text)}
            recorded = {
                sample.labels["status"]: sample.value
                for sample in families["agent_runs_recorded"].samples
                if sample.name.endswith("_total")
            }
            assert recorded["completed"] > 1
            assert recorded["interrupted"] == 1, "a run is recorded when it pauses too"
            assert families["agent_database_up"].samples[0].value == 1
            assert families["agent_clock_replicas"].samples
            assert any(not name.startswith("agent_") for name in families) is theirs
        assert "queue" in (await http.get("/metrics?format=json")).json()


def _check_traces(collector: Collector, paused_thread: str) -> None:
    spans = collector.spans()

    def value(span: Any, name: str) -> str:
        return next((item.value.string_value for item in span.attributes if item.key == name), "")

    paused = [
        span
        for span in spans
        if span.name.startswith("invoke_agent") and value(span, "gen_ai.conversation.id") == paused_thread
    ]
    assert [value(span, "learning.run.status") for span in paused][-1:] == ["completed"]
    assert len({span.trace_id for span in paused}) == 1
    assert paused[0].parent_span_id, "it hangs under the span of LangGraph's worker"
    names = {span.name for span in spans}
    assert {"retrieval agent_memory", "learn_session", "tick learner", "tick monitor"} <= names
    assert collector.services() == {"langchain-learning-machine"}
    assert not any(text in str(spans) for text in (TOLD, "ada@example.com"))


async def _converse(client: Any) -> str:
    """What users do; returns the thread that waited for a person."""
    assert {a["graph_id"] for a in await client.assistants.search()} == {
        "assistant",
        "support_team",
        "operations",
    }

    # Learned in one conversation, known in the next, by this user alone.
    await ask(client, "assistant", TOLD, user="ada@example.com")
    assert "billing" in await ask_until_known(client, "assistant", user="ada@example.com", wanted=TOLD)
    assert "billing" not in answer_of(await ask(client, "assistant", ASKED, user="bob"))

    # A tool waits for a person; who answers passes no user, and the run stays Ada's.
    paused = await ask(
        client, "assistant", "Please delete the account ada@example.com", user="ada@example.com"
    )
    [pause] = paused["__interrupt__"]
    resumed = await client.runs.wait(
        paused["thread"],
        "assistant",
        command={"resume": {pause["id"]: {"decisions": [{"type": "approve"}]}}},
    )
    assert "__interrupt__" not in resumed
    assert any(message["type"] == "tool" for message in resumed["messages"])

    # The team's specialists know too, without code of their own.
    team = await ask(client, "support_team", "Please refund order A1001", user="ada@example.com")
    assert team["category"] == "billing"
    assert not any("learned_knowledge" in str(message) for message in team["messages"])
    return str(paused["thread"])
