"""The monitor: looks at everything every few minutes, once for all replicas, and has alerts raised from it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

from agent import telemetry
from agent.clock import Clock, Tick
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
from agent.portal import portal
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
    """Looks at everything every `interval_minutes`, in one of all replicas that run it.

    Made without I/O. Safe from any event loop: the work is done in the portal.

    Args:
        interval_minutes: from look to look; `None` is `monitor_interval` of the settings, by default 5.
        settings: instead of those of the environment.
        database: instead of the one that the settings name.
        checks: instead of all.
        alerts: instead of alerts to the sinks that the settings name.

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
        self._checks = tuple(checks)
        self._alerts = alerts
        self._clock: Clock | None = None

    @property
    def settings(self) -> Settings:
        """Its settings; those of the environment are read at the first use."""
        if self._given_settings is None:
            self._given_settings = current_settings()
        return self._given_settings

    @property
    def database(self) -> Database:
        """Where it looks and keeps what it measures."""
        if self._given_database is None:
            from agent.database import open_database

            self._given_database = open_database(self.settings)
        return self._given_database

    @property
    def interval(self) -> timedelta:
        """From look to look."""
        if self._interval_minutes is None:
            return self.settings.monitor_interval
        return timedelta(minutes=self._interval_minutes)

    @property
    def is_running(self) -> bool:
        """Whether it was started and not stopped."""
        return self._clock is not None

    async def start(self) -> None:
        """Look from now on, once per interval for all replicas. A database that is away is waited for."""
        if self._clock is None:
            self._clock = Clock(
                CLOCK_NAME, self.interval, database=self.database, settings=self.settings, cycle=self._cycle
            )
            await self._clock.start()

    async def stop(self) -> None:
        """Stop; a look that runs is finished, for `exit_timeout` at most."""
        clock, self._clock = self._clock, None
        if clock is not None:
            await clock.stop()

    async def run_once(self) -> MonitorReport:
        """Look at everything now, whatever the clock says, and raise, keep and resolve alerts.

        A check that fails is a finding and an event; the others go on, and alerts of its own stay as they are.

        Raises:
            ConfigurationError: the settings name a sink and not what it needs.
            DatabaseUnavailable: there is nothing to look at.
        """
        return await portal().run(self._look())

    async def _cycle(self, tick: Tick) -> None:
        await self._look()

    async def _look(self) -> MonitorReport:
        began = time.monotonic()
        if self._alerts is None:
            self._alerts = Alerts(self.settings, self.database)
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
