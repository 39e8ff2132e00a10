"""Logs of runs that are made up by rules, with fixed seeds: other tools than those of the recorded log.

The share of calls that fail, and why they do, are set here; nothing of the learning was chosen by them.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

from agent.learning.tool_experience_calls import ToolCall, read_calls
from agent.learning.transcripts import read_run
from benchmarks.made_logs_more import http, retail, sql

RUNS = 150


def made_logs() -> dict[str, list[list[ToolCall]]]:
    """The logs by name."""
    return {name: [_run(one, seed) for seed in range(RUNS)] for name, one in
            (("made up: shop", _shop), ("made up: web service", _service), ("made up: files", _files),
             ("made up: sql", sql), ("made up: http", http), ("made up: retail", retail))}  # fmt: skip


Call = tuple[str, dict[str, Any], str]


def _run(steps: Callable[[random.Random], list[Call]], seed: int) -> list[ToolCall]:
    messages: list[dict[str, Any]] = [{"role": "user", "content": "Please help me."}]
    for number, (tool, arguments, result) in enumerate(steps(random.Random(seed))):
        call = {"id": f"c{number}", "function": {"name": tool, "arguments": json.dumps(arguments)}}
        messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
        messages.append({"role": "tool", "tool_call_id": f"c{number}", "name": tool, "content": result})
    return list(read_calls(read_run(json.dumps({"messages": messages}))["messages"]))


def _shop(chance: random.Random) -> list[Call]:
    """Orders that can be changed only while they are pending, returned only once delivered; items in pairs."""
    calls: list[Call] = []
    user = f"{chance.choice(['ann', 'bo', 'cy'])}_{chance.randrange(1000, 9999)}"
    orders = [f"#W{chance.randrange(1_000_000, 9_999_999)}" for _ in range(2)]
    calls.append(("get_user", {"user_id": user}, json.dumps({"user_id": user, "orders": orders})))
    for order in orders:
        status = chance.choice(["pending", "pending", "delivered", "delivered", "cancelled"])
        items = [str(chance.randrange(10**9, 10**10)) for _ in range(3)]
        calls.append(
            (
                "get_order",
                {"order_id": order},
                json.dumps({"order_id": order, "status": status, "items": items}),
            )
        )
        if chance.random() < 0.1:
            calls.append(("get_order", {"order_id": order.strip("#")}, "Error: order not found"))
        wish = chance.choice(["cancel", "return", "exchange"])
        if chance.random() > 0.3:  # mostly the agent looks at the status
            wish = {"pending": "cancel", "delivered": chance.choice(["return", "exchange"])}.get(
                status, "none"
            )
        if wish == "cancel":
            reason = chance.choice(["no longer needed", "ordered by mistake", "too expensive"])
            error = "non-pending order cannot be cancelled" if status != "pending" else (
                "invalid reason" if reason == "too expensive" else None)  # fmt: skip
            calls.append(
                ("cancel_order", {"order_id": order, "reason": reason}, f"Error: {error}" if error else "ok")
            )
        elif wish == "return":
            error = "non-delivered order cannot be returned" if status != "delivered" else None
            calls.append(
                (
                    "return_items",
                    {"order_id": order, "item_ids": items[:1]},
                    f"Error: {error}" if error else "ok",
                )
            )
        elif wish == "exchange":
            new = [str(chance.randrange(10**9, 10**10)) for _ in range(chance.choice([2, 2, 2, 1]))]
            error = "non-delivered order cannot be exchanged" if status != "delivered" else (
                "the number of items to be exchanged should match" if len(new) != 2 else None)  # fmt: skip
            arguments = {"order_id": order, "item_ids": items[:2], "new_item_ids": new}
            calls.append(("exchange_items", arguments, f"Error: {error}" if error else "ok"))
    return calls


def _service(chance: random.Random) -> list[Call]:
    """A web service: a parameter left out, a wrong type, a page that is too large, a region that is not served; and
    faults that come by chance, which nothing before the call can tell."""
    calls: list[Call] = []
    for _ in range(chance.randrange(2, 6)):
        arguments: dict[str, Any] = {
            "region": chance.choice(["eu", "us", "us", "asia"]),
            "limit": chance.choice([10, 20, 50]),
            "query": f"case {chance.randrange(10_000)}",
        }
        kind = chance.random()
        error = None
        if kind < 0.08:
            del arguments["region"]
            error = "422: field required: region"
        elif kind < 0.16:
            arguments["limit"] = str(arguments["limit"])
            error = "422: limit is not a valid integer"
        elif kind < 0.22:
            arguments["limit"] = 500
            error = "400: limit must be at most 100"
        elif arguments["region"] == "asia":
            error = "503: region asia is not served"
        elif kind < 0.23:
            error = f"504: upstream timed out after {chance.randrange(1000, 3000)} ms"
        calls.append(("search_cases", arguments, f"Error: {error}" if error else '{"cases": []}'))
        calls.append(("get_time", {}, "12:00"))
    return calls


def _files(chance: random.Random) -> list[Call]:
    """Files: paths that were never listed, folders that may not be written, a file read before it is there."""
    calls: list[Call] = []
    names = [f"/data/report_{chance.randrange(100, 999)}.csv" for _ in range(4)]
    calls.append(("list_files", {"folder": "/data"}, json.dumps(names)))
    for name in names:
        kind = chance.random()
        if kind < 0.12:
            other = f"/data/report_{chance.randrange(1000, 9999)}.csv"
            calls.append(("read_file", {"path": other}, f"Error: {other}: no such file or directory"))
        elif kind < 0.22:
            path = f"/etc/{chance.choice(['a', 'b', 'c'])}{chance.randrange(100)}.conf"
            calls.append(("write_file", {"path": path, "text": "x"}, f"Error: {path}: permission denied"))
        calls.append(("read_file", {"path": name}, "a,b\n1,2"))
        calls.append(("write_file", {"path": name.replace("report", "copy"), "text": "a"}, "written"))
    return calls
