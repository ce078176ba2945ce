"""Small memory file systems, as containers have them at /dev/shm."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def small_memory(folder: Path, mib: int) -> Iterator[Path]:
    """A memory file system in a new folder; the test is skipped where this process may not mount one.

    Args:
        folder: where it is mounted.
        mib: its size.
    """
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={mib}m,mode=700", "none", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root may mount a file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
