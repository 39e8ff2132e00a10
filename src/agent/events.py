"""What happened that somebody may want to know: one function to tell it, one to listen.

Every event is also a line of the logger `agent.events`: a warning for the names that end in `_failed`,
`_unavailable`, `_refused` or `_spooled`, for alerts that are open and, the first time in a process, for `_skipped`; for
debugging what happens in every run or tick; information for the rest. Facts never hold message text.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

_logger = logging.getLogger("agent.events")
_listeners: list[Callable[[Event], None]] = []
_ALARMING = (
    "_failed",
    "_unavailable",
    "_refused",
    "_spooled",
    "alert_raised",
    "alert_worsened",
    "alert_reminded",
)
_ALARMING_ONCE = "_skipped"
_ORDINARY = frozenset({"knowledge_recalled", "run_recorded", "tool_call_ended", "clock_ticked"})
"""In every run or tick, for those who count: as lines of a log they would hide the rest."""
_told: set[str] = set()


@dataclass(frozen=True, kw_only=True)
class Event:
    """One thing that happened."""

    name: str
    """In the past tense, such as `recall_failed` or `run_spooled`."""
    facts: dict[str, Any]
    """Plain values; ids rather than contents."""
    at: datetime = field(default_factory=lambda: datetime.now(UTC))


def emit(name: str, /, **facts: Any) -> None:
    """Tell all listeners. A listener that raises is logged and does not stop the caller."""
    event = Event(name=name, facts=facts)
    alarming = name.endswith(_ALARMING) or (name.endswith(_ALARMING_ONCE) and name not in _told)
    _told.add(name)
    level = logging.WARNING if alarming else logging.DEBUG if name in _ORDINARY else logging.INFO
    _logger.log(level, "%s %s", name, ", ".join(f"{fact}={facts[fact]!r}" for fact in facts))
    for listener in tuple(_listeners):
        try:
            listener(event)
        except Exception:  # a listener is foreign code and must not fail a run
            _logger.exception("listener %r failed on event %s", listener, name)


@contextmanager
def listening(listener: Callable[[Event], None]) -> Iterator[None]:
    """Call `listener` with every event, in the thread that emits it, until the block ends."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)
