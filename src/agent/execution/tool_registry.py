"""The tools that the executor knows: what each takes, how dangerous a call is, how it is run."""

from __future__ import annotations

import json
import re
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from agent.approval.risk import Risk
from agent.errors import ConfigurationError, InvalidRequest
from agent.identity import Identity

_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,63}")
_WRONG_SHOWN_MAX: Final = 5


class ToolArguments(BaseModel):
    """Base of the arguments of a tool: unknown names are refused and nothing is converted."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, hide_input_in_errors=True)


@dataclass(frozen=True, kw_only=True)
class CallContext:
    """Whose call it is and where it comes from."""

    identity: Identity
    tainted: bool = False
    """Whether the run has read untrusted text."""
    thread_id: str | None = None
    tool_call_id: str | None = None
    reason: str = ""
    """What the model gives as its reason: a claim."""
    bounds: Mapping[str, Any] = field(default_factory=dict)
    """What was approved at most; empty while a call is assessed."""
    ticket: str | None = None
    """Of the claimed approval, by which the execution is entered in the log."""
    entry: Mapping[str, Any] = field(default_factory=dict)
    """What the log says of the call before it runs, for a tool that writes its own row in its own transaction."""


@dataclass(frozen=True, kw_only=True)
class Appraisal:
    """What a tool's own code says about one call before it may run."""

    risk: Risk
    why: str = ""
    forbidden_because: str | None = None
    """Set: the call is never run, and this is why; for the model to read."""
    shown: Mapping[str, Any] | None = None
    """The arguments as people are shown them; `None`: as they are."""
    summary: str = ""
    """The call in a sentence, made by code."""
    effects: Mapping[str, Any] = field(default_factory=dict)
    """What it would do, as measured: for SQL rows by table."""
    bounds: Mapping[str, Any] = field(default_factory=dict)
    """What an approval allows at most; part of what is approved."""
    fingerprint: str | None = None
    """The same for calls that differ only in values, for standing rules."""
    tables: Sequence[str] = ()
    rows: int | None = None
    """How many rows it would change."""
    rights: Sequence[str] = ()
    """Rights that this call needs besides those of its tool."""


@dataclass(frozen=True, kw_only=True)
class ToolOutcome:
    """What came of a call that ran."""

    value: Any = None
    """JSON-safe."""
    rows: Sequence[Any] | None = None
    row_count: int | None = None
    result_bytes: int | None = None
    effects: Mapping[str, Any] = field(default_factory=dict)
    """What it did: for SQL rows by table."""
    pre_image: Any = None
    log_id: str | None = None
    """Set by a tool that entered the execution in the log itself, in the transaction of its work."""
    error: str | None = None
    """Set: it failed and surely changed nothing; for the model to read."""
    unsure: bool = False
    """Whether it may have done its work although it failed, such as a mail server that did not answer."""
    approval_id: str | None = None
    """Of a request that the call made and that is not decided yet."""


Run = Callable[[Any, CallContext], Awaitable[ToolOutcome]]
Appraise = Callable[[Any, CallContext], Awaitable[Appraisal]]
Measure = Callable[[Any, CallContext, Appraisal], Awaitable[Appraisal]]
Idempotency = Literal["none", "keyed", "idempotent"]


@dataclass(frozen=True, kw_only=True)
class ToolSpec:
    """One tool."""

    name: str
    description: str
    arguments: type[BaseModel]
    """A model that is strict and refuses unknown names, such as a subclass of `ToolArguments`."""
    risk: Risk | Appraise
    """The same for every call, or code that says it for one. It touches nothing: it comes before all other checks."""
    run: Run
    measure: Measure | None = None
    """Completes the appraisal of a call that does more than read by what it would do, such as by a trial. It comes
    after rights, rules, kill switch and limits. Where the context has bounds, these hold and nothing is tried."""
    rights: tuple[str, ...] | None = None
    """Rights that the policy must grant to tenant and agent for any call; `None`: the right of the tool's own name."""
    idempotency: Idempotency = "none"
    """Whether a call may run a second time. `"idempotent"`: it does no harm, so a call that lost its connection is
    tried once more. `"keyed"`: never, and who comes back with the same call of the same thread gets the result that was
    recorded. `"none"`: never, and who comes back is told that it ran."""
    version: str = "1"
    """Part of what is approved: change it with what the tool does."""
    target: str = ""
    """What it works on, such as a database; part of what is approved."""
    per_hour: int | None = None
    """Calls by one tenant in an hour; `None`: no limit of its own. A rule of the policy may set a lower one."""
    kind: Literal["execution", "action"] = "execution"
    untrusted: bool = False
    """Whether its results hold text of strangers, after which the run is treated one level stricter."""
    for_agent_tools: bool = True
    """Whether tools that agents write may call it."""

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ConfigurationError(
                f"tool name={self.name!r} must be 1 to 64 letters, digits, _ or -, and not begin with a digit"
            )
        config = self.arguments.model_config
        if config.get("extra") != "forbid" or not config.get("strict"):
            raise ConfigurationError(
                f"the arguments of tool {self.name!r} must be a model with extra='forbid' and strict=True; "
                "derive it from ToolArguments"
            )
        if self.per_hour is not None and self.per_hour < 0:
            raise ConfigurationError(f"tool {self.name!r}: per_hour={self.per_hour} must not be negative")
        if self.idempotency not in get_args(Idempotency):
            raise ConfigurationError(
                f"tool {self.name!r}: idempotency={self.idempotency!r} is none of {', '.join(get_args(Idempotency))}"
            )
        if self.rights is not None and not all(isinstance(one, str) and one for one in self.rights):
            raise ConfigurationError(f"tool {self.name!r}: rights={self.rights!r} must be a tuple of names")

    @property
    def needed_rights(self) -> tuple[str, ...]:
        """Rights that any call of it needs."""
        return (self.name,) if self.rights is None else tuple(self.rights)

    def checked(self, arguments: Any) -> BaseModel:
        """The arguments as the tool's own type.

        Raises:
            InvalidRequest: an unknown or missing argument, or one of another type.
        """
        if not isinstance(arguments, Mapping):
            raise InvalidRequest(
                f"{self.name}: the arguments must be an object, not {type(arguments).__name__}"
            )
        try:
            written = json.dumps(dict(arguments), allow_nan=False)
        except (TypeError, ValueError, RecursionError):
            raise InvalidRequest(
                f"{self.name}: the arguments must be JSON: text, numbers, lists, objects"
            ) from None
        try:
            # By the rules of JSON, where an object is a record and an ISO date a date; nothing else is converted.
            return self.arguments.model_validate_json(written, strict=True)
        except ValidationError as error:
            raise InvalidRequest(f"{self.name}: {what_is_wrong(error)}") from None


def what_is_wrong(error: ValidationError) -> str:
    """The complaints about arguments in words a model can act on, without the values."""
    found = [
        f"{'.'.join(str(part) for part in item['loc']) or 'the arguments'}: {item['msg']}"
        for item in error.errors(include_url=False, include_input=False, include_context=False)
    ]
    more = f"; and {len(found) - _WRONG_SHOWN_MAX} more" if len(found) > _WRONG_SHOWN_MAX else ""
    return "; ".join(found[:_WRONG_SHOWN_MAX]) + more


class ToolRegistry:
    """The tools by name."""

    def __init__(self, tools: Sequence[ToolSpec] = ()) -> None:
        self._tools: dict[str, ToolSpec] = {}
        for tool in tools:
            self.register(tool)

    def register(self, tool: ToolSpec) -> ToolSpec:
        """Make a tool known.

        Raises:
            ConfigurationError: another of this name is known already.
        """
        if self._tools.get(tool.name, tool) is not tool:
            raise ConfigurationError(
                f"a tool {tool.name!r} is registered already; give this one another name"
            )
        self._tools[tool.name] = tool
        return tool

    def get(self, name: str) -> ToolSpec | None:
        """The tool of this name, or `None` where there is none."""
        return self._tools.get(name)

    def __iter__(self) -> Iterator[ToolSpec]:
        return iter(list(self._tools.values()))
