"""Ranks with arenas and mirrors, as threads of one process."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import pytest
import torch

from lightning_ckptless.errors import TransportError
from lightning_ckptless.protocol.placement import place
from lightning_ckptless.protocol.versions import Complete, Version, newest_complete
from lightning_ckptless.replica.arena import Arena, Owner
from lightning_ckptless.replica.layout.layout import Layout, slot_views
from lightning_ckptless.replica.layout.planner import plan_layout
from lightning_ckptless.replica.layout.tensor_spec import describe
from lightning_ckptless.replica.mirror.mirror import Mirror
from lightning_ckptless.replica.mirror.mirror_settings import MirrorSettings
from lightning_ckptless.replica.transport import LoopbackTransport

State = dict[str, torch.Tensor]
Probe = Callable[[str, Version], None]


class StopError(Exception):
    """Raised by a probe to stop a mirror in the middle of a round."""


class World:
    """Ranks as threads, each with its own arena and mirror."""

    def __init__(
        self, tmp_path: Path, owner: Owner, world_size: int, *, copies: int = 1, timeout_s: float = 20.0
    ) -> None:
        self.size = world_size
        self.arenas = [Arena.create(tmp_path, "run", f"node{rank}", owner) for rank in range(world_size)]
        self.placement = place([f"node{rank}" for rank in range(world_size)], copies)
        self.timeout_s = timeout_s
        self.generation = 0
        self.mirrors: list[Mirror] = []
        self.transports: list[LoopbackTransport] = []

    def tensors(self, value: float) -> State:
        """A replicated state filled with a value, and a private tensor."""
        return {
            "weight": torch.full((200, 100), float(value)),
            "bias": torch.full((50,), -value, dtype=torch.int64),
            "mean": torch.full((9,), float(value)),
        }

    def layout(self, tensors: State | None = None) -> Layout:
        tensors = tensors or self.tensors(0)
        shared = describe({name: t for name, t in tensors.items() if name != "mean"}, replicated=True)
        private = describe({name: t for name, t in tensors.items() if name == "mean"}, replicated=False)
        return plan_layout([shared + private] * self.size)

    def begin(
        self,
        *,
        committed: Version | None = None,
        probes: dict[int, Probe] | None = None,
        layout: Layout | None = None,
        checksum: str = "xxh3",
        threads: int = 1,
        staging: str = "overlap",
        slots: int = 2,
        history_every: int = 1,
        verifies: bool = True,
    ) -> World:
        """Start a new generation."""
        self.close()
        self.generation += 1
        self.transports = LoopbackTransport.world(self.size, timeout_s=self.timeout_s)
        self.mirrors = [
            Mirror(
                arena=self.arenas[rank],
                layout=layout or self.layout(),
                placement=self.placement,
                transport=self.transports[rank],
                generation=self.generation,
                committed=committed,
                probe=(probes or {}).get(rank),
                settings=MirrorSettings(checksum, threads, staging, slots, history_every, verifies),
            )
            for rank in range(self.size)
        ]
        return self

    def submit(self, step: int, tensors: State | None = None, *, ranks: Sequence[int] | None = None) -> None:
        for rank in ranks if ranks is not None else range(self.size):
            state = tensors or self.tensors(step)
            self.mirrors[rank].submit(Version(step, True), state, f"blob {rank} {step}".encode())

    def settle(self) -> list[Version | None]:
        return [mirror.settle() for mirror in self.mirrors]

    def fail(self, victim: int) -> list[Version | None]:
        """Close a rank's transport, upon which every other rank gets an error and closes its own.

        Returns:
            The version that each of them knows to be committed.
        """
        self.transports[victim].close()

        def committed_on(rank: int) -> Version | None:
            with pytest.raises(TransportError):
                self.mirrors[rank].settle()
            self.transports[rank].close()
            return self.mirrors[rank].committed

        with ThreadPoolExecutor(self.size) as pool:
            return list(pool.map(committed_on, [rank for rank in range(self.size) if rank != victim]))

    def newest(self, *, without: Sequence[int] = ()) -> int | None:
        lines = [line for rank, arena in enumerate(self.arenas) if rank not in without for line in arena.inventory()]
        found = newest_complete(lines)
        return found.snapshot.version.optimizer_step if isinstance(found, Complete) else None

    def values(self, *, without: Sequence[int] = ()) -> set[float]:
        """All values in the newest complete version, after verifying the checksums of all replicas."""
        lines = {rank: arena.inventory() for rank, arena in enumerate(self.arenas) if rank not in without}
        found = newest_complete([line for own in lines.values() for line in own])
        assert isinstance(found, Complete)
        seen = set()
        for replica in (replica for kept in found.replicas for replica in kept):
            arena = next(self.arenas[rank] for rank, own in lines.items() if replica in own)
            assert arena.verify(replica)
            layout = arena.read_layout(replica.layout) or self.layout()
            for view in slot_views(layout, replica.shard, arena.read_bulk(replica)):
                seen |= {abs(float(value)) for value in set(view.flatten().tolist())}
            step = replica.version.optimizer_step
            assert arena.read_blob(replica) == f"blob {replica.shard} {step}".encode()
        return seen

    def close(self) -> None:
        for transport in self.transports:
            transport.close()
        for mirror in self.mirrors:
            mirror.close()
        self.mirrors = []


class MakeWorld(Protocol):
    """Makes a world of several ranks."""

    def __call__(self, world_size: int, *, copies: int = 1) -> World: ...


def wait_for(gate: threading.Event, moment: str = "stage") -> Probe:
    def probe(at: str, version: Version) -> None:
        assert at != moment or gate.wait(20)

    return probe


def stop_at(moment: str, step: int | None = None) -> Probe:
    def probe(at: str, version: Version) -> None:
        if at == moment and step in (None, version.optimizer_step):
            raise StopError(moment)

    return probe
