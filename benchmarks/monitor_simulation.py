"""`python -m benchmarks.monitor_simulation`: how often the monitor's detector is wrong, and how soon it is right.

Weeks of series are drawn at fixed seeds: event rates from 1 to 200 an hour, shares of failures, a pattern of the day,
more variance than Poisson has. Printed for each: false alarms a week, and the time to see a doubling, beside two usual
rules (twice the mean; three standard deviations) and beside the best tests there are for who knows the true rate and
the true change (`monitor_oracles.py`). All of it is also left in `benchmarks/results/monitor_simulation.md`.
"""

from __future__ import annotations

import math
import platform
import random
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from agent.monitoring.detectors import Baseline, Count, CumulatedSum, fit_baseline, limit_for
from agent.monitoring.exact_tests import poisson_tail
from benchmarks.environment import commit
from benchmarks.monitor_oracles import ORACLES, Oracle, threshold_for

RESULTS = Path(__file__).parent / "results" / "monitor_simulation.md"
LOOK = timedelta(minutes=5)
LOOKS_AN_HOUR = 12
LOOKS_A_WEEK = 7 * 24 * LOOKS_AN_HOUR
HISTORY_HOURS = 14 * 24
REFIT_LOOKS = 6 * LOOKS_AN_HOUR
WATCHED_LOOKS_MAX = 24 * LOOKS_AN_HOUR
WINDOW_LOOKS = 6
START = datetime(2026, 1, 5, tzinfo=UTC)
GOAL_MINUTES = 30.0
ORACLE_WEEKS = 4
"""For the thresholds of those who know all so many times the weeks that the others are looked at."""


@dataclass(frozen=True, kw_only=True)
class Series:
    """What is drawn."""

    name: str
    per_hour: float
    """Watched events an hour, over the day."""
    share: float | None = None
    """Of trials that are such an event; `None`: events have no trials."""
    daily: float = 0.0
    """Swing of the day: 0.8 is from 0.2 to 1.8 times the mean."""
    dispersion: float = 1.0
    """Variance over mean of the hourly counts."""


CASES = (
    *(Series(name=f"{rate:g} events an hour", per_hour=rate) for rate in (1, 5, 10, 20, 50, 100, 200)),
    Series(name="20 an hour, 5 % of 400 runs", per_hour=20, share=0.05),
    Series(name="20 an hour, 20 % of 100 runs", per_hour=20, share=0.2),
    Series(name="20 an hour, 33 % of 60 runs", per_hour=20, share=1 / 3),
    Series(name="2 an hour, 10 % of 20 runs", per_hour=2, share=0.1),
    Series(name="20 an hour, by day and night", per_hour=20, daily=0.8),
    Series(name="20 an hour of 400 runs, by day and night", per_hour=20, share=0.05, daily=0.8),
    Series(name="20 an hour, variance twice the mean", per_hour=20, dispersion=2.0),
    Series(name="50 an hour, day and night, variance 1.5 times", per_hour=50, daily=0.8, dispersion=1.5),
)


class Draw:
    """Looks of one series, one after the other."""

    def __init__(self, series: Series, seed: int) -> None:
        self._series = series
        self._random = random.Random(seed)
        self._hour: datetime | None = None
        self._factor = 1.0

    def look(self, at: datetime, times: float = 1.0) -> Count:
        """What a look at this time sees where events come so many times as often."""
        series = self._series
        hour = at.replace(minute=0)
        if series.dispersion > 1 and hour != self._hour:
            # Gamma rates, new each hour, make negative binomial counts of this dispersion.
            shape = series.per_hour / (series.dispersion - 1)
            self._factor = self._random.gammavariate(shape, 1 / shape)
        self._hour = hour
        expected = usual(series, at) * self._factor
        if series.share is None:
            return Count(at=at, exposure=1 / LOOKS_AN_HOUR, events=self.poisson(expected * times))
        trials = self.poisson(expected / series.share)
        share = min(series.share * times, 1.0)
        return Count(at=at, exposure=trials, events=sum(self._random.random() < share for _ in range(trials)))

    def poisson(self, mean: float) -> int:
        """Events of a look: exponential waits within it."""
        events, waited = 0, self._random.expovariate(1.0)
        while waited < mean:
            events += 1
            waited += self._random.expovariate(1.0)
        return events


def usual(series: Series, at: datetime) -> float:
    """How many events a look at this time has without a change, on average."""
    swing = 1 + series.daily * math.sin(2 * math.pi * (at.hour + at.minute / 60) / 24)
    return series.per_hour / LOOKS_AN_HOUR * swing


def log_ratio(series: Series, count: Count) -> float:
    """The logarithm of how much likelier a look is where events come twice as often, for who knows the series."""
    if series.share is None:
        return count.events * math.log(2) - usual(series, count.at)
    higher = min(2 * series.share, 1.0)
    return count.events * math.log(higher / series.share) + (count.exposure - count.events) * math.log(
        (1 - higher) / (1 - series.share)
    )


def oracles_for(series: Series, *, weeks: int, seed: int) -> dict[str, float]:
    """The thresholds of those who know all, for one false alarm a week; of scattered series nobody knows all."""
    if series.dispersion > 1:
        return {}
    draw = Draw(series, seed)
    ratios = [log_ratio(series, draw.look(START + LOOK * n)) for n in range(weeks * LOOKS_A_WEEK)]
    return {name: threshold_for(make, ratios, weeks) for name, make in ORACLES.items()}


def hours_of(looks: Sequence[Count]) -> list[Count]:
    """The looks, hour by hour."""
    return [
        Count(
            at=looks[first].at,
            exposure=sum(look.exposure for look in looks[first : first + LOOKS_AN_HOUR]),
            events=sum(look.events for look in looks[first : first + LOOKS_AN_HOUR]),
        )
        for first in range(0, len(looks) - LOOKS_AN_HOUR + 1, LOOKS_AN_HOUR)
    ]


class Rule:
    """A rule that says, look by look, whether something is changed."""

    def __init__(self, history: Sequence[Count], *, is_share: bool) -> None:
        self.is_share = is_share
        self.learn(history)

    def learn(self, history: Sequence[Count]) -> None:
        """Take a newer history."""
        raise NotImplementedError

    def add(self, count: Count) -> bool:
        """The next look."""
        raise NotImplementedError


class OurRule(Rule):
    """The monitor's: its cumulated sum, with the baseline of the hours before."""

    _sums: CumulatedSum | None = None

    def learn(self, history: Sequence[Count]) -> None:
        baseline: Baseline = fit_baseline(history, is_share=self.is_share)
        limit = limit_for(
            baseline,
            [Count(at=count.at, exposure=count.exposure / LOOKS_AN_HOUR, events=0) for count in history],
        )
        if self._sums is None:
            self._sums = CumulatedSum(baseline=baseline, limit=limit)
        self._sums.baseline, self._sums.limit = baseline, limit

    def add(self, count: Count) -> bool:
        assert self._sums is not None
        return self._sums.add(count)


class WindowRule(Rule):
    """A rule over the last half hour against a mean and a deviation of half hours."""

    def __init__(
        self, history: Sequence[Count], *, is_share: bool, limit: Callable[[float, float], float]
    ) -> None:
        self._limit = limit
        self._window: list[Count] = []
        super().__init__(history, is_share=is_share)

    def learn(self, history: Sequence[Count]) -> None:
        rates = [count.events / count.exposure for count in history if count.exposure > 0]
        self._reached = self._limit(statistics.fmean(rates), statistics.pstdev(rates) * math.sqrt(2))

    def add(self, count: Count) -> bool:
        self._window = [*self._window, count][-WINDOW_LOOKS:]
        exposure = sum(look.exposure for look in self._window)
        return exposure > 0 and sum(look.events for look in self._window) / exposure >= self._reached


RULES: dict[str, Callable[[Sequence[Count], bool], Rule]] = {
    "ours": lambda history, is_share: OurRule(history, is_share=is_share),
    "2x mean": lambda history, is_share: WindowRule(
        history, is_share=is_share, limit=lambda mean, _: 2 * mean
    ),
    "3 sigma": lambda history, is_share: WindowRule(
        history, is_share=is_share, limit=lambda mean, deviation: mean + 3 * deviation
    ),
}


@dataclass(frozen=True, kw_only=True)
class Found:
    """What one rule did on one series."""

    false_alarms_a_week: float
    median_minutes: float
    p90_minutes: float
    within_goal: float
    """Share of doublings seen within `GOAL_MINUTES`."""


def simulate(series: Series, *, weeks: int, doublings: int, seed: int) -> dict[str, Found]:
    """False alarms over weeks without a change, and times to see a doubling."""
    thresholds = oracles_for(series, weeks=ORACLE_WEEKS * weeks, seed=seed + 50_000)
    names = (*RULES, *thresholds)
    alarms = dict.fromkeys(names, 0)
    is_share = series.share is not None
    for week in range(weeks):
        draw = Draw(series, seed + week)
        looks = [draw.look(START + LOOK * n) for n in range(HISTORY_HOURS * LOOKS_AN_HOUR + LOOKS_A_WEEK)]
        hours = hours_of(looks)
        rules = {name: make(hours[:HISTORY_HOURS], is_share) for name, make in RULES.items()}
        oracles = {name: Oracle(ORACLES[name], limit) for name, limit in thresholds.items()}
        was = dict.fromkeys(RULES, False)
        for n, look in enumerate(looks[HISTORY_HOURS * LOOKS_AN_HOUR :]):
            for name, rule in rules.items():
                if n and n % REFIT_LOOKS == 0:
                    first = n // LOOKS_AN_HOUR
                    rule.learn(hours[first : first + HISTORY_HOURS])
                is_alarm = rule.add(look)
                alarms[name] += is_alarm and not was[name]
                was[name] = is_alarm
            for name, oracle in oracles.items():
                alarms[name] += oracle.add(log_ratio(series, look))
    minutes: dict[str, list[float]] = {name: [] for name in names}
    for number in range(doublings):
        draw = Draw(series, seed + 10_000 + number // 20)
        if number % 20 == 0:  # twenty doublings after each history
            looks = [draw.look(START + LOOK * n) for n in range(HISTORY_HOURS * LOOKS_AN_HOUR)]
            hours = hours_of(looks)
        sees: dict[str, Callable[[Count], bool]] = {
            name: make(hours, is_share).add for name, make in RULES.items()
        }
        for name, limit in thresholds.items():
            sees[name] = _knowing(series, Oracle(ORACLES[name], limit))
        begin = START + timedelta(hours=HISTORY_HOURS + number % 24)
        before = 6 * LOOKS_AN_HOUR
        for name, is_seen in sees.items():
            again = Draw(series, seed + 20_000 + number)  # the same for all
            for n in range(before):
                is_seen(again.look(begin + LOOK * (n - before)))
            seen = next(
                (n for n in range(WATCHED_LOOKS_MAX) if is_seen(again.look(begin + LOOK * n, 2.0))),
                None,
            )
            minutes[name].append(math.inf if seen is None else 5.0 * (seen + 1))
    return {
        name: Found(
            false_alarms_a_week=alarms[name] / weeks,
            median_minutes=statistics.median(minutes[name]),
            p90_minutes=sorted(minutes[name])[math.ceil(0.9 * doublings) - 1],
            within_goal=sum(each <= GOAL_MINUTES for each in minutes[name]) / doublings,
        )
        for name in names
    }


def _knowing(series: Series, oracle: Oracle) -> Callable[[Count], bool]:
    return lambda count: oracle.add(log_ratio(series, count))


def most_that_any_rule_sees(per_hour: float) -> float:
    """Upper bound of the share of doublings of a Poisson rate seen within half an hour, at one false alarm a week.

    A week has 336 half hours, so a rule may raise in one of 336 without a change; of all such rules for one half hour
    the likelihood ratio test sees most (Neyman and Pearson 1933), even if it knows the rate and when to begin.
    """
    usual = per_hour / 2
    allowed = 1 / 336
    least = next(events for events in range(10_000) if poisson_tail(events, usual) <= allowed)
    rest = (allowed - poisson_tail(least, usual)) / (
        poisson_tail(least - 1, usual) - poisson_tail(least, usual)
    )
    seen = poisson_tail(least, 2 * usual)
    return seen + rest * (poisson_tail(least - 1, 2 * usual) - seen)


def as_markdown(found: dict[str, dict[str, Found]], *, weeks: int, doublings: int) -> str:
    """Tables and the environment."""
    lines = [
        "# False alarms, and the time to see a doubling",
        "",
        f"Made by `python -m benchmarks.monitor_simulation` at commit {commit()}, Python {platform.python_version()}.",
        f"{weeks} weeks and {doublings} doublings of each series after 14 days of history, a look every five minutes,",
        "fixed seeds. Times are from the change to the look that sees it, in minutes; `never` is not within a day.",
        "",
        "| series | rule | false alarms a week | median | p90 | seen within 30 minutes |",
        "|---|---|---|---|---|---|",
    ]
    for series, rules in found.items():
        for name, one in rules.items():
            times = [
                "never" if math.isinf(each) else f"{each:g}" for each in (one.median_minutes, one.p90_minutes)
            ]
            lines.append(
                f"| {series} | {name} | {one.false_alarms_a_week:.2f} | {times[0]} | {times[1]} | "
                f"{one.within_goal:.0%} |"
            )
    worst = max(rules["ours"].false_alarms_a_week for rules in found.values())
    twenty = found["20 events an hour"]["ours"]
    knowing = [found["20 events an hour"][name] for name in ORACLES]
    knows_all = (
        "`knows all` are tests that are given the true rate and the true change, with a threshold found by simulation "
        "at which they raise once a week: Page's cumulated sum; Shiryaev and Roberts' sum, which has the least mean "
        "delay of all such tests; and the latter over the last half hour alone, made for this goal. At 20 events an "
        f"hour the best median among them is {min(one.median_minutes for one in knowing):g} minutes and the largest "
        f"share within 30 minutes {max(one.within_goal for one in knowing):.0%}; ours, which has to learn the rate, "
        f"has {twenty.median_minutes:g} minutes and {twenty.within_goal:.0%}."
    )
    lines += [
        "",
        "No rule with one false alarm a week sees more of the doublings of a Poisson rate within 30 minutes than "
        + ", ".join(f"{most_that_any_rule_sees(rate):.0%} at {rate} an hour" for rate in (10, 20, 50, 100))
        + " (Neyman and Pearson's bound for one half hour).",
        "",
        knows_all,
        "",
        "| goal | found | reached |",
        "|---|---|---|",
        f"| at most one false alarm a week and series | {worst:.2f} at worst | {_mark(worst <= 1)} |",
        *(
            f"| a doubling at 20 events an hour within 30 minutes, {name} | {found_minutes:g} minutes | "
            f"{_mark(found_minutes <= GOAL_MINUTES)} |"
            for name, found_minutes in (("median", twenty.median_minutes), ("90 of 100", twenty.p90_minutes))
        ),
        "",
    ]
    return "\n".join(lines)


def _mark(reached: bool) -> str:
    return "yes" if reached else "**no**"


def main(arguments: Sequence[str]) -> int:
    """Print the tables and keep them; `--quick` draws fewer weeks and keeps nothing."""
    quick = "--quick" in arguments
    weeks, doublings = (5, 60) if quick else (60, 600)
    found = {
        series.name: simulate(series, weeks=weeks, doublings=doublings, seed=1_000_000 * number)
        for number, series in enumerate(CASES, start=1)
    }
    text = as_markdown(found, weeks=weeks, doublings=doublings)
    print(text)
    if not quick:
        RESULTS.write_text(text, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
