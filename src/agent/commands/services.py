"""What the commands that run as services share: they start something and stop it cleanly at SIGTERM or Ctrl-C."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from typing import TYPE_CHECKING

from agent.commands.options import tenant_identity
from agent.commands.output import remark
from agent.telemetry import exporting

if TYPE_CHECKING:
    from agent.clock import Service
    from agent.database import Database


def run_service(service: Service, database: Database, says: str) -> None:
    """Start it, say so, and stop it when the process is asked to end; its events go to standard error meanwhile.

    Its database is reached first, so that one without our schema, or a login that may not work on it, is refused in one
    line, and closed last.
    """
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", stream=sys.stderr)
    logging.getLogger("agent.events").setLevel(logging.INFO)
    asyncio.run(_run(service, database, says))


async def _run(service: Service, database: Database, says: str) -> None:
    asked = asyncio.Event()
    loop = asyncio.get_running_loop()
    signals = (signal.SIGTERM, signal.SIGINT)
    for number in signals:
        loop.add_signal_handler(number, asked.set)
    async with exporting():
        try:
            await database.call("clock_status", tenant_identity(None), tick_limit=1)
            await service.start()
            remark(says)
            await asked.wait()
        finally:
            await service.stop()
            await database.close()
            for number in signals:
                loop.remove_signal_handler(number)
