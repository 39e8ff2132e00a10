"""The seal on a paused run of an agent-written tool: it is put back only as it was put away, where it belongs.

The interpreter loads a snapshot as it is, so a forged one would be a way into it. The seal binds the bytes to the
approval that the run waits for, to the code and to the tenant, with a secret that all servers of one database share.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets


class ContinuationSeal:
    """Seals and checks with one secret; without one, with a key of this process."""

    def __init__(self, secret: str | None) -> None:
        material = secret.encode() if secret is not None else secrets.token_bytes(32)
        self._key = hashlib.blake2b(material, person=b"agent tool pause").digest()

    def of(self, payload: str, *, approval_id: str, code_hash: str, tenant_id: str) -> str:
        """The seal of this text in this place, in hexadecimal digits."""
        bound = json.dumps([approval_id, code_hash, tenant_id, payload])
        return hmac.new(self._key, bound.encode(), hashlib.sha256).hexdigest()

    def holds(
        self, mac: object, payload: object, *, approval_id: str, code_hash: str, tenant_id: str
    ) -> bool:
        """Whether the text carries its seal, and belongs here."""
        if not isinstance(mac, str) or not isinstance(payload, str) or not mac.isascii():
            return False
        expected = self.of(payload, approval_id=approval_id, code_hash=code_hash, tenant_id=tenant_id)
        return hmac.compare_digest(mac, expected)
