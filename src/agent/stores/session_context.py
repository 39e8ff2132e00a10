"""Session context: what one session is about, and with planning its goal, plan and progress."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import Field

from agent.errors import ConfigurationError
from agent.identity import Identity
from agent.stores.base import (
    EvidenceLookup,
    Known,
    LearningMode,
    Proposed,
    Refused,
    Store,
    answer_model,
    check_instructions,
    check_mode,
    is_blank,
    trust_of,
)

SUMMARY_CHARACTERS_MAX = 4_000
_PLANNING = {
    "goal": "What the user wants to reach in this session",
    "plan": "The steps agreed on, one a line",
    "progress": "Which steps are done, and what comes next",
}


@dataclass(frozen=True, kw_only=True)
class SessionContextConfig:
    """Options of the session context."""

    mode: LearningMode = LearningMode.ALWAYS
    """`ALWAYS` only: the agent has no tools for it."""
    enable_planning: bool = False
    """Also keep goal, plan and progress."""
    instructions: str = ""
    """Added to what the extracting model is told."""

    def __post_init__(self) -> None:
        check_mode(self, "session_context", self.mode, (LearningMode.ALWAYS,))
        check_instructions(self, self.instructions)
        if not isinstance(self.enable_planning, bool):
            raise ConfigurationError(
                f"SessionContextConfig(enable_planning={self.enable_planning!r}) must be True or False"
            )


class SessionContextStore(Store):
    """One row per field and session; a change is a new version of its row."""

    name: ClassVar[str] = "session_context"
    section: ClassVar[str] = "session_context"

    def __init__(self, config: SessionContextConfig) -> None:
        self.config = config

    @property
    def fields(self) -> dict[str, str]:
        """Fields that are kept, with what each is for."""
        return {"summary": "What happened in this session so far, in a few sentences"} | (
            _PLANNING if self.config.enable_planning else {}
        )

    def extraction_schema(self) -> tuple[Any, Any] | None:
        parts: dict[str, Any] = {
            name: (str | None, Field(default=None, description=f"{purpose}; null leaves it as it is"))
            for name, purpose in self.fields.items()
        }
        parts["evidence"] = (
            list[str],
            Field(description="References of the messages it rests on, such as r1.m1"),
        )
        update: Any = answer_model("SessionUpdate", **parts)
        return update | None, Field(default=None, description="Where this session stands now")

    def extraction_instructions(self) -> str:
        return (
            f"session_context: where this session stands, whole and not only what is new: {', '.join(self.fields)}."
            + (f"\n{self.config.instructions}" if self.config.instructions else "")
        )

    def operations(
        self, extracted: Any, evidence: EvidenceLookup, known: Known, identity: Identity
    ) -> Proposed:
        proposed = Proposed()
        if extracted is None:
            return proposed
        found = evidence(extracted.evidence)
        if not found or identity.session_id is None:
            proposed.refused.append(Refused(store=self.name, reason="no evidence of this user"))
            return proposed
        for name in self.fields:
            content = (getattr(extracted, name) or "").strip()
            if is_blank(content):
                continue
            if len(content) > SUMMARY_CHARACTERS_MAX:
                proposed.refused.append(
                    Refused(store=self.name, reason=f"{name} of {len(content)} characters")
                )
                continue
            proposed.operations.append(
                {
                    "action": "write",
                    "store": self.name,
                    "field": name,
                    "session_id": identity.session_id,
                    "content": content,
                    # A summary is a model's words, whoever was summed up.
                    "trust": "tool" if trust_of(found) == "tool" else "model",
                    "source": "extraction",
                    "run_id": found[0].run_id,
                    "evidence": [item.as_json() for item in found],
                }
            )
        return proposed
