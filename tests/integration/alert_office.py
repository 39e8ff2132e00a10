"""What the tests of alerts share: findings, sinks that remember, and the clock of the rows turned back."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from agent.database import Database
from agent.database.postgres import PostgresDatabase
from agent.identity import Identity
from agent.monitoring.alert_sinks import DeliveryFailed
from agent.monitoring.alerts import Alerts
from agent.monitoring.findings import Finding
from agent.monitoring.notices import Notice
from agent.testing.throwaway import ThrowawayDatabase
from tests.integration.rows import rows, value

SINCE = datetime(2026, 11, 20, 8, 0, tzinfo=UTC)
NOBODY = Identity()


def finding(cause: str = "error_rate:agent=support", **changes: Any) -> Finding:
    """A finding of the check that the cause begins with."""
    given: dict[str, Any] = {
        "cause": cause,
        "check": cause.partition(":")[0],
        "severity": "warning",
        "title": "Agent support fails twice as often as usual",
        "what": "12 of 40 runs failed in the last half hour; 3 of 40 are usual.",
        "since": SINCE,
        "evidence": {"failed": 12, "runs": 40, "usual": 0.075},
        "advice": "Look at `agent runs list --failed`.",
    }
    return Finding(**(given | changes))


class Recorder:
    """A sink that remembers, and fails as long as it is told to."""

    def __init__(self, name: str = "recorder") -> None:
        self.name = name
        self.notices: list[Notice] = []
        self.fails: DeliveryFailed | Exception | None = None

    async def send(self, notice: Notice) -> None:
        """Keep it, or fail."""
        if self.fails is not None:
            raise self.fails
        self.notices.append(notice)

    @property
    def kinds(self) -> list[str]:
        """What it was told, in order."""
        return [notice.kind for notice in self.notices]


@dataclass
class AlertOffice:
    """Alerts over a database of their own."""

    throwaway: ThrowawayDatabase
    database: Database
    sink: Recorder = field(default_factory=Recorder)

    def alerts(self, *sinks: Any, **changes: Any) -> Alerts:
        """Alerts of a deployment, as each replica has them."""
        settings = self.throwaway.settings.model_copy(update=changes)
        return Alerts(settings, self.database, sinks or [self.sink])

    async def round(
        self, *found: Finding, checked: Iterable[str] = ("error_rate",), **changes: Any
    ) -> list[str]:
        """One round of the monitor, told at once. Returns the kinds of its notices."""
        alerts = self.alerts(**changes)
        notices = await alerts.report(found, set(checked))
        await alerts.deliver(patience=timedelta(0))
        return [notice.kind for notice in notices]

    def age(self, hours: float) -> None:
        """As if all that is there had happened so many hours earlier."""
        back = f"interval '{hours * 3600} seconds'"
        for table, columns in {
            "agent_alert": ("raised_at", "opened_at", "last_seen_at", "resolved_at", "reminded_at"),
            "agent_alert_notice": ("at",),
            "agent_alert_delivery": ("at", "next_attempt_at", "sent_at"),
            "agent_alert_silence": ("made_at", "until"),
        }.items():
            changes = ", ".join(f"{column} = {column} - {back}" for column in columns)
            rows(self.throwaway.url, f"UPDATE {table} SET {changes}")

    async def listed(self, **wanted: Any) -> list[dict[str, Any]]:
        """The alerts of the deployment's own tenant."""
        found: list[dict[str, Any]] = await self.database.call("list_alerts", NOBODY, wanted=wanted)
        return found

    async def silence(self, pattern: str, seconds: float = 3600, by: str = "ada") -> dict[str, Any]:
        """A silence of the deployment's own tenant."""
        made: dict[str, Any] = await self.database.call(
            "silence_alerts",
            NOBODY,
            silence={"pattern": pattern, "seconds": seconds, "made_by": by, "why": "known"},
        )
        return made

    def deliveries(self) -> list[tuple[str, str, int]]:
        """Sink, state and attempts of each delivery, in order."""
        return rows(
            self.throwaway.url, "SELECT sink, state, attempts FROM agent_alert_delivery ORDER BY at, sink"
        )

    def count(self, table: str = "agent_alert") -> int:
        """How many rows there are."""
        return int(value(self.throwaway.url, f"SELECT count(*) FROM {table}"))


@asynccontextmanager
async def alert_office(throwaway: ThrowawayDatabase) -> AsyncIterator[AlertOffice]:
    """An office over this database."""
    database = PostgresDatabase(throwaway.url)
    try:
        yield AlertOffice(throwaway, database)
    finally:
        await database.close()
