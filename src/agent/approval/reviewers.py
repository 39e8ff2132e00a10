"""Who may decide on approvals, and how each channel knows them. Nobody listed means nobody."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from agent.approval.risk import Risk
from agent.errors import ConfigurationError


@dataclass(frozen=True, kw_only=True)
class Reviewer:
    """A person who may decide."""

    name: str
    """The principal that votes are counted by."""
    user_ids: tuple[str, ...] = ()
    """This person as a user of agents: nobody decides on what they asked for themselves."""
    slack: str | None = None
    """Member id in Slack."""
    telegram: int | None = None
    """User id in Telegram."""
    jwt_subject: str | None = None
    """`sub` of their Supabase access token."""
    token_sha256: str | None = None
    """sha256 of their token for the web, 64 hex digits."""
    interrupt: bool = False
    """Whether they may answer LangGraph interrupts."""
    interrupt_without_login: bool = False
    """Whether every answer counts as theirs where the server has no authentication."""
    cli: bool = False
    """Whether they may be named on the command line."""
    tenants: tuple[str, ...] = ("*",)
    risks: tuple[Risk, ...] = (Risk.WRITE, Risk.DESTRUCTIVE)

    def may_decide(self, tenant_id: str, risk: Risk) -> bool:
        """Whether they decide on calls of this risk in this tenant. Who decides on WRITE decides on READ too."""
        risks = {*self.risks, Risk.READ} if Risk.WRITE in self.risks else set(self.risks)
        return ("*" in self.tenants or tenant_id in self.tenants) and risk in risks - {Risk.FORBIDDEN}

    def is_user(self, user_id: str | None) -> bool:
        """Whether a user of agents is this person."""
        return user_id is not None and (user_id == self.name or user_id in self.user_ids)


class Reviewers:
    """All who may decide.

    Raises:
        ConfigurationError: two share a name or the same account of a channel: one person could vote twice.
    """

    def __init__(self, reviewers: Iterable[Reviewer] = ()) -> None:
        self._all = tuple(reviewers)
        for what in ("name", "slack", "telegram", "jwt_subject", "token_sha256"):
            self._refuse_shared(what, [getattr(reviewer, what) for reviewer in self._all])
        # An id of a user is one person's, and so is a name: a second principal must not vote as the first.
        known_as = [{reviewer.name, *reviewer.user_ids} for reviewer in self._all]
        self._refuse_shared("user_ids", [each for ids in known_as for each in ids])
        if sum(reviewer.interrupt_without_login for reviewer in self._all) > 1:
            raise ConfigurationError(
                "interrupt_without_login = true stands with more than one reviewer: without a login all answers look "
                "alike, so at most one person can be meant"
            )

    @staticmethod
    def _refuse_shared(what: str, values: list[Any]) -> None:
        seen = set()
        for value in values:
            if value is None:
                continue
            if value in seen:
                shown = "" if what == "token_sha256" else f" {value!r}"
                raise ConfigurationError(
                    f"two reviewers share {what}{shown}: one person could vote twice. Give each account to one reviewer"
                )
            seen.add(value)

    def __iter__(self) -> Iterator[Reviewer]:
        return iter(self._all)

    def __len__(self) -> int:
        return len(self._all)

    def by_name(self, name: str) -> Reviewer | None:
        """The reviewer of this name."""
        return next((one for one in self._all if one.name == name), None)

    def by_slack(self, user_id: str) -> Reviewer | None:
        """The reviewer with this member id in Slack."""
        return next((one for one in self._all if user_id and one.slack == user_id), None)

    def by_telegram(self, user_id: int) -> Reviewer | None:
        """The reviewer with this user id in Telegram."""
        if isinstance(user_id, bool) or not isinstance(user_id, int):
            return None
        return next((one for one in self._all if one.telegram == user_id), None)

    def by_subject(self, subject: str) -> Reviewer | None:
        """The reviewer whose access token names this subject; the token's signature is checked before."""
        return next((one for one in self._all if subject and one.jwt_subject == subject), None)

    def by_token(self, token: str) -> Reviewer | None:
        """The reviewer who holds this token. All are compared, each in constant time."""
        digest = hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()
        found = None
        for one in self._all:
            if one.token_sha256 is not None and hmac.compare_digest(one.token_sha256, digest):
                found = one
        return found if token else None

    def for_interrupt(self, user_id: str | None) -> Reviewer | None:
        """Who answered an interrupt: the user whom the server authenticated; `None`: it has no authentication."""
        if user_id is None:
            return next((one for one in self._all if one.interrupt_without_login), None)
        return next((one for one in self._all if one.interrupt and user_id and user_id in one.user_ids), None)

    def allowed(self, tenant_id: str, risk: Risk) -> list[str]:
        """Names of those who decide on calls of this risk in this tenant."""
        return [one.name for one in self._all if one.may_decide(tenant_id, risk)]
