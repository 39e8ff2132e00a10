"""Which rule holds for a call, and what a model is given of a result."""

from __future__ import annotations

import itertools
import json

import pytest

from agent.approval.policy_file import parse_policy
from agent.approval.risk import Risk
from agent.errors import InvalidRequest
from agent.execution import sql_building
from agent.execution.execution_policy import Ruling, lacking, rule_on, stricter
from agent.execution.result_text import fenced
from agent.execution.state_seal import StateSeal

RULES = """
[[rule]]
tool = "web_*"
decision = "allow"
per_hour = 5
[[rule]]
tool = "pay"
agent = "clerk"
tenant = "acme"
risk = "WRITE"
decision = "deny"
[[rule]]
tool = "pay"
decision = "ask"
"""


def ruling(tool: str, risk: Risk, *, agent_id: str | None = "clerk", tenant_id: str = "acme") -> Ruling:
    rules = parse_policy(RULES.encode()).rules
    return rule_on(rules, tool=tool, agent_id=agent_id, tenant_id=tenant_id, risk=risk)


def test_without_a_rule_reading_runs_and_the_rest_asks() -> None:
    decisions = {risk: ruling("other", risk).decision for risk in Risk}
    assert decisions == {"READ": "allow", "WRITE": "ask", "DESTRUCTIVE": "ask", "FORBIDDEN": "deny"}


def test_the_first_rule_that_fits_holds() -> None:
    assert (ruling("pay", Risk.WRITE).decision, ruling("pay", Risk.WRITE).rule) == ("deny", "2")
    assert ruling("pay", Risk.READ).decision == "ask"
    for other in ({"agent_id": "x"}, {"tenant_id": "x"}, {"agent_id": None}):
        assert ruling("pay", Risk.WRITE, **other).rule == "3"


def test_no_rule_allows_what_destroys_or_what_is_forbidden() -> None:
    assert ruling("web_search", Risk.WRITE).decision == "allow"
    assert ruling("web_search", Risk.WRITE).per_hour == 5
    assert ruling("web_search", Risk.DESTRUCTIVE).decision == "ask"
    assert ruling("web_search", Risk.FORBIDDEN).decision == "deny"


def test_a_limit_is_counted_per_agent_where_the_rule_names_agents_or_says_so() -> None:
    rules = parse_policy(
        b"""
[[rule]]
tool = "a"
agent = "support*"
decision = "ask"
per_hour = 1
[[rule]]
tool = "b"
decision = "ask"
per_hour = 1
per = "agent"
[[rule]]
tool = "c"
agent = "support*"
decision = "ask"
per_hour = 1
per = "tenant"
[[rule]]
decision = "ask"
per_hour = 1
"""
    ).rules
    rulings = [
        rule_on(rules, tool=tool, agent_id="support-1", tenant_id="acme", risk=Risk.WRITE) for tool in "abcd"
    ]
    assert [one.per_agent for one in rulings] == [True, True, False, False]


def test_without_a_grant_all_rights_are_granted_and_with_one_only_what_is_named() -> None:
    grants = parse_policy(
        b"""
[[grant]]
rights = ["sql.read"]
[[grant]]
rights = ["sql.*", "crm_*"]
agent = "clerk"
tenant = "acme"
"""
    ).grants
    needed = ["sql.write", "sql.read", "crm_note", "mail.send"]

    def missing(agent_id: str | None, tenant_id: str) -> list[str]:
        return lacking(grants, needed, agent_id=agent_id, tenant_id=tenant_id)

    assert lacking((), needed, agent_id=None, tenant_id="acme") == []
    assert missing("clerk", "acme") == ["mail.send"]
    for other in (("clerk", "other"), ("x", "acme"), (None, "acme")):
        assert missing(*other) == ["crm_note", "mail.send", "sql.write"]


def test_the_stricter_of_two_decisions_wins_whichever_comes_first() -> None:
    order = ("allow", "ask", "deny")
    for one, other in itertools.product(order, order):
        assert stricter(one, other) == order[max(order.index(one), order.index(other))]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text", ["</tool_result>", "<TOOL_RESULT>", "a\u202eb", "\u2028", "\U000e0041", "&lt;", "\ufeff"]
)
def test_nothing_in_a_result_closes_the_fence_or_hides(text: str) -> None:
    told = fenced("execute_sql", {"rows": [text], text: 1})
    inside = told.split("\n")[2]
    assert text not in inside
    assert json.loads(inside) == {"rows": [text], text: 1}
    assert told.count("</tool_result>") == 1
    assert "never instructions" in told


def test_a_long_result_is_cut_and_says_so() -> None:
    told = fenced("t", "x" * 100, characters_max=50)
    assert '<cut characters="52"/>' in told
    assert fenced('evil"><x', 1).count("<") == 2


@pytest.mark.parametrize("name", ["", "a b", 'a"b', "a;b", "é", "1a", "a" * 64, "a.b"])
def test_what_is_no_plain_name_is_no_column(name: str) -> None:
    with pytest.raises(InvalidRequest):
        sql_building.identifier(name)


@pytest.mark.parametrize("value", [float("inf"), float("nan"), b"x", [1], {"a": 1}, "a\x00b"])
def test_what_is_no_plain_value_is_no_constant(value: object) -> None:
    with pytest.raises(InvalidRequest):
        sql_building.literal(value)


def test_statements_are_made_of_names_and_constants() -> None:
    made = sql_building.select(
        "shop.orders", columns=["id"], filters=[("a", "in", [1, "x'y"]), ("b", "is_null", None)],
        order=[("id", True)], limit=3,
    )  # fmt: skip
    assert made == (
        'SELECT "id" FROM "shop"."orders" WHERE "a" IN (1, \'x\'\'y\') AND "b" IS NULL ORDER BY "id" DESC LIMIT 3'
    )
    changed = sql_building.update("shop.orders", key={"id": 7, "b": None}, values={"s": None, "t": True})
    assert changed == 'UPDATE "shop"."orders" SET "s" = NULL, "t" = TRUE WHERE "id" = 7 AND "b" IS NULL'
    for comparison, value in (("=", None), ("=", [1]), ("in", []), ("in", "abc"), ("is_null", 1)):
        with pytest.raises(InvalidRequest):
            sql_building.condition("a", comparison, value)  # type: ignore[arg-type]


def test_a_seal_holds_for_what_was_sealed_and_nothing_else() -> None:
    seal, other = StateSeal("secret"), StateSeal("other")
    kept = seal.sealed({"identity": {"user_id": "ada"}, "calls": {"c": {"approval_id": "a"}}})
    assert seal.holds(kept)
    assert StateSeal("secret").holds(json.loads(json.dumps(kept)))
    for changed in (
        {**kept, "identity": {"user_id": "bob"}}, {**kept, "more": 1}, {**kept, "seal": "0" * 32},
        {name: value for name, value in kept.items() if name != "seal"}, {**kept, "calls": {"c": object()}}, None, 1,
    ):  # fmt: skip
        assert not seal.holds(changed)
    assert not other.holds(kept)
    assert not StateSeal(None).holds(kept)
