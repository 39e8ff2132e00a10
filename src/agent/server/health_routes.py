"""Whether this process lives (`/healthz`) and whether it can do its work (`/readyz`)."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Final

from fastapi import APIRouter, Depends
from fastapi.responses import JSONResponse

from agent.clock import Service
from agent.database.migrations import migration_names
from agent.errors import (
    AccessRefused,
    ConfigurationError,
    DatabaseUnavailable,
    IdentityError,
    LearningError,
    MigrationError,
)
from agent.server.house import House, house
from agent.server.house_state import HouseState, StateUnread

router = APIRouter()

_CACHED_SECONDS: Final = 1.0
_WAIT_SECONDS: Final = 0.8
"""Less than the second that probes of Kubernetes wait unless they are told otherwise."""
_UNCACHED: Final = {"Cache-Control": "no-store"}


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing that was looked at. The words are our own: whoever asks may be a stranger."""

    ok: bool
    message: str
    what_to_do: str = ""
    """Empty where nothing has to be done."""

    def as_json(self) -> dict[str, Any]:
        """For the body of the answer."""
        return {"ok": self.ok, "message": self.message, "what_to_do": self.what_to_do}


class Readiness:
    """What this server needs to do its work, looked at when asked.

    Args:
        state: of the database.
        clocks: by name, those that this server started; `None` for one that is switched off.
    """

    def __init__(self, state: HouseState, clocks: Mapping[str, Service | None]) -> None:
        self._state = state
        self._clocks = clocks

    async def checks(self) -> dict[str, Check]:
        """By name. Never raises."""
        return {"database": await self._database()} | {
            name: _clock(name, clock) for name, clock in self._clocks.items()
        }

    async def _database(self) -> Check:
        try:
            found = await self._state.read(max_age_seconds=_CACHED_SECONDS, wait_seconds=_WAIT_SECONDS)
        except StateUnread:
            return Check(
                ok=False,
                message=f"The database gave no answer within {_WAIT_SECONDS:g} seconds.",
                what_to_do="Wait while it starts; then look at its load and at the network, and run `agent doctor`.",
            )
        except LearningError as error:
            return _fault(error)
        missing = await asyncio.to_thread(migration_names) - set(found["migrations"])
        if missing:
            return _NOT_MIGRATED
        return Check(ok=True, message="The database answers and has all migrations.")


_NOT_MIGRATED: Final = Check(
    ok=False,
    message="The database lacks migrations of this version.",
    what_to_do="Run `agent migrate` against it.",
)


def _fault(error: LearningError) -> Check:
    if isinstance(error, DatabaseUnavailable):
        return Check(
            ok=False,
            message="The database cannot be reached.",
            what_to_do="Look whether it runs and whether this machine may connect; `agent doctor` here says more.",
        )
    if isinstance(error, MigrationError):
        return _NOT_MIGRATED
    if isinstance(error, AccessRefused | IdentityError):
        return Check(
            ok=False,
            message="The database does not take this login or key for a server's.",
            what_to_do="Use the service role key, or a login that is a member of agent_server; see `agent doctor`.",
        )
    if isinstance(error, ConfigurationError):
        return Check(
            ok=False,
            message="The settings of the database cannot be used.",
            what_to_do="Correct them; `agent doctor` on this machine says which.",
        )
    return Check(
        ok=False, message="The database refuses.", what_to_do="`agent doctor` on this machine says why."
    )


def _clock(name: str, clock: Service | None) -> Check:
    if clock is None:
        return Check(ok=True, message=f"The {name} is switched off in this process.")
    if clock.is_running:
        return Check(ok=True, message=f"The {name} ticks.")
    return Check(
        ok=False,
        message=f"The {name} has stopped.",
        what_to_do="Restart this process; the log of its `agent.events` says why it stopped.",
    )


@router.get("/healthz", include_in_schema=False)
async def healthz() -> JSONResponse:
    """This process lives and its event loop turns."""
    return JSONResponse({"alive": True}, headers=_UNCACHED)


@router.get("/readyz", include_in_schema=False)
async def readyz(here: Annotated[House, Depends(house)]) -> JSONResponse:
    """Whether this process can do its work, check by check; 503 where one of them fails."""
    checks = await Readiness(here.state, here.clocks).checks()
    ready = all(check.ok for check in checks.values())
    return JSONResponse(
        {"ready": ready, "checks": {name: check.as_json() for name, check in checks.items()}},
        status_code=200 if ready else 503,
        headers=_UNCACHED,
    )
