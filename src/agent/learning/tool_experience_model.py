"""How likely a call is to fail with a known error: logistic regression over its conditions, a model per tool and error.

The fit has one optimum, and is done in one order, so the same calls give the same model however they came. Coordinate
descent in the dual (Yu, Huang and Lin 2011), because calls have hundreds of conditions and a tool hundreds of calls.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from agent.learning.tool_experience_calls import Condition

BASE = -2.0
"""Log odds of a failure of which nothing else is known: one in eight."""
PENALTY = 0.5
"""Strength of the pull of weights towards what is believed without data."""
BIAS_SCALE = 2.0
"""How much more freely the base moves than a weight, as a variance."""
EPOCHS_MAX = 600
SETTLED = 0.0003
"""A fit ends when no call's share moves by more in an epoch."""

BELIEFS = {"again": 4.0, "still": 3.0}
"""Weights before there are data, for the error at hand: the same call failed in this run, or still has the values that
the error named. Errors that pass by themselves unlearn it."""
EMPHASIS = {"shape": 4.0, "link": 8.0, "item": 1.5, "pair": 0.7, "retry": 0.7, "changed": 0.7, "after": 0.3}
"""How much more a kind of condition counts than the others: what holds for many values, such as a form or the state of
the record named, over the value itself. Chosen on the airline log of `benchmarks/tool_warnings`."""


@dataclass(frozen=True, slots=True)
class Example:
    """A call that was made."""

    values: Mapping[int, float]
    failed: bool
    """With the error of the model; calls that failed with another one are no examples, as they never got so far."""


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


def fit(examples: Sequence[Example], beliefs: Mapping[int, float]) -> Model:
    """The model of these calls; `beliefs` are the weights it starts from."""
    # In an order of their own and a mixed one: the descent ends a little off the optimum, on the same spot each time.
    examples = sorted(examples, key=lambda e: (sum(e.values) % 1_000_003, sorted(e.values.items()), e.failed))
    model = Model(weights=dict(beliefs))
    freedom = _freedom(examples)
    shares = [0.5] * len(examples)
    signs = [1.0 if example.failed else -1.0 for example in examples]
    sizes = [
        (sum(freedom[key] * value * value for key, value in example.values.items()) + BIAS_SCALE) / PENALTY
        for example in examples
    ]
    for example, sign, share in zip(examples, signs, shares, strict=True):
        _move(model, example, freedom, sign * share / PENALTY)
    for _ in range(EPOCHS_MAX):
        moved = 0.0
        for place, example in enumerate(examples):
            margin = signs[place] * (
                model.base + sum(model.weights[key] * value for key, value in example.values.items())
            )
            share = _best_share(margin, sizes[place], shares[place])
            change = share - shares[place]
            if abs(change) > 1e-6:
                _move(model, example, freedom, signs[place] * change / PENALTY)
                shares[place] = share
                moved = max(moved, abs(change))
        if moved < SETTLED:
            break
    return model


def _freedom(examples: Sequence[Example]) -> dict[int, float]:
    """Variance of each weight: what is rare among calls that succeeded tells more when it comes with a failure."""
    clean = [example for example in examples if not example.failed]
    counts = Counter(key for example in clean for key in example.values)
    keys = {key for example in examples for key in example.values}
    return {key: math.log1p(len(clean) / (counts[key] + 1)) ** 3 for key in keys}


def _move(model: Model, example: Example, freedom: Mapping[int, float], step: float) -> None:
    weights = model.weights
    for key, value in example.values.items():
        weights[key] = weights.get(key, 0.0) + step * value * freedom[key]
    model.base += step * BIAS_SCALE


def _best_share(margin: float, size: float, share: float) -> float:
    """The share of one call in the dual at which size * (x - share) + margin + log(x / (1 - x)) is 0."""
    low, high = -margin - size * (1 - share), -margin + size * share
    odds = min(max(-margin, low), high)
    for _ in range(20):
        probability = _sigmoid(odds)
        surplus = size * (probability - share) + margin + odds
        if surplus > 0:
            high = odds
        else:
            low = odds
        step = surplus / (size * probability * (1 - probability) + 1)
        odds = odds - step if low < odds - step < high else (low + high) / 2
        if abs(step) < 1e-6:
            break
    return _sigmoid(odds)


def _sigmoid(odds: float) -> float:
    if odds < 0:
        power = math.exp(max(odds, -60))
        return power / (1 + power)
    return 1 / (1 + math.exp(-min(odds, 60)))
