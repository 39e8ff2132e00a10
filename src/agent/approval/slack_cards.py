"""How a card and the form of an edit look in Slack: Block Kit.

Everything that people or models wrote stands in rich text or plain text, which Slack does not read as markup.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final

from agent.approval.card import KEY_DIGITS, Card, CardItem
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

APPROVE: Final = "approval_approve"
REJECT: Final = "approval_reject"
EDIT: Final = "approval_edit"
_VALUE_LIMIT: Final = 2_000  # of a button, by Slack
_INPUT_LIMIT: Final = 3_000  # of a text field, by Slack
_PRIVATE_LIMIT: Final = 3_000  # of a modal's private metadata, by Slack


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


def _button(text: str, action_id: str, value: str) -> dict[str, Any]:
    return {"type": "button", "action_id": action_id, "text": plain(text, 75), "value": value}
