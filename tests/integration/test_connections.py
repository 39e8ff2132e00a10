"""Calls without cursors: values, errors, calls that are given up, connections that end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import psycopg
import pytest
from psycopg_pool import AsyncConnectionPool, PoolTimeout

from agent.database.connections import Connection, Connections
from agent.database.postgres import PostgresDatabase
from agent.identity import Identity
from agent.portal import portal
from agent.testing.throwaway import ThrowawayDatabase


@pytest.fixture
async def connection(learning_database: ThrowawayDatabase) -> AsyncIterator[Connection]:
    async with await Connection.connect(learning_database.url, autocommit=True) as opened:
        yield opened


@pytest.fixture
async def database(learning_database: ThrowawayDatabase) -> AsyncIterator[PostgresDatabase]:
    opened = PostgresDatabase(learning_database.url)
    yield opened
    await opened.close()


@pytest.mark.parametrize("prepare", [True, False])
@pytest.mark.parametrize(
    ("statement", "given", "expected"),
    [
        (b"SELECT $1::text", 'a"\\é😀', 'a"\\é😀'),
        (b"SELECT $1::text", None, None),
        (b"SELECT $1::text WHERE false", "a", None),
        (b"SELECT $1::integer", -7, -7),
        (b"SELECT $1::float8", 0.1, 0.1),
        (b"SELECT $1::boolean", True, True),
        (
            b"SELECT to_jsonb($1::text[])",
            ["a,b", 'c"\\', None, "NULL", "", "{}"],
            ["a,b", 'c"\\', None, "NULL", "", "{}"],
        ),
        (b"SELECT to_jsonb($1::integer[])", [1, 2], [1, 2]),
        (b"SELECT to_jsonb($1::text[])", [], []),
    ],
)
async def test_values_go_there_and_back(
    connection: Connection, statement: bytes, given: Any, expected: Any, prepare: bool
) -> None:
    for _ in range(2):
        assert await connection.value_of(statement, [given], prepare=prepare) == expected


async def test_a_document_larger_than_the_socket_takes_at_once(connection: Connection) -> None:
    text = "x" * 5_000_000
    assert await connection.value_of(b"SELECT $1::text || 'y'", [text], prepare=True) == text + "y"


async def test_what_has_no_text_form_is_refused_before_it_is_sent(connection: Connection) -> None:
    with pytest.raises(psycopg.ProgrammingError, match="type dict"):
        await connection.value_of(b"SELECT $1::jsonb", [{"a": 1}], prepare=True)
    assert await connection.value_of(b"SELECT 1", [], prepare=True) == 1


async def test_an_error_of_the_server_leaves_the_connection_usable(connection: Connection) -> None:
    for statement, kind in (
        (b"SELECT 1 / $1::integer", psycopg.errors.DivisionByZero),
        (b"SELEC", psycopg.errors.SyntaxError),
    ):
        given = [0] if b"$1" in statement else []
        for _ in range(2):  # while it is prepared, and prepared or not afterwards
            with pytest.raises(kind):
                await connection.value_of(statement, given, prepare=True)
    assert await connection.value_of(b"SELECT 1 / $1::integer", [1], prepare=True) == 1


@pytest.mark.parametrize("known", [True, False])
async def test_a_call_that_is_given_up_ends_in_the_server_and_spares_the_connection(
    connection: Connection, known: bool
) -> None:
    slow = b"SELECT 'slept' FROM pg_sleep($1)"
    if known:
        await connection.value_of(slow, [0], prepare=True)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1):
            await connection.value_of(slow, [60], prepare=True)
    assert not connection.closed
    assert await connection.value_of(slow, [0], prepare=True) == "slept"


async def test_a_connection_that_the_server_ends_in_a_call_says_so(
    connection: Connection, learning_database: ThrowawayDatabase
) -> None:
    call = asyncio.create_task(connection.value_of(b"SELECT 1 FROM pg_sleep(60)", [], prepare=True))
    async with await Connection.connect(learning_database.url, autocommit=True) as other:
        ended = False
        while not ended:  # until the call has begun
            ended = await other.value_of(
                b"SELECT count(pg_terminate_backend(pid)) > 0 FROM pg_stat_activity "
                b"WHERE query LIKE 'SELECT 1 FROM pg_sleep%' AND state = 'active' AND pid = $1::integer",
                [connection.info.backend_pid],
                prepare=True,
            )
    with pytest.raises(psycopg.OperationalError):
        await asyncio.wait_for(call, 10)
    assert connection.closed


async def test_calls_one_after_another_share_a_connection_and_calls_at_once_do_not(
    learning_database: ThrowawayDatabase,
) -> None:
    pool = AsyncConnectionPool(
        learning_database.url,
        connection_class=Connection,
        min_size=1,
        max_size=2,
        open=False,
        kwargs={"autocommit": True},
    )
    await pool.open()
    connections = Connections(pool)
    try:
        first = await connections.take(timeout=10)
        await connections.give_back(first)
        again = await connections.take(timeout=10)
        assert again is first
        second = await connections.take(timeout=10)
        assert second is not first
        with pytest.raises(PoolTimeout):
            await connections.take(timeout=0.1)
        waiting = asyncio.create_task(connections.take(timeout=10))
        await asyncio.sleep(0)
        await connections.give_back(first)  # to the one who waits, and is not kept from it
        assert await waiting is first
        await connections.give_back(first)
        await connections.give_back(second)
    finally:
        await connections.close()
    assert first.closed
    assert second.closed


async def test_a_call_begins_before_anybody_waits_for_it_and_survives_a_connection_that_ends(
    database: PostgresDatabase,
) -> None:
    ada = Identity(user_id="ada")
    asked = {"question": "bees", "stores": ["user_memory"], "memory_limit": 5}
    assert database.begin("recall_context", ada, **asked) is None  # nothing is at hand, nothing is prepared
    plain = await database.call("recall_context", ada, **asked)

    begun = database.begin("recall_context", ada, **asked)
    assert begun is not None
    assert database.begin("recall_context", ada, **asked) is None  # its connection is in use
    assert await portal().run(begun()) == plain

    lost = database.begin("recall_context", ada, **asked)
    assert lost is not None
    async with await Connection.connect(database.url, autocommit=True) as other:
        await other.value_of(
            b"SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity "
            b"WHERE pid <> pg_backend_pid() AND datname = current_database()",
            [],
            prepare=True,
        )
    assert await portal().run(lost()) == plain


async def test_what_was_prepared_and_is_gone_or_another_clients_is_not_run(
    database: PostgresDatabase, learning_database: ThrowawayDatabase
) -> None:
    ada = Identity(user_id="ada")
    asked = {"question": "bees", "stores": ["user_memory"], "memory_limit": 5}
    plain = await database.call("recall_context", ada, **asked)
    for _ in range(
        2
    ):  # as behind a transaction pooler: sent to a server connection that has none of it, and at once
        pool = database._pool
        assert pool is not None
        connection = pool.take_at_hand()
        assert connection is not None
        await portal().run(connection.value_of(b"DISCARD ALL", [], prepare=False))
        await portal().run(pool.give_back(connection))
        begun = database.begin("recall_context", ada, **asked)
        assert (
            await portal().run(begun() if begun else database._call("recall_context", ada, **asked)) == plain
        )


async def test_no_two_connections_have_a_name_for_a_statement_in_common(
    learning_database: ThrowawayDatabase,
) -> None:
    names = b"SELECT to_jsonb(array_agg(name)) FROM pg_prepared_statements"
    found: set[str] = set()
    for _ in range(2):
        async with await Connection.connect(learning_database.url, autocommit=True) as opened:
            await opened.value_of(b"SELECT 1", [], prepare=True)
            found.update(await opened.value_of(names, [], prepare=False))
    assert len(found) == 2
