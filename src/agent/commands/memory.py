"""`agent memory`: list, search, show, erase."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from enum import StrEnum
from pathlib import Path
from stat import S_ISREG
from typing import TYPE_CHECKING, Annotated, Any
from uuid import UUID

import typer

from agent.commands.options import (
    EXIT_CODES,
    JsonOption,
    TenantOption,
    UserOption,
    opened_database,
    settings,
    somebody,
    tenant_identity,
    user_identity,
)
from agent.commands.output import (
    Column,
    heading,
    is_terminal,
    local_time,
    one_line,
    print_lines,
    print_table,
    remark,
    say,
    say_json,
    short_id,
)

if TYPE_CHECKING:
    from agent.database import Database
    from agent.identity import Identity

app = typer.Typer(
    help="Memories: list, search, show where one comes from, erase a user.", no_args_is_help=True
)

_SHOWN = 100


class Scope(StrEnum):
    """Whose memories are searched."""

    USER = "user"
    TENANT = "tenant"


@app.command("list", epilog=f"In a pipe: tab-separated lines without a heading. {EXIT_CODES}")
def list_(
    user: UserOption = None,
    store: Annotated[
        str | None,
        typer.Option(
            metavar="STORE",
            help="Only this store: user_profile, user_memory, session_context, conversation.",
        ),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="Show at most so many.")] = 100,
    tenant: TenantOption = None,
    as_json: JsonOption = False,
) -> None:
    """List what is known about a user, newest first; without a user, the users of whom something is known.

    What was said, word for word, is listed with --store conversation alone."""

    async def read() -> tuple[Identity | None, list[dict[str, Any]], bool]:
        async with opened_database() as database:
            identity = user_identity(database, tenant, user)
            if identity is None:
                return None, await database.call("list_users", tenant_identity(tenant)), False
            found: list[dict[str, Any]] = await database.get_learnings(
                identity=identity, store=store, limit=limit + 1
            )
            said = store is None and await database.get_learnings(
                identity=identity, store="conversation", limit=1
            )
            return identity, found, bool(said)

    identity, found, has_said = asyncio.run(read())
    if identity is None:
        if store is not None:
            raise typer.BadParameter(
                "stores are listed for one user; name one with --user", param_hint="'--store'"
            )
        _print_users(found, as_json=as_json)
        return
    has_more = len(found) > limit
    del found[limit:]
    if as_json:
        say_json(found)
        return
    if not found:
        where = "" if store is None else f" in store {store!r}"
        but = " but what was said" if has_said else ""
        remark(f"Nothing{but} is known about {identity.user_id!r} of tenant {identity.tenant_id!r}{where}.")
    elif is_terminal():
        columns = (
            Column(title="memory", style="cyan"), Column(title="store"), Column(title="kind"),
            Column(title="what is known", is_wide=True), Column(title="by"), Column(title="recorded"),
        )  # fmt: skip
        print_table(
            columns,
            (
                (
                    short_id(memory["memory_id"]), memory["store"], one_line(memory["field"] or memory["kind"], 40),
                    one_line(memory["content"], 300), memory["trust"], local_time(memory["recorded_at"]),
                )
                for memory in found
            ),
        )  # fmt: skip
    else:
        print_lines(
            (
                memory["memory_id"], memory["store"], memory["field"] or memory["kind"], memory["trust"],
                memory["recorded_at"], memory["content"],
            )
            for memory in found
        )  # fmt: skip
    if has_more:
        remark(f"The newest {limit} of them; more with --limit {limit * 4}.")
    if has_said:
        remark("What was said, word for word: --store conversation")


def _print_users(users: list[dict[str, Any]], *, as_json: bool) -> None:
    if as_json:
        say_json(users)
    elif not users:
        remark("Nothing is known about anybody yet.")
    elif is_terminal():
        columns = (
            Column(title="user"), Column(title="memories", is_number=True), Column(title="turns", is_number=True),
            Column(title="newest"),
        )  # fmt: skip
        rows = [
            (
                one_line(user["user_id"]),
                str(user["memories"]),
                str(user["turns"]),
                local_time(user["last_recorded_at"]),
            )
            for user in users
        ]
        print_table(columns, rows)
        remark("What is known about one: agent memory list --user USER")
    else:
        print_lines(
            (user["user_id"], user["memories"], user["last_recorded_at"], user["turns"]) for user in users
        )


@app.command(epilog=f"In a pipe: tab-separated lines without a heading. {EXIT_CODES}")
def search(
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="What to look for.")],
    scope: Annotated[
        Scope,
        typer.Option(metavar="SCOPE", help="user, or tenant: what is known of the application, for example."),
    ] = Scope.USER,
    user: UserOption = None,
    limit: Annotated[int, typer.Option(min=1, max=200, help="Show at most so many.")] = 5,
    tenant: TenantOption = None,
    as_json: JsonOption = False,
) -> None:
    """Find what is known about a user, or to all of a tenant, that bears on a question, best first."""

    def asking(database: Database) -> Identity:
        return tenant_identity(tenant) if scope is Scope.TENANT else somebody(database, tenant, user)

    by_words = settings().embedding_model is None
    found = asyncio.run((_search_by_words if by_words else _search)(question, asking, limit, scope.value))
    if as_json:
        say_json(found)
    elif not found:
        remark("Nothing known bears on that.")
    elif is_terminal():
        columns = (
            Column(title="memory", style="cyan"), Column(title="score", is_number=True),
            Column(title="what is known", is_wide=True), Column(title="recorded"),
        )  # fmt: skip
        rows = [(short_id(memory["memory_id"]), f"{memory['score']:.2f}", one_line(memory["content"], 300),
                 local_time(memory["recorded_at"])) for memory in found]  # fmt: skip
        print_table(columns, rows)
    else:
        print_lines((memory["memory_id"], memory["score"], memory["content"]) for memory in found)


async def _search_by_words(
    question: str, asking: Callable[[Database], Identity], limit: int, scope: str
) -> list[dict[str, Any]]:
    async with opened_database() as database:
        found: list[dict[str, Any]] = await database.call(
            "match_memories", asking(database), question=question, memory_limit=limit, the_scope=scope
        )
        return found


async def _search(
    question: str, asking: Callable[[Database], Identity], limit: int, scope: str
) -> list[dict[str, Any]]:
    """By words and vectors; apart from the other because embedders take a second to import."""
    from agent.learning.machine import LearningMachine

    machine = LearningMachine(settings=settings())
    try:
        return await machine.search(question, identity=asking(machine.database), limit=limit, scope=scope)
    finally:
        await machine.aclose()


@app.command(epilog=EXIT_CODES)
def show(
    memory_id: Annotated[
        str, typer.Argument(metavar="MEMORY_ID", help="Id of the memory, or how it begins.")
    ],
    user: UserOption = None,
    tenant: TenantOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show one memory: its versions, and the runs and quotes that it was learned from."""

    async def read() -> dict[str, Any]:
        async with opened_database() as database:
            return await _find(database, somebody(database, tenant, user), memory_id)

    memory = asyncio.run(read())
    if as_json:
        say_json(memory)
    else:
        print_memory(memory)


async def _find(database: Database, identity: Identity, memory_id: str) -> dict[str, Any]:
    from agent.errors import NotFound

    found = [memory_id] if _is_uuid(memory_id) else await _ids_like(database, identity, memory_id)
    if len(found) > 1:
        raise NotFound(
            f"{len(found)} memories begin with {memory_id!r}: {', '.join(found[:3])}. Give more of the id"
        )
    memory: dict[str, Any] | None = None
    if found:
        memory = await database.call("get_learning", identity, the_memory_id=found[0])
    if memory is None:
        raise NotFound(
            f"user {identity.user_id!r} of tenant {identity.tenant_id!r} has no memory {memory_id!r}. `agent memory "
            "list` shows those there are; one that was superseded is found by its full id"
        )
    return memory


def _is_uuid(text: str) -> bool:
    try:
        UUID(text)
    except ValueError:
        return False
    return True


async def _ids_like(database: Database, identity: Identity, beginning: str) -> list[str]:
    if not beginning:
        return []
    found = await database.call("get_learnings", identity, wanted={"begins": beginning}, memory_limit=_SHOWN)
    return [memory["memory_id"] for memory in found]


def print_memory(memory: Mapping[str, Any]) -> None:
    """One memory with its versions and evidence, as `get_learning` gives it."""
    heading(f"Memory {memory['memory_id']}")
    is_current = memory["superseded_at"] is None
    facts = {
        "content": memory["content"],
        "store": memory["store"],
        "field" if memory["field"] else "kind": memory["field"] or memory["kind"],
        "trust": memory["trust"],
        "recorded": f"{local_time(memory['recorded_at'])} by {memory['source']}",
        "current": "yes" if is_current else f"no: {memory['superseded_reason']}",
    }
    for name, value in facts.items():
        if value not in (None, ""):
            say(f"  {name}: {one_line(value)}")
    heading("Versions")
    for version in memory["versions"]:
        end = ""
        if version["superseded_at"]:
            end = f" until {local_time(version['superseded_at'])} ({one_line(version['superseded_reason'])})"
        recorded = local_time(version["recorded_at"])
        say(f"  {version['version']}. {one_line(version['content'], 300)}  [{recorded}{end}]")
    heading("Evidence")
    for item in memory["evidence"]:
        where = " ".join(one_line(part) for part in (item["message_id"], item["tool_call_id"]) if part)
        say(f"  version {item['version']}: run {one_line(item['run_id'])}, message {where or '(unknown)'}")
        if item["quote"]:
            say(f'    "{one_line(item["quote"], 300)}"')
    if not memory["evidence"]:
        say("  none: it was not learned from a run")


@app.command(epilog="Exit codes: 0 erased, 1 not erased, 2 wrong usage.")
def erase(
    user: UserOption = None,
    tenant: TenantOption = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Erase a user: memories with their history and evidence, runs, outcomes and waiting jobs. There is no way back."""

    async def name() -> Identity:
        async with opened_database() as database:
            return somebody(database, tenant, user)

    identity = asyncio.run(name())
    if not yes:
        remark(
            f"This erases all that is known about {identity.user_id!r} of tenant {identity.tenant_id!r}, for good."
        )
        print("Type the user id to go on: ", end="", file=sys.stderr, flush=True)
        if sys.stdin.readline().rstrip("\r\n") != identity.user_id:
            remark("agent: that is not the user id; nothing was erased")
            raise typer.Exit(1)

    async def work() -> dict[str, int]:
        async with opened_database() as database:
            counts: dict[str, int] = await database.call("erase_user", identity)
            return counts

    # Before the database: what is delivered from disk afterwards would bring the user back.
    spooled = _forget_spooled(settings().data_dir / "spool", identity)
    counts = {**asyncio.run(work()), "spooled runs on disk": spooled}
    if as_json:
        say_json(counts)
    elif is_terminal():
        columns = (Column(title="table"), Column(title="rows gone", is_number=True))
        print_table(columns, [(table, str(gone)) for table, gone in counts.items()])
    else:
        print_lines(counts.items())


def _forget_spooled(folder: Path, identity: Identity) -> int:
    """Delete a user's runs that wait on this machine for the database, and those it has refused.

    A file that makes no sense is nobody's: it is set aside, and what can be erased is erased.
    """
    from agent.learning.spool import Spool

    gone = 0
    for path in sorted(folder.rglob("*.json")):
        try:
            if not S_ISREG(path.lstat().st_mode):
                continue  # none of ours, and reading a pipe would wait for ever
            whose = dict(json.loads(path.read_bytes())["identity"])
        except OSError:
            continue  # delivered meanwhile, or not ours to read
        except (ValueError, KeyError, TypeError, RecursionError):
            if path.parent == folder:
                with suppress(OSError):
                    Spool(folder).set_aside(path)
            continue
        if (whose.get("tenant_id"), whose.get("user_id")) == (identity.tenant_id, identity.user_id):
            path.unlink(missing_ok=True)
            gone += 1
    return gone
