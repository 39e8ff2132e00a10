"""What the monitor reads: series of readings by five minutes and by hours, and how detectors see them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from agent.database.protocol import Database
from agent.monitoring.detectors import Count, Level
from agent.monitoring.exact_tests import weighted_median
from agent.settings import Settings

LOOK = timedelta(minutes=5)
"""Length of a reading."""
_HOUR = timedelta(hours=1)
_RECENT_HOURS = 12
_HISTORY_DAYS = 14
_SERIES_MAX = 300
_REFRESH_SECONDS = 20.0


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What happened in five minutes, or in an hour."""

    at: datetime
    events: int
    failures: int
    total: float
    squares: float
    middle: float | None
    """Median of the values; of an hour the median of its readings. `None`: there were no values."""

    @classmethod
    def from_row(cls, row: Sequence[Any]) -> Reading:
        """A reading as `monitor_readings` writes it."""
        return cls(
            at=datetime.fromtimestamp(row[0], UTC),
            events=int(row[1]),
            failures=int(row[2]),
            total=float(row[3]),
            squares=float(row[4]),
            middle=None if row[5] is None else float(row[5]),
        )


@dataclass(frozen=True, kw_only=True)
class Series:
    """One thing that is watched."""

    tenant_id: str
    """Empty for what belongs to no tenant."""
    measure: str
    agent_id: str
    part: str
    """Tool, kind of outcome or table; else empty."""
    recent: tuple[Reading, ...]
    """By five minutes, the last twelve hours and what has passed of this one."""
    hours: tuple[Reading, ...]
    """Before them, by hours."""
    now: datetime
    first_at: datetime
    """Since when anything is measured."""

    @classmethod
    def from_row(cls, row: Mapping[str, Any], *, now: datetime, first_at: datetime) -> Series:
        """A series as `monitor_readings` writes it."""
        return cls(
            tenant_id=row["tenant_id"],
            measure=row["measure"],
            agent_id=row["agent_id"],
            part=row["part"],
            recent=tuple(map(Reading.from_row, row["recent"])),
            hours=tuple(map(Reading.from_row, row["hours"])),
            now=now,
            first_at=first_at,
        )

    def shares(self) -> tuple[list[Count], list[Count]]:
        """Failures among events: recent looks without a gap, and the hours before them.

        Where little is known, a third of it is recent and the rest history.
        """
        known = self.now - self.first_at
        since = self.now - min(timedelta(hours=_RECENT_HOURS), known / 3)
        begin = _whole(since, LOOK)
        by_time = {reading.at: reading for reading in self.recent}
        looks = []
        at = begin
        while at <= self.now:
            reading = by_time.get(at)
            looks.append(
                Count(
                    at=at,
                    exposure=reading.events if reading else 0,
                    events=reading.failures if reading else 0,
                )
            )
            at += LOOK
        earlier = [reading for reading in self.recent if reading.at < begin]
        hours = [
            Count(at=hour.at, exposure=hour.events, events=hour.failures)
            for hour in (*self.hours, *by_hour(earlier))
        ]
        return looks, hours

    def levels(self) -> tuple[list[Level], list[Level]]:
        """Medians of the values: those of the last hour, and hours before."""
        begin = self.now - _HOUR
        recent = [reading for reading in self.recent if reading.at >= begin]
        earlier = [reading for reading in self.recent if reading.at < begin]
        return _levels(recent), _levels((*self.hours, *by_hour(earlier)))

    def since(self, begin: datetime) -> Reading | None:
        """All that happened since then, as one reading without a median; `None` where nothing did."""
        found = [reading for reading in (*self.hours, *self.recent) if reading.at >= begin]
        return _sum(found[0].at, found) if found else None


@dataclass(frozen=True, kw_only=True)
class Readings:
    """All series that had events lately."""

    now: datetime
    series: tuple[Series, ...]
    left_out: int
    """Series with the fewest events that were not read, because there are more than 300."""

    def of(self, *measures: str) -> Iterable[Series]:
        """The series of these measures."""
        return (series for series in self.series if series.measure in measures)


def by_hour(readings: Iterable[Reading]) -> list[Reading]:
    """The readings added up by hours, in order."""
    hours: dict[datetime, list[Reading]] = {}
    for reading in readings:
        hours.setdefault(_whole(reading.at, _HOUR), []).append(reading)
    return [_sum(at, found) for at, found in sorted(hours.items())]


def _sum(at: datetime, readings: Sequence[Reading]) -> Reading:
    valued = [(reading.middle, reading.events) for reading in readings if reading.middle is not None]
    return Reading(
        at=at,
        events=sum(reading.events for reading in readings),
        failures=sum(reading.failures for reading in readings),
        total=sum(reading.total for reading in readings),
        squares=sum(reading.squares for reading in readings),
        middle=weighted_median([one for one, _ in valued], [many for _, many in valued]) if valued else None,
    )


def _levels(readings: Iterable[Reading]) -> list[Level]:
    return [
        Level(at=reading.at, events=reading.events, middle=reading.middle)
        for reading in readings
        if reading.middle is not None and reading.middle > 0
    ]


def _whole(at: datetime, step: timedelta) -> datetime:
    """The begin of the step that this time is in, counted from 1970."""
    seconds = int(step.total_seconds())
    return datetime.fromtimestamp(int(at.timestamp()) // seconds * seconds, UTC)


async def refresh_readings(database: Database, settings: Settings) -> None:
    """Measure what ended or came in, in short steps, for at most 20 seconds."""
    target_ms = float(settings.target_response_time.total_seconds() * 1000)
    end = time.monotonic() + _REFRESH_SECONDS
    while (await database.call("refresh_readings", target_ms=target_ms))["more"] and time.monotonic() < end:
        pass


async def read_readings(database: Database, settings: Settings) -> Readings:
    """Bring the readings up to date and read them: two calls.

    The first times there are seven days to measure, an hour at a call and the latest first; what a look has no time for
    a later one goes on with.
    """
    await refresh_readings(database, settings)
    found = await database.call(
        "monitor_readings",
        recent_hours=_RECENT_HOURS,
        history_days=_HISTORY_DAYS,
        series_limit=_SERIES_MAX,
    )
    now = datetime.fromisoformat(found["now"])
    first_at = datetime.fromisoformat(found["first_at"]) if found["first_at"] else now
    return Readings(
        now=now,
        series=tuple(Series.from_row(row, now=now, first_at=first_at) for row in found["series"]),
        left_out=found["left_out"],
    )
