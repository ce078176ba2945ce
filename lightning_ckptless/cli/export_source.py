"""What `ckptless export` reads: a run with its arenas and durable states, or a folder of durable states alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lightning_ckptless.cli.runs import Run, find_run
from lightning_ckptless.errors import OptionsError
from lightning_ckptless.ledger import LEDGER_NAME

_MARKER = "ckptless-durable.json"
_MANIFEST = "state.json"


@dataclass(frozen=True, slots=True)
class Source:
    """Where a state is looked for.

    Args:
        name: as the user has named it.
        run: with its ledger; None for a folder of durable states alone.
        arena_dir: folder of the arenas; None for what the ledger says.
        durable: folder of durable states; None where there is none.
        state: one durable state; None for the one that suits.
    """

    name: str
    run: Run | None = None
    arena_dir: Path | None = None
    durable: Path | None = None
    state: Path | None = None


def find_source(name: str | None, run_root: Path | None, arena_dir: Path | None) -> Source:
    """What the user means.

    Args:
        name: id or folder of a run, folder of durable states or of one of them; None for the newest run.
        run_root: folder of all runs; None for the usual one.
        arena_dir: folder of the arenas; None for what the ledger says.

    Raises:
        OptionsError: there is no such run, and the folder is nothing of ours.
    """
    folder = None if name is None else Path(name)
    if folder is not None and folder.is_dir() and not (folder / LEDGER_NAME).is_file():
        if (folder / _MARKER).is_file():
            return Source(str(name), durable=folder)
        if (folder / _MANIFEST).is_file():
            return Source(str(name), state=folder)
        if not _is_known(str(name), run_root):
            raise OptionsError(
                f"{name}: neither the folder of a run (it would have {LEDGER_NAME}) nor one of durable states "
                f"(it would have {_MARKER})"
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
    """Folder of a run's durable states, as its writer has told."""
    written = run.of("durable_written")
    return Path(written[-1].fields["path"]).parent if written else None
