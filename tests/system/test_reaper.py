"""The reaper removes the folder of a process that has exited, if its run has finished."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from lightning_ckptless.system.reaper import MARKER, reap, start_reaper


def test_a_finished_folder_is_removed_when_the_process_exits(tmp_path: Path) -> None:
    folder = tmp_path / "arena"
    folder.mkdir()
    (folder / "slot").touch()
    owner = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    start_reaper(owner.pid, str(folder))
    reapers = [p for p in psutil.process_iter() if str(folder) in _command(p)]
    assert len(reapers) == 1
    assert not any("torch" in file.path for file in reapers[0].memory_maps())
    assert reapers[0].num_fds() <= 4
    (folder / MARKER).touch()
    owner.communicate(b"\n")
    reapers[0].wait()
    assert not folder.exists()


@pytest.mark.parametrize("finished", [False, True])
def test_only_a_finished_folder_is_removed(finished: bool, tmp_path: Path) -> None:
    owner = subprocess.Popen([sys.executable, "-c", ""])
    owner.wait()
    if finished:
        (tmp_path / MARKER).touch()
    assert reap(owner.pid, str(tmp_path)) is finished
    assert tmp_path.exists() is not finished
    os.makedirs(tmp_path, exist_ok=True)


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []
