"""The shipped graphs under `langgraph dev`, driven by the SDK: an embedded Postgres, a worker inside, no model key."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from langgraph_sdk import get_client

from agent import Identity, LearningMachine, Settings
from agent.portal import portal
from agent.settings import WorkerMode

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

CHECKOUT = Path(__file__).resolve().parents[2]
TOLD = "I prefer concise answers and I work on billing"
ASKED = "What do you know about me?"


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
def dev_server(data_dir: Path) -> Iterator[DevServer]:
    """The checkout's `langgraph.json` in a folder of its own, since the server keeps its state in the folder."""
    project = data_dir / "project"
    project.mkdir()
    for name in ("graphs", "src", "supabase", "pyproject.toml", "README.md", "langgraph.json"):
        (project / name).symlink_to(CHECKOUT / name)
    knowledge = data_dir / "knowledge"
    (project / ".env").write_text(f"LEARNING_DATA_DIR={knowledge}\nLEARNING_QUIET_PERIOD=0.3\n")
    port = _free_port()
    log = data_dir / "server.log"
    environment = os.environ | {"LANGGRAPH_CLI_NO_ANALYTICS": "1", "LANGGRAPH_NO_VERSION_CHECK": "1"}
    program = str(Path(sys.executable).with_name("langgraph"))
    command = [program, "dev", "--no-browser", "--no-reload", "--port", str(port)]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=project, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
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


async def ask(client: Any, graph: str, text: str, *, user: str, thread: str | None = None) -> dict[str, Any]:
    """One turn of a user on a thread, a new one where none is named."""
    thread = thread or (await client.threads.create())["thread_id"]
    state: dict[str, Any] = await client.runs.wait(
        thread,
        graph,
        input={"messages": [{"role": "user", "content": text}]},
        config={"configurable": {"user_id": user}},
    )
    return state | {"thread": thread}


def answer_of(state: dict[str, Any]) -> str:
    """The last message."""
    return str(state["messages"][-1]["content"])


async def ask_until_known(client: Any, graph: str, *, user: str, wanted: str) -> str:
    """Ask on new threads until the worker has learned what is wanted."""
    answer = ""
    for _ in range(30):
        answer = answer_of(await ask(client, graph, ASKED, user=user))
        if wanted in answer:
            break
        await asyncio.sleep(0.5)
    return answer


async def test_two_conversations_an_approval_and_a_team(data_dir: Path) -> None:
    with dev_server(data_dir) as server:
        async with get_client(url=server.url) as client:
            await _converse(client, server)

    log = server.log.read_text()
    assert "BlockingError" not in log
    assert "recall_failed" not in log
    assert "Traceback" not in log


async def _converse(client: Any, server: DevServer) -> None:
    assert {a["graph_id"] for a in await client.assistants.search()} == {"assistant", "support_team"}

    # Learned in one conversation, known in the next, by this user alone.
    await ask(client, "assistant", TOLD, user="ada@example.com")
    assert "billing" in await ask_until_known(client, "assistant", user="ada@example.com", wanted=TOLD)
    assert "billing" not in answer_of(await ask(client, "assistant", ASKED, user="bob"))

    # A tool waits for a person; who answers passes no user, and the run stays Ada's.
    paused = await ask(
        client, "assistant", "Please delete the account ada@example.com", user="ada@example.com"
    )
    [pause] = paused["__interrupt__"]
    resumed = await client.runs.wait(
        paused["thread"],
        "assistant",
        command={"resume": {pause["id"]: {"decisions": [{"type": "approve"}]}}},
    )
    assert "__interrupt__" not in resumed
    assert any(message["type"] == "tool" for message in resumed["messages"])

    # The team's specialists know too, without code of their own.
    team = await ask(client, "support_team", "Please refund order A1001", user="ada@example.com")
    assert team["category"] == "billing"
    assert not any("learned_knowledge" in str(message) for message in team["messages"])

    machine = LearningMachine(settings=server.settings)
    runs = await portal().run(machine.database.call("list_runs", Identity(), wanted={}, run_limit=200))
    of_pause = [run for run in runs if run["session_id"] == paused["thread"]]
    assert [(run["user_id"], run["status"]) for run in of_pause] == [("ada@example.com", "completed")]
    assert {run["agent_id"] for run in runs} >= {"assistant", "support_team"}
    assert {run["status"] for run in runs} == {"completed"}
    await machine.aclose()
