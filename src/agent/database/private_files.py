"""Folders and files that nobody but this user can have written.

Where several users share a machine, another one may have made our folder first, to plant files in it or to take ours
away. So a folder is used only if it is this user's and closed to the writing of others, and a file in it is opened
without following a link and without waiting for whoever holds the other end of a pipe.
"""

from __future__ import annotations

import errno
import os
import stat
import sys
from collections.abc import Collection
from pathlib import Path

from agent.errors import OperatorError

if sys.platform != "win32":
    import pwd

# Windows has neither: there the rights of the user's folders are inherited from the profile.
_UNFOLLOWED = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
_IN_BINARY = getattr(os, "O_BINARY", 0)


def make_private_folder(folder: Path, *, mode: int = 0o700, parents: bool = False) -> None:
    """A new folder of exactly this mode, whatever the umask; `parents` are made closed to the writing of others.

    Raises:
        FileExistsError: something is there; `require_private` tells whether it can be used.
    """
    if parents:
        missing = [parent for parent in folder.parents if not parent.exists()]
        for parent in reversed(missing):
            parent.mkdir(mode=0o755, exist_ok=True)
    folder.mkdir(mode=0o700)
    if sys.platform == "win32" or stat.S_IMODE(folder.lstat().st_mode) == mode:
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | _UNFOLLOWED)
    try:
        if os.fstat(descriptor).st_uid == os.geteuid():  # else somebody put another in its place
            os.fchmod(descriptor, mode)
    finally:
        os.close(descriptor)


def require_private(folder: Path, *, may_be_link: bool = False) -> None:
    """Nothing, if this folder is this user's and no other user can write to it.

    Args:
        folder: Must be there.
        may_be_link: Also a link that this user or root made, to a folder of which the same holds.

    Raises:
        OperatorError: it is another user's, a link, or open to others; the message says what to do.
    """
    if sys.platform == "win32":
        return
    found = folder.lstat()
    if stat.S_ISLNK(found.st_mode) and may_be_link:
        if found.st_uid not in (os.geteuid(), 0):
            raise OperatorError(
                f"the link {str(folder)!r} belongs to user {_name_of(found.st_uid)!r}, who can lead it elsewhere. "
                "Remove it, or set LEARNING_DATA_DIR to a folder of your own."
            )
        found = folder.stat()
    if not stat.S_ISDIR(found.st_mode):
        kind = "a link" if stat.S_ISLNK(found.st_mode) else "a file"
        raise OperatorError(f"{str(folder)!r} must be a folder and is {kind}. Move it away and try again.")
    if found.st_uid != os.geteuid():
        raise OperatorError(
            f"the folder {str(folder)!r} belongs to user {_name_of(found.st_uid)!r}, who can change what is in it. Run "
            "this as that user, or set LEARNING_DATA_DIR to a folder of your own."
        )
    if found.st_mode & 0o022:
        raise OperatorError(
            f"other users can write to the folder {str(folder)!r} (mode {stat.S_IMODE(found.st_mode):o}), so what is "
            "in it may be theirs. Look through it, then close it (chmod go-w), or set LEARNING_DATA_DIR to a folder of "
            "your own."
        )


def read_private(
    path: Path | str, *, owners: Collection[int] | None = None, bytes_max: int, folder: int | None = None
) -> bytes:
    """What a file holds, if it is a regular one, no link, and no larger than that.

    Args:
        owners: User ids of whom it may be; `None`: only this process's.
        folder: Descriptor of the folder that `path` is a name in.

    Raises:
        FileNotFoundError: there is none.
        OSError: it cannot be read, or is another kind of thing than that.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | _UNFOLLOWED | _IN_BINARY, dir_fd=folder)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise _refused("is a link", path) from None
        raise
    with os.fdopen(descriptor, "rb") as file:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise _refused("is no regular file", path)
        if sys.platform != "win32" and found.st_uid not in (owners or (os.geteuid(),)):
            raise _refused(f"belongs to user {_name_of(found.st_uid)!r}", path)
        contents = file.read(bytes_max + 1)
    if len(contents) > bytes_max:
        raise _refused(f"is larger than {bytes_max} bytes", path)
    return contents


def _refused(reason: str, path: Path | str) -> OSError:
    return PermissionError(errno.EPERM, f"not read because it {reason}", str(path))


def _name_of(user_id: int) -> str:
    if sys.platform != "win32":
        try:
            return pwd.getpwuid(user_id).pw_name
        except KeyError:
            pass
    return f"number {user_id}"
