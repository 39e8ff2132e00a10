"""One process of the sandbox, and the JSON messages that go in and come out of it."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from agent.errors import OperatorError

_MESSAGE_BYTES_MAX = 4 << 20
_START_SECONDS = 20.0
_DEPTH_MAX = 100


@dataclass
class SandboxProcess:
    """One helper process, its pipes, and whether it is behind bubblewrap."""

    process: asyncio.subprocess.Process
    confined: bool
    broken: bool = False
    drain: asyncio.Task[None] | None = None

    @classmethod
    async def start(cls, command: Sequence[str], *, confined: bool) -> SandboxProcess:
        """A process that said it is ready.

        Raises:
            OperatorError: it did not; with the first line it wrote instead.
        """
        try:
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                env={},
                limit=_MESSAGE_BYTES_MAX,
                start_new_session=True,
            )
        except OSError as error:
            raise OperatorError(f"the sandbox's process cannot be started: {error}") from None
        helper = cls(process, confined)
        said = await helper._answer(_START_SECONDS)
        if "ready" in said:
            helper.drain = asyncio.get_running_loop().create_task(helper._drop_errors())
            return helper
        assert process.stderr is not None  # noqa: S101 - a pipe was asked for
        with suppress(TimeoutError):
            words = await asyncio.wait_for(process.stderr.read(500), 1)
            said["message"] = words.decode(errors="replace").strip().partition("\n")[0] or said.get("message")
        await helper.stop()
        raise OperatorError(f"the sandbox's process did not start: {said.get('message', 'it said nothing')}")

    @property
    def is_alive(self) -> bool:
        return self.process.returncode is None and not self.broken

    async def ask(self, message: Mapping[str, Any], *, seconds: float) -> dict[str, Any]:
        """The answer to one message; what is no answer in time is a failure, and the end of this process."""
        assert self.process.stdin is not None  # noqa: S101 - a pipe was asked for
        try:
            self.process.stdin.write(json.dumps(message, allow_nan=False).encode() + b"\n")
            await asyncio.wait_for(self.process.stdin.drain(), seconds)
        except (TypeError, ValueError) as error:
            return {"failed": "ValueError", "message": f"not JSON: {error}"}
        except (OSError, TimeoutError):
            self.broken = True
            return {"failed": "Crashed", "message": "the sandbox's process has ended"}
        return await self._answer(seconds)

    async def _answer(self, seconds: float) -> dict[str, Any]:
        assert self.process.stdout is not None  # noqa: S101 - a pipe was asked for
        said: Any = None
        try:
            line = await asyncio.wait_for(self.process.stdout.readline(), seconds)
            said = json.loads(line) if line else None
        except TimeoutError:
            self.broken = True
            return {"failed": "TimeoutError", "message": "the code did not end in time and was killed"}
        except (ValueError, RecursionError):  # too long, or not JSON
            pass
        if not _is_answer(said):
            self.broken = True
            return {
                "failed": "Crashed",
                "message": "the sandbox's process ended, or answered with something else",
            }
        return dict(said)

    async def _drop_errors(self) -> None:
        """Nothing that the helper complains of may fill its pipe, nor reach a terminal."""
        assert self.process.stderr is not None  # noqa: S101 - a pipe was asked for
        while await self.process.stderr.read(65_536):
            pass

    async def stop(self) -> None:
        """Kill it, with everything it started."""
        with suppress(ProcessLookupError):
            if sys.platform == "win32":
                self.process.kill()
            else:
                os.killpg(self.process.pid, signal.SIGKILL)
        await self.process.wait()
        if self.drain is not None:
            await self.drain
        assert self.process.stdin is not None  # noqa: S101 - a pipe was asked for
        self.process.stdin.close()
        with suppress(OSError):
            await self.process.stdin.wait_closed()


def _is_answer(said: Any) -> bool:
    """Whether a message from the box has a shape that is read here."""
    if not isinstance(said, dict):
        return False
    if not _is_shallow(said):
        return False
    if "call" in said:
        return (
            isinstance(said["call"], str)
            and isinstance(said.get("args"), list)
            and _is_named(said.get("kwargs"))
        )
    if "state" in said:
        return _is_base64(said["state"]) and isinstance(said.get("printed"), str)
    if "diagnostics" in said:
        return isinstance(said["diagnostics"], list) and all(map(_is_diagnostic, said["diagnostics"]))
    return "failed" in said or "done" in said or "ready" in said


def _is_shallow(value: Any) -> bool:
    """Whether it is nested less deep than anything that reads JSON recursively can bear."""
    level = [value]
    for _ in range(_DEPTH_MAX):
        level = [
            inner
            for outer in level
            if isinstance(outer, list | dict)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return True
    return False


def _is_named(arguments: Any) -> bool:
    return isinstance(arguments, dict) and all(isinstance(name, str) for name in arguments)


def _is_diagnostic(fault: Any) -> bool:
    return (
        isinstance(fault, dict)
        and isinstance(fault.get("message"), str)
        and isinstance(fault.get("location"), dict)
        and "row" in fault["location"]
        and "code" in fault
    )


def _is_base64(text: Any) -> bool:
    try:
        base64.b64decode(text, validate=True)
    except (TypeError, ValueError):
        return False
    return isinstance(text, str)
