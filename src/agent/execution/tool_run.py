"""One run of a tool that an agent wrote: while it goes on, and what became of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from agent.execution.result_text import fenced
from agent.execution.tool_definition import ToolVersion
from agent.identity import Identity


@dataclass(frozen=True, kw_only=True)
class ToolRun:
    """What became of one run of an agent-written tool."""

    status: Literal["succeeded", "failed", "paused", "refused"]
    tool: str
    version: int | None = None
    value: Any = None
    """What it returned."""
    text: str = ""
    """For a model: the result as fenced data, or why there is none."""
    error: str | None = None
    approval_id: str | None = None
    """Paused: what it waits for. `ToolLibrary.resume` goes on when that is decided."""
    log_id: str | None = None
    printed: str = ""
    read_untrusted: bool = False
    """Whether a function it called gave it text of strangers."""


@dataclass
class RunProgress:
    """One run while it goes on, also over pauses."""

    tool: ToolVersion
    identity: Identity
    arguments: Mapping[str, Any]
    run_key: str
    stricter: bool
    """Whether its calls count as one level more dangerous: the run is tainted, or the version is new."""
    author: Identity
    """Whose rights its calls need besides those of the identity: a tool never does more than its author may."""
    untrusted: frozenset[str] = frozenset()
    """Names of functions whose answers hold text of strangers, besides those that say so themselves."""
    calls: int = 0
    read_untrusted: bool = False

    def as_json(self) -> dict[str, Any]:
        return {
            "tool": self.tool.name,
            "version": self.tool.version,
            "identity": self.identity.as_json(),
            "arguments": dict(self.arguments),
            "run_key": self.run_key,
            "stricter": self.stricter,
            "calls": self.calls,
            "read_untrusted": self.read_untrusted,
            "untrusted": sorted(self.untrusted),
        }


def ended_run(
    name: str,
    version: int,
    *,
    ok: bool,
    value: Any,
    error: str | None,
    log_id: str | None,
    read_untrusted: bool,
    printed: str = "",
) -> ToolRun:
    """A run that has ended."""
    return ToolRun(
        status="succeeded" if ok else "failed",
        tool=name,
        version=version,
        value=value,
        text=fenced(name, value) if ok else f"{name} failed.\n{fenced(name, {'error': error})}",
        error=error,
        log_id=log_id,
        printed=printed,
        read_untrusted=read_untrusted,
    )
