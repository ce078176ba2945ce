"""A restored version gets its missing copies before the previous version is overwritten."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from lightning_ckptless.errors import StateMissingError, TransportError
from lightning_ckptless.protocol.versions import Complete, SlotState, Version
from lightning_ckptless.replica.arena import Arena, Owner
from lightning_ckptless.replica.rereplicate import Rereplicated, rereplicate
from lightning_ckptless.replica.restore import choose, fetch
from lightning_ckptless.replica.slot import HEADER_BYTES
from lightning_ckptless.replica.transport import LoopbackTransport, Message, Transport
from tests.replica.conftest import Together
from tests.replica.world import MakeWorld, StopError, World, stop_at

Wrap = Callable[[LoopbackTransport], Transport]


def names(world: World) -> list[str]:
    return [arena.node for arena in world.arenas]


def everything(world: World) -> dict[int, range]:
    return dict.fromkeys(range(world.size), range(world.size))


def restored_by(world: World, together: Together) -> list[Complete]:
    transports = LoopbackTransport.world(world.size)

    def body(rank: int) -> Complete:
        found = choose(world.arenas[rank], transports[rank], names(world), need=everything(world))
        assert isinstance(found, Complete)
        return found

    return together(world.size, body)


def fill_in(
    world: World, together: Together, found: list[Complete] | None = None, wrap: Wrap | None = None
) -> list[Rereplicated]:
    """Rereplicate the restored version, and return the results of all ranks."""
    found = found or restored_by(world, together)
    transports = LoopbackTransport.world(world.size)

    def body(rank: int) -> Rereplicated:
        transport = wrap(transports[rank]) if wrap else transports[rank]
        return rereplicate(found[rank], world.arenas[rank], transport, names(world), world.placement)

    results = together(world.size, body)
    assert all(result == results[0] for result in results)
    return results


def write_without_copies(world: World) -> World:
    """Commit step 1, and stop all writers of step 2 before they send anything, so that it has no copies."""
    world.begin(probes={rank: stop_at("send", 2) for rank in range(world.size)})
    write_alone(world, 1, 2)
    assert world.newest() == 2
    assert {world.newest(without=[lost]) for lost in range(world.size)} == {1}
    return world


def mirrored(world: World, *steps: int) -> World:
    """Commit versions and end their generation."""
    world.begin()
    for step in steps:
        world.submit(step)
    assert set(world.settle()) == {Version(steps[-1], True)}
    world.close()
    return world


def write_alone(world: World, *steps: int) -> None:
    """Mirror versions, the last of which is not sent."""
    for step in steps[:-1]:
        world.submit(step)
        assert world.settle() == [Version(step, True)] * world.size
    world.submit(steps[-1])
    for mirror in world.mirrors:
        with pytest.raises(StopError):
            mirror.settle()
    world.close()


def lose(world: World, rank: int, folder: Path, owner: Owner) -> None:
    """Replace the arena of a rank by an empty one."""
    world.arenas[rank].remove()
    world.arenas[rank] = Arena.create(folder, "run", f"node{rank}", owner)


def damage(world: World, rank: int, shard: int) -> None:
    """Flip a byte of the newest copy of a shard in an arena."""
    arena = world.arenas[rank]
    newest = max((r for r in arena.inventory() if r.shard == shard), key=lambda replica: replica.version)
    (path,) = arena.path.glob(f"shard-{shard:04d}.held-by-{rank:04d}.*.slot-{newest.slot}")
    with path.open("r+b") as file:
        file.seek(HEADER_BYTES + 9)
        byte = file.read(1)
        file.seek(HEADER_BYTES + 9)
        file.write(bytes([byte[0] ^ 1]))


def contents(world: World) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for arena in world.arenas for path in arena.path.glob("shard-*")}


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("replenished", [False, True])
def test_overwriting_the_last_version_with_all_copies(
    world: MakeWorld, together: Together, size: int, replenished: bool
) -> None:
    """Restore a version that lacks copies, overwrite the previous one with the next, and lose an arena."""
    ranks = write_without_copies(world(size))
    if replenished:
        fill_in(ranks, together)
    ranks.begin(committed=Version(2, True), probes={rank: stop_at("send", 3) for rank in range(size)})
    write_alone(ranks, 3)
    assert ranks.newest() == 3
    for lost in range(size):
        assert ranks.newest(without=[lost]) == (2 if replenished else None)
        if replenished:
            assert ranks.values(without=[lost]) == {2.0}


@pytest.mark.parametrize(("size", "copies"), [(2, 1), (3, 1), (3, 2)])
def test_missing_copies_are_filled_in_and_committed(
    world: MakeWorld, together: Together, size: int, copies: int
) -> None:
    ranks = world(size, copies=copies)
    (result, *_) = fill_in(write_without_copies(ranks), together)
    assert result.pairs == tuple((s, holder) for s in range(size) for holder in sorted(ranks.placement.holders[s]))
    assert (
        result.copied_bytes
        == result.sent_bytes
        == copies * sum(ranks.layout().bulk_bytes(shard) + len(f"blob {shard} 2") for shard in range(size))
    )
    assert result.reason.startswith(f"filled in {copies * size} missing copies of step 2")
    assert all(ranks.values(without=[lost]) == {2.0} for lost in range(size))
    lines = [line for arena in ranks.arenas for line in arena.inventory()]
    assert {(line.version.optimizer_step, line.generation) for line in lines} == {(1, 1), (2, 1)}
    assert all(line.state is SlotState.COMMITTED for line in lines if line.shard != line.holder)


def test_a_node_that_came_back_empty_gets_its_copies_before_the_first_step(
    world: MakeWorld, together: Together, tmp_path: Path, owner: Owner
) -> None:
    ranks = mirrored(world(3), 1, 2)
    lose(ranks, 1, tmp_path, owner)
    (result, *_) = fill_in(ranks, together)
    sources = ranks.placement.sources(1)
    assert result.pairs == tuple(sorted((shard, 1) for shard in (1, *sources)))
    assert all(ranks.newest(without=[lost]) == 2 for lost in range(3))
    assert ranks.values(without=[0]) == {2.0}
    ranks.begin(committed=Version(2, True)).submit(3)
    assert ranks.settle() == [Version(3, True)] * 3
    assert ranks.values() == {3.0}


class _FailingTransport(LoopbackTransport):
    """A transport on which every call fails."""

    def exchange(self, sends: object, receives: object) -> None:
        raise AssertionError("nothing is to be sent")

    def gather(self, payload: bytes) -> list[bytes]:
        raise AssertionError("nothing is to be asked")


def test_nothing_is_sent_if_no_copy_is_absent(world: MakeWorld, together: Together) -> None:
    ranks = mirrored(world(2), 1, 2)
    found, before = restored_by(ranks, together), contents(ranks)
    silent = _FailingTransport.world(2)
    (result, _) = fill_in(ranks, together, found, wrap=lambda transport: silent[transport.rank])
    assert result == Rereplicated(0, 0, (), "step 2 has all its copies")
    assert contents(ranks) == before


class _ClosingTransport:
    """A transport that closes at some moment; ranks that wait for this one get an error and close too."""

    def __init__(self, inner: LoopbackTransport, moment: str) -> None:
        self._inner, self._moment = inner, moment
        self.rank, self.world_size = inner.rank, inner.world_size

    def _die(self, moment: str) -> None:
        if moment == self._moment:
            raise TransportError(f"rank {self.rank} dies: {moment}")

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> None:
        self._die("before exchange")
        self._inner.exchange(sends, receives)
        self._die("after exchange")

    def gather(self, payload: bytes) -> list[bytes]:
        self._die("before gather")
        return self._inner.gather(payload)

    def vote(self, mine: int) -> int:
        return self._inner.vote(mine)

    def agree(self, mine: bool) -> bool:
        self._die("before agree")
        agreed = self._inner.agree(mine)
        self._die("after agree")
        return agreed

    def close(self) -> None:
        self._inner.close()


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize(
    "moment", ["before gather", "before exchange", "after exchange", "before agree", "after agree"]
)
def test_a_crash_during_rereplication_leaves_both_versions(
    world: MakeWorld, together: Together, moment: str, victim: int
) -> None:
    ranks = write_without_copies(world(2))
    found = restored_by(ranks, together)
    transports = LoopbackTransport.world(2)

    def body(rank: int) -> bool:
        transport: Transport = _ClosingTransport(transports[rank], moment) if rank == victim else transports[rank]
        try:
            rereplicate(found[rank], ranks.arenas[rank], transport, names(ranks), ranks.placement)
        except TransportError:
            transport.close()
            return False
        return True

    ended = together(2, body)
    assert not ended[victim] and ended[1 - victim] == (moment == "after agree")
    assert ranks.newest() == 2
    for lost in (0, 1):
        newest = ranks.newest(without=[lost])
        assert newest in (1, 2) and ranks.values(without=[lost]) == {float(newest)}
    fill_in(ranks, together)
    assert [ranks.newest(without=[lost]) for lost in (0, 1)] == [2, 2]


def test_restored_mappings_are_not_modified(world: MakeWorld, together: Together) -> None:
    ranks = write_without_copies(world(2))
    found = restored_by(ranks, together)
    transports = LoopbackTransport.world(2)
    need = everything(ranks)
    fetched = together(
        2, lambda rank: fetch(found[rank], ranks.arenas[rank], transports[rank], names(ranks), need=need)
    )
    before = [{shard: bulk.clone() for shard, bulk in one.bulks.items()} for one in fetched]
    fill_in(ranks, together, found)
    for one, kept in zip(fetched, before, strict=True):
        assert all(torch.equal(one.bulks[shard], bulk) for shard, bulk in kept.items())


def test_a_damaged_copy_is_replaced_in_its_slot(world: MakeWorld, together: Together) -> None:
    ranks = mirrored(world(2), 1, 2)
    places = sorted((line.shard, line.holder, line.slot) for a in ranks.arenas for line in a.inventory())
    damage(ranks, 0, shard=0)
    (result, _) = fill_in(ranks, together)
    assert result.pairs == ((0, 0),)
    assert all(ranks.values(without=[lost]) == {2.0} for lost in (0, 1))
    assert places == sorted((line.shard, line.holder, line.slot) for a in ranks.arenas for line in a.inventory())
    # The next round overwrites the previous version.
    ranks.begin(committed=Version(2, True), probes={rank: stop_at("send", 3) for rank in (0, 1)})
    write_alone(ranks, 3)
    assert ranks.newest(without=[1]) == ranks.newest(without=[0]) == 2


def test_a_replica_damaged_after_the_restore_is_not_copied(
    world: MakeWorld, together: Together, tmp_path: Path, owner: Owner
) -> None:
    ranks = mirrored(world(3, copies=2), 1)
    lose(ranks, 2, tmp_path, owner)
    found = restored_by(ranks, together)
    for shard in range(3):
        damage(ranks, shard % 2, shard)
    (result, *_) = fill_in(ranks, together, found)
    assert {(shard, 2) for shard in range(3)} <= set(result.pairs)
    assert ranks.values(without=[0, 1]) == {1.0}


def test_if_all_replicas_were_damaged_since_all_ranks_get_an_error(
    world: MakeWorld, together: Together, tmp_path: Path, owner: Owner
) -> None:
    ranks = mirrored(world(2), 1)
    lose(ranks, 1, tmp_path, owner)
    found = restored_by(ranks, together)
    damage(ranks, 0, shard=1)
    transports = LoopbackTransport.world(2)

    def body(rank: int) -> None:
        with pytest.raises(StateMissingError, match="shard 1 of step 1 was intact when it was restored, but all its 1"):
            rereplicate(found[rank], ranks.arenas[rank], transports[rank], names(ranks), ranks.placement)

    together(2, body)


def test_an_unmarked_committed_version_is_marked_by_the_next_mirror(world: MakeWorld, together: Together) -> None:
    """All copies are sealed and all votes cast, but no rank survived to learn of it."""
    ranks = world(2).begin(probes={rank: stop_at("agree", 2) for rank in (0, 1)})
    write_alone(ranks, 1, 2)
    assert fill_in(ranks, together)[0].pairs == ()
    ranks.begin(committed=Version(2, True))
    lines = [line for arena in ranks.arenas for line in arena.inventory()]
    assert {line.version.optimizer_step: line.state for line in lines} == {1: "committed", 2: "committed"}
    ranks.close()
