"""Discovery of the application that agents work on: `auto_discovery` finds out what its database holds.

Nothing is opened at import; the settings are read when they are first needed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from agent.database.opening import open_database
from agent.database.protocol import Database
from agent.discovery.discovering import Known, as_structure, discover, load_known
from agent.discovery.pattern_learning import learn_patterns, stored_patterns
from agent.discovery.structure import AppStructure, app_name
from agent.errors import NotFound
from agent.learning.app_rendering import render_structure
from agent.portal import portal
from agent.settings import Settings, current_settings

if TYPE_CHECKING:
    from langchain_core.tools import BaseTool

__all__ = ["AutoDiscovery", "auto_discovery", "find_in_application_tool"]


_FIRST_TABLES_MAX = 200
"""Tables of an application that are sampled at once when it is first discovered."""
_FIRST_TIME = timedelta(seconds=10)
"""How long they are sampled then."""


class AutoDiscovery:
    """What is known of one application's database, and the way to find out.

    Safe for use from any number of tasks, threads and event loops.

    Args:
        settings: instead of those of the environment.
        database: where knowledge is kept, instead of the one the settings name. It is also what is discovered, unless
            `app_database_url` is set.
    """

    def __init__(self, *, settings: Settings | None = None, database: Database | None = None) -> None:
        self._given_settings = settings
        self._given_database = database
        self._database: Database | None = None
        self._known: Known | None = None

    @property
    def settings(self) -> Settings:
        return self._given_settings or current_settings()

    @property
    def database(self) -> Database:
        """Where knowledge is kept."""
        if self._given_database is not None:
            return self._given_database
        if self._database is None:
            self._database = open_database(self.settings)
        return self._database

    async def discover_app_structure(
        self,
        schemas: Sequence[str] | None = None,
        *,
        patterns: bool | None = None,
        progress: Callable[[str], None] | None = None,
    ) -> AppStructure:
        """Read the structure of the application's database, learn what is new in it, and return all that is known.

        What did not change since the last time is neither sent nor written again. `changes` says what did, `problems`
        what could not be seen. Nothing is locked. Patterns and inferred relationships are as they were last time,
        unless rows are sampled now.

        Args:
            schemas: only these; what is known of others stays. `None`: all but the system's and the layer's own.
            patterns: whether to sample rows. `True`: of all tables, some hundredths of a second each. `None`: where no
                table was sampled yet and there are at most 200, for ten seconds; the background learner does the rest.
            progress: called with the name of each step as it begins (`agent.discovery.discovering.STEPS`).

        Raises:
            DatabaseUnavailable: the application's database or that of the layer cannot be reached.
            ConfigurationError: an address is wrong.
            OperatorError: the structure cannot be read at all.
        """
        return await portal().run(self._discover(schemas, patterns, progress))

    def discover_app_structure_sync(
        self,
        schemas: Sequence[str] | None = None,
        *,
        patterns: bool | None = None,
        progress: Callable[[str], None] | None = None,
    ) -> AppStructure:
        """`discover_app_structure` for code without an event loop."""
        return portal().run_sync(self._discover(schemas, patterns, progress))

    async def get_cached_structure(self) -> AppStructure | None:
        """What the last discovery found, from the layer's own tables; `None` where there was none yet."""
        return await portal().run(self._cached())

    def get_cached_structure_sync(self) -> AppStructure | None:
        """`get_cached_structure` for code without an event loop."""
        return portal().run_sync(self._cached())

    async def render(self, question: str, token_budget: int | None = None) -> str:
        """What is known of the application for a prompt: the objects that bear on the question in full, others by name.

        Args:
            question: what the prompt is about.
            token_budget: never exceeded; `None` is the setting `token_budget`.

        Raises:
            NotFound: the application was never discovered.
        """
        return await portal().run(self._render(question, token_budget))

    def render_sync(self, question: str, token_budget: int | None = None) -> str:
        """`render` for code without an event loop."""
        return portal().run_sync(self._render(question, token_budget))

    async def _discover(
        self,
        schemas: Sequence[str] | None,
        patterns: bool | None,
        progress: Callable[[str], None] | None,
    ) -> AppStructure:
        await discover(self.settings, self.database, schemas=schemas, had=self._known, progress=progress)
        found = await self._cached()
        if found is None:  # its saving was waited for
            raise NotFound(f"what was discovered of {app_name(self.settings)!r} has been deleted meanwhile")
        is_first = not found.patterns and len(found.tables) <= _FIRST_TABLES_MAX
        if patterns or (patterns is None and is_first):
            found = await self._sample(found, None if patterns else _FIRST_TIME)
        return found

    async def _sample(self, structure: AppStructure, limit: timedelta | None) -> AppStructure:
        """The same structure with the patterns of its tables, sampled now."""
        deadline = None if limit is None else datetime.now(UTC) + limit
        learned = await learn_patterns(self.settings, self.database, structure, deadline=deadline)
        found = await self._cached() or structure
        return replace(found, problems=[*found.problems, *learned.problems])

    async def _cached(self) -> AppStructure | None:
        known, learned = await asyncio.gather(
            load_known(self.database, self.settings, self._known),
            stored_patterns(self.settings, self.database, app_name(self.settings)),
        )
        self._known = known
        return as_structure(known, learned, self.settings)

    async def _render(self, question: str, token_budget: int | None) -> str:
        structure = await self._cached()
        if structure is None:
            raise NotFound(
                f"nothing is known of the application {app_name(self.settings)!r} yet; `agent discover` finds out"
            )
        budget = self.settings.token_budget if token_budget is None else token_budget
        return render_structure(structure, question, token_budget=budget)


auto_discovery = AutoDiscovery()
"""Discovery by the settings of the environment."""


def find_in_application_tool(discovery: AutoDiscovery | None = None) -> BaseTool:
    """A tool by which an agent looks up the application's tables, columns, keys and functions.

    Args:
        discovery: `None` is `auto_discovery`.
    """
    from langchain_core.tools import StructuredTool

    known = discovery or auto_discovery

    async def find_in_application(question: str) -> str:
        """Find which tables, columns, keys and functions of the application's database bear on a question.

        Args:
            question: what you look for, in words: "which table holds refunds?"
        """
        try:
            return await known.render(question)
        except NotFound as error:
            return str(error)

    def find_in_application_sync(question: str) -> str:
        try:
            return known.render_sync(question)
        except NotFound as error:
            return str(error)

    return StructuredTool.from_function(
        func=find_in_application_sync,
        coroutine=find_in_application,
        name="find_in_application",
        description=find_in_application.__doc__,
        parse_docstring=True,
    )
