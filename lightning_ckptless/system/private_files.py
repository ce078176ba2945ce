"""Files and folders that no other user can have written.

What lies in a folder that others may write to can be replaced at any moment, and what a link leads to was chosen by
whoever made it. A folder is private when it is a folder of this user that only this user may write to.
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
    """Refuse a file or folder that another user may have written, or may write to.

    Args:
        path: itself, not what it links to.
        found: what is known of it; None to look.

    Raises:
        PermissionError: it is a link or another user's, or its group or others may write to it; with the fix.
        OSError: there is none.
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
    """Refuse a folder that is not private, or has an entry that is not. Entries may come and go meanwhile.

    Raises:
        PermissionError: with the path that is not, and the fix.
        OSError: there is no such folder.
    """
    require_private(folder)
    # With a umask of 002 files are writable by their group, which means nothing where it cannot reach them.
    is_open = bool(folder.lstat().st_mode & _OPEN_TO_OTHERS)
    for path in folder.iterdir():
        with suppress(FileNotFoundError):
            require_private(path) if is_open else _require_own(path, path.lstat())


def target_of_own_link(path: Path) -> Path:
    """Where a link of this user leads to; the path itself where it is anything else."""
    return path.resolve() if path.is_symlink() and path.lstat().st_uid == os.getuid() else path


@contextmanager
def open_own_folder(path: Path) -> Iterator[int]:
    """Hold a folder of this user open, whatever is put in its place meanwhile.

    Yields:
        A descriptor of it, for the `dir_fd` of calls of `os`.

    Raises:
        PermissionError: it is another user's.
        OSError: there is none, or the path is a link or a file.
    """
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if (uid := os.fstat(handle).st_uid) != os.getuid():
            raise PermissionError(f"{path}: expected a folder of user {os.getuid()}, found one of user {uid}")
        yield handle
    finally:
        os.close(handle)
