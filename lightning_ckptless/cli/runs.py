"""Finds a run by id, by folder, or the newest one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lightning_ckptless import environment
from lightning_ckptless.errors import LaunchError, OptionsError
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
    """Find a run and read its ledger; the arguments and errors are those of `find_folder`."""
    folder = find_folder(name, root)
    return Run(folder.name, folder, read_ledger(folder / LEDGER_NAME).events)


def find_folder(name: str | None, root: Path | None) -> Path:
    """Find the folder of a run.

    Args:
        name: run id or run folder; None for the newest run.
        root: folder of all runs; None for the default.

    Raises:
        OptionsError: there is no such run, and the message lists the newest ones; or it belongs to another user.
    """
    folder_of_runs, newest = run_root(root), newest_folders(root)
    candidates = [Path(name), folder_of_runs / name] if name else newest[:1]
    for folder in candidates:
        if _has_ledger(folder):
            return folder.absolute()
    known = ", ".join(folder.name for folder in reversed(newest[:5])) or "none"
    raise OptionsError(
        f"{name or 'the newest run'}: no {LEDGER_NAME} found in {folder_of_runs.absolute()}; runs there: {known}"
    )


def newest_folders(root: Path | None) -> list[Path]:
    """Return the folders of all runs, the newest first.

    Args:
        root: folder of all runs; None for the default.
    """
    ledgers = sorted(run_root(root).glob(f"*/{LEDGER_NAME}"), key=lambda path: path.stat().st_mtime, reverse=True)
    return [path.parent.absolute() for path in ledgers]


def _has_ledger(folder: Path) -> bool:
    """Whether a folder is that of a run.

    Raises:
        OptionsError: another user does not permit to look.
    """
    try:
        return (folder / LEDGER_NAME).is_file()
    except PermissionError as error:
        raise OptionsError(f"{folder}: belongs to another user, who does not permit reading it ({error})") from error


def find_live_run(name: str | None, root: Path | None, *, to_do: str) -> Run:
    """Find a run that can still carry out a request.

    Args:
        name: see `find_run`.
        root: see `find_run`.
        to_do: what is requested, as a verb.

    Raises:
        LaunchError: the run has ended.
        OptionsError: there is no such run.
    """
    found = find_run(name, root)
    started, ended = found.of("run_started"), found.of("run_ended")
    if ended and ended[-1].at >= started[-1].at:
        raise LaunchError(f"{found.run_id} has ended: there is nothing to {to_do}")
    return found
