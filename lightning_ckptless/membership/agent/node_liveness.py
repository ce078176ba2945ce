"""Heartbeats between the agents of a run, over the store of their rendezvous.

There are two threads. One exchanges heartbeats with the store and may wait for an answer forever, because a connection
that drops packets reports no error. The other one watches the clock. When it finds this node partitioned, it shuts down
the agent's connections to the stores, so that whatever the agent's main thread waits for there fails at once.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import replace
from typing import Any

from torch.distributed import DistError

from lightning_ckptless.membership.worker.connections import abort_connections_to
from lightning_ckptless.protocol.node_liveness import (
    AllAlive,
    Bound,
    CutOff,
    Finding,
    Liveness,
    NodesLost,
    judge,
    watched_by,
)

_CHECKS_PER_INTERVAL = 5
_CLOSE_S = 5.0
_CUT_EVERY_S = 0.05
_GOODBYE = -(2**62)

Address = tuple[str, int]


class Heartbeat:
    """The heartbeats of one agent, over all rounds.

    Args:
        bound: how much silence is tolerated.
        clock: seconds, monotonic.
    """

    def __init__(self, bound: Bound, clock: Callable[[], float] = time.monotonic) -> None:
        self.bound = bound
        self._clock = clock
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._watch: threading.Thread | None = None
        self._round: _Round | None = None
        self._finding: Finding = AllAlive()
        self._place: tuple[Address, ...] = ()
        self._worker_store: tuple[Address, ...] = ()

    @property
    def finding(self) -> Finding:
        """The latest finding. A node that was found partitioned stays so."""
        return self._finding

    def begin_round(self, store: Any, *, node: int, nodes: int, place: Address, worker_store: Address) -> None:
        """Exchange heartbeats among the nodes that have met.

        Args:
            store: of the round; a separate connection to it is opened.
            node: number of this node in the round.
            nodes: how many there are.
            place: address of the rendezvous.
            worker_store: address of the store in which the workers of the round meet.
        """
        self.rest()
        beats = _Round(store.clone(), node, watched_by(node, nodes), f"{place[0]}:{place[1]}", self._clock)
        addresses = _addresses_of(place), _addresses_of(worker_store)
        with self._lock:
            self._round, (self._place, self._worker_store) = beats, addresses
        beats.start(self.bound.interval_s)
        if self._watch is None:
            self._watch = threading.Thread(target=self._check, name="ckptless-heartbeat-watch", daemon=True)
            self._watch.start()

    def rest(self) -> None:
        """Pause until the next round: there is no other node to exchange heartbeats with."""
        with self._lock:
            before, self._round = self._round, None
            if not isinstance(self._finding, CutOff):
                self._finding = AllAlive()
        if before is not None:
            before.end()

    def leave(self) -> None:
        """Note that this node has done its part: from now on it may be silent."""
        with self._lock:
            beats = self._round
        self.rest()
        if beats is not None:
            beats.say_goodbye()

    def close(self) -> None:
        """Stop the threads."""
        self._over.set()
        if self._watch is not None:
            self._watch.join(_CLOSE_S)
        self.rest()

    def _check(self) -> None:
        pause_s = self.bound.interval_s / _CHECKS_PER_INTERVAL
        while not self._over.wait(pause_s):
            with self._lock:
                if self._round is not None and not isinstance(self._finding, CutOff):
                    self._finding = self._round.judge(self.bound)
                found, place, worker_store = self._finding, self._place, self._worker_store
            if isinstance(found, CutOff):
                # Repeatedly: a connection that is being established at this moment is aborted once it exists.
                pause_s = _CUT_EVERY_S
                abort_connections_to({*place, *worker_store})
            elif isinstance(found, NodesLost) and 0 in found.nodes:
                # The lost node hosts the workers' store, and the agent may be waiting for it.
                abort_connections_to(worker_store)


class _Round:
    """The heartbeats of one round: a thread that increments this node's counter and reads those of the watched nodes.

    Args:
        store: over a connection of its own.
        node: number of this node.
        watched: numbers of the nodes it watches.
        place: address of the store, for messages.
        clock: seconds.
    """

    def __init__(self, store: Any, node: int, watched: Collection[int], place: str, clock: Callable[[], float]) -> None:
        self._store = store
        self._node = node
        self._place = place
        self._clock = clock
        self._over = threading.Event()
        self._counts = dict.fromkeys(watched, 0)
        self._lock = threading.Lock()
        self._progress = self._new_liveness()
        self._thread: threading.Thread | None = None

    def start(self, interval_s: float) -> None:
        """Start sending heartbeats."""
        self._thread = threading.Thread(target=self._beat, args=(interval_s,), name="ckptless-heartbeat", daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Stop sending heartbeats."""
        self._over.set()
        if self._thread is not None:
            self._thread.join(_CLOSE_S)

    def say_goodbye(self) -> None:
        """Announce that this node leaves, so that no node misses it; called after `end`."""
        # If the store does not answer, no node can be notified.
        with suppress(DistError, RuntimeError):
            self._store.add(_key(self._node), _GOODBYE)

    def judge(self, bound: Bound) -> Finding:
        """Return the finding on what was seen so far."""
        with self._lock:
            now, liveness = self._clock(), self._progress
            # A process that was stopped has seen nothing of what happened meanwhile.
            was_stopped = now - liveness.looked_at > bound.cut_s / 2
            self._progress = self._new_liveness() if was_stopped else replace(liveness, looked_at=now)
        return judge(liveness, bound, now=now, endpoint=self._place)

    def _new_liveness(self) -> Liveness:
        now = self._clock()
        return Liveness(now, now, dict.fromkeys(self._counts, now))

    def _beat(self, interval_s: float) -> None:
        while not self._over.is_set():
            try:
                self._store.add(_key(self._node), 1)
                counts = {node: self._store.add(_key(node), 0) for node in self._counts}
            except (DistError, RuntimeError):
                # `judge` evaluates the silence; a closed connection stays silent.
                return
            now = self._clock()
            heard = {node: now for node, count in counts.items() if count != self._counts[node]}
            with self._lock:
                self._counts = {node: count for node, count in counts.items() if count >= 0}
                known = {**self._progress.heard_at, **heard}
                heard_at = {node: at for node, at in known.items() if node in self._counts}
                self._progress = replace(self._progress, answered_at=now, heard_at=heard_at)
            self._over.wait(interval_s)


def _key(node: int) -> str:
    return f"ckptless/heartbeat/{node}"


def _addresses_of(address: Address) -> tuple[Address, ...]:
    """Resolve an address while the network is available."""
    host, port = address
    found: list[Any] = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return tuple(dict.fromkeys((str(sockaddr[0]), port) for *_, sockaddr in found))
