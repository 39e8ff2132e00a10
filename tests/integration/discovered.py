"""What the tests of discovery share: an application's tables, and an AutoDiscovery over a throw-away database."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import sql

from agent.database.postgres import PostgresDatabase
from agent.discovery.structure import AppStructure, full_name
from agent.learning.auto_discover import AutoDiscovery
from agent.testing.throwaway import ThrowawayDatabase

SHOP = """
CREATE SCHEMA shop;
CREATE TYPE shop.state AS ENUM ('new', 'paid', 'refunded');
CREATE DOMAIN shop.cents AS bigint CHECK (VALUE >= 0);
CREATE TABLE shop.customers (
    customer_id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    email text NOT NULL UNIQUE,
    joined_on date NOT NULL DEFAULT CURRENT_DATE,
    shout text GENERATED ALWAYS AS (upper(email)) STORED);
COMMENT ON TABLE shop.customers IS 'Who buys here';
COMMENT ON COLUMN shop.customers.email IS 'Where bills go';
CREATE TABLE shop.orders (
    order_id bigint PRIMARY KEY,
    customer_id bigint NOT NULL REFERENCES shop.customers ON DELETE CASCADE,
    state shop.state NOT NULL DEFAULT 'new',
    states shop.state[],
    paid shop.cents,
    CONSTRAINT paid_in_full CHECK (paid > 0 OR state = 'new'));
CREATE INDEX orders_by_state ON shop.orders (state) WHERE state <> 'paid';
CREATE TABLE shop.refunds (
    refund_id bigint PRIMARY KEY, order_id bigint REFERENCES shop.orders, amount numeric(10, 2));
ALTER TABLE shop.refunds ENABLE ROW LEVEL SECURITY;
CREATE POLICY all_of_them ON shop.refunds FOR SELECT TO PUBLIC USING (amount > 0);
CREATE VIEW shop.open_orders AS SELECT o.order_id, c.email FROM shop.orders o JOIN shop.customers c USING (customer_id);
CREATE MATERIALIZED VIEW shop.sales AS SELECT state, count(*) AS orders FROM shop.orders GROUP BY state;
CREATE FUNCTION shop.pay(the_order bigint, cents bigint DEFAULT 1) RETURNS void LANGUAGE sql
    AS 'UPDATE shop.orders SET paid = cents WHERE order_id = the_order';
CREATE FUNCTION shop.pay_twice(the_order bigint) RETURNS void LANGUAGE plpgsql
    AS 'BEGIN PERFORM shop.pay(the_order); PERFORM shop.pay(the_order); END';
CREATE FUNCTION shop.total() RETURNS bigint LANGUAGE sql STABLE SECURITY DEFINER SET search_path = shop
    AS 'SELECT sum(paid)::bigint FROM orders';
CREATE FUNCTION shop.any_sql(what text) RETURNS void LANGUAGE plpgsql AS 'BEGIN EXECUTE what; END';
CREATE FUNCTION shop.standard(a bigint) RETURNS void BEGIN ATOMIC DELETE FROM shop.refunds WHERE refund_id = a; END;
CREATE FUNCTION shop.noted() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN NEW.paid := 0; RETURN NEW; END';
CREATE TRIGGER note BEFORE INSERT ON shop.orders FOR EACH ROW EXECUTE FUNCTION shop.noted();
CREATE PROCEDURE shop.tidy() LANGUAGE plpgsql AS 'BEGIN DELETE FROM shop.refunds; END';
"""


def execute(url: str, *statements: str) -> None:
    """Run statements as the owner of everything."""
    with psycopg.connect(url, autocommit=True) as connection:
        for statement in statements:
            connection.execute(statement.encode())


def table(structure: AppStructure, name: str) -> dict[str, Any]:
    """The one table of that full name."""
    (found,) = [item for item in structure.tables if full_name(item["schema"], item["name"]) == name]
    return found


def function(structure: AppStructure, name: str) -> dict[str, Any]:
    """The one function of that full name."""
    (found,) = [item for item in structure.functions if full_name(item["schema"], item["name"]) == name]
    return found


def names(structure: AppStructure) -> list[str]:
    """All tables by full name, those of the stand-ins for Supabase aside."""
    return [full_name(item["schema"], item["name"]) for item in structure.tables]


def over(database: ThrowawayDatabase, **changes: Any) -> AutoDiscovery:
    """Discovery with the settings of a database, changed."""
    return AutoDiscovery(
        settings=database.settings.model_copy(update=changes), database=PostgresDatabase(database.url)
    )


def a_login(url: str, name: str, *grants: str) -> str:
    """Make a login that may do what the grants say, and return its address."""
    with psycopg.connect(url, autocommit=True) as connection:
        role = sql.Identifier(name)
        connection.execute(sql.SQL("CREATE ROLE {} LOGIN PASSWORD 'reader'").format(role))
        for grant in grants:
            connection.execute(sql.SQL("GRANT {} TO {}").format(sql.SQL(grant), role))
    scheme, _, rest = url.partition("://")
    return f"{scheme}://{name}:reader@{rest.partition('@')[2]}"


def pagila() -> str:
    """The text of a sample application's schema, or a skipped test."""
    folder = Path(os.environ.get("LEARNING_DATA") or Path(__file__).parents[3] / "shared" / "data")
    path = folder / "schemas" / "pagila_schema.sql"
    if not path.is_file():
        pytest.skip(f"there is no {path}")
    return path.read_text("utf-8").replace("OWNER TO postgres", "OWNER TO CURRENT_USER")
