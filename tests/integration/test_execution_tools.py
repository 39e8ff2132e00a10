"""The executor's own tools on a real database and a real mail server."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest
from pydantic import SecretStr

from agent import Identity
from agent.approval.policy_file import parse_policy
from agent.errors import NotFound, Refused
from agent.events import Event, listening
from agent.execution import execution_tools
from agent.execution.execution_records import ExecutionResult
from agent.execution.safe_executor import SafeExecutor
from agent.portal import portal
from agent.testing import tool_call
from agent.testing.throwaway import ThrowawayDatabase
from tests.integration.agents import ASYNC_AND_SYNC, as_user, call, said
from tests.integration.safe_agents import (
    POLICY,
    MakeExecutor,
    agent_with,
    answers_of_tools,
    approvals,
    decide,
    executors_on,
    log_of,
    pauses,
    until,
)
from tests.integration.shop_sql import POLICY as TABLES
from tests.integration.shop_sql import TABLES as SHOP_TABLES
from tests.integration.shop_sql import Shop, shop
from tests.mail_server import Mailbox, mailbox

CAROL = Identity(tenant_id="acme", user_id="carol", session_id="s1")


@pytest.fixture
def make(learning_database: ThrowawayDatabase) -> Iterator[MakeExecutor]:
    with executors_on(learning_database) as made:
        yield made


@pytest.fixture
def store(learning_database: ThrowawayDatabase) -> Iterator[Shop]:
    with shop(learning_database, policy=POLICY + TABLES, tenants=("acme", "other")) as opened:
        yield opened


@pytest.fixture
def executor(store: Shop, make: MakeExecutor) -> SafeExecutor:
    return make(TABLES, tenant="acme")


def run(executor: SafeExecutor, tool: str, args: dict[str, Any], **options: Any) -> ExecutionResult:
    return asyncio.run(executor.execute(tool, args, identity=options.pop("identity", CAROL), **options))


def approved(executor: SafeExecutor, tool: str, args: dict[str, Any], *names: str) -> ExecutionResult:
    """Ask, let these people say yes, and run."""
    waiting = run(executor, tool, args, wait=False)
    assert waiting.waits_for is not None, waiting
    (asked,) = [one for one in approvals(executor) if one.approval_id == waiting.waits_for]
    for name in names or ("ada",):
        assert decide(executor, asked, "approve", name) == "recorded"
    return asyncio.run(
        executor.run_approved(asyncio.run(executor.queue.get(asked.approval_id, CAROL)), CAROL)
    )


def test_a_select_gives_rows_and_only_those_of_the_tenant(executor: SafeExecutor) -> None:
    result = run(
        executor, "execute_sql", {"sql": "SELECT id, tenant_id FROM shop.orders ORDER BY id LIMIT 3"}
    )
    assert (result.status, result.risk) == ("succeeded", "READ")
    assert result.rows == [{"id": number, "tenant_id": "acme"} for number in (2, 4, 6)]
    assert log_of(executor)[0]["row_count"] == 3


def test_a_write_shows_its_row_count_and_is_held_to_it(executor: SafeExecutor, store: Shop) -> None:
    sql = "UPDATE shop.orders SET status = 'paid' WHERE id = 2"
    waiting = run(executor, "execute_sql", {"sql": sql}, wait=False)
    assert waiting.effects == {"shop.orders": {"inserted": 0, "updated": 1, "deleted": 0}}
    (asked,) = approvals(executor)
    assert asked.rows == 1
    assert "UPDATE shop.orders" in asked.arguments_shown["sql"]
    assert store.rows("SELECT count(*) FROM shop.orders WHERE status = 'paid'") == [(0,)]

    decide(executor, asked, "approve")
    result = run(executor, "execute_sql", {"sql": sql}, approval_id=asked.approval_id)

    assert (result.status, result.effects["shop.orders"]["updated"]) == ("succeeded", 1)
    assert store.rows("SELECT id FROM shop.orders WHERE status = 'paid'") == [(2,)]
    (row,) = log_of(executor)
    assert (row["state"], row["decided_by"], row["rows"]["shop.orders"]["updated"]) == (
        "executed",
        ["ada"],
        1,
    )
    assert str(row["log_id"]) == result.log_id


def test_more_rows_than_were_approved_change_nothing(executor: SafeExecutor, store: Shop) -> None:
    sql = "UPDATE shop.orders SET status = 'paid' WHERE amount = 2"
    waiting = run(executor, "execute_sql", {"sql": sql}, wait=False)
    (asked,) = approvals(executor)
    store.do("INSERT INTO shop.orders (tenant_id, amount) VALUES ('acme', 2)")
    decide(executor, asked, "approve")

    result = run(executor, "execute_sql", {"sql": sql}, approval_id=waiting.waits_for)

    assert result.status == "failed"
    assert store.rows("SELECT count(*) FROM shop.orders WHERE status = 'paid'") == [(0,)]
    assert approvals(executor)[0].state == "failed"


@pytest.mark.parametrize(
    "sql",
    [
        "DROP TABLE shop.orders",
        "SELECT * FROM shop.secrets",
        "SELECT secret FROM shop.products",
        "SELECT shop.purge()",
        "SELECT 1; DELETE FROM shop.orders",
        "SELECT set_config('role', 'postgres', false)",
        "not sql at all",
    ],
)
def test_what_is_forbidden_never_runs_and_nobody_is_asked(
    sql: str, executor: SafeExecutor, store: Shop
) -> None:
    result = run(executor, "execute_sql", {"sql": sql})
    assert (result.status, result.risk, approvals(executor)) == ("refused", "FORBIDDEN", [])
    assert store.rows("SELECT count(*) FROM shop.orders") == [(20,)]
    assert log_of(executor)[0]["state"] == "refused"


def test_a_delete_of_everything_needs_two_people(executor: SafeExecutor, store: Shop) -> None:
    result = approved(executor, "execute_sql", {"sql": "DELETE FROM shop.orders"}, "ada", "bob")
    assert (result.status, result.risk, result.decided_by) == ("succeeded", "DESTRUCTIVE", ("ada", "bob"))
    assert store.rows("SELECT DISTINCT tenant_id FROM shop.orders") == [("other",)]


def test_sql_that_the_database_does_not_take_is_told_to_the_model(executor: SafeExecutor) -> None:
    result = run(executor, "execute_sql", {"sql": "SELECT nothing FROM shop.orders"})
    assert result.status == "failed"
    assert "nothing" in (result.error or "")
    write = run(executor, "execute_sql", {"sql": "UPDATE shop.orders SET status = NULL WHERE id = 2"})
    assert (write.status, approvals(executor)) == ("refused", [])


def test_a_query_is_made_of_columns_filters_order_and_limit(executor: SafeExecutor) -> None:
    query = {
        "table": "shop.orders",
        "columns": ["id", "amount"],
        "filters": [
            {"column": "amount", "op": ">=", "value": 4},
            {"column": "id", "op": "in", "value": [4, 6, 8]},
            {"column": "card", "op": "is_null"},
        ],
        "order": [{"column": "amount", "descending": True}],
        "limit": 2,
    }
    result = run(executor, "query_data", query)
    assert result.rows == [{"id": 8, "amount": 8}, {"id": 6, "amount": 6}]
    everything = run(executor, "query_data", {"table": "shop.products", "limit": 1})
    assert everything.rows is not None
    assert set(everything.rows[0]) == {"id", "name", "price"}


def test_a_query_without_columns_reads_those_that_the_tenants_own_entry_lists(make: MakeExecutor) -> None:
    tables = """
[[table]]
name = "shop.products"
columns = ["id", "price"]
tenants = ["other"]
[[table]]
name = "shop.products"
columns = ["id", "name"]
tenants = ["acme"]
"""
    query = {"table": "shop.products", "limit": 1}
    found = portal().run_sync(make(tables, tenant="acme").assess("query_data", query, CAROL))
    assert (str(found.risk), found.decision) == ("READ", "allow")
    assert "name" in found.arguments_shown["sql"]
    assert "price" not in found.arguments_shown["sql"]


@pytest.mark.parametrize(
    "query",
    [
        {"table": "shop.secrets"},
        {"table": "orders"},
        {"table": 'shop.orders" WHERE true; --'},
        {"table": "shop.products", "columns": ["secret"]},
        {"table": "shop.products", "columns": ['id", (SELECT 1) AS "x']},
        {"table": "shop.orders", "filters": [{"column": "id", "op": "or", "value": 1}]},
        {"table": "shop.orders", "filters": [{"column": "id", "op": "=", "value": {"a": 1}}]},
        {"table": "shop.orders", "limit": 100_000},
        {"table": "shop.orders", "where": "true"},
    ],
)
def test_a_query_outside_of_what_is_listed_is_refused(query: dict[str, Any], executor: SafeExecutor) -> None:
    assert run(executor, "query_data", query).status in ("refused", "failed")


@pytest.mark.parametrize(
    "value", ["' OR true --", "\\' OR true --", "x'; DELETE FROM shop.orders; --", "é\\", "$$"]
)
def test_a_value_is_never_sql(value: str, executor: SafeExecutor, store: Shop) -> None:
    result = run(
        executor, "query_data", {"table": "shop.orders", "filters": [{"column": "status", "value": value}]}
    )
    assert (result.status, result.rows) == ("succeeded", [])
    change = {"table": "shop.orders", "key": {"id": 2}, "values": {"status": value}}
    assert approved(executor, "update_client_status", change).ok
    assert store.rows("SELECT status FROM shop.orders WHERE id = 2") == [(value,)]
    assert store.rows("SELECT count(*) FROM shop.orders") == [(20,)]


def test_an_update_touches_at_most_the_rows_it_says(executor: SafeExecutor, store: Shop) -> None:
    change: dict[str, Any] = {"table": "shop.orders", "key": {"status": "new"}, "values": {"amount": 1}}
    refused = run(executor, "update_client_status", change)
    assert (refused.status, approvals(executor)) == ("refused", [])
    assert "10 rows would change" in (refused.error or "")
    result = approved(executor, "update_client_status", change | {"max_rows": 10}, "ada")
    assert result.effects["shop.orders"]["updated"] == 10
    forbidden = run(executor, "update_client_status", change | {"values": {"card": "x"}})
    assert forbidden.status == "refused"


def test_a_write_is_undone_on_the_word_of_a_reviewer_and_only_once(
    executor: SafeExecutor, store: Shop
) -> None:
    written = approved(executor, "execute_sql", {"sql": "UPDATE shop.orders SET status = 'x' WHERE id = 2"})
    log_id = int(written.log_id or 0)
    with pytest.raises(Refused, match="carol is no reviewer"):
        asyncio.run(executor.undo(log_id, identity=CAROL))

    undone = asyncio.run(executor.undo(log_id, identity=Identity(tenant_id="acme", user_id="ada")))

    assert undone.effects["shop.orders"]["updated"] == 1
    assert store.rows("SELECT status FROM shop.orders WHERE id = 2") == [("new",)]
    newest = log_of(executor)[-1]
    assert (newest["tool"], newest["decision"], newest["undoes"], newest["decided_by"]) == (
        "undo", "undone", log_id, ["ada"],
    )  # fmt: skip
    with pytest.raises(Refused, match="undone already"):
        asyncio.run(executor.undo(log_id, identity=Identity(tenant_id="acme", user_id="ada")))
    with pytest.raises(NotFound):
        asyncio.run(executor.undo(999, identity=Identity(tenant_id="acme", user_id="ada")))


def test_rows_that_changed_since_are_not_overwritten(executor: SafeExecutor, store: Shop) -> None:
    written = approved(executor, "execute_sql", {"sql": "UPDATE shop.orders SET status = 'x' WHERE id = 2"})
    store.do("UPDATE shop.orders SET status = 'y' WHERE id = 2")
    with pytest.raises(Refused):
        asyncio.run(
            executor.undo(int(written.log_id or 0), identity=Identity(tenant_id="acme", user_id="ada"))
        )
    assert store.rows("SELECT status FROM shop.orders WHERE id = 2") == [("y",)]


@pytest.mark.parametrize("colour", ASYNC_AND_SYNC)
def test_an_agent_reads_writes_with_a_yes_and_is_refused_a_drop(
    colour: str, executor: SafeExecutor, store: Shop
) -> None:
    script = [
        tool_call("execute_sql", sql="SELECT count(*) AS n FROM shop.orders"),
        tool_call("execute_sql", sql="DROP TABLE shop.orders"),
        tool_call("execute_sql", sql="UPDATE shop.orders SET status = 'paid' WHERE id = 4"),
        "done",
    ]
    agent = agent_with(executor, script, execution_tools.tools(executor))
    config = as_user("carol", "t1")
    config["configurable"]["tenant_id"] = "acme"
    (pause,) = pauses(call(colour, agent, said("Go"), config))
    assert "1 updated" in pause.value["message"]
    from langgraph.types import Command

    result = call(colour, agent, Command(resume={pause.id: True}), config)

    told = [message.text for message in answers_of_tools(result)]
    assert '"n": 10' in told[0]
    assert "never run" in told[1]
    assert '"updated": 1' in told[2]
    assert store.rows("SELECT status FROM shop.orders WHERE id = 4") == [("paid",)]


def test_the_tools_are_there_by_name_and_say_what_they_take(executor: SafeExecutor) -> None:
    made = {tool.name: tool for tool in execution_tools.tools(executor)}
    assert set(made) == {"execute_sql", "query_data", "update_client_status", "send_email", "create_new_tool"}
    assert "def run" in made["create_new_tool"].description
    from langchain_core.utils.function_calling import convert_to_openai_tool

    for tool in made.values():
        json.dumps(convert_to_openai_tool(tool))
    assert execution_tools.execute_sql.name == "execute_sql"


def test_a_tool_outside_of_a_guarded_graph_waits_for_the_approval(
    executor: SafeExecutor, store: Shop
) -> None:
    made = {tool.name: tool for tool in execution_tools.tools(executor)}
    future = portal().submit(made["execute_sql"].ainvoke({"sql": "DELETE FROM shop.orders WHERE id = 2"}))
    (asked,) = until(lambda: approvals(executor))
    decide(executor, asked, "approve")
    assert '"deleted": 1' in future.result(30)


# Mail


def mailer(
    make: MakeExecutor, server: Mailbox, more: str = 'allowed = ["*@example.com"]\ndry_run = false\n'
) -> SafeExecutor:
    return make(
        "[[mail]]\n" + more,
        tenant="acme",
        smtp_url=SecretStr(f"smtp://127.0.0.1:{server.server_address[1]}"),
        mail_from="agent@example.com",
    )


MAIL = {"to": ["ada@example.com", "bob@example.com"], "subject": "Grüße", "body": "Hello\n.\nWörld"}


def test_a_mail_is_sent_once_after_a_yes(make: MakeExecutor) -> None:
    with mailbox() as server:
        executor = mailer(make, server)
        result = approved(executor, "send_email", MAIL)
        assert (result.status, result.value["sent"]) == ("succeeded", True)
        (mail,) = server.mails
    assert [re.findall("<(.*)>", line)[0] for line in mail["to"]] == MAIL["to"]
    assert "Subject: =?utf-8?" in mail["text"]


def test_a_mail_is_only_rehearsed_by_default(make: MakeExecutor) -> None:
    with mailbox() as server:
        executor = mailer(make, server, 'allowed = ["*@example.com"]\n')
        result = approved(executor, "send_email", MAIL)
        assert (result.status, result.value["sent"], result.value["dry_run"]) == ("succeeded", False, True)
        assert server.mails == []


@pytest.mark.parametrize(
    "change",
    [
        {"to": ["mallory@evil.com"]},
        {"to": ["ada@example.com", "mallory@evil.com"]},
        {"to": ["ada@example.com\nBcc: mallory@evil.com"]},
        {"to": ["Ada <ada@example.com>"]},
        {"subject": "hi\r\nBcc: mallory@evil.com"},
        {"to": []},
        {"to": "ada@example.com"},
        {"cc": ["mallory@evil.com"]},
    ],
)
def test_mail_elsewhere_or_with_hidden_headers_is_refused(change: dict[str, Any], make: MakeExecutor) -> None:
    with mailbox() as server:
        executor = mailer(make, server)
        result = run(executor, "send_email", MAIL | change, wait=False)
        assert result.status in ("refused", "denied")
        assert (approvals(executor), server.mails) == ([], [])


def test_a_recipient_that_the_server_refuses_means_that_nobody_gets_it(make: MakeExecutor) -> None:
    with mailbox(refuses="bob@") as server:
        executor = mailer(make, server)
        result = approved(executor, "send_email", MAIL)
        assert (result.status, server.mails) == ("failed", [])


def test_a_server_that_goes_away_after_the_text_leaves_it_unknown(make: MakeExecutor) -> None:
    with mailbox(dies=True) as server:
        executor = mailer(make, server)
        result = approved(executor, "send_email", MAIL)
        assert result.status == "unknown"
        assert approvals(executor)[0].state == "unknown"


def test_without_a_mail_server_nobody_is_asked(make: MakeExecutor) -> None:
    executor = make('[[mail]]\nallowed = ["*@example.com"]\ndry_run = false\n', tenant="acme")
    result = run(executor, "send_email", MAIL)
    assert (result.status, approvals(executor)) == ("failed", [])
    assert "LEARNING_SMTP_URL" in (result.error or "")


# --- what a trial would do ---------------------------------------------------------------------------------------

CHARGED = """
CREATE TABLE shop.charged (what text);
CREATE FUNCTION shop.charge() RETURNS integer LANGUAGE plpgsql SECURITY DEFINER AS
    $$ BEGIN PERFORM setval('shop.charges', 2); RETURN 1; END $$;
CREATE SEQUENCE shop.charges;
CREATE FUNCTION shop.noted() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS
    $$ BEGIN PERFORM shop.charge(); RETURN OLD; END $$;
"""
CHARGES = "SELECT last_value FROM shop.charges"
"""A sequence does not go back with a transaction, just like what is reached outside of the database."""
TRIGGER = "CREATE TRIGGER charges AFTER DELETE ON shop.orders FOR EACH ROW EXECUTE FUNCTION shop.noted()"


@contextmanager
def charging(
    database: ThrowawayDatabase, make: MakeExecutor, more: str = "", trigger: str = ""
) -> Iterator[tuple[SafeExecutor, Shop]]:
    tables = TABLES.replace(
        '{"shop.discount" = "READ"}', '{"shop.discount" = "READ", "shop.charge" = "WRITE"}\n' + more
    )
    with psycopg.connect(database.url, autocommit=True) as connection:
        connection.execute(SHOP_TABLES.encode())
        connection.execute(CHARGED.encode())
        if trigger:
            connection.execute(trigger.encode())
    opened = Shop(database, parse_policy((POLICY + tables).encode()))
    opened.make_logins("acme")
    yield make(tables, tenant="acme"), opened
    portal().run_sync(opened.runner.aclose())


@pytest.mark.parametrize(
    ("sql", "trigger", "name"),
    [
        ("SELECT shop.charge()", "", "function shop.charge"),
        ("DELETE FROM shop.orders WHERE id = 2", TRIGGER, "trigger shop.orders.charges"),
        (
            "UPDATE shop.products SET price = 1 WHERE id = 1",
            (
                "CREATE TABLE shop.lines (p integer REFERENCES shop.products ON UPDATE CASCADE); "
                "CREATE TRIGGER charges AFTER UPDATE ON shop.lines EXECUTE FUNCTION shop.noted()"
            ),
            "trigger shop.lines.charges",
        ),
    ],
)
def test_what_reaches_outside_is_not_tried_before_two_people_agree(
    learning_database: ThrowawayDatabase, make: MakeExecutor, sql: str, trigger: str, name: str
) -> None:
    with charging(learning_database, make, trigger=trigger) as (executor, store):
        waiting = run(executor, "execute_sql", {"sql": sql}, wait=False)

        assert (waiting.risk, waiting.effects["not_tried"]) == ("DESTRUCTIVE", [name])
        assert store.rows(CHARGES) == [(1,)], "it was run before anybody said yes"
        (asked,) = approvals(executor)
        assert asked.rows is None
        for person in ("ada", "bob"):
            decide(executor, asked, "approve", person)
        result = run(executor, "execute_sql", {"sql": sql}, approval_id=asked.approval_id)
        assert result.status == "succeeded", result.error
        assert store.rows(CHARGES) == [(1 if "lines" in name else 2,)]


def test_a_trusted_trigger_runs_in_the_trial_and_the_card_says_so(
    learning_database: ThrowawayDatabase, make: MakeExecutor
) -> None:
    trusted = 'trusted_triggers = ["shop.orders.charges"]'
    with charging(learning_database, make, trusted, TRIGGER) as (executor, _):
        waiting = run(executor, "execute_sql", {"sql": "DELETE FROM shop.orders WHERE id = 2"}, wait=False)

        assert waiting.effects["rows"]["shop.orders"]["deleted"] == 1
        assert "TRUNCATE in them is not counted" in waiting.effects["triggers"]


def test_a_trigger_made_after_the_approval_is_not_run(
    learning_database: ThrowawayDatabase, make: MakeExecutor
) -> None:
    with charging(learning_database, make) as (executor, store):
        sql = "DELETE FROM shop.orders WHERE id = 2"
        run(executor, "execute_sql", {"sql": sql}, wait=False)
        (asked,) = approvals(executor)
        decide(executor, asked, "approve")
        store.do(TRIGGER)

        result = run(executor, "execute_sql", {"sql": sql}, approval_id=asked.approval_id)

        assert (result.status, store.rows(CHARGES)) == ("failed", [(1,)])


def test_the_model_is_told_no_address_no_login_and_no_path(
    learning_database: ThrowawayDatabase, make: MakeExecutor
) -> None:
    told: list[Event] = []
    with listening(told.append):
        result = run(make(TABLES, tenant="acme"), "execute_sql", {"sql": "SELECT id FROM shop.orders"})

    assert "agent migrate --roles" in (result.error or "")
    assert not re.search(r"/|@|json|port=", (result.error or "").replace("agent sql check", ""))
    assert "sql_not_ready" in [event.name for event in told]


def test_a_wrong_table_is_called_a_table(executor: SafeExecutor) -> None:
    result = run(executor, "query_data", {"table": "public.orders; drop table x"})
    assert "is no name of a table" in (result.error or "")


INSERT = {"sql": "INSERT INTO shop.orders (tenant_id, status) VALUES ('acme', 'new')"}


def orders_begun(store: Shop) -> Any:
    """What the sequence of the orders says, which a trial moves on though it is taken back."""
    return store.rows("SELECT last_value FROM shop.orders_id_seq")


def test_a_write_that_is_denied_halted_or_over_its_limit_does_not_touch_the_tables(
    store: Shop, make: MakeExecutor
) -> None:
    before = orders_begun(store)
    for rules in (
        '[[rule]]\ntool = "execute_sql"\nrisk = "WRITE"\ndecision = "deny"\n',
        '[[rule]]\ntool = "execute_sql"\nrisk = "WRITE"\ndecision = "ask"\nper_hour = 0\n',
        '[[grant]]\nrights = ["sql.read"]\n',
    ):
        executor = make(TABLES + rules, tenant="acme")
        assert run(executor, "execute_sql", INSERT, wait=False).status == "denied", rules
    executor = make(TABLES, tenant="acme")
    halt = {"tool": "execute_sql", "reason": "mad", "halted_by": "ada"}
    made = asyncio.run(executor.database.call("halt_executions", CAROL, halt=halt))
    assert run(executor, "execute_sql", INSERT, wait=False).status == "denied"
    assert orders_begun(store) == before

    asyncio.run(executor.database.call("resume_executions", CAROL, halt_id=made["halt_id"], resumed_by="ada"))
    assert run(executor, "execute_sql", INSERT, wait=False).waits_for is not None
    assert orders_begun(store) != before


def test_reading_and_writing_by_sql_are_rights_of_their_own(store: Shop, make: MakeExecutor) -> None:
    executor = make(TABLES + '[[grant]]\nrights = ["sql.read"]\n', tenant="acme")
    assert run(executor, "execute_sql", {"sql": "SELECT id FROM shop.orders"}).status == "succeeded"
    assert run(executor, "query_data", {"table": "shop.orders", "columns": ["id"]}).status == "succeeded"
    refused: dict[str, dict[str, Any]] = {
        "execute_sql": {"sql": "UPDATE shop.orders SET status = 'x' WHERE id = 2"},
        "update_client_status": {"table": "shop.orders", "key": {"id": 2}, "values": {"status": "x"}},
        "send_email": {"to": ["a@example.com"], "subject": "s", "body": "b"},
        "create_new_tool": {"name": "n", "description": "d", "code": "", "parameters": {}, "examples": []},
    }
    found = {tool: run(executor, tool, args, wait=False) for tool, args in refused.items()}
    assert {tool: str(one.error).partition(",")[0] for tool, one in found.items()} == {
        "execute_sql": "execute_sql needs the right sql.write",
        "update_client_status": "update_client_status needs the right sql.write",
        "send_email": "send_email needs the right mail.send",
        "create_new_tool": "create_new_tool needs the right tools.create",
    }


def test_the_same_write_again_gives_what_it_gave_and_changes_nothing(store: Shop, make: MakeExecutor) -> None:
    rule = '[[rule]]\ntool = "execute_sql"\nrisk = "WRITE"\ndecision = "allow"\n'
    executor = make(TABLES + rule, tenant="acme")
    write = {"sql": "UPDATE shop.orders SET amount = amount + 1 WHERE id = 2 RETURNING id, amount"}
    first = run(executor, "execute_sql", write, request_key="k")
    again = run(executor, "execute_sql", write, request_key="k")
    assert (first.status, first.repeated) == ("succeeded", False)
    assert (again.status, again.repeated, again.log_id) == ("succeeded", True, first.log_id)
    assert again.value == first.value
    assert again.value["rows"] == [{"id": 2, "amount": 3}]
    assert store.rows("SELECT amount FROM shop.orders WHERE id = 2") == [(3,)]


def test_a_mail_is_sent_once_though_the_call_comes_back(make: MakeExecutor) -> None:
    allow = (
        'allowed = ["*@example.com"]\ndry_run = false\n'
        '[[rule]]\ntool = "send_email"\nrisk = "WRITE"\ndecision = "allow"\n'
    )
    with mailbox() as server:
        executor = mailer(make, server, allow)
        found = [run(executor, "send_email", MAIL, request_key="k") for _ in range(2)]
        assert [(one.status, one.repeated) for one in found] == [("succeeded", False), ("succeeded", True)]
        assert found[0].value == found[1].value
        assert len(server.mails) == 1
    with mailbox(dies=True) as server:
        executor = mailer(make, server, allow)
        found = [run(executor, "send_email", MAIL, request_key="other") for _ in range(2)]
        assert [one.status for one in found] == ["unknown", "refused"]
        assert len(server.mails) == 1
