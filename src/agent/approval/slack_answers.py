"""What a press of a card's buttons in Slack means, and what a form that was sent says.

Nothing here knows how a press came in: the signed HTTP request and Socket Mode both end in `SlackAnswers.receive`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from agent.approval.card import KEY_DIGITS
from agent.approval.channel_rows import remember_delivery
from agent.approval.records import Approval
from agent.approval.slack_cards import APPROVE, EDIT, REJECT, fits_a_form
from agent.approval.slack_posting import SlackChannel
from agent.errors import LearningError, NotFound, OperatorError
from agent.events import emit
from agent.identity import Identity

if TYPE_CHECKING:
    from agent.approval.human_approval import HumanApprovalQueue
    from agent.approval.reviewers import Reviewer


class SlackAnswers:
    """What people press and write in Slack, as decisions. Whatever is unclear decides nothing."""

    def __init__(self, queue: HumanApprovalQueue, channel: SlackChannel) -> None:
        self._queue = queue
        self._channel = channel

    async def receive(self, payload: Mapping[str, Any], *, delivery_key: str) -> None:
        """Take one interaction whose origin is proven.

        Args:
            payload: as Slack sent it.
            delivery_key: the same for each copy of this delivery, and for no other.
        """
        try:
            if not await remember_delivery(self._queue, SlackChannel.name, delivery_key):
                emit("slack_answer_refused", reason="the delivery is a copy of an earlier one")
                return
            match payload.get("type"):
                case "block_actions":
                    await self._pressed(payload, delivery_key)
                case "view_submission":
                    await self._edited(payload)
        except LearningError as error:
            # Slack has its answer already and sends nothing again: without a word the press would be lost.
            emit("slack_answer_failed", reason=type(error).__name__)
            user, channel = _text(payload, "user", "id"), _channel_of(payload)
            if user and channel:
                text = "Not done: it could not be recorded, and nothing was decided. Press again."
                await self._channel.tell(channel=channel, user=user, text=text)
        except _Refusal as refusal:
            user = _text(payload, "user", "id")
            emit("slack_answer_refused", reason=str(refusal), slack_user=user)
            if refusal.channel and user:
                await self._channel.tell(channel=refusal.channel, user=user, text=f"Not done: {refusal}")

    async def _pressed(self, payload: Mapping[str, Any], delivery_key: str) -> None:
        actions = payload.get("actions")
        if not isinstance(actions, list) or len(actions) != 1 or not isinstance(actions[0], Mapping):
            raise _Refusal("the press holds no single button")
        action_id = actions[0].get("action_id")
        if action_id not in {APPROVE, REJECT, EDIT}:
            return  # links are buttons too
        place = {
            "channel": _text(payload, "container", "channel_id"),
            "ts": _text(payload, "container", "message_ts"),
        }
        if _text(payload, "channel", "id") != place["channel"]:
            raise _Refusal("the press names two channels")
        tenant, hashes = _read_value(actions[0].get("value"))
        reviewer, approvals = await self._checked(payload, tenant, hashes, place)
        if action_id == EDIT:
            await self._open_editor(payload, approvals, place)
            return
        verdict = "approve" if action_id == APPROVE else "reject"
        try:
            outcome = await self._queue.decide(
                list(hashes),
                verdict,
                reviewer,
                channel=SlackChannel.name,
                hashes=hashes,
                identity_tenant=tenant,
                dedup_key=f"slack:{delivery_key}",
            )
        except LearningError as error:
            emit("slack_answer_failed", reason=type(error).__name__)
            raise _Refusal("it could not be recorded, and nothing was decided. Press again", place) from None
        if outcome.outcome != "recorded":
            raise _Refusal(outcome.why or "you have decided already", place)
        outdated = next(filter(None, map(self._queue.outdated_because, outcome.approvals)), None)
        if outdated is not None:
            await self._channel.tell(
                channel=place["channel"], user=_text(payload, "user", "id"), text=f"Recorded. {outdated}"
            )

    async def _open_editor(
        self, payload: Mapping[str, Any], approvals: Sequence[Approval], place: Mapping[str, str]
    ) -> None:
        if len(approvals) != 1:
            raise _Refusal("actions are edited one by one", place)
        if not fits_a_form(approvals[0]):
            raise _Refusal(
                "this is too long for a form of Slack. Edit it on the web page, or reject it",
                place,
            )
        try:
            await self._channel.open_editor(
                approvals[0], trigger_id=_text(payload, "trigger_id"), place=place
            )
        except OperatorError as error:
            emit("slack_delivery_failed", what="form", reason=str(error))
            raise _Refusal("Slack did not open the form. Press again", place) from None

    async def _edited(self, payload: Mapping[str, Any]) -> None:
        if _text(payload, "view", "callback_id") != EDIT:
            return
        try:
            private = json.loads(_text(payload, "view", "private_metadata"))
            tenant, approval_id, key = private["tenant"], private["approval_id"], private["hash"]
            place = {"channel": private["channel"], "ts": private["ts"]}
        except (ValueError, KeyError, TypeError):
            raise _Refusal("the form does not say what it is about") from None
        hashes = {str(approval_id): str(key)}
        reviewer, _ = await self._checked(payload, str(tenant), hashes, place)
        arguments = written_arguments(payload)
        if isinstance(arguments, str):
            raise _Refusal(arguments, place)
        try:
            await self._queue.edit(
                str(approval_id), arguments, reviewer, channel=SlackChannel.name, identity_tenant=str(tenant)
            )
        except LearningError as error:
            emit("slack_answer_failed", reason=type(error).__name__)
            raise _Refusal(f"the edit was not taken: {error}", place) from None

    async def _checked(
        self, payload: Mapping[str, Any], tenant: str, hashes: Mapping[str, str], place: Mapping[str, str]
    ) -> tuple[Reviewer, list[Approval]]:
        """The person, if they are a reviewer, and the approvals, if this message of ours showed exactly these."""
        user, team = _text(payload, "user", "id"), _text(payload, "team", "id")
        reviewer = self._queue.policy.reviewers.by_slack(user) if user else None
        if reviewer is None:
            raise _Refusal("you are not listed as a reviewer", place)
        if _text(payload, "user", "team_id") not in {"", team}:
            raise _Refusal("you are of another workspace", place)
        approvals = []
        for approval_id, key in hashes.items():
            try:
                approval = await self._queue.get(approval_id, Identity(tenant_id=tenant))
            except LearningError as error:
                if isinstance(error, NotFound):
                    raise _Refusal("there is no such approval", place) from None
                emit("slack_answer_failed", reason=type(error).__name__)
                raise _Refusal(
                    "it could not be looked up, and nothing was decided. Press again", place
                ) from None
            if len(key) < KEY_DIGITS or not approval.args_hash.startswith(key):
                raise _Refusal("the arguments are not those of the card", place)
            if not _is_of(approval, place, app=_text(payload, "api_app_id"), team=team):
                raise _Refusal("this message is not the card of that approval", place)
            approvals.append(approval)
        return reviewer, approvals


class _Refusal(Exception):
    """Nothing was decided; the words are for the person who pressed."""

    def __init__(self, why: str, place: Mapping[str, str] | None = None) -> None:
        super().__init__(why)
        self.channel = (place or {}).get("channel")


def written_arguments(payload: Mapping[str, Any]) -> dict[str, Any] | str:
    """The arguments of a sent form, or what is wrong with them."""
    try:
        text = payload["view"]["state"]["values"]["arguments"]["json"]["value"]
        arguments = json.loads(text, parse_constant=_no_number)
    except (KeyError, TypeError):
        return "The form is empty."
    except (ValueError, RecursionError):
        return "This is no JSON."
    return arguments if isinstance(arguments, dict) else 'Arguments are a JSON object: {"name": value}.'


def form_fault(payload: Mapping[str, Any]) -> dict[str, Any] | None:
    """The answer that shows the person what is wrong with the form they sent; `None`: nothing is."""
    if payload.get("type") != "view_submission" or _text(payload, "view", "callback_id") != EDIT:
        return None
    arguments = written_arguments(payload)
    if isinstance(arguments, str):
        return {"response_action": "errors", "errors": {"arguments": arguments}}
    return None


def _no_number(text: str) -> Any:
    raise ValueError(f"{text} is no JSON number")


def _read_value(value: Any) -> tuple[str, dict[str, str]]:
    """Tenant, and approvals with the beginnings of their hashes."""
    try:
        read = json.loads(value)
        tenant, approvals = read["tenant"], read["approvals"]
    except (ValueError, KeyError, TypeError):
        raise _Refusal("the button does not say what it is about") from None
    if not isinstance(tenant, str) or not tenant or not isinstance(approvals, dict) or not approvals:
        raise _Refusal("the button does not say what it is about")
    return tenant, {str(approval_id): str(key) for approval_id, key in approvals.items()}


def _text(document: Any, *path: str) -> str:
    """The text at a path of a document; empty where there is none."""
    for name in path:
        document = document.get(name) if isinstance(document, Mapping) else None
    return document if isinstance(document, str) else ""


def _channel_of(payload: Mapping[str, Any]) -> str:
    """Where the person pressed, or opened the form; empty where it does not say."""
    if payload.get("type") != "view_submission":
        return _text(payload, "container", "channel_id")
    try:
        return _text(json.loads(_text(payload, "view", "private_metadata")), "channel")
    except (ValueError, RecursionError):
        return ""


def _is_of(approval: Approval, place: Mapping[str, str], *, app: str, team: str) -> bool:
    """Whether this is one of the messages that showed the approval, in that workspace and by that app."""
    if not all((place["channel"], place["ts"], app, team)):
        return False
    return any(
        (post.get("channel"), post.get("ts"), post.get("app"), post.get("team"))
        == (place["channel"], place["ts"], app, team)
        for message in approval.messages
        if message.get("channel") == SlackChannel.name
        for post in (message.get("ref") or {}).get("posts", ())
    )
