"""Running micro-batches again leaves a run as it was, and gives the same gradients each time."""

from __future__ import annotations

import threading
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_ckptless.errors import OptionsError
from lightning_ckptless.testing.wrong_products import wrong_products
from lightning_ckptless.trainer.audit.micro_batch import MicroBatches
from tests.lab import parts
from tests.trainer.interrupted import OneProcess, Outcome, fit
from tests.trainer.test_habits import HABITS, OPTIONS, Habits

QUICK = ("hidden_state", "buffer_created_in_training", "generator_created_on_first_use")
KINDS = {
    "plain": OPTIONS,
    "accumulating": replace(OPTIONS, accumulate=2, precision="bf16-mixed", scheduler="step", logger="both"),
    "frozen": replace(OPTIONS, block="adapted"),
    "counted": replace(OPTIONS, block="following:counted"),
    "data": replace(OPTIONS, block="following:data"),
    "replaced": replace(OPTIONS, block="following:replaced"),
    "averaged": replace(OPTIONS, ema=True),
    "combined": replace(OPTIONS, data="combined"),
}


class Checked(OneProcess):
    """Runs every micro-batch twice before it is trained on, and once with wrong matrix products."""

    replaying = nullcontext

    def __init__(self) -> None:
        super().__init__()
        self.found: list[bool] = []

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        host_state = self.host_state
        assert host_state is not None
        micro_batches = MicroBatches(self.trainer, lambda: host_state, nullcontext)
        packed = micro_batches.pack(batch)
        with micro_batches.runs(packed) as run:
            first, again = run(packed), run(packed)
            with wrong_products():
                wrong = run(packed)
        assert first == again and "loss" in first
        self.found.append(first != wrong)


def checked(options: parts.Options, root: Path) -> tuple[Outcome, Outcome, Checked]:
    strategy = Checked()
    return fit(options, root / "whole", OneProcess(), None), fit(options, root / "checked", strategy, None), strategy


def require_same(whole: Outcome, other: Outcome) -> None:
    assert other.rows == whole.rows and other.log_rows == whole.log_rows
    assert other.weights.keys() == whole.weights.keys()
    for name, tensor in whole.weights.items():
        assert torch.equal(tensor, other.weights[name]), name


@pytest.mark.parametrize(
    "habit", [habit if habit in QUICK else pytest.param(habit, marks=pytest.mark.long) for habit in HABITS]
)
def test_state_in_unusual_places_is_left_as_it_was(habit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model_class = parts.model_class
    monkeypatch.setattr(parts, "model_class", lambda *args: getattr(Habits, habit)(model_class(*args)))
    whole, other, strategy = checked(OPTIONS, tmp_path)
    require_same(whole, other)
    assert len(strategy.found) == 8 and all(strategy.found)


@pytest.mark.parametrize(
    "kind", [kind if kind == "plain" else pytest.param(kind, marks=pytest.mark.long) for kind in KINDS]
)
def test_each_kind_of_training_is_left_as_it_was(kind: str, tmp_path: Path) -> None:
    whole, other, strategy = checked(KINDS[kind], tmp_path)
    require_same(whole, other)
    assert strategy.found and all(strategy.found)


class Held:
    """A batch that cannot be pickled."""

    def __init__(self) -> None:
        self.lock = threading.Lock()


class NoState:
    """Stands for the host state of a trainer."""

    def of_step(self) -> dict[str, Any]:
        return {}

    def put_back(self, saved: dict[str, Any]) -> None: ...


def test_a_batch_that_cannot_be_handed_over_is_refused() -> None:
    trainer: Any = type("Trainer", (), {"lightning_module": nn.Linear(1, 1), "global_rank": 1})()
    host_state: Any = NoState()
    with pytest.raises(OptionsError, match=r"rank 1: .*batch cannot be handed to another rank: .*lock"):
        MicroBatches(trainer, lambda: host_state, nullcontext).pack([Held()])
