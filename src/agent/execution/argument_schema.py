"""JSON schemas of arguments that an agent writes for its tools: which are taken, and what fits one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from agent.errors import InvalidRequest
from agent.execution.host_function import usable_as_name

_PROPERTIES_MAX = 30
_DEPTH_MAX = 6
_TYPES = ("string", "integer", "number", "boolean", "array", "object", "null")
# No `pattern`, which may take for ever to match, and no `$ref`, which may never end.
_KEYWORDS = frozenset(
    {
        "type", "description", "title", "enum", "items", "properties", "required", "additionalProperties", "anyOf",
        "minimum", "maximum", "minLength", "maxLength", "minItems", "maxItems",
    }
)  # fmt: skip


def checked_parameters(schema: Any) -> dict[str, Any]:
    """The schema of a tool's arguments, closed to others than it names.

    Raises:
        InvalidRequest: it is none that is taken here; the message says where and why.
    """
    if not isinstance(schema, Mapping) or schema.get("type") != "object":
        raise InvalidRequest(
            'parameters must be a JSON schema {"type": "object", "properties": {…}, "required": […]}; '
            'for a tool without arguments {"type": "object", "properties": {}}'
        )
    _check(schema, "parameters", 0)
    properties = dict(schema.get("properties", {}))
    for name in properties:
        if not usable_as_name(name):
            raise InvalidRequest(
                f"parameters: {name!r} cannot be the name of an argument of a Python function"
            )
    return {
        "type": "object",
        "properties": properties,
        "required": list(schema.get("required", [])),
        "additionalProperties": False,
    }


def _check(schema: Any, where: str, depth: int) -> None:
    if not isinstance(schema, Mapping):
        raise InvalidRequest(f"{where} must be an object, not {type(schema).__name__}")
    if depth > _DEPTH_MAX:
        raise InvalidRequest(f"{where} is nested deeper than {_DEPTH_MAX} levels")
    unknown = [key for key in schema if key not in _KEYWORDS]
    if unknown:
        raise InvalidRequest(
            f"{where}: {unknown[0]!r} is not taken here; taken are {', '.join(sorted(_KEYWORDS))}"
        )
    kinds = schema.get("type")
    if kinds is None and "anyOf" not in schema and "enum" not in schema:
        raise InvalidRequest(f"{where} needs a type: {', '.join(_TYPES)}")
    for kind in kinds if isinstance(kinds, list) else [kinds]:
        if kind is not None and kind not in _TYPES:
            raise InvalidRequest(f"{where}: type {kind!r} is not one of {', '.join(_TYPES)}")
    properties = schema.get("properties", {})
    if not isinstance(properties, Mapping) or len(properties) > _PROPERTIES_MAX:
        raise InvalidRequest(f"{where}: properties must be an object with at most {_PROPERTIES_MAX} names")
    required = schema.get("required", [])
    if not isinstance(required, list) or not all(
        isinstance(name, str) and name in properties for name in required
    ):
        raise InvalidRequest(f"{where}: required must be a list of names in properties")
    if schema.get("additionalProperties", False) not in (True, False):
        raise InvalidRequest(f"{where}: additionalProperties must be true or false")
    for bound in ("minimum", "maximum", "minLength", "maxLength", "minItems", "maxItems"):
        value = schema.get(bound, 0)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise InvalidRequest(f"{where}: {bound} must be a number")
    if "enum" in schema and (not isinstance(schema["enum"], list) or not schema["enum"]):
        raise InvalidRequest(f"{where}: enum must be a list with at least one value")
    for name, inner in properties.items():
        _check(inner, f"{where}.{name}", depth + 1)
    if "items" in schema:
        _check(schema["items"], f"{where}[]", depth + 1)
    if "anyOf" in schema:
        if not isinstance(schema["anyOf"], list) or not schema["anyOf"]:
            raise InvalidRequest(f"{where}: anyOf must be a list with at least one schema")
        for number, inner in enumerate(schema["anyOf"]):
            _check(inner, f"{where} anyOf {number}", depth + 1)


def check_arguments(arguments: Any, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments, if they fit the schema; nothing is converted.

    Raises:
        InvalidRequest: they do not; the message says where.
    """
    if (fault := _misfit(arguments, parameters, "arguments")) is not None:
        raise InvalidRequest(fault)
    return dict(arguments)


def _misfit(value: Any, schema: Mapping[str, Any], where: str) -> str | None:
    if "anyOf" in schema and all(_misfit(value, inner, where) is not None for inner in schema["anyOf"]):
        return f"{where} fits none of the kinds that are allowed"
    if "enum" in schema and not any(_same(value, allowed) for allowed in schema["enum"]):
        return f"{where} must be one of {', '.join(repr(allowed) for allowed in schema['enum'])}"
    kinds = schema.get("type")
    kinds = kinds if isinstance(kinds, list) else [kinds] if kinds is not None else []
    if kinds and not any(_is_of(value, kind) for kind in kinds):
        return f"{where} must be of type {' or '.join(kinds)}"
    if isinstance(value, str):
        return _out_of_bounds(len(value), schema, "minLength", "maxLength", f"the length of {where}")
    if isinstance(value, list):
        return _out_of_bounds(len(value), schema, "minItems", "maxItems", f"the length of {where}") or next(
            (
                fault
                for number, inner in enumerate(value)
                if (fault := _misfit(inner, schema.get("items", {}), f"{where}[{number}]")) is not None
            ),
            None,
        )
    if isinstance(value, Mapping):
        return _misfit_of_object(value, schema, where)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return _out_of_bounds(value, schema, "minimum", "maximum", where)
    return None


def _misfit_of_object(value: Mapping[str, Any], schema: Mapping[str, Any], where: str) -> str | None:
    properties = schema.get("properties", {})
    for name in schema.get("required", []):
        if name not in value:
            return f"{where}: {name!r} is missing"
    for name, inner in value.items():
        if name in properties:
            if (fault := _misfit(inner, properties[name], f"{where}.{name}")) is not None:
                return fault
        elif schema.get("additionalProperties", not properties) is not True:
            return f"{where}: {name!r} is not an argument of this tool"
    return None


def _out_of_bounds(amount: float, schema: Mapping[str, Any], least: str, most: str, what: str) -> str | None:
    if least in schema and amount < schema[least]:
        return f"{what} must be at least {schema[least]}"
    if most in schema and amount > schema[most]:
        return f"{what} must be at most {schema[most]}"
    return None


def _is_of(value: Any, kind: str) -> bool:
    if isinstance(value, bool):
        return kind == "boolean"
    if isinstance(value, float) and not math.isfinite(value):
        return False
    types: Mapping[str, type | tuple[type, ...]] = {
        "string": str, "integer": int, "number": (int, float), "boolean": bool, "array": list, "object": dict,
        "null": type(None),
    }  # fmt: skip
    return isinstance(value, types[kind])


def _same(one: Any, other: Any) -> bool:
    """Equal and of one kind: `True` is not 1."""
    if isinstance(one, bool) != isinstance(other, bool):
        return False
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, Sequence) and isinstance(other, Sequence) and not isinstance(one, str):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other)


same_json = _same
