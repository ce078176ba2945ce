"""State that hooks change outside module, callbacks and datamodule is restored in a new process and in a survivor."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import BatchSampler, ConcatDataset, DataLoader, Dataset, RandomSampler, Sampler, Subset

from lightning_ckptless.formats.packing import pack, unpack
from lightning_ckptless.internals.lightning.loops import FitLoops
from lightning_ckptless.trainer.data.loader import make_resumable
from lightning_ckptless.trainer.data.position import attributes_now
from lightning_ckptless.trainer.state.host_state import HostState
from lightning_ckptless.trainer.state.surroundings import Surroundings
from tests.lab import parts
from tests.trainer.interrupted import interrupted, run
from tests.trainer.tiny import callback, tiny_module, tiny_trainer

OPTIONS = replace(parts.Options(), samples=16, epochs=3, scheduler="none")
"""Four batches an epoch; validation after each."""


class Curriculum(Dataset[Any]):
    """Samples with a changing difficulty, and a transform that counts its calls."""

    def __init__(self, samples: int = 16) -> None:
        self.samples, self.difficulty, self.transform = samples, 1.0, Counting()

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> Any:
        return self.transform(torch.full((6,), index / 16) * self.difficulty), torch.tensor(index % 3)


class Counting:
    """A function whose result changes with every call."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, value: Any) -> Any:
        self.calls += 1
        return value + 0.01 * self.calls if isinstance(value, torch.Tensor) else self.collated(value)

    def collated(self, samples: Any) -> Any:
        x, y = torch.utils.data.default_collate(samples)
        return x + 0.01 * self.calls, y


class Weighted(Sampler[int]):
    """Draws by weights, which are a tensor attribute."""

    def __init__(self, samples: int) -> None:
        self.weights = torch.ones(samples)

    def __iter__(self) -> Any:
        return iter(torch.multinomial(self.weights, len(self.weights), True).tolist())

    def __len__(self) -> int:
        return len(self.weights)


def train_data(model: Any, index: int = 0) -> Any:
    loaders = FitLoops(model.trainer).combined_loader.flattened
    return loaders[index]


class Programs:
    """Each changes something after every step. `data`, if present, replaces the lab's training data."""

    class Accumulation:
        @staticmethod
        def change(model: Any) -> None:
            model.trainer.accumulate_grad_batches = 1 + model.current_epoch

    class Clipping:
        @staticmethod
        def change(model: Any) -> None:
            model.trainer.gradient_clip_val = 0.5 / (1 + model.global_step)

    class MoreEpochs:
        @staticmethod
        def change(model: Any) -> None:
            model.trainer.fit_loop.max_epochs = 4

    class FewerSteps:
        @staticmethod
        def change(model: Any) -> None:
            model.trainer.fit_loop.epoch_loop.max_steps = 10

    class LimitedValidation:
        @staticmethod
        def change(model: Any) -> None:
            model.trainer.limit_val_batches = 1

    class LessFrequentValidation:
        @staticmethod
        def change(model: Any) -> None:
            model.trainer.check_val_every_n_epoch = 3

    class ValidationWithinEpoch:
        @staticmethod
        def change(model: Any) -> None:
            model.trainer.val_check_batch = 2

    class AttributeOfAnOptimizerWrapper:
        @staticmethod
        def change(model: Any) -> None:
            wrapper = model.optimizers()
            wrapper.seen = getattr(wrapper, "seen", 0) + 1
            model.trainer.gradient_clip_val = 1 / wrapper.seen

    class Curriculum:
        data = staticmethod(lambda: DataLoader(Curriculum(), 4, shuffle=True))

        @staticmethod
        def change(model: Any) -> None:
            train_data(model).dataset.difficulty += 0.1

    class CurriculumWithWorkers:
        data = staticmethod(lambda: DataLoader(ByDifficulty(), 4, shuffle=True, num_workers=1))

        @staticmethod
        def change(model: Any) -> None:
            train_data(model).dataset.difficulty += 0.1

    class NestedDatasets:
        @staticmethod
        def data() -> Any:
            return DataLoader(ConcatDataset([Subset(Curriculum(), range(8)), Curriculum(8)]), 4, shuffle=True)

        @staticmethod
        def change(model: Any) -> None:
            train_data(model).dataset.datasets[0].dataset.difficulty += 0.1

    class CountingCollate:
        data = staticmethod(lambda: DataLoader(parts.Numbers(16), 4, shuffle=True, collate_fn=Counting()))

        @staticmethod
        def change(model: Any) -> None:
            pass

    class GrowingBatches:
        @staticmethod
        def data() -> Any:
            numbers = parts.Numbers(32)
            return DataLoader(numbers, batch_sampler=BatchSampler(RandomSampler(numbers), 2, False))

        @staticmethod
        def change(model: Any) -> None:
            train_data(model).batch_sampler.batch_size += 1

    class WeightsFollowLosses:
        data = staticmethod(lambda: DataLoader(parts.Numbers(16), 4, sampler=Weighted(16)))

        @staticmethod
        def change(model: Any) -> None:
            train_data(model).sampler.weights[model.global_step % 16] *= 5

    class SeveralLoaders:
        @staticmethod
        def data() -> Any:
            return [DataLoader(Curriculum(), 4, shuffle=True), DataLoader(Curriculum(8), 4)]

        @staticmethod
        def change(model: Any) -> None:
            train_data(model, 0).dataset.difficulty += 0.1
            train_data(model, 1).dataset.transform.calls += 7

    class ValidationData:
        @staticmethod
        def change(model: Any) -> None:
            loader = FitLoops(model.trainer).validation_loader
            if loader is not None:
                loader.flattened[0].dataset.difficulty += 0.5

    class InitialSettingRequired:
        @staticmethod
        def begin(model: Any) -> None:
            # `GradientAccumulationScheduler` checks this when a fit starts, also in a new process.
            assert model.trainer.accumulate_grad_batches == 1

        @staticmethod
        def change(model: Any) -> None:
            model.trainer.accumulate_grad_batches = 1 + model.current_epoch

    class ObjectInTheModel:
        @staticmethod
        def begin(model: Any) -> None:
            model.layer_schedule = [Schedule()]

        @staticmethod
        def change(model: Any) -> None:
            model.trainer.gradient_clip_val = model.layer_schedule[0].next()


class Schedule:
    """A user-defined object with state in another user-defined object."""

    def __init__(self) -> None:
        self.steps, self.inner = 0, Counting()

    def next(self) -> float:
        self.steps += 1
        self.inner.calls += 2
        return 1 / (self.steps + self.inner.calls)


class ByDifficulty(Curriculum):
    """Has no counter, which would differ between the copies in worker processes."""

    def __getitem__(self, index: int) -> Any:
        return torch.full((6,), index / 16) * self.difficulty, torch.tensor(index % 3)


PROGRAMS = [name for name in vars(Programs) if not name.startswith("_")]
LONG = {"MoreEpochs", "FewerSteps", "LessFrequentValidation", "Clipping", "Curriculum", "AttributeOfAnOptimizerWrapper"}


def patch(program: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model_class, data_class = parts.model_class, parts.data_class

    def with_change(*args: Any) -> Any:
        class Changing(model_class(*args)):  # type: ignore[misc]
            def on_train_start(self) -> None:
                if hasattr(program, "begin"):
                    program.begin(self)

            def on_train_batch_end(self, *_: Any) -> None:
                program.change(self)

            def loss(self, batch: Any) -> Any:
                return super().loss(batch[0] if isinstance(batch[0], list) else batch)

        return Changing

    def with_data(*args: Any) -> Any:
        class Data(data_class(*args)):  # type: ignore[misc]
            def train_dataloader(self) -> Any:
                return program.data() if hasattr(program, "data") else super().train_dataloader()

            def val_dataloader(self) -> Any:
                return DataLoader(Curriculum(8), 4)

        return Data

    monkeypatch.setattr(parts, "model_class", with_change)
    monkeypatch.setattr(parts, "data_class", with_data)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.long) if name in LONG else name for name in PROGRAMS]
)
def test_a_new_process_continues_exactly(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    patch(getattr(Programs, name), monkeypatch)
    whole, _ = run(OPTIONS, tmp_path / "whole")
    at = next(version for version in whole.versions if version.optimizer_step >= 6)
    joined = interrupted(OPTIONS, tmp_path / "joined", at)
    assert joined.rows == whole.rows
    for key, tensor in whole.weights.items():
        assert torch.equal(tensor, joined.weights[key]), key
    assert joined.log_rows == whole.log_rows


def test_the_programs_change_what_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the test above could not fail."""
    patch(Programs.WeightsFollowLosses, monkeypatch)
    changed, _ = run(OPTIONS, tmp_path / "changed")
    monkeypatch.setattr(Programs.WeightsFollowLosses, "change", staticmethod(lambda _: None))
    unchanged, _ = run(OPTIONS, tmp_path / "unchanged")
    assert changed.rows != unchanged.rows


# ---------------------------------------------------------------------- in a survivor


def test_a_rolled_back_step_leaves_no_changes(tmp_path: Path) -> None:
    kept: dict[str, Any] = {}
    loader = DataLoader(Curriculum(), 4, sampler=Weighted(16))

    def step(trainer: Any, module: Any, *_: Any) -> None:
        if trainer.global_step == 1:
            kept["host_state"] = HostState(trainer)
            kept["state"] = pack(kept["host_state"].capture())
        if trainer.global_step == 2:
            trainer.accumulate_grad_batches, trainer.new = 3, 4
            trainer.fit_loop.max_epochs = 9
            module.optimizers().seen = 1
            kept["host_state"].apply(unpack(kept["state"]))
            assert (trainer.accumulate_grad_batches, trainer.fit_loop.max_epochs) == (1, 1)
            assert not hasattr(trainer, "new")
            assert not hasattr(module.optimizers(), "seen")

    trainer = tiny_trainer(tmp_path, max_steps=3, callbacks=[callback(on_train_batch_end=step)])
    model = tiny_module()
    model.layer = torch.nn.Linear(6, 1)
    trainer.fit(model, loader)
    assert kept


def test_a_replaced_object_is_reported_once(tmp_path: Path) -> None:
    told: list[str] = []
    seen: list[Any] = []

    def begin(trainer: Any, *_: Any) -> None:
        seen.append(Surroundings(trainer, told.append))

    def step(trainer: Any, *_: Any) -> None:
        if trainer.global_step == 2:
            trainer.train_dataloader.dataset.transform = Counting()
        attributes_now(FitLoops(trainer))
        seen[0].report_training_data()

    hooks = callback(on_train_start=begin, on_train_batch_end=step)
    model = tiny_module()
    model.layer = torch.nn.Linear(6, 1)
    trainer = tiny_trainer(tmp_path, max_steps=4, callbacks=[hooks])
    FitLoops(trainer).iterate_data_through(make_resumable)
    trainer.fit(model, DataLoader(Curriculum(), 4))
    assert told == ["train dataloader 0: loader.dataset.transform"]
