"""Fixtures for all tests. What starts something heavy starts it when first asked for."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from agent.database.embedded import erase_embedded
from agent.errors import OperatorError
from tests.supabase_layout import SupabaseLayout, supabase_layout_database
from tests.supabase_lite import SupabaseLite, supabase_lite_server

if TYPE_CHECKING:
    from agent.testing.throwaway import (
        ThrowawayDatabase,
    )  # as a plugin it must not be imported before pytest does

pytest_plugins = ["agent.testing.throwaway"]

_OURS = (
    "DATABASE_URL",
    "APP_DATABASE_URL",
    "SUPABASE_",
    "OPENAI_",
    "LEARNING_",
    "SLACK_",
    "TELEGRAM_",
    "LANGSMITH_",
    "LANGCHAIN_",
    "PG",
    "OTEL_",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """No test is named after the moment of its collection: two workers would collect different tests."""
    today = time.time()
    for item in items:
        for number in re.findall(r"\d{10,}", item.nodeid):
            if abs(int(number[:10]) - today) < 30 * 86_400:
                raise pytest.UsageError(f"{item.nodeid} is named after the time; compute it inside the test")


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting of whoever runs the tests, and above all no database and no key of theirs, reaches a test."""
    for name in os.environ:
        if name.startswith(_OURS) and name != "LEARNING_DATA":
            monkeypatch.delenv(name)


@pytest.fixture
def data_dir() -> Iterator[Path]:
    """An empty folder for an embedded server, which is stopped and removed afterwards.

    Not `tmp_path`: its path may be too long for a socket, and the account that runs Postgres for root cannot enter.
    """
    folder = Path(tempfile.mkdtemp(prefix="learning-test-"))
    if os.geteuid() == 0:
        folder.chmod(0o711)
    yield folder
    with suppress(OperatorError):  # a test may have left it such that it cannot be opened
        erase_embedded(folder)
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def supabase_layout(data_dir: Path) -> Iterator[SupabaseLayout]:
    """An empty database laid out as on Supabase, with a server of its own."""
    with supabase_layout_database(data_dir) as layout:
        yield layout


@pytest.fixture
def supabase_lite(learning_database: ThrowawayDatabase) -> Iterator[SupabaseLite]:
    """Supabase's REST and Auth protocol over `learning_database`. Mark the test `node`."""
    with supabase_lite_server(learning_database.tcp_url) as server:
        yield server
