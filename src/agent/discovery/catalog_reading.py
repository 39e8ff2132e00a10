"""Read the structure of a database: one query; where an object cannot be read, around it."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import lru_cache
from typing import Any, Final

import psycopg
from psycopg import AsyncConnection, AsyncRawCursor

from agent.database.connection_errors import explain
from agent.database.migrations import body_of
from agent.database.protocol import Database
from agent.discovery.structure import open_app_database
from agent.errors import DatabaseUnavailable, MigrationError, OperatorError
from agent.settings import Settings

_PATIENCE: Final = 15
"""How many time-outs reading may take in all, before what is left is reported as not seen."""
_LOST = ("08", "57P", "53")

Ask = Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]


class _Failed(Exception):
    """The query failed for what it read, not for the connection."""


async def read_structure(settings: Settings, database: Database, wanted: dict[str, Any]) -> dict[str, Any]:
    """What `discover_app_structure` returns for the application's database: `tables`, `functions`, `extensions`,
    `problems`.

    Our own database is asked by its storage function, another one by the text of that function, in one round trip. If
    that fails, the objects are asked for in ever smaller groups, and `problems` names those that cannot be read.

    Raises:
        DatabaseUnavailable: the application's database cannot be reached.
        ConfigurationError: its address is wrong.
    """
    if settings.app_database_url is None:
        return await _read(_asking_ours(database, settings), wanted, settings)
    async with open_app_database(settings) as connection:
        url = settings.app_database_url.get_secret_value()
        return await _read(_asking(connection, url), wanted, settings)


@lru_cache(maxsize=1)
def _query() -> bytes:
    return body_of("discover_app_structure").encode()


def _asking(connection: AsyncConnection[Any], url: str) -> Ask:
    async def ask(wanted: dict[str, Any]) -> dict[str, Any]:
        try:
            cursor = AsyncRawCursor(connection)
            await cursor.execute(_query(), [json.dumps(wanted)])
            row = await cursor.fetchone()
        except psycopg.Error as error:
            if connection.broken or error.sqlstate is None or error.sqlstate.startswith(_LOST):
                raise explain(error, url) from None
            raise _Failed(error.diag.message_primary or type(error).__name__) from None
        return dict(row[0]) if row else {}

    return ask


def _asking_ours(database: Database, settings: Settings) -> Ask:
    async def ask(wanted: dict[str, Any]) -> dict[str, Any]:
        seconds = settings.discovery_timeout.total_seconds()
        try:
            async with asyncio.timeout(seconds):
                return dict(await database.call("discover_app_structure", wanted=wanted))
        except TimeoutError:
            raise _Failed(f"no answer within {seconds:g} s") from None
        except (MigrationError, DatabaseUnavailable):
            raise
        except OperatorError as error:
            raise _Failed(str(error)) from None

    return ask


async def _read(ask: Ask, wanted: dict[str, Any], settings: Settings) -> dict[str, Any]:
    try:
        return await ask(wanted)
    except _Failed:
        return await _read_around(ask, wanted, settings)


async def _read_around(ask: Ask, wanted: dict[str, Any], settings: Settings) -> dict[str, Any]:
    """Ask for ever smaller groups of objects, until what fails stands alone."""
    until = time.monotonic() + _PATIENCE * settings.discovery_timeout.total_seconds()
    try:
        names = (await ask({**wanted, "names_only": True}))["names"]
    except _Failed as error:
        raise OperatorError(f"the structure of the application's database cannot be read: {error}") from None
    found: dict[str, Any] = {"tables": [], "functions": [], "extensions": [], "problems": []}
    groups: list[Sequence[dict[str, Any]]] = [names[: len(names) // 2], names[len(names) // 2 :]]
    while groups:
        group = groups.pop()
        if not group:
            continue
        if time.monotonic() > until:
            found["problems"] += [
                {"object": item["name"], "reason": "there was no time left"} for item in group
            ]
            continue
        try:
            part = await ask({**wanted, "only": [item["oid"] for item in group]})
        except _Failed as error:
            if len(group) == 1:
                found["problems"].append({"object": group[0]["name"], "reason": str(error)})
            else:
                groups += [group[len(group) // 2 :], group[: len(group) // 2]]
            continue
        found["extensions"] = part["extensions"]
        for kind in ("tables", "functions", "problems"):
            found[kind] += part[kind]
    return found
