"""Two nodes are lost at once with their arenas, and resume from the durable states that the first has written."""

from __future__ import annotations

import signal
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from lightning_ckptless.ledger import read_ledger
from lightning_ckptless.membership.forkserver.client import ForkServer
from tests.faults.cluster import END_S, Cluster
from tests.faults.test_nodes import TWO_NODES, assert_identical


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(240)
def test_all_nodes_are_lost(tmp_path: Path, stack: ExitStack, parent: ForkServer) -> None:
    options = replace(TWO_NODES, slow_mirror_s=0.2, strategy_options="{'durable_every_s': 0.2}")
    cluster = Cluster(tmp_path, stack, options)
    cluster.arenas.mkdir()
    agents = [cluster.start_agent("node:rank=all:step=9") for _ in range(2)]
    assert [agent.wait(timeout=END_S) for agent in agents] == [-signal.SIGKILL] * 2, cluster.output()
    for agent in agents:
        cluster.remove_arena(agent)
    cluster.agents.clear()
    cluster.options = replace(options, slow_mirror_s=0.0)
    agents = [cluster.start_agent() for _ in range(2)]
    assert [agent.wait(timeout=END_S) for agent in agents] == [0, 0], cluster.output()
    started = [
        e.fields["reason"] for e in read_ledger(tmp_path / "runs" / "two-nodes" / "ledger.jsonl", only="run_started")
    ]
    assert "resumes from the durable state" in started[-1]
    assert_identical(cluster, parent)
