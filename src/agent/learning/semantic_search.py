"""Search in what is known: of a user, and what a tenant shares, such as what discovery learned of the application.

By words, and by vectors of a user's memories where an embedder is set. Nothing is opened at import.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from agent.database.protocol import Database
from agent.database.supabase import SupabaseDatabase
from agent.identity import Identity
from agent.learning.rendering import inert, tokens
from agent.portal import portal
from agent.settings import Settings, current_settings

if TYPE_CHECKING:
    from agent.learning.machine import LearningMachine

__all__ = ["SemanticSearch", "semantic_search"]


class SemanticSearch:
    """Finds memories that bear on a question.

    Args:
        settings: instead of those of the environment.
        database: instead of the one the settings name.
    """

    def __init__(self, *, settings: Settings | None = None, database: Database | None = None) -> None:
        self._given_settings = settings
        self._given_database = database
        self._machine: LearningMachine | None = None

    async def search_memories(
        self, query: str, limit: int = 5, *, identity: Identity | None = None
    ) -> list[dict[str, Any]]:
        """The memories that fit best, each with its `scope` (`user` or `tenant`) and `score`; empty where none does.

        Scores are relative to the best of their scope. With a user's token only that user's memories are searched.

        Args:
            query: what to look for.
            limit: at most so many.
            identity: who asks; `None`: tenant and default user of the settings. Without a user, what the tenant shares.
        """
        return await portal().run(self._search(query, limit, identity))

    def search_memories_sync(
        self, query: str, limit: int = 5, *, identity: Identity | None = None
    ) -> list[dict[str, Any]]:
        """`search_memories` for code without an event loop."""
        return portal().run_sync(self._search(query, limit, identity))

    async def get_relevant_context(
        self, question: str, *, identity: Identity | None = None, token_budget: int | None = None
    ) -> str:
        """What fits a question as lines for a prompt, the best first; empty where nothing does.

        Args:
            question: what the prompt is about.
            identity: as in `search_memories`.
            token_budget: never exceeded; `None` is the setting `token_budget`.
        """
        return await portal().run(self._context(question, identity, token_budget))

    def get_relevant_context_sync(
        self, question: str, *, identity: Identity | None = None, token_budget: int | None = None
    ) -> str:
        """`get_relevant_context` for code without an event loop."""
        return portal().run_sync(self._context(question, identity, token_budget))

    def _opened(self) -> LearningMachine:
        if self._machine is None:
            from agent.learning.machine import LearningMachine

            self._machine = LearningMachine(settings=self._given_settings, database=self._given_database)
        return self._machine

    async def _search(self, query: str, limit: int, identity: Identity | None) -> list[dict[str, Any]]:
        machine = self._opened()
        settings = machine.settings
        who = identity or Identity(tenant_id=settings.tenant, user_id=settings.default_user)
        is_user = (
            isinstance(machine.database, SupabaseDatabase) and machine.database.claimed_identity is not None
        )
        scopes = [*(["user"] if who.is_somebody else []), *([] if is_user else ["tenant"])]
        found = await asyncio.gather(
            *(machine.search(query, identity=who, limit=limit, scope=scope) for scope in scopes)
        )
        memories = [
            {**memory, "scope": scope} for scope, those in zip(scopes, found, strict=True) for memory in those
        ]
        return sorted(memories, key=lambda memory: -float(memory["score"]))[:limit]

    async def _context(self, question: str, identity: Identity | None, token_budget: int | None) -> str:
        settings = self._given_settings or current_settings()
        left = settings.token_budget if token_budget is None else token_budget
        lines = []
        for memory in await self._search(question, 20, identity):
            line = inert(f"- {memory['content']} [{memory['recorded_at'][:10]}, {memory['trust']}]")
            cost = tokens(line) + 1
            if cost <= left:
                left -= cost
                lines.append(line)
        return "\n".join(lines)


semantic_search = SemanticSearch()
"""Search by the settings of the environment."""
