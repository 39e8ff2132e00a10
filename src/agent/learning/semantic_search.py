"""Search in what is known: of a user, and what a tenant shares, such as what discovery learned of the application.

By words, and by vectors where an embedder is set. Nothing is opened at import.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from langchain_core.documents import BaseDocumentCompressor
from langchain_core.messages import BaseMessage

from agent.database.protocol import Database, clean, somebody
from agent.database.supabase import SupabaseDatabase
from agent.errors import IdentityError, InvalidRequest, ModelError
from agent.events import emit
from agent.identity import Identity
from agent.learning.conversation_import import TURN_MAX, as_turns, batches, instant, texts
from agent.learning.rendering import render_lines
from agent.learning.reranking import CANDIDATES
from agent.portal import portal
from agent.settings import Settings, current_settings
from agent.stores.base import Memory
from agent.stores.conversation import CONVERSATION

if TYPE_CHECKING:
    from agent.learning.machine import LearningMachine

__all__ = ["SemanticSearch", "semantic_search"]

SEARCHED_STORES = ("user_memory", CONVERSATION, "application")
"""Stores whose memories are searched."""
LIMIT_MAX = 200
"""Greatest number of results."""
_QUERY_CHARACTERS_MAX = 4_000
_WORD = re.compile(r"\w+")
_TRUSTS = ("user", "tool", "model")
"""Labels that are found: memories of trust `external` never are."""
_TOKENS_OF_A_MEMORY = 20
"""What a memory takes in a context at least, roughly: no more are fetched than could be shown."""


class SemanticSearch:
    """Finds memories that bear on a question, and takes in conversations that happened elsewhere.

    Args:
        settings: instead of those of the environment.
        database: instead of the one the settings name.
        reranker: LangChain document compressor that puts what was found into a better order, as an object or
            `module:object`. `None`: as the settings say.
    """

    def __init__(
        self,
        *,
        settings: Settings | None = None,
        database: Database | None = None,
        reranker: str | BaseDocumentCompressor | None = None,
    ) -> None:
        self._given_settings = settings
        self._given_database = database
        self._given_reranker = reranker
        self._machine: LearningMachine | None = None

    async def search_memories(
        self,
        query: str,
        limit: int = 5,
        *,
        identity: Identity | None = None,
        stores: Sequence[str] | None = None,
        kinds: Sequence[str] | None = None,
        tags: Sequence[str] | None = None,
        trust: Sequence[str] | None = None,
        session_id: str | None = None,
        since: datetime | str | None = None,
        until: datetime | str | None = None,
        as_of: datetime | str | None = None,
    ) -> list[dict[str, Any]]:
        """The memories that fit best, each with its `scope` (`user` or `tenant`), its `score` and `why` it was found;
        empty where none does, and for a query without words.

        `why` names the lists that a memory was found in (`words`, `vector`, …), each with its `rank` there and its
        `score`, 1 being the best of the list. Scores of a scope are multiplied by the share of the query's words that
        its best memory has, divided by that of the other scope, so that neither crowds out the other. With a user's
        token only that user's memories are searched. Text that cannot be stored, such as NUL, is passed over.

        Args:
            query: what to look for; the first 4,000 characters count.
            limit: at most so many, from 1 to 200.
            identity: who asks; `None`: tenant and default user of the settings. Without a user, what the tenant shares.
            stores: only of these: `user_memory`, `conversation`, `application`.
            kinds: only of these kinds, such as `preference`; of a conversation `user` and `assistant`.
            tags: only with all of these.
            trust: only with one of these labels: `user`, `tool`, `model`.
            session_id: only of this session.
            since: only what is so, or was said, since then; a moment without a time zone is UTC.
            until: only what is so, or was said, before then.
            as_of: what was believed at that time, and not what is now.

        Raises:
            InvalidRequest: an argument that cannot be; it names it.
        """
        filters = _filters(stores, kinds, tags, trust, session_id, since, until)
        return await portal().run(self._search(query, limit, identity, filters, as_of))

    def search_memories_sync(
        self,
        query: str,
        limit: int = 5,
        *,
        identity: Identity | None = None,
        stores: Sequence[str] | None = None,
        kinds: Sequence[str] | None = None,
        tags: Sequence[str] | None = None,
        trust: Sequence[str] | None = None,
        session_id: str | None = None,
        since: datetime | str | None = None,
        until: datetime | str | None = None,
        as_of: datetime | str | None = None,
    ) -> list[dict[str, Any]]:
        """`search_memories` for code without an event loop."""
        filters = _filters(stores, kinds, tags, trust, session_id, since, until)
        return portal().run_sync(self._search(query, limit, identity, filters, as_of))

    async def get_relevant_context(
        self,
        question: str,
        *,
        identity: Identity | None = None,
        token_budget: int | None = None,
        stores: Sequence[str] | None = None,
        kinds: Sequence[str] | None = None,
        tags: Sequence[str] | None = None,
        trust: Sequence[str] | None = None,
        session_id: str | None = None,
        since: datetime | str | None = None,
        until: datetime | str | None = None,
        as_of: datetime | str | None = None,
    ) -> str:
        """What fits a question as lines for a prompt, the most useful first; empty where nothing does.

        The text is inert, as in the block of the middleware: neighbouring turns of a conversation are one line, and
        what says nothing new is left out.

        Args:
            question: what the prompt is about.
            identity: as in `search_memories`, and so are the arguments after `token_budget`.
            token_budget: never exceeded; `None` is the setting `token_budget`.

        Raises:
            InvalidRequest: an argument that cannot be; it names it.
        """
        filters = _filters(stores, kinds, tags, trust, session_id, since, until)
        return await portal().run(self._context(question, identity, token_budget, filters, as_of))

    def get_relevant_context_sync(
        self,
        question: str,
        *,
        identity: Identity | None = None,
        token_budget: int | None = None,
        stores: Sequence[str] | None = None,
        kinds: Sequence[str] | None = None,
        tags: Sequence[str] | None = None,
        trust: Sequence[str] | None = None,
        session_id: str | None = None,
        since: datetime | str | None = None,
        until: datetime | str | None = None,
        as_of: datetime | str | None = None,
    ) -> str:
        """`get_relevant_context` for code without an event loop."""
        filters = _filters(stores, kinds, tags, trust, session_id, since, until)
        return portal().run_sync(self._context(question, identity, token_budget, filters, as_of))

    async def add_conversation(
        self,
        messages: Iterable[BaseMessage | Mapping[str, Any]],
        *,
        session_id: str,
        identity: Identity | None = None,
        tags: Sequence[str] = (),
        first_turn: int = 1,
    ) -> dict[str, int]:
        """Remember a conversation that happened elsewhere, word for word.

        It goes in by batches, so a long one may be given whole. Done again, or with more at its end, it adds what is
        new: a turn is known by its session and its number, and one that differs becomes a new version. Where an
        embedder is set the turns get vectors at once; without one, or where it fails, they are found by their words.

        Args:
            messages: LangChain messages, or dicts with `role` (`user` or `human`, `assistant` or `ai`) and `content`,
                and optionally `name` of who speaks, `time` (a `datetime` or ISO 8601), `captions` (texts of the images
                that were sent along), `tags` and `turn`. LangChain messages may have the last four in
                `additional_kwargs`. Messages of tools and of the system, and those that say nothing, are passed over.
            session_id: which conversation it is.
            identity: whose it is; `None`: tenant and default user of the settings.
            tags: of all its turns, to filter by.
            first_turn: number of the first message; each that has no `turn` of its own is one after that before it.

        Returns:
            How many were `added`, `changed`, `unchanged`, and how many old ones were `retired_over_limit` of the user.

        Raises:
            InvalidRequest: a message or an argument that cannot be; nothing of its batch was written.
            IdentityError: the identity names no user, or `session_id` is no id.
        """
        return await portal().run(self._add(messages, session_id, identity, tags, first_turn))

    def add_conversation_sync(
        self,
        messages: Iterable[BaseMessage | Mapping[str, Any]],
        *,
        session_id: str,
        identity: Identity | None = None,
        tags: Sequence[str] = (),
        first_turn: int = 1,
    ) -> dict[str, int]:
        """`add_conversation` for code without an event loop."""
        return portal().run_sync(self._add(messages, session_id, identity, tags, first_turn))

    def _opened(self) -> LearningMachine:
        if self._machine is None:
            from agent.learning.machine import LearningMachine

            self._machine = LearningMachine(
                settings=self._given_settings, database=self._given_database, reranker=self._given_reranker
            )
        return self._machine

    def _asking(self, identity: Identity | None) -> Identity:
        if identity is not None and not isinstance(identity, Identity):
            raise IdentityError(f"identity={identity!r} must be an agent.Identity")
        settings = self._opened().settings
        return identity or Identity(tenant_id=settings.tenant, user_id=settings.default_user)

    async def _search(
        self,
        query: str,
        limit: int,
        identity: Identity | None,
        filters: Mapping[str, Any],
        as_of: datetime | str | None,
    ) -> list[dict[str, Any]]:
        if not isinstance(query, str):
            raise InvalidRequest(f"query={query!r:.100} must be text")
        if type(limit) is not int or not 1 <= limit <= LIMIT_MAX:
            raise InvalidRequest(f"limit={limit!r} must be a number from 1 to {LIMIT_MAX}")
        then = None if as_of is None else instant(as_of, "as_of")
        machine = self._opened()
        who = self._asking(identity)
        text = clean(query)[:_QUERY_CHARACTERS_MAX]
        is_user = (
            isinstance(machine.database, SupabaseDatabase) and machine.database.claimed_identity is not None
        )
        scopes = [*(["user"] if who.is_somebody else []), *([] if is_user else ["tenant"])]
        reranker = await machine.ready_reranker()
        wanted = limit if reranker is None else max(limit, CANDIDATES)
        by_scope = await asyncio.gather(
            *(
                machine.search(
                    text,
                    identity=who,
                    limit=wanted,
                    scope=scope,
                    filters=filters,
                    as_of=then,
                    rerank=False,  # once, when the scopes are together
                )
                for scope in scopes
            )
        )
        found = _merged(text, dict(zip(scopes, by_scope, strict=True)))
        return (found if reranker is None else await reranker.rerank(text, found))[:limit]

    async def _context(
        self,
        question: str,
        identity: Identity | None,
        token_budget: int | None,
        filters: Mapping[str, Any],
        as_of: datetime | str | None,
    ) -> str:
        settings = self._given_settings or current_settings()
        budget = settings.token_budget if token_budget is None else token_budget
        if type(budget) is not int or budget < 0:
            raise InvalidRequest(f"token_budget={token_budget!r} must be a number of at least 0")
        wanted = max(10, min(LIMIT_MAX, budget // _TOKENS_OF_A_MEMORY))
        found = await self._search(question, wanted, identity, filters, as_of)
        return render_lines([Memory.from_row(row) for row in found], token_budget=budget).text

    async def _add(
        self,
        messages: Iterable[BaseMessage | Mapping[str, Any]],
        session_id: str,
        identity: Identity | None,
        tags: Sequence[str],
        first_turn: int,
    ) -> dict[str, int]:
        who = somebody(self._asking(identity)).with_(session_id=session_id)
        if who.session_id is None:
            raise InvalidRequest("session_id=None must name the conversation")
        if type(first_turn) is not int or not 1 <= first_turn <= TURN_MAX:
            raise InvalidRequest(f"first_turn={first_turn!r} must be a number from 1 to {TURN_MAX}")
        if isinstance(messages, str | Mapping) or not isinstance(messages, Iterable):
            raise InvalidRequest("messages must be a list of LangChain messages or dicts")
        machine = self._opened()
        turns = as_turns(messages, first_turn=first_turn, tags=texts(tags, "tags"))
        counts = {"added": 0, "changed": 0, "unchanged": 0, "retired_over_limit": 0}
        for batch in batches(turns):
            receipt = await machine.database.call(
                "add_turns",
                who,
                the_session=session_id,
                turns=batch,
                memory_limit=machine.limits.get(CONVERSATION),
            )
            counts = {name: number + receipt[name] for name, number in counts.items()}
        try:
            await machine.embed_memories(who)
        except ModelError as error:  # the next learning of this user tries again
            emit("embedding_failed", model=str(machine.settings.embedding_model), reason=str(error))
        return counts


def _filters(
    stores: Sequence[str] | None,
    kinds: Sequence[str] | None,
    tags: Sequence[str] | None,
    trust: Sequence[str] | None,
    session_id: str | None,
    since: datetime | str | None,
    until: datetime | str | None,
) -> dict[str, Any]:
    """The filters of `match_memories`, checked."""
    filters: dict[str, Any] = {}
    for name, given, allowed in (
        ("stores", stores, SEARCHED_STORES),
        ("kinds", kinds, None),
        ("tags", tags, None),
        ("trust", trust, _TRUSTS),
    ):
        if given is None:
            continue
        filters[name] = texts(given, name)
        if allowed is not None and (unknown := [item for item in filters[name] if item not in allowed]):
            raise InvalidRequest(f"{name}={given!r}: {unknown[0]!r} is none of {', '.join(allowed)}")
    if session_id is not None:
        filters["session_id"] = Identity(session_id=session_id).session_id
    for name, moment in (("since", since), ("until", until)):
        if moment is not None:
            filters[name] = instant(moment, name)
    return filters


def _merged(query: str, by_scope: Mapping[str, Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    """What the scopes found, best first. Scores are relative to the best of a scope, so that the best of one that has
    next to nothing would stand beside the best of the other; how much of the query it has tells them apart."""
    sought = _stems(query)
    strengths = {
        scope: max((_share(sought, memory["content"]) for memory in found), default=0.0)
        for scope, found in by_scope.items()
    }
    strongest = max(strengths.values(), default=0.0)
    memories = []
    for scope, found in by_scope.items():
        weight = strengths[scope] / strongest if strongest else 1.0
        memories += [
            {**memory, "scope": scope, "score": round(float(memory["score"]) * weight, 4)} for memory in found
        ]
    return sorted(memories, key=lambda memory: -memory["score"])


def _stems(text: str) -> frozenset[str]:
    """The longer words of a text; of ASCII words the first five letters count."""
    return frozenset(
        word[:5] if word.isascii() else word for word in _WORD.findall(text.lower()) if len(word) > 2
    )


def _share(sought: frozenset[str], content: str) -> float:
    """How much of what is sought a content has; something always, for a vector finds what no word does."""
    return max(len(sought & _stems(content)) / len(sought), 0.2) if sought else 0.2


semantic_search = SemanticSearch()
"""Search by the settings of the environment."""
