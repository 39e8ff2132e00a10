"""The same invented user for every agent under test: memories to fill a store with, questions to ask."""

from __future__ import annotations

import random

SEED = 20251120

_SUBJECTS = (
    "billing dashboard", "invoice export", "quarterly report", "onboarding guide", "warehouse scanner",
    "shipping label", "refund policy", "loyalty program", "support inbox", "mobile app", "release checklist",
    "vendor contract", "tax filing", "payment gateway", "customer survey", "training video", "sales forecast",
    "delivery route", "return form", "product catalogue", "incident review", "access badge", "travel expense",
    "team calendar", "newsletter draft", "audit log", "price list", "job interview", "office move", "data backup",
)  # fmt: skip
_OPENINGS = (
    "Prefers", "Works on", "Asked twice about", "Is responsible for", "Had trouble with", "Wants a summary of",
    "Reviews", "Decided to postpone", "Is waiting for news about", "Finished", "Dislikes the current",
    "Was promised a discount on", "Shares", "Needs approval for", "Presented",
)  # fmt: skip
_DETAILS = (
    "in short bullet points", "with numbers in euros", "before the board meeting", "together with Amara from finance",
    "after the move to Lisbon", "on the first Monday of the month", "because of the new supplier in Gdansk",
    "without attachments", "in the morning only", "for the Nordic customers", "as a plain text e-mail",
    "with the old reference number", "since the outage in March", "until the contract is signed",
    "for the pilot group", "at the request of Kenji", "while the warehouse is closed", "in German and English",
)  # fmt: skip
_QUESTIONS = (
    "What do you know about my billing dashboard?",
    "How should you send me the quarterly report?",
    "Which supplier gave us trouble with the shipping label?",
    "Can you prepare the vendor contract the way I like it?",
    "What was decided about the office move to Lisbon?",
    "Who works with me on the tax filing?",
    "Is there anything open about the payment gateway outage?",
    "Please summarise the customer survey for the Nordic customers.",
    "When do I want news about the delivery route?",
    "Draft the newsletter for the pilot group.",
    "What did I ask about the refund policy and the return form?",
    "Remind me what Kenji wanted for the product catalogue.",
)


def memories(count: int) -> list[str]:
    """`count` different sentences about one user, the same on every machine; a longer list begins with the shorter."""
    chance = random.Random(SEED)
    return [
        f"{chance.choice(_OPENINGS)} the {chance.choice(_SUBJECTS)} {chance.choice(_DETAILS)}, "
        f"case {1000 + number} of the {chance.choice(_SUBJECTS)}."
        for number in range(count)
    ]


def question(number: int) -> str:
    """The question of run `number`: a dozen questions in turn, each sharing words with hundreds of the memories."""
    return _QUESTIONS[number % len(_QUESTIONS)]
