"""More logs that are made up by rules: an agent that writes SQL, one that calls HTTP, one that serves buyers.

Their errors come from a state that calls change: a table that is not there, a token that ran out, a balance that is
spent. They were written after everything of the learning was chosen, and nothing was chosen by them.
"""

from __future__ import annotations

import json
import random
from typing import Any

Call = tuple[str, dict[str, Any], str]

_TABLES = {
    "orders": ["id", "customer_id", "status", "total"],
    "customers": ["id", "email", "city"],
    "products": ["id", "title", "price"],
}
_WRONG_COLUMNS = {"orders": ["amount", "customer"], "customers": ["name", "mail"], "products": ["cost"]}


def sql(chance: random.Random) -> list[Call]:
    """Queries on three tables: columns that are not there, a table of another schema, text compared with numbers, and
    inserts that break a key."""
    calls: list[Call] = []
    taken: set[int] = set()
    for _ in range(chance.randrange(4, 9)):
        table = chance.choice(list(_TABLES))
        kind = chance.random()
        if kind < 0.1:
            column = chance.choice(_WRONG_COLUMNS[table])
            calls.append(
                (
                    "query",
                    {"sql": f"select {column} from {table} limit {chance.choice([5, 10])}"},
                    f'Error: column "{column}" does not exist',
                )
            )
        elif kind < 0.16:
            name = chance.choice(["invoices", "payments"])
            calls.append(
                ("query", {"sql": f"select * from {name}"}, f'Error: relation "{name}" does not exist')
            )
        elif kind < 0.3:
            key = chance.randrange(1, 12)
            error = (
                f"Error: duplicate key value violates unique constraint, key (id)=({key})"
                if key in taken
                else None
            )
            calls.append(("insert", {"table": table, "id": key}, error or '{"inserted": 1}'))
            taken.add(key)
        else:
            column = chance.choice(_TABLES[table])
            calls.append(
                (
                    "query",
                    {"sql": f"select {column} from {table} limit {chance.choice([5, 10])}"},
                    json.dumps([{column: chance.randrange(100)}]),
                )
            )
    return calls


def http(chance: random.Random) -> list[Call]:
    """An API that answers failures as JSON with a code: a token that ran out until it is renewed, a scope that it has
    not, a version that is stale, a currency that is not taken."""
    calls: list[Call] = []
    expired = False
    for _ in range(chance.randrange(4, 10)):
        if chance.random() < 0.08:
            expired = True
        amount = chance.randrange(5, 500)
        currency = chance.choice(["EUR", "USD", "USD", "GBP", "JPY"])
        path = chance.choice(["/v1/charges", "/v1/refunds", "/v1/customers"])
        method = "DELETE" if path == "/v1/customers" and chance.random() < 0.3 else "POST"
        arguments = {"method": method, "path": path, "body": {"amount": amount, "currency": currency}}
        error: tuple[int, str] | None = None
        if expired:
            error = (401, "token has expired")
        elif method == "DELETE":
            error = (403, "scope customers:write is required")
        elif currency == "JPY":
            error = (400, f"currency {currency} is not supported")
        elif path == "/v1/refunds" and amount > 400:
            error = (422, f"refund of {amount} is above the limit of 400")
        result = (
            {"error": {"code": error[0], "message": error[1]}}
            if error
            else {"id": f"ch_{chance.randrange(10**6)}"}
        )
        calls.append(("request", arguments, json.dumps(result)))
        if expired:
            if chance.random() < 0.3:
                calls.append(("request", arguments, json.dumps(result)))
            calls.append(("renew_token", {}, '{"ok": true}'))
            expired = False
    return calls


def retail(chance: random.Random) -> list[Call]:
    """Buyers with a gift card and orders of several states: what is found by name or e-mail, cancelled, paid otherwise,
    exchanged; some orders and cards are of somebody else."""
    calls: list[Call] = []
    first, last = chance.choice(["yusuf", "mei", "omar"]), chance.choice(["rossi", "khan"])
    user = f"{first}_{last}_{chance.randrange(1000, 9999)}"
    card, gift = (
        f"credit_card_{chance.randrange(10**6, 10**7)}",
        f"gift_card_{chance.randrange(10**6, 10**7)}",
    )
    balance = chance.randrange(5, 120)
    orders = [f"#W{chance.randrange(10**6, 10**7)}" for _ in range(chance.randrange(1, 4))]
    if chance.random() < 0.06:
        calls.append(
            (
                "find_user_id_by_email",
                {"email": f"x{chance.randrange(999)}@example.com"},
                "Error: user not found",
            )
        )
    calls.append(("find_user_id_by_email", {"email": f"{user}@example.com"}, user))
    methods = {
        card: {"source": "credit_card", "id": card},
        gift: {"source": "gift_card", "id": gift, "balance": balance},
    }
    calls.append(
        (
            "get_user_details",
            {"user_id": user},
            json.dumps({"user_id": user, "payment_methods": methods, "orders": orders}),
        )
    )
    for order in orders:
        status = chance.choice(["pending", "pending", "processed", "delivered"])
        total = chance.randrange(20, 150)
        paid_by = chance.choice([card, gift])
        details = {"order_id": order, "status": status, "total": total, "paid_by": paid_by}
        if chance.random() < 0.08:
            calls.append(("get_order_details", {"order_id": order[1:]}, "Error: order not found"))
        calls.append(("get_order_details", {"order_id": order}, json.dumps(details)))
        wish = chance.choice(["cancel", "pay", "return", "nothing"])
        if wish == "cancel":
            error = None if status == "pending" else "non-pending order cannot be cancelled"
            calls.append(("cancel_pending_order", {"order_id": order, "reason": "no longer needed"},
                          f"Error: {error}" if error else json.dumps(details | {"status": "cancelled"})))  # fmt: skip
        elif wish == "pay" and status == "pending":
            method = chance.choice([card, gift, f"paypal_{chance.randrange(10**6, 10**7)}"])
            error = ("payment method not found" if method not in methods else
                     "the new payment method should be different from the current one" if method == paid_by else
                     "insufficient gift card balance to pay for the order" if method == gift and balance < total else
                     None)  # fmt: skip
            calls.append(("modify_pending_order_payment", {"order_id": order, "payment_method_id": method},
                          f"Error: {error}" if error else json.dumps(details | {"paid_by": method})))  # fmt: skip
        elif wish == "return":
            error = None if status == "delivered" else "non-delivered order cannot be returned"
            calls.append(("return_delivered_order_items", {"order_id": order, "payment_method_id": paid_by},
                          f"Error: {error}" if error else json.dumps(details | {"status": "returned"})))  # fmt: skip
    return calls
