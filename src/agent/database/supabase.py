"""The transport to a Supabase project: the storage functions as RPC of the `supabase` client."""

from __future__ import annotations

import asyncio
import base64
import json
from typing import TYPE_CHECKING, Any

from agent.database.protocol import Database, refusal, to_json
from agent.errors import AccessRefused, ConfigurationError, DatabaseUnavailable, IdentityError, OperatorError
from agent.identity import DEFAULT_TENANT, Identity
from agent.portal import forget_in_forked_child
from agent.settings import Settings

if TYPE_CHECKING:
    import httpx

    from supabase import AsyncClient

_TIMEOUT_SECONDS = 10.0
_AWAY = (408, 425, 429, 502, 503, 504)


class SupabaseDatabase(Database):
    """Storage functions over PostgREST, with a server's key or in the name of one user.

    With a user's access token the database takes the identity from the claims, whatever is asked for.
    """

    def __init__(self, url: str, key: str, *, access_token: str | None = None) -> None:
        self._url = url
        self._key = key
        self._access_token = access_token
        self._secret = access_token  # the one user's; that of the servers is not for them
        self._client: AsyncClient | None = None
        self._http: httpx.AsyncClient | None = None
        self._opening: asyncio.Lock | None = None
        forget_in_forked_child(self)

    def start_anew(self) -> None:
        """In a forked child: the connections are the parent's."""
        self._client = self._http = self._opening = self._reading_secret = None

    @classmethod
    def from_settings(cls, settings: Settings) -> SupabaseDatabase:
        """The transport these settings ask for.

        Raises:
            ConfigurationError: the keys do not suffice; the message says which is missing.
        """
        if settings.supabase_url is None:
            raise ConfigurationError("SUPABASE_URL is not set")
        if settings.supabase_service_role_key is not None:
            key = settings.supabase_service_role_key.get_secret_value()
            if _role_of_key(key) == "anon":
                raise ConfigurationError(
                    "SUPABASE_SERVICE_ROLE_KEY is a public key. Set the service role key (or sb_secret_…) there; the "
                    "public one belongs in SUPABASE_ANON_KEY, with a user's token in SUPABASE_ACCESS_TOKEN"
                )
            return cls(settings.supabase_url, key)
        if settings.supabase_anon_key is None:
            raise ConfigurationError(
                "SUPABASE_URL is set but no key: set SUPABASE_SERVICE_ROLE_KEY (a server), or SUPABASE_ANON_KEY and "
                "SUPABASE_ACCESS_TOKEN (one user)"
            )
        anon_key = settings.supabase_anon_key.get_secret_value()
        if _role_of_key(anon_key) == "service_role":
            raise ConfigurationError(
                "SUPABASE_ANON_KEY is a server's key. Set it as SUPABASE_SERVICE_ROLE_KEY to act for any user, or set "
                "the public key to act for the one of SUPABASE_ACCESS_TOKEN"
            )
        if settings.supabase_access_token is None:
            raise ConfigurationError(
                "SUPABASE_ANON_KEY is set but no SUPABASE_ACCESS_TOKEN: the anon key is public and says nothing about "
                "who asks. Set a user's access token beside it, or SUPABASE_SERVICE_ROLE_KEY for a server"
            )
        token = settings.supabase_access_token.get_secret_value()
        identity_of_token(token)  # now rather than at the first run
        return cls(settings.supabase_url, anon_key, access_token=token)

    @property
    def claimed_identity(self) -> Identity | None:
        """Whom the access token names, or `None` for a server's key. Read for labels only: the database verifies."""
        return identity_of_token(self._access_token) if self._access_token else None

    async def _call(self, function: str, identity: Identity | None = None, /, **arguments: Any) -> Any:
        import httpx
        from postgrest.exceptions import APIError

        if identity is not None:
            arguments["identity"] = identity.as_json()
        client = await self._open_client()
        try:
            answer = await client.rpc(function, json.loads(to_json(arguments))).execute()
        except APIError as error:
            code = str(error.code) if error.code is not None else None
            refused = "invalid api key" in (error.message or "").lower()
            if refused or code in ("401", "403", "PGRST301", "PGRST302", "PGRST303"):
                raise AccessRefused(
                    f"Supabase at {self._url} refused the key or the token ({error.message}); check that it belongs to "
                    "this project and has not expired"
                ) from None
            raise refusal(function, code, error.message or "no message") from None
        except httpx.InvalidURL as error:
            raise ConfigurationError(f"SUPABASE_URL={self._url!r} is no address: {error}") from None
        except (httpx.HTTPError, OSError) as error:
            raise DatabaseUnavailable(
                f"Supabase at {self._url} cannot be reached ({type(error).__name__}); is SUPABASE_URL right?"
            ) from None
        return answer.data

    async def _open_client(self) -> AsyncClient:
        if self._client is None:
            self._opening = self._opening or asyncio.Lock()
            async with self._opening:
                if self._client is None:
                    import httpx

                    from supabase import AsyncClientOptions, SupabaseException, acreate_client

                    headers = {"Authorization": f"Bearer {self._access_token}"} if self._access_token else {}
                    self._http = httpx.AsyncClient(
                        timeout=_TIMEOUT_SECONDS,
                        follow_redirects=False,  # the key would go along
                        event_hooks={"response": [self._check_answer]},
                    )
                    try:
                        self._client = await acreate_client(
                            self._url, self._key, AsyncClientOptions(headers=headers, httpx_client=self._http)
                        )
                    except (SupabaseException, ValueError) as error:
                        await self._close()
                        raise ConfigurationError(f"SUPABASE_URL or its key is not usable: {error}") from None
        return self._client

    async def _check_answer(self, response: httpx.Response) -> None:
        """Tell an answer of the database from one of whatever stands between: the client takes a web page, and nothing
        at all, for a result.

        Raises:
            DatabaseUnavailable: the project is overloaded, paused or away.
            OperatorError: this is no project of Supabase.
            ConfigurationError: it is somewhere else.
        """
        status = response.status_code
        if response.has_redirect_location:
            raise ConfigurationError(
                f"SUPABASE_URL redirects to {_origin_of_redirect(response)}: nothing was sent there, because the key "
                "would go along. If that is your project, set its address as SUPABASE_URL"
            )
        if status in (401, 403):
            return
        await response.aread()
        try:
            answer = response.json()
        except ValueError:
            answer = None
            is_json = False
        else:
            is_json = True
        has_code = isinstance(answer, dict) and isinstance(answer.get("code"), str)
        if status in _AWAY or (status >= 500 and not has_code):
            raise DatabaseUnavailable(f"Supabase at {self._url} cannot serve now (HTTP {status})")
        if not is_json:
            kind = response.headers.get("content-type", "nothing")
            raise OperatorError(
                f"{self._url} does not answer as a project of Supabase does (HTTP {status}, {kind}); is SUPABASE_URL "
                "the project's address?"
            )

    async def _close(self) -> None:
        self._client = None
        http, self._http = self._http, None
        if http is not None:
            await http.aclose()


def _origin_of_redirect(response: httpx.Response) -> str:
    import httpx

    try:
        target = response.url.join(response.headers["location"])
    except (httpx.InvalidURL, ValueError):
        return "what is no address"
    port = "" if target.port is None else f":{target.port}"
    host = f"[{target.host}]" if ":" in target.host else target.host
    return f"{target.scheme}://{host}{port}"


def identity_of_token(token: str) -> Identity:
    """Whom a JWT names: its `sub` as the user, `app_metadata.tenant_id` as the tenant. The signature is not checked.

    Raises:
        ConfigurationError: it is no JWT or names nobody.
    """
    try:
        claims = _claims_of(token)
        user_id = claims["sub"]
        tenant = (claims.get("app_metadata") or {}).get("tenant_id")
        if tenant is None or tenant == "":
            tenant = DEFAULT_TENANT
        elif not isinstance(tenant, str):
            tenant = json.dumps(tenant)  # as the database reads it: a number is its digits
        if user_id is None:
            raise KeyError("sub")
        return Identity(tenant_id=tenant, user_id=user_id)
    except (IndexError, KeyError, TypeError, AttributeError, ValueError, IdentityError):
        raise ConfigurationError(
            "SUPABASE_ACCESS_TOKEN is not a JWT with a `sub` claim. It must be a signed-in user's access token, not a "
            "key, nor the personal token (sbp_…) of Supabase's command line"
        ) from None


def _role_of_key(key: str) -> str | None:
    """`anon` or `service_role`, or `None` where the key does not say."""
    if key.startswith("sb_publishable_"):
        return "anon"
    if key.startswith("sb_secret_"):
        return "service_role"
    try:
        role = _claims_of(key)["role"]
    except (IndexError, KeyError, TypeError, ValueError):
        return None
    return role if isinstance(role, str) else None


def _claims_of(token: str) -> Any:
    payload = token.split(".")[1]
    return json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
