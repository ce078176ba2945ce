"""Two nodes on one machine: an agent each, an arena each, and the loss of one with all that it had."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil
import pytest

from lightning_ckptless.ledger import read_ledger
from lightning_ckptless.membership.parent import PreloadedParent
from lightning_ckptless.replica.arena import find_arenas
from lightning_ckptless.testing.compare import compare
from lightning_ckptless.testing.drill import run_variant
from lightning_ckptless.testing.log_files import collect_logs
from lightning_ckptless.testing.traces import read_traces
from tests.faults.conftest import REPOSITORY, command_for
from tests.faults.matrix import BASE, is_version
from tests.lab.parts import Options

ONE_NODE = replace(BASE, samples=80)
SHARDED = replace(ONE_NODE, mesh="2x1")
END_S = 90


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Cluster:
    """Agents on loopback that share a folder for logs and have an arena each."""

    folder: Path
    stack: ExitStack
    options: Options = ONE_NODE
    port: int = field(default_factory=_free_port)
    next_port: int = 0
    agents: list[psutil.Popen] = field(default_factory=list)

    @property
    def arenas(self) -> Path:
        """Where the nodes' shared memory is."""
        return self.folder / "arenas"

    def start_agent(self, faults: str = "", address: str = "127.0.0.1") -> psutil.Popen:
        """Start one node, with faults for the rank that it gets; the first one hosts the rendezvous."""
        name = f"node{len(self.agents)}"
        words = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-id", "two-nodes", "--local-addr", address]
        words += ["--run-root", str(self.folder / "runs"), "--arena-dir", str(self.arenas)]
        if self.next_port:
            words += ["--rdzv-endpoint", f"127.0.0.1:{self.port},127.0.0.2:{self.next_port}"]
        else:
            words += ["--rdzv-endpoint", f"127.0.0.1:{self.port}"]
            words += ["--rdzv-conf", f"is_host={'no' if self.agents else 'yes'}"]
        env = {
            **os.environ,
            "PYTHONPATH": str(REPOSITORY),
            "CKPTLESS_FAULTS": faults,
            # Sums over several threads round otherwise than the uninterrupted run's.
            "OMP_NUM_THREADS": "1",
            "CKPTLESS_TRACE_DIR": str(self.folder / "trace"),
        }
        log = self.stack.enter_context((self.folder / f"{name}.log").open("w"))
        agent = psutil.Popen(
            [
                sys.executable,
                "-m",
                "lightning_ckptless.job",
                *words,
                *command_for(replace(self.options, devices=1, num_nodes=2)),
            ],
            cwd=self.folder,
            env=env,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        self.agents.append(agent)
        self.stack.callback(_end, agent)
        return agent

    def lose(self, agent: psutil.Popen) -> None:
        """Take the arena of a dead node away."""
        (info,) = [info for info in find_arenas(self.arenas) if info.owner.pid == agent.pid]
        shutil.rmtree(info.path)

    def output(self) -> str:
        """What all agents and workers printed."""
        return "\n".join(path.read_text() for path in sorted(self.folder.glob("node*.log")))


def _end(agent: psutil.Popen) -> None:
    if agent.poll() is None:
        agent.terminate()
        agent.wait(timeout=END_S)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    """What ends with the test."""
    with ExitStack() as stack:
        yield stack


def _assert_identical(cluster: Cluster, parent: PreloadedParent) -> None:
    env = {"PYTHONPATH": str(REPOSITORY)}
    whole = run_variant(command_for(cluster.options), cluster.folder / "whole", parent=parent, isolate=True, env=env)
    collect_logs(read_traces(cluster.folder / "trace").values(), cluster.folder / "logs", since=0)
    verdict = compare(whole.folder, cluster.folder)
    assert verdict.identical, f"{verdict}\n{cluster.output()}"


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("options", [ONE_NODE, SHARDED], ids=["replicated", "sharded"])
def test_node_is_lost_with_its_arena(
    options: Options, tmp_path: Path, stack: ExitStack, parent: PreloadedParent
) -> None:
    cluster = Cluster(tmp_path, stack, options)
    cluster.arenas.mkdir()
    stays = cluster.start_agent()
    lost = cluster.start_agent("node:rank=all:step=7")
    assert lost.wait(timeout=END_S) == -signal.SIGKILL, cluster.output()
    cluster.lose(lost)
    comes = cluster.start_agent()
    assert [agent.wait(timeout=END_S) for agent in (stays, comes)] == [0, 0], cluster.output()
    events = list(read_ledger(tmp_path / "runs" / "two-nodes" / "ledger.jsonl"))
    restored = [event.fields for event in events if event.event == "restored"]
    assert [is_version(fields["version"], "step 6") for fields in restored] == [True]
    assert restored[0]["moved_bytes"] > 0
    assert list(find_arenas(cluster.arenas)) == []
    _assert_identical(cluster, parent)


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_ranks_of_both_nodes_die_at_once(tmp_path: Path, stack: ExitStack, parent: PreloadedParent) -> None:
    cluster = Cluster(tmp_path, stack)
    cluster.arenas.mkdir()
    agents = [cluster.start_agent("kill:rank=all:step=5") for _ in range(2)]
    assert [agent.wait(timeout=END_S) for agent in agents] == [0, 0], cluster.output()
    _assert_identical(cluster, parent)


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_rank_of_one_node_is_replaced_and_the_other_node_goes_on(
    tmp_path: Path, stack: ExitStack, parent: PreloadedParent
) -> None:
    cluster = Cluster(tmp_path, stack)
    cluster.arenas.mkdir()
    agents = [cluster.start_agent("kill:rank=1:step=5,kill:rank=0:step=9") for _ in range(2)]
    assert [agent.wait(timeout=END_S) for agent in agents] == [0, 0], cluster.output()
    events = list(read_ledger(tmp_path / "runs" / "two-nodes" / "ledger.jsonl"))
    assert sum(event.event == "in_place" for event in events) == 2
    assert not [event for event in events if event.event == "relaunch"]
    assert [event.fields["culprit_rank"] for event in events if event.event == "recovery"] == [1, 0]
    _assert_identical(cluster, parent)


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_the_node_that_hosts_the_rendezvous_is_lost(tmp_path: Path, stack: ExitStack, parent: PreloadedParent) -> None:
    cluster = Cluster(tmp_path, stack, next_port=_free_port())
    cluster.arenas.mkdir()
    lost = cluster.start_agent("node:rank=all:step=7")
    stays = cluster.start_agent(address="127.0.0.2")
    assert lost.wait(timeout=END_S) == -signal.SIGKILL, cluster.output()
    cluster.lose(lost)
    comes = cluster.start_agent()
    assert [agent.wait(timeout=END_S) for agent in (stays, comes)] == [0, 0], cluster.output()
    events = list(read_ledger(tmp_path / "runs" / "two-nodes" / "ledger.jsonl"))
    assert [event.fields["next"].split(":")[0] for event in events if event.event == "meeting_place_lost"] == [
        "127.0.0.2"
    ]
    restored = [event.fields for event in events if event.event == "restored"]
    assert [is_version(fields["version"], "step 6") for fields in restored] == [True]
    _assert_identical(cluster, parent)
