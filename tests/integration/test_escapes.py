"""The benchmark of escapes: nothing gets out, and it would see what does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from agent.execution.tool_sandbox import SandboxResult
from benchmarks.safety import escapes


async def test_no_attempt_gets_out_of_the_sandbox() -> None:
    found = await escapes.try_all()
    assert {group: tally.leaks for group, tally in found.items() if tally.leaks} == {}
    assert sum(tally.tried for tally in found.values()) >= 60


@pytest.mark.parametrize(
    ("result", "more"),
    [
        (SandboxResult(status="done", value="anything"), {}),
        (SandboxResult(status="failed", error="FileNotFoundError: {secret}"), {}),
        (SandboxResult(status="failed", printed="{secret}"), {}),
        (SandboxResult(status="failed", error="root:x:0:0"), {}),
        (SandboxResult(status="paused"), {}),
        (SandboxResult(status="failed"), {"calls": ["send_email"]}),
        (SandboxResult(status="failed"), {"seconds": 60.0}),
        (SandboxResult(status="failed"), {"connected": True}),
        (SandboxResult(status="failed"), {"marked": True}),
    ],
)
def test_every_sign_of_an_escape_is_seen(result: SandboxResult, more: dict[str, Any]) -> None:
    with escapes._bait() as bait:
        attempt = escapes.Attempt(name="x", code="")
        quiet: dict[str, Any] = {"calls": [], "seconds": 0.1, "connected": False}
        assert escapes._sign(SandboxResult(status="failed"), attempt, bait, **quiet) is None
        if more.pop("marked", False):
            bait.marker.write_text("x")
        said = {
            name: text.replace("{secret}", bait.secret)
            for name in ("error", "printed")
            if (text := getattr(result, name))
        }
        leaking = SandboxResult(**{**vars(result), **said})
        assert escapes._sign(leaking, attempt, bait, **quiet | more) is not None


@pytest.mark.parametrize("name", ["read a file", "see variables", "connect on the machine", "write a file"])
def test_what_native_code_tries_in_the_box_works_outside_of_it(name: str) -> None:
    with escapes._bait() as bait:
        program = escapes._NATIVE[name].format(
            canary=str(bait.file), marker=str(bait.marker), port=bait.port, pid=0
        )
        ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        assert ran.stdout.strip()
        assert not Path("/box").exists()
