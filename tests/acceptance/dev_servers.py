"""`langgraph dev` on the checkout, in a folder of its own."""

from __future__ import annotations

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

from agent import Settings
from agent.settings import WorkerMode

CHECKOUT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, kw_only=True)
class DevServer:
    """A running `langgraph dev`."""

    url: str
    log: Path
    settings: Settings
    """For a look at its database from outside."""


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def dev_server(data_dir: Path, variables: Mapping[str, str] | None = None) -> Iterator[DevServer]:
    """The checkout's `langgraph.json` in a folder of its own, since the server keeps its state in the folder.

    Args:
        data_dir: where project folder, database and log go.
        variables: more lines of `.env`.
    """
    project = data_dir / "project"
    project.mkdir()
    for name in ("graphs", "src", "supabase", "pyproject.toml", "README.md", "langgraph.json"):
        (project / name).symlink_to(CHECKOUT / name)
    knowledge = data_dir / "knowledge"
    lines = {"LEARNING_DATA_DIR": knowledge, "LEARNING_QUIET_PERIOD": "0.3", **(variables or {})}
    (project / ".env").write_text("".join(f"{name}={value}\n" for name, value in lines.items()))
    port = _free_port()
    log = data_dir / "server.log"
    environment = os.environ | {"LANGGRAPH_CLI_NO_ANALYTICS": "1", "LANGGRAPH_NO_VERSION_CHECK": "1"}
    program = str(Path(sys.executable).with_name("langgraph"))
    command = [program, "dev", "--no-browser", "--no-reload", "--port", str(port)]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=project,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    settings = Settings(data_dir=knowledge, worker=WorkerMode.OFF)
    try:
        _wait_until_ready(f"http://127.0.0.1:{port}", process, log)
        yield DevServer(url=f"http://127.0.0.1:{port}", log=log, settings=settings)
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
        process.poll()
        time.sleep(0.1)
    raise AssertionError(f"the server did not start:\n{log.read_text()}")
