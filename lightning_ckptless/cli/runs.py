"""Runs as the user names them: by id, by folder, or not at all for the newest."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lightning_ckptless import environment
from lightning_ckptless.errors import OptionsError
from lightning_ckptless.ledger import LEDGER_NAME, Event, read_ledger


@dataclass(frozen=True, slots=True)
class Run:
    """A run's folder and what its ledger says.

    Args:
        run_id: its name.
        folder: of the ledger.
        events: in the order in which they happened.
    """

    run_id: str
    folder: Path
    events: tuple[Event, ...]

    def of(self, kind: str) -> list[Event]:
        """The events of one kind."""
        return [event for event in self.events if event.event == kind]

    @property
    def arena_dir(self) -> Path | None:
        """Folder of its arenas, as its workers told; None where they did not."""
        return next((Path(event.fields["arena"]).parent for event in reversed(self.of("run_started"))), None)


def run_root(root: Path | None) -> Path:
    """The folder of all runs: as given, from the environment, or `./ckptless`."""
    return root or environment.run_root()


def find_run(name: str | None, root: Path | None) -> Run:
    """The run that the user means.

    Args:
        name: its id or its folder; None for the newest.
        root: folder of all runs; None for the usual one.

    Raises:
        OptionsError: there is no such run; the message names those that are there.
    """
    place = run_root(root)
    ledgers = sorted(place.glob(f"*/{LEDGER_NAME}"), key=lambda path: path.stat().st_mtime)
    candidates = [Path(name), place / name] if name else [path.parent for path in ledgers[-1:]]
    for folder in candidates:
        if (folder / LEDGER_NAME).is_file():
            return Run(folder.absolute().name, folder.absolute(), read_ledger(folder / LEDGER_NAME).events)
    known = ", ".join(path.parent.name for path in ledgers[-5:]) or "none"
    raise OptionsError(f"{name or 'the newest run'}: no ledger of it in {place.absolute()}; the runs there: {known}")
