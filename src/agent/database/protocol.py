"""The one way to the database: a named storage function and its arguments (D1)."""

from __future__ import annotations

import json
import math
import re
from typing import Any, LiteralString, Protocol

from agent.errors import (
    AccessRefused,
    ConflictError,
    IdentityError,
    InvalidLearning,
    LearningError,
    MigrationError,
    NotFound,
    OperatorError,
)
from agent.identity import Identity


class Database(Protocol):
    """A transport to the storage functions. Safe for use from any number of tasks of one event loop."""

    async def call(self, function: str, identity: Identity | None = None, /, **arguments: Any) -> Any:
        """Run one storage function, one transaction, and return its JSON result.

        Raises:
            DatabaseUnavailable: not reachable; the same call may succeed later.
            LearningError: another branch of the tree in `agent.errors`, by what the function refused.
        """

    async def prepare(self) -> None:
        """Do what is done once and may take longer than a call should: the embedded server starts and is migrated."""

    async def close(self) -> None:
        """Give back connections; calls after it open new ones."""


# Arguments that are JSON documents; all others are plain values or lists of text.
JSON_ARGUMENTS = frozenset(
    {
        "identity",
        "run",
        "runs",
        "operations",
        "learning",
        "learnings",
        "wanted",
        "limits",
        "embeddings",
        "sessions",
    }
)
# Arguments whose type Postgres does not find out from text.
CASTS: dict[str, LiteralString] = dict.fromkeys(JSON_ARGUMENTS, "::jsonb") | {
    "the_memory_id": "::uuid",
    "the_memory_ids": "::uuid[]",
    "run_ids": "::text[]",
    "stores": "::text[]",
}

_NOT_STORABLE = re.compile("[\x00\ud800-\udfff]")


def clean(value: Any) -> Any:
    """The same document without what Postgres cannot store: NUL and lone surrogates become U+FFFD, numbers that are
    none become text."""
    if isinstance(value, str):
        return _NOT_STORABLE.sub("\ufffd", value)
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {clean(key) if _is_key(key) else clean(str(key)): clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [clean(item) for item in value]
    return value


def _is_key(key: Any) -> bool:
    return key is None or isinstance(key, str | int | float)


def to_json(value: Any) -> str:
    """A JSON document as Postgres takes it; what JSON cannot say becomes its `str`."""
    return json.dumps(clean(value), ensure_ascii=False, default=lambda odd: clean(str(odd)), allow_nan=False)


def refusal(function: str, sqlstate: str | None, message: str) -> LearningError:
    """The error of our tree for an error of the database.

    Args:
        function: the storage function that was called.
        sqlstate: five letters by PostgreSQL's appendix A, or one of ours (`agent_private.refuse`).
        message: the primary message of the server; it holds no stored text.
    """
    match sqlstate:
        case "AGN01":
            return IdentityError(f"{function}: {message}")
        case "AGN02":
            return ConflictError(f"{function}: {message}")
        case "AGN03":
            return NotFound(f"{function}: {message}")
        case "AGN04" | "23502" | "23514":
            return InvalidLearning(f"{function}: {message}")
        case "42501":
            return AccessRefused(
                f"{function}: {message}. This login or key may not do that; a server needs a service key or a login "
                "that is a member of agent_server"
            )
        case "42883" | "42P01" | "3F000" | "PGRST202" | "PGRST205":
            return MigrationError(
                f"the database has no function {function} of this version; run `agent migrate` against it"
            )
        case "40001" | "40P01" | "23505":
            return ConflictError(f"{function}: {message}")
        case str() if sqlstate.startswith(("22", "54")):  # a value that cannot be, or is larger than Postgres can hold
            return InvalidLearning(f"{function}: {message}")
        case _:
            return OperatorError(f"{function} failed in the database ({sqlstate}): {message}")
