"""Runs that could not be recorded, kept on disk until they can."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent.database.protocol import to_json
from agent.identity import Identity


@dataclass(frozen=True, kw_only=True)
class SpooledRun:
    """One run that waits on disk."""

    path: Path
    identity: Identity
    run: dict[str, Any]


class Spool:
    """A folder with one file per run. Writers in any number of processes do not meet: a file appears whole or not.

    All methods block; call them from a thread.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def put(self, identity: Identity, run: dict[str, Any]) -> Path:
        """Keep a run; on disk when this returns. The same run and status again replaces its file.

        Raises:
            OSError: the folder cannot be written.
        """
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        key = json.dumps([identity.tenant_id, run["run_id"], run["status"]])
        path = self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
        partial = path.with_name(f"{path.name}.{os.getpid()}.{os.urandom(4).hex()}.partial")
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(to_json({"identity": identity.as_json(), "run": run}))
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        return path

    def waiting(self) -> Iterator[SpooledRun]:
        """The runs that wait, oldest first. A file that cannot be read is set aside and passed over."""
        if not self.folder.is_dir():
            return
        for path in sorted(self.folder.glob("*.json"), key=_age):
            try:
                kept = json.loads(path.read_text(encoding="utf-8"))
                spooled = SpooledRun(
                    path=path, identity=Identity.from_json(kept["identity"]), run=kept["run"]
                )
            except FileNotFoundError:
                continue  # delivered by another process meanwhile
            except (ValueError, KeyError, TypeError):
                self.set_aside(path)
                continue
            yield spooled

    def count(self) -> int:
        """How many runs wait."""
        return sum(1 for _ in self.folder.glob("*.json")) if self.folder.is_dir() else 0

    def delivered(self, path: Path) -> None:
        """Forget a run that the database has."""
        path.unlink(missing_ok=True)

    def set_aside(self, path: Path) -> None:
        """Keep a run that the database will never take in the folder `refused`, for a person to look at."""
        refused = self.folder / "refused"
        refused.mkdir(exist_ok=True, mode=0o700)
        if path.exists():
            path.replace(refused / path.name)


def _age(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0
