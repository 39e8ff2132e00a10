"""The text of a message of Telegram: with explicit entities and no parse mode, so that nothing is read as markup."""

from __future__ import annotations

from typing import Any, Final

MESSAGE_LIMIT: Final = 4_096
"""UTF-16 units of one message, by Telegram."""


class MessageText:
    """A message that grows, with entities, up to Telegram's limit.

    Args:
        too_long: what is said at the end where not all of it found room.
    """

    def __init__(self, too_long: str) -> None:
        self._too_long = too_long
        self._parts: list[str] = []
        self._entities: list[dict[str, Any]] = []
        self._length = 0
        self._is_whole = True

    def add(self, part: str, kind: str | None = None) -> None:
        """Append a part, or nothing from here on where no room is left."""
        length = _units(part)
        if not self._is_whole or self._length + length > MESSAGE_LIMIT - _units(self._too_long):
            self._is_whole = False
            return
        if kind is not None and part.strip():
            trailing = len(part) - len(part.rstrip("\n"))
            leading = len(part) - len(part.lstrip("\n"))
            self._entities.append(
                {"type": kind, "offset": self._length + leading, "length": length - trailing - leading}
            )
        self._parts.append(part)
        self._length += length

    def finished(self) -> tuple[str, list[dict[str, Any]], bool]:
        """Text, entities counted in UTF-16 units, and whether everything is in it."""
        end = "" if self._is_whole else self._too_long
        return "".join(self._parts) + end, self._entities, self._is_whole


def _units(text: str) -> int:
    return len(text.encode("utf-16-le", "surrogatepass")) // 2
