"""User memory: observations about one user, each with its evidence."""

from __future__ import annotations

from contextvars import copy_context
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from langchain.tools import ToolRuntime
from langchain_core.tools import BaseTool, StructuredTool, ToolException
from pydantic import ConfigDict, Field, create_model

from agent.errors import ConfigurationError
from agent.identity import Identity
from agent.portal import portal
from agent.stores.base import (
    EvidenceLookup,
    Known,
    LearningMode,
    Proposed,
    Refused,
    Store,
    ToolWriter,
    answer_model,
    check_instructions,
    check_mode,
    is_blank,
    one_of,
    said_by_user,
    trust_of,
    write_or_say,
)
from agent.stores.conversation import CONVERSATION

CONTENT_CHARACTERS_MAX = 2_000
"""Longest observation that a model or a tool may write."""


@dataclass(frozen=True, kw_only=True)
class UserMemoryConfig:
    """Options of the user memory."""

    mode: LearningMode = LearningMode.ALWAYS
    """`ALWAYS` or `AGENTIC`."""
    max_memories: int | None = 10_000
    """Greatest number of current memories of one user; the oldest above it are retired. `None`: no limit."""
    memory_types: tuple[str, ...] = ("fact", "preference", "goal", "event")
    """Kinds a memory may have. `conversation` is taken: so turns of conversations are marked in a prompt."""
    instructions: str = ""
    """Added to what the extracting model is told."""

    def __post_init__(self) -> None:
        check_mode(self, "user_memory", self.mode, (LearningMode.ALWAYS, LearningMode.AGENTIC))
        check_instructions(self, self.instructions)
        if self.max_memories is not None and (type(self.max_memories) is not int or self.max_memories < 1):
            raise ConfigurationError(
                f"UserMemoryConfig(max_memories={self.max_memories!r}) must be a number of at least 1, or None"
            )
        if not isinstance(self.memory_types, list | tuple) or not self.memory_types:
            raise ConfigurationError(
                f"UserMemoryConfig(memory_types={self.memory_types!r}) must be a tuple of at least one name"
            )
        object.__setattr__(self, "memory_types", tuple(self.memory_types))
        if CONVERSATION in self.memory_types or not all(
            isinstance(t, str) and t.strip() for t in self.memory_types
        ):
            raise ConfigurationError(
                f"UserMemoryConfig(memory_types={self.memory_types!r}): names must be text; {CONVERSATION!r} is taken"
            )
        if len(set(self.memory_types)) < len(self.memory_types):
            raise ConfigurationError(f"UserMemoryConfig(memory_types={self.memory_types!r}) has a name twice")


class UserMemoryStore(Store):
    """Observations, one row each; equal texts are one memory."""

    name: ClassVar[str] = "user_memory"
    section: ClassVar[str] = "user_memories"

    def __init__(self, config: UserMemoryConfig) -> None:
        self.config = config

    def limits(self) -> dict[str, int]:
        return {self.name: self.config.max_memories} if self.config.max_memories is not None else {}

    def extraction_schema(self) -> tuple[Any, Any] | None:
        if self.mode is not LearningMode.ALWAYS:
            return None
        kind: Any = Literal.__getitem__(self.config.memory_types)
        references = (list[str], Field(description="References of the messages that say so, such as r1.m1"))
        content = (
            str,
            Field(description="One self-contained sentence about the user, in the user's language"),
        )
        memory = (str, Field(description="Reference of the memory, such as k3"))
        changes = [
            answer_model(
                "AddMemory",
                action=(Literal["add"], ...),
                memory_type=(kind, ...),
                content=content,
                evidence=references,
            ),
            answer_model(
                "UpdateMemory",
                action=(Literal["update"], ...),
                memory=memory,
                memory_type=(kind, ...),
                content=content,
                evidence=references,
            ),
            answer_model("RetireMemory", action=(Literal["retire"], ...), memory=memory, evidence=references),
        ]
        return one_of(changes, "action"), Field(
            default_factory=list, description="Memories to add, update or retire"
        )

    def extraction_instructions(self) -> str:
        return (
            f"user_memory: what is worth knowing about this user in later conversations, of one of these types: "
            f"{', '.join(self.config.memory_types)}. Add what is new; update a memory (by its reference) that the user "
            "corrected or refined; retire one that the user said is no longer so. Nothing that is already known, "
            "nothing about this one request only, no secrets or credentials."
            + (f"\n{self.config.instructions}" if self.config.instructions else "")
        )

    def operations(
        self, extracted: Any, evidence: EvidenceLookup, known: Known, identity: Identity
    ) -> Proposed:
        proposed = Proposed()
        by_reference = {f"k{number}": memory for number, memory in enumerate(known.memories, start=1)}
        touched: set[str] = set()
        for change in extracted or ():
            found = evidence(change.evidence)
            if not found:
                proposed.refused.append(
                    Refused(store=self.name, reason=f"{change.action}: no evidence of this user")
                )
                continue
            operation: dict[str, Any] = {
                "store": self.name,
                "source": "extraction",
                "trust": trust_of(found),
                "run_id": found[0].run_id,
                "evidence": [item.as_json() for item in found],
            }
            if change.action != "add":
                memory = by_reference.get(change.memory)
                if memory is None or memory.memory_id in touched:
                    proposed.refused.append(
                        Refused(
                            store=self.name,
                            reason=f"{change.action}: {change.memory!r} is no memory that was shown",
                        )
                    )
                    continue
                if memory.trust == "user" and not said_by_user(found):
                    reason = f"{change.action}: only the user may change what the user said"
                    proposed.refused.append(Refused(store=self.name, reason=reason))
                    continue
                touched.add(memory.memory_id)
                operation |= {"memory_id": memory.memory_id, "expected_version": memory.version}
            if change.action == "retire":
                proposed.operations.append(operation | {"action": "retire", "reason": "no longer so"})
                continue
            content = change.content.strip()
            if is_blank(content) or len(content) > CONTENT_CHARACTERS_MAX:
                proposed.refused.append(
                    Refused(store=self.name, reason=f"content of {len(content)} characters")
                )
                continue
            proposed.operations.append(
                operation | {"action": "write", "kind": change.memory_type, "content": content}
            )
        return proposed

    def tools(self, write: ToolWriter) -> list[BaseTool]:
        return [_save_tool(self, write)] if self.mode is LearningMode.AGENTIC else []


def _save_tool(store: UserMemoryStore, write: ToolWriter) -> BaseTool:
    kinds = store.config.memory_types

    kind: Any = Literal.__getitem__(kinds)
    arguments = create_model(
        "SaveUserMemory",
        __config__=ConfigDict(extra="forbid", arbitrary_types_allowed=True),
        runtime=(ToolRuntime, ...),  # injected by LangGraph, hidden from the model
        content=(
            str,
            Field(
                min_length=1,
                max_length=CONTENT_CHARACTERS_MAX,
                description="One self-contained sentence about the user",
            ),
        ),
        memory_type=(kind, Field(default=kinds[0], description="What it is")),
    )

    async def save(runtime: ToolRuntime, content: str, memory_type: str = kinds[0]) -> str:
        if memory_type not in kinds:
            raise ToolException(
                f"Nothing was saved: memory_type={memory_type!r} is none of {', '.join(kinds)}."
            )
        if is_blank(content):
            raise ToolException("Nothing was saved: the content is empty.")
        learning = {
            "action": "write",
            "store": store.name,
            "kind": memory_type,
            "content": content.strip(),
            "trust": "model",
            "source": "tool",
        }
        receipt = (await write_or_say(write, runtime, [learning]))[0]
        word = "Already known" if receipt["status"] == "unchanged" else "Saved"
        return f"{word} (memory {receipt['memory_id'][:8]}): {receipt['content']}"

    def save_sync(runtime: ToolRuntime, content: str, memory_type: str = kinds[0]) -> str:
        return portal().run_sync(save(runtime, content, memory_type), context=copy_context())

    return StructuredTool.from_function(
        func=save_sync,
        coroutine=save,
        name="save_user_memory",
        description=(
            "Remember something about the user for future conversations: a fact, a preference, a goal, an event. "
            "One sentence that can be understood on its own. Never passwords or keys."
        ),
        args_schema=arguments,
        infer_schema=False,
        handle_tool_error=True,
    )
