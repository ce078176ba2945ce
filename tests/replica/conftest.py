"""Fixtures for the tests of replicas: arenas, states and small worlds."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol, TypeVar

import pytest
import torch

from lightning_ckptless.protocol.versions import Version
from lightning_ckptless.replica.arena import Arena, Owner
from lightning_ckptless.replica.slot_stamp import Stamp
from tests.replica.world import MakeWorld, World

T = TypeVar("T")


class Together(Protocol):
    """Runs one function per rank, each in a thread, and returns their results."""

    def __call__(self, world_size: int, body: Callable[[int], T]) -> list[T]: ...


@pytest.fixture
def owner() -> Owner:
    """The process of the test, as an owner."""
    return Owner.of(os.getpid())


@pytest.fixture
def arena(tmp_path: Path, owner: Owner) -> Iterator[Arena]:
    """An empty arena."""
    made = Arena.create(tmp_path, "run", "node0", owner)
    yield made
    made.close()


@pytest.fixture
def stamp() -> Stamp:
    """The stamp of a test slot."""
    return Stamp(Version(3, True), generation=1, world_size=2, layout="ab" * 32, shard=0, holder=1)


@pytest.fixture
def together() -> Together:
    """See `Together`."""

    def run(world_size: int, body: Callable[[int], T]) -> list[T]:
        with ThreadPoolExecutor(world_size, thread_name_prefix="rank") as pool:
            return list(pool.map(body, range(world_size)))

    return run


@pytest.fixture
def world(tmp_path: Path, owner: Owner) -> Iterator[MakeWorld]:
    """Makes worlds and closes them."""
    made: list[World] = []

    def make(world_size: int, *, copies: int = 1) -> World:
        made.append(World(tmp_path, owner, world_size, copies=copies))
        return made[-1]

    yield make
    for one in made:
        one.close()
        for arena in one.arenas:
            arena.close()


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    """Tensors of every kind that a state may contain."""
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(300, 70, generator=generator)
    return {
        "weight": wide,
        "turned": torch.randn(40, 50, generator=generator).t(),
        "strided": torch.randn(64, 8, generator=generator)[:, ::2],
        "scalar": torch.tensor(3.5),
        "step": torch.tensor(7, dtype=torch.int64),
        "empty": torch.empty(0, 4),
        "flags": torch.rand(33, generator=generator) > 0.5,
        "half": torch.randn(129, generator=generator).to(torch.bfloat16),
        "wave": torch.randn(9, 5, dtype=torch.complex64, generator=generator),
        "small": torch.randint(-128, 127, (77,), dtype=torch.int8, generator=generator),
    }
