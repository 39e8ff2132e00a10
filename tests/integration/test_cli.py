"""The command line, on a real database: what it prints, its exit codes, and what is then in the database."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psycopg
import pytest
from typer.testing import CliRunner, Result

from agent.cli import app
from agent.identity import Identity
from agent.learning.learner_steps import LEARNER_STEPS
from agent.learning.spool import Spool
from agent.settings import _FIELD_OF_VARIABLE, Settings, current_settings
from agent.testing.openai_server import Refusal, openai_server
from agent.testing.throwaway import ThrowawayDatabase, throwaway_database
from tests.supabase_lite import SupabaseLite

ROOT = Path(__file__).parents[2]
AGENT = [sys.executable, "-m", "agent.cli"]
ERROR = {"role": "tool", "tool_call_id": "c", "name": "refund", "content": "Error: more than was paid"}


class Cli:
    """`agent`, called in this process in a folder of its own."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self._monkeypatch = monkeypatch

    def set(self, **variables: str) -> None:
        for name, value in variables.items():
            self._monkeypatch.setenv(name, value)

    def __call__(self, *arguments: str, input: str | bytes | None = None) -> Result:  # noqa: A002 - as the runner has it
        current_settings.cache_clear()
        result = CliRunner().invoke(app, arguments, input=input)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    def json(self, *arguments: str) -> Any:
        result = self(*arguments, "--json")
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    def file(self, *runs: Any, name: str = "log.jsonl") -> str:
        path = self.folder / name
        path.write_text("".join(f"{run if isinstance(run, str) else json.dumps(run)}\n" for run in runs))
        return str(path)


def run_of(text: str, *more: dict[str, Any], **facts: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}, *more], **facts}


@pytest.fixture
def bare_cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cli]:
    """With nothing set, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    current_settings.cache_clear()
    yield Cli(tmp_path, monkeypatch)
    current_settings.cache_clear()


@pytest.fixture
def cli(bare_cli: Cli, learning_database: ThrowawayDatabase) -> Cli:
    """On a migrated database."""
    bare_cli.set(DATABASE_URL=learning_database.url)
    return bare_cli


def remember(cli: Cli, user: str = "ada", content: str = "Prefers concise answers", **more: Any) -> str:
    """Write a memory through the storage function; its id."""
    learning = {"store": "user_memory", "kind": "preference", "content": content, **more}
    with psycopg.connect(os.environ["DATABASE_URL"], autocommit=True) as connection:
        query = "SELECT public.upsert_learning(%s::jsonb, %s::jsonb) ->> 'memory_id'"
        identity = json.dumps({"tenant_id": "default", "user_id": user})
        row = connection.execute(query, (identity, json.dumps(learning))).fetchone()
    assert row is not None
    return str(row[0])


def on_a_terminal(*arguments: str, columns: int = 120) -> str:
    """What a person would see on a terminal, without the colours."""
    main, secondary = pty.openpty()
    environment = {**os.environ, "COLUMNS": str(columns), "TERM": "xterm"}
    process = subprocess.Popen([*AGENT, *arguments], stdout=secondary, stdin=secondary, env=environment)
    os.close(secondary)
    seen = b""
    with suppress(OSError):  # the end of a terminal is an error on Linux
        while chunk := os.read(main, 65536):
            seen += chunk
    os.close(main)
    assert process.wait(60) == 0, seen
    return re.sub(r"\x1b\[[0-9;]*m", "", seen.decode())


# --- the program ------------------------------------------------------------------------------------------------


def test_help_names_every_command_and_the_exit_codes() -> None:
    shown = subprocess.run(
        [*AGENT, "--help"], capture_output=True, text=True, check=True, env=os.environ
    ).stdout
    for command in (
        "init", "demo", "migrate", "worker", "doctor", "memory", "runs", "approvals", "log", "tools", "sql",
    ):  # fmt: skip
        assert re.search(rf"^\W*{command} ", shown, re.MULTILINE), command
    assert "Exit codes" in shown


def test_starting_the_program_imports_nothing_heavy() -> None:
    script = "import sys, agent.cli; print(*(m for m in ('langchain_core', 'langgraph', 'psycopg', 'pydantic', 'rich') "
    script += "if m in sys.modules))"
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert shown.split() == []


def test_wrong_usage_is_exit_code_2(cli: Cli) -> None:
    for arguments in (["nonsense"], ["runs", "list", "--limit", "0"], ["runs", "list", "--status", "odd"]):
        assert cli(*arguments).exit_code == 2, arguments


def test_an_error_is_one_line_and_a_traceback_only_where_asked_for(bare_cli: Cli) -> None:
    bare_cli.set(DATABASE_URL="postgresql://ada:secret@127.0.0.1:1/nowhere")
    result = bare_cli("runs", "list")
    assert result.exit_code == 1
    assert result.stderr.startswith("agent: ")
    assert result.stderr.count("\n") == 1
    assert "secret" not in result.output
    with pytest.raises(Exception, match="cannot be reached"):
        bare_cli("--debug", "runs", "list")


def test_a_wrong_setting_is_told(bare_cli: Cli) -> None:
    bare_cli.set(LEARNING_TENAT="x")
    result = bare_cli("runs", "list")
    assert result.exit_code == 1
    assert "did you mean LEARNING_TENANT?" in result.stderr


# --- runs -------------------------------------------------------------------------------------------------------


def test_import_tells_what_went_in(cli: Cli) -> None:
    log = cli.file(run_of("one"), run_of("two", reward=1))
    first = cli("runs", "import", log)
    assert (first.exit_code, first.stdout) == (0, "2 runs imported, 0 known already.\n")
    again = cli("runs", "import", log)
    assert (again.exit_code, again.stdout) == (0, "0 runs imported, 2 known already.\n")


def test_import_names_bad_lines_and_ends_with_3(cli: Cli) -> None:
    log = cli.file(run_of("one"), "{oops", run_of("two"), {"task_id": 1})
    result = cli("runs", "import", log)
    assert result.exit_code == 3
    assert result.stdout == "2 runs imported, 0 known already, 2 bad lines.\n"
    assert [line.split(":")[0] for line in result.stderr.splitlines()] == [
        "line 2 is not JSON",
        "line 4 has neither 'messages' nor 'traj'",
    ]


def test_import_names_the_first_twenty_bad_lines_and_counts_all(cli: Cli) -> None:
    log = cli.file(*(["{oops"] * 2_000), run_of("fine"))
    result = cli("runs", "import", log)
    assert result.exit_code == 3
    assert result.stdout == "1 run imported, 0 known already, 2000 bad lines.\n"
    told = result.stderr.splitlines()
    assert [line.split(" is not")[0] for line in told[:20]] == [f"line {number}" for number in range(1, 21)]
    assert told[20:] == ["The bad lines after these are only counted."]
    as_json = json.loads(cli("runs", "import", log, "--json").stdout)
    assert (as_json["bad"], len(as_json["bad_lines"])) == (2_000, 20)


def test_import_as_json_has_nothing_else_on_standard_output(cli: Cli) -> None:
    result = cli("runs", "import", cli.file(run_of("one"), "[]"), "--json")
    assert result.exit_code == 3
    told = json.loads(result.stdout)
    assert told.pop("file").endswith("log.jsonl")
    assert told == {
        "recorded": 1,
        "known": 0,
        "bad": 1,
        "bad_lines": [{"line": 2, "reason": "is a list, not an object"}],
    }


def test_import_of_nothing_usable_ends_with_1(cli: Cli) -> None:
    assert cli("runs", "import", cli.file("nonsense", "[]")).exit_code == 1
    missing = cli("runs", "import", "no-such-file.jsonl")
    assert missing.exit_code == 1
    assert "no-such-file.jsonl" in missing.stderr
    assert cli("runs", "import", cli.file()).exit_code == 0, "an empty log is a whole log"


def test_import_reads_standard_input(cli: Cli) -> None:
    result = cli("runs", "import", "-", input=json.dumps(run_of("piped")).encode())
    assert (result.exit_code, result.stdout) == (0, "1 run imported, 0 known already.\n")
    assert "source_file" not in cli.json("runs", "list")[0]["facts"]


def test_import_says_how_far_it_came_when_the_database_goes(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    from agent.database.postgres import PostgresDatabase
    from agent.errors import DatabaseUnavailable

    real = PostgresDatabase.call
    calls: list[str] = []

    async def fails_the_second_time(self: PostgresDatabase, function: str, *args: Any, **more: Any) -> Any:
        calls.append(function)
        if len(calls) == 2:
            raise DatabaseUnavailable("it went away")
        return await real(self, function, *args, **more)

    monkeypatch.setattr(PostgresDatabase, "call", fails_the_second_time)
    log = cli.file(*(run_of(f"question {number}") for number in range(70)))
    result = cli("runs", "import", log)
    assert result.exit_code == 1
    assert "50 runs imported" in result.stderr
    assert "it went away" in result.stderr
    assert cli("runs", "import", log).stdout == "20 runs imported, 50 known already.\n"


def test_list_shows_failures_with_their_tool_errors(cli: Cli) -> None:
    log = cli.file(
        run_of("fine", reward=1, task_id="good"),
        run_of("bad", ERROR, ERROR, reward=0, task_id="bad", trial=3),
        run_of("lucky", ERROR, reward=1, task_id="lucky"),
    )
    cli("runs", "import", log, "--agent", "shop")
    everything = cli("runs", "list").stdout.splitlines()
    assert len(everything) == 3
    failed = {
        line.split("\t")[5]: line.split("\t") for line in cli("runs", "list", "--failed").stdout.splitlines()
    }
    assert set(failed) == {"bad / 3", "lucky"}
    assert failed["bad / 3"][4] == "failure (reward 0)"
    assert failed["bad / 3"][7] == "refund: Error: more than was paid (x2)"
    assert failed["lucky"][4] == "success (reward 1)"
    assert [run["agent_id"] for run in cli.json("runs", "list", "--failed")] == ["shop", "shop"]


def test_list_is_held_to_its_limit_and_says_so(cli: Cli) -> None:
    cli("runs", "import", cli.file(*(run_of(f"question {number}") for number in range(7))))
    result = cli("runs", "list", "--limit", "5")
    assert len(result.stdout.splitlines()) == 5
    assert "--limit 20" in result.stderr
    assert "--limit" not in cli("runs", "list", "--limit", "7").stderr


def test_list_keeps_tenants_and_users_apart(cli: Cli) -> None:
    cli("runs", "import", cli.file(run_of("mine")), "--user", "ada")
    cli("runs", "import", cli.file(run_of("theirs")), "--tenant", "other")
    assert [run["user_id"] for run in cli.json("runs", "list")] == ["ada"]
    assert cli.json("runs", "list", "--user", "grace") == []
    assert [run["user_id"] for run in cli.json("runs", "list", "--tenant", "other")] == [None]
    cli.set(LEARNING_TENANT="other")
    assert [run["user_id"] for run in cli.json("runs", "list")] == [None]


def test_an_empty_list_is_told_on_standard_error(cli: Cli) -> None:
    result = cli("runs", "list", "--failed")
    assert (result.exit_code, result.stdout) == (0, "")
    assert "No such runs" in result.stderr
    assert cli.json("runs", "list") == []


def test_show_finds_a_run_by_how_its_id_begins(cli: Cli) -> None:
    call = {"id": "c", "function": {"name": "refund", "arguments": '{"amount": 80}'}}
    asks = {"role": "assistant", "content": None, "tool_calls": [call]}
    cli("runs", "import", cli.file(run_of("Refund 80 euros", asks, ERROR, reward=0, task_id="t7")))
    run_id = cli.json("runs", "list")[0]["run_id"]
    shown = cli("runs", "show", run_id[:6]).stdout
    for text in (
        run_id,
        "task_id: t7",
        "failure (reward 0)",
        "tool error in refund: Error: more than was paid",
        "m1 user: Refund 80 euros",
        "calls refund {'amount': 80}",
        "m3 tool refund (error)",
    ):
        assert text in shown, text
    assert cli.json("runs", "show", run_id)["messages"][0]["content"] == "Refund 80 euros"


def test_show_refuses_what_is_unknown_or_ambiguous(cli: Cli) -> None:
    cli("runs", "import", cli.file(*(run_of(f"question {number}") for number in range(20))))
    first_letters = [run["run_id"][0] for run in cli.json("runs", "list")]
    common = next(letter for letter in first_letters if first_letters.count(letter) > 1)
    ambiguous = cli("runs", "show", common)
    assert ambiguous.exit_code == 1
    assert f"{first_letters.count(common)} runs begin with {common!r}" in ambiguous.stderr
    for unknown in ("zzz", ""):
        result = cli("runs", "show", unknown)
        assert (result.exit_code, result.stdout) == (1, "")
    assert cli("runs", "show", cli.json("runs", "list")[0]["run_id"], "--tenant", "other").exit_code == 1


def test_what_a_log_says_does_not_steer_the_terminal(cli: Cli) -> None:
    evil = {
        "role": "tool",
        "name": "x",
        "content": "Error: \x1b]0;owned\x07 \x1b[2J [bold]loud[/bold] [/nonsense] \u202e",
    }
    cli("runs", "import", cli.file(run_of("a\x1b[31mred", evil, reward=0, task_id="[red]\x1b[31m")))
    run_id = cli.json("runs", "list")[0]["run_id"]
    for shown in (cli("runs", "list").stdout, cli("runs", "show", run_id).stdout):
        assert "\x1b" not in shown
        assert "\u202e" not in shown
    seen = on_a_terminal("runs", "list", "--failed")
    assert "[bold]loud[/bold] [/nonsense]" in " ".join(seen.split())
    assert "\x1b" not in seen


STEERING = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
EVIL = "\x1b]0;owned\x07\x1b[2J\x9b31m\u061c\u200f\u2028\u2029\u202e\u2066\r"


def store(function: str, argument: Any, user: str = "ada") -> Any:
    """What the storage function answers to this argument."""
    with psycopg.connect(os.environ["DATABASE_URL"], autocommit=True) as connection:
        identity = json.dumps({"tenant_id": "default", "user_id": user})
        query = f"SELECT public.{function}(%s::jsonb, %s::jsonb)"
        row = connection.execute(query.encode(), (identity, json.dumps(argument))).fetchone()
    assert row is not None
    return row[0]


def steering_run(run_id: str) -> dict[str, Any]:
    call = {"id": "c", "name": EVIL, "args": {EVIL: EVIL}}
    return {
        "run_id": f"{EVIL}{run_id}",
        "status": "failed",
        "error": EVIL,
        "facts": {EVIL: EVIL, "task_id": EVIL, "user": "somebody else"},
        "messages": [
            {
                "message_id": EVIL,
                "role": EVIL,
                "name": EVIL,
                "content": f"{EVIL}\nhello",
                "tool_calls": [call],
            }
        ],
        "tool_errors": [{"tool": EVIL, "tool_call_id": EVIL, "message": EVIL}],
    }


def test_no_stored_name_steers_the_terminal(cli: Cli) -> None:
    for run_id in ("one", "two"):
        store("record_run", steering_run(run_id))
    one = f"{EVIL}one"
    evidence = [{"run_id": one, "message_id": EVIL, "quote": EVIL}]
    memory_id = remember(cli, content=f"Likes tea {EVIL}", kind=EVIL, evidence=evidence)
    retired = remember(cli, content="Likes coffee")
    store(
        "upsert_learnings",
        [{"action": "retire", "store": "user_memory", "memory_id": retired, "reason": EVIL}],
    )
    commands = (
        ["runs", "list"], ["runs", "list", "--failed"], ["runs", "show", one], ["runs", "show", EVIL],
        ["memory", "list"], ["memory", "list", "--user", "ada"], ["memory", "search", "tea", "--user", "ada"],
        ["memory", "show", memory_id, "--user", "ada"], ["memory", "show", retired, "--user", "ada"],
        ["memory", "list", "--user", EVIL],
    )  # fmt: skip
    for command in commands:
        result = cli(*command)
        assert result.output, command
        assert not STEERING.search(result.output), (command, result.output)
    ambiguous = cli("runs", "show", EVIL)
    assert ambiguous.exit_code == 1
    assert "2 runs begin with" in ambiguous.stderr
    for terminal in (["runs", "show", one], ["runs", "list"], ["memory", "list", "--user", "ada"]):
        seen = on_a_terminal(*terminal).replace("\r\n", "\n")
        assert not STEERING.search(seen), (terminal, seen)


def test_json_is_the_same_text_and_does_not_steer_the_terminal(cli: Cli) -> None:
    store("record_run", steering_run("one"))
    result = cli("runs", "show", f"{EVIL}one", "--json")
    assert not STEERING.search(result.stdout)
    told = json.loads(result.stdout)
    assert told["run_id"] == f"{EVIL}one"
    assert told["messages"][0]["content"] == f"{EVIL}\nhello"


def test_a_fact_does_not_pass_for_what_is_known_of_a_run(cli: Cli) -> None:
    store("record_run", {"run_id": "r", "status": "failed", "facts": {"user": "grace", "recorded": "never"}})
    shown = cli("runs", "show", "r").stdout
    assert "  user: ada\n" in shown
    assert "  fact user: grace\n" in shown
    assert "  fact recorded: never\n" in shown


@pytest.mark.parametrize(
    "odd",
    [
        {"facts": [1]},
        {"facts": "text"},
        {"facts": None},
        {"facts": {"task_id": {"a": [1]}, "trial": []}},
        {"tool_errors": [1, None, "x", {}, {"tool": {"a": 1}, "message": [1]}]},
        {"tool_errors": {"tool": "x"}},
        {"messages": [1, None, "x", {}, {"message_id": {}, "role": {"a": 1}, "content": [1], "name": 3}]},
        {"messages": {"role": "user"}},
        {"messages": [{"message_id": "m", "role": "user"}, {"message_id": "m", "role": "user", "content": None}]},
        {"messages": [{"message_id": "m", "role": "x", "content": "", "tool_calls": [1, {}, {"name": [1]}]}]},
        {"messages": [{"message_id": "m", "role": "x", "content": "", "tool_calls": {"name": "x"}}]},
        {"messages": [{"message_id": "m", "role": ["system"], "content": {"a": "x" * 400}, "tool_calls": None}]},
        {"error": {"message": "x"}},
    ],
)  # fmt: skip
def test_a_run_of_odd_json_is_shown_and_hides_no_other(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, odd: dict[str, Any]
) -> None:
    """As it comes from a database in which somebody has written past the storage functions."""
    from agent.database.postgres import PostgresDatabase

    cli("runs", "import", cli.file(run_of("fine", task_id="fine", reward=1)))
    store("record_run", {"run_id": "odd", "status": "completed", "messages": []})
    real = PostgresDatabase.call

    async def with_odd_json(self: PostgresDatabase, function: str, *args: Any, **more: Any) -> Any:
        answer = await real(self, function, *args, **more)
        for run in answer if isinstance(answer, list) else [answer]:
            if run["run_id"] == "odd":
                run.update({name: value for name, value in odd.items() if name in run})
        return answer

    monkeypatch.setattr(PostgresDatabase, "call", with_odd_json)
    for arguments in ([], ["--failed"]):
        assert cli("runs", "list", *arguments).exit_code == 0
    listed = cli("runs", "list").stdout
    assert "odd\t" in listed
    assert "fine" in listed
    shown = cli("runs", "show", "odd")
    assert shown.exit_code == 0
    assert "Run odd" in shown.stdout
    monkeypatch.setattr("agent.commands.runs.is_terminal", lambda: True)
    for arguments in ([], ["--failed"]):
        assert cli("runs", "list", *arguments).exit_code == 0


def test_on_a_terminal_runs_are_a_table(cli: Cli) -> None:
    cli("runs", "import", cli.file(run_of("bad", ERROR, reward=0, task_id="t1")))
    seen = on_a_terminal("runs", "list", "--failed")
    assert re.search(r"run +recorded +task +outcome +what went wrong", seen)
    assert re.search(r"[0-9a-f]{8} .* t1 +failure \(reward 0\) +refund: Error: more than was paid", seen)


# --- memory -----------------------------------------------------------------------------------------------------


def test_memories_of_one_user_are_listed_and_searched(cli: Cli) -> None:
    memory_id = remember(cli)
    remember(cli, content="Works on billing")
    remember(cli, user="grace", content="Prefers long answers")
    lines = [line.split("\t") for line in cli("memory", "list", "--user", "ada").stdout.splitlines()]
    assert [line[-1] for line in lines] == ["Works on billing", "Prefers concise answers"]
    assert [m["content"] for m in cli.json("memory", "search", "which answers?", "--user", "ada")] == [
        "Prefers concise answers"
    ]
    found = cli("memory", "search", "concise", "--user", "ada").stdout.split("\t")
    assert (found[0], found[2]) == (memory_id, "Prefers concise answers\n")
    nothing = cli("memory", "search", "zebra", "--user", "ada")
    assert (nothing.exit_code, nothing.stdout) == (0, "")


def test_a_store_narrows_the_list(cli: Cli) -> None:
    remember(cli)
    remember(cli, store="user_profile", field="name", content="Ada", value="Ada", kind="")
    assert [m["field"] for m in cli.json("memory", "list", "--user", "ada", "--store", "user_profile")] == [
        "name"
    ]
    assert len(cli.json("memory", "list", "--user", "ada")) == 2


def test_without_a_user_the_users_are_listed(cli: Cli) -> None:
    remember(cli)
    remember(cli, content="Works on billing")
    remember(cli, user="grace@example.com ✨")
    assert {user["user_id"]: user["memories"] for user in cli.json("memory", "list")} == {
        "ada": 2,
        "grace@example.com ✨": 1,
    }
    assert cli("memory", "list", "--store", "user_memory").exit_code == 2


def test_the_default_user_is_meant_where_none_is_named(cli: Cli) -> None:
    remember(cli)
    nobody = cli("memory", "search", "concise")
    assert nobody.exit_code == 2
    assert "--user" in nobody.stderr
    cli.set(LEARNING_DEFAULT_USER="ada")
    assert len(cli.json("memory", "search", "concise")) == 1
    assert len(cli.json("memory", "list")) == 1


def test_show_tells_versions_and_evidence(cli: Cli) -> None:
    cli("runs", "import", cli.file(run_of("I prefer concise answers")), "--user", "ada")
    run_id = cli.json("runs", "list")[0]["run_id"]
    evidence = [{"run_id": run_id, "message_id": "m1", "quote": "I prefer concise answers"}]
    memory_id = remember(cli, evidence=evidence)
    remember(cli, memory_id=memory_id, content="Prefers very concise answers")
    shown = cli("memory", "show", memory_id[:6], "--user", "ada").stdout
    for text in (memory_id, "1. Prefers concise answers", "2. Prefers very concise answers", "(updated)",
                 f"version 1: run {run_id}, message m1", '"I prefer concise answers"'):  # fmt: skip
        assert text in shown, text
    assert len(cli.json("memory", "show", memory_id, "--user", "ada")["versions"]) == 2
    assert "Prefers" in cli("runs", "show", run_id).stdout, "a run shows what was learned from it"


def test_a_memory_of_somebody_else_is_not_there(cli: Cli) -> None:
    memory_id = remember(cli)
    for asked in (memory_id, memory_id[:6]):
        result = cli("memory", "show", asked, "--user", "grace")
        assert (result.exit_code, result.stdout) == (1, "")
    assert cli("memory", "show", memory_id, "--user", "ada", "--tenant", "other").exit_code == 1


def test_search_uses_vectors_where_an_embedder_is_set(cli: Cli) -> None:
    remember(cli)
    with openai_server(dimensions=8) as server:
        cli.set(OPENAI_API_KEY="k", OPENAI_BASE_URL=server.url)
        found = cli.json("memory", "search", "concise", "--user", "ada")
        assert [memory["content"] for memory in found] == ["Prefers concise answers"]
        assert len(server.embedding_requests) == 1


def test_erase_asks_and_takes_no_other_answer(cli: Cli) -> None:
    remember(cli)
    for answer in ("grace\n", "\n", "", "yes\n", "ADA\n"):
        result = cli("memory", "erase", "--user", "ada", input=answer)
        assert result.exit_code == 1, answer
        assert "nothing was erased" in result.stderr
    assert len(cli.json("memory", "list", "--user", "ada")) == 1
    assert cli("memory", "erase", "--yes").exit_code == 2, "nobody is named"


@pytest.mark.parametrize(("arguments", "answer"), [(["--yes"], ""), ([], "ada\n")])
def test_erase_takes_a_user_and_nobody_else(cli: Cli, arguments: list[str], answer: str) -> None:
    remember(cli)
    remember(cli, user="grace")
    cli("runs", "import", cli.file(run_of("hello")), "--user", "ada")
    spool = Spool(Path(".agent/spool"))
    for user in ("ada", "grace"):
        spool.put(Identity(user_id=user), {"run_id": f"run of {user}", "status": "completed"})
    spool.set_aside(spool.put(Identity(user_id="ada"), {"run_id": "refused", "status": "completed"}))
    result = cli("memory", "erase", "--user", "ada", "--json", *arguments, input=answer)
    assert result.exit_code == 0
    gone = json.loads(result.stdout)
    assert (gone["agent_memory"], gone["agent_run"], gone["procrastinate_jobs"]) == (1, 1, 1)
    assert gone["spooled runs on disk"] == 2
    assert [user["user_id"] for user in cli.json("memory", "list")] == ["grace"]
    assert cli.json("runs", "list") == []
    assert [waiting.identity.user_id for waiting in spool.waiting()] == ["grace"]


@pytest.mark.parametrize(
    "content",
    [
        b'{"identity": 5}', b'{"identity": "ada"}', b'{"identity": null}', b'{"identity": [1]}', b"[]", b"5", b"{}",
        b"\xff\xfe", b"", b'{"identity": ' + b"[" * 100_000,
    ],
    ids=lambda content: content[:20].decode(errors="replace"),
)  # fmt: skip
def test_erase_goes_on_past_a_file_that_makes_no_sense_and_sets_it_aside(cli: Cli, content: bytes) -> None:
    remember(cli)
    spool = Spool(Path(".agent/spool"))
    spool.put(Identity(user_id="ada"), {"run_id": "waits", "status": "completed"})
    for name in ("0.json", "z.json"):
        (spool.folder / name).write_bytes(content)
    os.mkfifo(spool.folder / "pipe.json")
    result = cli("memory", "erase", "--user", "ada", "--yes", "--json")
    assert result.exit_code == 0, result.output
    gone = json.loads(result.stdout)
    assert (gone["agent_memory"], gone["spooled runs on disk"]) == (1, 1)
    assert cli.json("memory", "list") == []
    assert sorted(path.name for path in (spool.folder / "refused").iterdir()) == ["0.json", "z.json"]
    assert [path.name for path in spool.folder.glob("*.json")] == ["pipe.json"]
    again = cli("memory", "erase", "--user", "ada", "--yes", "--json")
    assert again.exit_code == 0, "what is set aside stays there and stops nobody"


def test_on_a_terminal_memories_are_a_table(cli: Cli) -> None:
    memory_id = remember(cli, content="Prefers [red]concise[/red] answers")
    seen = on_a_terminal("memory", "list", "--user", "ada")
    assert re.search(
        rf"{memory_id[:8]} +user_memory +preference +Prefers \[red\]concise\[/red\] answers", seen
    )


@pytest.mark.node
def test_a_users_token_acts_for_that_user_alone(cli: Cli, supabase_lite: SupabaseLite) -> None:
    remember(cli)
    remember(cli, user="grace", content="Works on shipping")
    cli.set(
        DATABASE_URL="",
        SUPABASE_URL=supabase_lite.url,
        SUPABASE_ANON_KEY=supabase_lite.publishable_key,
        SUPABASE_ACCESS_TOKEN=supabase_lite.access_token("ada"),
    )
    assert [memory["content"] for memory in cli.json("memory", "list")] == ["Prefers concise answers"]
    refused = cli("memory", "list", "--user", "grace")
    assert refused.exit_code == 2
    assert "access token is one of user 'ada'" in refused.stderr
    assert cli("runs", "list").exit_code == 1, "a tenant's runs are for servers"
    assert cli("doctor").exit_code == 0


# --- migrate ----------------------------------------------------------------------------------------------------


def test_migrate_brings_a_database_up_and_then_has_nothing_to_do(bare_cli: Cli) -> None:
    with throwaway_database(migrated=False) as database:
        bare_cli.set(DATABASE_URL=database.url)
        before = bare_cli("migrate", "--check")
        assert before.exit_code == 1
        assert "agent migrate" in before.stderr
        assert bare_cli("migrate", "--check", "--json").exit_code == 1
        assert bare_cli("runs", "list").exit_code == 1
        applied = bare_cli("migrate")
        assert applied.exit_code == 0
        assert applied.stdout.startswith("applied 20")
        assert "Nothing to do" in bare_cli("migrate").stdout
        assert bare_cli.json("migrate", "--check")["is_current"] is True
        assert bare_cli("migrate", "--check").exit_code == 0
        assert bare_cli.json("runs", "list") == []


@pytest.mark.parametrize("command", ["migrate", "worker"])
def test_what_needs_postgres_says_so_where_only_supabase_is_set(bare_cli: Cli, command: str) -> None:
    bare_cli.set(SUPABASE_URL="http://127.0.0.1:1", SUPABASE_SECRET_KEY="sb_secret_hidden")
    result = bare_cli(command)
    assert result.exit_code == 1
    assert "Set DATABASE_URL" in result.stderr.replace("set DATABASE_URL", "Set DATABASE_URL")
    assert "hidden" not in result.output


# --- worker -----------------------------------------------------------------------------------------------------


def wait_until(is_true: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not is_true():
        assert process.poll() is None, f"it left: {process.communicate()}"
        assert time.monotonic() < deadline, "it did not happen within a minute"
        time.sleep(0.1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_worker_learns_until_it_is_told_to_leave(cli: Cli, number: signal.Signals) -> None:
    cli.set(LEARNING_QUIET_PERIOD="0")
    cli("runs", "import", cli.file(run_of("I work on billing")), "--user", "ada")
    turns = ("memory", "list", "--user", "ada", "--store", "conversation")
    (cli.folder / "machines.py").write_text(
        "import agent\nmine = agent.LearningMachine(agent_id='shop')\nother = 1\n"
    )
    worker = subprocess.Popen(
        [*AGENT, "worker", "--machine", "machines:mine", "--concurrency", "2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        wait_until(lambda: bool(cli.json(*turns)), worker)
        worker.send_signal(number)
        _, told = worker.communicate(timeout=60)
    finally:
        worker.kill()
    assert worker.returncode == 0, told
    assert "session_learned" in told
    assert "Traceback" not in told
    assert "I work on billing" in [turn["content"] for turn in cli.json(*turns)]
    assert cli.json("runs", "list")[0]["learned_at"] is not None


@pytest.mark.parametrize(
    ("named", "reason"),
    [
        ("nonsense", "module:name"),
        ("no_such_module:mine", "no module"),
        ("machines:other", "not a LearningMachine"),
        ("machines:missing", "not a LearningMachine"),
    ],
)
def test_a_machine_that_is_none_is_wrong_usage(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, named: str, reason: str
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "machines", raising=False)
    (cli.folder / "machines.py").write_text("other = 1\n")
    result = cli("worker", "--machine", named)
    assert result.exit_code == 2
    assert reason in " ".join(re.sub(r"[│\s]+", " ", result.stderr).split())


@pytest.mark.parametrize("service", [("worker",), ("learner", "run"), ("monitor", "run")])
def test_a_service_on_a_database_without_the_schema_says_what_to_do(
    bare_cli: Cli, service: tuple[str, ...]
) -> None:
    with throwaway_database(migrated=False) as database:
        bare_cli.set(DATABASE_URL=database.url)
        result = bare_cli(*service)
    assert result.exit_code == 1
    assert "agent migrate" in result.stderr


@pytest.mark.parametrize("service", ["learner", "monitor"])
def test_a_service_stops_the_embedded_server_that_it_started(
    service: str, data_dir: Path, tmp_path: Path
) -> None:
    environment = {**os.environ, "LEARNING_DATA_DIR": str(data_dir), "LEARNING_WORKER": "off"}
    subprocess.run([*AGENT, "migrate"], cwd=tmp_path, env=environment, check=True, capture_output=True)
    running = subprocess.Popen(
        [*AGENT, service, "run"], cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True
    )
    try:
        assert running.stderr is not None
        assert "Ctrl-C ends it" in (line := running.stderr.readline()), line
        running.send_signal(signal.SIGTERM)
        _, told = running.communicate(timeout=60)
    finally:
        running.kill()
        running.wait(30)
    assert running.returncode == 0, told
    assert "Traceback" not in told
    assert not list(data_dir.rglob("postmaster.pid")), "the server runs on"


# --- doctor -----------------------------------------------------------------------------------------------------


def findings(cli: Cli, *arguments: str, exit_code: int) -> dict[str, dict[str, str]]:
    result = cli("doctor", "--json", *arguments)
    assert result.exit_code == exit_code, result.output
    told = json.loads(result.stdout)
    assert told["is_well"] is (exit_code == 0)
    for finding in told["findings"]:
        assert finding["status"] != "problem" or finding["what_to_do"], finding
    return {finding["name"]: finding for finding in told["findings"]}


def test_the_doctor_finds_a_good_database_good(cli: Cli) -> None:
    cli("runs", "import", cli.file(run_of("hello")), "--user", "ada")
    found = findings(cli, exit_code=0)
    assert {name: finding["status"] for name, finding in found.items()} == {
        "settings": "ok", "database": "ok", "reachable": "ok", "vector": "ok", "migrated": "ok", "isolated": "ok",
        "queue": "ok", "model": "note", "embeddings": "note", "spool": "ok", "policy": "note", "slack": "ok",
        "telegram": "ok", "mail": "ok", "sandbox": found["sandbox"]["status"], "application": "ok", "background": "ok",
        "alerts": "ok",
    }  # fmt: skip
    assert found["sandbox"]["status"] == (
        "ok" if "behind bubblewrap" in found["sandbox"]["message"] else "note"
    )
    assert "because DATABASE_URL is set" in found["database"]["message"]
    assert "1 waiting" in found["queue"]["message"]
    assert "ok\treachable\t" in cli("doctor").stdout


POLICY = """
[[reviewer]]
name = "ada"
slack = "U1"
[approval]
destructive_votes = 1
"""


def test_the_doctor_says_what_is_missing_for_approvals_channels_and_mail(cli: Cli, tmp_path: Path) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text(POLICY)
    cli.set(LEARNING_POLICY_FILE=str(policy), SLACK_BOT_TOKEN="xoxb-1", LEARNING_MAIL_FROM="a@example.com")
    found = findings(cli, exit_code=1)
    assert {name: found[name]["status"] for name in ("policy", "slack", "telegram", "mail")} == {
        "policy": "ok", "slack": "problem", "telegram": "ok", "mail": "problem",
    }  # fmt: skip
    assert "1 reviewer, 0 rules" in found["policy"]["message"]
    assert found["slack"]["message"].endswith(
        "missing: SLACK_SIGNING_SECRET or SLACK_APP_TOKEN, slack_channel in the policy file"
    )
    assert "LEARNING_SMTP_URL not set" in found["mail"]["message"]

    policy.write_text(POLICY + 'slack_channel = "C1"\n')
    cli.set(SLACK_APP_TOKEN="xapp-1", LEARNING_SMTP_URL="smtp://u:hidden@127.0.0.1:9")
    found = findings(cli, exit_code=0)
    assert (found["slack"]["status"], found["mail"]["status"]) == ("ok", "ok")

    policy.write_text(POLICY.replace("destructive_votes = 1", 'slack_chanel = "C1"'))
    found = findings(cli, exit_code=1)
    assert "did you mean 'slack_channel'" in found["policy"]["message"]
    policy.write_text("[approval]\nwrite_votes = 2\n")
    found = findings(cli, exit_code=1)
    assert "WRITE calls in tenant 'default' need 2 who approve, and 0 may" in found["policy"]["message"]


def test_the_doctor_says_where_alerts_go_and_what_a_sink_lacks(cli: Cli) -> None:
    cli.set(LEARNING_ALERT_WEBHOOK="https://ada:hidden@hooks.example.com/x", LEARNING_ALERT_TELEGRAM_CHAT="5")
    assert findings(cli, exit_code=1)["alerts"]["message"].endswith("needs TELEGRAM_BOT_TOKEN")
    cli.set(TELEGRAM_BOT_TOKEN="1:x", TELEGRAM_SECRET="s" * 16)
    result = cli("doctor")
    assert "alerts are told to: log, telegram, webhook" in result.stdout
    assert "hidden" not in result.output


def test_the_doctor_asks_the_applications_database_and_tells_of_learner_and_monitor(cli: Cli) -> None:
    cli.set(
        APP_DATABASE_URL="postgresql://shop:hidden@127.0.0.1:9/shop", LEARNING_LEARNER="false",
        LEARNING_MONITOR_INTERVAL="600",
    )  # fmt: skip
    result = cli("doctor")
    assert "hidden" not in result.output
    found = findings(cli, exit_code=1)
    assert found["application"]["status"] == "problem"
    assert "127.0.0.1:9/shop cannot be reached" in found["application"]["message"]
    assert "?." not in found["application"]["message"]
    assert found["sql"]["status"] == "note"
    assert "does NOT run in the database of APP_DATABASE_URL" in found["sql"]["message"]
    assert found["background"]["message"].endswith(
        "learner off (LEARNING_LEARNER=false); monitor on, every 10 minutes"
    )
    cli.set(APP_DATABASE_URL=os.environ["DATABASE_URL"])
    found = findings(cli, exit_code=0)
    assert "answers" in found["application"]["message"]
    assert "sql" not in found


def test_the_doctor_never_shows_a_secret(cli: Cli) -> None:
    with openai_server(api_key="sk-right") as server:
        cli.set(OPENAI_API_KEY="sk-hidden-wrong", OPENAI_BASE_URL=server.url, SUPABASE_ANON_KEY="sb-hidden")
        cli.set(DATABASE_URL=os.environ["DATABASE_URL"])
        result = cli("doctor", "--call-model")
    password = os.environ["DATABASE_URL"].split(":")[2].split("@")[0]
    assert result.exit_code == 1, "the key is refused"
    assert "OPENAI_API_KEY set" in result.stdout
    assert "SUPABASE_SERVICE_ROLE_KEY not set" in result.stdout
    for secret in ("hidden", password):
        assert secret not in result.output


def test_the_doctor_says_what_a_database_lacks(bare_cli: Cli) -> None:
    with throwaway_database(migrated=False) as database:
        bare_cli.set(DATABASE_URL=database.url)
        found = findings(bare_cli, exit_code=1)
    assert found["migrated"]["status"] == "problem"
    assert "agent migrate" in found["migrated"]["what_to_do"]
    assert "queue" not in found


def test_the_doctor_says_what_cannot_be_reached(bare_cli: Cli) -> None:
    bare_cli.set(DATABASE_URL="postgresql://ada:hidden@127.0.0.1:1/nowhere")
    assert findings(bare_cli, exit_code=1)["reachable"]["status"] == "problem"
    assert "hidden" not in bare_cli("doctor").output
    bare_cli.set(DATABASE_URL="", SUPABASE_URL="http://127.0.0.1:1", SUPABASE_SECRET_KEY="sb_secret_hidden")
    found = findings(bare_cli, exit_code=1)
    assert found["reachable"]["status"] == "problem"
    assert "SUPABASE_URL is set and DATABASE_URL is not" in found["database"]["message"]


def test_the_doctor_names_the_missing_key(bare_cli: Cli) -> None:
    bare_cli.set(SUPABASE_URL="http://127.0.0.1:1", SUPABASE_ANON_KEY="public")
    assert "SUPABASE_ACCESS_TOKEN" in findings(bare_cli, exit_code=1)["database"]["message"]


@pytest.mark.parametrize(
    "address",
    [
        {"SUPABASE_URL": "http://admin:hidden@127.0.0.1:1", "SUPABASE_SECRET_KEY": "sb_secret_x"},
        {"OPENAI_BASE_URL": "http://admin:hidden@127.0.0.1:1/v1"},
        {"DATABASE_URL": "postgresql://admin:12#hidden@127.0.0.1:1/db"},
        {"DATABASE_URL": "postgresql://admin:12?hidden@127.0.0.1:1/db"},
    ],
)
def test_an_address_with_a_password_in_it_is_never_shown(bare_cli: Cli, address: dict[str, str]) -> None:
    bare_cli.set(**address)
    for command in (["doctor"], ["runs", "list"], ["memory", "list"]):
        result = bare_cli(*command)
        assert result.exit_code == 1
        assert "hidden" not in result.output
        assert "admin:12" not in result.output.replace("\n", "")


def test_the_doctor_names_a_wrong_setting(bare_cli: Cli) -> None:
    bare_cli.set(LEARNING_TOKEN_BUDGET="many")
    assert "LEARNING_TOKEN_BUDGET" in findings(bare_cli, exit_code=1)["settings"]["message"]


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        ("ALTER TABLE public.agent_run NO FORCE ROW LEVEL SECURITY", "agent_run"),
        ("ALTER TABLE public.agent_memory DISABLE ROW LEVEL SECURITY", "agent_memory"),
        ("GRANT EXECUTE ON FUNCTION public.erase_user(jsonb) TO anon", "erase_user"),
        (
            "GRANT EXECUTE ON FUNCTION public.get_learnings(jsonb, jsonb, integer, integer) TO PUBLIC",
            "get_learnings",
        ),
    ],
)
def test_the_doctor_finds_isolation_that_was_undone(cli: Cli, damage: str, named: str) -> None:
    with psycopg.connect(os.environ["DATABASE_URL"], autocommit=True) as connection:
        connection.execute(damage.encode())
    found = findings(cli, exit_code=1)["isolated"]
    assert found["status"] == "problem"
    assert named in found["message"]


def test_the_doctor_finds_a_login_that_may_act_for_nobody(
    cli: Cli, learning_database: ThrowawayDatabase
) -> None:
    login = f"stranger_{os.getpid()}"
    with psycopg.connect(learning_database.url, autocommit=True) as connection:
        connection.execute(f"CREATE ROLE {login} LOGIN PASSWORD 'p'".encode())
        try:
            address = learning_database.tcp_url.split("@")[1]
            cli.set(DATABASE_URL=f"postgresql://{login}:p@{address}")
            found = findings(cli, exit_code=1)
        finally:
            connection.execute(f"DROP ROLE {login}".encode())
    assert [name for name in ("migrated", "isolated") if found.get(name, {}).get("status") == "problem"]
    assert any("agent_server" in finding["message"] + finding["what_to_do"] for finding in found.values())


def test_the_doctor_asks_for_a_worker_where_none_may_run_inside(cli: Cli) -> None:
    cli("runs", "import", cli.file(run_of("hello")), "--user", "ada")
    cli.set(LEARNING_WORKER="off")
    assert "agent worker" in findings(cli, exit_code=1)["queue"]["what_to_do"]


def test_the_doctor_counts_what_waits_on_disk(cli: Cli) -> None:
    Spool(Path(".agent/spool")).put(Identity(user_id="ada"), {"run_id": "r", "status": "completed"})
    found = findings(cli, exit_code=0)["spool"]
    assert found["status"] == "note"
    assert found["message"].startswith("1 runs wait")


def test_the_doctor_calls_the_model_only_when_told_to(cli: Cli) -> None:
    with openai_server(["ready"], dimensions=8) as server:
        cli.set(OPENAI_API_KEY="k", OPENAI_BASE_URL=server.url)
        assert findings(cli, exit_code=0)["model"]["status"] == "ok"
        assert server.requests == []
        found = findings(cli, "--call-model", exit_code=0)
        assert found["model"]["message"].endswith("answers")
        assert found["embeddings"]["message"].endswith("answers with 8 dimensions")
        assert (len(server.chat_requests), len(server.embedding_requests)) == (1, 1)


def test_the_doctor_tells_of_a_model_that_cannot_be_used(cli: Cli) -> None:
    cli.set(LEARNING_MODEL="nonsense:x", LEARNING_EMBEDDINGS="none")
    found = findings(cli, exit_code=1)["model"]
    assert found["status"] == "problem"
    assert "nonsense" in found["message"]
    with openai_server([Refusal(status=500)]) as server:
        cli.set(LEARNING_MODEL="openai:gpt-5-mini", OPENAI_API_KEY="k", OPENAI_BASE_URL=server.url)
        assert findings(cli, "--call-model", exit_code=1)["model"]["status"] == "problem"


@pytest.mark.node
def test_the_doctor_looks_at_supabase_through_its_keys(bare_cli: Cli, supabase_lite: SupabaseLite) -> None:
    bare_cli.set(SUPABASE_URL=supabase_lite.url, SUPABASE_SECRET_KEY=supabase_lite.secret_key)
    found = findings(bare_cli, exit_code=0)
    assert {found[name]["status"] for name in ("reachable", "migrated", "isolated", "queue")} == {"ok"}
    bare_cli.set(SUPABASE_SECRET_KEY="sb_secret_wrong")
    found = findings(bare_cli, exit_code=1)
    assert [
        finding
        for finding in found.values()
        if finding["status"] == "problem" and "key" in finding["what_to_do"]
    ]
    bare_cli.set(SUPABASE_SECRET_KEY=supabase_lite.publishable_key)
    found = findings(bare_cli, exit_code=1)
    assert found["database"]["status"] == "problem"
    assert "public key" in found["database"]["message"]


# --- init -------------------------------------------------------------------------------------------------------


def test_init_writes_the_files_of_a_project(bare_cli: Cli) -> None:
    result = bare_cli("init", "my agent")
    assert result.exit_code == 0
    project = bare_cli.folder / "my agent"
    assert sorted(path.name for path in project.iterdir()) == [".env", "agent_graph.py", "langgraph.json"]
    assert (project / ".env").stat().st_mode & 0o777 == 0o600
    config = json.loads((project / "langgraph.json").read_text())
    assert config["graphs"] == {"agent": "./agent_graph.py:graph"}
    assert config["env"] == ".env"


def test_init_leaves_what_is_there(bare_cli: Cli) -> None:
    Path(".env").write_text("OPENAI_API_KEY=mine\n")
    Path("agent_graph.py").symlink_to("nowhere.py")
    told = bare_cli.json("init")
    assert told == {"directory": ".", "written": ["langgraph.json"], "kept": [".env", "agent_graph.py"]}
    assert Path(".env").read_text() == "OPENAI_API_KEY=mine\n"
    assert not Path("nowhere.py").exists()
    assert "left .env alone" in bare_cli("init").stdout


def test_init_tells_where_it_cannot_write(bare_cli: Cli) -> None:
    Path("file").write_text("")
    result = bare_cli("init", "file")
    assert result.exit_code == 1
    assert "cannot write into 'file'" in result.stderr


def test_the_settings_that_init_writes_are_all_there_are(bare_cli: Cli) -> None:
    bare_cli("init")
    lines = [line for line in Path(".env").read_text().splitlines() if re.match(r"#?[A-Z_]+=", line)]
    named = {line.lstrip("#").partition("=")[0] for line in lines}
    written_out = set(_FIELD_OF_VARIABLE) - {"SUPABASE_SECRET_KEY", "SUPABASE_PUBLISHABLE_KEY"}
    assert named == written_out | {"AGENT_MODEL"}
    active = dict(line.split("=", 1) for line in lines if not line.startswith("#"))
    assert Settings.from_environment(active) == Settings(default_user="local-user")
    defaults = dict(
        line.lstrip("#").split("=", 1)
        for line in lines
        if line.startswith("#LEARNING_") and "MODEL=" not in line and "EMBEDDINGS=" not in line
    )
    assert Settings.from_environment(defaults) == Settings(), "what is commented out is the default"


def test_the_graph_of_init_answers_and_says_what_is_missing(cli: Cli) -> None:
    cli("init")
    script = "import agent_graph; print(agent_graph.graph.invoke({'messages': [('user', 'hi')]})['messages'][-1].text)"
    command = [sys.executable, "-c", script]
    answer = subprocess.run(command, capture_output=True, text=True, check=True, cwd=cli.folder, timeout=60)
    assert "OPENAI_API_KEY is not set" in answer.stdout
    with openai_server(["I am here."]) as server:
        environment = {
            **os.environ,
            "OPENAI_API_KEY": "k",
            "OPENAI_BASE_URL": server.url,
            "LEARNING_WORKER": "off",
        }
        environment |= {"LEARNING_MODEL": "none", "LEARNING_EMBEDDINGS": "none"}
        answer = subprocess.run(
            command, capture_output=True, text=True, check=True, cwd=cli.folder, env=environment, timeout=60
        )
    assert answer.stdout.strip() == "I am here."


# --- demo -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_demo_goes_the_whole_way(cli: Cli) -> None:
    """It leaves the configured database alone, and nothing behind."""
    before = set(Path("/tmp").glob("agent-demo-*"))
    shown = subprocess.run(
        [*AGENT, "demo"], capture_output=True, text=True, check=False, cwd=ROOT, timeout=110
    )
    assert shown.returncode == 0, shown.stderr
    told = shown.stdout
    learned, _, later = told.partition("3. Another session")
    assert re.search(
        r"conversation\.user: My name is Ada\..*\n +from run [0-9a-f]{8}, message [0-9a-f]{8}", learned
    )
    assert re.search(r"user_profile\.name: Ada\n +from run [0-9a-f]{8}, a tool call", learned)
    answer = next(line for line in later.splitlines() if line.startswith("  agent: "))
    for known in ("Ada", "billing", "concise"):
        assert known in answer
    counts = re.search(r"(\d+) runs imported, 0 known already, 0 bad lines", later)
    assert counts is not None
    assert int(counts[1]) >= 24
    assert "Error: refund of 80.00 EUR exceeds the 59.90 EUR paid" in later
    actions = later.partition("5. Nothing dangerous")[2]
    assert '{"status": "shipped", "orders": 2}' in actions  # a read runs
    write = actions.partition("A write waits")[2].partition("What destroys")[0]
    assert "UPDATE shop.orders SET status = 'delivered' WHERE order_id = 'A1002'" in write
    assert "Rows, by a trial run: shop.orders: 1 updated" in write
    assert write.index("trial run") < write.index("grace approves") < write.index('"changed": {')
    assert "execute_sql was not executed" in actions.partition("Drop the table")[2]
    tool = actions.partition("A tool that the agent writes")[2]
    assert "def run(email: str)" in tool
    assert tool.index("grace approves") < tool.index('"238.00 euros"')
    assert re.search(r"\d+ rows, intact", tool)
    found = told.partition("6. What the application holds")[2]
    assert "shop.orders (email) → shop.customers (email), declared" in found
    assert re.search(r"- status: delivered \d+ %, shipped \d+ %", found)
    assert "ada@example.com" not in found
    alert = found.partition("7. The monitor")[2]
    assert alert.index("Critical: PUBLIC may UPDATE on shop.orders") < alert.index("REVOKE USAGE")
    assert alert.index("REVOKE USAGE") < alert.index("Resolved: PUBLIC may UPDATE on shop.orders")
    assert "What next" in later
    assert shown.stderr.count("Traceback") == 0, shown.stderr
    assert cli.json("memory", "list") == []
    assert set(Path("/tmp").glob("agent-demo-*")) <= before


def test_the_demo_says_where_it_can_be_run(bare_cli: Cli) -> None:
    result = bare_cli("demo")
    assert result.exit_code == 1
    assert "checkout" in result.stderr


def test_the_demo_does_not_write_into_a_folder_in_use(bare_cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    (bare_cli.folder / "file").write_text("")
    monkeypatch.chdir(ROOT)
    result = bare_cli("demo", "--keep", str(bare_cli.folder))
    assert result.exit_code == 1
    assert "is not empty" in result.stderr
    assert [path.name for path in bare_cli.folder.iterdir()] == ["file"]


# --- the background learner ---------------------------------------------------------------------------------------


def test_learn_does_a_cycle_and_status_shows_it(cli: Cli) -> None:
    assert cli("learner", "status").stderr.startswith("No cycles yet")
    result = cli("learn", "--once")
    assert result.exit_code == 0, result.output
    assert [line.split("\t")[:2] for line in result.stdout.splitlines() if "\t" in line] == [
        [step.name, "done"] for step in LEARNER_STEPS
    ]
    again = cli.json("learn", "--once")
    assert {step["state"] for step in again["steps"]} == {"done"}
    status = cli.json("learner", "status")
    assert [len(cycle["steps"]) for cycle in status["cycles"]] == [len(LEARNER_STEPS)] * 2
    assert status["cycles"][0]["cycle"] == again["cycle"]
    assert (status["replicas"], status["next_at"]) == ([], None)
    assert cli("learn", "--json").exit_code == 2


def test_the_learner_as_a_service_does_cycles_and_leaves_when_asked(
    cli: Cli, learning_database: ThrowawayDatabase
) -> None:
    environment = {**os.environ, "DATABASE_URL": learning_database.url, "LEARNING_LEARNER_INTERVAL": "1"}
    service = subprocess.Popen(
        [*AGENT, "learner", "run"], cwd=cli.folder, env=environment, stderr=subprocess.PIPE, text=True
    )
    try:
        deadline = time.monotonic() + 60
        while not [cycle for cycle in cli.json("learner", "status")["cycles"] if cycle["finished_at"]]:
            assert time.monotonic() < deadline, "no cycle came"
            time.sleep(0.2)
        service.send_signal(signal.SIGTERM)
        _, told = service.communicate(timeout=30)
    finally:
        service.kill()
        service.wait(30)
    assert service.returncode == 0, told
    assert "Learning every second." in told
    assert cli.json("learner", "status")["replicas"] == []
