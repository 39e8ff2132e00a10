"""Databases that are not there, not let in, or not what they should be: the message says what to do and holds no
password, and the agent answers all the same."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit, urlunsplit

import psycopg
import pytest
from langchain.agents import create_agent
from psycopg import sql
from pydantic import SecretStr

from agent import Identity, LearningMachine, listening
from agent.database import postgres
from agent.database.connection_errors import check_address, plain_address
from agent.database.migrations import migrate
from agent.database.postgres import PostgresDatabase
from agent.errors import (
    AccessRefused,
    ConfigurationError,
    DatabaseUnavailable,
    InvalidLearning,
    LearningError,
    MigrationError,
    OperatorError,
)
from agent.events import Event
from agent.portal import portal
from agent.settings import Settings, WorkerMode
from agent.testing import ScriptedChat
from agent.testing.throwaway import ThrowawayDatabase, throwaway_database

ADA = Identity(user_id="ada@example.com", session_id="t1")
SECRET = "hunter2/do:not?show"
CALLS: dict[str, dict[str, Any]] = {
    "recall_context": {"question": "cat"},
    "record_run": {"run": {"run_id": "r1", "status": "completed", "messages": []}},
    "get_learnings": {},
}


@pytest.fixture
def heard() -> Iterator[list[Event]]:
    events: list[Event] = []
    with listening(events.append):
        yield events


Open = Callable[..., PostgresDatabase]


@pytest.fixture
async def open_at() -> AsyncIterator[Open]:
    opened: list[PostgresDatabase] = []

    def at(url: str) -> PostgresDatabase:
        opened.append(PostgresDatabase(url, connections_max=2))
        return opened[-1]

    yield at
    for database in opened:
        await database.close()


@pytest.fixture
def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


@pytest.fixture
async def silent_port() -> AsyncIterator[int]:
    """Takes connections and never says a word."""
    release = asyncio.Event()

    async def hold(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await release.wait()
        writer.close()

    server = await asyncio.start_server(hold, "127.0.0.1", 0)
    yield server.sockets[0].getsockname()[1]
    release.set()
    server.close()
    await server.wait_closed()


def changed(url: str, *, user: str | None = None, password: str | None = None, **parts: Any) -> str:
    """The address with another user, password, path or query."""
    split = urlsplit(url)
    user = quote(user if user is not None else split.username or "", safe="")
    password = quote(password if password is not None else split.password or "", safe="")
    netloc = f"{user}:{password}@{split.hostname}:{split.port}"
    return urlunsplit(split._replace(netloc=netloc, **parts))


async def refusal_of(database: PostgresDatabase, function: str = "recall_context") -> LearningError:
    """How a call is refused; the same way at once and again."""
    errors = []
    for _ in range(2):
        with pytest.raises(LearningError) as caught:
            await database.call(function, ADA, **CALLS[function])
        errors.append(caught.value)
    assert type(errors[0]) is type(errors[1])
    for error in errors:
        chain = repr(error) + str(error) + repr(error.__cause__)
        assert "hunter2" not in chain
        assert quote(SECRET, safe="") not in chain
    return errors[0]


# --- not reached ------------------------------------------------------------------------------------------------


async def test_a_closed_port(open_at: Open, closed_port: int) -> None:
    error = await refusal_of(
        open_at(f"postgresql://ada:{quote(SECRET, safe='')}@127.0.0.1:{closed_port}/memory")
    )
    assert isinstance(error, DatabaseUnavailable)
    assert f"127.0.0.1:{closed_port}" in str(error)
    assert "running" in str(error)


async def test_an_unknown_host(open_at: Open) -> None:
    error = await refusal_of(open_at(f"postgresql://ada:{quote(SECRET, safe='')}@nowhere.invalid/memory"))
    assert isinstance(error, DatabaseUnavailable)
    assert "nowhere.invalid" in str(error)


async def test_a_socket_that_is_not_there(open_at: Open, tmp_path: Path) -> None:
    error = await refusal_of(
        open_at(f"postgresql://ada:hunter2@/memory?host={quote(str(tmp_path), safe='')}")
    )
    assert isinstance(error, DatabaseUnavailable)
    assert str(tmp_path) in str(error)


async def test_a_server_that_never_answers(
    open_at: Open, silent_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgres, "_CONNECT_SECONDS", 2)
    database = open_at(f"postgresql://ada:hunter2@127.0.0.1:{silent_port}/memory")
    with pytest.raises(DatabaseUnavailable, match=f"127.0.0.1:{silent_port}") as caught:
        await database.call("get_learnings", ADA)
    assert "hunter2" not in str(caught.value)


# --- an address that is none ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://ada:hunter2@127.0.0.1:99999/memory",
        "postgresql://ada:hunter2@127.0.0.1:port/memory",
        "postgresql://ada:hunter2@[::1/memory",
        "postgresql://ada:hunter2@bad@127.0.0.1/memory",
        "postgresql://ada:hunter2/x@127.0.0.1/memory",
        "postgresql://ada:hunter2#x@127.0.0.1/memory",
        "postgresql://ada:12#hunter2@127.0.0.1/memory",
        "postgresql://ada:12?hunter2@127.0.0.1/memory",
        "postgresql://ada:12/34?hunter2@127.0.0.1/memory",
        "postgresql://ada:hunter2%zz@127.0.0.1/memory",
        "postgresql://127.0.0.1/memory?password=hunter2&nonsense=1",
        "postgresql://ada:hunter2@127.0.0.1/memory?sslmode=sometimes",
        "host=127.0.0.1 password=hunter2",
    ],
)
async def test_an_address_that_cannot_be_read(open_at: Open, url: str) -> None:
    error = await refusal_of(open_at(url))
    assert isinstance(error, ConfigurationError)
    assert "address" in str(error) or "DATABASE_URL" in str(error)


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://ada:12#34@127.0.0.1/memory",
        "postgresql://ada:12?34@127.0.0.1/memory",
        "postgresql://ada:12/34?56@127.0.0.1/memory",
    ],
)
def test_nothing_is_shown_of_an_address_that_would_be_cut_in_the_password(url: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        check_address(url)
    assert "12" not in str(caught.value)
    assert plain_address(url) == "the database"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://ada:12%2334@127.0.0.1/memory", "ada@127.0.0.1:5432/memory"),
        ("postgresql://ada@127.0.0.1?application_name=a#b@c", "ada@127.0.0.1:5432/"),
        ("postgresql:///memory?host=/tmp/x@y", "/tmp/x@y:5432/memory"),
    ],
)
def test_an_address_that_can_be_read_is_taken(url: str, shown: str) -> None:
    check_address(url)
    assert plain_address(url) == shown


# --- not let in -------------------------------------------------------------------------------------------------


async def test_a_wrong_password(open_at: Open, learning_database: ThrowawayDatabase) -> None:
    error = await refusal_of(open_at(changed(learning_database.tcp_url, password=SECRET)))
    assert isinstance(error, ConfigurationError)
    assert "password" in str(error)
    assert "DATABASE_URL" in str(error)


async def test_an_unknown_user(open_at: Open, learning_database: ThrowawayDatabase) -> None:
    error = await refusal_of(open_at(changed(learning_database.tcp_url, user="nobody-here", password=SECRET)))
    assert isinstance(error, ConfigurationError)
    assert "nobody-here" in str(error)


async def test_an_unknown_database(open_at: Open, learning_database: ThrowawayDatabase) -> None:
    error = await refusal_of(open_at(changed(learning_database.tcp_url, path="/nowhere")))
    assert isinstance(error, ConfigurationError)
    assert "nowhere" in str(error)
    assert "reate it" in str(error)


async def test_a_server_without_encryption_where_it_is_asked_for(
    open_at: Open, learning_database: ThrowawayDatabase
) -> None:
    error = await refusal_of(open_at(changed(learning_database.tcp_url, query="sslmode=require")))
    assert "SSL" in str(error)


async def test_a_login_without_rights(open_at: Open, learning_database: ThrowawayDatabase) -> None:
    name = f"stranger_{learning_database.name}"
    with psycopg.connect(learning_database.url, autocommit=True) as connection:
        connection.execute(
            sql.SQL("CREATE ROLE {} LOGIN PASSWORD {}").format(sql.Identifier(name), sql.Literal(SECRET))
        )
        try:
            database = open_at(changed(learning_database.tcp_url, user=name, password=SECRET))
            for function in CALLS:
                error = await refusal_of(database, function)
                assert isinstance(error, AccessRefused)
                assert "agent_server" in str(error)
            await database.close()
        finally:
            connection.execute(sql.SQL("DROP ROLE {}").format(sql.Identifier(name)))


# --- not what it should be --------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", CALLS)
async def test_a_database_that_was_never_migrated(open_at: Open, function: str) -> None:
    with throwaway_database(migrated=False) as database:
        opened = open_at(database.url)
        error = await refusal_of(opened, function)
        assert isinstance(error, MigrationError)
        assert "agent migrate" in str(error)
        await opened.close()


async def test_a_function_that_somebody_dropped(open_at: Open, learning_database: ThrowawayDatabase) -> None:
    database = open_at(learning_database.url)
    assert await database.call("get_learnings", ADA) == []
    with psycopg.connect(learning_database.url, autocommit=True) as connection:
        connection.execute("DROP FUNCTION public.get_learnings, public.recall_context")
    for function in ("get_learnings", "recall_context"):
        error = await refusal_of(database, function)
        assert isinstance(error, MigrationError)
        assert function in str(error)
    assert (await database.call("record_run", ADA, **CALLS["record_run"]))["recorded"]


async def test_an_inner_part_that_somebody_dropped(
    open_at: Open, learning_database: ThrowawayDatabase
) -> None:
    with psycopg.connect(learning_database.url, autocommit=True) as connection:
        connection.execute("DROP FUNCTION agent_private.store_run")
        connection.execute("DROP TABLE public.agent_memory_term CASCADE")
        connection.execute("DROP SCHEMA agent_queue CASCADE")
    database = open_at(learning_database.url)
    assert isinstance(await refusal_of(database, "record_run"), MigrationError)


async def test_the_extension_that_somebody_dropped(
    open_at: Open, learning_database: ThrowawayDatabase
) -> None:
    with psycopg.connect(learning_database.url, autocommit=True) as connection:
        connection.execute("DROP EXTENSION vector CASCADE")
    error = await refusal_of(open_at(learning_database.url))
    assert isinstance(error, OperatorError)
    assert "vector" in str(error)
    assert "agent doctor" in str(error) or "CREATE EXTENSION" in str(error)


async def test_a_database_that_is_read_only(open_at: Open, learning_database: ThrowawayDatabase) -> None:
    """As a standby is, or a disk that is full at some providers."""
    name = sql.Identifier(learning_database.name)
    with psycopg.connect(learning_database.url, autocommit=True) as connection:
        connection.execute(sql.SQL("ALTER DATABASE {} SET default_transaction_read_only = on").format(name))
    database = open_at(learning_database.url)
    assert await database.call("get_learnings", ADA) == []
    error = await refusal_of(database, "record_run")
    assert isinstance(error, OperatorError)
    assert "read-only" in str(error)


async def test_a_value_that_the_database_refuses_is_the_callers(
    open_at: Open, learning_database: ThrowawayDatabase
) -> None:
    database = open_at(learning_database.url)
    for run in (
        {},
        {"run_id": "r", "status": "splendid"},
        {"run_id": "r", "status": "completed", "started_at": "x"},
    ):
        with pytest.raises(InvalidLearning):
            await database.call("record_run", ADA, run=run)


# --- the agent answers all the same -----------------------------------------------------------------------------


def settings_for(url: str, folder: Path, **changes: Any) -> Settings:
    return Settings.model_validate(
        {
            "database_url": SecretStr(url), "data_dir": folder, "worker": WorkerMode.OFF, "quiet_period": 0,
            "recall_timeout": timedelta(seconds=1), **changes,
        }
    )  # fmt: skip


async def answer_of(machine: LearningMachine, *, is_async: bool) -> str:
    """What the agent answers, once its run is recorded or kept."""
    agent: Any = create_agent(ScriptedChat(script=["Hello, Ada."]), [], middleware=[machine.middleware()])
    config = {"configurable": {"thread_id": "t1", "user_id": ADA.user_id}}
    given = {"messages": [("user", "I have a cat")]}
    state = await agent.ainvoke(given, config) if is_async else agent.invoke(given, config)
    await portal().run(machine.recorded_all())
    said: str = state["messages"][-1].text
    return said


BAD: dict[str, Callable[[ThrowawayDatabase, int], str]] = {
    "closed port": lambda database, port: f"postgresql://ada:hunter2@127.0.0.1:{port}/memory",
    "unreadable": lambda database, port: "postgresql://ada:hunter2@bad@127.0.0.1/memory",
    "wrong password": lambda database, port: changed(database.tcp_url, password="hunter2"),
    "unknown database": lambda database, port: changed(database.tcp_url, path="/nowhere"),
    "not migrated": lambda database, port: database.url,
}


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("kind", BAD)
async def test_the_agent_answers_and_the_run_is_kept(
    kind: str, is_async: bool, closed_port: int, tmp_path: Path, heard: list[Event]
) -> None:
    with throwaway_database(migrated=False) as database:
        machine = LearningMachine(settings=settings_for(BAD[kind](database, closed_port), tmp_path))
        assert await answer_of(machine, is_async=is_async) == "Hello, Ada."
        assert [event.name for event in heard] == ["recall_failed", "run_spooled"]
        assert "hunter2" not in str(heard)
        assert len(list((tmp_path / "spool").glob("*.json"))) == 1
        with pytest.raises(LearningError):
            await machine.get_learnings(identity=ADA)
        await machine.aclose()


async def test_the_agent_answers_in_front_of_a_server_that_never_does(
    silent_port: int, tmp_path: Path, heard: list[Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgres, "_CONNECT_SECONDS", 2)
    url = f"postgresql://ada:hunter2@127.0.0.1:{silent_port}/memory"
    machine = LearningMachine(settings=settings_for(url, tmp_path))
    assert await answer_of(machine, is_async=True) == "Hello, Ada."
    assert [event.name for event in heard] == ["recall_failed", "run_spooled"]
    await machine.aclose()


async def test_the_agent_answers_though_nothing_can_be_kept_either(
    closed_port: int, tmp_path: Path, heard: list[Event]
) -> None:
    (tmp_path / "spool").write_text("a file where a folder should be", encoding="utf-8")
    url = f"postgresql://ada:hunter2@127.0.0.1:{closed_port}/memory"
    machine = LearningMachine(settings=settings_for(url, tmp_path))
    assert await answer_of(machine, is_async=True) == "Hello, Ada."
    assert [event.name for event in heard] == ["recall_failed", "run_record_failed"]
    await machine.aclose()


async def test_an_embedded_server_that_cannot_start_stops_nobody(tmp_path: Path, heard: list[Event]) -> None:
    (tmp_path / "postgres").write_text("a file where a folder should be", encoding="utf-8")
    machine = LearningMachine(settings=settings_for("postgresql://x", tmp_path, database_url=None))
    assert await answer_of(machine, is_async=True) == "Hello, Ada."
    assert [event.name for event in heard] == ["recall_failed", "run_spooled"]
    await machine.aclose()


async def test_what_was_kept_is_learned_once_the_database_is_migrated(tmp_path: Path) -> None:
    with throwaway_database(migrated=False) as database:
        settings = settings_for(database.url, tmp_path, worker=WorkerMode.INSIDE, recall_timeout=10)
        machine = LearningMachine(settings=settings)
        try:
            await answer_of(machine, is_async=True)
            assert machine.recorder.spool.count() == 1
            await migrate(database.url)
            assert await machine.drain()
            assert machine.recorder.spool.count() == 0
            known = await machine.get_learnings(identity=ADA, store="conversation", kind="user")
            assert [memory["content"] for memory in known] == ["I have a cat"]
        finally:
            with suppress(LearningError):
                await machine.aclose()
