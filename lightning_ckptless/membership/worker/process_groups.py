"""Process groups, created for every generation under a store prefix of its own.

A store that outlives its workers (torchrun shares one over all its restarts) still holds the addresses of dead ranks: a
group that reads them fails or hangs. Under a new prefix there is nothing old to read.

A worker that survives a fault leaves its groups and opens new ones in the same process. The old ones are aborted first
and released later: gloo takes 10 ms and more to stop its threads, and no recovery has to wait for that.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import Any, Protocol
from weakref import WeakSet

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
    store_of_ranks,
    unchanged_excepthook,
)
from lightning_ckptless.membership.rendezvous.generation import join_generation
from lightning_ckptless.membership.worker.connections import Connections, new_sockets
from lightning_ckptless.membership.worker.nccl import ENDS_THE_PROCESS
from lightning_ckptless.membership.worker.placeholder_group import open_alone

JOIN_TIMEOUT_S = 600.0
_FIRST_PAUSE_S = 0.0005
_LONGEST_PAUSE_S = 0.01


class RendezvousStore:
    """The store in which the ranks rendezvous, over a connection that is kept as long as it works.

    It is not aborted with the groups of a generation that has ended, because the next rendezvous needs it. For each new
    connection torch resolves addresses in the domain name system, and a lost query costs 5 s. With one connection per
    rank and rendezvous, that happened in every recovery of 32 ranks.

    Attributes:
        sockets: sockets of the connection, as returned by `new_sockets`.
    """

    def __init__(self) -> None:
        self.sockets: dict[int, str] = {}
        self._store: Store | None = None
        self._place: tuple[str | None, str | None] = None, None

    def connect(self, rank: int, world_size: int, *, reconnect: bool) -> Store:
        """Connect to the store that the environment names.

        Args:
            rank: this worker's rank.
            world_size: number of ranks.
            reconnect: open a new connection in any case: needed where threads of a device's groups use the last one.
        """
        place = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
        if self._store is None or reconnect or place != self._place:
            self._store, self._place = None, place
            with new_sockets() as self.sockets:
                found = next(rendezvous("env://", rank, world_size, timeout=timedelta(seconds=JOIN_TIMEOUT_S)))
            self._store = found[0]
        return self._store


class Wait(Protocol):
    """A wait for other ranks that no connection ends."""

    def abort(self) -> None:
        """End it with an error, in whichever thread it is."""


class World:
    """The process groups that a worker trains in.

    Attributes:
        generation: number of the membership that was joined last; 0 before the first.
    """

    def __init__(self) -> None:
        self.generation = 0
        self._connections = Connections()
        self._rendezvous_store = RendezvousStore()
        self._leaving = threading.Lock()
        self._own: set[int] = set()
        self._retired: list[Any] = []
        self._waits: WeakSet[Wait] = WeakSet()
        self._shared: Counter[str] = Counter()
        self._is_over: Callable[[], bool] = lambda: False

    def open(
        self,
        *,
        rank: int,
        world_size: int,
        backend: str,
        timeout: timedelta | None,
        device: torch.device | None,
        regrouping: int = 0,
        is_over: Callable[[], bool] = lambda: False,
        when_joined: Callable[[], None] = lambda: None,
    ) -> int:
        """Join the current generation and create its default process group, unless there is one.

        Args:
            rank: this worker's rank.
            world_size: number of ranks.
            backend: backend of the default group, e.g. `gloo` or `nccl`.
            timeout: for collectives; None for torch's default.
            device: bound to the group where the backend needs it; None on the host.
            regrouping: number under which survivors and replacements meet; 0 where all ranks start together.
            is_over: whether a newer regrouping has been announced meanwhile.
            when_joined: called when all ranks have arrived, before the process groups are created.

        Returns:
            Number of the generation.

        Raises:
            TransportError: not all ranks arrived, or a newer regrouping was announced.
        """
        if dist.is_initialized():
            # A second trainer of the same script, in a membership that the first one has joined.
            self.generation = int(os.environ.get(environment.GENERATION, "1"))
            return self.generation
        self._shared.clear()
        self._is_over = is_over
        store = self._rendezvous_store.connect(rank, world_size, reconnect=device is not None)
        if regrouping:
            store = PrefixStore(f"ckptless/regrouping-{regrouping}", store)
        try:
            generation = join_generation(store, rank, world_size, JOIN_TIMEOUT_S, is_over)
        except TransportError as error:
            if isinstance(error.__cause__, dist.DistError):
                self._rendezvous_store = RendezvousStore()
            raise
        when_joined()
        restart_group_names()
        options: dict[str, Any] = {} if timeout is None else {"timeout": timeout}
        try:
            with (
                self._connections.opening(world_size, self._rendezvous_store.sockets),
                unchanged_excepthook(enabled=bool(regrouping)),
                _one_request_to_store(),
            ):
                dist.init_process_group(
                    backend, store=generation.store, rank=rank, world_size=world_size, device_id=device, **options
                )
        finally:
            # Another fault may end this when the group exists already: it is ours, and not the script's.
            self._own = {id(group) for group in process_groups()}
        if is_over():
            raise TransportError(f"rank {rank}: another fault was reported while the process groups were created")
        atexit.register(close_world)
        self.renumber(generation.number)
        return generation.number

    def pretend(self, rank: int, world_size: int) -> None:
        """Create groups that send nothing, for a process that builds its model before it joins the other ranks."""
        open_fake_groups(rank, world_size)

    def pretend_to_be(self, rank: int, world_size: int) -> None:
        """Answer for rank and world size in a process that has not met the other ranks; see `placeholder_group`."""
        if not self.is_open:
            open_alone(rank, world_size)
            self._own = {id(group) for group in process_groups()}

    def renumber(self, generation: int) -> None:
        """Set the generation to the number that its ranks have agreed on, also for what this process trains next."""
        os.environ[environment.GENERATION] = str(generation)
        self.generation = generation

    @property
    def is_on_one_node(self) -> bool:
        """Whether one agent has started all ranks."""
        return os.environ.get("LOCAL_WORLD_SIZE") == str(dist.get_world_size())

    def share(self, name: str, text: str) -> str:
        """Pass a text from one rank to others.

        Args:
            name: what the text is; those who share it call this together.
            text: empty on all ranks but one.

        Returns:
            The text of that one.

        Raises:
            TransportError: a newer regrouping was announced, the store is lost, or the text does not come.
        """
        store, key = store_of_ranks(), f"ckptless/{name}/{self._shared[name]}"
        self._shared[name] += 1
        try:
            if text:
                store.set(key, text)
                return text
            return self._await(store, key)
        except dist.DistError as error:
            raise TransportError(f"lost the store of the ranks: {error}") from error

    def _await(self, store: Store, key: str) -> str:
        deadline, pause_s = time.monotonic() + JOIN_TIMEOUT_S, _FIRST_PAUSE_S
        while not store.check([key]):
            if self._is_over():
                raise TransportError("another fault was reported while the ranks were regrouping")
            if time.monotonic() > deadline:
                raise TransportError(f"no rank of this node has set {key!r} within {JOIN_TIMEOUT_S:g} s")
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
        return store.get(key).decode()

    def host_group(self, timeout_s: float, *, may_be_of_training: bool = False) -> dist.ProcessGroup | None:
        """Create a gloo group over all ranks for state in host memory.

        Args:
            timeout_s: longest wait for another rank, in seconds.
            may_be_of_training: whether it may be the training's own group, because it carries nothing but a few
                messages.
        """
        if may_be_of_training and dist.get_backend() == "gloo":
            return world_group()
        with self.making():
            group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
        return group if isinstance(group, dist.ProcessGroup) else None

    def abort_with_groups(self, wait: Wait) -> None:
        """Abort a wait whenever the groups of this generation are, for as long as the object exists."""
        with self._leaving:
            self._waits.add(wait)

    @property
    def is_open(self) -> bool:
        """Whether there is a default process group."""
        return dist.is_available() and dist.is_initialized()

    def foreign_groups(self) -> int:
        """How many process groups were created by other code, and cannot be re-created on its behalf."""
        return sum(id(group) not in self._own for group in process_groups())

    @contextmanager
    def making(self) -> Iterator[None]:
        """Track groups that are created within the block as ours, whichever code creates them.

        We abort and re-create them.
        """
        before = set(map(id, process_groups()))
        try:
            ranks = dist.get_world_size() if self.is_open else 0
            with self._connections.opening(ranks, self._rendezvous_store.sockets), _one_request_to_store():
                yield
        finally:
            # Another fault may end the block when only some of its groups have been created.
            self._own |= set(map(id, process_groups())) - before

    def abort(self) -> int:
        """Abort whatever a thread does in these groups, and in those being created. Callable from any thread.

        Returns:
            How many connections were aborted; each communicator of a device counts as one.
        """
        with self._leaving:
            for wait in self._waits:
                wait.abort()
            return abort_device_groups() + self._connections.abort()

    def leave(self) -> None:
        """Abort the groups and leave them; `release` frees them."""
        self.abort()
        with self._leaving:
            self._retired += process_groups()
            if dist.is_initialized():
                dist.destroy_process_group()
            self._own.clear()
            self._waits.clear()
            if self._connections.has_aborted(self._rendezvous_store.sockets):
                self._rendezvous_store = RendezvousStore()
            self._connections.forget()

    def release(self) -> None:
        """Release the groups that were left, which waits for their threads. All ranks have left them."""
        self._retired.clear()
        self._connections.release()


@cache
def world_of_process() -> World:
    """Return the world of this process, in which all its trainers train."""
    return World()


def keep_through_device_errors() -> None:
    """Configure NCCL to leave this process alive when a peer is lost: a watcher aborts what waits for that peer.

    By default torch's threads end the whole process, and with it every survivor of a fault, when they detect a lost
    connection or have dumped what was in flight.
    """
    for name in ENDS_THE_PROCESS:
        os.environ.setdefault(name, "0")


@contextmanager
def _one_request_to_store() -> Iterator[None]:
    """Let gloo read the addresses of all ranks in one request, and not in one per rank, and read short ones.

    It reads these variables whenever a group is created. They are removed again: tests of users check that training
    leaves the environment as it was. Other threads read the environment when they start, which none does meanwhile.
    """
    names = "GLOO_ENABLE_STORE_V2_API", "GLOO_ENABLE_RANK_AS_SEQUENCE_NUMBER"
    added = [name for name in names if name not in os.environ]
    os.environ.update(dict.fromkeys(added, "1"))
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


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
