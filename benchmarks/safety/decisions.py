"""A thousand tries to get something run that nobody said yes to: over Slack, Telegram, the web and the command line.

Requests go through the real routes to the real queue on a database of their own. What runs, runs as it would for real:
by a claim with the hash of what is about to be done. A try has harmed if it ran what it should not have.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from agent.approval.binding import binding_hash
from agent.approval.records import Approval
from agent.approval.risk import Risk
from agent.approval.telegram import TelegramChannel
from agent.errors import LearningError
from agent.identity import Identity
from agent.server.deliveries import finish
from agent.testing.throwaway import async_throwaway_database
from benchmarks.safety.section import Line, Section
from tests.approval_desk import BOB, Desk, open_desk, token_of
from tests.chat_servers import SLACK_SECRET, slack_signed

CHANNELS = ("slack", "telegram", "web", "cli")
EACH = 21
"""Tries of a kind over one channel."""
AT_ONCE = 20
ROUNDS_AT_ONCE = 4
"""For each channel one."""

MEMBERS = {"ada": ("UADA", 1001), "eve": ("UEVE", 1002), "max": ("UMAX", 1003), "nobody": ("UNOBODY", 666)}


class Bench:
    """Runs tries and counts what ran."""

    def __init__(self, desk: Desk) -> None:
        self.desk = desk
        self.ran: Counter[str] = Counter()
        """Approval -> how often something ran under it."""
        self.recorded = 0

    # --- deciding, as each channel does it

    async def decide(
        self,
        channel: str,
        approval: Approval,
        who: str = "ada",
        *,
        forged: bool = False,
        key: str | None = None,
    ) -> Callable[[], Awaitable[None]]:
        """A request that approves, ready to be sent once or again.

        Args:
            channel: over which.
            approval: what.
            who: reviewer's name; `nobody` is no reviewer.
            forged: signed with another secret.
            key: beginning of the hash that it names, where another than the approval's.
        """
        slack_user, telegram_user = MEMBERS[who]
        desk = self.desk
        if channel == "slack":
            payload = await desk.slack_press(approval, user=slack_user)
            if key is not None:
                value = json.loads(payload["actions"][0]["value"])
                value["approvals"] = {approval.approval_id: key}
                payload["actions"][0]["value"] = json.dumps(value)
            body, headers = slack_signed(payload, secret="another" if forged else SLACK_SECRET)

            async def send() -> None:
                await desk.http.post("/approvals/slack", content=body, headers=headers)

        elif channel == "telegram":
            # The button that we would have made for the other call.
            shown = approval if key is None else replace(approval, args_hash=key)
            data = TelegramChannel(desk.queue).button_data("a", [shown])
            update = await desk.telegram_press(approval, user=telegram_user, data=data)
            secret = "forged-secret-of-somebody" if forged else None

            async def send() -> None:
                await (desk.send_telegram(update, secret=secret) if secret else desk.send_telegram(update))

        elif channel == "web":
            token = "forged" if forged else token_of(who)
            content = {"verdict": "approve", "args_hash": key or approval.args_hash}
            address = f"/approvals/{approval.approval_id}/decide?tenant={approval.tenant_id}"

            async def send() -> None:
                await desk.http.post(address, json=content, headers={"authorization": f"Bearer {token}"})

        else:
            reviewer = desk.queue.policy.reviewers.by_name("nobody" if forged else who)

            async def send() -> None:
                if reviewer is None:
                    return  # `--as` somebody who is not listed
                await desk.queue.decide(
                    [approval.approval_id],
                    "approve",
                    reviewer,
                    channel="cli",
                    hashes={approval.approval_id: key or approval.args_hash},
                    identity_tenant=approval.tenant_id,
                )

        return send

    async def press(self, channel: str, approval: Approval, who: str = "ada", **given: Any) -> None:
        """One decision, worked on to its end."""
        await (await self.decide(channel, approval, who, **given))()
        await finish()

    async def must_be(self, approval: Approval, state: str, votes: int) -> None:
        """Stop where a try did not come as far as it should have: what was never near to running shows nothing.

        Raises:
            RuntimeError: the approval is in another state, or has another number of votes.
        """
        now = await self.desk.now(approval)
        if (now.state, len(now.votes)) != (state, votes):
            raise RuntimeError(
                f"an approval is {now.state} with {len(now.votes)} votes, not {state} with {votes}"
            )

    # --- running

    async def run(self, approval: Approval, arguments: dict[str, Any] | None = None) -> bool:
        """Try to run the approved call, or one with other arguments in its place."""
        done = dict(approval.arguments) if arguments is None else arguments
        identity = Identity(tenant_id=approval.tenant_id, user_id=approval.requested_by)
        hashed = binding_hash(approval.tool, done, tenant_id=approval.tenant_id)
        try:
            claim = await self.desk.queue.claim(
                approval.approval_id, identity, args_hash=hashed, claimed_by="benchmark"
            )
        except LearningError:
            return False
        if not claim["claimed"]:
            return False
        self.ran[approval.approval_id] += 1
        entry = {"state": "executed", "arguments_shown": done, "arguments_run": done}
        await self.desk.queue.finish(claim["ticket"], identity, entry)
        return True


Try = Callable[[Bench, str, Approval], Awaitable[int]]
"""One try over one channel. Returns how often something ran that should not have."""


async def _forged(bench: Bench, channel: str, approval: Approval) -> int:
    await bench.press(channel, approval, forged=True)
    return int(await bench.run(approval))


async def _expired(bench: Bench, channel: str, approval: Approval) -> int:
    await bench.press(channel, approval)
    return int(await bench.run(approval))


async def _replayed(bench: Bench, channel: str, approval: Approval) -> int:
    """Needs two votes; one request is sent three times."""
    send = await bench.decide(channel, approval)
    for _ in range(3):
        await send()
        await finish()
    await bench.must_be(approval, "pending", 1)
    return int(await bench.run(approval))


async def _re_used(bench: Bench, channel: str, approval: Approval) -> int:
    """It may run once; then it is decided and run again."""
    await bench.press(channel, approval)
    await bench.run(approval)
    await bench.must_be(approval, "executed", 1)
    await bench.press(channel, approval, "eve")
    await bench.run(approval)
    return max(bench.ran[approval.approval_id] - 1, 0)


async def _double_clicked(bench: Bench, channel: str, approval: Approval) -> int:
    """Needs two votes; one person presses five times at once."""
    presses = [await bench.decide(channel, approval) for _ in range(5)]
    await asyncio.gather(*(press() for press in presses))
    await finish()
    await bench.must_be(approval, "pending", 1)
    return int(await bench.run(approval))


async def _edited_after_approval(bench: Bench, channel: str, approval: Approval) -> int:
    await bench.press(channel, approval)
    await bench.must_be(approval, "approved", 1)
    return int(await bench.run(approval, {**approval.arguments, "amount": 999_999}))


async def _other_tenant(bench: Bench, channel: str, approval: Approval) -> int:
    """The reviewer decides for another tenant only."""
    await bench.press(channel, approval, "max")
    return int(await bench.run(approval))


async def _self_approved(bench: Bench, channel: str, approval: Approval) -> int:
    """Ada asked for it, under the id that she has as a user."""
    await bench.press(channel, approval, "ada")
    return int(await bench.run(approval))


async def _non_member(bench: Bench, channel: str, approval: Approval) -> int:
    await bench.press(channel, approval, "nobody")
    return int(await bench.run(approval))


async def _stale_interrupt(bench: Bench, channel: str, approval: Approval) -> int:
    """The pause is over, because it was withdrawn; then the old card is pressed."""
    send = await bench.decide(channel, approval)
    await bench.desk.queue.cancel(approval.approval_id, BOB, by="benchmark")
    await send()
    await finish()
    return int(await bench.run(approval))


async def _swapped_arguments(bench: Bench, channel: str, approval: Approval) -> int:
    """The request names the hash of another call, and the other call is run."""
    other = {**approval.arguments, "card": "9999"}
    hashed = binding_hash(approval.tool, other, tenant_id=approval.tenant_id)
    await bench.press(channel, approval, key=hashed)
    return int(await bench.run(approval, other)) + int(await bench.run(approval))


KINDS: Sequence[tuple[str, Try, dict[str, Any]]] = (
    ("forged", _forged, {}),
    ("expired", _expired, {"seconds": 45.0}),
    ("replayed", _replayed, {"votes": 2}),
    ("re-used", _re_used, {}),
    ("double-clicked", _double_clicked, {"votes": 2}),
    ("edited after approval", _edited_after_approval, {}),
    ("other tenant", _other_tenant, {}),
    ("self-approved", _self_approved, {"identity": Identity(tenant_id="default", user_id="ada-the-user")}),
    ("non-member", _non_member, {}),
    ("stale interrupt", _stale_interrupt, {}),
    ("swapped arguments", _swapped_arguments, {}),
)


async def _asked(desk: Desk, count: int, **given: Any) -> list[Approval]:
    """Approvals whose cards are delivered."""
    asked = [await desk.ask(**{"risk": Risk.WRITE, **given}) for _ in range(count)]
    waiting = {approval.approval_id for approval in asked}
    while waiting:
        await desk.deliver()
        for approval_id in list(waiting):
            now = await desk.queue.get(approval_id, BOB)
            if not now.is_open:
                raise RuntimeError(f"approval {approval_id} is {now.state} before its card is there")
            if len(now.messages) == 2:
                waiting.discard(approval_id)
    return asked


async def _concurrent(bench: Bench) -> tuple[int, int]:
    """An approved call is claimed by twenty at once. Returns tries, and runs above one for each approval."""
    harmed = 0
    for channel, approval in zip(CHANNELS, await _asked(bench.desk, ROUNDS_AT_ONCE), strict=True):
        await bench.press(channel, approval)
        await asyncio.gather(*(bench.run(approval) for _ in range(AT_ONCE)))
        harmed += abs(bench.ran[approval.approval_id] - 1)
    return AT_ONCE * ROUNDS_AT_ONCE, harmed


async def _allowed(bench: Bench) -> tuple[int, int]:
    """What should run: so that it is seen that tries could have succeeded. Returns tries and runs."""
    asked = await _asked(bench.desk, len(CHANNELS))
    for channel, approval in zip(CHANNELS, asked, strict=True):
        await bench.press(channel, approval)
    return len(asked), sum([await bench.run(approval) for approval in asked])


async def _measured() -> Section:
    began = time.perf_counter()
    lines: list[Line] = []
    total = harmed_in_all = 0
    with tempfile.TemporaryDirectory() as folder:
        async with async_throwaway_database() as database, open_desk(database, Path(folder)) as desk:
            bench = Bench(desk)
            asked, ran = await _allowed(bench)
            lines.append(
                Line(
                    what="approved as it should be, by channel",
                    printed=f"{ran} of {asked} ran",
                    reached=ran == asked,
                )
            )
            for name, attempt, given in KINDS:
                approvals = await _asked(desk, EACH * len(CHANNELS), **given)
                if name == "expired":
                    ends = max(approval.expires_at for approval in approvals)
                    await asyncio.sleep(max((ends - datetime.now(UTC)).total_seconds() + 0.1, 0))
                harmed = 0
                for number, approval in enumerate(approvals):
                    harmed += await attempt(bench, CHANNELS[number % len(CHANNELS)], approval)
                lines.append(_line(name, len(approvals), harmed))
                total, harmed_in_all = total + len(approvals), harmed_in_all + harmed
            tries, harmed = await _concurrent(bench)
            lines.append(_line(f"{AT_ONCE} at once", tries, harmed))
            total, harmed_in_all = total + tries, harmed_in_all + harmed
    lines.append(_line("all", total, harmed_in_all))
    lines.append(Line(what="time", printed=f"{time.perf_counter() - began:.0f} s", reached=None))
    return Section(title="Decisions that must not count", lines=lines)


def _line(name: str, tries: int, harmed: int) -> Line:
    return Line(what=name, printed=f"{harmed} of {tries} tries ran something (goal 0)", reached=harmed == 0)


def measure() -> Section:
    """Make all tries and count."""
    return asyncio.run(_measured())
