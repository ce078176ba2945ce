"""The settings of one node's agent, and the state that its agents share over the life of the run."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lightning_ckptless.membership.channel.fault_report import FaultReport
from lightning_ckptless.membership.worker.program import Program
from lightning_ckptless.membership.worker.startup import Job
from lightning_ckptless.protocol.retry_policy import RecoveryHistory, RecoveryLimits


@dataclass(frozen=True, slots=True)
class NodeSettings:
    """What an agent needs beyond torch elastic's own settings.

    Args:
        name: unique in the run, constant for the life of the agent.
        program: what the workers run.
        env: environment that all workers share.
        cwd: their working directory.
        fresh: start new interpreters instead of forking the fork server.
        stop_grace_s: time between SIGTERM and SIGKILL, in seconds, where workers are asked to exit.
        finish_grace_s: time in seconds for workers to finish a step and save when the agent is asked to end.
        exit_grace_s: time in seconds between an exception that ends a worker's script and the exit of its process.
        run_folder: folder of the run.
        least_nodes: how many nodes the run needs.
        endpoints: how many rendezvous endpoints it has.
        max_restarts: recoveries in the life of the agent; None for any number.
        max_recoveries_without_progress: recoveries in a row without a new committed step; None to leave it to the
            strategy of the workers.
        max_recoveries_per_hour: recoveries within an hour; None to leave it to the strategy.
        in_place: whether survivors recover in place; None to leave it to the strategy of the workers.
        standbys: processes that wait for a rank; None to leave it to the strategy.
        preload_imports: whether new processes preload what the script imports; None to leave it to the strategy.
        log_line_prefix: prefix of each line of worker output that is both shown and logged; a template with
            `${role_name}`, `${rank}` and `${local_rank}`.
        time_limit_s: seconds after the agent's start at which the run is ended; None for no limit.
        replacement_outputs: folder for the output of new processes until they have joined the other ranks; None for a
            temporary one.
        host: name of the host.
    """

    name: str
    program: Program
    env: Mapping[str, str]
    cwd: str
    fresh: bool
    stop_grace_s: float
    finish_grace_s: float
    exit_grace_s: float
    run_folder: Path
    least_nodes: int
    endpoints: int = 1
    max_restarts: int | None = None
    max_recoveries_without_progress: int | None = None
    max_recoveries_per_hour: int | None = None
    in_place: bool | None = None
    standbys: int | None = None
    preload_imports: bool | None = None
    log_line_prefix: str | None = None
    time_limit_s: float | None = None
    replacement_outputs: Path | None = None
    host: str = field(default_factory=socket.gethostname)

    def limits(self, asked: RecoveryLimits) -> RecoveryLimits:
        """Return how often the run may recover.

        Args:
            asked: limits of the workers' strategy; those of the command line take precedence.
        """
        without_progress, per_hour = self.max_recoveries_without_progress, self.max_recoveries_per_hour
        return RecoveryLimits(
            asked.without_progress if without_progress is None else without_progress,
            asked.per_hour if per_hour is None else per_hour,
            self.max_restarts,
        )

    def job(self, env: Mapping[str, str], *, fresh: bool) -> Job:
        """Return what a worker runs.

        Args:
            env: what its environment adds to that of all workers.
            fresh: start a new interpreter.
        """
        return Job(self.program, {**self.env, **env}, self.cwd, fresh)


@dataclass(slots=True)
class NodeRun:
    """The run on one node, over all its agents: if a rendezvous is lost, the next agent continues.

    Attributes:
        faults: reports of the faults, in order.
        history: the recoveries, for their limits.
        starts: number of starts of all workers.
        recoveries_in_place: number of recoveries in which the survivors stayed.
        hydra: run folder that Hydra created for the first worker; empty if there is none.
        exit_code: this node's exit code.
        has_given_up: whether it ended with a fault after which the state is kept.
    """

    faults: list[FaultReport] = field(default_factory=list)
    history: RecoveryHistory = field(default_factory=RecoveryHistory)
    starts: int = 0
    recoveries_in_place: int = 0
    hydra: str = ""
    exit_code: int = 0
    has_given_up: bool = False

    @property
    def relaunches(self) -> int:
        """Number of relaunches of all workers."""
        return max(0, self.starts - 1)
