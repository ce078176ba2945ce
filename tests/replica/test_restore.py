"""Restoring a version into live tensors, bit for bit, after losses and damage."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol, TypeVar

import pytest
import torch

from lightning_ckptless.errors import StateMissingError
from lightning_ckptless.protocol.placement import place
from lightning_ckptless.protocol.versions import Complete, Missing, Version
from lightning_ckptless.replica.arena import Arena, Owner
from lightning_ckptless.replica.layout.planner import plan_layout
from lightning_ckptless.replica.layout.tensor_spec import describe
from lightning_ckptless.replica.mirror.mirror import Mirror
from lightning_ckptless.replica.restore import Fetched, choose, fetch, fill, gather_inventory, shared_layout
from lightning_ckptless.replica.slot import HEADER_BYTES
from lightning_ckptless.replica.transport import LoopbackTransport, Transport
from tests.replica.conftest import Together

T = TypeVar("T")
State = dict[str, torch.Tensor]


class Job:
    """Ranks on nodes that mirror a state and lose parts of it."""

    def __init__(
        self,
        tmp_path: Path,
        owner: Owner,
        together: Together,
        state: State,
        nodes: list[str],
        *,
        domains: list[str] | None = None,
    ) -> None:
        self.folder, self.owner, self.together, self.nodes = tmp_path, owner, together, nodes
        self.size = len(nodes)
        self.arenas = {node: Arena.create(tmp_path, "run", node, owner) for node in dict.fromkeys(nodes)}
        self.placement = place(domains or nodes, 1)
        self.state = [self.state_of(rank, state) for rank in range(self.size)]
        shared = describe(state, replicated=True)
        private = describe({"seen": torch.zeros(5)}, replicated=False)
        self.layout = plan_layout([shared + private] * self.size)

    def state_of(self, rank: int, state: State) -> State:
        return {name: tensor.clone() for name, tensor in state.items()} | {"seen": torch.full((5,), 10.0 + rank)}

    def mirror(self, *steps: int) -> Job:
        """Mirror versions; the live tensors are those of the last one."""
        transports = LoopbackTransport.world(self.size)
        mirrors = [
            Mirror(
                arena=self.arenas[node],
                layout=self.layout,
                placement=self.placement,
                transport=transports[rank],
                generation=1,
            )
            for rank, node in enumerate(self.nodes)
        ]
        for arena in self.arenas.values():
            arena.write_layout(self.layout)
        for step in steps:
            for rank, mirror in enumerate(mirrors):
                mirror.submit(Version(step, True), self.state[rank], f"blob {rank} {step}".encode())
        for mirror in mirrors:
            mirror.settle()
            mirror.close()
        return self

    def lose(self, node: str) -> None:
        """Lose a node; an empty one of the same name replaces it."""
        self.arenas[node].remove()
        self.arenas[node] = Arena.create(self.folder, "run", node, self.owner)

    def damage(self, node: str, shard: int, *, offset: int = 100) -> None:
        """Flip a byte of the newest replica of a shard on a node."""
        newest = max(
            (r for r in self.arenas[node].inventory() if r.shard == shard), key=lambda replica: replica.version
        )
        with self.arenas[node]._path(newest).open("r+b") as file:
            file.seek(HEADER_BYTES + offset)
            byte = file.read(1)
            file.seek(HEADER_BYTES + offset)
            file.write(bytes([byte[0] ^ 0x40]))

    def run(self, body: Callable[[int, Arena, Transport], T]) -> list[T]:
        transports = LoopbackTransport.world(self.size)
        return self.together(self.size, lambda rank: body(rank, self.arenas[self.nodes[rank]], transports[rank]))

    def choose(self) -> Complete | Missing:
        found = self.run(lambda rank, arena, transport: choose(arena, transport, self.nodes))
        assert all(one == found[0] for one in found)
        return found[0]

    def restore(self) -> list[tuple[State, Fetched]]:
        """Every rank's tensors after a restore into zeros, and what it fetched."""

        def body(rank: int, arena: Arena, transport: Transport) -> tuple[State, Fetched]:
            found = choose(arena, transport, self.nodes)
            assert isinstance(found, Complete)
            layout = shared_layout(arena, transport, found.snapshot.layout)
            fetched = fetch(found, arena, transport, self.nodes, need=layout.need)
            tensors = {name: torch.zeros_like(tensor) for name, tensor in self.state[rank].items()}
            held = {name: tensor.data_ptr() for name, tensor in tensors.items()}
            assert fill(layout, fetched.bulks, tensors, rank) == sum(tensor.nbytes for tensor in tensors.values())
            assert held == {name: tensor.data_ptr() for name, tensor in tensors.items()}
            step = found.snapshot.version.optimizer_step
            assert fetched.blobs == {rank: f"blob {rank} {step}".encode()}
            return tensors, fetched

        return self.run(body)

    def exact(self, restored: list[tuple[State, Fetched]]) -> bool:
        return all(
            torch.equal(tensors[name], tensor)
            for rank, (tensors, _) in enumerate(restored)
            for name, tensor in self.state[rank].items()
        )


class MakeJob(Protocol):
    """Makes a job whose ranks are on given nodes."""

    def __call__(self, nodes: list[str], *, domains: list[str] | None = None) -> Job: ...


@pytest.fixture
def job(tmp_path: Path, owner: Owner, together: Together, state: State) -> Iterator[MakeJob]:
    """Makes jobs and closes their arenas."""
    made: list[Job] = []

    def make(nodes: list[str], *, domains: list[str] | None = None) -> Job:
        made.append(Job(tmp_path, owner, together, state, nodes, domains=domains))
        return made[-1]

    yield make
    for one in made:
        for arena in one.arenas.values():
            arena.close()


TWO_BY_TWO = ["a", "a", "b", "b"]


@pytest.mark.parametrize("nodes", [["a", "b"], ["a", "b", "c"], TWO_BY_TWO])
def test_every_rank_is_restored(job: MakeJob, nodes: list[str]) -> None:
    run = job(nodes).mirror(1, 2)
    assert run.exact(run.restore())


def test_a_single_node_reads_only_its_own_arena(job: MakeJob) -> None:
    run = job(["a", "a"], domains=["r0", "r1"]).mirror(1)
    restored = run.restore()
    assert run.exact(restored)
    assert [fetched.moved_bytes for _, fetched in restored] == [0, 0]
    assert [fetched.sources for _, fetched in restored] == [{"own arena": 2, "peer": 0}] * 2


@pytest.mark.parametrize("lost", ["a", "b"])
@pytest.mark.parametrize("nodes", [["a", "b"], TWO_BY_TWO])
def test_a_lost_node_gets_everything_from_its_peers(job: MakeJob, nodes: list[str], lost: str) -> None:
    run = job(nodes).mirror(1, 2, 3)
    run.lose(lost)
    restored = run.restore()
    assert run.exact(restored)
    for node, (_, fetched) in zip(nodes, restored, strict=True):
        peer = len(nodes) if node == lost else 0
        assert fetched.sources == {"own arena": len(nodes) - peer, "peer": peer}
        assert (fetched.moved_bytes > 0) == (node == lost)


def test_three_nodes_lose_one(job: MakeJob) -> None:
    run = job(["a", "b", "c"]).mirror(1)
    run.lose("b")
    assert run.exact(run.restore())


def test_the_layout_is_received_from_a_peer_and_stored(job: MakeJob) -> None:
    run = job(["a", "b"]).mirror(1)
    run.lose("a")
    assert run.arenas["a"].read_layout(run.layout.digest) is None
    run.restore()
    kept = run.arenas["a"].read_layout(run.layout.digest)
    assert kept is not None and kept.chunks == run.layout.chunks


def test_a_layout_that_no_arena_contains_is_an_error(job: MakeJob) -> None:
    run = job(["a", "b"]).mirror(1)

    def body(rank: int, arena: Arena, transport: Transport) -> None:
        with pytest.raises(StateMissingError, match=f"rank {rank}: no arena contains layout 00"):
            shared_layout(arena, transport, "00")

    run.run(body)


@pytest.mark.parametrize("offset", [0, 4321])
def test_a_damaged_replica_is_replaced_by_a_peers(job: MakeJob, offset: int) -> None:
    run = job(["a", "b"]).mirror(1, 2)
    run.damage("a", 0, offset=offset)
    restored = run.restore()
    assert run.exact(restored)
    assert [fetched.sources["peer"] for _, fetched in restored] == [1, 0]
    assert "1 damaged replica ignored" in run.choose().reason


def test_if_all_replicas_are_damaged_the_previous_version_is_restored(job: MakeJob) -> None:
    run = job(["a", "b"]).mirror(1, 2)
    run.damage("a", 0)
    run.damage("b", 0)
    found = run.choose()
    assert isinstance(found, Complete) and found.snapshot.version == Version(1, True)
    assert run.exact(run.restore())


def test_if_every_version_is_damaged_none_is_found(job: MakeJob) -> None:
    run = job(["a", "b"]).mirror(1)
    run.damage("a", 1)
    run.damage("b", 1)
    found = run.choose()
    assert isinstance(found, Missing) and found.shards == (1,) and found.since == Version(1, True)


def test_empty_arenas_contain_no_version(job: MakeJob) -> None:
    run = job(["a", "b"])
    assert run.choose() == Missing((), None, "the arenas are empty")


def test_after_too_many_losses_no_version_is_complete(job: MakeJob) -> None:
    run = job(["a", "b", "c"]).mirror(1)
    run.lose("a")
    run.lose("b")
    found = run.choose()
    assert isinstance(found, Missing) and found.since == Version(1, True) and found.shards


def test_a_version_of_another_world_size_is_found(job: MakeJob) -> None:
    job(["a", "b"]).mirror(1)
    larger = job(["a", "b", "c"])
    found = larger.choose()
    assert isinstance(found, Complete) and found.snapshot.world_size == 2


def test_one_rank_of_each_node_reads_the_inventory(job: MakeJob) -> None:
    run = job(TWO_BY_TWO).mirror(1)
    lines = run.run(lambda rank, arena, transport: gather_inventory(arena, transport, reads=rank in (0, 2)))
    assert all(one == lines[0] for one in lines)
    assert len(lines[0]) == len(set(lines[0])) == 4 * 2


def test_a_rank_may_need_only_some_shards(job: MakeJob) -> None:
    run = job(["a", "b"]).mirror(1)
    run.lose("a")
    need: dict[int, tuple[int, ...]] = {0: (1,), 1: ()}

    def body(rank: int, arena: Arena, transport: Transport) -> Fetched:
        found = choose(arena, transport, run.nodes, need=need)
        assert isinstance(found, Complete)
        return fetch(found, arena, transport, run.nodes, need=need)

    fetched = run.run(body)
    assert [set(one.bulks) for one in fetched] == [{1}, set()]
    assert [one.blobs for one in fetched] == [{0: b"blob 0 1"}, {1: b"blob 1 1"}]
    assert fetched[0].moved_bytes == run.layout.bulk_bytes(1) + len(b"blob 0 1") and fetched[1].moved_bytes == 0


def test_filling_increments_the_version_counter(job: MakeJob) -> None:
    run = job(["a", "b"]).mirror(1)
    weight = torch.nn.Parameter(torch.zeros_like(run.state[0]["weight"]))
    found = run.choose()
    assert isinstance(found, Complete)
    bulks = {kept[0].shard: run.arenas[kept[0].node].read_bulk(kept[0]) for kept in found.replicas}
    before = weight._version
    tensors = {name: torch.zeros_like(tensor) for name, tensor in run.state[0].items()} | {"weight": weight}
    fill(run.layout, bulks, tensors, 0)
    assert weight._version > before and weight.requires_grad and torch.equal(weight, run.state[0]["weight"])


def test_a_replica_whose_slot_was_removed_does_not_verify(job: MakeJob) -> None:
    run = job(["a", "b"]).mirror(1)
    (line, *_) = run.arenas["a"].inventory()
    assert run.arenas["a"].verify(line)
    run.arenas["a"].prune(())
    assert not run.arenas["a"].verify(line)
