"""Log files without space on the disk: reported before the start and after a failure."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from lightning_ckptless.errors import LaunchError
from lightning_ckptless.membership.agent.logs import log_files
from lightning_ckptless.membership.forkserver.client import ForkServer
from lightning_ckptless.membership.launch.config import LaunchConfig
from lightning_ckptless.membership.launch.launch import run
from tests.membership.conftest import script

FAILS = "import sys; sys.exit(3)"


@pytest.fixture
def config(write: Callable[..., Path], tmp_path: Path) -> LaunchConfig:
    """Workers that fail at once, with their output in files."""
    return LaunchConfig(program=script(write(FAILS)), cwd=tmp_path, log_dir=tmp_path / "logs", tee="3", max_restarts=0)


def fill(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Have the file system of a folder be full, as far as it is asked."""
    real = os.statvfs

    def full(path: Path) -> object:
        return SimpleNamespace(f_bavail=0, f_frsize=4096) if path == folder else real(path)

    monkeypatch.setattr(os, "statvfs", full)


def test_a_full_disk_is_an_error_before_the_start(
    bare: ForkServer, config: LaunchConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(monkeypatch, tmp_path / "logs")
    with pytest.raises(LaunchError, match=r"--log-dir .*logs: the file system has 0 bytes free"):
        run(config, parent=bare)
    assert run(replace(config, tee="0"), parent=bare).exit_code == 3
    assert run(replace(config, log_dir=None), parent=bare).exit_code == 3


@pytest.mark.parametrize("where", ["/proc/none/logs", "file"])
def test_a_folder_that_cannot_be_created_is_an_error(
    where: str, bare: ForkServer, config: LaunchConfig, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(LaunchError, match=r"--log-dir .*: cannot create the log files: .*choose another folder"):
        run(replace(config, log_dir=tmp_path / where), parent=bare)


def test_folders_of_a_round_that_cannot_be_created_are_an_error(config: LaunchConfig, tmp_path: Path) -> None:
    with log_files(config) as logs:
        (tmp_path / "logs").rmdir()
        (tmp_path / "logs").touch()
        with pytest.raises(LaunchError, match="cannot create the log files"):
            logs.reify({0: {}})


def test_a_disk_that_has_become_full_is_reported_with_the_fault(
    bare: ForkServer,
    config: LaunchConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def record(event: str, **_: object) -> None:
        if event == "workers_spawned":
            fill(monkeypatch, tmp_path / "logs")

    assert run(config, parent=bare, record=record).exit_code == 3
    assert "logs: the file system has 0 bytes free, so a worker that prints fails" in capfd.readouterr().err
