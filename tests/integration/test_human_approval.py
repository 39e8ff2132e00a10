"""The queue as programs use it: ask, wait, decide, edit, take up. Whatever is unclear is a no."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import pytest

from agent import Identity, listening
from agent.approval.binding import binding_hash
from agent.approval.human_approval import HumanApprovalQueue, Reassess
from agent.approval.policy_file import PolicyFile
from agent.approval.records import Approval, ApprovalRequest
from agent.approval.reviewers import Reviewer, Reviewers
from agent.approval.risk import Risk
from agent.database.postgres import PostgresDatabase
from agent.errors import ConflictError, DatabaseUnavailable, InvalidRequest, NotFound, Refused
from agent.events import Event
from agent.testing.throwaway import ThrowawayDatabase
from tests.integration.approvals import ADA, BOB, EVE, HASH, MAX, OTHER_HASH, POLICY, SELF
from tests.integration.rows import rows, value

CARD = {"card_last4": "1234"}


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


async def first_pending(queue: HumanApprovalQueue, identity: Identity = ADA) -> Approval:
    """What was just asked for, as soon as it is there."""
    async with asyncio.timeout(30):
        while not (found := await queue.get_pending_approvals(identity)):  # noqa: ASYNC110 - another task asks
            await asyncio.sleep(0.02)
        return found[0]


async def vote(
    queue: HumanApprovalQueue,
    approval: Approval,
    reviewer: Reviewer = BOB,
    verdict: str = "approve",
    **more: Any,
) -> str:
    outcome = await queue.decide(
        [approval.approval_id],
        verdict,
        reviewer,
        channel="test",
        hashes={approval.approval_id: approval.args_hash},
        identity_tenant=approval.tenant_id,
        **more,
    )
    return outcome.outcome


def a_request(**changes: Any) -> ApprovalRequest:
    made = ApprovalRequest(
        tool="pay",
        arguments=CARD,
        args_hash=HASH,
        risk=Risk.WRITE,
        approvers=("bob", "eve", "max", "boss"),
    )
    return replace(made, **changes)


async def ask(queue: HumanApprovalQueue, **more: Any) -> dict[str, Any]:
    arguments: dict[str, Any] = {"risk_level": "WRITE", "timeout": 60, "identity": ADA}
    return await queue.request_approval("pause_stripe_payouts", CARD, **arguments | more)


# Asking and waiting


async def test_a_yes_lets_the_program_go_on(queue: HumanApprovalQueue) -> None:
    waiting = asyncio.create_task(ask(queue))
    approval = await first_pending(queue)
    assert (approval.tool, approval.arguments, approval.requested_by) == ("pause_stripe_payouts", CARD, "ada")
    await vote(queue, approval, note="go on")

    answer = await waiting

    assert answer["approved"] is True
    assert answer["decided_by"] == ["bob"]
    assert (answer["arguments"], answer["note"]) == (CARD, "go on")
    assert answer["approval_id"] == approval.approval_id
    after = await queue.get(approval.approval_id, ADA)
    assert (after.state, after.log_id) == ("executed", answer["log_id"])


async def test_what_is_high_needs_two_people(queue: HumanApprovalQueue) -> None:
    waiting = asyncio.create_task(ask(queue, risk_level="HIGH"))
    approval = await first_pending(queue)
    assert (approval.risk, approval.required_votes, approval.approvers) == (
        Risk.DESTRUCTIVE,
        2,
        ("bob", "boss", "eve"),
    )
    await vote(queue, approval, BOB)
    assert not waiting.done()
    await vote(queue, approval, EVE)

    assert (await waiting)["decided_by"] == ["bob", "eve"]


async def test_a_no_is_a_no(queue: HumanApprovalQueue) -> None:
    waiting = asyncio.create_task(ask(queue))
    await vote(queue, await first_pending(queue), verdict="reject", note="not today")

    answer = await waiting

    assert (answer["approved"], answer["state"], answer["note"]) == (False, "rejected", "not today")


async def test_no_answer_is_a_no_and_a_yes_after_it_changes_nothing(queue: HumanApprovalQueue) -> None:
    answer = await ask(queue, timeout=0.2)

    assert (answer["approved"], answer["state"], answer["decided_by"]) == (False, "expired", [])
    late = await queue.get(answer["approval_id"], ADA)
    assert await vote(queue, late) == "refused"
    assert await queue.get_pending_approvals(ADA) == []


async def test_the_votes_that_the_policy_demands_cannot_be_lowered_and_nobody_can_be_added(
    queue: HumanApprovalQueue,
) -> None:
    waiting = asyncio.create_task(
        ask(queue, risk_level="DESTRUCTIVE", required_votes=1, approvers=["bob", "mallory", "eve", "max"])
    )
    approval = await first_pending(queue)
    waiting.cancel()

    assert (approval.required_votes, set(approval.approvers)) == (2, {"bob", "eve"})


async def test_what_is_forbidden_is_not_even_asked(queue: HumanApprovalQueue) -> None:
    with pytest.raises(InvalidRequest, match="FORBIDDEN"):
        await ask(queue, risk_level="FORBIDDEN")
    with pytest.raises(InvalidRequest, match="FORBIDDEN"):
        await queue.submit(a_request(risk=Risk.FORBIDDEN), ADA)
    assert await queue.list(ADA) == []


async def test_arguments_that_are_no_plain_values_are_refused(queue: HumanApprovalQueue) -> None:
    with pytest.raises(InvalidRequest):
        await queue.request_approval("pay", {"amount": float("nan")})


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"action": ""}, "names the action"),
        ({"action": None}, "names the action"),
        ({"args": None}, "args must be an object"),
        ({"timeout": "5"}, "timeout='5'"),
        ({"timeout": -1}, "timeout=-1"),
        ({"timeout": float("inf")}, "timeout=inf"),
        ({"timeout": None}, "timeout=None"),
    ],
)
async def test_what_is_no_request_is_told_in_plain_words(
    queue: HumanApprovalQueue, wrong: dict[str, Any], said: str
) -> None:
    given: dict[str, Any] = {"action": "pay", "args": {}, "timeout": 1}
    with pytest.raises(InvalidRequest, match=said):
        await queue.request_approval(**given | wrong)
    assert await queue.list(ADA) == []


@pytest.mark.parametrize(
    "of", [{"approvers": []}, {"approvers": ["boss"]}, {"risk_level": "DESTRUCTIVE", "approvers": ["bob"]}]
)
async def test_what_nobody_could_approve_is_refused_at_once(
    queue: HumanApprovalQueue, of: dict[str, Any]
) -> None:
    async with asyncio.timeout(20):
        answer = await ask(queue, timeout=300, **of)

    assert (answer["approved"], answer["state"], answer["approval_id"]) == (False, "refused", None)
    assert "would have to approve it" in answer["note"]
    assert answer["log_id"] is not None
    assert await queue.list(ADA) == []


async def test_who_stops_while_it_is_asked_stops_asking(
    queue: HumanApprovalQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, submit = asyncio.Event(), queue.submit
    loop = asyncio.get_running_loop()

    async def slow(*given: Any) -> Approval:
        loop.call_soon_threadsafe(begun.set)
        approval = await submit(*given)
        await asyncio.sleep(0.3)
        return approval

    monkeypatch.setattr(queue, "submit", slow)
    waiting = asyncio.create_task(ask(queue))
    await begun.wait()
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting

    approval = await first_pending(queue)
    assert (await queue.wait(approval.approval_id, ADA, 30)).state == "cancelled"


async def test_who_stops_waiting_stops_asking(queue: HumanApprovalQueue) -> None:
    waiting = asyncio.create_task(ask(queue))
    approval = await first_pending(queue)

    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting

    assert (await queue.wait(approval.approval_id, ADA, 30)).state == "cancelled"


async def test_many_wait_at_once_and_each_gets_its_own_answer(queue: HumanApprovalQueue) -> None:
    asked = [await queue.submit(a_request(args_hash=f"{number:064x}"), ADA) for number in range(8)]
    waiting = [asyncio.create_task(queue.wait(each.approval_id, ADA, 60)) for each in asked]
    for number, approval in enumerate(asked):
        await vote(queue, approval, verdict="approve" if number % 2 else "reject")

    found = await asyncio.gather(*waiting)

    assert [each.approval_id for each in found] == [each.approval_id for each in asked]
    assert [each.state for each in found] == ["rejected", "approved"] * 4


async def test_waiting_works_from_any_number_of_event_loops(queue: HumanApprovalQueue) -> None:
    approval = await queue.submit(a_request(), ADA)

    def elsewhere() -> str:
        return asyncio.run(queue.wait(approval.approval_id, ADA, 60)).state

    waiting = [asyncio.create_task(asyncio.to_thread(elsewhere)) for _ in range(2)]
    await vote(queue, approval)

    assert await asyncio.gather(*waiting) == ["approved", "approved"]


async def test_a_change_is_heard_where_the_connection_lets_us_listen(
    queue: HumanApprovalQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Looked for again only after the test is over: what comes before is heard.
    monkeypatch.setattr("agent.approval.human_approval._LOOK_AGAIN_SECONDS", 1000.0)
    approval = await queue.submit(a_request(), ADA)
    waiting = asyncio.create_task(queue.wait(approval.approval_id, ADA, 1000))
    async with asyncio.timeout(60):
        while not queue.notifications.is_listening:  # noqa: ASYNC110 - another thread listens
            await asyncio.sleep(0.02)
        await vote(queue, approval)
        assert (await waiting).state == "approved"


async def test_where_nothing_is_heard_the_row_is_looked_at_again(
    database: PostgresDatabase, learning_database: ThrowawayDatabase
) -> None:
    class Deaf(PostgresDatabase):
        """One that is reached in a way that tells no address, like Supabase's keys."""

        url = None  # type: ignore[assignment]

    deaf = Deaf(learning_database.url)
    queue = HumanApprovalQueue(deaf, learning_database.settings, POLICY)
    approval = await queue.submit(a_request(), ADA)
    waiting = asyncio.create_task(queue.wait(approval.approval_id, ADA, 60))
    await asyncio.sleep(0.1)
    await vote(HumanApprovalQueue(database, learning_database.settings, POLICY), approval)

    assert (await waiting).state == "approved"
    assert not queue.notifications.is_listening
    await deaf.close()


# The database gone


class Relay:
    """A way to a database that can be cut and mended."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._target = (parts.hostname, parts.port)
        self._parts = parts
        self._server: asyncio.Server | None = None
        self._port = 0
        self._writers: set[asyncio.StreamWriter] = set()

    @property
    def url(self) -> str:
        place = f"{self._parts.username}:{self._parts.password}@127.0.0.1:{self._port}"
        return urlunsplit(self._parts._replace(netloc=place))

    async def mend(self) -> None:
        self._server = await asyncio.start_server(self._carry, "127.0.0.1", self._port)
        self._port = self._server.sockets[0].getsockname()[1]

    async def cut(self) -> None:
        assert self._server is not None
        self._server.close()
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there_reader, there_writer = await asyncio.open_connection(*self._target)
        self._writers |= {writer, there_writer}

        async def pump(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
            with suppress(OSError):
                while data := await source.read(65536):
                    target.write(data)
                    await target.drain()
            target.transport.abort()

        await asyncio.gather(pump(reader, there_writer), pump(there_reader, writer))


@pytest.fixture
async def relay(learning_database: ThrowawayDatabase) -> AsyncIterator[Relay]:
    relay = Relay(learning_database.tcp_url)
    await relay.mend()
    yield relay
    await relay.cut()


@pytest.fixture
async def far_queue(relay: Relay, learning_database: ThrowawayDatabase) -> AsyncIterator[HumanApprovalQueue]:
    """A queue whose database can go away."""
    database = PostgresDatabase(relay.url)
    yield HumanApprovalQueue(database, learning_database.settings, POLICY)
    await database.close()


async def test_the_database_gone_while_waiting_is_a_no_and_the_state_is_clear_when_it_is_back(
    far_queue: HumanApprovalQueue, queue: HumanApprovalQueue, relay: Relay, heard: list[Event]
) -> None:
    waiting = asyncio.create_task(ask(far_queue, timeout=3))
    approval = await first_pending(queue)
    await relay.cut()
    await vote(queue, approval)  # somebody whose way is not cut

    answer = await waiting

    assert (answer["approved"], answer["state"], answer["decided_by"]) == (False, "unavailable", [])
    assert "approval_wait_unavailable" in [event.name for event in heard]
    await relay.mend()
    assert (await queue.get(approval.approval_id, ADA)).state in ("approved", "expired"), "never executed"
    assert await queue.cancel(approval.approval_id, ADA) == await queue.get(approval.approval_id, ADA)
    assert (await queue.get(approval.approval_id, ADA)).state == "expired"


async def test_a_database_that_comes_back_in_time_gives_the_answer(
    far_queue: HumanApprovalQueue, queue: HumanApprovalQueue, relay: Relay
) -> None:
    waiting = asyncio.create_task(ask(far_queue))
    approval = await first_pending(queue)
    await relay.cut()
    await vote(queue, approval)
    await asyncio.sleep(0.5)
    await relay.mend()

    assert (await waiting)["approved"] is True


async def test_where_nothing_can_be_asked_it_is_an_error(far_queue: HumanApprovalQueue, relay: Relay) -> None:
    await relay.cut()

    with pytest.raises(DatabaseUnavailable):
        await ask(far_queue)


# Deciding


async def test_the_policy_of_now_has_a_say_as_well(
    database: PostgresDatabase,
    learning_database: ThrowawayDatabase,
    queue: HumanApprovalQueue,
    heard: list[Event],
) -> None:
    approval = await queue.submit(a_request(), ADA)
    without_bob = HumanApprovalQueue(
        database, learning_database.settings, PolicyFile(reviewers=Reviewers([EVE, MAX]))
    )

    assert await vote(without_bob, approval, BOB) == "refused"
    assert "decision_refused" in [event.name for event in heard]
    assert await vote(queue, approval, BOB) == "recorded"
    claimed = await without_bob.claim(approval.approval_id, ADA, args_hash=HASH, claimed_by="p")
    assert (claimed["claimed"], claimed["ticket"]) == (False, None)
    assert (await queue.claim(approval.approval_id, ADA, args_hash=HASH, claimed_by="p"))["claimed"]


@pytest.mark.parametrize("reviewer", [SELF, Reviewer(name="mallory"), Reviewer(name="ada")])
async def test_who_may_not_decide_changes_nothing(queue: HumanApprovalQueue, reviewer: Reviewer) -> None:
    approval = await queue.submit(a_request(), ADA)

    assert await vote(queue, approval, reviewer) == "refused"
    assert (await queue.get(approval.approval_id, ADA)).votes == ()


async def test_a_risk_that_is_not_theirs_is_not_decided(queue: HumanApprovalQueue) -> None:
    approval = await queue.submit(a_request(risk=Risk.DESTRUCTIVE), ADA)

    assert await vote(queue, approval, MAX) == "refused"


@pytest.mark.parametrize("hashes", [{}, {"x": HASH}, OTHER_HASH, HASH[:15], ""])
async def test_a_decision_about_something_else_changes_nothing(
    queue: HumanApprovalQueue, hashes: Any
) -> None:
    approval = await queue.submit(a_request(), ADA)
    if isinstance(hashes, str):
        hashes = {approval.approval_id: hashes}
    elif hashes:
        hashes = {approval.batch_id: HASH}

    outcome = await queue.decide([approval.approval_id], "approve", BOB, channel="test", hashes=hashes)

    assert outcome.outcome == "refused"


async def test_an_unknown_id_or_another_tenant_is_refused(queue: HumanApprovalQueue) -> None:
    approval = await queue.submit(a_request(), ADA)
    foreign = await queue.decide(
        [approval.approval_id], "approve", BOB, channel="test", hashes={}, identity_tenant="t2"
    )

    assert (foreign.outcome, foreign.approvals) == ("refused", ())
    with pytest.raises(NotFound):
        await queue.get("no id", ADA)
    with pytest.raises(NotFound):
        await queue.get(approval.approval_id, ADA.with_(tenant_id="t2"))


async def test_the_documents_of_a_batch_come_back_in_the_order_they_were_named(
    queue: HumanApprovalQueue,
) -> None:
    one = await queue.submit(a_request(), ADA)
    two = await queue.submit(a_request(batch_id=one.batch_id), ADA)
    hashes = {each.approval_id: each.args_hash for each in (one, two)}

    outcome = await queue.decide(
        [two.approval_id, one.approval_id], "approve", BOB, channel="test", hashes=hashes
    )

    assert [each.approval_id for each in outcome.approvals] == [two.approval_id, one.approval_id]
    assert {each.verdict for each in outcome.approvals} == {"approve"}
    assert [each.approval_id for each in await queue.of_batch(one.batch_id, ADA)] == [
        one.approval_id,
        two.approval_id,
    ]


# Editing


def reassess_as(risk: Risk = Risk.WRITE, **more: Any) -> Reassess:
    async def reassess(approval: Approval, arguments: dict[str, Any]) -> ApprovalRequest:
        return a_request(
            arguments=arguments,
            args_hash=binding_hash("pay", arguments, tenant_id=approval.tenant_id),
            risk=risk,
            approved_by="policy:1",
            **more,
        )

    return reassess


async def test_an_edit_is_approved_by_its_editor_and_waited_for(queue: HumanApprovalQueue) -> None:
    queue.reassess_with("action", reassess_as())
    waiting = asyncio.create_task(ask(queue))
    old = await first_pending(queue)

    async def reassess(approval: Approval, arguments: dict[str, Any]) -> ApprovalRequest:
        made = await reassess_as()(approval, arguments)
        return replace(made, tool=approval.tool)

    new = await queue.edit(
        old.approval_id, {"card_last4": "9999"}, BOB, channel="web", reassess=reassess, note="the other card"
    )

    assert (new.replaces, new.edited_by, new.requested_by) == (old.approval_id, "bob", "ada")
    assert [(each["voter"], each["channel"]) for each in new.votes] == [("bob", "web")]
    answer = await waiting
    assert (answer["approved"], answer["arguments"]) == (True, {"card_last4": "9999"})
    assert answer["approval_id"] == new.approval_id


async def test_an_edit_never_lowers_the_risk_and_something_destructive_is_approved_by_others(
    queue: HumanApprovalQueue,
) -> None:
    queue.reassess_with("action", reassess_as(Risk.READ))
    old = await queue.submit(a_request(risk=Risk.DESTRUCTIVE, required_votes=1), ADA)

    new = await queue.edit(old.approval_id, {"a": 1}, BOB, channel="web")

    assert (new.risk, new.state, new.votes) == (Risk.DESTRUCTIVE, "pending", ())
    assert await vote(queue, new, BOB) == "refused"
    assert await vote(queue, new, EVE) == "recorded"


async def test_an_edit_keeps_the_quorum_and_the_people_of_the_request(queue: HumanApprovalQueue) -> None:
    waiting = asyncio.create_task(ask(queue, required_votes=2, approvers=["bob", "eve"]))
    old = await first_pending(queue)

    async def reassess(approval: Approval, arguments: dict[str, Any]) -> ApprovalRequest:
        made = await reassess_as(approvers=("bob", "eve", "max"), required_votes=1)(approval, arguments)
        return replace(made, tool=approval.tool)

    new = await queue.edit(old.approval_id, {"n": 1_000_000}, BOB, channel="web", reassess=reassess)

    assert (new.state, new.required_votes, new.approvers) == ("pending", 2, ("bob", "eve"))
    assert [each["voter"] for each in new.votes] == ["bob"]
    assert await vote(queue, new, MAX) == "refused"
    assert await vote(queue, new, EVE) == "recorded"
    assert (await waiting)["decided_by"] == ["bob", "eve"]


async def test_a_row_that_was_changed_after_it_was_asked_for_is_not_handed_out(
    queue: HumanApprovalQueue, learning_database: ThrowawayDatabase
) -> None:
    waiting = asyncio.create_task(ask(queue))
    approval = await first_pending(queue)
    rows(learning_database.url, 'UPDATE human_approval_queue SET arguments = \'{"card_last4": "6666"}\'')
    await vote(queue, approval)

    answer = await waiting

    assert (answer["approved"], answer["log_id"]) == (False, None)
    assert "changed after it was asked for" in answer["note"]


async def test_without_somebody_who_can_check_it_an_edit_is_refused(queue: HumanApprovalQueue) -> None:
    old = await queue.submit(a_request(), ADA)

    assert not queue.can_edit(old)
    with pytest.raises(InvalidRequest, match="cannot be edited here"):
        await queue.edit(old.approval_id, {"a": 1}, BOB, channel="web")
    queue.reassess_with("action", reassess_as())
    assert queue.can_edit(old)
    assert queue.schema_of(old) is None
    queue.describe_with("action", lambda approval: {"title": approval.tool})
    assert queue.schema_of(old) == {"title": "pay"}


async def test_an_edit_by_the_wrong_person_of_another_tool_or_too_late_is_refused(
    queue: HumanApprovalQueue,
) -> None:
    queue.reassess_with("action", reassess_as())
    old = await queue.submit(a_request(), ADA)
    for reviewer in (SELF, Reviewer(name="mallory")):
        with pytest.raises(Refused):
            await queue.edit(old.approval_id, {"a": 1}, reviewer, channel="web")

    async def other_tool(approval: Approval, arguments: dict[str, Any]) -> ApprovalRequest:
        return a_request(tool="drop_database", arguments=arguments)

    with pytest.raises(Refused, match="never the tool"):
        await queue.edit(old.approval_id, {"a": 1}, BOB, channel="web", reassess=other_tool)
    await vote(queue, old)
    with pytest.raises(ConflictError):
        await queue.edit(old.approval_id, {"a": 1}, BOB, channel="web")


async def test_two_edits_at_once_leave_one_request(queue: HumanApprovalQueue) -> None:
    queue.reassess_with("action", reassess_as())
    old = await queue.submit(a_request(), ADA)

    found = await asyncio.gather(
        *[queue.edit(old.approval_id, {"a": number}, BOB, channel="web") for number in range(6)],
        return_exceptions=True,
    )

    assert sum(isinstance(each, Approval) for each in found) == 1
    assert {type(each) for each in found} == {Approval, ConflictError}


# Taking up


async def test_a_claim_is_finished_with_its_ticket_alone(
    queue: HumanApprovalQueue, learning_database: ThrowawayDatabase
) -> None:
    approval = await queue.submit(a_request(), ADA)
    await vote(queue, approval)
    claims = await asyncio.gather(
        *[queue.claim(approval.approval_id, ADA, args_hash=HASH, claimed_by="p") for _ in range(20)]
    )
    [ticket] = [each["ticket"] for each in claims if each["claimed"]]

    with pytest.raises(NotFound):
        await queue.finish(None, ADA, {"state": "executed"})
    ended = await queue.finish(ticket, ADA, {"state": "failed", "error": "no"})

    assert ended["state"] == "failed"
    assert value(learning_database.url, "SELECT count(*) FROM agent_execution_log") == 1
    assert ticket not in str(rows(learning_database.url, "SELECT q::text FROM human_approval_queue q"))
