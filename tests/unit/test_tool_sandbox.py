"""Code of agents in the sandbox: what it can, what it cannot, and what is told of it."""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from agent.errors import InvalidRequest, OperatorError
from agent.events import Event, listening
from agent.execution import sandbox_confinement
from agent.execution.continuation_seal import ContinuationSeal
from agent.execution.host_function import HostAnswer, HostFunction, annotation_of
from agent.execution.sandbox_confinement import HelperPrograms
from agent.execution.sandbox_process import SandboxProcess
from agent.execution.tool_sandbox import SandboxLimits, Snapshot, ToolSandbox
from agent.portal import portal

QUERY = HostFunction(
    name="query_data",
    parameters={
        "type": "object",
        "properties": {"limit": {"type": "integer"}, "table": {"type": "string"}},
        "required": ["table"],
    },
)
SEND = HostFunction(
    name="send_email",
    parameters={"type": "object", "properties": {"to": {"type": "string"}}, "required": ["to"]},
)
NUMBER = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}


class Host:
    """Answers calls and remembers them."""

    def __init__(self, answer: HostAnswer | None = None) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self._answer = answer or HostAnswer(value=[{"id": 1}])

    async def __call__(self, name: str, arguments: dict[str, Any]) -> HostAnswer:
        self.calls.append((name, arguments))
        return self._answer


@pytest.fixture
async def sandbox() -> AsyncIterator[ToolSandbox]:
    made = ToolSandbox(SandboxLimits(seconds=1.0))
    yield made
    await made.close()


async def test_code_runs_with_its_arguments_and_its_result_comes_back_as_json(sandbox: ToolSandbox) -> None:
    code = (
        "import datetime\nfrom decimal import Decimal\n"
        "def run(n):\n    print('n is', n)\n"
        "    return {'tuple': (n, n + 1), 'day': datetime.date(2026, 1, 2), 'price': Decimal('1.50')}\n"
    )
    result = await sandbox.run(code, {"n": 3}, Host())
    assert result.status == "done"
    assert result.value == {"tuple": [3, 4], "day": "2026-01-02", "price": "1.50"}
    assert result.printed == "n is 3\n"


async def test_a_host_function_is_called_by_position_and_by_name(sandbox: ToolSandbox) -> None:
    host = Host()
    code = "def run():\n    rows = query_data('orders', limit=2)\n    return len(rows)\n"
    result = await sandbox.run(code, {}, host, host_functions=[QUERY])
    assert (result.status, result.value, result.host_calls) == ("done", 1, 1)
    assert host.calls == [("query_data", {"table": "orders", "limit": 2})]


@pytest.mark.parametrize(
    "call", ["send_email(to='x')", "eval('send_em' + 'ail')(to='x')", "[f(to='x') for f in [send_email]]"]
)
async def test_a_function_that_was_not_granted_is_not_called(sandbox: ToolSandbox, call: str) -> None:
    host = Host()
    result = await sandbox.run(f"def run():\n    return {call}\n", {}, host, host_functions=[QUERY])
    assert result.status == "failed"
    assert "NameError" in str(result.error)
    assert host.calls == []


async def test_loading_the_code_calls_nothing(sandbox: ToolSandbox) -> None:
    host = Host()
    result = await sandbox.run(
        "x = query_data('t')\ndef run():\n    return x\n", {}, host, host_functions=[QUERY]
    )
    assert result.status == "failed"
    assert host.calls == []


async def test_a_failed_call_can_be_caught_by_the_code(sandbox: ToolSandbox) -> None:
    code = (
        "def run():\n    try:\n        return query_data('t')\n"
        "    except RuntimeError as error:\n        return str(error)\n"
    )
    result = await sandbox.run(code, {}, Host(HostAnswer(error="no such table")), host_functions=[QUERY])
    assert result.value == "no such table"


async def test_calls_beyond_the_limit_never_reach_the_host(sandbox: ToolSandbox) -> None:
    host = Host()
    code = (
        "def run():\n    for i in range(100):\n        try:\n            query_data('t')\n"
        "        except RuntimeError:\n            pass\n    return 'through'\n"
    )
    await sandbox.run(code, {}, host, host_functions=[QUERY])
    assert len(host.calls) == sandbox.limits.host_calls


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        ("while True:\n        pass", "TimeoutError"),
        ("x = 10 ** 50\n    while True:\n        x = x * x", "Error"),
        ("return 'a' * 10 ** 11", "MemoryError"),
        ("return 'x' * 1_000_000", "characters as JSON"),
        ("return float('nan')", "ValueError"),
        ("return b'x'", "cannot leave the sandbox"),
    ],
)
async def test_a_limit_ends_the_run_and_not_the_sandbox(sandbox: ToolSandbox, body: str, kind: str) -> None:
    result = await sandbox.run(f"def run():\n    {body}\n", {}, Host())
    assert result.status == "failed"
    assert kind in str(result.error)
    assert (await sandbox.run("def run():\n    return 1\n", {}, Host())).value == 1


async def test_an_error_tells_its_line(sandbox: ToolSandbox) -> None:
    result = await sandbox.run("def run():\n    a = 1\n    raise ValueError('odd')\n", {}, Host())
    assert result.error == "ValueError: odd (line 3)"


async def test_nothing_of_one_run_is_there_in_the_next(sandbox: ToolSandbox) -> None:
    code = "import json\ndef run():\n    json.kept = 1\n    global kept\n    kept = 'secret'\n    return 1\n"
    await sandbox.run(code, {}, Host())
    result = await sandbox.run("def run():\n    return kept\n", {}, Host())
    assert result.status == "failed"
    assert "NameError" in str(result.error)


async def test_the_check_finds_the_capabilities(sandbox: ToolSandbox) -> None:
    code = (
        "from typing import Any\n"
        "def rows(table: str) -> Any:\n    '''Not send_email.'''\n    return query_data(table)\n"
        "def run(n: int) -> Any:\n    return rows('t')\n"
    )
    check = await sandbox.check(code, NUMBER, [QUERY, SEND])
    assert check.problems == ()
    assert check.capabilities == ("query_data",)


@pytest.mark.parametrize(
    ("code", "complaint"),
    [
        ("def run(n: int) -> int:\n    return query_data(tabel='t')\n", "tabel"),
        ("def run(n: int) -> int:\n    return undefined_thing\n", "undefined_thing"),
        ("def run(n: str) -> str:\n    return n\n", "called with the declared parameters"),
        ("def run(m: int) -> int:\n    return m\n", "called with the declared parameters"),
        ("def run(n: int):\n    yield n\n", "yield"),
        ("def run(n: int:\n", "line 1"),
        ("def other(n: int) -> int:\n    return n\n", "def run"),
        ("async def run(n: int) -> int:\n    return n\n", "plain function"),
        ("def run(n: int) -> int:\n    return 'x'  # type: ignore\n", "switched off"),
        ("def run(n: int) -> int:\n    return n\n" + "#" * 20_000, "characters"),
        ("def run(n: int) -> int:\n    return n\n\x00", "control characters"),
    ],
)
async def test_code_that_is_wrong_is_found_before_it_runs(
    sandbox: ToolSandbox, code: str, complaint: str
) -> None:
    check = await sandbox.check(code, NUMBER, [QUERY])
    assert any(complaint in problem for problem in check.problems), check.problems


async def test_a_run_pauses_and_goes_on_in_another_sandbox(sandbox: ToolSandbox) -> None:
    code = "def run(n):\n    print('before')\n    rows = query_data('t')\n    print('after')\n    return [n, rows]\n"
    paused = await sandbox.run(code, {"n": 7}, Host(HostAnswer(paused="approval")), host_functions=[QUERY])
    assert paused.status == "paused"
    assert paused.paused is not None
    assert (paused.paused.function, paused.paused.arguments) == ("query_data", {"table": "t"})
    other, host = ToolSandbox(), Host()
    try:
        kept = Snapshot.from_json(paused.paused.as_json())
        result = await other.resume(kept, HostAnswer(value="rows"), host, host_functions=[QUERY])
    finally:
        await other.close()
    assert result.value == [7, "rows"]
    assert result.printed == "before\nafter\n"
    assert host.calls == []


async def test_a_pause_does_not_give_more_calls(sandbox: ToolSandbox) -> None:
    host = Host()
    code = "def run():\n    for i in range(50):\n        query_data('t')\n"
    paused = await sandbox.run(code, {}, Host(HostAnswer(paused="approval")), host_functions=[QUERY])
    assert paused.paused is not None
    await sandbox.resume(paused.paused, HostAnswer(value=1), host, host_functions=[QUERY])
    assert len(host.calls) == sandbox.limits.host_calls - 1


async def test_a_snapshot_does_not_grant_what_its_tool_was_not(sandbox: ToolSandbox) -> None:
    code = "def run():\n    query_data('t')\n    return send_email(to='x')\n"
    paused = await sandbox.run(code, {}, Host(HostAnswer(paused="approval")), host_functions=[QUERY])
    assert paused.paused is not None
    host = Host()
    result = await sandbox.resume(paused.paused, HostAnswer(value=1), host, host_functions=[QUERY, SEND])
    assert result.status == "failed"
    assert host.calls == []


@pytest.mark.parametrize(
    "changed",
    [
        {"payload": "other"},
        {"approval_id": "b"},
        {"code_hash": "d"},
        {"tenant_id": "f"},
        {"mac": "0" * 64},
        {"mac": None},
        {"mac": "é"},
    ],
)
def test_a_seal_holds_only_for_what_was_sealed(changed: dict[str, Any]) -> None:
    seal = ContinuationSeal("secret")
    place = {"approval_id": "a", "code_hash": "c", "tenant_id": "e"}
    whole = {"mac": seal.of("payload", **place), "payload": "payload", **place}
    assert ContinuationSeal("secret").holds(**whole)
    assert not seal.holds(**(whole | changed))
    assert not ContinuationSeal("other").holds(**whole)


def test_a_seal_without_a_secret_holds_in_no_other_process() -> None:
    place = {"approval_id": "a", "code_hash": "c", "tenant_id": "e"}
    assert not ContinuationSeal(None).holds(ContinuationSeal(None).of("payload", **place), "payload", **place)


async def test_without_bubblewrap_one_warning_is_given_and_code_still_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("agent.execution.sandbox_confinement.shutil.which", lambda _name: None)
    events: list[Event] = []
    sandbox = ToolSandbox()
    try:
        with listening(events.append):
            first = await sandbox.run("def run():\n    return 1\n", {}, Host())
            await sandbox.run("def run():\n    return 2\n", {}, Host())
            stolen = await sandbox.run("def run():\n    return open('/etc/passwd').read()\n", {}, Host())
    finally:
        await sandbox.close()
    assert (first.value, first.confined) == (1, False)
    assert stolen.status == "failed"
    assert [event.name for event in events] == ["sandbox_confinement_unavailable"]


def a_bubblewrap(folder: Path, *, fails: int, saying: str) -> str:
    """A bubblewrap that fails so many times before it works."""
    real = shutil.which("bwrap")
    if real is None:
        pytest.skip("no bubblewrap here")
    program = folder / "bwrap"
    program.write_text(
        f"#!/bin/sh\necho x >> {folder}/tries\n"
        f'if [ $(wc -l < {folder}/tries) -le {fails} ]; then echo "bwrap: {saying}" >&2; exit 1; fi\n'
        f'exec {real} "$@"\n'
    )
    program.chmod(0o755)
    return str(program)


async def test_a_box_that_fails_for_a_moment_is_tried_again_and_code_never_runs_outside_of_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    moment = "Creating new namespace failed: Resource temporarily unavailable"
    sandbox = ToolSandbox()
    try:
        if not await sandbox.is_confined():
            pytest.skip("no bubblewrap that works here")
    finally:
        await sandbox.close()
    bubblewrap = a_bubblewrap(tmp_path, fails=4, saying=moment)
    monkeypatch.setattr("agent.execution.sandbox_confinement.shutil.which", lambda _name: bubblewrap)
    sandbox = ToolSandbox()
    try:
        with pytest.raises(OperatorError, match="temporarily unavailable"):
            await sandbox.run("def run():\n    return 1\n", {}, Host())
        ran = await sandbox.run("def run():\n    return 1\n", {}, Host())
    finally:
        await sandbox.close()
    assert (ran.value, ran.confined) == (1, True)


async def test_a_box_that_the_kernel_refused_is_tried_again_later(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bubblewrap = a_bubblewrap(tmp_path, fails=3, saying="setting up uid map: Permission denied")
    monkeypatch.setattr("agent.execution.sandbox_confinement.shutil.which", lambda _name: bubblewrap)
    monkeypatch.setattr("agent.execution.tool_sandbox._CONFINE_AGAIN_SECONDS", 0.0)
    events: list[Event] = []
    sandbox = ToolSandbox()
    try:
        with listening(events.append):
            outside = await sandbox.run("def run():\n    return 1\n", {}, Host())
        inside = await sandbox.run("def run():\n    return 1\n", {}, Host())
    finally:
        await sandbox.close()
    assert (outside.confined, inside.confined) == (False, True)
    assert [event.name for event in events] == ["sandbox_confinement_unavailable"]


async def test_where_the_box_has_worked_code_never_runs_outside_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sandbox = ToolSandbox()
    try:
        if not await sandbox.is_confined():
            pytest.skip("no bubblewrap that works here")
        await sandbox.close()
        monkeypatch.setattr("agent.execution.sandbox_confinement.shutil.which", lambda _name: None)
        with pytest.raises(OperatorError, match="bubblewrap"):
            await sandbox.run("def run():\n    return 1\n", {}, Host())
    finally:
        await sandbox.close()


async def test_an_answer_of_another_shape_ends_the_process() -> None:
    nested = "[" * 300 + "1" + "]" * 300
    program = (
        "import sys\n"
        """print('{"ready": 1}', flush=True)\n"""
        "sys.stdin.readline()\n"
        f"""print('{{"done": {nested}}}', flush=True)\n"""
        "sys.stdin.readline()\n"
    )

    async def ask() -> tuple[dict[str, Any], bool]:
        process = await SandboxProcess.start([sys.executable, "-c", program], confined=False)
        try:
            return await process.ask({"do": "anything"}, seconds=5), process.is_alive
        finally:
            await process.stop()

    said, alive = await portal().run(ask())
    assert said["failed"] == "Crashed"
    assert not alive


async def test_the_processes_of_a_run_are_gone_when_it_has_ended() -> None:
    words = ("sandbox_helper.py", "/box/helper.py")
    others = _processes_of_ours_with(*words)  # of other sandboxes that this process has
    sandbox = ToolSandbox(SandboxLimits(seconds=1.0))
    running = asyncio.create_task(sandbox.run("def run():\n    while True:\n        pass\n", {}, Host()))
    while not _processes_of_ours_with(*words) - others:  # noqa: ASYNC110 - a process rings no bell
        await asyncio.sleep(0.01)
    await running
    await sandbox.close()
    assert _processes_of_ours_with(*words) - others == set()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
async def test_a_forked_child_has_processes_of_its_own(sandbox: ToolSandbox) -> None:
    assert (await sandbox.run("def run():\n    return 1\n", {}, Host())).value == 1
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            result = asyncio.new_event_loop().run_until_complete(
                sandbox.run("def run():\n    return 2\n", {}, Host())
            )
            os.write(write, str(result.value).encode())
        finally:
            os._exit(0)
    os.close(write)
    _, status = await asyncio.to_thread(os.waitpid, child, 0)
    assert os.read(read, 100) == b"2"
    assert status == 0
    os.close(read)
    assert (await sandbox.run("def run():\n    return 3\n", {}, Host())).value == 3


def test_the_helper_needs_nothing_of_this_package() -> None:
    source = Path(sandbox_confinement.__file__).with_name("sandbox_helper.py").read_text()
    assert "import agent" not in source
    assert "from agent" not in source
    assert HelperPrograms.found().interpreter.is_file()


@pytest.mark.parametrize(
    ("schema", "annotation"),
    [
        ({"type": "string"}, "str"),
        ({"type": "array", "items": {"type": "integer"}}, "list[int]"),
        ({"type": ["string", "null"]}, "str | None"),
        ({"anyOf": [{"type": "number"}, {"type": "null"}]}, "float | None"),
        ({"enum": ["a", "b"]}, "Literal['a', 'b']"),
        ({"type": "object"}, "dict[str, Any]"),
        ({"$ref": "#/$defs/x"}, "Any"),
        (True, "Any"),
    ],
)
def test_schemas_become_annotations(schema: Any, annotation: str) -> None:
    assert annotation_of(schema) == annotation


def test_arguments_given_twice_or_too_many_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="takes 2"):
        QUERY.arguments_of(["t", 1, 2], {})
    with pytest.raises(InvalidRequest, match="twice"):
        QUERY.arguments_of(["t"], {"table": "u"})


def _processes_of_ours_with(*words: str) -> set[int]:
    """This process's own children in whose command one of these words stands."""
    found = set()
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command = (entry / "cmdline").read_bytes().decode(errors="replace")
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has ended meanwhile
            continue
        if parent == os.getpid() and any(word in command for word in words):
            found.add(int(entry.name))
    return found
