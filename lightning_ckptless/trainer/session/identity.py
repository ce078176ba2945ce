"""Which run, node and agent this worker belongs to, read from its environment."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_ckptless import environment

_DEFAULT_RUN_IDS = frozenset({"", "none"})


@dataclass(frozen=True, slots=True)
class Identity:
    """A worker's place in its run.

    Args:
        run_id: name of the run, the same on all nodes and across all relaunches.
        node: name of this node, unique in the run while its agent lives.
        agent_pid: process id of the agent that relaunches the workers of this node.
        own_agent: whether that process is our agent rather than torchrun's.
        run_root: folder that contains one folder per run.
    """

    run_id: str
    node: str
    agent_pid: int
    own_agent: bool
    run_root: Path

    @property
    def run_folder(self) -> Path:
        """Folder of the ledger."""
        return self.run_root / self.run_id


def is_worker(env: Mapping[str, str] = os.environ) -> bool:
    """Whether an elastic agent, ours or torchrun's, started this process."""
    return "TORCHELASTIC_RUN_ID" in env


def may_be_restarted(env: Mapping[str, str] = os.environ) -> bool:
    """Whether the launcher would relaunch the workers if this one failed now."""
    return int(env.get("TORCHELASTIC_RESTART_COUNT", "0")) < int(env.get("TORCHELASTIC_MAX_RESTARTS", "1"))


def identify(trainer: Any, env: Mapping[str, str] = os.environ) -> Identity:
    """Determine which run, node and agent this worker belongs to.

    torchrun names every run `none` unless told otherwise. Such a run is named after its agent instead, so that two of
    them on one node do not adopt each other's arenas.
    """
    own_agent = environment.AGENT in env
    agent_pid = int(env[environment.AGENT]) if own_agent else os.getppid()
    host = re.sub(r"[^A-Za-z0-9.]+", "-", socket.gethostname())
    run_id = env.get("TORCHELASTIC_RUN_ID", "")
    if run_id in _DEFAULT_RUN_IDS:
        run_id = f"torchrun-{host}-{agent_pid}"
    node = env.get(environment.NODE, f"{host}-{agent_pid}")
    root = (
        Path(env[environment.RUN_ROOT]) if environment.RUN_ROOT in env else Path(trainer.default_root_dir) / "ckptless"
    )
    return Identity(re.sub(r"[^A-Za-z0-9_.-]+", "-", run_id), node, agent_pid, own_agent, root.absolute())


def count_fit(env: MutableMapping[str, str] = os.environ) -> int:
    """Count a call of `fit` in this process, over all its trainers; a relaunched script repeats their order.

    Returns:
        The fit index of the call: the number of earlier calls of `fit`.
    """
    before = fits_before(env)
    env[environment.FIT_INDEX] = str(before + 1)
    return before


def fits_before(env: Mapping[str, str] = os.environ) -> int:
    """Number of calls of `fit` that this process has made."""
    return int(env.get(environment.FIT_INDEX, "0"))


def count_call(env: MutableMapping[str, str] = os.environ) -> None:
    """Count a trainer call other than `fit`."""
    env[environment.CALLS] = str(calls_before(env) + 1)


def calls_before(env: Mapping[str, str] = os.environ) -> int:
    """Number of trainer calls other than `fit` that this process has made."""
    return int(env.get(environment.CALLS, "0"))
