"""Process groups, made anew for every generation under a store prefix of its own.

A store that outlives its workers (torchrun shares one over all its restarts) still holds the addresses of the dead:
a group that reads them fails or hangs. Under a fresh prefix there is nothing old to read.

A worker that survives a fault leaves its groups and opens new ones in the same process. What belonged to the old ones
is cut first, and let go of later: gloo takes 10 ms and more to end its threads, which no recovery has to wait for.
"""

from __future__ import annotations

import atexit
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from lightning_ckptless import environment
from lightning_ckptless.errors import TransportError
from lightning_ckptless.internals.torch_internals import (
    abort_device_groups,
    open_fake_groups,
    process_groups,
    restart_group_names,
    unchanged_excepthook,
)
from lightning_ckptless.membership.rendezvous.generation import join_generation
from lightning_ckptless.membership.worker.connections import Connections, new_sockets
from lightning_ckptless.membership.worker.nccl import ENDS_THE_PROCESS
from lightning_ckptless.membership.worker.placeholder_group import open_alone

JOIN_TIMEOUT_S = 600.0


def _never() -> bool:
    return False


class MeetingStore:
    """The store in which the ranks meet, over a connection that lasts as long as it works.

    It is not cut with the groups of a generation that is over, for the next meeting needs it: torch looks the addresses
    of each new connection up in the domain name system, and a query that is lost there costs 5 s. With a connection
    for each rank and meeting, that was every recovery of 32 ranks.

    Attributes:
        sockets: of the connection, as `new_sockets` has told.
    """

    def __init__(self) -> None:
        self.sockets: dict[int, str] = {}
        self._store: Store | None = None
        self._place: tuple[str | None, str | None] = None, None

    def connect(self, rank: int, world_size: int, *, reconnect: bool) -> Store:
        """The store that the environment names.

        Args:
            rank: this worker's rank.
            world_size: number of ranks.
            reconnect: use a new connection in any case: where threads of a device's groups use the last one.
        """
        place = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
        if self._store is None or reconnect or place != self._place:
            self._store, self._place = None, place
            with new_sockets() as self.sockets:
                found = next(rendezvous("env://", rank, world_size, timeout=timedelta(seconds=JOIN_TIMEOUT_S)))
            self._store = found[0]
        return self._store


class World:
    """The process groups that a worker trains in.

    Attributes:
        generation: number of the membership that was joined last; 0 before the first.
    """

    def __init__(self) -> None:
        self.generation = 0
        self._connections = Connections()
        self._meeting_store = MeetingStore()
        self._leaving = threading.Lock()
        self._own: set[int] = set()
        self._retired: list[Any] = []

    def open(
        self,
        *,
        rank: int,
        world_size: int,
        backend: str,
        timeout: timedelta | None,
        device: torch.device | None,
        regrouping: int = 0,
        is_over: Callable[[], bool] = _never,
        when_joined: Callable[[], None] = lambda: None,
    ) -> int:
        """Join the current generation and create its default process group, unless there is one.

        Args:
            rank: this worker's rank.
            world_size: number of ranks.
            backend: of the default group, e.g. `gloo` or `nccl`.
            timeout: for collectives; None for torch's default.
            device: bound to the group where the backend wants it; None on the host.
            regrouping: number under which survivors of a fault and their new peers meet; 0 where all start together.
            is_over: whether a newer regrouping has been told meanwhile.
            when_joined: called when all ranks have come, before the process groups are made.

        Returns:
            Number of the generation.

        Raises:
            TransportError: not all ranks came, or a newer regrouping has been told.
        """
        if dist.is_initialized():
            # A second trainer of the same program, in a membership that the first one has joined.
            self.generation = int(os.environ.get(environment.GENERATION, "1"))
            return self.generation
        store = self._meeting_store.connect(rank, world_size, reconnect=device is not None)
        if regrouping:
            store = PrefixStore(f"ckptless/regrouping-{regrouping}", store)
        try:
            generation = join_generation(store, rank, world_size, JOIN_TIMEOUT_S, is_over)
        except TransportError as error:
            if isinstance(error.__cause__, dist.DistError):
                self._meeting_store = MeetingStore()
            raise
        when_joined()
        restart_group_names()
        options: dict[str, Any] = {} if timeout is None else {"timeout": timeout}
        with (
            self._connections.opening(world_size, self._meeting_store.sockets),
            unchanged_excepthook(enabled=bool(regrouping)),
        ):
            dist.init_process_group(
                backend, store=generation.store, rank=rank, world_size=world_size, device_id=device, **options
            )
        if is_over():
            raise TransportError(f"rank {rank}: another fault was told while the process groups were made")
        self._own = {id(group) for group in process_groups()}
        atexit.register(close_world)
        self.renumber(generation.number)
        return generation.number

    def pretend(self, rank: int, world_size: int) -> None:
        """Make groups that send nothing, for a process that has to build its model before it meets the others."""
        open_fake_groups(rank, world_size)

    def pretend_to_be(self, rank: int, world_size: int) -> None:
        """Answer for rank and world size in a process that has not met the others; see `alone`."""
        if not self.is_open:
            open_alone(rank, world_size)
            self._own = {id(group) for group in process_groups()}

    def renumber(self, generation: int) -> None:
        """Give the generation the number that its ranks have agreed on, for whatever this process trains next, too."""
        os.environ[environment.GENERATION] = str(generation)
        self.generation = generation

    def host_group(self, timeout_s: float) -> dist.ProcessGroup | None:
        """A gloo group over all ranks for state in host memory, apart from the training's own collectives."""
        with self.making():
            group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
        return group if isinstance(group, dist.ProcessGroup) else None

    @property
    def is_open(self) -> bool:
        """Whether there is a default process group."""
        return dist.is_available() and dist.is_initialized()

    def foreign_groups(self) -> int:
        """How many process groups there are that somebody else has made: they cannot be made anew for him."""
        return sum(id(group) not in self._own for group in process_groups())

    @contextmanager
    def making(self) -> Iterator[None]:
        """Groups that are made within it are ours, whoever makes them: we cut them and make them anew."""
        before = set(map(id, process_groups()))
        with self._connections.opening(dist.get_world_size() if self.is_open else 0, self._meeting_store.sockets):
            yield
        self._own |= set(map(id, process_groups())) - before

    def cut(self) -> int:
        """End whatever a thread does in these groups, now and in those that are being made. Any thread may call it.

        Returns:
            How many connections were there to be cut, each communicator of a device counted as one.
        """
        with self._leaving:
            return abort_device_groups() + self._connections.cut()

    def leave(self) -> None:
        """Give up the groups, which are cut: they are let go of by `bury`."""
        self.cut()
        with self._leaving:
            self._retired += process_groups()
            if dist.is_initialized():
                dist.destroy_process_group()
            self._own.clear()
            if self._connections.has_cut(self._meeting_store.sockets):
                self._meeting_store = MeetingStore()
            self._connections.forget()

    def bury(self) -> None:
        """Let go of the groups that were left, which waits for their threads. All ranks have left them."""
        self._retired.clear()
        self._connections.bury()


@cache
def world_of_process() -> World:
    """The world of this process: all its trainers train in the same process groups, whichever of them made these."""
    return World()


def keep_through_device_errors() -> None:
    """Have NCCL leave this process alive when a peer is gone, for a watcher ends what waits for that peer.

    By default threads of torch's end the whole process when they have seen a lost connection, or after a dump of what
    was under way, and every survivor of a fault with it.
    """
    for name in ENDS_THE_PROCESS:
        os.environ.setdefault(name, "0")


def world_group() -> dist.ProcessGroup:
    """The default process group."""
    group = dist.group.WORLD
    assert group is not None, "torch.distributed is not initialized"
    return group


def close_world() -> None:
    """Destroy the default process group, if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def use_loopback_on_one_node(local_world_size: int, world_size: int) -> None:
    """Keep gloo on the loopback interface where all ranks are on this machine and no interface was chosen."""
    if local_world_size == world_size:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
