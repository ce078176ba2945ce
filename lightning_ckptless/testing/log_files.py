"""Copies the log files of a finished run and reads them as rows.

Our own values (`ckptless/...`) depend on time and are excluded, as are rows without other values.
"""

from __future__ import annotations

import csv
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from lightning_ckptless.testing.trace import OWN_PREFIX
from lightning_ckptless.testing.trace_reader import Trace

Row = tuple[tuple[str, str], ...]
"""Pairs of name and value, sorted by name."""

_CSV_FILE = "metrics.csv"
_EVENT_FILES = "events.out.tfevents.*"
_VERSION = re.compile(r"version_(\d+)")
_FOLDERS_FILE = "folders.txt"
_CHECKPOINTS_FILE = "checkpoints.txt"


def collect_logs(traces: Iterable[Trace], target: Path, *, since: float) -> None:
    """Copy the log files of a run that has just ended.

    Args:
        traces: traces of the run, which name the folders of its loggers.
        target: folder for the copies.
        since: start of the run in seconds since the epoch; older files belong to another run.
    """
    target.mkdir(parents=True, exist_ok=True)
    folders = list(dict.fromkeys(folder for trace in traces for _, folder in trace.loggers if folder is not None))
    unexpected = [path for folder in folders for path in _newer_siblings(folder) if path not in folders]
    (target / _FOLDERS_FILE).write_text(f"{len(folders) + len(set(unexpected))}\n")
    for number, folder in enumerate(folders):
        _copy(folder, target / str(number), since)


def _newer_siblings(folder: Path) -> Iterator[Path]:
    """Yield version folders newer than the given one, which a faulty relaunch would have created."""
    if own := _VERSION.fullmatch(folder.name):
        for path in folder.parent.iterdir():
            match = _VERSION.fullmatch(path.name)
            if match and int(match[1]) > int(own[1]):
                yield path


def _copy(folder: Path, target: Path, since: float) -> None:
    target.mkdir()
    files = [folder / _CSV_FILE, *sorted(folder.glob(_EVENT_FILES))]
    for path in files:
        if path.exists() and path.stat().st_mtime >= since:
            shutil.copy2(path, target / path.name)
    checkpoints = [str(p.relative_to(folder)) for p in folder.rglob("*.ckpt") if p.stat().st_mtime >= since]
    (target / _CHECKPOINTS_FILE).write_text("".join(f"{name}\n" for name in sorted(checkpoints)))


def read_logs(folder: Path) -> dict[str, list[Row]]:
    """Return the rows of copied log files, by the name used in reports."""
    if not folder.is_dir():
        return {}
    logs = {"log folders": [_row({"count": (folder / _FOLDERS_FILE).read_text().strip()})]}
    for copy in sorted(path for path in folder.iterdir() if path.is_dir()):
        if (copy / _CSV_FILE).exists():
            logs[f"logger {copy.name}, {_CSV_FILE}"] = list(csv_rows(copy / _CSV_FILE))
        if any(copy.glob(_EVENT_FILES)):
            logs[f"logger {copy.name}, TensorBoard scalars"] = list(tensorboard_rows(copy))
        names = (copy / _CHECKPOINTS_FILE).read_text().splitlines()
        logs[f"logger {copy.name}, checkpoint files"] = [_row({"file": name}) for name in names]
    return logs


def csv_rows(path: Path) -> Iterator[Row]:
    """Yield the rows written by a `CSVLogger`."""
    with path.open(newline="") as file:
        for cells in csv.DictReader(file):
            filled = {name: value for name, value in cells.items() if value}
            row = {name: value for name, value in filled.items() if not name.startswith(OWN_PREFIX)}
            # The logger adds the step to every row.
            if len(row) == len(filled) or set(row) - {"step", "epoch"}:
                yield _row(row)


def tensorboard_rows(folder: Path) -> Iterator[Row]:
    """Yield the scalars written by a `TensorBoardLogger` to all event files of a folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # noqa: PLC0415 - optional

    # Disable purging and sampling, so that scalars that were written twice are read twice.
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}, purge_orphaned_data=False)
    events.Reload()
    for tag in sorted(events.Tags()["scalars"]):
        if not tag.startswith(OWN_PREFIX):
            for scalar in events.Scalars(tag):
                yield _row({"step": str(scalar.step), tag: repr(scalar.value)})


def _row(cells: dict[str, str]) -> Row:
    return tuple(sorted(cells.items()))
