"""Generators of augmentations are found where they are held, and restored."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, RandomSampler, Subset

from lightning_ckptless.formats.packing import pack, unpack
from lightning_ckptless.trainer.data.dataset_generators import DatasetGenerators, LoaderGenerators
from lightning_ckptless.trainer.data.loader import holders, make_resumable, tracker_of


class Noise:
    """An augmentation with generators of its own, of which it creates one with the first sample."""

    __slots__ = ("array", "late", "text")

    def __init__(self) -> None:
        self.text, self.array = random.Random(3), np.random.default_rng(3)
        self.late: torch.Generator | None = None

    def __call__(self, value: float) -> float:
        if self.late is None:
            self.late = torch.Generator().manual_seed(3)
        return value + self.text.random() + float(self.array.random()) + float(torch.rand((), generator=self.late))


class Augmented(Dataset[float]):
    """Numbers with noise."""

    def __init__(self) -> None:
        self.steps = [Noise(), Noise()]

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> float:
        return self.steps[1](self.steps[0](index))


class Collate:
    """Adds noise to a batch."""

    def __init__(self) -> None:
        self.noise = Noise()

    def __call__(self, samples: list[float]) -> list[float]:
        return [self.noise(sample) for sample in samples]


def make_loader(workers: int = 0) -> DataLoader[Any]:
    return DataLoader(
        Subset(Augmented(), range(8)), 2, collate_fn=Collate(), num_workers=workers,
        multiprocessing_context="fork" if workers else None,
    )  # fmt: skip


def test_generators_continue_in_a_new_process() -> None:
    first = make_loader()
    held = DatasetGenerators(first.dataset, first.collate_fn)
    batches = iter(first)
    next(batches)
    saved = pack(held.capture())
    expected = next(batches)
    for loader in (first, make_loader()):
        DatasetGenerators(loader.dataset, loader.collate_fn).apply(unpack(saved))
        assert loader.collate_fn([loader.dataset[index] for index in (2, 3)]) == expected


@pytest.mark.parametrize("workers", [0, 1])
def test_a_resumed_loader_draws_the_same(workers: int) -> None:
    first = make_resumable(make_loader(workers))
    batches = iter(first)
    taken = [next(batches), next(batches)]
    tracker: Any = tracker_of(first)
    position = unpack(pack(tracker.position(0)))
    rest = list(batches)
    second = make_resumable(make_loader(workers))
    tracker_of(second).resume = position  # type: ignore[union-attr]
    assert list(second) == rest
    assert len(taken) + len(rest) == 4


def test_a_validation_loader_begins_as_it_would_have() -> None:
    def make() -> tuple[DataLoader[Any], LoaderGenerators]:
        data = Augmented()
        sampler = RandomSampler(data, generator=torch.Generator().manual_seed(3))
        loader = DataLoader(data, 2, sampler=sampler, generator=torch.Generator().manual_seed(4))
        return loader, LoaderGenerators(loader, holders(loader))

    first, held = make()
    list(first)
    saved = pack(held.capture())
    expected = [batch.tolist() for batch in first]
    second, held = make()
    held.apply(unpack(saved))
    assert [batch.tolist() for batch in second] == expected
