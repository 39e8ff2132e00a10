"""The application that a LangGraph server mounts: it runs whatever is missing, and not with a bad policy."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from agent.approval.binding import binding_hash
from agent.approval.human_approval import HumanApprovalQueue, human_approval_queue
from agent.approval.records import ApprovalRequest
from agent.approval.risk import Risk
from agent.errors import ConfigurationError
from agent.events import Event, listening
from agent.identity import Identity
from agent.server.app import app, keeping_approvals, keeping_time, lifespan
from agent.server.house import House
from agent.server.reviewer_pages import approval_desk
from agent.settings import current_settings
from agent.testing.throwaway import ThrowawayDatabase
from tests.integration.rows import rows

AWAY = "postgresql://ada:secret@127.0.0.1:1/away"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder to serve from; the process's own queue and desk read its settings, and forget them afterwards."""
    monkeypatch.chdir(tmp_path)
    kept = dict(vars(human_approval_queue))
    vars(human_approval_queue).update({"_given": (None, None, None), "_reassessors": {}, "_schemas": {}})
    for name in ("settings", "database", "policy", "notifications"):
        vars(human_approval_queue).pop(name, None)
    approval_desk.cache_clear()
    current_settings.cache_clear()
    yield tmp_path
    vars(human_approval_queue).clear()
    vars(human_approval_queue).update(kept)
    approval_desk.cache_clear()
    current_settings.cache_clear()


async def test_a_server_without_its_database_runs_and_lets_nobody_decide(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATABASE_URL", AWAY)
    seen: list[Event] = []
    transport = httpx.ASGITransport(app=app)
    with listening(seen.append):
        async with lifespan(app), httpx.AsyncClient(transport=transport, base_url="http://a.test") as client:
            assert (await client.get("/approvals")).status_code == 401
            assert (await client.get("/approvals.json")).status_code == 401
            assert (await client.get("/approvals/style.css")).status_code == 200
            for chat in ("slack", "telegram"):
                assert (await client.post(f"/approvals/{chat}", content=b"{}")).status_code == 404, (
                    "it is not set up"
                )
    assert "secret" not in str(seen)


async def test_a_server_does_not_start_where_it_cannot_tell_who_may_approve(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATABASE_URL", AWAY)
    for policy in ("[[reviewer]]\nnames = 'ada'\n", "not toml", "[[reviewer]]\nname = 'a'\n" * 2):
        (place / "agent-policy.toml").write_text(policy)
        vars(human_approval_queue).pop("policy", None)
        with pytest.raises(ConfigurationError, match=r"agent-policy\.toml"):
            async with lifespan(app):
                pass


async def test_while_a_server_runs_what_is_past_its_time_expires_and_edits_are_checked(
    learning_database: ThrowawayDatabase,
) -> None:
    queue = HumanApprovalQueue(settings=learning_database.settings)
    try:
        async with keeping_approvals(queue):
            answer = await queue.request_approval("pay", {"amount": 1}, timeout=0.1)
            assert (answer["approved"], answer["state"]) == (False, "expired")
            pending = await queue.submit(_request(), Identity())
            assert queue.can_edit(pending)
    finally:
        await queue.database.close()


def _request() -> ApprovalRequest:
    return ApprovalRequest(
        tool="pay", arguments={}, args_hash=binding_hash("pay", {}, tenant_id="default"), risk=Risk.WRITE
    )


def test_the_interface_for_programs_is_described_and_pages_are_not() -> None:
    described = set(app.openapi()["paths"])
    assert described == {
        "/approvals.json",
        "/approvals/{approval_id}.json",
        "/approvals/{approval_id}/allow",
        "/approvals/{approval_id}/decide",
        "/alerts.json",
        "/alerts/{alert_id}.json",
        "/alerts/silence",
        "/alerts/silences/{silence_id}/end",
    }


async def test_two_applications_of_a_process_run_one_learner_and_one_monitor_until_the_last_ends(
    learning_database: ThrowawayDatabase,
) -> None:
    queue = HumanApprovalQueue(settings=learning_database.settings)
    first, second = House(queue), House(queue)
    async with keeping_time(first, queue.database):
        async with keeping_time(second, queue.database):
            assert first.clocks == second.clocks
            await _until(lambda: _clocks(learning_database.url) == ["learner", "monitor"])
        assert all(clock is not None and clock.is_running for clock in first.clocks.values())
    assert not any(clock is not None and clock.is_running for clock in first.clocks.values())
    assert _clocks(learning_database.url) == []
    await queue.database.close()


async def test_what_the_settings_switch_off_does_not_run(learning_database: ThrowawayDatabase) -> None:
    settings = learning_database.settings.model_copy(update={"learner": False, "monitor": False})
    queue = HumanApprovalQueue(settings=settings)
    here = House(queue)
    async with keeping_time(here, queue.database):
        assert here.clocks == {"learner": None, "monitor": None}


def _clocks(url: str) -> list[str]:
    return [clock for (clock,) in rows(url, "SELECT clock FROM agent_clock ORDER BY clock")]


async def _until(condition: Callable[[], bool]) -> None:
    loop = asyncio.get_running_loop()
    end = loop.time() + 30
    while not condition():
        assert loop.time() < end, "it did not come"
        await asyncio.sleep(0.05)
