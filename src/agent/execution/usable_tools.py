"""Which versions of tools that agents wrote may run, and for whom: what people approved, and nothing that differs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from agent.approval.binding import binding_hash
from agent.approval.records import Approval
from agent.errors import NotFound, Refused
from agent.execution.call_judging import require_rights
from agent.execution.tool_definition import ToolVersion
from agent.identity import Identity

if TYPE_CHECKING:
    from agent.approval.human_approval import HumanApprovalQueue
    from agent.database.protocol import Database
    from agent.execution.safe_executor import SafeExecutor

CREATE_NEW_TOOL = "create_new_tool"
"""Name of the tool by which an agent hands in another."""
CREATE_RIGHTS = ("tools.create",)
"""Rights that it takes."""
_CARRIED_OUT = ("executing", "executed", "unknown")
"""States of an approval whose version the database let run: it did so in a transaction, and the process that asked for
it may have died before it could say so."""


class UsableTools:
    """Versions of tools, and whether they may run.

    Args:
        database: where they are.
        queue: their approvals.
        executor: its registry says what rights the functions take that they call.
    """

    def __init__(self, database: Database, queue: HumanApprovalQueue, executor: SafeExecutor) -> None:
        self._database = database
        self._queue = queue
        self._executor = executor

    async def version(self, identity: Identity, name: str, version: int | None = None) -> ToolVersion:
        """One version of a tool; without a number the approved one, else the newest.

        Raises:
            NotFound: there is none.
        """
        row = await self._database.call("get_tool", identity, tool_name=name, version=version)
        if row is None:
            raise NotFound(
                f"there is no tool {name!r}" + (f" in version {version}" if version is not None else "")
            )
        return ToolVersion.from_row(row)

    async def approval_of(self, version: ToolVersion, identity: Identity) -> Approval | None:
        """The approval that a version names, as it is now."""
        return None if version.approval_id is None else await self._queue.get(version.approval_id, identity)

    def require_rights(self, tool: str, capabilities: Iterable[str], identity: Identity) -> None:
        """Nothing, if tenant and agent have the rights of these functions, which a tool's code calls.

        Raises:
            Refused: they lack one.
        """
        specs = [spec for spec in map(self._executor.registry.get, capabilities) if spec is not None]
        needed = {right for spec in specs for right in spec.needed_rights}
        require_rights(self._executor.policy, tool, needed, identity)

    def require_usable(self, version: ToolVersion, identity: Identity, approval: Approval | None) -> Identity:
        """The author of a version that people approved, if both author and identity have the rights that it needs.

        Args:
            approval: the one that the version names, as it is now.

        Raises:
            Refused: it is not approved, or not any more, or one of them lacks a right.
        """
        author = self._require_runnable(version, identity, approval)
        for who in (author, identity):
            self.require_rights(version.name, version.capabilities, who)
        return author

    @staticmethod
    def _require_runnable(version: ToolVersion, identity: Identity, approval: Approval | None) -> Identity:
        """The agent that handed in a version, if this is what people approved.

        Raises:
            Refused: it is not, or not any more.
        """
        if version.state != "approved" or approval is None:
            raise Refused(
                f"the tool {version.name!r} is not approved (version {version.version} is {version.state})"
            )
        expected = {"name": version.name, "version": version.version, "code_hash": version.code_hash}
        if not (
            version.is_whole
            and approval.approval_id == version.approval_id
            and approval.kind == "tool_version"
            and approval.state in _CARRIED_OUT
            and dict(approval.arguments) == expected
            and approval.args_hash == approval_hash(expected, identity)
        ):
            raise Refused(
                f"the tool {version.name!r} is not what was approved: its code or its entry was changed. "
                "Retire it and hand it in again."
            )
        return identity.with_(user_id=approval.requested_by, agent_id=approval.agent_id)


def approval_hash(arguments: Mapping[str, Any], identity: Identity) -> str:
    """What the approval of a version is bound to; without the policy's version, since it must hold ever after."""
    return binding_hash(CREATE_NEW_TOOL, dict(arguments), tenant_id=identity.tenant_id)
