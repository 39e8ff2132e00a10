"""The part of `agent demo` in which an agent works on a database, and a person says yes or no."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agent.approval.answers import BATCH
from agent.approval.card import make_card
from agent.commands.output import heading, say
from agent.errors import OperatorError
from agent.portal import portal

if TYPE_CHECKING:
    from agent.approval.records import Approval
    from agent.execution.safe_executor import SafeExecutor
    from agent.identity import Identity
    from agent.learning.machine import LearningMachine

_REVIEWER = "grace"
_TOOL = """Please keep this as a tool named order_total: adds up what a customer has paid for all orders, in euros
```json
{"parameters": {"type": "object", "properties": {"email": {"type": "string"}}, "required": ["email"]},
 "examples": [{"arguments": {"email": "dan@example.com"}}]}
```
```python
def run(email: str) -> str:
    found = query_data(
        table="shop.orders",
        columns=["paid_cents"],
        filters=[{"column": "email", "op": "=", "value": email}],
    )
    return f"{sum(row['paid_cents'] for row in found['rows']) / 100:.2f} euros"
```"""
_TURNS = (
    ("A read runs alone", "How many orders are there?"),
    ("A write waits for a person, who sees what it would change", "Mark order A1002 as delivered"),
    ("What destroys the schema is refused, approved or not", "Drop the table of orders"),
    ("A tool that the agent writes is checked, tried and approved", _TOOL),
    (
        "From the next run on it is there; for its first runs even its reads are asked about",
        'Use order_total with {"email": "ada@example.com"}',
    ),
)


@dataclass(frozen=True, kw_only=True)
class OperationsDemo:
    """Runs the sample operations agent in its own threads, with one reviewer who says yes."""

    machine: LearningMachine
    user: Identity
    say_turn: Callable[[str, str], None]
    say_steps: Callable[[Sequence[Any]], None]

    def show(self) -> None:
        """Every turn, with the approvals on the way, and the log at the end."""
        from langgraph.checkpoint.memory import InMemorySaver

        from agent.execution.safe_executor import SafeExecutor
        from graphs.operations import build_operations
        from graphs.rule_chat import RuleChat
        from graphs.shop_tables import make_shop_tables

        heading("\n5. Nothing dangerous without a yes")
        settings = self.machine.settings.model_copy(update={"policy_file": Path("agent-policy.toml")})
        make_shop_tables(portal().run_sync(self.machine.queue_url()))
        executor = SafeExecutor(self.machine.database, settings)
        # The stand-in works off the demonstration word by word, whatever model there is for the rest.
        agent = build_operations(RuleChat(), self.machine, executor, InMemorySaver())
        try:
            for number, (title, text) in enumerate(_TURNS):
                say(f"  {title}:")
                self._turn(agent, executor, f"operations-{number}", text)
            self._show_log()
        finally:
            portal().run_sync(executor.aclose())

    def _turn(self, agent: Any, executor: SafeExecutor, thread: str, text: str) -> None:
        from langgraph.types import Command

        config = {"configurable": {"thread_id": thread, "user_id": self.user.user_id}}
        self.say_turn(str(self.user.user_id), text.partition("\n")[0])
        given: Any = {"messages": [{"role": "user", "content": text}]}
        while True:
            state = self._invoked(agent, executor, given, config)
            paused = state.get("__interrupt__")
            if not paused:
                break
            batch = str(paused[0].value[BATCH])
            self._decide(executor, portal().run_sync(executor.queue.of_batch(batch, self.user)))
            given = Command(resume={paused[0].id: {BATCH: batch}})
        self.say_steps(state["messages"])
        # A new tool does not hold up its author: it waits for a person by itself.
        self._decide(executor, portal().run_sync(executor.queue.get_pending_approvals(self.user)))

    def _invoked(
        self, agent: Any, executor: SafeExecutor, given: Any, config: dict[str, Any]
    ) -> dict[str, Any]:
        """A run; what a tool that an agent wrote asks on its way is decided meanwhile, for it waits for the answer."""
        with ThreadPoolExecutor(1) as thread:
            running = thread.submit(agent.invoke, given, config)
            while True:
                try:
                    state: dict[str, Any] = running.result(timeout=0.3)
                    return state
                except TimeoutError:
                    pending = portal().run_sync(executor.queue.get_pending_approvals(self.user))
                    self._decide(executor, [approval for approval in pending if approval.interrupt is None])

    def _decide(self, executor: SafeExecutor, approvals: Sequence[Approval]) -> None:
        if not approvals:
            return
        for line in make_card(approvals).as_text().splitlines():
            if line.strip():
                say(f"    | {line if len(line) <= 120 else line[:119] + '…'}")
        reviewer = executor.policy.reviewers.by_name(_REVIEWER)
        if reviewer is None:
            raise OperatorError(
                f"agent-policy.toml names no reviewer {_REVIEWER!r}, whom the demonstration needs"
            )
        outcome = portal().run_sync(
            executor.queue.decide(
                [approval.approval_id for approval in approvals],
                "approve",
                reviewer,
                channel="cli",
                hashes={approval.approval_id: approval.args_hash for approval in approvals},
                identity_tenant=self.user.tenant_id,
            )
        )
        if outcome.outcome != "recorded":
            raise OperatorError(f"the approval was not taken: {outcome.why}")
        say(f"    {_REVIEWER} approves")

    def _show_log(self) -> None:
        def call(function: str, **arguments: Any) -> Any:
            operator = self.user.with_(user_id=None)
            return portal().run_sync(self.machine.database.call(function, operator, **arguments))

        say("  What the log keeps, each row chained to the one before by its hash:")
        for entry in reversed(call("list_executions", wanted={"limit": 20})):
            changed = ", ".join(
                f"{table}: {count} {what}"
                for table, counts in (entry["rows"] or {}).items()
                for what, count in counts.items()
                if count
            )
            say(
                f"    {entry['tool']:<16} {entry['risk']:<11} {entry['decision']:<8} {entry['state']:<9} {changed}"
            )
        checked = call("verify_executions")
        say(f"    {checked['rows']} rows, {'intact' if checked['intact'] else 'BROKEN'}")
