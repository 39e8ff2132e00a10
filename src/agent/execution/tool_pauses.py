"""Runs of agents' tools that wait for people in the middle: sealed, put away, taken up by whoever goes on with them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from agent.approval.records import Approval
from agent.approval.risk import Risk
from agent.errors import ConflictError, DatabaseUnavailable, LearningError, NotFound, OperatorError, Refused
from agent.events import emit
from agent.execution.continuation_seal import ContinuationSeal
from agent.execution.tool_run import RunProgress
from agent.execution.tool_sandbox import Snapshot
from agent.execution.usable_tools import UsableTools
from agent.identity import Identity

if TYPE_CHECKING:
    from agent.database.protocol import Database

_PUT_BACK_ATTEMPTS = 5
NOT_OURS = "the paused run is not what was put away, or belongs to somebody else; it is not resumed"


class ToolPauses:
    """Paused runs.

    Args:
        database: where they wait.
        usable: says whether their tools may run still.
    """

    def __init__(self, database: Database, usable: UsableTools) -> None:
        self._database = database
        self._usable = usable
        self._made_seal: ContinuationSeal | None = None
        self._own_seal = ContinuationSeal(None)

    async def put_away(
        self, progress: RunProgress, snapshot: Snapshot, wait_seconds: float, *, replaces: str | None
    ) -> None:
        """Keep a run that waits. `replaces`: the approval that it waited for before."""
        payload = json.dumps(progress.as_json() | {"snapshot": snapshot.as_json()})
        mac = (await self._seal()).of(
            payload,
            approval_id=snapshot.approval_id,
            code_hash=progress.tool.code_hash,
            tenant_id=progress.identity.tenant_id,
        )
        await self._database.call(
            "save_continuation",
            progress.identity,
            the_approval_id=snapshot.approval_id,
            payload=payload,
            mac=mac,
            wait_seconds=wait_seconds,
            replaces=replaces,
        )

    async def take(self, approval_id: str, identity: Identity) -> Mapping[str, Any] | None:
        """What waits for this approval, for one taker; `None`: nothing, or it was taken."""
        taking = asyncio.ensure_future(
            self._database.call("take_continuation", identity, the_approval_id=approval_id)
        )
        try:
            kept: Mapping[str, Any] | None = await asyncio.shield(taking)
        except asyncio.CancelledError:
            with suppress(LearningError):
                if await taking is not None:
                    await self.put_back(approval_id, identity, asyncio.CancelledError())
            raise
        return kept

    async def put_back(self, approval_id: str, identity: Identity, why: BaseException) -> None:
        """Give back what was taken and did not go on. Its call still runs once: the approval is claimed once."""
        for attempt in range(_PUT_BACK_ATTEMPTS):
            try:
                await self._database.call(
                    "release_continuation",
                    identity,
                    the_approval_id=approval_id,
                    error=f"{type(why).__name__}: {why}",
                )
            except DatabaseUnavailable:
                await asyncio.sleep(0.2 * 2**attempt)
            else:
                return
        emit("tool_continuation_lost", approval_id=approval_id)

    async def open(
        self, kept: Mapping[str, Any], approval: Approval, identity: Identity
    ) -> tuple[RunProgress, Snapshot]:
        """A run as it was put away, to go on with; one that can never go on is ended, and that is logged.

        Raises:
            Refused: it was changed, belongs elsewhere, or its tool may not run any more.
            NotFound: there is no such tool any more.
            OperatorError: it cannot be checked here.
        """
        try:
            return await self._opened(kept, approval, identity)
        except (Refused, NotFound) as error:
            entry = {
                "state": "refused",
                "tool": _tool_of(kept["payload"]),
                "risk": str(Risk.READ),
                "decision": "refused",
                "error": str(error),
            }
            with suppress(ConflictError):
                await self._database.call(
                    "finish_continuation",
                    identity,
                    the_approval_id=approval.approval_id,
                    the_key="",
                    entry=entry,
                )
            raise

    async def _opened(
        self, kept: Mapping[str, Any], approval: Approval, identity: Identity
    ) -> tuple[RunProgress, Snapshot]:
        """A run as it was put away. The interpreter sees nothing of it before its seal is found whole.

        Raises:
            Refused: it was changed, belongs elsewhere, or its tool may not run any more.
        """
        not_ours = Refused(NOT_OURS)
        try:
            said = json.loads(kept["payload"])
            name, number = str(said["tool"]), int(said["version"])
        except (KeyError, TypeError, ValueError, RecursionError):
            raise not_ours from None
        version = await self._usable.version(identity, name, number)
        author = self._usable.require_usable(
            version, identity, await self._usable.approval_of(version, identity)
        )
        seal = await self._seal()
        if not seal.holds(
            kept.get("mac"),
            kept["payload"],
            approval_id=approval.approval_id,
            code_hash=version.code_hash,
            tenant_id=identity.tenant_id,
        ):
            if seal is self._own_seal:
                raise OperatorError(
                    "the secret of the database is not known here, so no paused run can be checked"
                )
            emit("tool_continuation_refused", approval_id=approval.approval_id, tool=name)
            raise not_ours
        owner = Identity.from_json(said["identity"])
        if (owner.tenant_id, owner.user_id) != (identity.tenant_id, identity.user_id):
            raise not_ours
        progress = RunProgress(
            tool=version,
            identity=owner,
            arguments=said["arguments"],
            run_key=said["run_key"],
            stricter=said["stricter"],
            author=author,
            calls=said["calls"],
            read_untrusted=said["read_untrusted"],
            untrusted=frozenset(said.get("untrusted", ())),  # not in runs put away by an earlier version
        )
        return progress, Snapshot.from_json(said["snapshot"])

    async def _seal(self) -> ContinuationSeal:
        if self._made_seal is None:
            await self._database.prepare()
            if (secret := self._database.secret()) is None:
                return self._own_seal
            self._made_seal = ContinuationSeal(secret)
        return self._made_seal


def _tool_of(payload: Any) -> str:
    """The tool that a paused run says it is of."""
    try:
        return str(json.loads(payload)["tool"])[:200] or "paused run"
    except (KeyError, TypeError, ValueError, RecursionError):
        return "paused run"
