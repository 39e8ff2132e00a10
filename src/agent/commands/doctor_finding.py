"""One thing that `agent doctor` looked at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "note", "problem"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was looked at."""

    name: str
    status: Status
    """`note`: works, and worth knowing; `problem`: something has to be done."""
    message: str
    what_to_do: str = ""
    """Empty where nothing has to be done."""
