"""Who a run belongs to, resolved once at its start (D5)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

from agent.errors import IdentityError

DEFAULT_TENANT = "default"
_ID_CHARACTERS_MAX = 512
_ID_BYTES_MAX = 800  # three of them and a name fit a row of an index, which takes 2,704


@dataclass(frozen=True, kw_only=True)
class Identity:
    """Tenant, user, session (LangGraph thread), agent and run. `None` means: not known.

    Ids are any text of at most 512 characters and 800 bytes of UTF-8 without NUL and lone surrogates: dots,
    quotes, `@` and emoji are ids like others and are stored as they are.
    """

    tenant_id: str = DEFAULT_TENANT
    user_id: str | None = None
    session_id: str | None = None
    agent_id: str | None = None
    run_id: str | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is None:
                continue
            if not isinstance(value, str):
                raise IdentityError(f"{name}={value!r} must be text, not {type(value).__name__}")
            if len(value) > _ID_CHARACTERS_MAX:
                raise IdentityError(
                    f"{name} has {len(value)} characters; at most {_ID_CHARACTERS_MAX} are allowed"
                )
            if not value or value.isspace():
                raise IdentityError(f"{name}={value!r} is empty; leave it out to mean nobody")
            if "\x00" in value:
                raise IdentityError(f"{name}={value!r} holds a NUL character, which Postgres cannot store")
            if not _is_storable(value):
                raise IdentityError(f"{name}={value!r} holds half a character (a lone surrogate)")
            if len(value.encode()) > _ID_BYTES_MAX:
                raise IdentityError(
                    f"{name} has {len(value.encode())} bytes of UTF-8; at most {_ID_BYTES_MAX} are allowed"
                )
        if self.tenant_id is None:
            raise IdentityError("tenant_id is missing")

    @property
    def is_somebody(self) -> bool:
        """Whether personal memories may be read or written for this identity."""
        return self.user_id is not None

    def with_(self, **changes: Any) -> Self:
        """The same identity with some ids replaced."""
        return replace(self, **changes)

    def as_json(self) -> dict[str, str]:
        """The ids that are known, as the storage functions take them."""
        return {name: value for name, value in vars(self).items() if value is not None}

    @classmethod
    def from_json(cls, ids: Mapping[str, Any]) -> Self:
        """The inverse of `as_json`; unknown keys are refused."""
        try:
            return cls(**dict(ids))
        except TypeError as error:
            raise IdentityError(f"{dict(ids)!r} is not an identity: {error}") from None


def _is_storable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
