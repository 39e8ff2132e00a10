"""A small shop with fixed sample data: the tools of the sample agents.

Nothing is stored: a refund or an order changes no data, so every conversation finds the same shop. What the shop
refuses, it refuses as a tool error, which the model is told and the run survives.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import date, timedelta
from typing import Any

from langchain_core.tools import BaseTool, ToolException, tool
from pydantic import FiniteFloat

TODAY = date(2026, 11, 20)
"""The day on which everything here happens."""
REFUND_PERIOD = timedelta(days=30)
DISCOUNT_PERCENT_MAX = 15


@dataclass(frozen=True, kw_only=True)
class Order:
    """One order; amounts are in cents of a euro."""

    order_id: str
    email: str
    item: str
    paid_cents: int
    refunded_cents: int = 0
    shipped_on: date | None = None
    delivered_on: date | None = None
    in_stock: bool = True
    """Whether the item could be sent again."""

    @property
    def invoice_id(self) -> str:
        """`INV-` and the digits of the order."""
        return f"INV-{self.order_id[1:]}"

    @property
    def status(self) -> str:
        """One word for where it stands."""
        if self.delivered_on:
            return "delivered"
        return "shipped" if self.shipped_on else "processing"


@dataclass(frozen=True, kw_only=True)
class Subscription:
    """One subscription; the price is in cents of a euro a month."""

    subscription_id: str
    email: str
    plan: str
    monthly_cents: int
    bound_until: date | None = None
    """Cannot be cancelled before this day; `None`: at any time."""


ORDERS = {
    order.order_id: order
    for order in (
        Order(order_id="A1001", email="ada@example.com", item="espresso cups", paid_cents=5990,
              shipped_on=date(2026, 11, 9), delivered_on=date(2026, 11, 12)),
        Order(order_id="A1002", email="ada@example.com", item="desk lamp", paid_cents=12900,
              shipped_on=date(2026, 11, 18)),
        Order(order_id="A1003", email="grace@example.com", item="notebooks", paid_cents=1850),
        Order(order_id="A1004", email="alan@example.com", item="office chair", paid_cents=24000,
              shipped_on=date(2026, 8, 26), delivered_on=date(2026, 8, 30)),
        Order(order_id="A1005", email="grace@example.com", item="headphones", paid_cents=3500, refunded_cents=3500,
              shipped_on=date(2026, 11, 10), delivered_on=date(2026, 11, 15)),
        Order(order_id="A1006", email="alan@example.com", item="kettle", paid_cents=4450,
              shipped_on=date(2026, 11, 6), delivered_on=date(2026, 11, 8), in_stock=False),
    )
}  # fmt: skip
SUBSCRIPTIONS = {
    subscription.subscription_id: subscription
    for subscription in (
        Subscription(subscription_id="S3001", email="ada@example.com", plan="coffee club", monthly_cents=1900),
        Subscription(subscription_id="S3002", email="alan@example.com", plan="tea club", monthly_cents=1400,
                     bound_until=date(2027, 3, 31)),
    )
}  # fmt: skip
ACCOUNTS = frozenset(order.email for order in ORDERS.values())


class ShopError(ToolException):
    """The shop refuses; the message is written for the model and the customer."""


def _tell(error: ToolException) -> str:
    return f"Error: {error}"


def _shop_tool(function: Callable[..., Any]) -> BaseTool:
    made = tool(function, parse_docstring=True)
    made.handle_tool_error = _tell
    return made


def _order(order_id: str) -> Order:
    try:
        return ORDERS[order_id.strip().upper()]
    except KeyError:
        raise ShopError(f"order {order_id} not found; order numbers look like A1001") from None


def _subscription(subscription_id: str) -> Subscription:
    try:
        return SUBSCRIPTIONS[subscription_id.strip().upper()]
    except KeyError:
        raise ShopError(
            f"subscription {subscription_id} not found; subscription numbers look like S3001"
        ) from None


def _euros(cents: int) -> str:
    return f"{cents // 100}.{cents % 100:02} EUR"


@_shop_tool
def order_status(order_id: str) -> str:
    """Look up an order: what it is, what was paid and where it stands.

    Args:
        order_id: Number of the order, such as A1001.
    """
    order = _order(order_id)
    return f"Order {order.order_id} ({order.item}, {_euros(order.paid_cents)} paid) is {order.status}."


@_shop_tool
def track_shipment(order_id: str) -> str:
    """Find out where the parcel of an order is.

    Args:
        order_id: Number of the order, such as A1001.
    """
    order = _order(order_id)
    if order.delivered_on:
        return f"The parcel of order {order.order_id} was delivered on {order.delivered_on}."
    if order.shipped_on is None:
        raise ShopError(f"order {order.order_id} has not been shipped, so there is nothing to track yet")
    expected_on = order.shipped_on + timedelta(days=5)
    return (
        f"The parcel of order {order.order_id} left on {order.shipped_on} and is expected on {expected_on}."
    )


@_shop_tool
def change_address(order_id: str, address: str) -> str:
    """Send an order to another address; possible until it is shipped.

    Args:
        order_id: Number of the order, such as A1001.
        address: The new address, in one line.
    """
    order = _order(order_id)
    if order.shipped_on:
        raise ShopError(
            f"order {order.order_id} left on {order.shipped_on}; its address cannot be changed any more"
        )
    return f"Order {order.order_id} will be sent to {address}."


@_shop_tool
def find_invoice(order_id: str) -> str:
    """Find the invoice of an order.

    Args:
        order_id: Number of the order, such as A1001.
    """
    order = _order(order_id)
    return f"Invoice {order.invoice_id} of order {order.order_id} says {_euros(order.paid_cents)} for {order.item}."


@_shop_tool
def refund_order(order_id: str, amount: FiniteFloat | None = None) -> str:
    """Pay money back for a delivered order, within 30 days and never more than was paid.

    Args:
        order_id: Number of the order, such as A1001.
        amount: Euros to pay back; all that was paid when left out.
    """
    order = _order(order_id)
    left_cents = order.paid_cents - order.refunded_cents
    cents = left_cents if amount is None else round(amount * 100)
    if left_cents == 0:
        raise ShopError(f"order {order.order_id} has already been refunded in full")
    if cents <= 0:
        raise ShopError(f"refund of {_euros(cents)} refused: the amount must be above zero")
    if cents > left_cents:
        raise ShopError(
            f"refund of {_euros(cents)} exceeds the {_euros(left_cents)} paid for order {order.order_id}"
        )
    if order.delivered_on and TODAY - order.delivered_on > REFUND_PERIOD:
        raise ShopError(
            f"order {order.order_id} was delivered on {order.delivered_on}; refunds end after "
            f"{REFUND_PERIOD.days} days"
        )
    return f"{_euros(cents)} for order {order.order_id} are on their way back to the customer."


@_shop_tool
def cancel_subscription(subscription_id: str) -> str:
    """End a subscription.

    Args:
        subscription_id: Number of the subscription, such as S3001.
    """
    subscription = _subscription(subscription_id)
    if subscription.bound_until and subscription.bound_until > TODAY:
        raise ShopError(
            f"subscription {subscription.subscription_id} is bound until {subscription.bound_until} and cannot be "
            "cancelled before"
        )
    return f"Subscription {subscription.subscription_id} ({subscription.plan}) ends with this month."


@_shop_tool
def offer_discount(subscription_id: str, percent: int = 10) -> str:
    """Make a subscription cheaper for six months.

    Args:
        subscription_id: Number of the subscription, such as S3001.
        percent: Discount in percent, at most 15.
    """
    subscription = _subscription(subscription_id)
    if not 0 < percent <= DISCOUNT_PERCENT_MAX:
        raise ShopError(
            f"a discount of {percent} percent is not allowed; at most {DISCOUNT_PERCENT_MAX} percent are"
        )
    price = _euros(subscription.monthly_cents * (100 - percent) // 100)
    return f"Subscription {subscription.subscription_id} costs {price} a month for the next six months."


@_shop_tool
def report_defect(order_id: str, description: str) -> str:
    """Open a case about something broken.

    Args:
        order_id: Number of the order, such as A1001.
        description: What is wrong, in the customer's words.
    """
    order = _order(order_id)
    if not order.delivered_on:
        raise ShopError(f"order {order.order_id} has not been delivered, so no defect can be reported")
    return f"Case Q{order.order_id[1:]} is open for the {order.item} of order {order.order_id}."


@_shop_tool
def send_replacement(order_id: str) -> str:
    """Send the item of a delivered order once more, free of charge.

    Args:
        order_id: Number of the order, such as A1001.
    """
    order = _order(order_id)
    if not order.in_stock:
        raise ShopError(f"the {order.item} of order {order.order_id} is out of stock and cannot be replaced")
    return f"A replacement ({order.item}) for order {order.order_id} leaves tomorrow."


@_shop_tool
def delete_account(email: str) -> str:
    """Delete a customer's account with all its orders. This cannot be undone.

    Args:
        email: E-mail address of the account.
    """
    if email.strip().lower() not in ACCOUNTS:
        raise ShopError(f"there is no account for {email}")
    return f"The account of {email} has been deleted."


BILLING_TOOLS = (order_status, find_invoice, refund_order)
SHIPPING_TOOLS = (order_status, track_shipment, change_address)
RETENTION_TOOLS = (order_status, cancel_subscription, offer_discount)
QUALITY_TOOLS = (order_status, report_defect, send_replacement)
ALL_TOOLS = (
    order_status, track_shipment, change_address, find_invoice, refund_order, cancel_subscription, offer_discount,
    report_defect, send_replacement, delete_account,
)  # fmt: skip
