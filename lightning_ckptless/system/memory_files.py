"""Files of anonymous memory: links that stand in for files where a memory file system is too small for them.

A process makes the memory (`memfd_create`), keeps it open, and puts a link to its descriptor, `/proc/PID/fd/N`, where
the file would be. Every process of the same user that can see that process opens it by its path like a file. Only the
memory of the machine or the container limits its size. It is freed when its holder has closed it and every process that
has mapped it has ended.

Process ids and descriptors are used again, so a link may come to lead elsewhere. The memory has a name, which is
compared before anything is opened and again after it: what bears another name counts as missing.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path

_TARGET = re.compile(r"/proc/\d+/fd/\d+")


def make_memory_file(path: Path) -> int:
    """Make an empty file of anonymous memory, and the link to it, in the place of whatever is at the path.

    Returns:
        Its descriptor, not inheritable: the file exists as long as this process keeps it open.

    Raises:
        OSError: the kernel gives none, or the link cannot be written.
    """
    handle = os.memfd_create(_name_of(path), os.MFD_CLOEXEC)
    try:
        os.fchmod(handle, 0o600)
        draft = path.with_name(f".{path.name}.link")
        draft.unlink(missing_ok=True)
        draft.symlink_to(f"/proc/{os.getpid()}/fd/{handle}")
        draft.replace(path)
    except OSError:
        os.close(handle)
        raise
    return handle


def open_file(path: Path, flags: int) -> int:
    """Open a file, of memory or not. No other link is followed.

    Args:
        path: of the file.
        flags: as for `os.open`; a file that is created is private.

    Raises:
        FileNotFoundError: there is none, or its memory is gone.
        OSError: it cannot be opened, or is a link of another kind.
    """
    try:
        return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
    _require_held(path)
    handle = os.open(path, flags & ~os.O_CREAT | os.O_CLOEXEC)
    try:
        _require_memory(path, f"/proc/self/fd/{handle}")
    except OSError:
        os.close(handle)
        raise
    return handle


def stat_file(path: Path) -> os.stat_result:
    """What is known of a file, of memory or not.

    Raises:
        FileNotFoundError: there is none, or its memory is gone.
        OSError: it is a link of another kind.
    """
    found = path.lstat()
    if not stat.S_ISLNK(found.st_mode):
        return found
    _require_held(path)
    return path.stat()


def is_there(path: Path) -> bool:
    """Whether there is a file, of memory or not; a link to memory that is gone is none."""
    try:
        stat_file(path)
    except FileNotFoundError:
        return False
    return True


def is_memory_file(path: Path) -> bool:
    """Whether a file is one of anonymous memory that is still there."""
    with suppress(OSError):
        return path.is_symlink() and stat_file(path) is not None
    return False


def _require_held(path: Path) -> None:
    target = os.readlink(path)
    if _TARGET.fullmatch(target) is None:
        raise OSError(errno.ELOOP, "expected a file, found a symbolic link", str(path))
    _require_memory(path, target)


def _require_memory(path: Path, descriptor: str) -> None:
    """Refuse a descriptor, by its path in /proc, that does not lead to the memory of a file."""
    try:
        found = os.readlink(descriptor)
    except OSError:
        # Its holder has ended, or the process that has its number now is another user's.
        found = ""
    if found != f"/memfd:{_name_of(path)} (deleted)":
        raise FileNotFoundError(errno.ENOENT, "the process that held this memory has ended", str(path))


def _name_of(path: Path) -> str:
    # Of the folder only the name: processes may have different paths to it. The kernel limits the length: hence a hash.
    return f"ckptless-{blake2b(f'{path.parent.name}/{path.name}'.encode(), digest_size=12).hexdigest()}"
