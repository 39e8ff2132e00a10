"""A shop's tables and a policy for them, for tests of agents' SQL."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg

from agent.approval.policy_file import PolicyFile, parse_policy
from agent.database.protocol import to_json
from agent.execution.sql_logins import create_logins, logins_file
from agent.execution.sql_policy import SqlScope, SqlVerdict, classify
from agent.execution.sql_runner import SqlRunner
from agent.identity import Identity
from agent.portal import portal
from agent.testing.throwaway import ThrowawayDatabase

TABLES = """
CREATE SCHEMA shop;
CREATE TABLE shop.orders (
    id serial PRIMARY KEY, tenant_id text NOT NULL, status text NOT NULL DEFAULT 'new',
    amount numeric NOT NULL DEFAULT 0, card text, total numeric GENERATED ALWAYS AS (amount * 2) STORED);
ALTER TABLE shop.orders ENABLE ROW LEVEL SECURITY;
CREATE POLICY everybody ON shop.orders USING (true);
INSERT INTO shop.orders (tenant_id, status, amount)
SELECT CASE WHEN i % 2 = 0 THEN 'acme' ELSE 'other' END, 'new', i FROM generate_series(1, 20) i;
CREATE TABLE shop.products (id integer PRIMARY KEY, name text NOT NULL, price numeric(10, 2), secret text);
INSERT INTO shop.products VALUES (1, 'hive', 99.50, 's1'), (2, 'veil', 20, 's2'), (3, 'smoker', 35, 's3');
CREATE TABLE shop.secrets (word text);
INSERT INTO shop.secrets VALUES ('swordfish');
CREATE FUNCTION shop.purge() RETURNS integer LANGUAGE plpgsql SECURITY DEFINER AS
    $$ BEGIN DELETE FROM shop.orders; RETURN 1; END $$;
CREATE FUNCTION shop.discount(price numeric) RETURNS numeric LANGUAGE sql VOLATILE AS $$ SELECT price * 0.9 $$;
"""

POLICY = """
[[table]]
name = "shop.orders"
tenant_column = "tenant_id"
insert = true
update = ["status", "amount"]
delete = true
[[table]]
name = "shop.products"
columns = ["id", "name", "price"]
update = ["price"]
[sql]
functions = {"shop.discount" = "READ"}
max_rows = 5
timeout_seconds = 2
undo_rows = 8
"""


@contextmanager
def shop(
    database: ThrowawayDatabase, *, policy: str = POLICY, tenants: tuple[str, ...] = ("acme",)
) -> Iterator[Shop]:
    """The tables in this database, and logins for these tenants."""
    with psycopg.connect(database.url, autocommit=True) as connection:
        connection.execute(TABLES.encode())
    opened = Shop(database, parse_policy(policy.encode()))
    for tenant in tenants:
        opened.make_logins(tenant)
    try:
        yield opened
    finally:
        portal().run_sync(opened.runner.aclose())


class Shop:
    """The shop and the ways into it."""

    def __init__(self, database: ThrowawayDatabase, policy: PolicyFile) -> None:
        self.database = database
        self.policy = policy
        self.settings = database.settings
        self.file = logins_file(database.settings)
        self.runner = SqlRunner(database.settings, policy)

    def make_logins(self, tenant: str) -> None:
        portal().run_sync(create_logins(self.database.url, self.policy, tenant, file=self.file))

    def judge(self, text: str, tenant: str = "acme") -> SqlVerdict:
        return classify(text, SqlScope.from_policy(self.policy.tables, self.policy.sql, tenant))

    def rows(self, text: str) -> list[tuple[Any, ...]]:
        """As the owner, past everything."""
        with psycopg.connect(self.database.url, autocommit=True) as connection:
            return connection.execute(text.encode()).fetchall()

    def do(self, text: str) -> None:
        with psycopg.connect(self.database.url, autocommit=True) as connection:
            connection.execute(text.encode())

    def call(self, function: str, *arguments: Any) -> Any:
        """A storage function, as a server."""
        marks = ", ".join("%s::jsonb" if isinstance(argument, dict) else "%s" for argument in arguments)
        given = [to_json(argument) if isinstance(argument, dict) else argument for argument in arguments]
        with psycopg.connect(self.database.url, autocommit=True) as connection:
            row = connection.execute(f"SELECT public.{function}({marks})".encode(), given).fetchone()
        assert row is not None
        return row[0]

    def ticket(self, tenant: str = "acme", *, key: str = "k", risk: str = "WRITE") -> str:
        """Of an approved and claimed execution."""
        identity = Identity(tenant_id=tenant, user_id="ada").as_json()
        digest = "ab" * 32
        asked = self.call(
            "request_approval",
            identity,
            {
                "request_key": key, "kind": "execution", "tool": "execute_sql", "tool_version": "1",
                "arguments": {"sql": key}, "arguments_shown": {"sql": key}, "args_hash": digest, "risk": risk,
                "summary": key, "reason": "", "effects": {}, "bounds": {}, "approvers": ["grace"], "required_votes": 1,
                "expires_in_seconds": 60, "escalate_in_seconds": 20,
            },
        )  # fmt: skip
        with psycopg.connect(self.database.url, autocommit=True) as connection:
            decided = connection.execute(
                "SELECT public.decide_approvals(%s::jsonb, %s::jsonb)",
                (
                    to_json({"tenant_id": tenant}),
                    to_json(
                        [
                            {
                                "approval_id": asked["approval_id"], "verdict": "approve", "decided_by": "grace",
                                "user_ids": [], "channel": "cli", "args_hash": digest,
                            }
                        ]
                    ),
                ),
            ).fetchone()  # fmt: skip
        assert decided is not None
        assert decided[0]["outcome"] == "recorded", decided
        claimed = self.call("claim_approval", {"tenant_id": tenant}, asked["approval_id"], digest, "test")
        assert claimed["claimed"], claimed
        return str(claimed["ticket"])

    def log(self, log_id: str | None, tenant: str = "acme") -> dict[str, Any]:
        found: dict[str, Any] = self.call("get_execution", {"tenant_id": tenant}, log_id)
        return found
