"""`agent monitor`: one look at everything, or the monitor as a service."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated

import typer

from agent.commands.options import EXIT_CODES, JsonOption, opened_database, settings
from agent.commands.output import (
    Column,
    counted_as,
    heading,
    in_words,
    is_terminal,
    print_lines,
    print_table,
    remark,
    say_json,
)

if TYPE_CHECKING:
    from agent.monitoring.continuous_monitor import MonitorReport

app = typer.Typer(help="The monitor: what is not as it should be, and since when.", no_args_is_help=True)


@app.callback(
    invoke_without_command=True, epilog=f"In a pipe: tab-separated lines without a heading. {EXIT_CODES}"
)
def monitor(
    context: typer.Context,
    once: Annotated[bool, typer.Option("--once", help="Look at everything now and tell.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Look at everything once: each check and what it found. Alerts are raised, resolved and sent as by the service."""
    if context.invoked_subcommand is not None:
        if once or as_json:
            raise typer.BadParameter(
                "does not go with a command", param_hint="'--once'" if once else "'--json'"
            )
        return
    if not once:
        raise typer.BadParameter("goes with --once", param_hint="'--json'")
    report = asyncio.run(_look())
    if as_json:
        say_json(report.as_json())
    else:
        _print(report)
    if any(check.error is not None for check in report.checks):
        raise typer.Exit(1)


@app.command(epilog=EXIT_CODES)
def run() -> None:
    """Look every five minutes (LEARNING_MONITOR_INTERVAL) until SIGTERM or Ctrl-C; any number may run."""
    from agent.commands.services import run_service
    from agent.monitoring.continuous_monitor import ContinuousMonitor

    chosen = ContinuousMonitor(settings=settings())
    every = in_words(chosen.clock.interval)
    run_service(chosen, chosen.database, f"Looking {every}. Ctrl-C ends it.")


async def _look() -> MonitorReport:
    from agent.monitoring.continuous_monitor import ContinuousMonitor

    async with opened_database() as database:
        return await ContinuousMonitor(settings=settings(), database=database).run_once()


def _print(report: MonitorReport) -> None:
    if is_terminal():
        print_table(
            (
                Column(title="check", style="cyan"), Column(title="looks for", is_wide=True),
                Column(title="found", is_number=True), Column(title="ms", is_number=True),
            ),
            (
                (
                    check.name, check.about if check.error is None else f"failed: {check.error}", str(check.findings),
                    f"{check.seconds * 1000:.0f}",
                )
                for check in report.checks
            ),
        )  # fmt: skip
        if report.findings:
            heading("Found")
            print_table(
                (
                    Column(title="severity"), Column(title="since"), Column(title="what", is_wide=True),
                    Column(title="what to do", is_wide=True),
                ),
                (
                    (
                        one.severity, one.since.astimezone().strftime("%Y-%m-%d %H:%M"), f"{one.title}\n{one.what}",
                        one.advice,
                    )
                    for one in report.findings
                ),
            )  # fmt: skip
    else:
        print_lines(("check", check.name, check.findings, check.error) for check in report.checks)
        print_lines(
            ("finding", one.severity, one.cause, one.since.isoformat(), one.tenant_id, one.title)
            for one in report.findings
        )
    remark(
        f"{counted_as(len(report.checks), 'check')} found {counted_as(len(report.findings), 'thing')} to look at; "
        f"{counted_as(report.notices, 'notice')} to tell, {report.sent} sent. What is open: agent alerts list"
        if report.findings
        else f"{counted_as(len(report.checks), 'check')} found nothing that is not as it should be."
    )
