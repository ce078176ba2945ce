"""Checkpoint files of a future that did not happen are removed, and no others."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from lightning_ckptless.protocol.versions import Version
from lightning_ckptless.trainer.checkpoints import (
    files_of_the_future,
    newest_checkpoint,
    note_of_save,
    remove,
    step_of,
)
from tests.trainer.tiny import tiny_trainer


def before_tail(step: int) -> Version:
    return Version(step, tail_done=False)


def after_tail(step: int) -> Version:
    return Version(step, tail_done=True)


@pytest.mark.parametrize(
    ("after", "restored", "ahead"),
    [
        (None, after_tail(0), False),
        (after_tail(3), after_tail(4), False),
        (after_tail(3), after_tail(3), True),
        (after_tail(3), after_tail(2), True),
        # Saved in the validation behind step 3: a version after that validation holds it, one before does not.
        (before_tail(3), after_tail(3), False),
        (before_tail(3), before_tail(3), True),
    ],
)
def test_a_file_is_of_the_future_if_the_version_does_not_know_it(
    after: Version | None, restored: Version, ahead: bool, tmp_path: Path
) -> None:
    path = tmp_path / "epoch=0.ckpt"
    note = note_of_save(str(path), after, existed=False)
    path.touch()
    assert files_of_the_future([note], restored) == ([path] if ahead else [])


def test_a_file_that_was_written_over_is_kept(tmp_path: Path) -> None:
    last, best = tmp_path / "last.ckpt", tmp_path / "best.ckpt"
    notes = [
        note_of_save(str(last), after_tail(1), existed=False),
        note_of_save(str(last), after_tail(5), existed=True),
        # It lay there before the run: no note tells who wrote it.
        note_of_save(str(best), after_tail(5), existed=True),
    ]
    last.touch()
    best.touch()
    assert files_of_the_future(notes, after_tail(3)) == []


def test_a_file_that_is_gone_is_not_named(tmp_path: Path) -> None:
    notes = [note_of_save(str(tmp_path / "gone.ckpt"), after_tail(5), existed=False)]
    assert files_of_the_future(notes, after_tail(3)) == []


def test_a_file_saved_twice_is_named_once(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    path.touch()
    notes = [note_of_save(str(path), after_tail(step), existed=step > 4) for step in (4, 5)]
    assert files_of_the_future(notes, after_tail(3)) == [path]


@given(
    saves=st.lists(st.tuples(st.integers(0, 6), st.booleans(), st.sampled_from("abcd")), max_size=12),
    restored=st.builds(Version, st.integers(0, 6), st.booleans()),
)
def test_what_is_left_is_the_folder_that_the_version_has_seen(
    saves: list[tuple[int, bool, str]], restored: Version
) -> None:
    with tempfile.TemporaryDirectory() as root:
        notes, known = [], set[str]()
        for step, tail_done, name in sorted(saves):
            path, after = Path(root, f"{name}.ckpt"), Version(step, tail_done)
            notes.append(note_of_save(str(path), after, path.exists()))
            path.touch()
            if after < restored:
                known.add(path.name)
        for path in files_of_the_future(notes, restored):
            path.unlink()
        assert set(os.listdir(root)) == known
        assert files_of_the_future(notes, restored) == []


# ---------------------------------------------------------------------- the newest file


def test_the_newest_of_all_folders_is_found(tmp_path: Path) -> None:
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


def test_the_folder_is_the_one_that_lightning_would_choose(tmp_path: Path) -> None:
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


def test_a_folder_is_a_checkpoint_once_its_last_file_is_there(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, callbacks=[ModelCheckpoint(tmp_path)], enable_checkpointing=True)
    whole, torn = tmp_path / "step=1.ckpt", tmp_path / "step=2.ckpt"
    for folder, files in ((whole, (".metadata", "meta.pt")), (torn, (".metadata",))):
        folder.mkdir()
        for name in files:
            (folder / name).touch()
    assert newest_checkpoint(trainer) == str(whole)
    remove(whole)
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
