"""One run of a drill: the same script, left alone or with faults, and what is left of it when it has ended."""

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
    """A run that has ended.

        <folder>/trace/              digests of every step of every rank
        <folder>/runs/<run id>/      its ledger
        <folder>/logs/               copies of its log files
        <folder>/output/             what it printed

    Args:
        folder: of all that is known about it.
        exit_code: of its agent.
        wall_s: from its start to its end.
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
        """Folder of the ledger; None where the run has written none."""
        return next((path.parent for path in (self.folder / "runs").glob(f"*/{LEDGER_NAME}")), None)

    @property
    def events(self) -> tuple[Event, ...]:
        """The ledger's events."""
        folder = self.run_folder
        return () if folder is None else read_ledger(folder / LEDGER_NAME).events

    def tail(self, lines: int = 20) -> str:
        """The last lines that it printed on stderr, for a message that says what went wrong."""
        newest = max((self.folder / "output").rglob("*"), key=_written_at, default=None)
        return "" if newest is None else "\n".join(newest.read_text(errors="replace").splitlines()[-lines:])

    def save(self) -> None:
        """Put the facts beside the files, so that `load` finds them."""
        facts = {"exit_code": self.exit_code, "wall_s": self.wall_s}
        (self.folder / _SUMMARY).write_text(json.dumps(facts))

    @classmethod
    def load(cls, folder: Path) -> Self:
        """A run that ended earlier."""
        return cls(folder, **json.loads((folder / _SUMMARY).read_text()))


def _written_at(path: Path) -> float:
    return path.stat().st_mtime if path.is_file() and path.stat().st_size else 0.0


def environment_of(folder: Path, faults: str, more: Mapping[str, str]) -> dict[str, str]:
    """Variables under which any script traces its steps and gets its faults."""
    return {
        **more,
        environment.TRACE_DIR: str(folder / "trace"),
        environment.RUN_ROOT: str(folder / "runs"),
        environment.FAULTS: faults,
    }
