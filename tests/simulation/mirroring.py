"""The versions of a simulated worker: mirrored, restored, and given back the copies that they lack."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from lightning_ckptless.errors import TransportError
from lightning_ckptless.protocol.versions import Complete, Version
from lightning_ckptless.replica.rereplicate import rereplicate
from tests.simulation.arena import Place, SimulatedMirror
from tests.simulation.tasks import Waiting

if TYPE_CHECKING:
    from tests.simulation.worker import Worker


@dataclass
class Restoration:
    """A fetched version.

    Args:
        complete: the version with its replicas.
        host: the same.
        bulk: this rank's tensor state.
        saved: its host state.
    """

    complete: Complete
    host: Complete | None
    bulk: torch.Tensor
    saved: dict[str, Any]

    @property
    def version(self) -> Version:
        """The version."""
        return self.complete.snapshot.version


class Mirroring:
    """Mirrors the versions of a worker, over all generations; see `trainer.commit.mirroring.Mirroring`.

    Args:
        worker: the worker.
    """

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._mirror: SimulatedMirror | None = None
        self._protected: Version | None = None
        self._protecting: _Protecting | None = None

    def resume(self, restoration: Restoration) -> None:
        """Resume from a restored version, whose missing replicas are made in the background."""
        self._protected = restoration.version
        members = self._worker.session.members
        if restoration.complete.snapshot.world_size == members.world_size:
            self._protecting = _Protecting(self._worker, restoration.complete)
            return
        # Other ranks wrote it: it is mirrored again, for these.
        self._protected = None
        self.commit(restoration.version)
        self._open().settle()

    def commit(self, version: Version) -> None:
        """Hand a version to the mirror."""
        worker, report = self._worker, self._worker.session.report
        mirror = self._open()
        report.step_done()
        blob = json.dumps({"step": version.optimizer_step, "report": report.state(version)}).encode()
        copy_s = worker.world.scheduler.delay(worker.world.pace_s / 2)
        bulk = content(version.optimizer_step, worker.session.rank, worker.history)
        mirror.submit(version, bulk, blob, copy_s)

    def _open(self) -> SimulatedMirror:
        if self._protecting is not None:
            self._protecting.wait()
            self._protecting = None
        if self._mirror is None:
            worker = self._worker
            members, process, world = worker.session.members, worker.process, worker.world
            group = worker.groups.connected()
            place = Place(world.scheduler, group, members.rank, worker.arena, members.placement, members.generation)
            when_committed = partial(worker.note_committed, members.generation)
            self._mirror = SimulatedMirror(place, self._protected, lambda: process.alive, world.ring_of, when_committed)
        return self._mirror

    def abandon(self) -> None:
        """Abandon work in progress: the generation is over."""
        if self._protecting is not None:
            self._protecting.abandon()
            self._protecting = None
        if self._mirror is not None:
            self._mirror.close()
            self._mirror = None

    def settle(self) -> None:
        """Wait until the last version is committed."""
        if self._protecting is not None or self._mirror is not None:
            self._open().settle()


class _Protecting:
    """Rereplication in a task of its own; see `trainer.commit.rereplication`.

    Args:
        worker: the worker.
        found: the restored version.
    """

    def __init__(self, worker: Worker, found: Complete) -> None:
        self._error: Exception | None = None
        self._is_over = False
        self._waiting: Waiting = []
        self._scheduler = worker.world.scheduler
        members = worker.session.members

        def run() -> None:
            try:
                rereplicate(found, members.arena, members.transport, members.nodes, members.placement)
            except TransportError as error:
                self._error = error
            self._is_over = True
            self._scheduler.notify(self._waiting)

        worker.spawn(run)

    def wait(self) -> None:
        """Wait until all replicas are in place.

        Raises:
            TransportError: a peer was lost.
        """
        self.abandon()
        if self._error is not None:
            raise self._error

    def abandon(self) -> None:
        """Wait until it has ended: the connections have been aborted."""
        self._scheduler.wait_for(self._waiting, lambda: self._is_over)


def content(step: int, shard: int, history: int) -> torch.Tensor:
    """The tensor state of a shard.

    Args:
        step: optimizer steps made.
        shard: index of the shard.
        history: of the state, the same on all ranks.
    """
    return torch.tensor([step * 1000 + shard, history], dtype=torch.int64).view(torch.uint8)


def history_in(bulk: torch.Tensor) -> int:
    """The history in the tensor state of a shard."""
    return int(bulk.view(torch.int64)[1])
