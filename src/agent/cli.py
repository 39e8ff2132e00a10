"""The command line `agent`."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from agent.commands import (
    alerts,
    approvals,
    demo,
    discover,
    doctor,
    init,
    learn,
    log,
    memory,
    monitor,
    operations,
    runs,
    sql,
    telegram,
    tools,
)
from agent.commands.options import EXIT_CODES
from agent.commands.output import remark
from agent.errors import CallerError, LearningError, NotFound


class _Commands(TyperGroup):
    """Turns our errors into one line and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except LearningError as error:
            if ctx.params.get("debug"):
                raise
            remark(f"agent: {error}")
            is_usage = isinstance(error, CallerError) and not isinstance(error, NotFound)
            raise typer.Exit(2 if is_usage else 1) from None


app = typer.Typer(
    name="agent",
    cls=_Commands,
    help="Agents that learn: what they know, what they did, and what keeps them going.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
init.add_to(app)
demo.add_to(app)
operations.add_to(app)
learn.add_to(app)
doctor.add_to(app)
discover.add_to(app)
app.add_typer(memory.app, name="memory")
app.add_typer(runs.app, name="runs")
app.add_typer(approvals.app, name="approvals")
app.add_typer(alerts.app, name="alerts")
app.add_typer(log.app, name="log")
app.add_typer(telegram.app, name="telegram")
app.add_typer(tools.app, name="tools")
app.add_typer(sql.app, name="sql")
app.add_typer(monitor.app, name="monitor")


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"langchain-learning-machine {version('langchain-learning-machine')}")
        raise typer.Exit


@app.callback()
def _root(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Options of all commands; `debug` is read where errors are told."""


def main() -> None:
    """The entry of the console script."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # an answer with an emoji on a terminal that has none
    app()


if __name__ == "__main__":
    main()
