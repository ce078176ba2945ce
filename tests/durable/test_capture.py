"""A version is read whole or not at all, however fast it is overwritten."""

from __future__ import annotations

import threading

import pytest

from lightning_ckptless.durable.capture import Captured, Room, capture
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


def test_the_newest_committed_version(world: World) -> None:
    for step in (1, 2, 3):
        world.submit(step)
        world.settle()
    captured = capture(world.arenas, Room())
    assert captured.snapshot.version == Version(3, True)
    assert values(captured) == {3.0}
    assert [copy.blob for copy in captured.shards] == [b"blob 0 3", b"blob 1 3"]
    assert capture(world.arenas, Room(), at=Version(2, True)).snapshot.version == Version(2, True)


def test_a_version_that_is_gone_is_named_with_the_one_that_is_there(world: World) -> None:
    for step in (1, 2, 3):
        world.submit(step)
        world.settle()
    with pytest.raises(DurableError, match=r"step 1 is not in the arenas .* they hold step 3"):
        capture(world.arenas, Room(), at=Version(1, True))


def test_nothing_was_committed(world: World) -> None:
    with pytest.raises(DurableError, match="the arenas are empty"):
        capture(world.arenas, Room())


@pytest.mark.parametrize("checksum", ["xxh3", "none"])
def test_never_a_mixture_while_training_overwrites(checksum: str, world: World) -> None:
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
    room, seen = Room(), set[int]()
    try:
        while len(seen) < 12:
            try:
                captured = capture(world.arenas, room, threads=2)
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


def test_a_damaged_replica_is_passed_over_for_another(world: World) -> None:
    world.submit(1)
    world.settle()
    (own,) = world.arenas[0].path.glob("shard-0000.kept-by-0000.*slot-0")
    with own.open("r+b") as file:
        file.seek(4096)
        file.write(b"\1")
    assert values(capture(world.arenas, Room())) == {1.0}
    (kept,) = world.arenas[1].path.glob("shard-0000.kept-by-0001.*slot-0")
    with kept.open("r+b") as file:
        file.seek(4096)
        file.write(b"\1")
    with pytest.raises(DurableError, match="damaged"):
        capture(world.arenas, Room())
