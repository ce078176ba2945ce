"""Choosing the checkpoint file that a run can continue from."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from lightning_ckptless.trainer.outputs.checkpoint_files import newest_checkpoint, step_of
from tests.trainer.tiny import tiny_trainer


def test_the_newest_file_of_all_folders_is_found(tmp_path: Path) -> None:
    saver, other = ModelCheckpoint(tmp_path / "one"), ModelCheckpoint(tmp_path / "two", every_n_train_steps=3)
    trainer = tiny_trainer(tmp_path, callbacks=[saver, other], enable_checkpointing=True)
    assert newest_checkpoint(trainer) is None
    for age, name in enumerate(("two/new.ckpt", "one/old.ckpt", "one/older.ckpt")):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
        os.utime(path, (1000 - age, 1000 - age))
    (tmp_path / "one" / "notes.txt").touch()
    assert newest_checkpoint(trainer) == str(tmp_path / "two" / "new.ckpt")


def test_the_default_folder_is_the_one_that_lightning_chooses(tmp_path: Path) -> None:
    logger = CSVLogger(str(tmp_path), version=3)
    trainer = tiny_trainer(tmp_path, logger=logger, callbacks=[ModelCheckpoint()], enable_checkpointing=True)
    folder = trainer.checkpoint_callbacks[0]._ModelCheckpoint__resolve_ckpt_dir(trainer)
    path = Path(folder) / "epoch=0.ckpt"
    path.parent.mkdir(parents=True)
    path.touch()
    assert newest_checkpoint(trainer) == str(path)


def test_without_a_logger_the_folder_is_below_the_root(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, callbacks=[ModelCheckpoint()], enable_checkpointing=True)
    path = Path(trainer.checkpoint_callbacks[0]._ModelCheckpoint__resolve_ckpt_dir(trainer)) / "epoch=0.ckpt"
    path.parent.mkdir()
    path.touch()
    assert newest_checkpoint(trainer) == str(path)


def test_a_folder_is_a_checkpoint_once_its_last_file_exists(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, callbacks=[ModelCheckpoint(tmp_path)], enable_checkpointing=True)
    whole, torn = tmp_path / "step=1.ckpt", tmp_path / "step=2.ckpt"
    for folder, files in ((whole, (".metadata", "meta.pt")), (torn, (".metadata",))):
        folder.mkdir()
        for name in files:
            (folder / name).touch()
    assert newest_checkpoint(trainer) == str(whole)
    shutil.rmtree(whole)
    assert newest_checkpoint(trainer) is None
    assert torn.exists()


def test_the_step_of_a_file_is_read_without_its_tensors(tmp_path: Path) -> None:
    torch.save({"global_step": 7, "state_dict": {"w": torch.ones(3)}}, tmp_path / "good.ckpt")
    torch.save({"epoch": 7}, tmp_path / "other.ckpt")
    torch.save({"global_step": 7, "class": Path}, tmp_path / "classes.ckpt")
    (tmp_path / "text.ckpt").write_text("no checkpoint")
    (tmp_path / "folder.ckpt").mkdir()
    assert step_of(str(tmp_path / "good.ckpt")) == 7
    for name in ("other", "classes", "text", "folder", "missing"):
        assert step_of(str(tmp_path / f"{name}.ckpt")) is None
    assert step_of("last") is None
