"""The calls of one turn of an agent: what may run, what waits for people, what was decided. For middleware and node.

A pause of a graph runs its node again from the top, with the answers given so far. So all of this may be done twice:
requests have keys, answers are taken once, and what is run was claimed.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, Final

from langchain_core.messages import AIMessage, BaseMessage, RemoveMessage, ToolMessage
from langchain_core.runnables import RunnableConfig
from langchain_core.tools import BaseTool
from langgraph.errors import GraphBubbleUp
from langgraph.types import Command, Send, interrupt
from pydantic import BaseModel

from agent.approval.answers import UNREADABLE, Answer, BatchAnswer, Proposed, Verdict, payload, read_answers
from agent.approval.binding import binding_hash, canonical_json
from agent.approval.card import visible
from agent.approval.graph_resume import announce_pause, is_watched
from agent.approval.records import Approval
from agent.approval.risk import Risk
from agent.errors import ConfigurationError, ConflictError, InvalidRequest, LearningError, Refused
from agent.events import emit
from agent.execution.call_arguments import check_taken
from agent.execution.call_judging import judged, still_approved
from agent.execution.execution_records import (
    Assessment,
    ExecutionResult,
    Permit,
    Status,
    call_key,
    failure_of,
)
from agent.execution.result_text import fenced
from agent.execution.safe_executor import SafeExecutor
from agent.execution.tool_registry import Appraisal, ToolOutcome
from agent.identity import Identity

CHANNEL: Final = "interrupt"
UNTRUSTED: Final = "agent_untrusted"
"""Mark of a tool's message whose text is a stranger's."""

_BATCHES: Final = uuid.UUID("5b1a8c52-7f0e-4d0c-9a55-6e0d6f1f6c11")
_EDITS_MAX: Final = 100
_MEDIA: Final = frozenset({"image", "image_url", "audio", "input_audio", "video"})
_REASON_CHARACTERS_MAX: Final = 1_000

read_untrusted: ContextVar[list[bool] | None] = ContextVar("agent_read_untrusted", default=None)
"""Whether the call around this code has read untrusted text: a list of one, which agents inside it set."""

around_tainted: ContextVar[bool] = ContextVar("agent_around_tainted", default=False)
"""Whether the agent whose call is around this code had read untrusted text before it made the call."""


@dataclass(frozen=True, kw_only=True)
class Caller:
    """Whose turn it is."""

    identity: Identity
    thread_id: str | None
    tainted: bool = False
    written: frozenset[str] = frozenset()
    """Names of the tools of this run that agents wrote: what those call is gated, each call for itself."""


@dataclass(frozen=True, kw_only=True)
class GatedCall:
    """One call of the turn."""

    id: str
    name: str
    original: Mapping[str, Any]
    """The arguments as the model wrote them."""
    assessment: Assessment | None = None
    """Of a call that runs without asking."""
    approval: Approval | None = None
    """Of a call that waits, or waited; the newest where it was edited."""
    refusal: tuple[Status, str, Risk] | None = None
    """Set: it does not run, and why."""

    @property
    def is_asked(self) -> bool:
        """Whether people are asked, rather than a rule."""
        return self.approval is not None and not any(
            by.startswith(("policy:", "rule:")) for by in self.approval.decided_by
        )


@dataclass(frozen=True, kw_only=True)
class Turn:
    """All calls of one message of the model."""

    batch_id: str
    caller: Caller
    calls: Sequence[GatedCall]
    place: str | None = None
    """Thread and message, whoever asks; `None` where there is no thread to come back to."""
    notice: str = ""
    """Why the answer before did not count."""

    @property
    def asked(self) -> list[GatedCall]:
        """The calls that people are asked about; the same ones at every pause of a turn."""
        return [call for call in self.calls if call.is_asked]

    @property
    def waits(self) -> bool:
        """Whether a decision is missing."""
        return any(call.approval is not None and call.approval.is_open for call in self.calls)


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
        if risks is not None and not isinstance(risks, Mapping):
            raise ConfigurationError(f"risks={risks!r} must be a mapping of names to risks")
        if (
            isinstance(untrusted_tools, str)
            or not isinstance(untrusted_tools, Collection)
            or not all(isinstance(name, str) for name in untrusted_tools)
        ):
            raise ConfigurationError(f"untrusted_tools={untrusted_tools!r} must be a collection of names")
        self.executor = executor
        try:
            self.risks = {name: Risk.of(str(risk)) for name, risk in (risks or {}).items()}
        except LearningError as error:
            raise ConfigurationError(f"risks: {error}") from None
        self.untrusted_tools = frozenset(untrusted_tools)
        self.tools: dict[str, BaseTool] = {}
        """Tools seen so far, to check calls and edits by."""
        self.has_seen_tools = False
        """Whether the tools of the agent were seen in this process: a call of another is of none."""

    def unknown_names(self, written: Collection[str] = ()) -> list[str]:
        """Names in `risks` and `untrusted_tools` that no tool has."""
        known = {"*", *self.tools, *written, *(spec.name for spec in self.executor.registry)}
        return sorted((set(self.risks) | self.untrusted_tools) - known)

    async def ready(self) -> None:
        """Let the seals be those of all processes on this database, where the database can be asked."""
        try:
            await self.executor.database.prepare()
        except LearningError as error:  # each call says for itself that it cannot be allowed
            emit("tool_call_unavailable", tool=None, risk=None, reason=str(error))

    # Taint

    def is_untrusted(self, name: str) -> bool:
        """Whether a tool's results hold text of strangers."""
        spec = self.executor.registry.get(name)
        return bool({"*", name} & self.untrusted_tools) or (spec is not None and spec.untrusted)

    def taints(self, messages: Sequence[Any]) -> bool:
        """Whether these messages hold the result of an untrusted tool."""
        return any(
            isinstance(message, ToolMessage)
            and (
                message.additional_kwargs.get(UNTRUSTED) is True
                or (message.name is not None and self.is_untrusted(message.name))
            )
            for message in messages
        )

    # A turn

    def turn(
        self,
        message: AIMessage,
        caller: Caller,
        config: RunnableConfig,
        *,
        user_id: str | None,
        paused_before: bool,
    ) -> Generator[Any, Any, Turn]:
        """Assess the calls of a message, ask where it is needed, and pause until all is decided.

        Yields coroutines whose results it wants sent back: they are done in the portal. The interrupt is raised here,
        in the node's own context.
        """
        turn: Turn = yield self._open(message, caller, held=is_watched(config))
        number = 0
        while turn.waits:
            eligible: set[str] = yield self._show(turn, number)
            announce_pause(turn.batch_id, caller.identity, config)
            is_named = _is_named(config)
            answer = interrupt(self._payload(turn))
            turn = yield self._answered(
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

    async def _open(self, message: AIMessage, caller: Caller, *, held: bool) -> Turn:
        message_id = message.id
        if caller.thread_id is None:  # never resumed; and ids of messages may be the same for several users
            message_id = str(uuid.uuid4())
        try:
            batch_id = _batch_of(caller, message_id)
            known = await self._rows(batch_id, caller.identity)
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
                        gated, caller, key=key, batch_id=batch_id, held=held, reason=message.text.strip()
                    )
                )
        return Turn(batch_id=batch_id, caller=caller, calls=calls, place=_place(caller.thread_id, message_id))

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

    async def is_anothers(self, message: AIMessage, caller: Caller) -> bool:
        """Whether the calls of this message were asked about before, for another tenant than the caller's."""
        place = _place(caller.thread_id, message.id)
        if place is None or await self._rows(_batch_of(caller, message.id), caller.identity):
            return False
        return await self._was_asked_by_others(place, caller.identity.tenant_id)

    async def _was_asked_by_others(self, place: str, tenant_id: str) -> bool:
        """Enter that this tenant came by. Whether another was here first, and this one never."""
        is_first = await self._first_time(f"{place}:asked")
        is_first_of_tenant = await self._first_time(f"{place}:asked:{_tenant_mark(tenant_id)}")
        return is_first_of_tenant and not is_first

    async def _known(
        self, call: GatedCall, row: Approval, known: Sequence[Approval], caller: Caller
    ) -> GatedCall:
        """A call that was proposed before; one that is another by now is not run, and neither is the old one."""
        try:
            is_same = row.tool == call.name and canonical_json(row.arguments) == canonical_json(
                self._normal(call.name, call.original)
            )
        except InvalidRequest:
            is_same = False
        if not is_same:
            newest = _newest(row, known)
            await self.executor.queue.cancel(newest.approval_id, caller.identity)
            return replace(
                call,
                refusal=("refused", "the call was changed after it was proposed", row.risk),
            )
        return replace(call, approval=_newest(row, known))

    async def _asked(
        self, call: GatedCall, caller: Caller, *, key: str, batch_id: str, held: bool, reason: str
    ) -> GatedCall:
        """A call that comes for the first time."""
        try:
            found = await self.assess(call.name, call.original, caller, call.id)
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
            )
        except (InvalidRequest, Refused, ConflictError) as error:
            status = "denied" if isinstance(error, Refused) else "refused"
            return replace(call, refusal=(status, str(error), Risk.WRITE))
        except LearningError as error:  # no answer is a no
            return replace(call, refusal=("failed", str(error), Risk.WRITE))
        return replace(call, approval=approval)

    async def assess(
        self, name: str, arguments: Mapping[str, Any], caller: Caller, call_id: str
    ) -> Assessment:
        """What code says of a call, of a registered tool or of any other of LangChain's.

        Raises:
            InvalidRequest: there is no such tool, or it does not take these arguments as they are.
            LearningError: it cannot be tried.
        """
        if self.executor.registry.get(name) is not None:
            return await self.executor.assess(
                name,
                arguments,
                caller.identity,
                caller.tainted,
                thread_id=caller.thread_id,
                tool_call_id=call_id,
            )
        if name not in caller.written:
            self._check_taken(name, arguments)
        is_written = name in caller.written and name not in self.risks
        return judged(
            self.executor.policy,
            Appraisal(risk=Risk.READ if is_written else self.risks.get(name, Risk.WRITE)),
            tool=name,
            tool_version="1",
            target="",
            kind="action",
            arguments=dict(arguments),
            identity=caller.identity,
            tainted=caller.tainted and not is_written,
            thread_id=caller.thread_id,
            tool_call_id=call_id,
            rights=()
            if name in caller.written
            else None,  # those of what its code calls, checked when it runs
        )

    def _check_taken(self, name: str, arguments: Mapping[str, Any]) -> None:
        """Refuse a call of a tool that there is not, or with arguments that it would not get as they are."""
        tool = self.tools.get(name)
        if tool is not None:
            check_taken(tool, arguments)
        elif self.has_seen_tools:
            known = {*self.tools, *(spec.name for spec in self.executor.registry)}
            raise InvalidRequest(f"there is no tool {name!r}; known are {', '.join(sorted(known))}")

    def _normal(self, name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments as they are bound: those of registered tools with their defaults."""
        spec = self.executor.registry.get(name)
        if spec is None:
            return dict(arguments)
        try:
            return spec.checked(arguments).model_dump(mode="json")
        except InvalidRequest:
            return dict(arguments)

    async def _rows(self, batch_id: str, identity: Identity) -> list[Approval]:
        found = await self.executor.database.call(
            "list_approvals", identity, wanted={"batch_id": batch_id, "limit": 1000}
        )
        return [Approval.from_row(row) for row in found]

    # The pause

    def _payload(self, turn: Turn) -> dict[str, Any]:
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
                    arguments_schema=self._schema(approval.tool),
                )
            )
        return found

    def _schema(self, name: str) -> dict[str, Any]:
        spec = self.executor.registry.get(name)
        if spec is not None:
            return spec.arguments.model_json_schema()
        model = _model_of(self.tools.get(name))
        return model.model_json_schema() if model is not None else {}

    async def _show(self, turn: Turn, number: int) -> set[str]:
        """Note what the pause of this number shows. Returns what it showed already when the answer was given.

        On the way to a pause these are none; after it, when the node runs again, what the person saw. An answer counts
        by places, so it counts only for the very same calls in the same order: not where one came meanwhile, changed
        its place, or was edited elsewhere.
        """
        if number == 0 and turn.place is not None:
            await self._was_asked_by_others(turn.place, turn.caller.identity.tenant_id)
        asked = [call.approval for call in turn.asked if call.approval is not None]
        whole = canonical_json([[approval.approval_id, approval.args_hash] for approval in asked])
        digest = hashlib.sha256(whole.encode()).hexdigest()
        if await self._first_time(f"{turn.batch_id}:{number}:shown:{digest}"):
            return set()
        return {approval.approval_id for approval in asked if approval.is_open}

    async def _first_time(self, key: str) -> bool:
        return bool(await self.executor.database.call("remember_delivery", channel=CHANNEL, delivery_key=key))

    async def _answered(
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
        if not isinstance(answers, BatchAnswer) and await self._first_time(
            f"{turn.batch_id}:{number}:answered"
        ):
            if not eligible:
                notice = "The answer was given before this was shown, so it does not count."
            elif (
                may_be_stale
                and any(answer.verdict != "reject" for answer in answers)
                and await self._first_time(f"{turn.batch_id}:stale")
            ):
                notice = (
                    "The answer did not say which pause it is for and may have been meant for the one before. "
                    "Please answer once more, or resume by the id of the interrupt."
                )
            else:
                notice = await self._vote(turn, number, answers, eligible, user_id)
        rows = await self._rows(turn.batch_id, turn.caller.identity)
        by_id = {row.approval_id: row for row in rows}
        calls = [
            call
            if call.approval is None
            else replace(call, approval=_newest(by_id.get(call.approval.approval_id, call.approval), rows))
            for call in turn.calls
        ]
        return replace(turn, calls=calls, notice=notice)

    async def _vote(
        self, turn: Turn, number: int, answers: Sequence[Answer], eligible: set[str], user_id: str | None
    ) -> str:
        """Make votes of answers. Returns why some did not count."""
        queue = self.executor.queue
        reviewer = self.executor.policy.reviewers.for_interrupt(user_id)
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
                    self.check_edit(approval, answer.arguments)
                    await queue.edit(
                        approval.approval_id,
                        dict(answer.arguments),
                        reviewer,
                        channel=CHANNEL,
                        reassess=self.executor.reassess,
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

    def check_edit(self, approval: Approval, arguments: Mapping[str, Any]) -> None:
        """Refuse edited arguments that a LangChain tool seen by this process does not take.

        Raises:
            InvalidRequest: they do not fit.
        """
        tool = self.tools.get(approval.tool)
        if tool is not None and self.executor.registry.get(approval.tool) is None:
            check_taken(tool, arguments)

    # What is kept, and what is run

    def frozen(self, turn: Turn) -> dict[str, Any]:
        """What was decided, by id of the call: what `admit` holds each call to."""
        found: dict[str, Any] = {}
        for call in turn.calls:
            kept: dict[str, Any] = {"call": _digest(call.name, call.original)}
            if not kept["call"] and call.refusal is None:
                kept["refusal"] = ["refused", "the arguments cannot be written as JSON", "WRITE"]
            elif call.refusal is not None:
                kept["refusal"] = [call.refusal[0], call.refusal[1], str(call.refusal[2])]
            elif call.approval is not None:
                kept["approval_id"] = call.approval.approval_id
            elif call.assessment is not None:
                kept["args_hash"] = call.assessment.args_hash
                kept["tainted"] = call.assessment.tainted
            # Two calls of one id cannot be told apart later, so neither runs.
            if call.id in found and found[call.id] != kept:
                kept = {"call": "", "refusal": ["refused", "two calls have the same id", "WRITE"]}
            found[call.id] = kept
        return found

    async def admitted(
        self,
        name: str,
        arguments: Mapping[str, Any],
        call_id: str,
        kept: Mapping[str, Any] | None,
        caller: Caller,
    ) -> Permit | ToolMessage:
        """The permit for a LangChain tool, or the message of a call that did not run or that the executor ran."""
        found = await self.admit(name, arguments, call_id, kept, caller)
        if isinstance(found, ExecutionResult):
            return self.message(found, call_id)
        if self.executor.registry.get(name) is not None:
            return self.message(await self.executor.run(found), call_id)
        if name in caller.written:
            return await self._run_written(found, call_id, caller)
        return found

    async def _run_written(self, permit: Permit, call_id: str, caller: Caller) -> ToolMessage:
        """Run a tool that an agent wrote; the library enters in the log what became of it."""
        name = permit.assessment.tool
        ran = await self.executor.library.run(
            name, permit.assessment.arguments, caller.identity, tainted=caller.tainted
        )
        if permit.ticket is not None:
            await self.executor.settle(permit, ToolOutcome(error=ran.error))
        return ToolMessage(
            content=ran.text,
            name=name,
            tool_call_id=call_id,
            status="success" if ran.status == "succeeded" else "error",
            artifact={"status": ran.status, "approval_id": ran.approval_id, "log_id": ran.log_id},
            additional_kwargs=self._mark(name, by_inside=ran.read_untrusted),
        )

    async def admit(
        self,
        name: str,
        arguments: Mapping[str, Any],
        call_id: str,
        kept: Mapping[str, Any] | None,
        caller: Caller,
    ) -> Permit | ExecutionResult:
        """The permit to run a call, or the result of one that does not run."""
        try:
            return await self._admit(name, arguments, call_id, kept, caller)
        except LearningError as error:
            status: Status = "denied" if isinstance(error, Refused) else "failed"
            return await self.executor.refusals.turn_away(
                name, arguments, caller.identity, status, str(error)
            )

    async def _admit(
        self,
        name: str,
        arguments: Mapping[str, Any],
        call_id: str,
        kept: Mapping[str, Any] | None,
        caller: Caller,
    ) -> Permit | ExecutionResult:
        if kept is None:
            raise Refused("nobody decided on this call: it did not come from the model's last message")
        if (refusal := kept.get("refusal")) is not None:
            status, why, risk = refusal
            return await self.executor.refusals.turn_away(
                name, arguments, caller.identity, status, why, risk=Risk.of(risk)
            )
        if kept.get("call") != _digest(name, arguments):
            raise Refused("the call is not the one that was decided on")
        approval_id = kept.get("approval_id")
        if approval_id is None:
            found = await self.assess(
                name, arguments, replace(caller, tainted=bool(kept.get("tainted"))), call_id
            )
            if found.args_hash != kept.get("args_hash"):
                raise Refused("the policy file has changed since the call was allowed")
            return await self.executor.permits.admit(found, caller.identity)
        approval = await self.executor.queue.get(approval_id, caller.identity)
        if approval.state != "approved":
            result = await self.executor.refusals.not_run(approval, caller.identity)
            if result.status == "rejected" and approval.note == UNREADABLE:
                why = "the answer about it could not be read, and that counts as a no"
                again = "Do not try it again unless the user asks."
                return replace(result, error=why, text=f"{name} was not executed: {why}. {again}")
            return result
        if self.executor.registry.get(name) is not None:
            found = await self.executor.approved_call(approval, caller.identity)
        else:
            found = still_approved(
                await self.assess(name, approval.arguments, replace(caller, tainted=False), call_id), approval
            )
        return await self.executor.permits.admit(found, caller.identity, approval)

    def message(self, result: ExecutionResult, call_id: str) -> ToolMessage:
        """The message for a model."""
        return ToolMessage(
            content=result.text,
            name=result.tool,
            tool_call_id=call_id,
            status="success" if result.ok else "error",
            artifact={
                "status": result.status,
                "risk": str(result.risk),
                "approval_id": result.approval_id,
                "log_id": result.log_id,
            },
            additional_kwargs=self._mark(result.tool, by_inside=False),
        )

    def _mark(self, name: str, *, by_inside: bool) -> dict[str, Any]:
        return {UNTRUSTED: True} if by_inside or self.is_untrusted(name) else {}

    async def settle_foreign(
        self, permit: Permit, result: ToolMessage | Command[Any], *, read: bool
    ) -> ToolMessage | Command[Any]:
        """Enter how a LangChain tool ended, and fence its result where it is a stranger's text."""
        name = permit.assessment.tool
        if not isinstance(result, ToolMessage):
            settled = await self.executor.settle(permit, ToolOutcome())
            if not settled.ok:
                return self.message(settled, permit.assessment.tool_call_id or "")
            mark = self._mark(name, by_inside=read)
            return changed_messages(result, lambda message: self._strange(name, message)) if mark else result
        error = "the tool answered with an error" if result.status == "error" else None
        size = len(result.text.encode(errors="replace"))
        settled = await self.executor.settle(permit, ToolOutcome(error=error, result_bytes=size))
        if settled.error is not None and error is None:  # it could not be entered in the log
            return self.message(settled, str(result.tool_call_id))
        update: dict[str, Any] = {}
        if mark := self._mark(name, by_inside=read):
            update["additional_kwargs"] = {**result.additional_kwargs, **mark}
        if self.is_untrusted(name):
            update["content"] = _fenced_content(name, result.content)
        return result.model_copy(update=update) if update else result

    def _strange(self, name: str, message: BaseMessage) -> BaseMessage:
        """A message that a tool put into the state, marked and where the tool is untrusted fenced."""
        update: dict[str, Any] = {"additional_kwargs": {**message.additional_kwargs, UNTRUSTED: True}}
        if self.is_untrusted(name):
            update["content"] = _fenced_content(name, message.content)
        return message.model_copy(update=update)

    async def settle_error(self, permit: Permit, error: BaseException) -> None:
        """Enter that a LangChain tool raised, or paused the graph: then it is not run again with this approval."""
        if isinstance(error, GraphBubbleUp):
            if permit.ticket is not None:
                why = "the tool paused in the middle of its work"
                await self.executor.settle(permit, ToolOutcome(error=why, unsure=True))
        elif isinstance(error, Exception):
            await self.executor.settle(permit, failure_of(error))
        else:
            await self.executor.settle(
                permit, ToolOutcome(error="it was cancelled while it ran", unsure=True)
            )


def describe(approval: Approval) -> str:
    """The call for a person in plain text, made by code: what runs, what it does, who asks.

    Lines of our own begin at the margin. What is in the call cannot: its line feeds are indented or escaped.
    """
    lines = [f"{approval.risk}: {_on_one_line(approval.summary)}"]
    arguments = approval.arguments_shown
    if isinstance(arguments, Mapping):
        lines += [
            _labelled(_on_one_line(name), value if isinstance(value, str) else canonical_json(value))
            for name, value in arguments.items()
        ]
    else:
        lines.append(_on_one_line(canonical_json(arguments)))
    for table, changed in (approval.effects or {}).items():
        if isinstance(changed, Mapping):
            counts = ", ".join(f"{count} {_on_one_line(what)}" for what, count in changed.items() if count)
            lines.append(f"{_on_one_line(table)}: {counts or 'nothing'}")
    votes = len([vote for vote in approval.votes if vote.get("verdict") == "approve"])
    if approval.required_votes > 1:
        lines.append(f"approved by {votes} of {approval.required_votes}")
    if approval.reason:
        lines.append(_labelled("the model says", approval.reason))
    return "\n".join(lines)


def _on_one_line(text: Any) -> str:
    return visible(text).replace("\n", "\\n")


def _labelled(label: str, text: str) -> str:
    """A label and a text, whose lines are indented where they are several."""
    rows = visible(text).split("\n")
    return f"{label}: {rows[0]}" if len(rows) == 1 else "\n    ".join([f"{label}:", *rows])


def changed_messages(value: Any, change: Callable[[BaseMessage], BaseMessage]) -> Any:
    """An update of the state, or a command with one, with each message in it changed."""
    if isinstance(value, RemoveMessage):
        return value
    if isinstance(value, BaseMessage):
        return change(value)
    if isinstance(value, Command):
        return replace(
            value, update=changed_messages(value.update, change), goto=changed_messages(value.goto, change)
        )
    if isinstance(value, Send):
        return Send(value.node, changed_messages(value.arg, change))
    if type(value) is dict:
        return {name: changed_messages(item, change) for name, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(changed_messages(item, change) for item in value)
    return value


def _fenced_content(name: str, content: Any) -> Any:
    """The content of a message with all that is text in it fenced; pictures and sounds stay."""
    if isinstance(content, str):
        return fenced(name, content)
    return [
        block
        if isinstance(block, Mapping) and block.get("type") in _MEDIA and "text" not in block
        else {"type": "text", "text": fenced(name, _text_of(block))}
        for block in content
    ]


def _text_of(block: Any) -> Any:
    is_text = isinstance(block, Mapping) and block.get("type") == "text"
    return block.get("text") if is_text else block


def last_calls(messages: Sequence[Any]) -> AIMessage | None:
    """The last message of the model, if it calls tools that nobody has answered."""
    answered = set()
    for message in reversed(messages):
        if isinstance(message, ToolMessage):
            answered.add(message.tool_call_id)
        elif isinstance(message, AIMessage):
            open_calls = [call for call in message.tool_calls if call.get("id") not in answered]
            return message if open_calls else None
        elif isinstance(message, BaseMessage):
            return None
    return None


def _newest(row: Approval, known: Sequence[Approval]) -> Approval:
    """The request that replaced this one, or this one."""
    by_id = {other.approval_id: other for other in known}
    for _ in range(_EDITS_MAX):
        if row.replaced_by is None or row.replaced_by not in by_id:
            return row
        row = by_id[row.replaced_by]
    return row


def _digest(name: str, arguments: Mapping[str, Any]) -> str:
    """Hash of a call as the model wrote it; empty where it has none, such as one with NaN in it."""
    try:
        return binding_hash(name, dict(arguments), tenant_id="")
    except InvalidRequest:
        return ""


def _batch_of(caller: Caller, message_id: str | None) -> str:
    return str(
        uuid.uuid5(_BATCHES, canonical_json([caller.identity.tenant_id, caller.thread_id, message_id]))
    )


def _place(thread_id: str | None, message_id: str | None) -> str | None:
    if thread_id is None or message_id is None:
        return None
    return str(uuid.uuid5(_BATCHES, canonical_json([thread_id, message_id])))


def _tenant_mark(tenant_id: str) -> str:
    return hashlib.sha256(tenant_id.encode()).hexdigest()


def _is_named(config: RunnableConfig) -> bool:
    """Whether the run was resumed by the id of its interrupt, which LangGraph keeps in the configuration."""
    return bool((config.get("configurable") or {}).get("__pregel_resume_map"))


def _model_of(tool: BaseTool | None) -> type[BaseModel] | None:
    """The type of a tool's arguments, as the model is told of them; `None` where there is none."""
    schema = tool.tool_call_schema if tool is not None else None
    return schema if isinstance(schema, type) and issubclass(schema, BaseModel) else None
