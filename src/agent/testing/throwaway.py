"""A database for one test: migrated, empty, gone afterwards.

Use `throwaway_database()` as a context manager, `async_throwaway_database()` in async code, or the pytest fixture
`learning_database` (`pytest_plugins = ["agent.testing.throwaway"]` in your `conftest.py`). The first use in a process
starts an embedded Postgres in a temporary folder, the others clone its migrated template in a few hundredths of a
second.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import psycopg
from psycopg import sql
from pydantic import SecretStr

from agent.database.embedded import EmbeddedServer, erase_embedded, start_embedded
from agent.database.migrations import migrate
from agent.errors import OperatorError
from agent.settings import Settings, WorkerMode

_TEMPLATE = "learning_template"
_PREFIX = "learning-throwaway-"
_LEFTOVER_AFTER = timedelta(hours=1)

# Nothing here outlives the test, so nothing waits for a disk. Tests of crowds need more connections than a program.
_SERVER_SETTINGS = {
    "fsync": "off",
    "synchronous_commit": "off",
    "full_page_writes": "off",
    "max_connections": "300",
    # A connection that was given up half-way holds up DROP DATABASE until this is over.
    "authentication_timeout": "10s",
}


@dataclass(frozen=True, kw_only=True)
class ThrowawayDatabase:
    """One database that is dropped when its context ends, whoever is still connected."""

    name: str
    url: str
    """`postgresql://…` of a superuser, over the server's socket."""
    tcp_url: str
    """The same over TCP on 127.0.0.1, for programs that know no sockets."""
    settings: Settings
    """For this database: learns at once, no worker of its own, no model, its own folder for files."""


@contextmanager
def throwaway_database(*, migrated: bool = True, **changes: Any) -> Iterator[ThrowawayDatabase]:
    """A database of its own for the block.

    Args:
        migrated: `False`: without the learning system's tables; Supabase's roles and `auth` functions are there.
        changes: Fields of `Settings` that shall differ, such as `worker=WorkerMode.INSIDE`.

    Raises:
        OperatorError: the embedded server cannot run on this machine.
    """
    server = _this_process.server()
    name = f"throwaway_{secrets.token_hex(8)}"
    template = _this_process.template(server) if migrated else "template1"
    # A few dozen small files: quicker to copy than to write twice.
    make = sql.SQL("CREATE DATABASE {} TEMPLATE {} STRATEGY file_copy")
    _execute(server, make.format(sql.Identifier(name), sql.Identifier(template)))
    files = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}files-"))
    url = server.url(name, over_tcp=False)
    settings = {
        "quiet_period": timedelta(0),
        "worker": WorkerMode.OFF,
        "model": "none",
        "embeddings": "none",
        "data_dir": files,
        **changes,
        "database_url": SecretStr(url),
    }
    try:
        yield ThrowawayDatabase(
            name=name,
            url=url,
            tcp_url=server.url(name, over_tcp=True),
            settings=Settings.model_validate(settings),
        )
    finally:
        shutil.rmtree(files, ignore_errors=True)
        _execute(server, sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name)))


@asynccontextmanager
async def async_throwaway_database(
    *, migrated: bool = True, **changes: Any
) -> AsyncIterator[ThrowawayDatabase]:
    """`throwaway_database` that does not hold up the event loop."""
    context = throwaway_database(migrated=migrated, **changes)
    database = await asyncio.to_thread(context.__enter__)
    try:
        yield database
    finally:
        await asyncio.to_thread(context.__exit__, None, None, None)


def _execute(server: EmbeddedServer, statement: sql.Composed | sql.SQL) -> None:
    with psycopg.connect(server.url(over_tcp=False), autocommit=True, connect_timeout=30) as connection:
        connection.execute(statement)


class _ThisProcess:
    """The server and the template of this process, made when first asked for."""

    def __init__(self) -> None:
        self._guard = threading.RLock()
        self._server: EmbeddedServer | None = None
        self._has_template = False

    def server(self) -> EmbeddedServer:
        with self._guard:
            if self._server is None:
                _sweep()
                folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
                if os.geteuid() == 0:
                    folder.chmod(0o711)  # the account that runs Postgres for root must pass
                self._server = start_embedded(folder, tcp_port=0, server_settings=_SERVER_SETTINGS)
                atexit.register(_at_exit_of(os.getpid()), folder, self._server)
            return self._server

    def template(self, server: EmbeddedServer) -> str:
        with self._guard:
            if not self._has_template:
                _execute(server, sql.SQL("CREATE DATABASE {}").format(sql.Identifier(_TEMPLATE)))
                url = server.url(_TEMPLATE, over_tcp=False)
                # In a thread, because there may be an event loop in this one.
                with ThreadPoolExecutor(1) as thread:
                    thread.submit(lambda: asyncio.run(migrate(url))).result()
                self._has_template = True
        return _TEMPLATE


_this_process = _ThisProcess()


def _at_exit_of(process_id: int) -> Callable[[Path, EmbeddedServer], None]:
    def leave(folder: Path, server: EmbeddedServer) -> None:
        if os.getpid() == process_id:  # not a forked child
            server.release()
            shutil.rmtree(folder, ignore_errors=True)

    return leave


def _sweep() -> None:
    """Remove what killed test runs of this user left behind."""
    now = time.time()
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with suppress(OSError, OperatorError):  # somebody else's, in use, or swept by another run
            found = folder.lstat()
            if found.st_uid == os.geteuid() and now - found.st_mtime > _LEFTOVER_AFTER.total_seconds():
                if (folder / "postgres").exists():
                    erase_embedded(folder)
                shutil.rmtree(folder)


try:
    import pytest
except ImportError:  # the context managers serve any test runner
    pass
else:

    @pytest.fixture
    def learning_database() -> Iterator[ThrowawayDatabase]:
        """A migrated database for this test alone."""
        with throwaway_database() as database:
            yield database
