"""The program inside the box: one process per run of one tool, with an interpreter of its own for the tool's code.

It is started by `tool_sandbox.py` as a file, not imported: in the box there is neither this package nor anything else
but the interpreter, Python's own library and `pydantic_monty`. It reads one JSON message per line and answers each with
one. Nothing but JSON crosses, so that not even a broken interpreter hands the agent's process anything but text.

Arguments: the folder that `pydantic_monty` is in, the interpreter's program, the bytes of address space allowed.
"""

from __future__ import annotations

import base64
import datetime as dt
import decimal
import json
import os
import sys
from typing import Any

_PRINTED_CHARACTERS = 10_000
_MESSAGE_CHARACTERS = 2_000


class _Printed:
    """What the code prints, up to a limit; the rest is dropped."""

    def __init__(self) -> None:
        self.text = ""

    def __call__(self, _stream: str, text: str) -> None:
        self.text += text[: max(0, _PRINTED_CHARACTERS - len(self.text))]


def _plain(value: Any) -> Any:
    """What JSON has no word for, as the nearest it has."""
    import pydantic_monty

    if isinstance(value, dt.date | dt.time):
        return value.isoformat()
    if isinstance(value, decimal.Decimal):
        return str(value)
    if isinstance(value, set | frozenset):
        return list(value)
    if isinstance(value, pydantic_monty.MontyClassProxy):
        return value.attributes
    raise TypeError(
        f"a value of type {type(value).__name__} cannot leave the sandbox; return text, numbers, lists, dicts"
    )


def _limit_this_process(address_space: int) -> None:
    if sys.platform == "win32":
        return
    import resource

    for kind, amount in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_AS, address_space),
        (resource.RLIMIT_NOFILE, 64),
    ):
        _, most = resource.getrlimit(kind)
        wanted = amount if most == resource.RLIM_INFINITY else min(amount, most)
        resource.setrlimit(kind, (wanted, wanted))


class _Session:
    """One session of the interpreter, and where it stands."""

    def __init__(self, pool: Any) -> None:
        self._pool = pool
        self._session: Any = None
        self._at: Any = None
        self._granted: frozenset[str] = frozenset()
        self._result_characters = 0
        self._printed = _Printed()

    def check(self, message: dict[str, Any]) -> dict[str, Any]:
        """Type-check the code, and then the calls, each with these stubs; the code's module level runs."""
        import pydantic_monty

        found: list[Any] = []
        with self._pool.checkout(
            limits=message["limits"],
            os_policy={"sleep": "zero"},
            type_check=True,
            type_check_stubs=message["stubs"],
            type_check_format="json",
            script_name="tool.py",
        ) as session:
            for number, part in enumerate(message["parts"]):
                try:
                    at = session.feed_start(part, print_callback=self._printed)
                    while not isinstance(at, pydantic_monty.MontyComplete):
                        at = self._onward(at, granted=frozenset())
                except pydantic_monty.MontyTypingError as error:
                    found += [{**fault, "part": number} for fault in json.loads(error.display())]
                    break
        return {"diagnostics": found}

    def start(self, message: dict[str, Any]) -> dict[str, Any]:
        """Run the module level without any host function, then begin the call."""
        import pydantic_monty

        self._open(message, limits=message["limits"])
        at = self._session.feed_start(message["code"], print_callback=self._printed)
        while not isinstance(at, pydantic_monty.MontyComplete):
            at = self._onward(at, granted=frozenset())
        self._at = self._session.feed_start(
            "run(**_arguments)", inputs={"_arguments": message["arguments"]}, print_callback=self._printed
        )
        return self._until_a_call()

    def load(self, message: dict[str, Any]) -> dict[str, Any]:
        """Put back a run that was paused in a call."""
        import pydantic_monty

        self._open(message, limits=None)
        at = self._session.load_snapshot(base64.b64decode(message["state"]), print_callback=self._printed)
        if not isinstance(at, pydantic_monty.FunctionSnapshot) or at.is_os_function:
            raise ValueError("the snapshot is not of a run that waits for a host function")
        self._at = at
        return self._call(at)

    def answer(self, message: dict[str, Any]) -> dict[str, Any]:
        """Go on with a host function's answer."""
        if "error" in message:
            self._at = self._at.resume({"exc_type": "RuntimeError", "message": message["error"]})
        else:
            self._at = self._at.resume({"return_value": message["value"]})
        return self._until_a_call()

    def dump(self, _message: dict[str, Any]) -> dict[str, Any]:
        """The run as it waits for a host function."""
        state = base64.b64encode(self._at.dump()).decode()
        return {"state": state, "printed": self._printed.text}

    def printed_so_far(self) -> str:
        """What the code has printed, up to the limit."""
        return self._printed.text

    def _open(self, message: dict[str, Any], *, limits: Any) -> None:
        self._granted = frozenset(message["granted"])
        self._result_characters = int(message["result_characters"])
        self._session = self._pool.checkout(
            limits=limits,
            script_name="tool.py",
            os_policy={"sleep": "zero"},  # nobody waits for a tool that waits
        )
        self._session.__enter__()

    def _until_a_call(self) -> dict[str, Any]:
        import pydantic_monty

        while not isinstance(self._at, pydantic_monty.MontyComplete):
            at = self._at
            if self._is_granted_call(at):
                return self._call(at)
            self._at = self._onward(at, granted=self._granted)
        text = json.dumps(self._at.output, default=_plain, allow_nan=False)
        if len(text) > self._result_characters:
            raise ValueError(
                f"the result has {len(text)} characters as JSON; at most {self._result_characters} may leave"
            )
        return {"done": json.loads(text), "printed": self._printed.text}

    def _is_granted_call(self, at: Any) -> bool:
        import pydantic_monty

        return (
            isinstance(at, pydantic_monty.FunctionSnapshot)
            and not at.is_os_function
            and at.object_id is None
            and at.function_name in self._granted
        )

    @staticmethod
    def _call(at: Any) -> dict[str, Any]:
        arguments = json.loads(json.dumps([list(at.args), at.kwargs], default=_plain, allow_nan=False))
        return {"call": str(at.function_name), "args": arguments[0], "kwargs": arguments[1]}

    @staticmethod
    def _onward(at: Any, *, granted: frozenset[str]) -> Any:
        """Past everything but a call of a granted function: there are no files, no modules and no other names."""
        import pydantic_monty

        if isinstance(at, pydantic_monty.NameLookupSnapshot):
            if at.object_id is None and at.variable_name in granted:

                def stands_for() -> None:
                    """Only its name crosses into the sandbox."""

                stands_for.__name__ = at.variable_name
                return at.resume(value=stands_for)
            return at.resume()
        if isinstance(at, pydantic_monty.FunctionSnapshot):
            if at.is_os_function:
                return at.resume_auto()  # with no mount and no handler this refuses
            return at.resume(
                {"exc_type": "NameError", "message": f"name {at.function_name!r} is not defined"}
            )
        raise RuntimeError("the code waits for something that nobody will answer")


def _failure(error: BaseException) -> dict[str, Any]:
    """What went wrong, for whoever wrote the code."""
    import pydantic_monty

    kind, text, line = type(error).__name__, str(error), None
    if isinstance(error, pydantic_monty.MontyCrashedError):
        kind = "TimeoutError" if error.timed_out else "Crashed"
    elif isinstance(error, pydantic_monty.MontySyntaxError | pydantic_monty.MontyRuntimeError):
        kind, _, text = error.display("type-msg").partition(": ")
        frames = error.traceback()
        line = frames[-1].line if frames else None
        inner = [frame.line for frame in frames if frame.filename.endswith("tool.py")]
        line = inner[-1] if inner else line
    return {"failed": kind[:100], "message": text[:_MESSAGE_CHARACTERS], "line": line}


def main() -> None:
    """Answer messages until there are no more."""
    package_folder, program, address_space = sys.argv[1:4]
    _limit_this_process(int(address_space))
    sys.path.insert(0, package_folder)
    import pydantic_monty

    # The answers have a pipe of their own: what anything here prints must not be taken for one.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    with pydantic_monty.Monty(
        binary_path=program, min_processes=1, max_processes=1, request_timeout=60
    ) as pool:
        session = _Session(pool)
        verbs = {
            "check": session.check,
            "start": session.start,
            "load": session.load,
            "answer": session.answer,
            "dump": session.dump,
        }
        print(json.dumps({"ready": pydantic_monty.__version__}), file=answers, flush=True)
        for line in sys.stdin:
            try:
                message = json.loads(line)
                answer = verbs[message["do"]](message)
            except Exception as error:  # noqa: BLE001 - told to the process that asked, which decides
                answer = _failure(error) | {"printed": session.printed_so_far()}
            print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
