"""Whether a LangChain tool takes the arguments of a call as they are written: then what people are shown is what runs.

LangChain leaves out what a tool does not know and converts what it can; a person would have approved something else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, Final

from langchain_core.tools import BaseTool, Tool
from pydantic import AliasChoices, AliasPath, BaseModel, RootModel, ValidationError

from agent.errors import InvalidRequest
from agent.execution.tool_registry import what_is_wrong

_SCALARS: Final = (str, bool, int, float)


def check_taken(tool: BaseTool, arguments: Mapping[str, Any]) -> None:
    """Refuse arguments that this tool does not take as they are; injected ones are not for a model to give.

    Raises:
        InvalidRequest: one is unknown, missing, of another type, or would be left out; the message is for a model.
    """
    if isinstance(tool, Tool) and tool.args_schema is None:  # one text, under any name
        if len(arguments) != 1 or not isinstance(next(iter(arguments.values())), str):
            raise InvalidRequest(f"{tool.name} takes one argument, a text")
        return
    schema = tool.tool_call_schema
    if isinstance(schema, dict):
        _check_named(tool.name, schema, arguments)
    elif issubclass(schema, BaseModel):
        _check_model(tool, schema, arguments)
    else:
        raise InvalidRequest(f"the arguments of {tool.name} cannot be checked: its schema is of pydantic 1")


def _check_named(name: str, schema: Mapping[str, Any], arguments: Mapping[str, Any]) -> None:
    """By names only: what else a JSON schema of a foreign tool says is checked by the tool, which gets all of it."""
    properties = schema.get("properties")
    is_open = bool(schema.get("additionalProperties")) or bool(schema.get("patternProperties"))
    if not is_open and (unknown := sorted(set(arguments) - set(properties or {}))):
        raise InvalidRequest(f"{name} takes no {unknown[0]!r}")
    if missing := [key for key in schema.get("required") or () if key not in arguments]:
        raise InvalidRequest(f"{name}: {missing[0]} is missing")


def _check_model(tool: BaseTool, model: type[BaseModel], arguments: Mapping[str, Any]) -> None:
    # The model of a call has neither the aliases nor the openness of the tool's own.
    own = tool.args_schema
    whole = own if isinstance(own, type) and issubclass(own, BaseModel) else None
    is_open = whole is not None and whole.model_config.get("extra") == "allow"
    if not is_open and (unknown := sorted(set(arguments) - set(model.model_fields))):
        raise InvalidRequest(f"{tool.name} takes no {unknown[0]!r}")
    try:
        validated = model.model_validate(dict(arguments))
    except ValidationError as error:
        raise InvalidRequest(f"{tool.name}: {what_is_wrong(error)}") from None
    except Exception as error:  # noqa: BLE001 - a validator is the tool's own code, and no interrupt is raised here
        raise InvalidRequest(f"{tool.name}: its arguments failed with {type(error).__name__}") from None
    for key, value in arguments.items():
        if key in model.model_fields and (fault := _changed(value, getattr(validated, key), key)):
            raise InvalidRequest(f"{tool.name}: {fault}")


def _changed(given: Any, taken: Any, where: str) -> str | None:
    """What of a value the tool would not get, or get as another kind; `None` where it gets it as it is."""
    if isinstance(taken, RootModel):
        return _changed(given, taken.root, where)
    if isinstance(given, Mapping):
        inner = _inner(taken)
        if inner is None:
            return None
        for key, value in given.items():
            if key not in inner:
                return f"{where} takes no {key!r}"
            if (fault := _changed(value, inner[key], f"{where}.{key}")) is not None:
                return fault
        return None
    if isinstance(given, list | tuple) and isinstance(taken, list | tuple):
        faults = (
            _changed(one, other, f"{where}[{place}]")
            for place, (one, other) in enumerate(zip(given, taken, strict=False))
        )
        return next((fault for fault in faults if fault is not None), None)
    if type(given) in _SCALARS and type(taken) in _SCALARS and type(given) is not type(taken):
        are_numbers = not isinstance(given, bool | str) and not isinstance(taken, bool | str)
        if not are_numbers or given != taken:
            return f"{where} must be of type {type(taken).__name__}, not {type(given).__name__}"
    return None


def _inner(taken: Any) -> dict[str, Any] | None:
    """What a tool gets of an object, by the names a call may give it; `None` where it makes something of its own."""
    if isinstance(taken, BaseModel):
        found = {
            name: getattr(taken, field)
            for field, info in type(taken).model_fields.items()
            for name in (field, *_aliases(info.alias), *_aliases(info.validation_alias))
        }
        return found | (taken.model_extra or {})
    if isinstance(taken, Mapping):
        return {str(key): value for key, value in taken.items()}
    if dataclasses.is_dataclass(taken) and not isinstance(taken, type):
        return {field.name: getattr(taken, field.name, None) for field in dataclasses.fields(taken)}
    return None


def _aliases(alias: str | AliasPath | AliasChoices | None) -> Iterator[str]:
    if isinstance(alias, str):
        yield alias
    elif isinstance(alias, AliasPath):
        yield str(alias.path[0])
    elif isinstance(alias, AliasChoices):
        for choice in alias.choices:
            yield from _aliases(choice)
