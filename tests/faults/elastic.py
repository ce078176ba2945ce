"""Counted runs (`tests/lab/counted.py`) on nodes that continue with fewer nodes and grow back."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path

import psutil
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from lightning_ckptless.membership.forkserver.client import ForkServer
from lightning_ckptless.membership.launch.config import LaunchConfig, Outcome
from lightning_ckptless.membership.launch.launch import run
from lightning_ckptless.membership.worker.program import Program
from lightning_ckptless.runner import record_for
from lightning_ckptless.testing.drill import run_variant
from tests.faults.cluster import END_S, OUR_LAUNCHER, Cluster, free_port
from tests.faults.conftest import REPOSITORY
from tests.faults.counting import COUNTED, Account, account_of
from tests.lab.parts import Options

BOUND = 2e-6
"""Largest difference of a weight of magnitude one after all steps, since ranks are summed in a different order."""
_POLL_S = 0.1


def command(folder: Path, nodes: int, devices: int, *words: str) -> tuple[str, ...]:
    """Return the command of a counted run with `nodes` times `devices` ranks."""
    return (str(COUNTED), "--folder", str(folder), "--nodes", str(nodes), "--devices", str(devices), *words)


def run_undisturbed(folder: Path, parent: ForkServer, ranks: int, *words: str) -> Account:
    """Run without faults and return the result."""
    folder.mkdir()
    env = {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    variant = run_variant(
        list(command(folder, 1, ranks, *words)), folder / "run", nproc=ranks, parent=parent, isolate=True, env=env
    )
    assert variant.exit_code == 0, variant.tail()
    return account_of(folder)


def start(
    folder: Path,
    parent: ForkServer,
    ranks: int,
    *words: str,
    faults: str = "",
    max_restarts: int = 0,
    nnodes: str = "1",
) -> Outcome:
    """Start a counted run on one node, with the folder's name as its run id, and wait for its end."""
    script, *arguments = command(folder, 1, ranks, *words)
    config = LaunchConfig(
        program=Program("script", script, tuple(arguments)),
        nproc=ranks,
        run_id=folder.name,
        max_restarts=max_restarts,
        env={"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "CKPTLESS_FAULTS": faults},
        nnodes=nnodes,
        rdzv_endpoint=f"127.0.0.1:{free_port()}",
        rdzv_conf={"last_call_timeout": 4},
        cwd=folder,
        run_root=folder / "runs",
        arena_dir=folder / "arenas",
        log_dir=folder / f"output-{ranks}",
        redirects="3",
    )
    return run(config, parent=parent, record=record_for(config))


class Nodes:
    """Nodes of an elastic run whose rendezvous store is outside of all nodes."""

    def __init__(
        self,
        folder: Path,
        stack: ExitStack,
        *,
        least: int,
        most: int,
        devices: int = 1,
        words: tuple[str, ...] = (),
        env: Mapping[str, Mapping[str, str]] = {},
        launcher: tuple[str, ...] = OUR_LAUNCHER,
    ) -> None:
        folder.mkdir(exist_ok=True)
        self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        run = command(folder, most, devices, *words)
        nodes = ("--nnodes", f"{least}:{most}", "--nproc-per-node", str(devices))
        self.cluster = Cluster(
            folder, stack, Options(), env, words=nodes, port=self.store.port, external_store=True, command=run,
            launcher=launcher,
        )  # fmt: skip
        self.cluster.arenas.mkdir()
        self.agents: list[psutil.Popen] = []

    def start(self, number: int, faults: str = "") -> psutil.Popen:
        """Start a node; ranks are in the order of node numbers."""
        agent = self.cluster.start_agent(faults, f"127.0.0.{number + 1}")
        self.agents.append(agent)
        return agent

    def lose(self, agent: psutil.Popen) -> None:
        """Wait until a node is lost, and remove its arena."""
        assert agent.wait(timeout=END_S) == -signal.SIGKILL, self.cluster.output()
        self.cluster.remove_arena(agent)

    def lose_and_rejoin(self, lost: int, fault: str, *, of: int, left: int) -> Account:
        """Train to the end while one node is lost with its arena and rejoins.

        Args:
            lost: number of the lost node.
            fault: the fault that kills it.
            of: number of nodes.
            left: number of ranks without it.
        """
        agents = [self.start(number, fault if number == lost else "") for number in range(of)]
        self.lose(agents[lost])
        self.wait_for_world(left)
        agents[lost] = self.start(lost)
        assert [agent.wait(timeout=END_S) for agent in agents] == [0] * of, self.cluster.output()
        return account_of(self.cluster.folder)

    def wait_for_world(self, size: int) -> None:
        """Wait until `size` ranks have completed a step."""
        self.wait_until(lambda: size in account_of(self.cluster.folder).worlds.values(), f"no step of {size} ranks")

    def wait_until(self, condition: Callable[[], bool], otherwise: str) -> None:
        """Wait until a condition holds.

        Args:
            condition: polled.
            otherwise: error message if it never holds.
        """
        for _ in range(round(END_S / _POLL_S)):
            if condition():
                return
            threading.Event().wait(_POLL_S)
        raise AssertionError(f"{otherwise}:\n{self.cluster.output()}")


def rungs(nodes: Nodes) -> list[str]:
    """Return the rung of each recovery."""
    return [str(fields["rung"]) for fields in nodes.cluster.events("recovery")]
