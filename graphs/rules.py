"""The tables that `RuleChat` goes by: what it understands, and what it does then."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

CAPABILITIES = {
    "order_status": "look up orders",
    "track_shipment": "track parcels",
    "change_address": "change a delivery address",
    "find_invoice": "find invoices",
    "refund_order": "refund orders",
    "cancel_subscription": "cancel subscriptions",
    "offer_discount": "offer a discount on a subscription",
    "report_defect": "open a case for something broken",
    "send_replacement": "send a replacement",
    "delete_account": "delete an account",
    "update_user_profile": "keep your profile",
    "save_user_memory": "remember things for you",
    "execute_sql": "read the shop's tables and, once a person has approved it, change them",
    "create_new_tool": "keep a tool that you write down for me, once a person has approved it",
}
"""Tool name -> what the model says it can do with it."""

CASUAL_GREETING = re.compile(r"^\W*(?:hello|hi|hey|good (?:morning|afternoon|evening))\b", re.IGNORECASE)
QUESTION = re.compile(r"\?|^\W*(?:what|where|who|which|when|how|do|does|did|am|is|are|can)\b", re.IGNORECASE)
ABOUT_ME = re.compile(r"\b(?:me|my|mine|i|i'm|i've)\b", re.IGNORECASE)
ALL_ABOUT_ME = re.compile(
    r"\bwhat (?:do|did|can|have) you (?:already )?(?:know|learn\w*|remember\w*|recall|stored?|tell me)\b.*\b(?:me|i)\b"
    r"|\bwhat (?:do|have) you (?:remember|learn\w*)\W*$"
    r"|\b(?:do|can) you (?:know|remember|recall) (?:me|anything|something|who i am)\b"
    r"|\bwhat (?:did|have) i (?:ever |already )?(?:tell|told)\b"
    r"|\bwho am i\b"
    r"|\btell me (?:everything |all |what )?(?:you know )?about (?:me|myself)\b",
    re.IGNORECASE,
)
COMMON_WORDS = frozenset(
    {"what", "where", "which", "when", "know", "that", "does", "have", "your", "from", "with", "answers"}
)
"""Words of four letters and more that say nothing about what a question is about."""
WORDS_FOR_FIELDS = {
    "work": ("company", "role"),
    "job": ("company", "role"),
    "employer": ("company",),
    "called": ("name",),
    "live": ("location",),
    "based": ("location",),
    "speak": ("language",),
}
"""Word of a question about oneself -> profile fields it may be about, besides those that share a word with it."""


# --- what a person says about themselves ------------------------------------------------------------------------

_CLAUSE = (
    r"(?P<value>[^.!?;\n]+?)(?=,?\s+(?:and|but)\s+(?:i|i'm|my|call|please|you|also|we)\b|\s*[.!?;,\n]|\s*$)"
)


@dataclass(frozen=True)
class Statement:
    """A sentence worth keeping."""

    pattern: re.Pattern[str]
    memory: str
    """How it is kept where there is no field for it; `{value}` is what the pattern caught."""
    memory_type: str
    fields: tuple[str, ...] = ()
    """Profile fields it may go to; the first that the schema has is taken."""
    field_value: str = "{value}"


def _statement(
    pattern: str, memory: str, memory_type: str, *fields: str, field_value: str = "{value}"
) -> Statement:
    return Statement(
        re.compile(rf"\b{pattern}\s+{_CLAUSE}", re.IGNORECASE), memory, memory_type, fields, field_value
    )


STATEMENTS = (
    _statement("my name is", "Name is {value}", "fact", "name"),
    _statement(r"call me(?=\s+(?-i:[^\Wa-z]))", "Wants to be called {value}", "fact", "preferred_name", "name"),
    _statement(r"i(?:'m| am)? work(?:ing)? (?:at|for)", "Works at {value}", "fact", "company"),
    _statement(r"i(?:'m| am)? work(?:ing)? (?:on|in|with)", "Works on {value}", "fact", "role",
               field_value="works on {value}"),
    _statement(r"i(?:'m| am)? work(?:ing)? as", "Works as {value}", "fact", "role"),
    _statement(r"i(?:'m| am)? (?:live|living|based) in", "Lives in {value}", "fact", "location"),
    _statement(r"i speak", "Speaks {value}", "fact", "language"),
    _statement(r"my time ?zone is", "Time zone is {value}", "fact", "timezone"),
    _statement(r"i(?:'d| would)? prefer", "Prefers {value}", "preference", "preferences"),
    _statement(r"(?<!you )(?<!i )(?<!to )remember(?: that)?(?!\s+me\b)", "{value}", "fact"),
)  # fmt: skip

FORGET = re.compile(
    r"\bforget my (?P<field>preferred name|name|role|company|location|language|time ?zone|preferences)\b",
    re.IGNORECASE,
)


# --- what a person wants done -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Slot:
    """A value that a tool needs."""

    pattern: re.Pattern[str] | None
    """Its group `value`; `None`: the whole message."""
    question: str
    """Asked when it is missing."""
    kind: Literal["text", "code", "number"] = "text"


SLOTS = {
    "order_id": Slot(re.compile(r"\b(?P<value>[a-z]\d{4})\b(?<!s\d{4})", re.IGNORECASE),
                     "Which order is it? Its number looks like A1001.", "code"),
    "subscription_id": Slot(re.compile(r"\b(?P<value>s\d{4})\b", re.IGNORECASE),
                            "Which subscription is it? Its number looks like S3001.", "code"),
    "amount": Slot(re.compile(r"(?P<value>\d+(?:\.\d{1,2})?)\s*(?:eur\b|euros?\b|€)", re.IGNORECASE),
                   "How many euros?", "number"),
    "percent": Slot(re.compile(r"(?P<value>\d+)\s*(?:%|percent\b)", re.IGNORECASE), "How many percent?", "number"),
    "email": Slot(re.compile(r"(?P<value>[\w.+-]+@[\w-]+(?:\.[\w-]+)+)"), "Which e-mail address is the account for?"),
    "address": Slot(re.compile(r"\baddress\b.*?\b(?:is|to)\s+(?P<value>[^.!?\n]+)", re.IGNORECASE),
                    "What is the new address? Write: the address is …"),
    "description": Slot(None, "What is wrong with it?"),
}  # fmt: skip


@dataclass(frozen=True)
class Action:
    """A wish and the tool that grants it."""

    tool: str
    pattern: re.Pattern[str]


def _action(tool: str, pattern: str) -> Action:
    return Action(tool, re.compile(pattern, re.IGNORECASE))


ACTIONS = (
    _action("delete_account", r"\b(?:delete|erase|close|remove)\b.*\baccount\b"),
    _action("refund_order", r"\brefund|\b(?:money|euros?|eur)\b.*\bback\b|\bpay (?:me )?back\b|\breimburs"),
    _action("offer_discount", r"\bdiscount|\btoo expensive\b|\bcheaper\b"),
    _action("cancel_subscription", r"\bcancel|\bend my subscription\b|\bunsubscribe\b"),
    _action(
        "change_address",
        r"\b(?:change|new|update|correct|wrong|another|different)\b.*\baddress\b|\baddress is\b",
    ),
    _action("send_replacement", r"\breplace|\bexchange\b|\bnew one\b"),
    _action(
        "report_defect", r"\bbroken\b|\bdefect|\bdamaged\b|\bcracked\b|\bfaulty\b|\bdoes(?:n't| not) work\b"
    ),
    _action("find_invoice", r"\binvoices?\b|\bbill\b"),
    _action(
        "track_shipment",
        r"\b(?:where|when)\b.*\b(?:parcel|package|order|it)\b|\btrack|\bparcel\b|\bdeliver|\bship",
    ),
    _action("order_status", r"\border\b.*\b(?:status|stand|state)|\bstatus\b|\blook up\b"),
)
"""The first whose tool is bound and whose pattern is found is done."""
BARE_NUMBERS = (_action("order_status", r"\b[a-z]\d{4}\b(?<!s\d{4})"),)
"""What a number asks for where nothing else is asked."""


# --- the operations agent -----------------------------------------------------------------------------------------

SQL = re.compile(
    r"(?:^|[\n:`]\s*)(?P<value>(?:select|with \w+ as|insert into|update [\w.]+ set|delete from|explain|drop \w+"
    r"|truncate|alter \w+|create \w+)\s[^`]+)",
    re.IGNORECASE,
)
"""A statement at the beginning of a message or of a line, or after a colon."""
QUERIES: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"\bhow many orders\b", re.IGNORECASE),
     "SELECT status, count(*) AS orders FROM shop.orders GROUP BY status ORDER BY status"),
    (re.compile(r"\bmark (?:order )?(?P<order_id>[a-z]\d{4}) as (?P<status>processing|shipped|delivered|refunded)\b",
                re.IGNORECASE),
     "UPDATE shop.orders SET status = '{status}' WHERE order_id = '{order_id}'"),
    (re.compile(r"\bdrop (?:the )?table (?:of )?(?:the )?(?P<table>orders|customers)\b", re.IGNORECASE),
     "DROP TABLE shop.{table}"),
)  # fmt: skip
"""What a person says -> the statement for it; a code is written in capitals, other words in small letters."""
FENCED_RESULT = re.compile(r"<tool_result\b[^>]*>\s*(?P<data>.*?)\s*</tool_result>", re.DOTALL)
"""How the safe executor hands over what a tool gave: as data."""
NEW_TOOL = re.compile(
    r"\b[Tt]ool (?:named |called )?`?(?P<name>[a-z][a-z0-9_]+)`?\s*:\s*(?P<description>[^\n`]+)"
    r"\s*```json\s*(?P<form>\{.*?\})\s*```\s*```python\s*(?P<code>.*?)```",
    re.DOTALL,
)
"""A tool that a person dictates: name, what it is for, its form (`parameters`, perhaps `examples`) and its code."""
USE_TOOL = re.compile(
    r"\b[Uu]se (?:the )?(?:tool )?`?(?P<name>[a-z][a-z0-9_]+)`? with (?P<arguments>\{.*\})", re.DOTALL
)


# --- the support team's two questions ---------------------------------------------------------------------------

CATEGORIES: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("billing", re.compile(r"\brefund|\bmoney\b|\binvoices?\b|\bbill\w*|\bcharged?\b|\bpaid\b|\bpay\w*|\breimburs\w*|"
                           r"\beuros?\b|\beur\b", re.IGNORECASE)),
    ("shipping", re.compile(r"\bship\w*|\bparcel|\bpackage|\bdeliver\w*|\btrack\w*|\barriv\w*|\baddress\b|\bwhere is\b",
                            re.IGNORECASE)),
    ("retention", re.compile(r"\bcancel\w*|\bsubscri\w*|\bdiscount\w*|\bexpensive\b|\bcheaper\b|\bleav(?:e|ing)\b|"
                             r"\baccount\b", re.IGNORECASE)),
    ("quality", re.compile(r"\bbroken\b|\bdefect\w*|\bdamaged?\b|\bcrack\w*|\bfaulty\b|\bquality\b|\breplace\w*|"
                           r"\bdoes(?:n't| not) work\b", re.IGNORECASE)),
)  # fmt: skip
"""Category -> its words; the category with the most hits is taken, the earlier one where two have as many."""
CATEGORY_OF_THE_REST = "retention"
CONFIDENCE_OF_THE_REST = 0.2
ESCALATE = re.compile(
    r"\blawyer\b|\battorney\b|\bsue\b|\bunacceptable\b|\bfurious\b|\bthird time\b|\bcomplain\w*|\bmanager\b",
    re.IGNORECASE,
)

FAILURE = "That did not work: "
NEXT_STEP = "As a next step, check the number and write again, or ask for a person to look at it."
REVIEW_SENDS_BACK: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"\A\s*\Z"), "The answer is empty."),
    (re.compile(rf"(?:{FAILURE}|could not)(?!.*next step)", re.DOTALL | re.IGNORECASE),
     "The answer reports a failure and names no next step."),
)  # fmt: skip
"""What a draft must not look like -> the reason to send it back."""
