"""From a configuration to a run that has ended: one agent on this node, its parent and its workers."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_ckptless.errors import OptionsError
from lightning_ckptless.membership.fault import FaultReport
from lightning_ckptless.membership.parent import PreloadedParent
from lightning_ckptless.membership.program import Program, script_path

DEFAULT_PRELOAD = (
    "torch",
    "torch.distributed",
    "torch._dynamo",
    "lightning.pytorch",
    "lightning_ckptless",
)
"""What workers of a usual run import, in the order that is quickest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchConfig:
    """One node's part of a run.

    Args:
        program: what the workers run.
        nproc: workers on this node.
        nnodes: number of nodes, or `min:max`.
        rdzv_endpoint: `host:port` where several nodes meet; not needed on one.
        rdzv_conf: further settings of torch's c10d rendezvous, e.g. `{"join_timeout": 600}` (seconds).
        run_id: name of the run, the same on all nodes; made up on a single node when empty.
        max_restarts: relaunches after failures of workers until the run gives up.
        preload: modules that the preloaded parent imports.
        fresh: start each worker as a new process, without a preloaded parent.
        run_root: folder that receives the run's own folder; handed to the workers.
        env: what the workers' environment has beyond this process's.
        cwd: working directory of the workers; None for this process's.
        node_name: unique in the run; None for host name and process id.
        local_addr: address under which other nodes reach this one; None to look it up.
        log_dir: folder for the workers' output; None for no log files.
        redirects: streams that go only to files, as torchrun's `--redirects` has them.
        tee: streams that go to files too, as torchrun's `--tee` has them.
        local_ranks_filter: ranks whose output is shown; empty for all.
        log_line_prefix: template of what stands before each line of a stream in `tee`; None for torch's own.
        stop_grace_s: time that workers have to end after SIGTERM, where they are asked and not killed.

    Raises:
        OptionsError: a value is out of range, or several nodes are given no place to meet.
    """

    program: Program
    nproc: int = 1
    nnodes: str = "1"
    rdzv_endpoint: str = ""
    rdzv_conf: Mapping[str, str | int] = field(default_factory=dict)
    run_id: str = ""
    max_restarts: int = 100
    preload: tuple[str, ...] = DEFAULT_PRELOAD
    fresh: bool = False
    run_root: Path | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    cwd: Path | None = None
    node_name: str | None = None
    local_addr: str | None = None
    log_dir: Path | None = None
    redirects: str = "0"
    tee: str = "0"
    local_ranks_filter: tuple[int, ...] = ()
    log_line_prefix: str | None = None
    stop_grace_s: float = 5.0

    def __post_init__(self) -> None:
        for name, least in (("nproc", 1), ("max_restarts", 0), ("stop_grace_s", 0)):
            if getattr(self, name) < least:
                raise OptionsError(f"{name}={getattr(self, name)!r}: expected at least {least}")
        _, most_nodes = self.node_range
        if most_nodes > 1 and not self.rdzv_endpoint:
            raise OptionsError(f"nnodes={self.nnodes}: the nodes must know where to meet; give rdzv_endpoint=HOST:PORT")
        if most_nodes > 1 and not self.run_id:
            raise OptionsError(f"nnodes={self.nnodes}: the nodes must know which run they belong to; give a run id")

    @property
    def node_range(self) -> tuple[int, int]:
        """Least and most number of nodes."""
        match = re.fullmatch(r"(\d+)(?::(\d+))?", self.nnodes)
        least, most = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
        if not 0 < least <= most:
            raise OptionsError(f"nnodes={self.nnodes!r}: expected a number, or MIN:MAX with 0 < MIN <= MAX")
        return least, most


    @property
    def working_dir(self) -> str:
        """Absolute path of the workers' working directory."""
        return str((self.cwd or Path()).absolute())


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended on this node.

    Args:
        exit_code: 0, or that of the worker which ended it, 128 + number for a signal.
        restarts: how often the workers were started again.
        faults: what this node saw of each fault.
    """

    exit_code: int
    restarts: int
    faults: tuple[FaultReport, ...]


def _no_record(event: str, **fields: Any) -> None:
    """Nobody listens."""


def run(
    config: LaunchConfig, *, parent: PreloadedParent | None = None, record: Callable[..., None] = _no_record
) -> Outcome:
    """Run this node's workers until they succeed, or fail for good.

    Installs no signal handlers and can be called in any thread. An exception that a signal handler of the caller
    raises ends the workers and passes through.

    Args:
        config: what to run.
        parent: a preloaded parent that outlives the run; None for one of its own.
        record: receives events as `record(event, **fields)`: workers_spawned, fault, relaunch.

    Raises:
        LaunchError: the workers cannot be started, or the nodes do not find each other.
    """
    with nullcontext(parent) if parent is not None else make_parent(config) as forker:
        # torch is imported here, while the parent imports it too.
        from lightning_ckptless.membership.node import run_node  # noqa: PLC0415

        return run_node(config, forker, record)


def make_parent(config: LaunchConfig) -> PreloadedParent:
    """The parent that suits a configuration, not yet started."""
    modules = () if config.fresh else config.preload
    return PreloadedParent(modules, path=script_path(config.program, config.working_dir), flags=config.program.flags)
