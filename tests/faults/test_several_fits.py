"""A program with several trainers: each `fit` has its own state, and what stands between them runs as usual."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_ckptless.membership.forkserver.client import ForkServer
from lightning_ckptless.testing.drill import run_drill, run_variant
from lightning_ckptless.testing.variant import Variant
from tests.faults.conftest import REPOSITORY

SCRIPT = """
import sys
import lightning as L
from lightning.pytorch.demos.boring_classes import BoringModel

def trainer(epochs):
    return L.Trainer(
        accelerator="cpu", devices=2, strategy="ckptless", max_epochs=epochs, limit_train_batches=6,
        limit_val_batches=2, limit_test_batches=2, enable_progress_bar=False, enable_model_summary=False,
        log_every_n_steps=1, logger=L.pytorch.loggers.CSVLogger("."), enable_checkpointing=False,
    )

L.seed_everything(3, workers=True)
model = BoringModel()
first = trainer(1)
first.fit(model)
first.test(model)
second = trainer(3)
second.fit(model)
assert second.global_step == 18
if "--fail" in sys.argv:
    raise ValueError("past the training")
"""
ENV = {"PYTHONPATH": str(REPOSITORY)}


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program."""
    path = tmp_path_factory.mktemp("program") / "train.py"
    path.write_text(SCRIPT)
    return path


@pytest.fixture(scope="module")
def baseline(script: Path, tmp_path_factory: pytest.TempPathFactory, parent: ForkServer) -> Variant:
    """The uninterrupted run."""
    return run_variant([str(script)], tmp_path_factory.mktemp("baseline"), parent=parent, isolate=True, env=ENV)


@pytest.mark.parametrize("step", [3, 9])
def test_kill(step: int, script: Path, baseline: Variant, tmp_path: Path, parent: ForkServer) -> None:
    report = run_drill(
        [str(script)],
        f"kill:rank=1:step={step}",
        folder=tmp_path / "drill",
        parent=parent,
        baseline=baseline,
        isolate=True,
        env=ENV,
    )
    assert report.problems == ()
    # What a new process cannot do is to come to the second fit alone.
    assert (report.in_place, report.relaunches) == ((1, 0) if step < 6 else (0, 1))
    # A fit that had ended before the fault recovers from nothing.
    assert [recovery.steps_replayed > 0 for recovery in report.recoveries] == [True]
    if step > 6:
        (relaunch,) = (event for event in report.faulted.events if event.event == "relaunch")
        assert relaunch.fields["reason"] == (
            "not in place: the program is in its fit number 2, which a new process cannot reach alone"
        )


def test_an_error_past_fit_ends_the_run_once(script: Path, tmp_path: Path, parent: ForkServer) -> None:
    command = [str(script), "--fail"]
    variant: Variant = run_variant(command, tmp_path / "run", parent=parent, isolate=True, env=ENV)
    assert variant.exit_code == 1
    assert "ValueError: past the training" in variant.tail()
    assert not any(event.event == "relaunch" for event in variant.events)
