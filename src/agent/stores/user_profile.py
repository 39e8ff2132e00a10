"""User profile: typed fields about one user, each with one answer at a time."""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import copy_context
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from langchain.tools import ToolRuntime
from langchain_core.tools import BaseTool, StructuredTool, ToolException
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, create_model
from pydantic.fields import FieldInfo

from agent.errors import ConfigurationError, InvalidLearning
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
    check_mode,
    display,
    one_of,
    trust_of,
    write_or_say,
)


class UserProfile(BaseModel):
    """The default fields. Subclass it, or pass any other model, to have fields of your own."""

    name: str | None = Field(default=None, description="Full name")
    preferred_name: str | None = Field(default=None, description="What the user wants to be called")
    role: str | None = Field(default=None, description="Job, role or field of work")
    company: str | None = Field(default=None, description="Organisation the user works for")
    location: str | None = Field(default=None, description="Where the user lives or works")
    language: str | None = Field(default=None, description="Language the user wants to be answered in")
    timezone: str | None = Field(default=None, description="Time zone, as an IANA name where known")
    preferences: str | None = Field(default=None, description="How the user wants to be answered")


@dataclass(frozen=True, kw_only=True)
class UserProfileConfig:
    """Options of the user profile."""

    mode: LearningMode = LearningMode.ALWAYS
    """`ALWAYS` or `AGENTIC`."""
    schema: type[BaseModel] = UserProfile
    """Fields and their types; descriptions are shown to the model. Every field may be unknown, whatever it declares."""
    instructions: str = ""
    """Added to what the extracting model is told."""

    def __post_init__(self) -> None:
        check_mode(self, "user_profile", self.mode, (LearningMode.ALWAYS, LearningMode.AGENTIC))
        if not (isinstance(self.schema, type) and issubclass(self.schema, BaseModel)):
            raise ConfigurationError(
                f"UserProfileConfig(schema={self.schema!r}) must be a pydantic model class"
            )
        if not self.schema.model_fields:
            raise ConfigurationError(f"UserProfileConfig(schema={self.schema.__name__}) has no fields")
        taken = {"clear_fields", "runtime"} & self.schema.model_fields.keys()
        if taken:
            raise ConfigurationError(
                f"UserProfileConfig(schema={self.schema.__name__}): the field name {taken.pop()!r} is taken by the tool"
            )


class UserProfileStore(Store):
    """Typed fields, one row each; a change is a new version of its row."""

    name: ClassVar[str] = "user_profile"
    section: ClassVar[str] = "user_profile"

    def __init__(self, config: UserProfileConfig) -> None:
        self.config = config
        self._adapters: dict[str, TypeAdapter[Any]] = {
            name: TypeAdapter(_annotation(info)) for name, info in config.schema.model_fields.items()
        }

    @property
    def mode(self) -> LearningMode:
        return self.config.mode

    def value_of(self, name: str, value: Any) -> Any:
        """The value as its field's type has it, in JSON terms.

        Raises:
            InvalidLearning: no such field, or a value its type refuses.
        """
        if name not in self._adapters:
            raise InvalidLearning(f"user_profile has no field {name!r}; it has {', '.join(self._adapters)}")
        try:
            typed = self._adapters[name].validate_python(value)
        except ValidationError as error:
            reasons = "; ".join(
                fault["msg"] for fault in error.errors(include_url=False, include_input=False)
            )
            raise InvalidLearning(f"user_profile field {name!r} does not take {value!r}: {reasons}") from None
        return self._adapters[name].dump_python(typed, mode="json")

    def change(self, name: str, value: Any, **more: Any) -> dict[str, Any]:
        """The operation that sets one field, or clears it where the value is `None` or empty text.

        Raises:
            InvalidLearning: as in `value_of`.
        """
        if value is None or (isinstance(value, str) and not value.strip()):
            if name not in self._adapters:
                raise InvalidLearning(
                    f"user_profile has no field {name!r}; it has {', '.join(self._adapters)}"
                )
            return {"action": "retire", "store": self.name, "field": name, "reason": "cleared", **more}
        typed = self.value_of(name, value)
        content = display(typed)
        if not content.strip():
            raise InvalidLearning(
                f"user_profile field {name!r} cannot hold {value!r}: there is nothing to show of it"
            )
        return {
            "action": "write", "store": self.name, "field": name, "content": content[:20_000], "value": typed, **more,
        }  # fmt: skip

    def extraction_schema(self) -> tuple[Any, Any] | None:
        if self.mode is not LearningMode.ALWAYS:
            return None
        changes = [
            answer_model(
                f"Set_{name}",
                field=(Literal[name], ...),
                value=(
                    _annotation(info) | None,
                    Field(description=f"{info.description or name}; null clears the field"),
                ),
                evidence=(
                    list[str],
                    Field(description="References of the user messages that say so, such as r1.m1"),
                ),
            )
            for name, info in self.config.schema.model_fields.items()
        ]
        return one_of(changes, "field"), Field(
            default_factory=list, description="Profile fields to set or clear"
        )

    def extraction_instructions(self) -> str:
        fields = "\n".join(
            f"  - {name}: {info.description or name}"
            for name, info in self.config.schema.model_fields.items()
        )
        return (
            "user_profile: lasting facts about the user that fit one of these fields. Set a field only when the user "
            "stated it; set it to null when the user takes it back.\n" + fields
            + (f"\n{self.config.instructions}" if self.config.instructions else "")
        )  # fmt: skip

    def operations(
        self, extracted: Any, evidence: EvidenceLookup, known: Known, identity: Identity
    ) -> Proposed:
        proposed = Proposed()
        current = {memory.field: memory for memory in known.profile}
        for change in extracted or ():
            found = evidence(change.evidence)
            if not found:
                proposed.refused.append(
                    Refused(store=self.name, reason=f"{change.field}: no evidence of this user")
                )
                continue
            try:
                operation = self.change(
                    change.field,
                    change.value,
                    trust=trust_of(found),
                    source="extraction",
                    run_id=found[0].run_id,
                    evidence=[item.as_json() for item in found],
                )
            except InvalidLearning as error:
                proposed.refused.append(Refused(store=self.name, reason=str(error)))
                continue
            if operation["action"] == "retire" and change.field not in current:
                continue
            proposed.operations.append(operation)
        return proposed

    def tools(self, write: ToolWriter) -> list[BaseTool]:
        return [_update_tool(self, write)] if self.mode is LearningMode.AGENTIC else []


def _annotation(info: FieldInfo) -> Any:
    """The type of a field with its constraints."""
    return Annotated[info.annotation, *info.metadata] if info.metadata else info.annotation


def _update_tool(store: UserProfileStore, write: ToolWriter) -> BaseTool:
    fields: dict[str, Any] = {
        name: (_annotation(info) | None, Field(default=None, description=info.description))
        for name, info in store.config.schema.model_fields.items()
    }
    names = tuple(store.config.schema.model_fields)
    fields["clear_fields"] = (
        list[Literal[names]],  # type: ignore[valid-type]
        Field(default_factory=list, description="Fields to forget"),
    )
    fields["runtime"] = (ToolRuntime, ...)  # injected by LangGraph, hidden from the model
    arguments = create_model(
        "UpdateUserProfile", __config__=ConfigDict(extra="forbid", arbitrary_types_allowed=True), **fields
    )

    async def update(runtime: ToolRuntime, clear_fields: Sequence[str] = (), **values: Any) -> str:
        changes = {name: value for name, value in values.items() if value is not None}
        if both := changes.keys() & set(clear_fields):
            raise ToolException(
                f"Nothing was saved: {', '.join(sorted(both))} cannot be set and cleared at once."
            )
        try:
            learnings = [
                store.change(name, value, trust="model", source="tool") for name, value in changes.items()
            ]
            learnings += [store.change(name, None) for name in clear_fields]
        except InvalidLearning as error:
            raise ToolException(f"Nothing was saved: {error}") from None
        if not learnings:
            raise ToolException("Nothing was saved: no field was given.")
        return _confirmation(await write_or_say(write, runtime, learnings))

    def update_sync(runtime: ToolRuntime, clear_fields: Sequence[str] = (), **values: Any) -> str:
        return portal().run_sync(update(runtime, clear_fields, **values), context=copy_context())

    return StructuredTool.from_function(
        func=update_sync,
        coroutine=update,
        name="update_user_profile",
        description=(
            "Remember lasting facts about the user for future conversations, or forget them. "
            "Call it when the user states or corrects one of these fields."
        ),
        args_schema=arguments,
        infer_schema=False,
        handle_tool_error=True,
    )


def _confirmation(receipts: Sequence[dict[str, Any]]) -> str:
    """What the database did, in words for the agent."""
    words = {
        "created": "Saved",
        "updated": "Updated",
        "unchanged": "Already known",
        "retired": "Forgot",
        "absent": "Was not known",
    }
    return "; ".join(
        f"{words[receipt['status']]}: {receipt['field']}"
        + (f" = {receipt['content']}" if receipt["status"] not in ("retired", "absent") else "")
        for receipt in receipts
    )
