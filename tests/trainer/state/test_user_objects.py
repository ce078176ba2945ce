"""Objects that hooks keep state in are restored if their class is user code, and reported if a change is lost."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from lightning_ckptless.formats.packing import pack, unpack
from lightning_ckptless.formats.pickles import Packed
from lightning_ckptless.trainer.state.surroundings import Surroundings
from lightning_ckptless.trainer.state.user_objects import is_users_own
from tests.trainer.tiny import callback, tiny_loader, tiny_module, tiny_trainer


class Tracker:
    """Counts, keeps a history, and holds a resource that is not plain data."""

    def __init__(self) -> None:
        self.count, self.seen, self.inner, self.resource = 0, [0.0], SimpleNamespace(a=1), None

    def step(self) -> None:
        self.count += 1
        self.seen.append(self.count / 2)


def fit(root: Path, step: Any, **attributes: Any) -> tuple[Any, list[str]]:
    """Train three steps, capture after each, and return the model and the reported names."""
    told: list[str] = []
    seen: dict[str, Any] = {}

    def begin(trainer: Any, *_: Any) -> None:
        seen["now"] = Surroundings(trainer, told.append)
        seen["now"].watch_objects()

    def after(trainer: Any, model: Any, *_: Any) -> None:
        step(trainer, model, seen["now"])
        seen["now"].capture()

    hooks = callback(on_train_start=begin, on_train_batch_end=after)
    model = tiny_module()
    for name, value in attributes.items():
        setattr(hooks if name.startswith("on_callback_") else model, name, value)
    tiny_trainer(root, max_steps=3, callbacks=[hooks]).fit(model, tiny_loader())
    return model, told


def test_a_user_defined_object_is_restored(tmp_path: Path) -> None:
    kept: list[Packed] = []

    def step(trainer: Any, model: Any, surroundings: Surroundings) -> None:
        model.tracker.step()
        if trainer.global_step == 1:
            kept.append(pack(surroundings.capture()))
        if trainer.global_step == 3:
            model.tracker.resource = object()
            surroundings.apply(unpack(kept[0]))

    held = Tracker()
    model, told = fit(tmp_path, step, tracker=held)
    assert model.tracker is held
    assert (held.count, held.seen) == (1, [0.0, 0.5])
    assert held.resource is not None
    assert told == ["Tiny.tracker.resource"]


@pytest.mark.parametrize("name", ["tracker", "on_callback_tracker"])
def test_a_replaced_object_is_reported_once(name: str, tmp_path: Path) -> None:
    def step(trainer: Any, model: Any, _: Surroundings) -> None:
        owner = model if name == "tracker" else trainer.callbacks[0]
        setattr(owner, name, Tracker())

    _, told = fit(tmp_path, step, **{name: Tracker()})
    assert told == [f"Tiny.{name}" if name == "tracker" else f"callback 0 (Hooks).{name}"]


def test_a_change_in_an_installed_packages_object_is_reported_but_not_undone(tmp_path: Path) -> None:
    kept: list[Packed] = []

    class_of_package: Any = type(OmegaConf.create({}))
    held = class_of_package({"a": 1})

    def step(trainer: Any, model: Any, surroundings: Surroundings) -> None:
        if trainer.global_step == 1:
            kept.append(pack(surroundings.capture()))
        vars(model.config)["noted"] = trainer.global_step
        if trainer.global_step == 3:
            surroundings.apply(unpack(kept[0]))

    model, told = fit(tmp_path, step, config=held)
    assert not is_users_own(class_of_package)
    assert told == ["Tiny.config.noted"]
    assert vars(model.config)["noted"] == 3


def test_nothing_is_reported_if_nothing_changes(tmp_path: Path) -> None:
    def step(_: Any, model: Any, __: Surroundings) -> None:
        model.steps = [*getattr(model, "steps", []), 1]
        model.hidden = torch.ones(2)

    _, told = fit(tmp_path, step, tracker=Tracker(), ratio=Fraction(1, 2), inner=torch.nn.Linear(2, 2))
    assert told == []
