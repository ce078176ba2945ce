"""Fixtures based on the simulated ranks of `tests.replica`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from lightning_ckptless.durable.capture import Captured, CopyBuffers, capture
from lightning_ckptless.durable.folder import Manifest, ShardFacts
from lightning_ckptless.replica.arena import Owner
from tests.replica.world import World


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    """Two ranks with arenas and layouts."""
    made = World(tmp_path, Owner.of(os.getpid()), 2)
    for arena in made.arenas:
        arena.write_layout(made.layout())
    yield made.begin()
    made.close()
    for arena in made.arenas:
        arena.close()


@pytest.fixture
def captured(world: World) -> Captured:
    """A copy of step 3."""
    for step in (1, 2, 3):
        world.submit(step)
        world.settle()
    return capture(world.arenas, CopyBuffers())


def manifest_of(captured: Captured) -> Manifest:
    """Build the manifest that a writer would write."""
    shards = tuple(ShardFacts(s.bulk.numel(), len(s.blob), s.checksum) for s in captured.shards)
    return Manifest("run", captured.snapshot, shards, None, None, 1.0)
