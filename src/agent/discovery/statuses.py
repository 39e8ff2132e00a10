"""Status columns and how rows go from one status to the next: from tables of history, and from rows met again.

A row met again is known by a keyed hash of its primary key, never by the key.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, Final

from agent.discovery.column_patterns import LEAST_TIMES, as_time
from agent.discovery.column_types import kind_of
from agent.discovery.formats import VALUE_LIMIT
from agent.discovery.personal_data import may_show
from agent.discovery.sampling import Sample
from agent.discovery.words import name_words, word_set

SEEN_MAX: Final = 1000
"""Rows of a table whose last status is remembered."""
OTHER: Final = "(other)"
"""Stands for every status that is not shown."""

_STATUS_WORDS: Final = word_set("""
    status state stage phase step lifecycle workflow substatus fulfillment disposition zustand stand estado etat
    etape statut stato fase stadium situacao stan
    """)
_STATUS_VALUES: Final = word_set("""
    open opened closed new pending active inactive draft approved rejected cancelled canceled paid unpaid void
    shipped delivered returned refunded failed succeeded success error done todo queued running completed
    complete processing processed archived deleted published unpublished review blocked resolved waiting
    accepted declined expired suspended started finished in_progress confirmed on_hold
    """)
_PLACE_WORDS: Final = word_set("city zip zipcode postal postcode country province county street")
_FROM_WORDS: Final = word_set("from old previous prev before prior last alt alter von anterior ancien")
_TO_WORDS: Final = word_set("to new next after current neu neuer nach nuevo nouveau")
_HISTORY_WORDS: Final = word_set(
    "history histories log logs audit audits event events change changes transition transitions trail journal"
)
_FIELD_NAMES: Final = frozenset(
    {"field", "field_name", "column_name", "attribute", "property", "changed_field"}
)

Counts = Counter[tuple[str, str]]


def status_columns(table: Mapping[str, Any], columns: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The columns of a table whose values are stages of its rows.

    Args:
        table: its structure document.
        columns: the patterns of its columns.
    """
    every_word = {word for column in table["columns"] for word in name_words(column["name"])}
    found = []
    for column in table["columns"]:
        pattern = columns.get(column["name"])
        if pattern is None or pattern["personal"] is not None or kind_of(column) not in ("text", "enum"):
            continue
        values = [str(value) for value, _ in pattern["top"]]
        words = set(name_words(column["name"]))
        is_named = bool(words & _STATUS_WORDS) and not (words == {"state"} and every_word & _PLACE_WORDS)
        reads_so = len(values) > 1 and 2 * sum(_plain(value) in _STATUS_VALUES for value in values) >= len(
            values
        )
        if (is_named and (values or column.get("enum"))) or reads_so:
            found.append(column["name"])
    return found


def _plain(value: str) -> str:
    return value.strip().lower().replace(" ", "_").replace("-", "_")


def is_history(table: Mapping[str, Any]) -> bool:
    """Whether the rows of a table tell, by its name or its columns, what became of rows of another."""
    return bool(_HISTORY_WORDS & set(name_words(table["name"]))) or any(pairs_of(table))


def pairs_of(table: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """`(from column, to column, what they are of)` of a history table: `old_status`, `new_status`, `status`."""
    names = {column["name"]: name_words(column["name"]) for column in table["columns"]}
    of_base: dict[str, dict[str, str]] = {}
    for name, words in names.items():
        rest = [word for word in words if word not in _FROM_WORDS | _TO_WORDS]
        base = " ".join(rest)
        if not rest or not (set(rest) & _STATUS_WORDS or base == "value"):
            continue
        side = "from" if set(words) & _FROM_WORDS else "to"
        # `previous_status, status`: the plain name is where it went, unless another says so.
        if side == "from" or set(words) & _TO_WORDS or "to" not in of_base.get(base, {}):
            of_base.setdefault(base, {})[side] = name
    for base, sides in of_base.items():
        if len(sides) == 2:
            yield sides["from"], sides["to"], base


def transitions_told(
    table: Mapping[str, Any], sample: Sample, parent_column: str | None, shown: Collection[str]
) -> Counter[tuple[str, str]]:
    """The transitions that the rows of a history table tell.

    Args:
        table: its structure document.
        sample: its rows.
        parent_column: the column that says of which row a row tells; needed where a row has only the status after.
        shown: values that may be shown; every other one becomes `OTHER`.
    """
    counts: Counts = Counter()
    rows = _together(sample)
    for before, after, base in pairs_of(table):
        if before not in sample.columns or after not in sample.columns:
            continue
        places = sample.columns.index(before), sample.columns.index(after)
        steps = [(row[places[0]], row[places[1]]) for row in rows]
        if base == "value":
            naming = next((name for name in sample.columns if name.lower() in _FIELD_NAMES), None)
            if naming is None:
                continue
            fields = sample.columns.index(naming)
            steps = [step for step, row in zip(steps, rows, strict=True) if _names_status(row[fields])]
            times = Counter(value for step in steps for value in step if value is not None)
            shown = {value for value, count in times.items() if count >= LEAST_TIMES and may_show(value)}
        for was, became in steps:
            _count(counts, was, became, shown)
    if counts or parent_column is None or not is_history(table):
        return counts
    return _consecutive(table, sample, parent_column, shown)


def _names_status(field: str | None) -> bool:
    return field is not None and bool(_STATUS_WORDS & set(name_words(field)))


def _consecutive(
    table: Mapping[str, Any], sample: Sample, parent_column: str, shown: Collection[str]
) -> Counter[tuple[str, str]]:
    """Transitions between a parent's rows in the order of time: right only where no row between is missing, so of a
    whole table or of its newest rows."""
    counts: Counts = Counter()
    rows = sample.rows if sample.is_whole else sample.newest
    time = next(
        (c["name"] for c in table["columns"] if kind_of(c) == "time" and c["name"] in sample.columns), None
    )
    status = next(
        (
            c["name"]
            for c in table["columns"]
            if kind_of(c) in ("text", "enum")
            and set(name_words(c["name"])) & _STATUS_WORDS
            and c["name"] in sample.columns
        ),
        None,
    )
    if time is None or status is None or parent_column not in sample.columns:
        return counts
    by_parent: dict[str, list[tuple[Any, str]]] = {}
    for row in rows:
        parent, at, value = (row[sample.columns.index(name)] for name in (parent_column, time, status))
        moment = as_time(at) if at else None
        if parent is not None and moment is not None and value is not None:
            by_parent.setdefault(parent, []).append((moment, value))
    for steps in by_parent.values():
        steps.sort(key=lambda step: step[0])
        for (_, before), (_, after) in pairwise(steps):
            _count(counts, before, after, shown)
    return counts


def _count(
    counts: Counter[tuple[str, str]], before: str | None, after: str | None, shown: Collection[str]
) -> None:
    if before is not None and after is not None and before != after:
        pair = (before if before in shown else OTHER, after if after in shown else OTHER)
        if pair != (OTHER, OTHER):
            counts[pair] += 1


def row_hashes(table: Mapping[str, Any], sample: Sample, secret: str) -> list[str] | None:
    """A keyed hash of each row's primary key, rows before newest ones; `None` where a table has no key to read.

    Keyed, because the hash of a small number is found by trying all of them.
    """
    key = table["primary_key"]
    if not key or not set(key) <= set(sample.columns):
        return None
    places = [sample.columns.index(name) for name in key]
    purpose = f"row of {table['schema']}.{table['name']}".encode()
    own = hashlib.blake2b(purpose, key=hashlib.sha256(secret.encode()).digest()).digest()
    found = []
    for row in [*sample.rows, *sample.newest]:
        values = [row[place] for place in places]
        text = "\0".join(value for value in values if value is not None)  # no value of Postgres has a NUL
        # A key that was cut names more than one row.
        usable = None not in values and len(text) < VALUE_LIMIT
        found.append(hashlib.blake2b(text.encode(), digest_size=8, key=own).hexdigest() if usable else "")
    return found


def rows_met_again(
    sample: Sample, hashes: Sequence[str], column: str, seen: Mapping[str, str], shown: Collection[str]
) -> tuple[Counter[tuple[str, str]], dict[str, str]]:
    """The transitions of rows whose status was another when they were seen last, and what is seen now.

    Args:
        sample: the rows.
        hashes: one per row, as `row_hashes` gives them.
        column: a status column.
        seen: by hash the status of the discovery before.
        shown: values that may be shown; every other one becomes `OTHER`.
    """
    place = sample.columns.index(column)
    now: dict[str, str] = {}
    for row, row_hash in zip([*sample.rows, *sample.newest], hashes, strict=True):
        value = row[place]
        if row_hash and value is not None:
            now[row_hash] = value if value in shown else OTHER
    counts: Counts = Counter()
    for row_hash, value in now.items():
        before = seen.get(row_hash)
        if before is not None and before != value:
            counts[before, value] += 1
    kept = now | {row_hash: value for row_hash, value in seen.items() if row_hash not in now}
    return counts, dict(list(kept.items())[:SEEN_MAX])


def _together(sample: Sample) -> list[list[str | None]]:
    """The rows of both parts, one that is in both once."""
    return list({tuple(row): row for row in [*sample.rows, *sample.newest]}.values())
