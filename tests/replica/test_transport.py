"""A conformance suite for all transports, and their behaviour when a peer dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from concurrent.futures import Future
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TypeVar, cast

import pytest
import torch
import torch.distributed as dist

from lightning_ckptless.errors import TransportError
from lightning_ckptless.protocol.ballots import BALLOT_BITS
from lightning_ckptless.replica.ballot_box import BallotBox
from lightning_ckptless.replica.node_transport import share_memory
from lightning_ckptless.replica.transport import GlooTransport, LoopbackTransport, SoloTransport, Transport
from tests.replica.conftest import Together

T = TypeVar("T")
Join = Callable[[int], Transport]
Kind = Callable[..., Join]

TIMEOUT_S = 20.0


def loopback(world_size: int, folder: Path, timeout_s: float = TIMEOUT_S) -> Join:
    ranks = LoopbackTransport.world(world_size, timeout_s=timeout_s)
    return ranks.__getitem__


def gloo(world_size: int, folder: Path, timeout_s: float = TIMEOUT_S) -> Join:
    store = dist.HashStore()  # type: ignore[attr-defined]

    def join(rank: int) -> Transport:
        backend = dist.ProcessGroupGloo(store, rank, world_size, timedelta(seconds=timeout_s))
        # A backend has the methods of a group. A real group would need the process-wide default group.
        return GlooTransport(cast("dist.ProcessGroup", backend))

    return join


def solo(world_size: int, folder: Path) -> Join:
    assert world_size == 1
    return lambda rank: SoloTransport()


def nodes(names: str, world_size: int, folder: Path) -> Join:
    """Ranks that share the memory of their nodes.

    Args:
        names: node of each rank, one letter each.
        world_size: number of ranks.
        folder: contains the arenas.
    """
    messages, boxes = LoopbackTransport.world(world_size, timeout_s=TIMEOUT_S), list[BallotBox]()
    given = {name: Future[str]() for name in names}

    def join(rank: int) -> Transport:
        arena = folder / names[rank]
        arena.mkdir(exist_ok=True)

        def spread_name(name: str) -> str:
            if name:
                given[names[rank]].set_result(name)
            return given[names[rank]].result(TIMEOUT_S)

        shared = share_memory(
            messages[rank], names, arena, spread_name=spread_name, timeout_s=TIMEOUT_S, when_open=boxes.append
        )
        messages[rank].gather(b"")
        assert list(arena.iterdir()) == [], "another generation could find the ballots of this one"
        return shared

    return join


CASES: list[tuple[Kind, int]] = [
    (solo, 1),
    (loopback, 1),
    (loopback, 2),
    (loopback, 4),
    (gloo, 1),
    (gloo, 2),
    (gloo, 4),
    *((partial(nodes, names), len(names)) for names in ("aa", "aaaa", "abba", "abc", "abbbcab")),
]


def name_of(kind: Kind) -> str:
    return f"{kind.func.__name__}-{kind.args[0]}" if isinstance(kind, partial) else kind.__name__


class Ranks:
    """Runs one function on every rank's transport."""

    def __init__(self, kind: Kind, size: int, folder: Path, together: Together) -> None:
        self.size = size
        self._join, self._together = kind(size, folder), together

    def __call__(self, body: Callable[[Transport], T]) -> list[T]:
        def one(rank: int) -> T:
            transport = self._join(rank)
            assert (transport.rank, transport.world_size) == (rank, self.size)
            try:
                return body(transport)
            finally:
                transport.agree(True)
                transport.close()

        return self._together(self.size, one)


@pytest.fixture(params=CASES, ids=lambda case: f"{name_of(case[0])}-{case[1]}")
def world(request: pytest.FixtureRequest, tmp_path: Path, together: Together) -> Ranks:
    """A world of several ranks over one of the transports."""
    kind, size = request.param
    return Ranks(kind, size, tmp_path, together)


def parcel(source: int, target: int, length: int) -> torch.Tensor:
    return ((torch.arange(length) * 7 + source * 31 + target) % 251).to(torch.uint8)


@pytest.mark.parametrize("length", [0, 1, 4096, 300_001])
def test_every_rank_sends_to_every_other_concurrently(world: Ranks, length: int) -> None:
    def body(transport: Transport) -> bool:
        peers = [peer for peer in range(transport.world_size) if peer != transport.rank]
        rooms = {peer: torch.empty(length, dtype=torch.uint8) for peer in peers}
        transport.exchange(
            [(peer, 1, parcel(transport.rank, peer, length)) for peer in peers],
            [(peer, 1, room) for peer, room in rooms.items()],
        )
        return all(torch.equal(room, parcel(peer, transport.rank, length)) for peer, room in rooms.items())

    assert all(world(body))


def test_tags_distinguish_messages_between_two_ranks(world: Ranks) -> None:
    def body(transport: Transport) -> bool:
        peers = [peer for peer in range(transport.world_size) if peer != transport.rank]
        rooms = {(peer, tag): torch.empty(5 + tag, dtype=torch.uint8) for peer in peers for tag in (2, 0, 1)}
        transport.exchange(
            [(peer, tag, parcel(tag, peer, 5 + tag)) for peer in peers for tag in range(3)],
            [(peer, tag, room) for (peer, tag), room in rooms.items()],
        )
        return all(torch.equal(room, parcel(tag, transport.rank, 5 + tag)) for (_, tag), room in rooms.items())

    assert all(world(body))


def test_one_way_traffic_needs_no_answer(world: Ranks) -> None:
    def body(transport: Transport) -> bool:
        room = torch.empty(10, dtype=torch.uint8)
        last = transport.world_size - 1
        sends = [(last, 0, parcel(0, last, 10))] if transport.rank == 0 < last else []
        receives = [(0, 0, room)] if transport.rank == last > 0 else []
        transport.exchange(sends, receives)
        return not receives or torch.equal(room, parcel(0, last, 10))

    assert all(world(body))


def test_a_sent_tensor_may_change_afterwards(world: Ranks) -> None:
    def body(transport: Transport) -> bool:
        if transport.world_size == 1:
            return True
        after, before = (transport.rank + 1) % transport.world_size, (transport.rank - 1) % transport.world_size
        data, room = torch.empty(10_000, dtype=torch.uint8), torch.empty(10_000, dtype=torch.uint8)
        seen = []
        for value in range(5):
            data.fill_(value)
            transport.exchange([(after, 0, data)], [(before, 0, room)])
            seen.append(sorted(set(room.tolist())))
        return seen == [[value] for value in range(5)]

    assert all(world(body))


@pytest.mark.parametrize("against", [None, 0, "last"])
def test_all_must_agree(world: Ranks, against: int | str | None) -> None:
    dissenter = world.size - 1 if against == "last" else against
    assert world(lambda transport: transport.agree(transport.rank != dissenter)) == [against is None] * world.size


def test_a_vote_has_many_bits(world: Ranks) -> None:
    def body(transport: Transport) -> list[int]:
        return [transport.vote(((1 << BALLOT_BITS) - 1) ^ (1 << (bit + transport.rank))) for bit in range(10)]

    cleared = [sum(1 << bit + rank for rank in range(world.size)) for bit in range(10)]
    assert world(body) == [[((1 << BALLOT_BITS) - 1) ^ bits for bits in cleared]] * world.size


def test_every_rank_gets_all_payloads(world: Ranks) -> None:
    payloads = [[bytes([rank, turn]) * (rank * 1000 * (1 + turn)) for rank in range(world.size)] for turn in range(5)]

    def body(transport: Transport) -> list[list[bytes]]:
        return [transport.gather(of_turn[transport.rank]) for of_turn in payloads]

    assert world(body) == [payloads] * world.size


def test_empty_payloads_can_be_gathered(world: Ranks) -> None:
    assert world(lambda transport: transport.gather(b"")) == [[b""] * world.size] * world.size


# ------------------------------------------------------------------ silence and death


def ask(transport: Transport, what: str) -> None:
    other = 1 - transport.rank
    if what == "exchange":
        transport.exchange([], [(other, 0, torch.empty(10, dtype=torch.uint8))])
    elif what == "agree":
        transport.agree(True)
    else:
        transport.gather(b"x")


@pytest.mark.parametrize("what", ["exchange", "agree", "gather"])
@pytest.mark.parametrize("kind", [loopback, gloo])
def test_a_silent_peer_is_an_error(kind: Kind, what: str, tmp_path: Path, together: Together) -> None:
    join = kind(2, tmp_path, timeout_s=0.3)
    ranks = together(2, join)
    with pytest.raises(TransportError, match="rank 0"):
        ask(ranks[0], what)


def test_a_closed_loopback_rank_is_detected_immediately(together: Together) -> None:
    ranks = LoopbackTransport.world(2, timeout_s=3600)
    ranks[1].close()
    for what in ("exchange", "agree", "gather"):
        with pytest.raises(TransportError, match="rank 1 has closed"):
            ask(ranks[0], what)
        with pytest.raises(TransportError, match="its transport is closed"):
            ask(ranks[1], what)


def test_a_message_of_another_length_is_refused() -> None:
    ranks = LoopbackTransport.world(2)
    ranks[1].exchange([(0, 0, torch.zeros(9, dtype=torch.uint8))], [])
    with pytest.raises(TransportError, match="rank 1 sent 9 bytes under tag 0, expected 10"):
        ask(ranks[0], "exchange")


PEER = """
    import os, signal, sys, torch, torch.distributed as dist
    from datetime import timedelta
    from lightning_ckptless.errors import TransportError
    from lightning_ckptless.replica.transport import GlooTransport
    folder, rank, what = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    dist.init_process_group("gloo", f"file://{folder}/store", timedelta(seconds=60), 2, rank)
    transport = GlooTransport(dist.new_group(backend="gloo"))
    assert transport.agree(True) and not transport.agree(rank == 0)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        if what == "exchange":
            transport.exchange([], [(1, 0, torch.empty(10, dtype=torch.uint8))])
        else:
            transport.agree(True)
    except TransportError as error:
        print("received:", error)
"""


@pytest.mark.parametrize("what", ["exchange", "agree"])
def test_a_killed_process_is_detected_by_its_peer(tmp_path: Path, what: str) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-c", textwrap.dedent(PEER), str(tmp_path)]
    survivor, victim = (
        subprocess.Popen([*command, str(rank), what], env=environment, stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    )
    output, _ = survivor.communicate(timeout=50)
    victim.communicate(timeout=50)
    assert victim.returncode == -signal.SIGKILL
    assert output.startswith("received: rank 0 of 2:")
