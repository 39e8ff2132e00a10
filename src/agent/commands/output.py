"""What commands print: tables on a terminal, tab-separated lines in a pipe, JSON for programs.

Nothing printed here steers a terminal, whoever chose the ids, names and texts that are in it.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

_CONTROL = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]"
)  # C0 without tab and line feed, C1, line separators, and what turns the direction of text


def is_terminal() -> bool:
    """Whether a person reads standard output."""
    return sys.stdout.isatty()


def say(text: str = "") -> None:
    """One line of the result."""
    print(inert(text))  # the program's own output


def remark(text: str) -> None:
    """One line that is no result: notes and errors, on standard error."""
    print(inert(text), file=sys.stderr)


def say_json(value: Any) -> None:
    """The result for programs; nothing else may be on standard output then."""
    is_unicode = (sys.stdout.encoding or "utf-8").lower().replace("-", "") == "utf8"
    text = json.dumps(value, ensure_ascii=not is_unicode, indent=2, default=str)
    # They can only stand inside JSON's texts, where the escape means the same.
    print(_CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text))


def inert(text: Any) -> str:
    """The text without characters that steer a terminal; line ends and tabs stay."""
    return _CONTROL.sub("\ufffd", str(text).replace("\r\n", "\n"))


def one_line(text: Any, width: int | None = None) -> str:
    """The text with all white space made single spaces, cut to a width."""
    line = " ".join(inert(text).split())
    return line if width is None or len(line) <= width else f"{line[: max(width - 1, 0)]}…"


def counted_as(count: int, what: str) -> str:
    """A number of things: `1 table`, `2 tables`."""
    return f"{count} {what}{'' if count == 1 else 's'}"


def in_words(interval: timedelta) -> str:
    """How often: `every hour`, `every 5 minutes`, `every 90 seconds`."""
    seconds = interval.total_seconds()
    unit, length = next(
        ((unit, length) for unit, length in (("hour", 3600), ("minute", 60)) if seconds % length == 0),
        ("second", 1),
    )
    number = seconds / length
    return f"every {unit}" if number == 1 else f"every {number:g} {unit}s"


def short_id(identifier: str) -> str:
    """The first characters of an id, as tables show it; commands take it back where it is unambiguous."""
    return identifier[:8]


def local_time(timestamp: str | None) -> str:
    """A timestamp of the database as a person reads it, in the time zone of this machine."""
    return datetime.fromisoformat(timestamp).astimezone().strftime("%Y-%m-%d %H:%M") if timestamp else ""


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column of a table on a terminal."""

    title: str
    is_wide: bool = False
    """Takes the room that is left, and may use several lines."""
    is_number: bool = False
    style: str = ""


def print_table(
    columns: Sequence[Column], rows: Iterable[Sequence[str]], *, title: str | None = None
) -> None:
    """A table; for terminals only."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(
        box=SIMPLE_HEAD, title=title, title_justify="left", title_style="bold", pad_edge=False, expand=False
    )
    for column in columns:
        table.add_column(
            Text(column.title),
            ratio=1 if column.is_wide else None,
            no_wrap=not column.is_wide,
            overflow="fold",
            justify="right" if column.is_number else "left",
            style=column.style,
        )
    for row in rows:
        table.add_row(*(Text(inert(cell)) for cell in row))  # Text: what a log says must not become markup
    Console().print(table)


def print_lines(rows: Iterable[Sequence[Any]]) -> None:
    """Tab-separated lines without a heading, one row each; for pipes."""
    for row in rows:
        say("\t".join(one_line("" if cell is None else cell) for cell in row))


def heading(text: str) -> None:
    """A line that begins a part of a longer result."""
    if is_terminal():
        from rich.console import Console
        from rich.text import Text

        Console().print(Text(inert(text), style="bold"))
    else:
        say(text)
