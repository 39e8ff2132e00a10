"""Approvals in Slack: the card in Block Kit, and what a press of its buttons means.

Nothing here knows how a press came in: the signed HTTP request and Socket Mode both end in `SlackAnswers.receive`.
Everything that people or models wrote stands in rich text or plain text, which Slack does not read as markup.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from agent.approval.card import KEY_DIGITS, Card, CardItem, make_card, result_text
from agent.approval.records import Approval
from agent.approval.risk import Risk
from agent.chat.slack_blocks import (
    TEXT_LIMIT,
    element,
    escaped,
    header,
    labelled,
    plain,
    preformatted,
    rich,
    section,
)
from agent.errors import LearningError, NotFound, OperatorError
from agent.events import emit
from agent.identity import Identity

if TYPE_CHECKING:
    from slack_sdk.socket_mode.aiohttp import SocketModeClient
    from slack_sdk.web.async_client import AsyncWebClient

    from agent.approval.human_approval import HumanApprovalQueue
    from agent.approval.reviewers import Reviewer

APPROVE: Final = "approval_approve"
REJECT: Final = "approval_reject"
EDIT: Final = "approval_edit"
_VALUE_LIMIT: Final = 2_000  # of a button, by Slack
_INPUT_LIMIT: Final = 3_000  # of a text field, by Slack
_PRIVATE_LIMIT: Final = 3_000  # of a modal's private metadata, by Slack
_FINAL: Final = frozenset({"executed", "failed", "unknown"})


def slack_channel(queue: HumanApprovalQueue) -> SlackChannel | None:
    """The channel of the queue's settings and policy; `None` where token, way back or channel are not set."""
    settings = queue.settings
    is_reachable = settings.slack_signing_secret is not None or settings.slack_app_token is not None
    if settings.slack_bot_token is None or not is_reachable or queue.policy.approval.slack_channel is None:
        return None
    return SlackChannel(queue)


class SlackChannel:
    """Puts cards into Slack and keeps them as the rows are."""

    name = "slack"

    def __init__(self, queue: HumanApprovalQueue, client: AsyncWebClient | None = None) -> None:
        """Args:
        queue: whose approvals these are; its settings and policy say where they go.
        client: Slack's own; by default one of the settings' token and address.
        """
        self._queue = queue
        self._client = client
        self._workspace: dict[str, str] | None = None

    @property
    def client(self) -> AsyncWebClient:
        """Slack's client, made when first asked for."""
        if self._client is None:
            from slack_sdk.http_retry.builtin_async_handlers import (
                AsyncConnectionErrorRetryHandler,
                AsyncRateLimitErrorRetryHandler,
            )
            from slack_sdk.web.async_client import AsyncWebClient

            token = self._queue.settings.slack_bot_token
            if token is None:
                raise OperatorError("there is no way to Slack: SLACK_BOT_TOKEN is not set")
            self._client = AsyncWebClient(
                token=token.get_secret_value(),
                base_url=self._queue.settings.slack_api_url,
                timeout=15,
                retry_handlers=[
                    AsyncConnectionErrorRetryHandler(max_retry_count=1),
                    AsyncRateLimitErrorRetryHandler(max_retry_count=1),
                ],
            )
        return self._client

    async def post(self, card_of: Sequence[Approval], *, escalated: bool) -> dict[str, Any]:
        """Post the card of a batch; the reference says where it is, so that only answers from there count.

        Raises:
            OperatorError: Slack did not take it.
        """
        named = self._queue.policy.approval
        if named.slack_channel is None:
            raise OperatorError(
                "approvals cannot go to Slack: the policy file names no slack_channel under [approval]"
            )
        card = self._card(card_of)
        posts = [await self._post_card(card, card_of, named.slack_channel, is_escalation=False)]
        if escalated and named.slack_escalation_channel:
            try:
                posts.append(
                    await self._post_card(card, card_of, named.slack_escalation_channel, is_escalation=True)
                )
            except OperatorError as error:  # the card itself is posted, and must not be posted again
                emit("slack_delivery_failed", what="escalation", reason=str(error))
        return {"posts": posts, "told": {}}

    async def update(self, approvals: Sequence[Approval], ref: Mapping[str, Any]) -> dict[str, Any]:
        """Make the messages say what the rows say; escalate once; answer in the thread what became of it.

        Raises:
            OperatorError: Slack did not take it.
        """
        card = self._card(approvals)
        posts = [dict(post) for post in ref.get("posts", ())]
        shown = {"text": summary(card), "blocks": blocks(card, editable=self._editable(approvals))}
        for post in posts:
            await self._call(
                "chat.update", {"channel": post["channel"], "ts": post["ts"], **shown}, gone_is_fine=True
            )
        escalation = self._queue.policy.approval.slack_escalation_channel
        is_escalated = any(post.get("is_escalation") for post in posts)
        if card.is_escalated and card.is_open and escalation and not is_escalated:
            posts.append(await self._post_card(card, approvals, escalation, is_escalation=True))
        return {"posts": posts, "told": await self._tell_results(approvals, posts, dict(ref.get("told", {})))}

    async def tell(self, *, channel: str, user: str, text: str) -> None:
        """Say something to one person only. Where Slack does not take it, an event says so."""
        try:
            await self._call("chat.postEphemeral", {"channel": channel, "user": user, "text": escaped(text)})
        except OperatorError as error:
            emit("slack_delivery_failed", what="note", reason=str(error))

    async def open_editor(self, approval: Approval, *, trigger_id: str, place: Mapping[str, str]) -> None:
        """Open the form in which a person writes other arguments.

        Raises:
            OperatorError: Slack did not take it; a press is good for three seconds.
        """
        await self._call("views.open", {"trigger_id": trigger_id, "view": edit_view(approval, place)})

    def _card(self, approvals: Sequence[Approval]) -> Card:
        return make_card(approvals, public_url=self._queue.settings.public_url)

    def _editable(self, approvals: Sequence[Approval]) -> frozenset[str]:
        return frozenset(
            one.approval_id for one in approvals if self._queue.can_edit(one) and fits_a_form(one)
        )

    async def _post_card(
        self, card: Card, approvals: Sequence[Approval], channel: str, *, is_escalation: bool
    ) -> dict[str, Any]:
        answer = await self._call(
            "chat.postMessage",
            {
                "channel": channel,
                "text": summary(card),
                "blocks": blocks(card, editable=self._editable(approvals)),
                "unfurl_links": False,
                "unfurl_media": False,
            },
        )
        workspace = await self._whose(answer)
        return {
            "channel": str(answer["channel"]),
            "ts": str(answer["ts"]),
            "is_escalation": is_escalation,
            **workspace,
        }

    async def _whose(self, posted: Mapping[str, Any]) -> dict[str, str]:
        """The workspace and the app that the messages are of: answers of others do not count."""
        if self._workspace is None:
            message = posted.get("message") or {}
            me = await self._call("auth.test", {})
            app = message.get("app_id") or (message.get("bot_profile") or {}).get("app_id")
            if not app:
                bot = await self._call("bots.info", {"bot": me.get("bot_id")})
                app = (bot.get("bot") or {}).get("app_id")
            if not app or not me.get("team_id"):
                raise OperatorError(
                    "Slack does not say which app posted the card, and an answer could not be told from a forged one. "
                    "SLACK_BOT_TOKEN must be the bot token (xoxb-…) of an app"
                )
            self._workspace = {"app": str(app), "team": str(me["team_id"])}
        return self._workspace

    async def _tell_results(
        self, approvals: Sequence[Approval], posts: Sequence[Mapping[str, Any]], told: dict[str, str]
    ) -> dict[str, str]:
        """Answer in the threads what became of each action, once."""
        for approval in approvals:
            state = approval.state
            if state not in _FINAL or told.get(approval.approval_id) == state:
                continue
            text = result_text(approval, await log_entry(self._queue, approval))
            for post in posts:
                await self._call(
                    "chat.postMessage",
                    {
                        "channel": post["channel"],
                        "thread_ts": post["ts"],
                        "text": escaped(text)[:TEXT_LIMIT],
                        "unfurl_links": False,
                        "unfurl_media": False,
                    },
                    gone_is_fine=True,
                )
            told[approval.approval_id] = state
        return told

    async def _call(
        self, method: str, arguments: Mapping[str, Any], *, gone_is_fine: bool = False
    ) -> dict[str, Any]:
        import aiohttp
        from slack_sdk.errors import SlackApiError, SlackClientError

        try:
            # Reading methods of Slack take forms, writing ones JSON too.
            if method == "bots.info":
                answer = await self.client.api_call(method, data=dict(arguments))
            else:
                answer = await self.client.api_call(method, json=dict(arguments))
        except SlackApiError as error:
            # `data` is text where the answer was no JSON.
            why = error.response.get("error") if isinstance(error.response.data, dict) else "no JSON"
            if gone_is_fine and why in {"message_not_found", "thread_not_found", "cant_update_message"}:
                return {}  # somebody deleted the message: the row is the truth, and there is nothing to keep alike
            raise OperatorError(
                f"Slack refused {method}: {why}. The app needs the scopes chat:write and users:read and must be a "
                "member of the channel (/invite it)"
            ) from None
        except (SlackClientError, aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            raise OperatorError(
                f"Slack could not be reached for {method}: {type(error).__name__}. It is tried again"
            ) from None
        return dict(answer.data) if isinstance(answer.data, dict) else {}


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


class SlackSocket:
    """Socket Mode: answers come over a connection of ours, and the server needs no public address."""

    def __init__(self, queue: HumanApprovalQueue, channel: SlackChannel) -> None:
        self._queue = queue
        self._channel = channel
        self._answers = SlackAnswers(queue, channel)
        self._socket: SocketModeClient | None = None
        self._at_work: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Connect, and stay connected until `stop`; both in the portal's loop.

        Raises:
            OperatorError: SLACK_APP_TOKEN is not set, or Slack did not take it.
        """
        import aiohttp
        from slack_sdk.errors import SlackClientError
        from slack_sdk.socket_mode.aiohttp import SocketModeClient

        token = self._queue.settings.slack_app_token
        if token is None:
            raise OperatorError("Socket Mode needs SLACK_APP_TOKEN (xapp-…), and it is not set")
        self._socket = SocketModeClient(app_token=token.get_secret_value(), web_client=self._channel.client)
        self._socket.socket_mode_request_listeners.append(self._listen)
        try:
            await self._socket.connect()  # type: ignore[no-untyped-call]
        except (SlackClientError, aiohttp.ClientError, TimeoutError, OSError) as error:
            await self.stop()
            raise OperatorError(
                f"Socket Mode could not start: {type(error).__name__}. Is Socket Mode on in the app, and "
                "SLACK_APP_TOKEN an app-level token with the scope connections:write?"
            ) from None

    async def stop(self) -> None:
        """Disconnect, and finish what has been received."""
        if self._socket is not None:
            await self._socket.close()  # type: ignore[no-untyped-call]
            self._socket = None
        if self._at_work:
            await asyncio.gather(*self._at_work, return_exceptions=True)

    async def _listen(self, client: Any, request: Any) -> None:
        from slack_sdk.socket_mode.response import SocketModeResponse

        payload = request.payload if isinstance(request.payload, Mapping) else {}
        fault = form_fault(payload) if request.type == "interactive" else None
        await client.send_socket_mode_response(SocketModeResponse(request.envelope_id, payload=fault))
        if request.type == "interactive" and fault is None:
            task = asyncio.create_task(
                self._answers.receive(payload, delivery_key=f"socket:{request.envelope_id}")
            )
            self._at_work.add(task)
            task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._at_work.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            emit("slack_answer_failed", reason=type(error).__name__)


class _Refusal(Exception):
    """Nothing was decided; the words are for the person who pressed."""

    def __init__(self, why: str, place: Mapping[str, str] | None = None) -> None:
        super().__init__(why)
        self.channel = (place or {}).get("channel")


# --- what is shown ----------------------------------------------------------------------------------------------


def summary(card: Card) -> str:
    """The line that notifications show."""
    facts = "; ".join(f"{fact.label}: {fact.text}" for fact in card.facts)
    return escaped(f"{card.title}. {facts}")[:TEXT_LIMIT]


def blocks(card: Card, *, editable: Collection[str] = ()) -> list[dict[str, Any]]:
    """The card in Block Kit, with a button to edit for these approvals."""
    marks = {Risk.READ: "", Risk.WRITE: "", Risk.DESTRUCTIVE: "⚠ ", Risk.FORBIDDEN: "⚠ "}
    built: list[dict[str, Any]] = [
        header(f"{marks[card.risk]}{card.title}"),
    ]
    is_single = len(card.items) == 1
    for item in card.items_shown:
        built.append(rich([*_item_elements(item, with_title=not is_single)]))
        if item.is_open and not is_single:
            built.append(_buttons(card, [item], block_id=item.approval_id, editable=editable))
    if not card.is_whole:
        more = len(card.items) - len(card.items_shown)
        built.append(rich([section(f"and {more} more, which this message cannot show: {card.where}")]))
    end = [labelled(fact.label, fact.text) for fact in card.facts]
    if any(item.hidden_characters for item in card.items):
        end.append(labelled("The whole", card.where))
    for claim in card.claims:
        end.append(section(f"{claim.label}:", bold=True))
        end.append({"type": "rich_text_quote", "elements": [element(claim.text)]})
    built.append(rich(end))
    if card.is_open:
        block_id = card.open_items[0].approval_id if is_single else f"batch:{card.batch_id}"
        built.append(_buttons(card, card.open_items, block_id=block_id, editable=editable))
    return [block for block in built if block.get("elements") != []]


def _item_elements(item: CardItem, *, with_title: bool) -> list[dict[str, Any]]:
    elements = [section(f"{item.risk}: {item.title}", bold=True)] if with_title else []
    for one in item.shown:
        if one.is_code:
            elements.append(section(one.label, bold=True))
            elements.append(preformatted(one.text))
        else:
            elements.append(labelled(one.label, one.text))
        if one.hidden_characters:
            elements.append(section(f"sha256 of the whole: {one.sha256}"))
    elements.append(labelled("State", item.status))
    elements.append(labelled("Approval", f"{item.approval_id}, hash {item.key}"))
    return elements


def _buttons(
    card: Card, items: Sequence[CardItem], *, block_id: str, editable: Collection[str]
) -> dict[str, Any]:
    value = json.dumps(
        {"tenant": card.tenant_id, "approvals": {item.approval_id: item.key for item in items}},
        ensure_ascii=False,
        separators=(",", ":"),
    )
    if len(value) > _VALUE_LIMIT:
        return rich([section(f"Too many to decide at once here: {card.where}")])
    is_all = len(items) > 1
    needs_confirmation = any(item.risk is Risk.DESTRUCTIVE or item.hidden_characters for item in items)
    buttons = [_button(f"Reject all {len(items)}" if is_all else "Reject", REJECT, value)]
    if card.is_whole or not is_all:
        approve = _button(f"Approve all {len(items)}" if is_all else "Approve", APPROVE, value)
        if needs_confirmation:
            approve |= {"confirm": _confirmation(items), "style": "danger"}
        else:
            approve["style"] = "primary"
        buttons.insert(0, approve)
    if not is_all and items[0].approval_id in editable:
        buttons.append(_button("Edit…", EDIT, value))
    return {"type": "actions", "block_id": block_id[:255], "elements": buttons}


def _confirmation(items: Sequence[CardItem]) -> dict[str, Any]:
    parts = []
    if any(item.risk is Risk.DESTRUCTIVE for item in items):
        parts.append("This destroys data.")
    if hidden := sum(item.hidden_characters for item in items):
        parts.append(f"{hidden:,} characters of it are not on this card. Have you read the whole?")
    names = ", ".join(item.title for item in items)
    return {
        "title": plain("Are you sure?", 100),
        "text": plain(f"{' '.join(parts)} {names}", 300),
        "confirm": plain("Approve", 30),
        "deny": plain("Back", 30),
        "style": "danger",
    }


def edit_view(approval: Approval, place: Mapping[str, str]) -> dict[str, Any]:
    """The form in which a person writes other arguments."""
    private = json.dumps(
        {
            "tenant": approval.tenant_id,
            "approval_id": approval.approval_id,
            "hash": approval.args_hash[:KEY_DIGITS],
            **place,
        },
        ensure_ascii=False,
    )
    is_strict = approval.risk is Risk.DESTRUCTIVE
    after = (
        "What you write is a new request, and other people approve it."
        if is_strict
        else "What you write is checked like the agent's own call; sending it approves it."
    )
    return {
        "type": "modal",
        "callback_id": EDIT,
        "private_metadata": private,
        "title": plain("Edit", 24),
        "submit": plain("Send", 24),
        "close": plain("Back", 24),
        "blocks": [
            {"type": "section", "text": plain(f"{approval.tool}. {after}", 3_000)},
            {
                "type": "input",
                "block_id": "arguments",
                "label": plain("Arguments (JSON)", 2_000),
                "element": {
                    "type": "plain_text_input",
                    "action_id": "json",
                    "multiline": True,
                    "max_length": _INPUT_LIMIT,
                    "initial_value": _editable_text(approval),
                },
            },
        ],
    }


def fits_a_form(approval: Approval) -> bool:
    """Whether its arguments fit a form."""
    return (
        len(_editable_text(approval)) <= _INPUT_LIMIT and len(approval.tenant_id) * 6 < _PRIVATE_LIMIT - 400
    )


def _editable_text(approval: Approval) -> str:
    # ASCII: what cannot be seen stands as \u202e, and is kept when the form is sent.
    return json.dumps(approval.arguments, ensure_ascii=True, indent=2)


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


def _button(text: str, action_id: str, value: str) -> dict[str, Any]:
    return {"type": "button", "action_id": action_id, "text": plain(text, 75), "value": value}


# --- what comes back ----------------------------------------------------------------------------------------------


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


async def remember_delivery(queue: HumanApprovalQueue, channel: str, delivery_key: str) -> bool:
    """Whether this delivery comes for the first time."""
    return bool(
        await queue.database.call("remember_delivery", None, channel=channel, delivery_key=delivery_key)
    )


async def log_entry(queue: HumanApprovalQueue, approval: Approval) -> dict[str, Any] | None:
    """The entry of the execution log of an action that ran; `None` where there is none or it cannot be read now."""
    if not approval.log_id:
        return None
    try:
        entry = await queue.database.call(
            "get_execution", Identity(tenant_id=approval.tenant_id), the_log_id=approval.log_id
        )
    except LearningError:
        return None  # the card says the state, and where to look
    return dict(entry) if isinstance(entry, Mapping) else None
