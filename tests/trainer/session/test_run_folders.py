"""A replacement uses the folders that the first process of its rank had chosen."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.profilers import SimpleProfiler

from lightning_ckptless.trainer.session import run_folders
from lightning_ckptless.trainer.session.run_folders import RunFolders, hydra_folder
from tests.trainer.tiny import DISTRIBUTIONS, tiny_trainer


@pytest.fixture(autouse=True)
def new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget the folders that this process has chosen, and restore the working directory afterwards."""
    monkeypatch.setattr(run_folders, "_chosen_before", {})
    monkeypatch.chdir(os.getcwd())


def trainer_in(folder: Path) -> Any:
    saver, other = ModelCheckpoint(folder / "all"), OnExceptionCheckpoint(folder / "failed")
    profiler = SimpleProfiler(dirpath=folder / "profile", filename="times")
    return tiny_trainer(folder, callbacks=[saver, other], profiler=profiler, enable_checkpointing=True)


def test_root_folder_callbacks_and_profiler_use_the_first_processs_folders(tmp_path: Path) -> None:
    first, later = trainer_in(tmp_path / "1"), trainer_in(tmp_path / "2")
    RunFolders(later).adopt([RunFolders(first).own()], 0)
    assert later.default_root_dir == str(tmp_path / "1")
    assert {str(c.dirpath) for c in later.callbacks if hasattr(c, "dirpath")} == {
        str(tmp_path / "1" / "failed"),
        str(tmp_path / "1" / "all"),
    }
    # Each path keeps its type.
    assert later.profiler.dirpath == tmp_path / "1" / "profile"


def test_each_rank_has_its_own_folders(tmp_path: Path) -> None:
    facts = [RunFolders(trainer_in(tmp_path / name)).own() for name in ("a", "b")]
    later = trainer_in(tmp_path / "c")
    RunFolders(later).adopt(facts, 1)
    assert later.default_root_dir == str(tmp_path / "b")
    another = trainer_in(tmp_path / "d")
    RunFolders(another).adopt(facts, 2)
    assert another.default_root_dir == str(tmp_path / "d")


def test_a_folder_derived_from_a_logger_is_not_changed(tmp_path: Path) -> None:
    first, later = (tiny_trainer(tmp_path, callbacks=[ModelCheckpoint()], enable_checkpointing=True) for _ in range(2))
    first.checkpoint_callback.dirpath = str(tmp_path / "version_0")
    RunFolders(later).adopt([RunFolders(first).own()], 0)
    assert later.checkpoint_callback.dirpath is None


def test_the_working_directory_is_that_of_the_first_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("1", "2"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "1")
    facts = RunFolders(tiny_trainer(Path("."))).own()
    monkeypatch.chdir(tmp_path / "2")
    RunFolders(tiny_trainer(Path("."))).adopt([facts], 0)
    assert Path.cwd() == tmp_path / "1"


def test_a_later_fit_without_a_note_uses_the_folders_of_the_run(tmp_path: Path) -> None:
    first, later = trainer_in(tmp_path / "1"), trainer_in(tmp_path / "2")
    RunFolders(later).adopt([RunFolders(first).own()], 0)
    second = trainer_in(tmp_path / "2" / "second")
    RunFolders(second).adopt(None, 0)
    assert second.default_root_dir == str(tmp_path / "1" / "second")


def test_without_a_note_nothing_changes(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path)
    before = RunFolders(trainer).own()
    RunFolders(trainer).adopt(None, 0)
    RunFolders(trainer).adopt([before], 0)
    assert RunFolders(trainer).own() == before


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_the_root_folder_of_a_trainer_can_be_set(distribution: str, tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path / "2", distribution=distribution)
    RunFolders(trainer).adopt([RunFolders(tiny_trainer(tmp_path / "1", distribution=distribution)).own()], 0)
    assert trainer.default_root_dir == str(tmp_path / "1")


@pytest.mark.parametrize(
    ("mode", "folder"), [("RUN", "run=/out/now"), ("MULTIRUN", "sweep=/cwd/multirun/now"), (None, "run=/out/now")]
)
def test_the_folder_that_hydra_created(mode: str | None, folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = SimpleNamespace(
        mode=None if mode is None else SimpleNamespace(name=mode),
        runtime=SimpleNamespace(cwd="/cwd", output_dir="/out/now"),
        sweep=SimpleNamespace(dir="multirun/now"),
    )
    made = SimpleNamespace(HydraConfig=SimpleNamespace(initialized=lambda: True, get=lambda: config))
    monkeypatch.setitem(sys.modules, "hydra.core.hydra_config", made)
    assert hydra_folder() == folder


def test_a_script_without_hydra_has_no_hydra_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "hydra.core.hydra_config", raising=False)
    assert hydra_folder() == ""
