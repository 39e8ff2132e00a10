"""The seal on what the executor keeps in a graph's state: it was said by us and not by a client.

Who may write a thread's state through a server's API may write its private part too. What is not sealed with the secret
that all servers of one database share counts as nothing.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Callable, Mapping
from typing import Any, Final

from agent.approval.binding import canonical_json
from agent.database.protocol import Database
from agent.errors import InvalidRequest

DEFAULT_PURPOSE: Final = "agent safe run"


class StateSeal:
    """Seals and checks with one secret; without one it is good for this process only.

    Args:
        secret: of the database.
        purpose: what is sealed, at most 16 letters; what was sealed for one purpose holds for no other.
    """

    def __init__(self, secret: str | None, purpose: str = DEFAULT_PURPOSE) -> None:
        material = secret.encode() if secret is not None else secrets.token_bytes(32)
        self._key = hashlib.blake2b(material, person=purpose.encode()).digest()

    def sealed(self, kept: Mapping[str, Any]) -> dict[str, Any]:
        """The document with its seal."""
        plain = {name: value for name, value in kept.items() if name != "seal"}
        return plain | {"seal": self._of(plain)}

    def holds(self, kept: Any) -> bool:
        """Whether the document carries our seal."""
        if not isinstance(kept, Mapping) or not isinstance(given := kept.get("seal"), str):
            return False
        plain = {name: value for name, value in kept.items() if name != "seal"}
        try:
            expected = self._of(plain)
        except InvalidRequest:
            return False
        return hmac.compare_digest(given.encode(errors="replace"), expected.encode())

    def _of(self, plain: Mapping[str, Any]) -> str:
        text = canonical_json(plain)
        return hashlib.blake2b(text.encode(errors="replace"), key=self._key, digest_size=16).hexdigest()


class DatabaseSeal:
    """The seal of a database's secret once that is known, until then one of this process.

    Args:
        database: gives the database; it is opened no sooner than a seal is needed.
        purpose: as of `StateSeal`.
    """

    def __init__(self, database: Callable[[], Database], purpose: str = DEFAULT_PURPOSE) -> None:
        self._database = database
        self._purpose = purpose
        self._of_database: StateSeal | None = None
        self._of_process = StateSeal(None, purpose)

    @property
    def now(self) -> StateSeal:
        """The one to seal and to check with."""
        if self._of_database is None:
            secret = self._database().secret()
            if secret is None:
                return self._of_process
            self._of_database = StateSeal(secret, self._purpose)
        return self._of_database
