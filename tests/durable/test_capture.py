"""A version is copied consistently, however fast training overwrites it."""

from __future__ import annotations

import threading

import pytest

from lightning_ckptless.durable.capture import Captured, CopyBuffers, capture
from lightning_ckptless.errors import DurableError
from lightning_ckptless.protocol.versions import Version
from lightning_ckptless.replica.layout.layout import slot_views
from tests.replica.world import World


def values(captured: Captured) -> set[float]:
    found: set[float] = set()
    for shard, copy in enumerate(captured.shards):
        for view in slot_views(captured.layout, shard, copy.bulk):
            found |= {abs(float(value)) for value in view.flatten().tolist()}
    return found


def test_the_newest_committed_version_is_copied(world: World) -> None:
    for step in (1, 2, 3):
        world.submit(step)
        world.settle()
    captured = capture(world.arenas, CopyBuffers())
    assert captured.snapshot.version == Version(3, True)
    assert values(captured) == {3.0}
    assert [copy.blob for copy in captured.shards] == [b"blob 0 3", b"blob 1 3"]
    assert capture(world.arenas, CopyBuffers(), at=Version(2, True)).snapshot.version == Version(2, True)


def test_an_overwritten_version_is_reported_with_the_available_one(world: World) -> None:
    for step in (1, 2, 3):
        world.submit(step)
        world.settle()
    with pytest.raises(DurableError, match=r"step 1 is not in the arenas .* which hold step 3"):
        capture(world.arenas, CopyBuffers(), at=Version(1, True))


def test_empty_arenas_are_an_error(world: World) -> None:
    with pytest.raises(DurableError, match="the arenas are empty"):
        capture(world.arenas, CopyBuffers())


@pytest.mark.parametrize("checksum", ["xxh3", "none"])
def test_a_copy_never_mixes_versions(checksum: str, world: World) -> None:
    world.begin(checksum=checksum)
    stop = threading.Event()

    def train() -> None:
        step = 0
        while not stop.is_set():
            step += 1
            world.submit(step)
        world.settle()

    training = threading.Thread(target=train)
    training.start()
    buffers, seen = CopyBuffers(), set[int]()
    try:
        while len(seen) < 12:
            try:
                captured = capture(world.arenas, buffers, threads=2)
            except DurableError as error:
                assert "empty" in str(error) or "overwritten" in str(error)  # noqa: PT017
                continue
            step = captured.snapshot.version.optimizer_step
            assert values(captured) == {float(step)}
            assert {copy.blob for copy in captured.shards} == {f"blob {rank} {step}".encode() for rank in (0, 1)}
            seen.add(step)
    finally:
        stop.set()
        training.join()


def test_a_damaged_replica_is_skipped(world: World) -> None:
    world.submit(1)
    world.settle()
    (own,) = world.arenas[0].path.glob("shard-0000.held-by-0000.*slot-0")
    with own.open("r+b") as file:
        file.seek(4096)
        file.write(b"\1")
    assert values(capture(world.arenas, CopyBuffers())) == {1.0}
    (kept,) = world.arenas[1].path.glob("shard-0000.held-by-0001.*slot-0")
    with kept.open("r+b") as file:
        file.seek(4096)
        file.write(b"\1")
    with pytest.raises(DurableError, match="damaged"):
        capture(world.arenas, CopyBuffers())
