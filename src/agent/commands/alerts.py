"""`agent alerts`: list, show and silence what the monitor found; try the sinks."""

from __future__ import annotations

import asyncio
import getpass
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agent.commands.options import (
    EXIT_CODES,
    JsonOption,
    TenantOption,
    how_long,
    only_id,
    opened_database,
    settings,
    tenant_identity,
)
from agent.commands.output import (
    Column,
    counted_as,
    heading,
    is_terminal,
    local_time,
    one_line,
    print_lines,
    print_table,
    remark,
    say,
    say_json,
    short_id,
)

if TYPE_CHECKING:
    from agent.monitoring.alert_sinks import Sink
    from agent.monitoring.notices import Notice

app = typer.Typer(help="Alerts: what the monitor found, and what is silenced.", no_args_is_help=True)

_PAGE = 1_000
_ByOption = Annotated[
    str | None,
    typer.Option("--as", metavar="NAME", help="Who does this; by default the user of this machine."),
]


@app.command("list", epilog=f"In a pipe: tab-separated lines without a heading. {EXIT_CODES}")
def list_(
    all_: Annotated[bool, typer.Option("--all", help="Resolved ones too.")] = False,
    limit: Annotated[int, typer.Option(min=1, max=_PAGE, help="Show at most so many.")] = 50,
    tenant: TenantOption = None,
    as_json: JsonOption = False,
) -> None:
    """List what is open, the gravest first."""
    found = _read("list_alerts", tenant, wanted=({} if all_ else {"state": "open"}) | {"limit": limit})
    if as_json:
        say_json(found)
        return
    if not found:
        remark("There are no alerts." if all_ else "Nothing is open.")
    elif is_terminal():
        columns = (
            Column(title="alert", style="cyan"), Column(title="severity"), Column(title="state"),
            Column(title="what", is_wide=True), Column(title="since"),
        )  # fmt: skip
        print_table(
            columns,
            (
                (
                    short_id(row["alert_id"]), row["severity"],
                    "silenced" if row["state"] == "open" and row["silence_id"] else row["state"],
                    one_line(row["title"], 200), local_time(row["since"]),
                )
                for row in found
            ),
        )  # fmt: skip
    else:
        print_lines(
            (
                row["alert_id"], row["severity"], row["state"], "silenced" if row["silence_id"] else "", row["cause"],
                row["since"], row["title"],
            )
            for row in found
        )  # fmt: skip
    if len(found) == limit:
        remark(f"The first {limit}; there may be more with --limit {min(limit * 4, _PAGE)}.")


@app.command(epilog=EXIT_CODES)
def show(
    alert_id: Annotated[str, typer.Argument(metavar="ALERT_ID", help="Id of the alert, or how it begins.")],
    tenant: TenantOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show one alert: what is so, since when, the evidence, what to do, and what was told of it."""
    from agent.errors import NotFound

    wanted = alert_id.strip().lower()
    is_id = re.fullmatch(r"[0-9a-f][0-9a-f-]*", wanted)
    known = _read("list_alerts", tenant, wanted={"begins": wanted, "limit": 9}) if is_id else []
    ids = [row["alert_id"] for row in known]
    identity = tenant_identity(tenant)
    alert = _read(
        "get_alert", tenant, the_alert_id=only_id(ids, wanted, "alert", identity, "agent alerts list --all")
    )
    if alert is None:
        raise NotFound(f"alert {wanted!r} was deleted just now")
    if as_json:
        say_json(alert)
    else:
        _print(alert)


def _print(alert: Mapping[str, Any]) -> None:
    from agent.monitoring.notices import alert_link, evidence_text

    heading(f"{alert['severity']}: {one_line(alert['title'])}")
    say(alert["what"])
    if alert["state"] == "open":
        say(f"What to do: {alert['advice']}")
    seen = counted_as(alert["times_seen"], "time")
    say(f"State:      {alert['state']}, seen {seen}, last {local_time(alert['last_seen_at'])}")
    say(f"Since:      {local_time(alert['since'])}")
    if alert["resolved_at"]:
        say(f"Resolved:   {local_time(alert['resolved_at'])}")
    if alert["times_reopened"]:
        say(f"Came back:  {alert['times_reopened']} times soon after it was resolved")
    say(f"Cause:      {one_line(alert['cause'])}")
    if alert["silence"]:
        silence = alert["silence"]
        by = f"by {one_line(silence['made_by'])}: {one_line(silence['why'])}"
        say(f"Silenced:   until {local_time(silence['until'])} {by}")
    link = alert_link(settings().public_url, alert["alert_id"], alert["tenant_id"])
    if link:
        say(f"Page:       {link}")
    evidence = evidence_text(alert["evidence"], characters=8_000)
    if evidence:
        heading("Evidence")
        say(evidence)
    heading("Told")
    for notice in alert["notices"]:
        where = ", ".join(_told(one) for one in notice["deliveries"])
        say(f"{local_time(notice['at'])}  {notice['kind']}  {where}")


def _told(delivery: Mapping[str, Any]) -> str:
    why = f" ({one_line(delivery['error'])})" if delivery["error"] else ""
    return f"{delivery['sink']} {delivery['state'].replace('_', ' ')}{why}"


@app.command(epilog=EXIT_CODES)
def silence(
    pattern: Annotated[
        str,
        typer.Argument(
            metavar="PATTERN", help="A cause or the name of a check; * is any text, ? any letter."
        ),
    ],
    lasts: Annotated[
        str, typer.Option("--for", metavar="TIME", help="How long: 30m, 2h, 7d; at most 30 days.")
    ],
    why: Annotated[str, typer.Option("--why", metavar="TEXT", help="For the others.")] = "",
    by: _ByOption = None,
    tenant: TenantOption = None,
    as_json: JsonOption = False,
) -> None:
    """Record alerts and tell nobody for a while. What lasts is told when the silence ends."""
    given = {
        "pattern": pattern,
        "seconds": how_long(lasts).total_seconds(),
        "made_by": by or _who(),
        "why": why,
    }
    made = _read("silence_alerts", tenant, silence=given)
    if as_json:
        say_json(made)
        return
    say(f"{one_line(made['pattern'])} is silenced until {local_time(made['until'])}.")
    remark(f"It ends with: agent alerts unsilence {made['silence_id']}")


@app.command(epilog=f"In a pipe: tab-separated lines without a heading. {EXIT_CODES}")
def silences(
    all_: Annotated[bool, typer.Option("--all", help="Those that are over too.")] = False,
    tenant: TenantOption = None,
    as_json: JsonOption = False,
) -> None:
    """List silences, newest first."""
    found = [row for row in _read("list_alert_silences", tenant) if all_ or row["holds"]]
    if as_json:
        say_json(found)
    elif not found:
        remark("Nothing is silenced.")
    elif is_terminal():
        columns = (
            Column(title="silence", style="cyan"), Column(title="pattern"), Column(title="holds"),
            Column(title="until"), Column(title="by"), Column(title="why", is_wide=True),
        )  # fmt: skip
        print_table(
            columns,
            (
                (
                    short_id(row["silence_id"]), one_line(row["pattern"], 60), "yes" if row["holds"] else "no",
                    local_time(row["until"]), one_line(row["made_by"], 24), one_line(row["why"], 200),
                )
                for row in found
            ),
        )  # fmt: skip
    else:
        print_lines(
            (row["silence_id"], row["pattern"], row["holds"], row["until"], row["made_by"], row["why"])
            for row in found
        )


@app.command(epilog=EXIT_CODES)
def unsilence(
    silence_id: Annotated[
        str, typer.Argument(metavar="SILENCE_ID", help="Id of the silence, or how it begins.")
    ],
    by: _ByOption = None,
    tenant: TenantOption = None,
    as_json: JsonOption = False,
) -> None:
    """End a silence before its time."""
    ids = [row["silence_id"] for row in _read("list_alert_silences", tenant)]
    wanted = silence_id.strip().lower()
    whole = only_id(ids, wanted, "silence", tenant_identity(tenant), "agent alerts silences --all")
    ended = _read("end_alert_silence", tenant, the_silence_id=whole, ended_by=by or _who())
    if as_json:
        say_json({"ended": ended})
    else:
        say("The silence is over." if ended else "It was over already.")


@app.command("test", epilog=EXIT_CODES)
def try_sinks(as_json: JsonOption = False) -> None:
    """Send a notice that is marked as a test to every sink that the settings name. Nothing is stored."""
    from agent.monitoring.alert_sinks import configured_sinks

    sinks = configured_sinks(settings())
    outcomes = asyncio.run(_try_all(sinks, _test_notice()))
    if as_json:
        say_json(outcomes)
    else:
        for outcome in outcomes:
            say(f"{outcome['sink']}: {outcome['error'] or 'sent'}")
        if len(sinks) == 1:
            remark(
                "Only the log is set up. docs/howto/alerts.md says how to add Slack, Telegram, a webhook or mail."
            )
    if any(outcome["error"] for outcome in outcomes):
        raise typer.Exit(1)


async def _try_all(sinks: list[Sink], notice: Notice) -> list[dict[str, Any]]:
    from agent.monitoring.alert_sinks import DeliveryFailed

    async def attempt(sink: Sink) -> dict[str, Any]:
        try:
            async with asyncio.timeout(30):
                await sink.send(notice)
        except DeliveryFailed as failed:
            return {"sink": sink.name, "error": str(failed)}
        except TimeoutError:
            return {"sink": sink.name, "error": "no answer within 30 seconds"}
        return {"sink": sink.name, "error": None}

    return await asyncio.gather(*(attempt(sink) for sink in sinks))


def _test_notice() -> Notice:
    from uuid import uuid4

    from agent.monitoring.notices import Notice

    now = datetime.now(UTC)
    return Notice(
        notice_id=str(uuid4()), kind="raised", at=now, tenant_id=settings().tenant, alert_id=str(uuid4()), cause="test",
        check="test", severity="info", title="This is a test",
        what="Somebody ran `agent alerts test`. Nothing is wrong.",
        advice="Nothing.", evidence={"sent_at": now.isoformat(timespec="seconds")}, since=now, resolved_at=None,
        times_seen=1, times_reopened=0, link=None,
    )  # fmt: skip


def _who() -> str:
    """The user of this machine, where it knows a name."""
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # in a container that runs under a number alone
        return "command line"


def _read(function: str, tenant: str | None, **arguments: Any) -> Any:
    async def call() -> Any:
        async with opened_database() as database:
            return await database.call(function, tenant_identity(tenant), **arguments)

    return asyncio.run(call())
