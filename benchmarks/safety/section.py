"""What a part of the safety benchmark says: a title, and lines with what was asked for and what came out."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Line:
    """One figure."""

    what: str
    printed: str
    """The figure with its unit and, where there is one, its goal."""
    reached: bool | None
    """Whether the goal is reached; `None` where there is no goal."""


@dataclass(frozen=True, kw_only=True)
class Section:
    """The figures of one subject."""

    title: str
    lines: list[Line] = field(default_factory=list)
