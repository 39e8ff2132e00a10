"""Conversations: what was said, word for word and message by message, so that recall works with no model at all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from agent.errors import ConfigurationError
from agent.identity import Identity
from agent.stores.base import EvidenceLookup, Known, LearningMode, Proposed, Store, check_mode

CONVERSATION = "conversation"
"""Name of the store, and the word by which its memories are told from others in a prompt."""


@dataclass(frozen=True, kw_only=True)
class ConversationConfig:
    """Options of the conversations."""

    mode: LearningMode = LearningMode.ALWAYS
    """`ALWAYS` only: what was said is kept when a run is learned, and nobody writes it."""
    max_turns: int | None = 20_000
    """Greatest number of turns of one user; the oldest above it are retired. `None`: no limit."""

    def __post_init__(self) -> None:
        check_mode(self, CONVERSATION, self.mode, (LearningMode.ALWAYS,))
        if self.max_turns is not None and (type(self.max_turns) is not int or self.max_turns < 1):
            raise ConfigurationError(
                f"ConversationConfig(max_turns={self.max_turns!r}) must be a number of at least 1, or None"
            )


class ConversationStore(Store):
    """One row per message of a user or an assistant. `apply_learning` writes them; no model is asked."""

    name: ClassVar[str] = CONVERSATION
    section: ClassVar[str] = "conversations"

    def __init__(self, config: ConversationConfig) -> None:
        self.config = config

    def limits(self) -> dict[str, int]:
        return {self.name: self.config.max_turns} if self.config.max_turns is not None else {}

    def extraction_schema(self) -> tuple[Any, Any] | None:
        return None

    def extraction_instructions(self) -> str:
        return ""

    def operations(
        self, extracted: Any, evidence: EvidenceLookup, known: Known, identity: Identity
    ) -> Proposed:
        return Proposed()
