"""The server that all agents under test share: the embedded one as it ships, on disk and durable.

The throw-away server of `agent.testing` writes to no disk in time, which would flatter whoever commits most.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import psycopg
from psycopg import sql

from agent.database.embedded import EmbeddedServer, erase_embedded, start_embedded
from agent.database.migrations import migrate


@contextmanager
def measuring_server() -> Iterator[EmbeddedServer]:
    """An embedded server in a folder of its own until the block ends."""
    folder = Path(tempfile.mkdtemp(prefix="learning-benchmark-"))
    folder.chmod(0o711)  # where root measures, another account runs Postgres and must pass
    try:
        # Vacuum and analyze are the harness's to order, at the same point for every agent.
        with start_embedded(folder, server_settings={"autovacuum": "off"}) as server:
            yield server
        erase_embedded(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@asynccontextmanager
async def fresh_database(server: EmbeddedServer, name: str) -> AsyncIterator[str]:
    """The URL of a migrated database of that name, dropped when the block ends, whoever is still connected."""
    identifier = sql.Identifier(name)
    with psycopg.connect(server.url(), autocommit=True) as connection:
        connection.execute(sql.SQL("CREATE DATABASE {}").format(identifier))
        try:
            await migrate(server.url(name))
            yield server.url(name)
        finally:
            connection.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(identifier))
