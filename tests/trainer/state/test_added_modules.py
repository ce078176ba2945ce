"""Modules that callbacks make in training are there in a new process."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from lightning_ckptless.errors import OptionsError
from lightning_ckptless.formats.packing import pack, unpack
from lightning_ckptless.trainer.state.added_modules import AddedModules, restore_modules
from lightning_ckptless.trainer.state.tensors import StateIndex

WIDTH = 1000


class Holder:
    """A callback."""

    average: Any = None


def process(first: bool = False) -> Any:
    """Return a trainer with a model and a callback, which has a module from the start or has none."""
    model, holder = nn.Linear(WIDTH, 2), Holder()
    if first:
        holder.early = nn.BatchNorm1d(2)  # type: ignore[attr-defined]
    strategy = SimpleNamespace(model=model)
    return SimpleNamespace(
        lightning_module=model, callbacks=[holder], optimizers=[], strategy=strategy, global_rank=0, global_step=3
    )


def averaged() -> nn.Module:
    """Return a module with a shared and a frozen parameter and a buffer."""
    made = nn.Sequential(nn.Linear(WIDTH, 2), nn.BatchNorm1d(2), nn.Linear(WIDTH, 2))
    made[2].weight = made[0].weight
    made[0].register_forward_hook(lambda *_: None)
    return made.requires_grad_(False)


def test_a_new_process_gets_a_place_for_the_tensors() -> None:
    trained, fresh = process(first=True), process(first=True)
    added = AddedModules(trained)
    trained.callbacks[0].average = averaged()
    packed = pack(added.capture())
    assert len(packed) < 4 * WIDTH, "tensors are part of the version anyway"
    restore_modules(fresh, unpack(packed))
    made = fresh.callbacks[0].average
    assert made[2].weight is made[0].weight and not made[0].weight.requires_grad
    found, expected = (
        {name: (type(t), t.shape, t.dtype) for name, t in StateIndex(trainer).read().items()}
        for trainer in (fresh, trained)
    )
    assert found == expected


def test_a_new_process_passes_the_module_on() -> None:
    trained, second, third = process(), process(), process()
    added = AddedModules(trained)
    trained.callbacks[0].average = averaged()
    saved = unpack(pack(added.capture()))
    restore_modules(second, saved)
    again = AddedModules(second)
    again.apply(saved)
    restore_modules(third, unpack(pack(again.capture())))
    assert isinstance(third.callbacks[0].average, nn.Sequential)


def test_a_module_made_after_the_version_is_taken_away() -> None:
    trainer = process(first=True)
    saved = unpack(pack(AddedModules(trainer).capture()))
    trainer.callbacks[0].average = averaged()
    restore_modules(trainer, saved)
    assert trainer.callbacks[0].average is None and trainer.callbacks[0].early is not None


def test_a_module_that_is_made_or_replaced_changes_the_layout() -> None:
    trainer = process()
    for _ in range(2):
        index = StateIndex(trainer)
        assert index.is_current()
        trainer.callbacks[0].average = averaged()
        assert not index.is_current()


def test_a_module_that_cannot_be_made_elsewhere_is_refused() -> None:
    trainer = process()
    added = AddedModules(trainer)
    trainer.callbacks[0].average = averaged()
    trainer.callbacks[0].average.follow = lambda: torch.ones(1)
    with pytest.raises(OptionsError, match=r"rank 0: callback/0\.Holder\.average, .* step 3, .*make it in setup"):
        added.capture()
