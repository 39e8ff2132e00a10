"""The part of `agent demo` in which the layer finds out by itself: what the application holds, and what is wrong."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from agent.commands.output import heading, one_line, say
from agent.errors import OperatorError
from agent.portal import portal

if TYPE_CHECKING:
    from agent.discovery.structure import AppStructure
    from agent.learning.machine import LearningMachine
    from agent.monitoring.notices import Notice

_SCHEMA: Final = "shop"
_QUESTION: Final = "Which table holds what customers paid?"
_TOKENS: Final = 300
_MISTAKE: Final = "GRANT USAGE ON SCHEMA shop TO PUBLIC; GRANT UPDATE ON shop.orders TO PUBLIC"
_REMEDY: Final = "REVOKE USAGE ON SCHEMA shop FROM PUBLIC; REVOKE UPDATE ON shop.orders FROM PUBLIC"
_WIDTH: Final = 116


class _Told:
    """A sink of alerts that keeps what it is told."""

    name = "demo"

    def __init__(self) -> None:
        self.notices: list[Notice] = []

    async def send(self, notice: Notice) -> None:
        """Keep one."""
        self.notices.append(notice)


@dataclass(frozen=True, kw_only=True)
class DiscoveryDemo:
    """Discovers the sample shop's tables, which are there by now, and has the monitor look at them."""

    machine: LearningMachine

    def show(self) -> None:
        """The structure, the patterns, and one alert from its beginning to its end."""
        heading("\n6. What the application holds is found out")
        self._discover()
        heading("\n7. The monitor raises an alert, and resolves it")
        self._watch()

    def _discover(self) -> None:
        from agent.discovery.pattern_text import describe_table
        from agent.learning.auto_discover import AutoDiscovery
        from graphs.shop_tables import sell_notebooks

        say("  (The shop has sold 400 notebooks meanwhile.)")
        sell_notebooks(self._url)
        discovery = AutoDiscovery(settings=self.machine.settings, database=self.machine.database)
        found = discovery.discover_app_structure_sync([_SCHEMA], patterns=True)
        _say_structure(found)
        say("  Patterns of its data, from samples; of what is personal only the shape is kept:")
        for pattern in found.patterns:
            for line in describe_table(pattern).splitlines():
                say(f"    {one_line(line, _WIDTH)}")
        say(f"  What an agent is given for {_QUESTION!r}:")
        for line in discovery.render_sync(_QUESTION, _TOKENS).splitlines():
            say(f"    | {one_line(line, _WIDTH)}")

    def _watch(self) -> None:
        from agent.monitoring.alerts import Alerts
        from agent.monitoring.continuous_monitor import ContinuousMonitor
        from graphs.shop_tables import run_as_owner

        told = _Told()
        settings, database = self.machine.settings, self.machine.database
        monitor = ContinuousMonitor(
            settings=settings, database=database, alerts=Alerts(settings, database, sinks=[told])
        )

        report = portal().run_sync(monitor.run_once())
        say(f"  It makes {len(report.checks)} checks, every five minutes. Somebody makes a mistake:")
        for statement, kind in ((_MISTAKE, "raised"), (_REMEDY, "resolved")):
            say(f"    {statement}")
            run_as_owner(self._url, statement)
            told.notices.clear()
            portal().run_sync(monitor.run_once())
            notice = next(
                (one for one in told.notices if (one.kind, one.severity) == (kind, "critical")), None
            )
            if notice is None:
                raise OperatorError(
                    f"the monitor has {kind} no alert about {statement!r}; `agent monitor --once` says what it finds"
                )
            say(f"    {one_line(notice.headline, _WIDTH)}")
            if kind == "raised":
                say(f"      {one_line(notice.advice, _WIDTH)}")
                say("  It is told once, and again every few hours while it lasts. Somebody puts it right:")

    @property
    def _url(self) -> str:
        return portal().run_sync(self.machine.queue_url())


def _say_structure(found: AppStructure) -> None:
    kinds = Counter(table["kind"].replace("_", " ") for table in found.tables)
    counted = ", ".join(f"{count} {kind}{'s' if count > 1 else ''}" for kind, count in sorted(kinds.items()))
    say(f"  Schema {_SCHEMA}: {counted}; {len(found.functions)} functions. Relationships:")
    for link in found.relationships:
        how = "declared" if link["declared"] else "inferred from the values"
        say(
            f"    {link['from_table']} ({', '.join(link['from_columns'])}) → {link['to_table']} "
            f"({', '.join(link['to_columns'])}), {how}"
        )
