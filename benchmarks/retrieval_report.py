"""What the benchmark of recall tells: lines of its tables, and how they read as Markdown and as a plot."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table of goals."""

    measure: str
    baseline: str
    """What the named baseline reaches on the same data, or where its number is from; empty where there is none."""
    goal: str
    """Empty for a line that tells more about the one above, such as one category of questions."""
    ours: str
    reached: bool | None
    """`None` where there is no goal, or where it was not measured; `ours` then says why."""


@dataclass(frozen=True, kw_only=True)
class Section:
    """What one part of the benchmark found."""

    title: str
    rows: Sequence[Row] = ()
    text: str = ""
    """Markdown: how it was measured, and tables that hold more than the goals."""


def row_table(rows: Iterable[Row]) -> str:
    """The table of goals as Markdown."""
    verdicts = {True: "yes", False: "**no**", None: ""}
    return table(
        ("measure", "baseline", "goal", "ours", "reached"),
        ([row.measure, row.baseline, row.goal, row.ours, verdicts[row.reached]] for row in rows),
    )


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table as Markdown."""
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines))


_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 760, 420, 70, 230, 30, 50
_COLOURS = ("#1b6ca8", "#c0392b", "#27803b", "#8e44ad", "#b9770e", "#566573")


def plot(title: str, series: Mapping[str, Sequence[tuple[float, float]]], *, x: str, y: str) -> str:
    """Lines over logarithmic axes, as SVG; all numbers above 0."""
    points = [point for line in series.values() for point in line]
    low_x, high_x = _decades(value for value, _ in points)
    low_y, high_y = _decades(value for _, value in points)

    def place(point: tuple[float, float]) -> tuple[float, float]:
        across = (math.log10(point[0]) - low_x) / (high_x - low_x)
        up = (math.log10(point[1]) - low_y) / (high_y - low_y)
        return (
            round(_LEFT + across * (_WIDTH - _LEFT - _RIGHT), 1),
            round(_HEIGHT - _BOTTOM - up * (_HEIGHT - _TOP - _BOTTOM), 1),
        )

    frame = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif" '
        f'font-size="12"><rect width="100%" height="100%" fill="white"/><text x="{_LEFT}" y="18" font-weight="bold">'
        f'{title}</text><text x="{_LEFT}" y="{_HEIGHT - 10}">{x}</text>'
        f'<text transform="translate(16 {_HEIGHT - _BOTTOM}) rotate(-90)">{y}</text>'
    )
    parts = [frame]
    for exponent in range(low_x, high_x + 1):
        across, _ = place((10.0**exponent, 10.0**low_y))
        parts.append(
            f'<path d="M{across} {_TOP}V{_HEIGHT - _BOTTOM}" stroke="#ddd"/>'
            f'<text x="{across}" y="{_HEIGHT - _BOTTOM + 16}" text-anchor="middle">{10.0**exponent:,g}</text>'
        )
    for exponent in range(low_y, high_y + 1):
        _, down = place((10.0**low_x, 10.0**exponent))
        parts.append(
            f'<path d="M{_LEFT} {down}H{_WIDTH - _RIGHT}" stroke="#ddd"/>'
            f'<text x="{_LEFT - 6}" y="{down + 4}" text-anchor="end">{10.0**exponent:,g}</text>'
        )
    for number, (name, line) in enumerate(series.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        places = [place(point) for point in line]
        drawn = " ".join(f"{across},{down}" for across, down in places)
        parts.append(f'<polyline points="{drawn}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{across}" cy="{down}" r="3" fill="{colour}"/>' for across, down in places]
        key = _TOP + 10 + 18 * number
        parts.append(
            f'<rect x="{_WIDTH - _RIGHT + 14}" y="{key - 9}" width="10" height="10" fill="{colour}"/>'
            f'<text x="{_WIDTH - _RIGHT + 30}" y="{key}">{name}</text>'
        )
    return "\n".join([*parts, "</svg>"]) + "\n"


def _decades(values: Iterable[float]) -> tuple[int, int]:
    """The powers of ten that hold all values, at least one apart."""
    exponents = [math.log10(value) for value in values]
    low = math.floor(min(exponents))
    return low, max(low + 1, math.ceil(max(exponents)))
