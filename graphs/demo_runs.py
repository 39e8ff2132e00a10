"""Makes a file of finished runs: `python -m graphs.demo_runs FILE`.

The shop's agents, without learning and on the rule-based model, go through the conversations below. Some fail as real
ones do: the shop refuses, money goes back in the wrong amount, a customer gives up. One JSON object a line, with
`task_id`, `messages` in OpenAI's format and `reward` 1 or 0. The same input gives the same bytes.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from langchain_core.messages import (
    AIMessage,
    BaseMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
    convert_to_openai_messages,
)
from langgraph.pregel import Pregel

from graphs.rule_chat import RuleChat
from graphs.shop_agent import PROMPT, shop_agent
from graphs.team import SPECIALISTS, team_builder

CHANGING_TOOLS = frozenset(
    {
        "refund_order",
        "change_address",
        "cancel_subscription",
        "offer_discount",
        "report_defect",
        "send_replacement",
    }
)


@dataclass(frozen=True)
class Task:
    """What a customer says, and which changes should come of it."""

    task_id: str
    turns: tuple[str, ...]
    changes: tuple[tuple[str, dict[str, Any]], ...] = ()
    """Tools of `CHANGING_TOOLS` with their arguments; empty: nothing may change."""
    lookups: tuple[str, ...] = ()
    """Tools that must have answered without an error."""
    agent: Literal["assistant", "team"] = "team"


def _refund(order_id: str, amount: float | None = None) -> tuple[str, dict[str, Any]]:
    return "refund_order", {"order_id": order_id} | ({} if amount is None else {"amount": amount})


TASKS: Sequence[Task] = (
    # The shop does what it is asked for.
    Task("status-1", ("What is the status of order A1001?",), lookups=("order_status",)),
    Task("status-2", ("Could you look up order A1003 for me?",), lookups=("order_status",), agent="assistant"),
    Task("status-3", ("Hello", "Status of A1006, please"), lookups=("order_status",), agent="assistant"),
    Task("track-1", ("Where is my parcel from order A1002?",), lookups=("track_shipment",)),
    Task("track-2", ("Has order A1004 been delivered?",), lookups=("track_shipment",)),
    Task("track-3", ("When does my package arrive?", "A1002"), lookups=("track_shipment",), agent="assistant"),
    Task("invoice-1", ("I need the invoice for order A1001.",), lookups=("find_invoice",)),
    Task("invoice-2", ("Please send me my invoice", "A1005"), lookups=("find_invoice",)),
    Task("invoice-3", ("I lost the invoice of order A1006",), lookups=("find_invoice",), agent="assistant"),
    Task("refund-1", ("Please refund order A1001.",), (_refund("A1001"),)),
    Task("refund-2", ("One cup was missing, I want 15 euros back for order A1001.",), (_refund("A1001", 15),)),
    Task("refund-3", ("I want my money back", "A1006"), (_refund("A1006"),)),
    Task("refund-4", ("Can you refund 4.50 EUR of order A1006?",), (_refund("A1006", 4.5),), agent="assistant"),
    Task(
        "address-1",
        ("I have moved. For order A1003 the new address is 5 Hill Road, Leeds",),
        (("change_address", {"order_id": "A1003", "address": "5 Hill Road, Leeds"}),),
    ),
    Task("cancel-1", ("Please cancel subscription S3001.",), (("cancel_subscription", {"subscription_id": "S3001"}),)),
    Task(
        "discount-1",
        ("S3001 is too expensive, would 15 percent less be possible?",),
        (("offer_discount", {"subscription_id": "S3001", "percent": 15}),),
    ),
    Task("replace-1", ("A cup of order A1001 is cracked, please replace it.",),
         (("send_replacement", {"order_id": "A1001"}),)),
    Task("defect-1", ("My kettle from order A1006 is broken.",),
         (("report_defect", {"order_id": "A1006", "description": "My kettle from order A1006 is broken."}),)),
    # The shop refuses, and that is the right end.
    Task("refused-1", ("Please refund order A1005 once more.",)),
    Task("refused-2", ("I would like a refund for the chair, order A1004.",)),
    Task("refused-3", ("Cancel subscription S3002 today.",)),
    Task("refused-4", ("Change the address of order A1002, the address is 9 Oak Street, York",), agent="assistant"),
    Task("refused-5", ("Give me 50 percent discount on S3001.",)),
    # A number that is not there: the customer's wish stays open.
    Task("unknown-1", ("Please refund order A1101.",), (_refund("A1001"),)),
    Task("unknown-2", ("Refund 10 euros of order B1001, please.",), (_refund("A1001", 10),)),
    Task("unknown-3", ("Where is the parcel of order A2001?",), lookups=("track_shipment",)),
    Task("unknown-4", ("I need the invoice for order A1010.",), lookups=("find_invoice",), agent="assistant"),
    Task("unknown-5", ("Please cancel subscription S3100.",), (("cancel_subscription", {"subscription_id": "S3001"}),)),
    # More than was paid, where a part would have been right.
    Task("amount-1", ("I paid too much for order A1001, refund 80 euros.",), (_refund("A1001", 59.9),)),
    Task("amount-2", ("Refund 60 EUR for my kettle, order A1006.",), (_refund("A1006", 44.5),)),
    # The wrong amount goes back: no tool complains.
    Task("wrong-1", ("Refund 20 euros for order A1001. Sorry, I meant 12 euros.",), (_refund("A1001", 12),)),
    Task("wrong-2", ("Please pay back 40 euros for A1006, no: half of it, 20 euros.",), (_refund("A1006", 20),)),
    Task("wrong-3", ("I want my money back for one of two cups, order A1001.",), (_refund("A1001", 29.95),)),
    # Out of stock: nobody offers the refund that would have helped.
    Task("stock-1", ("My kettle, A1006, does not work. Replace it or give me what I paid.",), (_refund("A1006"),)),
    # The customer gives up.
    Task("gave-up-1", ("I want my money back", "The one from last week", "Forget it."), lookups=("refund_order",)),
    Task("gave-up-2", ("It is broken", "The thing you sent me", "I do not have the number here. Bye."),
         lookups=("report_defect",)),
    Task("gave-up-3", ("Please close my account ada@example.com", "So nobody can do that?", "I will call instead."),
         lookups=("delete_account",)),
    Task("gave-up-4", ("Can somebody call me about my delivery?", "No, I do not know the number"),
         lookups=("track_shipment",), agent="assistant"),
)  # fmt: skip


@dataclass
class _Shop:
    """Both agents, built once."""

    assistant: Pregel[Any, Any, Any, Any] = field(default_factory=lambda: shop_agent(RuleChat()))
    team: Pregel[Any, Any, Any, Any] = field(default_factory=lambda: team_builder(RuleChat()).compile())


def demo_runs() -> Iterator[dict[str, Any]]:
    """The runs, one dict for each line of the file."""
    agents = _Shop()
    for task in TASKS:
        yield _run(agents, task)


def write_demo_runs(path: Path) -> tuple[int, int]:
    """Write the file; returns the number of runs and how many of them succeeded."""
    runs = list(demo_runs())
    path.write_text("".join(json.dumps(run, ensure_ascii=False) + "\n" for run in runs), encoding="utf-8")
    return len(runs), sum(run["reward"] for run in runs)


def _run(agents: _Shop, task: Task) -> dict[str, Any]:
    graph: Pregel[Any, Any, Any, Any] = getattr(agents, task.agent)
    state: dict[str, Any] = {"messages": []}
    for number, turn in enumerate(task.turns):
        said = HumanMessage(turn, id=f"{task.task_id}-{number}")
        state = graph.invoke({**state, "messages": [*state["messages"], said]})
    prompts = {specialist.category: specialist.prompt for specialist in SPECIALISTS}
    prompt = PROMPT if task.agent == "assistant" else prompts[state["category"]]
    messages = [SystemMessage(prompt), *state["messages"]]
    return {
        "task_id": task.task_id,
        "messages": convert_to_openai_messages(messages),
        "reward": int(_is_success(task, messages)),
    }


def _is_success(task: Task, messages: Sequence[BaseMessage]) -> bool:
    failed = {
        message.tool_call_id
        for message in messages
        if isinstance(message, ToolMessage) and message.status == "error"
    }
    done = [call for message in messages if isinstance(message, AIMessage) for call in message.tool_calls
            if call["id"] not in failed]  # fmt: skip
    changes = [(call["name"], call["args"]) for call in done if call["name"] in CHANGING_TOOLS]
    looked_up = {call["name"] for call in done}
    return changes == list(task.changes) and looked_up.issuperset(task.lookups)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m graphs.demo_runs", description="Write a file of finished runs."
    )
    parser.add_argument(
        "file", type=Path, metavar="FILE", help="where to write; an existing file is replaced"
    )
    file: Path = parser.parse_args(arguments).file
    try:
        total, succeeded = write_demo_runs(file)
    except OSError as error:
        print(
            f"cannot write {str(file)!r}: {error.strerror}; name a file in a folder that exists",
            file=sys.stderr,
        )
        return 1
    print(f"{total} runs written to {file}: {succeeded} succeeded, {total - succeeded} failed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
