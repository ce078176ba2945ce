"""Heartbeats between the agents of a run, over the store of their rendezvous.

There are three threads. One exchanges heartbeats with the store and may wait for an answer forever, because a
connection that drops packets reports no error. One waits until the connection to the agent of a watched node is closed,
and then lets heartbeats be exchanged more often. One watches the clock. When it finds that this node is partitioned, it
shuts down the agent's connections to the stores, so that any wait of the agent's main thread there fails at once.
"""

from __future__ import annotations

import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

from torch.distributed import DistError

from lightning_ckptless.membership.agent.peer_connections import Address, PeerConnections
from lightning_ckptless.membership.worker.connections import abort_connections_to
from lightning_ckptless.protocol.node_liveness import (
    PAUSES,
    AllAlive,
    Bound,
    Finding,
    Heard,
    Liveness,
    NodesLost,
    Partitioned,
    judge,
    longest_pause_s,
    watched_by,
)

_CHECKS_PER_INTERVAL = 5
_CLOSE_S = 5.0
_CUT_EVERY_S = 0.05
_GOODBYE = -(2**62)
_HURRIED_S = 0.1
"""Pause between two heartbeats after a connection was closed, until it is known why."""


class Heartbeat:
    """The heartbeats of one agent, over all rounds.

    Args:
        bound: how much silence is tolerated.
        host: name or address under which other agents reach this one.
        clock: seconds, monotonic.
    """

    def __init__(self, bound: Bound, host: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.bound = bound
        self._host = host
        self._clock = clock
        self._pauses = deque[float](maxlen=PAUSES)
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
        """Exchange heartbeats among the nodes of a round.

        Args:
            store: store of the round; a separate connection to it is opened.
            node: number of this node in the round.
            nodes: how many there are.
            place: address of the rendezvous.
            worker_store: address of the store of the round's workers.
        """
        self.rest()
        beats = _Round(
            store.clone(), node, nodes, self._host, self.bound, self._pauses, f"{place[0]}:{place[1]}", self._clock
        )
        addresses = _addresses_of(place), _addresses_of(worker_store)
        with self._lock:
            self._round, (self._place, self._worker_store) = beats, addresses
        beats.start()
        if self._watch is None:
            self._watch = threading.Thread(target=self._check, name="ckptless-heartbeat-watch", daemon=True)
            self._watch.start()

    def rest(self) -> None:
        """Pause until the next round: there is no other node to exchange heartbeats with."""
        with self._lock:
            before, self._round = self._round, None
            if not isinstance(self._finding, Partitioned):
                self._finding = AllAlive()
        if before is not None:
            before.end()

    def leave(self) -> None:
        """Record that this node has done its part and may be silent from now on."""
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
        pause_s = self.bound.beat_s / _CHECKS_PER_INTERVAL
        while not self._over.wait(pause_s):
            with self._lock:
                if self._round is not None and not isinstance(self._finding, Partitioned):
                    self._finding = self._round.judge()
                found, place, worker_store = self._finding, self._place, self._worker_store
            if isinstance(found, Partitioned):
                # Repeatedly: a connection that is being established at this moment is aborted once it exists.
                pause_s = _CUT_EVERY_S
                abort_connections_to({*place, *worker_store})
            elif isinstance(found, NodesLost) and 0 in found.nodes:
                # The lost node hosts the workers' store, and the agent may be waiting for it.
                abort_connections_to(worker_store)


class _Round:
    """The heartbeats of one round: a thread that increments this node's counter and reads those of the watched nodes.

    | Key | Content |
    |---|---|
    | `heartbeat/NODE` | counter; negative once the node has done its part |
    | `heartbeat/NODE/pause` | longest of its last pauses between two heartbeats, in ms; 0 if unknown |
    | `heartbeat/NODE/address` | where its agent listens for the connections of others |

    Args:
        store: the store, over a separate connection.
        node: number of this node.
        nodes: how many there are.
        host: name or address under which other agents reach this one.
        bound: how much silence is tolerated.
        pauses: pauses between the last heartbeats of this node; extended.
        place: address of the store, for messages.
        clock: seconds.
    """

    def __init__(
        self,
        store: Any,
        node: int,
        nodes: int,
        host: str,
        bound: Bound,
        pauses: deque[float],
        place: str,
        clock: Callable[[], float],
    ) -> None:
        self._store = store
        self._node = node
        self._bound = bound
        self._pauses = pauses
        self._place = place
        self._clock = clock
        self._over = threading.Event()
        self._has_news = threading.Event()
        watched = watched_by(node, nodes)
        self._counts = dict.fromkeys(watched, 0)
        self._lock = threading.Lock()
        self._progress = self._new_liveness()
        self._said_ms = 0
        self._peers = PeerConnections(host, watched, self, self._note_closed)
        self._thread = threading.Thread(target=self._beat, name="ckptless-heartbeat", daemon=True)

    def start(self) -> None:
        """Start sending heartbeats."""
        self._thread.start()
        self._peers.start()

    def end(self) -> None:
        """Stop sending heartbeats."""
        self._over.set()
        self._has_news.set()
        self._peers.close()
        self._thread.join(_CLOSE_S)

    def say_goodbye(self) -> None:
        """Announce that this node leaves, so that it does not count as lost; called after `end`."""
        # If the store does not answer, no node can be notified.
        with suppress(DistError, RuntimeError):
            self._store.add(_key(self._node), _GOODBYE)

    def judge(self) -> Finding:
        """Return the finding from what was seen so far."""
        with self._lock:
            now, liveness = self._clock(), self._progress
            # A process that was suspended saw nothing of what happened meanwhile.
            was_stopped = now - liveness.looked_at > self._bound.partitioned_s / 2
            self._progress = self._new_liveness() if was_stopped else replace(liveness, looked_at=now)
        return judge(liveness, self._bound, now=now, endpoint=self._place)

    def _new_liveness(self) -> Liveness:
        now = self._clock()
        return Liveness(now, now, {node: Heard(now) for node in self._counts})

    def publish(self, address: Address) -> None:
        """Publish where this agent listens."""
        with suppress(DistError, RuntimeError):
            self._store.set(_address_key(self._node), f"{address[0]} {address[1]}")

    def look_up(self, node: int) -> Address | None:
        """Return where the agent of a node listens; None if not known yet."""
        with suppress(DistError, RuntimeError, ValueError):
            if self._store.check([_address_key(node)]):
                host, port = self._store.get(_address_key(node)).decode().rsplit(" ", 1)
                return host, int(port)
        return None

    def _note_closed(self, node: int) -> None:
        with self._lock:
            heard = self._progress.heard
            if node in heard:
                closed = replace(heard[node], closed_at=self._clock())
                self._progress = replace(self._progress, heard={**heard, node: closed})
        self._has_news.set()

    def _beat(self) -> None:
        sent_at = None
        while not self._over.is_set():
            began_at = self._clock()
            try:
                self._store.add(_key(self._node), 1)
                self._say_longest_pause()
                counts = {node: self._store.add(_key(node), 0) for node in self._counts}
                pauses_s = {node: self._store.add(_pause_key(node), 0) / 1000 for node in self._suspects()}
            except (DistError, RuntimeError):
                # `judge` evaluates the silence; a closed connection stays silent.
                return
            if sent_at is not None:
                self._pauses.append(began_at - sent_at)
            sent_at = began_at
            self._note(counts, pauses_s)
            self._has_news.wait(_HURRIED_S if self._suspects() else self._bound.beat_s)
            self._has_news.clear()

    def _say_longest_pause(self) -> None:
        longest_ms = round(1000 * longest_pause_s(self._pauses))
        if longest_ms != self._said_ms:
            self._store.add(_pause_key(self._node), longest_ms - self._said_ms)
            self._said_ms = longest_ms

    def _suspects(self) -> list[int]:
        """Return the nodes that seem to be dead."""
        with self._lock:
            return [node for node, heard in self._progress.heard.items() if heard.seems_dead]

    def _note(self, counts: dict[int, int], pauses_s: dict[int, float]) -> None:
        """Process an answer of the store."""
        now = self._clock()
        with self._lock:
            heard = dict(self._progress.heard)
            for node, count in counts.items():
                if count < 0:
                    heard.pop(node, None)
                elif count != self._counts[node]:
                    heard[node] = replace(heard[node], at=now)
            for node, longest_s in pauses_s.items():
                if node in heard:
                    heard[node] = replace(heard[node], longest_pause_s=longest_s)
            self._counts = {node: count for node, count in counts.items() if count >= 0}
            self._progress = replace(self._progress, answered_at=now, heard=heard)


def _key(node: int) -> str:
    return f"ckptless/heartbeat/{node}"


def _pause_key(node: int) -> str:
    return f"{_key(node)}/pause"


def _address_key(node: int) -> str:
    return f"{_key(node)}/address"


def _addresses_of(address: Address) -> tuple[Address, ...]:
    """Resolve an address while the network is available."""
    host, port = address
    found: list[Any] = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return tuple(dict.fromkeys((str(sockaddr[0]), port) for *_, sockaddr in found))
