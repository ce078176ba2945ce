"""A finished run of a drill, without or with faults, and its files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from lightning_ckptless import environment
from lightning_ckptless.ledger import LEDGER_NAME, Event, read_ledger

_SUMMARY = "run.json"


@dataclass(frozen=True, slots=True)
class Variant:
    """A finished run.

        <folder>/trace/              digests of every step of every rank
        <folder>/runs/<run id>/      its ledger
        <folder>/logs/               copies of its log files
        <folder>/output/             its output

    Args:
        folder: folder of all its files.
        exit_code: exit code of its agent.
        wall_s: duration in seconds.
    """

    folder: Path
    exit_code: int
    wall_s: float

    @property
    def trace(self) -> Path:
        """Folder of the traces."""
        return self.folder / "trace"

    @property
    def run_folder(self) -> Path | None:
        """Folder of the ledger; None without one."""
        return next((path.parent for path in (self.folder / "runs").glob(f"*/{LEDGER_NAME}")), None)

    @property
    def events(self) -> tuple[Event, ...]:
        """The ledger's events."""
        folder = self.run_folder
        return () if folder is None else read_ledger(folder / LEDGER_NAME).events

    def tail(self, lines: int = 20) -> str:
        """Return the last lines of its newest output file, for an error message."""
        newest = max((self.folder / "output").rglob("*"), key=_written_at, default=None)
        return "" if newest is None else "\n".join(newest.read_text(errors="replace").splitlines()[-lines:])

    def save(self) -> None:
        """Write a summary file that `load` reads."""
        facts = {"exit_code": self.exit_code, "wall_s": self.wall_s}
        (self.folder / _SUMMARY).write_text(json.dumps(facts))

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Load a run that was saved earlier."""
        return cls(folder, **json.loads((folder / _SUMMARY).read_text()))


def _written_at(path: Path) -> float:
    return path.stat().st_mtime if path.is_file() and path.stat().st_size else 0.0


def environment_of(folder: Path, faults: str, more: Mapping[str, str]) -> dict[str, str]:
    """Return the environment variables that make a script write a trace and inject faults."""
    return {
        **more,
        environment.TRACE_DIR: str(folder / "trace"),
        environment.RUN_ROOT: str(folder / "runs"),
        environment.FAULTS: faults,
    }
