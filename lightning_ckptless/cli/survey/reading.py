"""What was read of a run at one moment. Everything that is shown follows from it, by pure functions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lightning_ckptless.cli.survey.history import History
from lightning_ckptless.membership.worker.progress import WorkerProgress
from lightning_ckptless.protocol.versions import Replica
from lightning_ckptless.replica.arena import ArenaInfo


@dataclass(frozen=True, slots=True)
class ArenaReading:
    """The contents of one arena.

    Args:
        info: what it is, and whose.
        written_at: the replicas in it, with the time of the last write to each in seconds since the epoch.
        torn_headers: slots that are being written, or whose writer died.
    """

    info: ArenaInfo
    written_at: Mapping[Replica, float]
    torn_headers: int


@dataclass(frozen=True, slots=True)
class NodeReading:
    """The processes of a node on this host.

    Args:
        agent_alive: whether its agent runs.
        workers: the progress that its workers have written.
        states: state of each rank's newest process as in /proc, by process id; `X` if it has exited.
    """

    agent_alive: bool
    workers: tuple[WorkerProgress, ...]
    states: Mapping[int, str]


@dataclass(frozen=True, slots=True)
class Reading:
    """A run at one moment.

    Args:
        run_id: id of the run.
        folder: folder of its ledger.
        at: when it was read, in seconds since the epoch.
        clock_s: the same on the clock of the workers' progress.
        history: its events.
        arenas: its arenas on this host.
        nodes: its nodes on this host, by name.
        free_bytes: free space where its ledger is.
    """

    run_id: str
    folder: Path
    at: float
    clock_s: float
    history: History
    arenas: tuple[ArenaReading, ...]
    nodes: Mapping[str, NodeReading]
    free_bytes: int

    @property
    def replicas(self) -> dict[Replica, float]:
        """The replicas in the current arenas, with the time of the last write to each."""
        return {replica: at for arena in self.current_arenas for replica, at in arena.written_at.items()}

    @property
    def current_arenas(self) -> tuple[ArenaReading, ...]:
        """The arenas of the `fit` that has started last; all if that is unknown."""
        started = self.history.newest.get("run_started")
        path = None if started is None else started.fields["arena"]
        run_ids = {arena.info.run_id for arena in self.arenas if str(arena.info.path) == path}
        return tuple(arena for arena in self.arenas if not run_ids or arena.info.run_id in run_ids)
