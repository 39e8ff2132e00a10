"""The throw-away database: its own for each use, migrated, and gone afterwards."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import psycopg
import pytest

from agent.database.embedded import start_embedded
from agent.database.migrations import check
from agent.settings import WorkerMode
from agent.testing import throwaway
from agent.testing.throwaway import async_throwaway_database, throwaway_database


def _exists(url: str, name: str) -> bool:
    with psycopg.connect(url) as connection:
        return (
            connection.execute("SELECT FROM pg_database WHERE datname = %s", (name,)).fetchone() is not None
        )


async def test_it_is_migrated_and_empty() -> None:
    async with async_throwaway_database() as database:
        assert (await check(database.url)).is_current
        for url in (database.url, database.tcp_url):
            with psycopg.connect(url) as connection:
                assert connection.execute("SELECT current_database()").fetchone() == (database.name,)


def test_each_use_has_its_own_and_it_is_dropped_though_somebody_is_connected() -> None:
    with throwaway_database() as first:
        with throwaway_database() as second:
            lingering = psycopg.connect(second.url)
            lingering.execute("CREATE TABLE only_here ()")
            lingering.commit()
            with psycopg.connect(first.url) as connection:
                assert connection.execute("SELECT to_regclass('only_here')").fetchone() == (None,)
        assert not _exists(first.url, second.name)
        with pytest.raises(psycopg.OperationalError):
            lingering.execute("SELECT 1")
        lingering.close()


def test_it_is_dropped_when_the_test_fails() -> None:
    with throwaway_database() as outer:
        with pytest.raises(ZeroDivisionError), throwaway_database() as inner:
            _ = 1 / 0
        assert not _exists(outer.url, inner.name)


def test_its_settings_are_for_tests_and_can_be_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-never-used")
    with throwaway_database() as database:
        settings = database.settings
        assert settings.database_url is not None
        assert settings.database_url.get_secret_value() == database.url
        assert settings.quiet_period == timedelta(0)
        assert settings.worker is WorkerMode.OFF
        assert settings.extraction_model is None
        assert settings.embedding_model is None
        assert settings.data_dir.is_dir()
    assert not settings.data_dir.exists()
    with throwaway_database(worker=WorkerMode.INSIDE, tenant="acme") as database:
        assert (database.settings.worker, database.settings.tenant) == (WorkerMode.INSIDE, "acme")


def test_the_fixture_works_in_a_project_of_a_user(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text('pytest_plugins = ["agent.testing.throwaway"]\n')
    (tmp_path / "test_mine.py").write_text(
        "import psycopg\n"
        "def test_mine(learning_database):\n"
        "    with psycopg.connect(learning_database.url) as connection:\n"
        "        assert connection.execute('SELECT count(*) > 0 FROM agent_migration').fetchone() == (True,)\n"
    )
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:randomly",
        str(tmp_path),
    ]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "1 passed" in ran.stdout


def test_what_a_killed_run_left_is_removed_later_and_what_is_in_use_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folders = [Path(tempfile.mkdtemp(prefix=throwaway._PREFIX)) for _ in range(2)]
    for folder in folders:
        folder.chmod(0o711)
    left, fresh = folders
    program = (
        "import os, sys; from pathlib import Path; from agent.database.embedded import start_embedded;"
        "print(start_embedded(Path(sys.argv[1])).process_id, flush=True); os.kill(os.getpid(), 9)"
    )
    killed = subprocess.run(
        [sys.executable, "-c", program, left], capture_output=True, text=True, check=False
    )
    server = int(killed.stdout)
    long_ago = time.time() - 7200
    os.utime(left, (long_ago, long_ago))
    throwaway._sweep()
    assert not left.exists()
    assert fresh.exists()
    with start_embedded(fresh):
        os.utime(fresh, (long_ago, long_ago))
        # As another process would see it: this one may always remove its own.
        subprocess.run(
            [sys.executable, "-c", "from agent.testing import throwaway; throwaway._sweep()"], check=True
        )
        assert fresh.exists()
    throwaway._sweep()
    assert not fresh.exists()
    command_line = Path(f"/proc/{server}/cmdline")
    assert not command_line.exists() or not command_line.read_bytes(), (
        "the server that was left has been stopped"
    )
