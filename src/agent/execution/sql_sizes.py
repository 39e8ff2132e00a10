"""Arguments of functions that make a value or a series that is only there to use the server up."""

from __future__ import annotations

import re
from typing import Any, Final

import postgast

from agent.execution.sql_tree import kind, strings, unwrap

_SERIES_LIMIT: Final = 10_000_000
_TEXT_LIMIT: Final = 10_000
_LEAST_LIMIT: Final = 1_000
# The one place where format() may take a width from.
_FORMAT_WIDTH: Final = re.compile(r"%(?:\d+\$)?-*(\*|\d+(?!\d*\$))")


class TooLarge(Exception):
    """Stops the walk; the message is the reason."""


def check_size(node: Any, name: str) -> None:
    """Of repeat, lpad or rpad.

    Raises:
        TooLarge: nothing in the statement bounds the length.
    """
    arguments = [unwrap(item) for item in node.args]
    length = _number(arguments[1]) if len(arguments) in {2, 3} else None
    is_named = any(kind(item) == "NamedArgExpr" for item in arguments)
    if (
        name == "repeat"
        and len(arguments) == 2
        and kind(arguments[0]) == "A_Const"
        and _is_least(arguments[1])
    ):
        return
    if length is None or length > _TEXT_LIMIT or is_named:
        raise TooLarge(
            f"{name} needs a length that is a number up to {_TEXT_LIMIT}"
            + (f"; or repeat a constant least(…, {_LEAST_LIMIT}) times" if name == "repeat" else "")
        )


def check_format(node: Any) -> None:
    """Of format.

    Raises:
        TooLarge: a width is too large, or is not known.
    """
    template = unwrap(node.args[0]) if node.args else None
    if template is None or kind(template) != "A_Const" or node.func_variadic:
        raise TooLarge("format needs a constant first argument, and no VARIADIC")
    for width in _FORMAT_WIDTH.findall(template.sval.sval):
        if width == "*" or len(width) > 4 or int(width) > _LEAST_LIMIT:
            raise TooLarge(f"format takes widths up to {_LEAST_LIMIT}, written in its first argument")


def check_series(node: Any) -> None:
    """Of generate_series.

    Raises:
        TooLarge: an end is too far away.
    """
    for item in node.args:
        number = _number(unwrap(item))
        if number is not None and abs(number) > _SERIES_LIMIT:
            raise TooLarge(f"generate_series is limited to numbers up to {_SERIES_LIMIT}")


def _is_least(node: Any) -> bool:
    """least(…, number) with a number that is small enough."""
    if kind(node) == "TypeCast":
        return strings(node.type_name.names)[-1] in {"int2", "int4", "int8"} and _is_least(unwrap(node.arg))
    if kind(node) != "MinMaxExpr" or node.op != postgast.pg_query_pb2.MinMaxOp.IS_LEAST:
        return False
    numbers = [_number(unwrap(item)) for item in node.args]
    return any(number is not None and number <= _LEAST_LIMIT for number in numbers)


def _number(node: Any) -> int | None:
    """The value of a constant whole number, or None. Other numbers are rounded up."""
    if kind(node) == "TypeCast":
        return _number(unwrap(node.arg))
    if kind(node) == "A_Expr" and strings(node.name) == ["-"] and not node.HasField("lexpr"):
        number = _number(unwrap(node.rexpr))
        return None if number is None else -number
    if kind(node) != "A_Const":
        return None
    if node.HasField("ival"):
        return int(node.ival.ival)
    if node.HasField("fval"):
        return int(float(node.fval.fval)) + 1
    if node.HasField("sval") and node.sval.sval.strip().lstrip("+-").isdecimal():
        return int(node.sval.sval)
    return None
