"""A simulation of nodes that are lost with their arenas, while a version is mirrored or while copies are filled in.

The decisions are made by the code of a real run: placement (`place`), the version (`newest_complete`), which copies are
filled in from where (`absent_copies`, `plan_copies`), which slot is overwritten (`target_slot`, `refill_slot`,
`settle`, `advance`). The simulation adds losses between any two events; a lost node comes back empty.

Independently of that code, the simulation tracks which nodes have a copy of each shard of the newest committed version.
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
        seed: determines the order of all events that have no fixed order.
        domains: failure domain of each node.
        copies: replicas of each shard in addition to the writer's own.
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
        """All copies that the placement requires."""
        return [(shard, rank) for shard, others in enumerate(self.placement.holders) for rank in (shard, *others)]

    def inventory(self) -> list[Replica]:
        """Contents of all arenas."""
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

    # ------------------------------------------------------------------ events

    def train(self) -> Iterator[None]:
        """Mirror one version after another; a loss may occur at every yield."""
        while True:
            self.step += 1
            snapshot = Snapshot(Version(self.step, True), self.generation, len(self.nodes), "layout")
            written: dict[Copy, int] = {}
            for copy in self._shuffled(self.copies):
                written[copy] = number = target_slot(self._views(copy), self.committed)
                self._discard_in_flight(copy, number)
                self._change(copy, number, SlotEvent.BEGIN, snapshot)
                yield
                self._change(copy, number, SlotEvent.SEAL, snapshot)
                yield
            # All ranks have voted: the version counts as committed, although no rank has learned of it yet.
            self._count(snapshot)
            for copy in self._shuffled(self.copies):
                self._change(copy, written[copy], SlotEvent.COMMIT, snapshot)
                yield

    def _count(self, snapshot: Snapshot) -> None:
        self.committed = snapshot
        self.holders = [{rank for shard, rank in self.copies if shard == each} for each in range(len(self.nodes))]

    def lose(self, domains: Collection[str]) -> None:
        """Lose all nodes of some domains with their arenas; empty ones replace them."""
        for rank, domain in enumerate(self.domains):
            if domain in domains:
                self._names += 1
                self.nodes[rank] = Node(f"n{rank}.{self._names}")
                for holders in self.holders:
                    holders.discard(rank)

    @property
    def should_be_missing(self) -> tuple[int, ...]:
        """The shards of the committed version without any copy left, by independent bookkeeping."""
        return tuple(shard for shard, holders in enumerate(self.holders) if not holders)

    def look(self) -> Complete | Missing:
        """The version that a new generation finds."""
        self.generation += 1
        return newest_complete(self.inventory())

    def protect(self, found: Complete) -> Iterator[None]:
        """Fill in the copies that a restored version lacks; a loss may occur at every yield."""
        restored = found.snapshot
        self.step = restored.version.optimizer_step
        committed = newest_committed(self.inventory())
        plan = plan_copies(found, self.names, absent_copies(found, self.placement.holders, self.names))
        filled: dict[Copy, int] = {}
        for transfer in self._shuffled(plan):
            copy = transfer.replica.shard, _target(transfer)
            filled[copy] = number = refill_slot(self._views(copy), restored, committed)
            self._discard_in_flight(copy, number)
            self._change(copy, number, SlotEvent.BEGIN, restored)
            yield
            self._change(copy, number, SlotEvent.SEAL, restored)
            if restored == self.committed:
                self.holders[copy[0]].add(copy[1])
            yield
        # A restored version counts as committed only once all its copies exist.
        self._count(restored)
        for copy, number in self._shuffled(list(filled.items())):
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

    def _discard_in_flight(self, copy: Copy, number: int) -> None:
        view = self._views(copy)[number]
        if view.state in (SlotState.WRITING, SlotState.STAGED):
            self._change(copy, number, SlotEvent.DISCARD, view.snapshot)

    def _change(self, copy: Copy, number: int, event: SlotEvent, snapshot: Snapshot | None) -> None:
        shard, rank = copy
        view = self._views(copy)[number]
        state = advance(view.state, event, shard=shard, rank=rank, version=snapshot.version if snapshot else None)
        self.nodes[rank].slots[copy][number] = SlotView(state, None if state is SlotState.EMPTY else snapshot)

    def _shuffled(self, items: Sequence[T]) -> list[T]:
        return self.chance.sample(list(items), len(items))


def _target(transfer: Transfer) -> int:
    return transfer.rank if isinstance(transfer, Read) else transfer.target_rank
