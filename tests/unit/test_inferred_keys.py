"""Names and types suggest references, and only where one table fits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from agent.discovery.inferred_keys import candidates, is_confirmed, whole_numbers


def table(
    name: str,
    *columns: str,
    key: str | None = "id",
    schema: str = "public",
    kind: str = "table",
    unique: Sequence[str] = (),
) -> dict[str, Any]:
    """A structure document: columns are `name type`, without a type `bigint`."""
    return {
        "schema": schema,
        "name": name,
        "kind": kind,
        "columns": [
            {"name": column.partition(" ")[0], "type": column.partition(" ")[2] or "bigint", "readable": True}
            for column in columns
        ],
        "primary_key": [key] if key else [],
        "unique": [{"name": f"{column}_key", "columns": [column]} for column in unique],
        "foreign_keys": [],
        "readable": True,
    }


def found(*tables: dict[str, Any]) -> set[str]:
    return {
        f"{item.from_table}.{item.from_column} → {item.to_table}.{item.to_column}"
        for item in candidates(tables)
    }


@pytest.mark.parametrize(
    ("column", "target"),
    [
        ("customer_id", table("customers", "id")),
        ("customer_id", table("customer", "customer_id", key="customer_id")),
        ("customerId", table("customers", "id")),
        ("customerid", table("Customer", "id")),
        ("id_customer", table("customers", "id")),
        ("fk_customer_id", table("customers", "id")),
        ("customer_id", table("tbl_customer", "id")),
        ("billing_customer_id", table("customers", "id")),
        ("category_id", table("categories", "id")),
        ("address_id", table("addresses", "id")),
        ("person_id", table("people", "id")),
        ("order_item_id", table("order_items", "id")),
        ("country_code text", table("countries", "code text", "name text", key="code")),
        ("customer_uuid uuid", table("customers", "id", "uuid uuid", unique=["uuid"])),
        ("customer uuid", table("customers", "id uuid")),
        ("created_by uuid", table("users", "id uuid")),
    ],
)
def test_a_column_that_names_a_table_points_at_its_key(column: str, target: dict[str, Any]) -> None:
    rows = table("things", "id", column)

    (candidate,) = candidates([rows, target])
    assert (candidate.from_column, candidate.to_table) == (column.partition(" ")[0], target["name"])


@pytest.mark.parametrize(
    ("column", "target"),
    [
        ("customer_id text", table("customers", "id")),  # another type
        ("customer_id", table("customers", "id", key=None)),  # nothing unique
        ("customer_id", table("customers", "id", kind="view")),
        ("id", table("customers", "id")),
        ("customer", table("customers", "id")),  # may be a number of customers
        ("size", table("sizes", "id")),
        ("paid", table("pas", "id")),
        ("created_by", table("users", "id")),  # small numbers are everywhere
        ("customer_id", table("customers", "email text", "id", key="email", unique=())),
    ],
)
def test_what_a_name_or_a_type_does_not_say_is_not_suggested(column: str, target: dict[str, Any]) -> None:
    assert candidates([table("things", "id", column), target]) == []


def test_of_several_tables_that_fit_none_is_taken() -> None:
    rows = table("orders", "id", "customer_id")

    assert found(rows, table("customer", "id"), table("customers", "id")) == set()
    assert found(rows, table("customers", "id", schema="a"), table("customers", "id", schema="b")) == set()
    assert found(rows, table("customers", "id"), table("customers", "id", schema="b")) == {
        "orders.customer_id → customers.id"
    }


def test_names_in_any_letters_are_taken() -> None:
    assert (
        candidates(
            [table("表", "id", "列", "_", "1", "select", "a.b"), table("", "id"), table("_", "id", "表_id")]
        )
        == []
    )


def test_a_longer_name_comes_first() -> None:
    assert found(table("x", "id", "order_item_id"), table("items", "id"), table("order_items", "id")) == {
        "x.order_item_id → order_items.id"
    }


def test_a_reference_to_one_of_several_tables_is_not_suggested() -> None:
    rows = table("comments", "id", "post_id", "post_type text")

    assert found(rows, table("posts", "id")) == set()


def test_a_parent_is_a_row_of_the_same_table() -> None:
    assert found(table("categories", "id", "parent_id")) == {"categories.parent_id → categories.id"}


def test_declared_references_are_left_alone() -> None:
    rows = table("orders", "id", "customer_id")
    rows["foreign_keys"] = [{"columns": ["customer_id"]}]

    assert candidates([rows, table("customers", "id")]) == []


def test_values_must_confirm_it() -> None:
    assert is_confirmed(100, 40, 100, whole_numbers=True)
    assert is_confirmed(100, 40, 96, whole_numbers=True)
    assert not is_confirmed(100, 40, 90, whole_numbers=True)
    assert not is_confirmed(0, 0, 0, whole_numbers=True)
    assert not is_confirmed(50, 1, 50, whole_numbers=True)
    assert is_confirmed(1, 1, 1, whole_numbers=False)


def test_the_evidence_is_part_of_the_relationship() -> None:
    tables = [table("Orders", "id", "customer_id"), table("customers", "id")]
    (candidate,) = candidates(tables)

    assert whole_numbers(tables, candidate)
    assert candidate.relationship(8, 6) == {
        "from_table": 'public."Orders"',
        "from_columns": ["customer_id"],
        "to_table": "public.customers",
        "to_columns": ["id"],
        "name": "Orders.customer_id = customers.id",
        "declared": False,
        "evidence": {"sampled": 8, "matched": 6, "share": 0.75},
    }


DJANGO = [
    table("auth_user", "id", "name text"),
    table("auth_group", "id", "name text"),
    table("auth_user_groups", "id", "user_id", "group_id"),
    table("catalogue_product", "id", "title text"),
    table("catalogue_category", "id"),
    table("basket_line", "id", "product_id", "quantity", "owner_id"),
    table("order_shippingaddress", "id", "line text"),
    table("order_eventtype", "id"),
    table("django_content_type", "id"),
    table("order_order", "id", "user_id", "shipping_address_id", "event_type_id", "sent_by_id"),
]


def test_tables_may_begin_with_the_part_of_the_application_that_they_are_of() -> None:
    assert found(*DJANGO) == {
        "auth_user_groups.user_id → auth_user.id",
        "auth_user_groups.group_id → auth_group.id",
        "basket_line.product_id → catalogue_product.id",
        "basket_line.owner_id → auth_user.id",
        "order_order.user_id → auth_user.id",
        "order_order.shipping_address_id → order_shippingaddress.id",
        "order_order.event_type_id → order_eventtype.id",
    }


def test_of_several_tables_with_the_same_end_the_one_of_the_same_part_is_meant() -> None:
    assert found(
        table("dhcp4_server", "id"),
        table("dhcp6_server", "id"),
        table("dhcp4_pool_server", "pool", "server_id", key=None),
        table("other_thing", "id", "server_id"),
    ) == {"dhcp4_pool_server.server_id → dhcp4_server.id"}


def test_the_name_of_a_key_says_where_it_points() -> None:
    assert found(
        table("hstgrp", "groupid", "name text", key="groupid"),
        table("hosts", "hostid", "name text", key="hostid"),
        table("drules", "druleid", "proxy_hostid", "groupid", key="druleid"),
    ) == {"drules.proxy_hostid → hosts.hostid", "drules.groupid → hstgrp.groupid"}


def test_the_key_of_a_table_does_not_point_where_its_name_ends() -> None:
    assert not found(
        table("hosts", "hostid", key="hostid"), table("autoreg_host", "autoreg_hostid", key="autoreg_hostid")
    )
