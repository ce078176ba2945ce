"""Silence on a real connection: packets are dropped, and nothing is reset."""

from __future__ import annotations

import select
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
from torch.distributed import DistError, PrefixStore, TCPStore  # type: ignore[attr-defined]

from lightning_ckptless.membership.agent.node_liveness import Heartbeat
from lightning_ckptless.protocol.node_liveness import AllAlive, Bound, NodesLost, Partitioned

BOUND = Bound(0.2, 3)
SOON_S = 10.0


class Cable:
    """Connections to a port that can be made silent in mid-flight."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._pairs: dict[socket.socket, socket.socket] = {}
        self._over, self._silent = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._carry)
        self._thread.start()

    def fall_silent(self) -> None:
        """From now on nothing arrives any more."""
        self._silent.set()

    def close(self) -> None:
        """Take the cable away."""
        self._over.set()
        self._thread.join()
        for end in (self._listener, *self._pairs):
            end.close()

    def _carry(self) -> None:
        while not self._over.is_set():
            for end in select.select([self._listener, *self._pairs], [], [], 0.02)[0]:
                if self._silent.is_set():
                    self._over.wait(0.02)
                elif end is self._listener:
                    here, there = end.accept()[0], socket.create_connection(("127.0.0.1", self._target))
                    self._pairs |= {here: there, there: here}
                elif data := end.recv(65536):
                    self._pairs[end].sendall(data)
                else:
                    other = self._pairs.pop(end)
                    self._pairs.pop(other)
                    other.close()
                    end.close()


def make_store() -> Any:
    """The store of a rendezvous, or of its workers. Not a fixture: pytest would hold it, and its sockets, too long."""
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


@contextmanager
def beating(
    store: TCPStore, node: int, nodes: int, *, worker_store: int = 0, bound: Bound = BOUND
) -> Iterator[Heartbeat]:
    """A node that beats, over a store that it is connected to."""
    heartbeat = Heartbeat(bound, "127.0.0.1")
    place = ("127.0.0.1", store.port)
    heartbeat.begin_round(
        PrefixStore("round", store), node=node, nodes=nodes, place=place, worker_store=("127.0.0.1", worker_store or 1)
    )
    try:
        yield heartbeat
    finally:
        heartbeat.close()


def wait_for(heartbeat: Heartbeat, kind: type) -> float:
    """Seconds until a finding of a kind is there."""
    began, done = time.monotonic(), threading.Event()
    while not isinstance(heartbeat.finding, kind):
        assert time.monotonic() - began < SOON_S, heartbeat.finding
        done.wait(0.01)
    return time.monotonic() - began


def test_a_node_whose_packets_are_dropped_finds_itself_partitioned() -> None:
    server = make_store()
    cable = Cable(server.port)
    store = TCPStore("127.0.0.1", cable.port, is_master=False)
    try:
        with beating(store, 1, 2) as cut, beating(server, 0, 2) as other:
            threading.Event().wait(2 * BOUND.interval_s)
            assert (cut.finding, other.finding) == (AllAlive(), AllAlive())
            with ThreadPoolExecutor(1) as pool:
                cable.fall_silent()
                # As an agent does: it waits in the store, which no time-out of it ends.
                waiting = pool.submit(store.add, "asked", 1)
                took_s = wait_for(cut, Partitioned)
                assert BOUND.partitioned_s - BOUND.interval_s <= took_s < SOON_S
                with pytest.raises(DistError):
                    waiting.result(timeout=SOON_S)
            wait_for(other, NodesLost)
            assert other.finding.nodes == (1,)  # type: ignore[union-attr]
    finally:
        cable.close()


def test_a_lost_node_is_detected_and_the_next_round_starts_over() -> None:
    server = make_store()
    with beating(server, 0, 2) as stays:
        with beating(server.clone(), 1, 2):
            threading.Event().wait(2 * BOUND.interval_s)
        wait_for(stays, NodesLost)
        stays.begin_round(
            PrefixStore("next", server),
            node=0,
            nodes=2,
            place=("127.0.0.1", server.port),
            worker_store=("127.0.0.1", 1),
        )
        assert stays.finding == AllAlive()
        stays.rest()
        threading.Event().wait(2 * BOUND.lost_s)
        assert stays.finding == AllAlive()


def test_a_node_whose_connection_is_closed_is_lost_long_before_the_limit() -> None:
    server, patient = make_store(), Bound(0.05, 6000)
    with beating(server, 0, 2, bound=patient) as stays:
        with beating(server.clone(), 1, 2, bound=patient):
            # Time to connect, and for as many pauses as a node needs to know its longest.
            threading.Event().wait(1.5)
        wait_for(stays, NodesLost)
        assert "its agent's connection was closed" in stays.finding.reason  # type: ignore[union-attr]


def test_a_node_that_says_goodbye_does_not_count_as_lost() -> None:
    server = make_store()
    with beating(server, 0, 2) as stays, beating(server.clone(), 1, 2) as leaves:
        threading.Event().wait(2 * BOUND.interval_s)
        leaves.leave()
        threading.Event().wait(2 * BOUND.lost_s)
        assert (stays.finding, leaves.finding) == (AllAlive(), AllAlive())


def test_an_agent_does_not_wait_for_a_silent_workers_store() -> None:
    server = make_store()
    workers = make_store()
    cable = Cable(workers.port)
    client = TCPStore("127.0.0.1", cable.port, is_master=False)
    try:
        with beating(server, 1, 3, worker_store=cable.port) as heartbeat, ThreadPoolExecutor(1) as pool:
            cable.fall_silent()
            waiting = pool.submit(client.check, ["regrouping"])
            wait_for(heartbeat, NodesLost)
            assert heartbeat.finding.nodes == (0, 2)  # type: ignore[union-attr]
            with pytest.raises(DistError):
                waiting.result(timeout=SOON_S)
    finally:
        cable.close()
