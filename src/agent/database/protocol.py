"""The one way to the database: a named storage function and its arguments (D1)."""

from __future__ import annotations

import asyncio
import json
import math
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, LiteralString
from uuid import UUID

from agent.errors import (
    AccessRefused,
    ConflictError,
    DatabaseUnavailable,
    IdentityError,
    InvalidLearning,
    LearningError,
    MigrationError,
    NotFound,
    OperatorError,
)
from agent.identity import Identity
from agent.portal import portal

_SECRET_WAITS_SECONDS = 1.0
"""Longest wait for the secret; the reading of it goes on."""
_SECRET_RESTS_SECONDS = 2.0
"""How long it is not asked for after it could not be read."""


Begun = Callable[[], Coroutine[Any, Any, Any]]
"""A call that was sent: its result."""


class Database(ABC):
    """A transport to the storage functions, and the storage operations that people call themselves.

    Safe for use from any number of tasks, threads and event loops: the work is done in the portal.
    """

    _secret: str | None = None
    _secret_rests_until = 0.0
    _reading_secret: asyncio.Task[None] | None = None

    async def call(self, function: str, identity: Identity | None = None, /, **arguments: Any) -> Any:
        """Run one storage function, one transaction, and return its JSON result.

        Raises:
            DatabaseUnavailable: not reachable; the same call may succeed later.
            LearningError: another branch of the tree in `agent.errors`, by what the function refused.
        """
        return await portal().run(self._call(function, identity, **arguments))

    def begin(self, function: str, identity: Identity, /, **arguments: Any) -> Begun | None:
        """Send a call now, without waiting, from any thread; `None` where the transport cannot, at this moment or ever.

        Returns:
            What gives the result of the call: to be called once, and awaited in the portal.
        """
        return None

    async def prepare(self) -> None:
        """Do what is done once and may take longer than a call should: the embedded server starts and is migrated, and
        the secret is read. A database that is away raises nothing here, unless it is the embedded one."""
        if self._secret is None:
            await portal().run(self._prepare())

    @property
    def is_prepared(self) -> bool:
        """Whether `prepare` has nothing left to do."""
        return self._secret is not None

    async def close(self) -> None:
        """Give back connections; calls after it open new ones."""
        await portal().run(self._close())

    @abstractmethod
    async def _call(self, function: str, identity: Identity | None = None, /, **arguments: Any) -> Any:
        """`call` in the portal."""

    async def _prepare(self) -> None:
        """`prepare` in the portal."""
        await self._read_secret()

    @abstractmethod
    async def _close(self) -> None:
        """`close` in the portal."""

    def secret(self) -> str | None:
        """What all servers of this database know and no client does, to seal with; `None` where it is not known yet:
        then `prepare` reads it. A thread without an event loop waits for it."""
        if self._secret is None and not _in_a_loop():
            portal().run_sync(self._prepare())
        return self._secret

    async def _read_secret(self) -> None:
        """Read the secret, where this was not done. What cannot be read is asked for again after some seconds."""
        if self._secret is not None or time.monotonic() < self._secret_rests_until:
            return
        if self._reading_secret is None or self._reading_secret.done():
            self._reading_secret = asyncio.get_running_loop().create_task(self._ask_for_secret())
        await asyncio.wait([self._reading_secret], timeout=_SECRET_WAITS_SECONDS)

    async def _ask_for_secret(self) -> None:
        try:
            self._secret = str(await self._call("server_secret", purpose="seal"))
        except (
            LearningError
        ):  # each call says for itself what is wrong; until then seals hold in this process
            self._secret_rests_until = time.monotonic() + _SECRET_RESTS_SECONDS

    async def get_learning(self, memory_id: str, *, identity: Identity) -> dict[str, Any] | None:
        """One memory with its versions and evidence, or `None` where this identity has none of that id."""
        found: dict[str, Any] | None = await self.call(
            "get_learning", somebody(identity), the_memory_id=checked_id(memory_id)
        )
        return found

    async def get_learnings(
        self,
        *,
        identity: Identity,
        store: str | None = None,
        kind: str | None = None,
        field: str | None = None,
        limit: int = 100,
        offset: int = 0,
    ) -> list[dict[str, Any]]:
        """Current memories, newest first; turns of conversations only with `store="conversation"`. At most 10,000 at
        once."""
        wanted = {"store": store, "kind": kind, "field": field}
        found: list[dict[str, Any]] = await self.call(
            "get_learnings",
            somebody(identity),
            wanted={name: value for name, value in wanted.items() if value is not None},
            memory_limit=limit,
            memory_offset=offset,
        )
        return found

    async def upsert_learning(
        self, learning: Mapping[str, Any], *, identity: Identity, memory_limit: int | None = None
    ) -> dict[str, Any]:
        """Write one memory as it is given; `LearningMachine.upsert_learning` checks it against its store first.

        Args:
            learning: `store`, `content`, and what else `agent_private.write_memory` takes; with `action: retire` it is
                retired.
            identity: whose it is.
            memory_limit: greatest number of memories of this store; the oldest above it are retired.

        Returns:
            The receipt: `status` (`created`, `updated`, `unchanged`, `retired`, `absent`), `memory_id`, `version`, ….

        Raises:
            InvalidLearning: it has no store or no content.
            NotFound: no such memory of this identity.
            ConflictError: it is at another version than `expected_version`.
        """
        receipts: list[dict[str, Any]] = await self.call(
            "upsert_learnings",
            somebody(identity),
            learnings=[dict(learning)],
            limits={} if memory_limit is None else {str(learning.get("store")): memory_limit},
        )
        return receipts[0]

    async def delete_learning(self, memory_id: str, *, identity: Identity) -> bool:
        """Delete one memory for good with all its versions. `False`: this identity has none of that id."""
        return bool(
            await self.call("delete_learning", somebody(identity), the_memory_id=checked_id(memory_id))
        )

    async def delete_learnings(self, memory_ids: Sequence[str], *, identity: Identity) -> int:
        """Delete these memories for good; ids this identity does not have are passed over. Returns how many went."""
        ids = [checked_id(memory_id) for memory_id in memory_ids]
        return int(await self.call("delete_learnings", somebody(identity), the_memory_ids=ids))

    async def clear_learnings(self, *, identity: Identity, store: str | None = None) -> int:
        """Delete all memories of an identity for good, of one store or of all. Returns how many went."""
        return int(await self.call("clear_learnings", somebody(identity), the_store=store))


def _in_a_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def somebody(identity: Identity) -> Identity:
    """The identity, if it names a user.

    Raises:
        IdentityError: it is none, or names nobody: an empty scope is refused.
    """
    if not isinstance(identity, Identity):
        raise IdentityError(f"identity={identity!r} must be an agent.Identity")
    if not identity.is_somebody:
        raise IdentityError("the identity names no user: an empty scope is refused")
    return identity


def checked_id(memory_id: str) -> str:
    """The id as Postgres writes it.

    Raises:
        InvalidLearning: it is no UUID.
    """
    try:
        return str(UUID(memory_id))
    except (ValueError, AttributeError, TypeError):
        raise InvalidLearning(f"memory_id={memory_id!r} is no memory id (a UUID)") from None


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
        "discovery",
        "limits",
        "embeddings",
        "models",
        "conditions",
        "sessions",
        "report",
        "request",
        "decisions",
        "interrupt",
        "ref",
        "rule",
        "entry",
        "halt",
        "tool",
        "findings",
        "silence",
        "patterns",
        "outcomes",
        "sightings",
        "turns",
        "filters",
    }
)
# Arguments whose type Postgres does not find out from text.
CASTS: dict[str, LiteralString] = dict.fromkeys(JSON_ARGUMENTS, "::jsonb") | {
    "the_memory_id": "::uuid",
    "the_memory_ids": "::uuid[]",
    "run_ids": "::text[]",
    "stores": "::text[]",
    "the_queues": "::text[]",
    "the_approval_id": "::uuid",
    "the_batch_id": "::uuid",
    "batch_id": "::uuid",
    "the_rule_id": "::uuid",
    "halt_id": "::uuid",
    "channels": "::text[]",
    "checked": "::text[]",
    "sinks": "::text[]",
    "the_alert_id": "::uuid",
    "the_notice_id": "::uuid",
    "the_silence_id": "::uuid",
    "as_of": "::timestamptz",
    "attempt": "::integer",
    "delivered_version": "::bigint",
    "the_log_id": "::bigint",
    "the_tables": "::text[]",
    "kept_tables": "::text[]",
    "the_columns": "::text[]",
    "how_read": "::text[]",
    "percent": "::double precision",
    "version": "::integer",
    "per_hour": "::integer",
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
    try:  # most documents need no cleaning, and cleaning takes ten times as long as writing
        written = json.dumps(value, ensure_ascii=False, allow_nan=False)
        written.encode()
        if "\\u0000" not in written:
            return written
    except (TypeError, ValueError):  # odd objects, odd keys, no numbers, half characters
        pass
    return json.dumps(clean(value), ensure_ascii=False, default=lambda odd: clean(str(odd)), allow_nan=False)


def refusal(function: str, sqlstate: str | None, message: str) -> LearningError:
    """The error of our tree for an error of the database.

    Args:
        function: the storage function that was called.
        sqlstate: five letters by PostgreSQL's appendix A, or one of ours (`agent_private.refuse`).
        message: the primary message of the server; it holds no stored text.
    """
    match sqlstate:
        case "PT403":
            return IdentityError(f"{function}: {message}")
        case "PT409":
            return ConflictError(f"{function}: {message}")
        case "PT404":
            return NotFound(f"{function}: {message}")
        case "PT422" | "23502" | "23514":
            return InvalidLearning(f"{function}: {message}")
        case "42501":
            return AccessRefused(
                f"{function}: {message}. This login, key or token may not do that; a server needs a service key or a "
                "login that is a member of agent_server"
            )
        case "42883" | "42P01" | "3F000" | "PGRST202" | "PGRST205":
            return MigrationError(
                f"the database has no function {function} of this version, or not all of it ({message}); run "
                "`agent migrate` against it, and if that changes nothing, `agent doctor`"
            )
        case "42703" | "42704":
            return MigrationError(
                f"{function}: {message}. Something that a migration made is gone, or somebody changed it; "
                "`agent doctor` says what is there"
            )
        case "40001" | "40P01" | "23505":
            return ConflictError(f"{function}: {message}")
        case str() if sqlstate.startswith(
            ("08", "53", "57")
        ):  # connection, resources, cancelled or shut down
            return DatabaseUnavailable(f"{function}: {message} ({sqlstate})")
        case str() if sqlstate.startswith(
            ("22", "54")
        ):  # a value that cannot be, or is larger than Postgres can hold
            return InvalidLearning(f"{function}: {message}")
        case _:
            return OperatorError(f"{function} failed in the database ({sqlstate}): {message}")
