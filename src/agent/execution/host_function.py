"""The executor's tools as the code of an agent-written tool sees them: functions, and what they answer."""

from __future__ import annotations

import keyword
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from agent.errors import InvalidRequest


@dataclass(frozen=True, kw_only=True)
class HostFunction:
    """One tool of the executor, as the code sees it: a function."""

    name: str
    """The tool's name."""
    parameters: Mapping[str, Any]
    """JSON schema of its arguments: an object."""
    description: str = ""
    """What it does, for whoever writes code."""

    @property
    def argument_names(self) -> tuple[str, ...]:
        """In the order in which they may be given by position: the required ones first."""
        names = list(self.parameters.get("properties", {}))
        required = set(self.parameters.get("required", ()))
        return tuple(sorted(names, key=lambda name: name not in required))

    @property
    def signature(self) -> str:
        """As a line of Python without the `def`."""
        required = set(self.parameters.get("required", ()))
        properties = self.parameters.get("properties", {})
        shown = [
            f"{name}: {annotation_of(properties[name])}" + ("" if name in required else " = ...")
            for name in self.argument_names
        ]
        return f"{self.name}({', '.join(shown)}) -> Any"

    def arguments_of(self, positional: Sequence[Any], named: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of one call by name.

        Raises:
            InvalidRequest: more than it takes, or one given twice.
        """
        names = self.argument_names
        if len(positional) > len(names):
            raise InvalidRequest(
                f"{self.name}() takes {len(names)} arguments but {len(positional)} were given"
            )
        found = dict(zip(names, positional, strict=False))
        twice = found.keys() & named.keys()
        if twice:
            raise InvalidRequest(f"{self.name}() got {min(twice)!r} twice")
        return found | dict(named)


@dataclass(frozen=True, kw_only=True)
class HostAnswer:
    """What a host function says to the code that called it."""

    value: Any = None
    """Its result, as JSON."""
    error: str | None = None
    """Why there is none: raised in the code as a RuntimeError."""
    paused: str | None = None
    """Id of the approval it waits for: the run is put away instead of answered."""


CallHost = Callable[[str, dict[str, Any]], Awaitable[HostAnswer]]


def annotation_of(schema: Any) -> str:
    """A JSON schema as a Python type, as far as Python has words for it; else `Any`."""
    if not isinstance(schema, Mapping):
        return "Any"
    if isinstance(schema.get("enum"), list) and schema["enum"]:
        plain = [value for value in schema["enum"] if isinstance(value, str | int | bool) or value is None]
        return f"Literal[{', '.join(map(repr, plain))}]" if len(plain) == len(schema["enum"]) else "Any"
    for several in ("anyOf", "oneOf"):
        if isinstance(schema.get(several), list) and schema[several]:
            return " | ".join(dict.fromkeys(annotation_of(part) for part in schema[several]))
    kind = schema.get("type")
    if isinstance(kind, list):
        return " | ".join(dict.fromkeys(annotation_of({**schema, "type": part}) for part in kind)) or "Any"
    if kind == "array":
        return f"list[{annotation_of(schema.get('items'))}]"
    words = {
        "string": "str", "integer": "int", "number": "float", "boolean": "bool", "null": "None",
        "object": "dict[str, Any]",
    }  # fmt: skip
    return words.get(kind, "Any") if isinstance(kind, str) else "Any"


def usable_as_name(name: str) -> bool:
    """Whether Python takes it as a name that is not its own."""
    return name.isascii() and name.isidentifier() and not keyword.iskeyword(name) and not name.startswith("_")
