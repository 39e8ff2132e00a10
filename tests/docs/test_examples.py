"""The code in the documentation is run as a reader would run it, page by page, and its printed output compared.

A Python block says what it is by a mark after its language:

`example`: it runs, after those before it on its page; a `text output` block after it is what it prints, `…` for
anything. `example model`: with a key set, against a local server that speaks OpenAI's protocol. `file=NAME`: a file of
the reader's project; with `example` it runs too, and test files are run by pytest. `sketch`: not run, only compiled,
because it needs something of the reader's or of a provider.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psycopg
import pytest
from typer.testing import CliRunner

from agent.cli import app
from agent.database.embedded import erase_embedded
from agent.learning.machine import living_machines
from agent.portal import portal
from agent.settings import current_settings
from agent.testing import tool_call
from agent.testing.openai_server import openai_server
from agent.testing.throwaway import ThrowawayDatabase
from tests.docs.pages import ROOT, Block, blocks, pages

PYTHON_PAGES = [page for page in pages() if any(block.language == "python" for block in blocks(page))]
RUN_PAGES = [page for page in PYTHON_PAGES if any("example" in block.marks for block in blocks(page))]
TEST_PAGES = [
    page for page in PYTHON_PAGES if any((block.file or "").startswith("test_") for block in blocks(page))
]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


class Desk:
    """A reader's desk: an empty folder, a database, nothing else set."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self._monkeypatch = monkeypatch
        self._not_ours = living_machines()

    def run(self, page: Path) -> None:
        """Run the examples of a page in one module."""
        module = types.ModuleType(f"docs_{page.stem.replace('-', '_')}")
        self._monkeypatch.setitem(sys.modules, module.__name__, module)
        printed: str | None = None
        for block in blocks(page):
            if block.file is not None:
                self.put(block)
            if block.language == "python" and "example" in block.marks:
                with self._model() if "model" in block.marks else contextlib.nullcontext():
                    printed = self._print(block, module)
            elif block.language == "text" and "output" in block.marks:
                assert printed is not None, f"{block.place}: output without an example before it"
                assert_printed(printed, block)
                printed = None

    def put(self, block: Block) -> None:
        """Write a file of the reader's project."""
        assert block.file is not None
        (self.folder / block.file).write_text(block.code, encoding="utf-8")

    def _print(self, block: Block, module: types.ModuleType) -> str:
        current_settings.cache_clear()
        # Empty lines in front, so that a traceback shows the line of the page.
        code = compile("\n" * (block.line - 1) + block.code, str(block.page), "exec", dont_inherit=True)
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(code, module.__dict__)  # noqa: S102 - the pages are ours
        return printed.getvalue()

    @contextlib.contextmanager
    def _model(self) -> Iterator[None]:
        with openai_server([answer_or_extract]) as server, self._monkeypatch.context() as patch:
            patch.setenv("OPENAI_API_KEY", "sk-local")
            patch.setenv("OPENAI_BASE_URL", server.url)
            yield
            assert server.chat_requests, "an example that is marked `model` calls none"
            self.close_machines()  # while the model still answers

    def close_machines(self) -> None:
        """End the workers of the examples' machines; what they recorded is learned first."""
        for machine in living_machines():
            if machine not in self._not_ours:
                machine.drain_sync()
                portal().run_sync(machine.aclose())


def answer_or_extract(body: Mapping[str, Any]) -> Any:
    """What a model would say: what it learned where it is asked to extract, else a few words."""
    for tool in body.get("tools", ()):
        if tool["function"]["name"] == "Learned":
            wanted = tool["function"]["parameters"]["properties"]
            learned = {
                "user_profile": [{"field": "preferences", "value": "concise answers", "evidence": ["r1.m1"]}],
                "user_memory": [
                    {
                        "action": "add",
                        "memory_type": "fact",
                        "content": "Works on billing.",
                        "evidence": ["r1.m1"],
                    }
                ],
                "session_context": {"summary": "The user introduced themselves.", "evidence": ["r1.m1"]},
            }
            return tool_call("Learned", **{name: value for name, value in learned.items() if name in wanted})
    return "Noted."


def assert_printed(printed: str, expected: Block) -> None:
    """Compare line by line; `…` stands for anything, a line of it alone for any lines."""
    pattern = re.escape(expected.code.strip()).replace("…", ".*?")
    assert re.fullmatch(pattern, printed.strip(), re.DOTALL), (
        f"{expected.place} promises\n{expected.code}\nand the example prints\n{printed}"
    )


@pytest.fixture
def desk(
    tmp_path: Path, learning_database: ThrowawayDatabase, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Desk]:
    """With the examples' machines stopped afterwards, and nothing of theirs left in this process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("DATABASE_URL", learning_database.url)
    known = set(sys.modules)
    current_settings.cache_clear()
    desk = Desk(tmp_path, monkeypatch)
    yield desk
    desk.close_machines()
    current_settings.cache_clear()
    for path in tmp_path.glob("*.py"):
        if path.stem not in known:
            sys.modules.pop(path.stem, None)


@pytest.mark.parametrize("page", RUN_PAGES, ids=name_of)
def test_the_examples_of_a_page_run_and_print_what_it_says(page: Path, desk: Desk) -> None:
    desk.run(page)


@pytest.mark.parametrize("page", PYTHON_PAGES, ids=name_of)
def test_every_python_block_is_run_or_says_why_not(page: Path) -> None:
    for block in blocks(page):
        if block.language == "python":
            compile(block.code, block.place, "exec", dont_inherit=True)
            is_marked = "example" in block.marks or "sketch" in block.marks or block.file is not None
            assert is_marked, f"{block.place}: neither `example` nor `sketch`, nor a file"


@pytest.mark.parametrize("page", TEST_PAGES, ids=name_of)
def test_the_test_files_of_a_page_pass_under_pytest(page: Path, tmp_path: Path) -> None:
    for block in blocks(page):
        if block.file is not None:
            (tmp_path / block.file).write_text(block.code, encoding="utf-8")

    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "error", str(tmp_path)]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100, check=False)

    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout


def test_the_first_example_of_the_readme_runs_as_a_script_with_nothing_set(data_dir: Path) -> None:
    first, output = (
        next(block for block in blocks(ROOT / "README.md") if marks <= {block.language, *block.marks})
        for marks in ({"python", "example"}, {"text", "output"})
    )
    (data_dir / "hello.py").write_text(first.code, encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}  # as a script in the checkout has it

    try:
        result = subprocess.run(
            [sys.executable, "hello.py"], cwd=data_dir, env=environment, capture_output=True, text=True, timeout=100,
            check=False,
        )  # fmt: skip
    finally:
        erase_embedded(data_dir / ".agent")

    assert result.returncode == 0, result.stderr
    assert_printed(result.stdout, output)


def test_the_log_on_the_page_about_logs_goes_in(desk: Desk) -> None:
    (log,) = (block for block in blocks(ROOT / "docs" / "howto" / "import-logs.md") if block.file is not None)
    desk.put(log)

    imported = CliRunner().invoke(app, ["runs", "import", str(log.file)])
    failed = json.loads(CliRunner().invoke(app, ["runs", "list", "--failed", "--json"]).stdout)

    assert imported.exit_code == 0, imported.output
    assert "2 runs imported" in imported.stdout
    assert [(run["facts"]["task_id"], run["outcomes"][0]["succeeded"]) for run in failed] == [
        ("refund-2", False)
    ]
    assert failed[0]["tool_errors"][0]["message"] == "Error: order B1001 not found"


def test_sql_blocks_are_sql(learning_database: ThrowawayDatabase) -> None:
    with psycopg.connect(learning_database.url) as connection:
        for page in pages():
            for block in blocks(page):
                if block.language == "sql":
                    connection.execute(block.code.encode())
        connection.rollback()  # roles would outlive the database


def test_json_blocks_are_json() -> None:
    for page in pages():
        for block in blocks(page):
            if block.language == "json":
                json.loads(block.code)
            elif block.language == "jsonl":
                for line in block.code.splitlines():
                    json.loads(line)


def test_a_promise_about_output_that_is_broken_fails() -> None:
    promised = Block(
        page=ROOT / "README.md", line=1, language="text", marks=("output",), code="a … c\n…\nd\n"
    )

    assert_printed("a b c\nmore\nlines\nd\n", promised)
    with pytest.raises(AssertionError, match="promises"):
        assert_printed("a b\nd\n", promised)


@pytest.mark.skipif(shutil.which("sh") is None, reason="no sh here")
def test_shell_blocks_are_shell() -> None:
    for page in pages():
        for block in blocks(page):
            if block.language == "sh":
                result = subprocess.run(
                    ["sh", "-n"], input=block.code, text=True, capture_output=True, check=False
                )
                assert result.returncode == 0, f"{block.place}: {result.stderr}"
