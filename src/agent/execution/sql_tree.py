"""Reading postgast's trees: one way to go through every node, so that no kind of syntax is left out by hand."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Final

_PLACES: Final = frozenset({
    "list_end", "list_start", "location", "name_location", "rexpr_list_end", "rexpr_list_start", "stmt_len",
    "stmt_location",
})  # fmt: skip
"""Fields that say where in the text something was."""


def unwrap(node: Any) -> Any:
    """The node inside a `Node`, or the node itself."""
    if node.DESCRIPTOR.name != "Node":
        return node
    which = node.WhichOneof("node")
    return node if which is None else getattr(node, which)


def kind(node: Any) -> str:
    """The name of its type: `SelectStmt`. An empty place in a list is a `Node`."""
    return str(node.DESCRIPTOR.name)


def children(node: Any) -> Iterator[tuple[str, Any]]:
    """The nodes right below, each with the field it is in; empty places are left out."""
    for descriptor, value in node.ListFields():
        if descriptor.message_type is None:
            continue
        for item in (value,) if hasattr(value, "DESCRIPTOR") else value:
            child = unwrap(item)
            if child.DESCRIPTOR.name != "Node":
                yield descriptor.name, child


def strings(nodes: Iterable[Any]) -> list[str]:
    """The texts of a dotted name; "" for what is no text."""
    return [item.string.sval if item.HasField("string") else "" for item in nodes]


def same_tree(one: Any, other: Any) -> bool:
    """Whether both say the same, wherever it stood in the text."""
    left = [(field, value) for field, value in one.ListFields() if field.name not in _PLACES]
    right = [(field, value) for field, value in other.ListFields() if field.name not in _PLACES]
    if len(left) != len(right):
        return False
    for (field, value), (other_field, other_value) in zip(left, right, strict=True):
        if field.number != other_field.number:
            return False
        if field.message_type is None:
            if value != other_value:
                return False
        elif hasattr(value, "DESCRIPTOR"):
            if not same_tree(value, other_value):
                return False
        elif len(value) != len(other_value) or not all(map(same_tree, value, other_value)):
            return False
    return True
