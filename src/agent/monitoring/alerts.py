"""Alerts: findings become rows, and rows are told. One alert per cause while it lasts, whoever reports it how often.

What is to be told is decided in the database, in the transaction that takes the findings. Sending is apart from it, so
a sink that fails is tried again and holds up neither the monitor nor the other sinks.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final

from langgraph.errors import GraphBubbleUp

from agent.errors import ConfigurationError
from agent.events import emit
from agent.identity import Identity
from agent.monitoring.alert_sinks import DeliveryFailed, Sink, configured_sinks
from agent.monitoring.notices import Notice, bounded

if TYPE_CHECKING:
    from agent.database.protocol import Database
    from agent.monitoring.findings import Finding
    from agent.settings import Settings

_SEND_SECONDS: Final = 30.0
_LEASE_SECONDS: Final = 60.0
"""More than one attempt takes: who holds a notice that long without a word is dead."""
_FAILURES_MAX: Final = 3
"""Failures in a row after which a sink is left alone until the next `deliver`."""
_PAUSE_SECONDS: Final = 0.2
"""Between two looks at what is due right now and taken by somebody else."""
_TEXT_MAX: Final = 2_000
_TITLE_MAX: Final = 200


class Alerts:
    """Takes findings and tells of them, for one deployment. Any number may work at once, in any number of processes.

    Args:
        settings: whose tenant, cooldown, reminder and sinks count.
        database: where alerts are.
        sinks: where they are told; by default what the settings name. Their names must differ.

    Raises:
        ConfigurationError: the settings name a sink and not what it needs, or two sinks have one name.
    """

    def __init__(self, settings: Settings, database: Database, sinks: Sequence[Sink] | None = None) -> None:
        chosen = configured_sinks(settings) if sinks is None else list(sinks)
        self._sinks = {sink.name: sink for sink in chosen}
        if len(self._sinks) < len(chosen):
            raise ConfigurationError(f"two sinks have one name: {sorted(sink.name for sink in chosen)}")
        self._settings = settings
        self._database = database
        self._identity = Identity(tenant_id=settings.tenant)

    async def report(self, findings: Sequence[Finding], checked: Collection[str]) -> list[Notice]:
        """Raise what is new, keep what lasts, resolve what was looked for and not found any more; one transaction.

        Args:
            findings: all that the checks found this time.
            checked: names of the checks that were made to their end; alerts of others stay as they are.

        Returns:
            What is to be told; `deliver` sends it.

        Raises:
            DatabaseUnavailable: the database cannot be reached; nothing was written.
        """
        rows = await self._database.call(
            "report_findings",
            self._identity,
            findings=[_document(finding) for finding in findings],
            checked=sorted(checked),
            sinks=sorted(self._sinks),
            cooldown_seconds=self._settings.alert_cooldown.total_seconds(),
            reminder_seconds=self._settings.alert_reminder.total_seconds(),
        )
        return [self._notice(row) for row in rows]

    async def deliver(self, *, patience: timedelta = timedelta(seconds=30)) -> int:
        """Send what is due, to all sinks at once, and to each in order. Returns how many notices were sent.

        Args:
            patience: how long to wait for what is due a little later, because it has failed; the rest is for the next
                call, of this process or another.

        Raises:
            DatabaseUnavailable: the database cannot be reached; what was sent just then may be sent again.
        """
        until = time.monotonic() + patience.total_seconds()
        lanes = [self._send_waiting(sink, until) for sink in self._sinks.values()]
        ended = await asyncio.gather(*lanes, return_exceptions=True)
        for lane in ended:
            if isinstance(lane, BaseException):
                raise lane
        return sum(lane for lane in ended if isinstance(lane, int))

    async def _send_waiting(self, sink: Sink, until: float) -> int:
        sent = failures = 0
        while failures < _FAILURES_MAX:
            taken = await self._database.call(
                "take_alert_delivery", self._identity, sinks=[sink.name], lease_seconds=_LEASE_SECONDS
            )
            wait: float | None
            if taken["delivery"] is None:
                wait = taken["next_in_seconds"]
            elif (failed := await self._send(sink, taken["delivery"])) is None:
                sent, failures, wait = sent + 1, 0, 0.0
            else:
                failures, wait = failures + 1, failed.wait.total_seconds() if failed.wait else 0.0
            if taken["delivery"] is not None and wait == 0:
                continue
            if wait is None or time.monotonic() + wait > until:
                break
            await asyncio.sleep(max(wait, _PAUSE_SECONDS))
        return sent

    async def _send(self, sink: Sink, delivery: Mapping[str, Any]) -> DeliveryFailed | None:
        failed: DeliveryFailed | None = None
        try:
            async with asyncio.timeout(_SEND_SECONDS):
                await sink.send(self._notice(delivery))
        except DeliveryFailed as error:
            failed = error
        except TimeoutError:
            failed = DeliveryFailed(f"no answer within {_SEND_SECONDS:.0f} seconds")
        except GraphBubbleUp:
            raise
        except Exception as error:  # noqa: BLE001 - a sink may be foreign code and must not stop the monitor
            failed = DeliveryFailed(type(error).__name__)
        state = await self._database.call(
            "finish_alert_delivery",
            self._identity,
            the_notice_id=delivery["notice_id"],
            sink=sink.name,
            attempt=delivery["attempt"],
            error=None if failed is None else str(failed),
            retry_seconds=None if failed is None or failed.wait is None else failed.wait.total_seconds(),
        )
        if failed is not None:
            emit(
                "alert_delivery_failed", alert_id=delivery["alert"]["alert_id"], sink=sink.name, reason=str(failed),
                given_up=state == "given_up",
            )  # fmt: skip
        return failed

    def _notice(self, row: Mapping[str, Any]) -> Notice:
        return Notice.from_row(row, public_url=self._settings.public_url)


def _document(finding: Finding) -> dict[str, Any]:
    """The finding as it is stored: no longer than a page shows."""
    return asdict(finding) | {
        "title": finding.title[:_TITLE_MAX],
        "what": finding.what[:_TEXT_MAX],
        "advice": finding.advice[:_TEXT_MAX],
        "evidence": bounded(finding.evidence),
        "since": finding.since.isoformat(),
    }
