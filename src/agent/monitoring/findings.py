"""What a check found: the record that checks make and alerts are raised from."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal, get_args

from agent.errors import ConfigurationError

Severity = Literal["info", "warning", "critical"]
SEVERITIES: tuple[Severity, ...] = get_args(Severity)
"""From the mildest to the gravest."""

LONGEST_CAUSE = 200


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that is not as it should be, for as long as the check that made it finds it again.

    Raises:
        ConfigurationError: the cause is empty or longer than 200 letters, or there is no such severity.
    """

    cause: str
    """Stable key of the same thing at the next look, at most 200 letters: `error_rate:agent=support`."""
    check: str
    """Name of the check that found it: `error_rate`."""
    severity: Severity
    title: str
    """One line for a person."""
    what: str
    """What is so, in a sentence or two. Never text of users, nor a key that was found."""
    since: datetime
    """When it began as far as the readings tell, with a time zone."""
    evidence: dict[str, Any]
    """Plain JSON values: the counts and the ids behind it."""
    advice: str
    """What to do now."""
    tenant_id: str | None = None
    """`None`: the deployment's own tenant."""

    def __post_init__(self) -> None:
        if not 0 < len(self.cause) <= LONGEST_CAUSE:
            raise ConfigurationError(
                f"cause {self.cause!r} of a finding must have 1 to {LONGEST_CAUSE} letters"
            )
        if self.severity not in SEVERITIES:
            raise ConfigurationError(
                f"severity {self.severity!r} of finding {self.cause!r} is none of {SEVERITIES}"
            )
        if self.since.tzinfo is None:
            raise ConfigurationError(f"since={self.since!r} of finding {self.cause!r} has no time zone")


def cause_of(check: str, /, **parts: str) -> str:
    """The stable key of a finding: `check:name=value,…`, without empty values; what is too long ends in its hash."""
    named = ",".join(f"{name}={value}" for name, value in parts.items() if value)
    cause = f"{check}:{named}" if named else check
    if len(cause) <= LONGEST_CAUSE:
        return cause
    digits = hashlib.sha256(cause.encode()).hexdigest()[:16]
    return f"{cause[: LONGEST_CAUSE - 17]}#{digits}"
