"""Two nodes on one machine, each with its own agent and arena: loss of ranks and of whole nodes."""

from __future__ import annotations

import signal
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from lightning_ckptless.ledger import read_ledger
from lightning_ckptless.membership.forkserver.client import ForkServer
from lightning_ckptless.replica.arena import find_arenas
from lightning_ckptless.testing.compare import compare
from lightning_ckptless.testing.drill import run_variant
from lightning_ckptless.testing.log_files import collect_logs
from lightning_ckptless.testing.trace_reader import read_traces
from tests.faults.cluster import END_S, Cluster, free_port
from tests.faults.conftest import REPOSITORY, command_for
from tests.faults.matrix import BASE, is_version
from tests.lab.parts import Options

ONE_NODE = replace(BASE, samples=80)
TWO_NODES = replace(ONE_NODE, devices=1, num_nodes=2)
SHARDED = replace(TWO_NODES, mesh="2x1")


def assert_identical(cluster: Cluster, parent: ForkServer) -> None:
    """Compare the results of a cluster with an undisturbed run of the same number of ranks on one node."""
    env = {"PYTHONPATH": str(REPOSITORY), "CKPTLESS_FAILURE_DOMAIN": "r0"}
    alone = replace(cluster.options, devices=cluster.options.num_nodes, num_nodes=1)
    words, folder = command_for(alone), cluster.folder / "undisturbed"
    undisturbed = run_variant(words, folder, nproc=alone.devices, parent=parent, isolate=True, env=env)
    assert undisturbed.exit_code == 0, undisturbed.tail()
    collect_logs(read_traces(cluster.folder / "trace").values(), cluster.folder / "logs", since=0)
    verdict = compare(undisturbed.folder, cluster.folder)
    assert verdict.identical, f"{verdict}\n{cluster.output()}"


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    "options", [TWO_NODES, pytest.param(SHARDED, marks=pytest.mark.long)], ids=["replicated", "sharded"]
)
def test_a_node_is_lost_with_its_arena(options: Options, tmp_path: Path, stack: ExitStack, parent: ForkServer) -> None:
    cluster = Cluster(tmp_path, stack, options)
    cluster.arenas.mkdir()
    stays = cluster.start_agent()
    lost = cluster.start_agent("node:rank=all:step=7")
    assert lost.wait(timeout=END_S) == -signal.SIGKILL, cluster.output()
    cluster.remove_arena(lost)
    comes = cluster.start_agent()
    assert [agent.wait(timeout=END_S) for agent in (stays, comes)] == [0, 0], cluster.output()
    events = list(read_ledger(tmp_path / "runs" / "two-nodes" / "ledger.jsonl"))
    restored = [event.fields for event in events if event.event == "restored"]
    assert [is_version(fields["version"], "step 6") for fields in restored] == [True]
    assert restored[0]["moved_bytes"] > 0
    assert list(find_arenas(cluster.arenas)) == []
    assert_identical(cluster, parent)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(240)
def test_ranks_of_both_nodes_die_at_once(tmp_path: Path, stack: ExitStack, parent: ForkServer) -> None:
    cluster = Cluster(tmp_path, stack, TWO_NODES)
    cluster.arenas.mkdir()
    agents = [cluster.start_agent("kill:rank=all:step=5") for _ in range(2)]
    assert [agent.wait(timeout=END_S) for agent in agents] == [0, 0], cluster.output()
    assert_identical(cluster, parent)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(240)
def test_ranks_on_both_nodes_are_replaced_in_place(tmp_path: Path, stack: ExitStack, parent: ForkServer) -> None:
    cluster = Cluster(tmp_path, stack, TWO_NODES)
    cluster.arenas.mkdir()
    agents = [cluster.start_agent("kill:rank=1:step=5,kill:rank=0:step=9") for _ in range(2)]
    assert [agent.wait(timeout=END_S) for agent in agents] == [0, 0], cluster.output()
    events = list(read_ledger(tmp_path / "runs" / "two-nodes" / "ledger.jsonl"))
    assert sum(event.event == "in_place" for event in events) == 2
    assert not [event for event in events if event.event == "relaunch"]
    assert [event.fields["culprit_rank"] for event in events if event.event == "recovery"] == [1, 0]
    assert_identical(cluster, parent)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(240)
def test_the_node_that_hosts_the_rendezvous_is_lost(tmp_path: Path, stack: ExitStack, parent: ForkServer) -> None:
    cluster = Cluster(tmp_path, stack, TWO_NODES, next_port=free_port())
    cluster.arenas.mkdir()
    lost = cluster.start_agent("node:rank=all:step=7")
    stays = cluster.start_agent(address="127.0.0.2")
    assert lost.wait(timeout=END_S) == -signal.SIGKILL, cluster.output()
    cluster.remove_arena(lost)
    comes = cluster.start_agent()
    assert [agent.wait(timeout=END_S) for agent in (stays, comes)] == [0, 0], cluster.output()
    events = list(read_ledger(tmp_path / "runs" / "two-nodes" / "ledger.jsonl"))
    assert [event.fields["next"].split(":")[0] for event in events if event.event == "rendezvous_lost"] == ["127.0.0.2"]
    restored = [event.fields for event in events if event.event == "restored"]
    assert [is_version(fields["version"], "step 6") for fields in restored] == [True]
    assert_identical(cluster, parent)
