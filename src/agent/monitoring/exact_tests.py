"""Exact tail probabilities and robust measures, for decisions that must hold with few data. Needs `math` alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

_SMALLEST = 1e-300
_PRECISION = 1e-14
_STEPS_MAX = 10_000

# Makes the median absolute deviation of so many normal values unbiased (Croux and Rousseeuw 1992, "Time-efficient
# algorithms for two highly robust estimators of scale"); above nine values n / (n - 0.8).
_MAD_CORRECTIONS = {2: 1.196, 3: 1.495, 4: 1.363, 5: 1.206, 6: 1.200, 7: 1.140, 8: 1.129, 9: 1.107}


def poisson_tail(events: int, expected: float) -> float:
    """P(X >= events) where `expected` are expected: the regularised lower incomplete gamma function."""
    if events <= 0:
        return 1.0
    if expected <= 0:
        return 0.0
    scale = math.exp(events * math.log(expected) - expected - math.lgamma(events))
    if expected < events + 1:  # the series converges fast here, the fraction there
        term = total = 1.0 / events
        for step in range(1, _STEPS_MAX):
            term *= expected / (events + step)
            total += term
            if term < total * _PRECISION:
                break
        return min(scale * total, 1.0)
    b = expected + 1.0 - events
    c, d = 1.0 / _SMALLEST, 1.0 / b
    fraction = d
    for step in range(1, _STEPS_MAX):
        a = -step * (step - events)
        b += 2.0
        d = 1.0 / _away_from_zero(a * d + b)
        c = _away_from_zero(b + a / c)
        fraction *= d * c
        if abs(d * c - 1.0) < _PRECISION:
            break
    return max(1.0 - scale * fraction, 0.0)


def binomial_tail(events: int, trials: int, probability: float) -> float:
    """P(X >= events) of so many trials: the regularised incomplete beta function."""
    if events <= 0:
        return 1.0
    if events > trials or probability <= 0:
        return 0.0
    if probability >= 1:
        return 1.0
    return _incomplete_beta(events, trials - events + 1, probability)


def binomial_head(events: int, trials: int, probability: float) -> float:
    """P(X <= events) of so many trials."""
    return binomial_tail(trials - events, trials, 1.0 - probability)


def conditional_tail(events: int, exposure: float, earlier_events: int, earlier_exposure: float) -> float:
    """How likely so many of all events fall into the later part by chance, if the rate never changed.

    Exact for two Poisson counts whatever the rate, which need not be known (Przyborowski and Wilenski 1940). Without
    an earlier exposure nothing can be said: 1.
    """
    if exposure <= 0 or earlier_exposure <= 0:
        return 1.0
    return binomial_tail(events, events + earlier_events, exposure / (exposure + earlier_exposure))


def student_tail(value: float, freedom: float) -> float:
    """P(T >= value) of Student's distribution with so many degrees of freedom."""
    half = _incomplete_beta(freedom / 2, 0.5, freedom / (freedom + value * value)) / 2
    return half if value >= 0 else 1.0 - half


def median(values: Sequence[float]) -> float:
    """The middle of the values, of which there is at least one."""
    ordered = sorted(values)
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


def weighted_median(values: Sequence[float], weights: Sequence[float]) -> float:
    """The first value, in order, up to which half of the weight lies."""
    pairs = sorted(zip(values, weights, strict=True))
    half = sum(weights) / 2
    reached = 0.0
    for value, weight in pairs:
        reached += weight
        if reached >= half:
            return value
    return pairs[-1][0]


def robust_scale(values: Sequence[float]) -> float:
    """The standard deviation that normal values of this median absolute deviation have; needs two values."""
    middle = median(values)
    deviation = median([abs(value - middle) for value in values])
    count = len(values)
    return 1.4826 * deviation * _MAD_CORRECTIONS.get(count, count / (count - 0.8))


def _away_from_zero(value: float) -> float:
    return value if abs(value) > _SMALLEST else _SMALLEST


def _incomplete_beta(a: float, b: float, x: float) -> float:
    """I_x(a, b) by Lentz's continued fraction, on the side where it converges fast."""
    if x <= 0:
        return 0.0
    if x >= 1:
        return 1.0
    if x > (a + 1) / (a + b + 2):
        return 1.0 - _incomplete_beta(b, a, 1 - x)
    scale = math.exp(
        math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    )
    c = 1.0
    d = 1.0 / _away_from_zero(1.0 - (a + b) * x / (a + 1.0))
    fraction = d
    for m in range(1, _STEPS_MAX):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        d = 1.0 / _away_from_zero(1.0 + even * d)
        c = _away_from_zero(1.0 + even / c)
        fraction *= d * c
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        d = 1.0 / _away_from_zero(1.0 + odd * d)
        c = _away_from_zero(1.0 + odd / c)
        fraction *= d * c
        if abs(d * c - 1.0) < _PRECISION:
            break
    return min(scale * fraction / a, 1.0)
