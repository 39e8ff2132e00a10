"""What a person is shown before they decide: built from the call by code, never from what a model says about it.

Slack, Telegram, the web page and the command line show the same card. Pure: no I/O, no clock.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import accumulate
from typing import Any, Final
from urllib.parse import urlencode

from agent.approval.records import WARNING, Approval
from agent.approval.risk import Risk

TEXT_LIMIT: Final = 2_400
"""Characters of one value that a card shows; chats take about 3,000 in one block."""
LINE_LIMIT: Final = 60
"""Lines of one value that a card shows."""
CLAIM_LIMIT: Final = 600
CARD_LIMIT: Final = 9_000
"""Characters of all values of one card together."""
ARGUMENTS_LIMIT: Final = 16
"""Arguments that are shown one by one; more are shown as one document."""
VALUES_LIMIT: Final = 24
"""Values that one card shows; items beyond it are counted and not shown."""
ITEMS_LIMIT: Final = 8
"""Actions that one card shows. A batch of more can be rejected from a chat, and is approved where all are seen."""
KEY_DIGITS: Final = 16
"""Hex digits of the hash that buttons carry: what the database takes for a decision at least."""

_RUN_OF_SPACES: Final = re.compile(r"[ \t]{24,}")
_RUN_OF_LINES: Final = re.compile(r"\n(?:[ \t]*\n){4,}")
# Characters that fonts draw as nothing, although Unicode does not call them invisible.
_BLANKS: Final = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u180b\u180c\u180d\u180f\u2800\u3164\uffa0")
_CODE_NAMES: Final = frozenset({"sql", "code", "query", "statement", "body", "text", "html"})


@dataclass(frozen=True, kw_only=True)
class Shown:
    """One thing on a card: a label and its text, in which every character can be seen."""

    label: str
    text: str
    is_code: bool = False
    """Whether it is shown in type of one width, with its line ends."""
    hidden_characters: int = 0
    """How many characters of the whole are not in `text`."""
    sha256: str = ""
    """Hash of the whole where something is hidden."""


@dataclass(frozen=True, kw_only=True)
class CardItem:
    """One action on a card."""

    approval_id: str
    args_hash: str
    title: str
    """Tool and version."""
    risk: Risk
    state: str
    status: str
    """The state as a sentence."""
    shown: tuple[Shown, ...]
    """The exact call, then what it will do: rows per table, bounds."""
    claim: Shown | None
    """What the model gave as its reason: to be shown last, and as a claim."""

    @property
    def is_open(self) -> bool:
        """Whether it waits for a decision."""
        return self.state == "pending"

    @property
    def key(self) -> str:
        """The first digits of the hash, which go with each decision."""
        return self.args_hash[:KEY_DIGITS]

    @property
    def hidden_characters(self) -> int:
        """How many characters of the call are not on the card."""
        return sum(one.hidden_characters for one in self.shown)


@dataclass(frozen=True, kw_only=True)
class Card:
    """All that is asked at once: one action, or the risky calls of one turn."""

    batch_id: str
    tenant_id: str
    title: str
    risk: Risk
    """The strictest of its items."""
    items: tuple[CardItem, ...]
    items_shown: tuple[CardItem, ...]
    """As many of them, from the first on, as one message takes."""
    facts: tuple[Shown, ...]
    """Who asked, until when, who has voted."""
    claims: tuple[Shown, ...]
    """What the model gave as reasons; last."""
    where: str
    """Where the whole can be seen."""
    link: str | None
    """Address of its page, where the server's public address is known."""
    is_escalated: bool

    @property
    def open_items(self) -> tuple[CardItem, ...]:
        """Those that wait for a decision."""
        return tuple(item for item in self.items if item.is_open)

    @property
    def is_open(self) -> bool:
        """Whether anything waits for a decision."""
        return bool(self.open_items)

    @property
    def is_whole(self) -> bool:
        """Whether every item is shown, so that all may be approved at once."""
        return len(self.items) == len(self.items_shown)

    @property
    def needs_confirmation(self) -> bool:
        """Whether a press must be confirmed: data is destroyed, or a part of the call is not on the card."""
        return self.risk is Risk.DESTRUCTIVE or any(item.hidden_characters for item in self.items)

    def as_text(self) -> str:
        """The card as lines of text, for terminals and for notifications."""
        return "\n".join(_lines(self))


def make_card(
    approvals: Sequence[Approval],
    *,
    public_url: str | None = None,
    tenant_id: str | None = None,
    text_limit: int = TEXT_LIMIT,
    line_limit: int = LINE_LIMIT,
    card_limit: int = CARD_LIMIT,
) -> Card:
    """The card of these approvals, which are of one batch.

    Args:
        approvals: at least one, all of one batch; shown in order of their requests.
        public_url: address of the server, for the link to the card's page.
        tenant_id: whose they are, where the approvals do not say.
        text_limit: greatest number of characters of one value.
        line_limit: greatest number of lines of one value.
        card_limit: greatest number of characters of all values that messages show, where it is more than that of one.
    """
    ordered = sorted(approvals, key=lambda one: (one.requested_at, one.approval_id))
    first = ordered[0]
    counts = list(accumulate(len(_values(one)) for one in ordered[:ITEMS_LIMIT]))
    shown_count = max(sum(count <= VALUES_LIMIT for count in counts), 1)
    whole = max(card_limit, text_limit)
    share = min(text_limit, max(whole // max(counts[shown_count - 1], 1), 80))
    items = tuple(_item(one, text_limit=share, line_limit=line_limit) for one in ordered)
    risk = max((item.risk for item in items), key=lambda one: one.rank)
    title = f"{items[0].title}" if len(items) == 1 else f"{len(items)} actions"
    tenant = tenant_id or first.tenant_id
    path = f"/approvals/{first.approval_id}?{urlencode({'tenant': tenant})}"
    link = f"{public_url.rstrip('/')}{path}" if public_url else None
    command = "; ".join(f"agent approvals show {item.approval_id}" for item in items[:2])
    return Card(
        batch_id=first.batch_id,
        tenant_id=tenant,
        title=f"{risk}: {title}",
        risk=risk,
        items=items,
        items_shown=items[:shown_count],
        facts=_facts(ordered),
        claims=tuple(item.claim for item in items if item.claim is not None),
        where=f"{link} or {command}" if link else command,
        link=link,
        is_escalated=any(one.escalated_at for one in ordered),
    )


def visible(text: Any) -> str:
    """The text with every character that cannot be seen, or that turns the direction of others, as `\\u{202E}`.

    Line feeds and tabs stay. Long runs of blanks, which push what follows out of sight, are told by their length.
    """
    seen = "".join(_seen(character) for character in str(text).replace("\r\n", "\n"))
    seen = _RUN_OF_SPACES.sub(lambda run: f" ⟨{len(run[0])} blanks⟩ ", seen)
    return _RUN_OF_LINES.sub(lambda run: "\n⟨{} empty lines⟩\n".format(run[0].count("\n") - 1), seen)


def _seen(character: str) -> str:
    if " " <= character <= "~" or character in "\n\t":
        return character
    category = unicodedata.category(character)
    hides = category in {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"} or character in _BLANKS
    is_odd_space = category == "Zs"
    is_selector = "\ufe00" <= character <= "\ufe0f" or "\U000e0100" <= character <= "\U000e01ef"
    return f"\\u{{{ord(character):04X}}}" if hides or is_odd_space or is_selector else character


def cut(text: str, *, characters: int, lines: int) -> tuple[str, int]:
    """The beginning and the end of a text that is too long, and how many characters are left out between them."""
    rows = text.split("\n")
    if len(text) <= characters and len(rows) <= lines:
        return text, 0
    if len(rows) > lines:
        head, tail = "\n".join(rows[: lines * 2 // 3]), "\n".join(rows[-(lines // 3) :])
    else:
        head, tail = text[: len(text) // 2], text[len(text) // 2 :]
    head, tail = head[: characters * 2 // 3], tail[-(characters // 3) :]
    hidden = len(text) - len(head) - len(tail)
    return f"{head}\n⟨{hidden:,} characters are not shown here⟩\n{tail}", hidden


def shown_time(moment: datetime | str | None) -> str:
    """A moment as everybody reads it alike: in UTC."""
    if moment is None:
        return ""
    if isinstance(moment, str):
        try:
            moment = datetime.fromisoformat(moment)
        except ValueError:
            return visible(moment)
    return moment.astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC")


def result_text(approval: Approval, entry: Mapping[str, Any] | None) -> str:
    """What became of an action, for the thread of its card.

    Args:
        approval: it has run, or it will not.
        entry: its entry in the execution log, where there is one that can be read.
    """
    told = f"{visible(approval.tool)}: {_status(approval)}"
    if entry is None:
        return told
    parts = []
    rows = entry.get("rows")
    if isinstance(rows, Mapping) and rows and all(_is_delta(one) for one in rows.values()):
        parts.append("; ".join(_delta(name, one) for name, one in rows.items()))
    elif entry.get("row_count") is not None:
        parts.append(f"{entry['row_count']} rows")
    if entry.get("duration_ms") is not None:
        parts.append(f"{float(entry['duration_ms']):.0f} ms")
    if entry.get("error"):
        parts.append(cut(visible(entry["error"]), characters=500, lines=6)[0])
    return f"{told}\n{'; '.join(parts)}" if parts else told


_STATUS: Final = {
    "pending": "Waiting for a decision",
    "approved": "Approved, not yet run",
    "rejected": "Rejected: it will not run",
    "expired": "Expired without enough votes: it will not run",
    "cancelled": "Withdrawn: it will not run",
    "executing": "Running",
    "executed": "Done",
    "failed": "Tried, and failed",
    "unknown": "Broken off while running: whether it happened is not known, somebody must look",
}


def _item(approval: Approval, *, text_limit: int, line_limit: int) -> CardItem:
    title = visible(approval.tool)
    if approval.tool_version != "1":
        title += f" (version {visible(approval.tool_version)})"
    shown = _values(approval)
    return CardItem(
        approval_id=approval.approval_id,
        args_hash=approval.args_hash,
        title=title,
        risk=approval.risk,
        state=approval.state,
        status=_status(approval),
        shown=tuple(_limited(one, characters=text_limit, lines=line_limit) for one in shown),
        claim=_limited(
            Shown(label=f"The model's claim, not checked ({title})", text=visible(approval.reason)),
            characters=CLAIM_LIMIT,
            lines=8,
        )
        if approval.reason
        else None,
    )


def _values(approval: Approval) -> list[Shown]:
    """The whole call and what it will do."""
    shown = [*_call(approval.arguments_shown), *_effects(approval)]
    if approval.replaces:
        who = f" by {visible(approval.edited_by)}" if approval.edited_by else ""
        shown.append(
            Shown(label="Edited", text=f"these arguments were written{who}, in place of the agent's")
        )
    return shown


def _call(arguments: Any) -> Iterable[Shown]:
    """The exact arguments, one by one."""
    if isinstance(arguments, str):
        yield Shown(label="Call", text=visible(arguments), is_code=True)
        return
    if not isinstance(arguments, Mapping) or len(arguments) > ARGUMENTS_LIMIT:
        yield Shown(label="Call", text=visible(_json(arguments)), is_code=True)
        return
    if not arguments:
        yield Shown(label="Arguments", text="none")
    for name, value in arguments.items():
        label = cut(visible(name).replace("\n", "\\n"), characters=60, lines=1)[0]
        if isinstance(value, str):
            is_code = "\n" in value or len(value) > 80 or str(name).lower() in _CODE_NAMES
            # Quoted where it stands in a line, so that its ends are seen and "3" is told from 3.
            text = visible(value) if is_code else visible(json.dumps(value, ensure_ascii=False))
            yield Shown(label="SQL" if str(name).lower() == "sql" else label, text=text, is_code=is_code)
        else:
            text = visible(_json(value))
            yield Shown(label=label, text=text, is_code=len(text) > 80)


def _effects(approval: Approval) -> Iterable[Shown]:
    effects = approval.effects
    if isinstance(effects, Mapping):
        if warning := effects.get(WARNING):
            yield Shown(label="Warning", text=visible(warning))
        effects = {name: value for name, value in effects.items() if name != WARNING}
        delta = effects.get("rows", effects)
        if isinstance(delta, Mapping) and delta and all(_is_delta(one) for one in delta.values()):
            yield Shown(
                label="Rows, by a trial run", text="; ".join(_delta(name, one) for name, one in delta.items())
            )
            effects = {n: v for n, v in effects.items() if n != "rows"} if "rows" in effects else {}
        for name, value in effects.items():
            text = visible(value) if isinstance(value, str) else visible(_json(value))
            yield Shown(label=visible(name).replace("_", " ").capitalize(), text=text, is_code="\n" in text)
    elif effects:
        yield Shown(label="Effects", text=visible(effects))
    if approval.bounds:
        yield Shown(label="Held to", text=visible(_json(approval.bounds)))


def _is_delta(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(value) and set(value) <= {"inserted", "updated", "deleted"}


def _delta(table: Any, counts: Mapping[str, Any]) -> str:
    told = ", ".join(
        f"{counts[verb]} {verb}" for verb in ("inserted", "updated", "deleted") if counts.get(verb)
    )
    return f"{visible(table)}: {told or 'none'}"


def _facts(approvals: Sequence[Approval]) -> tuple[Shown, ...]:
    first = approvals[0]
    asker = visible(first.requested_by) if first.requested_by else "nobody who is known"
    places = [
        f"{word} {visible(name)}"
        for word, name in (
            ("agent", first.agent_id),
            ("session", first.session_id),
            ("tenant", first.tenant_id),
        )
        if name
    ]
    facts = [Shown(label="Asked for", text=", ".join([asker, *places]))]
    if any(one.is_open for one in approvals):
        ends = min(shown_time(one.expires_at) for one in approvals if one.is_open)
        facts.append(Shown(label="Expires", text=f"{ends}; no answer is a no"))
        if any(one.escalated_at for one in approvals):
            facts.append(Shown(label="Escalated", text="it expires soon and nobody has decided"))
    return tuple(facts)


def _status(approval: Approval) -> str:
    state = approval.state
    told = _STATUS[state]
    votes = approval.votes
    if state == "expired" and len(approval.decided_by) >= approval.required_votes:
        told = "Approved, but not taken up in time: it will not run"
    if state == "pending":
        yes = sum(vote.get("verdict") == "approve" for vote in votes)
        needed = approval.required_votes
        told += f" ({yes} of {needed} votes)" if needed > 1 or yes else ""
    elif state != "cancelled" and (deciders := [visible(who) for who in approval.decided_by]):
        told += f"; decided by {', '.join(deciders)}"
    notes = [
        f"{visible(vote.get('voter'))}: “{cut(visible(vote['note']), characters=300, lines=4)[0]}”"
        for vote in votes
        if vote.get("note")
    ]
    if approval.log_id and state in {"executed", "failed", "unknown"}:
        told += f"; log entry {visible(approval.log_id)}"
    return f"{told}. {' '.join(notes)}".strip() if notes else told


def _limited(shown: Shown, *, characters: int, lines: int) -> Shown:
    text, hidden = cut(shown.text, characters=characters, lines=lines)
    if not hidden:
        return shown
    digest = hashlib.sha256(shown.text.encode("utf-8", "surrogatepass")).hexdigest()
    return Shown(label=shown.label, text=text, is_code=shown.is_code, hidden_characters=hidden, sha256=digest)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=None, sort_keys=True, default=str)


def _lines(card: Card) -> Iterable[str]:
    yield card.title
    for item in card.items:
        yield ""
        yield f"{item.title}  {item.risk}  {item.approval_id}  hash {item.key}"
        for one in item.shown:
            yield from _shown_lines(one)
        yield f"  State: {item.status}"
    yield ""
    for one in card.facts:
        yield from _shown_lines(one)
    if any(item.hidden_characters for item in card.items):
        yield f"  The whole: {card.where}"
    for one in card.claims:
        yield from _shown_lines(one)


def _shown_lines(shown: Shown) -> Iterable[str]:
    if shown.is_code or "\n" in shown.text:
        yield f"  {shown.label}:"
        yield from (f"    {line}" for line in shown.text.split("\n"))
    else:
        yield f"  {shown.label}: {shown.text}"
    if shown.hidden_characters:
        yield f"  (sha256 of the whole {shown.label}: {shown.sha256})"
