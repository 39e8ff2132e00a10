"""The seal on a run kept in graph state: whose run it is was said by us and not by a client.

The private part of a graph's state is not taken from a run's input, but who may write a thread's state through a
server's API may write that part too, and would be whoever it names. So what settles the identity is sealed with a
secret that all servers of one database share, and what is not sealed counts for nobody.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
from collections.abc import Mapping
from typing import Any

_SEALED = ("identity", "run_id", "started_at", "first_message_id", "nested")


class RunSeal:
    """Seals and checks with one secret.

    Args:
        secret: that of the database; `None`: one of this process.
        before: what this process sealed with until it knew the secret; that still holds.
    """

    def __init__(self, secret: str | None, before: RunSeal | None = None) -> None:
        self._before = before
        material = secret.encode() if secret is not None else secrets.token_bytes(32)
        self._key = hashlib.blake2b(material, person=b"agent run seal").digest()

    def of(self, kept: Mapping[str, Any]) -> str:
        """The seal for what is kept of a run, in hexadecimal digits."""
        settled = json.dumps([kept.get(name) for name in _SEALED], sort_keys=True)
        return hashlib.blake2b(settled.encode(errors="replace"), key=self._key, digest_size=16).hexdigest()

    def holds(self, kept: Mapping[str, Any]) -> bool:
        """Whether what is kept of a run carries its seal."""
        given = kept.get("seal")
        if not isinstance(given, str):
            return False
        if hmac.compare_digest(given.encode(errors="replace"), self.of(kept).encode()):
            return True
        return self._before is not None and self._before.holds(kept)
