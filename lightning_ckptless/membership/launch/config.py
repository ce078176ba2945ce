"""The configuration of a launch, which is one node's part of a run, and its outcome."""

from __future__ import annotations

import os
import re
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lightning_ckptless import environment
from lightning_ckptless.distributions import LIGHTNING, PYTORCH_LIGHTNING
from lightning_ckptless.errors import OptionsError
from lightning_ckptless.membership.channel.fault_report import FaultReport
from lightning_ckptless.membership.worker.program import Program

_LIGHTNING = re.compile(rb"^\s*(?:import|from)\s+lightning\b", re.MULTILINE)
_PYTORCH_LIGHTNING = re.compile(rb"^\s*(?:import|from)\s+pytorch_lightning\b", re.MULTILINE)


def distribution_of(words: Iterable[str], env: Mapping[str, str] = os.environ) -> str:
    """Return the distribution of Lightning that a script imports; `lightning.pytorch` when in doubt.

    The text of the script is searched; it is not run.

    Args:
        words: the script and its arguments; the first Python file among them is searched.
        env: may name the distribution (`CKPTLESS_LIGHTNING`).
    """
    if named := env.get(environment.LIGHTNING):
        return named
    for word in words:
        if word.endswith(".py") and Path(word).is_file():
            text = Path(word).read_bytes()
            return PYTORCH_LIGHTNING if _PYTORCH_LIGHTNING.search(text) and not _LIGHTNING.search(text) else LIGHTNING
    return LIGHTNING


DEFAULT_PRELOAD = (
    "torch",
    "torch.distributed",
    "torch._dynamo",
    LIGHTNING,
    "lightning_ckptless.trainer.strategy.strategies",
)
"""What workers usually import, in the fastest order."""


def usual_modules(words: Sequence[str]) -> tuple[str, ...]:
    """Return what workers usually import, with the distribution of Lightning that a script uses.

    Args:
        words: the script and its arguments.
    """
    used = distribution_of(words)
    return tuple(used if name == LIGHTNING else name for name in DEFAULT_PRELOAD)


DEFAULT_STOP_GRACE_S = 5.0
DEFAULT_FINISH_GRACE_S = 20.0
"""Together with the time before SIGKILL shorter than the 30 s that schedulers usually allow."""
DEFAULT_EXIT_GRACE_S = 60.0
"""For what scripts do after an exception before they exit, e.g. uploading the last rows of their logs."""


def new_run_id() -> str:
    """Return a name for a run: its start time and a random suffix."""
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:4]}"


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchConfig:
    """One node's part of a run.

    Args:
        program: what the workers run.
        nproc: workers on this node.
        nnodes: number of nodes, or `min:max`.
        rdzv_endpoint: `host:port` of the rendezvous; not needed on one node. Several, separated by commas, are
            endpoints on different nodes; when one is lost, the next is used.
        rdzv_conf: further settings of torch's c10d rendezvous, e.g. `{"join_timeout": 600}` (seconds).
        run_id: name of the run; must be given where there are several nodes, the same on all of them.
        is_named: whether the user has chosen that name.
        max_restarts: recoveries in the life of the agent until the run gives up; None for any number.
        max_recoveries_without_progress: recoveries in a row without a new committed step until the run gives up; None
            to leave it to the strategy.
        max_recoveries_per_hour: recoveries within an hour until the run gives up; None to leave it to the strategy.
        preload: modules that the fork server imports.
        fresh: start each worker as a new process, without a fork server.
        run_root: parent folder of the run folder; passed to the workers.
        arena_dir: folder of the arenas; passed to the workers.
        env: environment variables of the workers, in addition to this process's.
        cwd: working directory of the workers; None for this process's.
        node_name: unique in the run; None for host name and process id.
        local_addr: address under which other nodes reach this one; None to look it up.
        log_dir: folder for the workers' output; None for no log files.
        redirects: streams that go only to files, as in torchrun's `--redirects`.
        tee: streams that are shown and also go to files, as in torchrun's `--tee`.
        local_ranks_filter: local ranks whose output is shown; empty for all.
        log_line_prefix: template of the prefix of each line of a stream in `tee`; None for torch's own.
        role: torch elastic's name for the kind of worker.
        stop_grace_s: time in seconds for workers to exit after SIGTERM, where they are asked to and not killed.
        finish_grace_s: time in seconds for workers to finish a step and save when the agent receives SIGTERM.
        exit_grace_s: time in seconds between an exception that ends a worker's script and the exit of its process,
            which is killed then.
        in_place: whether survivors recover in place; None to leave it to the strategy of the workers.
        standbys: processes that wait for a rank; None to leave it to the strategy.
        preload_imports: whether new processes preload what the script has imported; None to leave it to the strategy.
        time_limit_s: time in seconds from the start of the agent after which the run is ended; None for no limit.

    Raises:
        OptionsError: a value is out of range, or several nodes have no rendezvous endpoint.
    """

    program: Program
    nproc: int = 1
    nnodes: str = "1"
    rdzv_endpoint: str = ""
    rdzv_conf: Mapping[str, str | int] = field(default_factory=dict)
    run_id: str = field(default_factory=new_run_id)
    is_named: bool = False
    max_restarts: int | None = None
    max_recoveries_without_progress: int | None = None
    max_recoveries_per_hour: int | None = None
    preload: tuple[str, ...] = DEFAULT_PRELOAD
    fresh: bool = False
    run_root: Path | None = None
    arena_dir: Path | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    cwd: Path | None = None
    node_name: str | None = None
    local_addr: str | None = None
    log_dir: Path | None = None
    redirects: str = "0"
    tee: str = "0"
    local_ranks_filter: tuple[int, ...] = ()
    log_line_prefix: str | None = None
    role: str = "default"
    stop_grace_s: float = DEFAULT_STOP_GRACE_S
    finish_grace_s: float = DEFAULT_FINISH_GRACE_S
    exit_grace_s: float = DEFAULT_EXIT_GRACE_S
    in_place: bool | None = None
    standbys: int | None = None
    preload_imports: bool | None = None
    time_limit_s: float | None = None

    def __post_init__(self) -> None:
        for name, least in (
            ("nproc", 1),
            ("max_restarts", 0),
            ("max_recoveries_without_progress", 0),
            ("max_recoveries_per_hour", 0),
            ("stop_grace_s", 0),
            ("finish_grace_s", 0),
            ("exit_grace_s", 0),
            ("standbys", 0),
            ("time_limit_s", 0),
        ):
            if (value := getattr(self, name)) is not None and value < least:
                raise OptionsError(f"{name}={value!r}: expected at least {least}")
        least_nodes, most_nodes = self.node_range
        if most_nodes > 1 and not self.rdzv_endpoint:
            raise OptionsError(f"nnodes={self.nnodes}: several nodes need a rendezvous; set rdzv_endpoint=HOST:PORT")
        if len(self.endpoints) > 1 and 2 * least_nodes <= most_nodes:
            raise OptionsError(
                f"nnodes={self.nnodes} with {len(self.endpoints)} rendezvous endpoints: after a network partition "
                "both halves could continue, each at its own endpoint. Set the minimum number of nodes to "
                f"{most_nodes // 2 + 1} or more, or give one endpoint"
            )

    @property
    def endpoints(self) -> tuple[str, ...]:
        """The rendezvous endpoints, in order."""
        return tuple(endpoint.strip() for endpoint in self.rdzv_endpoint.split(",") if endpoint.strip())

    @property
    def node_range(self) -> tuple[int, int]:
        """Minimum and maximum number of nodes."""
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
        exit_code: 0, or that of the worker which ended the run, 128 + number for a signal.
        restarts: how often all workers were started again.
        faults: what this node saw of each fault.
        in_place: how often only the lost ranks were replaced.
        has_given_up: whether it ended because of its machines or their surroundings, and not because of its script.
    """

    exit_code: int
    restarts: int
    faults: tuple[FaultReport, ...]
    in_place: int = 0
    has_given_up: bool = False
