"""Truncates the log files of a restored run to a version, so that they are continued from there.

A new `CSVLogger` would delete the rows in its folder, and a new `TensorBoardLogger` would write existing steps again.
Therefore the files are truncated to the restored version before the first access to `experiment`.
"""

from __future__ import annotations

import csv
import os
import struct
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from lightning_ckptless.internals.lightning.distribution import distribution_of, is_a, module
from lightning_ckptless.internals.lightning.override import Override


def note_saved_config(callbacks: list[Any], *, saved: bool) -> None:
    """Set whether LightningCLI's callback has saved its configuration; it refuses to overwrite an existing file."""
    for callback in callbacks:
        if is_a(callback, "cli", "SaveConfigCallback"):
            callback.already_saved = saved


def empty_positions(loggers: list[Any]) -> list[dict[str, Any] | None]:
    """Return the positions of log files before anything was written."""
    return [{"rows": 0, "keys": [], "unsaved": [], "files": {}} for _ in loggers]


def log_positions(loggers: list[Any]) -> list[dict[str, Any] | None]:
    """Return the current position of each log file."""
    return [_position(logger) for logger in loggers]


def _position(logger: Any) -> dict[str, Any] | None:
    if is_a(logger, "loggers", "CSVLogger"):
        writer = logger.experiment
        return {
            "rows": getattr(writer, "ckptless_rows", 0),
            "keys": list(writer.metrics_keys),
            "unsaved": list(writer.metrics),
        }
    if is_a(logger, "loggers", "TensorBoardLogger"):
        logger.experiment.flush()
        return {"files": {name: path.stat().st_size for name, path in _event_files(Path(logger.log_dir)).items()}}
    return None


def watch_logs(loggers: list[Any]) -> None:
    """Count the rows written to log files, and make rewrites of them atomic."""
    for logger in loggers:
        if is_a(logger, "loggers", "CSVLogger"):
            _watch_csv(logger.experiment)


def cut_logs(trainer: Any, saved: list[dict[str, Any] | None]) -> None:
    """Truncate log files to saved positions; called on the rank that writes them, before it opens them."""
    for logger, position in zip(trainer.loggers, saved, strict=False):
        if position is None:
            continue
        if "rows" in position and is_a(logger, "loggers", "CSVLogger"):
            _cut_csv(logger, position, distribution_of(trainer))
        elif "files" in position and is_a(logger, "loggers", "TensorBoardLogger"):
            _close_elsewhere(logger)
            _cut_events(Path(logger.log_dir), position["files"])


def keep_logs(trainer: Any) -> None:
    """Keep existing log files unchanged; called on the rank that writes them, before it opens them."""
    for logger in trainer.loggers:
        if is_a(logger, "loggers", "CSVLogger"):
            path = (
                Path(logger.log_dir)
                / module(distribution_of(trainer), "loggers.csv_logs").ExperimentWriter.NAME_METRICS_FILE
            )
            rows = _read_rows(path) if path.exists() else []
            keys = list(rows[0]) if rows else []
            _cut_csv(logger, {"rows": len(rows), "keys": keys, "unsaved": []}, distribution_of(trainer))


def rewind_logs(trainer: Any, saved: list[dict[str, Any] | None]) -> None:
    """Rewind log files to saved positions, open or not; called on the rank that writes them."""
    for logger, position in zip(trainer.loggers, saved, strict=False):
        if position is None:
            continue
        if "rows" in position and is_a(logger, "loggers", "CSVLogger"):
            if _is_open(logger):
                _rewind_csv(logger.experiment, position)
            else:
                _cut_csv(logger, position, distribution_of(trainer))
        elif "files" in position and is_a(logger, "loggers", "TensorBoardLogger"):
            logger.experiment.flush()
            _cut_events(Path(logger.log_dir), position["files"], spare=_open_events(logger))


def _is_open(logger: Any) -> bool:
    """Return whether a `CSVLogger` is open in its current folder; the script may have opened another before `fit`."""
    return hasattr(logger._experiment, "ckptless_rows") and logger._experiment.log_dir == logger.log_dir


# ---------------------------------------------------------------------- CSV


def _watch_csv(writer: Any) -> None:
    if hasattr(writer, "ckptless_rows"):
        return
    path = Path(writer.metrics_file_path)
    writer.ckptless_rows = len(_read_rows(path)) if path.exists() else 0
    _count_rows(writer)


def _count_rows(writer: Any) -> None:
    def counted_save() -> None:
        rows = len(writer.metrics)
        save.original()
        writer.ckptless_rows += rows

    def rewrite_atomically(fieldnames: list[str]) -> None:
        # Lightning truncates and rewrites the file when a column is added; a kill in between would lose all rows.
        path = Path(writer.metrics_file_path)
        _write_rows(path, fieldnames, _read_rows(path))

    save = Override(writer, "save", counted_save)
    Override(writer, "_rewrite_with_new_header", rewrite_atomically)


def _cut_csv(logger: Any, position: dict[str, Any], distribution: str) -> None:
    writer_class = module(distribution, "loggers.csv_logs").ExperimentWriter
    folder = Path(logger.log_dir)
    path = folder / writer_class.NAME_METRICS_FILE
    hidden = folder / f".{path.name}.kept"
    if hidden.exists() and not path.exists():
        os.replace(hidden, path)
    rows = _read_rows(path)[: position["rows"]] if path.exists() else []
    if path.exists():
        # The constructor deletes an existing metrics file.
        os.replace(path, hidden)
    with warnings.catch_warnings():
        # It warns that it deletes the rows, which the renaming has prevented.
        warnings.simplefilter("ignore")
        writer = writer_class(log_dir=str(folder))
    if hidden.exists():
        os.replace(hidden, path)
        if position["rows"]:
            _write_rows(path, position["keys"], rows)
        else:
            path.unlink()
    writer.metrics_keys = list(position["keys"])
    writer.metrics = list(position["unsaved"])
    writer.ckptless_rows = position["rows"]
    writer.hparams = _saved_hparams(folder / writer.NAME_HPARAMS_FILE, distribution)
    _count_rows(writer)
    logger._experiment = writer


def _saved_hparams(path: Path, distribution: str) -> dict[str, Any]:
    """Read the saved hyper-parameters, as the writer rewrites the file with all that it knows when it gets new ones."""
    with suppress(yaml.YAMLError):
        if path.exists():
            return dict(module(distribution, "core.saving").load_hparams_from_yaml(path, use_omegaconf=False))
    return {}


def _rewind_csv(writer: Any, position: dict[str, Any]) -> None:
    path = Path(writer.metrics_file_path)
    if (writer.ckptless_rows, writer.metrics_keys) != (position["rows"], position["keys"]):
        rows = _read_rows(path)[: position["rows"]] if path.exists() else []
        if rows:
            _write_rows(path, position["keys"], rows)
        else:
            path.unlink(missing_ok=True)
    writer.metrics_keys = list(position["keys"])
    writer.metrics = list(position["unsaved"])
    writer.ckptless_rows = position["rows"]


def _read_rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _write_rows(path: Path, keys: list[str], rows: list[dict[str, str]]) -> None:
    fresh = path.with_name(f".{path.name}.new")
    with fresh.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=keys, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(fresh, path)


# ---------------------------------------------------------------------- TensorBoard

_LENGTH = struct.Struct("<Q")


def _event_files(folder: Path) -> dict[str, Path]:
    """Return event files by relative path; values that are logged together have their own sub-folders."""
    return {path.relative_to(folder).as_posix(): path for path in folder.rglob("events.out.tfevents.*")}


def _open_events(logger: Any) -> Path:
    """Return the file that a logger currently writes to; in a process that has just started it has only a header."""
    return Path(logger.experiment.file_writer.event_writer._file_name)


def _close_elsewhere(logger: Any) -> None:
    """Close a writer that the script opened before `fit` in a folder other than the run's."""
    writer = logger._experiment
    if writer is not None and writer.log_dir != logger.log_dir:
        writer.close()
        logger._experiment = None


def event_files(loggers: list[Any]) -> set[Path]:
    """Return the event files in the folders of TensorBoard loggers."""
    folders = [Path(logger.log_dir) for logger in loggers if is_a(logger, "loggers", "TensorBoardLogger")]
    return {path for folder in folders for path in _event_files(folder).values()}


def drop_events_beyond(loggers: list[Any], before: set[Path]) -> None:
    """Remove event files that this process has created without writing rows.

    Args:
        loggers: loggers of the trainer.
        before: files that existed before.
    """
    for logger in loggers:
        if is_a(logger, "loggers", "TensorBoardLogger") and logger._experiment is not None:
            logger._experiment.close()
            logger._experiment = None
    for path in event_files(loggers) - before:
        path.unlink()


def _header_bytes(path: Path) -> int:
    """Return the length of the first record of an event file: length, its checksum, content, checksum."""
    with path.open("rb") as file:
        length = file.read(_LENGTH.size)
    return _LENGTH.size + 4 + _LENGTH.unpack(length)[0] + 4 if len(length) == _LENGTH.size else 0


def _cut_events(folder: Path, sizes: dict[str, int], spare: Path | None = None) -> None:
    for name, path in _event_files(folder).items():
        if name not in sizes and path != spare:
            path.unlink()
        elif name not in sizes:
            # Rows are there if the version is older than this process: the run was rewound to it.
            os.truncate(path, min(path.stat().st_size, _header_bytes(path)))
        elif path.stat().st_size > sizes[name]:
            os.truncate(path, sizes[name])
