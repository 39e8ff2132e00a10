"""Pieces of Block Kit. Texts stand in rich text or plain text, which Slack does not read as markup."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

TEXT_LIMIT: Final = 2_900
"""Characters of the line that notifications show; Slack takes 3,000 of one text."""
HEADER_LIMIT: Final = 150
"""Characters of a header, by Slack."""


def escaped(text: str) -> str:
    """The text so that Slack reads no markup, mention or link in it."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def plain(text: str, limit: int) -> dict[str, Any]:
    """Plain text, cut to what the place takes."""
    shown = text if len(text) <= limit else f"{text[: limit - 1]}…"
    return {"type": "plain_text", "text": shown, "emoji": False}


def header(text: str) -> dict[str, Any]:
    """The block of a title."""
    return {"type": "header", "text": plain(text, HEADER_LIMIT)}


def rich(elements: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A block of rich text; Slack takes none without elements."""
    return {"type": "rich_text", "elements": list(elements)}


def element(text: str, *, bold: bool = False) -> dict[str, Any]:
    """A text within an element of rich text; Slack takes no empty one."""
    made: dict[str, Any] = {"type": "text", "text": text or " "}
    return made | {"style": {"bold": True}} if bold else made


def section(text: str, *, bold: bool = False) -> dict[str, Any]:
    """A paragraph of rich text."""
    return {"type": "rich_text_section", "elements": [element(text, bold=bold)]}


def labelled(label: str, text: str) -> dict[str, Any]:
    """A paragraph that begins with its label."""
    return {"type": "rich_text_section", "elements": [element(f"{label}: ", bold=True), element(text)]}


def preformatted(text: str) -> dict[str, Any]:
    """Text in type of one width, with its line ends."""
    return {"type": "rich_text_preformatted", "elements": [element(text)]}


def link(url: str, text: str) -> dict[str, Any]:
    """A paragraph that is a link."""
    return {"type": "rich_text_section", "elements": [{"type": "link", "url": url, "text": text}]}
