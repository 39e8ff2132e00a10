"""The policy file is checked whole when it is read."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent.approval.policy_file import load_policy, parse_policy
from agent.approval.risk import Risk
from agent.errors import ConfigurationError

WHOLE = b"""
[[reviewer]]
name = "ada"
user_ids = ["a1"]
slack = "U1"
telegram = 42
jwt_subject = "sub"
token_sha256 = "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"
interrupt = true
cli = true
tenants = ["t1"]
risks = ["WRITE"]

[approval]
write_votes = 2
destructive_ttl_seconds = 60
slack_channel = "C1"
telegram_chat = -100

[[rule]]
tool = "execute_sql"
risk = "low"
decision = "allow"
per_hour = 20

[[rule]]
decision = "deny"

[[mail]]
allowed = ["*@example.com"]
dry_run = false

[[table]]
name = "public.orders"
columns = ["id", "status"]
tenant_column = "tenant_id"
update = ["status"]

[[table]]
name = "public.items"
insert = true
delete = true
tenants = ["t1"]

[sql]
functions = { "public.total" = "READ" }
types = ["public.order_status"]
operators = ["extensions.<=>"]
max_rows = 10
timeout_seconds = 2
undo_rows = 5
"""


def test_a_whole_file_is_read() -> None:
    policy = parse_policy(WHOLE)

    assert policy.reviewers.allowed("t1", Risk.WRITE) == ["ada"]
    assert policy.reviewers.allowed("t2", Risk.WRITE) == []
    assert (policy.approval.votes(Risk.WRITE), policy.approval.votes(Risk.DESTRUCTIVE)) == (2, 2)
    assert (policy.approval.ttl_seconds(Risk.WRITE), policy.approval.ttl_seconds(Risk.DESTRUCTIVE)) == (
        3600,
        60,
    )
    assert (policy.approval.slack_channel, policy.approval.telegram_chat) == ("C1", -100)
    first, second = policy.rules
    assert (first.tool, first.agent, first.risk, first.decision, first.per_hour) == (
        "execute_sql",
        "*",
        Risk.WRITE,
        "allow",
        20,
    )
    assert (second.tool, second.risk) == ("*", None)
    assert (policy.mail[0].allowed, policy.mail[0].dry_run) == (("*@example.com",), False)
    orders, items = policy.tables
    assert (orders.columns, orders.update, orders.insert, orders.delete) == (
        ("id", "status"),
        ("status",),
        False,
        False,
    )
    assert (items.columns, items.tenants) == (None, ("t1",))
    assert policy.sql.functions == {"public.total": Risk.READ}
    assert (policy.sql.types, policy.sql.operators) == (("public.order_status",), ("extensions.<=>",))
    assert (policy.sql.max_rows, policy.sql.timeout_seconds, policy.sql.undo_rows) == (10, 2, 5)


def test_an_empty_policy_lets_nobody_do_anything() -> None:
    policy = parse_policy(b"")

    assert list(policy.reviewers) == []
    assert (policy.rules, policy.tables, policy.mail) == ((), (), ())
    assert (policy.approval.write_votes, policy.approval.destructive_votes) == (1, 2)


def test_the_version_changes_with_every_byte() -> None:
    assert parse_policy(WHOLE).version != parse_policy(WHOLE + b"\n").version
    assert parse_policy(WHOLE).version == parse_policy(WHOLE).version


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[[reviewer]]\nnam = "ada"', "did you mean 'name'"),
        ("[approvals]\nwrite_votes = 1", "did you mean 'approval'"),
        ("[approval]\nwrite_vote = 1", "did you mean 'write_votes'"),
        ('[[rule]]\ndecision = "maybe"', "'maybe'"),
        ('[[rule]]\ntool = "x"', "decision"),
        ('[[rule]]\nrisk = "DESTRUCTIVE"\ndecision = "allow"', "without asking"),
        ('[[rule]]\nrisk = "FORBIDDEN"\ndecision = "ask"', "never runs"),
        ('[[rule]]\nrisk = "MILD"\ndecision = "ask"', "MILD"),
        ('[[rule]]\ndecision = "ask"\nper_hour = -1', "per_hour=-1"),
        ('[[rule]]\ndecision = "ask"\nper = "agent"', "without per_hour"),
        ('[[grant]]\nagent = "a"', "rights"),
        ('[[grant]]\nrights = [""]', "rights"),
        ("[approval]\nwrite_votes = 0", "write_votes=0"),
        ("[approval]\nwrite_votes = true", "write_votes"),
        ('[approval]\nwrite_votes = "2"', "write_votes"),
        ("[approval]\nwrite_ttl_seconds = 0", "write_ttl_seconds"),
        ('[[reviewer]]\nname = ""', "name"),
        ('[[reviewer]]\nname = "rule:1"', "rule"),
        ('[[reviewer]]\nname = "a"\ntelegram = "42"', "telegram"),
        ('[[reviewer]]\nname = "a"\nrisks = ["FORBIDDEN"]', "FORBIDDEN"),
        ('[[reviewer]]\nname = "a"\n[[reviewer]]\nname = "a"', "vote twice"),
        ('[[table]]\nname = "orders"', "schema.table"),
        ('[[table]]\nname = "public.orders"\ncolumns = []', "no column"),
        ('[[table]]\nname = "public.orders"\nupdate = true', "update"),
        ('[[table]]\nname = "p.o"\n[[table]]\nname = "p.o"', "twice"),
        ('[[table]]\nname = "p.o"\ntenants = ["t"]\n[[table]]\nname = "p.o"', "twice"),
        ('[sql]\nfunctions = { "total" = "READ" }', "schema.name"),
        ('[sql]\ntypes = ["vector"]', "schema.name"),
        ('[sql]\noperators = ["<=>"]', "schema.operator"),
        ('[sql]\noperators = ["extensions.similarity"]', "schema.operator"),
        ("[sql]\nmax_rows = 0", "max_rows"),
        ("[sql", "no TOML"),
    ],
)
def test_what_cannot_be_is_refused_with_its_place(text: str, said: str) -> None:
    with pytest.raises(ConfigurationError, match=said) as error:
        parse_policy(text.encode(), "my-policy.toml")
    assert str(error.value).startswith("my-policy.toml")


def test_a_token_where_its_hash_belongs_is_not_shown() -> None:
    with pytest.raises(ConfigurationError) as error:
        parse_policy(b'[[reviewer]]\nname = "a"\ntoken_sha256 = "my secret token"')
    assert "my secret token" not in str(error.value)
    assert "token_sha256" in str(error.value)


def test_without_a_file_nobody_may_and_a_file_that_is_named_must_be_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert list(load_policy().reviewers) == []
    with pytest.raises(ConfigurationError, match="does not exist"):
        load_policy(tmp_path / "agent-policy.toml")
    (tmp_path / "agent-policy.toml").write_bytes(WHOLE)
    assert [each.name for each in load_policy().reviewers] == ["ada"]
    assert [each.name for each in load_policy(tmp_path / "agent-policy.toml").reviewers] == ["ada"]


def test_a_file_that_cannot_be_read_is_an_error_and_no_empty_policy(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="cannot be read"):
        load_policy(tmp_path)
    (tmp_path / "latin").write_bytes(b'[[reviewer]]\nname = "\xe4"')
    with pytest.raises(ConfigurationError, match="no TOML"):
        load_policy(tmp_path / "latin")
