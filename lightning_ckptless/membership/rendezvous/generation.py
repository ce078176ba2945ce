"""A new number and a new part of the store for every membership.

A store may outlive the processes that use it: torchrun shares one over all its restarts. Nothing that a dead process
has written there, including its number, may be mistaken for a message of a live one. So a number counts only for ranks
that find themselves in it:

    rank 0                                   every other rank
    open     a number never used before      read     the number that rank 0 published last
    publish  the number                      hello    own random nonce, under the number
    collect  all nonces under the number     accept   the number whose `go` for this rank contains its nonce
    go       to each rank, its nonce         else     read again; hello again under every new number

`go` is written in one request, but each rank reads only its own part: with a single list, the bytes sent by the store
would grow with the square of the number of ranks. A `go` with a process's nonce was written after that process started,
by a rank 0 that was alive then. A rank 0 that finds a published number other than its own opens a new one. So a number
that a dying process publishes late delays the live ranks but has no other effect.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass

from torch.distributed import DistError
from torch.distributed.distributed_c10d import PrefixStore, Store

from lightning_ckptless.errors import TransportError
from lightning_ckptless.membership.clock import Clock
from lightning_ckptless.protocol.wording import name_ranks

_COUNTER = "ckptless/generations"
_CURRENT = "ckptless/current"
_FIRST_PAUSE_S = 0.001
_LONGEST_PAUSE_S = 0.003
_QUESTIONS_PER_S = 2000
_CLOCK = Clock()


@dataclass(frozen=True, slots=True)
class Generation:
    """One membership of a run.

    Args:
        number: grows with every membership that uses the same store.
        store: a part of the store that no other membership uses.
    """

    number: int
    store: Store


def join_generation(
    store: Store,
    rank: int,
    world_size: int,
    timeout_s: float,
    is_over: Callable[[], bool] = lambda: False,
    clock: Clock = _CLOCK,
) -> Generation:
    """Agree on a generation with all ranks of this membership.

    Every rank calls it once, in any order.

    Args:
        store: connected to all ranks; may hold data of dead memberships.
        rank: 0 to `world_size - 1`.
        world_size: number of ranks.
        timeout_s: time for all ranks to arrive, in seconds.
        is_over: polled while waiting: whether this membership is over before it has begun.
        clock: clock of this process.

    Raises:
        TransportError: not all ranks arrived in time, the store is lost, or the membership is over. The message names
            the missing ranks.
    """
    assert 0 <= rank < world_size
    deadline = clock.monotonic() + timeout_s
    rendezvous = _Rendezvous(store, rank, world_size, deadline, timeout_s, is_over, clock)
    try:
        number = rendezvous.lead() if rank == 0 else rendezvous.follow()
    except DistError as error:
        raise TransportError(f"rank {rank}: lost the store of the rendezvous of {world_size} ranks: {error}") from error
    return Generation(number, PrefixStore(f"ckptless/{number}", store))


def skip_generations(store: Store, count: int) -> None:
    """Start the numbers of a new store after `count` generations numbered elsewhere."""
    store.add(_COUNTER, count)


@dataclass(slots=True)
class _Rendezvous:
    store: Store
    rank: int
    world_size: int
    deadline: float
    timeout_s: float
    is_over: Callable[[], bool]
    clock: Clock
    _pauses: int = 0

    def lead(self) -> int:
        """Rank 0: open numbers until all ranks accept one."""
        while True:
            number = self.store.add(_COUNTER, 1)
            self.store.set(_CURRENT, str(number))
            self._say_hello(number)
            hellos = [_hello_key(number, rank) for rank in range(self.world_size)]
            while self._published() == number:
                if self.store.check(hellos):
                    nonces = self.store.multi_get(hellos)
                    keys = [_go_key(number, rank) for rank in range(self.world_size)]
                    self.store.multi_set(keys, nonces)  # type: ignore[attr-defined]  # missing in the stubs
                    return number
                self._pause(number)

    def follow(self) -> int:
        """Other ranks: say hello under each published number until one is confirmed."""
        nonces: dict[int, str] = {}
        while True:
            number = self._published()
            if number is not None and number not in nonces:
                nonces[number] = self._say_hello(number)
                self._pauses = 0
            for said, nonce in nonces.items():
                go = _go_key(said, self.rank)
                if self.store.check([go]) and self.store.get(go).decode() == nonce:
                    return said
            self._pause(number)

    def _say_hello(self, number: int) -> str:
        nonce = uuid.uuid4().hex
        self.store.set(_hello_key(number, self.rank), nonce)
        return nonce

    def _published(self) -> int | None:
        return int(self.store.get(_CURRENT)) if self.store.check([_CURRENT]) else None

    def _pause(self, number: int | None) -> None:
        """Wait before the store is polled again: longer each time, and longer the more ranks there are."""
        if self.is_over():
            raise TransportError(
                f"rank {self.rank}: another fault was reported during the rendezvous of {self.world_size} ranks"
            )
        if self.clock.monotonic() > self.deadline:
            raise self._late(number)
        longest_s = max(_LONGEST_PAUSE_S, self.world_size / _QUESTIONS_PER_S)
        self.clock.sleep(min(_FIRST_PAUSE_S * 2 ** min(self._pauses, 10), longest_s))
        self._pauses += 1

    def _late(self, number: int | None) -> TransportError:
        missing = [0] if number is None else self._missing(number)
        return TransportError(
            f"rank {self.rank} waited {self.timeout_s:g} s for all {self.world_size} ranks to join; "
            f"{name_ranks(missing)} did not arrive. Look for their errors above, or for a node "
            "that cannot reach the others"
        )

    def _missing(self, number: int) -> list[int]:
        absent = [rank for rank in range(self.world_size) if not self.store.check([_hello_key(number, rank)])]
        # All have said hello, so rank 0, which answers, is missing: the number came from a dead membership.
        return absent or [0]


def _hello_key(number: int, rank: int) -> str:
    return f"ckptless/{number}/hello/{rank}"


def _go_key(number: int, rank: int) -> str:
    return f"ckptless/{number}/go/{rank}"
