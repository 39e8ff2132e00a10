"""Whether the logins of agents' SQL can do more than the policy file lists: asked when a server starts."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, get_args

from agent.errors import LearningError
from agent.events import emit
from agent.execution.sql_logins import address_of, login_of, logins_file, read_logins
from agent.execution.sql_owner_script import Kind, policy_digest
from agent.execution.sql_rights import excess_rights

if TYPE_CHECKING:
    from agent.approval.policy_file import PolicyFile
    from agent.settings import Settings

_WAIT_SECONDS = 30.0


@dataclass(frozen=True, kw_only=True)
class CheckedLogin:
    """One login, and what it could do beyond the policy."""

    tenant_id: str
    login: str
    too_many: tuple[str, ...]
    """Rights too many. With any of them no statement is run under this login."""
    failure: str | None
    """Why it could not be tested; `None`: it was."""


async def check_logins(
    settings: Settings, policy: PolicyFile, *, owner_url: str | None = None
) -> list[CheckedLogin]:
    """Log in as each login that was made and see that it can do no more than the policy says.

    Args:
        settings: they say where the logins are kept.
        policy: what they may do.
        owner_url: of the embedded server, whose port may be another today; `None`: the addresses that are kept.

    Raises:
        OperatorError: the file of the logins cannot be read.
    """
    known = await asyncio.to_thread(read_logins, logins_file(settings))
    checked = []
    for tenant_id, entry in sorted(known.items()):
        if owner_url is not None and entry.get("policy") != policy_digest(policy, tenant_id):
            continue  # those of the embedded server are made anew at their first use
        for kind in get_args(Kind):
            if kind not in entry:
                continue
            login, too_many, failure = login_of(entry[kind])[0], [], None
            url = entry[kind] if owner_url is None else address_of(owner_url, *login_of(entry[kind]))
            try:
                async with asyncio.timeout(_WAIT_SECONDS):
                    excess = await excess_rights(url, kind, policy, tenant_id)
                too_many = [right for right, is_providers in excess if not is_providers]
            except LearningError as error:
                failure = str(error)
            except TimeoutError:
                failure = f"no answer in {_WAIT_SECONDS:g} seconds"
            checked.append(
                CheckedLogin(tenant_id=tenant_id, login=login, too_many=tuple(too_many), failure=failure)
            )
    return checked


async def warn_of_logins(settings: Settings, policy: PolicyFile, *, owner_url: str | None = None) -> None:
    """Tell by events which logins can do too much, or cannot be tested. The refusal itself is at their first use."""
    try:
        checked = await check_logins(settings, policy, owner_url=owner_url)
    except LearningError as error:
        emit("sql_login_check_failed", tenant_id=None, login=None, reason=str(error))
        return
    for one in checked:
        reason = one.failure or "; ".join(one.too_many[:8])
        if reason:
            emit("sql_login_check_failed", tenant_id=one.tenant_id, login=one.login, reason=reason)
