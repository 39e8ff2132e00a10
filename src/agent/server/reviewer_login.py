"""Who is at the door of the approval pages: a reviewer's token, a Supabase access token, or a session made from one.

A session is a cookie that holds the reviewer's name and an end, signed, and never the token. It ends at once when the
reviewer's token or subject in the policy file changes. What a session does is guarded against other sites twice: a
token in each form, and the origin of the request.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from agent.approval.reviewers import Reviewer, Reviewers
    from agent.settings import Settings

COOKIE = "agent_reviewer"
SESSION_LASTS = timedelta(hours=8)
_AUDIENCE = "authenticated"
_COOKIE_MAX = 2048
_CREDENTIAL_MAX = 8192


@dataclass(frozen=True, kw_only=True)
class Session:
    """A reviewer who has logged in with a browser."""

    reviewer: Reviewer
    session_id: str
    csrf_token: str
    """To be sent with every form of this session."""


@dataclass(frozen=True, kw_only=True)
class LogIn:
    """What a successful log-in gives a browser."""

    session: Session
    cookie: str
    lasts: timedelta


class ReviewerLogin:
    """Recognises reviewers.

    Args:
        reviewers: those of the policy file.
        settings: for the secret of Supabase's tokens and the public address.
        secret: what all servers of one database share; `None`: a session is good in this process only.
        clock: seconds since 1970.
    """

    def __init__(
        self,
        reviewers: Reviewers,
        settings: Settings,
        secret: str | None,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        material = secret.encode() if secret is not None else secrets.token_bytes(32)
        self._key = hashlib.blake2b(material, person=b"agent reviewers").digest()
        self._reviewers = reviewers
        self._settings = settings
        self._clock = clock

    def by_credential(self, credential: str) -> Reviewer | None:
        """The reviewer whose token this is, or whom this access token names; `None`: nobody's."""
        found = self._by_credential(credential.strip())
        return None if found is None else found[0]

    def log_in(self, credential: str) -> LogIn | None:
        """A session for whom the credential names; `None`: nobody."""
        found = self._by_credential(credential.strip())
        if found is None:
            return None
        reviewer, how, ends = found
        now = self._clock()
        end = min(now + SESSION_LASTS.total_seconds(), ends)
        session_id = secrets.token_urlsafe(18)
        content = {"name": reviewer.name, "how": how, "end": int(end), "id": session_id}
        body = base64.urlsafe_b64encode(json.dumps(content).encode()).decode().rstrip("=")
        seal = self._seal("session", body, _credential_of(reviewer, how))
        return LogIn(
            session=self._session(reviewer, session_id),
            cookie=f"{body}.{seal}",
            lasts=timedelta(seconds=max(0, end - now)),
        )

    def by_cookie(self, cookie: str | None) -> Session | None:
        """The session that a cookie holds; `None`: none, over, or not made by us for who the reviewer is today."""
        if not cookie or len(cookie) > _COOKIE_MAX:
            return None
        body, _, seal = cookie.partition(".")
        content = _content(body)
        if content is None or content["end"] <= self._clock():
            return None
        reviewer = self._reviewers.by_name(content["name"])
        if reviewer is None or not (credential := _credential_of(reviewer, content["how"])):
            return None
        if not hmac.compare_digest(
            seal.encode("utf-8", "surrogatepass"), self._seal("session", body, credential).encode()
        ):
            return None
        return self._session(reviewer, content["id"])

    def is_own_form(self, session: Session, csrf_token: str | None) -> bool:
        """Whether a form was made for this session."""
        given = (csrf_token or "").encode("utf-8", "surrogatepass")
        return hmac.compare_digest(given, session.csrf_token.encode())

    def is_own_origin(self, headers: Mapping[str, str]) -> bool:
        """Whether a browser sent this request from one of our pages. No origin told: no."""
        if headers.get("sec-fetch-site", "same-origin") != "same-origin":
            return False
        origin = _place(headers.get("origin") or headers.get("referer"))
        if origin is None:
            return False
        # Hosts rather than whole origins: behind a proxy that does TLS we do not see the scheme.
        return origin in {_place(self._settings.public_url), headers.get("host", "").lower() or None}

    def _session(self, reviewer: Reviewer, session_id: str) -> Session:
        return Session(
            reviewer=reviewer, session_id=session_id, csrf_token=self._seal("form", reviewer.name, session_id)
        )

    def _by_credential(self, credential: str) -> tuple[Reviewer, str, float] | None:
        """The reviewer, how they are known, and when that ends."""
        if not credential or len(credential) > _CREDENTIAL_MAX:
            return None
        reviewer = self._reviewers.by_token(credential)
        if reviewer is not None:
            return reviewer, "token", float("inf")
        claims = self._claims(credential)
        if claims is None:
            return None
        reviewer = self._reviewers.by_subject(claims["sub"])
        return None if reviewer is None else (reviewer, "jwt", float(claims["exp"]))

    def _claims(self, token: str) -> Mapping[str, Any] | None:
        """The claims of a Supabase access token that is ours and holds now."""
        secret = self._settings.supabase_jwt_secret
        if secret is None or token.count(".") != 2:
            return None
        import jwt

        try:
            claims: dict[str, Any] = jwt.decode(
                token,
                secret.get_secret_value(),
                algorithms=["HS256"],
                audience=_AUDIENCE,
                options={"require": ["exp", "aud", "sub"]},
            )
        except (jwt.PyJWTError, ValueError, TypeError):  # the last two: claims of odd kinds
            return None
        if not isinstance(claims["sub"], str) or not claims["sub"]:
            return None
        return claims

    def _seal(self, *parts: str) -> str:
        message = json.dumps(parts).encode()
        return hashlib.blake2b(message, key=self._key, digest_size=24).hexdigest()


def _content(body: str) -> dict[str, Any] | None:
    try:
        content = json.loads(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4)))
    except (ValueError, binascii.Error, RecursionError):
        return None
    kinds = {"name": str, "how": str, "end": int, "id": str}
    if not isinstance(content, dict) or content.keys() != kinds.keys():
        return None
    return content if all(isinstance(content[name], kind) for name, kind in kinds.items()) else None


def _credential_of(reviewer: Reviewer, how: str) -> str:
    """What a session of this kind stands on; empty where the reviewer has it no more."""
    known = {"token": reviewer.token_sha256, "jwt": reviewer.jwt_subject}.get(how)
    return "" if not known else f"{how} {known}"


def _place(address: str | None) -> str | None:
    """Host and port of an address as a browser writes them; `None` where it has none."""
    if not address:
        return None
    try:
        parts = urlsplit(address)
    except ValueError:
        return None
    return parts.netloc.lower() or None if parts.scheme in {"http", "https"} else None
