"""What psycopg says, in plain words, sorted by who must act, and never with the password."""

from __future__ import annotations

from urllib.parse import SplitResult, unquote, urlsplit

import psycopg
from psycopg.conninfo import conninfo_to_dict

from agent.errors import AccessRefused, ConfigurationError, DatabaseUnavailable, LearningError, OperatorError

_ENCODE = (
    "Characters such as @ : / ? # and % in a user name or password must be percent-encoded: %40 for @, %2F for / and "
    "so on; for the whole password: python -c 'import urllib.parse, getpass; "
    'print(urllib.parse.quote(getpass.getpass(), safe=""))\''
)


def check_address(url: str) -> None:
    """Refuse an address that libpq would cut in the wrong place: it would look for a part of the password as a host,
    and show it.

    Raises:
        ConfigurationError: without the address, because nobody can tell which part is the password.
    """
    scheme, separator, rest = url.partition("://")
    if not separator or scheme not in ("postgresql", "postgres"):
        raise ConfigurationError("the database address must begin with postgresql:// and does not")
    if fault := _fault(rest):
        raise ConfigurationError(f"the database address has {fault}. {_ENCODE}")
    try:
        urlsplit(url).port  # noqa: B018 - reading it is the check
        conninfo_to_dict(url)
    except (
        ValueError,
        psycopg.ProgrammingError,
    ):  # both show what they could not read, which may be the password
        raise ConfigurationError(
            f"the database address or one of its options cannot be read. {_ENCODE}"
        ) from None


def _fault(rest: str) -> str | None:
    """What makes libpq and us cut this, an address without its scheme, in different places; `None` for nothing.

    For libpq a `?` or `#` before the `@` is a part of the user's name or password, for URLs in general it ends the
    host: the password's beginning would pass for a port, and would be shown.
    """
    login, is_login, _ = rest.partition("/")[0].partition("@")
    if is_login and "?" in login:
        return "a '?' before its '@'; in a name or password it is written %3F"
    authority, _, path = rest.partition("?")[0].partition("/")
    if "#" in authority:
        return "a '#' before its path; in a name or password it is written %23"
    if authority.count("@") > 1 or "@" in path:
        return "more than one '@' or one in a wrong place"
    return None


def plain_address(url: str) -> str:
    """The address as it may be shown: `user@host:port/database`; nothing of one that `check_address` refuses."""
    parts = _split(url)
    if parts is None:
        return "the database"
    query = dict(pair.partition("=")[::2] for pair in parts.query.split("&"))
    host = parts.hostname or unquote(query.get("host", "")) or "this machine"
    port = parts.port or query.get("port") or 5432
    user = f"{unquote(parts.username)}@" if parts.username else ""
    return f"{user}{host}:{port}/{unquote(parts.path.lstrip('/'))}"


def explain(error: psycopg.Error, url: str) -> LearningError:
    """The error of ours for one of psycopg's that came while connecting or from a lost connection.

    The server's language is not always English: what is not recognised counts as unavailable, with the server's words.
    """
    where = plain_address(url)
    said = _without_password(str(error), url)
    rows = [row.strip() for row in said.splitlines() if row.strip()]
    last = next(
        (row for row in reversed(rows) if not row.endswith("?")), type(error).__name__
    )  # libpq asks back
    if (
        error.sqlstate == "28P01"
        or "password authentication failed" in said
        or "no password supplied" in said
    ):
        return ConfigurationError(
            f"{where} refused the password (or there is no such user). Check both in DATABASE_URL."
        )
    if error.sqlstate == "3D000" or ("database " in said and " does not exist" in said):
        return ConfigurationError(
            f"there is no such database: {where}. Create it, or correct the name in DATABASE_URL."
        )
    if error.sqlstate == "28000" or "pg_hba.conf" in said or ("role " in said and " does not exist" in said):
        return ConfigurationError(
            f"{where} does not let this user in from here: {last}. Check the user in DATABASE_URL, and on the server "
            "pg_hba.conf; a managed server may want sslmode=require."
        )
    if "invalid sslmode" in said:
        return ConfigurationError(f"the database address has a wrong option: {last}. Correct DATABASE_URL.")
    if error.sqlstate == "42501":
        return AccessRefused(
            f"{where} refused: {last}. Connect as the owner of the tables, or have the rights granted."
        )
    if error.sqlstate == "53300" or "too many clients" in said or "remaining connection slots" in said:
        return DatabaseUnavailable(
            f"{where} has no connection left: {last}. Close some, raise max_connections, or connect through a pooler."
        )
    if "failed to resolve host" in said or "could not translate host name" in said:
        return DatabaseUnavailable(
            f"the host of {where} is not known here. Check it in DATABASE_URL, and the network."
        )
    if (
        "timeout expired" in said
        or "timed out" in said
        or isinstance(error, psycopg.errors.ConnectionTimeout)
    ):
        return DatabaseUnavailable(
            f"{where} did not answer in time. Is it running, and does a firewall let you through?"
        )
    if error.sqlstate is not None and not error.sqlstate.startswith(("08", "53", "57")):
        return OperatorError(f"{where} answered with an error: {last} (SQLSTATE {error.sqlstate})")
    return DatabaseUnavailable(
        f"{where} cannot be reached: {last}. Is it running, and are host and port right?"
    )


def _without_password(text: str, url: str) -> str:
    parts = _split(url)
    options = [pair.partition("=") for pair in parts.query.split("&")] if parts else []
    for password in (
        parts.password if parts else None,
        *(value for name, _, value in options if name in ("password", "sslpassword")),
    ):
        for form in {password, unquote(password)} if password else ():
            text = text.replace(form, "***")
    return text


def _split(url: str) -> SplitResult | None:
    try:
        check_address(url)
    except ConfigurationError:
        return None
    return urlsplit(url)
