"""Importing logs of runs: streaming, again and again, bad lines among good ones."""

from __future__ import annotations

import asyncio
import io
import json
import os
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from agent.database.postgres import PostgresDatabase
from agent.errors import AccessRefused, DatabaseUnavailable, InvalidLearning, OperatorError
from agent.identity import Identity
from agent.learning import run_import
from agent.learning.run_import import BadLine, ImportReport, import_runs
from agent.testing.throwaway import ThrowawayDatabase

OPERATOR = Identity()


def line(number: int, **more: Any) -> bytes:
    return (
        json.dumps({"messages": [{"role": "user", "content": f"question {number}"}], **more}).encode() + b"\n"
    )


class Storage:
    """The real storage functions, or a refusal in their place."""

    def __init__(self, url: str, identity: Identity = OPERATOR) -> None:
        self.url = url
        self.identity = identity
        self.calls: list[int] = []
        self.refuse: Callable[[list[dict[str, Any]]], None] = lambda _: None

    def __call__(self, runs: list[dict[str, Any]]) -> dict[str, int]:
        self.calls.append(len(runs))
        self.refuse(runs)
        counts: dict[str, int] = self.call("import_runs", runs=runs)
        return counts

    def call(self, function: str, **arguments: Any) -> Any:
        async def work() -> Any:
            database = PostgresDatabase(self.url, connections_max=1)
            try:
                return await database.call(function, self.identity, **arguments)
            finally:
                await database.close()

        return asyncio.run(work())

    def runs(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.call("list_runs", run_limit=10_000)
        return found


@pytest.fixture
def storage(learning_database: ThrowawayDatabase) -> Storage:
    return Storage(learning_database.url)


def imported(log: bytes, storage: Storage, **options: Any) -> ImportReport:
    report = ImportReport()
    import_runs(io.BytesIO(log), storage, report, **options)
    return report


def test_runs_go_in_with_what_is_known_of_them(storage: Storage) -> None:
    error = {"role": "tool", "tool_call_id": "c", "name": "refund", "content": "Error: too much"}
    log = json.dumps(
        {"traj": [{"role": "user", "content": "hi"}, error], "reward": 0, "task_id": "t1"}
    ).encode()
    report = imported(log, storage, source_file="log.jsonl", agent_id="shop")
    assert (report.recorded, report.known, report.bad) == (1, 0, 0)
    [run] = storage.runs()
    assert run["source"] == "import"
    assert run["agent_id"] == "shop"
    assert run["facts"] == {"task_id": "t1", "source_file": "log.jsonl", "line": 1}
    assert run["tool_errors"] == [{"tool": "refund", "tool_call_id": "c", "message": "Error: too much"}]
    assert run["outcomes"] == [{"kind": "reward", "succeeded": False, "score": 0}]
    assert run["message_count"] == 2
    assert run["user_id"] is None


def test_an_import_that_is_done_again_changes_nothing(storage: Storage) -> None:
    log = b"".join(line(number, reward=number % 2) for number in range(120))
    assert imported(log, storage).recorded == 120
    before = storage.runs()
    report = imported(log, storage)
    assert (report.recorded, report.known) == (0, 120)
    assert storage.runs() == before


def test_a_log_that_has_grown_adds_what_is_new(storage: Storage) -> None:
    log = b"".join(line(number) for number in range(30))
    imported(log, storage)
    report = imported(line(99) + log + line(100), storage)
    assert (report.recorded, report.known) == (2, 30)


def test_an_interrupted_import_goes_on(storage: Storage) -> None:
    log = b"".join(line(number) for number in range(120))

    def away_at_the_third(_: list[dict[str, Any]]) -> None:
        if len(storage.calls) == 3:
            raise DatabaseUnavailable("gone for a while")

    storage.refuse = away_at_the_third
    report = ImportReport()
    with pytest.raises(DatabaseUnavailable):
        import_runs(io.BytesIO(log), storage, report)
    assert report.recorded == 100, "what went in is told"
    assert len(storage.runs()) == 100
    again = imported(log, storage)
    assert (again.recorded, again.known) == (20, 100)


def test_bad_lines_are_named_and_the_rest_goes_in(storage: Storage) -> None:
    log = (
        line(1)
        + b"{oops\n"
        + b"\n"
        + b"[]\n"
        + line(2)
        + b'{"task_id": 1}\n'
        + b"\xff\xfe\n"
        + line(3).rstrip()
    )
    told: list[BadLine] = []
    report = imported(log, storage, on_bad=told.append)
    assert (report.recorded, report.bad) == (3, 4)
    assert report.bad_lines == told
    assert [(bad.line_number, bad.reason.split(":")[0]) for bad in told] == [
        (2, "is not JSON"),
        (4, "is a list, not an object"),
        (6, "has neither 'messages' nor 'traj'"),
        (7, "is not UTF-8 (byte 1)"),
    ]


def test_a_line_that_is_nested_too_deeply_is_bad_and_the_rest_goes_in(storage: Storage) -> None:
    def nested(opening: str, closing: str, levels: int) -> bytes:
        content = opening * levels + "1" + closing * levels
        return f'{{"messages": [{{"role": "user", "content": {content}}}]}}\n'.encode()

    bombs = [nested("[", "]", levels) for levels in (21, 400, 960, 100_000)]
    bombs += [nested('{"a":', "}", levels) for levels in (21, 400, 960)]
    report = imported(line(1) + b"".join(bombs) + line(2), storage)
    assert report.recorded == 2
    assert [bad.line_number for bad in report.bad_lines] == [2, 3, 4, 5, 6, 7, 8]
    assert all("nested too deeply" in bad.reason for bad in report.bad_lines)


def test_a_report_names_the_first_bad_lines_and_counts_all(storage: Storage) -> None:
    told: list[BadLine] = []
    report = imported(b"{oops\n" * 1_000 + line(1), storage, on_bad=told.append)
    assert (report.recorded, report.bad, len(told)) == (1, 1_000, 1_000)
    assert [bad.line_number for bad in report.bad_lines] == list(range(1, 21))


def test_a_line_that_is_too_long_is_bad_and_passed_over(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_import, "LINE_BYTES_MAX", 4096)
    monkeypatch.setattr(run_import, "_CHUNK_BYTES", 1000)
    exactly = line(1, padding="")
    exactly = line(1, padding="x" * (4096 - len(exactly)))
    assert len(exactly) == 4096
    log = line(0) + line(2, padding="x" * 10_000) + exactly + line(4, padding="x" * 4096).rstrip()
    report = imported(log, storage)
    assert report.recorded == 2
    assert [bad.line_number for bad in report.bad_lines] == [2, 4]


def test_batches_end_by_number_and_by_size(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    imported(b"".join(line(number) for number in range(120)), storage)
    assert storage.calls == [50, 50, 20]
    storage.calls.clear()
    monkeypatch.setattr(run_import, "BATCH_BYTES", 2500)
    imported(b"".join(line(number, padding="x" * 1000) for number in range(6)), storage)
    assert storage.calls == [3, 3]


def test_progress_covers_every_byte(storage: Storage) -> None:
    log = b"".join(line(number) for number in range(120)) + b"{bad\n\n" + line(7).rstrip()
    steps: list[int] = []
    imported(log, storage, on_bytes=steps.append)
    assert sum(steps) == len(log)
    assert len(steps) == 3


def test_a_run_that_the_database_refuses_does_not_keep_the_others_out(storage: Storage) -> None:
    def refuse_the_third(runs: list[dict[str, Any]]) -> None:
        if any(run["messages"][0]["content"] == "question 3" for run in runs):
            raise InvalidLearning("import_runs: no")

    storage.refuse = refuse_the_third
    report = imported(b"".join(line(number) for number in range(6)), storage)
    assert report.recorded == 5
    assert report.bad_lines == [BadLine(line_number=4, reason="was refused by the database: import_runs: no")]


@pytest.mark.parametrize(
    "error",
    [
        AccessRefused("import_runs: permission denied"),
        OperatorError("failed in the database (53100): disk full"),
    ],
)
def test_a_database_that_takes_nothing_ends_the_import(storage: Storage, error: Exception) -> None:
    def refuse(_: list[dict[str, Any]]) -> None:
        raise error

    storage.refuse = refuse
    with pytest.raises(type(error)):
        imported(line(1) + line(2), storage)
    assert storage.calls == [2]


def test_a_log_of_one_user_does_not_become_another_users(storage: Storage) -> None:
    storage.identity = Identity(user_id="ada")
    imported(line(1), storage)
    storage.identity = Identity(user_id="grace")
    report = imported(line(1) + line(2), storage)
    assert report.recorded == 1
    assert [bad.line_number for bad in report.bad_lines] == [1]
    assert "belongs to somebody else" in report.bad_lines[0].reason
    assert Counter(run["user_id"] for run in storage.runs()) == {"ada": 1, "grace": 1}


def test_runs_of_a_user_are_to_be_learned_and_others_are_not(storage: Storage) -> None:
    imported(line(1) + line(2), storage)
    assert storage.call("learning_status")["jobs_waiting"] == 0
    storage.identity = Identity(user_id="ada")
    imported(line(3, session_id="s") + line(4, session_id="s"), storage, quiet_period=timedelta(0))
    status = storage.call("learning_status")
    assert (status["jobs_waiting"], status["runs_waiting"]) == (1, 2)


def test_tenants_have_runs_of_their_own(storage: Storage) -> None:
    imported(line(1), storage)
    storage.identity = Identity(tenant_id="other")
    assert imported(line(1), storage).recorded == 1
    assert len(storage.runs()) == 1


def test_what_postgres_cannot_store_goes_in_replaced(storage: Storage) -> None:
    call = {"id": "\x00", "function": {"name": "f", "arguments": '{"\\u0000": 1}'}}
    messages = [{"role": "user", "content": "a\x00b \ud800"}, {"role": "assistant", "tool_calls": [call]}]
    log = json.dumps({"messages": messages, "task_id": "\x00"}).encode()
    assert imported(log, storage).recorded == 1
    run = storage.call("get_run", the_run_id=storage.runs()[0]["run_id"])
    assert [message["content"] for message in run["messages"]] == ["a\ufffdb \ufffd", ""]
    assert run["messages"][1]["tool_calls"] == [{"id": "\ufffd", "name": "f", "args": {"\ufffd": 1}}]
    assert run["facts"] == {"task_id": "\ufffd", "line": 1}


def test_a_message_of_a_megabyte_goes_in(storage: Storage) -> None:
    text = "emoji 🙂 " * 125_000
    log = json.dumps({"messages": [{"role": "user", "content": text}]}).encode()
    assert imported(log, storage).recorded == 1
    run = storage.call("get_run", the_run_id=storage.runs()[0]["run_id"])
    assert run["messages"][0]["content"] == text


def airline_log() -> Path:
    """A log of a hundred real runs, which is not shipped; where CI is set it must be there."""
    folder = Path(os.environ.get("LEARNING_DATA") or Path(__file__).parents[3] / "shared" / "data")
    log = folder / "trajectories" / "tau_airline_dev.jsonl"
    if not log.exists():
        reason = (
            f"the airline runs are not in {folder}; set LEARNING_DATA to the folder that has trajectories/"
        )
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return log


def test_a_real_log_goes_in_with_outcomes_and_tool_errors(storage: Storage) -> None:
    log = airline_log()
    with log.open("rb") as file:
        report = ImportReport()
        import_runs(file, storage, report, source_file=log.name)
    assert (report.recorded, report.known, report.bad) == (100, 0, 0)
    runs = storage.runs()
    assert len(runs) == 100
    assert Counter(run["outcomes"][0]["succeeded"] for run in runs) == {True: 31, False: 69}
    # Counted in the data by hand: 63 results begin with "Error:", and no other result reports a failure.
    assert sum(len(run["tool_errors"]) for run in runs) == 63
    assert sum(bool(run["tool_errors"]) for run in runs) == 29
    failed = storage.call("list_runs", wanted={"failed": True}, run_limit=1000)
    assert len(failed) == 76
    assert all(not run["outcomes"][0]["succeeded"] or run["tool_errors"] for run in failed)
    tools = Counter(error["tool"] for run in runs for error in run["tool_errors"])
    assert tools == {
        "update_reservation_flights": 39,
        "book_reservation": 23,
        "update_reservation_baggages": 1,
    }
