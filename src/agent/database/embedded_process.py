"""The server's process: started apart from ours, found again by what it wrote, stopped in order."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from agent.database.embedded_place import INSTEAD, Place, postgres_programs
from agent.database.private_files import read_private
from agent.errors import OperatorError

START_SECONDS_MAX = 120.0  # recovery after a power cut reads at most `max_wal_size`
POLL_SECONDS = 0.01
_STOP_SECONDS_MAX = 30.0
_DEFAULT_PORT = 5432  # without TCP only a part of the socket's name
_LOG_BYTES_MAX = 1_000_000
_RECORD_BYTES_MAX = 100_000


@dataclass(frozen=True, kw_only=True)
class Running:
    """A server that accepts connections, as its own `postmaster.pid` tells."""

    process_id: int
    port: int
    socket_folder: str
    has_tcp: bool

    def serves(self, tcp_port: int | None) -> bool:
        return tcp_port is None or (self.has_tcp and tcp_port in (0, self.port))

    @property
    def socket_exists(self) -> bool:
        return Path(self.socket_folder, f".s.PGSQL.{self.port}").exists()


def launch(place: Place, tcp_port: int | None, settings: Mapping[str, str]) -> Running:
    programs = postgres_programs(place.account)
    socket_folder = place.socket_folder()
    deadline = time.monotonic() + START_SECONDS_MAX
    while True:
        port = (tcp_port or _free_port()) if tcp_port is not None else _DEFAULT_PORT
        given = {
            **settings,
            "listen_addresses": "127.0.0.1" if tcp_port is not None else "",
            "port": str(port),
            "unix_socket_directories": str(socket_folder),
            "unix_socket_permissions": "0700",
        }
        options = [part for name, value in given.items() for part in ("-c", f"{name}={value}")]
        written = _spawn(place, [str(programs / "postgres"), "-D", str(place.cluster), *options])
        running = find_running(place)
        if running is not None:
            return running
        said = _log_since(place, written)
        # The helpers of a server that was killed need a moment to notice it.
        may_pass = "still in use" in said or ("Address already in use" in said and tcp_port == 0)
        if not may_pass or time.monotonic() > deadline:
            raise OperatorError(start_failure(place, said, "started", tcp_port))
        time.sleep(0.1)


def _spawn(place: Place, command: list[str]) -> int:
    """Start the server apart from this process and wait until it can be asked. Returns where its log begins."""
    log = os.open(place.log, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        written = os.fstat(log).st_size
        if written > _LOG_BYTES_MAX:
            os.ftruncate(log, 0)
            written = 0
        # A session of its own: neither Ctrl-C nor the end of this process reaches it. The shell leaves at once, so
        # that it is nobody's child.
        started = subprocess.run(
            ["/bin/sh", "-c", '"$@" </dev/null >&2 & echo $!', "sh", *command], stdout=subprocess.PIPE, stderr=log,
            cwd="/", env=server_environment(), umask=0o077, start_new_session=True, timeout=60, check=True,
            **place.account.subprocess_arguments(),
        )  # fmt: skip
    finally:
        os.close(log)
    process_id = int(started.stdout)
    deadline = time.monotonic() + START_SECONDS_MAX
    while _is_alive(process_id):
        told = _read_postmaster(place)
        if told is not None and told.process_id == process_id and told.status not in ("", "starting"):
            break
        if time.monotonic() > deadline:
            raise OperatorError(
                f"the embedded database at {str(place.home)!r} has been starting for {START_SECONDS_MAX:.0f} seconds: "
                f"it is repairing itself after a crash, or the disk is very slow. See {str(place.log)!r} and try again."
            )
        time.sleep(POLL_SECONDS)
    return written


def find_running(place: Place) -> Running | None:
    """The server of this place, left by whomever, once it accepts connections. Call with the main lock held."""
    deadline = time.monotonic() + START_SECONDS_MAX
    while True:
        told = _read_postmaster(place)
        if told is None:
            return None
        process_id = told.process_id
        if not is_our_postgres(process_id, place):
            _clear_away(place, told)
            return None
        if told.status == "ready":
            if told.port is None or told.socket_folder is None:
                raise OperatorError(
                    f"{str(place.cluster / 'postmaster.pid')!r} names no port or no socket folder of ours: somebody "
                    f"changed it. End process {process_id} and start again."
                )
            return Running(
                process_id=process_id,
                port=told.port,
                socket_folder=str(told.socket_folder),
                has_tcp=told.has_tcp,
            )
        if time.monotonic() > deadline:
            raise OperatorError(
                f"the embedded database at {str(place.home)!r} (process {process_id}) has been starting or stopping "
                f"for {START_SECONDS_MAX:.0f} seconds. See {str(place.log)!r}; wait, or end that process."
            )
        time.sleep(POLL_SECONDS)


def _clear_away(place: Place, told: _Postmaster) -> None:
    """Make room for a new server where one was killed. Deletes nothing outside the cluster and the socket folder."""
    # The folder may have been moved since, or have another path in another container.
    folder = told.socket_folder or place.home / "run"
    socket_path = folder / f".s.PGSQL.{told.port}" if told.port is not None else None
    if socket_path is not None and _answers(socket_path):
        raise OperatorError(
            f"the embedded database at {str(place.home)!r} runs where this process cannot see it: in another "
            f"container, it seems. Two servers on the same data would destroy it. Stop that one, {INSTEAD}."
        )
    with suppress(ProcessLookupError, PermissionError):
        os.kill(told.process_id, 0)
        # The number went to another program, or its parent has not asked how it ended. Postgres only looks whether
        # the number is in use, and would refuse to start for ever.
        with _opened(place.cluster) as cluster, suppress(FileNotFoundError):
            os.unlink("postmaster.pid", dir_fd=cluster)
        if socket_path is not None:
            with suppress(FileNotFoundError), _opened(folder) as sockets:
                for leftover in (socket_path.name, f"{socket_path.name}.lock"):
                    with suppress(FileNotFoundError):
                        os.unlink(leftover, dir_fd=sockets)


def _answers(socket_path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(5)
        try:
            probe.connect(str(socket_path))
        except OSError:
            return False
    return True


def stop(place: Place, process_id: int) -> None:
    """End it in order: connections are closed and everything is on disk when this returns."""
    for order, seconds in ((signal.SIGINT, _STOP_SECONDS_MAX), (signal.SIGQUIT, 10.0)):
        if not is_our_postgres(process_id, place):
            return
        with suppress(ProcessLookupError):
            os.kill(process_id, order)
        deadline = time.monotonic() + seconds
        # Alive and not ours: a process that is leaving has lost its name a moment before it is gone.
        while _is_alive(process_id):
            if time.monotonic() > deadline:
                break
            time.sleep(POLL_SECONDS)
        else:
            return
    raise OperatorError(
        f"the embedded database at {str(place.home)!r} (process {process_id}) does not stop; end it by hand"
    )


@dataclass(frozen=True, kw_only=True)
class _Postmaster:
    """What `postmaster.pid` tells. The account writes it, so for root it is the word of another user."""

    process_id: int
    port: int | None
    """`None`: not told yet, or no port."""
    socket_folder: Path | None
    """`None`: not told yet, or no socket folder of this place."""
    has_tcp: bool
    status: str


def _read_postmaster(place: Place) -> _Postmaster | None:
    """`None` where there is none.

    Raises:
        OperatorError: it does not begin with the number of a process.
    """
    contents = read_cluster_file(place, "postmaster.pid")
    if not contents:
        return None
    # Process, data folder, start time, port, socket folder, address, memory, status.
    lines = [*contents.split(b"\n"), *[b""] * 8]
    # Negative: Postgres in single-user mode.
    process_id = _number(lines[0].strip().removeprefix(b"-"), 2**31 - 1)
    if process_id is None:
        raise OperatorError(
            f"{str(place.cluster / 'postmaster.pid')!r} is damaged: it does not begin with the number of a process. "
            "Delete it if no Postgres runs on that folder, and start again."
        )
    folder = Path(os.fsdecode(lines[4]))
    return _Postmaster(
        process_id=process_id,
        port=_number(lines[3].strip(), 65535),
        socket_folder=folder if place.is_socket_folder(folder) else None,
        has_tcp=bool(lines[5].strip()),
        status=lines[7].strip().decode("ascii", errors="replace"),
    )


def _number(text: bytes, largest: int) -> int | None:
    number = int(text) if re.fullmatch(rb"[0-9]{1,10}", text) else 0
    return number if 0 < number <= largest else None


def read_cluster_file(place: Place, name: str) -> bytes | None:
    """A small file of the cluster; `None` where there is none. The account may have put anything in its place.

    Raises:
        OperatorError: it did, or the file cannot be read.
    """
    try:
        with _opened(place.cluster) as cluster:
            owners = (place.account.user_id, os.geteuid())
            return read_private(name, owners=owners, bytes_max=_RECORD_BYTES_MAX, folder=cluster)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise OperatorError(
            f"{str(place.cluster / name)!r} of the embedded database cannot be used: {error.strerror}. See who put it "
            f"there and put it right, or move {str(place.home)!r} away to start anew."
        ) from None


@contextmanager
def _opened(folder: Path) -> Iterator[int]:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def is_our_postgres(process_id: int, place: Place) -> bool:
    """Whether this is a Postgres of the account on this cluster, and so may be sent a signal."""
    if not _is_alive(process_id):
        return False
    owner = str(place.account.user_id).encode()
    try:
        arguments = Path(f"/proc/{process_id}/cmdline").read_bytes().split(b"\0")
        status = Path(f"/proc/{process_id}/status").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        if Path("/proc/self/cmdline").exists():
            return False
        asked = subprocess.run(
            ["/bin/ps", "-ww", "-o", "uid=,command=", "-p", str(process_id)],
            check=False,
            capture_output=True,
            timeout=10,
        ).stdout
        return asked.split()[:1] == [owner] and b"postgres" in asked and os.fsencode(place.cluster) in asked
    users = next((line.split()[1:] for line in status.splitlines() if line.startswith(b"Uid:")), [])
    # No arguments at all: a dead one not yet reaped.
    is_postgres = arguments[0].rpartition(b"/")[2] == b"postgres"
    return (
        set(users) == {owner}
        and is_postgres
        and b"-D" in arguments
        and os.fsencode(place.cluster) in arguments
    )


def _is_alive(process_id: int) -> bool:
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    try:
        # A dead one that its parent has not asked about: in a container the first process may never ask.
        state = Path(f"/proc/{process_id}/stat").read_bytes().rpartition(b") ")[2][:1]
    except (FileNotFoundError, ProcessLookupError):
        return not Path("/proc/self/stat").exists()
    return state not in (b"Z", b"X")


def server_environment() -> dict[str, str]:
    # Neither keys of the caller nor its PG… variables reach the server.
    return {"PATH": "/usr/bin:/bin", "LC_ALL": "C", "TZ": "UTC"}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _log_since(place: Place, written: int) -> str:
    with place.log.open("rb") as file:
        file.seek(written)
        return file.read().decode("utf-8", errors="replace")


def start_failure(place: Place, said: str, what: str, tcp_port: int | None = None) -> str:
    lines = [
        line
        for line in said.strip().splitlines()
        if any(word in line for word in ("FATAL", "error:", "PANIC"))
    ]
    last = (lines or said.strip().splitlines() or ["it said nothing"])[-1]
    if "Address already in use" in said and tcp_port:
        step = f"Port {tcp_port} is taken: end the program that has it, or ask for another (0: any free one)."
    elif "No space left on device" in said:
        step = "The disk is full: make room and try again."
    elif "Read-only file system" in said or "Permission denied" in said:
        step = f"Set LEARNING_DATA_DIR to a folder that can be written, {INSTEAD}."
    else:
        step = f"Its log is {str(place.log)!r}. Try again, {INSTEAD}."
    return f"the embedded database in {str(place.home)!r} could not be {what}: {last}. {step}"
