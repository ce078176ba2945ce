"""Faults are injected at their step and moment, and the injector leaves no hooks in the model."""

from __future__ import annotations

import importlib
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from lightning_ckptless import environment
from lightning_ckptless._registration.names import classes_for
from lightning_ckptless.errors import OptionsError
from lightning_ckptless.lightning_pytorch import FaultInjector
from lightning_ckptless.testing.fault_injector import InjectedError
from tests.lab.parts import Options
from tests.testing.runs import BASE, fit


class Watch(pl.Callback):
    """Records the progress of the run until the fault."""

    def __init__(self) -> None:
        self.step = -1
        self.before: dict[str, torch.Tensor] = {}
        self.model: Any = None

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.step, self.model = trainer.global_step, pl_module
        self.before = {name: tensor.clone() for name, tensor in pl_module.state_dict().items()}

    def changed(self, part: str) -> bool:
        """Return whether parameters or buffers with this name have changed since the batch began."""
        now = self.model.state_dict()
        return any(not torch.equal(now[name], tensor) for name, tensor in self.before.items() if part in name)


def run_until_fault(faults: str, tmp_path: Path, options: Options = BASE) -> tuple[Watch, str]:
    """Run until the fault; returns the progress and the traceback."""
    watch, injector = Watch(), FaultInjector(faults, tmp_path / "marks")
    with pytest.raises(InjectedError) as error:
        fit(options, tmp_path, watch, injector)
    return watch, "\n".join(traceback.format_exception(error.value))


def test_a_fault_in_training_step(tmp_path: Path) -> None:
    watch, where = run_until_fault("raise:rank=0:step=4", tmp_path)
    assert watch.step == 3
    assert "in training_step" in where
    assert watch.changed("running_mean") and not watch.changed("weight")
    assert "in backward" not in where


def test_a_fault_in_backward(tmp_path: Path) -> None:
    watch, where = run_until_fault("raise:rank=0:step=4:at=backward", tmp_path)
    assert watch.step == 3
    assert "in backward" in where
    assert any(parameter.grad is None for parameter in watch.model.parameters())


def test_a_fault_in_the_optimizer_step(tmp_path: Path) -> None:
    watch, where = run_until_fault("raise:rank=0:step=4:at=optimizer_step", tmp_path)
    assert watch.step == 3 == watch.model.trainer.global_step
    assert "in optimizer_step" in where
    assert watch.changed("weight")


def test_a_fault_between_step_and_commit(tmp_path: Path) -> None:
    watch, where = run_until_fault("raise:rank=0:step=4:at=commit", tmp_path)
    assert watch.step == 3
    assert watch.model.trainer.global_step == 4
    assert "in on_train_batch_end" in where


def test_a_fault_in_accumulation(tmp_path: Path) -> None:
    watch, _ = run_until_fault("raise:rank=0:step=3:at=accumulation", tmp_path, replace(BASE, accumulate=2))
    progress = watch.model.trainer.fit_loop.epoch_loop.batch_progress
    assert (watch.step, progress.current.ready) == (2, 5)
    assert any(parameter.grad is not None for parameter in watch.model.parameters())


def test_a_step_of_accumulated_batches_commits_once(tmp_path: Path) -> None:
    watch, _ = run_until_fault("raise:rank=0:step=2:at=commit", tmp_path, replace(BASE, accumulate=2))
    assert watch.model.trainer.fit_loop.epoch_loop.batch_progress.current.ready == 4


def test_a_fault_in_validation_skips_the_sanity_check(tmp_path: Path) -> None:
    watch, where = run_until_fault("raise:rank=0:step=1:at=validation", tmp_path)
    assert watch.model.trainer.global_step == 6
    assert "on_validation_batch_start" in where


def test_a_fault_at_the_end_of_the_epoch(tmp_path: Path) -> None:
    watch, _ = run_until_fault("raise:rank=0:step=7:at=epoch_end", tmp_path)
    assert watch.model.trainer.global_step == 12
    assert watch.model.trainer.current_epoch == 1


@pytest.mark.parametrize("moment", ["training_step", "backward", "optimizer_step", "commit"])
def test_a_fault_with_two_optimizers(moment: str, tmp_path: Path) -> None:
    """A batch makes two steps; faults in even steps are injected, too."""
    watch, _ = run_until_fault(f"raise:rank=0:step=4:at={moment}", tmp_path, replace(BASE, optimization="two"))
    assert watch.step in {2, 4}


def test_a_fault_is_injected_once(tmp_path: Path) -> None:
    run_until_fault("raise:rank=0:step=4:at=backward", tmp_path)
    injector = FaultInjector("raise:rank=0:step=4:at=backward", tmp_path / "marks")
    # In another generation, as after a relaunch.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
        trainer, model = fit(BASE, tmp_path, injector)
    assert trainer.global_step == 12
    assert "training_step" not in vars(model)


def test_hooks_are_removed(tmp_path: Path) -> None:
    faults = ",".join(f"raise:rank=0:step=99:at={m}" for m in ("training_step", "backward", "optimizer_step", "commit"))
    trainer, model = fit(BASE, tmp_path, FaultInjector(faults, tmp_path / "marks"))
    assert "training_step" not in vars(model)
    assert not any(parameter._backward_hooks for parameter in model.parameters())
    assert not any(optimizer._optimizer_step_post_hooks for optimizer in trainer.optimizers)


def test_a_fault_of_a_rank_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionsError, match="rank 1 does not exist, the world size is 1"):
        fit(BASE, tmp_path, FaultInjector("raise:rank=1:step=4", tmp_path))


def test_a_fault_of_a_rank_that_may_still_join_is_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CKPTLESS_NNODES", "1:3")
    trainer, _ = fit(BASE, tmp_path, FaultInjector("raise:rank=2:step=4", tmp_path))
    assert trainer.global_step == 12
    with pytest.raises(OptionsError, match="rank 3 does not exist, the world size is 3"):
        fit(BASE, tmp_path, FaultInjector("raise:rank=3:step=4", tmp_path))


def test_other_strategies_need_a_marker_folder(tmp_path: Path) -> None:
    with pytest.raises(OptionsError, match="set marker_dir="):
        fit(BASE, tmp_path, FaultInjector("raise:rank=0:step=4"))


def test_invalid_faults_are_refused_at_once() -> None:
    with pytest.raises(OptionsError, match="did you mean 'kill'"):
        FaultInjector("kil:rank=0:step=4")


@pytest.mark.parametrize("distribution", ["lightning.pytorch", "pytorch_lightning"])
def test_faults_are_read_from_the_environment(distribution: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(environment.FAULTS, " ")
    made_by = classes_for(distribution).FaultInjector.from_environment
    assert made_by() is None
    monkeypatch.setenv(environment.FAULTS, "kill:rank=0:step=4")
    assert isinstance(made_by(), importlib.import_module(f"{distribution}.callbacks").Callback)
