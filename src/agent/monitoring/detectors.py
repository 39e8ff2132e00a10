"""Whether something changed: pure functions over counts and levels, made for few data and for many looks.

Three of them: `watch_events` for what happens more often than it used to, `watch_level` for what takes more than it
used to, `misses_share` and `misses_mean` for what is held against a target.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from agent.monitoring.exact_tests import (
    binomial_head,
    binomial_tail,
    median,
    poisson_tail,
    robust_scale,
    student_tail,
    weighted_median,
)

RATIO = 2.0
"""The change that is looked for: so many times as often. Others are found too, larger ones sooner."""

# Expected events per look -> threshold of the cumulated sum, so that Poisson events at an unchanged rate reach it 0.8
# times in 2,016 looks, which is a week of looks every five minutes. Solved with the Markov chain of Brook and Evans
# (1972) over 500 states; a test solves it again. Below the first and above the last the threshold stays: fewer than
# five events are never enough, and where many are expected a doubling is seen at once anyway.
_LOOK_SIZES = (0.05, 0.1, 0.2, 0.5, 1.0, 5 / 3, 3.0, 5.0)
_THRESHOLDS = (3.50, 4.09, 4.66, 5.31, 5.71, 5.94, 6.04, 6.09)

_ABOVE_THRESHOLD_MAX = 1.0  # so that what is over is seen to be over
_CLEARED_BELOW = 0.5  # of the threshold
_HOURS_OF_DAY = 24
_OWN_EVENTS = 8.0  # of an hour of the day, from which on it counts more than the whole day
_OUTLIER = 1e-5
_OF_LARGE_SHARES = 0.75  # from the simulation in benchmarks/


@dataclass(frozen=True, kw_only=True)
class Count:
    """How often something happened in a stretch of time."""

    at: datetime
    """When the stretch began, with a time zone."""
    exposure: float
    """How often it could have happened: trials, or the time in hours where events have no trials."""
    events: int


@dataclass(frozen=True, kw_only=True)
class Shift:
    """A change that is there now."""

    since: datetime
    """Begin of the stretch from which on it looks changed."""
    events: int
    """Seen since then."""
    expected: float
    """Expected since then, as before the change."""
    exposure: float
    chance: float
    """How likely so many or more are by chance, for this one stretch: the exact tail."""

    @property
    def ratio(self) -> float:
        """How many times as often as expected."""
        return self.events / self.expected if self.expected > 0 else math.inf


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """How often something happens by the hour of the day (UTC), as its history has it."""

    rates: tuple[float, ...]
    """Per exposure, one for each hour of the day."""
    dispersion: float
    """Variance of the hourly counts over their mean; 1 for Poisson, never less."""
    events: int
    is_share: bool
    """Whether exposures are trials, so that a rate is a probability."""

    def rate(self, at: datetime) -> float:
        """Expected events for each exposure at this time."""
        return self.rates[at.hour]


def fit_baseline(history: Sequence[Count], *, is_share: bool) -> Baseline:
    """The baseline of a history by hours.

    Hours that do not fit their own hour of other days are left out, so that an incident does not become the norm. Hours
    of the day with few events lean on the whole day. An unknown rate counts as one event in five trials, or two hours.
    """
    kept = _without_outliers(history)
    prior = 5.0 if is_share else 2.0
    exposure = sum(count.exposure for count in kept)
    events = sum(count.events for count in kept)
    overall = (events + 1) / (exposure + prior)
    by_hour_exposure, by_hour_events = _by_hour(kept)
    smoothed = []
    for hour in range(_HOURS_OF_DAY):
        near = ((hour, 1.0), (hour - 1, 0.5), ((hour + 1) % _HOURS_OF_DAY, 0.5))
        seen = sum(by_hour_events[other] * weight for other, weight in near)
        could = sum(by_hour_exposure[other] * weight for other, weight in near)
        smoothed.append((seen + _OWN_EVENTS) / (could + _OWN_EVENTS / overall))
    expected = [smoothed[count.at.hour] * count.exposure for count in kept]
    total = sum(expected)
    squares = sum((count.events - mean) ** 2 for count, mean in zip(kept, expected, strict=True))
    # Less its own error, or every second Poisson series would count as scattered.
    dispersion = max(1.0, squares / total - math.sqrt(0.5 / len(kept))) if total > 0 else 1.0
    # What is known from few events may be higher than it looks: one standard error.
    doubt = 1.0 + math.sqrt(dispersion / (events + 1))
    most = 0.95 if is_share else math.inf
    return Baseline(
        rates=tuple(min(rate * doubt, most) for rate in smoothed),
        dispersion=dispersion,
        events=events,
        is_share=is_share,
    )


def _by_hour(counts: Iterable[Count]) -> tuple[list[float], list[float]]:
    exposures = [0.0] * _HOURS_OF_DAY
    events = [0.0] * _HOURS_OF_DAY
    for count in counts:
        exposures[count.at.hour] += count.exposure
        events[count.at.hour] += count.events
    return exposures, events


def _without_outliers(history: Sequence[Count]) -> list[Count]:
    """The hours whose events are not far above what other days had at that hour and those beside it."""
    exposures, events = _by_hour(history)
    by_day: dict[tuple[int, int], Count] = {(count.at.toordinal(), count.at.hour): count for count in history}
    kept = []
    for count in history:
        day, hour = count.at.toordinal(), count.at.hour
        others_events = others_exposure = 0.0
        for near in (hour - 1, hour, hour + 1):
            same_day = by_day.get((day, near % _HOURS_OF_DAY))
            others_events += events[near % _HOURS_OF_DAY] - (same_day.events if same_day else 0)
            others_exposure += exposures[near % _HOURS_OF_DAY] - (same_day.exposure if same_day else 0)
        if others_exposure > 0:
            expected = (others_events + 1) / others_exposure * count.exposure
            if count.events > 3 * expected and poisson_tail(count.events, expected) < _OUTLIER:
                continue
        kept.append(count)
    return kept


def threshold(expected_per_look: float) -> float:
    """The sum that counts as a change where so many events are expected per look."""
    if expected_per_look <= _LOOK_SIZES[0]:
        return _THRESHOLDS[0]
    if expected_per_look >= _LOOK_SIZES[-1]:
        return _THRESHOLDS[-1]
    after = bisect_left(_LOOK_SIZES, expected_per_look)
    low, high = math.log(_LOOK_SIZES[after - 1]), math.log(_LOOK_SIZES[after])
    part = (math.log(expected_per_look) - low) / (high - low)
    return _THRESHOLDS[after - 1] + part * (_THRESHOLDS[after] - _THRESHOLDS[after - 1])


@dataclass(kw_only=True)
class CumulatedSum:
    """Page's test: how much more likely what was seen is under a rate `RATIO` times as high, over the stretch that
    speaks most for it. It needs no window: a large change shows in one look, a small one in hours."""

    baseline: Baseline
    limit: float
    """The sum from which on it is a change; see `threshold`."""
    total: float = 0.0
    is_changed: bool = False
    stretch: list[Count] = field(default_factory=list)
    """The counts since the sum was last 0."""

    def add(self, count: Count) -> bool:
        """Take the next look into account; whether things are changed now."""
        rate = self.baseline.rate(count.at)
        if self.baseline.is_share:
            higher = min(RATIO * rate, (1 + rate) / 2)
            step = count.events * math.log(higher / rate) + (count.exposure - count.events) * math.log(
                (1 - higher) / (1 - rate)
            )
        else:
            step = count.events * math.log(RATIO) - count.exposure * rate * (RATIO - 1)
        self.total = min(
            max(self.total + step / self.baseline.dispersion, 0.0), self.limit + _ABOVE_THRESHOLD_MAX
        )
        if self.total == 0:
            self.stretch.clear()
        else:
            self.stretch.append(count)
        if self.is_changed:
            self.is_changed = self.total > _CLEARED_BELOW * self.limit
        else:
            self.is_changed = self.total >= self.limit
        return self.is_changed


def limit_for(baseline: Baseline, recent: Sequence[Count]) -> float:
    """The threshold for looks like these."""
    expected = sum(count.exposure * baseline.rate(count.at) for count in recent)
    limit = threshold(expected / max(len(recent), 1) / baseline.dispersion)
    # Steps of large shares are smaller than Poisson's and overshoot the limit less.
    return limit + _OF_LARGE_SHARES * sum(baseline.rates) / _HOURS_OF_DAY if baseline.is_share else limit


def watch_events(recent: Sequence[Count], history: Sequence[Count], *, is_share: bool) -> Shift | None:
    """Whether something happens more often now than its history says: at most one false alarm a week and series.

    Args:
        recent: the looks of the last hours, one after the other in equal steps, the last one now.
        history: hours before them; may be empty.
        is_share: whether exposures are trials (failures of so many runs) or hours.
    """
    baseline = fit_baseline(history, is_share=is_share)
    sums = CumulatedSum(baseline=baseline, limit=limit_for(baseline, recent))
    for count in recent:
        sums.add(count)
    if not sums.is_changed:
        return None
    events = sum(count.events for count in sums.stretch)
    exposure = sum(count.exposure for count in sums.stretch)
    expected = sum(count.exposure * baseline.rate(count.at) for count in sums.stretch)
    chance = (
        binomial_tail(events, round(exposure), expected / exposure)
        if is_share and exposure > 0
        else poisson_tail(events, expected)
    )
    first = next(count for count in sums.stretch if count.events)
    return Shift(since=first.at, events=events, expected=expected, exposure=exposure, chance=chance)


# --- levels -----------------------------------------------------------------------------------------------------

LEVEL_CHANCE = 1e-4
LEVEL_RATIO = 1.5
LEVEL_HISTORY_MIN = 8
_LEVEL_EVENTS_MIN = 3
_LEVEL_SCALE_MIN = 0.05  # 5 %: what always takes equally long may still vary by so much
_MAD_EFFICIENCY = (
    0.37  # of the median absolute deviation among normal values: so much of a value is one of freedom
)


@dataclass(frozen=True, kw_only=True)
class Level:
    """How much something took in a stretch of time."""

    at: datetime
    events: int
    middle: float
    """The median, above 0."""


@dataclass(frozen=True, kw_only=True)
class Rise:
    """A level that is higher than it used to be."""

    since: datetime
    middle: float
    usual: float
    events: int
    chance: float

    @property
    def ratio(self) -> float:
        """How many times the usual."""
        return self.middle / self.usual


def watch_level(recent: Sequence[Level], history: Sequence[Level]) -> Rise | None:
    """Whether something takes clearly more now than in its history, by medians of logarithms.

    Needs `LEVEL_HISTORY_MIN` hours of history and three events now; a rise below `LEVEL_RATIO` is none.

    Args:
        recent: stretches that together are at most as long as one of the history.
        history: hours before them.
    """
    recent = [level for level in recent if level.events and level.middle > 0]
    history = [level for level in history if level.events and level.middle > 0]
    events = sum(level.events for level in recent)
    if len(history) < LEVEL_HISTORY_MIN or events < _LEVEL_EVENTS_MIN:
        return None
    usual_by_hour = [_usual_level(history, hour) for hour in range(_HOURS_OF_DAY)]
    usual = usual_by_hour[recent[-1].at.hour]
    residuals = [math.log(level.middle) - usual_by_hour[level.at.hour] for level in history]
    now = weighted_median([math.log(level.middle) for level in recent], [level.events for level in recent])
    typical = median([level.events for level in history])
    scale = max(robust_scale(residuals), _LEVEL_SCALE_MIN) * math.sqrt(max(1.0, typical / events))
    score = (now - usual) / (
        scale * math.sqrt(1 + 1.57 / len(history))
    )  # 1.57: variance of a median against a mean's
    chance = student_tail(score, max(_MAD_EFFICIENCY * len(history), 1.0))
    if chance >= LEVEL_CHANCE or now - usual < math.log(LEVEL_RATIO):
        return None
    return Rise(since=recent[0].at, middle=math.exp(now), usual=math.exp(usual), events=events, chance=chance)


def _usual_level(history: Sequence[Level], hour: int) -> float:
    """The median logarithm around this hour of the day where at least five hours tell it, else of all hours."""
    near = {(hour - 1) % _HOURS_OF_DAY, hour, (hour + 1) % _HOURS_OF_DAY}
    own = [math.log(level.middle) for level in history if level.at.hour in near]
    return median(own if len(own) >= 5 else [math.log(level.middle) for level in history])


# --- targets ----------------------------------------------------------------------------------------------------

TARGET_CHANCE = 1e-3


def misses_share(events: int, trials: int, target: float, *, at_least: bool) -> float | None:
    """The chance of a share so far on the wrong side of its target, if it is below `TARGET_CHANCE`; else `None`.

    Args:
        events: what counts, such as resolved conversations.
        trials: of so many.
        target: between 0 and 1.
        at_least: whether the target is the least share, else it is the largest.
    """
    if trials == 0:
        return None
    chance = binomial_head(events, trials, target) if at_least else binomial_tail(events, trials, target)
    return chance if chance < TARGET_CHANCE else None


def misses_mean(count: int, total: float, squares: float, target: float) -> float | None:
    """The chance of a mean so far below its target, if it is below `TARGET_CHANCE`; else `None`. Needs ten values.

    Args:
        count: so many values.
        total: their sum.
        squares: the sum of their squares.
        target: the least mean.
    """
    if count < 10:
        return None
    mean = total / count
    variance = max((squares - count * mean * mean) / (count - 1), 1e-6)  # equal values still have an error
    chance = student_tail((target - mean) / math.sqrt(variance / count), count - 1)
    return chance if chance < TARGET_CHANCE else None
