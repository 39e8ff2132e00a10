"""JSON to an address that is a secret, because a token or a key stands in it."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import httpx

_TIMEOUT_SECONDS: Final = 15.0
_LONGEST_WAIT: Final = timedelta(days=1)
_is_secret: ContextVar[bool] = ContextVar("_is_secret", default=False)


async def post_json(
    address: str,
    document: Mapping[str, Any],
    *,
    client: httpx.AsyncClient | None = None,
    headers: Mapping[str, str] | None = None,
) -> httpx.Response:
    """The answer to a document. No redirect is followed, no step takes more than 15 seconds, nothing of it is logged.

    Args:
        address: where it goes; a user and a password in it are sent as Basic authorization.
        document: plain JSON values.
        client: that makes the request; by default one of its own.
        headers: beside those of JSON.

    Raises:
        httpx.HTTPError: no answer. Its words may hold the address.
    """
    import httpx

    with _unlogged():
        if client is not None:
            return await client.post(address, json=document, headers=headers, follow_redirects=False)
        async with httpx.AsyncClient(timeout=_TIMEOUT_SECONDS, follow_redirects=False) as own:
            return await own.post(address, json=document, headers=headers)


def retry_after(response: httpx.Response) -> timedelta | None:
    """How long the other side wants to be left alone, by its header `Retry-After`; `None`: it does not say."""
    given = response.headers.get("retry-after", "")
    try:
        wait = timedelta(seconds=int(given))
    except (ValueError, OverflowError):
        try:
            moment = parsedate_to_datetime(given)
        except ValueError:
            return None
        wait = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)) - datetime.now(UTC)
    return min(wait, _LONGEST_WAIT) if wait > timedelta(0) else None


class _Unlogged(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return not _is_secret.get()


_unlogged_filter = _Unlogged()


@contextmanager
def _unlogged() -> Iterator[None]:
    """Keep httpx from logging, in this task, the addresses it asks."""
    logging.getLogger("httpx").addFilter(_unlogged_filter)  # once, however often it is added
    token = _is_secret.set(True)
    try:
        yield
    finally:
        _is_secret.reset(token)
