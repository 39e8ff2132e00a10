"""Reads the `<learned_knowledge>` block of a prompt, as a language model would."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

type_of_style = Literal["concise", "detailed"]

_BLOCK = re.compile(r"<learned_knowledge>(.*?)</learned_knowledge>", re.DOTALL)
_SECTION = re.compile(r"<(\w+)>(.*?)</\1>", re.DOTALL)
_LINE = re.compile(r"^- (?P<text>.*?)(?:\s*\[[^\[\]]*\])?\s*$")
_TURN = re.compile(r" (?:\||\.\.\.) (?=user: |assistant: )")
_FIELD = re.compile(r"^(?P<name>\w+): (?P<value>.+)$", re.DOTALL)

_WISH = r"\b(?:prefer|want|like|keep|please|answer|be|give|favou?r)\w*\b[^.;\n]*?"
_STYLES: tuple[tuple[type_of_style, re.Pattern[str]], ...] = (
    ("concise", re.compile(_WISH + r"\b(?:concise|short|brief|terse|to the point)", re.IGNORECASE)),
    ("detailed", re.compile(_WISH + r"\b(?:detailed|detail|long|longer|thorough|in depth)\b", re.IGNORECASE)),
)
_NO = re.compile(r"\b(?:not|never|no longer|stop)\b|n't\b", re.IGNORECASE)
_NAMED = re.compile(
    # "call me Ada", but not "call me tomorrow"
    r"\b(?:(?:name is|i am named|i'm named)\s+|(?:call me|called)\s+(?=(?-i:[^\Wa-z])))(?P<name>[^\W\d_][\w'\u2019-]*)",
    re.IGNORECASE,
)
_FIRST_WORD = re.compile(r"[^\W\d_][\w'\u2019-]*")


@dataclass(frozen=True)
class Fact:
    """One line of the block, unescaped and without its ids and dates."""

    section: str
    text: str

    @property
    def field(self) -> tuple[str, str] | None:
        """Name and value, where the line is a field of the profile."""
        found = _FIELD.match(self.text) if self.section == "user_profile" else None
        return (found["name"], found["value"]) if found else None


def known_facts(system_texts: Iterable[str]) -> tuple[Fact, ...]:
    """All lines of all blocks in these system messages, in their order."""
    return tuple(_lines(system_texts))


def _lines(system_texts: Iterable[str]) -> Iterator[Fact]:
    for text in system_texts:
        for block in _BLOCK.finditer(text):
            for section in _SECTION.finditer(block[1]):
                for line in section[2].splitlines():
                    if found := _LINE.match(line):
                        yield from (
                            Fact(section[1], html.unescape(said)) for said in _said(section[1], found["text"])
                        )


def _said(section: str, text: str) -> list[str]:
    """What a line says of the person: of a conversation the person's own turns."""
    if section != "conversations":
        return [text]
    turns = _TURN.split(text)
    return [turn.removeprefix("user: ") for turn in turns if not turn.startswith("assistant: ")]


def preferred_name(facts: Iterable[Fact], said: Iterable[str]) -> str | None:
    """How to address the person: what they said here goes before what is known."""
    facts = tuple(facts)
    fields = dict(fact.field for fact in facts if fact.field)
    for text in said:
        if found := _NAMED.search(text):
            return found["name"]
    for name in ("preferred_name", "first_name", "name"):
        if found := _FIRST_WORD.match(fields.get(name, "")):
            return found[0]
    for fact in facts:
        if found := _NAMED.search(fact.text):
            return found["name"]
    return None


def preferred_style(facts: Iterable[Fact], said: Iterable[str]) -> type_of_style | None:
    """The first style that is wished for: in this conversation (newest first), then in the block's order."""
    known = [f"prefers {fact.field[1]}" if fact.field and fact.field[0] == "preferences" else fact.text
             for fact in facts]  # fmt: skip
    for text in (*said, *known):
        for sentence in re.split(r"[.;\n]", text):
            for style, wish in _STYLES:
                if (found := wish.search(sentence)) and not _NO.search(sentence[: found.end()]):
                    return style
    return None
