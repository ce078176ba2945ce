"""Stopping by SIGTERM: what the user's hooks see, and where Lightning ends the run."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from lightning_ckptless.errors import SIGTERM_EXIT_CODE
from lightning_ckptless.internals.lightning.distribution import module
from lightning_ckptless.internals.lightning.loops import FitLoops
from lightning_ckptless.internals.lightning.sigterm import SigtermFlag, give_exit_code
from lightning_ckptless.trainer.commit.step_boundaries import StepBoundaries
from tests.trainer.tiny import DISTRIBUTIONS, callback, tiny_loader, tiny_module, tiny_trainer

HOOKS = ("on_train_batch_start", "on_train_batch_end", "on_validation_start", "on_train_epoch_end", "on_exception")


def run(
    root: Path, distribution: str, *, at: str, agree: bool | None, step: int
) -> tuple[list[Any], SystemExit | None]:
    """Train four batches, with a SIGTERM sent in a hook.

    Args:
        root: root folder of the trainer.
        distribution: the Lightning package.
        at: the hook.
        agree: whether the ranks agree at the end of the batch; None to leave everything to Lightning.
        step: number of completed steps when the signal is sent.

    Returns:
        What the hooks saw (hook, steps, flag), and the exception that ended the run.
    """
    seen: list[Any] = []

    def note(name: str) -> Any:
        def hook(trainer: Any, *_: Any) -> None:
            if name == at and trainer.global_step == step and not any(row[2] for row in seen):
                os.kill(os.getpid(), signal.SIGTERM)
            seen.append((name, trainer.global_step, trainer.received_sigterm))

        return hook

    trainer = tiny_trainer(
        root, distribution, callbacks=[callback(distribution, **{name: note(name) for name in HOOKS})]
    )
    if agree is not None:
        flag = SigtermFlag(trainer)

        def after_batch() -> None:
            if agree and flag.asked:
                flag.agree()
                if not flag.is_training_done:
                    raise module(distribution, "utilities.exceptions").SIGTERMException

        StepBoundaries(
            FitLoops(trainer), lambda _: None, every_n_steps=lambda: 1, since=None,
            after_batch=after_batch, training=flag.show,
        )  # fmt: skip
    try:
        trainer.fit(tiny_module(distribution), tiny_loader(), tiny_loader())
    except SystemExit as error:
        return seen, error
    return seen, None


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize(
    ("at", "step"), [("on_train_batch_start", 1), ("on_train_batch_end", 2), ("on_train_batch_end", 4)]
)
def test_a_single_rank_ends_like_lightning(at: str, step: int, distribution: str, tmp_path: Path) -> None:
    expected, by_lightning = run(tmp_path / "plain", distribution, at=at, agree=None, step=step)
    found, error = run(tmp_path / "ours", distribution, at=at, agree=True, step=step)
    if step == 4:
        # Lightning ends a validation in progress; here the step ends with its validation.
        assert (found[-1], expected[-1]) == (("on_exception", 4, True),) * 2
    else:
        assert found == expected
        assert found[-2:] == [("on_train_batch_end", 2, True), ("on_exception", 2, True)]
    assert type(error) is type(by_lightning) is module(distribution, "utilities.exceptions").SIGTERMException


@pytest.mark.parametrize("at", ["on_train_batch_start", "on_validation_start"])
def test_a_rank_does_not_end_before_all_ranks_agree(at: str, tmp_path: Path) -> None:
    step = 4 if at == "on_validation_start" else 1
    seen, error = run(tmp_path, DISTRIBUTIONS[0], at=at, agree=False, step=step)
    assert error is None
    assert seen[-1][:2] == ("on_train_epoch_end", 4)
    assert not any(flag for name, _, flag in seen if "validation" in name or "epoch" in name)


def test_the_exit_code_identifies_sigterm() -> None:
    errors = module(DISTRIBUTIONS[0], "utilities.exceptions")
    asked, chosen, other = errors.SIGTERMException(), errors.SIGTERMException(), SystemExit()
    chosen.code = 3
    for error in (asked, chosen, other):
        give_exit_code(error)
    assert (asked.code, chosen.code, other.code) == (SIGTERM_EXIT_CODE, 3, None)
