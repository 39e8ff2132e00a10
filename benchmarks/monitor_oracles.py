"""What the best sequential tests see that know what no monitor can: the usual rate and the size of the change.

Each raises once a week without a change: its threshold is found by simulation, on the same looks every five minutes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

Step = Callable[[float], float]
"""Takes the logarithm of how much likelier a look is under the change; gives what alarms when it is high."""

HALF_HOUR_LOOKS = 6
_HALVINGS = 20
_HIGHEST = 30.0


def cumulated_sum() -> Step:
    """Page's test: no test with as few false alarms has a smaller greatest mean delay (Moustakides 1986)."""
    total = 0.0

    def step(log_ratio: float) -> float:
        nonlocal total
        total = max(total + log_ratio, 0.0)
        return total

    return step


def shiryaev_roberts() -> Step:
    """No test that starts again after each false alarm has a smaller mean delay for a change that comes late (Pollak
    and Tartakovsky 2009)."""
    log_sum = -math.inf

    def step(log_ratio: float) -> float:
        nonlocal log_sum
        log_sum = _log_one_more(log_sum) + log_ratio
        return log_sum

    return step


def half_hour() -> Step:
    """The sum of Shiryaev and Roberts over the changes of the last half hour alone, made for what is to be seen within
    half an hour and blind to what is older."""
    window: list[float] = []

    def step(log_ratio: float) -> float:
        window.append(log_ratio)
        del window[:-HALF_HOUR_LOOKS]
        log_sum = -math.inf
        for each in window:
            log_sum = _log_one_more(log_sum) + each
        return log_sum

    return step


def _log_one_more(log_sum: float) -> float:
    """log(1 + exp(log_sum))."""
    return max(log_sum, 0.0) + math.log1p(math.exp(-abs(log_sum)))


ORACLES: dict[str, Callable[[], Step]] = {
    "knows all: CUSUM": cumulated_sum,
    "knows all: Shiryaev-Roberts": shiryaev_roberts,
    "knows all: half an hour": half_hour,
}


class Oracle:
    """One test at work, which starts again after each alarm."""

    def __init__(self, make: Callable[[], Step], threshold: float) -> None:
        self._make, self._threshold = make, threshold
        self._step = make()

    def add(self, log_ratio: float) -> bool:
        """The next look; whether it alarms."""
        is_alarm = self._step(log_ratio) >= self._threshold
        if is_alarm:
            self._step = self._make()
        return is_alarm


def threshold_for(make: Callable[[], Step], log_ratios: Sequence[float], alarms: float) -> float:
    """From which on the test alarms so often on these looks without a change."""
    low, high = 0.0, _HIGHEST
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if _alarms(Oracle(make, middle), log_ratios) > alarms:
            low = middle
        else:
            high = middle
    return high


def _alarms(oracle: Oracle, log_ratios: Iterable[float]) -> int:
    return sum(map(oracle.add, log_ratios))
