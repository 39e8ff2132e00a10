"""What of an application bears on a question stands first in a prompt."""

from __future__ import annotations

from typing import Any

import pytest

from agent.discovery.structure import AppStructure
from agent.learning.app_rendering import render_structure


def table(name: str, *columns: str) -> dict[str, Any]:
    """A structure document of a table with columns of text."""
    return {
        "schema": "public", "name": name, "kind": "table", "comment": None, "row_estimate": None, "partitions": 0,
        "primary_key": [], "foreign_keys": [],
        "columns": [{"name": c, "type": "text", "nullable": True, "comment": None, "enum": None} for c in columns],
    }  # fmt: skip


def function(name: str) -> dict[str, Any]:
    """A structure document of a function."""
    return {
        "schema": "public", "name": name, "kind": "function", "arguments": "", "identity_arguments": "",
        "result": "void", "comment": None, "writes": "no",
    }  # fmt: skip


APPLICATION = AppStructure(
    app="shop:5432/shop",
    discovered_at="2026-01-01T00:00:00+00:00",
    tables=[
        table("customfields", "label"),
        table("client_class", "label"),
        table("shipping_address", "line"),
        table("statuses", "label"),
        table("invoice", "total"),
        table("hold", "which", "are", "stored"),
    ],
    functions=[function("invoice_list"), function("get_invoice"), function("all_hold_of_table")],
)


@pytest.mark.parametrize(
    ("question", "first"),
    [
        ("Which table holds the custom fields?", "customfields"),
        ("client classes", "client_class"),
        ("where are addresses stored", "shipping_address"),
        ("the status of things", "statuses"),
        ("show the invoices", "invoice"),
    ],
)
def test_the_table_that_is_asked_for_is_the_first(question: str, first: str) -> None:
    lines = render_structure(APPLICATION, question, token_budget=400).splitlines()
    assert lines[2] == f"table public.{first}"
