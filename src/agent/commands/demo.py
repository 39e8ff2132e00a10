"""`agent demo`: the main job from end to end, on a database of its own."""

from __future__ import annotations

import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agent.commands.options import EXIT_CODES, settings
from agent.commands.output import (
    Column,
    heading,
    inert,
    is_terminal,
    one_line,
    print_table,
    remark,
    say,
    short_id,
)
from agent.commands.runs import errors_of, outcome_of
from agent.errors import ConfigurationError, ModelError, OperatorError

if TYPE_CHECKING:
    from agent.learning.machine import LearningMachine
    from agent.settings import Settings

_USER = "ada"
_FIRST_SESSION = (
    "My name is Ada. I prefer concise answers and I work on billing.",
    "What is the status of order A1001?",
)
_SECOND_SESSION = ("What do you know about me?", "Where is the parcel of order A1002?")
_FAILED_SHOWN = 8
_LEARNING_WAIT = timedelta(seconds=60)
_TOLD = ("tool_call_refused ", "alert_raised ", "alert_resolved ")


def demo(
    keep: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Keep the database in this new or empty folder instead of deleting it."
        ),
    ] = None,
) -> None:
    """Show the whole way once, really run: a conversation, what is learned from it, another one that knows it, and a
    log of runs with its failures. Run it in the checkout, where graphs/ is."""
    _find_graphs()
    # The demo tells itself that calls are refused and that an alert is raised, as it wants to show.
    logging.getLogger("agent.events").addFilter(lambda record: not record.getMessage().startswith(_TOLD))
    with _folder(keep) as folder:
        _Demo(folder).show(is_kept=keep is not None)


def _find_graphs() -> None:
    here = Path.cwd()
    if not all(
        (here / "graphs" / name).is_file() for name in ("assistant.py", "demo_runs.py", "operations.py")
    ):
        raise OperatorError(
            f"the demo uses the project's sample graphs, and {str(here)!r} has no graphs/assistant.py. Run it in "
            "the checkout of langchain-learning-machine; `agent init` starts a project of your own"
        )
    if str(here) not in sys.path:
        sys.path.insert(0, str(here))


@contextmanager
def _folder(keep: Path | None) -> Iterator[Path]:
    if keep is not None:
        if keep.exists() and (not keep.is_dir() or any(keep.iterdir())):
            raise ConfigurationError(f"--keep {str(keep)!r} is not empty: name a folder that is new or empty")
        keep.mkdir(parents=True, exist_ok=True)
        yield keep
        return
    from agent.database.embedded import erase_embedded

    folder = Path(tempfile.mkdtemp(prefix="agent-demo-"))
    if os.geteuid() == 0:
        folder.chmod(0o711)  # the account that runs Postgres for root must pass
    try:
        yield folder
    finally:
        with suppress(OperatorError):  # it never started
            erase_embedded(folder)
        shutil.rmtree(folder, ignore_errors=True)


class _Demo:
    def __init__(self, folder: Path) -> None:
        from agent.identity import Identity

        self._folder = folder
        self._settings = _settings_in(folder)
        self._user = Identity(tenant_id=self._settings.tenant, user_id=_USER)
        self._machine = _machine(self._settings)

    def show(self, *, is_kept: bool) -> None:
        from agent.portal import portal

        try:
            remark(f"Starting a Postgres in {self._folder} …")
            self._call("queue_state", the_queue=self._machine.queue)
            agent = self._build_agent()
            self._converse(agent, "1. A first session", "first", _FIRST_SESSION)
            self._learn()
            self._converse(agent, "3. Another session", "second", _SECOND_SESSION)
            self._show_recalled()
            self._import_runs()
            self._operate()
            self._find_out()
            self._what_next(is_kept=is_kept)
        finally:
            portal().run_sync(self._machine.aclose())

    def _call(self, function: str, identity: Any = None, /, **arguments: Any) -> Any:
        from agent.portal import portal

        return portal().run_sync(self._machine.database.call(function, identity, **arguments))

    def _build_agent(self) -> Any:
        from langgraph.checkpoint.memory import InMemorySaver

        from graphs.assistant import build_assistant
        from graphs.chat_model import chat_model
        from graphs.rule_chat import RuleChat

        model = chat_model()
        if isinstance(model, RuleChat):
            say(
                "No model key is set: the agent runs on a rule-based stand-in, and what users say is learned as it is."
            )
        else:
            say(f"The agent runs on {getattr(model, 'model_name', type(model).__name__)}.")
        return build_assistant(model, self._machine, InMemorySaver())

    def _converse(self, agent: Any, title: str, session: str, turns: Sequence[str]) -> None:
        from langgraph.errors import GraphBubbleUp

        from agent.portal import portal

        heading(f"\n{title}")
        config = {"configurable": {"thread_id": session, "user_id": _USER}}
        for turn in turns:
            _say_turn(_USER, turn)
            try:
                state = agent.invoke({"messages": [{"role": "user", "content": turn}]}, config)
            except GraphBubbleUp:
                raise
            except Exception as error:  # a provider's client has errors of its own
                raise ModelError(
                    f"the model of the demo failed: {type(error).__name__}: {one_line(error, 300)}. Without "
                    "OPENAI_API_KEY and GRAPH_MODEL the demo needs none"
                ) from error
            _say_steps(state["messages"])
            portal().run_sync(self._machine.recorded_all())  # what follows shows the runs, in this order

    def _learn(self) -> None:
        heading("\n2. What was learned from it, and from where")
        if not self._machine.drain_sync(_LEARNING_WAIT):
            raise OperatorError(
                f"nothing was learned in {_LEARNING_WAIT}; `agent doctor` looks for the reason"
            )
        said = self._call("get_learnings", self._user, wanted={"store": "conversation"}, memory_limit=50)
        found = self._call("get_learnings", self._user, wanted={}, memory_limit=50) + said
        if not found:
            raise OperatorError(
                "nothing was learned from the first session; `agent doctor` looks for the reason"
            )
        for memory in reversed(found):
            whole = self._call("get_learning", self._user, the_memory_id=memory["memory_id"])
            name = ".".join(part for part in (memory["store"], memory["field"] or memory["kind"]) if part)
            say(f"  {short_id(memory['memory_id'])} {name}: {one_line(memory['content'], 120)}")
            for item in whole["evidence"]:
                place = f"message {short_id(item['message_id'])}" if item["message_id"] else "a tool call"
                quote = f': "{one_line(item["quote"], 80)}"' if item["quote"] else ""
                say(f"           from run {short_id(item['run_id'])}, {place}{quote}")

    def _show_recalled(self) -> None:
        runs = self._call("list_runs", self._user.with_(user_id=None), wanted={"session_id": "second"})
        first = self._call("get_run", self._user.with_(user_id=None), the_run_id=runs[-1]["run_id"])
        say("  Recalled for the first question, by row and version:")
        for exposure in first["exposures"]:
            memory = f"{short_id(exposure['memory_id'])} v{exposure['version']}"
            say(f"    {memory} {one_line(exposure['content'] or '', 110)}")

    def _import_runs(self) -> None:
        from agent.identity import Identity
        from agent.learning.run_import import ImportReport, import_runs
        from graphs.demo_runs import write_demo_runs

        heading("\n4. A log of runs comes in")
        log = self._folder / "demo_runs.jsonl"
        total, succeeded = write_demo_runs(log)
        say(
            f"  The shop's agents have worked off {total} tasks; {succeeded} went well. What happened is in {log.name}."
        )
        operator = Identity(tenant_id=self._settings.tenant)
        report = ImportReport()
        with log.open("rb") as file:
            import_runs(
                file,
                lambda runs: self._call("import_runs", operator, runs=runs),
                report,
                source_file=log.name,
                agent_id="shop",
            )
        say(f"  {report.recorded} runs imported, {report.known} known already, {report.bad} bad lines.")
        failed = [
            run
            for run in self._call(
                "list_runs", operator, wanted={"failed": True, "source": "import"}, run_limit=1000
            )
            if any(outcome["succeeded"] is False for outcome in run["outcomes"])
        ]
        with_errors = [run for run in failed if run["tool_errors"]]
        say(f"  {len(failed)} of them failed, {len(with_errors)} with an error of a tool. Some of these:")
        _print_failed(with_errors[:_FAILED_SHOWN])

    def _operate(self) -> None:
        from agent.commands.demo_operations import OperationsDemo

        OperationsDemo(
            machine=self._machine, user=self._user, say_turn=_say_turn, say_steps=_say_steps
        ).show()

    def _find_out(self) -> None:
        from agent.commands.demo_discovery import DiscoveryDemo

        DiscoveryDemo(machine=self._machine).show()

    def _what_next(self, *, is_kept: bool) -> None:
        heading("\nWhat next")
        agent = _program()
        if is_kept:
            place = f"DATABASE_URL= SUPABASE_URL= LEARNING_DATA_DIR={self._folder}"
            say("  Look at what is in the database, which is kept:")
            say(f"    {place} {agent} memory list --user {_USER}")
            say(f"    {place} {agent} memory search billing --user {_USER}")
            say(f"    {place} {agent} runs list --failed")
        else:
            say(
                f"  {f'{agent} demo --keep demo-data':<40}keeps the database, for `memory` and `runs` of {agent}"
            )
        say(f"  {'make dev':<40}the graphs under `langgraph dev`")
        say(f"  {f'{agent} init my-agent':<40}a project of your own")


def _program() -> str:
    """How this program is called from here: `agent` where the shell finds it, else its path, such as
    `.venv/bin/agent`."""
    here = Path(sys.argv[0]).absolute()
    found = shutil.which("agent")
    if found is not None and here == Path(found).absolute():
        return "agent"
    return str(here.relative_to(Path.cwd())) if here.is_relative_to(Path.cwd()) else str(here)


def _settings_in(folder: Path) -> Settings:
    """The settings of this process, with everything that is kept in this folder."""
    from agent.settings import WorkerMode

    return settings().model_copy(
        update={
            "database_url": None,
            "supabase_url": None,
            "app_database_url": None,
            "data_dir": folder,
            "default_user": None,
            "quiet_period": timedelta(0),
            "worker": WorkerMode.INSIDE,
        }
    )


def _machine(chosen: Settings) -> LearningMachine:
    from agent import LearningMachine, LearningMode, UserProfileConfig

    return LearningMachine(user_profile=UserProfileConfig(mode=LearningMode.AGENTIC), settings=chosen)


def _say_turn(who: str, text: str) -> None:
    if is_terminal():
        from rich.console import Console
        from rich.padding import Padding
        from rich.text import Text

        style = "bold cyan" if who == _USER else "bold green"
        Console().print(Padding(Text.assemble((f"{who}: ", style), inert(text)), (0, 0, 0, 2)))
    else:
        say(f"  {who}: {text}")


def _say_steps(messages: Sequence[Any]) -> None:
    """What the agent did since the person spoke last: its tool calls, their results, its answer."""
    last = max(index for index, message in enumerate(messages) if message.type == "human")
    for message in messages[last + 1 :]:
        for call in getattr(message, "tool_calls", None) or ():
            say(f"    calls {call['name']} {one_line(call['args'], 100)}")
        if message.type == "tool":
            say(f"    → {one_line(message.text, 110)}")
        elif message.text:
            _say_turn("agent", message.text)


def _print_failed(runs: Sequence[Mapping[str, Any]]) -> None:
    rows = [
        (
            short_id(run["run_id"]),
            str(run["facts"].get("task_id", "")),
            outcome_of(run),
            errors_of(run, width=90),
        )
        for run in runs
    ]
    if is_terminal():
        columns = (
            Column(title="run", style="cyan"),
            Column(title="task"),
            Column(title="outcome"),
            Column(title="what went wrong", is_wide=True),
        )
        print_table(columns, rows)
    else:
        for row in rows:
            say("    " + "  ".join(one_line(cell) for cell in row))


def add_to(app: typer.Typer) -> None:
    """Register this command."""
    app.command(epilog=EXIT_CODES)(demo)
