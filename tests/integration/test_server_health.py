"""Probes and metrics of the server: what they say when all is well, when the database goes and when it is back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from fastapi.responses import JSONResponse, PlainTextResponse
from langchain.agents import create_agent
from prometheus_client.parser import text_string_to_metric_families
from pydantic import SecretStr

from agent import Settings
from agent.approval.human_approval import HumanApprovalQueue
from agent.events import emit, listening
from agent.identity import Identity
from agent.monitoring.alerts import Alerts
from agent.monitoring.findings import Finding
from agent.portal import portal
from agent.server import health_routes, metrics_routes
from agent.server.house import House, house
from agent.server.metrics_routes import MetricsBesideLangGraph
from agent.settings import WorkerMode
from agent.testing import ScriptedChat
from agent.testing.throwaway import ThrowawayDatabase, throwaway_database
from tests.integration.agents import all_recorded, as_user, call, machine_on, said
from tests.integration.rows import rows
from tests.integration.safe_agents import Deeds, executors_on

AWAY = Settings(database_url=SecretStr("postgresql://ada:secret@127.0.0.1:1/away"), worker=WorkerMode.OFF)
HERE = ("127.0.0.1", 4711)


@asynccontextmanager
async def served(
    here: House, *, client: tuple[str, int] = HERE, langgraph: Any = None
) -> AsyncIterator[httpx.AsyncClient]:
    """The routes over one house; `langgraph` is what another server in the same application says at /metrics."""
    app = FastAPI()
    if langgraph is not None:
        app.add_api_route("/metrics", lambda: langgraph)
    for routes in (health_routes, metrics_routes):
        app.include_router(routes.router)
    app.add_middleware(MetricsBesideLangGraph, house_of=lambda: here)
    app.dependency_overrides[house] = lambda: here
    transport = httpx.ASGITransport(app=app, client=client)
    async with httpx.AsyncClient(transport=transport, base_url="http://a.test") as http:
        yield http


def house_on(settings: Settings) -> House:
    return House(HumanApprovalQueue(settings=settings))


def samples(text: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """By name and labels, as Prometheus itself reads the text."""
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(text: str, name: str, **labels: str) -> float:
    return samples(text)[name, frozenset(labels.items())]


class _Ticking:
    def __init__(self, *, is_running: bool) -> None:
        self.is_running = is_running

    async def start(self) -> None:
        self.is_running = True

    async def stop(self) -> None:
        self.is_running = False


async def test_a_server_with_a_migrated_database_lives_and_is_ready(
    learning_database: ThrowawayDatabase,
) -> None:
    here = house_on(learning_database.settings)
    here.clocks.update(learner=_Ticking(is_running=True), monitor=None)
    async with served(here) as http:
        assert (await http.get("/healthz")).json() == {"alive": True}
        ready = await http.get("/readyz")

    assert ready.status_code == 200
    assert ready.json()["ready"] is True
    assert {name: check["ok"] for name, check in ready.json()["checks"].items()} == {
        "database": True,
        "learner": True,
        "monitor": True,
    }
    assert "switched off" in ready.json()["checks"]["monitor"]["message"]


async def test_without_its_database_a_server_lives_is_not_ready_and_tells_no_secret() -> None:
    async with served(house_on(AWAY)) as http:
        assert (await http.get("/healthz")).status_code == 200
        ready = await http.get("/readyz")
        text = (await http.get("/learning/metrics")).text

    assert ready.status_code == 503
    assert not ready.json()["checks"]["database"]["ok"]
    assert "cannot be reached" in ready.json()["checks"]["database"]["message"]
    assert "agent doctor" in ready.json()["checks"]["database"]["what_to_do"]
    assert not any(word in ready.text for word in ("secret", "127.0.0.1", "ada", "away"))
    assert value(text, "agent_database_up") == 0


async def test_a_server_is_ready_again_once_its_database_lets_it_in_again(
    learning_database: ThrowawayDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health_routes, "_CACHED_SECONDS", 0.0)
    monkeypatch.setattr("agent.database.postgres._REST_AFTER_FAILURE_SECONDS", 0.0)
    name = learning_database.name
    elsewhere = learning_database.url.replace(name, "postgres")
    async with served(house_on(learning_database.settings)) as http:
        assert (await http.get("/readyz")).status_code == 200
        rows(elsewhere, f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
        rows(elsewhere, "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", name)
        try:
            away = await http.get("/readyz")
            up_while_away = value((await http.get("/learning/metrics")).text, "agent_database_up")
        finally:
            rows(elsewhere, f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
        assert (away.status_code, away.json()["checks"]["database"]["ok"]) == (503, False)
        assert up_while_away == 0
        assert (await http.get("/readyz")).status_code == 200


async def test_a_database_without_our_migrations_is_not_ready_and_says_what_to_run() -> None:
    with throwaway_database(migrated=False) as database:
        async with served(house_on(database.settings)) as http:
            ready = await http.get("/readyz")
    assert ready.status_code == 503
    assert "agent migrate" in ready.json()["checks"]["database"]["what_to_do"]


async def test_a_database_that_lacks_the_newest_migration_is_not_ready_and_one_that_is_newer_is(
    learning_database: ThrowawayDatabase,
) -> None:
    rows(
        learning_database.url,
        "INSERT INTO agent_migration (name) VALUES ('29990101000000_of_the_future.sql')",
    )
    async with served(house_on(learning_database.settings)) as http:
        assert (await http.get("/readyz")).status_code == 200
    rows(
        learning_database.url,
        "DELETE FROM agent_migration WHERE name = (SELECT max(name) FROM agent_migration WHERE name < '2999')",
    )
    async with served(house_on(learning_database.settings)) as http:
        ready = await http.get("/readyz")
    assert ready.status_code == 503
    assert "lacks migrations" in ready.json()["checks"]["database"]["message"]


async def test_a_clock_that_has_stopped_makes_a_server_not_ready(
    learning_database: ThrowawayDatabase,
) -> None:
    here = house_on(learning_database.settings)
    here.clocks["monitor"] = _Ticking(is_running=False)
    async with served(here) as http:
        ready = await http.get("/readyz")
    assert ready.status_code == 503
    assert ready.json()["checks"]["monitor"] == {
        "ok": False,
        "message": "The monitor has stopped.",
        "what_to_do": "Restart this process; the log of its `agent.events` says why it stopped.",
    }


async def test_many_probes_ask_the_database_once(learning_database: ThrowawayDatabase) -> None:
    here = house_on(learning_database.settings)
    asked = []
    database = human_database(here)
    call_really = database.call

    async def counting(function: str, *more: Any, **arguments: Any) -> Any:
        asked.append(function)
        return await call_really(function, *more, **arguments)

    database.call = counting
    async with served(here) as http:
        answers = await asyncio.gather(*(http.get("/readyz") for _ in range(50)))
    assert {answer.status_code for answer in answers} == {200}
    assert asked == ["server_state"]


async def test_a_database_that_does_not_answer_holds_no_probe_up(
    learning_database: ThrowawayDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health_routes, "_WAIT_SECONDS", 0.05)
    here = house_on(learning_database.settings)
    answers_now = asyncio.Event()

    async def hangs(function: str, *more: Any, **arguments: Any) -> Any:
        await answers_now.wait()

    human_database(here).call = hangs
    async with served(here) as http:
        ready = await http.get("/readyz")
        portal().loop.call_soon_threadsafe(answers_now.set)
    assert ready.status_code == 503
    assert "no answer within" in ready.json()["checks"]["database"]["message"]


# --- metrics ----------------------------------------------------------------------------------------------------


async def test_the_metrics_count_runs_recalls_and_calls_of_tools_and_name_nobody(
    learning_database: ThrowawayDatabase,
) -> None:
    here = house_on(learning_database.settings)
    with listening(here.metrics.count), executors_on(learning_database) as make:
        machine = machine_on(learning_database, model=None)
        agent = create_agent(
            ScriptedChat(script=["Hello Ada."]), middleware=[machine.middleware()], name="receptionist"
        )
        for thread in ("thread-one", "thread-two"):
            await asyncio.to_thread(
                call, "sync", agent, said("I am Ada."), as_user("ada@example.com", thread)
            )
        await asyncio.to_thread(all_recorded, machine)
        executor = make(registry=Deeds().registry())
        ada = Identity(user_id="ada@example.com", session_id="thread-one")
        await executor.execute("look", {"user_id": 1}, identity=ada)
        await executor.execute("never", {"user_id": 1}, identity=ada)
        waits = await executor.execute("delete", {"user_id": 1}, identity=ada, wait=False)
        assert waits.waits_for is not None
        async with served(here) as http:
            answer = await http.get("/learning/metrics")
        await machine.aclose()

    text = answer.text
    assert answer.headers["content-type"].startswith("text/plain")
    assert value(text, "agent_runs_recorded_total", status="completed") == 2
    assert value(text, "agent_recall_seconds_count") == 2
    assert value(text, "agent_tool_calls_total", risk="READ", decision="allowed", status="succeeded") == 1
    assert value(text, "agent_tool_calls_total", risk="FORBIDDEN", decision="refused", status="refused") == 1
    assert value(text, "agent_tool_call_seconds_count", risk="READ") == 1
    assert value(text, "agent_approvals_requested_total", risk="WRITE", state="pending") == 1
    assert value(text, "agent_approvals_pending", risk="WRITE") == 1
    assert value(text, "agent_approval_age_seconds") >= 0
    assert value(text, "agent_database_up") == 1
    assert value(text, "agent_jobs", state="failed") == 0
    assert value(text, "agent_events_total", event="run_recorded") == 2
    for personal in ("ada", "thread-one", "receptionist", "Hello"):
        assert personal not in text.lower()


async def test_votes_spooled_and_lost_runs_and_learning_are_counted(
    learning_database: ThrowawayDatabase,
) -> None:
    here = house_on(learning_database.settings)
    with listening(here.metrics.count):
        emit("run_spooled", run_id="1", status="completed", reason="away")
        emit("run_record_failed", run_id="1", status="completed", reason="away", spool="full")
        emit("recall_failed", reason="slow")
        emit("session_learned", runs=3)
        emit("learning_cycle_done", cycle="c", steps={})
        emit("learning_step_done", cycle="c", step="curate", counts={})
        emit("learning_step_failed", cycle="c", step="curate", error="no")
        emit("monitor_looked", checks=5, failed=["error_rate"], findings=0, notices=0, seconds=0.1)
        emit("learning_failed", error="no")
        for outcome in ("recorded", "repeated"):
            emit("approval_decided", outcome=outcome, verdict="approve")
        emit("approval_decided", outcome="recorded", verdict="x" * 500)
    async with served(here) as http:
        text = (await http.get("/learning/metrics")).text
    assert value(text, "agent_runs_spooled_total") == 1
    assert value(text, "agent_learner_cycles_total") == value(text, "agent_monitor_looks_total") == 1
    assert value(text, "agent_learner_steps_total", step="curate", state="done") == 1
    assert value(text, "agent_learner_steps_total", step="curate", state="failed") == 1
    assert value(text, "agent_monitor_checks_total", state="done") == 4
    assert value(text, "agent_monitor_checks_total", state="failed") == 1
    assert value(text, "agent_runs_lost_total") == 1
    assert value(text, "agent_recall_failures_total") == 1
    assert value(text, "agent_runs_learned_total") == 3
    assert value(text, "agent_learning_failures_total") == 1
    assert value(text, "agent_approvals_decided_total", verdict="approve") == 1
    assert value(text, "agent_approvals_decided_total", verdict="other") == 1


async def test_ours_stand_beside_those_of_langgraphs_server_and_alone_where_it_has_none(
    learning_database: ThrowawayDatabase,
) -> None:
    here = house_on(learning_database.settings)
    theirs = PlainTextResponse("# HELP lg_runs Runs.\n# TYPE lg_runs gauge\nlg_runs 2.0")
    async with served(here, langgraph=theirs) as http:
        both = (await http.get("/metrics")).text
    async with served(here) as http:
        alone = await http.get("/metrics")
    assert value(both, "lg_runs") == 2
    assert value(both, "agent_database_up") == 1
    assert alone.status_code == 200
    assert value(alone.text, "agent_database_up") == 1

    async with served(here, langgraph=JSONResponse({"queue": 1})) as http:
        assert (await http.get("/metrics?format=json")).json() == {"queue": 1}


@pytest.mark.parametrize(
    ("client", "headers", "status"),
    [
        (("127.0.0.1", 1), {}, 200),
        (("127.0.0.2", 1), {}, 200),
        (("::1", 1), {}, 200),
        (("::ffff:127.0.0.1", 1), {}, 200),
        (("10.0.0.7", 1), {}, 403),
        (("127.0.0.1", 1), {"X-Forwarded-For": "127.0.0.1"}, 403),
        (("127.0.0.1", 1), {"Forwarded": "for=10.0.0.7"}, 403),
        (("testclient", 1), {}, 403),
    ],
)
async def test_without_a_token_the_metrics_are_for_this_machine(
    learning_database: ThrowawayDatabase, client: tuple[str, int], headers: dict[str, str], status: int
) -> None:
    here = house_on(learning_database.settings)
    theirs = PlainTextResponse("lg_runs 2.0\n")
    async with served(here, client=client) as http:
        assert (await http.get("/learning/metrics", headers=headers)).status_code == status
        assert (await http.get("/metrics", headers=headers)).status_code == status
    async with served(here, client=client, langgraph=theirs) as http:
        found = samples((await http.get("/metrics", headers=headers)).text)
    assert (("agent_database_up", frozenset[tuple[str, str]]()) in found) is (status == 200)
    assert ("lg_runs", frozenset[tuple[str, str]]()) in found


@pytest.mark.parametrize(
    ("given", "status"),
    [("Bearer of news", 200), ("Bearer of New", 401), ("of news", 401), ("Bearer of news ", 401), ("", 401)],
)
async def test_with_a_token_everybody_needs_it(
    learning_database: ThrowawayDatabase, given: str, status: int
) -> None:
    changed = learning_database.settings.model_copy(update={"metrics_token": SecretStr("of news")})
    here = house_on(changed)
    for client in (HERE, ("10.0.0.7", 1)):
        async with served(here, client=client) as http:
            for path in ("/learning/metrics", "/metrics"):
                answer = await http.get(path, headers={"Authorization": given})
                assert answer.status_code == status
                assert "of news" not in answer.text


async def test_the_gauges_are_of_all_tenants_and_of_the_queue(learning_database: ThrowawayDatabase) -> None:
    with executors_on(learning_database) as make:
        executor = make('[[reviewer]]\nname = "zoe"\ntenants = ["other"]\n', registry=Deeds().registry())
        for tenant in ("default", "other"):
            asked = await executor.execute(
                "destroy", {"user_id": 1}, identity=Identity(tenant_id=tenant, user_id="eve"), wait=False
            )
            assert asked.waits_for or asked.error
        state = await executor.database.call("server_state", job_limit=10)
        rows(
            learning_database.url,
            "INSERT INTO agent_queue.procrastinate_jobs (queue_name, task_name, priority, status, scheduled_at)"
            " SELECT 'learning', 'agent.none', 0, 'todo', now() - interval '1 minute' FROM generate_series(1, 12)",
        )
        later = await executor.database.call("server_state", job_limit=10)
        now = datetime.now(UTC)
        alerts = Alerts(executor.settings, executor.database, sinks=[])
        found = Finding(
            cause="error_rate:agent=support",
            check="error_rate",
            severity="critical",
            title="More errors",
            what="Twice as many errors as before.",
            since=now,
            evidence={},
            advice="Look at the runs.",
        )
        await alerts.report([found], ["error_rate"])
        await executor.database.call(
            "tick", Identity(), the_clock="sample", interval_seconds=3600.0, replica="one"
        )
        async with served(house_on(executor.settings)) as http:
            text = (await http.get("/learning/metrics")).text
    assert value(text, "agent_alerts_open", severity="critical") == 1
    assert value(text, "agent_alerts_open", severity="info") == 0
    assert value(text, "agent_clock_replicas", clock="sample") == 1
    assert 0 <= value(text, "agent_clock_age_seconds", clock="sample") < 60
    assert state["approvals"]["DESTRUCTIVE"]["pending"] == 2
    assert state["jobs"]["due"] == 0
    assert later["jobs"]["due"] == 10
    assert later["queue_age_seconds"] >= 60


def human_database(here: House) -> Any:
    """The database that a house looks at."""
    return here.state._database
