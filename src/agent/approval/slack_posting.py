"""Cards of approvals in Slack: posted, and kept as the rows are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from agent.approval.card import Card, make_card, result_text
from agent.approval.channel_rows import log_entry
from agent.approval.records import Approval
from agent.approval.slack_cards import blocks, edit_view, fits_a_form, summary
from agent.chat.slack_blocks import (
    TEXT_LIMIT,
    escaped,
)
from agent.errors import OperatorError
from agent.events import emit

if TYPE_CHECKING:
    from slack_sdk.web.async_client import AsyncWebClient

    from agent.approval.human_approval import HumanApprovalQueue

_FINAL: Final = frozenset({"executed", "failed", "unknown"})


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
