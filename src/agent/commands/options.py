"""What commands share: their options, for whom they act, and the way to the database."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from agent.database import Database
    from agent.identity import Identity
    from agent.settings import Settings

EXIT_CODES = "Exit codes: 0 done, 1 it could not be done, 2 wrong usage."

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON on standard output and nothing else.")]
TenantOption = Annotated[
    str | None, typer.Option("--tenant", metavar="TENANT", help="Tenant; by default LEARNING_TENANT.")
]
UserOption = Annotated[
    str | None, typer.Option("--user", metavar="USER", help="User; by default LEARNING_DEFAULT_USER.")
]


def settings() -> Settings:
    """The settings of this process."""
    from agent.settings import current_settings

    return current_settings()


@asynccontextmanager
async def opened_database() -> AsyncIterator[Database]:
    """The database of the settings, closed at the end."""
    from agent.database import open_database

    database = open_database(settings())
    try:
        yield database
    finally:
        await database.close()


def tenant_identity(tenant: str | None) -> Identity:
    """An operator's identity: a tenant and nobody in it."""
    from agent.identity import Identity

    return Identity(tenant_id=settings().tenant if tenant is None else tenant)


def user_identity(database: Database, tenant: str | None, user: str | None) -> Identity | None:
    """For whom to act: whom the access token names where there is one, else the options, else the settings.

    `None` where nobody is named.

    Raises:
        IdentityError: the options name somebody else than the token.
    """
    from agent.database.supabase import SupabaseDatabase
    from agent.errors import IdentityError

    if isinstance(database, SupabaseDatabase) and (claimed := database.claimed_identity) is not None:
        if user not in (None, claimed.user_id) or tenant not in (None, claimed.tenant_id):
            raise IdentityError(
                f"the access token is one of user {claimed.user_id!r} in tenant {claimed.tenant_id!r}, and nobody else "
                "can be acted for with it. Leave out --user and --tenant, or set SUPABASE_SERVICE_ROLE_KEY"
            )
        return claimed
    user = settings().default_user if user is None else user
    return None if user is None else tenant_identity(tenant).with_(user_id=user)


def somebody(database: Database, tenant: str | None, user: str | None) -> Identity:
    """As `user_identity`, where somebody must be named.

    Raises:
        IdentityError: nobody is.
    """
    from agent.errors import IdentityError

    identity = user_identity(database, tenant, user)
    if identity is None:
        raise IdentityError("whose? Name a user with --user, or set LEARNING_DEFAULT_USER")
    return identity


def how_long(written: str) -> timedelta:
    """The time of an option `--for`, such as 30m, 12h, 7d or 2w."""
    found = re.fullmatch(r"([0-9]{1,5})([mhdw])", written.strip().lower())
    if found is None:
        raise typer.BadParameter(f"{written!r} is no time such as 30m, 12h, 7d or 2w", param_hint="'--for'")
    unit = {"m": "minutes", "h": "hours", "d": "days", "w": "weeks"}[found[2]]
    return timedelta(**{unit: int(found[1])})


def only_id(ids: Sequence[str], begins: str, kind: str, identity: Identity, shown_by: str) -> str:
    """The one id that begins so.

    Raises:
        NotFound: none does, or several do.
    """
    from agent.errors import NotFound

    found = [one for one in ids if begins and one.startswith(begins.lower())]
    if len(found) == 1:
        return found[0]
    if found:
        raise NotFound(
            f"{len(found)} {kind}s begin with {begins!r}: {', '.join(found[:3])}{', …' if found[3:] else ''}. "
            "Give more of the id"
        )
    raise NotFound(f"tenant {identity.tenant_id!r} has no {kind} {begins!r}. `{shown_by}` shows those it has")
