"""Finds a run by id, by folder, or the newest one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lightning_ckptless import environment
from lightning_ckptless.errors import OptionsError
from lightning_ckptless.ledger import LEDGER_NAME, Event, read_ledger


@dataclass(frozen=True, slots=True)
class Run:
    """A run's folder and the events in its ledger.

    Args:
        run_id: id of the run.
        folder: folder of the ledger.
        events: events in chronological order.
    """

    run_id: str
    folder: Path
    events: tuple[Event, ...]

    def of(self, kind: str) -> list[Event]:
        """Return the events with this name."""
        return [event for event in self.events if event.event == kind]

    @property
    def arena_dir(self) -> Path | None:
        """Folder of its arenas, as reported by its workers; None before they have."""
        return next((Path(event.fields["arena"]).parent for event in reversed(self.of("run_started"))), None)


def run_root(root: Path | None) -> Path:
    """Return the folder of all runs: the given one, the one in the environment, or `./ckptless`."""
    return root or environment.run_root()


def find_run(name: str | None, root: Path | None) -> Run:
    """Find a run.

    Args:
        name: run id or run folder; None for the newest run.
        root: folder of all runs; None for the default.

    Raises:
        OptionsError: there is no such run; the message lists the newest ones.
    """
    folder_of_runs = run_root(root)
    ledgers = sorted(folder_of_runs.glob(f"*/{LEDGER_NAME}"), key=lambda path: path.stat().st_mtime)
    candidates = [Path(name), folder_of_runs / name] if name else [path.parent for path in ledgers[-1:]]
    for folder in candidates:
        if (folder / LEDGER_NAME).is_file():
            return Run(folder.absolute().name, folder.absolute(), read_ledger(folder / LEDGER_NAME).events)
    known = ", ".join(path.parent.name for path in ledgers[-5:]) or "none"
    raise OptionsError(
        f"{name or 'the newest run'}: no {LEDGER_NAME} found in {folder_of_runs.absolute()}; runs there: {known}"
    )
