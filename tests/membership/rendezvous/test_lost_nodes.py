"""Nodes that rendezvous again without lost ones: at once, and without a last call."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.elastic.rendezvous import RendezvousInfo, RendezvousParameters

from lightning_ckptless.membership.rendezvous.handlers import DataRendezvous, several_machines

SOON_S = 60.0
LATE = {"last_call_timeout": 600, "keep_alive_interval": 600, "is_host": False}
"""A rendezvous that waits for its last call, or until a silent node is dropped, takes longer than the test."""


class Nodes:
    """Three nodes, any two of which can continue. They rendezvous in threads.

    Args:
        pool: runs the threads.
    """

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self._pool = pool
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.handlers = [self.make(number) for number in range(3)]
        self.places = [info.rank for info in self.join(self.handlers)]

    def make(self, number: int) -> DataRendezvous:
        """Return another node."""
        endpoint = f"127.0.0.1:{self._store.port}"
        return several_machines(RendezvousParameters("c10d", endpoint, "run", 2, 3, f"127.0.0.{number + 1}", **LATE))

    def begin(self, handler: DataRendezvous) -> Future[RendezvousInfo]:
        """Let a node rendezvous."""
        return self._pool.submit(handler.next_rendezvous)

    def join(self, handlers: list[DataRendezvous]) -> list[RendezvousInfo]:
        """Let nodes rendezvous; returns what each has found."""
        return [joined.result(SOON_S) for joined in [self.begin(handler) for handler in handlers]]


@contextmanager
def three_nodes() -> Iterator[Nodes]:
    with ThreadPoolExecutor(4) as pool:
        nodes = Nodes(pool)
        try:
            yield nodes
        finally:
            for handler in nodes.handlers:
                handler.shutdown()


def until(is_true: Callable[[], Any]) -> None:
    pause, limit = threading.Event(), int(SOON_S / 0.01)
    assert any(is_true() or pause.wait(0.01) for _ in range(limit))


def test_all_nodes_that_are_left_continue_without_a_last_call() -> None:
    with three_nodes() as nodes:
        first, second, lost = nodes.handlers
        first.expel([nodes.places[2]])
        second.expel([nodes.places[2]])
        found = nodes.join([first, second])
        assert {info.rank for info in found} == {0, 1}
        assert {info.world_size for info in found} == {2}
        # It was not lost after all.
        until(lambda: lost.num_nodes_waiting() == 0)
        returned = nodes.begin(lost)
        until(lambda: first.num_nodes_waiting() == second.num_nodes_waiting() == 1)
        assert {info.world_size for info in [*nodes.join([first, second]), returned.result(SOON_S)]} == {3}


def test_a_node_that_leaves_is_not_waited_for() -> None:
    with three_nodes() as nodes:
        first, second, leaves = nodes.handlers
        leaves.leave()
        assert {info.world_size for info in nodes.join([first, second])} == {2}


def test_a_node_that_is_late_is_waited_for() -> None:
    with three_nodes() as nodes:
        first, second, late = nodes.handlers
        others = [nodes.begin(first), nodes.begin(second)]
        until(lambda: late.num_nodes_waiting() == 2)
        assert not any(other.done() for other in others)
        assert {info.world_size for info in [late.next_rendezvous(), *(other.result(SOON_S) for other in others)]} == {
            3
        }


def test_a_replacement_that_already_waits_takes_part() -> None:
    with three_nodes() as nodes:
        first, second, _ = nodes.handlers
        nodes.handlers.append(new := nodes.make(3))
        first.expel([nodes.places[2]])
        replaced = nodes.begin(new)
        until(lambda: first.num_nodes_waiting() == 1)
        assert {info.world_size for info in [*nodes.join([first, second]), replaced.result(SOON_S)]} == {3}


def test_nodes_learn_of_each_other_without_reading_the_state_again(monkeypatch: pytest.MonkeyPatch) -> None:
    with three_nodes() as nodes:
        first, second, lost = nodes.handlers
        monkeypatch.setattr(first._state_holder, "_cache_duration", 3600)
        assert first.num_nodes_waiting() == 0
        second.expel([nodes.places[2]])
        joined = nodes.begin(second)
        until(lambda: first.num_nodes_waiting() == 1)
        assert first.next_rendezvous().world_size == joined.result(SOON_S).world_size == 2
        lost.shutdown()


def test_a_new_node_waits_while_none_is_admitted() -> None:
    """A node of the last round that rendezvouses again does not wait: its workers are lost."""
    with three_nodes() as nodes:
        first, second, third = nodes.handlers
        third.leave()
        first.admits_nodes = second.admits_nodes = False
        nodes.handlers.append(nodes.make(3))
        joined = nodes.begin(nodes.handlers[-1])
        until(lambda: (first.num_nodes_waiting(), first.spare_nodes()) == (0, 1))
        again = nodes.begin(second)
        until(lambda: first.num_nodes_waiting() == 1)
        found = [future.result(SOON_S) for future in (nodes.begin(first), again, joined)]
        assert {info.world_size for info in found} == {3}
