"""Several nodes on one machine: agents on loopback or in network namespaces, each with its own arena."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from lightning_ckptless.ledger import read_ledger
from lightning_ckptless.replica.arena import find_arenas
from tests.faults.conftest import REPOSITORY, command_for
from tests.lab.parts import Options

END_S = 90
OUR_LAUNCHER = ("-m", "lightning_ckptless.runner")
CONF = "keep_alive_interval=1,keep_alive_max_attempt=4,last_call_timeout=4"
"""A node is lost after 4 s without a keep-alive: short for a test, long enough for a busy machine."""


def free_port() -> int:
    """Return a port of the loopback interface that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Cluster:
    """Agents that share a folder for logs and have their own arenas.

    Args:
        folder: receives all output.
        stack: terminates the agents when it is closed.
        options: the training configuration; one worker per node.
        env: additional environment variables, by node.
        words: additional options of `ckptless run`.
        arena_dir: folder of the arenas; None for one in `folder`.
        host: host of the rendezvous.
        port: port of the rendezvous.
        next_port: port of a second rendezvous endpoint, on 127.0.0.2; 0 for none.
        external_store: whether the rendezvous store is outside of all nodes, so that any node can be lost.
        command: replaces the lab's training script.
        launcher: arguments of Python that start a node.
        agents: the agents started so far.
    """

    folder: Path
    stack: ExitStack
    options: Options
    env: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    words: tuple[str, ...] = ()
    arena_dir: Path | None = None
    host: str = "127.0.0.1"
    port: int = field(default_factory=free_port)
    next_port: int = 0
    external_store: bool = False
    command: tuple[str, ...] = ()
    launcher: tuple[str, ...] = OUR_LAUNCHER
    agents: list[psutil.Popen] = field(default_factory=list)

    @property
    def arenas(self) -> Path:
        """The folder of the arenas."""
        return self.arena_dir or self.folder / "arenas"

    @property
    def program(self) -> list[str]:
        """The command that every node runs."""
        return [*self.command] or command_for(self.options)

    @property
    def ledger(self) -> Path:
        """The ledger of the run."""
        return self.folder / "runs" / "two-nodes" / "ledger.jsonl"

    def events(self, kind: str) -> list[dict[str, Any]]:
        """Return the fields of all ledger events of one kind."""
        return [event.fields for event in read_ledger(self.ledger, only=kind)]

    def start_agent(
        self, faults: str = "", address: str = "127.0.0.1", *, env: Mapping[str, str] = {}, within: Sequence[str] = ()
    ) -> psutil.Popen:
        """Start one node; the first node hosts the rendezvous.

        Args:
            faults: fault script of its rank.
            address: address of the node; ranks are in the order of addresses.
            env: additional environment variables of this node.
            within: command prefix, e.g. to run in a network namespace.
        """
        name, nodes = f"node{len(self.agents)}", str(self.options.num_nodes)
        words = ["--nnodes", nodes, "--nproc-per-node", "1", "--rdzv-id", "two-nodes", "--local-addr", address]
        words += self.words
        if self.next_port:
            words += ["--rdzv-endpoint", f"127.0.0.1:{self.port},127.0.0.2:{self.next_port}"]
        else:
            words += ["--rdzv-endpoint", f"{self.host}:{self.port}"]
            words += ["--rdzv-conf", f"is_host={'no' if self.agents or self.external_store else 'yes'},{CONF}"]
        environment = {
            **os.environ,
            "PYTHONPATH": str(REPOSITORY),
            "CKPTLESS_FAULTS": faults,
            "CKPTLESS_RUN_ROOT": str(self.folder / "runs"),
            "CKPTLESS_ARENA_DIR": str(self.arenas),
            # The undisturbed run uses one thread, too: the number of threads changes how sums are rounded.
            "OMP_NUM_THREADS": "1",
            "CKPTLESS_TRACE_DIR": str(self.folder / "trace"),
            **self.env.get(name, {}),
            **env,
        }
        log = self.stack.enter_context((self.folder / f"{name}.log").open("w"))
        agent = psutil.Popen(
            [*within, sys.executable, *self.launcher, *words, *self.program],
            cwd=self.folder,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        self.agents.append(agent)
        self.stack.callback(_end, agent)
        return agent

    def remove_arena(self, agent: psutil.Popen) -> None:
        """Remove the arena of a dead node."""
        (info,) = [info for info in find_arenas(self.arenas) if info.owner.pid == agent.pid]
        shutil.rmtree(info.path)

    def output(self) -> str:
        """Return the output of all agents and workers."""
        return "\n".join(path.read_text() for path in sorted(self.folder.glob("node*.log")))


def _end(agent: psutil.Popen) -> None:
    if agent.poll() is None:
        agent.terminate()
        agent.wait(timeout=END_S)
