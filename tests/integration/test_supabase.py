"""The Supabase path against Supabase's own protocol (`@supabase/lite`): a server's key, a user's token, bad ones."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event as Flag
from threading import Thread
from typing import Any
from uuid import uuid4

import httpx
import psycopg
import pytest
from langchain.agents import create_agent
from langchain_core.messages import AIMessage
from pydantic import SecretStr

from agent import Identity, LearningMachine, UserMemoryConfig, UserProfileConfig, listening, with_learning
from agent.database.opening import EmbeddedDatabase, open_database
from agent.database.postgres import PostgresDatabase
from agent.database.supabase import SupabaseDatabase, identity_of_token
from agent.errors import (
    AccessRefused,
    ConfigurationError,
    ConflictError,
    DatabaseUnavailable,
    IdentityError,
    InvalidLearning,
    LearningError,
    MigrationError,
    ModelError,
    NotFound,
    OperatorError,
)
from agent.events import Event
from agent.portal import portal
from agent.settings import Settings, WorkerMode
from agent.stores.base import LearningMode
from agent.testing import ScriptedChat, tool_call
from agent.testing.throwaway import ThrowawayDatabase, throwaway_database
from tests.integration.test_embeddings import FAR, Meanings
from tests.integration.test_extraction import add, learned, said
from tests.supabase_lite import SupabaseLite, supabase_lite_server

pytestmark = pytest.mark.node
RPC = "/rest/v1/rpc/"


class Project:
    """A Supabase project, and whoever is needed in it: each test has users and tenants of its own."""

    def __init__(self, lite: SupabaseLite, database: ThrowawayDatabase) -> None:
        self.lite = lite
        self.database = database

    def server_settings(self, folder: Path, **changes: Any) -> Settings:
        return self.settings(folder, supabase_service_role_key=SecretStr(self.lite.secret_key), **changes)

    def user_settings(self, folder: Path, token: str, **changes: Any) -> Settings:
        return self.settings(
            folder,
            supabase_anon_key=SecretStr(self.lite.publishable_key),
            supabase_access_token=SecretStr(token),
            **changes,
        )

    def settings(self, folder: Path, **changes: Any) -> Settings:
        return Settings.model_validate(
            {
                "supabase_url": self.lite.url, "data_dir": folder, "quiet_period": timedelta(0), "model": "none",
                "embeddings": "none", "worker": WorkerMode.OFF, "recall_timeout": timedelta(seconds=20),
                "embedding_timeout": timedelta(seconds=5), **changes,
            }
        )  # fmt: skip

    def row_counts(self) -> dict[str, int]:
        """Of every table of ours, seen from outside."""
        with psycopg.connect(self.database.url) as connection:
            names = connection.execute(
                "SELECT tablename FROM pg_tables WHERE schemaname = 'public' AND tablename LIKE 'agent_%'"
            ).fetchall()
            return {
                name: connection.execute(f"SELECT count(*) FROM public.{name}").fetchall()[0][0]
                for (name,) in names
            }


@pytest.fixture(scope="module")
def project() -> Iterator[Project]:
    with throwaway_database() as database, supabase_lite_server(database.tcp_url) as lite:
        yield Project(lite, database)


def somebody(**more: Any) -> Identity:
    """A user nobody else has."""
    return Identity(user_id=f"ada-{uuid4().hex[:12]}@example.com", session_id="t1", **more)


@pytest.fixture
def heard() -> Iterator[list[Event]]:
    events: list[Event] = []
    with listening(events.append):
        yield events


Make = Callable[..., LearningMachine]


@pytest.fixture
async def make(project: Project, tmp_path: Path) -> AsyncIterator[Make]:
    """Machines of a server, or of a user whose token is given."""
    made: list[LearningMachine] = []

    def machine(
        token: str | None = None, changes: dict[str, Any] | None = None, **options: Any
    ) -> LearningMachine:
        changes = changes or {}
        settings = (
            project.server_settings(tmp_path, **changes)
            if token is None
            else project.user_settings(tmp_path, token, **changes)
        )
        made.append(LearningMachine(settings=settings, **options))
        return made[-1]

    yield machine
    for one in made:
        await one.aclose()


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch, project: Project) -> list[str]:
    """The paths of all requests to the project."""
    paths: list[str] = []
    send = httpx.AsyncClient.send

    async def sending(self: httpx.AsyncClient, request: httpx.Request, **more: Any) -> httpx.Response:
        assert str(request.url).startswith(project.lite.url)
        paths.append(request.url.path)
        return await send(self, request, **more)

    monkeypatch.setattr(httpx.AsyncClient, "send", sending)
    return paths


def config_of(identity: Identity, thread: str = "t1") -> dict[str, Any]:
    return {
        "configurable": {"thread_id": thread, "user_id": identity.user_id, "tenant_id": identity.tenant_id}
    }


async def ask(agent: Any, identity: Identity, text: str, thread: str = "t1", *, is_async: bool = True) -> str:
    given, config = {"messages": [("user", text)]}, config_of(identity, thread)
    state = (
        await agent.ainvoke(given, config)
        if is_async
        else await asyncio.to_thread(agent.invoke, given, config)
    )
    answer: str = state["messages"][-1].text
    return answer


def echoing(machine: LearningMachine) -> Any:
    """An agent that answers with what it knows."""
    return create_agent(ScriptedChat(script=[_instructions]), [], middleware=[machine.middleware()])


def _instructions(messages: list[Any]) -> str:
    return "\n".join(message.text for message in messages if message.type == "system") or "I know nothing."


async def record(machine: LearningMachine, identity: Identity, *texts: str) -> str:
    run_id = f"run-{uuid4()}"
    run = {"run_id": run_id, "status": "completed", "messages": [said(text, text[:9]) for text in texts]}
    assert await portal().run(machine.record(identity, run))
    return run_id


async def learn(machine: LearningMachine, identity: Identity) -> int:
    return await portal().run(machine.learn_session(identity))


async def contents(machine: LearningMachine, identity: Identity, **wanted: Any) -> list[str]:
    return [memory["content"] for memory in await machine.get_learnings(identity=identity, **wanted)][::-1]


async def said_by(machine: LearningMachine, identity: Identity) -> list[str]:
    """What this user said, as it is remembered."""
    return await contents(machine, identity, store="conversation", kind="user")


# --- a server's key ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_async", [False, True])
async def test_two_conversations_and_two_users_through_rpc_alone(
    make: Make, requests: list[str], is_async: bool
) -> None:
    machine = make(changes={"worker": WorkerMode.AUTO})
    agent = echoing(machine)
    ada, bob = somebody(), somebody()

    assert await ask(agent, ada, "I keep bees", is_async=is_async) == "I know nothing."
    await portal().run(machine.recorded_all())
    assert requests[:3] == [f"{RPC}server_secret", f"{RPC}recall_context", f"{RPC}record_run"]
    await ask(agent, bob, "I keep ants", is_async=is_async)
    assert await machine.drain()
    answers = {
        who.user_id: await ask(agent, who, "What do I keep?", "t2", is_async=is_async) for who in (ada, bob)
    }
    assert "I keep bees" in answers[ada.user_id]
    assert "ants" not in answers[ada.user_id]
    assert "I keep ants" in answers[bob.user_id]
    assert [path for path in requests if not path.startswith(RPC)] == []


async def test_a_run_takes_two_calls(make: Make, requests: list[str]) -> None:
    machine = make()
    agent = echoing(machine)
    ada = somebody()
    for number in range(3):
        await ask(agent, ada, f"thought {number}")
        await portal().run(machine.recorded_all())
    # What states are sealed with is asked for once.
    assert requests == [f"{RPC}server_secret", *[f"{RPC}recall_context", f"{RPC}record_run"] * 3]


async def test_a_graph_of_any_kind_learns_too(make: Make) -> None:
    machine = make(changes={"worker": WorkerMode.AUTO})
    inner = create_agent(ScriptedChat(script=[_instructions]), [])
    graph = with_learning(inner, machine)
    ada = somebody()
    await ask(graph, ada, "I keep bees")
    assert await machine.drain()
    assert "I keep bees" in await ask(graph, ada, "What do I keep?", "t2")


async def test_what_was_said_is_learned_without_waiting_for_anybody(make: Make) -> None:
    machine = make(changes={"worker": WorkerMode.AUTO})
    ada = somebody()
    await ask(echoing(machine), ada, "I keep bees")
    async with asyncio.timeout(60):
        while await said_by(machine, ada) != ["I keep bees"]:  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.05)


async def test_a_model_extracts_and_fields_keep_their_types(make: Make) -> None:
    changes = [
        {"field": "name", "value": "Ada", "evidence": ["r1.m1"]},
        {"field": "company", "value": "Engines", "evidence": ["r1.m1"]},
    ]
    model = ScriptedChat(
        script=[
            learned(user_profile=changes, user_memory=[add("Keeps bees")]),
            learned(
                user_profile=[{"field": "company", "value": None, "evidence": ["r1.m1"]}],
                user_memory=[{"action": "retire", "memory": "k1", "evidence": ["r1.m1"]}],
                session_context={"summary": "Changed jobs.", "evidence": ["r1.m1"]},
            ),
        ]
    )
    machine = make(model=model)
    ada = somebody()
    run_id = await record(machine, ada, "I am Ada of Engines and keep bees")
    assert await learn(machine, ada) == 1
    assert await contents(machine, ada) == ["Ada", "Engines", "Keeps bees"]
    (memory,) = await machine.get_learnings(identity=ada, store="user_memory")
    full = await machine.get_learning(memory["memory_id"], identity=ada)
    assert full is not None
    assert [item["run_id"] for item in full["evidence"]] == [run_id]
    await record(machine, ada, "I left, and the bees are gone")
    assert await learn(machine, ada) == 1
    assert await contents(machine, ada) == ["Ada", "Changed jobs."]


async def test_a_write_in_between_is_a_conflict_here_too(make: Make) -> None:
    ada = somebody()
    other = make()

    def first(messages: list[Any]) -> AIMessage:
        # From a thread, because the portal's own loop waits for this answer.
        thread = Thread(target=lambda: asyncio.run(_write_alone(other, ada)))
        thread.start()
        thread.join()
        return learned(user_memory=[add("decided on stale data")])

    model = ScriptedChat(script=[first, learned(user_memory=[add("decided on fresh data")])])
    machine = make(model=model)
    await record(machine, ada, "Hello")
    assert await learn(machine, ada) == 1
    assert await contents(machine, ada) == ["Likes tea", "decided on fresh data"]
    assert "Likes tea" in model.calls[1].messages[-1].text


async def _write_alone(machine: LearningMachine, identity: Identity) -> None:
    """By an own client, beside the portal."""
    learning = {"action": "write", "store": "user_memory", "content": "Likes tea", "kind": "fact"}
    key = machine.settings.supabase_service_role_key
    assert key is not None
    async with httpx.AsyncClient() as client:
        answer = await client.post(
            f"{machine.settings.supabase_url}{RPC}upsert_learnings",
            json={"identity": identity.as_json(), "learnings": [learning]},
            headers={"apikey": key.get_secret_value()},
        )
    answer.raise_for_status()


async def test_vectors_travel_too(make: Make) -> None:
    machine = make(embeddings=Meanings())
    ada = somebody()
    await record(machine, ada, *FAR)
    await learn(machine, ada)
    assert (await machine.search("tomcat", identity=ada))[0]["content"] == "I adopted a kitten"
    assert (await machine.search("Which physician?", identity=ada))[0][
        "content"
    ] == "Her brother is a surgeon"
    rendered = await portal().run(machine.recall(ada.with_(session_id="t2"), "Which physician?"))
    assert "Her brother is a surgeon" in [memory.content for memory in rendered.shown]


async def test_a_model_that_fails_leaves_the_runs_for_the_next(make: Make, heard: list[Event]) -> None:
    model = ScriptedChat(script=["no", "no", learned(user_memory=[add("Keeps bees", "r1.m1", "r2.m1")])])
    machine = make(model=model, changes={"worker": WorkerMode.AUTO, "quiet_period": timedelta(hours=1)})
    ada = somebody()
    await record(machine, ada, "I keep bees")
    assert await machine.drain() is False
    assert [event.name for event in heard if event.name.endswith("failed")] == ["learning_failed"]
    with pytest.raises(ModelError):
        await learn(machine, ada)
    await record(machine, ada, "Many bees")
    assert await machine.drain()
    assert await contents(machine, ada) == ["Keeps bees"]


async def test_the_tools_of_an_agent_answer_from_the_receipt(make: Make) -> None:
    machine = make(
        user_profile=UserProfileConfig(mode=LearningMode.AGENTIC),
        user_memory=UserMemoryConfig(mode=LearningMode.AGENTIC),
    )
    chat = ScriptedChat(
        script=[
            tool_call("update_user_profile", name="Ada", company="Engines"),
            tool_call("save_user_memory", content="Keeps bees", memory_type="preference"),
            tool_call("update_user_profile", clear_fields=["company"]),
            tool_call("save_user_memory", content="Keeps bees"),
            lambda messages: "\n".join(message.text for message in messages if message.type == "tool"),
        ]
    )
    agent = create_agent(chat, [], middleware=[machine.middleware()])
    ada = somebody()
    told = (await ask(agent, ada, "I am Ada")).splitlines()
    assert told[0] == "Saved: name = Ada; Saved: company = Engines"
    assert told[1].startswith("Saved (memory ")
    assert told[2] == "Forgot: company"
    assert told[3].startswith("Already known")
    assert await contents(machine, ada) == ["Ada", "Keeps bees"]


async def test_every_storage_operation(make: Make) -> None:
    machine = make()
    ada, bob = somebody(), somebody()
    created = await machine.upsert_learning(identity=ada, store="user_memory", content="one", kind="goal")
    memory_id = created["memory_id"]
    updated = await machine.upsert_learning(
        identity=ada, store="user_memory", content="two", memory_id=memory_id, expected_version=1
    )
    assert (created["status"], updated["status"], updated["version"]) == ("created", "updated", 2)
    with pytest.raises(ConflictError):
        await machine.upsert_learning(
            identity=ada, store="user_memory", content="three", memory_id=memory_id, expected_version=1
        )
    with pytest.raises(NotFound):
        await machine.upsert_learning(identity=bob, store="user_memory", content="x", memory_id=memory_id)
    assert await machine.get_learning(memory_id, identity=bob) is None
    assert await machine.delete_learning(memory_id, identity=bob) is False
    full = await machine.get_learning(memory_id, identity=ada)
    assert full is not None
    assert [version["content"] for version in full["versions"]] == ["one", "two"]
    more = [
        (await machine.upsert_learning(identity=ada, store="user_memory", content=text))["memory_id"]
        for text in ("three", "four")
    ]
    await machine.upsert_learning(identity=ada, store="user_profile", field="name", content="Ada")
    assert len(await machine.get_learnings(identity=ada, limit=2, offset=1)) == 2
    assert await contents(machine, ada, kind="fact") == ["three", "four"]
    assert await machine.delete_learnings([more[0], str(uuid4())], identity=ada) == 1
    assert await machine.delete_learning(more[1], identity=ada) is True
    assert await machine.clear_learnings(identity=ada, store="user_profile") == 1
    assert await contents(machine, ada) == ["two"]
    assert await machine.clear_learnings(identity=ada) == 1
    with pytest.raises(IdentityError):
        await machine.clear_learnings(identity=Identity())
    with pytest.raises(InvalidLearning):
        await machine.get_learning("no id", identity=ada)


@pytest.mark.parametrize(
    "user_id",
    ['O\'Brien "x"', "👩‍👩‍👧", "a.b@c", "../x?y=1&z=%00#", "x" * 512, "eq.(1)", "{}", "null", " padded "],
)
async def test_awkward_ids_are_ids_like_others(make: Make, user_id: str) -> None:
    machine = make()
    tenant = uuid4().hex
    who = Identity(tenant_id=tenant, user_id=user_id, session_id=user_id)
    await record(machine, who, "I keep bees")
    assert await learn(machine, who) == 1
    assert await said_by(machine, who) == ["I keep bees"]
    assert await said_by(machine, Identity(tenant_id=tenant, user_id=user_id[:-1] + "!")) == []


async def test_text_of_any_kind_travels(make: Make) -> None:
    machine = make()
    ada = somebody()
    texts = ["NUL \x00 and half \ud83d", "emoji 👩‍👩‍👧 Zoë 日本", "quotes ' \" \\ %s {} $1", "x" * 1_000_000]
    await record(machine, ada, *texts)
    assert await learn(machine, ada) == 1
    kept = await said_by(machine, ada)
    assert kept[:3] == ["NUL \ufffd and half \ufffd", *texts[1:3]]
    assert len(kept[3]) == 20_000


async def test_a_crowd_loses_nothing(make: Make) -> None:
    machine = make()
    ada = somebody()
    await asyncio.gather(*(record(machine, ada, f"thought number {number}") for number in range(20)))
    assert await learn(machine, ada) == 20
    assert sorted(await said_by(machine, ada)) == sorted(f"thought number {number}" for number in range(20))


async def test_a_machine_that_was_closed_opens_again(make: Make) -> None:
    machine = make()
    ada = somebody()
    await machine.upsert_learning(identity=ada, store="user_memory", content="Keeps bees")
    await machine.aclose()
    assert await contents(machine, ada) == ["Keeps bees"]


async def test_a_worker_needs_another_address_and_says_so(make: Make) -> None:
    with pytest.raises(ConfigurationError, match="DATABASE_URL"):
        await make().queue_url()


# --- a user's token ---------------------------------------------------------------------------------------------


async def test_a_token_is_who_one_is_whatever_is_said(make: Make, project: Project) -> None:
    server = make()
    ada, bob = somebody(), somebody()
    await server.upsert_learning(identity=bob, store="user_memory", content="Secret of Bob")
    machine = make(project.lite.access_token(ada.user_id or ""))
    agent = echoing(machine)

    assert await ask(agent, bob, "I keep bees, says somebody as Bob") == "I know nothing."
    assert await contents(machine, bob) == []
    receipt = await machine.upsert_learning(identity=bob, store="user_memory", content="Written as Bob")
    assert receipt["status"] == "created"
    assert "Written as Bob" in await ask(agent, bob, "What do you know?", "t2")
    assert await machine.clear_learnings(identity=bob.with_(tenant_id="acme")) == 1

    await portal().run(machine.recorded_all())
    assert await contents(server, bob) == ["Secret of Bob"]
    assert await learn(server, bob) == 0
    assert await learn(server, ada) == 1
    assert await said_by(server, ada) == ["I keep bees, says somebody as Bob"]


async def test_the_tenant_is_in_the_token(make: Make, project: Project) -> None:
    ada = somebody(tenant_id="acme")
    machine = make(project.lite.access_token(ada.user_id or "", app_metadata={"tenant_id": "acme"}))
    await ask(echoing(machine), Identity(user_id="bob", tenant_id="other"), "I keep bees")
    await portal().run(machine.recorded_all())
    server = make()
    assert await learn(server, ada) == 1
    assert await said_by(server, ada) == ["I keep bees"]
    assert await said_by(server, ada.with_(tenant_id="default")) == []


async def test_a_tenant_that_users_write_themselves_does_not_count(make: Make, project: Project) -> None:
    ada = somebody()
    machine = make(project.lite.access_token(ada.user_id or "", user_metadata={"tenant_id": "acme"}))
    await machine.upsert_learning(identity=ada, store="user_memory", content="Keeps bees")
    server = make()
    assert await contents(server, ada.with_(tenant_id="acme")) == []
    assert await contents(server, ada) == ["Keeps bees"]


async def test_a_user_who_signed_up_remembers(make: Make, project: Project) -> None:
    user_id, token = project.lite.sign_up(f"{uuid4().hex}@example.com", "correct horse battery")
    machine = make(token)
    await machine.upsert_learning(identity=somebody(), store="user_memory", content="Keeps bees")
    assert await contents(make(), Identity(user_id=user_id)) == ["Keeps bees"]


async def test_a_user_may_look_after_their_own_and_do_no_servers_work(make: Make, project: Project) -> None:
    ada, bob = somebody(), somebody()
    server = make()
    secret = await server.upsert_learning(identity=bob, store="user_memory", content="Secret of Bob")
    machine = make(project.lite.access_token(ada.user_id or ""))
    assert await machine.get_learning(secret["memory_id"], identity=bob) is None
    assert await machine.delete_learning(secret["memory_id"], identity=bob) is False
    assert await machine.delete_learnings([secret["memory_id"]], identity=bob) == 0
    assert await machine.search("secret", identity=bob) == []
    before = project.row_counts()
    everything: dict[str, dict[str, Any]] = {
        "pending_learning": {},
        "apply_learning": {"run_ids": [], "operations": [], "expected_version": 0},
        "expedite_learning": {"sessions": []},
        "queue_state": {"the_queue": "learning"},
        "retry_learning": {"the_queue": "learning", "delay_seconds": 0, "attempt": 1},
        "rescue_learning": {"stalled_seconds": 0},
        "memories_without_embedding": {"model": "m"},
        "store_embeddings": {"model": "m", "embeddings": []},
        "import_runs": {"runs": []},
        "list_runs": {},
        "get_run": {"the_run_id": "r"},
        "list_users": {},
        "erase_user": {},
        "learning_status": {},
    }
    without_identity = {"expedite_learning", "queue_state", "rescue_learning"}
    for function, arguments in everything.items():
        identity = None if function in without_identity else bob
        with pytest.raises(AccessRefused):
            await machine.database.call(function, identity, **arguments)
    assert project.row_counts() == before
    assert await contents(server, bob) == ["Secret of Bob"]


async def test_a_users_machine_leaves_learning_to_a_server(
    make: Make, project: Project, heard: list[Event]
) -> None:
    ada = somebody()
    machine = make(project.lite.access_token(ada.user_id or ""), changes={"worker": WorkerMode.AUTO})
    await ask(echoing(machine), ada, "I keep bees")
    await machine.drain(timedelta(seconds=20))
    assert [event.name for event in heard if event.name.endswith("failed")] == []
    assert await said_by(machine, ada) == []
    server = make()
    assert await learn(server, ada) == 1
    assert await said_by(machine, ada) == ["I keep bees"]


async def test_the_tables_are_closed_to_everybody(project: Project) -> None:
    """Around our functions, straight at the tables. (This server gives the secret key every table, which Supabase does
    not do to tables that were taken from it.)"""
    lite = project.lite
    keys = {
        "anon": {"apikey": lite.publishable_key},
        "user": {"apikey": lite.publishable_key, "Authorization": f"Bearer {lite.access_token('ada')}"},
    }
    async with httpx.AsyncClient(base_url=f"{lite.url}/rest/v1") as client:
        for headers in keys.values():
            for table in project.row_counts():
                answer = await client.get(f"/{table}", params={"select": "*"}, headers=headers)
                assert answer.status_code >= 400 or answer.json() == []
                answer = await client.post(f"/{table}", json={"tenant_id": "x"}, headers=headers)
                assert answer.status_code >= 400


async def test_the_public_key_may_call_nothing_over_http(project: Project) -> None:
    identity = somebody().as_json()
    async with httpx.AsyncClient(base_url=f"{project.lite.url}/rest/v1/rpc") as client:
        for function, arguments in {
            "recall_context": {"identity": identity, "question": "x"},
            "get_learnings": {"identity": identity},
            "record_run": {"identity": identity, "run": {"run_id": "r", "status": "completed"}},
            "clear_learnings": {"identity": identity},
            "pending_learning": {"identity": identity},
        }.items():
            answer = await client.post(
                f"/{function}", json=arguments, headers={"apikey": project.lite.publishable_key}
            )
            assert answer.status_code in (401, 403, 404), (function, answer.text)


# --- keys that do not suffice -----------------------------------------------------------------------------------


def settings_with(**keys: str) -> Settings:
    return Settings.model_validate({"supabase_url": "https://p.supabase.co", **keys})


@pytest.mark.parametrize(
    ("keys", "missing"),
    [
        ({}, ["SUPABASE_SERVICE_ROLE_KEY", "SUPABASE_ANON_KEY"]),
        ({"supabase_anon_key": "public"}, ["SUPABASE_ACCESS_TOKEN", "SUPABASE_SERVICE_ROLE_KEY"]),
        ({"supabase_access_token": "a.b.c"}, ["SUPABASE_ANON_KEY"]),
    ],
)
def test_what_is_missing_is_said_at_once(keys: dict[str, str], missing: list[str]) -> None:
    with pytest.raises(ConfigurationError) as caught:
        LearningMachine(settings=settings_with(**keys))
    assert [name for name in missing if name not in str(caught.value)] == []


def test_a_servers_key_given_as_the_public_one_is_said_at_once() -> None:
    """With it a user's token would be laid over a key that may do everything."""
    with pytest.raises(ConfigurationError, match="SUPABASE_SERVICE_ROLE_KEY"):
        LearningMachine(
            settings=settings_with(supabase_anon_key="sb_secret_x" * 4, supabase_access_token="a.b.c")
        )


def test_the_public_key_given_as_a_servers_is_said_at_once() -> None:
    with pytest.raises(ConfigurationError, match="SUPABASE_ANON_KEY"):
        LearningMachine(settings=settings_with(supabase_service_role_key="sb_publishable_x" * 4))


@pytest.mark.parametrize(
    "token",
    [
        "garbage",
        "a.b.c",
        "",
        ".".join(["e30"] * 3),  # {}
        "e30.W10.e30",  # []
        "e30.eyJzdWIiOm51bGx9.e30",  # {"sub": null}
        "e30.eyJzdWIiOiAiIn0.e30",  # {"sub": ""}
        "e30.eyJzdWIiOiA1fQ.e30",  # {"sub": 5}
        "e30.eyJzdWIiOiAiYSIsICJhcHBfbWV0YWRhdGEiOiAieCJ9.e30",  # {"sub": "a", "app_metadata": "x"}
        "sbp_0123456789abcdef",  # the personal token of Supabase's command line, which has the same variable
    ],
)
def test_a_token_that_names_nobody_is_said_at_once(token: str) -> None:
    with pytest.raises((ConfigurationError, IdentityError)) as caught:
        LearningMachine(settings=settings_with(supabase_anon_key="public", supabase_access_token=token))
    assert "SUPABASE_ACCESS_TOKEN" in str(caught.value)
    assert not token or token not in str(caught.value)


@pytest.mark.parametrize(
    ("app_metadata", "tenant_id"),
    [
        (None, "default"),
        ({}, "default"),
        ({"tenant_id": ""}, "default"),
        ({"tenant_id": "acme"}, "acme"),
        ({"tenant_id": 7}, "7"),
    ],
)
async def test_a_token_is_read_as_the_database_reads_it(
    project: Project, make: Make, app_metadata: Any, tenant_id: str
) -> None:
    ada = somebody(tenant_id=tenant_id)
    token = project.lite.access_token(ada.user_id or "", app_metadata=app_metadata)
    assert identity_of_token(token) == Identity(user_id=ada.user_id, tenant_id=tenant_id)
    await make(token).upsert_learning(identity=ada, store="user_memory", content="Keeps bees")
    assert await contents(make(), ada) == ["Keeps bees"]


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"supabase_url": "https://p", "supabase_service_role_key": "k"}, SupabaseDatabase),
        (
            {"supabase_url": "https://p", "supabase_service_role_key": "k", "database_url": "postgresql://h"},
            PostgresDatabase,
        ),
        ({"supabase_service_role_key": "k"}, EmbeddedDatabase),
        ({}, EmbeddedDatabase),
    ],
)
def test_which_database_is_meant(fields: dict[str, str], kind: type) -> None:
    assert type(open_database(Settings.model_validate(fields))) is kind


async def test_a_servers_key_wins_over_a_token(project: Project, tmp_path: Path) -> None:
    token = project.lite.access_token("ada")
    settings = project.server_settings(
        tmp_path,
        supabase_anon_key=SecretStr(project.lite.publishable_key),
        supabase_access_token=SecretStr(token),
    )
    machine = LearningMachine(settings=settings)
    assert machine.claimed_identity is None
    await machine.aclose()


# --- keys and tokens that are wrong -----------------------------------------------------------------------------


async def refused(settings: Settings) -> LearningError:
    """How a call is refused; and the agent answers all the same."""
    machine = LearningMachine(settings=settings)
    try:
        with pytest.raises(LearningError) as caught:
            await machine.get_learnings(identity=Identity(user_id="ada"))
        events: list[Event] = []
        with listening(events.append):
            assert await ask(echoing(machine), Identity(user_id="ada"), "Hello") == "I know nothing."
            await portal().run(machine.recorded_all())
        assert [event.name for event in events] == ["recall_failed", "run_spooled"]
        assert machine.recorder.spool.count() == 1
    finally:
        await machine.aclose()
    shown = str(caught.value) + str(events)
    for key in ("supabase_service_role_key", "supabase_anon_key", "supabase_access_token"):
        secret = getattr(settings, key)
        assert secret is None or secret.get_secret_value() not in shown
    return caught.value


async def test_a_wrong_key_is_refused(project: Project, tmp_path: Path) -> None:
    settings = project.settings(tmp_path, supabase_service_role_key=SecretStr("sb_secret_wrong0123456789"))
    error = await refused(settings)
    assert isinstance(error, AccessRefused)
    assert "key" in str(error)
    assert project.lite.url in str(error)


@pytest.mark.parametrize("kind", ["expired", "forged", "unsigned"])
async def test_a_token_that_is_no_longer_or_never_was_one_is_refused(
    project: Project, tmp_path: Path, kind: str
) -> None:
    valid_for = timedelta(hours=-1) if kind == "expired" else timedelta(hours=1)
    token = project.lite.access_token("ada", valid_for=valid_for)
    if kind == "forged":
        token = token[:-6] + ("AAAAAA" if not token.endswith("AAAAAA") else "BBBBBB")
    if kind == "unsigned":
        header, payload, _ = token.split(".")
        token = f"eyJhbGciOiJub25lIiwidHlwIjoiSldUIn0.{payload}."
        assert header
    error = await refused(project.user_settings(tmp_path, token))
    assert isinstance(error, AccessRefused)
    assert "token" in str(error)


async def test_a_project_that_was_never_migrated(tmp_path: Path) -> None:
    with throwaway_database(migrated=False) as database, supabase_lite_server(database.tcp_url) as lite:
        error = await refused(Project(lite, database).server_settings(tmp_path))
    assert isinstance(error, MigrationError)
    assert "agent migrate" in str(error)


# --- addresses that are wrong -----------------------------------------------------------------------------------


@contextmanager
def web_server(
    status: int,
    body: bytes,
    kind: str = "application/json",
    *,
    hang: bool = False,
    location: str | None = None,
    asked: list[str] | None = None,
) -> Iterator[str]:
    """Something on the web that is no Supabase, or one in trouble."""
    closing = Flag()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            if asked is not None:
                asked.append(self.path)
            self.rfile.read(int(self.headers.get("content-length") or 0))
            if hang:
                closing.wait(60)
                return
            self.send_response(status)
            self.send_header("content-type", kind)
            self.send_header("content-length", str(len(body)))
            if location is not None:
                self.send_header("location", location)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            """The test's output stays clean."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        closing.set()
        server.shutdown()
        server.server_close()
        thread.join()


def at(url: str, folder: Path, **changes: Any) -> Settings:
    return Settings.model_validate(
        {
            "supabase_url": url, "supabase_service_role_key": "sb_secret_hunter2hunter2", "data_dir": folder,
            "worker": WorkerMode.OFF, "recall_timeout": timedelta(seconds=5), **changes,
        }
    )  # fmt: skip


HTML = b"<html><body>502 Bad Gateway</body></html>"
TROUBLE: dict[str, tuple[int, bytes, str, type[LearningError]]] = {
    "a gateway without its server": (502, HTML, "text/html", DatabaseUnavailable),
    "a project that is paused": (
        540,
        b'{"message": "project paused"}',
        "application/json",
        DatabaseUnavailable,
    ),
    "too many requests": (429, b'{"message": "rate limit"}', "application/json", DatabaseUnavailable),
    "no database behind it": (
        503,
        b'{"code": "PGRST001", "message": "Database client error", "details": null, "hint": null}',
        "application/json",
        DatabaseUnavailable,
    ),
    "a statement that took too long": (
        500,
        b'{"code": "57014", "message": "canceling statement due to statement timeout"}',
        "application/json",
        DatabaseUnavailable,
    ),
    "a web page": (200, HTML, "text/html", OperatorError),
    "a web page that is not there": (404, HTML, "text/html", OperatorError),
    "nothing at all": (200, b"", "application/json", OperatorError),
    "half an answer": (200, b'{"profile": [', "application/json", OperatorError),
    "another key": (401, b'{"message": "Invalid API key"}', "application/json", AccessRefused),
    "a forbidden one": (403, b"Forbidden", "text/plain", AccessRefused),
}


@pytest.mark.parametrize("kind", TROUBLE)
async def test_an_answer_that_is_none(kind: str, tmp_path: Path) -> None:
    status, body, content_type, expected = TROUBLE[kind]
    with web_server(status, body, content_type) as url:
        error = await refused(at(url, tmp_path))
    assert isinstance(error, expected)
    assert isinstance(error, DatabaseUnavailable) == (expected is DatabaseUnavailable)
    assert "hunter2" not in str(error)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_neither_key_nor_question_follows_a_redirect(status: int, tmp_path: Path) -> None:
    asked: list[str] = []
    with web_server(200, b"[]", asked=asked) as elsewhere:
        location = elsewhere.replace("127.0.0.1", "localhost")
        with web_server(status, b"", location=f"{location}/rest?token=1") as url:
            error = await refused(at(url, tmp_path))
    assert asked == []
    assert isinstance(error, ConfigurationError)
    assert str(error).startswith(f"SUPABASE_URL redirects to {location}: ")


@pytest.mark.parametrize("location", ["http://[", "//", "http://exa mple:99999999/", "/login"])
async def test_a_redirect_to_anywhere_is_explained(location: str, tmp_path: Path) -> None:
    with web_server(302, b"", location=location) as url:
        error = await refused(at(url, tmp_path))
    assert isinstance(error, ConfigurationError)
    assert "SUPABASE_URL redirects to " in str(error)


async def test_an_address_where_nobody_is(tmp_path: Path) -> None:
    with web_server(200, b"[]") as url:
        pass
    error = await refused(at(url, tmp_path))
    assert isinstance(error, DatabaseUnavailable)
    assert url in str(error)
    assert "SUPABASE_URL" in str(error)


@pytest.mark.parametrize("url", ["http://nowhere.invalid", "http://127.0.0.1:1", "http://[::1]:1"])
async def test_a_host_that_is_not_there(url: str, tmp_path: Path) -> None:
    assert isinstance(await refused(at(url, tmp_path)), DatabaseUnavailable)


@pytest.mark.parametrize("url", ["http://exa mple.com", "http://127.0.0.1:99999", "http://\u2100.example"])
async def test_an_address_that_is_none(url: str, tmp_path: Path) -> None:
    with pytest.raises(LearningError) as caught:
        await LearningMachine(settings=Settings.from_environment(_environment(url, tmp_path))).get_learnings(
            identity=Identity(user_id="ada")
        )
    assert isinstance(caught.value, ConfigurationError | DatabaseUnavailable)


def _environment(url: str, folder: Path) -> dict[str, str]:
    return {"SUPABASE_URL": url, "SUPABASE_SERVICE_ROLE_KEY": "k", "LEARNING_DATA_DIR": str(folder)}


async def test_a_project_that_hangs_holds_up_no_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agent.database.supabase._TIMEOUT_SECONDS", 0.3)
    with web_server(200, b"", hang=True) as url:
        error = await refused(at(url, tmp_path))
    assert isinstance(error, DatabaseUnavailable)


async def test_runs_kept_while_it_was_away_are_delivered_and_learned_once(
    project: Project, tmp_path: Path
) -> None:
    ada = somebody()
    with web_server(502, HTML, "text/html") as url:
        away = LearningMachine(settings=at(url, tmp_path))
        await ask(echoing(away), ada, "I keep bees")
        await portal().run(away.recorded_all())
        assert away.recorder.spool.count() == 1
        await away.aclose()
    back = LearningMachine(settings=project.server_settings(tmp_path, worker=WorkerMode.AUTO))
    try:
        await ask(echoing(back), ada, "And ants")
        assert await back.drain()
        assert back.recorder.spool.count() == 0
        assert sorted(await said_by(back, ada)) == ["And ants", "I keep bees"]
        kept = json.dumps(await back.get_learnings(identity=ada, store="conversation"))
        assert kept.count("I keep bees") == 1
    finally:
        await back.aclose()
