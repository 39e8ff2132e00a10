"""How the sandbox's helper process is started: behind bubblewrap where the kernel allows it, else with limits only."""

from __future__ import annotations

import shutil
import sys
import sysconfig
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from agent.errors import OperatorError

ADDRESS_SPACE_BYTES = 4 << 30
"""Most that one process of the sandbox may map; the code's own memory is limited far below, by the interpreter."""

_HELPER = Path(__file__).with_name("sandbox_helper.py")
_LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache")


@dataclass(frozen=True, kw_only=True)
class HelperPrograms:
    """What the helper needs of this installation."""

    python: Path
    """The interpreter itself, not a link to it."""
    library: Path
    """Folder of Python's own library."""
    package: Path
    """Folder `pydantic_monty`."""
    typing_extensions: Path
    """The one module that it imports besides."""
    interpreter: Path
    """The program that runs the tools' code."""

    @classmethod
    def found(cls) -> HelperPrograms:
        """Those of this process's environment.

        Raises:
            OperatorError: `pydantic-monty` is not whole.
        """
        from pydantic_monty import _binary

        package, extensions = find_spec("pydantic_monty"), find_spec("typing_extensions")
        try:
            interpreter = _binary.find_monty_binary()
        except FileNotFoundError as error:
            raise OperatorError(
                f"the sandbox's interpreter is missing: {error}. Install pydantic-monty again, with its runtime."
            ) from None
        if package is None or package.origin is None or extensions is None or extensions.origin is None:
            raise OperatorError("the sandbox's package pydantic-monty cannot be found. Install it again.")
        return cls(
            python=Path(getattr(sys, "_base_executable", sys.executable) or sys.executable).resolve(),
            library=Path(sysconfig.get_path("stdlib")).resolve(),
            package=Path(package.origin).resolve().parent,
            typing_extensions=Path(extensions.origin).resolve(),
            interpreter=Path(interpreter).resolve(),
        )


def plain_command(programs: HelperPrograms) -> list[str]:
    """The helper with nothing but limits around it."""
    return [
        str(programs.python), "-I", "-S", "-B", "-X", "utf8", str(_HELPER),
        str(programs.package.parent), str(programs.interpreter), str(ADDRESS_SPACE_BYTES),
    ]  # fmt: skip


def confined_command(programs: HelperPrograms, inside: list[str] | None = None) -> list[str] | None:
    """The helper in namespaces of its own: no network, no other process, no file but what it runs on.

    Args:
        programs: What is put into the box.
        inside: Another command to run there; tests and benchmarks try what the box holds back.

    Returns:
        `None` where there is no bubblewrap.
    """
    bubblewrap = shutil.which("bwrap")
    if bubblewrap is None or sys.platform != "linux":
        return None
    command = [
        bubblewrap, "--unshare-all", "--unshare-user", "--disable-userns", "--uid", "65534", "--gid", "65534",
        "--hostname", "box", "--die-with-parent", "--new-session", "--clearenv", "--cap-drop", "ALL",
    ]  # fmt: skip
    for folder in _LIBRARIES:
        command += ["--ro-bind-try", folder, folder]
    command += ["--ro-bind", str(programs.library), str(programs.library)]
    shared = sysconfig.get_config_var("LIBDIR"), sysconfig.get_config_var("INSTSONAME")
    if all(isinstance(part, str) and part for part in shared):
        file = str(Path(shared[0]) / shared[1])
        command += ["--ro-bind-try", file, file]
    for unneeded in ("site-packages", "dist-packages"):
        if (programs.library / unneeded).is_dir():  # other people's modules
            command += ["--tmpfs", str(programs.library / unneeded)]
    command += [
        "--ro-bind", str(programs.python), str(programs.python),
        "--ro-bind", str(programs.package), "/box/lib/pydantic_monty",
        "--ro-bind", str(programs.typing_extensions), "/box/lib/typing_extensions.py",
        "--ro-bind", str(programs.interpreter), "/box/monty",
        "--ro-bind", str(_HELPER), "/box/helper.py",
        "--remount-ro", "/", "--chdir", "/box", "--",
    ]  # fmt: skip
    return command + (
        inside
        if inside is not None
        else [
            str(programs.python), "-I", "-S", "-B", "-X", "utf8", "/box/helper.py",
            "/box/lib", "/box/monty", str(ADDRESS_SPACE_BYTES),
        ]
    )  # fmt: skip
