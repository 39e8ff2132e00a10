"""Samples over the storage functions alone, where Supabase's keys are all there is: the same samples, one call each."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, Final

from agent.database.protocol import Database
from agent.discovery.sampling import (
    Sample,
    SampleError,
    SamplePlan,
    Sampler,
    as_sample,
    head_of,
    reason_of_code,
)
from agent.discovery.structure import full_name
from agent.errors import AccessRefused, DatabaseUnavailable, LearningError, MigrationError, NotFound

_ANSWER_SECONDS: Final = 5  # to the time of the statement, for the way there and back


class StorageSampler(Sampler):
    """With the rights of the key, in the time that the project's API gives a statement and not longer than `timeout`.

    The planner's statistics are not read: no API shows them.
    """

    def __init__(self, database: Database, timeout: timedelta) -> None:
        self._database = database
        self._seconds = timeout.total_seconds() + _ANSWER_SECONDS

    async def now(self) -> datetime:
        found = await self._call(
            "pg_class", "sample_app_table", the_schema="pg_catalog", the_table="pg_class", the_columns=["oid"],
            how_read=["null"], row_limit=1,
        )  # fmt: skip
        return datetime.fromisoformat(found["now"])

    async def sample(self, plan: SamplePlan) -> Sample:
        found = await self._rows(plan)
        is_whole = plan.percent is None and len(found) < plan.rows
        if plan.percent is not None and not any(not row[-1] for row in found):
            found += await self._rows(head_of(plan))
        return as_sample(plan, found, is_whole=is_whole)

    async def _rows(self, plan: SamplePlan) -> list[list[Any]]:
        found = await self._call(
            plan.name,
            "sample_app_table",
            the_schema=plan.schema,
            the_table=plan.table,
            the_columns=list(plan.columns),
            how_read=list(plan.how_read),
            row_limit=plan.rows,
            percent=plan.percent,
            spread=plan.spread,
            key_column=plan.key,
            newest_by=plan.newest_by,
            newest_rows=plan.newest_rows,
        )
        rows: list[list[Any]] = found["rows"]
        return rows

    async def distinct_estimates(
        self,
        tables: Sequence[tuple[str, str]],
    ) -> dict[tuple[str, str, str], float]:
        return {}

    async def match(
        self, reference: Mapping[str, Any], rows: int, percent: float | None
    ) -> tuple[int, int, int]:
        found = await self._call(
            full_name(reference["from_schema"], reference["from_table"]),
            "match_app_values",
            **reference,
            row_limit=rows,
            percent=percent,
        )
        return found["sampled"], found["distinct"], found["matched"]

    async def _call(self, table: str, function: str, **arguments: Any) -> Any:
        try:
            async with asyncio.timeout(self._seconds):
                found = await self._database.call(function, **arguments)
        except TimeoutError:
            raise SampleError(table, "it took longer than discovery may take") from None
        except DatabaseUnavailable as error:
            if "57014" in str(error):  # cancelled by the time-out of the key's role; the database is there
                raise SampleError(table, "it took longer than discovery may take") from None
            raise
        except MigrationError:
            raise
        except AccessRefused:
            raise SampleError(table, "this key may not read it") from None
        except NotFound:
            raise SampleError(table, "it was dropped or changed meanwhile") from None
        except LearningError as error:
            raise SampleError(table, f"reading it failed ({type(error).__name__})") from None
        if (code := found.get("code_of_others")) is not None:
            raise SampleError(table, reason_of_code(code))
        return found
