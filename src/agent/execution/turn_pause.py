"""The pause of a graph in which people decide on the calls of a turn: what it shows, and what its answers mean."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from agent.approval.answers import Answer, BatchAnswer, Proposed, Verdict, payload, read_answers
from agent.approval.binding import canonical_json
from agent.errors import ConflictError, InvalidRequest, Refused
from agent.events import emit
from agent.execution.agent_tools import AgentTools
from agent.execution.call_description import describe
from agent.execution.gated_turn import Turn, newest
from agent.execution.safe_executor import SafeExecutor
from agent.execution.turn_rows import CHANNEL, TurnRows


class TurnPause:
    """Shows calls that wait, and takes the answers.

    Args:
        executor: whose approvals these are.
        tools: the agent's.
        rows: what is known of the turn.
    """

    def __init__(self, executor: SafeExecutor, tools: AgentTools, rows: TurnRows) -> None:
        self._executor = executor
        self._tools = tools
        self._rows = rows

    def payload(self, turn: Turn) -> dict[str, Any]:
        """What the interrupt carries."""
        asked = self._proposed(turn)
        message = "\n\n".join(call.description for call in asked)
        expires = min(
            (
                call.approval.expires_at
                for call in turn.asked
                if call.approval is not None and call.approval.is_open
            ),
            default=None,
        )
        return payload(
            asked,
            batch_id=turn.batch_id,
            message=f"{turn.notice}\n\n{message}" if turn.notice else message,
            expires_at=expires.isoformat() if expires is not None else None,
        )

    def _proposed(self, turn: Turn) -> list[Proposed]:
        found = []
        for call in turn.asked:
            approval = call.approval
            if approval is None:
                continue
            allowed: tuple[Verdict, ...] = ("approve", "edit", "reject")
            found.append(
                Proposed(
                    tool_call_id=call.id,
                    tool=approval.tool,
                    arguments=dict(approval.arguments),
                    description=describe(approval),
                    allowed=allowed if approval.is_open else ("approve", "reject"),
                    approval_id=approval.approval_id,
                    args_hash=approval.args_hash,
                    arguments_schema=self._tools.schema(approval.tool),
                )
            )
        return found

    async def show(self, turn: Turn, number: int) -> set[str]:
        """Note what the pause of this number shows. Returns what it showed already when the answer was given.

        On the way to a pause these are none; after it, when the node runs again, what the person saw. An answer counts
        by places, so it counts only for the very same calls in the same order: not where one came meanwhile, changed
        its place, or was edited elsewhere.
        """
        if number == 0 and turn.place is not None:
            await self._rows.was_asked_by_others(turn.place, turn.caller.identity.tenant_id)
        asked = [call.approval for call in turn.asked if call.approval is not None]
        whole = canonical_json([[approval.approval_id, approval.args_hash] for approval in asked])
        digest = hashlib.sha256(whole.encode()).hexdigest()
        if await self._rows.first_time(f"{turn.batch_id}:{number}:shown:{digest}"):
            return set()
        return {approval.approval_id for approval in asked if approval.is_open}

    async def answered(
        self,
        turn: Turn,
        number: int,
        value: Any,
        *,
        eligible: set[str],
        user_id: str | None,
        may_be_stale: bool,
    ) -> Turn:
        """Take an answer, once, and read the rows again."""
        notice = ""
        answers = read_answers(value, self._proposed(turn))
        if not isinstance(answers, BatchAnswer) and await self._rows.first_time(
            f"{turn.batch_id}:{number}:answered"
        ):
            if not eligible:
                notice = "The answer was given before this was shown, so it does not count."
            elif (
                may_be_stale
                and any(answer.verdict != "reject" for answer in answers)
                and await self._rows.first_time(f"{turn.batch_id}:stale")
            ):
                notice = (
                    "The answer did not say which pause it is for and may have been meant for the one before. "
                    "Please answer once more, or resume by the id of the interrupt."
                )
            else:
                notice = await self._vote(turn, number, answers, eligible, user_id)
        rows = await self._rows.approvals(turn.batch_id, turn.caller.identity)
        by_id = {row.approval_id: row for row in rows}
        calls = [
            call
            if call.approval is None
            else replace(call, approval=newest(by_id.get(call.approval.approval_id, call.approval), rows))
            for call in turn.calls
        ]
        return replace(turn, calls=calls, notice=notice)

    async def _vote(
        self, turn: Turn, number: int, answers: Sequence[Answer], eligible: set[str], user_id: str | None
    ) -> str:
        """Make votes of answers. Returns why some did not count."""
        queue = self._executor.queue
        reviewer = self._executor.policy.reviewers.for_interrupt(user_id)
        notices = []
        for call, answer in zip(turn.asked, answers, strict=True):
            approval = call.approval
            if approval is None or not approval.is_open or approval.approval_id not in eligible:
                continue
            if not answer.readable:
                emit("approval_answer_refused", approval_id=approval.approval_id, reason=answer.note)
            if reviewer is None and answer.verdict != "reject":
                notices.append(
                    "Whoever answered here may not approve: the policy file lets nobody answer interrupts as "
                    f"{'the user ' + repr(user_id) if user_id else 'a server without login'}."
                )
                continue
            key = f"{turn.batch_id}:{number}:{approval.approval_id}"
            try:
                is_changed = answer.arguments is not None and canonical_json(
                    dict(answer.arguments)
                ) != canonical_json(dict(approval.arguments))
                if is_changed and answer.arguments is not None and reviewer is not None:
                    self._tools.check_edit(approval, answer.arguments)
                    await queue.edit(
                        approval.approval_id,
                        dict(answer.arguments),
                        reviewer,
                        channel=CHANNEL,
                        reassess=self._executor.reassess,
                        identity_tenant=turn.caller.identity.tenant_id,
                        note=answer.note,
                    )
                    continue
                if reviewer is not None:
                    verdict = "reject" if answer.verdict == "reject" else "approve"
                    outcome = await queue.decide(
                        [approval.approval_id],
                        verdict,
                        reviewer,
                        channel=CHANNEL,
                        hashes={approval.approval_id: approval.args_hash},
                        identity_tenant=turn.caller.identity.tenant_id,
                        note=answer.note,
                        dedup_key=key,
                    )
                    if outcome.outcome != "refused":
                        continue
                    notices.append(f"The answer of {reviewer.name} does not count: {outcome.why}.")
                if answer.verdict == "reject":  # whoever may go on with the thread may say no to it
                    await queue.cancel(approval.approval_id, turn.caller.identity)
            except (InvalidRequest, Refused, ConflictError) as error:
                notices.append(f"The answer about {approval.tool} does not count: {error}")
        return " ".join(dict.fromkeys(notices))
