"""Log files continue in the folder of the run: every row and event exactly once, whenever the process dies."""

from __future__ import annotations

import csv
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_ckptless.formats.packing import pack, unpack
from lightning_ckptless.internals.lightning.distribution import module
from lightning_ckptless.internals.lightning.log_files import (
    cut_logs,
    empty_positions,
    log_positions,
    rewind_logs,
    watch_logs,
)
from lightning_ckptless.internals.lightning.logger_identity import identity_of, set_identity
from tests.trainer.tiny import DISTRIBUTIONS, tiny_trainer

Log = Callable[[Any, int], None]


def csv_logger(root: Path, distribution: str = DISTRIBUTIONS[0]) -> Any:
    return module(distribution, "loggers").CSVLogger(str(root))


def tensorboard(root: Path, distribution: str = DISTRIBUTIONS[0]) -> Any:
    return module(distribution, "loggers").TensorBoardLogger(str(root))


def a_step(logger: Any, step: int) -> None:
    logger.log_metrics({"loss": step / 8}, step=step)
    logger.save()


def used(logger: Any) -> Any:
    """A logger whose run has ended."""
    a_step(logger, 0)
    logger.finalize("success")
    return logger


def started_again(logger: Any, saved: list[Any], root: Path, make: Callable[..., Any], distribution: str) -> Any:
    """A logger of a new process that resumes from a version."""
    fresh = make(root, distribution)
    set_identity(fresh, identity_of(logger))
    cut_logs(tiny_trainer(root, distribution, logger=fresh), unpack(pack(saved)))
    watch_logs([fresh])
    return fresh


def rows(logger: Any) -> list[dict[str, str]]:
    with Path(logger.log_dir, "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def steps(logger: Any) -> list[int]:
    return [int(row["step"]) for row in rows(logger)]


def text(logger: Any) -> str:
    return Path(logger.log_dir, "metrics.csv").read_text()


def test_loggers_of_other_kinds_are_left_alone(tmp_path: Path) -> None:
    class Own(module(DISTRIBUTIONS[0], "loggers").Logger):  # type: ignore[misc]
        name = version = None

        def log_metrics(self, metrics: Any, step: Any = None) -> None: ...
        def log_hyperparams(self, params: Any) -> None: ...

    own = Own()
    watch_logs([own])
    assert log_positions([own]) == [None]
    cut_logs(tiny_trainer(tmp_path, logger=own), empty_positions([own]))


# ---------------------------------------------------------------------- CSV


@pytest.fixture(params=DISTRIBUTIONS)
def watched(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, str]:
    """A logger that a run writes to, and its distribution."""
    logger = csv_logger(tmp_path, request.param)
    watch_logs([logger])
    return logger, request.param


def test_rows_after_the_version_are_truncated(watched: tuple[Any, str], tmp_path: Path) -> None:
    logger, distribution = watched
    for step in range(3):
        a_step(logger, step)
    (position,), before = log_positions([logger]), text(logger)
    assert position is not None
    assert position["rows"] == 3
    for step in range(3, 5):
        a_step(logger, step)
    fresh = started_again(logger, [position], tmp_path, csv_logger, distribution)
    assert text(fresh) == before
    a_step(fresh, 3)
    assert steps(fresh) == [0, 1, 2, 3]
    assert log_positions([fresh])[0] == position | {"rows": 4}


def test_a_truncated_log_continues_like_an_untouched_one(watched: tuple[Any, str], tmp_path: Path) -> None:
    logger, distribution = watched
    whole = csv_logger(tmp_path / "whole", distribution)
    for step in range(6):
        a_step(whole, step)
    for stop in (2, 4):
        for step in range(stop - 2, stop):
            a_step(logger, step)
        saved = log_positions([logger])
        a_step(logger, stop)
        logger = started_again(logger, saved, tmp_path, csv_logger, distribution)
    for step in range(4, 6):
        a_step(logger, step)
    assert text(logger) == text(whole)


def test_rows_that_are_not_written_yet_are_part_of_the_version(watched: tuple[Any, str], tmp_path: Path) -> None:
    logger, distribution = watched
    a_step(logger, 0)
    logger.log_metrics({"loss": 0.5}, step=1)
    saved = log_positions([logger])
    logger.save()
    fresh = started_again(logger, saved, tmp_path, csv_logger, distribution)
    assert steps(fresh) == [0]
    fresh.save()
    assert steps(fresh) == [0, 1]


def test_columns_added_after_the_version_are_removed(watched: tuple[Any, str], tmp_path: Path) -> None:
    logger, distribution = watched
    a_step(logger, 0)
    saved, before = log_positions([logger]), text(logger)
    logger.log_metrics({"val_loss": 0.5}, step=1)
    logger.save()
    assert "val_loss" in text(logger)
    fresh = started_again(logger, saved, tmp_path, csv_logger, distribution)
    assert text(fresh) == before
    fresh.log_metrics({"val_loss": 0.5}, step=1)
    fresh.save()
    assert text(fresh) == text(logger)
    assert steps(fresh) == [0, 1]


def test_a_partially_written_row_is_removed(watched: tuple[Any, str], tmp_path: Path) -> None:
    logger, distribution = watched
    a_step(logger, 0)
    saved, before = log_positions([logger]), text(logger)
    with Path(logger.log_dir, "metrics.csv").open("a") as file:
        file.write('0.25,"1')
    assert text(started_again(logger, saved, tmp_path, csv_logger, distribution)) == before


def test_a_version_before_the_first_row_has_no_file(watched: tuple[Any, str], tmp_path: Path) -> None:
    logger, distribution = watched
    saved = log_positions([logger])
    a_step(logger, 0)
    fresh = started_again(logger, saved, tmp_path, csv_logger, distribution)
    assert not Path(fresh.log_dir, "metrics.csv").exists()
    a_step(fresh, 0)
    assert text(fresh) == text(logger)
    assert steps(fresh) == [0]


def test_a_run_that_starts_over_begins_with_empty_files(watched: tuple[Any, str], tmp_path: Path) -> None:
    logger, distribution = watched
    a_step(logger, 0)
    fresh = started_again(logger, empty_positions([logger]), tmp_path, csv_logger, distribution)
    assert not Path(fresh.log_dir, "metrics.csv").exists()
    assert fresh.log_dir == logger.log_dir


def test_a_kill_while_the_file_is_replaced_loses_nothing(watched: tuple[Any, str], tmp_path: Path) -> None:
    logger, distribution = watched
    for step in range(2):
        a_step(logger, step)
    saved, before = log_positions([logger]), text(logger)
    file = Path(logger.log_dir, "metrics.csv")
    file.rename(file.with_name(".metrics.csv.kept"))
    file.with_name(".metrics.csv.new").write_text("half a row")
    fresh = started_again(logger, saved, tmp_path, csv_logger, distribution)
    assert text(fresh) == before
    a_step(fresh, 2)
    assert steps(fresh) == [0, 1, 2]


def test_a_file_that_was_removed_is_started_again(watched: tuple[Any, str], tmp_path: Path) -> None:
    logger, distribution = watched
    a_step(logger, 0)
    saved = log_positions([logger])
    Path(logger.log_dir, "metrics.csv").unlink()
    fresh = started_again(logger, saved, tmp_path, csv_logger, distribution)
    a_step(fresh, 1)
    assert steps(fresh) == [1]


def test_a_new_column_never_leaves_the_file_empty(watched: tuple[Any, str], monkeypatch: pytest.MonkeyPatch) -> None:
    logger, _ = watched
    a_step(logger, 0)
    before = text(logger)
    logger.log_metrics({"val_loss": 0.5}, step=1)

    class Killed(BaseException):
        """The process ends while the rows are written anew."""

    def die(*_: Any) -> None:
        raise Killed

    monkeypatch.setattr(csv.DictWriter, "writerows", die)
    with pytest.raises(Killed):
        logger.save()
    assert text(logger) == before


def test_rows_are_counted_once_however_often_positions_are_read(watched: tuple[Any, str]) -> None:
    logger, _ = watched
    a_step(logger, 0)
    watch_logs([logger])
    a_step(logger, 1)
    logger.save()
    (position,) = log_positions([logger])
    assert position is not None
    assert position["rows"] == 2


def test_rows_from_before_the_watch_are_counted(tmp_path: Path) -> None:
    logger = csv_logger(tmp_path)
    a_step(logger, 0)
    watch_logs([logger])
    a_step(logger, 1)
    (position,) = log_positions([logger])
    assert position is not None
    assert position["rows"] == 2


def test_the_csv_loggers_warning_about_deleted_files_is_suppressed(watched: tuple[Any, str], tmp_path: Path) -> None:
    logger, distribution = watched
    a_step(logger, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        started_again(logger, log_positions([logger]), tmp_path, csv_logger, distribution)


def test_hyperparameters_of_the_previous_process_are_kept(watched: tuple[Any, str], tmp_path: Path) -> None:
    logger, distribution = watched
    logger.log_hyperparams({"lr": 0.1})
    a_step(logger, 0)
    fresh = started_again(logger, log_positions([logger]), tmp_path, csv_logger, distribution)
    fresh.log_hyperparams({"width": 8})
    assert set(Path(fresh.log_dir, "hparams.yaml").read_text().split("\n")) == {"lr: 0.1", "width: 8", ""}


def test_a_rank_that_becomes_rank_0_opens_the_file_of_the_run(watched: tuple[Any, str], tmp_path: Path) -> None:
    logger, distribution = watched
    for step in range(3):
        a_step(logger, step)
    saved = log_positions([logger])
    a_step(logger, 3)
    fresh = csv_logger(tmp_path, distribution)
    set_identity(fresh, identity_of(logger))
    rewind_logs(tiny_trainer(tmp_path, distribution, logger=fresh), saved)
    a_step(fresh, 3)
    assert steps(fresh) == [0, 1, 2, 3]


@pytest.mark.parametrize("make", [csv_logger, tensorboard])
def test_a_logger_that_was_opened_before_fit_writes_into_the_folder_of_the_run(make: Any, tmp_path: Path) -> None:
    logger = make(tmp_path, DISTRIBUTIONS[0])
    watch_logs([logger])
    a_step(logger, 0)
    saved = log_positions([logger])
    fresh = make(tmp_path, DISTRIBUTIONS[0])
    assert fresh.experiment.log_dir != logger.log_dir
    set_identity(fresh, identity_of(logger))
    cut_logs(tiny_trainer(tmp_path, logger=fresh), saved)
    assert fresh.experiment.log_dir == logger.log_dir
    for opened in (logger, fresh):
        opened.finalize("success")


# ---------------------------------------------------------------------- TensorBoard


def events(logger: Any) -> Counter[tuple[str, int]]:
    """How often each value of each step occurs in the event files."""
    found: Counter[tuple[str, int]] = Counter()
    folder = Path(logger.log_dir)
    for found_in in {path.parent for path in folder.rglob("events.out.tfevents.*")}:
        reader = EventAccumulator(str(found_in), size_guidance={"scalars": 0})
        reader.Reload()
        for tag in reader.Tags()["scalars"]:
            found.update((tag, event.step) for event in reader.Scalars(tag))
    return found


def logged(*expected: int, tag: str = "loss") -> Counter[tuple[str, int]]:
    return Counter((tag, step) for step in expected)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_every_event_occurs_once(distribution: str, tmp_path: Path) -> None:
    logger = tensorboard(tmp_path, distribution)
    for stop in (2, 4, 5):
        for step in range({2: 0, 4: 2, 5: 4}[stop], stop):
            a_step(logger, step)
        saved = log_positions([logger])
        for step in range(stop, stop + 2):
            a_step(logger, step)
        logger.experiment.close()
        logger = started_again(logger, saved, tmp_path, tensorboard, distribution)
        assert events(logger) == logged(*range(stop))
    a_step(logger, 5)
    logger.experiment.close()
    assert events(logger) == logged(*range(6))


def test_queued_events_are_part_of_the_version(tmp_path: Path) -> None:
    logger = tensorboard(tmp_path)
    logger.log_metrics({"loss": 1.0}, step=0)
    saved = log_positions([logger])
    logger.experiment.close()
    fresh = started_again(logger, saved, tmp_path, tensorboard, DISTRIBUTIONS[0])
    assert events(fresh) == logged(0)


def test_values_that_are_logged_together_are_truncated_too(tmp_path: Path) -> None:
    def both(logger: Any, step: int) -> None:
        logger.log_metrics({"losses": {"a": torch.tensor(1.0), "b": torch.tensor(2.0)}}, step=step)

    logger = tensorboard(tmp_path)
    both(logger, 0)
    saved = log_positions([logger])
    both(logger, 1)
    logger.experiment.close()
    fresh = started_again(logger, saved, tmp_path, tensorboard, DISTRIBUTIONS[0])
    assert events(fresh) == Counter({("losses", 0): 2})
    both(fresh, 1)
    fresh.experiment.close()
    assert events(fresh) == Counter({("losses", 0): 2, ("losses", 1): 2})


def test_a_run_that_starts_over_has_no_events(tmp_path: Path) -> None:
    logger = tensorboard(tmp_path)
    a_step(logger, 0)
    logger.experiment.close()
    fresh = started_again(logger, empty_positions([logger]), tmp_path, tensorboard, DISTRIBUTIONS[0])
    assert events(fresh) == Counter()


def test_other_files_in_the_folder_are_kept(tmp_path: Path) -> None:
    logger = tensorboard(tmp_path)
    a_step(logger, 0)
    logger.experiment.close()
    other = Path(logger.log_dir, "checkpoints", "epoch=0.ckpt")
    other.parent.mkdir()
    other.touch()
    started_again(logger, empty_positions([logger]), tmp_path, tensorboard, DISTRIBUTIONS[0])
    assert other.exists()
