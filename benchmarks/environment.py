"""Where and with what a measurement was made."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import psycopg

_PACKAGES = (
    "langchain-learning-machine", "langchain", "langchain-core", "langgraph", "psycopg", "agno", "sqlalchemy",
    "langmem", "langgraph-checkpoint-postgres",
)  # fmt: skip


def _git(*arguments: str) -> str:
    answer = subprocess.run(
        ["git", *arguments],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    return answer.stdout.strip() if answer.returncode == 0 else ""


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown"
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown"
    )


def commit() -> str:
    """The commit that is measured, and whether files differ from it."""
    changes = (
        "with uncommitted changes" if _git("status", "--porcelain", "--", ":!benchmarks/results") else "clean"
    )
    return f"{_git('rev-parse', 'HEAD') or 'none'} ({changes})"


def environment(database_url: str, *, date: str | None) -> dict[str, str]:
    """What a reader needs to judge the numbers; `date` is today (UTC) where none is given."""
    with psycopg.connect(database_url) as connection:
        (server_version,) = connection.execute("SELECT current_setting('server_version')").fetchone() or (
            "unknown",
        )
    return {
        "date": date or datetime.now(UTC).date().isoformat(),
        "commit": commit(),
        "cores": str(os.cpu_count()),
        "processor": _processor(),
        "load before": " ".join(f"{load:.2f}" for load in os.getloadavg()),
        "system": f"{platform.system()} {platform.machine()}",
        "Python": platform.python_version(),
        "Postgres": f"{server_version}, embedded, all agents on the same server",
    } | {package: version(package) for package in _PACKAGES}
