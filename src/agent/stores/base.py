"""What every store is: one kind of knowledge, how it is learned, written by tools, and rendered."""

from __future__ import annotations

import functools
import json
import operator
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from enum import StrEnum
from typing import Annotated, Any, ClassVar

from langchain_core.tools import BaseTool, ToolException
from pydantic import BaseModel, ConfigDict, Field, create_model

from agent.errors import ConfigurationError, DatabaseUnavailable, IdentityError, LearningError
from agent.events import emit
from agent.identity import Identity


class LearningMode(StrEnum):
    """How a store learns."""

    ALWAYS = "always"
    """After the run, by the worker."""
    AGENTIC = "agentic"
    """Only through the agent's own tools; no model call of ours."""
    PROPOSE = "propose"
    """By proposal, confirmed by the user. No store supports it yet."""
    HITL = "hitl"
    """By a reviewer's approval. No store supports it yet."""


def check_mode(config: object, store: str, mode: object, allowed: Sequence[LearningMode]) -> None:
    """Refuse a mode that the store does not have.

    Raises:
        ConfigurationError: names the store, the mode and what is allowed.
    """
    if not isinstance(mode, LearningMode):
        raise ConfigurationError(
            f"{type(config).__name__}(mode={mode!r}): the mode of store={store!r} must be a LearningMode, such as "
            f"LearningMode.{allowed[0].name}"
        )
    if mode not in allowed:
        raise ConfigurationError(
            f"{type(config).__name__}(mode={mode!r}): store={store!r} does not support this mode; "
            f"it supports {', '.join(f'LearningMode.{m.name}' for m in allowed)}"
        )


def check_instructions(config: object, instructions: object) -> None:
    """Refuse instructions that are no text.

    Raises:
        ConfigurationError: names the config and the value.
    """
    if not isinstance(instructions, str):
        raise ConfigurationError(f"{type(config).__name__}(instructions={instructions!r}) must be text")


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """Where a memory was learned from."""

    run_id: str
    message_id: str = ""
    tool_call_id: str = ""
    quote: str = ""
    """The words themselves, at most 1,000 characters."""
    role: str = "user"
    """Whose words: `user` or `tool`."""

    def as_json(self) -> dict[str, str]:
        """As the storage functions take it."""
        return {
            "run_id": self.run_id,
            "message_id": self.message_id,
            "tool_call_id": self.tool_call_id,
            "quote": self.quote[:1000],
        }


@dataclass(frozen=True, kw_only=True)
class Memory:
    """One memory as recall returns it."""

    memory_id: str
    version: int
    store: str
    content: str
    trust: str
    recorded_at: str
    """ISO 8601."""
    kind: str = ""
    field: str | None = None
    value: Any = None
    session_id: str | None = None
    """Session of a turn, and of what is tied to one."""
    turn: int | None = None
    """Place of a turn in its session, from 1; `None` for what is no turn."""
    speaker: str | None = None
    """Name of who said a turn, where there is one."""
    valid_from: str | None = None
    """When a turn was said; since when something else is so. ISO 8601."""

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Memory:
        """From a row of `recall_context`."""
        return cls(
            memory_id=row["memory_id"],
            version=row["version"],
            store=row["store"],
            content=row["content"],
            trust=row["trust"],
            recorded_at=row["recorded_at"],
            kind=row.get("kind") or "",
            field=row.get("field"),
            value=row.get("value"),
            session_id=row.get("session_id"),
            turn=row.get("turn"),
            speaker=row.get("speaker"),
            valid_from=row.get("valid_from"),
        )


@dataclass(frozen=True, kw_only=True)
class Known:
    """What was known when learning began, by store."""

    profile: Sequence[Memory] = ()
    memories: Sequence[Memory] = ()
    session: Sequence[Memory] = ()


@dataclass(frozen=True, kw_only=True)
class Refused:
    """Something a model proposed and code did not accept."""

    store: str
    reason: str


@dataclass(kw_only=True)
class Proposed:
    """What a store makes of a model's answer: operations for `apply_learning`, and what it refused."""

    operations: list[dict[str, Any]] = dataclass_field(default_factory=list)
    refused: list[Refused] = dataclass_field(default_factory=list)


EvidenceLookup = Callable[[Sequence[str]], list[Evidence]]
"""Turns the references of a model's answer (`r1.m2`) into evidence; unknown, foreign or recalled ones are left out."""

ToolWriter = Callable[[Any, Sequence[dict[str, Any]]], Awaitable[list[dict[str, Any]]]]
"""Writes learnings for the identity of a tool call (its `ToolRuntime`) and returns the database's receipts."""


class Store(ABC):
    """One kind of knowledge. Stores hold no state: rows are in the database, options in their config."""

    name: ClassVar[str]
    """As in `agent_memory.store` and in the arguments of `LearningMachine`."""
    section: ClassVar[str]
    """Name of its part of the rendered block."""
    config: Any
    """Its options; their `repr` says all of them."""

    @property
    def mode(self) -> LearningMode:
        """How it learns."""
        mode: LearningMode = self.config.mode
        return mode

    @abstractmethod
    def extraction_schema(self) -> tuple[Any, Any] | None:
        """Type and pydantic field of its part of the extraction, or `None` where no model extracts for it."""

    @abstractmethod
    def extraction_instructions(self) -> str:
        """What the extracting model is told about this store."""

    @abstractmethod
    def operations(
        self, extracted: Any, evidence: EvidenceLookup, known: Known, identity: Identity
    ) -> Proposed:
        """Validate one part of an extraction and turn it into operations."""

    def tools(self, write: ToolWriter) -> list[BaseTool]:
        """The tools an agent gets for it; none unless the mode is AGENTIC."""
        return []

    def limits(self) -> dict[str, int]:
        """Greatest number of memories by store, for `apply_learning`."""
        return {}


def answer_model(model_name: str, /, **fields: Any) -> type[BaseModel]:
    """Part of the schema of a model's answer: unknown keys are refused."""
    return create_model(model_name, __config__=ConfigDict(extra="forbid"), **fields)


def one_of(models: Sequence[type[BaseModel]], discriminator: str) -> Any:
    """The type of a list of any of these models, told apart by one field."""
    union = functools.reduce(operator.or_, models)
    item: Any = Annotated[union, Field(discriminator=discriminator)] if len(models) > 1 else union
    return list[item]


async def write_or_say(
    write: ToolWriter, runtime: Any, learnings: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Write for a tool and return the receipts.

    Raises:
        ToolException: nothing was saved; in words for the agent, and its tool message is marked as an error.
    """
    try:
        return await write(runtime, learnings)
    except IdentityError:
        raise ToolException("Nothing was saved: it is not known who the user is.") from None
    except DatabaseUnavailable:
        raise ToolException("Nothing was saved: the memory cannot be reached right now.") from None
    except LearningError as error:
        emit("tool_write_failed", reason=str(error))
        raise ToolException(f"Nothing was saved: the memory refused it ({type(error).__name__}).") from None


def trust_of(evidence: Sequence[Evidence]) -> str:
    """Label of the least trusted thing among the evidence: a tool's result counts less than a user's words."""
    return "user" if all(item.role == "user" and not item.tool_call_id for item in evidence) else "tool"


def said_by_user(evidence: Sequence[Evidence]) -> bool:
    """Whether any of it is the user's own word, which alone may change or take back what the user said."""
    return any(item.role == "user" and not item.tool_call_id for item in evidence)


def is_blank(text: str) -> bool:
    """Whether there is nothing to see in it."""
    return not any(character.isprintable() and not character.isspace() for character in text)


def display(value: Any) -> str:
    """A value as text for search and prompts."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple | dict) and not value:
        return "none"
    if isinstance(value, list | tuple) and all(isinstance(item, str | int | float) for item in value):
        return ", ".join(display(item) for item in value)
    if isinstance(value, BaseModel):
        return value.model_dump_json()
    if isinstance(value, dict | list):
        return json.dumps(value, ensure_ascii=False, default=str)
    return str(value)
