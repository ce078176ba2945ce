"""Dataloaders of every kind: they differ in what draws their order and noise, and where."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    WeightedRandomSampler,
)

from tests.lab.parts import Numbers, SizedStream, Stream

SAMPLES = 10
BATCHES = 5


class OwnNoise(Numbers):
    """Adds noise from the dataset's own generators."""

    def __init__(self, samples: int = SAMPLES) -> None:
        super().__init__(samples)
        self.python, self.numpy = random.Random(1), np.random.default_rng(2)
        self.torch = torch.Generator().manual_seed(3)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        noise = self.python.random() + self.numpy.random() + torch.rand(1, generator=self.torch)
        return noise, torch.tensor(index)


class Shuffled(Sampler[int]):
    """Draws the order of an epoch from its own generator, and counts epochs."""

    def __init__(self) -> None:
        self.generator, self.epochs = random.Random(5), 0

    def __len__(self) -> int:
        return SAMPLES

    def __iter__(self) -> Iterator[int]:
        self.epochs += 1
        order = [*range(SAMPLES)] if self.epochs % 2 else [*range(0, SAMPLES, 2)] * 2
        self.generator.shuffle(order)
        return iter(order)


class EachIndexDrawn(Sampler[int]):
    """Draws indices one at a time from the global generator, interleaved with other draws."""

    def __len__(self) -> int:
        return SAMPLES

    def __iter__(self) -> Iterator[int]:
        return (random.randrange(SAMPLES) for _ in range(SAMPLES))


class EarlyBatches(Sampler[list[int]]):
    """Draws its order when its iterator is created, not at the first index."""

    def __len__(self) -> int:
        return BATCHES

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(SAMPLES).tolist()
        return iter([order[i : i + 2] for i in range(0, SAMPLES, 2)])


class ShuffledStream(IterableDataset[torch.Tensor]):
    """Draws the order of an epoch from its own generator."""

    def __init__(self) -> None:
        self.generator = random.Random(7)

    def __iter__(self) -> Iterator[torch.Tensor]:
        order = [*range(SAMPLES)]
        self.generator.shuffle(order)
        return (torch.tensor(i) for i in order)


class OwnIteration(DataLoader[Any]):
    """A loader that overrides `__iter__`."""

    def __iter__(self) -> Any:
        for batch in super().__iter__():
            yield "mine", batch


class Reread(DataLoader[Any]):
    """Iterates with a generator function, and restores its position by reading the batches again."""

    done = start = 0

    def __iter__(self) -> Any:
        start, self.start = self.start, 0
        for number, batch in enumerate(super().__iter__()):
            if number >= start:
                self.done = number + 1
                yield batch

    def state_dict(self) -> dict[str, Any]:
        return {"done": self.done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.start = state["done"]


class OwnPosition(IterableDataset[torch.Tensor]):
    """Draws the order of an epoch at the first sample, and restores its position without reading earlier samples."""

    def __init__(self, noise: float = 0.0) -> None:
        self.at, self.noise = 0, noise

    def __iter__(self) -> Iterator[torch.Tensor]:
        order = torch.randperm(SAMPLES) if not self.noise else torch.arange(SAMPLES)
        self.at %= SAMPLES
        while self.at < SAMPLES:
            self.at += 1
            yield order[self.at - 1] + (self.noise * torch.rand(()) if self.noise else 0)

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = state["at"]


def own_position(noise: float = 0.0) -> Any:
    from torchdata.stateful_dataloader import StatefulDataLoader

    return StatefulDataLoader(OwnPosition(noise), batch_size=2)


def collate_with_noise(samples: Any) -> Any:
    return torch.stack([x for x, _ in samples]) + torch.rand(1) + random.random(), [int(y) for _, y in samples]


def noisy(samples: Any) -> Any:
    return torch.rand(1), samples


def init_with_noise(worker_id: int) -> None:
    np.random.seed(int(torch.randint(1000, (1,))) + worker_id)


def stateful(**options: Any) -> Any:
    from torchdata.stateful_dataloader import StatefulDataLoader

    return StatefulDataLoader(Numbers(SAMPLES), batch_size=2, **options)


def numbered(**options: Any) -> DataLoader[Any]:
    return DataLoader(Numbers(SAMPLES), **({"batch_size": 2} | options))


def own_generator(**options: Any) -> DataLoader[Any]:
    return numbered(shuffle=True, generator=torch.Generator().manual_seed(11), **options)


LOADERS: dict[str, Callable[[], DataLoader[Any]]] = {
    "in order": numbered,
    "shuffled": lambda: numbered(shuffle=True),
    "own generator": own_generator,
    "with replacement": lambda: numbered(sampler=RandomSampler(range(SAMPLES), replacement=True)),
    "weighted": lambda: numbered(sampler=WeightedRandomSampler([1.0] * SAMPLES, SAMPLES)),
    "distributed": lambda: numbered(sampler=DistributedSampler(range(2 * SAMPLES), 2, 1)),  # type: ignore[arg-type]
    "batch sampler": lambda: DataLoader(
        Numbers(SAMPLES), batch_sampler=BatchSampler(RandomSampler(range(SAMPLES)), 2, drop_last=True)
    ),
    "early batches": lambda: DataLoader(Numbers(SAMPLES), batch_sampler=EarlyBatches()),
    "list as sampler": lambda: numbered(sampler=[3, 1, 4, 1, 5, 9, 2, 6, 5, 3]),
    "sampler with its own generator": lambda: numbered(sampler=Shuffled()),
    "index after index": lambda: numbered(sampler=EachIndexDrawn()),
    "dataset with its own generators": lambda: DataLoader(OwnNoise(), batch_size=2, shuffle=True),
    "no batches": lambda: DataLoader(Numbers(BATCHES), batch_size=None, shuffle=True),
    "own collate": lambda: numbered(shuffle=True, collate_fn=collate_with_noise),
    "iterable": lambda: DataLoader(Stream(SAMPLES, 0, 1), batch_size=2),
    "sized iterable": lambda: DataLoader(SizedStream(SAMPLES, 0, 1), batch_size=2),
    "iterable with its own generator": lambda: DataLoader(ShuffledStream(), batch_size=2),
    "own iteration": lambda: OwnIteration(Numbers(SAMPLES), batch_size=2, shuffle=True),
    "stateful": lambda: stateful(shuffle=True),
    "stateful generator": lambda: Reread(Stream(SAMPLES, 0, 1), batch_size=2),
    "stateful generator, noise": lambda: Reread(Stream(SAMPLES, 0, 1), batch_size=2, collate_fn=noisy),
    "stateful generator, own shuffling": lambda: Reread(ShuffledStream(), batch_size=2),
    "stateful dataset, noise": lambda: own_position(noise=1.0),
}
WORKERS: dict[str, Callable[[], DataLoader[Any]]] = {
    "one": lambda: numbered(shuffle=True, num_workers=1),
    "two": lambda: numbered(shuffle=True, num_workers=2),
    "two, own generator": lambda: own_generator(num_workers=2),
    "two, persistent": lambda: numbered(shuffle=True, num_workers=2, persistent_workers=True),
    "two, persistent, early batches": lambda: DataLoader(
        OwnNoise(), batch_sampler=EarlyBatches(), num_workers=2, persistent_workers=True
    ),
    "two, own start and collate": lambda: numbered(
        shuffle=True, num_workers=2, worker_init_fn=init_with_noise, collate_fn=collate_with_noise
    ),
    "two, iterable": lambda: DataLoader(Stream(SAMPLES, 0, 1), batch_size=2, num_workers=2),
}
