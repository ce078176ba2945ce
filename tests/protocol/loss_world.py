"""A world in which nodes are lost with their arenas: while a version is mirrored, and while lost copies are filled in.

What decides is the code of a run: who keeps what (`place`), what is restored (`newest_complete`), which copies are
filled in from where (`absent_copies`, `plan_copies`), which slot is overwritten (`target_slot`, `refill_slot`,
`settle`, `advance`). What is played is that a loss may come between any two events, and that a lost node comes back
empty.

The world keeps a second book, by other means: for each shard the nodes that hold a copy of the newest version that is
committed.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from lightning_ckptless.protocol.placement import Placement, place
from lightning_ckptless.protocol.slots import (
    SlotEvent,
    SlotView,
    absent_copies,
    advance,
    newest_committed,
    refill_slot,
    settle,
    target_slot,
)
from lightning_ckptless.protocol.transfers import Read, Transfer, plan_copies
from lightning_ckptless.protocol.versions import (
    Complete,
    Missing,
    Replica,
    SlotState,
    Snapshot,
    Version,
    newest_complete,
)

T = TypeVar("T")
Copy = tuple[int, int]
"""A shard and the rank that keeps a copy of it."""


@dataclass
class Node:
    """A node with its arena: two slots for each copy."""

    name: str
    slots: dict[Copy, list[SlotView]] = field(default_factory=dict)


class World:
    """Nodes of one rank each.

    Args:
        seed: decides the order of all that has none.
        domains: failure domain of each node.
        copies: replicas of each shard beyond the writer's own.
    """

    def __init__(self, seed: int, domains: Sequence[str], copies: int) -> None:
        self.chance = random.Random(seed)
        self.domains = tuple(domains)
        self.placement: Placement = place(domains, copies)
        self.nodes = [Node(f"n{rank}") for rank in range(len(domains))]
        self.committed: Snapshot | None = None
        self.holders: list[set[int]] = [set() for _ in domains]
        self.generation = 1
        self.step = 0
        self._names = 0

    @property
    def names(self) -> tuple[str, ...]:
        """Name of each rank's node."""
        return tuple(node.name for node in self.nodes)

    @property
    def copies(self) -> list[Copy]:
        """All copies that are planned."""
        return [(shard, rank) for shard, others in enumerate(self.placement.holders) for rank in (shard, *others)]

    def inventory(self) -> list[Replica]:
        """What all arenas hold."""
        return [
            Replica(
                shard, rank, node.name, number, view.snapshot.version, view.snapshot.generation,
                len(self.nodes), "layout", view.state, 1, 1, "",
            )
            for node in self.nodes
            for (shard, rank), pair in node.slots.items()
            for number, view in enumerate(pair)
            if view.snapshot is not None
        ]  # fmt: skip

    # ------------------------------------------------------------------ what happens

    def train(self) -> Iterator[None]:
        """Mirror one version after the other; a loss may come wherever this yields."""
        while True:
            self.step += 1
            snapshot = Snapshot(Version(self.step, True), self.generation, len(self.nodes), "layout")
            written: dict[Copy, int] = {}
            for copy in self._in_any_order(self.copies):
                written[copy] = number = target_slot(self._views(copy), self.committed)
                self._discard_what_is_under_way(copy, number)
                self._change(copy, number, SlotEvent.BEGIN, snapshot)
                yield
                self._change(copy, number, SlotEvent.SEAL, snapshot)
                yield
            # All have voted: from here on it counts, though nobody has learned so yet.
            self._count(snapshot)
            for copy in self._in_any_order(self.copies):
                self._change(copy, written[copy], SlotEvent.COMMIT, snapshot)
                yield

    def _count(self, snapshot: Snapshot) -> None:
        self.committed = snapshot
        self.holders = [{rank for shard, rank in self.copies if shard == each} for each in range(len(self.nodes))]

    def lose(self, domains: Collection[str]) -> None:
        """All nodes of some domains are gone with their arenas; others come, with nothing."""
        for rank, domain in enumerate(self.domains):
            if domain in domains:
                self._names += 1
                self.nodes[rank] = Node(f"n{rank}.{self._names}")
                for holders in self.holders:
                    holders.discard(rank)

    @property
    def should_be_missing(self) -> tuple[int, ...]:
        """By the second book: shards of the committed version of which nobody holds a copy any more."""
        return tuple(shard for shard, holders in enumerate(self.holders) if not holders)

    def look(self) -> Complete | Missing:
        """What a new generation finds."""
        self.generation += 1
        return newest_complete(self.inventory())

    def protect(self, found: Complete) -> Iterator[None]:
        """Fill in what a restored version lacks; a loss may come wherever this yields."""
        restored = found.snapshot
        self.step = restored.version.optimizer_step
        told = newest_committed(self.inventory())
        plan = plan_copies(found, self.names, absent_copies(found, self.placement.holders, self.names))
        filled: dict[Copy, int] = {}
        for transfer in self._in_any_order(plan):
            copy = transfer.replica.shard, _target(transfer)
            filled[copy] = number = refill_slot(self._views(copy), restored, told)
            self._discard_what_is_under_way(copy, number)
            self._change(copy, number, SlotEvent.BEGIN, restored)
            yield
            self._change(copy, number, SlotEvent.SEAL, restored)
            if restored == self.committed:
                self.holders[copy[0]].add(copy[1])
            yield
        # Whole by what its writers had sealed, it counts when all its copies are there, and not before.
        self._count(restored)
        for copy, number in self._in_any_order(list(filled.items())):
            self._change(copy, number, SlotEvent.COMMIT, restored)
            yield
        for copy in self.copies:
            for number, view in enumerate(self._views(copy)):
                if (event := settle(view, restored)) is not None:
                    self._change(copy, number, event, view.snapshot)

    # ------------------------------------------------------------------ slots

    def _views(self, copy: Copy) -> tuple[SlotView, SlotView]:
        first, second = self.nodes[copy[1]].slots.setdefault(copy, [SlotView(), SlotView()])
        return first, second

    def _discard_what_is_under_way(self, copy: Copy, number: int) -> None:
        view = self._views(copy)[number]
        if view.state in (SlotState.WRITING, SlotState.STAGED):
            self._change(copy, number, SlotEvent.DISCARD, view.snapshot)

    def _change(self, copy: Copy, number: int, event: SlotEvent, snapshot: Snapshot | None) -> None:
        shard, rank = copy
        view = self._views(copy)[number]
        state = advance(view.state, event, shard=shard, rank=rank, version=snapshot.version if snapshot else None)
        self.nodes[rank].slots[copy][number] = SlotView(state, None if state is SlotState.EMPTY else snapshot)

    def _in_any_order(self, things: Sequence[T]) -> list[T]:
        return self.chance.sample(list(things), len(things))


def _target(transfer: Transfer) -> int:
    return transfer.rank if isinstance(transfer, Read) else transfer.target_rank
