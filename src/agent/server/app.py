"""The FastAPI application that `langgraph.json` mounts: its lifespan runs the workers of this process's graphs."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from agent.learning.machine import living_machines


@asynccontextmanager
async def lifespan(application: FastAPI) -> AsyncIterator[None]:
    """Start a worker for each machine that the graphs made, and stop them in order.

    What was left to learn when the server stopped last is learned without waiting for a new run.
    """
    machines = living_machines()
    for machine in machines:
        await machine.start_worker()
    try:
        yield
    finally:
        for machine in machines:
            await machine.aclose()


app = FastAPI(title="Learning layer", lifespan=lifespan)
