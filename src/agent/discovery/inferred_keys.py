"""References that nobody declared: a column's name and type say where it points, and its values confirm it.

A name must say it, because small numbers are contained in every table of small numbers. Where several tables fit
equally, none is taken. References of more than one column are not looked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice, takewhile
from typing import Any, Final

from agent.discovery.column_types import base_type
from agent.discovery.structure import full_name
from agent.discovery.words import name_words, word_set

LEAST_MATCH: Final = 0.95
"""Least share of sampled values that must exist in the other table: some rows may be deleted."""
MATCH_ROWS: Final = 500
"""Rows whose values are compared, about; at most twice as many."""
_ID_WORDS: Final = word_set("id uid uuid guid key code no nr num number fk ref pk")
_ROLE_COLUMNS: Final = word_set(
    "owner author creator assignee reviewer approver manager created updated deleted assigned approved "
    "recipient sender requester"
)
_KINDS_OF_THINGS: Final = word_set("type group class kind category status")
_PEOPLE_TABLES: Final = ("user", "account", "profile", "staff", "employee", "member", "person")
_PREFIXES: Final = frozenset({"tbl", "tb", "t", "dim", "fact", "app", "lu", "ref", "sys", "mst"})
_WHOLE_NUMBERS: Final = frozenset({"smallint", "integer", "bigint", "numeric"})
_TEXTS: Final = frozenset({"text", "character varying", "character", "citext"})
_TARGET_KINDS: Final = frozenset({"table", "partitioned_table"})
_IRREGULAR: Final = {
    "person": "people",
    "child": "children",
    "status": "statuses",
    "staff": "staff",
    "man": "men",
}


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A reference that names and types suggest."""

    from_schema: str
    from_table: str
    from_column: str
    to_schema: str
    to_table: str
    to_column: str

    def as_reference(self) -> dict[str, str]:
        """As `Sampler.match` takes it."""
        return dict(vars(self))

    def relationship(self, sampled: int, matched: int) -> dict[str, Any]:
        """The structure document of the relationship, with its evidence."""
        return {
            "from_table": full_name(self.from_schema, self.from_table),
            "from_columns": [self.from_column],
            "to_table": full_name(self.to_schema, self.to_table),
            "to_columns": [self.to_column],
            "name": f"{self.from_table}.{self.from_column} = {self.to_table}.{self.to_column}",
            "declared": False,
            "evidence": {"sampled": sampled, "matched": matched, "share": round(matched / sampled, 4)},
        }


def is_confirmed(sampled: int, distinct: int, matched: int, *, whole_numbers: bool) -> bool:
    """Whether values confirm what names suggest. One small number proves nothing: two different ones are needed."""
    return sampled > 0 and distinct >= (2 if whole_numbers else 1) and matched >= LEAST_MATCH * sampled


def candidates(tables: Sequence[Mapping[str, Any]]) -> list[Candidate]:
    """The references that names and types suggest, of columns that no foreign key uses yet."""
    targets = _targets_of(tables)
    found = []
    for table in tables:
        if table["kind"] not in _TARGET_KINDS or not table.get("readable", True):
            continue
        declared = {name for key in table["foreign_keys"] for name in key["columns"]}
        words_of_columns = {tuple(name_words(column["name"])) for column in table["columns"]}
        for column in table["columns"]:
            if column["name"] in declared or not column.get("readable", True):
                continue
            target = _target_of(table, column, targets, words_of_columns)
            if target is not None:
                found.append(target)
    return found


def whole_numbers(tables: Sequence[Mapping[str, Any]], candidate: Candidate) -> bool:
    """Whether the column of a candidate holds whole numbers, which match by chance."""
    for table in tables:
        if (table["schema"], table["name"]) == (candidate.from_schema, candidate.from_table):
            return any(
                column["name"] == candidate.from_column and base_type(column) in _WHOLE_NUMBERS
                for column in table["columns"]
            )
    return False


@dataclass(frozen=True)
class _Target:
    schema: str
    table: str
    column: str
    family: str
    key_words: tuple[str, ...]
    words: tuple[str, ...]
    """Of the table's name."""


@dataclass(frozen=True)
class _Targets:
    """The unique columns that others may point at, by words that a column may say."""

    by_name: dict[tuple[str, ...], list[_Target]]
    """By all forms of the table's name."""
    by_end: dict[tuple[str, ...], list[_Target]]
    """By the forms of its ends, where the application's parts prefix their tables: `product` of `catalogue_product`."""
    by_key: dict[tuple[str, ...], list[_Target]]
    """By the name of the primary key itself, where it says more than `id`."""


def _targets_of(tables: Sequence[Mapping[str, Any]]) -> _Targets:
    found = _Targets({}, {}, {})
    for table in tables:
        if table["kind"] not in _TARGET_KINDS or not table.get("readable", True):
            continue
        types = {column["name"]: column for column in table["columns"]}
        words = tuple(name_words(table["name"]))
        alone = [table["primary_key"], *(key["columns"] for key in table["unique"])]
        for name in dict.fromkeys(names[0] for names in alone if len(names) == 1):
            if name not in types:
                continue
            target = _Target(
                table["schema"], table["name"], name, _family(types[name]), tuple(name_words(name)), words
            )
            for form in _forms(words):
                found.by_name.setdefault(form, []).append(target)
            for start in range(1, len(words) if not _is_link(table) else 0):
                for form in _forms(words[start:]):
                    found.by_end.setdefault(form, []).append(target)
            if [name] == table["primary_key"] and _without_id(target.key_words) not in (
                (),
                target.key_words,
            ):
                found.by_key.setdefault(target.key_words, []).append(target)
    return found


def _is_link(table: Mapping[str, Any]) -> bool:
    """Whether a table only ties rows of others together, so that nothing points at it."""
    rest = [column["name"] for column in table["columns"] if column["name"] not in table["primary_key"]]
    return len(rest) > 1 and all(name.lower().endswith("id") for name in rest)


def _family(column: Mapping[str, Any]) -> str:
    name = base_type(column)
    return "number" if name in _WHOLE_NUMBERS else "text" if name in _TEXTS else name


def _forms(words: tuple[str, ...]) -> set[tuple[str, ...]]:
    """A table's name as a column may spell it: in the singular and the plural, with and without a prefix."""
    forms = set()
    for base in {words, words[1:] if len(words) > 1 and words[0] in _PREFIXES else words}:
        if base:
            *first, last = base
            forms |= {(*first, form) for form in _numbers_of(last)}
    return forms


def _numbers_of(word: str) -> set[str]:
    """A word with its likely singulars and plurals."""
    found = {word, f"{word}s"}
    if word.endswith("ies") and len(word) > 4:
        found.add(f"{word[:-3]}y")
    if word.endswith(("ses", "xes", "zes", "ches", "shes")):
        found.add(word[:-2])
    if word.endswith("s") and not word.endswith("ss") and len(word) > 2:
        found.add(word[:-1])
    if word.endswith("ves"):
        found |= {f"{word[:-3]}f", f"{word[:-3]}fe"}
    if word.endswith(("f", "fe")):
        found.add(f"{word.removesuffix('e')[:-1]}ves")
    if word.endswith("y"):
        found.add(f"{word[:-1]}ies")
    if word.endswith(("s", "x", "z", "ch", "sh")):
        found.add(f"{word}es")
    for one, many in _IRREGULAR.items():
        if word in (one, many):
            found |= {one, many}
    return found


def _target_of(
    table: Mapping[str, Any],
    column: Mapping[str, Any],
    targets: _Targets,
    words_of_columns: Iterable[tuple[str, ...]],
) -> Candidate | None:
    words = tuple(name_words(column["name"]))
    base = _without_id(words)
    if not base:
        return None
    family = _family(column)
    is_bare = base == words
    if is_bare and family != "uuid":
        # `customer integer` may be a count; with an id word, or as a uuid, it is a reference.
        return None
    if (*base, "type") in words_of_columns and not is_bare:
        return None  # points at one of several tables, as the column of the type says
    own = (table["schema"], table["name"])
    if [column["name"]] == table["primary_key"]:
        # It may be another table's key, by its whole name alone: the end of its own name is said by chance.
        found: Iterable[list[_Target]] = islice(
            _by_words(base, words, {base: targets.by_name.get(base, [])}, family), 1
        )
    else:
        own_words = tuple(name_words(table["name"]))
        found = chain(
            _by_words(base, words, targets.by_name, family),
            _by_parts(base, words, targets, family, own_words),
        )
    for fitting in found:
        others = [
            target
            for target in fitting
            if (target.schema, target.table, target.column) != (*own, column["name"])
        ]
        near = [target for target in others if target.schema == table["schema"]] or others
        if len({(target.schema, target.table) for target in near}) > 1:
            return None  # which of them is not said
        if near:
            target = _best_key(near, words)
            return Candidate(
                from_schema=table["schema"],
                from_table=table["name"],
                from_column=column["name"],
                to_schema=target.schema,
                to_table=target.table,
                to_column=target.column,
            )
    if base in (("parent",), ("root",)) or base[:1] == ("parent",):
        return _to_itself(table, column, family)
    return None


def _without_id(words: tuple[str, ...]) -> tuple[str, ...]:
    """The words that say what is meant: `customer` of `customer_id`, of `id_customer` and of `fk_customer_id`."""
    rest = words
    while len(rest) > 1 and rest[-1] in _ID_WORDS:
        rest = rest[:-1]
    while len(rest) > 1 and rest[0] in _ID_WORDS:
        rest = rest[1:]
    for ending in ("uuid", "id"):
        # Written in one word: `customerid`, `proxy_hostid`.
        if rest == words and rest[-1:] and rest[-1].endswith(ending) and len(rest[-1]) > len(ending) + 2:
            return (*rest[:-1], rest[-1].removesuffix(ending))
    return rest if rest and rest[0] not in _ID_WORDS else ()


def _by_words(
    base: tuple[str, ...],
    words: tuple[str, ...],
    by_name: Mapping[tuple[str, ...], list[_Target]],
    family: str,
) -> Iterable[list[_Target]]:
    """Targets by the longest end of the name that names a table: `address` of `billing_address_id`."""
    for start in range(len(base)):
        end = base[start:]
        fitting = [
            target
            for target in by_name.get(end, ())
            if target.family == family and (target.key_words == words or _is_key_of(target, end))
        ]
        if fitting:
            yield fitting
    joined = ("".join(base),)
    if len(base) > 1 and joined in by_name:
        yield [target for target in by_name[joined] if target.family == family and _is_key_of(target, joined)]
    if family == "uuid" and (set(base) & _ROLE_COLUMNS):
        for people in _PEOPLE_TABLES:
            fitting = [target for target in by_name.get((people,), ()) if target.family == family]
            if fitting:
                yield fitting


def _by_parts(
    base: tuple[str, ...], words: tuple[str, ...], targets: _Targets, family: str, own: tuple[str, ...]
) -> Iterable[list[_Target]]:
    """Targets by parts of their names, and those that people are kept in."""
    yield from _by_end(base, words, targets, family, own)
    yield from _by_key(words, targets, family)
    if base != words and set(base) & _ROLE_COLUMNS:
        for people in _PEOPLE_TABLES:
            yield from _by_words((people,), words, targets.by_name, family)
            yield from _by_end((people,), words, targets, family, own)


def _by_key(words: tuple[str, ...], targets: _Targets, family: str) -> Iterable[list[_Target]]:
    """Targets whose primary key is named at the end of the column's name: `user_no` of `changed_by_user_no`."""
    for start in range(len(words)):
        fitting = [target for target in targets.by_key.get(words[start:], ()) if target.family == family]
        if fitting:
            yield fitting


def _by_end(
    base: tuple[str, ...], words: tuple[str, ...], targets: _Targets, family: str, own: tuple[str, ...]
) -> Iterable[list[_Target]]:
    """Targets whose names end with what the column says. Of several those of the same part of the application, told by
    the words that the names begin with, and then the shortest name."""
    for start in range(len(base)):
        end = base[start:]
        if start and end[0] in _KINDS_OF_THINGS:
            return  # `event_type` is one of the types of events, not of any others
        fitting = [
            target
            for form in {end, ("".join(end),)}
            for target in targets.by_end.get(form, ())
            if target.family == family
            and target.words != own
            and (start == 0 or target.words[0] == own[0])
            and (target.key_words == words or _is_key_of(target, form))
        ]
        if fitting:
            common = {target: _same_begin(target.words, own) for target in fitting}
            best = min((-common[target], len(target.words)) for target in fitting)
            yield [target for target in fitting if (-common[target], len(target.words)) == best]


def _same_begin(one: Sequence[str], other: Sequence[str]) -> int:
    """How many words two names begin with alike."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _is_key_of(target: _Target, table_words: tuple[str, ...]) -> bool:
    """Whether a unique column is the one by which rows of its table are named: `id`, `customer_id`, `code`, `uuid`."""
    rest = [word for word in target.key_words if (word,) not in {(form,) for form in _all_forms(table_words)}]
    return all(word in _ID_WORDS for word in rest) or "".join(rest) in {
        f"{form}id" for form in _all_forms(("".join(table_words),))
    }


def _all_forms(words: tuple[str, ...]) -> set[str]:
    return {form for word in words for form in _numbers_of(word)}


def _best_key(targets: Sequence[_Target], words: tuple[str, ...]) -> _Target:
    """Of several keys of one table that of the same name, else that which the column's last word names, else `id`."""

    def order(target: _Target) -> tuple[bool, bool, bool]:
        return (
            target.key_words != words,
            target.key_words[-1:] != words[-1:],
            target.key_words != ("id",),
        )

    return min(targets, key=order)


def _to_itself(
    table: Mapping[str, Any],
    column: Mapping[str, Any],
    family: str,
) -> Candidate | None:
    """`parent_id` points at the primary key of its own table."""
    key = table["primary_key"]
    types = {item["name"]: item for item in table["columns"]}
    if len(key) != 1 or key[0] == column["name"] or key[0] not in types or _family(types[key[0]]) != family:
        return None
    return Candidate(
        from_schema=table["schema"],
        from_table=table["name"],
        from_column=column["name"],
        to_schema=table["schema"],
        to_table=table["name"],
        to_column=key[0],
    )
