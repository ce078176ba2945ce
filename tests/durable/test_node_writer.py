"""Several nodes write a durable state together; it becomes visible when all parts exist."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from lightning_ckptless.durable import node_writer
from lightning_ckptless.durable.folder import DurableFolder, Manifest
from lightning_ckptless.durable.node_writer import NodeWriter
from lightning_ckptless.durable.store import load_state
from lightning_ckptless.durable.writer_settings import WriterSettings
from lightning_ckptless.protocol.durable_schedule import Share, share_of
from lightning_ckptless.protocol.versions import Version
from lightning_ckptless.replica.arena import Owner
from tests.replica.world import World

NODES = 4


class Nodes:
    """Four nodes with one rank, one arena and one writer each; no arena has all shards."""

    def __init__(self, folder: Path) -> None:
        self.world = World(folder, Owner.of(os.getpid()), NODES)
        for arena in self.world.arenas:
            arena.write_layout(self.world.layout())
        self.world.begin()
        self.folder = DurableFolder(folder / "durable")
        self.failures: list[str] = []
        self.writers = [self._writer(folder, arena.path) for arena in self.world.arenas]

    def _writer(self, folder: Path, arena: Path) -> NodeWriter:
        settings = WriterSettings(
            str(arena), str(self.folder.path), str(folder / "ledger"), "run", os.getpid(), 5, None, 2
        )
        return NodeWriter(settings, lambda version, error: self.failures.append(f"{version}: {error}"))

    def train_to(self, step: int) -> None:
        """Commit a version."""
        self.world.submit(step)
        self.world.settle()

    def run_writers(self, *nodes: int, is_last: bool = False) -> None:
        """Run the writers of some nodes, in this order."""
        names = [arena.node for arena in self.world.arenas]
        for node in nodes:
            share = share_of(names[node], self.world.placement.holders, names, 5)
            self.writers[node].write_if_due(self.world.arenas[node], share, is_last=is_last)

    def close(self) -> None:
        """Release threads and mappings, as pytest keeps a reference to this object."""
        self.world.close()
        for arena in self.world.arenas:
            arena.close()
        self.writers.clear()


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    made = Nodes(tmp_path)
    yield made
    made.close()


def test_a_state_is_visible_when_all_parts_exist(nodes: Nodes) -> None:
    nodes.train_to(4)
    nodes.run_writers(0, 1, 2, 3)
    assert not nodes.folder.path.exists()
    nodes.train_to(5)
    nodes.run_writers(0, 3, 1)
    nodes.run_writers(0)
    assert nodes.folder.versions() == ()
    # The version stays readable in its slot for one more step.
    nodes.train_to(6)
    nodes.run_writers(2, 0)
    assert (nodes.folder.versions(), nodes.failures) == ((Version(5, True),), [])
    ((path, manifest),) = nodes.folder.states()
    state = load_state(path, Manifest.read(path))
    assert [shard.blob for shard in state.shards] == [f"blob {rank} 5".encode() for rank in range(NODES)]
    assert manifest.snapshot.world_size == NODES
    assert [entry.name for entry in nodes.folder.path.iterdir() if entry.name.startswith(".")] == []


def test_a_state_that_a_node_has_missed_is_discarded(nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    nodes.train_to(5)
    nodes.run_writers(0, 1, 3)
    nodes.train_to(6)
    nodes.train_to(7)
    monkeypatch.setattr(node_writer, "PARTS_WAIT_S", 0.0)
    nodes.run_writers(2, 0)
    assert nodes.folder.states() == []
    (failure,) = nodes.failures
    assert failure.startswith("step 5: the nodes did not write shards 2 within 0 s: check that ")
    assert failure.endswith("is a folder shared by all nodes")
    assert [entry.name for entry in nodes.folder.path.iterdir()] == ["ckptless-durable.json"]


def test_a_state_that_a_lost_node_has_missed_is_discarded_once_a_newer_one_is_complete(nodes: Nodes) -> None:
    nodes.train_to(5)
    nodes.run_writers(0, 1, 3)
    nodes.world.begin(committed=Version(5, True))
    nodes.train_to(10)
    nodes.run_writers(0, 1, 2, 3)
    nodes.run_writers(0)
    assert (nodes.folder.versions(), nodes.failures) == ((Version(10, True),), [])
    nodes.run_writers(0, is_last=True)
    assert sorted(entry.name for entry in nodes.folder.path.iterdir()) == ["ckptless-durable.json", "step-0000000010"]


def test_the_next_state_removes_the_parts_of_a_lost_leader(nodes: Nodes) -> None:
    nodes.train_to(5)
    nodes.run_writers(1, 2)
    for step in (9, 10):
        nodes.train_to(step)
    nodes.run_writers(3, 2, 1, 0)
    assert nodes.folder.versions() == (Version(10, True),)
    assert sorted(entry.name for entry in nodes.folder.path.iterdir()) == ["ckptless-durable.json", "step-0000000010"]


def test_the_last_version_is_written_whatever_its_step(nodes: Nodes) -> None:
    nodes.train_to(8)
    nodes.run_writers(3, 2, 1, is_last=True)
    nodes.run_writers(0, is_last=True)
    assert nodes.folder.versions() == (Version(8, True),)


def test_a_node_without_shards_writes_nothing(nodes: Nodes) -> None:
    nodes.train_to(5)
    nodes.writers[0].write_if_due(nodes.world.arenas[0], Share((), NODES, leads=False))
    assert not nodes.folder.path.exists()
