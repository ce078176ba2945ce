"""Finds what `ckptless export` reads: a run with its arenas and durable states, or a folder of durable states."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lightning_ckptless.cli.runs import Run, find_run
from lightning_ckptless.errors import OptionsError
from lightning_ckptless.ledger import LEDGER_NAME
from lightning_ckptless.protocol.durable_schedule import FOLDER_MARKER, MANIFEST_NAME


@dataclass(frozen=True, slots=True)
class Source:
    """Where to look for a state.

    Args:
        name: name given by the user.
        run: the run and its ledger; None for a folder of durable states without a run.
        arena_dir: folder of the arenas; None for the one in the ledger.
        durable: folder of durable states; None if there is none.
        state: folder of a single durable state; None to choose one.
    """

    name: str
    run: Run | None = None
    arena_dir: Path | None = None
    durable: Path | None = None
    state: Path | None = None


def find_source(name: str | None, run_root: Path | None, arena_dir: Path | None) -> Source:
    """Find the source that a name refers to.

    Args:
        name: run id, run folder, folder of durable states or of a single one; None for the newest run.
        run_root: folder of all runs; None for the default.
        arena_dir: folder of the arenas; None for the one in the ledger.

    Raises:
        OptionsError: there is no such run, or the folder is neither a run nor a folder of durable states.
    """
    folder = None if name is None else Path(name)
    if folder is not None and folder.is_dir() and not (folder / LEDGER_NAME).is_file():
        if (folder / FOLDER_MARKER).is_file():
            return Source(str(name), durable=folder)
        if (folder / MANIFEST_NAME).is_file():
            return Source(str(name), state=folder)
        if not _is_known(str(name), run_root):
            raise OptionsError(
                f"{name}: neither a run folder (expected {LEDGER_NAME}) nor a folder of durable states "
                f"(expected {FOLDER_MARKER})"
            )
    run = find_run(name, run_root)
    return Source(run.run_id, run, arena_dir, _durable_of(run))


def _is_known(name: str, run_root: Path | None) -> bool:
    try:
        find_run(name, run_root)
    except OptionsError:
        return False
    return True


def _durable_of(run: Run) -> Path | None:
    """Return the folder of a run's durable states, according to its ledger."""
    written = run.of("durable_written")
    return Path(written[-1].fields["path"]).parent if written else None
