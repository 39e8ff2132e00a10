"""The calls of one turn of an agent: what may run, what waits for people, what was decided. For middleware and node.

A pause of a graph runs its node again from the top, with the answers given so far. So all of this may be done twice:
requests have keys, answers are taken once, and what is run was claimed.
"""

from __future__ import annotations

import uuid
from collections.abc import Collection, Generator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from langchain_core.messages import AIMessage, BaseMessage, ToolMessage
from langchain_core.runnables import RunnableConfig
from langgraph.types import interrupt

from agent.approval.binding import canonical_json
from agent.approval.graph_resume import announce_pause, is_watched
from agent.approval.records import Approval
from agent.approval.risk import Risk
from agent.errors import ConfigurationError, ConflictError, InvalidRequest, LearningError, Refused
from agent.events import emit
from agent.execution.agent_tools import AgentTools
from agent.execution.decided_calls import DecidedCalls
from agent.execution.execution_records import Status, call_key
from agent.execution.gated_turn import Caller, GatedCall, Turn, batch_of, newest, place_of
from agent.execution.safe_executor import SafeExecutor
from agent.execution.taint import around_tainted, read_untrusted
from agent.execution.turn_pause import TurnPause
from agent.execution.turn_rows import TurnRows
from agent.identity import Identity
from agent.learning.tool_experience_notices import has_failed, with_what_is_known

__all__ = ["CallGate", "around_tainted", "read_untrusted"]

_REASON_CHARACTERS_MAX: Final = 1_000


class CallGate:
    """What middleware and node share.

    Args:
        executor: who assesses, asks and runs.
        risks: how dangerous each LangChain tool is, by name; a tool that is not named is WRITE and asks.
        untrusted_tools: names of tools whose results hold text of strangers; `"*"` means all.
    """

    def __init__(
        self,
        executor: SafeExecutor,
        *,
        risks: Mapping[str, Risk | str] | None = None,
        untrusted_tools: Collection[str] = (),
    ) -> None:
        if not isinstance(executor, SafeExecutor):
            raise ConfigurationError(
                f"executor={executor!r} must be a SafeExecutor, not {type(executor).__name__}"
            )
        self.executor = executor
        self.tools = AgentTools(executor, risks=risks, untrusted_tools=untrusted_tools)
        """What the agent has."""
        self.decided = DecidedCalls(executor, self.tools)
        """Runs what was decided."""
        self._rows = TurnRows(executor)
        self._pause = TurnPause(executor, self.tools, self._rows)

    async def ready(self) -> None:
        """Let the seals be those of all processes on this database, where the database can be asked."""
        try:
            await self.executor.database.prepare()
        except LearningError as error:  # each call says for itself that it cannot be allowed
            emit("tool_call_unavailable", tool=None, risk=None, reason=str(error))

    def turn(
        self,
        message: AIMessage,
        caller: Caller,
        config: RunnableConfig,
        *,
        user_id: str | None,
        paused_before: bool,
        earlier: Sequence[BaseMessage] = (),
    ) -> Generator[Any, Any, Turn]:
        """Assess the calls of a message, ask where it is needed, and pause until all is decided.

        Yields coroutines whose results it wants sent back: they are done in the portal. The interrupt is raised here,
        in the node's own context.

        Args:
            message: the model's.
            caller: whose turn it is.
            config: of the node.
            user_id: who resumed the run, where a server knows.
            paused_before: whether an answer may have been meant for an earlier pause of the run.
            earlier: the messages up to this one, for the warning that people are shown.
        """
        turn: Turn = yield self._open(message, caller, held=is_watched(config), earlier=earlier)
        number = 0
        while turn.waits:
            eligible: set[str] = yield self._pause.show(turn, number)
            announce_pause(turn.batch_id, caller.identity, config)
            is_named = _is_named(config)
            answer = interrupt(self._pause.payload(turn))
            turn = yield self._pause.answered(
                turn,
                number,
                answer,
                eligible=eligible,
                user_id=user_id,
                # An answer that names no pause may have been meant for the one before.
                may_be_stale=not is_named and (paused_before or number > 0),
            )
            number += 1
        return turn

    async def _open(
        self, message: AIMessage, caller: Caller, *, held: bool, earlier: Sequence[BaseMessage]
    ) -> Turn:
        message_id = message.id
        if caller.thread_id is None:  # never resumed; and ids of messages may be the same for several users
            message_id = str(uuid.uuid4())
        try:
            batch_id = batch_of(caller, message_id)
            known = await self._rows.approvals(batch_id, caller.identity)
        except LearningError as error:  # no answer is a no
            return self.refused(message, caller, str(error))
        if known:  # who asked was settled when it was asked; whoever resumes a run does not become them
            asked = known[0]
            caller = replace(
                caller,
                identity=caller.identity.with_(
                    user_id=asked.requested_by,
                    agent_id=asked.agent_id,
                    session_id=asked.session_id,
                    run_id=asked.run_id,
                ),
            )
        calls = []
        for place, call in enumerate(message.tool_calls):
            call_id = call.get("id") or f"call-{place}"
            key = call_key(caller.thread_id, message_id, call_id)
            gated = GatedCall(id=call_id, name=call["name"], original=dict(call["args"]))
            row = next((row for row in known if row.request_key == key), None)
            if row is not None:
                calls.append(await self._known(gated, row, known, caller))
            else:
                calls.append(
                    await self._asked(
                        gated,
                        caller,
                        key=key,
                        batch_id=batch_id,
                        held=held,
                        reason=message.text.strip(),
                        earlier=earlier,
                    )
                )
        return Turn(
            batch_id=batch_id, caller=caller, calls=calls, place=place_of(caller.thread_id, message_id)
        )

    def refused(self, message: AIMessage, caller: Caller, why: str, status: Status = "failed") -> Turn:
        """The turn in which none of the message's calls runs."""
        return Turn(
            batch_id=str(uuid.uuid4()),
            caller=caller,
            calls=[
                GatedCall(
                    id=call.get("id") or f"call-{place}",
                    name=call["name"],
                    original=dict(call["args"]),
                    refusal=(status, why, Risk.WRITE),
                )
                for place, call in enumerate(message.tool_calls)
            ],
        )

    def may_be_told(self, result: Any) -> bool:
        """Whether an agent is to be told what is known of the error in this result."""
        return self.executor.settings.tool_warnings and has_failed(result)

    async def told(
        self, failed: ToolMessage, identity: Identity, earlier: Sequence[BaseMessage]
    ) -> ToolMessage:
        """The message of a failed call with what such calls have in common, as far as that is known."""
        return await with_what_is_known(
            self.executor.database,
            identity,
            failed,
            earlier=earlier,
            wait=self.executor.settings.recall_timeout,
        )

    async def is_anothers(self, message: AIMessage, caller: Caller) -> bool:
        """Whether the calls of this message were asked about before, for another tenant than the caller's."""
        place = place_of(caller.thread_id, message.id)
        if place is None or await self._rows.approvals(batch_of(caller, message.id), caller.identity):
            return False
        return await self._rows.was_asked_by_others(place, caller.identity.tenant_id)

    async def _known(
        self, call: GatedCall, row: Approval, known: Sequence[Approval], caller: Caller
    ) -> GatedCall:
        """A call that was proposed before; one that is another by now is not run, and neither is the old one."""
        try:
            is_same = row.tool == call.name and canonical_json(row.arguments) == canonical_json(
                self.tools.normal(call.name, call.original)
            )
        except InvalidRequest:
            is_same = False
        if not is_same:
            latest = newest(row, known)
            await self.executor.queue.cancel(latest.approval_id, caller.identity)
            return replace(
                call,
                refusal=("refused", "the call was changed after it was proposed", row.risk),
            )
        return replace(call, approval=newest(row, known))

    async def _asked(
        self,
        call: GatedCall,
        caller: Caller,
        *,
        key: str,
        batch_id: str,
        held: bool,
        reason: str,
        earlier: Sequence[BaseMessage],
    ) -> GatedCall:
        """A call that comes for the first time."""
        try:
            found = await self.tools.assess(call.name, call.original, caller, call.id)
            if found.decision == "deny":
                status: Status = "refused" if found.risk is Risk.FORBIDDEN else "denied"
                return replace(call, refusal=(status, found.why, found.risk))
            if found.decision == "allow" and found.risk is Risk.READ:
                return replace(call, assessment=found)
            approval = await self.executor.permits.propose(
                found,
                caller.identity,
                request_key=key,
                batch_id=batch_id,
                held=held,
                reason=reason[:_REASON_CHARACTERS_MAX],
                earlier=earlier,
            )
        except (InvalidRequest, Refused, ConflictError) as error:
            status = "denied" if isinstance(error, Refused) else "refused"
            return replace(call, refusal=(status, str(error), Risk.WRITE))
        except LearningError as error:  # no answer is a no
            return replace(call, refusal=("failed", str(error), Risk.WRITE))
        return replace(call, approval=approval)


def _is_named(config: RunnableConfig) -> bool:
    """Whether the run was resumed by the id of its interrupt, which LangGraph keeps in the configuration."""
    return bool((config.get("configurable") or {}).get("__pregel_resume_map"))
