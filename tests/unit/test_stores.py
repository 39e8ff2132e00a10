"""The stores: what their options refuse, how typed fields keep their types, and what becomes of a model's proposals."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum, StrEnum
from ipaddress import IPv4Address
from typing import Annotated, Any, Literal, Self
from uuid import UUID

import pytest
from langchain_core.tools import ToolException
from pydantic import (
    AnyUrl,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    field_validator,
    model_validator,
)

from agent.errors import ConfigurationError, DatabaseUnavailable, IdentityError, InvalidLearning
from agent.identity import Identity
from agent.learning.extraction import extraction_schema
from agent.learning.machine import LearningMachine
from agent.settings import Settings, WorkerMode
from agent.stores.base import Evidence, Known, LearningMode, Memory, Store, display, trust_of
from agent.stores.conversation import CONVERSATION
from agent.stores.session_context import SessionContextConfig, SessionContextStore
from agent.stores.user_memory import UserMemoryConfig, UserMemoryStore
from agent.stores.user_profile import UserProfile, UserProfileConfig, UserProfileStore

ADA = Identity(user_id="ada", session_id="t1")
SAID = Evidence(run_id="r1", message_id="m1", quote="so I said")


class Plan(StrEnum):
    FREE = "free"
    PRO = "pro"


class Level(Enum):
    LOW = 1
    HIGH = 2


class Address(BaseModel):
    street: str
    number: int
    postcode: str | None = None


class Customer(BaseModel):
    """A schema with every kind of field."""

    name: str | None = None
    age: Annotated[int, Field(ge=0, le=150)] | None = Field(default=None, description="Age in years")
    seats: int = Field(default=1, ge=1)
    is_vip: bool = False
    score: float | None = None
    born_on: date | None = None
    seen_at: datetime | None = None
    wakes_at: time | None = None
    patience: timedelta | None = None
    balance: Decimal | None = None
    languages: list[str] = []
    limits: dict[str, int] = {}
    address: Address | None = None
    addresses: list[Address] = []
    plan: Plan | None = None
    level: Level | None = None
    colour: Literal["red", "green"] | None = None
    code: str | None = Field(default=None, pattern=r"^[A-Z]{3}$")
    website: AnyUrl | None = None
    machine: IPv4Address | None = None
    account: UUID | None = None
    anything: Any = None
    pair: tuple[int, str] | None = None
    tags: set[str] = set()
    required: int


@pytest.fixture
def customer() -> UserProfileStore:
    return UserProfileStore(UserProfileConfig(schema=Customer))


def finding(*found: Evidence) -> Callable[[Sequence[str]], list[Evidence]]:
    """Looks up `r1.m1` and nothing else."""
    return lambda references: list(found) if "r1.m1" in references else []


def answer(*stores: Store, **parts: Any) -> Any:
    """What a model answers, read as the extraction reads it."""
    schema = extraction_schema(stores)
    assert schema is not None
    return schema.model_validate(parts)


# --- options ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (
            lambda: UserProfileConfig(mode=LearningMode.PROPOSE),
            ["user_profile", "PROPOSE", "ALWAYS", "AGENTIC"],
        ),
        (lambda: UserProfileConfig(mode=LearningMode.HITL), ["user_profile", "HITL", "ALWAYS"]),
        (lambda: UserProfileConfig(mode="always"), ["user_profile", "'always'"]),  # type: ignore[arg-type]
        (lambda: UserProfileConfig(mode=None), ["user_profile", "None"]),  # type: ignore[arg-type]
        (
            lambda: UserMemoryConfig(mode=LearningMode.PROPOSE),
            ["user_memory", "PROPOSE", "ALWAYS", "AGENTIC"],
        ),
        (lambda: UserMemoryConfig(mode=LearningMode.HITL), ["user_memory", "HITL"]),
        (lambda: SessionContextConfig(mode=LearningMode.AGENTIC), ["session_context", "AGENTIC", "ALWAYS"]),
        (lambda: SessionContextConfig(mode=LearningMode.HITL), ["session_context", "HITL", "ALWAYS"]),
        (lambda: UserMemoryConfig(max_memories=0), ["max_memories=0"]),
        (lambda: UserMemoryConfig(max_memories=-1), ["max_memories=-1"]),
        (lambda: UserMemoryConfig(max_memories="5"), ["max_memories='5'"]),  # type: ignore[arg-type]
        (lambda: UserMemoryConfig(max_memories=2.5), ["max_memories=2.5"]),  # type: ignore[arg-type]
        (lambda: UserMemoryConfig(max_memories=True), ["max_memories=True"]),
        (lambda: UserMemoryConfig(memory_types=()), ["memory_types=()"]),
        (lambda: UserMemoryConfig(memory_types="fact"), ["memory_types='fact'"]),  # type: ignore[arg-type]
        (lambda: UserMemoryConfig(memory_types=5), ["memory_types=5"]),  # type: ignore[arg-type]
        (lambda: UserMemoryConfig(memory_types=("fact", "")), ["memory_types=", "''"]),
        (lambda: UserMemoryConfig(memory_types=("fact", 7)), ["memory_types=", "7"]),  # type: ignore[arg-type]
        (lambda: UserMemoryConfig(memory_types=("fact", "fact")), ["memory_types=", "twice"]),
        (lambda: UserMemoryConfig(memory_types=(CONVERSATION,)), ["memory_types=", "conversation"]),
        (lambda: SessionContextConfig(enable_planning="yes"), ["enable_planning='yes'"]),  # type: ignore[arg-type]
        (lambda: UserProfileConfig(schema=dict), ["schema=", "dict"]),  # type: ignore[arg-type]
        (lambda: UserProfileConfig(schema=Customer(required=1)), ["schema="]),  # type: ignore[arg-type]
        (lambda: UserProfileConfig(instructions=5), ["instructions=5"]),  # type: ignore[arg-type]
        (lambda: UserMemoryConfig(instructions=None), ["instructions=None"]),  # type: ignore[arg-type]
    ],
)
def test_an_option_that_cannot_be_is_refused_with_its_name_and_value(
    make: Callable[[], object], says: list[str]
) -> None:
    with pytest.raises(ConfigurationError) as caught:
        make()
    assert [word for word in says if word not in str(caught.value)] == []


@pytest.mark.parametrize("config", [UserProfileConfig, UserMemoryConfig, SessionContextConfig])
def test_an_unknown_option_is_refused(config: Any) -> None:
    with pytest.raises(TypeError, match="max_memorys"):
        config(max_memorys=5)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"user_profile": "yes"}, "user_profile='yes'"),
        ({"user_memory": UserProfileConfig()}, "user_memory=UserProfileConfig"),
        ({"session_context": None}, "session_context=None"),
        ({"model": 5}, "model=5"),
        ({"embeddings": object}, "embeddings="),
        ({"settings": {"tenant": "x"}}, "settings="),
        ({"agent_id": ""}, "agent_id=''"),
        ({"agent_id": 7}, "agent_id=7"),
    ],
)
def test_a_machine_refuses_an_argument_of_another_kind(options: dict[str, Any], says: str) -> None:
    settings = options.pop("settings", Settings(worker=WorkerMode.OFF))
    with pytest.raises(ConfigurationError) as caught:
        LearningMachine(settings=settings, **options)
    assert says in str(caught.value)


class _Foreign:
    """Pydantic knows nothing of it."""


class WithForeign(BaseModel):
    model_config = ConfigDict(arbitrary_types_allowed=True)
    thing: _Foreign | None = None


class WithCallable(BaseModel):
    hook: Callable[[], int] | None = None


class WithClearFields(BaseModel):
    clear_fields: list[str] = []


class WithRuntime(BaseModel):
    runtime: str = ""


class Empty(BaseModel):
    pass


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        (WithForeign, "thing"),
        (WithCallable, "hook"),
        (WithClearFields, "clear_fields"),
        (WithRuntime, "runtime"),
        (Empty, "no fields"),
    ],
)
def test_a_schema_that_no_model_could_fill_is_refused_at_once(schema: type[BaseModel], says: str) -> None:
    with pytest.raises(ConfigurationError, match=says) as caught:
        UserProfileConfig(schema=schema)
    assert schema.__name__ in str(caught.value)


def test_stores_that_are_off_are_not_there() -> None:
    machine = LearningMachine(
        settings=Settings(worker=WorkerMode.OFF), user_profile=False, session_context=SessionContextConfig()
    )
    assert [store.name for store in machine.stores] == ["user_memory", "session_context", "conversation"]
    machine = LearningMachine(settings=Settings(worker=WorkerMode.OFF), user_memory=False, conversation=False)
    assert [store.name for store in machine.stores] == ["user_profile", "session_context"]


def test_only_stores_that_learn_after_the_run_are_asked_about() -> None:
    agentic = [
        UserProfileStore(UserProfileConfig(mode=LearningMode.AGENTIC)),
        UserMemoryStore(UserMemoryConfig(mode=LearningMode.AGENTIC)),
    ]
    assert extraction_schema(agentic) is None
    both = extraction_schema([*agentic, SessionContextStore(SessionContextConfig())])
    assert both is not None
    assert list(both.model_fields) == ["session_context"]


def test_only_agentic_stores_have_tools() -> None:
    settings = Settings(worker=WorkerMode.OFF)
    assert LearningMachine(settings=settings).tools == []
    machine = LearningMachine(
        settings=settings,
        user_profile=UserProfileConfig(mode=LearningMode.AGENTIC),
        user_memory=UserMemoryConfig(mode=LearningMode.AGENTIC),
    )
    assert [tool.name for tool in machine.tools] == ["update_user_profile", "save_user_memory"]


def test_the_runtime_is_hidden_from_the_model() -> None:
    machine = LearningMachine(
        settings=Settings(worker=WorkerMode.OFF),
        user_profile=UserProfileConfig(mode=LearningMode.AGENTIC, schema=Customer),
        user_memory=UserMemoryConfig(mode=LearningMode.AGENTIC, memory_types=("fact", "wish")),
    )
    schemas: list[Any] = [tool.tool_call_schema for tool in machine.tools]
    profile, memory = schemas
    assert set(profile.model_json_schema()["properties"]) == {*Customer.model_fields, "clear_fields"}
    assert memory.model_json_schema()["properties"]["memory_type"]["enum"] == ["fact", "wish"]
    assert "runtime" not in json.dumps(profile.model_json_schema())


# --- typed fields -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "given", "value", "shown"),
    [
        ("name", "Ada", "Ada", "Ada"),
        ("age", 36, 36, "36"),
        ("age", "36", 36, "36"),
        ("age", 0, 0, "0"),
        ("seats", 3, 3, "3"),
        ("is_vip", False, False, "no"),
        ("is_vip", True, True, "yes"),
        ("is_vip", "yes", True, "yes"),
        ("score", 0.5, 0.5, "0.5"),
        ("born_on", "1815-12-10", "1815-12-10", "1815-12-10"),
        ("born_on", date(1815, 12, 10), "1815-12-10", "1815-12-10"),
        ("seen_at", "2026-01-02T03:04:05Z", "2026-01-02T03:04:05Z", "2026-01-02T03:04:05Z"),
        ("wakes_at", "07:30", "07:30:00", "07:30:00"),
        ("patience", "PT5M", "PT5M", "PT5M"),
        ("balance", "10.50", "10.50", "10.50"),
        ("languages", ["en", "de"], ["en", "de"], "en, de"),
        ("limits", {"a": 1}, {"a": 1}, '{"a": 1}'),
        (
            "address",
            {"street": "Main", "number": "5"},
            {"street": "Main", "number": 5, "postcode": None},
            '{"street": "Main", "number": 5, "postcode": null}',
        ),
        (
            "address",
            Address(street="Ünter", number=1),
            {"street": "Ünter", "number": 1, "postcode": None},
            "Ünter",
        ),
        (
            "addresses",
            [{"street": "M", "number": 5}],
            [{"street": "M", "number": 5, "postcode": None}],
            '"M"',
        ),
        ("plan", "pro", "pro", "pro"),
        ("plan", Plan.PRO, "pro", "pro"),
        ("level", 2, 2, "2"),
        ("colour", "red", "red", "red"),
        ("code", "ABC", "ABC", "ABC"),
        ("website", "https://example.com/x", "https://example.com/x", "https://example.com/x"),
        ("machine", "10.0.0.1", "10.0.0.1", "10.0.0.1"),
        (
            "account",
            "00000000-0000-0000-0000-000000000007",
            "00000000-0000-0000-0000-000000000007",
            "00000000-0000-0000-0000-000000000007",
        ),
        ("anything", {"x": [1]}, {"x": [1]}, '{"x": [1]}'),
        ("pair", [1, "a"], [1, "a"], "1, a"),
        ("tags", ["one"], ["one"], "one"),
        ("required", 5, 5, "5"),
    ],
)
def test_a_field_keeps_its_type(
    customer: UserProfileStore, field: str, given: Any, value: Any, shown: str
) -> None:
    operation = customer.change(field, given)
    assert operation["value"] == value
    assert type(operation["value"]) is type(value)
    assert shown in operation["content"]
    assert json.loads(json.dumps(operation)) == operation


@pytest.mark.parametrize(
    ("field", "given"),
    [
        ("age", -1),
        ("age", 151),
        ("age", "old"),
        ("age", 1.5),
        ("seats", 0),
        ("is_vip", "perhaps"),
        ("born_on", "yesterday"),
        ("languages", "en"),
        ("languages", [1]),
        ("address", {"street": "Main"}),
        ("address", {"street": "Main", "number": "five"}),
        ("addresses", [{}]),
        ("plan", "gold"),
        ("level", 3),
        ("colour", "blue"),
        ("code", "abc"),
        ("website", "nowhere"),
        ("required", "x"),
        ("required", []),
        ("score", "NaN"),
        ("score", float("inf")),
        ("nickname", "x"),
    ],
)
def test_a_value_that_does_not_fit_its_field_is_refused(
    customer: UserProfileStore, field: str, given: Any
) -> None:
    with pytest.raises(InvalidLearning, match=field):
        customer.change(field, given)


@pytest.mark.parametrize("nothing", [None, "", "  \n"])
@pytest.mark.parametrize("field", ["name", "age", "required", "languages"])
def test_nothing_clears_a_field(customer: UserProfileStore, field: str, nothing: Any) -> None:
    assert customer.change(field, nothing) == {
        "action": "retire", "store": "user_profile", "field": field, "reason": "cleared",
    }  # fmt: skip


@pytest.mark.parametrize(("field", "empty"), [("languages", []), ("limits", {}), ("tags", set())])
def test_an_empty_list_is_knowledge_too(customer: UserProfileStore, field: str, empty: Any) -> None:
    operation = customer.change(field, empty)
    assert operation["action"] == "write"
    assert operation["content"] == "none"
    assert operation["value"] == ({} if empty == {} else [])


def test_a_field_that_is_not_there_cannot_be_cleared(customer: UserProfileStore) -> None:
    with pytest.raises(InvalidLearning, match="nickname"):
        customer.change("nickname", None)


class Strict(BaseModel):
    """Checks that are not in the annotation."""

    model_config = ConfigDict(str_strip_whitespace=True)
    email: str | None = None
    postcode: str | None = None

    @field_validator("email")
    @classmethod
    def _has_at(cls, email: str | None) -> str | None:
        if email is not None and "@" not in email:
            raise ValueError("is no address")
        return email.lower() if email else email

    @field_validator("*", mode="before")
    @classmethod
    def _no_placeholder(cls, value: Any) -> Any:
        if value == "n/a":
            raise ValueError("is a placeholder")
        return value

    @field_validator("postcode", mode="wrap")
    @classmethod
    def _or_unknown(cls, value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        return handler(value) or "?"


def test_validators_of_a_schema_are_held() -> None:
    store = UserProfileStore(UserProfileConfig(schema=Strict))
    assert store.change("email", "ADA@Example.com")["value"] == "ada@example.com"
    with pytest.raises(InvalidLearning, match="is no address"):
        store.change("email", "ada")
    assert store.change("postcode", " 12345 ")["value"] == "12345"
    with pytest.raises(InvalidLearning, match="placeholder"):
        store.change("postcode", "n/a")


class Whole(BaseModel):
    """Checks over several fields, which a profile that is known in part cannot hold."""

    model_config = ConfigDict(frozen=True, extra="forbid", alias_generator=str.upper)
    begins: int
    ends: int

    @field_validator("ends")
    @classmethod
    def _after(cls, ends: int, info: ValidationInfo) -> int:
        if ends < info.data["begins"]:
            raise ValueError("too early")
        return ends

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.begins > self.ends:
            raise ValueError("in the wrong order")
        return self


def test_checks_over_several_fields_do_not_stop_one() -> None:
    store = UserProfileStore(UserProfileConfig(schema=Whole))
    assert store.change("begins", 5)["value"] == 5
    with pytest.raises(InvalidLearning, match="ends"):
        store.change("ends", 4)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("x", "x"),
        (True, "yes"),
        (False, "no"),
        (3, "3"),
        (["a", 1, 2.5], "a, 1, 2.5"),
        ([True, False], "yes, no"),
        ([], "none"),
        ({}, "none"),
        ([{"a": 1}], '[{"a": 1}]'),
        ({"ä": date(2026, 1, 2)}, '{"ä": "2026-01-02"}'),
        (Address(street="M", number=1), '{"street":"M","number":1,"postcode":null}'),
        (None, "None"),
    ],
)
def test_values_are_shown_as_plain_text(value: Any, text: str) -> None:
    assert display(value) == text


def test_a_long_value_is_cut_in_what_is_shown_alone(customer: UserProfileStore) -> None:
    operation = customer.change("name", "x" * 30_000)
    assert len(operation["content"]) == 20_000


# --- proposals of a model ---------------------------------------------------------------------------------------


def profile_memory(field: str, content: str, number: int = 1) -> Memory:
    return Memory(
        memory_id=str(UUID(int=number)), version=2, store="user_profile", content=content, trust="user",
        recorded_at="2026-11-20", field=field,
    )  # fmt: skip


def user_memory(content: str, number: int) -> Memory:
    return Memory(
        memory_id=str(UUID(int=number)), version=number, store="user_memory", content=content, trust="user",
        recorded_at="2026-11-20", kind="fact",
    )  # fmt: skip


def test_a_field_is_set_with_its_evidence() -> None:
    store = UserProfileStore(UserProfileConfig())
    said = answer(store, user_profile=[{"field": "name", "value": "Ada", "evidence": ["r1.m1"]}])
    proposed = store.operations(said.user_profile, finding(SAID), Known(), ADA)
    assert proposed.operations == [
        {
            "action": "write", "store": "user_profile", "field": "name", "content": "Ada", "value": "Ada",
            "trust": "user", "source": "extraction", "run_id": "r1", "evidence": [SAID.as_json()],
        }
    ]  # fmt: skip
    assert proposed.refused == []


def test_what_has_no_evidence_is_refused_and_the_rest_is_kept() -> None:
    store = UserProfileStore(UserProfileConfig())
    said = answer(
        store,
        user_profile=[
            {"field": "name", "value": "Eve", "evidence": ["r9.m9"]},
            {"field": "role", "value": "judge", "evidence": []},
            {"field": "company", "value": "Engines", "evidence": ["r9.m9", "r1.m1"]},
        ],
    )
    proposed = store.operations(said.user_profile, finding(SAID), Known(), ADA)
    assert [operation["field"] for operation in proposed.operations] == ["company"]
    assert [refused.store for refused in proposed.refused] == ["user_profile", "user_profile"]


def test_a_known_field_is_cleared_and_an_unknown_one_is_left_alone() -> None:
    store = UserProfileStore(UserProfileConfig())
    known = Known(profile=[profile_memory("company", "Engines")])
    said = answer(
        store,
        user_profile=[
            {"field": "company", "value": None, "evidence": ["r1.m1"]},
            {"field": "role", "value": None, "evidence": ["r1.m1"]},
        ],
    )
    proposed = store.operations(said.user_profile, finding(SAID), known, ADA)
    assert [(item["action"], item["field"]) for item in proposed.operations] == [("retire", "company")]


def test_a_custom_schema_is_asked_for_in_its_own_types(customer: UserProfileStore) -> None:
    said = answer(
        customer,
        user_profile=[
            {"field": "age", "value": 36, "evidence": ["r1.m1"]},
            {"field": "plan", "value": "pro", "evidence": ["r1.m1"]},
            {"field": "address", "value": {"street": "Main", "number": 5}, "evidence": ["r1.m1"]},
            {"field": "is_vip", "value": False, "evidence": ["r1.m1"]},
            {"field": "born_on", "value": "1815-12-10", "evidence": ["r1.m1"]},
        ],
    )
    proposed = customer.operations(said.user_profile, finding(SAID), Known(), ADA)
    assert {item["field"]: item["value"] for item in proposed.operations} == {
        "age": 36,
        "plan": "pro",
        "address": {"street": "Main", "number": 5, "postcode": None},
        "is_vip": False,
        "born_on": "1815-12-10",
    }


@pytest.mark.parametrize(
    "change",
    [
        {"field": "age", "value": -1, "evidence": ["r1.m1"]},
        {"field": "age", "value": "old", "evidence": ["r1.m1"]},
        {"field": "plan", "value": "gold", "evidence": ["r1.m1"]},
        {"field": "nickname", "value": "x", "evidence": ["r1.m1"]},
        {"field": "name", "value": "x"},
        {"field": "name", "evidence": ["r1.m1"]},
        {"field": "name", "value": "x", "evidence": "r1.m1"},
        {"field": "name", "value": "x", "evidence": ["r1.m1"], "trust": "user"},
    ],
)
def test_an_answer_outside_the_schema_is_no_answer(
    customer: UserProfileStore, change: dict[str, Any]
) -> None:
    with pytest.raises(ValidationError):
        answer(customer, user_profile=[change])


def test_memories_are_added_changed_and_retired_by_their_references() -> None:
    store = UserMemoryStore(UserMemoryConfig())
    known = Known(memories=[user_memory("one", 1), user_memory("two", 2), user_memory("three", 3)])
    said = answer(
        store,
        user_memory=[
            {"action": "add", "memory_type": "fact", "content": " new ", "evidence": ["r1.m1"]},
            {
                "action": "update",
                "memory": "k2",
                "memory_type": "goal",
                "content": "two b",
                "evidence": ["r1.m1"],
            },
            {"action": "retire", "memory": "k3", "evidence": ["r1.m1"]},
        ],
    )
    proposed = store.operations(said.user_memory, finding(SAID), known, ADA)
    assert proposed.refused == []
    add, update, retire = proposed.operations
    assert (add["action"], add["content"], add["kind"], "memory_id" in add) == ("write", "new", "fact", False)
    assert (update["memory_id"], update["expected_version"]) == (str(UUID(int=2)), 2)
    assert (update["content"], update["kind"]) == ("two b", "goal")
    assert (retire["action"], retire["memory_id"], retire["expected_version"]) == (
        "retire",
        str(UUID(int=3)),
        3,
    )


@pytest.mark.parametrize("reference", ["k0", "k2", "k-1", "1", "", "K1x", str(UUID(int=1)), "r1.m1"])
@pytest.mark.parametrize("action", ["update", "retire"])
def test_a_memory_that_was_not_shown_cannot_be_changed(action: str, reference: str) -> None:
    store = UserMemoryStore(UserMemoryConfig())
    more = {"memory_type": "fact", "content": "x"} if action == "update" else {}
    said = answer(store, user_memory=[{"action": action, "memory": reference, "evidence": ["r1.m1"], **more}])
    proposed = store.operations(said.user_memory, finding(SAID), Known(memories=[user_memory("one", 1)]), ADA)
    assert proposed.operations == []
    assert len(proposed.refused) == 1


def test_a_memory_is_changed_once_in_one_answer() -> None:
    store = UserMemoryStore(UserMemoryConfig())
    change = {"action": "update", "memory": "k1", "memory_type": "fact", "evidence": ["r1.m1"]}
    said = answer(store, user_memory=[{**change, "content": "a"}, {**change, "content": "b"}])
    proposed = store.operations(said.user_memory, finding(SAID), Known(memories=[user_memory("one", 1)]), ADA)
    assert [item["content"] for item in proposed.operations] == ["a"]
    assert len(proposed.refused) == 1


@pytest.mark.parametrize("content", ["", "  \n ", "x" * 2001])
def test_a_memory_without_words_or_with_too_many_is_refused(content: str) -> None:
    store = UserMemoryStore(UserMemoryConfig())
    said = answer(
        store,
        user_memory=[{"action": "add", "memory_type": "fact", "content": content, "evidence": ["r1.m1"]}],
    )
    proposed = store.operations(said.user_memory, finding(SAID), Known(), ADA)
    assert proposed.operations == []
    assert len(proposed.refused) == 1


@pytest.mark.parametrize("memory_type", ["opinion", "conversation", "", None])
def test_only_types_of_the_configuration_are_taken(memory_type: str | None) -> None:
    store = UserMemoryStore(UserMemoryConfig(memory_types=("fact",)))
    with pytest.raises(ValidationError):
        answer(
            store,
            user_memory=[
                {"action": "add", "memory_type": memory_type, "content": "x", "evidence": ["r1.m1"]}
            ],
        )


def test_a_session_keeps_a_summary_and_with_planning_more() -> None:
    said = {
        "summary": "Refund.",
        "goal": "Money back",
        "plan": "1. ask",
        "progress": " ",
        "evidence": ["r1.m1"],
    }
    store = SessionContextStore(SessionContextConfig(enable_planning=True))
    proposed = store.operations(
        answer(store, session_context=said).session_context, finding(SAID), Known(), ADA
    )
    assert {item["field"]: item["content"] for item in proposed.operations} == {
        "summary": "Refund.",
        "goal": "Money back",
        "plan": "1. ask",
    }
    assert {item["session_id"] for item in proposed.operations} == {"t1"}
    assert {item["trust"] for item in proposed.operations} == {"model"}
    plain = SessionContextStore(SessionContextConfig())
    with pytest.raises(ValidationError):
        answer(plain, session_context=said)


@pytest.mark.parametrize(
    ("part", "identity", "refused"),
    [
        (None, ADA, 0),
        ({"summary": "x", "evidence": []}, ADA, 1),
        ({"summary": "x", "evidence": ["r1.m1"]}, Identity(user_id="ada"), 1),
        ({"summary": "x" * 4001, "evidence": ["r1.m1"]}, ADA, 1),
        ({"summary": None, "evidence": ["r1.m1"]}, ADA, 0),
        ({"summary": " ", "evidence": ["r1.m1"]}, ADA, 0),
    ],
)
def test_a_summary_that_cannot_be_kept_is_not(part: Any, identity: Identity, refused: int) -> None:
    store = SessionContextStore(SessionContextConfig())
    proposed = store.operations(
        answer(store, session_context=part).session_context, finding(SAID), Known(), identity
    )
    assert proposed.operations == []
    assert len(proposed.refused) == refused


def test_the_least_trusted_evidence_gives_the_label() -> None:
    tool = Evidence(run_id="r1", message_id="m2", tool_call_id="c1")
    assert trust_of([SAID]) == "user"
    assert trust_of([SAID, tool]) == "tool"


def test_a_quote_is_cut() -> None:
    assert len(Evidence(run_id="r", quote="x" * 5000).as_json()["quote"]) == 1000


def test_a_model_may_learn_nothing() -> None:
    stores = [UserProfileStore(UserProfileConfig()), UserMemoryStore(UserMemoryConfig())]
    nothing = answer(*stores)
    for store in stores:
        assert store.operations(getattr(nothing, store.name), finding(SAID), Known(), ADA).operations == []


# --- tools ------------------------------------------------------------------------------------------------------


class Writer:
    """In the database's place: keeps what it is given and answers with a receipt each, or an error."""

    def __init__(self, error: Exception | None = None, status: str = "created") -> None:
        self.learnings: list[dict[str, Any]] = []
        self.error = error
        self.status = status

    async def __call__(self, runtime: Any, learnings: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        if self.error is not None:
            raise self.error
        self.learnings += learnings
        return [
            {
                "status": "retired" if item["action"] == "retire" else self.status,
                "memory_id": str(UUID(int=1)),
                "field": item.get("field"),
                "content": item.get("content"),
            }
            for item in learnings
        ]


def tool_of(store: Store, writer: Writer) -> Callable[..., Any]:
    (tool,) = store.tools(writer)
    coroutine = getattr(tool, "coroutine", None)
    assert coroutine is not None

    async def call(**arguments: Any) -> str:
        said: str = await coroutine(None, **arguments)
        return said

    return call


@pytest.fixture
def update_profile() -> Callable[[Writer], Callable[..., Any]]:
    store = UserProfileStore(UserProfileConfig(mode=LearningMode.AGENTIC, schema=Customer))
    return lambda writer: tool_of(store, writer)


async def test_the_profile_tool_sets_and_clears_with_types(update_profile: Any) -> None:
    writer = Writer()
    said = await update_profile(writer)(age=36, is_vip=False, clear_fields=["name"])
    assert said == "Saved: age = 36; Saved: is_vip = no; Forgot: name"
    assert [(item["action"], item["field"], item.get("value")) for item in writer.learnings] == [
        ("write", "age", 36),
        ("write", "is_vip", False),
        ("retire", "name", None),
    ]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({}, "no field"),
        ({"name": "x", "clear_fields": ["name"]}, "set and cleared"),
        ({"age": -5}, "age"),
        ({"clear_fields": ["nickname"]}, "nickname"),
    ],
)
async def test_the_profile_tool_says_what_it_did_not_do(
    update_profile: Any, arguments: dict[str, Any], says: str
) -> None:
    writer = Writer()
    with pytest.raises(ToolException, match=f"Nothing was saved.*{says}"):
        await update_profile(writer)(**arguments)
    assert writer.learnings == []


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (IdentityError("secret detail"), "who the user is"),
        (DatabaseUnavailable("secret detail"), "cannot be reached"),
        (InvalidLearning("secret detail"), "refused"),
    ],
)
async def test_a_tool_tells_the_agent_what_went_wrong_in_chosen_words(error: Exception, says: str) -> None:
    save = tool_of(UserMemoryStore(UserMemoryConfig(mode=LearningMode.AGENTIC)), Writer(error))
    with pytest.raises(ToolException, match=says) as caught:
        await save(content="Likes tea")
    assert "secret detail" not in str(caught.value)
    assert str(caught.value).startswith("Nothing was saved")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"content": "x", "memory_type": "opinion"}, "opinion"),
        ({"content": " \n"}, "empty"),
    ],
)
async def test_the_memory_tool_refuses_what_its_store_does_not_take(
    arguments: dict[str, Any], says: str
) -> None:
    writer = Writer()
    save = tool_of(UserMemoryStore(UserMemoryConfig(mode=LearningMode.AGENTIC)), writer)
    with pytest.raises(ToolException, match=says):
        await save(**arguments)
    assert writer.learnings == []


async def test_the_memory_tool_answers_from_the_receipt() -> None:
    store = UserMemoryStore(UserMemoryConfig(mode=LearningMode.AGENTIC))
    assert await tool_of(store, Writer())(content=" Likes tea ") == "Saved (memory 00000000): Likes tea"
    known = await tool_of(store, Writer(status="unchanged"))(content="Likes tea")
    assert known.startswith("Already known")


def test_the_default_profile_has_the_promised_fields() -> None:
    assert list(UserProfile.model_fields) == [
        "name", "preferred_name", "role", "company", "location", "language", "timezone", "preferences",
    ]  # fmt: skip
