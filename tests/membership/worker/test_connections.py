"""Connections opened in a block are aborted, and no others."""

from __future__ import annotations

import os
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from datetime import timedelta

import pytest
from torch.distributed import HashStore, ProcessGroupGloo  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import PrefixStore

from lightning_ckptless.membership.worker.connections import Connections, new_sockets


@pytest.fixture
def connections() -> Iterator[Connections]:
    made = Connections()
    yield made
    made.forget()
    made.release()


def connected(stack: ExitStack) -> tuple[socket.socket, socket.socket, socket.socket]:
    """A listener and both ends of a connection to it."""
    listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
    ours = stack.enter_context(socket.create_connection(listener.getsockname()))
    theirs = stack.enter_context(listener.accept()[0])
    return listener, ours, theirs


def test_only_connections_opened_in_the_block_are_aborted(connections: Connections, stack: ExitStack) -> None:
    _, before, before_peer = connected(stack)
    with connections.opening(2):
        listener, ours, theirs = connected(stack)
    assert connections.abort() == 2
    assert (ours.recv(1), theirs.recv(1)) == (b"", b"")
    before.sendall(b"x")
    assert before_peer.recv(1) == b"x"
    # A listener that is shut down would end gloo's process.
    with socket.create_connection(listener.getsockname()) as another:
        assert another.getpeername() == listener.getsockname()


def test_no_peer_notices_before_all_ranks_have_released(connections: Connections, stack: ExitStack) -> None:
    listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
    with connections.opening(2):
        ours = socket.create_connection(listener.getsockname())
    theirs = stack.enter_context(listener.accept()[0])
    assert [connections.abort(), connections.abort()] == [1, 0]
    assert ours.recv(1) == b""
    # As gloo does when it has read the end.
    ours.close()
    connections.forget()
    theirs.settimeout(0.05)
    theirs.sendall(b"x")
    with pytest.raises(TimeoutError):
        theirs.recv(1)
    connections.release()
    with pytest.raises(ConnectionResetError):
        theirs.recv(1)


def test_connections_being_established_are_aborted(connections: Connections, stack: ExitStack) -> None:
    with connections.opening(2):
        _, ours, _ = connected(stack)
        assert connections.abort() == 2
        assert ours.recv(1) == b""


def test_a_reused_file_descriptor_is_left_alone(connections: Connections, stack: ExitStack) -> None:
    with connections.opening(2):
        _, ours, theirs = connected(stack)
    numbers = ours.fileno(), theirs.fileno()
    ours.close()
    theirs.close()
    read, write = os.pipe()
    stack.callback(os.close, read)
    stack.callback(os.close, write)
    assert {read, write} == set(numbers)
    assert connections.abort() == 0
    assert os.write(write, b"x") == 1


def test_local_sockets_are_left_alone(connections: Connections, stack: ExitStack) -> None:
    with connections.opening(2):
        ours, theirs = socket.socketpair()
    stack.enter_context(ours)
    stack.enter_context(theirs)
    assert connections.abort() == 0
    ours.sendall(b"x")
    assert theirs.recv(1) == b"x"


def test_forgotten_connections_are_not_aborted(connections: Connections, stack: ExitStack) -> None:
    with connections.opening(2):
        connected(stack)
    connections.forget()
    assert connections.abort() == 0


def test_a_connection_that_is_waited_on_is_aborted_only_within_the_block(
    connections: Connections, stack: ExitStack
) -> None:
    with new_sockets() as lent:
        _, ours, theirs = connected(stack)
    lent.pop(theirs.fileno())
    with connections.opening(2, lent):
        pass
    assert connections.abort() == 0
    assert not connections.has_aborted(lent)
    with connections.opening(2, lent):
        assert connections.abort() == 1
    assert ours.recv(1) == b""
    assert connections.has_aborted(lent)
    connections.forget()
    assert not connections.has_aborted(lent)


def test_a_connection_attempt_is_aborted(connections: Connections, stack: ExitStack) -> None:
    listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
    # The kernel answers no further attempts when its queue is full.
    for _ in range(4):
        waiting = stack.enter_context(socket.socket())
        waiting.setblocking(False)
        waiting.connect_ex(listener.getsockname())
    with connections.opening(2):
        ours = stack.enter_context(socket.socket())
        ours.setblocking(False)
        ours.connect_ex(listener.getsockname())
        assert connections.abort() == 1
        assert ours.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) != 0
        assert connections.abort() == 0


@pytest.mark.timeout(30)
def test_a_rank_that_waits_for_a_dead_peer_to_connect_is_unblocked(
    connections: Connections, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is no connection to that peer that could be aborted, and no call of torch ends the wait."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    store = HashStore()
    store.set("again/0/1", _address_of_the_dead(store))  # type: ignore[arg-type]  # the stub knows of text only
    ended = threading.Event()

    def make() -> None:
        with connections.opening(2), suppress(RuntimeError):
            ProcessGroupGloo(PrefixStore("again", store), 0, 2, timedelta(seconds=60))
        ended.set()

    thread = threading.Thread(target=make)
    thread.start()
    assert not ended.wait(0.1)
    for _ in range(500):
        connections.abort()
        if ended.wait(0.01):
            break
    thread.join()
    assert ended.is_set()


def _address_of_the_dead(store: HashStore) -> bytes:
    """The address of a peer with the highest port: the lower port waits for the higher one to connect."""
    # A group that is collected closes its connection, while the other rank may still be connecting.
    groups: dict[int, ProcessGroupGloo] = {}

    def make(rank: int) -> None:
        groups[rank] = ProcessGroupGloo(PrefixStore("once", store), rank, 2, timedelta(seconds=60))

    ranks = [threading.Thread(target=make, args=(rank,)) for rank in (0, 1)]
    for thread in ranks:
        thread.start()
    for thread in ranks:
        thread.join()
    found = bytearray(store.get("once/0/1"))
    (name_bytes,) = struct.unpack_from("=q", found)
    struct.pack_into("!H", found, 8 + name_bytes + 8 + 2, 65535)
    return bytes(found)
