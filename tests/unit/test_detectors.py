"""What the detectors find and what they leave alone, with few data and with many looks."""

from __future__ import annotations

import math
import random
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from agent.monitoring.detectors import (
    Count,
    CumulatedSum,
    Level,
    fit_baseline,
    limit_for,
    misses_mean,
    misses_share,
    threshold,
    watch_events,
    watch_level,
)

NOW = datetime(2026, 3, 20, 15, tzinfo=UTC)
LOOK = timedelta(minutes=5)
HOUR = timedelta(hours=1)


def hours(count: int, exposure: float, events: int) -> list[Count]:
    """So many equal hours before `NOW - 12 h`."""
    begin = NOW - timedelta(hours=12 + count)
    return [Count(at=begin + HOUR * n, exposure=exposure, events=events) for n in range(count)]


def looks(*events: int, exposure: float) -> list[Count]:
    """Looks up to now, the last of them with these events, quiet ones before."""
    given = [0] * (144 - len(events)) + list(events)
    return [
        Count(at=NOW - LOOK * (len(given) - n), exposure=exposure, events=each)
        for n, each in enumerate(given)
    ]


@pytest.mark.parametrize("expected", [0.1, 0.5, 5 / 3, 5.0])
def test_a_week_of_looks_reaches_the_threshold_less_than_once(expected: float) -> None:
    """Brook and Evans' chain over the states of the sum, solved here as it was for the table."""
    limit, states = threshold(expected), 500
    width = limit / states
    events = np.arange(int(stats.poisson.isf(1e-13, expected)) + 3)
    chances = stats.poisson.pmf(events, expected)
    steps = events * math.log(2) - expected
    moves = np.zeros((states, states))
    rows = np.arange(states)
    for chance, step in zip(chances, steps, strict=True):
        reached = np.maximum(0.0, rows * width + step)
        stays = reached < limit
        place = np.floor(reached / width).astype(int)
        part = reached / width - place
        for column, weight in ((place, 1 - part), (place + 1, part)):
            np.add.at(moves, (rows[stays], np.minimum(column, states - 1)[stays]), chance * weight[stays])
    mean_looks = np.linalg.solve(np.eye(states) - moves, np.ones(states))[0]

    assert 2_016 < mean_looks < 2 * 2_016


@given(st.floats(0, 1_000), st.floats(0, 1_000))
def test_the_threshold_is_between_its_ends(one: float, other: float) -> None:
    assert 3.5 <= threshold(one) <= 6.09
    if max(one, other) <= 5:
        assert threshold(min(one, other)) <= threshold(max(one, other)) + 1e-9


def test_what_is_as_usual_is_left_alone() -> None:
    usual = looks(*[1] * 144, exposure=10)
    assert watch_events(usual, hours(200, 120, 12), is_share=True) is None


def test_failures_that_quadruple_are_seen_and_dated() -> None:
    recent = looks(*[1] * 132, *[6] * 12, exposure=10)

    shift = watch_events(recent, hours(200, 120, 12), is_share=True)

    assert shift is not None
    assert NOW - timedelta(hours=1, minutes=15) <= shift.since <= NOW - timedelta(minutes=40)
    assert shift.ratio > 3
    assert shift.chance < 1e-6
    assert shift.events <= shift.exposure


def test_what_is_over_is_seen_to_be_over() -> None:
    failing, well = [10] * 24, [1] * 12
    history = hours(200, 120, 12)

    assert watch_events(looks(*[1] * 100, *failing, exposure=10), history, is_share=True) is not None
    assert watch_events(looks(*[1] * 88, *failing, *well, exposure=10), history, is_share=True) is None


@pytest.mark.parametrize("failures", [[1, 0, 0, 0, 0, 1], [1], [0, 2, 0, 1]])
def test_one_or_two_failures_of_a_new_agent_are_nothing(failures: list[int]) -> None:
    assert watch_events(looks(*failures, exposure=1), [], is_share=True) is None


def test_an_agent_without_a_history_that_always_fails_is_seen() -> None:
    recent = [
        Count(at=count.at, exposure=count.events, events=count.events)
        for count in looks(*[2] * 12, exposure=0)
    ]

    assert watch_events(recent, [], is_share=True) is not None


def test_nothing_at_all_is_nothing() -> None:
    assert watch_events([], [], is_share=True) is None
    assert watch_events(looks(exposure=0), [], is_share=False) is None


def test_gaps_are_no_news() -> None:
    history = hours(200, 120, 12)
    recent = looks(*[0] * 100, *[1] * 44, exposure=10)
    with_gap = [
        count if n % 2 else Count(at=count.at, exposure=0, events=0) for n, count in enumerate(recent)
    ]
    assert watch_events(with_gap, history, is_share=True) is None


def test_a_pattern_of_the_day_is_no_alarm() -> None:
    def by_day(at: datetime) -> int:
        return 40 if 8 <= at.hour < 18 else 2

    begin = NOW - timedelta(days=10)
    history = [Count(at=begin + HOUR * n, exposure=1.0, events=by_day(begin + HOUR * n)) for n in range(228)]
    draw = random.Random(3)
    morning = NOW.replace(hour=6)
    recent = []
    for n in range(144):
        at = morning + LOOK * n
        recent.append(
            Count(at=at, exposure=1 / 12, events=int(draw.random() < by_day(at) / 12 % 1) + by_day(at) // 12)
        )
    assert watch_events(recent, history, is_share=False) is None
    flat = [Count(at=count.at, exposure=1.0, events=20) for count in history]
    assert watch_events(recent, flat, is_share=False) is not None, "without the pattern it would be one"


def test_an_incident_in_the_history_does_not_become_the_norm() -> None:
    calm = hours(14 * 24, 120, 12)
    with_incident = [
        Count(at=count.at, exposure=120, events=110) if 100 <= n < 106 else count
        for n, count in enumerate(calm)
    ]
    after = fit_baseline(with_incident, is_share=True)
    assert after.rate(NOW) == pytest.approx(fit_baseline(calm, is_share=True).rate(NOW), rel=0.05)
    assert after.dispersion < 1.2


def test_scatter_beyond_chance_is_given_more_patience() -> None:
    draw = random.Random(5)
    wild = [Count(at=NOW - HOUR * n, exposure=1.0, events=draw.choice([2, 38])) for n in range(300, 12, -1)]
    assert fit_baseline(wild, is_share=False).dispersion > 8
    assert fit_baseline(hours(288, 1.0, 20), is_share=False).dispersion == 1


@given(
    st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), max_size=60),
    st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), min_size=1, max_size=60),
    st.booleans(),
)
def test_any_counts_give_an_answer_that_holds_together(
    history: list[tuple[int, int]], recent: list[tuple[int, int]], is_share: bool
) -> None:
    def counts(pairs: list[tuple[int, int]], step: timedelta, until: datetime) -> list[Count]:
        return [
            Count(at=until - step * (len(pairs) - n), exposure=max(pair), events=min(pair))
            for n, pair in enumerate(pairs)
        ]

    earlier = counts(history, HOUR, NOW - HOUR * 12)
    later = counts(recent, LOOK, NOW)
    shift = watch_events(later, earlier, is_share=is_share)
    if shift is not None:
        assert later[0].at <= shift.since <= later[-1].at
        assert 0 < shift.events <= sum(count.events for count in later)
        assert 0 <= shift.chance <= 1
        assert shift.events > shift.expected


@given(st.lists(st.integers(0, 9), min_size=1, max_size=300))
def test_the_sum_stays_between_nothing_and_a_little_above_its_limit(events: list[int]) -> None:
    baseline = fit_baseline(hours(100, 1.0, 20), is_share=False)
    later = looks(*events[:144], exposure=1 / 12)
    sums = CumulatedSum(baseline=baseline, limit=limit_for(baseline, later))
    for count in later:
        sums.add(count)
        assert 0 <= sums.total <= sums.limit + 1
        assert (sums.total == 0) == (not sums.stretch)


# --- levels


def levels(*middles: float, events: int = 20, step: timedelta = HOUR, until: datetime = NOW) -> list[Level]:
    return [
        Level(at=until - step * (len(middles) - n), events=events, middle=middle)
        for n, middle in enumerate(middles)
    ]


def scattered(count: int, around: float, spread: float, seed: int = 1) -> list[float]:
    draw = random.Random(seed)
    return [around * math.exp(draw.gauss(0, spread)) for _ in range(count)]


def test_a_median_three_times_as_high_is_a_rise() -> None:
    rise = watch_level(
        levels(*[3_000] * 12, step=LOOK, events=3), levels(*scattered(48, 1_000, 0.2), until=NOW - HOUR)
    )
    assert rise is not None
    assert rise.ratio == pytest.approx(3, rel=0.2)


@pytest.mark.parametrize(
    ("recent", "history"),
    [
        ([1_050] * 12, scattered(48, 1_000, 0.2)),  # within its scatter
        ([1_400] * 12, [1_000] * 48),  # not half as much more
        ([3_000] * 12, [1_000] * 7),  # too short a history
        ([3_000] * 12, scattered(12, 1_000, 1.2)),  # as wild before
        ([], [1_000] * 48),
    ],
)
def test_what_may_be_chance_is_no_rise(recent: list[float], history: list[float]) -> None:
    assert watch_level(levels(*recent, step=LOOK, events=3), levels(*history, until=NOW - HOUR)) is None


def test_two_slow_runs_are_no_rise() -> None:
    assert (
        watch_level(levels(9_000, 9_000, step=LOOK, events=1), levels(*[1_000] * 48, until=NOW - HOUR))
        is None
    )


def test_a_slow_hour_of_every_day_is_no_rise() -> None:
    history = [
        Level(at=NOW - HOUR * n, events=20, middle=9_000 if (NOW - HOUR * n).hour in (13, 14, 15) else 1_000)
        for n in range(24 * 8, 1, -1)
    ]
    recent = levels(*[9_000] * 12, step=LOOK, events=3, until=NOW)
    assert watch_level(recent, history) is None
    elsewhere = [Level(at=level.at - timedelta(hours=10), events=3, middle=9_000) for level in recent]
    assert watch_level(elsewhere, history) is not None


# --- targets


@pytest.mark.parametrize(
    ("solved", "runs", "is_missed"),
    [(0, 0, False), (1, 3, False), (0, 5, False), (0, 6, True), (70, 100, False), (60, 100, False), (54, 100, True)],
)  # fmt: skip
def test_a_share_misses_its_target_when_chance_does_not_explain_it(
    solved: int, runs: int, is_missed: bool
) -> None:
    assert (misses_share(solved, runs, 0.7, at_least=True) is not None) is is_missed


@pytest.mark.parametrize(
    ("slow", "runs", "is_missed"), [(1, 1, False), (3, 4, True), (5, 100, False), (14, 100, True)]
)
def test_a_share_goes_beyond_its_largest(slow: int, runs: int, is_missed: bool) -> None:
    assert (misses_share(slow, runs, 0.05, at_least=False) is not None) is is_missed


@pytest.mark.parametrize(
    ("values", "is_missed"),
    [
        ([0.1] * 9, False),
        ([0.5] * 10, True),
        ([0.79, 0.8, 0.81] * 5, False),
        ([0.2, 1.0] * 10, False),
        ([0.9] * 30, False),
    ],
)
def test_a_mean_misses_its_target_when_chance_does_not_explain_it(
    values: list[float], is_missed: bool
) -> None:
    found = misses_mean(len(values), sum(values), sum(value * value for value in values), 0.8)
    assert (found is not None) is is_missed
