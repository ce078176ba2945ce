"""Files of anonymous memory, which replace files if a memory file system is too small for them.

A process creates the memory (`memfd_create`), keeps it open, and places a link to its descriptor (`/proc/PID/fd/N`) at
the path of the file. Every process of the same user that can see that process can open the path like a file. The size
is limited only by the memory of the host or the container. The memory is freed when its holder has closed it and every
process that has mapped it has exited.

Process ids and descriptors are reused, so a link may point to something else later. Therefore the memory has a name
that is compared before and after it is opened. Memory with another name counts as missing.
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
    """Create an empty file of anonymous memory and a link to it, which replaces any file at the path.

    Returns:
        Its descriptor, which is not inheritable. The file exists as long as this process keeps it open.

    Raises:
        OSError: the memory or the link cannot be created.
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
    """Open a regular file or a file of anonymous memory. Other links are not followed.

    Args:
        path: path of the file.
        flags: flags of `os.open`; a file that is created is private.

    Raises:
        FileNotFoundError: the file or its memory does not exist.
        OSError: it cannot be opened, or is another link.
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
    """Return the status of a regular file or a file of anonymous memory.

    Raises:
        FileNotFoundError: the file or its memory does not exist.
        OSError: it is another link.
    """
    found = path.lstat()
    if not stat.S_ISLNK(found.st_mode):
        return found
    _require_held(path)
    return path.stat()


def is_there(path: Path) -> bool:
    """Return whether a file exists; a link to memory that was freed does not count."""
    try:
        stat_file(path)
    except FileNotFoundError:
        return False
    return True


def is_memory_file(path: Path) -> bool:
    """Return whether a path is a file of anonymous memory that still exists."""
    with suppress(OSError):
        return path.is_symlink() and stat_file(path) is not None
    return False


def _require_held(path: Path) -> None:
    target = os.readlink(path)
    if _TARGET.fullmatch(target) is None:
        raise OSError(errno.ELOOP, "expected a file, found a symbolic link", str(path))
    _require_memory(path, target)


def _require_memory(path: Path, descriptor: str) -> None:
    """Refuse a descriptor, given by its path in /proc, that is not the memory of the file."""
    try:
        found = os.readlink(descriptor)
    except OSError:
        # The holder has exited, or its process id now belongs to a process of another user.
        found = ""
    if found != f"/memfd:{_name_of(path)} (deleted)":
        raise FileNotFoundError(errno.ENOENT, "the process that held this memory has exited", str(path))


def _name_of(path: Path) -> str:
    # Uses only the name of the folder, as its path may differ between processes, and a hash, as the kernel limits the
    # length.
    return f"ckptless-{blake2b(f'{path.parent.name}/{path.name}'.encode(), digest_size=12).hexdigest()}"
