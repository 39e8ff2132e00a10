"""Where code that an agent wrote runs: an interpreter without host access, in a process of its own, in a box.

Three walls, each of which holds alone against what is tried in practice. The code is run by `pydantic-monty`, an
interpreter that knows no files, no network, no modules of ours and no way to the process around it. Its worker and the
client that talks to it sit together in a helper process under bubblewrap, with no network, no other process and no
file but what they run on, and that process serves one run and is thrown away. And nothing but JSON comes out of it.

The only things that the code can do are the host functions it was granted, and those are calls of the executor.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

from agent.errors import InvalidRequest, OperatorError
from agent.events import emit
from agent.execution.host_function import CallHost, HostAnswer, HostFunction, annotation_of
from agent.execution.sandbox_confinement import HelperPrograms, confined_command, plain_command
from agent.execution.sandbox_process import SandboxProcess
from agent.portal import forget_in_forked_child, portal

_GRACE_SECONDS = 3.0
_IGNORES = re.compile(r"#[^\n]*\b(?:type|ty|pyright|mypy)\s*:\s*ignore", re.IGNORECASE)
_NOT_DEFINED = re.compile(r"Name `([^`]+)` used when not defined")
_RUN = re.compile(r"^def\s+run\s*\(", re.MULTILINE)
_ASYNC_RUN = re.compile(r"^async\s+def\s+run\s*\(", re.MULTILINE)
_CONFINE_WAITS = (0.2, 1.0)
"""Seconds between attempts to start behind bubblewrap."""
_CONFINE_AGAIN_SECONDS = 300.0
"""How long code runs outside of a box that the kernel refused, before a box is tried again."""
_KERNEL_REFUSES = re.compile(
    r"permission|not permitted|not support|not implemented|max_\*|unknown option|invalid argument",
    re.IGNORECASE,
)
"""What bubblewrap says where this kernel, or whatever contains it, lets nobody make a box."""


@dataclass(frozen=True, kw_only=True)
class SandboxLimits:
    """What one run of one tool may use."""

    seconds: float = 2.0
    """Time that the code computes between its first line and its last; waiting for host functions does not count."""
    memory_bytes: int = 64 << 20
    """Memory of the code's values."""
    host_calls: int = 20
    """Calls of host functions, also over a pause."""
    suspensions: int = 200
    """Times that the code may ask its host for anything, such as a name that is not there."""
    code_characters: int = 20_000
    """Length of the code."""
    argument_characters: int = 100_000
    """Length of the arguments, and of each answer of a host function, as JSON."""
    result_characters: int = 200_000
    """Length of the result as JSON."""

    def as_message(self) -> dict[str, Any]:
        """As the interpreter takes them."""
        return {
            "max_feed_duration_secs": self.seconds,
            "max_memory": self.memory_bytes,
            "max_suspensions": self.suspensions,
            "max_total_sleep_secs": 0.0,
            "max_recursion_depth": 200,
        }


@dataclass(frozen=True, kw_only=True)
class CodeCheck:
    """What is known of code before it runs."""

    problems: tuple[str, ...]
    """What must be changed, each with its line; empty: nothing."""
    capabilities: tuple[str, ...]
    """The host functions that it uses, sorted. It is granted these and no others."""


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A run that waits in a call of a host function. It proves nothing of itself: who stores it must seal it."""

    state: str
    """The interpreter's memory, in base64."""
    function: str
    """The host function it waits for."""
    arguments: dict[str, Any]
    """The arguments of that call."""
    approval_id: str
    """What it waits for."""
    granted: tuple[str, ...]
    """The host functions it may call."""
    host_calls: int
    """How many it has called, this one included."""
    printed: str
    """What it had printed."""

    def as_json(self) -> dict[str, Any]:
        """As plain values."""
        return dict(vars(self)) | {"granted": list(self.granted)}

    @classmethod
    def from_json(cls, kept: Mapping[str, Any]) -> Snapshot:
        """The inverse of `as_json`."""
        return cls(**{**kept, "granted": tuple(kept["granted"])})


@dataclass(frozen=True, kw_only=True)
class SandboxResult:
    """What became of one run."""

    status: Literal["done", "failed", "paused"]
    value: Any = None
    """What `run` returned, as JSON."""
    printed: str = ""
    """What it printed, up to 10,000 characters."""
    error: str | None = None
    """Kind, message and line of what went wrong, for whoever wrote the code."""
    paused: Snapshot | None = None
    """Where it waits."""
    host_calls: int = 0
    """How many host functions it called."""
    duration_ms: int = 0
    """From start to end, waiting included."""
    confined: bool = True
    """Whether the process was behind bubblewrap."""


class ToolSandbox:
    """Checks and runs code that an agent wrote. One process per run, at most `at_once` of them, one kept ready.

    Host functions are called on the portal's loop.
    """

    def __init__(self, limits: SandboxLimits | None = None, *, at_once: int = 4) -> None:
        self.limits = limits or SandboxLimits()
        self._at_once = at_once
        self._confined: bool | None = None
        self._confine_again = 0.0
        self._programs: HelperPrograms | None = None
        self.start_anew()
        forget_in_forked_child(self)

    def start_anew(self) -> None:
        """Forget the processes of a parent."""
        self._ready: asyncio.Task[SandboxProcess] | None = None
        self._slots: asyncio.Semaphore | None = None
        self._closes_at_exit = False

    async def check(
        self, code: str, parameters: Mapping[str, Any], host_functions: Sequence[HostFunction]
    ) -> CodeCheck:
        """Type-check code against its parameters and the host functions, in the sandbox.

        The module level of the code runs, without any host function.
        """
        problems = self._outward_problems(code)
        if problems:
            return CodeCheck(problems=tuple(problems), capabilities=())
        return await portal().run(self._check(code, parameters, host_functions))

    async def run(
        self,
        code: str,
        arguments: Mapping[str, Any],
        call_host: CallHost,
        *,
        host_functions: Sequence[HostFunction] = (),
    ) -> SandboxResult:
        """Run `run(**arguments)` of this code; it can call these host functions and no others."""
        problems = self._outward_problems(code)
        if problems:
            return SandboxResult(status="failed", error=problems[0])
        start = {
            "do": "start",
            "code": code,
            "arguments": dict(arguments),
            "limits": self.limits.as_message(),
            "granted": [function.name for function in host_functions],
            "result_characters": self.limits.result_characters,
        }
        if (length := _json_length(start["arguments"])) > self.limits.argument_characters:
            return SandboxResult(
                status="failed", error=f"ValueError: the arguments have {length} characters as JSON"
            )
        return await portal().run(self._drive(start, call_host, host_functions, calls=0, printed=""))

    async def resume(
        self,
        snapshot: Snapshot,
        answer: HostAnswer,
        call_host: CallHost,
        *,
        host_functions: Sequence[HostFunction],
    ) -> SandboxResult:
        """Go on with a run that was paused, with the answer to the call it waits in.

        The snapshot must be the caller's own: nothing here can tell a forged one.
        """
        functions = [function for function in host_functions if function.name in snapshot.granted]
        load = {
            "do": "load",
            "state": snapshot.state,
            "granted": [function.name for function in functions],
            "result_characters": self.limits.result_characters,
        }
        return await portal().run(
            self._drive(
                load, call_host, functions, calls=snapshot.host_calls, printed=snapshot.printed, first=answer
            )
        )

    async def is_confined(self) -> bool:
        """Whether helpers run behind bubblewrap here; starts one if it is not known yet."""
        return await portal().run(self._is_confined())

    async def close(self) -> None:
        """Stop the process that is kept ready."""
        await portal().run(self._close())

    # In the portal from here on.

    def _outward_problems(self, code: str) -> list[str]:
        """What can be said of code without parsing it: parsing is done in the box."""
        if len(code) > self.limits.code_characters:
            return [f"the code has {len(code)} characters; at most {self.limits.code_characters} are allowed"]
        if any(ord(character) < 32 and character not in "\n\t" for character in code.replace("\r\n", "\n")):
            return ["the code holds control characters; only line ends and tabs are allowed"]
        try:
            code.encode()
        except UnicodeEncodeError:
            return ["the code holds half a character (a lone surrogate)"]
        problems = []
        if _ASYNC_RUN.search(code):
            problems.append(
                "`run` must be a plain function, not `async def`: host functions are called without await"
            )
        elif not _RUN.search(code):
            problems.append("the code must define a function `def run(...)` at its top level")
        if _IGNORES.search(code) or "no_type_check" in code:
            problems.append(
                "the type check cannot be switched off: remove the comment or decorator that does"
            )
        return problems

    async def _check(
        self, code: str, parameters: Mapping[str, Any], host_functions: Sequence[HostFunction]
    ) -> CodeCheck:
        properties = parameters.get("properties", {})
        required = set(parameters.get("required", ()))
        arguments = "".join(
            f"given_{name}_: {annotation_of(schema)}\n" for name, schema in properties.items()
        )
        base = f"from typing import Any, Literal\n{arguments}"
        stubs = base + "".join(f"def {function.signature}: ...\n" for function in host_functions)
        calls = [
            f"    run({', '.join(f'{name}=given_{name}_' for name in names)})\n"
            for names in dict.fromkeys((tuple(properties), tuple(n for n in properties if n in required)))
        ]
        whole = f"def calls_of_run() -> None:\n{''.join(calls)}"
        message = {"do": "check", "limits": self.limits.as_message()}
        bare = await self._ask_once({**message, "stubs": base, "parts": [code]})
        if "failed" in bare:
            return CodeCheck(problems=(_error_of(bare),), capabilities=())
        missing = {
            match[1]
            for fault in bare["diagnostics"]
            for match in [_NOT_DEFINED.search(fault["message"])]
            if match
        }
        capabilities = tuple(sorted(missing & {function.name for function in host_functions}))
        full = await self._ask_once({**message, "stubs": stubs, "parts": [code, whole]})
        if "failed" in full:
            return CodeCheck(problems=(_error_of(full),), capabilities=capabilities)
        problems = tuple(
            f"{_place_of(fault)}: {fault['message']} [{fault['code']}]"
            for fault in full["diagnostics"]
            if fault.get("severity") == "error"
        )
        return CodeCheck(problems=problems[:20], capabilities=capabilities)

    async def _ask_once(self, message: dict[str, Any]) -> dict[str, Any]:
        async with self._slot():
            helper = await self._helper()
            try:
                return await helper.ask(message, seconds=2 * self.limits.seconds + _GRACE_SECONDS)
            finally:
                await helper.stop()
                self._make_ready()

    async def _drive(
        self,
        begin: dict[str, Any],
        call_host: CallHost,
        host_functions: Sequence[HostFunction],
        *,
        calls: int,
        printed: str,
        first: HostAnswer | None = None,
    ) -> SandboxResult:
        known = {function.name: function for function in host_functions}
        started = time.monotonic()
        async with self._slot():
            helper = await self._helper()
            try:
                seconds = 2 * self.limits.seconds + _GRACE_SECONDS
                said = await helper.ask(begin, seconds=seconds)
                waiting = first
                while "call" in said:
                    if waiting is None:
                        calls += 1
                        waiting = await self._called(known.get(said["call"]), said, call_host, calls)
                    if waiting.paused is not None:
                        dumped = await helper.ask({"do": "dump"}, seconds=seconds)
                        if "failed" in dumped:
                            said = dumped
                            break
                        snapshot = Snapshot(
                            state=dumped["state"],
                            function=said["call"],
                            arguments=known[said["call"]].arguments_of(said["args"], said["kwargs"]),
                            approval_id=waiting.paused,
                            granted=tuple(known),
                            host_calls=calls,
                            printed=printed + dumped["printed"],
                        )
                        return self._result(
                            started, helper, status="paused", paused=snapshot, host_calls=calls
                        )
                    reply: dict[str, Any] = (
                        {"do": "answer", "error": waiting.error[:2000]}
                        if waiting.error is not None
                        else {"do": "answer", "value": waiting.value}
                    )
                    waiting = None
                    said = await helper.ask(reply, seconds=seconds)
            finally:
                await helper.stop()
                self._make_ready()
        printed += str(said.get("printed", ""))
        if "failed" in said:
            return self._result(
                started, helper, status="failed", error=_error_of(said), printed=printed, host_calls=calls
            )
        return self._result(
            started, helper, status="done", value=said.get("done"), printed=printed, host_calls=calls
        )

    async def _called(
        self, function: HostFunction | None, said: Mapping[str, Any], call_host: CallHost, calls: int
    ) -> HostAnswer:
        """The answer to one call; what is out of bounds never reaches the host."""
        if function is None:
            return HostAnswer(error=f"{said['call']!r} was not granted to this tool")
        if calls > self.limits.host_calls:
            return HostAnswer(error=f"a run may call at most {self.limits.host_calls} host functions")
        try:
            arguments = function.arguments_of(said["args"], said["kwargs"])
        except InvalidRequest as error:
            return HostAnswer(error=str(error))
        if _json_length(arguments) > self.limits.argument_characters:
            return HostAnswer(error=f"the arguments of {function.name}() are too long")
        answer = await call_host(function.name, arguments)
        if answer.paused is None and answer.error is None:
            try:
                length = _json_length(answer.value)
            except (TypeError, ValueError) as error:
                return HostAnswer(
                    error=f"{function.name}() answered with something that is not JSON: {error}"
                )
            if length > self.limits.argument_characters:
                return HostAnswer(
                    error=f"{function.name}() answered with {length} characters, too many to take in"
                )
        return answer

    def _result(self, started: float, helper: SandboxProcess, **facts: Any) -> SandboxResult:
        duration_ms = int((time.monotonic() - started) * 1000)
        return SandboxResult(duration_ms=duration_ms, confined=helper.confined, **facts)

    def _slot(self) -> asyncio.Semaphore:
        if self._slots is None:
            self._slots = asyncio.Semaphore(self._at_once)
        return self._slots

    async def _helper(self) -> SandboxProcess:
        """A process that has served nobody yet."""
        if not self._closes_at_exit:
            self._closes_at_exit = True
            portal().at_exit(self._close_now)
        ready, self._ready = self._ready, None
        if ready is not None:
            with suppress(OperatorError):  # then a new one is tried, whose failure is told
                helper = await ready
                if helper.is_alive:
                    return helper
                await helper.stop()
        return await self._start_helper()

    def _make_ready(self) -> None:
        if self._ready is None:
            self._ready = asyncio.get_running_loop().create_task(self._start_helper())
            self._ready.add_done_callback(lambda done: done.cancelled() or done.exception())

    async def _start_helper(self) -> SandboxProcess:
        """Start one, behind bubblewrap if that has worked here, or has not been tried yet."""
        if self._programs is None:
            self._programs = await asyncio.to_thread(HelperPrograms.found)
        confined = confined_command(self._programs)
        reason = "bubblewrap is not installed"
        if confined is not None and (self._confined is not False or time.monotonic() >= self._confine_again):
            refused = await self._start_confined(confined)
            if isinstance(refused, SandboxProcess):
                self._confined = True
                return refused
            reason = str(refused)
            self._confine_again = time.monotonic() + _CONFINE_AGAIN_SECONDS
        elif self._confined:
            raise OperatorError(
                "bubblewrap was removed while agent-written tools ran behind it. Install it again."
            )
        helper = await SandboxProcess.start(plain_command(self._programs), confined=False)
        if self._confined is None:
            self._confined = False
            emit("sandbox_confinement_unavailable", reason=reason[:300])
        return helper

    async def _start_confined(self, command: Sequence[str]) -> SandboxProcess | OperatorError:
        """Start one behind bubblewrap, or the kernel's refusal to make a box.

        Raises:
            OperatorError: it failed in another way, such as for want of memory, or although it has worked before: that
                is no reason to run code outside of a box.
        """
        for wait_seconds in (*_CONFINE_WAITS, None):
            try:
                return await SandboxProcess.start(command, confined=True)
            except OperatorError as error:
                if wait_seconds is not None:
                    await asyncio.sleep(wait_seconds)
                elif self._confined or not _KERNEL_REFUSES.search(str(error)):
                    raise
                else:
                    return error
        raise AssertionError("unreachable")

    async def _is_confined(self) -> bool:
        if self._confined is None:
            async with self._slot():
                await (await self._helper()).stop()
                self._make_ready()
        return bool(self._confined)

    async def _close(self) -> None:
        ready, self._ready = self._ready, None
        if ready is not None:
            with suppress(OperatorError):
                await (await ready).stop()
        if self._closes_at_exit:
            self._closes_at_exit = False
            portal().forget(self._close_now)

    def _close_now(self) -> None:
        self._closes_at_exit = False  # the portal is working through its list and must find it unchanged
        portal().run_sync(self._close())


def _place_of(fault: Mapping[str, Any]) -> str:
    return (
        f"line {fault['location']['row']}"
        if fault.get("part") == 0
        else "called with the declared parameters"
    )


def _error_of(said: Mapping[str, Any]) -> str:
    where = f" (line {said['line']})" if isinstance(said.get("line"), int) else ""
    return f"{str(said.get('failed'))[:100]}: {str(said.get('message', ''))[:2000]}{where}"


def _json_length(value: Any) -> int:
    return len(json.dumps(value, allow_nan=False))
