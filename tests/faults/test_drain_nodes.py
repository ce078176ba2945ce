"""Draining a node: the others continue from a committed step, with a node that takes its place or without."""

from __future__ import annotations

import signal
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lightning_ckptless.membership.forkserver.client import ForkServer
from lightning_ckptless.membership.requests import Answer, DrainRequest, submit
from tests.faults.cluster import END_S, Cluster, free_port
from tests.faults.counting import Account, account_of, largest_difference
from tests.faults.elastic import BOUND, Nodes, run_undisturbed
from tests.faults.matrix import BASE

SAMPLES = ("--samples", "240")


class Drained(Nodes):
    """Nodes whose steps take long until one of them is drained."""

    def __init__(
        self, folder: Path, stack: ExitStack, *, least: int, most: int, flags: tuple[str, ...] = (), **more: Any
    ) -> None:
        self.is_over = folder / "drained"
        words = (*SAMPLES, "--pace", "0.25", "--pace-until", str(self.is_over), *more.pop("words", ()))
        super().__init__(folder, stack, least=least, most=most, words=words, **more)
        self.cluster.words += flags

    def begin(self, count: int) -> None:
        """Start a number of nodes, and wait until they train together."""
        for number in range(count):
            self.start(number)
        self.wait_for_world(count)

    def drain(self, node: int | None = None, *, rank: int | None = None) -> Answer:
        """Request that a node or a rank is drained, and wait for the answer."""
        return submit(self.cluster.ledger.parent, DrainRequest(node, rank), timeout_s=END_S)

    def finish(self, world: int) -> Account:
        """Let the run end once ranks of another world have completed a step."""
        self.wait_for_world(world)
        self.is_over.touch()
        assert [agent.wait(timeout=END_S) for agent in self.agents] == [0] * len(self.agents), self.cluster.output()
        return account_of(self.cluster.folder)

    def only(self, kind: str) -> dict[str, Any]:
        """Return the fields of the only event of a kind."""
        (fields,) = self.cluster.events(kind)
        return fields


def assert_same_training(found: Account, folder: Path, parent: ForkServer, *, ranks: int, exact: bool = False) -> None:
    """Compare with an undisturbed run: the samples of every step, and the weights, which may differ by rounding."""
    expected = run_undisturbed(folder / "undisturbed", parent, ranks, *SAMPLES)
    assert found.steps == expected.steps
    difference = largest_difference(expected, found)
    assert difference == 0 if exact else difference < BOUND


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_others_continue_without_a_drained_node(tmp_path: Path, stack: ExitStack, parent: ForkServer) -> None:
    nodes = Drained(tmp_path / "elastic", stack, least=2, most=3)
    nodes.begin(3)
    answer = nodes.drain(2)
    assert answer.accepted, answer.reason
    found = nodes.finish(2)
    assert found.sizes[-2:] == [3, 2]
    assert found.processes == 3, "the others keep their processes"
    drained, recovery = nodes.only("node_drained"), nodes.only("recovery")
    assert drained["exit_codes"] == {"0": 0}
    assert (recovery["kind"], recovery["steps_replayed"]) == ("drained", 0)
    assert recovery["version"] == f"step {drained['step']}"
    assert_same_training(found, tmp_path, parent, ranks=3)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_waiting_node_takes_the_place_of_a_drained_one(tmp_path: Path, stack: ExitStack, parent: ForkServer) -> None:
    nodes = Drained(tmp_path / "elastic", stack, least=2, most=2)
    nodes.begin(2)
    refused = nodes.drain(1)
    assert not refused.accepted
    assert "2 - 1 + 0 spare = 1 node would remain, but the run needs 2" in refused.reason
    nodes.start(2)
    nodes.wait_until(lambda: nodes.drain(1).accepted, "the third node does not wait for a place")
    found = nodes.finish(2)
    assert (found.sizes, found.processes) == ([2], 3)
    drained, recovery = nodes.only("node_drained"), nodes.only("recovery")
    assert drained["exit_codes"] == {"0": 0}
    assert (recovery["kind"], recovery["steps_replayed"]) == ("drained", 0)
    assert recovery["version"] == f"step {drained['step']}"
    assert_same_training(found, tmp_path, parent, ranks=2, exact=True)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_node_of_rank_0_is_drained(tmp_path: Path, stack: ExitStack, parent: ForkServer) -> None:
    """Another node takes over rank 0 with a new worker."""
    nodes = Drained(tmp_path / "elastic", stack, least=2, most=3)
    nodes.begin(3)
    answer = nodes.drain(0)
    assert answer.accepted, answer.reason
    found = nodes.finish(2)
    # On a busy machine two nodes may begin without the third.
    assert (found.sizes[-2:], found.processes) == ([3, 2], 3 + 1)
    assert nodes.only("node_drained")["exit_codes"] == {"0": 0}
    assert [fields["steps_replayed"] for fields in nodes.cluster.events("recovery")] == [0]
    assert_same_training(found, tmp_path, parent, ranks=3)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_sigterm_drains_one_of_two_nodes(tmp_path: Path, stack: ExitStack, parent: ForkServer) -> None:
    nodes = Drained(tmp_path / "elastic", stack, least=1, most=2, flags=("--on-sigterm", "drain"))
    nodes.begin(2)
    agent = nodes.agents[1]
    agent.send_signal(signal.SIGTERM)
    assert agent.wait(timeout=END_S) == 0, nodes.cluster.output()
    found = nodes.finish(1)
    assert (found.sizes, found.processes) == ([2, 1], 2)
    assert nodes.only("drain")["cause"] == "the agent received SIGTERM"
    assert nodes.only("node_drained")["exit_codes"] == {"0": 0}
    assert [fields["steps_replayed"] for fields in nodes.cluster.events("recovery")] == [0]
    assert_same_training(found, tmp_path, parent, ranks=2)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_rank_of_one_of_two_nodes_is_drained(tmp_path: Path, stack: ExitStack, parent: ForkServer) -> None:
    nodes = Drained(tmp_path / "elastic", stack, least=2, most=2)
    nodes.begin(2)
    answer = nodes.drain(rank=1)
    assert answer.accepted, answer.reason
    found = nodes.finish(2)
    assert (found.sizes, found.processes) == ([2], 3)
    drained, recovery = nodes.only("drained"), nodes.only("recovery")
    assert (drained["drained_rank"], drained["exit_code"]) == (1, 0)
    assert (recovery["kind"], recovery["steps_replayed"]) == ("drained", 0)
    assert_same_training(found, tmp_path, parent, ranks=2, exact=True)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_node_that_fails_its_health_check_is_drained(tmp_path: Path, stack: ExitStack, parent: ForkServer) -> None:
    asked = {"health_check": "tests.lab.kinds.disk_answers", "health_check_every_s": 1.0}
    unfit = {"node1": {"LAB_UNFIT": str(tmp_path / "unfit")}}
    nodes = Drained(tmp_path / "elastic", stack, least=1, most=2, words=("--strategy-options", repr(asked)), env=unfit)
    nodes.begin(2)
    assert nodes.agents[1].wait(timeout=END_S) == 0, nodes.cluster.output()
    found = nodes.finish(1)
    assert (found.sizes, found.processes) == ([2, 1], 2)
    assert nodes.only("drain")["cause"].startswith("the node failed its health check: tests.lab.kinds.disk_answers")
    assert nodes.only("node_drained")["exit_codes"] == {"0": 0}
    assert [fields["steps_replayed"] for fields in nodes.cluster.events("recovery")] == [0]
    assert_same_training(found, tmp_path, parent, ranks=2)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_host_of_the_rendezvous_is_not_drained(tmp_path: Path, stack: ExitStack) -> None:
    asked = tmp_path / "asked"
    options = replace(BASE, devices=1, num_nodes=2, slow_mirror_s=0.2, slow_until=str(asked))
    cluster = Cluster(tmp_path, stack, options, next_port=free_port())
    cluster.arenas.mkdir()
    cluster.ledger.parent.mkdir(parents=True)
    agents = [cluster.start_agent(address=address) for address in ("127.0.0.1", "127.0.0.2")]
    refused = submit(cluster.ledger.parent, DrainRequest(node=0), timeout_s=END_S)
    asked.touch()
    assert not refused.accepted
    assert "once it is gone, they use the next endpoint" in refused.reason
    assert [agent.wait(timeout=END_S) for agent in agents] == [0, 0], cluster.output()
