"""A project of a reader's own under `langgraph dev`, in a folder of its own."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

CHECKOUT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, kw_only=True)
class DevProject:
    """A running server and its folder."""

    url: str
    folder: Path
    log: Path

    def agent(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run `agent` in the project's folder."""
        command = [sys.executable, "-m", "agent.cli", *arguments]
        return subprocess.run(
            command, cwd=self.folder, capture_output=True, text=True, check=False, timeout=60
        )


@contextmanager
def dev_project(
    folder: Path, *, graph: str, policy: str, settings: Mapping[str, str] | None = None
) -> Iterator[DevProject]:
    """Serve `graph`, the text of a module that has `graph`, with the application of this package.

    Args:
        folder: empty; the database is kept in it too.
        graph: Python.
        policy: TOML of the policy file.
        settings: variables of `.env` beside those of the folder.
    """
    project = folder / "project"
    project.mkdir()
    (project / "shop.py").write_text(graph)
    (project / "agent-policy.toml").write_text(policy)
    environment = {
        "LEARNING_DATA_DIR": str(folder / "data"),
        "LEARNING_QUIET_PERIOD": "0.3",
        **(settings or {}),
    }
    (project / ".env").write_text("".join(f"{name}={value}\n" for name, value in environment.items()))
    config = {
        "dependencies": ["."],
        "graphs": {"shop": "./shop.py:graph"},
        "env": ".env",
        "http": {"app": str(CHECKOUT / "src" / "agent" / "server" / "app.py:app")},
    }
    (project / "langgraph.json").write_text(json.dumps(config))
    log = folder / "server.log"
    with running_dev(project, log) as url:
        yield DevProject(url=url, folder=project, log=log)


@contextmanager
def running_dev(project: Path, log: Path) -> Iterator[str]:
    """`langgraph dev` on the `langgraph.json` of a folder; its address, once it is ready."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    program = str(Path(sys.executable).with_name("langgraph"))
    command = [program, "dev", "--no-browser", "--no-reload", "--port", str(port)]
    quiet = os.environ | {"LANGGRAPH_CLI_NO_ANALYTICS": "1", "LANGGRAPH_NO_VERSION_CHECK": "1"}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=project, env=quiet, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        _wait_until_ready(f"http://127.0.0.1:{port}", process, log)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _wait_until_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(600):
        assert process.poll() is None, log.read_text()
        try:
            if httpx.get(f"{url}/ok", timeout=2).is_success:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.1)
    raise AssertionError(f"the server did not start:\n{log.read_text()}")
