"""Connections between agents that carry no data: the kernel closes them when the process at one end exits.

The kernel of the listening agent also establishes them, so that no code of that agent is involved. If a firewall allows
none, or a cable is unplugged, nothing is ever closed. What a closed connection means is decided in
`protocol/node_liveness.py`.
"""

from __future__ import annotations

import select
import socket
import threading
from collections.abc import Callable, Collection
from contextlib import suppress
from typing import Protocol

from lightning_ckptless.membership.rendezvous.handlers import listener_on

_CONNECT_S = 1.0
_LOOK_EVERY_S = 0.25
_CLOSE_S = 5.0
_CHUNK = 4096

Address = tuple[str, int]


class Addresses(Protocol):
    """Where the agents of a round listen; see `node_liveness.py`."""

    def publish(self, address: Address) -> None:
        """Publish where this agent listens."""

    def look_up(self, node: int) -> Address | None:
        """Return where the agent of a node listens; None if not known yet."""


class PeerConnections:
    """The connections of an agent to others, and a thread that waits for one to be closed.

    Args:
        host: name or address under which other agents reach this one.
        nodes: numbers of the nodes to connect to.
        addresses: addresses of the agents.
        report_closed: called with the number of a node when the connection to its agent was closed.
    """

    def __init__(
        self, host: str, nodes: Collection[int], addresses: Addresses, report_closed: Callable[[int], None]
    ) -> None:
        self._host = host
        self._addresses = addresses
        self._report_closed = report_closed
        self._missing = list(nodes)
        self._open: dict[socket.socket, int] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ckptless-peer-connections", daemon=True)

    def start(self) -> None:
        """Begin to connect."""
        self._thread.start()

    def close(self) -> None:
        """Close the connections, and end the thread; nothing is reported any more."""
        self._over.set()
        for connection in list(self._open):
            # Wake the thread.
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self._thread.join(_CLOSE_S)

    def _run(self) -> None:
        with suppress(OSError), listener_on(self._host, 0) or socket.create_server(("", 0)) as listener:
            self._addresses.publish((self._host, listener.getsockname()[1]))
            while self._missing and not self._over.is_set():
                self._connect()
                self._take_closed(_LOOK_EVERY_S)
            while not self._over.is_set():
                self._take_closed(None if self._open else _LOOK_EVERY_S)
        for connection in self._open:
            connection.close()

    def _connect(self) -> None:
        """Connect to nodes that listen; one that cannot be reached is not tried again."""
        for node in [*self._missing]:
            if (address := self._addresses.look_up(node)) is None:
                continue
            self._missing.remove(node)
            with suppress(OSError):
                self._open[socket.create_connection(address, timeout=_CONNECT_S)] = node

    def _take_closed(self, timeout_s: float | None) -> None:
        """Wait until a connection is closed, for at most `timeout_s` seconds."""
        poller = select.poll()
        for connection in self._open:
            poller.register(connection, select.POLLIN)
        readable = {number for number, _ in poller.poll(None if timeout_s is None else 1000 * timeout_s)}
        for connection in [each for each in self._open if each.fileno() in readable]:
            try:
                is_closed = not connection.recv(_CHUNK)
            except OSError:
                is_closed = True
            if is_closed and not self._over.is_set():
                self._report_closed(self._open.pop(connection))
                connection.close()
