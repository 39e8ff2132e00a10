"""References are inferred in schemas whose declared keys were taken away, and nothing else is."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from benchmarks.discovery_patterns import CRM, PAGILA_UNDECLARED, STOCK, accuracy, pagila_schema


@pytest.mark.parametrize(("name", "schema"), [("crm", CRM), ("stock", STOCK)])
async def test_the_keys_of_a_schema_are_found_again(name: str, schema: str) -> None:
    found = await accuracy(name, schema)

    assert (found.wrong, found.missed) == (frozenset(), frozenset())
    assert len(found.right) == 8


async def test_the_keys_of_a_sample_application_are_found_again() -> None:
    folder = Path(os.environ.get("LEARNING_DATA") or Path(__file__).parents[3] / "shared" / "data")
    path = folder / "schemas" / "pagila_schema.sql"
    if not path.is_file():
        pytest.skip(f"there is no {path}")

    found = await accuracy("pagila", pagila_schema(path), PAGILA_UNDECLARED)

    assert found.wrong == frozenset()
    assert found.recall == 1.0


async def test_small_numbers_that_are_contained_by_chance_are_no_references() -> None:
    schema = """
    CREATE TABLE customers (id integer PRIMARY KEY, rank integer, age integer);
    CREATE TABLE sizes (id integer PRIMARY KEY, customers integer, customer_count integer, id_number integer);
    CREATE TABLE counters (id integer PRIMARY KEY, size integer, value integer);
    CREATE TABLE customer (id integer PRIMARY KEY);
    CREATE TABLE visits (id integer PRIMARY KEY, customer_id integer, size integer);
    """

    found = await accuracy("traps", schema)

    assert found.wrong == frozenset()
