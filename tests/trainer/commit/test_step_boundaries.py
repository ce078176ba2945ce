"""A version exists after each optimizer step, before and after validation, and at no other moment."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_ckptless.internals.lightning.loops import FitLoops
from lightning_ckptless.protocol.versions import Version
from lightning_ckptless.trainer.commit.step_boundaries import StepBoundaries
from tests.trainer.tiny import callback, tiny_loader, tiny_module, tiny_trainer


def manual(optimizers: int) -> Any:
    """A module with manual optimization and one or more optimizers."""
    base: Any = type(tiny_module())

    class Manual(base):  # type: ignore[misc]
        automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.manual_backward(self.layer(batch[0]).square().mean())
            made = self.optimizers()
            for optimizer in made if isinstance(made, list) else [made]:
                optimizer.step()

        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(self.parameters(), lr=0.1) for _ in range(optimizers)]

    return Manual()


def versions(
    root: Path,
    *,
    module: Any = None,
    samples: int = 8,
    every_n_steps: int = 1,
    since: Version | None = None,
    validate: bool = True,
    **options: Any,
) -> list[str]:
    """The versions that a run of four batches captures: `3` after step 3, `3-` before its validation."""
    taken: list[str] = []

    def take(version: Version) -> None:
        assert version.optimizer_step == trainer.global_step
        taken.append(f"{version.optimizer_step}{'' if version.validation_done else '-'}")

    trainer = tiny_trainer(root, **options)
    StepBoundaries(FitLoops(trainer), take, every_n_steps=lambda: every_n_steps, since=since)
    trainer.fit(module or tiny_module(), tiny_loader(samples), tiny_loader() if validate else None)
    return taken


@pytest.mark.parametrize(
    ("expected", "options"),
    [
        ("0 1 2 3 4", {"validate": False}),
        ("0 1 2 3 4- 4", {}),
        ("0 1 2 3 4- 4 5 6 7 8- 8", {"max_epochs": 2}),
        ("0 1 2 3 4 5 6 7 8- 8", {"max_epochs": 2, "check_val_every_n_epoch": 2}),
        ("0 1 2- 2 3 4- 4", {"val_check_interval": 2}),
        ("0 1 2 3- 3", {"limit_train_batches": 3}),
        ("0 1 2 3", {"max_steps": 3}),
        # Each rank has its own clock, so whether validation is due must not decide whether there is a version.
        ("0 1 2 3 4", {"val_check_interval": timedelta(0)}),
        ("0 1 2 3 4", {"limit_val_batches": 0}),
        # Five batches: the last one steps without accumulating.
        ("0 1 2 3- 3", {"samples": 10, "accumulate_grad_batches": 2}),
        # Validation in the middle of an accumulation belongs to no step.
        ("0 1 2", {"accumulate_grad_batches": 2, "val_check_interval": 3}),
        ("0 1- 1 2- 2", {"accumulate_grad_batches": 2, "val_check_interval": 1}),
        ("0 3", {"every_n_steps": 3}),
        ("0 3- 3", {"every_n_steps": 3, "val_check_interval": 3}),
        ("0 3 6", {"every_n_steps": 3, "max_epochs": 2, "validate": False}),
        ("0 2 4- 4", {"samples": 16, "every_n_steps": 2, "accumulate_grad_batches": 2}),
        ("1 2 3 4- 4", {"since": Version(0, validation_done=True)}),
    ],
    ids=str,
)
def test_versions_of_a_run(expected: str, options: dict[str, Any], tmp_path: Path) -> None:
    assert " ".join(versions(tmp_path, **options)) == expected


@pytest.mark.parametrize(
    ("optimizers", "every_n_steps", "expected"),
    [(1, 1, "0 1 2 3 4- 4"), (2, 1, "0 2 4 6 8- 8"), (2, 3, "0 6")],
)
def test_versions_of_manual_optimization(optimizers: int, every_n_steps: int, expected: str, tmp_path: Path) -> None:
    taken = versions(tmp_path, module=manual(optimizers), every_n_steps=every_n_steps)
    assert " ".join(taken) == expected


def test_a_skipped_batch_makes_no_version(tmp_path: Path) -> None:
    def skip_the_third(trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 2:
            raise StopIteration

    hooks = callback(on_train_batch_start=skip_the_third)
    assert versions(tmp_path, validate=False, callbacks=[hooks]) == ["0", "1", "2"]


def test_a_run_from_a_checkpoint_between_epochs_begins_with_a_version(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path)
    trainer.fit(tiny_module(), tiny_loader())
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    taken: list[int] = []
    trainer = tiny_trainer(tmp_path, max_epochs=2)
    StepBoundaries(FitLoops(trainer), lambda v: taken.append(v.optimizer_step), every_n_steps=lambda: 1, since=None)
    trainer.fit(tiny_module(), tiny_loader(), ckpt_path=str(tmp_path / "end.ckpt"), weights_only=False)
    assert taken == [4, 5, 6, 7, 8]


def test_a_version_is_captured_before_validation(tmp_path: Path) -> None:
    known: dict[str, bool] = {}
    trainer = tiny_trainer(tmp_path)
    StepBoundaries(
        FitLoops(trainer), lambda v: known.update({str(v): "val_loss" in trainer.callback_metrics}),
        every_n_steps=lambda: 1, since=None,
    )  # fmt: skip
    trainer.fit(tiny_module(), tiny_loader(), tiny_loader())
    assert known["step 4 (before validation)"] is False
    assert known["step 4"] is True


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "0 1 2 3 4- wait validation 4 wait epoch_end"),
        ({"max_steps": 3, "val_check_interval": 2}, "0 1 2- wait validation 2 3 wait epoch_end"),
        # Validation without a version of its own, in the middle of an accumulation and by the clock.
        ({"accumulate_grad_batches": 2, "val_check_interval": 3}, "0 1 wait validation 2 wait epoch_end"),
        (
            {"val_check_interval": timedelta(0), "limit_train_batches": 2},
            "0 wait validation 1 wait validation 2 wait epoch_end",
        ),
    ],
    ids=str,
)
def test_hooks_that_may_change_weights_run_after_the_wait(
    options: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    order: list[str] = []
    hooks = callback(
        on_validation_epoch_start=lambda *_: order.append("validation"),
        on_train_epoch_end=lambda *_: order.append("epoch_end"),
    )
    trainer = tiny_trainer(tmp_path, callbacks=[hooks], **options)
    StepBoundaries(
        FitLoops(trainer),
        lambda version: order.append(f"{version.optimizer_step}{'' if version.validation_done else '-'}"),
        every_n_steps=lambda: 1,
        since=None,
        before_hooks=lambda: order.append("wait"),
    )
    trainer.fit(tiny_module(), tiny_loader(), tiny_loader())
    assert " ".join(order) == expected


def test_counters_agree_at_every_version(tmp_path: Path) -> None:
    """Within a step they disagree: Lightning counts batches, steps and log rows one after the other."""
    seen: list[tuple[int, ...]] = []

    def look(version: Version) -> None:
        progress = trainer.fit_loop.epoch_loop.batch_progress.current
        counts = {progress.ready, progress.started, progress.processed, progress.completed, trainer.global_step}
        seen.append((*counts, loops.batches_that_stepped + (not version.validation_done)))

    trainer = tiny_trainer(tmp_path)
    loops = FitLoops(trainer)
    StepBoundaries(loops, look, every_n_steps=lambda: 1, since=None)
    trainer.fit(tiny_module(), tiny_loader(), tiny_loader())
    assert seen == [(step, step) for step in (0, 1, 2, 3, 4, 4)]


def test_an_exception_in_commit_ends_the_run_before_the_next_step(tmp_path: Path) -> None:
    def refuse(version: Version) -> None:
        if version.optimizer_step == 2:
            raise RuntimeError("the arena is full")

    trainer = tiny_trainer(tmp_path)
    boundaries = StepBoundaries(FitLoops(trainer), refuse, every_n_steps=lambda: 1, since=None)
    with pytest.raises(RuntimeError, match="the arena is full"):
        trainer.fit(tiny_module(), tiny_loader())
    assert trainer.global_step == 2
    assert boundaries.last == Version(1, validation_done=True)


def test_the_loops_own_methods_are_restored(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path)
    loops = FitLoops(trainer)
    before = loops.epoch.advance, loops.epoch.on_advance_end
    boundaries = StepBoundaries(loops, lambda _: pytest.fail("a version"), every_n_steps=lambda: 1, since=None)
    assert loops.epoch.advance.function == boundaries.advance
    boundaries.remove()
    assert (loops.epoch.advance, loops.epoch.on_advance_end) == before
    assert not {"advance", "on_advance_end"} & {*vars(loops.epoch)}
    trainer.fit(tiny_module(), tiny_loader())
    assert trainer.global_step == 4
