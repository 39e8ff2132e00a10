"""The structure of an application's database as one value, the names in it, and the connection that reads it."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, fields
from typing import Any, Final
from urllib.parse import urlsplit

import psycopg
from psycopg import AsyncConnection
from psycopg.conninfo import conninfo_to_dict

from agent.database.connection_errors import check_address, explain, plain_address
from agent.database.opening import EmbeddedDatabase, open_database
from agent.errors import ConfigurationError
from agent.settings import Settings

OWN_APP: Final = "default"
"""The app whose database is the layer's own."""

_CONNECT_SECONDS = 10
_LOCK_MILLISECONDS = 500  # to wait for somebody's ALTER TABLE; then the object is reported as not seen
_IDLE_SECONDS = 60  # in a transaction, before the server ends it
_POOLER_PORT = 6543  # Supabase's transaction pooler: what is set in a session would reach other clients
_PLAIN_NAME = re.compile(r"[a-z_][a-z0-9_]*\Z")
# `SELECT word FROM pg_get_keywords() WHERE catcode <> 'U'` of Postgres 18: what quote_ident quotes.
_KEYWORDS_TEXT = """
all analyse analyze and any array as asc asymmetric authorization between bigint binary bit boolean both case cast
char character check coalesce collate collation column concurrently constraint create cross current_catalog
current_date current_role current_schema current_time current_timestamp current_user dec decimal default deferrable
desc distinct do else end except exists extract false fetch float for foreign freeze from full grant greatest group
grouping having ilike in initially inner inout int integer intersect interval into is isnull join json json_array
json_arrayagg json_exists json_object json_objectagg json_query json_scalar json_serialize json_table json_value
lateral leading least left like limit localtime localtimestamp merge_action national natural nchar none normalize
not notnull null nullif numeric offset on only or order out outer overlaps overlay placing position precision
primary real references returning right row select session_user setof similar smallint some substring symmetric
system_user table tablesample then time timestamp to trailing treat trim true union unique user using values
varchar variadic verbose when where window with xmlattributes xmlconcat xmlelement xmlexists xmlforest
xmlnamespaces xmlparse xmlpi xmlroot xmlserialize xmltable
"""
_KEYWORDS = frozenset(_KEYWORDS_TEXT.split())


def quoted(name: str) -> str:
    """A name as it stands in SQL: in double quotes only where Postgres needs them."""
    if _PLAIN_NAME.match(name) and name not in _KEYWORDS:
        return name
    return '"' + name.replace('"', '""') + '"'


def full_name(schema: str, name: str) -> str:
    """`schema.name`, each part quoted where Postgres needs it: how every table is called in documents and diffs."""
    return f"{quoted(schema)}.{quoted(name)}"


def function_name(document: Mapping[str, Any]) -> str:
    """`schema.name(argument types)` of a function's document; overloaded functions have different ones."""
    return f"{full_name(document['schema'], document['name'])}({document['identity_arguments']})"


@dataclass(frozen=True, kw_only=True, eq=False)
class AppStructure(Mapping[str, Any]):
    """What discovery knows of one database: a mapping whose keys are also attributes. All of it is plain JSON."""

    app: str
    """`default` for the layer's own database, else `host:port/database`."""
    discovered_at: str
    """When the structure was read, ISO 8601 by the clock of the layer's database."""
    tables: list[dict[str, Any]] = field(default_factory=list)
    """Tables, partitioned tables (without their partitions), views, materialised views and foreign tables."""
    functions: list[dict[str, Any]] = field(default_factory=list)
    """Functions, procedures, aggregates and window functions."""
    relationships: list[dict[str, Any]] = field(default_factory=list)
    """Foreign keys, and inferred ones with `declared: false` and their evidence."""
    patterns: list[dict[str, Any]] = field(default_factory=list)
    """What samples of the tables' rows told, one per sampled table."""
    extensions: list[dict[str, Any]] = field(default_factory=list)
    """`{name, version, schema}`; the objects that belong to extensions are left out."""
    problems: list[dict[str, Any]] = field(default_factory=list)
    """`{object, reason}` of what could not be seen."""
    changes: dict[str, list[str]] = field(default_factory=lambda: {"added": [], "removed": [], "changed": []})
    """Names of objects that were added, removed and changed since the discovery before."""

    def __getitem__(self, key: str) -> Any:
        if key not in _FIELDS:
            raise KeyError(key)
        return getattr(self, key)

    def __iter__(self) -> Iterator[str]:
        return iter(_FIELDS)

    def __len__(self) -> int:
        return len(_FIELDS)


_FIELDS: Final = tuple(item.name for item in fields(AppStructure))


def app_name(settings: Settings) -> str:
    """How the database that agents work on is called in our rows: never with a user or a password."""
    if settings.app_database_url is None:
        return OWN_APP
    return plain_address(settings.app_database_url.get_secret_value()).rpartition("@")[2]


@asynccontextmanager
async def open_app_database(settings: Settings) -> AsyncIterator[AsyncConnection[tuple[Any, ...]]]:
    """A connection to the application's database for one loop: read only, bounded in time, in autocommit.

    Every statement is cut off after `discovery_timeout`, and after half a second of waiting for a lock. The search path
    is empty, so names are printed with their schemas. Errors of statements are psycopg's own.

    Raises:
        ConfigurationError: the address is wrong, is a transaction pooler's, or there is none because the layer's
            database is reached by Supabase's keys.
        DatabaseUnavailable: the server cannot be reached.
    """
    url = await _address(settings)
    check_address(url)
    if urlsplit(url).port == _POOLER_PORT:
        raise ConfigurationError(
            f"{plain_address(url)} is a transaction pooler: limits that are set in a session would reach other "
            "clients. Use the direct connection or the session pooler, port 5432, in APP_DATABASE_URL"
        )
    try:
        connection = await AsyncConnection.connect(
            url,
            autocommit=True,
            connect_timeout=_CONNECT_SECONDS,
            prepare_threshold=None,
            client_encoding="utf8",
            application_name=conninfo_to_dict(url).get("application_name") or "agent discovery",
        )
    except psycopg.Error as error:
        raise explain(error, url) from None
    async with connection:
        milliseconds = int(settings.discovery_timeout.total_seconds() * 1000)
        await connection.execute(
            f"SET statement_timeout = {milliseconds}; SET lock_timeout = {_LOCK_MILLISECONDS}; "
            f"SET idle_in_transaction_session_timeout = '{_IDLE_SECONDS}s'; "
            "SET default_transaction_read_only = on; SET search_path = ''; SET jit = off; "
            "SET constraint_exclusion = off; "
            "SET max_parallel_workers_per_gather = 0".encode()
        )
        await connection.set_read_only(True)
        yield connection


async def _address(settings: Settings) -> str:
    if settings.app_database_url is not None:
        return settings.app_database_url.get_secret_value()
    if settings.database_url is not None:
        return settings.database_url.get_secret_value()
    database = open_database(settings)
    if isinstance(database, EmbeddedDatabase):
        return await database.url()
    raise ConfigurationError(
        "the application's database is reached by Supabase's keys, which give no connection of its own: set "
        "APP_DATABASE_URL to the project's session pooler"
    )
