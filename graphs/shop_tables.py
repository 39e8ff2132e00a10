"""The tables of the sample shop in a database, for the operations agent: `python -m graphs.shop_tables` makes them.

They go into the embedded database only: into nobody's own Postgres are sample tables put unasked.
"""

from __future__ import annotations

from typing import LiteralString

import psycopg

from agent.database.opening import EmbeddedDatabase, open_database
from agent.portal import portal
from agent.settings import current_settings

_TABLES = """
CREATE SCHEMA IF NOT EXISTS shop;
CREATE TABLE IF NOT EXISTS shop.customers (
    email text PRIMARY KEY,
    name text NOT NULL,
    status text NOT NULL DEFAULT 'active' CHECK (status IN ('active', 'paused', 'closed')),
    joined_on date NOT NULL
);
CREATE TABLE IF NOT EXISTS shop.orders (
    order_id text PRIMARY KEY,
    email text NOT NULL REFERENCES shop.customers,
    item text NOT NULL,
    paid_cents integer NOT NULL CHECK (paid_cents >= 0),
    status text NOT NULL CHECK (status IN ('processing', 'shipped', 'delivered', 'refunded')),
    ordered_on date NOT NULL
);
INSERT INTO shop.customers (email, name, status, joined_on) VALUES
    ('ada@example.com', 'Ada', 'active', '2025-03-01'), ('ben@example.com', 'Ben', 'active', '2025-06-14'),
    ('cleo@example.com', 'Cleo', 'paused', '2025-09-30'), ('dan@example.com', 'Dan', 'active', '2026-01-20')
ON CONFLICT DO NOTHING;
INSERT INTO shop.orders (order_id, email, item, paid_cents, status, ordered_on) VALUES
    ('A1001', 'ada@example.com', 'desk lamp', 4900, 'delivered', '2026-11-02'),
    ('A1002', 'ada@example.com', 'office chair', 18900, 'shipped', '2026-11-17'),
    ('A1003', 'ben@example.com', 'notebook', 650, 'processing', '2026-11-19'),
    ('A1004', 'cleo@example.com', 'monitor arm', 7900, 'shipped', '2026-11-16'),
    ('A1005', 'dan@example.com', 'keyboard', 9900, 'processing', '2026-11-18'),
    ('A1006', 'dan@example.com', 'mouse', 3900, 'delivered', '2026-10-28')
ON CONFLICT DO NOTHING;
"""
_NOTEBOOKS: LiteralString = """
INSERT INTO shop.orders (order_id, email, item, paid_cents, status, ordered_on)
SELECT 'B' || n, (ARRAY['ada', 'ben', 'cleo', 'dan'])[1 + n % 4] || '@example.com', 'notebook', 650 + n * 10,
       CASE WHEN n % 20 = 0 THEN 'refunded' WHEN n < 320 THEN 'delivered' WHEN n < 380 THEN 'shipped'
            ELSE 'processing' END,
       date '2026-11-19' - (400 - n) / 40
FROM generate_series(1, 400) AS n ON CONFLICT DO NOTHING
"""


def make_shop_tables(url: str) -> None:
    """Make the tables and fill them, where they are not there; what is there stays as it is."""
    with psycopg.connect(url, autocommit=False) as connection:
        connection.execute(_TABLES)


def sell_notebooks(url: str) -> None:
    """Add 400 orders, so that there is something to see patterns in."""
    run_as_owner(url, _NOTEBOOKS)


def run_as_owner(url: str, statements: LiteralString) -> None:
    """Run statements as whoever owns the shop's tables."""
    with psycopg.connect(url) as connection:
        connection.execute(statements)


def main() -> None:
    """Make them in the embedded database of the settings; with another database only say why not."""
    database = open_database(current_settings())
    if not isinstance(database, EmbeddedDatabase):
        print(
            "The shop's sample tables are made in the embedded database only; the agent uses your own tables."
        )
        return
    try:
        make_shop_tables(portal().run_sync(database.url()))
    finally:
        portal().run_sync(database.close())


if __name__ == "__main__":
    main()
