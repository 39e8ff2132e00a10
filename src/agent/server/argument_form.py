"""A form for the arguments of a call, made from its tool's JSON schema, and the way back from what was sent.

Pure. Where a tool has no schema here, the kinds of the present values are taken. What a form cannot ask for simply is
asked for as JSON. The tool's own validation comes after this; here only what cannot be read is refused.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

_INTEGER = re.compile(r"[+-]?\d{1,30}")
_LONG = 60


@dataclass(frozen=True, kw_only=True)
class Field:
    """One argument in a form."""

    name: str
    key: str
    """Name of the control: `arg.` and the position, since an argument may be called anything."""
    kind: str
    """`line`, `text`, `integer`, `number`, `choice` or `json`."""
    value: str
    """What stands in the control."""
    description: str = ""
    choices: tuple[tuple[str, str], ...] = ()
    """For a `choice`: what is sent, and what is shown."""
    is_optional: bool = False
    """Whether it may be left out."""
    is_left_out: bool = False
    problem: str = ""
    """Why what was sent cannot be read."""


def fields_of(schema: Mapping[str, Any] | None, arguments: Mapping[str, Any]) -> list[Field]:
    """The form for these arguments: those of the schema first, then those the schema does not know."""
    schema = schema or {}
    properties = {
        str(name): _resolved(inner, schema)
        for name, inner in _mapping(schema.get("properties")).items()
        if isinstance(inner, Mapping)
    }
    required = set(schema.get("required") or ()) if properties else set(arguments)
    names = [*properties, *(name for name in arguments if name not in properties)]
    return [
        _field(name, position, properties.get(name), arguments, is_optional=name not in required)
        for position, name in enumerate(names)
    ]


def read_form(
    schema: Mapping[str, Any] | None, arguments: Mapping[str, Any], sent: Mapping[str, str]
) -> tuple[dict[str, Any] | None, list[Field]]:
    """The arguments that were sent, or `None` with the form as it was sent and what is wrong with it.

    Args:
        schema: of the tool, as it was for the form.
        arguments: those the form was made of.
        sent: names of controls and their values.
    """
    read: dict[str, Any] = {}
    shown: list[Field] = []
    for field in fields_of(schema, arguments):
        is_left_out = field.is_optional and f"{field.key}.out" in sent
        text = sent.get(field.key)
        problem = ""
        if not is_left_out:
            try:
                read[field.name] = _value(field, text, arguments.get(field.name))
            except ValueError as error:
                problem = str(error)
        shown.append(
            replace(
                field,
                value=field.value if text is None else text,
                is_left_out=is_left_out,
                problem=problem,
            )
        )
    return (None if any(field.problem for field in shown) else read), shown


def read_json(text: str) -> Any:
    """A JSON document; numbers that are none and names given twice are refused.

    Raises:
        ValueError: it cannot be read.
    """

    def no_constant(name: str) -> Any:
        raise ValueError(f"{name} is no number of JSON")

    def whole(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({name for name, _ in pairs}) != len(pairs):
            raise ValueError("a name is given twice")
        return dict(pairs)

    try:
        return json.loads(text, parse_constant=no_constant, object_pairs_hook=whole)
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON: {error.msg}, line {error.lineno}") from None


def _resolved(inner: Mapping[str, Any], schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schema of a property without references and without the alternative that it is null."""
    for _ in range(8):
        reference = inner.get("$ref")
        if isinstance(reference, str) and reference.startswith("#/$defs/"):
            found = _mapping(schema.get("$defs")).get(reference.removeprefix("#/$defs/"))
            if not isinstance(found, Mapping):
                return inner
            inner = {**found, **{name: value for name, value in inner.items() if name != "$ref"}}
            continue
        one_of = inner.get("anyOf")
        if isinstance(one_of, list):
            others = [one for one in one_of if isinstance(one, Mapping) and one.get("type") != "null"]
            if len(others) == 1 and len(others) < len(one_of):
                rest = {name: value for name, value in inner.items() if name != "anyOf"}
                inner = {**others[0], **rest, "nullable": True}
                continue
        return inner
    return inner


def _field(
    name: str,
    position: int,
    schema: Mapping[str, Any] | None,
    arguments: Mapping[str, Any],
    *,
    is_optional: bool,
) -> Field:
    present = name in arguments
    value = arguments.get(name) if present else (schema or {}).get("default")
    kind, choices = _kind(schema, value, present=present)
    if kind in {"line", "text"}:
        text = value if isinstance(value, str) else ""
    elif kind == "choice":
        text = json.dumps(value)
    else:
        text = "" if value is None and kind != "json" else json.dumps(value, ensure_ascii=False, indent=2)
    return Field(
        name=name,
        key=f"arg.{position}",
        kind=kind,
        value=text,
        description=str((schema or {}).get("description") or ""),
        choices=choices,
        is_optional=is_optional,
        is_left_out=is_optional and not present,
    )


def _kind(
    schema: Mapping[str, Any] | None, value: Any, *, present: bool
) -> tuple[str, tuple[tuple[str, str], ...]]:
    """The kind of control; JSON wherever the present value would not fit into the one that the schema names."""
    named: dict[str, Any] = dict(schema) if schema is not None else {"type": _TYPES.get(type(value))}
    if named.get("nullable") or (present and value is None):
        return "json", ()
    if isinstance(options := named.get("enum"), list) and options:
        sent = [json.dumps(option) for option in options]
        if not present or json.dumps(value) in sent:
            shown = [option if isinstance(option, str) else json.dumps(option) for option in options]
            return "choice", tuple(zip(sent, shown, strict=True))
    match named.get("type"):
        case "boolean" if value is None or isinstance(value, bool):
            return "choice", (("true", "yes"), ("false", "no"))
        case "integer" if value is None or (isinstance(value, int) and not isinstance(value, bool)):
            return "integer", ()
        case "number" if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
            return "number", ()
        case "string" if value is None or isinstance(value, str):
            text = value or ""
            is_long = (
                len(text) > _LONG
                or any(mark in text for mark in "\n\r")
                or (named.get("maxLength") or 0) > 200
            )
            return ("text" if is_long or named.get("format") == "sql" else "line"), ()
    return "json", ()


_TYPES = {bool: "boolean", int: "integer", float: "number", str: "string"}


def _value(field: Field, text: str | None, before: Any) -> Any:
    """What a control says.

    Raises:
        ValueError: why it cannot be read, as it follows the argument's name.
    """
    if text is None:
        raise ValueError("is missing")
    match field.kind:
        case "line" | "text":
            # Browsers send line ends as CR LF, whatever they were.
            sent = text.replace("\r\n", "\n")
            return before if isinstance(before, str) and before.replace("\r\n", "\n") == sent else sent
        case "integer":
            if not _INTEGER.fullmatch(text.strip()):
                raise ValueError("must be a whole number")
            return int(text)
        case "number":
            try:
                number = read_json(text.strip())
            except ValueError:
                number = None
            if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
                raise ValueError("must be a number")
            return number
        case "choice":
            if text not in {sent for sent, _ in field.choices}:
                raise ValueError("must be one of the choices")
            return json.loads(text)
        case _:
            return read_json(text)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
