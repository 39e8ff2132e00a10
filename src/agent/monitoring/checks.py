"""What a check is: a name, and a function that looks and tells what it found."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from agent.database.protocol import Database
from agent.monitoring.findings import Finding
from agent.monitoring.readings import Readings, read_readings
from agent.settings import Settings


@dataclass(kw_only=True)
class Look:
    """One look at everything. What several checks read is read once, by the first that asks."""

    database: Database
    settings: Settings
    budget: timedelta
    """Longest time that one check may take."""
    _asked: dict[str, asyncio.Future[Any]] = field(default_factory=dict)

    async def readings(self) -> Readings:
        """The series of readings, brought up to date."""
        found: Readings = await self._once("readings", lambda: read_readings(self.database, self.settings))
        return found

    async def state(self) -> dict[str, Any]:
        """What is so right now, as `monitor_state` tells it."""
        found: dict[str, Any] = await self._once("state", lambda: self.database.call("monitor_state"))
        return found

    async def security(self) -> dict[str, Any]:
        """What bears on safety, as `monitor_security` tells it."""
        found: dict[str, Any] = await self._once(
            "security", lambda: self.database.call("monitor_security", history_days=14)
        )
        return found

    async def once(self, name: str, read: Callable[[], Awaitable[Any]]) -> Any:
        """What `read` gives, read once for all checks that ask by this name."""
        return await self._once(name, read)

    async def _once(self, name: str, read: Callable[[], Awaitable[Any]]) -> Any:
        if name not in self._asked:
            self._asked[name] = asyncio.ensure_future(read())
        return await asyncio.shield(self._asked[name])

    async def aclose(self) -> None:
        """Give up what is still being read."""
        for asked in self._asked.values():
            asked.cancel()
        await asyncio.gather(*self._asked.values(), return_exceptions=True)

    def tenant(self, tenant_id: str) -> str | None:
        """The tenant of a finding: `None` for the deployment's own."""
        return None if tenant_id in ("", self.settings.tenant) else tenant_id


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing that the monitor looks at, apart from all others."""

    name: str
    about: str
    """What it looks for, in a line."""
    find: Callable[[Look], Awaitable[list[Finding]]]


def a_time(text: str | None, otherwise: str) -> datetime:
    """A time as Postgres writes it in JSON."""
    return datetime.fromisoformat(text or otherwise)


def for_people(seconds: float) -> str:
    """A duration in its largest unit: `3 minutes`, `2.5 hours`."""
    for unit, length in (("days", 86_400), ("hours", 3_600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.3g} {unit}"
    return f"{seconds:.3g} seconds"
