"""Several nodes on one machine: agents on loopback, with an arena each."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from lightning_ckptless.replica.arena import find_arenas
from tests.faults.conftest import REPOSITORY, command_for
from tests.lab.parts import Options

END_S = 90


def free_port() -> int:
    """A port of loopback that nobody has taken yet."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Cluster:
    """Agents on loopback that share a folder for logs and have an arena each."""

    folder: Path
    stack: ExitStack
    options: Options
    env: dict[str, dict[str, str]] = field(default_factory=dict)
    words: tuple[str, ...] = ()
    arena_dir: Path | None = None
    port: int = field(default_factory=free_port)
    next_port: int = 0
    agents: list[psutil.Popen] = field(default_factory=list)

    @property
    def arenas(self) -> Path:
        """Where the nodes' shared memory is."""
        return self.arena_dir or self.folder / "arenas"

    def start_agent(self, faults: str = "", address: str = "127.0.0.1") -> psutil.Popen:
        """Start one node, with faults for the rank that it gets; the first one hosts the rendezvous."""
        name = f"node{len(self.agents)}"
        words = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-id", "two-nodes", "--local-addr", address]
        words += [*self.words, "--run-root", str(self.folder / "runs"), "--arena-dir", str(self.arenas)]
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
            **self.env.get(name, {}),
        }
        log = self.stack.enter_context((self.folder / f"{name}.log").open("w"))
        agent = psutil.Popen(
            [sys.executable, "-m", "lightning_ckptless.job", *words, *command_for(self.options)],
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
