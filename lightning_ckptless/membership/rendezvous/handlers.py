"""The rendezvous of a run's agents, and its stores.

A run on one machine has one agent, which needs no rendezvous: only the store of its workers listens, on loopback.
Agents on several machines use a torch store, which authenticates no client. So it listens only on the address under
which the nodes reach it, if that is known, and contains only data. torch elastic itself would store a pickle, which
runs as code in every agent that reads it.
"""

from __future__ import annotations

import errno
import ipaddress
import json
import socket
from collections.abc import Callable, Collection
from contextlib import suppress
from datetime import timedelta
from typing import Any

from torch.distributed import DistError, FileStore, HashStore, PrefixStore, Store, TCPStore  # type: ignore[attr-defined]
from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousConnectionError,
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStateError,
    RendezvousStoreInfo,
)
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import DEFAULT_PORT, C10dRendezvousBackend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import (
    RendezvousBackend,
    RendezvousSettings,
    RendezvousTimeout,
)
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint

from lightning_ckptless.internals.rendezvous_internals import (
    Node,
    PromptRendezvous,
    rendezvous_state_from_json,
    rendezvous_state_to_json,
)
from lightning_ckptless.internals.torch_internals import is_this_machine

LOOPBACK = "127.0.0.1"
_READ_TIMEOUT_S = 60
_GONE = "ckptless/gone/{}"
_BACKLOG = 4096
"""Maximum number of pending connections; the kernel may limit it further."""

_Encoded = tuple[bytes, Any]


def one_machine(run_id: str, keep_alive_interval_s: int, keep_alive_max_attempt: int) -> SingleNode:
    """Return the rendezvous of an agent that is alone in its run."""
    interval = timedelta(seconds=keep_alive_interval_s)
    return SingleNode(RendezvousSettings(run_id, 1, 1, RendezvousTimeout(), interval, keep_alive_max_attempt))


def several_machines(parameters: RendezvousParameters) -> DataRendezvous:
    """Return the rendezvous of one of several agents, with the settings of torch's c10d rendezvous.

    Raises:
        RendezvousError: the store cannot be reached.
    """
    store, hosts = _rendezvous_store(parameters)
    timeouts: dict[str, Any] = {
        name: None if (value := parameters.get_as_int(f"{name}_timeout")) is None else timedelta(seconds=value)
        for name in ("join", "last_call", "close", "heartbeat")
    }
    handler: DataRendezvous = DataRendezvous.from_backend(
        parameters.run_id,
        store,
        DataBackend(C10dRendezvousBackend(store, parameters.run_id), Changes(store, parameters.run_id)),
        parameters.min_nodes,
        parameters.max_nodes,
        parameters.local_addr,
        RendezvousTimeout(**timeouts),
        keep_alive_interval=int(parameters.get("keep_alive_interval", 5)),
        keep_alive_max_attempt=int(parameters.get("keep_alive_max_attempt", 3)),
    )
    handler.hosts = hosts
    return handler


class SingleNode(RendezvousHandler):
    """A rendezvous of one node, inside this process: every round completes at once.

    Args:
        settings: settings of the run.
    """

    def __init__(self, settings: RendezvousSettings) -> None:
        self.settings = settings
        self._store = HashStore()
        self._rounds = 0
        self._is_closed = False
        self._worker_store: TCPStore | None = None

    def get_backend(self) -> str:
        """Name of the kind of rendezvous."""
        return "single-node"

    @property
    def use_agent_store(self) -> bool:
        """Whether the workers use a store that lives as long as the round."""
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        """Begin a round with a new store for its workers, on loopback."""
        if self._is_closed:
            raise RendezvousClosedError(f"run {self.get_run_id()!r} was ended")
        self._rounds += 1
        self._worker_store = None
        self._worker_store = listening_store(LOOPBACK, 0)
        info = RendezvousStoreInfo(LOOPBACK, self._worker_store.port)
        return RendezvousInfo(PrefixStore(f"round-{self._rounds}", self._store), 0, 1, info)

    def is_closed(self) -> bool:
        """Whether the run has been ended."""
        return self._is_closed

    def set_closed(self) -> None:
        """End the run: no round follows."""
        self._is_closed = True

    def num_nodes_waiting(self) -> int:
        """Number of nodes that ask to take part: 0."""
        return 0

    def get_run_id(self) -> str:
        """Name of the run."""
        return self.settings.run_id

    hosts = True
    admits_nodes = True
    address = LOOPBACK

    def leave(self) -> None:
        """End the run: there is no other node."""
        self._is_closed = True

    def spare_nodes(self) -> int:
        """Number of nodes that wait for a place: 0."""
        return 0

    def expel(self, places: Collection[int]) -> None:
        """Remove other nodes: there is none."""

    def shutdown(self) -> bool:
        """End the run, and close the store of its workers."""
        self._is_closed = True
        self._worker_store = None
        return True


class DataRendezvous(PromptRendezvous):
    """torch elastic's rendezvous, with a separate store for the workers of every round, on one address.

    A node that is gone for good is recorded in the store of the round. So the others know when all remaining nodes have
    joined the next round, and complete it without a last call. A node is expected until it is gone: it first leaves its
    current round, which lasts until then.

    Attributes:
        hosts: whether this process hosts the nodes' store.
        admits_nodes: whether nodes that were not in the last round may begin a new one. Otherwise they wait.
    """

    hosts = False
    admits_nodes = True
    _has_left = False
    _number = -1

    def leave(self) -> None:
        """Leave the round, so that the other nodes can complete the next one without this node."""
        self._has_left = True
        self._note_gone([self._places[self.this_node]])
        super().leave()

    def expel(self, places: Collection[int]) -> None:
        """Remove nodes that are lost from the round, so that the other nodes can complete the next one without them.

        Args:
            places: places of the nodes, in the order in which they joined the round.
        """
        self._note_gone(places)
        self.remove(self._number, [node for node, place in self._places.items() if place in places])

    def num_nodes_waiting(self) -> int:
        """Number of nodes that wait for the next round, and may begin it; 0 for a node that has left."""
        if self._has_left:
            return 0
        waiting: int = super().num_nodes_waiting()
        return waiting if self.admits_nodes or not waiting else len(self.waiting_nodes() & self._places.keys())

    def next_rendezvous(self) -> RendezvousInfo:
        """Rendezvous with the other nodes; see `RendezvousHandler`."""
        info = super().next_rendezvous()
        self._number, self._places = self.current_round()
        self._round_store = info.store
        return info

    def _note_gone(self, places: Collection[int]) -> None:
        for place in places:
            self._round_store.set(_GONE.format(place), "1")

    def _have_all_come(self, participants: Collection[Node]) -> bool:
        """Whether some nodes of the last round are gone, and all others are here."""
        if self._number < 0:
            return False
        absent = [_GONE.format(place) for node, place in self._places.items() if node not in participants]
        return bool(absent) and bool(self._round_store.check(absent))

    def _create_tcp_store_server(self, master_addr: str, master_port: int) -> TCPStore:
        return listening_store(master_addr, master_port)


class Changes:
    """Announces changes of a rendezvous, so that the nodes need not read its state to detect them.

    The state has an entry for every node. An announcement is one key; nodes check for the next one.

    Args:
        store: the nodes' store.
        run_id: id of the run.
    """

    def __init__(self, store: Store, run_id: str) -> None:
        self._store = PrefixStore(f"ckptless/changes/{run_id}", store)
        self._next = 0

    def announce(self) -> None:
        """Announce that this node has changed the state."""
        self._store.set(str(self._store.add("count", 1)), "")

    def has_news(self) -> bool:
        """Whether a change was announced since the last call; called before the state is read.

        Raises:
            RendezvousConnectionError: the store does not answer.
        """
        try:
            if self._next and not self._store.check([str(self._next)]):
                return False
            self._next = self._store.add("count", 0) + 1
        except DistError as error:
            raise RendezvousConnectionError(f"the store of the rendezvous does not answer: {error}") from error
        return True


class DataBackend(RendezvousBackend):
    """Keeps the state of a rendezvous as JSON.

    Only data pickled in this process, from checked fields, is unpickled.

    Args:
        inner: stores bytes.
        changes: changes of the nodes.
    """

    def __init__(self, inner: RendezvousBackend, changes: Changes) -> None:
        self._inner = inner
        self._changes = changes
        self._known: dict[str, Any] = {}

    @property
    def name(self) -> str:
        """Name of the kind of rendezvous."""
        return self._inner.name

    def get_state(self) -> _Encoded | None:
        """Return the state in torch elastic's format.

        Raises:
            RendezvousStateError: the store holds no valid state.
        """
        found = self._inner.get_state()
        if found is None:
            return None
        state = _decoded(found[0])
        self._known = _nodes_in(found[0])
        return state, found[1]

    def set_state(self, state: bytes, token: Any = None) -> tuple[bytes, Any, bool] | None:
        """Replace the state that belongs to a token; returns the state that is valid now, and whether it is this one.

        Raises:
            RendezvousStateError: the store holds no valid state.
        """
        answer = self._inner.set_state(rendezvous_state_to_json(state), token)
        if answer is None:
            return None
        found = _decoded(answer[0])
        before, self._known = self._known, _nodes_in(answer[0])
        if answer[2] and self._known != before:
            self._changes.announce()
        return found, answer[1], answer[2]

    def has_changed(self) -> bool:
        """Whether another node has changed more than its last heartbeat since the last call.

        Raises:
            RendezvousConnectionError: the store does not answer.
        """
        return self._changes.has_news()


def _nodes_in(text: bytes) -> dict[str, Any]:
    """Return a valid state without the nodes' heartbeats."""
    fields: dict[str, Any] = json.loads(text)
    del fields["last_heartbeats"]
    return fields


def _decoded(text: bytes) -> bytes:
    try:
        return rendezvous_state_from_json(text)
    except ValueError as error:
        raise RendezvousStateError(
            f"the rendezvous state was not written by an agent of this version: {error}. Check that every node runs "
            "the same version of lightning_ckptless, and that only nodes of the run can reach the rendezvous port"
        ) from error


# ---------------------------------------------------------------------- stores


def listening_store(host: str, port: int, timeout_s: float = _READ_TIMEOUT_S) -> TCPStore:
    """Create a torch store whose server runs in this process and listens on one address, if that is known.

    Args:
        host: address or name under which it is reached.
        port: 0 for a free one.
        timeout_s: timeout of its operations, in seconds.

    Raises:
        OSError, RuntimeError: it cannot listen there.
    """
    listener = listener_on(host, port)
    settings: dict[str, Any] = {"is_master": True, "multi_tenant": True, "timeout": timedelta(seconds=timeout_s)}
    if listener is None:
        return TCPStore(host, port, **settings)
    port = int(listener.getsockname()[1])
    # The store owns the socket from here on.
    return TCPStore(host, port, master_listen_fd=listener.detach(), **settings)


def listener_on(host: str, port: int) -> socket.socket | None:
    """Return a socket that listens on an address of this machine; None if `host` does not identify one."""
    if (found := address_of(host)) is None:
        return None
    family, address = found
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address[0], port, *address[2:]))
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRNOTAVAIL:
            # A translated address, such as that of a Kubernetes service.
            return None
        raise
    return listener


def address_of(host: str, look_up: Callable[..., list[Any]] = socket.getaddrinfo) -> tuple[int, tuple[Any, ...]] | None:
    """Return the only address of a host name or address, as family and socket address.

    None if there are several, or where a name resolves to loopback on this machine only: many systems configure
    their own name that way, and other machines resolve it to another address.

    Args:
        host: name or address.
        look_up: as `socket.getaddrinfo`.
    """
    is_numeric = False
    with suppress(ValueError):
        ipaddress.ip_address(host)
        is_numeric = True
    try:
        found = {(family, address) for family, *_, address in look_up(host, None, type=socket.SOCK_STREAM)}
    except OSError:
        return None
    if host == "localhost":
        return min(found)
    if len(found) != 1:
        return None
    only = found.pop()
    is_loopback = ipaddress.ip_address(only[1][0]).is_loopback
    return only if is_numeric or not is_loopback else None


def _rendezvous_store(parameters: RendezvousParameters) -> tuple[Store, bool]:
    """Return the nodes' store or a connection to it, and whether it is in this process."""
    if parameters.get("store_type", "tcp") == "file":
        return FileStore(parameters.endpoint), False
    host, port = parse_rendezvous_endpoint(parameters.endpoint, default_port=DEFAULT_PORT)
    timeout_s = int(parameters.get("read_timeout", _READ_TIMEOUT_S))
    is_host = parameters.get_as_bool("is_host")
    try:
        if is_host or (is_host is None and is_this_machine(host)):
            try:
                return listening_store(host, port, timeout_s), True
            except (OSError, RuntimeError):
                # Another process on this machine may host the rendezvous, unless the user said that this one does.
                if is_host:
                    raise
        return TCPStore(host, port, is_master=False, multi_tenant=True, timeout=timedelta(seconds=timeout_s)), False
    except (OSError, ValueError, RuntimeError) as error:
        raise RendezvousConnectionError(f"no store at {host}:{port}: {error}") from error
