"""Records which faults were injected, in files that outlive the processes."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

from lightning_ckptless.protocol.fault_script import Fault


class FaultMarks:
    """Claims each occurrence of a fault exactly once per run.

    A fault of all ranks is claimed by the first rank that reaches it; the others of the same generation take part. A
    rank that is killed before it reaches the fault does not repeat it after the relaunch.

    Args:
        folder: folder of the marks; created when the first fault is claimed.
        generation: returns the current generation.
        rank: rank that claims.
    """

    def __init__(self, folder: Path, generation: Callable[[], int], rank: int) -> None:
        self.folder = folder
        self.rank = rank
        self._generation = generation
        self._claimed: set[tuple[int, int]] = set()

    def claim(self, index: int, fault: Fault) -> bool:
        """Claim an occurrence of a fault; returns whether this rank must inject it now.

        Args:
            index: index of the fault in the fault script.
            fault: the fault; it occurs `fault.times` times, once per generation.
        """
        generation = self._generation()
        if (generation, index) in self._claimed:
            return False
        for occurrence in range(fault.times):
            path = self.folder / f"{index}-{re.sub(r'[^a-z0-9]+', '-', str(fault))}.{occurrence}"
            if self._mark(path, generation) == generation:
                self._claimed.add((generation, index))
                return True
        return False

    def _mark(self, path: Path, generation: int) -> int:
        """Create a mark unless it exists; returns the generation of the mark."""
        self.folder.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{path.name}.{self.rank}.{os.getpid()}")
        draft.write_text(json.dumps({"generation": generation, "rank": self.rank}))
        try:
            # Linking is atomic: the mark appears with its content, and only one process succeeds.
            os.link(draft, path)
        except FileExistsError:
            return int(json.loads(path.read_text())["generation"])
        finally:
            draft.unlink()
        return generation

    @staticmethod
    def claimed(folder: Path) -> frozenset[int]:
        """Return the indices of faults that were injected at least once."""
        return frozenset(int(path.name.split("-")[0]) for path in folder.glob("[0-9]*"))
