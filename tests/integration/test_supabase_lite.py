"""The stand-in for Supabase tells the database who is asking, as Supabase does. Other tests build on that."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import httpx
import psycopg
import pytest
from postgrest.exceptions import APIError

from supabase import AsyncClient, AsyncClientOptions, acreate_client
from tests.supabase_lite import SupabaseLite

if TYPE_CHECKING:
    from agent.testing.throwaway import ThrowawayDatabase

pytestmark = pytest.mark.node


@pytest.fixture
def who_asks(learning_database: ThrowawayDatabase) -> None:
    """A function that tells how it was called, open to everybody."""
    with psycopg.connect(learning_database.url) as connection:
        connection.execute("""
            CREATE FUNCTION public.who_asks(greeting text) RETURNS jsonb LANGUAGE sql AS $$
                SELECT jsonb_build_object(
                    'greeting', greeting,
                    'role', current_user,
                    'claims', nullif(current_setting('request.jwt.claims', true), '')::jsonb
                )
            $$;
            CREATE TABLE public.closed AS SELECT 1 AS value;
            ALTER TABLE public.closed ENABLE ROW LEVEL SECURITY;
            GRANT SELECT ON public.closed TO anon, authenticated, service_role;
        """)


@asynccontextmanager
async def _client(
    server: SupabaseLite, key: str, access_token: str | None = None
) -> AsyncIterator[AsyncClient]:
    headers = {"Authorization": f"Bearer {access_token}"} if access_token else {}
    async with httpx.AsyncClient() as http:  # the client closes none of its own
        yield await acreate_client(
            server.url, key, options=AsyncClientOptions(headers=headers, httpx_client=http)
        )


async def _ask(client: AsyncClient) -> dict[str, Any]:
    answer = (await client.rpc("who_asks", {"greeting": "grüß dich"}).execute()).data
    assert isinstance(answer, dict)
    assert answer.pop("greeting") == "grüß dich"
    return answer


@pytest.mark.usefixtures("who_asks")
async def test_the_secret_key_is_the_service_role(supabase_lite: SupabaseLite) -> None:
    async with _client(supabase_lite, supabase_lite.secret_key) as client:
        assert await _ask(client) == {"role": "service_role", "claims": {"role": "service_role"}}
        assert (await client.table("closed").select("*").execute()).data == [{"value": 1}]


@pytest.mark.usefixtures("who_asks")
async def test_the_publishable_key_is_anon_and_sees_nothing(supabase_lite: SupabaseLite) -> None:
    async with _client(supabase_lite, supabase_lite.publishable_key) as client:
        assert await _ask(client) == {"role": "anon", "claims": {"role": "anon"}}
        assert (await client.table("closed").select("*").execute()).data == []


@pytest.mark.usefixtures("who_asks")
async def test_a_users_token_brings_its_claims(supabase_lite: SupabaseLite) -> None:
    token = supabase_lite.access_token("ada", app_metadata={"tenant_id": "acme"})
    async with _client(supabase_lite, supabase_lite.publishable_key, token) as client:
        answer = await _ask(client)
    assert answer["role"] == "authenticated"
    assert answer["claims"]["sub"] == "ada"
    assert answer["claims"]["app_metadata"] == {"tenant_id": "acme"}


@pytest.mark.usefixtures("who_asks")
async def test_a_user_who_signs_up_gets_a_token_of_the_same_kind(supabase_lite: SupabaseLite) -> None:
    user_id, token = supabase_lite.sign_up("ada@example.com", "correct horse")
    async with _client(supabase_lite, supabase_lite.publishable_key, token) as client:
        answer = await _ask(client)
    assert (answer["role"], answer["claims"]["sub"]) == ("authenticated", user_id)


@pytest.mark.usefixtures("who_asks")
async def test_an_expired_or_forged_token_is_refused(supabase_lite: SupabaseLite) -> None:
    expired = supabase_lite.access_token("ada", valid_for=timedelta(hours=-1))
    head, payload, _ = supabase_lite.access_token("ada").split(".")
    for token in (expired, f"{head}.{payload}.AAAA"):
        async with _client(supabase_lite, supabase_lite.publishable_key, token) as client:
            with pytest.raises(APIError):
                await _ask(client)


async def test_a_wrong_key_is_refused(supabase_lite: SupabaseLite) -> None:
    async with _client(supabase_lite, "sb_secret_wrong") as client:
        with pytest.raises(APIError):
            await client.rpc("learning_status", {}).execute()


async def test_anon_may_call_no_function_of_ours(supabase_lite: SupabaseLite) -> None:
    async with _client(supabase_lite, supabase_lite.publishable_key) as client:
        with pytest.raises(APIError) as caught:
            await client.rpc("list_users", {"identity": {"tenant_id": "default"}}).execute()
    assert caught.value.code == "42501"
