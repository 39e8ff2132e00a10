"""User profile: typed fields about one user, each with one answer at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextvars import copy_context
from dataclasses import dataclass
from inspect import signature
from typing import Annotated, Any, ClassVar, Literal

from langchain.tools import ToolRuntime
from langchain_core.tools import BaseTool, StructuredTool, ToolException
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model, field_validator
from pydantic.errors import PydanticUndefinedAnnotation, PydanticUserError
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
    check_instructions,
    check_mode,
    display,
    is_blank,
    one_of,
    said_by_user,
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
        check_instructions(self, self.instructions)
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
        for name, info in self.schema.model_fields.items():
            try:
                answer_model(name, value=(_annotation(info), ...)).model_json_schema()
            except (PydanticUserError, PydanticUndefinedAnnotation) as error:
                raise ConfigurationError(
                    f"UserProfileConfig(schema={self.schema.__name__}): the field {name!r} has a type that no model "
                    f"can fill, {info.annotation!r}: {error.message}"
                ) from None


class UserProfileStore(Store):
    """Typed fields, one row each; a change is a new version of its row."""

    name: ClassVar[str] = "user_profile"
    section: ClassVar[str] = "user_profile"

    def __init__(self, config: UserProfileConfig) -> None:
        self.config = config
        self._fields: dict[str, type[BaseModel]] = {
            name: _model_of_field(config.schema, name, info)
            for name, info in config.schema.model_fields.items()
        }

    def value_of(self, name: str, value: Any) -> Any:
        """The value as its field's type has it, in JSON terms.

        Raises:
            InvalidLearning: no such field, or a value its type refuses.
        """
        self._check_field(name)
        try:
            stored = self._fields[name].model_validate({name: value}).model_dump(mode="json")[name]
            json.dumps(stored, allow_nan=False)
        except ValidationError as error:
            reason = "; ".join(fault["msg"] for fault in error.errors(include_url=False, include_input=False))
        except Exception as error:  # noqa: BLE001 - a schema's own validators may raise anything
            reason = f"{type(error).__name__}: {error}"
        else:
            return stored
        raise InvalidLearning(f"user_profile field {name!r} does not take {value!r}: {reason}")

    def _check_field(self, name: str) -> None:
        if name not in self._fields:
            raise InvalidLearning(f"user_profile has no field {name!r}; it has {', '.join(self._fields)}")

    def change(self, name: str, value: Any, **more: Any) -> dict[str, Any]:
        """The operation that sets one field, or clears it where the value is `None` or empty text.

        Raises:
            InvalidLearning: as in `value_of`.
        """
        if value is None or (isinstance(value, str) and is_blank(value)):
            self._check_field(name)
            return {"action": "retire", "store": self.name, "field": name, "reason": "cleared", **more}
        typed = self.value_of(name, value)
        content = display(typed)
        if is_blank(content):
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
            if not said_by_user(found):
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
            except InvalidLearning:  # its words hold the value, and the reason goes into logs
                reason = f"{change.field}: the value does not fit its type"
                proposed.refused.append(Refused(store=self.name, reason=reason))
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


# Options of a schema that are about the whole of it.
_OF_THE_WHOLE = {
    "alias_generator",
    "extra",
    "frozen",
    "json_schema_extra",
    "title",
    "validate_by_alias",
    "validate_by_name",
}


def _model_of_field(schema: type[BaseModel], name: str, info: FieldInfo) -> type[BaseModel]:
    """A model of one field of a schema, with the validators of that field: the others may be unknown."""
    checks: dict[str, Any] = {
        f"check_{attribute}": field_validator(name, mode=found.info.mode)(
            _as_validator(getattr(schema, attribute), found.info.mode)
        )
        for attribute, found in schema.__pydantic_decorators__.field_validators.items()
        if name in found.info.fields or "*" in found.info.fields
    }
    config: Any = {key: value for key, value in schema.model_config.items() if key not in _OF_THE_WHOLE}
    field: Any = {name: (_annotation(info), ...)}
    return create_model(f"{schema.__name__}_{name}", __config__=config, __validators__=checks, **field)


def _as_validator(bound: Callable[..., Any], mode: str) -> Callable[..., Any]:
    """A validator of one class as a validator of another, with or without its optional `info`."""
    taken = len(signature(bound).parameters)

    def check(cls: type, value: Any, info: Any) -> Any:
        return bound(*(value, info)[:taken])

    def check_around(cls: type, value: Any, handler: Any, info: Any) -> Any:
        return bound(*(value, handler, info)[:taken])

    return check_around if mode == "wrap" else check


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
