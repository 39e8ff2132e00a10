"""Tail probabilities are those of scipy, and robust measures what their sources say."""

from __future__ import annotations

import math
import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from agent.monitoring.exact_tests import (
    binomial_head,
    binomial_tail,
    conditional_tail,
    median,
    poisson_tail,
    robust_scale,
    student_tail,
    weighted_median,
)

PROBABILITIES = st.floats(1e-6, 1 - 1e-6)


def alike(ours: float, theirs: float) -> bool:
    return math.isclose(ours, theirs, rel_tol=1e-6, abs_tol=1e-12)


@given(st.integers(0, 3_000), st.floats(1e-6, 3_000))
def test_the_tail_of_poisson_is_exact(events: int, expected: float) -> None:
    assert alike(poisson_tail(events, expected), stats.poisson.sf(events - 1, expected))


@given(st.integers(0, 3_000), st.integers(0, 3_000), PROBABILITIES)
def test_the_tails_of_the_binomial_are_exact(one: int, other: int, probability: float) -> None:
    events, trials = min(one, other), max(one, other)
    assert alike(binomial_tail(events, trials, probability), stats.binom.sf(events - 1, trials, probability))
    assert alike(binomial_head(events, trials, probability), stats.binom.cdf(events, trials, probability))


@given(st.floats(-40, 40), st.floats(1, 2_000))
def test_the_tail_of_student_is_exact(value: float, freedom: float) -> None:
    assert alike(student_tail(value, freedom), stats.t.sf(value, freedom))


@pytest.mark.parametrize(
    ("events", "trials", "probability", "tail"),
    [(0, 0, 0.5, 1.0), (1, 0, 0.5, 0.0), (1, 5, 0.0, 0.0), (5, 5, 1.0, 1.0), (6, 5, 0.5, 0.0), (5, 5, 0.5, 1 / 32)],
)  # fmt: skip
def test_the_ends_of_the_binomial(events: int, trials: int, probability: float, tail: float) -> None:
    assert binomial_tail(events, trials, probability) == pytest.approx(tail, abs=1e-15)


def test_nothing_is_expected_and_nothing_happens() -> None:
    assert poisson_tail(0, 0.0) == 1.0
    assert poisson_tail(1, 0.0) == 0.0


@given(st.integers(0, 60), st.floats(0.1, 100), st.integers(0, 600), st.floats(0.1, 1_000))
def test_two_counts_are_compared_by_the_binomial_of_their_exposures(
    events: int, exposure: float, earlier: int, earlier_exposure: float
) -> None:
    theirs = stats.binom.sf(events - 1, events + earlier, exposure / (exposure + earlier_exposure))
    assert alike(conditional_tail(events, exposure, earlier, earlier_exposure), theirs)


def test_without_a_history_no_count_is_improbable() -> None:
    assert conditional_tail(50, 1.0, 0, 0.0) == 1.0


@given(st.lists(st.floats(-1e9, 1e9), min_size=1))
def test_the_median_is_pythons(values: list[float]) -> None:
    assert median(values) == statistics.median(values)


@given(st.lists(st.integers(-1_000, 1_000), min_size=1, max_size=40))
def test_equal_weights_give_the_lower_median(values: list[int]) -> None:
    assert weighted_median(values, [1.0] * len(values)) == statistics.median_low(values)


def test_a_heavy_value_is_the_weighted_median() -> None:
    assert weighted_median([1, 2, 100], [1, 1, 10]) == 100


@pytest.mark.parametrize("count", [4, 6, 9, 14, 60])
def test_the_scale_of_normal_values_is_their_deviation(count: int) -> None:
    draw = random.Random(7)
    scales = [robust_scale([draw.gauss(5, 2) for _ in range(count)]) for _ in range(4_000)]
    assert statistics.fmean(scales) == pytest.approx(2, rel=0.05)


def test_one_wild_value_in_ten_does_not_move_the_scale() -> None:
    calm = [float(value) for value in range(10)]
    assert robust_scale([*calm[:-1], 1e9]) == robust_scale(calm)
