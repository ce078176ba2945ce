"""When the callbacks ask for a rewind, without a run."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

import lightning_ckptless
from lightning_ckptless.errors import OptionsError
from lightning_ckptless.trainer.rewind.callbacks import why_spike


class Strategy:
    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []

    def ask_to_rewind(self, cause: str, **how: Any) -> None:
        self.asked.append({"cause": cause, **how})


def step(callback: Any, outputs: Any, *, done: int, batch: int, **more: Any) -> list[dict[str, Any]]:
    strategy = Strategy()
    facts = {"accumulate_grad_batches": 1, "is_last_batch": False, "callback_metrics": {}, "global_rank": 1, **more}
    trainer = SimpleNamespace(strategy=strategy, global_step=done, current_epoch=0, **facts)
    callback.on_train_batch_end(trainer, None, outputs, None, batch)
    return strategy.asked


def test_a_loss_that_is_not_finite_goes_back_to_before_its_step() -> None:
    callback = lightning_ckptless.RewindOnNonFinite()
    assert step(callback, {"loss": 1.0}, done=20, batch=19) == []
    [asked] = step(callback, {"loss": math.nan}, done=20, batch=19)
    assert asked["cause"] == "loss=nan on rank 1 is not finite (batch 19 of epoch 0)"
    assert (asked["to_step"], asked["steps"], asked["skip_batches"]) == (19, None, None)


def test_a_batch_that_accumulates_has_made_no_step() -> None:
    callback = lightning_ckptless.RewindOnNonFinite(steps=3, skip_batches=2)
    [asked] = step(callback, math.inf, done=20, batch=40, accumulate_grad_batches=2)
    assert (asked["to_step"], asked["skip_batches"]) == (18, 2)
    [asked] = step(callback, math.inf, done=1, batch=1, accumulate_grad_batches=2)
    assert asked["to_step"] == 0


def test_a_spike_is_compared_with_the_median_of_a_full_window() -> None:
    callback = lightning_ckptless.RewindOnSpike(factor=3.0, window=3)
    for batch, value in enumerate([5.0, 90.0, 4.0]):
        assert step(callback, {"loss": value}, done=batch + 1, batch=batch) == []
    assert step(callback, {"loss": 15.0}, done=4, batch=3) == []
    [asked] = step(callback, {"loss": 46.0}, done=5, batch=4)
    assert "is more than 3 times the median of the 3 batches before, 15" in asked["cause"]
    assert callback.recent == [90.0, 4.0, 15.0], "a spike does not count for the median"


def test_a_logged_value_is_watched_by_its_name() -> None:
    callback = lightning_ckptless.RewindOnNonFinite("grad_norm")
    assert step(callback, {"loss": math.nan}, done=2, batch=1) == []
    assert step(callback, {"loss": 1.0}, done=2, batch=1, callback_metrics={"grad_norm": math.inf})


@pytest.mark.parametrize(
    ("value", "recent", "spikes"),
    [(3.0, [1, 1], False), (3.1, [1, 1], True), (-0.5, [-1, -1], False), (1.1, [-1, -1], True), (9, [1], False)],
)
def test_spikes(value: float, recent: list[float], spikes: bool) -> None:
    assert bool(why_spike(value, recent, factor=3.0, window=2)) == spikes


@pytest.mark.parametrize(
    "make",
    [
        lambda: lightning_ckptless.RewindOnNonFinite(steps=0),
        lambda: lightning_ckptless.RewindOnNonFinite(skip_batches=-1),
        lambda: lightning_ckptless.RewindOnSpike(factor=1.0),
        lambda: lightning_ckptless.RewindOnSpike(window=0),
    ],
)
def test_values_out_of_range_are_refused(make: Any) -> None:
    with pytest.raises(OptionsError, match="expected"):
        make()


def test_another_strategy_is_refused_before_the_first_step() -> None:
    with pytest.raises(OptionsError, match="needs strategy='ckptless', found Strategy"):
        lightning_ckptless.RewindOnSpike().on_train_start(SimpleNamespace(strategy=Strategy()), None)
