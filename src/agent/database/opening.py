"""Which database the settings mean."""

from __future__ import annotations

import asyncio
import weakref
from typing import Any

from agent.database.protocol import Begun, Database
from agent.errors import ConfigurationError
from agent.identity import Identity
from agent.portal import forget_in_forked_child, portal
from agent.settings import Settings

_opened: weakref.WeakValueDictionary[tuple[Any, ...], Database] = weakref.WeakValueDictionary()


def open_database(settings: Settings) -> Database:
    """The database of these settings; nothing is contacted before the first call.

    Who asks for the same place gets the same object while anybody has it: an agent made anew for every request opens no
    connections of its own. `database_url` wins, then Supabase; with neither, the embedded server in `data_dir` is
    started and migrated at the first call.

    Raises:
        ConfigurationError: `SUPABASE_URL` is set without keys that suffice.
    """
    place = (
        settings.database_url,
        settings.supabase_url,
        settings.supabase_service_role_key,
        settings.supabase_anon_key,
        settings.supabase_access_token,
        settings.data_dir,
    )
    database = _opened.get(place)
    if database is None:
        database = _opened[place] = _open(settings)
    return database


async def queue_url(database: Database) -> str:
    """Address of the Postgres that holds the queue, for workers.

    Raises:
        ConfigurationError: only Supabase's web address is known; workers need a Postgres connection.
    """
    from agent.database.postgres import PostgresDatabase

    if isinstance(database, EmbeddedDatabase):
        return await database.url()
    if isinstance(database, PostgresDatabase):
        return database.url
    raise ConfigurationError(
        "a worker needs a connection to Postgres and only SUPABASE_URL is set; set DATABASE_URL to the project's "
        "connection string (session mode or direct, port 5432) where the worker runs"
    )


def _open(settings: Settings) -> Database:
    if settings.database_url is not None:
        from agent.database.postgres import PostgresDatabase

        return PostgresDatabase(settings.database_url.get_secret_value())
    if settings.supabase_url is not None:
        from agent.database.supabase import SupabaseDatabase

        return SupabaseDatabase.from_settings(settings)
    return EmbeddedDatabase(settings)


class EmbeddedDatabase(Database):
    """The embedded Postgres, started and migrated when it is first called."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._database: Any = None
        self._server: Any = None
        self._starting: asyncio.Lock | None = None
        forget_in_forked_child(self)

    def start_anew(self) -> None:
        """In a forked child: the hold on the server is the parent's."""
        self._database = self._server = self._starting = None

    async def url(self) -> str:
        """Start the server if need be and return its address."""
        database = await portal().run(self._started())
        return str(database.url)

    def secret(self) -> str | None:
        """That of the database, once it runs."""
        return self._database.secret() if self._database is not None else None

    @property
    def is_prepared(self) -> bool:
        return self._database is not None and self._database.is_prepared

    def begin(self, function: str, identity: Identity, /, **arguments: Any) -> Begun | None:
        begun: Begun | None = (
            self._database.begin(function, identity, **arguments) if self._database else None
        )
        return begun

    async def _call(self, function: str, identity: Identity | None = None, /, **arguments: Any) -> Any:
        database = self._database or await self._started()
        return await database.call(function, identity, **arguments)

    async def _prepare(self) -> None:
        """Start and migrate the server, where this was not done."""
        database = self._database or await self._started()
        await database.prepare()

    async def _started(self) -> Any:
        self._starting = self._starting or asyncio.Lock()
        async with self._starting:
            if self._database is None:
                from agent.database.embedded import start_embedded
                from agent.database.migrations import migrate
                from agent.database.postgres import PostgresDatabase

                self._server = await asyncio.to_thread(start_embedded, self._settings.data_dir)
                url = self._server.url()
                await migrate(url)
                self._database = PostgresDatabase(url)
        return self._database

    async def _close(self) -> None:
        """Give back connections and this process's hold on the server; the last process stops it."""
        database, self._database = self._database, None
        server, self._server = self._server, None
        if database is not None:
            await database.close()
        if server is not None:
            await asyncio.to_thread(server.release)
