"""Approvals in Telegram: the card as a message with buttons, and what a press of them means.

Four methods of the Bot API over httpx. Texts are sent with explicit entities and no parse mode, so that nothing in
them is read as markup.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID

from agent.approval.card import Card, CardItem, Shown, make_card, result_text
from agent.approval.channel_rows import log_entry, remember_delivery
from agent.approval.records import Approval
from agent.approval.risk import Risk
from agent.chat.telegram_bot import TelegramBot
from agent.chat.telegram_text import MESSAGE_LIMIT, MessageText
from agent.errors import ConfigurationError, LearningError, NotFound, OperatorError
from agent.events import emit
from agent.identity import Identity

if TYPE_CHECKING:
    import httpx

    from agent.approval.human_approval import HumanApprovalQueue
    from agent.approval.reviewers import Reviewer

DATA_LIMIT: Final = 64
"""Bytes of a button's data, by Telegram."""
_MAC_BYTES: Final = 9  # 12 letters: leaves 26 bytes for the tenant
_TOO_LONG: Final = (
    "\n⟨This message cannot show all of it. It can be rejected here; approve it where all is seen.⟩"
)
_FINAL: Final = frozenset({"executed", "failed", "unknown"})
_VERDICTS: Final = {"a": "approve", "r": "reject", "A": "approve", "R": "reject"}


def telegram_channel(queue: HumanApprovalQueue) -> TelegramChannel | None:
    """The channel of the queue's settings; `None` where token or secret are not set."""
    if queue.settings.telegram_bot_token is None or queue.settings.telegram_secret is None:
        return None
    return TelegramChannel(queue)


class TelegramChannel:
    """Puts cards into Telegram and keeps them as the rows are."""

    name = "telegram"

    def __init__(self, queue: HumanApprovalQueue, client: httpx.AsyncClient | None = None) -> None:
        """Args:
        queue: whose approvals these are; its settings and policy say where they go.
        client: that makes the requests; by default one for each.
        """
        if queue.settings.telegram_bot_token is None:
            raise ConfigurationError("there is no way to Telegram: TELEGRAM_BOT_TOKEN is not set")
        self._queue = queue
        token = queue.settings.telegram_bot_token
        self._bot = TelegramBot(queue.settings.telegram_api_url, token, client)
        self.bot_id = token.get_secret_value().partition(":")[0]
        self._key = hashlib.sha256(b"approval buttons\0" + token.get_secret_value().encode()).digest()

    async def post(self, card_of: Sequence[Approval], *, escalated: bool) -> dict[str, Any]:
        """Send the card of a batch; the reference says where it is, so that only answers from there count.

        What destroys data goes to each reviewer in private; the rest to the chat of the policy file, or in private
        where there is none.

        Raises:
            OperatorError: Telegram took it for nobody.
        """
        card = self._card(card_of)
        posts = await self._send_card(card, card_of, self._chats(card, card_of, escalated=False))
        if escalated:
            known = {post["chat"] for post in posts}
            posts += await self._escalate(card, card_of, known)
        if not posts:
            raise OperatorError(
                "the card reached nobody in Telegram: the policy file must name a telegram_chat under [approval], or "
                "reviewers with `telegram = their id`, who have started a chat with the bot"
            )
        return {"posts": posts, "told": {}}

    async def update(self, approvals: Sequence[Approval], ref: Mapping[str, Any]) -> dict[str, Any]:
        """Make the messages say what the rows say; escalate once; answer what became of it.

        Raises:
            OperatorError: Telegram did not take it.
        """
        card = self._card(approvals)
        posts = [dict(post) for post in ref.get("posts", ())]
        for post in posts:
            await self._bot.call(
                "editMessageText",
                {
                    "chat_id": post["chat"],
                    "message_id": post["message"],
                    **self._message(card, approvals, is_private=bool(post.get("is_private"))),
                },
                gone_is_fine=True,
            )
        is_escalated = any(post.get("is_escalation") for post in posts)
        if card.is_escalated and card.is_open and not is_escalated:
            posts += await self._escalate(card, approvals, {post["chat"] for post in posts})
        return {"posts": posts, "told": await self._tell_results(approvals, posts, dict(ref.get("told", {})))}

    async def answer_press(self, press_id: str, text: str) -> None:
        """End the waiting of the button that was pressed. Where Telegram does not take it, an event says so."""
        try:
            await self._bot.call(
                "answerCallbackQuery",
                {"callback_query_id": press_id, "text": text[:200], "show_alert": bool(text)},
            )
        except OperatorError as error:
            emit("telegram_delivery_failed", what="answer", reason=str(error))

    async def set_webhook(self, url: str) -> None:
        """Tell Telegram to send presses to this address, and nothing else, with the secret of the settings.

        Raises:
            ConfigurationError: the address is not one of HTTPS, or TELEGRAM_SECRET is not set.
            OperatorError: Telegram did not take it.
        """
        secret = self._queue.settings.telegram_secret
        if secret is None:
            raise ConfigurationError(
                "TELEGRAM_SECRET is not set, and without it anybody could send presses. Set it to 16 to 256 of "
                "A-Z a-z 0-9 _ -"
            )
        if not url.startswith("https://"):
            raise ConfigurationError(
                f"Telegram sends to https:// only, and the address is {url!r}. Set LEARNING_PUBLIC_URL to the address "
                "under which the server is reached"
            )
        await self._bot.call(
            "setWebhook",
            {
                "url": url,
                "secret_token": secret.get_secret_value(),
                "allowed_updates": ["callback_query"],
                "drop_pending_updates": True,
            },
        )

    async def delete_webhook(self) -> None:
        """Tell Telegram to send nothing any more.

        Raises:
            OperatorError: Telegram did not take it.
        """
        await self._bot.call("deleteWebhook", {"drop_pending_updates": True})

    # --- the data of a button -----------------------------------------------------------------------------------

    def button_data(self, verdict: str, approvals: Sequence[Approval]) -> str | None:
        """What a button carries: verdict, approval or batch, a MAC over exact arguments, and the tenant.

        Args:
            verdict: `a` or `r` for one approval, `A` or `R` for all of a batch that wait.
            approvals: what the button decides.

        Returns:
            At most 64 bytes; `None` where the tenant's name does not fit.
        """
        tenant = _packed_tenant(approvals[0].tenant_id)
        target = approvals[0].batch_id if verdict.isupper() else approvals[0].approval_id
        data = f"{verdict}:{_packed(str(target))}:{self._mac(verdict, approvals)}:{tenant}"
        return data if tenant is not None and len(data.encode()) <= DATA_LIMIT else None

    def _mac(self, verdict: str, approvals: Sequence[Approval]) -> str:
        exact = sorted((one.approval_id, one.args_hash) for one in approvals)
        lines = [verdict, approvals[0].tenant_id, *(f"{approval} {hashed}" for approval, hashed in exact)]
        digest = hmac.digest(self._key, "\n".join(lines).encode(), "sha256")
        return base64.urlsafe_b64encode(digest[:_MAC_BYTES]).decode()

    def is_genuine(self, verdict: str, approvals: Sequence[Approval], mac: str) -> bool:
        """Whether we made this button, for exactly these arguments."""
        return bool(approvals) and hmac.compare_digest(self._mac(verdict, approvals).encode(), mac.encode())

    # --- sending --------------------------------------------------------------------------------------------------

    def _card(self, approvals: Sequence[Approval]) -> Card:
        return make_card(
            approvals,
            public_url=self._queue.settings.public_url,
            text_limit=1_500,
            card_limit=1_800,
            line_limit=40,
        )

    def _chats(self, card: Card, approvals: Sequence[Approval], *, escalated: bool) -> list[tuple[int, bool]]:
        """Chats to send to, each with whether it is private."""
        named = self._queue.policy.approval
        chat = named.telegram_escalation_chat if escalated else named.telegram_chat
        if card.risk is not Risk.DESTRUCTIVE and chat is not None:
            return [(chat, chat > 0)]  # ids of groups and channels are negative
        if escalated:
            return []  # who may decide has it in private already
        names = {name for one in approvals for name in one.approvers}
        people = (self._queue.policy.reviewers.by_name(name) for name in sorted(names))
        return [(one.telegram, True) for one in people if one is not None and one.telegram is not None]

    async def _escalate(
        self, card: Card, approvals: Sequence[Approval], known: set[Any]
    ) -> list[dict[str, Any]]:
        chats = [place for place in self._chats(card, approvals, escalated=True) if place[0] not in known]
        posts = await self._send_card(card, approvals, chats)
        return [{**post, "is_escalation": True} for post in posts]

    async def _send_card(
        self, card: Card, approvals: Sequence[Approval], chats: Iterable[tuple[int, bool]]
    ) -> list[dict[str, Any]]:
        posts = []
        for chat, is_private in chats:
            try:
                sent = await self._bot.call(
                    "sendMessage",
                    {"chat_id": chat, **self._message(card, approvals, is_private=is_private)},
                )
                posts.append(
                    {
                        "chat": int(sent["chat"]["id"]),
                        "message": int(sent["message_id"]),
                        "is_private": sent["chat"].get("type") == "private",
                    }
                )
            except OperatorError as error:  # one who has not started the bot must not keep it from the others
                emit("telegram_delivery_failed", what="card", reason=str(error))
            except (KeyError, TypeError, ValueError):
                emit("telegram_delivery_failed", what="card", reason="the answer names no message")
        return posts

    async def _tell_results(
        self, approvals: Sequence[Approval], posts: Sequence[Mapping[str, Any]], told: dict[str, str]
    ) -> dict[str, str]:
        for approval in approvals:
            state = approval.state
            if state not in _FINAL or told.get(approval.approval_id) == state:
                continue
            text = result_text(approval, await log_entry(self._queue, approval))
            for post in posts:
                await self._bot.call(
                    "sendMessage",
                    {
                        "chat_id": post["chat"],
                        "text": text[: MESSAGE_LIMIT // 2],
                        "reply_parameters": {
                            "message_id": post["message"],
                            "allow_sending_without_reply": True,
                        },
                        "link_preview_options": {"is_disabled": True},
                    },
                    gone_is_fine=True,
                )
            told[approval.approval_id] = state
        return told

    def _message(self, card: Card, approvals: Sequence[Approval], *, is_private: bool) -> dict[str, Any]:
        text, entities, is_whole = message_text(card)
        keyboard = []
        if is_private or card.risk is not Risk.DESTRUCTIVE:
            # Who presses here has seen no more than this message.
            is_seen = is_whole and not any(item.hidden_characters for item in card.items)
            keyboard = self._keyboard(card, approvals, may_approve=is_seen)
        return {
            "text": text,
            "entities": entities,
            "link_preview_options": {"is_disabled": True},
            "reply_markup": {"inline_keyboard": keyboard},
        }

    def _keyboard(
        self, card: Card, approvals: Sequence[Approval], *, may_approve: bool
    ) -> list[list[dict[str, str]]]:
        rows: list[list[dict[str, str]]] = []
        by_id = {one.approval_id: one for one in approvals}
        is_single = len(card.items) == 1
        for number, item in enumerate(card.items_shown, 1):
            if item.is_open:
                suffix = "" if is_single else f" {number}"
                one = [by_id[item.approval_id]]
                approve = self._button(f"✅ Approve{suffix}", "a", one) if may_approve else []
                rows.append([*approve, *self._button(f"❌ Reject{suffix}", "r", one)])
        waiting = [by_id[item.approval_id] for item in card.open_items]
        if len(waiting) > 1:
            may_all = may_approve and card.is_whole
            approve = self._button(f"✅ Approve all {len(waiting)}", "A", waiting) if may_all else []
            rows.append([*approve, *self._button(f"❌ Reject all {len(waiting)}", "R", waiting)])
        if card.is_open and card.link and card.link.startswith("https://"):
            told = "Show the whole, or edit" if may_approve else "Show the whole, to approve or edit"
            rows.append([{"text": told, "url": card.link}])
        return [row for row in rows if row]

    def _button(self, text: str, verdict: str, approvals: Sequence[Approval]) -> list[dict[str, str]]:
        data = self.button_data(verdict, approvals)
        return [] if data is None else [{"text": text, "callback_data": data}]


class TelegramAnswers:
    """What people press in Telegram, as decisions. Whatever is unclear decides nothing."""

    def __init__(self, queue: HumanApprovalQueue, channel: TelegramChannel) -> None:
        self._queue = queue
        self._channel = channel

    async def receive(self, update: Mapping[str, Any]) -> None:
        """Take one update whose origin is proven."""
        press = update.get("callback_query")
        if not isinstance(press, Mapping):
            return
        press_id = str(press.get("id") or "")
        try:
            said = await self._pressed(update, press)
        except _Refusal as refusal:
            emit("telegram_answer_refused", reason=str(refusal), telegram_user=_id(press.get("from")))
            said = f"Not done: {refusal}"
        except LearningError as error:
            emit("telegram_answer_failed", reason=type(error).__name__)
            said = "Not done: it could not be recorded, and nothing was decided. Press again."
        await self._channel.answer_press(press_id, said)

    async def _pressed(self, update: Mapping[str, Any], press: Mapping[str, Any]) -> str:
        update_id = update.get("update_id")
        if not isinstance(update_id, int) or isinstance(update_id, bool):
            raise _Refusal("the update has no number")
        if not await remember_delivery(
            self._queue, TelegramChannel.name, f"{self._channel.bot_id}:{update_id}"
        ):
            raise _Refusal("this was received before")
        user = _id(press.get("from"))
        reviewer = None if user is None else self._queue.policy.reviewers.by_telegram(user)
        if reviewer is None:
            raise _Refusal("you are not listed as a reviewer")
        verdict, target, mac, tenant = _read_data(press.get("data"))
        approvals = await self._decided_by(verdict, target, tenant)
        # One answer for a wrong MAC and an approval that does not exist: presses tell nothing of what there is.
        if not self._channel.is_genuine(verdict, approvals, mac):
            raise _Refusal("the button is not one of the card as it is now")
        self._check_place(press, approvals)
        return await self._decide(verdict, reviewer, approvals, tenant, update_id)

    async def _decided_by(self, verdict: str, target: str, tenant: str) -> list[Approval]:
        identity = Identity(tenant_id=tenant)
        if verdict.isupper():
            return [one for one in await self._queue.of_batch(target, identity) if one.is_open]
        try:
            return [await self._queue.get(target, identity)]
        except NotFound:
            return []

    @staticmethod
    def _check_place(press: Mapping[str, Any], approvals: Sequence[Approval]) -> None:
        message = press.get("message")
        chat = message.get("chat") if isinstance(message, Mapping) else None
        place = (_id(chat), message.get("message_id") if isinstance(message, Mapping) else None)
        for approval in approvals:
            known = {
                (post.get("chat"), post.get("message"))
                for delivered in approval.messages
                if delivered.get("channel") == TelegramChannel.name
                for post in (delivered.get("ref") or {}).get("posts", ())
            }
            if None in place or place not in known:
                raise _Refusal("this message is not the card of that approval")
            is_private = (
                isinstance(chat, Mapping)
                and chat.get("type") == "private"
                and _id(chat) == _id(press["from"])
            )
            if approval.risk is Risk.DESTRUCTIVE and not is_private:
                raise _Refusal("what destroys data is decided in a private chat only")

    async def _decide(
        self,
        verdict: str,
        reviewer: Reviewer,
        approvals: Sequence[Approval],
        tenant: str,
        update_id: int,
    ) -> str:
        outcome = await self._queue.decide(
            [one.approval_id for one in approvals],
            _VERDICTS[verdict],
            reviewer,
            channel=TelegramChannel.name,
            hashes={one.approval_id: one.args_hash for one in approvals},
            identity_tenant=tenant,
            dedup_key=f"{self._channel.bot_id}:{update_id}",
        )
        if outcome.outcome == "recorded":
            said = "Approved." if _VERDICTS[verdict] == "approve" else "Rejected."
            if any(map(self._queue.outdated_because, outcome.approvals)):
                said += " But the policy file was edited since, so it has to be asked for again."
            return said
        raise _Refusal(outcome.why or "you have decided already")


class _Refusal(Exception):
    """Nothing was decided; the words are for the person who pressed."""


def message_text(card: Card) -> tuple[str, list[dict[str, Any]], bool]:
    """The card as the text of one message; what is bold or code, counted in UTF-16 units; whether all fitted."""
    text = MessageText(_TOO_LONG)
    marks = "⚠️ " if card.risk in {Risk.DESTRUCTIVE, Risk.FORBIDDEN} else ""
    text.add(f"{marks}{card.title}\n", "bold")
    for number, item in enumerate(card.items_shown, 1):
        _add_item(text, item, f"{number}. {item.title} ({item.risk})" if len(card.items) > 1 else "")
    if not card.is_whole:
        text.add(f"\nand {len(card.items) - len(card.items_shown)} more, not on this card: {card.where}\n")
    text.add("\n")
    for fact in card.facts:
        _add_shown(text, fact)
    if any(item.hidden_characters for item in card.items):
        text.add(
            f"A part is not on this card, so it can be rejected here and approved where all is seen: {card.where}\n",
            "bold",
        )
    for claim in card.claims:
        _add_shown(text, claim)
    return text.finished()


def _add_item(text: MessageText, item: CardItem, title: str) -> None:
    if title:
        text.add(f"\n{title}\n", "bold")
    for one in item.shown:
        _add_shown(text, one)
    _add_shown(text, Shown(label="State", text=item.status))
    _add_shown(text, Shown(label="Approval", text=f"{item.approval_id}, hash {item.key}"))


def _add_shown(text: MessageText, shown: Shown) -> None:
    text.add(f"{shown.label}:", "bold")
    text.add("\n" if shown.is_code else " ")
    text.add(shown.text or " ", "pre" if shown.is_code else "code")
    text.add("\n")
    if shown.hidden_characters:
        text.add(f"sha256 of the whole: {shown.sha256}\n")


def _packed(identifier: str) -> str:
    """A UUID in 22 letters."""
    return base64.urlsafe_b64encode(UUID(identifier).bytes).decode().rstrip("=")


def _unpacked(letters: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_-]{22}", letters):
        raise ValueError("22 letters make an id")
    return str(UUID(bytes=base64.urlsafe_b64decode(letters + "==")))


def _packed_tenant(tenant: str) -> str | None:
    """A tenant's name as it stands in a button; a UUID takes 23 letters."""
    try:
        if str(UUID(tenant)) == tenant:
            return f"~{_packed(tenant)}"
    except ValueError:
        pass
    return None if tenant.startswith("~") else tenant


def _read_data(data: Any) -> tuple[str, str, str, str]:
    """Verdict, id, MAC and tenant of a button."""
    try:
        verdict, target, mac, tenant = str(data).split(":", 3)
        if verdict not in _VERDICTS or not tenant:
            raise ValueError
        return verdict, _unpacked(target), mac, _unpacked(tenant[1:]) if tenant.startswith("~") else tenant
    except (ValueError, binascii.Error):
        raise _Refusal("the button is not one of ours") from None


def _id(party: Any) -> int | None:
    """The id of a user or chat; `None` where there is none."""
    found = party.get("id") if isinstance(party, Mapping) else None
    return found if isinstance(found, int) and not isinstance(found, bool) else None
