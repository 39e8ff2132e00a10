"""What the server's refusals of a statement mean, and what an agent is told of them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import psycopg

from agent.errors import DatabaseUnavailable, InvalidRequest, LearningError, OperatorError, Refused
from agent.events import emit
from agent.execution.sql_owner_script import Kind

if TYPE_CHECKING:
    from agent.approval.policy_file import PolicyFile

_LOST = ("08", "57P", "53300")
_QUOTED = re.compile(r'".*"', re.DOTALL)


class NotRun(OperatorError):
    """A statement that was surely not run, for a reason that a model may read."""


def is_lost(error: psycopg.Error) -> bool:
    """Whether the connection was lost, or never made."""
    return error.sqlstate is None or error.sqlstate.startswith(_LOST)


def refused(error: psycopg.Error, kind: Kind, seconds: float) -> LearningError:
    """Our error for what the server said to an agent's statement."""
    said = _without_values(error)
    state = error.sqlstate
    if state is None or is_lost(error):
        return DatabaseUnavailable(
            f"the connection to the database was lost ({said}). Whether a write took place, only the log tells"
        )
    if state == "57014":
        return Refused(f"the statement took longer than {seconds:g} seconds and was cancelled. Ask for less")
    if state == "55P03":
        return Refused(
            "rows or a table that the statement needs are locked by somebody else. Try again later"
        )
    if state in ("42501", "25006"):
        # The gate let it through and the server did not: one of the two is wrong.
        emit("sql_by_server_refused", login=kind, sqlstate=state)
        return Refused(
            f"the database did not let this login do that: {said}. Only what the policy file lists may be touched; "
            "functions that row policies, defaults and triggers need are listed in its [sql] functions"
        )
    if state.startswith("53"):
        return Refused(f"the statement needs more than the server gives ({said}). Ask for less")
    if state in ("40001", "40P01"):
        return Refused(f"somebody else changed the same rows at the same time ({said}). Try again")
    return InvalidRequest(f"the database refused the statement: {said} (SQLSTATE {state})")


def refused_write(error: psycopg.Error, policy: PolicyFile) -> LearningError:
    """As `refused`, for a write; of a table of many tenants it is not told which value somebody else has already."""
    if error.sqlstate in ("23505", "23503", "23P01"):
        name = f"{error.diag.schema_name}.{error.diag.table_name}"
        shared = {table.name for table in policy.tables if table.tenant_column is None}
        if name not in shared:
            return InvalidRequest(
                "the database refused the statement: the rows break a constraint of the table (unique, foreign key "
                "or exclusion)"
            )
    return refused(error, "writer", policy.sql.timeout_seconds)


@contextmanager
def surely_not_run(is_for_good: bool) -> Iterator[None]:
    """Before a write is sent, a connection that fails means that nothing took place."""
    try:
        yield
    except (DatabaseUnavailable, psycopg.Error) as error:
        if not is_for_good:
            raise
        emit("sql_write_not_begun", reason=str(error))
        raise NotRun("the database could not be reached, so nothing was run. Try again later") from None


def _without_values(error: psycopg.Error) -> str:
    """The server's first sentence; what it quotes of rows, or what triggers say, is left out."""
    said = error.diag.message_primary or str(error) or type(error).__name__
    kind = (error.sqlstate or "")[:2]
    if kind == "P0":
        return "a function or trigger refused it"
    if kind == "22":  # data that cannot be is quoted, and may itself hold quotes
        said = _QUOTED.sub('"…"', said)
    return said[:300]
