"""Who a run is for: in which order the sources count, what an id may be, and what a bad one is told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st
from langchain.agents import create_agent
from pydantic import BaseModel

from agent.database.protocol import Database
from agent.errors import CallerError, ConfigurationError, IdentityError
from agent.identity import Identity
from agent.learning.machine import LearningMachine
from agent.learning.run_identity import resolve_identity
from agent.portal import portal
from agent.settings import Settings, WorkerMode
from agent.testing import ScriptedChat

AWKWARD = [
    "ada@example.com",
    "a.b.c",
    'O\'Brien "the" user',
    "👩‍👩‍👧 Zoë",
    "100%_user",
    "../../etc/passwd",
    "a\nb",
    "\\",
    "-- drop",
    "x" * 512,
    " padded ",
    "0",
]


# --- what an id may be ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("user_id", AWKWARD)
def test_an_awkward_id_is_an_id_like_others(user_id: str) -> None:
    identity = Identity(user_id=user_id)
    assert identity.user_id == user_id
    assert Identity.from_json(identity.as_json()) == identity


@pytest.mark.parametrize("name", ["tenant_id", "user_id", "session_id", "agent_id", "run_id"])
@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("", "empty"),
        (" \t\n", "empty"),
        ("\u2003", "empty"),
        ("a\x00b", "NUL"),
        ("x" * 513, "513"),
        ("👩" * 201, "804 bytes"),
        (42, "int"),
        (b"ada", "bytes"),
    ],
)
def test_an_id_that_cannot_be_is_refused_by_name(name: str, value: Any, says: str) -> None:
    with pytest.raises(IdentityError) as caught:
        Identity(**{name: value})
    assert name in str(caught.value)
    assert says in str(caught.value)
    assert isinstance(caught.value, CallerError)


def test_half_a_character_is_refused() -> None:
    """A lone surrogate would be stored as another character: two users would become one."""
    with pytest.raises(IdentityError, match="user_id"):
        Identity(user_id="ada\ud800")


def test_an_identity_has_a_tenant() -> None:
    with pytest.raises(IdentityError, match="tenant_id"):
        Identity(tenant_id=None)  # type: ignore[arg-type]


def test_an_unknown_key_is_refused() -> None:
    with pytest.raises(IdentityError, match="usr"):
        Identity.from_json({"usr": "ada"})


@pytest.mark.parametrize("character", ["x", " ", "\x00", "\ud800"])
def test_a_refusal_stays_short(character: str) -> None:
    with pytest.raises(IdentityError) as caught:
        Identity(user_id=character * 1_000_000)
    assert len(str(caught.value)) < 500


@given(st.text(max_size=600))
def test_every_text_is_an_id_or_is_refused(text: str) -> None:
    try:
        identity = Identity(user_id=text)
    except IdentityError:
        return
    assert identity.as_json()["user_id"] == text
    assert text.encode().decode() == text


# --- where it comes from ----------------------------------------------------------------------------------------


@dataclass
class Context:
    user_id: str | None = None
    tenant_id: str | None = None


class PydanticContext(BaseModel):
    user_id: str | None = None
    tenant_id: str | None = None


class AuthenticatedUser:
    """As LangGraph's server has it: attributes and items."""

    def __init__(self, **facts: Any) -> None:
        self._facts = facts
        self.identity = facts.get("identity")

    def __getitem__(self, name: str) -> Any:
        return self._facts[name]


def runtime_of(*, user: Any = None, context: Any = None, thread_id: str | None = None) -> Any:
    return SimpleNamespace(
        server_info=SimpleNamespace(user=user) if user is not None else None,
        context=context,
        execution_info=SimpleNamespace(thread_id=thread_id, run_id=None),
    )


def resolved(
    *,
    runtime: Any = None,
    configurable: Mapping[str, Any] | None = None,
    metadata: Mapping[str, Any] | None = None,
    default_user: str | None = "default-user",
    agent_id: str | None = None,
    claimed: Identity | None = None,
) -> Identity:
    settings = Settings(tenant="settings-tenant", default_user=default_user)
    config: Any = {"configurable": dict(configurable or {}), "metadata": dict(metadata or {})}
    return resolve_identity(settings, config, runtime or runtime_of(), agent_id=agent_id, claimed=claimed)


CONTEXT = Context(user_id="context-user", tenant_id="context-tenant")
CONFIGURABLE = {"user_id": "configurable-user", "tenant_id": "configurable-tenant"}
AUTHENTICATED = AuthenticatedUser(identity="authenticated-user", tenant_id="authenticated-tenant")
CLAIMED = Identity(user_id="claimed-user", tenant_id="claimed-tenant")


@pytest.mark.parametrize(
    ("sources", "user_id", "tenant_id"),
    [
        ("claimed authenticated context configurable", "claimed-user", "claimed-tenant"),
        ("authenticated context configurable", "authenticated-user", "authenticated-tenant"),
        ("context configurable", "context-user", "context-tenant"),
        ("configurable", "configurable-user", "configurable-tenant"),
        ("", "default-user", "settings-tenant"),
        ("authenticated", "authenticated-user", "authenticated-tenant"),
        ("context", "context-user", "context-tenant"),
    ],
)
def test_the_surest_source_counts_and_brings_its_tenant(sources: str, user_id: str, tenant_id: str) -> None:
    given = sources.split()
    identity = resolved(
        runtime=runtime_of(
            user=AUTHENTICATED if "authenticated" in given else None,
            context=CONTEXT if "context" in given else None,
        ),
        configurable=CONFIGURABLE if "configurable" in given else None,
        claimed=CLAIMED if "claimed" in given else None,
    )
    assert (identity.user_id, identity.tenant_id) == (user_id, tenant_id)


def test_nobody_is_nobody() -> None:
    identity = resolved(default_user=None)
    assert identity.user_id is None
    assert not identity.is_somebody
    assert identity.tenant_id == "settings-tenant"


@pytest.mark.parametrize(
    "user",
    [
        AuthenticatedUser(identity="ada"),
        AuthenticatedUser(identity="ada", tenant_id=""),
        {"identity": "ada"},
        SimpleNamespace(identity="ada"),
    ],
)
def test_an_authenticated_user_cannot_choose_a_tenant(user: Any) -> None:
    identity = resolved(runtime=runtime_of(user=user, context=CONTEXT), configurable=CONFIGURABLE)
    assert (identity.user_id, identity.tenant_id) == ("ada", "settings-tenant")


def test_an_authenticated_user_without_a_name_is_nobody_whoever_the_caller_names() -> None:
    identity = resolved(
        runtime=runtime_of(user=AuthenticatedUser(identity=""), context=CONTEXT), configurable=CONFIGURABLE
    )
    assert not identity.is_somebody


def test_the_tenant_of_a_source_that_names_no_user_does_not_count() -> None:
    identity = resolved(
        runtime=runtime_of(context=Context(tenant_id="context-tenant")),
        configurable={"user_id": "ada"},
    )
    assert (identity.user_id, identity.tenant_id) == ("ada", "settings-tenant")


@pytest.mark.parametrize(
    "context",
    [
        {"user_id": "ada", "tenant_id": "acme"},
        Context(user_id="ada", tenant_id="acme"),
        PydanticContext(user_id="ada", tenant_id="acme"),
        SimpleNamespace(user_id="ada", tenant_id="acme"),
    ],
)
def test_a_context_may_be_a_dict_or_an_object(context: Any) -> None:
    identity = resolved(runtime=runtime_of(context=context))
    assert (identity.user_id, identity.tenant_id) == ("ada", "acme")


@pytest.mark.parametrize("context", [{}, "ada", 42, ["user_id"], SimpleNamespace(), object()])
def test_a_context_of_another_kind_names_nobody(context: Any) -> None:
    assert resolved(runtime=runtime_of(context=context)).user_id == "default-user"


@pytest.mark.parametrize(
    ("given", "stored"),
    [
        (42, "42"),
        (0, "0"),
        (UUID(int=7), "00000000-0000-0000-0000-000000000007"),
        *((text, text) for text in AWKWARD),
    ],
)
def test_an_id_of_the_caller_is_kept_as_text(given: Any, stored: str) -> None:
    assert resolved(configurable={"user_id": given}).user_id == stored
    assert resolved(runtime=runtime_of(context={"user_id": given})).user_id == stored


@pytest.mark.parametrize("where", ["context", "configurable", "authenticated"])
@pytest.mark.parametrize(
    ("bad", "says"), [("a\x00", "NUL"), ("x" * 513, "513"), ("  ", "empty"), (["ada"], "list"), ({}, "dict")]
)
def test_a_bad_id_is_refused_wherever_it_comes_from(where: str, bad: Any, says: str) -> None:
    user = AuthenticatedUser(identity=bad) if where == "authenticated" else None
    context = {"user_id": bad} if where == "context" else None
    configurable = {"user_id": bad} if where == "configurable" else None
    with pytest.raises(IdentityError, match=says):
        resolved(runtime=runtime_of(user=user, context=context), configurable=configurable)


def test_a_bad_tenant_is_refused() -> None:
    with pytest.raises(IdentityError, match="tenant_id"):
        resolved(configurable={"user_id": "ada", "tenant_id": "a\x00"})


def test_the_session_is_the_thread() -> None:
    assert resolved(configurable={"thread_id": "t1"}).session_id == "t1"
    assert resolved(runtime=runtime_of(thread_id="t2")).session_id == "t2"


def test_runs_without_a_thread_are_sessions_of_their_own() -> None:
    first, second = resolved(), resolved()
    assert first.session_id
    assert second.session_id
    assert first.session_id != second.session_id


@pytest.mark.parametrize(
    ("agent_id", "metadata", "expected"),
    [
        ("mine", {"lc_agent_name": "shop", "graph_id": "g"}, "mine"),
        (None, {"lc_agent_name": "shop", "graph_id": "g"}, "shop"),
        (None, {"graph_id": "g"}, "g"),
        (None, {}, "agent"),
    ],
)
def test_the_agent_is_named_by_the_machine_the_agent_or_the_graph(
    agent_id: str | None, metadata: dict[str, str], expected: str
) -> None:
    assert resolved(agent_id=agent_id, metadata=metadata).agent_id == expected


def test_on_a_server_the_agent_is_not_named_by_metadata_that_clients_write() -> None:
    runtime = SimpleNamespace(
        context=None, execution_info=None, server_info=SimpleNamespace(user=None, graph_id="g")
    )
    forged = {"lc_agent_name": "shop", "graph_id": "other"}
    assert resolved(runtime=runtime, metadata=forged).agent_id == "g"


# --- through an agent -------------------------------------------------------------------------------------------


class RecordingDatabase(Database):
    """Knows nothing and keeps whom it was asked for."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Identity | None]] = []

    async def _call(self, function: str, identity: Identity | None = None, /, **arguments: Any) -> Any:
        self.calls.append((function, identity))
        if function == "recall_context":
            return {"profile": [], "session": [], "memories": []}
        return {}

    async def _close(self) -> None:
        """Nothing is open."""


def machine_on(database: RecordingDatabase) -> LearningMachine:
    return LearningMachine(database=database, settings=Settings(worker=WorkerMode.OFF))


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize(
    ("schema", "context"),
    [
        (None, {"user_id": "ada", "tenant_id": "acme"}),
        (Context, Context(user_id="ada", tenant_id="acme")),
        (PydanticContext, PydanticContext(user_id="ada", tenant_id="acme")),
    ],
)
async def test_a_run_of_an_agent_is_for_the_user_of_its_context(
    is_async: bool, schema: Any, context: Any
) -> None:
    database = RecordingDatabase()
    machine = machine_on(database)
    agent: Any = create_agent(
        ScriptedChat(script=["Hello."]),
        [],
        middleware=[machine.middleware()],
        context_schema=schema,
    )
    config = {"configurable": {"thread_id": "t", "user_id": "eve"}}
    given = {"messages": [("user", "Hi")]}
    if is_async:
        await agent.ainvoke(given, config, context=context)
    else:
        agent.invoke(given, config, context=context)
    await portal().run(machine.recorded_all())
    # What seals the run is asked for once in the life of a process.
    assert [function for function, _ in database.calls] == ["server_secret", "recall_context", "record_run"]
    assert {(who.tenant_id, who.user_id, who.session_id) for _, who in database.calls if who} == {
        ("acme", "ada", "t")
    }


def test_a_run_for_nobody_reads_and_writes_nothing() -> None:
    database = RecordingDatabase()
    machine = machine_on(database)
    agent: Any = create_agent(ScriptedChat(script=["Hello."]), [], middleware=[machine.middleware()])
    agent.invoke({"messages": [("user", "Hi")]})
    portal().run_sync(machine.recorded_all())
    assert database.calls == []


def test_a_run_for_a_user_who_cannot_be_says_so() -> None:
    agent: Any = create_agent(
        ScriptedChat(script=["Hello."]), [], middleware=[machine_on(RecordingDatabase()).middleware()]
    )
    with pytest.raises(IdentityError, match="NUL"):
        agent.invoke({"messages": [("user", "Hi")]}, {"configurable": {"user_id": "a\x00b"}})


async def test_storage_operations_refuse_nobody() -> None:
    machine = machine_on(RecordingDatabase())
    nobody = Identity()
    with pytest.raises(IdentityError):
        await machine.get_learnings(identity=nobody)
    with pytest.raises(IdentityError):
        await machine.clear_learnings(identity=nobody)
    with pytest.raises(IdentityError):
        await machine.upsert_learning(identity=nobody, store="user_memory", content="x")
    with pytest.raises(IdentityError):
        await machine.delete_learnings([], identity="ada")  # type: ignore[arg-type]


def test_a_machine_refuses_what_it_does_not_know() -> None:
    with pytest.raises(TypeError, match="user_profil"):
        LearningMachine(user_profil=True)
    with pytest.raises(ConfigurationError, match="user_profile='yes'"):
        LearningMachine(user_profile="yes")  # type: ignore[arg-type]
