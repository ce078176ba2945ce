"""Process groups in memory: collectives and messages between the ranks of one generation.

A collective completes for each rank after a delay of its own. If a rank is lost or aborts its connections meanwhile,
it may have completed for some ranks and fail for others, as with gloo.
"""

from __future__ import annotations

import zlib
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial, reduce
from operator import and_
from typing import Any

from lightning_ckptless.errors import TransportError
from lightning_ckptless.replica.checksum import bytes_of
from lightning_ckptless.replica.transport import Message
from tests.simulation.tasks import Scheduler, Waiting

_DELIVER_S = 0.001
_NOTICE_S = 0.004
"""Mean time until a rank notices that the connection to a peer is closed."""
Done = Callable[[list[Any] | None], None]
"""Called with the values of all ranks; None if the collective has failed."""


@dataclass
class _Collective:
    kind: str
    values: dict[int, Any] = field(default_factory=dict)
    done: dict[int, Done] = field(default_factory=dict)


class Group:
    """The connections between the ranks of one generation.

    Args:
        scheduler: runs the simulation.
        name: names it in messages.
        world_size: number of ranks.
    """

    def __init__(self, scheduler: Scheduler, name: str, world_size: int) -> None:
        self.name = name
        self.world_size = world_size
        self._scheduler = scheduler
        self._broken: set[int] = set()
        self._entered: dict[tuple[str, int], int] = defaultdict(int)
        self._collectives: dict[tuple[str, int], _Collective] = {}
        self._mail: dict[tuple[int, int, int], deque[bytes]] = defaultdict(deque)
        self._waiting: Waiting = []
        self._is_stalled = False

    def after_step(self, history: int) -> int:
        """The history of a state after a step of these ranks: a step that is repeated need not have the same result.

        Args:
            history: before it.
        """
        return zlib.crc32(f"{history} {self.name}".encode())

    def is_broken(self, rank: int) -> bool:
        """Whether a rank has lost or aborted its connections."""
        return rank in self._broken

    def abort(self, rank: int) -> None:
        """Abort all connections of a rank; no peer notices."""
        if rank not in self._broken:
            self._broken.add(rank)
            for collective in self._collectives.values():
                if (done := collective.done.pop(rank, None)) is not None:
                    self._scheduler.later(_DELIVER_S, partial(done, None))
            self._scheduler.notify(self._waiting)

    def stall(self) -> None:
        """Some ranks no longer reach the others: nothing completes, and no rank gets an error."""
        self._is_stalled = True

    def lose(self, rank: int, *, silently: bool) -> None:
        """A rank's process has exited.

        Args:
            rank: the rank.
            silently: whether its host is lost too, so that no connection is closed.
        """
        self._broken.add(rank)
        if silently or self._is_stalled:
            return
        for peer in range(self.world_size):
            if peer not in self._broken and self._scheduler.chance.random() < 0.5:
                self._scheduler.later(_NOTICE_S, partial(self.abort, peer))

    # ------------------------------------------------------------------ collectives

    def enter(self, rank: int, channel: str, kind: str, value: Any, done: Done) -> None:
        """Enter a collective without waiting for it.

        Args:
            rank: this rank.
            channel: collectives of one channel are in the same order on all ranks.
            kind: what it is, which has to be the same on all ranks.
            value: given by this rank.
            done: called when it has completed or failed.
        """
        if rank in self._broken:
            self._scheduler.later(_DELIVER_S, partial(done, None))
            return
        number = self._entered[channel, rank]
        self._entered[channel, rank] += 1
        collective = self._collectives.setdefault((channel, number), _Collective(kind))
        self._scheduler.require(
            collective.kind == kind, f"{self.name}: rank {rank} enters {kind}, another one {collective.kind}"
        )
        collective.values[rank], collective.done[rank] = value, done
        if len(collective.values) == self.world_size:
            for each in range(self.world_size):
                self._scheduler.later(_DELIVER_S, partial(self._deliver, (channel, number), each))

    def _deliver(self, key: tuple[str, int], rank: int) -> None:
        """Complete a collective for a rank that has not aborted its connections meanwhile."""
        collective = self._collectives[key]
        if not self._is_stalled and (done := collective.done.pop(rank, None)) is not None:
            done([collective.values[each] for each in range(self.world_size)])

    def collect(self, rank: int, channel: str, kind: str, value: Any) -> list[Any]:
        """Enter a collective, and wait for it; returns the values of all ranks.

        Raises:
            TransportError: a peer is lost, or this rank has aborted its connections.
        """
        found: list[list[Any] | None] = []
        waiting: Waiting = []

        def done(values: list[Any] | None) -> None:
            found.append(values)
            self._scheduler.notify(waiting)

        self.enter(rank, channel, kind, value, done)
        self._scheduler.wait_for(waiting, lambda: bool(found))
        if found[0] is None:
            raise TransportError(f"rank {rank} of {self.name}: {kind} failed")
        return found[0]

    # ------------------------------------------------------------------ messages

    def send(self, source: int, target: int, tag: int, data: bytes) -> None:
        """Send a message."""
        if not self._is_stalled:
            self._mail[source, target, tag].append(data)
            self._scheduler.notify(self._waiting)

    def receive(self, source: int, target: int, tag: int) -> bytes:
        """Wait for a message.

        Raises:
            TransportError: the peer is lost, or this rank has aborted its connections.
        """
        queue = self._mail[source, target, tag]
        self._scheduler.wait_for(self._waiting, lambda: bool(queue) or target in self._broken)
        if target in self._broken:
            raise TransportError(f"rank {target} of {self.name}: no message from rank {source}")
        return queue.popleft()


class GroupTransport:
    """A transport over a group; see `replica.transport.Transport`.

    Args:
        group: the group.
        rank: this rank.
    """

    def __init__(self, group: Group, rank: int) -> None:
        self.rank = rank
        self.world_size = group.world_size
        self._group = group

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> None:
        """See `Transport.exchange`."""
        for peer, tag, tensor in sends:
            self._group.send(self.rank, peer, tag, bytes(bytes_of(tensor)))
        for peer, tag, tensor in receives:
            bytes_of(tensor)[:] = self._group.receive(peer, self.rank, tag)

    def vote(self, mine: int) -> int:
        """See `Transport.vote`."""
        return int(reduce(and_, self._group.collect(self.rank, "host", "vote", mine)))

    def agree(self, mine: bool) -> bool:
        """See `Transport.agree`."""
        return self.vote(int(mine)) == 1

    def gather(self, payload: bytes) -> list[bytes]:
        """See `Transport.gather`."""
        return self._group.collect(self.rank, "host", "gather", payload)

    def close(self) -> None:
        """Nothing to release."""
