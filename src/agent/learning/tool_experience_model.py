"""How likely a call is to fail with a known error: logistic regression over its conditions, a model per tool and error.

The fit has one optimum, which Newton's method finds in a few steps (Rasmussen and Williams 2006, algorithm 3.1): so the
same calls give the same model however they came. It works on calls by calls, not on conditions by conditions, because
a tool has hundreds of calls and thousands of conditions; and the errors of a tool share what is costly.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from agent.learning.tool_experience_calls import Condition

BASE = -2.0
"""Log odds of a failure of which nothing else is known: one in eight."""
PENALTY = 0.5
"""Strength of the pull of weights towards what is believed without data."""
BIAS_SCALE = 2.0
"""How much more freely the base moves than a weight, as a variance."""
STEPS_MAX = 50
SETTLED = 1e-7
"""A fit ends when no call pulls by more than this otherwise than a step before."""
_COLUMNS = 4_096
"""Conditions that are multiplied at once, which bounds the memory."""

BELIEFS = {"again": 4.0, "still": 3.0, "heeded": -3.0, "unheeded": 1.0}
"""Weights before there are data, for the error at hand: the same call failed in this run, or still has the values that
the error named; or it has a number that the error told, or has none of them. Errors of another nature unlearn it."""
EMPHASIS = {"shape": 4.0, "link": 8.0, "item": 1.5, "pair": 0.7, "retry": 0.7, "changed": 0.7, "after": 0.3}
"""How much more a kind of condition counts than the others: what holds for many values, such as a form or the state of
the record named, over the value itself. Chosen on the airline log of `benchmarks/tool_warnings`."""


@dataclass(slots=True)
class Model:
    """Log odds of one error of one tool: a base and a weight per condition."""

    base: float = BASE
    weights: dict[int, float] = field(default_factory=dict)

    def risk(self, values: Mapping[int, float]) -> float:
        """The probability that a call with these conditions fails with the error."""
        return _sigmoid(self.base + sum(self.weights.get(key, 0.0) * value for key, value in values.items()))


def weigh(conditions: Iterable[Condition], tenant_id: str = "") -> dict[int, float]:
    """Conditions as numbers: each kind has the same weight in sum, however many of it hold."""
    conditions = list(conditions)
    counts = Counter(condition.kind for condition in conditions)
    return {
        condition.key(tenant_id): EMPHASIS.get(condition.kind, 1.0)
        if condition.kind in BELIEFS
        else EMPHASIS.get(condition.kind, 1.0) / math.sqrt(counts[condition.kind])
        for condition in conditions
    }


Numbers = NDArray[np.float64]


def fit(
    calls: Sequence[tuple[Mapping[int, float], str | None]], beliefs: Mapping[str, Mapping[int, float]]
) -> dict[str, Model]:
    """The models of a tool's errors.

    Args:
        calls: conditions of each call, and its error; calls that failed with another error are no examples of one, as
            they never got so far.
        beliefs: per error to fit, the weights that are believed without data.
    """
    keys = sorted({key for values, _ in calls for key in values})
    places = {key: place for place, key in enumerate(keys)}
    clean = np.array([error is None for _, error in calls], dtype=bool)
    entries = sorted(
        (places[key], row, value) for row, (values, _) in enumerate(calls) for key, value in values.items()
    )
    columns = np.array([column for column, _, _ in entries], dtype=np.intp)
    rows = np.array([row for _, row, _ in entries], dtype=np.intp)
    weighed = np.array([value for _, _, value in entries])
    freedom = _freedom(np.bincount(columns[clean[rows]], minlength=len(keys)), int(clean.sum()))
    likeness = np.full((len(calls), len(calls)), BIAS_SCALE / PENALTY)
    for start in range(0, len(keys), _COLUMNS):
        first, last = np.searchsorted(columns, (start, start + _COLUMNS))
        part = np.zeros((len(calls), min(_COLUMNS, len(keys) - start)))
        part[rows[first:last], columns[first:last] - start] = weighed[first:last]
        likeness += (part * freedom[start : start + _COLUMNS]) @ part.T
    models = {}
    for error, believed in beliefs.items():
        failed = np.array([found == error for _, found in calls], dtype=bool)
        chosen = np.flatnonzero(clean | failed)
        weights = np.array([believed.get(key, 0.0) for key in keys])
        odds = BASE + np.bincount(rows, weighed * weights[columns], minlength=len(calls))
        shares = np.zeros(len(calls))
        shares[chosen] = _settle(
            likeness[np.ix_(chosen, chosen)], odds[chosen].astype(np.float64), failed[chosen].astype(float)
        )
        weights += freedom * np.bincount(columns, weighed * shares[rows], minlength=len(keys))
        models[error] = Model(
            base=BASE + float(shares.sum()) * BIAS_SCALE / PENALTY,
            weights={**believed, **dict(zip(keys, weights.tolist(), strict=True))},
        )
    return models


def _freedom(counts: NDArray[np.intp], clean: int) -> Numbers:
    """Variance of each weight: what is rare among calls that succeeded tells more when it comes with a failure."""
    found: Numbers = np.log1p(clean / (counts + 1)) ** 3 / PENALTY
    return found


def _settle(likeness: Numbers, believed: Numbers, failed: Numbers) -> Numbers:
    """How much each call pulls at the optimum: its outcome less its risk."""
    shares = np.zeros(len(failed))
    odds = believed
    loss = _loss(shares, odds, believed, failed)
    for _ in range(STEPS_MAX):
        risks = 1 / (1 + np.exp(-np.clip(odds, -60, 60)))
        steepness = np.maximum(risks * (1 - risks), 1e-10)
        root = np.sqrt(steepness)
        aim = steepness * (odds - believed) + failed - risks
        system = np.eye(len(failed)) + root[:, None] * likeness * root
        change = aim - root * np.linalg.solve(system, root * (likeness @ aim)) - shares
        size = 1.0
        while True:
            moved = shares + size * change
            odds = believed + likeness @ moved
            reached = _loss(moved, odds, believed, failed)
            if reached <= loss + 1e-9 or size < 1e-3:
                break
            size /= 2
        shares, loss = moved, reached
        if size * np.max(np.abs(change), initial=0.0) < SETTLED:
            break
    return shares


def _loss(shares: Numbers, odds: Numbers, believed: Numbers, failed: Numbers) -> float:
    return float(shares @ (odds - believed) / 2 + np.sum(np.logaddexp(0, odds) - failed * odds))


def _sigmoid(odds: float) -> float:
    if odds < 0:
        power = math.exp(max(odds, -60))
        return power / (1 + power)
    return 1 / (1 + math.exp(-min(odds, 60)))
