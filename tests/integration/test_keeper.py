"""What looks after approvals in the background."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest

from agent import listening
from agent.approval.human_approval import HumanApprovalQueue
from agent.approval.keeper import ApprovalKeeper, ResumeOrder
from agent.approval.records import Approval
from agent.database.postgres import PostgresDatabase
from agent.errors import ConfigurationError
from agent.events import Event
from agent.settings import Settings
from agent.testing.throwaway import ThrowawayDatabase
from tests.integration.approvals import ADA, BOB, POLICY, asked
from tests.integration.rows import rows, value


class Board:
    """A channel of this process: cards are lines."""

    name = "board"

    def __init__(self) -> None:
        self.lines: list[tuple[str, Any, tuple[str, ...], bool | None]] = []
        self.fails: list[Exception] = []
        self.changed = threading.Event()

    async def post(self, card_of: Sequence[Approval], *, escalated: bool) -> dict[str, Any]:
        return self._write("post", None, card_of, escalated=escalated)

    async def update(self, approvals: Sequence[Approval], ref: Mapping[str, Any]) -> dict[str, Any]:
        return self._write("update", dict(ref), approvals, escalated=None)

    def _write(
        self, what: str, ref: Any, card: Sequence[Approval], *, escalated: bool | None
    ) -> dict[str, Any]:
        if self.fails:
            raise self.fails.pop()
        self.lines.append((what, ref, tuple(each.state for each in card), escalated))
        self.changed.set()
        return {"line": len(self.lines)}


@pytest.fixture
async def database(learning_database: ThrowawayDatabase) -> AsyncIterator[PostgresDatabase]:
    """The transport to `learning_database`, as a server."""
    database = PostgresDatabase(learning_database.url)
    yield database
    await database.close()


@pytest.fixture
def queue(database: PostgresDatabase, learning_database: ThrowawayDatabase) -> HumanApprovalQueue:
    """A queue whose reviewers are those of `tests.integration.approvals`."""
    return HumanApprovalQueue(database, learning_database.settings, POLICY)


@pytest.fixture
def heard() -> Iterator[list[Event]]:
    events: list[Event] = []
    with listening(events.append):
        yield events


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not holds():  # noqa: ASYNC110 - it happens in another thread
            await asyncio.sleep(0.02)


async def vote(queue: HumanApprovalQueue, approval: dict[str, Any], verdict: str = "approve") -> None:
    the_id = approval["approval_id"]
    outcome = await queue.decide(
        [the_id], verdict, BOB, channel="test", hashes={the_id: approval["args_hash"]}
    )
    assert outcome.outcome == "recorded"


async def test_a_card_is_posted_once_and_made_true_after_each_change(
    queue: HumanApprovalQueue, database: PostgresDatabase
) -> None:
    board = Board()
    keeper = ApprovalKeeper(queue, [board])
    approval = await asked(database)

    await keeper.run_once()
    await keeper.run_once()
    await vote(queue, approval)
    await keeper.run_once()
    await keeper.run_once()

    assert board.lines == [
        ("post", None, ("pending",), False),
        ("update", {"line": 1}, ("approved",), None),
    ]
    assert (await queue.get(approval["approval_id"], ADA)).messages == (
        {"channel": "board", "ref": {"line": 2}},
    )


async def test_keepers_at_once_post_a_card_once(
    queue: HumanApprovalQueue, database: PostgresDatabase
) -> None:
    board = Board()
    for _ in range(5):
        await asked(database)

    await asyncio.gather(*[ApprovalKeeper(queue, [board]).run_once() for _ in range(6)])

    assert [line[0] for line in board.lines] == ["post"] * 5


async def test_a_channel_that_fails_is_tried_again_and_stops_no_other(
    queue: HumanApprovalQueue,
    database: PostgresDatabase,
    learning_database: ThrowawayDatabase,
    heard: list[Event],
) -> None:
    class Other(Board):
        name = "other"

    broken, fine = Board(), Other()
    broken.fails = [RuntimeError("the chat is down")]
    keeper = ApprovalKeeper(queue, [broken, fine])
    await asked(database)

    await keeper.run_once()
    assert (len(broken.lines), len(fine.lines)) == (0, 1)
    [event] = [each for each in heard if each.name == "approval_delivery_failed"]
    assert (event.facts["channel"], event.facts["reason"]) == ("board", "RuntimeError: the chat is down")
    await keeper.run_once()
    assert broken.lines == [], "not before it is due again"
    rows(learning_database.url, "UPDATE approval_delivery SET deliver_after = '-infinity'")
    await keeper.run_once()
    assert len(broken.lines) == 1


async def test_what_expires_is_shown_and_resumes_its_run(
    queue: HumanApprovalQueue, database: PostgresDatabase, learning_database: ThrowawayDatabase
) -> None:
    board, resumed = Board(), []

    async def resume(order: ResumeOrder) -> None:
        resumed.append(order)

    approval = await asked(database, held=True, expires_in_seconds=1, escalate_in_seconds=1)
    pause = {"thread_id": "t", "interrupt_id": "i", "assistant_id": "a"}
    keeper = ApprovalKeeper(queue, [board], resume)
    await keeper.run_once()
    assert board.lines == []
    await database.call("attach_interrupt", ADA, batch_id=approval["batch_id"], interrupt=pause)
    await keeper.run_once()
    await until(lambda: value(learning_database.url, "SELECT expires_at <= now() FROM human_approval_queue"))

    await keeper.run_once()
    await keeper.run_once()

    assert board.lines[-1][2] == ("expired",)
    [order] = resumed
    assert (order.batch_id, order.tenant_id, order.interrupt) == (approval["batch_id"], "default", pause)
    assert [each.verdict for each in order.approvals] == ["reject"]


async def test_a_run_that_cannot_be_resumed_is_tried_again(
    queue: HumanApprovalQueue,
    database: PostgresDatabase,
    learning_database: ThrowawayDatabase,
    heard: list[Event],
) -> None:
    tried: list[str] = []

    async def resume(order: ResumeOrder) -> None:
        tried.append(order.batch_id)
        if len(tried) == 1:
            raise RuntimeError("the thread is at work")

    approval = await asked(database)
    await database.call(
        "attach_interrupt", ADA, batch_id=approval["batch_id"], interrupt={"interrupt_id": "i"}
    )
    await vote(queue, approval)
    keeper = ApprovalKeeper(queue, [], resume)
    await keeper.run_once()
    assert [each.facts["reason"] for each in heard if each.name == "approval_resume_failed"] == [
        "RuntimeError: the thread is at work"
    ]
    await keeper.run_once()
    assert len(tried) == 1, "not before it is due again"
    rows(learning_database.url, "UPDATE approval_batch SET resume_after = '-infinity'")
    await keeper.run_once()
    rows(learning_database.url, "UPDATE approval_batch SET resume_after = '-infinity'")
    await keeper.run_once()
    assert len(tried) == 2


async def test_it_works_by_itself_from_start_to_stop(
    queue: HumanApprovalQueue, database: PostgresDatabase
) -> None:
    board, resumed = Board(), threading.Event()

    async def resume(order: ResumeOrder) -> None:
        resumed.set()

    keeper = ApprovalKeeper(queue, [board], resume)
    await keeper.start()
    await keeper.start()
    try:
        approval = await asked(database)
        await until(lambda: [line[0] for line in board.lines] == ["post"])
        await database.call(
            "attach_interrupt", ADA, batch_id=approval["batch_id"], interrupt={"interrupt_id": "i"}
        )
        await vote(queue, approval)
        await until(lambda: board.lines[-1][2] == ("approved",))
        await until(resumed.is_set)
    finally:
        await keeper.stop()
        await keeper.stop()
    lines = len(board.lines)
    await asked(database)
    assert len(board.lines) == lines


async def test_what_nobody_finished_becomes_unknown(
    queue: HumanApprovalQueue, database: PostgresDatabase, learning_database: ThrowawayDatabase
) -> None:
    approval = await asked(database)
    await vote(queue, approval)
    claimed = await queue.claim(
        approval["approval_id"], ADA, args_hash=approval["args_hash"], claimed_by="somebody who dies"
    )
    assert claimed["claimed"]
    await ApprovalKeeper(queue).run_once()
    assert (await queue.get(approval["approval_id"], ADA)).state == "executing"

    await ApprovalKeeper(queue, executing_seconds=0).run_once()

    after = await queue.get(approval["approval_id"], ADA)
    assert after.state == "unknown"
    assert value(learning_database.url, "SELECT state FROM agent_execution_log") == "unknown"


async def test_one_without_a_readable_policy_does_not_start(
    database: PostgresDatabase, tmp_path: Any
) -> None:
    (tmp_path / "policy.toml").write_text("[[reviewer]")
    queue = HumanApprovalQueue(database, Settings(policy_file=tmp_path / "policy.toml"))

    with pytest.raises(ConfigurationError):
        await ApprovalKeeper(queue).start()


class Stuck(Board):
    """A channel that never answers."""

    name = "stuck"

    async def post(self, card_of: Sequence[Approval], *, escalated: bool) -> dict[str, Any]:
        self.changed.set()
        await asyncio.Event().wait()
        raise AssertionError


async def test_a_channel_that_does_not_answer_holds_nothing_else_up(
    queue: HumanApprovalQueue, database: PostgresDatabase, learning_database: ThrowawayDatabase
) -> None:
    stuck, fine, resumed = Stuck(), Board(), []

    async def resume(order: ResumeOrder) -> None:
        resumed.append(order.batch_id)

    keeper = ApprovalKeeper(queue, [stuck, fine], resume)
    await asked(database)
    await keeper.start()
    try:
        await until(stuck.changed.is_set)
        later = await asked(database)
        await database.call(
            "attach_interrupt", ADA, batch_id=later["batch_id"], interrupt={"interrupt_id": "i"}
        )
        short = await asked(database, expires_in_seconds=1, escalate_in_seconds=1)
        await until(lambda: len(fine.lines) >= 3)
        await vote(queue, later)
        async with asyncio.timeout(20):
            await until(lambda: resumed == [later["batch_id"]])
            query = f"SELECT state FROM human_approval_queue WHERE approval_id = '{short['approval_id']}'"
            await until(lambda: value(learning_database.url, query) == "expired")
    finally:
        async with asyncio.timeout(10):
            await keeper.stop()
