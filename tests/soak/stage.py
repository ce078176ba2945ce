"""The environment of a run: its folders, and the undisturbed runs to compare with."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from benchmarks.harness.processes import ENVIRONMENT, SHARED_MEMORY
from lightning_ckptless.errors import LaunchError
from lightning_ckptless.membership.forkserver.client import ForkServer
from lightning_ckptless.testing.drill import Variant, run_variant
from tests.faults.conftest import command_for
from tests.lab.parts import Options

DISK_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Place:
    """The folders of one run.

    Args:
        files: folder for everything that it writes.
        arenas: folder in shared memory.
        has_own_disk: whether `disk` is a small separate disk, which can be filled without harm.
    """

    files: Path
    arenas: Path
    has_own_disk: bool = False

    @property
    def disk(self) -> Path:
        """Folder for its durable states."""
        return self.files / "disk"

    @property
    def commits(self) -> Path:
        """File of the versions that ranks have recorded as committed."""
        return self.files / "commits.jsonl"

    @property
    def temporary(self) -> Path:
        """Folder for the temporary files of an agent in this process."""
        return self.files / "temporary"


@contextmanager
def place_for(folder: Path) -> Iterator[Place]:
    """Create the folders of a run in an emptied one; shared memory and disk are removed at the end, files are kept."""
    disk = folder / "disk"
    if os.path.ismount(disk):
        # Left by a soak test that was killed.
        _unmount(disk)
    shutil.rmtree(folder, ignore_errors=True)
    disk.mkdir(parents=True)
    (folder / "temporary").mkdir()
    arenas = Path(tempfile.mkdtemp(prefix="ckptless-soak-", dir=SHARED_MEMORY if SHARED_MEMORY.is_dir() else folder))
    mounted = _mount(disk)
    try:
        yield Place(folder, arenas, mounted)
    finally:
        if mounted:
            _unmount(disk)
        shutil.rmtree(arenas, ignore_errors=True)


def _mount(disk: Path) -> bool:
    if os.geteuid() != 0 or shutil.which("mount") is None:
        return False
    words = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(disk)]
    return subprocess.run(words, check=False, capture_output=True).returncode == 0


def _unmount(disk: Path) -> None:
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


class Undisturbed:
    """Undisturbed runs, one per configuration, computed once and kept.

    Args:
        folder: folder of all of them.
        parent: fork server for their workers.
    """

    def __init__(self, folder: Path, parent: ForkServer) -> None:
        self.folder = folder
        self._parent = parent

    def run(self, options: Options) -> Variant:
        """Return the undisturbed run with the given options of the test script.

        Raises:
            LaunchError: If it fails.
        """
        versions = [version(name) for name in ("torch", "lightning")]
        key = hashlib.sha256(json.dumps([asdict(options), versions]).encode()).hexdigest()[:16]
        folder = self.folder / key
        with suppress(FileNotFoundError, ValueError, TypeError):
            return Variant.load(folder)
        shutil.rmtree(folder, ignore_errors=True)
        words = command_for(options)
        found = run_variant(
            words, folder, nproc=options.devices, parent=self._parent, isolate=True, env=ENVIRONMENT, timeout_s=300
        )
        if found.exit_code:
            shutil.rmtree(folder)
            raise LaunchError(f"{' '.join(words)} failed without any fault: {found.tail()}")
        return found
