"""Signs in a text: keys that must not be in it, and words that look like an injection. Tells kinds, never the text."""

from __future__ import annotations

import re
import unicodedata

# By the forms that their makers document; each is distinct enough to be no ordinary word.
_KEYS = {
    "aws": r"\b(?:AKIA|ASIA)[A-Z2-7]{16}\b",
    "openai_or_anthropic": r"\bsk-(?:ant-|proj-|svcacct-)?[A-Za-z0-9_-]{20,}",
    "slack": r"\bxox[abeprs]-[A-Za-z0-9-]{10,}|https://hooks\.slack\.com/services/T[A-Z0-9]+/B[A-Z0-9]+/[A-Za-z0-9]{20,}",
    "github": r"\bgh[opsur]_[A-Za-z0-9]{36,}|\bgithub_pat_[A-Za-z0-9_]{30,}",
    "google": r"\bAIza[A-Za-z0-9_-]{35}(?![A-Za-z0-9_-])",
    "stripe": r"\b[rs]k_live_[A-Za-z0-9]{16,}",
    "supabase": r"\bsb(?:p_[a-f0-9]{40}|_secret_[A-Za-z0-9_-]{20,})",
    "telegram": r"\b\d{8,10}:AA[A-Za-z0-9_-]{33}(?![A-Za-z0-9_-])",
    "jwt": r"\beyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}",
    "private_key": r"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----",
    "database_password": r"\b(?:postgres(?:ql)?|mysql|mongodb(?:\+srv)?|redis|amqp)://[^\s:/@]+:[^\s:/@]{3,}@",
}
_KEY_FORMS = {kind: re.compile(form) for kind, form in _KEYS.items()}

_BEFORE = (
    r"(?:all |any |the |these |those |your |my |of |every )*"
    r"(?:previous|prior|above|earlier|preceding|existing|system)"
)
_ORDERS = r"(?:instructions?|prompts?|rules?|directions?|guidelines|messages?|context|constraints)"
_INJECTIONS = {
    "override": re.compile(
        rf"\b(?:ignore|disregard|forget|override|bypass|do not follow|don't follow) {_BEFORE} (?:\w+ )?{_ORDERS}\b"
        r"|\bignor(?:iere|ieren sie) (?:alle |die |deine |ihre )*"
        r"(?:vorherigen|bisherigen|obigen) (?:anweisungen|regeln)\b"
        r"|\bignora (?:todas |tus |las )*(?:las )?instrucciones (?:anteriores|previas)\b"
        r"|\bignore[zr]? (?:toutes )?(?:les|vos|tes) (?:instructions|consignes) (?:précédentes|antérieures)\b"
        r"|\b(?:your )?new (?:system )?instructions?(?: are)?:"
    ),
    "role_marker": re.compile(
        r"<\|(?:im_start|im_end|system|endoftext|eot_id|start_header_id)\|>|\[/?inst\]|<</?sys>>|</?(?:system|assistant)>"
        r"|^(?:#+ ?)?(?:system|assistant)(?: prompt| message)?:\s",
        re.MULTILINE,
    ),
    "prompt_theft": re.compile(
        r"\b(?:reveal|print|repeat|show|output|leak|tell) (?:me |us )?"
        r"(?:the |your |all |of |full |entire |hidden |exact )*"
        r"(?:system prompt|initial instructions|hidden instructions|prompt verbatim)\b"
    ),
    "persona": re.compile(
        r"\byou are now (?:dan|in developer mode|jailbroken|unrestricted)\b"
        r"|\b(?:enable|enter) (?:developer|dan|god) mode\b"
        r"|\b(?:do not|don't|never) (?:tell|inform|mention (?:this|it) to|alert) the (?:user|human|operator)\b"
    ),
}
# Letters that nobody sees: tags, which spell ASCII unseen, and runs of zero-width characters.
_HIDDEN = re.compile("[\U000e0020-\U000e007e]{3,}|[\u200b\u200c\u2060\ufeff]{8,}")
_UNSEEN = re.compile(
    "[\u00ad\u200b-\u200f\u202a-\u202e\u2060-\u2064\u2066-\u2069\ufeff\U000e0000-\U000e007f]"
)
_SPACES = re.compile(r"[^\S\n]+")


def keys_in(text: str) -> list[str]:
    """The kinds of keys that the text holds."""
    return [kind for kind, form in _KEY_FORMS.items() if form.search(text)]


def injections_in(text: str) -> list[str]:
    """The kinds of injection that the text looks like, however its letters are written."""
    found = ["hidden_text"] if _HIDDEN.search(text) else []
    plain = _SPACES.sub(" ", _UNSEEN.sub("", unicodedata.normalize("NFKC", text))).casefold()
    return found + [kind for kind, form in _INJECTIONS.items() if form.search(plain)]
