"""What is written in an application's catalog, without keys and without what names a person.

Comments, defaults, conditions and arguments of triggers are texts of somebody, and are kept, shown and recalled.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

from agent.discovery.formats import is_card_number, is_iban
from agent.discovery.personal_data import looks_secret

_CHARACTERS_MAX: Final = 4_000
_ROUNDS_MAX: Final = 20  # what is masked may show a value beside it
_SECRET_TEXT: Final = re.compile(
    r"-----BEGIN .*?(?:-----END [^-]*-----|\Z)"
    r"|(?<=bearer )[\w.~+/=-]{8,}"
    r"|(?<=basic )[\w+/=]{8,}",
    re.DOTALL | re.IGNORECASE,
)
_SAID: Final = re.compile(
    r"\b(passw(?:or)?d|passwort|pwd|secret|token|api[ _-]?key)(\"?\s{0,3}(?:is\s|[:=])\s{0,3}\"?)[^\s\",;]{4,}",
    re.IGNORECASE,
)
_EMAIL: Final = re.compile(r"[^\s@<>,;:\"'()]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63}){1,8}")
_PHONE: Final = re.compile(r"(?<![\w+])\+\d[\d ().\-/]{6,20}\d\b")
_NUMBER: Final = re.compile(
    r"\b(?:[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?|\d(?:[ -]?\d){12,18})\b"
)
_WORD: Final = re.compile(r"[^\s'\"<>,;(){}\[\]]{8,400}")
_LITERAL: Final = re.compile(r"'((?:[^']|'')*)'")
_TEXTS: Final = frozenset({"comment"})
_EXPRESSIONS: Final = frozenset(
    {"default", "generated", "definition", "using", "check", "arguments", "partition_by"}
)


def masked(text: str) -> str:
    """The first 4,000 characters with `<key>`, `<email>`, `<phone>` and `<number>` in place of such values.

    What is masked stays as it is when it is masked again.
    """
    for _ in range(_ROUNDS_MAX):
        before, text = text, _masked_once(text)
        if text == before:
            break
    return text


def _masked_once(text: str) -> str:
    text = _SECRET_TEXT.sub("<key>", text[:_CHARACTERS_MAX])
    text = _SAID.sub(r"\1\2<key>", text)
    text = _WORD.sub(lambda word: "<key>" if looks_secret(word[0]) else word[0], text)
    text = _EMAIL.sub("<email>", text)
    text = _PHONE.sub("<phone>", text)
    text = _NUMBER.sub(
        lambda found: "<number>" if is_card_number(found[0]) or is_iban(found[0]) else found[0], text
    )
    return text[:_CHARACTERS_MAX]


def masked_expression(expression: str) -> str:
    """The SQL expression with what its literals hold masked, and its names as they are."""
    return _LITERAL.sub(lambda literal: f"'{masked(literal[1])}'", expression)


def masked_document(document: Mapping[str, Any]) -> dict[str, Any]:
    """The document of a table or a function with its comments, expressions and labels of enums masked."""
    return {name: _masked_item(name, value) for name, value in document.items()}


def _masked_item(name: str, value: Any) -> Any:
    if isinstance(value, Mapping):
        return masked_document(value)
    if isinstance(value, list):
        if name == "enum":
            return [masked(label) for label in value]
        return [masked_document(item) if isinstance(item, Mapping) else item for item in value]
    if isinstance(value, str) and name in _TEXTS:
        return masked(value)
    return masked_expression(value) if isinstance(value, str) and name in _EXPRESSIONS else value
