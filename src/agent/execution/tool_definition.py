"""What an agent hands in as a new tool: checked for shape, hashed, and what became of it."""

from __future__ import annotations

import hashlib
import keyword
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from agent.approval.binding import canonical_json
from agent.errors import InvalidRequest
from agent.execution.argument_schema import check_arguments, checked_parameters

_NAME = re.compile(r"[a-z][a-z0-9_]{2,59}")
_DESCRIPTION_CHARACTERS_MAX = 1_000
_EXAMPLES_MAX = 10
_EXACT_BELOW = 2**53

WRITING_TOOLS = """\
Make a new tool out of Python code, for work that will come up again. It is type-checked, its examples are run, and a \
person approves it; then it is there from the next run on. It cannot be changed later: hand in the same name again for \
a new version.

code: one top-level function `def run(...)` with type hints, whose parameters are the names in `parameters`, and that \
returns JSON: text, numbers, booleans, None, lists, dicts. Helper functions and constants may stand beside it. It runs \
in a small interpreter without files, network, processes or packages. There are: functions, closures, lambdas, simple \
classes, dataclasses, match, try, with, f-strings, comprehensions, and of the standard library json, re, datetime, \
math, collections, itertools, functools, decimal, csv, hashlib, base64, random, typing, copy, time. There are NOT: \
class inheritance, `yield`, `del`, property and method decorators, `except*`, io, operator, enum, statistics, uuid, \
urllib, string, textwrap, or any other package. Import what you use, also `from typing import Any`.
The only way to anything outside is to call these functions inside `run` and its helpers, without `await`, and not \
through `map`, `sorted(key=…)` or other functions that call for you; each may need a person's approval when it runs:
{functions}
parameters: JSON schema of the arguments, {{"type": "object", "properties": {{…}}, "required": […]}}, without `$ref` \
and `pattern`; arguments not named there are refused.
examples: 1 to {examples_max} of {{"arguments": {{…}}, "result": …, "host_results": [{{"function": …, "result": …}}]}}.
`result` may be left out, else it must come out exactly. `host_results` are the answers that functions give in this \
example, in order; without them only calls that read are made, for real."""
"""What a model is told of `create_new_tool`; to be filled with the functions."""


@dataclass(frozen=True, kw_only=True)
class ToolDefinition:
    """A tool as an agent wrote it."""

    name: str
    description: str
    code: str
    parameters: Mapping[str, Any]
    examples: Sequence[Mapping[str, Any]]

    @classmethod
    def checked(
        cls, *, name: Any, description: Any, code: Any, parameters: Any, examples: Any, taken: Sequence[str]
    ) -> ToolDefinition:
        """A definition that can be tried.

        Args:
            taken: names of the tools that there are.

        Raises:
            InvalidRequest: something cannot be; the message is for whoever wrote it.
        """
        if not isinstance(name, str) or not _NAME.fullmatch(name) or keyword.iskeyword(name):
            raise InvalidRequest(
                "name must be 3 to 60 lower-case letters, digits and _, and begin with a letter"
            )
        if name in taken:
            raise InvalidRequest(f"there is a tool {name!r} already that no agent wrote; choose another name")
        if (
            not isinstance(description, str)
            or not 10 <= len(description.strip()) <= _DESCRIPTION_CHARACTERS_MAX
        ):
            raise InvalidRequest(
                f"description must say in 10 to {_DESCRIPTION_CHARACTERS_MAX} characters what the tool does and when"
            )
        if not isinstance(code, str):
            raise InvalidRequest("code must be text")
        closed = checked_parameters(parameters)
        if not isinstance(examples, list) or not 1 <= len(examples) <= _EXAMPLES_MAX:
            raise InvalidRequest(f"examples must be a list of 1 to {_EXAMPLES_MAX}")
        for number, example in enumerate(examples, 1):
            _check_example(example, number, closed)
        if not is_storable([description, code, closed, examples]):
            raise InvalidRequest(
                "description, code, parameters and examples must hold no NUL, no half characters and no number "
                "of 2**53 or more; write such numbers as text"
            )
        return cls(
            name=name,
            description=description.strip(),
            code=code.replace("\r\n", "\n"),
            parameters=as_kept(closed),
            examples=as_kept(examples),
        )


def _check_example(example: Any, number: int, parameters: Mapping[str, Any]) -> None:
    if not isinstance(example, Mapping) or not example.keys() <= {"arguments", "result", "host_results"}:
        raise InvalidRequest(f"example {number} must be an object of arguments, result and host_results")
    try:
        check_arguments(example.get("arguments"), parameters)
    except InvalidRequest as error:
        raise InvalidRequest(f"example {number}: {error}") from None
    answers = example.get("host_results", [])
    if not isinstance(answers, list) or not all(
        isinstance(answer, Mapping) and answer.keys() == {"function", "result"} for answer in answers
    ):
        raise InvalidRequest(
            f"example {number}: host_results must be a list of objects of function and result"
        )


def code_hash(
    *,
    name: str,
    description: str,
    code: str,
    parameters: Mapping[str, Any],
    examples: Sequence[Any],
    example_results: Sequence[Any],
    capabilities: Sequence[str],
) -> str:
    """What an approval of a tool is bound to: all that a person is shown of it. SHA-256 in hexadecimal digits."""
    everything = {
        "name": name,
        "description": description,
        "code": code,
        "parameters": parameters,
        "examples": list(examples),
        "example_results": list(example_results),
        "capabilities": list(capabilities),
    }
    return hashlib.sha256(canonical_json(everything).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class ToolVersion:
    """One version of a tool that an agent wrote, as it is kept."""

    name: str
    version: int
    state: Literal["draft", "approved", "retired"]
    description: str
    code: str
    parameters: Mapping[str, Any]
    examples: Sequence[Any]
    example_results: Sequence[Any]
    capabilities: Sequence[str]
    """The host functions it is granted."""
    code_hash: str
    author: str
    approval_id: str | None = None
    """By which it was approved, or that it waits for."""
    approved_by: Sequence[str] = ()

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> ToolVersion:
        """As the storage functions give it."""
        known = {name: row[name] for name in cls.__dataclass_fields__ if row.get(name) is not None}
        return cls(**known)

    @property
    def is_whole(self) -> bool:
        """Whether what is kept is what was hashed."""
        return self.code_hash == code_hash(
            name=self.name,
            description=self.description,
            code=self.code,
            parameters=self.parameters,
            examples=self.examples,
            example_results=self.example_results,
            capabilities=self.capabilities,
        )

    def as_shown(self) -> dict[str, Any]:
        """What a person who approves it is shown, most important first."""
        return {
            "name": self.name,
            "version": self.version,
            "description": self.description,
            "may_call": list(self.capabilities),
            "code": self.code,
            "parameters": dict(self.parameters),
            "example_results": list(self.example_results),
            "code_hash": self.code_hash,
            "author": self.author,
        }


def is_storable(value: Any) -> bool:
    """Whether Postgres can keep it as JSON, and gives back exactly this."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            return False
        return "\x00" not in value
    if isinstance(value, Mapping):
        return all(is_storable(part) for pair in value.items() for part in pair)
    if isinstance(value, list | tuple):
        return all(map(is_storable, value))
    return not isinstance(value, int | float) or abs(value) < _EXACT_BELOW


def as_kept(value: Any) -> Any:
    """A JSON value as it comes back from Postgres, which knows no -0."""
    if isinstance(value, Mapping):
        return {key: as_kept(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [as_kept(inner) for inner in value]
    if isinstance(value, float):
        return value or 0.0
    return value
