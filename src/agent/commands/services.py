"""What the commands that run as services share: they start something and stop it cleanly at SIGTERM or Ctrl-C."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from typing import Protocol

from agent.commands.output import remark
from agent.telemetry import exporting


class Service(Protocol):
    """Something that runs until it is stopped."""

    async def start(self) -> None:
        """Begin."""

    async def stop(self) -> None:
        """End, and wait for the end of what runs just now."""


def run_service(service: Service, says: str) -> None:
    """Start it, say so, and stop it when the process is asked to end; its events go to standard error meanwhile."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", stream=sys.stderr)
    logging.getLogger("agent.events").setLevel(logging.INFO)
    asyncio.run(_run(service, says))


async def _run(service: Service, says: str) -> None:
    asked = asyncio.Event()
    loop = asyncio.get_running_loop()
    signals = (signal.SIGTERM, signal.SIGINT)
    for number in signals:
        loop.add_signal_handler(number, asked.set)
    async with exporting():
        try:
            await service.start()
            remark(says)
            await asked.wait()
        finally:
            await service.stop()
            for number in signals:
                loop.remove_signal_handler(number)
