"""The departure of a node, as its own agent and those of the other nodes see it."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from torch.distributed import HashStore  # type: ignore[attr-defined]

from lightning_ckptless.membership.agent.departure import DepartedError, Departure, Leaving
from lightning_ckptless.membership.clock import Clock
from lightning_ckptless.membership.drain_events import NodeDrained
from lightning_ckptless.membership.events import Event
from lightning_ckptless.membership.forkserver.client import End
from lightning_ckptless.protocol.messages import HandedOver, HandOver, Message

WHY = "draining node 1"


@dataclass
class Workers:
    """Two workers of the leaving node."""

    all_train: bool = True
    all_at_end: bool = False
    running: int = 2
    handed_over: dict[int, HandedOver] = field(default_factory=dict)
    ends: dict[int, End | None] = field(default_factory=dict)
    sent: list[object] = field(default_factory=list)

    def lost(self) -> dict[int, End | None]:
        return self.ends

    def send(self, message: Message) -> None:
        self.sent.append(message)

    def allow_leave(self) -> None:
        self.sent.append("may leave")

    def stop(self, death_signal: int, grace_s: float) -> None:
        self.running = 0

    def hand_over(self) -> None:
        self.handed_over = {0: HandedOver(7, WHY), 1: HandedOver(7, WHY)}
        self.ends, self.running = {0: End(0, 1.0), 1: End(0, 1.0)}, 0


class Nodes:
    """The leaving node and one that stays, with one store and one clock."""

    def __init__(self) -> None:
        self.now = 100.0
        self.clock = Clock(lambda: self.now, lambda: self.now)
        self.store = HashStore()
        self.here, self.there = (Departure(self.store, self.clock, is_shared=True) for _ in range(2))
        self.events: list[Event] = []
        self.workers = Workers()

    def leave(self, wait_s: float = 600.0) -> Leaving:
        assert self.here.announce(WHY, hands_over_first=not wait_s) == WHY
        return Leaving("node1", WHY, self.here, wait_s, self.events.append, self.clock)


def test_the_ranks_are_handed_over_once_the_others_are_ready() -> None:
    nodes = Nodes()
    leaving = nodes.leave()
    assert nodes.there.news() == WHY
    leaving.poll(nodes.workers)
    assert nodes.workers.sent == []
    nodes.there.note_ready()
    nodes.now += 0.1
    leaving.poll(nodes.workers)
    leaving.poll(nodes.workers)
    assert nodes.workers.sent == [HandOver(WHY)]
    assert not nodes.there.is_finished()
    nodes.workers.hand_over()
    with pytest.raises(DepartedError):
        leaving.poll(nodes.workers)
    assert nodes.there.is_finished()
    summary = "this node has left the run: its ranks were handed over after step 7"
    assert nodes.events == [NodeDrained("node1", WHY, summary, 7, {0: 0, 1: 0})]
    assert leaving.summary == summary


def test_a_node_that_may_not_wait_hands_over_at_once() -> None:
    nodes = Nodes()
    nodes.leave(0.0).poll(nodes.workers)
    assert nodes.workers.sent == [HandOver(WHY)]


def test_the_others_learn_of_a_node_that_hands_over_at_once_when_it_has() -> None:
    nodes = Nodes()
    leaving = nodes.leave(0.0)
    for _ in range(30):
        leaving.poll(nodes.workers)
        assert nodes.there.news() == ""
        nodes.now += 2.0
    assert nodes.there.why() == WHY
    nodes.workers.hand_over()
    with pytest.raises(DepartedError):
        leaving.poll(nodes.workers)
    assert nodes.there.news() == WHY


def test_the_others_learn_of_a_node_that_is_lost_before_it_has_handed_over() -> None:
    nodes = Nodes()
    nodes.leave(0.0).poll(nodes.workers)
    assert nodes.there.news() == ""
    nodes.now += 9.0
    assert nodes.there.news() == ""
    nodes.now += 2.0
    assert nodes.there.news() == WHY


def test_the_others_wait_as_long_as_the_leaving_node_is_alive() -> None:
    nodes = Nodes()
    leaving = nodes.leave()
    nodes.there.note_ready()
    for _ in range(30):
        leaving.poll(nodes.workers)
        nodes.now += 2.0
        assert not nodes.there.is_finished()
    nodes.now += 11.0
    assert nodes.there.is_finished()


def test_a_worker_that_is_lost_on_the_way_ends_the_node() -> None:
    nodes = Nodes()
    leaving = nodes.leave()
    nodes.workers.ends = {1: End(-9, 1.0)}
    with pytest.raises(DepartedError, match="the step in flight is replayed"):
        leaving.poll(nodes.workers)
    assert nodes.workers.running == 0
    nodes.there.note_ready()
    assert nodes.there.is_finished()


def test_a_node_whose_peers_regroup_after_a_fault_leaves_at_once() -> None:
    nodes = Nodes()
    leaving = nodes.leave(0.0)
    leaving.poll(nodes.workers)
    with pytest.raises(DepartedError, match="another node had a fault"):
        leaving.give_up(nodes.workers)
    assert nodes.workers.running == 0
    assert nodes.there.news() == WHY


def test_workers_at_the_end_of_the_run_may_leave() -> None:
    nodes = Nodes()
    leaving = nodes.leave()
    nodes.workers.all_at_end = True
    leaving.poll(nodes.workers)
    assert nodes.workers.sent == ["may leave"]
    nodes.workers.running = 0
    with pytest.raises(DepartedError, match="its workers have ended"):
        leaving.poll(nodes.workers)


def test_one_node_leaves_at_a_time() -> None:
    nodes = Nodes()
    nodes.leave()
    assert nodes.there.announce("draining node 0") == WHY
    alone = Departure(nodes.store, nodes.clock, is_shared=False)
    assert (alone.news(), alone.why()) == ("", "")
