"""Temporary folders of agents, and those left behind by agents that were killed.

An agent holds a lock on each of its folders, which the kernel releases at its death. So a folder without a lock belongs
to no living agent, even if its process id is in use again.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from lightning_ckptless.system.private_files import open_own_folder

_PREFIX = "ckptless-scratch-"


class ScratchFolder:
    """A temporary folder of this process, for this user only.

    Args:
        purpose: part of its name.

    Attributes:
        path: the folder.
    """

    def __init__(self, purpose: str) -> None:
        while True:
            self.path = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{purpose}-"))
            self._handle = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            fcntl.flock(self._handle, fcntl.LOCK_EX)
            if self.path.exists():
                return
            # Another process took it for that of a dead agent and removed it before it was locked.
            os.close(self._handle)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.remove()

    def remove(self) -> None:
        """Remove the folder with its contents."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1


def find_abandoned() -> list[Path]:
    """Return this user's scratch folders whose agents no longer exist."""
    return [path for path in sorted(Path(tempfile.gettempdir()).glob(f"{_PREFIX}*")) if _take(path, remove=False)]


def remove_abandoned(path: Path) -> bool:
    """Remove a folder whose agent no longer exists; returns False if it does."""
    return _take(path, remove=True)


def _take(path: Path, *, remove: bool) -> bool:
    # A folder of another user, a link, or a missing folder is not ours to remove.
    with suppress(OSError), open_own_folder(path) as handle:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if remove:
            shutil.rmtree(path, ignore_errors=True)
        return True
    return False
