"""Checks that no other user can have written a file or folder.

Entries of a folder that others may write to can be replaced at any time, and the target of a link is chosen by its
creator. A folder is private if this user owns it and only this user may write to it.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH
_OPEN_TO_OTHERS = stat.S_IXGRP | stat.S_IXOTH


def require_private(path: Path, found: os.stat_result | None = None) -> None:
    """Refuse a file or folder that another user may have written or may write to.

    Args:
        path: path to check; links are not followed.
        found: status of the path; None to read it.

    Raises:
        PermissionError: it is a link, has another owner, or is writable by its group or others.
        OSError: it does not exist.
    """
    found = path.lstat() if found is None else found
    _require_own(path, found)
    if found.st_mode & _WRITABLE_BY_OTHERS:
        raise PermissionError(
            f"{path}: expected a {_kind(found)} that only user {os.getuid()} can write to, found mode "
            f"{stat.S_IMODE(found.st_mode):04o}: if no other user has written to it, run `chmod go-w {path}`"
        )


def _require_own(path: Path, found: os.stat_result) -> None:
    if stat.S_ISLNK(found.st_mode):
        raise PermissionError(f"{path}: expected a file or folder of user {os.getuid()}, found a symbolic link")
    if found.st_uid != os.getuid():
        raise PermissionError(
            f"{path}: expected a {_kind(found)} of user {os.getuid()}, found one of user {found.st_uid}"
        )


def _kind(found: os.stat_result) -> str:
    return "folder" if stat.S_ISDIR(found.st_mode) else "file"


def require_private_files(folder: Path) -> None:
    """Refuse a folder that is not private or has an entry that is not. Entries may be added and removed concurrently.

    Raises:
        PermissionError: the folder or an entry is not private.
        OSError: the folder does not exist.
    """
    require_private(folder)
    # With a umask of 002, files are group-writable, which is harmless if the group cannot enter the folder.
    is_open = bool(folder.lstat().st_mode & _OPEN_TO_OTHERS)
    for path in folder.iterdir():
        with suppress(FileNotFoundError):
            require_private(path) if is_open else _require_own(path, path.lstat())


def target_of_own_link(path: Path) -> Path:
    """Resolve a link owned by this user; return any other path unchanged."""
    return path.resolve() if path.is_symlink() and path.lstat().st_uid == os.getuid() else path


@contextmanager
def open_own_folder(path: Path) -> Iterator[int]:
    """Keep a folder of this user open, so that it cannot be exchanged.

    Yields:
        A descriptor for the `dir_fd` argument of functions in `os`.

    Raises:
        PermissionError: it has another owner.
        OSError: it does not exist, or is a link or a file.
    """
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if (uid := os.fstat(handle).st_uid) != os.getuid():
            raise PermissionError(f"{path}: expected a folder of user {os.getuid()}, found one of user {uid}")
        yield handle
    finally:
        os.close(handle)
