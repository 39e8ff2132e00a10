"""`agent approvals`, `agent log` and `agent tools`: what they print, their exit codes, and what is then in the rows."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from typer.testing import CliRunner, Result

from agent.approval.binding import binding_hash
from agent.approval.human_approval import HumanApprovalQueue
from agent.approval.records import Approval, ApprovalRequest
from agent.approval.risk import Risk
from agent.cli import app
from agent.database import open_database
from agent.execution.safe_executor import SafeExecutor
from agent.identity import Identity
from agent.settings import Settings, current_settings
from agent.testing.throwaway import ThrowawayDatabase
from tests.integration.shop_sql import POLICY as TABLES
from tests.integration.shop_sql import Shop, shop

BOB = Identity(user_id="bob", session_id="t1", agent_id="shop")
POLICY = """
[[reviewer]]
name = "ada"
user_ids = ["ada@example.com"]
cli = true

[[reviewer]]
name = "grace"
cli = true

[[reviewer]]
name = "chat-only"
slack = "U1"
"""


class Desk:
    """`agent`, called in this process, and the same database for tests to ask and look."""

    def __init__(self, database: ThrowawayDatabase, folder: Path) -> None:
        self.url = database.url
        self.folder = folder
        self.settings = Settings(database_url=database.settings.database_url)

    def __call__(self, *arguments: str, input: str | None = None) -> Result:  # noqa: A002 - as the runner has it
        current_settings.cache_clear()
        result = CliRunner().invoke(app, arguments, input=input)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    def json(self, *arguments: str) -> Any:
        result = self(*arguments, "--json")
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    def call(self, function: str, identity: Identity = BOB, **arguments: Any) -> Any:
        async def call() -> Any:
            database = open_database(self.settings)
            try:
                return await database.call(function, identity, **arguments)
            finally:
                await database.close()

        return asyncio.run(call())

    def ask(self, risk: Risk = Risk.WRITE, *, identity: Identity = BOB, **arguments: Any) -> Approval:
        arguments = arguments or {"order": "A1"}

        async def ask() -> Approval:
            database = open_database(self.settings)
            try:
                request = ApprovalRequest(
                    tool="refund", arguments=arguments, risk=risk, approvers=("ada", "grace", "chat-only"),
                    args_hash=binding_hash("refund", arguments, tenant_id=identity.tenant_id),
                    summary="Refund of an order", reason="The customer asked",
                )  # fmt: skip
                return await HumanApprovalQueue(database, self.settings).submit(request, identity)
            finally:
                await database.close()

        return asyncio.run(ask())

    def state(self, approval: Approval) -> str:
        return str(self.call("get_approval", the_approval_id=approval.approval_id)["state"])

    def log(self, **entry: Any) -> int:
        entry = {
            "state": "executed", "tool": "execute_sql", "tool_version": "1", "risk": "READ", "decision": "allowed",
            "arguments_shown": {"sql": "SELECT 1"}, "arguments_run": {"sql": "SELECT 1"}, "row_count": 1,
            "duration_ms": 3,
        } | entry  # fmt: skip
        return int(self.call("record_execution", entry=entry)["log_id"])

    def write_tool(self, name: str = "vat", code: str = "net * 0.19") -> None:
        tool = {
            "name": name, "description": "VAT of a price", "code": code, "parameters": {"net": "float"},
            "examples": [{"net": 1}], "example_results": [0.19], "capabilities": ["query_data"], "author": "shop run 1",
            "code_hash": binding_hash(name, {"c": code}, tenant_id="x"),
        }  # fmt: skip
        self.call("save_tool_version", tool=tool)


@pytest.fixture
def desk(
    learning_database: ThrowawayDatabase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Desk]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DATABASE_URL", learning_database.url)
    (tmp_path / "agent-policy.toml").write_text(POLICY)
    current_settings.cache_clear()
    yield Desk(learning_database, tmp_path)
    current_settings.cache_clear()


# --- approvals --------------------------------------------------------------------------------------------------


def test_what_waits_is_listed_and_shown(desk: Desk) -> None:
    first, second = desk.ask(), desk.ask(order="B2")
    lines = desk("approvals", "list").stdout.splitlines()
    assert [line.split("\t")[0] for line in lines] == [second.approval_id, first.approval_id]
    shown = desk("approvals", "show", first.approval_id[:13]).stdout
    assert '"A1"' in shown
    assert first.args_hash in shown
    assert shown.index("claim") < shown.index("The customer asked")
    assert desk.json("approvals", "show", first.approval_id)["arguments"] == {"order": "A1"}


def test_an_empty_list_is_told_on_standard_error(desk: Desk) -> None:
    result = desk("approvals", "list")
    assert (result.exit_code, result.stdout) == (0, "")
    assert "Nothing waits" in result.stderr
    assert desk.json("approvals", "list") == []


def test_a_call_is_approved_by_name(desk: Desk) -> None:
    approval = desk.ask()
    result = desk("approvals", "approve", approval.approval_id, "--as", "ada", "--yes", "--note", "fine")
    assert result.exit_code == 0, result.output
    assert result.stdout == "ada approved it. It is approved now.\n"
    found = desk.call("get_approval", the_approval_id=approval.approval_id)
    assert [(vote["voter"], vote["channel"], vote["note"]) for vote in found["votes"]] == [
        ("ada", "cli", "fine")
    ]
    assert desk.json("approvals", "list") == []
    assert [row["state"] for row in desk.json("approvals", "list", "--all")] == ["approved"]


def test_what_destroys_needs_two_and_a_second_vote_of_one_person_is_none(desk: Desk) -> None:
    approval = desk.ask(Risk.DESTRUCTIVE)
    for _ in range(2):
        result = desk("approvals", "approve", approval.approval_id, "--as", "ada", "--yes")
        assert (result.exit_code, "1 of 2 people" in result.stderr) == (0, True)
    assert "counts once" in result.stdout
    assert desk.state(approval) == "pending"
    assert (
        desk.json("approvals", "approve", approval.approval_id, "--as", "grace", "--yes")["approval"]["state"]
        == "approved"
    )


def test_a_rejection_ends_it(desk: Desk) -> None:
    approval = desk.ask()
    assert desk("approvals", "reject", approval.approval_id, "--as", "grace", "--yes").exit_code == 0
    late = desk("approvals", "approve", approval.approval_id, "--as", "ada", "--yes")
    assert late.exit_code == 1
    assert "not recorded: it is rejected" in late.stderr
    assert desk.state(approval) == "rejected"


@pytest.mark.parametrize("name", ["chat-only", "mallory", "ADA"])
def test_who_may_not_decide_here_is_refused(desk: Desk, name: str) -> None:
    approval = desk.ask()
    result = desk("approvals", "approve", approval.approval_id, "--as", name, "--yes")
    assert result.exit_code == 1
    assert "the policy file allows ada, grace" in result.stderr
    assert desk.state(approval) == "pending"


def test_a_reviewer_must_be_named_unless_there_is_one(desk: Desk) -> None:
    approval = desk.ask()
    result = desk("approvals", "approve", approval.approval_id, "--yes")
    assert (result.exit_code, "ada, grace with --as" in result.stderr) == (1, True)
    (desk.folder / "agent-policy.toml").write_text('[[reviewer]]\nname = "ada"\ncli = true\n')
    assert desk("approvals", "approve", approval.approval_id, "--yes").exit_code == 0


def test_without_a_policy_nobody_may(desk: Desk) -> None:
    approval = desk.ask()
    (desk.folder / "agent-policy.toml").unlink()
    result = desk("approvals", "approve", approval.approval_id, "--as", "ada", "--yes")
    assert (result.exit_code, "allows nobody" in result.stderr) == (1, True)
    assert desk.state(approval) == "pending"


def test_nobody_approves_their_own(desk: Desk) -> None:
    for user in ("ada", "ada@example.com"):
        approval = desk.ask(identity=Identity(user_id=user))
        result = desk("approvals", "approve", approval.approval_id, "--as", "ada", "--yes")
        assert (result.exit_code, "asked for themselves" in result.stderr) == (1, True)
        assert desk.state(approval) == "pending"


def test_nobody_is_asked_in_a_pipe(desk: Desk) -> None:
    approval = desk.ask()
    result = desk("approvals", "approve", approval.approval_id, "--as", "ada", input="y\n")
    assert (result.exit_code, "say --yes" in result.output) == (2, True)
    assert desk.state(approval) == "pending"


def test_a_decision_is_about_the_hash_that_was_seen(desk: Desk) -> None:
    approval = desk.ask()
    for digits in ("0" * 16, approval.args_hash[:15], "", approval.args_hash + "0"):
        result = desk("approvals", "approve", approval.approval_id, "--as", "ada", "--hash", digits)
        assert result.exit_code == 1, digits
    assert desk.state(approval) == "pending"
    result = desk(
        "approvals", "approve", approval.approval_id, "--as", "ada", "--hash", approval.args_hash[:16]
    )
    assert result.exit_code == 0, result.output


def test_ids_that_name_nothing_or_too_much_are_refused(desk: Desk) -> None:
    for number in range(20):
        desk.ask(order=f"{number}")
    ids = [row["approval_id"] for row in desk.json("approvals", "list")]
    shared = next(letter for letter in "0123456789abcdef" if sum(one[0] == letter for one in ids) > 1)
    for begins, why in ((shared, "Give more of the id"), ("zzz", "has no approval"), ("", "has no approval")):
        result = desk("approvals", "approve", begins, "--as", "ada", "--yes")
        assert (result.exit_code, why in result.stderr) == (1, True), begins
    assert desk("approvals", "show", ids[0], "--tenant", "other").exit_code == 1


def test_another_tenants_approvals_are_not_found(desk: Desk) -> None:
    approval = desk.ask(identity=Identity(tenant_id="other", user_id="bob"))
    assert desk.json("approvals", "list") == []
    assert desk("approvals", "approve", approval.approval_id, "--as", "ada", "--yes").exit_code == 1
    result = desk("approvals", "approve", approval.approval_id, "--as", "ada", "--yes", "--tenant", "other")
    assert result.exit_code == 0, result.output


def test_text_of_an_agent_does_not_steer_the_terminal(desk: Desk) -> None:
    approval = desk.ask(order="\x1b[2J\x1b]0;owned\x07 \u202e gnp.exe")
    for arguments in (("show", approval.approval_id), ("list",), ("show", approval.approval_id, "--json")):
        assert not {"\x1b", "\x07", "\u202e"} & set(desk("approvals", *arguments).stdout), arguments


# --- the kill switch and standing rules -------------------------------------------------------------------------


def test_agents_are_halted_and_go_on(desk: Desk) -> None:
    made = desk.json("approvals", "halt", "--reason", "odd mails", "--tool", "send_email", "--as", "ada")
    reserve: dict[str, Any] = {"the_tool": "send_email", "limit_key": "send_email", "per_hour": None}
    halted = desk.call("reserve_execution", **reserve)
    assert (halted["allowed"], halted["halted"]["reason"], halted["halted"]["by"]) == (
        False,
        "odd mails",
        "ada",
    )
    assert "tool send_email of all agents" in desk("approvals", "halts").stdout
    assert desk("approvals", "resume", made["halt_id"][:8], "--as", "grace").stdout == "The halt has ended.\n"
    assert desk.call("reserve_execution", **reserve)["allowed"] is True
    assert desk.json("approvals", "halts") == []
    again = desk("approvals", "resume", made["halt_id"], "--as", "ada")
    assert (again.exit_code, "has no halt" in again.stderr) == (1, True)


def test_a_halt_wants_a_reason_and_a_reviewer(desk: Desk) -> None:
    assert desk("approvals", "halt", "--as", "ada").exit_code == 2
    assert desk("approvals", "halt", "--reason", "x", "--as", "mallory").exit_code == 1
    assert desk.json("approvals", "halts") == []


def test_a_standing_rule_is_made_from_a_call_that_was_shown(desk: Desk) -> None:
    request = {
        "tool": "execute_sql", "kind": "execution", "arguments": {"sql": "UPDATE t SET a = 1"}, "args_hash": "a" * 64,
        "risk": "WRITE", "approvers": ["ada", "grace"], "fingerprint": "f", "tables": ["t"], "rows": 3,
    }  # fmt: skip
    seen = desk.call("request_approval", request=request)
    bounds = ("--rows", "5", "--for", "7d", "--uses", "1", "--as", "grace")
    unasked = desk("approvals", "allow", seen["approval_id"], *bounds)
    assert (unasked.exit_code, "--yes" in unasked.output) == (2, True)
    wrong = desk("approvals", "allow", seen["approval_id"], *bounds, "--hash", "b" * 16)
    assert wrong.exit_code == 1
    assert (
        desk("approvals", "allow", seen["approval_id"][:8], "--rows", "5", "--for", "soon", "--yes").exit_code
        == 2
    )

    made = desk("approvals", "allow", seen["approval_id"][:8], *bounds, "--hash", "a" * 16)
    assert made.exit_code == 0, made.output
    [rule] = desk.json("approvals", "rules")
    assert (rule["tool"], rule["fingerprint"], rule["tables"], rule["max_rows"], rule["max_uses"], rule["made_by"]) == (
        "execute_sql", "f", ["t"], 5, 1, "grace",
    )  # fmt: skip
    states = [desk.call("request_approval", request=request)["state"] for _ in range(2)]
    assert states == ["approved", "pending"]
    assert desk.call("get_approval", the_approval_id=seen["approval_id"])["state"] == "pending"


def test_no_standing_rule_for_what_destroys(desk: Desk) -> None:
    approval = desk.ask(Risk.DESTRUCTIVE)
    answer = desk(
        "approvals", "allow", approval.approval_id, "--rows", "5", "--for", "1d", "--as", "ada", "--yes"
    )
    assert (answer.exit_code, "DESTRUCTIVE" in answer.output) == (1, True)
    assert desk.json("approvals", "rules") == []


def test_standing_rules_are_listed_and_revoked(desk: Desk) -> None:
    rule = {
        "tool": "execute_sql", "fingerprint": "f1", "tables": ["shop.orders"], "max_rows": 5, "made_by": "ada",
        "expires_at": "2999-01-01T00:00:00Z", "max_uses": 3,
    }  # fmt: skip
    made = desk.call("save_standing_rule", rule=rule)
    [line] = desk("approvals", "rules").stdout.splitlines()
    assert line.split("\t")[:3] == [made["rule_id"], "holds", "execute_sql"]
    assert desk.json("approvals", "revoke", made["rule_id"][:8], "--as", "grace") == {"revoked": True}
    assert desk.json("approvals", "revoke", made["rule_id"], "--as", "grace") == {"revoked": False}
    assert [rule["holds"] for rule in desk.json("approvals", "rules")] == [False]


# --- the log ----------------------------------------------------------------------------------------------------


def test_the_log_is_listed_filtered_and_shown(desk: Desk) -> None:
    read = desk.log()
    wrote = desk.log(
        risk="WRITE", row_count=None, rows={"shop.orders": {"inserted": 0, "updated": 2, "deleted": 0}},
        pre_image={"shop.orders": [{"id": 1}]},
    )  # fmt: skip
    refused = desk.log(
        tool="send_email", state="refused", decision="refused", error="not an allowed recipient"
    )
    rows = [line.split("\t") for line in desk("log", "list").stdout.splitlines()]
    assert [row[0] for row in rows] == [str(refused), str(wrote), str(read)]
    assert [row[7] for row in rows] == ["1 read", "shop.orders: 2 updated", "1 read"]
    assert [row["log_id"] for row in desk.json("log", "list", "--state", "refused")] == [refused]
    assert [row["log_id"] for row in desk.json("log", "list", "--tool", "execute_sql", "--limit", "1")] == [
        wrote
    ]
    assert desk.json("log", "list", "--since", "2999-01-01") == []
    assert desk.json("log", "list", "--user", "grace") == []
    shown = desk("log", "show", str(wrote)).stdout
    for text in ("SELECT 1", "shop.orders: 2 updated", "user: bob", "agent: shop", "Before"):
        assert text in shown, text
    assert desk.json("log", "show", str(wrote))["pre_image"] == {"shop.orders": [{"id": 1}]}


def test_the_log_refuses_what_it_cannot_find(desk: Desk) -> None:
    desk.log()
    assert desk("log", "show", "99").exit_code == 1
    assert desk("log", "show", "1", "--tenant", "other").exit_code == 1
    for arguments in (
        ("show", "x"),
        ("show", "1;"),
        ("list", "--state", "odd"),
        ("list", "--since", "yesterday"),
    ):
        assert desk("log", *arguments).exit_code == 2, arguments


def test_a_log_that_was_changed_is_told(desk: Desk) -> None:
    desk.log()
    desk.log()
    whole = desk("log", "verify")
    assert (whole.exit_code, whole.stdout) == (0, "Whole: 2 entries, 0 events of approvals.\n")
    with psycopg.connect(desk.url, autocommit=True) as connection:
        connection.execute("SET session_replication_role = replica")  # as only a superuser can
        connection.execute("ALTER TABLE public.agent_execution_log DISABLE TRIGGER ALL")
        connection.execute("UPDATE public.agent_execution_log SET tool = 'other' WHERE log_id = 2")
    broken = desk("log", "verify")
    assert broken.exit_code == 1
    assert "from entry 2 on" in broken.stdout
    assert json.loads(desk("log", "verify", "--json").stdout)["first_broken"] == 2


def test_a_write_is_undone_once_and_that_is_logged(
    desk: Desk, learning_database: ThrowawayDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = POLICY + TABLES
    (desk.folder / "agent-policy.toml").write_text(policy)
    with shop(learning_database, policy=policy) as store:
        monkeypatch.setenv("LEARNING_SQL_LOGINS_FILE", str(store.file))
        log_id = _written(desk, store, "UPDATE shop.orders SET status = 'gone' WHERE id = 2")
        undo = ("log", "undo", str(log_id), "--tenant", "acme", "--as", "ada")
        assert desk(*undo).exit_code == 2, "nobody can be asked in a pipe"
        assert desk(*undo[:-1], "mallory", "--yes").exit_code == 1
        assert store.rows("SELECT status FROM shop.orders WHERE id = 2") == [("gone",)]
        undone = desk(*undo, "--yes")
        assert (undone.exit_code, undone.stdout) == (0, f"Undone; the log has it as entry {log_id + 1}.\n"), (
            undone.output
        )
        assert store.rows("SELECT status FROM shop.orders WHERE id = 2") == [("new",)]
        again = desk(*undo, "--yes")
        assert (again.exit_code, "was undone already" in again.stderr) == (1, True)
        assert "undone by" in desk("log", "show", str(log_id), "--tenant", "acme").stdout
        assert desk("log", "verify", "--tenant", "acme").exit_code == 0


def _written(desk: Desk, store: Shop, statement: str) -> int:
    """Run a statement as an agent, with Grace's approval; its log entry."""
    identity = Identity(tenant_id="acme", user_id="bob")

    async def write() -> int:
        database = open_database(store.settings)
        executor = SafeExecutor(database, store.settings, store.policy)
        try:
            running = asyncio.create_task(
                executor.execute("execute_sql", {"sql": statement}, identity=identity)
            )
            while not (pending := await executor.queue.get_pending_approvals(identity)):
                await asyncio.wait([running], timeout=0.05)
                assert not running.done(), running.result()
            grace = store.policy.reviewers.by_name("grace")
            assert grace is not None
            hashes = {pending[0].approval_id: pending[0].args_hash}
            await executor.queue.decide(
                [*hashes], "approve", grace, channel="test", hashes=hashes, identity_tenant="acme"
            )
            return int((await running).log_id or 0)
        finally:
            await executor.sql.aclose()
            await database.close()

    return asyncio.run(write())


# --- tools that agents wrote ------------------------------------------------------------------------------------


def test_tools_are_listed_shown_and_retired(desk: Desk) -> None:
    desk.write_tool()
    desk.write_tool(code="net * 0.07")
    rows = [line.split("\t") for line in desk("tools", "list").stdout.splitlines()]
    assert [(row[0], row[1], row[2], row[4]) for row in rows] == [
        ("vat", "2", "draft", "query_data"), ("vat", "1", "draft", "query_data"),
    ]  # fmt: skip
    shown = desk("tools", "show", "vat", "--version", "1").stdout
    assert "net * 0.19" in shown
    assert "shop run 1" in shown
    assert (
        desk("tools", "retire", "vat", "--version", "1", "--as", "ada").stdout == "Retired: vat version 1.\n"
    )
    assert [tool["version"] for tool in desk.json("tools", "list", "--state", "draft")] == [2]
    assert desk.json("tools", "retire", "vat", "--as", "ada") == {"retired": 1}
    again = desk("tools", "retire", "vat", "--as", "ada")
    assert (again.exit_code, "not retired" in again.stderr) == (1, True)


def test_a_tool_that_was_approved_since_is_listed_so(desk: Desk) -> None:
    desk.write_tool()
    arguments = {"name": "vat", "version": 1, "code_hash": desk.json("tools", "list")[0]["code_hash"]}
    asked = Approval.from_row(
        desk.call(
            "request_approval",
            request=ApprovalRequest(
                tool="create_new_tool", kind="tool_version", arguments=arguments, risk=Risk.WRITE,
                approvers=("ada",), args_hash=binding_hash("create_new_tool", arguments, tenant_id=BOB.tenant_id),
            ).as_json(),
        )
    )  # fmt: skip
    assert desk("approvals", "approve", asked.approval_id, "--as", "ada", "--yes").exit_code == 0
    assert [tool["state"] for tool in desk.json("tools", "list")] == ["approved"]
    assert desk.state(asked) == "executed"


def test_tools_that_are_not_there_are_told(desk: Desk) -> None:
    assert desk("tools", "show", "nothing").exit_code == 1
    assert desk("tools", "list", "--state", "odd").exit_code == 2
    assert "No agent has written" in desk("tools", "list").stderr
    desk.write_tool()
    assert desk("tools", "retire", "vat", "--as", "mallory").exit_code == 1
    assert [tool["state"] for tool in desk.json("tools", "list")] == ["draft"]
