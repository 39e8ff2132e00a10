"""The monitor: looks at everything every few minutes, once for all replicas, and has alerts raised from it."""

from __future__ import annotations

import asyncio
import contextvars
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

from agent import telemetry
from agent.clock import Clock, Tick
from agent.database import open_database
from agent.errors import ConfigurationError, DatabaseUnavailable
from agent.events import emit
from agent.monitoring import (
    checks_database,
    checks_errors,
    checks_operations,
    checks_performance,
    checks_security,
)
from agent.monitoring.alerts import Alerts
from agent.monitoring.checks import Check, Look
from agent.monitoring.findings import SEVERITIES, Finding, cause_of
from agent.portal import portal, workbench
from agent.settings import current_settings

if TYPE_CHECKING:
    from agent.database import Database
    from agent.settings import Settings

CLOCK_NAME: Final = "monitor"
CHECKS: Final = (
    *checks_performance.CHECKS,
    *checks_operations.CHECKS,
    *checks_database.CHECKS,
    *checks_errors.CHECKS,
    *checks_security.CHECKS,
)
OWN_CHECK: Final = "monitor"
"""Name of the check under which a check that fails is found."""
_CHECK_BUDGET = timedelta(seconds=60)
_ERROR_CHARACTERS_MAX = 300


@dataclass(frozen=True, kw_only=True)
class CheckReport:
    """What became of one check."""

    name: str
    about: str
    seconds: float
    findings: int
    error: str | None
    """Class and message of what it failed with; `None`: it looked."""


@dataclass(frozen=True, kw_only=True)
class MonitorReport:
    """What one look found."""

    at: datetime
    checks: tuple[CheckReport, ...]
    findings: tuple[Finding, ...]
    """The gravest first."""
    notices: int
    """How many things there were to tell: alerts raised, worsened, reminded of, resolved."""
    sent: int
    """How many notices went to a sink, earlier ones among them."""

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "at": self.at.isoformat(),
            "checks": [asdict(check) for check in self.checks],
            "notices": self.notices,
            "sent": self.sent,
            "findings": [asdict(one) | {"since": one.since.isoformat()} for one in self.findings],
        }


class ContinuousMonitor:
    """Looks at everything once per interval, in one of the replicas that run it.

    Nothing is read or contacted before it is started or run. The methods may be called in any event loop; each has a
    sync door with `_sync` behind its name.

    Args:
        interval_minutes: time between two looks; `None` is `settings.monitor_interval`, by default 5 minutes.
        settings: by default those of the environment.
        database: by default that of the settings.
        checks: what is looked at; by default everything.
        alerts: who is told; by default the sinks of the settings.

    Raises:
        ConfigurationError: the interval is not more than 0.
    """

    def __init__(
        self,
        interval_minutes: float | None = None,
        *,
        settings: Settings | None = None,
        database: Database | None = None,
        checks: Sequence[Check] = CHECKS,
        alerts: Alerts | None = None,
    ) -> None:
        if interval_minutes is not None and not interval_minutes > 0:
            raise ConfigurationError(f"interval_minutes={interval_minutes!r} must be more than 0")
        self._interval_minutes = interval_minutes
        self._given_settings = settings
        self._given_database = database
        self._given_alerts = alerts
        self._checks = tuple(checks)

    @cached_property
    def settings(self) -> Settings:
        """The settings, read when first asked for."""
        return self._given_settings or current_settings()

    @cached_property
    def database(self) -> Database:
        """Where it looks and keeps what it measures, opened when first called."""
        return self._given_database or open_database(self.settings)

    @cached_property
    def clock(self) -> Clock:
        """What starts the looks."""
        minutes = self._interval_minutes
        interval = self.settings.monitor_interval if minutes is None else timedelta(minutes=minutes)
        return Clock(
            CLOCK_NAME, interval, database=self.database, settings=self.settings, cycle=self._do_tick
        )

    @property
    def is_running(self) -> bool:
        """Whether it was started and not stopped."""
        return "clock" in vars(self) and self.clock.is_running

    @cached_property
    def _alerts(self) -> Alerts:
        return self._given_alerts or Alerts(self.settings, self.database)

    async def start(self) -> None:
        """Look now where this slot's look was not done, then once per interval; wait for a database that is away."""
        await self.clock.start()

    async def stop(self) -> None:
        """Stop. A look that runs gets `exit_timeout`; what was not looked at another replica does."""
        await self.clock.stop()

    async def run_once(self) -> MonitorReport:
        """Look at everything now, whatever the clock says, and raise, keep and resolve alerts.

        A check that fails is a finding and an event; the others go on, and alerts of its own stay as they are.

        Raises:
            ConfigurationError: the settings name a sink and not what it needs.
            DatabaseUnavailable: there is nothing to look at.
        """
        return await portal().run(self._look())

    def start_sync(self) -> None:
        """`start` from a thread without an event loop."""
        portal().run_sync(self.start())

    def stop_sync(self) -> None:
        """`stop` from a thread without an event loop."""
        portal().run_sync(self.stop())

    def run_once_sync(self) -> MonitorReport:
        """`run_once` from a thread without an event loop."""
        return portal().run_sync(self.run_once())

    async def _do_tick(self, tick: Tick) -> None:
        await self._look()

    async def _look(self) -> MonitorReport:
        # Beside the portal's loop: judging hundreds of series takes time that the calls of agents would wait for.
        looking = workbench().submit(self._look_at_everything(), context=contextvars.copy_context())
        return await asyncio.wrap_future(looking)

    async def _look_at_everything(self) -> MonitorReport:
        began = time.monotonic()
        look = Look(database=self.database, settings=self.settings, budget=_CHECK_BUDGET)
        try:
            async with asyncio.timeout(_CHECK_BUDGET.total_seconds()):
                state = await look.state()
            results = await asyncio.gather(*(_checked(check, look) for check in self._checks))
        except TimeoutError:
            raise DatabaseUnavailable(f"the database did not answer within {_CHECK_BUDGET}") from None
        finally:
            await look.aclose()
        reports = [report for report, _ in results]
        findings = [finding for _, found in results for finding in found]
        findings.sort(key=lambda one: (-SEVERITIES.index(one.severity), one.cause))
        looked = {OWN_CHECK, *(one.name for one in reports if one.error is None)}
        notices = await self._alerts.report(findings, looked)
        report = MonitorReport(
            at=datetime.fromisoformat(state["now"]).astimezone(UTC),
            checks=tuple(reports),
            findings=tuple(findings),
            notices=len(notices),
            sent=await self._alerts.deliver(),
        )
        emit(
            "monitor_looked",
            checks=len(reports),
            failed=[one.name for one in reports if one.error is not None],
            findings=len(findings),
            notices=report.notices,
            seconds=round(time.monotonic() - began, 3),
        )
        return report


async def _checked(check: Check, look: Look) -> tuple[CheckReport, list[Finding]]:
    """The check done, within its time; what it fails with is told and found."""
    began = time.monotonic()
    error: str | None = None
    try:
        with telemetry.span(f"monitor_check {check.name}", {"learning.check": check.name}) as span:
            async with asyncio.timeout(look.budget.total_seconds()):
                found = await check.find(look)
            span.set_attribute("learning.findings", len(found))
    except Exception as raised:  # noqa: BLE001 - one check must not stop the others, whatever is wrong with it
        error = f"{type(raised).__name__}: {raised}"[:_ERROR_CHARACTERS_MAX]
        emit("monitor_check_failed", check=check.name, error=error)
        found = [_failed(check, error)]
    report = CheckReport(
        name=check.name,
        about=check.about,
        seconds=round(time.monotonic() - began, 3),
        findings=0 if error is not None else len(found),
        error=error,
    )
    return report, found


def _failed(check: Check, error: str) -> Finding:
    return Finding(
        cause=cause_of("monitor_check_failed", check=check.name),
        check=OWN_CHECK,
        severity="warning",
        title=f"The check {check.name} cannot look",
        what=f"Nobody watches for {check.about} as long as this is so.",
        since=datetime.now(UTC),
        evidence={"check": check.name, "error": error},
        advice="Read the error; the other checks go on.",
    )


continuous_monitor: Final = ContinuousMonitor()
"""The monitor of this process, by the settings of its environment."""
