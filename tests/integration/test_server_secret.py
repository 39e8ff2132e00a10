"""The secret that the servers of a database seal with: one, random, and nobody else's."""

from __future__ import annotations

import asyncio

import psycopg
import pytest

from agent.database.postgres import PostgresDatabase
from agent.errors import LearningError
from agent.testing.throwaway import ThrowawayDatabase
from tests.integration.rows import rows


async def test_servers_that_ask_at_once_get_one_secret_that_the_address_does_not_tell(
    learning_database: ThrowawayDatabase,
) -> None:
    servers = [PostgresDatabase(learning_database.url) for _ in range(10)]
    try:
        assert {server.secret() for server in servers} == {None}
        await asyncio.gather(*[server.prepare() for server in servers])
        (secret,) = {server.secret() for server in servers}
    finally:
        for server in servers:
            await server.close()
    assert secret is not None
    assert len(secret) == 64
    assert secret not in learning_database.url
    assert rows(learning_database.url, "SELECT secret FROM agent_private.server_secret") == [(secret,)]


def test_a_thread_without_a_loop_waits_for_the_secret(learning_database: ThrowawayDatabase) -> None:
    first, second = PostgresDatabase(learning_database.url), PostgresDatabase(learning_database.url)
    try:
        secret = first.secret()
        assert secret is not None
        assert second.secret() == secret
    finally:
        for server in (first, second):
            asyncio.run(server.close())


async def test_a_database_that_is_away_tells_no_secret_and_raises_nothing() -> None:
    server = PostgresDatabase("postgresql://agent:guess-me@127.0.0.1:1/none")
    await server.prepare()
    assert server.secret() is None
    with pytest.raises(LearningError):
        await server.call("queue_state", the_queue="learning")


@pytest.mark.parametrize("claims", ['{"role": "authenticated", "sub": "eve"}', '{"role": "anon"}'])
def test_a_users_token_never_gets_it(learning_database: ThrowawayDatabase, claims: str) -> None:
    with psycopg.connect(learning_database.url) as connection:
        connection.execute("SELECT set_config('request.jwt.claims', %s, true)", [claims])
        with pytest.raises(psycopg.errors.InsufficientPrivilege, match="only a server"):
            connection.execute("SELECT public.server_secret('seal')")
