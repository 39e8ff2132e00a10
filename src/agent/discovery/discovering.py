"""One discovery: what is known, what is there, what changed, saved."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final
from uuid import uuid4

import orjson

from agent.database.protocol import Database
from agent.discovery.catalog_reading import read_structure
from agent.discovery.function_effects import own_effects, with_writes
from agent.discovery.masking import masked_document
from agent.discovery.object_text import change_text, function_text, relationship_text, table_text
from agent.discovery.pattern_learning import StoredPatterns
from agent.discovery.structure import AppStructure, app_name, full_name, function_name
from agent.errors import ConflictError
from agent.events import emit
from agent.identity import Identity
from agent.settings import Settings

STEPS: Final = ("reading what is known", "reading the structure", "saving what is new")
"""What a discovery does, one after the other."""

Progress = Callable[[str], None]
_MEASURES: Final = ("row_estimate", "size_bytes")


@dataclass(kw_only=True)
class _Seen:
    """One object as a discovery sees it."""

    kind: str
    name: str
    fingerprint: str
    document: dict[str, Any]
    row_estimate: int | None = None
    size_bytes: int | None = None

    @property
    def measures(self) -> tuple[int | None, int | None]:
        return self.row_estimate, self.size_bytes


@dataclass(kw_only=True)
class Known:
    """What our tables hold of an app."""

    version: int | None = None
    """`None`: it was never discovered."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """`discovered_at`, `extensions`, `problems`, `changes`."""
    objects: dict[tuple[str, str], _Seen] = field(default_factory=dict)
    """By kind and name."""


async def load_known(database: Database, settings: Settings, had: Known | None = None) -> Known:
    """What is saved of the application that these settings name. `had` is used again where nothing changed since."""
    found = await database.call(
        "get_app_structure",
        Identity(tenant_id=settings.tenant),
        the_app=app_name(settings),
        the_version=had.version if had is not None else None,
    )
    if found is None:
        return Known()
    if "objects" not in found and had is not None:
        return Known(version=found["version"], facts=found, objects=had.objects)
    objects = {(item["kind"], item["name"]): _as_masked(_Seen(**item)) for item in found.pop("objects")}
    return Known(version=found["version"], facts=found, objects=objects)


def _as_masked(saved: _Seen) -> _Seen:
    """What was saved, as masking has it today: where that differs, without fingerprint, so that it is read and saved
    anew."""
    masked = masked_document(saved.document)
    return saved if masked == saved.document else replace(saved, document=masked, fingerprint="")


async def discover(
    settings: Settings,
    database: Database,
    *,
    schemas: Sequence[str] | None = None,
    had: Known | None = None,
    progress: Progress | None = None,
) -> None:
    """Read the structure of the application, learn what is new in it, and save it. Any number may run at once.

    Raises:
        DatabaseUnavailable: one of the two databases cannot be reached.
        OperatorError: the structure cannot be read at all.
    """
    tell = progress or (lambda step: None)
    tell(STEPS[0])
    known = await load_known(database, settings, had)
    tell(STEPS[1])
    wanted: dict[str, Any] = {
        "exclude": settings.discovery_exclude,
        "known": {
            item.name: item.fingerprint for item in known.objects.values() if item.kind != "relationship"
        },
    }
    if schemas is not None:
        wanted["schemas"] = list(schemas)
    found = await read_structure(settings, database, wanted)
    tell(STEPS[2])
    seen, problems = _merged(found, known)
    discovery = {
        "discovery_id": f"discovery-{uuid4()}",
        "extensions": found["extensions"],
        "problems": problems,
    }
    saved = await _save(database, settings, discovery, seen, known, schemas)
    emit(
        "structure_discovered",
        app=app_name(settings),
        objects=len(seen),
        added=len(saved["added"]),
        changed=len(saved["changed"]),
        removed=len(saved["removed"]),
        problems=len(problems),
    )


async def _save(
    database: Database,
    settings: Settings,
    discovery: dict[str, Any],
    seen: list[_Seen],
    known: Known,
    schemas: Sequence[str] | None,
) -> dict[str, Any]:
    identity, app = Identity(tenant_id=settings.tenant), app_name(settings)
    unseen = [problem["object"] for problem in discovery["problems"]]
    if known.version is not None and _is_as_known(seen, known, schemas, unseen):
        try:
            same = {**discovery, "same_as_version": known.version}
            return dict(await database.call("save_app_structure", identity, the_app=app, discovery=same))
        except ConflictError:
            pass  # another discovery saved something meanwhile: then all is compared there
    whole = {
        **discovery,
        "schemas": None if schemas is None else list(schemas),
        "unseen": unseen,
        "objects": list(_as_saved(seen, known)),
    }
    return dict(await database.call("save_app_structure", identity, the_app=app, discovery=whole))


def _is_as_known(
    seen: list[_Seen], known: Known, schemas: Sequence[str] | None, unseen: Sequence[str]
) -> bool:
    there = {(item.kind, item.name) for item in seen}
    return all(
        (before := known.objects.get((item.kind, item.name))) is not None
        and before.fingerprint == item.fingerprint
        and before.measures == item.measures
        for item in seen
    ) and not any(
        item.name not in unseen
        and item.document.get("from_table") not in unseen
        and item.document.get("declared", True)
        and (schemas is None or item.document["schema"] in schemas)
        for key, item in known.objects.items()
        if key not in there
    )


def _merged(found: Mapping[str, Any], known: Known) -> tuple[list[_Seen], list[dict[str, Any]]]:
    """The objects that are there with their whole documents, and the problems."""
    problems = list(found["problems"])
    seen: list[_Seen] = []
    for kind, given in (("table", found["tables"]), ("function", found["functions"])):
        for item in given:
            document = dict(item)
            fingerprint = document.pop("fingerprint")
            measures = {measure: document.pop(measure, None) for measure in _MEASURES}
            if "known" in document:
                name = document["known"]
                document = known.objects[kind, name].document
            elif kind == "function":
                name = function_name(document)
                document["effects"] = asdict(own_effects(document))
                for part in ("body", "body_writes", "body_calls"):
                    del document[part]
                document = masked_document(document)
            else:
                name = full_name(document["schema"], document["name"])
                if document["readable"] is None:
                    problems.append({"object": name, "reason": "it was dropped while it was read"})
                    continue
                document = masked_document(document)
            if kind == "table" and not document["readable"]:
                problems.append({"object": name, "reason": "this login may not read its rows"})
            seen.append(_Seen(kind=kind, name=name, fingerprint=fingerprint, document=document, **measures))
    for item in [item for item in seen if item.kind == "table"]:
        for document in _relationships(item):
            name = f"{item.name}.{document['name']}"
            fingerprint = hashlib.md5(orjson.dumps(document), usedforsecurity=False).hexdigest()
            seen.append(_Seen(kind="relationship", name=name, fingerprint=fingerprint, document=document))
    return seen, problems


def _relationships(table: _Seen) -> Iterable[dict[str, Any]]:
    for key in table.document["foreign_keys"]:
        yield {
            "schema": table.document["schema"],
            "name": key["name"],
            "from_table": table.name,
            "from_columns": key["columns"],
            "to_table": full_name(key["to_schema"], key["to_table"]),
            "to_columns": key["to_columns"],
            "declared": True,
            "evidence": None,
        }


def _as_saved(seen: list[_Seen], known: Known) -> Iterable[dict[str, Any]]:
    """The objects as the storage function takes them: in full only what is new or different."""
    referring: dict[str, list[str]] = {}
    for item in seen:
        if item.kind == "relationship":
            referring.setdefault(item.document["to_table"], []).append(item.document["from_table"])
    functions = with_writes(item.document for item in seen if item.kind == "function")
    writes = {function_name(document): document["writes"] for document in functions}
    for item in seen:
        before = known.objects.get((item.kind, item.name))
        row: dict[str, Any] = {
            "kind": item.kind,
            "name": item.name,
            "fingerprint": item.fingerprint,
            "row_estimate": item.row_estimate,
            "size_bytes": item.size_bytes,
        }
        if before is None or before.fingerprint != item.fingerprint:
            row["document"] = item.document
            if known.version is not None and (before is None or before.document != item.document):
                row["change"] = change_text(
                    item.kind, item.name, before.document if before is not None else None, item.document
                )
            match item.kind:
                case "table":
                    row["memory"] = table_text(item.document, referring.get(item.name, ()))
                case "function":
                    row["memory"] = function_text({**item.document, "writes": writes[item.name]})
                case _:
                    row["memory"] = relationship_text(item.document)
        yield row


def as_structure(known: Known, learned: StoredPatterns, settings: Settings) -> AppStructure | None:
    """What is known as a value, or `None` where the application was never discovered."""
    if known.version is None:
        return None
    by_kind: dict[str, list[dict[str, Any]]] = {"table": [], "function": [], "relationship": []}
    for item in known.objects.values():
        document = {**item.document, "fingerprint": item.fingerprint}
        if item.kind == "table":
            document |= {"row_estimate": item.row_estimate, "size_bytes": item.size_bytes}
        by_kind[item.kind].append(document)
    return AppStructure(
        app=app_name(settings),
        discovered_at=known.facts["discovered_at"],
        tables=by_kind["table"],
        functions=with_writes(by_kind["function"]),
        relationships=[*by_kind["relationship"], *learned.relationships],
        patterns=learned.patterns,
        extensions=list(known.facts["extensions"]),
        problems=list(known.facts["problems"]),
        changes=dict(known.facts["changes"]),
    )
