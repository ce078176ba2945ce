"""One rank of a large world: it runs the real protocol code, and its messages cost what a network model says.

All ranks of a world decide alike, so one of them is enough: what the others would send is computed instead of sent. The
time of a call is the modelled time of its messages and the CPU time of the decisions on this machine.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import cast

import torch
from torch.distributed.distributed_c10d import Store

from benchmarks.model.network import Cost, Network
from lightning_ckptless.membership.rendezvous.generation import join_generation
from lightning_ckptless.protocol.failure_domains import domains_of, place_in
from lightning_ckptless.protocol.placement import Placement
from lightning_ckptless.protocol.versions import Complete, Replica, SlotState, Version
from lightning_ckptless.replica.arena import Arena
from lightning_ckptless.replica.arena_notes import ArenaNotes
from lightning_ckptless.replica.layout.layout import Chunk, Layout, aligned
from lightning_ckptless.replica.mirror.round_vote import RoundVote
from lightning_ckptless.replica.restore import choose, fetch, shared_layout
from lightning_ckptless.replica.transport import Message, gather_json

PAGE_BYTES = 8192
"""A gather sends one page of each rank first, whatever its payload."""
HOST_STATE_BYTES = 64_000
_CHECKSUM = "0123456789abcdef"
_KEPT = (7, 8)
"""Steps of the two versions that every arena holds."""


@dataclass(frozen=True)
class World:
    """What the ranks of a world have in common.

    Args:
        nodes: name of each rank's node.
        placement: of the shards.
        layout: of the state.
        inventories: replicas in each node's arena.
    """

    nodes: tuple[str, ...]
    placement: Placement
    layout: Layout
    inventories: dict[str, tuple[Replica, ...]]


def world_of(ranks: int, ranks_per_node: int, state_bytes: int) -> World:
    """Return a world with a replicated state, and one copy of each shard on another node, or on another rank."""
    nodes = tuple(f"node{rank // ranks_per_node:05d}" for rank in range(ranks))
    level = "node" if ranks > ranks_per_node else "rank"
    placement = place_in(domains_of(level, nodes, mesh=None), 1)
    each = max(1, state_bytes // ranks // 4)
    chunks = [
        Chunk("parameter", "torch.float32", (ranks * each,), (rank * each,), (each,), rank, 0, each * 4)
        for rank in range(ranks)
    ]
    layout = Layout(chunks, ranks)
    inventories: dict[str, list[Replica]] = {node: [] for node in nodes}
    for shard, others in enumerate(placement.holders):
        for holder in (shard, *others):
            for slot, step in enumerate(_KEPT):
                inventories[nodes[holder]].append(Replica(
                    shard, holder, nodes[holder], slot, Version(step, True), 1, ranks, layout.digest,
                    SlotState.COMMITTED, aligned(each * 4), HOST_STATE_BYTES, _CHECKSUM,
                ))  # fmt: skip
    return World(nodes, placement, layout, {node: tuple(found) for node, found in inventories.items()})


@dataclass
class ModelledTransport:
    """A transport whose calls return at once what the other ranks would send, and add up what they would cost.

    Args:
        network: prices the calls.
        rank: this rank.
        world_size: number of ranks.
        vote_cost: price of a vote.
        answers: payloads of all ranks in the next gathers; afterwards all say the same as this rank.
    """

    network: Network
    rank: int
    world_size: int
    vote_cost: Callable[[int], Cost]
    answers: list[list[bytes]] = field(default_factory=list)
    spent: Cost = field(default_factory=Cost)

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> None:
        sent = [data.numel() for _, _, data in sends if data.numel()]
        received = [data.numel() for _, _, data in receives if data.numel()]
        busiest = max((len(sent), sum(sent)), (len(received), sum(received)), key=lambda load: load[1])
        seconds = self.network.exchange(self.world_size, *busiest).seconds
        self.spent += Cost(len(sent), sum(sent), seconds)

    def vote(self, mine: int) -> int:
        self.spent += self.vote_cost(self.world_size)
        return mine

    def agree(self, mine: bool) -> bool:
        return self.vote(int(mine)) == 1

    def gather(self, payload: bytes) -> list[bytes]:
        everyone = self.answers.pop(0) if self.answers else [payload] * self.world_size
        self.spent += self.network.gather(self.world_size, PAGE_BYTES)
        rest = max(map(len, everyone)) + 8 - PAGE_BYTES
        if rest > 0:
            self.spent += self.network.gather(self.world_size, rest)
        return everyone

    def close(self) -> None:
        """Nothing to release."""


class ModelledStore(Store):
    """The store of a membership, in which all other ranks have written what they would write; it counts requests."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank
        self.requests, self.sent_bytes = 0, 0
        self._values: dict[str, str] = {"ckptless/current": "1"}

    def _count(self, *sent: str | bytes) -> None:
        self.requests += 1
        self.sent_bytes += sum(map(len, sent))

    def add(self, key: str, value: int) -> int:  # noqa: ARG002 - the signature of stores
        self._count()
        return 1

    def set(self, key: str, value: str) -> None:
        self._count(key, value)
        self._values[key] = value

    def check(self, keys: Sequence[str]) -> bool:
        self._count(*keys)
        return True

    def get(self, key: str) -> bytes:
        self._count(key)
        return self._values[key.replace("/go/", "/hello/")].encode()

    def multi_get(self, keys: Sequence[str]) -> list[bytes]:
        self._count(*keys)
        return [b"0" * 32 for _ in keys]

    def multi_set(self, keys: Sequence[str], values: Sequence[bytes]) -> None:
        self._count(*keys, *values)


class ModelledArena:
    """The arena of one node, with replicas that have no memory of their own."""

    def __init__(self, world: World, node: str) -> None:
        self.node = node
        self._world = world

    def inventory(self) -> tuple[Replica, ...]:
        return self._world.inventories[self.node]

    def verify(self, _replica: Replica, _threads: int = 1) -> bool:
        return True

    def read_layout(self, _digest: str) -> Layout:
        return self._world.layout

    def read_bulk(self, replica: Replica) -> torch.Tensor:
        return torch.empty(replica.bulk_bytes, dtype=torch.uint8)

    def read_blob(self, replica: Replica) -> bytes:
        return bytes(replica.blob_bytes)


@dataclass(frozen=True)
class Phase:
    """What a part of the protocol takes.

    Args:
        cost: messages and bytes of one rank, and the modelled time of all messages.
        decide_s: CPU time of the decisions of one rank.
    """

    cost: Cost
    decide_s: float


def vote(network: Network, ranks: int, vote_cost: Callable[[int], Cost]) -> Phase:
    """The vote at the end of a round."""
    transport = ModelledTransport(network, 0, ranks, vote_cost)
    began = time.process_time()
    outcome = RoundVote(complete=True).combine(transport.vote)
    assert outcome.complete
    return Phase(transport.spent, network.on_cores(ranks, time.process_time() - began))


def regroup(network: Network, world: World, rank: int) -> Phase:
    """The rendezvous in the store, two process groups, and what the ranks exchange before they restore."""
    ranks, cost = len(world.nodes), Cost()
    transport = ModelledTransport(network, rank, ranks, network.ring_vote)
    stores = [ModelledStore(0), ModelledStore(1)]
    began = time.process_time()
    for store in stores:
        join_generation(store, store.rank, ranks, 1.0)
    total = stores[0].requests + (ranks - 1) * stores[1].requests
    cost += network.requests(total, stores[1].requests, stores[1].sent_bytes)
    cost += network.mesh(ranks) + network.mesh(ranks)
    nodes = [node for node, _, _ in gather_json(transport, [world.nodes[rank], False, None])]
    place_in(domains_of("node" if len(set(world.nodes)) > 1 else "rank", nodes, mesh=None), 1)
    gather_json(transport, [ArenaNotes(generation=1).to_values(), 2000 * ranks])
    return Phase(cost + transport.spent, network.on_cores(ranks, time.process_time() - began))


def restore(network: Network, world: World, rank: int) -> Phase:
    """The choice of a version from all inventories, and the transfer of its shards to this rank."""
    ranks, node = len(world.nodes), world.nodes[rank]
    # One rank of each node lists the replicas in its arena.
    first = {name: number for number, name in reversed(list(enumerate(world.nodes)))}
    listed = [world.inventories[name] if first[name] == number else () for number, name in enumerate(world.nodes)]
    said = [json.dumps([asdict(replica) for replica in replicas]).encode() for replicas in listed]
    transport = ModelledTransport(network, rank, ranks, network.ring_vote, [said])
    arena = cast("Arena", ModelledArena(world, node))
    began = time.process_time()
    found = choose(arena, transport, world.nodes)
    assert isinstance(found, Complete), found
    layout = shared_layout(arena, transport, found.snapshot.layout)
    fetched = fetch(found, arena, transport, world.nodes, need=layout.need)
    gather_json(transport, [fetched.moved_bytes, fetched.sources])
    transport.gather(b" ".join([b"123456"] * network.ranks_per_node))  # the steps that the ranks of a node had begun
    return Phase(transport.spent, network.on_cores(ranks, time.process_time() - began))
