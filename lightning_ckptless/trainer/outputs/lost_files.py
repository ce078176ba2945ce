"""Files of the run that are missing, or shorter than they were at the version that the run rolls back to.

Every new process runs the script from its beginning. A script that deletes or recreates its output folder there
destroys files that are still in use, which would otherwise be noticed much later, or never.
"""

from __future__ import annotations

import csv
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_ckptless import environment
from lightning_ckptless.internals.lightning.distribution import distribution_of, is_a, module
from lightning_ckptless.protocol.versions import Version

_MOST_SHOWN = 5


@dataclass(frozen=True, slots=True)
class LostFile:
    """A file that is missing or too short.

    Args:
        path: path of the file.
        expected: its size at the version, in `unit`.
        found: its current size; None if it is missing.
        unit: `bytes` or `rows`.
    """

    path: str
    expected: int
    found: int | None
    unit: str = "bytes"

    def __str__(self) -> str:
        found = "it is missing" if self.found is None else f"found {self.found}"
        return f"{self.path} (expected {self.expected} {self.unit}, {found})"


def lost_checkpoints(written_bytes: dict[str, int]) -> list[LostFile]:
    """Find checkpoints that are missing or too short.

    Args:
        written_bytes: size of each checkpoint after it was written, by path.
    """
    sizes = {path: (expected, size_bytes(path)) for path, expected in written_bytes.items()}
    return [
        LostFile(path, expected, found)
        for path, (expected, found) in sizes.items()
        if found is None or found < expected
    ]


def lost_logs(trainer: Any, positions: list[dict[str, Any] | None] | None) -> list[LostFile]:
    """Find log files that are missing or too short.

    Args:
        trainer: trainer whose loggers have the folders of the run.
        positions: positions of the log files at the version; None on a rank that writes none.
    """
    lost: list[LostFile] = []
    for logger, position in zip(trainer.loggers, positions or [], strict=False):
        if position is None:
            continue
        if "rows" in position and is_a(logger, "loggers", "CSVLogger"):
            name = module(distribution_of(trainer), "loggers.csv_logs").ExperimentWriter.NAME_METRICS_FILE
            path = os.path.join(logger.log_dir, name)
            lost.append(LostFile(path, position["rows"], _rows(path), "rows"))
        elif "files" in position and is_a(logger, "loggers", "TensorBoardLogger"):
            files = {os.path.join(logger.log_dir, name): size for name, size in position["files"].items()}
            lost += [LostFile(path, size, size_bytes(path)) for path, size in files.items()]
    return [file for file in lost if (file.found or 0) < file.expected]


def warning_of(lost: list[LostFile], version: Version) -> str:
    """The warning about lost files."""
    shown = "\n  ".join(map(str, lost[:_MOST_SHOWN]))
    more = f"\n  and {len(lost) - _MOST_SHOWN} more" if len(lost) > _MOST_SHOWN else ""
    return (
        f"files of the run are missing or shorter than at {version}, to which it rolls back:\n  {shown}{more}\n"
        "  Every new process runs the script from its beginning. If the script deletes or recreates its output folder "
        f"there, do so only if neither {environment.FAULT_REPORT} nor {environment.STANDBY} is in os.environ."
    )


def size_bytes(path: str) -> int | None:
    """Size of a file, or of all files in a folder; None if it does not exist."""
    try:
        if os.path.isdir(path):
            return sum(file.stat().st_size for file in Path(path).rglob("*") if file.is_file())
        return os.stat(path).st_size
    except FileNotFoundError:
        return None


def _rows(path: str) -> int | None:
    try:
        with open(path, newline="") as file:
            return sum(1 for _ in csv.DictReader(file))
    except FileNotFoundError:
        return None
