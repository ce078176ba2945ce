"""Log files across a relaunch: the same folder, no row missing, no row twice.

A fresh `CSVLogger` would open the next version folder, or delete the rows of the one it is given; a fresh
`TensorBoardLogger` would write steps again that are already there. Before anything touches `.experiment`, the version
is set to the one of the run and the files are cut back to what belongs to the restored version.
"""

from __future__ import annotations

import csv
import os
import warnings
from pathlib import Path
from typing import Any

from lightning_ckptless.trainer.host.flavour import flavour_of, is_a, module
from lightning_ckptless.trainer.host.override import Override


def name_versions(loggers: list[Any]) -> list[dict[str, Any]]:
    """Name and version of each logger: known from the first moment of a run."""
    return [{"kind": type(logger).__name__, "version": _version_of(logger)} for logger in loggers]


def _version_of(logger: Any) -> int | str | None:
    # Not by getattr: Lightning's DummyLogger has an attribute of every name.
    version = vars(logger).get("_version")
    return version if isinstance(version, int | str) else None


def set_versions(loggers: list[Any], saved: list[dict[str, Any]]) -> None:
    """Let fresh loggers write into the folders of the run."""
    for logger, facts in zip(loggers, saved, strict=False):
        if type(logger).__name__ == facts["kind"] and facts["version"] is not None and "_version" in vars(logger):
            logger._version = facts["version"]


def forget_versions(loggers: list[Any]) -> None:
    """Let loggers choose folders of their own again."""
    for logger in loggers:
        if "_version" in vars(logger):
            logger._version = None


def note_saved_config(callbacks: list[Any], *, saved: bool) -> None:
    """Tell LightningCLI's callback whether the run's folder has its configuration; it refuses to find one there."""
    for callback in callbacks:
        if is_a(callback, "cli", "SaveConfigCallback"):
            callback.already_saved = saved


def empty_positions(loggers: list[Any]) -> list[dict[str, Any] | None]:
    """The positions of log files before anything was written."""
    return [{"rows": 0, "keys": [], "unsaved": [], "files": {}} for _ in loggers]


def log_positions(loggers: list[Any]) -> list[dict[str, Any] | None]:
    """How far each log file is: what was written until now, nothing after."""
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
    """Make every write of the log files countable, and rewrites of them atomic."""
    for logger in loggers:
        if is_a(logger, "loggers", "CSVLogger"):
            _watch_csv(logger.experiment)


def cut_logs(trainer: Any, saved: list[dict[str, Any] | None]) -> None:
    """Cut the log files back to saved positions; called on the rank that writes them, before it opens them."""
    for logger, position in zip(trainer.loggers, saved, strict=False):
        if position is None:
            continue
        if "rows" in position and is_a(logger, "loggers", "CSVLogger"):
            _cut_csv(logger, position, flavour_of(trainer))
        elif "files" in position and is_a(logger, "loggers", "TensorBoardLogger"):
            _cut_events(Path(logger.log_dir), position["files"])


def keep_logs(trainer: Any) -> None:
    """Open the log files that are there, as they are; called on the rank that writes them, before it opens them."""
    for logger in trainer.loggers:
        if is_a(logger, "loggers", "CSVLogger"):
            path = (
                Path(logger.log_dir)
                / module(flavour_of(trainer), "loggers.csv_logs").ExperimentWriter.NAME_METRICS_FILE
            )
            rows = _read_rows(path) if path.exists() else []
            keys = list(rows[0]) if rows else []
            _cut_csv(logger, {"rows": len(rows), "keys": keys, "unsaved": []}, flavour_of(trainer))


def rewind_logs(trainer: Any, saved: list[dict[str, Any] | None]) -> None:
    """Bring log files that are open back to saved positions; called on the rank that writes them."""
    for logger, position in zip(trainer.loggers, saved, strict=False):
        if position is None:
            continue
        if "rows" in position and is_a(logger, "loggers", "CSVLogger"):
            _rewind_csv(logger.experiment, position)
        elif "files" in position and is_a(logger, "loggers", "TensorBoardLogger"):
            logger.experiment.flush()
            _cut_events(Path(logger.log_dir), position["files"], spare=_open_events(logger))


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
        # Lightning empties the file and writes it anew when a column is added: a kill in between would lose all rows.
        path = Path(writer.metrics_file_path)
        _write_rows(path, fieldnames, _read_rows(path))

    save = Override(writer, "save", counted_save)
    Override(writer, "_rewrite_with_new_header", rewrite_atomically)


def _cut_csv(logger: Any, position: dict[str, Any], flavour: str) -> None:
    writer_class = module(flavour, "loggers.csv_logs").ExperimentWriter
    folder = Path(logger.log_dir)
    path = folder / writer_class.NAME_METRICS_FILE
    hidden = folder / f".{path.name}.kept"
    if hidden.exists() and not path.exists():
        os.replace(hidden, path)
    rows = _read_rows(path)[: position["rows"]] if path.exists() else []
    if path.exists():
        # The constructor deletes a metrics file that it finds.
        os.replace(path, hidden)
    with warnings.catch_warnings():
        # It says that it deletes the rows of the folder, which is what is prevented here.
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
    _count_rows(writer)
    logger._experiment = writer


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


def _event_files(folder: Path) -> dict[str, Path]:
    """Event files by their place in the folder: values that are logged together have folders of their own in it."""
    return {path.relative_to(folder).as_posix(): path for path in folder.rglob("events.out.tfevents.*")}


def _open_events(logger: Any) -> Path:
    """The file that a logger writes into at present: in a process that is new it holds nothing but its head."""
    return Path(logger.experiment.file_writer.event_writer._file_name)


def _cut_events(folder: Path, sizes: dict[str, int], spare: Path | None = None) -> None:
    for name, path in _event_files(folder).items():
        if name not in sizes:
            if path != spare:
                path.unlink()
        elif path.stat().st_size > sizes[name]:
            os.truncate(path, sizes[name])
