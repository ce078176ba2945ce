"""After rereplication, any single arena may be lost, whatever the arenas contained before."""

from __future__ import annotations

import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_ckptless.protocol.placement import place
from lightning_ckptless.protocol.slots import absent_copies
from lightning_ckptless.protocol.versions import Complete, Snapshot, Version, newest_complete
from lightning_ckptless.replica.arena import Arena, Owner
from lightning_ckptless.replica.checksum import bytes_of, digest
from lightning_ckptless.replica.rereplicate import Rereplicated, rereplicate
from lightning_ckptless.replica.restore import choose
from lightning_ckptless.replica.slot_stamp import Stamp
from lightning_ckptless.replica.transport import LoopbackTransport

OLD, NEW = Version(1, True), Version(2, True)
LAYOUT = "5e" * 32


@dataclass(frozen=True)
class Scenario:
    """The contents of the arenas at the start of a generation.

    Args:
        before: node of each rank while the versions were written.
        now: node of each rank of the new generation.
        learned: for each rank of the previous generation, whether it learned that the older version is committed.
        present: for each shard, whether its writer's and its holder's copy of the newer version exist.
        swapped: for each rank, the slot of its slot pairs that contains the older version.
    """

    before: tuple[str, ...]
    now: tuple[str, ...]
    learned: tuple[bool, ...]
    present: tuple[tuple[bool, bool], ...]
    swapped: tuple[int, ...]


@st.composite
def scenarios(draw: st.DrawFn) -> Scenario:
    """Two or three nodes of one or two ranks, possibly renumbered; the newer version may lack copies."""
    nodes, each = draw(st.integers(2, 3)), draw(st.integers(1, 2))
    names = tuple(f"n{node}" for node in range(nodes) for _ in range(each))
    now = draw(st.one_of(st.just(names), st.permutations(names).map(tuple)))
    some = st.sampled_from([(True, False), (False, True), (True, True)])
    size = len(names)
    return Scenario(
        before=names,
        now=now,
        learned=draw(st.tuples(*[st.booleans()] * size).filter(any)),
        present=draw(st.tuples(*[some] * size)),
        swapped=draw(st.tuples(*[st.integers(0, 1)] * size)),
    )


def written(scenario: Scenario, arenas: dict[str, Arena]) -> None:
    """Write the two versions into the arenas."""
    for shard, (holder,) in enumerate(place(scenario.before, 1).holders):
        for rank, is_present in zip((shard, holder), scenario.present[shard], strict=True):
            bulk_bytes = 8 + 3 * shard
            pair = arenas[scenario.before[rank]].slots(shard, rank, bulk_bytes, layout=LAYOUT)
            for version, slot in zip(
                (OLD, NEW), (pair[scenario.swapped[rank]], pair[1 - scenario.swapped[rank]]), strict=True
            ):
                if version is NEW and not is_present:
                    continue
                stamp = Stamp(version, 1, len(scenario.before), LAYOUT, shard, rank)
                blob = f"{shard} at {version}".encode()
                slot.begin(stamp)
                slot.bulk.fill_(10 * shard + version.optimizer_step)
                slot.seal(stamp, blob, digest("xxh3", (bytes_of(slot.bulk), blob)))
                if version is OLD and scenario.learned[rank]:
                    slot.commit()


def newest(arenas: dict[str, Arena], without: str | None) -> Complete:
    """The newest complete version in the remaining arenas, after verifying all its replicas."""
    lines = [line for node, arena in arenas.items() if node != without for line in arena.inventory()]
    found = newest_complete(lines)
    assert isinstance(found, Complete)
    for shard, kept in enumerate(found.replicas):
        for replica in kept:
            assert arenas[replica.node].verify(replica)
            assert arenas[replica.node].read_blob(replica) == f"{shard} at {found.snapshot.version}".encode()
    return found


def old_copies(arenas: dict[str, Arena]) -> set[tuple[str, int, int, int]]:
    """The slot of the older version."""
    lines = [line for arena in arenas.values() for line in arena.inventory()]
    return {(line.node, line.shard, line.holder, line.slot) for line in lines if line.version == OLD}


def replenished(scenario: Scenario, arenas: dict[str, Arena]) -> Rereplicated:
    """The results of all ranks of the new generation."""
    transports = LoopbackTransport.world(len(scenario.now))
    placement, ranks = place(scenario.now, 1), range(len(scenario.now))

    def body(rank: int) -> Rereplicated:
        arena = arenas[scenario.now[rank]]
        found = choose(arena, transports[rank], scenario.now, need=dict.fromkeys(ranks, ranks))
        assert isinstance(found, Complete) and found.snapshot == Snapshot(NEW, 1, len(scenario.now), LAYOUT)
        return rereplicate(found, arena, transports[rank], scenario.now, placement)

    with ThreadPoolExecutor(len(scenario.now)) as pool:
        results = list(pool.map(body, range(len(scenario.now))))
    assert all(one == results[0] for one in results)
    return results[0]


@settings(max_examples=60, deadline=None)
@given(scenarios())
def test_any_arena_may_be_lost_after_rereplication(scenario: Scenario) -> None:
    with tempfile.TemporaryDirectory() as folder:
        owner = Owner.of(os.getpid())
        arenas = {node: Arena.create(Path(folder), "run", node, owner) for node in dict.fromkeys(scenario.before)}
        written(scenario, arenas)
        olds = old_copies(arenas)
        result = replenished(scenario, arenas)
        if scenario.now == scenario.before:
            assert len(result.pairs) == sum(not there for pair in scenario.present for there in pair)
        assert old_copies(arenas) == olds
        assert absent_copies(newest(arenas, None), place(scenario.now, 1).holders, scenario.now) == ()
        for lost in arenas:
            assert newest(arenas, lost).snapshot.version == NEW
        assert replenished(scenario, arenas).pairs == ()
        for arena in arenas.values():
            arena.close()
