"""`agent init`: the first files of a project of one's own."""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated

import typer

from agent.commands.options import EXIT_CODES, JsonOption
from agent.commands.output import remark, say, say_json
from agent.errors import OperatorError


@dataclass(frozen=True, kw_only=True)
class _File:
    name: str
    template: str
    mode: int
    purpose: str


_FILES = (
    _File(name=".env", template="env.template", mode=0o600, purpose="settings, each with what it means"),
    _File(
        name="langgraph.json",
        template="langgraph.json.template",
        mode=0o644,
        purpose="tells LangGraph the graph",
    ),
    _File(
        name="agent_graph.py",
        template="agent_graph.py.template",
        mode=0o644,
        purpose="an agent that remembers",
    ),
)


def init(
    directory: Annotated[
        Path, typer.Argument(metavar="[DIR]", help="Folder of the project; made when missing.")
    ] = Path(),
    as_json: JsonOption = False,
) -> None:
    """Write .env, langgraph.json and a first graph into a project. What is there already is left alone."""
    written: list[_File] = []
    kept: list[_File] = []
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for file in _FILES:
            (written if _write(directory / file.name, file) else kept).append(file)
    except OSError as error:
        raise OperatorError(
            f"cannot write into {str(directory)!r}: {error.strerror or error}. Name a folder that you may write to"
        ) from error
    if as_json:
        say_json(
            {
                "directory": str(directory),
                "written": [f.name for f in written],
                "kept": [f.name for f in kept],
            }
        )
        return
    for file in written:
        say(f"wrote {directory / file.name}: {file.purpose}")
    for file in kept:
        say(f"left {directory / file.name} alone: it is there already")
    remark("")
    remark(f"Next{'' if directory == Path() else f', in {directory}'}:")
    remark("  put OPENAI_API_KEY into .env, and .env and .agent/ into .gitignore")
    remark('  pip install "langgraph-cli[inmem]" && langgraph dev')
    remark("  agent doctor      says what is missing")


def _write(path: Path, file: _File) -> bool:
    """Write a file that is not there yet; also a dangling link counts as there."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, file.mode)
    except FileExistsError:
        return False
    with os.fdopen(descriptor, "wb") as target:
        target.write(resources.files("agent.commands").joinpath("templates", file.template).read_bytes())
    return True


def add_to(app: typer.Typer) -> None:
    """Register this command."""
    app.command(epilog=EXIT_CODES)(init)
