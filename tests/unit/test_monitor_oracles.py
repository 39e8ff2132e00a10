"""The tests that know all, which the benchmark of the monitor compares with: they are what they are said to be."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest

from benchmarks.monitor_oracles import (
    HALF_HOUR_LOOKS,
    ORACLES,
    Oracle,
    Step,
    cumulated_sum,
    half_hour,
    shiryaev_roberts,
    threshold_for,
)

_LOOKS = [random.Random(7).gauss(-0.3, 1.0) for _ in range(40)]


def _sums(looks: list[float]) -> list[float]:
    """How much the looks from each of them on speak for a change."""
    return [sum(looks[first:]) for first in range(len(looks))]


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (cumulated_sum, lambda looks: max(0.0, *_sums(looks))),
        (shiryaev_roberts, lambda looks: math.log(sum(map(math.exp, _sums(looks))))),
        (half_hour, lambda looks: math.log(sum(map(math.exp, _sums(looks[-HALF_HOUR_LOOKS:]))))),
    ],
)
def test_each_sums_up_what_speaks_for_a_change_at_any_look(
    make: Callable[[], Step], expected: Callable[[list[float]], float]
) -> None:
    step = make()
    for number, look in enumerate(_LOOKS, start=1):
        assert step(look) == pytest.approx(expected(_LOOKS[:number]))


@pytest.mark.parametrize("name", ORACLES)
def test_the_threshold_lets_so_many_alarms_through_and_no_more(name: str) -> None:
    draw = random.Random(1)
    looks = [draw.gauss(-0.5, 1.0) for _ in range(20_000)]
    limit = threshold_for(ORACLES[name], looks, 20)
    alarms = sum(map(Oracle(ORACLES[name], limit).add, looks))
    more = sum(map(Oracle(ORACLES[name], limit - 0.5).add, looks))
    assert 15 <= alarms <= 20 < more


def test_a_test_starts_again_after_its_alarm() -> None:
    oracle = Oracle(cumulated_sum, 2.0)
    assert [oracle.add(1.0) for _ in range(6)] == [False, True] * 3
