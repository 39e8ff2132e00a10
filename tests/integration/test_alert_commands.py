"""`agent alerts`: what it prints, its exit codes, and what is then in the rows."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from agent.cli import app
from agent.settings import current_settings
from agent.testing.throwaway import ThrowawayDatabase
from tests.chat_servers import TELEGRAM_TOKEN, TelegramServer, serving
from tests.integration.alert_office import NOBODY, AlertOffice, alert_office, finding


class Shell:
    """`agent`, called in this process, and the same database to fill and look at."""

    def __init__(self, database: ThrowawayDatabase) -> None:
        self._database = database

    def __call__(self, *arguments: str) -> Result:
        current_settings.cache_clear()
        result = CliRunner().invoke(app, ["alerts", *arguments])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    def json(self, *arguments: str) -> Any:
        result = self(*arguments, "--json")
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    def do(self, work: Callable[[AlertOffice], Coroutine[Any, Any, Any]]) -> Any:
        async def run() -> Any:
            async with alert_office(self._database) as office:
                return await work(office)

        return asyncio.run(run())

    def found(self, *causes: str, **changes: Any) -> None:
        """Alerts of these causes; those of before are resolved."""
        self.do(lambda office: office.round(*(finding(cause, **changes) for cause in causes)))


@pytest.fixture
def shell(
    learning_database: ThrowawayDatabase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Shell]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DATABASE_URL", learning_database.url)
    yield Shell(learning_database)
    current_settings.cache_clear()


def test_what_is_open_is_listed_and_with_all_what_is_over_too(shell: Shell) -> None:
    assert "Nothing is open" in shell("list").stderr
    shell.found("error_rate:gone")
    shell.found("error_rate:here")
    assert [alert["cause"] for alert in shell.json("list")] == ["error_rate:here"]
    assert [alert["cause"] for alert in shell.json("list", "--all")] == ["error_rate:here", "error_rate:gone"]
    [line] = shell("list").stdout.splitlines()
    assert line.split("\t")[1:3] == ["warning", "open"]
    assert [shell.json("list", "--tenant", "acme"), len(shell.json("list", "--all", "--limit", "1"))] == [
        [],
        1,
    ]


def test_an_alert_is_shown_by_how_its_id_begins_and_steers_no_terminal(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LEARNING_PUBLIC_URL", "https://agents.example.com")
    shell.found("error_rate:\x1b[31m", title="\x1b[2Jgone", evidence={"\x1b]0;x\x07": "\u202e"})
    [alert] = shell.json("list")
    shown = shell("show", alert["alert_id"][:8]).stdout
    for part in (
        "12 of 40",
        "What to do: Look at",
        "raised  recorder sent",
        f"/alerts/{alert['alert_id']}?tenant=default",
    ):
        assert part in shown
    assert "\x1b" not in shown
    assert "\u202e" not in shown
    assert shell.json("show", alert["alert_id"])["notices"][0]["kind"] == "raised"


@pytest.mark.parametrize("given", ["00000000", "nonsense", "7", ""])
def test_an_alert_that_is_not_there_is_told(shell: Shell, given: str) -> None:
    result = shell("show", given)
    assert (result.exit_code, "has no alert" in result.stderr) == (1, True)


def test_a_silence_is_made_listed_and_ended(shell: Shell) -> None:
    result = shell("silence", "error_rate*", "--for", "2h", "--why", "a release", "--as", "ada")
    assert (result.exit_code, "is silenced until" in result.stdout) == (0, True)
    shell.found("error_rate:x")
    [alert] = shell.json("list")
    assert alert["reminded_at"] is None, "nobody was told"
    assert "Silenced:   until" in shell("show", alert["alert_id"]).stdout

    [silence] = shell.json("silences")
    assert (silence["pattern"], silence["made_by"], silence["why"]) == ("error_rate*", "ada", "a release")
    assert shell("unsilence", silence["silence_id"][:8]).stdout == "The silence is over.\n"
    assert shell.json("silences") == []
    assert shell.json("unsilence", silence["silence_id"]) == {"ended": False}
    assert [one["holds"] for one in shell.json("silences", "--all")] == [False]
    assert "Nothing is silenced" in shell("silences").stderr


def test_who_made_a_silence_is_the_user_of_the_machine_if_nobody_is_named(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOGNAME", "grace")
    assert shell.json("silence", "x", "--for", "1d")["made_by"] == "grace"


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("silence", "x"), 2),
        (("silence", "x", "--for", "soon"), 2),
        (("silence", "x", "--for", "31d"), 2),
        (("silence", "", "--for", "1h"), 2),
        (("unsilence", "nonsense"), 1),
        (("list", "--limit", "0"), 2),
    ],
)
def test_what_cannot_be_is_refused(shell: Shell, arguments: tuple[str, ...], code: int) -> None:
    assert shell(*arguments).exit_code == code
    assert shell.do(lambda office: office.database.call("list_alert_silences", NOBODY)) == []


def test_every_sink_is_tried_and_one_that_fails_is_told(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = shell("test")
    assert (result.exit_code, result.stdout.splitlines()[-1]) == (0, "log: sent")
    assert "Only the log is set up" in result.stderr

    server = TelegramServer()
    with serving(server) as address:
        monkeypatch.setenv("TELEGRAM_BOT_TOKEN", TELEGRAM_TOKEN)
        monkeypatch.setenv("TELEGRAM_API_URL", address)
        monkeypatch.setenv("LEARNING_ALERT_TELEGRAM_CHAT", "-100")
        monkeypatch.setenv("LEARNING_ALERT_WEBHOOK", "http://127.0.0.1:9/")
        result = shell("test", "--json")
    assert result.exit_code == 1
    outcomes = {one["sink"]: one["error"] for one in json.loads(result.stdout)}
    assert outcomes == {"log": None, "telegram": None, "webhook": "it could not be reached: ConnectError"}
    assert "This is a test" in server.of("sendMessage")[0]["text"]
    assert shell.do(lambda office: office.database.call("list_alerts", NOBODY)) == []
