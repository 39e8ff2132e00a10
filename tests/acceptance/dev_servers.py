"""`langgraph dev` on the checkout, in a folder of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from agent import Settings
from agent.settings import WorkerMode
from tests.dev_project import CHECKOUT, running_dev


@dataclass(frozen=True, kw_only=True)
class DevServer:
    """A running `langgraph dev`."""

    url: str
    log: Path
    settings: Settings
    """For a look at its database from outside."""


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
    log = data_dir / "server.log"
    with running_dev(project, log) as url:
        yield DevServer(url=url, log=log, settings=Settings(data_dir=knowledge, worker=WorkerMode.OFF))
