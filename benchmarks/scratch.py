"""Temporary folders of a benchmark, on disk and in shared memory, that are removed at its end."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True)
class Scratch:
    """Two folders that only this benchmark uses.

    Args:
        files: folder on disk.
        arenas: folder in shared memory.
    """

    files: Path
    arenas: Path


@contextmanager
def scratch() -> Iterator[Scratch]:
    """Create the folders, and remove them at the end."""
    with tempfile.TemporaryDirectory(prefix="ckptless-bench-") as files:
        arenas = tempfile.mkdtemp(prefix="ckptless-bench-", dir=SHARED_MEMORY if SHARED_MEMORY.is_dir() else files)
        try:
            yield Scratch(Path(files), Path(arenas))
        finally:
            shutil.rmtree(arenas, ignore_errors=True)
