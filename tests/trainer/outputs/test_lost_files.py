"""Files that a run lost are reported when it rolls back to a version that has them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import loggers

from lightning_ckptless.internals.lightning.log_files import log_positions
from lightning_ckptless.ledger import Ledger
from lightning_ckptless.protocol.versions import Version
from lightning_ckptless.trainer.outputs.checkpoint_files import CheckpointFiles
from lightning_ckptless.trainer.outputs.lost_files import (
    LostFile,
    lost_checkpoints,
    lost_logs,
    size_bytes,
    warning_of,
)
from lightning_ckptless.trainer.reporting.rank_ledger import RankLedger
from tests.trainer.tiny import tiny_trainer

VERSION = Version(4, True)


def test_checkpoints_that_are_missing_or_shorter_are_found(tmp_path: Path) -> None:
    whole, short, missing = (tmp_path / name for name in ("whole", "short", "missing"))
    whole.write_bytes(b"1234")
    short.write_bytes(b"12")
    assert lost_checkpoints({str(path): 4 for path in (whole, short, missing)}) == [
        LostFile(str(short), 4, 2),
        LostFile(str(missing), 4, None),
    ]


def test_the_size_of_a_folder_is_that_of_its_files(tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    for name in ("meta.pt", "shards/0.distcp"):
        (tmp_path / name).write_bytes(b"123")
    assert size_bytes(str(tmp_path)) == 6


def test_the_warning_names_files_sizes_and_cause() -> None:
    text = warning_of([LostFile("/a.csv", 9, 2, "rows"), LostFile("/b.ckpt", 100, None)], VERSION)
    assert text == (
        "files of the run are missing or shorter than at step 4, to which it rolls back:\n"
        "  /a.csv (expected 9 rows, found 2)\n"
        "  /b.ckpt (expected 100 bytes, it is missing)\n"
        "  Every new process runs the script from its beginning. If the script deletes or recreates its output folder "
        "there, do so only if neither CKPTLESS_FAULT_REPORT nor CKPTLESS_STANDBY is in os.environ."
    )


def test_a_long_list_is_shortened() -> None:
    text = warning_of([LostFile(f"/{number}", 1, None) for number in range(7)], VERSION)
    assert "/4 (" in text
    assert "/5 (" not in text
    assert "and 2 more" in text


@pytest.mark.parametrize(
    ("damage", "end"),
    [
        (lambda path: None, None),
        (lambda path: path.unlink(), "(expected 5 bytes, it is missing)"),
        (lambda path: path.write_text("x"), "(expected 5 bytes, found 1)"),
    ],
)
def test_a_rollback_reports_lost_checkpoints_that_it_needs(damage: Any, end: str | None, tmp_path: Path) -> None:
    files = CheckpointFiles(RankLedger(Ledger(tmp_path / "ledger.jsonl"), lambda: 0, lambda: 1), 0, print)
    for name, step in (("kept.ckpt", 2), ("later.ckpt", 4)):
        path = tmp_path / name
        files.saving(str(path), Version(step, True))
        path.write_text("12345")
        files.written(str(path))
    damage(tmp_path / "kept.ckpt")
    # The replay rewrites it.
    (tmp_path / "later.ckpt").unlink()
    files.roll_back(VERSION)
    assert [str(lost) for lost in files.lost] == ([] if end is None else [f"{tmp_path}/kept.ckpt {end}"])


@pytest.mark.parametrize("kind", ["CSVLogger", "TensorBoardLogger"])
def test_lost_log_files_are_found(kind: str, tmp_path: Path) -> None:
    logger = getattr(loggers, kind)(str(tmp_path))
    trainer = tiny_trainer(tmp_path, logger=logger)
    for step in range(3):
        logger.log_metrics({"loss": 0.5}, step)
        logger.save()
    if kind == "CSVLogger":
        logger.experiment.ckptless_rows = 3
    positions = log_positions(trainer.loggers)
    assert lost_logs(trainer, positions) == []
    assert lost_logs(trainer, None) == []
    shutil.rmtree(logger.log_dir)
    (lost,) = lost_logs(trainer, positions)
    assert lost.path.startswith(str(tmp_path))
    assert (lost.found, lost.unit) == (None, "rows" if kind == "CSVLogger" else "bytes")
    logger.finalize("success")
