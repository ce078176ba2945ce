"""After a fault, the files and folders that a program creates match those of the undisturbed run."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from lightning_ckptless.membership.forkserver.client import ForkServer
from lightning_ckptless.testing.drill import run_drill, run_variant
from lightning_ckptless.testing.starters import Ladder
from lightning_ckptless.testing.variant import Variant
from lightning_ckptless.trainer.outputs.checkpoint_copies import is_whole
from tests.faults.conftest import REPOSITORY, Drill
from tests.faults.matrix import BASE, Cell

ENV = {"PYTHONPATH": str(REPOSITORY)}
STAMP = re.compile(r"\d{15,}")
SCRIPT = """
import os, sys, time
import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel

class Model(BoringModel):
    def training_step(self, batch, batch_idx):
        # A checkpoint file of the user, which is never overwritten.
        path = f"{self.trainer.default_root_dir}/own-{fit}.ckpt"
        if self.global_step == 4 and not os.path.exists(path):
            self.trainer.save_checkpoint(path)
        return super().training_step(batch, batch_idx)

stamp = str(time.time_ns())
if "--chdir" in sys.argv:
    os.makedirs(stamp, exist_ok=True)
    os.chdir(stamp)
root = "." if "--chdir" in sys.argv else stamp
for fit in range(2 if "--twice" in sys.argv else 1):
    L.seed_everything(3, workers=True)
    model = Model()
    trainer = L.Trainer(
        accelerator="cpu", devices=2, strategy="ckptless", max_epochs=2 + fit, limit_train_batches=6,
        limit_val_batches=0, enable_progress_bar=False, enable_model_summary=False, logger=False, default_root_dir=root,
        callbacks=[
            # Both fits write into the same folder.
            ModelCheckpoint(f"{root}/newest", every_n_train_steps=2, save_last=True),
            ModelCheckpoint(f"{root}/all", every_n_train_steps=3, save_top_k=-1),
        ],
    )
    trainer.fit(model)
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The script, in a file."""
    path = tmp_path_factory.mktemp("program") / "train.py"
    path.write_text(SCRIPT)
    return path


Undisturbed = Callable[[tuple[str, ...]], Variant]


@pytest.fixture(scope="module")
def undisturbed(script: Path, parent: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """Return a function that returns the undisturbed run with some arguments; each runs once."""

    @cache
    def run(arguments: tuple[str, ...]) -> Variant:
        folder = tmp_path_factory.mktemp("undisturbed") / "run"
        return run_variant([str(script), *arguments], folder, parent=parent, isolate=True, env=ENV)

    return run


def checkpoints_of(variant: Variant) -> dict[str, int]:
    """Return the steps of all checkpoint files of a run, hidden ones included, by path without time stamps."""
    files = {path: STAMP.sub("STAMP", str(path.relative_to(variant.folder))) for path in variant.folder.rglob("*ckpt*")}
    return {name: torch.load(path, weights_only=False)["global_step"] for path, name in files.items() if path.is_file()}


def stamps_of(variant: Variant) -> set[str]:
    """Return the time stamps of the folders that contain a checkpoint."""
    return {stamp for path in variant.folder.rglob("*.ckpt") for stamp in STAMP.findall(str(path))}


CASES = {
    # Killed after a save and before the commit: there is one file too many, and one was removed too early.
    "rank=0-in_place": ("kill:rank=0:step=4:at=commit", (), None, (1, 0)),
    "rank=1-in_place": ("kill:rank=1:step=7", (), None, (1, 0)),
    "rank=0-relaunch-chdir": ("kill:rank=0:step=6:at=commit", ("--chdir",), False, (0, 1)),
    "rank=0-in_place-chdir": ("kill:rank=0:step=5", ("--chdir",), None, (1, 0)),
    "second_fit": ("kill:rank=1:step=16", ("--twice",), None, (1, 0)),
}
LONG = ("rank=1-in_place", "rank=0-in_place-chdir", "rank=0-relaunch-chdir")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.long] if n in LONG else []) for n in CASES])
def test_checkpoints_after_a_kill(
    name: str, script: Path, undisturbed: Undisturbed, tmp_path: Path, parent: ForkServer
) -> None:
    faults, arguments, in_place, recoveries = CASES[name]
    command = [str(script), *arguments]
    baseline = undisturbed(arguments)
    report = run_drill(
        command,
        faults,
        folder=tmp_path / "drill",
        parent=parent,
        baseline=baseline,
        isolate=True,
        env=ENV,
        ladder=Ladder(in_place=in_place),
    )
    assert report.problems == ()
    assert (report.in_place, report.relaunches) == recoveries
    assert checkpoints_of(baseline)
    assert checkpoints_of(report.faulted) == checkpoints_of(baseline)
    assert len(stamps_of(report.faulted)) == 1


DELETES_OUTPUT = """
import shutil
import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel

shutil.rmtree("out", ignore_errors=True)
L.seed_everything(3, workers=True)
trainer = L.Trainer(
    accelerator="cpu", devices=2, strategy="ckptless", max_epochs=1, limit_train_batches=8, limit_val_batches=0,
    enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=1,
    logger=L.pytorch.loggers.CSVLogger("out", flush_logs_every_n_steps=1),
    callbacks=[ModelCheckpoint("out/kept", every_n_train_steps=2, save_top_k=-1)],
)
trainer.fit(BoringModel())
"""


def test_files_deleted_by_the_script_are_reported(tmp_path: Path, parent: ForkServer) -> None:
    (tmp_path / "train.py").write_text(DELETES_OUTPUT)
    command, faults = [str(tmp_path / "train.py")], "kill:rank=0:step=6"
    run: Variant = run_variant(command, tmp_path / "run", faults=faults, parent=parent, isolate=True, env=ENV)
    assert run.exit_code == 0, run.tail()
    output = "".join(path.read_text() for path in (run.folder / "output").rglob("*") if path.is_file())
    # The last step before the fault, or the one before: its version may not be committed yet on a busy machine.
    assert len(re.findall(r"files of the run are missing or shorter than at step [45],", output)) == 1
    assert re.search(r"kept/epoch=0-step=[24]\.ckpt \(expected \d+ bytes, it is missing\)", output)
    assert re.search(r"metrics\.csv \(expected \d+ rows, it is missing\)", output)


@pytest.mark.long
@pytest.mark.parametrize("in_place", [None, False])
def test_checkpoint_folders_of_a_sharded_model(in_place: bool | None, drill: Drill) -> None:
    options = replace(BASE, mesh="2x1", checkpoint_every=2, epochs=1)
    report = drill(Cell("kill:rank=0:step=4:at=commit", options), Ladder(in_place=in_place))
    assert report.problems == ()

    def folders(variant: Variant) -> list[str]:
        found = [path for path in variant.folder.rglob("*ckpt*") if path.parent.name == "checkpoints"]
        assert all(is_whole(path) for path in found)
        return sorted(path.name for path in found)

    assert folders(report.faulted) == folders(report.baseline)
    assert "step=4" in " ".join(folders(report.faulted))
