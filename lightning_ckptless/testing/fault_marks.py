"""Which faults have happened: files that outlive the process they strike."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

from lightning_ckptless.protocol.fault_script import Fault


class FaultMarks:
    """Claims occurrences of faults, each exactly once per run.

    A fault of all ranks is claimed by the first of them; the others of the same generation join in. Those that were
    ended before their turn do not make up for it after the relaunch.

    Args:
        folder: of the marks; made when the first fault is claimed.
        generation: number of the membership, which may change.
        rank: who claims.
    """

    def __init__(self, folder: Path, generation: Callable[[], int], rank: int) -> None:
        self.folder = folder
        self.rank = rank
        self._generation = generation
        self._claimed: set[tuple[int, int]] = set()

    def claim(self, index: int, fault: Fault) -> bool:
        """Whether an occurrence of a fault is left for this rank in this generation.

        Args:
            index: place of the fault in the script of the run.
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
        """Put a mark where there is none; returns the generation whose mark is there."""
        self.folder.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{path.name}.{self.rank}.{os.getpid()}")
        draft.write_text(json.dumps({"generation": generation, "rank": self.rank}))
        try:
            # A link appears with its content, at once, and for one process only.
            os.link(draft, path)
        except FileExistsError:
            return int(json.loads(path.read_text())["generation"])
        finally:
            draft.unlink()
        return generation

    @staticmethod
    def claimed(folder: Path) -> frozenset[int]:
        """Indices of the faults that have happened at least once."""
        return frozenset(int(path.name.split("-")[0]) for path in folder.glob("[0-9]*"))
