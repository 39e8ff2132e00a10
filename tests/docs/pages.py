"""The pages of the documentation, cut into what the tests look at: blocks, tables, links, headings."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
_FENCE = re.compile(
    r"^(?P<indent>[ \t]*)```(?P<info>[^\n`]*)\n(?P<code>.*?)^(?P=indent)```[ \t]*$", re.MULTILINE | re.DOTALL
)
_LINK = re.compile(r"(?<!!)\[[^\]\n]*\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#{1,6} +(.+?) *$", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class Block:
    """A fenced block. Its marks are the words after the language: ```` ```python example ````."""

    page: Path
    line: int
    """Of the first line of code, from 1."""
    language: str
    marks: tuple[str, ...]
    code: str

    @property
    def file(self) -> str | None:
        """The name that the page gives to this file of the reader's project (`file=…`), or `None`."""
        return next((mark.removeprefix("file=") for mark in self.marks if mark.startswith("file=")), None)

    @property
    def place(self) -> str:
        """Where it is, for messages."""
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def pages() -> list[Path]:
    """Every page that readers get."""
    top = [
        ROOT / "README.md",
        ROOT / "ARCHITECTURE.md",
        ROOT / "CHANGELOG.md",
        ROOT / "benchmarks" / "README.md",
    ]
    return [*top, *sorted((ROOT / "docs").rglob("*.md"))]


def page(name: str) -> str:
    """The text of a page."""
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(path: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    text = path.read_text(encoding="utf-8")
    found = []
    for match in _FENCE.finditer(text):
        language, *marks = match["info"].split() or [""]
        found.append(
            Block(
                page=path,
                line=text.count("\n", 0, match.start("code")) + 1,
                language=language,
                marks=tuple(marks),
                code=textwrap.dedent(match["code"]),
            )
        )
    return found


def prose(text: str) -> str:
    """The text without its fenced blocks."""
    return _FENCE.sub("", text)


def links(text: str) -> list[str]:
    """Targets of all links of a page."""
    return _LINK.findall(prose(text))


def anchors(text: str) -> set[str]:
    """What may follow `#` in a link to this page, as GitHub makes it from headings."""
    return {
        re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        for heading in _HEADING.findall(prose(text))
    }


def section(text: str, heading: str) -> str:
    """The part of a page under one heading, up to the next of the same or a higher level.

    Raises:
        AssertionError: the page has no such heading.
    """
    begun = re.search(rf"^(#+) +{re.escape(heading)} *$", text, re.MULTILINE)
    assert begun is not None, f"there is no heading {heading!r}"
    rest = text[begun.end() :]
    ended = re.search(rf"^#{{1,{len(begun[1])}}} ", rest, re.MULTILINE)
    return rest[: ended.start()] if ended else rest


def rows(text: str) -> Iterator[Sequence[str]]:
    """The rows of all tables of a text, each as its cells; headings and rulers are left out."""
    is_body = False
    for line in prose(text).splitlines():
        if not line.lstrip().startswith("|"):
            is_body = False
        elif re.fullmatch(r"[\s|:-]+", line):
            is_body = True
        elif is_body:
            yield [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip().strip("|"))]


def code_words(text: str) -> list[str]:
    """What stands between backticks."""
    return re.findall(r"`([^`\n]+)`", prose(text))
