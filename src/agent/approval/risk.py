"""How dangerous a call is."""

from __future__ import annotations

from enum import StrEnum
from typing import Final, Self

from agent.errors import InvalidRequest


class Risk(StrEnum):
    """From what only reads to what never runs."""

    READ = "READ"
    """Changes nothing: runs alone."""
    WRITE = "WRITE"
    """Changes something: a person is asked."""
    DESTRUCTIVE = "DESTRUCTIVE"
    """May lose what cannot be brought back: two people are asked."""
    FORBIDDEN = "FORBIDDEN"
    """Never runs, approved or not."""

    @property
    def rank(self) -> int:
        """0 for READ to 3 for FORBIDDEN; as text the levels are not in order."""
        return _ORDER.index(self)

    @property
    def stricter(self) -> Risk:
        """One level up; FORBIDDEN stays."""
        return _ORDER[min(self.rank + 1, len(_ORDER) - 1)]

    @classmethod
    def of(cls, text: str) -> Self:
        """The level of this name; LOW, MEDIUM, HIGH and CRITICAL are understood too. Upper and lower case are alike.

        Raises:
            InvalidRequest: there is no such level.
        """
        name = str(text).strip().upper()
        try:
            return cls(_ALSO.get(name, name))
        except ValueError:
            raise InvalidRequest(
                f"risk {text!r} is none of {', '.join(_ORDER)} (nor LOW, MEDIUM, HIGH, CRITICAL)"
            ) from None


_ORDER: Final = tuple(Risk)
_ALSO: Final = {"LOW": "WRITE", "MEDIUM": "WRITE", "HIGH": "DESTRUCTIVE", "CRITICAL": "DESTRUCTIVE"}
