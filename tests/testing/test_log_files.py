"""Log files are copied and read as rows."""

from __future__ import annotations

import os
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from lightning_ckptless.testing.log_files import collect_logs, csv_rows, read_logs, tensorboard_rows
from lightning_ckptless.testing.trace_reader import Trace


def trace_of(folder: Path) -> Trace:
    return Trace(0, loggers=[("CSVLogger", folder), ("Other", None)])


def test_csv_rows_without_our_own_values(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("epoch,step,loss,ckptless/goodput\n0,1,0.5,\n,2,,0.9\n1,3,0.25,0.8\n")
    assert list(csv_rows(path)) == [
        (("epoch", "0"), ("loss", "0.5"), ("step", "1")),
        (("epoch", "1"), ("loss", "0.25"), ("step", "3")),
    ]


def test_tensorboard_scalars_written_twice_are_read_twice(tmp_path: Path) -> None:
    for values in ((1.0, 2.0, 3.0), (3.0, 4.0)):
        with SummaryWriter(tmp_path, filename_suffix=str(len(values))) as writer:
            for value in values:
                writer.add_scalar("loss", value, int(value))
            writer.add_scalar("ckptless/goodput", 0.5, 1)
    steps = [dict(row)["step"] for row in tensorboard_rows(tmp_path)]
    assert sorted(steps) == ["1", "2", "3", "3", "4"]


def test_only_files_of_this_run_are_copied(tmp_path: Path) -> None:
    folder = tmp_path / "lightning_logs" / "version_3"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "metrics.csv").write_text("step,loss\n1,0.5\n")
    (folder / "checkpoints" / "new.ckpt").touch()
    (folder / "checkpoints" / "old.ckpt").touch()
    os.utime(folder / "checkpoints" / "old.ckpt", (1.0, 1.0))
    (folder.parent / "version_2").mkdir()
    collect_logs([trace_of(folder)], tmp_path / "copy", since=100.0)
    logs = read_logs(tmp_path / "copy")
    assert logs["log folders"] == [(("count", "1"),)]
    assert logs["logger 0, metrics.csv"] == [(("loss", "0.5"), ("step", "1"))]
    assert logs["logger 0, checkpoint files"] == [(("file", "checkpoints/new.ckpt"),)]


def test_a_newer_version_folder_is_counted(tmp_path: Path) -> None:
    for name in ("version_0", "version_1", "version_10"):
        (tmp_path / name).mkdir()
    collect_logs([trace_of(tmp_path / "version_1")], tmp_path / "copy", since=0.0)
    assert read_logs(tmp_path / "copy")["log folders"] == [(("count", "2"),)]


def test_a_missing_folder_has_no_logs(tmp_path: Path) -> None:
    assert read_logs(tmp_path / "missing") == {}
