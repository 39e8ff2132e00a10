"""Runs that could not be recorded, kept on disk until they can."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent.database.private_files import make_private_folder, read_private, require_private
from agent.database.protocol import to_json
from agent.errors import IdentityError, OperatorError
from agent.events import emit
from agent.identity import Identity

_FILE_BYTES_MAX = 64 * 1024 * 1024


@dataclass(frozen=True, kw_only=True)
class SpooledRun:
    """One run that waits on disk."""

    path: Path
    identity: Identity
    run: dict[str, Any]


class Spool:
    """A folder with one file per run. Writers in any number of processes do not meet: a file appears whole or not.

    What is in it goes to the database as said by the users it names, so a folder that another user of the machine can
    write to, or a file of theirs, is not used.

    All methods block; call them from a thread.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._told: str | None = None

    def put(self, identity: Identity, run: dict[str, Any]) -> Path:
        """Keep a run; on disk when this returns. The same run and status again replaces its file.

        Raises:
            OSError: the folder cannot be written, or another user can write to it, or the run is too large.
        """
        self._make_folder()
        text = to_json({"identity": identity.as_json(), "run": run}).encode()
        if len(text) > _FILE_BYTES_MAX:
            raise OSError(
                f"a run of {len(text)} bytes is more than the {_FILE_BYTES_MAX} that are kept on disk"
            )
        key = json.dumps([identity.tenant_id, run["run_id"], run["status"]])
        path = self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
        partial = path.with_name(f"{path.name}.{os.getpid()}.{os.urandom(4).hex()}.partial")
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        return path

    def waiting(self) -> Iterator[SpooledRun]:
        """The runs that wait, oldest first. A file that makes no sense is set aside, with an event, and passed over.

        None, with an event, while another user can write to the folder. A file of another user, or one that is too
        large, is left where it is, with an event.
        """
        problem = self.problem()
        if problem is not None and problem != self._told:  # not again at every look
            emit("spooled_run_delivery_failed", run_id=None, reason=problem)
        self._told = problem
        files = self._files()
        for path in sorted(files, key=lambda path: files[path].st_mtime):
            try:
                kept = json.loads(read_private(path, bytes_max=_FILE_BYTES_MAX).decode())
                spooled = SpooledRun(
                    path=path, identity=Identity.from_json(kept["identity"]), run=dict(kept["run"])
                )
            except FileNotFoundError:
                continue  # delivered by another process meanwhile
            except OSError as error:
                emit("spooled_run_delivery_failed", run_id=None, reason=f"{path}: {error.strerror}")
                continue
            except (ValueError, KeyError, TypeError, RecursionError, IdentityError) as error:
                self.set_aside(path)
                emit(
                    "spooled_run_refused",
                    run_id=None,
                    reason=f"{path.name} is no run: {type(error).__name__}",
                )
                continue
            yield spooled

    def count(self) -> int:
        """How many runs wait and can be delivered."""
        return sum(
            found.st_size <= _FILE_BYTES_MAX and (sys.platform == "win32" or found.st_uid == os.geteuid())
            for found in self._files().values()
        )

    def problem(self) -> str | None:
        """Why the folder cannot be used, and what to do; `None` where it can, or is not there."""
        try:
            require_private(self.folder.parent, may_be_link=True)
            require_private(self.folder)
        except FileNotFoundError:
            return None
        except OperatorError as error:
            return f"the runs kept on disk are not used: {error}"
        except OSError as error:
            return f"the runs kept on disk cannot be read: {error.strerror} ({error.filename!r})"
        return None

    def _make_folder(self) -> None:
        # As root others may pass through the data folder: the account that runs the embedded server must.
        mode = 0o711 if sys.platform != "win32" and os.geteuid() == 0 else 0o700
        with suppress(FileExistsError):
            make_private_folder(self.folder.parent, mode=mode, parents=True)
        with suppress(FileExistsError):
            make_private_folder(self.folder)
        problem = self.problem()
        if problem is not None:
            raise PermissionError(problem)

    def _files(self) -> dict[Path, os.stat_result]:
        """Regular files only: a link or a pipe is none of ours."""
        if self.problem() is not None:
            return {}
        files = {}
        for path in self.folder.glob("*.json"):
            with suppress(FileNotFoundError):  # delivered by another process meanwhile
                found = path.lstat()
                if stat.S_ISREG(found.st_mode):
                    files[path] = found
        return files

    def delivered(self, path: Path) -> None:
        """Forget a run that the database has."""
        path.unlink(missing_ok=True)

    def set_aside(self, path: Path) -> None:
        """Keep a run that the database will never take in the folder `refused`, for a person to look at."""
        refused = self.folder / "refused"
        refused.mkdir(exist_ok=True, mode=0o700)
        if path.exists():
            path.replace(refused / path.name)
