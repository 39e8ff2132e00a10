"""A call in plain text, for a person who is asked about it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from agent.approval.binding import canonical_json
from agent.approval.card import visible
from agent.approval.records import WARNING, Approval


def describe(approval: Approval) -> str:
    """The call for a person in plain text, made by code: what runs, what it does, who asks.

    Lines of our own begin at the margin. What is in the call cannot: its line feeds are indented or escaped.
    """
    lines = [f"{approval.risk}: {_on_one_line(approval.summary)}"]
    arguments = approval.arguments_shown
    if isinstance(arguments, Mapping):
        lines += [
            _labelled(_on_one_line(name), value if isinstance(value, str) else canonical_json(value))
            for name, value in arguments.items()
        ]
    else:
        lines.append(_on_one_line(canonical_json(arguments)))
    for table, changed in (approval.effects or {}).items():
        if isinstance(changed, Mapping):
            counts = ", ".join(f"{count} {_on_one_line(what)}" for what, count in changed.items() if count)
            lines.append(f"{_on_one_line(table)}: {counts or 'nothing'}")
    if warning := (approval.effects or {}).get(WARNING):
        lines.append(_labelled("warning", str(warning)))
    votes = len([vote for vote in approval.votes if vote.get("verdict") == "approve"])
    if approval.required_votes > 1:
        lines.append(f"approved by {votes} of {approval.required_votes}")
    if approval.reason:
        lines.append(_labelled("the model says", approval.reason))
    return "\n".join(lines)


def _on_one_line(text: Any) -> str:
    return visible(text).replace("\n", "\\n")


def _labelled(label: str, text: str) -> str:
    """A label and a text, whose lines are indented where they are several."""
    rows = visible(text).split("\n")
    return f"{label}: {rows[0]}" if len(rows) == 1 else "\n    ".join([f"{label}:", *rows])
