"""Objects that hooks keep state in are restored if their class is user code, and reported if a change is lost."""

from __future__ import annotations

import itertools
import sys
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torchmetrics
from omegaconf import OmegaConf

from lightning_ckptless.formats.packing import pack, unpack
from lightning_ckptless.formats.pickles import Packed
from lightning_ckptless.trainer.state import program_variables
from lightning_ckptless.trainer.state.surroundings import Surroundings
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


@pytest.mark.parametrize("observes", [False, True])
def test_an_observer_is_not_part_of_the_run(tmp_path: Path, observes: bool) -> None:
    captured: list[Any] = []

    def begin(trainer: Any, *_: Any) -> None:
        captured.append(Surroundings(trainer))
        captured[0].watch_objects()

    def after(*_: Any) -> None:
        hooks.tracker.step()
        captured.append(captured[0].capture()["objects"]["own"])

    hooks = callback(on_train_start=begin, on_train_batch_end=after)
    hooks.tracker = Tracker()
    if observes:
        type(hooks).ckptless_observer = True
    tiny_trainer(tmp_path, max_steps=1, callbacks=[hooks]).fit(tiny_module(), tiny_loader())
    assert any("tracker" in path for path in captured[1]) == (not observes)


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
    assert not program_variables.is_users_module(class_of_package.__module__)
    assert told == ["Tiny.config.noted"]
    assert vars(model.config)["noted"] == 3


def test_nothing_is_reported_if_nothing_changes(tmp_path: Path) -> None:
    def step(_: Any, model: Any, __: Surroundings) -> None:
        model.steps = [*getattr(model, "steps", []), 1]
        model.hidden = torch.ones(2)

    _, told = fit(tmp_path, step, tracker=Tracker(), ratio=Fraction(1, 2), inner=torch.nn.Linear(2, 2))
    assert told == []


STEPS = 0
SEEN: list[int] = []
COUNTED: dict[str, Tracker] = {"of the module": Tracker()}


class Counting:
    """Counts in its class and in its module."""

    calls = 0

    def step(self) -> None:
        global STEPS  # noqa: PLW0603
        STEPS += 1
        SEEN.append(STEPS)
        COUNTED["of the module"].step()
        Counting.calls += 1


def test_variables_of_classes_and_modules_are_restored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for owner, name in ((sys.modules[__name__], "STEPS"), (Counting, "calls")):
        monkeypatch.setattr(owner, name, getattr(owner, name))
    kept: list[Packed] = []
    seen = SEEN

    def step(trainer: Any, model: Any, surroundings: Surroundings) -> None:
        model.counting.step()
        kept.append(pack(surroundings.capture()))
        if trainer.global_step == 3:
            surroundings.apply(unpack(kept[1]))

    _, told = fit(tmp_path, step, counting=Counting())
    assert told == []
    assert (STEPS, SEEN, Counting.calls, COUNTED["of the module"].count) == (2, [1, 2], 2, 2)
    assert SEEN is seen


def test_state_in_the_closure_of_a_hook_is_restored(tmp_path: Path) -> None:
    calls = 0
    kept: list[Packed] = []
    inner = torch.nn.Identity()

    def hook(*_: Any) -> None:
        nonlocal calls
        calls += 1

    def step(trainer: Any, model: Any, surroundings: Surroundings) -> None:
        model.inner(torch.ones(1))
        kept.append(pack(surroundings.capture()))
        if trainer.global_step == 3:
            surroundings.apply(unpack(kept[0]))

    inner.register_forward_hook(hook)
    _, told = fit(tmp_path, step, inner=inner)
    assert (told, calls) == ([], 1)


class Caching:
    """Has positions of which one can be read."""

    def __init__(self) -> None:
        self.numbers, self.iterators = (number for number in range(9)), {"a": itertools.cycle([1, 2])}
        self.readable = itertools.count()


def test_what_cannot_be_read_is_named_before_it_changes(tmp_path: Path) -> None:
    found: list[str] = []
    with (tmp_path / "lines").open("w") as file:
        fit(tmp_path, lambda _, __, now: found.extend(now.unreadable()), caching=Caching(), on_callback_file=file)
    names = {"caching.numbers", "caching.iterators['a']", "on_callback_file"}
    assert {name.split(".", 1)[1] for name in found} == names


def test_iterators_and_functions_set_in_training_are_named(tmp_path: Path) -> None:
    def step(_: Any, model: Any, __: Surroundings) -> None:
        model.batches, model.made = iter(tiny_loader()), Tracker if model.made is None else None
        # Lightning does the same.
        model.forward = model.forward

    _, told = fit(tmp_path, step, made=None)
    assert sorted(told) == ["Tiny.batches", "Tiny.made"]


class Average:
    """The average of a model's weights, as many scripts keep it."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.shadow = {name: p.detach().clone() for name, p in model.named_parameters()}

    def follow(self) -> None:
        for name in self.shadow:
            self.shadow[name] = self.shadow[name] + 1


@pytest.mark.parametrize("width", [20, 200], ids=["small", "large"])
def test_an_average_in_a_dictionary_is_restored(width: int, tmp_path: Path) -> None:
    kept: list[Packed] = []
    average = Average(torch.nn.Linear(width, width))
    first = float(average.shadow["weight"][0, 0])

    def step(trainer: Any, model: Any, surroundings: Surroundings) -> None:
        model.average.follow()
        kept.append(pack(surroundings.capture()))
        if trainer.global_step == 3:
            surroundings.apply(unpack(kept[0]))

    _, told = fit(tmp_path, step, average=average)
    assert told == []
    assert float(average.shadow["weight"][0, 0]) == pytest.approx(first + 1)


def test_an_average_too_large_to_be_captured_is_reported(tmp_path: Path) -> None:
    _, told = fit(tmp_path, lambda _, model, __: model.average.follow(), average=Average(torch.nn.Linear(1500, 1500)))
    assert told == ["Tiny.average.shadow"]


# ---------------------------------------------------------------------- objects of torch


class Probe:
    """A layer with an optimizer and a scheduler of its own."""

    def __init__(self) -> None:
        self.layer = torch.nn.Linear(2, 1)
        self.optimizer = torch.optim.Adam(self.layer.parameters(), 0.1)
        self.scheduler = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.5)

    def step(self) -> None:
        for parameter in self.layer.parameters():
            parameter.grad = torch.ones_like(parameter)
        self.optimizer.step()
        self.scheduler.step()

    def state(self) -> Any:
        return pack([part.state_dict() for part in (self.layer, self.optimizer, self.scheduler)])


@pytest.mark.parametrize("back_to", [0, 1], ids=["before its first step", "after it"])
def test_an_optimizer_that_the_trainer_does_not_know_is_restored(back_to: int, tmp_path: Path) -> None:
    kept: list[tuple[Packed, Packed]] = []
    probe = Probe()

    def step(trainer: Any, model: Any, surroundings: Surroundings) -> None:
        kept.append((pack(surroundings.capture()), probe.state()))
        model.probe[0].step()
        if trainer.global_step == 3:
            surroundings.apply(unpack(kept[back_to][0]))
            assert probe.state() == kept[back_to][1]

    _, told = fit(tmp_path, step, probe=[probe])
    assert len(kept) == 3 and told == []


@pytest.mark.parametrize(("width", "reported"), [(2, []), (1500, ["Tiny.teacher[0]"])], ids=["small", "large"])
def test_a_teacher_in_a_list_is_restored_or_reported(width: int, reported: list[str], tmp_path: Path) -> None:
    kept: list[Packed] = []
    teacher = torch.nn.Linear(width, width)
    first = teacher.bias.detach().clone()

    def step(trainer: Any, model: Any, surroundings: Surroundings) -> None:
        kept.append(pack(surroundings.capture()))
        model.teacher[0].bias.data.add_(1)
        if trainer.global_step == 3:
            surroundings.apply(unpack(kept[0]))

    _, told = fit(tmp_path, step, teacher=[teacher], still=(torch.nn.Linear(2, 2),))
    assert told == reported
    assert torch.equal(teacher.bias, first) is (not reported)


def test_a_module_that_was_added_is_reported(tmp_path: Path) -> None:
    _, told = fit(tmp_path, lambda _, model, __: model.parts.append(torch.nn.ReLU()), parts=torch.nn.ModuleList())
    assert told == ["Tiny.parts.0", "Tiny.parts.1", "Tiny.parts.2"]


def test_generators_and_metrics_in_containers_are_restored(tmp_path: Path) -> None:
    kept: list[Packed] = []
    held: dict[str, Any] = {"noise": torch.Generator().manual_seed(1), "sums": [torchmetrics.SumMetric()]}

    def draw() -> tuple[float, float]:
        held["sums"][0].update(1.0)
        return float(torch.rand((), generator=held["noise"])), float(held["sums"][0].compute())

    drawn: list[tuple[float, float]] = []

    def step(trainer: Any, _: Any, surroundings: Surroundings) -> None:
        if trainer.global_step == 3:
            surroundings.apply(unpack(kept[0]))
        kept.append(pack(surroundings.capture()))
        drawn.append(draw())

    fit(tmp_path, step, held=held)
    assert drawn[2] == drawn[0] != drawn[1]


def test_what_the_sanity_check_changed_is_restored_where_none_runs(tmp_path: Path) -> None:
    model, trainer = tiny_module(), tiny_trainer(tmp_path)
    model.tracker = Tracker()
    trainer.strategy.connect(model)
    first = Surroundings(trainer)
    model.tracker.step()
    model.tracker.resource = object()
    first.watch_objects()
    saved = first.capture()
    model.tracker = Tracker()
    second = Surroundings(trainer)
    second.watch_objects()
    second.apply(unpack(pack(saved)))
    assert (model.tracker.count, model.tracker.seen, saved["objects"]["own"].keys()) == (
        1,
        [0.0, 0.5],
        {"Tiny.tracker"},
    )
