"""Four nodes: losses that the placement of replicas tolerates, and losses that it does not."""

from __future__ import annotations

import signal
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from lightning_ckptless.membership.forkserver.client import ForkServer
from tests.faults.cluster import END_S, Cluster
from tests.faults.matrix import is_version
from tests.faults.test_nodes import TWO_NODES, assert_identical
from tests.lab.parts import Options

FOUR_NODES = replace(TWO_NODES, num_nodes=4, samples=160)
"""Four ranks, ten steps per epoch, twenty in total."""
RACKS = ("r0", "r0", "r1", "r1")
NODE_FAULT = "node:rank=all:step={}"


class FourNodes:
    """A cluster of four nodes whose rendezvous store is outside of all nodes."""

    def __init__(self, folder: Path, stack: ExitStack, options: Options) -> None:
        self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.cluster = Cluster(folder, stack, options, port=self.store.port, external_store=True)
        self.cluster.arenas.mkdir()
        self.agents: list[psutil.Popen] = []

    def start(self, node: int, faults: str = "") -> psutil.Popen:
        """Start a node; ranks are in the order of node numbers."""
        env = {"CKPTLESS_FAILURE_DOMAIN": RACKS[node]}
        return self.cluster.start_agent(faults, f"127.0.0.{node + 1}", env=env)

    def start_all(self, steps: dict[int, int], at: Mapping[int, str] = {}) -> None:
        """Start all nodes.

        Args:
            steps: by node, the step at which it is lost.
            at: by node, the suffix `:at=MOMENT` of its fault.
        """
        faults = {node: NODE_FAULT.format(step) + at.get(node, "") for node, step in steps.items()}
        self.agents = [self.start(node, faults.get(node, "")) for node in range(4)]

    def replace(self, lost: Collection[int]) -> None:
        """Wait until nodes are lost, remove their arenas, and start replacements as a scheduler would."""
        for node in lost:
            assert self.agents[node].wait(timeout=END_S) == -signal.SIGKILL, self.output
        for node in lost:
            self.cluster.remove_arena(self.agents[node])
        for node in lost:
            self.agents[node] = self.start(node)

    @property
    def exit_codes(self) -> list[int]:
        """The exit codes of all nodes; waits for them."""
        return [agent.wait(timeout=END_S) for agent in self.agents]

    @property
    def output(self) -> str:
        """The output of all agents and workers."""
        return self.cluster.output()


def reason_of_failure(nodes: FourNodes) -> str:
    """Wait until all nodes have failed with StateMissingError; return the reason in the ledger."""
    assert all(code not in (0, None) for code in nodes.exit_codes), nodes.output
    assert "StateMissingError" in nodes.output
    return str(nodes.cluster.events("run_started")[-1]["reason"])


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_rack_is_lost(tmp_path: Path, stack: ExitStack, parent: ForkServer) -> None:
    options = replace(FOUR_NODES, strategy_options="{'failure_domain': 'rack'}")
    nodes = FourNodes(tmp_path, stack, options)
    nodes.start_all({0: 7, 1: 7})
    nodes.replace([0, 1])
    assert nodes.exit_codes == [0] * 4, nodes.output
    planned, last = nodes.cluster.events("placement")[0], nodes.cluster.events("placement")[-1]
    assert (planned["kind"], planned["domains"], planned["holders"]) == ("rack", [*RACKS], [[2], [3], [0], [1]])
    assert "any 1 rack    always" in nodes.output
    (restored,) = nodes.cluster.events("restored")
    assert is_version(restored["version"], "step 6")
    (protection,) = nodes.cluster.events("protection")
    assert protection["version"] == restored["version"]
    # A surviving node may have taken over rank 0, and so another place.
    new = {rank for rank, node in enumerate(last["nodes"]) if node not in planned["nodes"]}
    assert len(new) == 2 and {holder for _, holder in protection["pairs"]} >= new
    assert_identical(nodes.cluster, parent)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_each_of_four_nodes_is_lost_in_turn(tmp_path: Path, stack: ExitStack, parent: ForkServer) -> None:
    nodes = FourNodes(tmp_path, stack, FOUR_NODES)
    nodes.start_all({0: 4, 1: 8, 2: 12, 3: 16})
    for node in range(4):
        nodes.replace([node])
    assert nodes.exit_codes == [0] * 4, nodes.output
    restored = [facts["version"] for facts in nodes.cluster.events("restored")]
    assert all(map(is_version, restored, ("step 3", "step 7", "step 11", "step 15"))), restored
    assert_identical(nodes.cluster, parent)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_placement_tolerates_the_loss_of_two_nodes(tmp_path: Path, stack: ExitStack, parent: ForkServer) -> None:
    nodes = FourNodes(tmp_path, stack, FOUR_NODES)
    nodes.start_all({0: 7, 2: 7})
    nodes.replace([0, 2])
    assert nodes.exit_codes == [0] * 4, nodes.output
    assert len(nodes.cluster.events("restored")) == 1
    assert_identical(nodes.cluster, parent)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_loss_of_all_replicas_falls_back_to_the_durable_state(
    tmp_path: Path, stack: ExitStack, parent: ForkServer
) -> None:
    # No node holds all four shards: each writes its own, and a state is complete once all have.
    options = replace(FOUR_NODES, slow_mirror_s=0.3, strategy_options="{'durable_every_n_steps': 2}")
    nodes = FourNodes(tmp_path, stack, options)
    nodes.start_all({2: 9, 3: 9})
    nodes.replace([2, 3])
    nodes.cluster.options = replace(options, slow_mirror_s=0.0)
    assert nodes.exit_codes == [0] * 4, nodes.output
    reason = nodes.cluster.events("run_started")[-1]["reason"]
    assert "resumes from the durable state" in reason
    assert "no version is complete" in reason
    assert {facts["step"] % 2 for facts in nodes.cluster.events("durable_written")} == {0}
    # The relaunch did not wait for the parts that the lost nodes owed.
    assert not nodes.cluster.events("durable_failed")
    assert_identical(nodes.cluster, parent)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_loss_of_all_replicas_ends_the_run_and_is_reported(tmp_path: Path, stack: ExitStack) -> None:
    nodes = FourNodes(tmp_path, stack, FOUR_NODES)
    nodes.start_all({2: 7, 3: 7})
    nodes.replace([2, 3])
    reason = reason_of_failure(nodes)
    assert "no version is complete: shards " in reason
    assert "shards 2, 3 of 4 have no replica" in reason
    assert not nodes.cluster.events("restored")


def lose_two_before_rereplication(nodes: FourNodes, second: int) -> None:
    """Lose node 1, and another node during the restore, before the replacement of node 1 has copies."""
    nodes.start_all({1: 7, second: 7}, at={second: ":at=restore"})
    nodes.replace([1])
    nodes.replace([second])


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_second_node_is_lost_before_rereplication(tmp_path: Path, stack: ExitStack, parent: ForkServer) -> None:
    nodes = FourNodes(tmp_path, stack, FOUR_NODES)
    lose_two_before_rereplication(nodes, 2)
    assert nodes.exit_codes == [0] * 4, nodes.output
    restored = [facts["version"] for facts in nodes.cluster.events("restored")]
    assert all(is_version(version, "step 6") for version in restored), restored
    protection = nodes.cluster.events("protection")[-1]
    assert {holder for _, holder in protection["pairs"]} == {1, 2}
    assert_identical(nodes.cluster, parent)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_loss_of_the_last_copies_before_rereplication_is_reported(tmp_path: Path, stack: ExitStack) -> None:
    nodes = FourNodes(tmp_path, stack, FOUR_NODES)
    lose_two_before_rereplication(nodes, 0)
    assert "shards 0, 1 of 4 have no replica" in reason_of_failure(nodes)
