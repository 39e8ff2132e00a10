"""What the log keeps of the arguments of a call that does not run: enough to see what was tried, no keys, no floods."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

from agent.learning.run_record import without_secrets

_TEXT_MAX: Final = 2_000
_ENTRIES_MAX: Final = 50
_DEPTH_MAX: Final = 6
_WHOLE_MAX: Final = 20_000
_SECRET_NAME: Final = re.compile(
    r".*(?:password|passwd|pwd|passphrase|secret|token|api[_-]?key|private[_-]?key|authorization)",
    re.IGNORECASE | re.DOTALL,
)


def as_logged(arguments: Any) -> Any:
    """The arguments with `…` for keys and for values under the name of one, and with what is long or deep cut.

    Texts end after 2,000 characters, lists and objects after 50 entries, nesting after 6 levels, and all of it after
    20,000 characters of text.
    """
    return _cut(arguments, 0, [_WHOLE_MAX])


def _cut(value: Any, depth: int, left: list[int]) -> Any:
    if isinstance(value, str):
        return _text(value, left)
    if value is None or isinstance(value, bool | int | float):
        return value
    if depth == _DEPTH_MAX:
        return "…"
    if isinstance(value, Mapping):
        kept: dict[str, Any] = {}
        for name, item in list(value.items())[:_ENTRIES_MAX]:
            shown = _text(str(name), left)
            kept[shown] = "…" if _SECRET_NAME.fullmatch(shown) else _cut(item, depth + 1, left)
        return kept | ({"…": f"{len(value) - _ENTRIES_MAX} more"} if len(value) > _ENTRIES_MAX else {})
    if isinstance(value, list | tuple):
        items = [_cut(item, depth + 1, left) for item in value[:_ENTRIES_MAX]]
        return items + ([f"… {len(value) - _ENTRIES_MAX} more"] if len(value) > _ENTRIES_MAX else [])
    return _text(repr(value), left)


def _text(text: str, left: list[int]) -> str:
    most = min(_TEXT_MAX, left[0])
    shown = without_secrets(text[: 2 * _TEXT_MAX])[:most]
    left[0] -= len(shown)
    return shown if len(text) <= most else f"{shown}… ({len(text):,} characters)"
