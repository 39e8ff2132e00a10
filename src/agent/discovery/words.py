"""Words: those that an identifier is made of, and lists of them by which discovery recognises things."""

from __future__ import annotations

import re
import unicodedata

_WORD = re.compile(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z]+|[A-Z]+|\d+")


def word_set(text: str) -> frozenset[str]:
    """The words of a text, which are separated by white space."""
    return frozenset(text.split())


def plain_letters(text: str) -> str:
    """A text in the letters of ASCII: accents are dropped, and so is what has no such letter."""
    return unicodedata.normalize("NFKD", text.replace("ß", "ss")).encode("ascii", "ignore").decode()


def name_words(name: str) -> list[str]:
    """The words of an identifier in small plain letters: `billingEMail_Address` is `billing`, `email`, `address`."""
    plain = re.sub(r"e[-_]?mail", "Email_", plain_letters(name), flags=re.IGNORECASE)
    return [word.lower() for word in _WORD.findall(plain)]
