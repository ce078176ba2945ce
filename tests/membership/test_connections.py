"""Connections that are made in a block are cut, and nothing else."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from lightning_ckptless.membership.connections import Connections


@pytest.fixture
def connections() -> Iterator[Connections]:
    made = Connections()
    yield made
    made.forget()
    made.bury()


def connected(stack: ExitStack) -> tuple[socket.socket, socket.socket, socket.socket]:
    """A listener and both ends of a connection to it."""
    listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
    ours = stack.enter_context(socket.create_connection(listener.getsockname()))
    theirs = stack.enter_context(listener.accept()[0])
    return listener, ours, theirs


def test_what_was_made_inside_is_cut_and_what_was_there_before_is_not(
    connections: Connections, stack: ExitStack
) -> None:
    _, before, before_peer = connected(stack)
    with connections.opening():
        listener, ours, theirs = connected(stack)
    assert connections.cut() == 2
    assert (ours.recv(1), theirs.recv(1)) == (b"", b"")
    before.sendall(b"x")
    assert before_peer.recv(1) == b"x"
    # A listener that is shut down would end gloo's process.
    with socket.create_connection(listener.getsockname()) as another:
        assert another.getpeername() == listener.getsockname()


def test_no_peer_notices_before_all_have_let_go(connections: Connections, stack: ExitStack) -> None:
    listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
    with connections.opening():
        ours = socket.create_connection(listener.getsockname())
    theirs = stack.enter_context(listener.accept()[0])
    assert [connections.cut(), connections.cut()] == [1, 0]
    assert ours.recv(1) == b""
    # As gloo does when it has read the end.
    ours.close()
    connections.forget()
    theirs.settimeout(0.05)
    theirs.sendall(b"x")
    with pytest.raises(TimeoutError):
        theirs.recv(1)
    connections.bury()
    with pytest.raises(ConnectionResetError):
        theirs.recv(1)


def test_what_is_being_made_is_cut_too(connections: Connections, stack: ExitStack) -> None:
    with connections.opening():
        _, ours, _ = connected(stack)
        assert connections.cut() == 2
        assert ours.recv(1) == b""


def test_a_number_that_is_used_again_is_left_alone(connections: Connections, stack: ExitStack) -> None:
    with connections.opening():
        _, ours, theirs = connected(stack)
    numbers = ours.fileno(), theirs.fileno()
    ours.close()
    theirs.close()
    read, write = os.pipe()
    stack.callback(os.close, read)
    stack.callback(os.close, write)
    assert {read, write} == set(numbers)
    assert connections.cut() == 0
    assert os.write(write, b"x") == 1


def test_local_sockets_are_left_alone(connections: Connections, stack: ExitStack) -> None:
    with connections.opening():
        ours, theirs = socket.socketpair()
    stack.enter_context(ours)
    stack.enter_context(theirs)
    assert connections.cut() == 0
    ours.sendall(b"x")
    assert theirs.recv(1) == b"x"


def test_nothing_is_left_to_be_cut_when_it_is_forgotten(connections: Connections, stack: ExitStack) -> None:
    with connections.opening():
        connected(stack)
    connections.forget()
    assert connections.cut() == 0
