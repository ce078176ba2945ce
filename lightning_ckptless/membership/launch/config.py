"""The configuration of a launch, which is one node's part of a run, and its outcome."""

from __future__ import annotations

import os
import re
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_ckptless import environment
from lightning_ckptless.configuration.option import Options, about, option, option_of
from lightning_ckptless.configuration.ranges import integer, number, one_of
from lightning_ckptless.distributions import CLASSES, LIGHTNING, PYTORCH_LIGHTNING
from lightning_ckptless.errors import OptionsError
from lightning_ckptless.membership.channel.fault_report import FaultReport
from lightning_ckptless.membership.worker.program import Program
from lightning_ckptless.options import CkptlessOptions

_LIGHTNING = re.compile(rb"^\s*(?:import|from)\s+lightning\b", re.MULTILINE)
_PYTORCH_LIGHTNING = re.compile(rb"^\s*(?:import|from)\s+pytorch_lightning\b", re.MULTILINE)


def distribution_of(words: Iterable[str], env: Mapping[str, str] = os.environ) -> str:
    """Return the distribution of Lightning that a script imports; `lightning.pytorch` if that is unclear.

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


DEFAULT_PRELOAD = ("torch", "torch.distributed", "torch._dynamo", LIGHTNING, CLASSES[LIGHTNING])
"""What workers usually import, in the fastest order."""


def usual_modules(words: Sequence[str]) -> tuple[str, ...]:
    """Return what workers usually import, with the distribution of Lightning that a script uses.

    Args:
        words: the script and its arguments.
    """
    used = distribution_of(words)
    chosen = {LIGHTNING: used, CLASSES[LIGHTNING]: CLASSES.get(used, CLASSES[LIGHTNING])}
    return tuple(chosen.get(name, name) for name in DEFAULT_PRELOAD)


DEFAULT_STOP_GRACE_S = 5.0
DEFAULT_FINISH_GRACE_S = 20.0
"""Together with the time before SIGKILL, less than the 30 s that schedulers usually allow."""
DEFAULT_EXIT_GRACE_S = 60.0
"""Time for what scripts do between an exception and their exit, e.g. uploading the last log rows."""


def new_run_id() -> str:
    """Return a name for a run: its start time and a random suffix."""
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:4]}"


def _for_the_strategy(name: str) -> Any:
    """Declare an option of the strategy that can be given to the launcher, which takes precedence."""
    return option_of(CkptlessOptions, name, none="the strategy's", flag=f"--{name.replace('_', '-')}")


@dataclass(frozen=True, kw_only=True)
class LaunchConfig(Options):
    """One node's part of a run.

    Args:
        program: what the workers run.

    Raises:
        OptionsError: a value is out of range, or several nodes have no rendezvous endpoint.
    """

    program: Program
    nproc: int = option(1, "workers on this node", integer(least=1))
    nnodes: str = option("1", "number of nodes, or `min:max`")
    rdzv_endpoint: str = option(
        "",
        "`host:port` of the rendezvous; not needed on one node. Several, separated by commas, are endpoints on "
        "different nodes; when one is lost, the next is used",
    )
    rdzv_conf: Mapping[str, str | int] = field(
        default_factory=dict,
        metadata=about("further settings of torch's c10d rendezvous, e.g. `{'join_timeout': 600}`, in seconds"),
    )
    run_id: str = field(
        default_factory=new_run_id,
        metadata=about("name of the run; must be given where there are several nodes, the same on all of them"),
    )
    is_named: bool = option(False, "whether the user has chosen that name")
    max_restarts: int | None = option(
        None,
        "recoveries in the life of the agent after which the run gives up",
        integer(least=0),
        none="any number",
    )
    preload: tuple[str, ...] = option(
        DEFAULT_PRELOAD, "additional module that the fork server imports", flag="--preload", metavar="MODULE"
    )
    """All modules that it imports; the flag adds to the default."""
    fresh: bool = option(False, "start every worker as a new interpreter", flag="--no-preload")
    run_root: Path | None = option(
        None,
        "parent folder of the run folder",
        none="CKPTLESS_RUN_ROOT, or ./ckptless",
        flag="--run-root",
        variable=environment.RUN_ROOT,
    )
    arena_dir: Path | None = option(
        None,
        "folder of the arenas, if the strategy names none",
        none="CKPTLESS_ARENA_DIR, or /dev/shm",
        flag="--arena-dir",
        variable=environment.ARENA_DIR,
    )
    standbys: int | None = _for_the_strategy("standbys")
    preload_imports: bool | None = _for_the_strategy("preload_imports")
    in_place: bool | None = _for_the_strategy("in_place")
    max_recoveries_without_progress: int | None = _for_the_strategy("max_recoveries_without_progress")
    max_recoveries_per_hour: int | None = _for_the_strategy("max_recoveries_per_hour")
    durable_every_n_steps: int | None = _for_the_strategy("durable_every_n_steps")
    durable_every_s: float | None = _for_the_strategy("durable_every_s")
    durable_dir: Path | None = _for_the_strategy("durable_dir")
    finish_grace_s: float = option(
        DEFAULT_FINISH_GRACE_S,
        "on SIGTERM, time for workers to finish the current step and save",
        number(0),
        unit="seconds",
        flag="--finish-grace",
    )
    on_sigterm: str = option(
        "end",
        "what the first SIGTERM to the agent does: `end` the run, or `drain` this node, whose work moves to other "
        "nodes; where that is not possible, the run ends",
        one_of(("end", "drain")),
        flag="--on-sigterm",
        metavar="end|drain",
    )
    preemption_notice: str = option(
        "",
        "your function, called every 5 s in the agent, that returns true or a text when this node is about to be "
        "taken away; the node is drained then",
        flag="--preemption-notice",
        metavar="MODULE.FUNCTION",
    )
    stop_grace_s: float = option(
        DEFAULT_STOP_GRACE_S,
        "time for workers to exit after SIGTERM, where they are asked to and not killed",
        number(0),
        unit="seconds",
    )
    exit_grace_s: float = option(
        DEFAULT_EXIT_GRACE_S,
        "time between an exception that ends a worker's script and the exit of its process, which is killed then",
        number(0),
        unit="seconds",
    )
    env: Mapping[str, str] = field(
        default_factory=dict,
        metadata=about("environment variables of the workers, in addition to this process's"),
    )
    cwd: Path | None = option(None, "working directory of the workers", none="this process's")
    node_name: str | None = option(None, "unique in the run", none="host name and process id")
    local_addr: str | None = option(None, "address under which other nodes reach this one", none="looking it up")
    log_dir: Path | None = option(None, "folder for the workers' output", none="no log files")
    redirects: str = option("0", "streams that go only to files, as in torchrun's `--redirects`")
    tee: str = option("0", "streams that are shown and also go to files, as in torchrun's `--tee`")
    local_ranks_filter: tuple[int, ...] = option((), "local ranks whose output is shown; empty for all")
    log_line_prefix: str | None = option(
        None, "template of the prefix of each line of a stream in `tee`", none="torch's own"
    )
    role: str = option("default", "torch elastic's name for the kind of worker")
    time_limit_s: float | None = option(
        None,
        "time from the start of the agent after which the run is ended",
        number(0),
        unit="seconds",
        none="no limit",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
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
        restarts: number of relaunches of all workers.
        faults: this node's reports of the faults.
        in_place: number of recoveries in place.
        has_given_up: whether it ended because of its machines or environment rather than its script.
    """

    exit_code: int
    restarts: int
    faults: tuple[FaultReport, ...]
    in_place: int = 0
    has_given_up: bool = False
