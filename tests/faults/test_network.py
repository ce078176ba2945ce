"""A network partition between two nodes: packets are dropped, and no connection is reset."""

from __future__ import annotations

import threading
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from lightning_ckptless.ledger import read_ledger
from lightning_ckptless.membership.forkserver.client import ForkServer
from tests.faults.cluster import END_S, Cluster
from tests.faults.hosts import ADDRESSES, make_hosts
from tests.faults.test_nodes import TWO_NODES, assert_identical

BOUND_S = 4.0


def wait_until_committed(cluster: Cluster, step: int) -> None:
    """Wait until all ranks have committed a step."""
    pause, deadline = threading.Event(), time.monotonic() + END_S
    while not any(facts["step"] >= step for facts in cluster.events("committed")):
        assert time.monotonic() < deadline, cluster.output()
        pause.wait(0.05)


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_node_with_a_cut_link_is_fenced_and_rejoins(tmp_path: Path, stack: ExitStack, parent: ForkServer) -> None:
    hosts = make_hosts(stack)
    cluster = Cluster(tmp_path, stack, replace(TWO_NODES, slow_mirror_s=0.3), host=ADDRESSES[0])
    cluster.arenas.mkdir()
    stays, cut = (
        cluster.start_agent(address=ADDRESSES[host], env=hosts.env, within=hosts.within(host)) for host in (0, 1)
    )
    wait_until_committed(cluster, 2)
    workers = psutil.Process(cut.pid).children(recursive=True)
    hosts.cut()
    began = time.monotonic()
    assert cut.wait(timeout=END_S) == 2, cluster.output()
    took_s = time.monotonic() - began
    # No upper bound: it depends on the load of the machine.
    assert took_s >= BOUND_S - 1, cluster.output()
    assert [process for process in workers if process.is_running() and process.status() != "zombie"] == []
    assert "this node is partitioned: the rendezvous at 10.77.0.1" in cluster.output()
    assert "of the round has been silent" in _wait_for(cluster, "node_lost")
    assert stays.poll() is None
    hosts.restore()
    cluster.options = replace(cluster.options, slow_mirror_s=0.0)
    comes = cluster.start_agent(address=ADDRESSES[1], env=hosts.env, within=hosts.within(1))
    assert [agent.wait(timeout=END_S) for agent in (stays, comes)] == [0, 0], cluster.output()
    assert [event.generation for event in read_ledger(cluster.ledger, only="restored")] == [2]
    assert_identical(cluster, parent)


def _wait_for(cluster: Cluster, kind: str) -> str:
    """Wait for an event and return its reason."""
    pause, deadline = threading.Event(), time.monotonic() + 10
    while not (found := cluster.events(kind)):
        assert time.monotonic() < deadline, cluster.output()
        pause.wait(0.05)
    return str(found[0]["reason"])
