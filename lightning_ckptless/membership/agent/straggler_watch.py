"""Detection of stragglers on one node, and of the moment at which one must be drained."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Protocol

from lightning_ckptless.membership.clock import Clock
from lightning_ckptless.membership.events import Report, StepTimes, StragglerFound
from lightning_ckptless.membership.worker.progress import read_progress
from lightning_ckptless.protocol.stragglers import (
    StragglerAction,
    StragglerOptions,
    StragglerPlan,
    find_straggler,
    plan_straggler,
)

_LOOK_EVERY_S = 1.0
_REPORT_EVERY_S = 60.0


class TimedWorkers(Protocol):
    """What the straggler watch needs of a node's workers; see `WorkerGroup`."""

    @property
    def inside(self) -> Collection[int]:
        """Local ranks that are in the training loop, or on their way back into it."""

    def pids(self) -> dict[int, int]:
        """Process ids by local rank."""


class StragglerWatch:
    """Compares how long one node's workers take per step.

    Args:
        folder: folder in which workers write their progress.
        report: receives events.
        clock: this node's clock.
    """

    def __init__(self, folder: Path, report: Report, clock: Clock) -> None:
        self._folder = folder
        self._report = report
        self._clock = clock
        self._looked_at = self._reported_at = clock.monotonic()
        self._slow_pid = -1
        self._slow_since = 0.0
        self._drained_at: float | None = None

    def poll(
        self, workers: TimedWorkers, ranks: Mapping[int, int], options: StragglerOptions, *, is_draining: bool
    ) -> StragglerPlan | None:
        """Look for a straggler if a check is due; returns a plan if it must be drained.

        Args:
            workers: this node's workers.
            ranks: their ranks, by local rank.
            options: the user's settings.
            is_draining: whether a rank of this node is being drained.
        """
        now = self._clock.monotonic()
        if now - self._looked_at < _LOOK_EVERY_S:
            return None
        self._looked_at = now
        own_s = self._own_s(workers)
        pids = {ranks[local_rank]: pid for local_rank, pid in workers.pids().items()}
        found = find_straggler({ranks[local_rank]: seconds for local_rank, seconds in own_s.items()}, options.factor)
        if found is None or pids[found.rank] != self._slow_pid:
            self._slow_pid, self._slow_since = -1 if found is None else pids[found.rank], now
        if is_due := now - self._reported_at >= _REPORT_EVERY_S:
            self._reported_at = now
            self._report(StepTimes({rank: round(1e3 * seconds, 3) for rank, seconds in own_s.items()}))
        if found is None:
            return None
        drained_s = None if self._drained_at is None else now - self._drained_at
        since_s = now - self._slow_since
        plan = plan_straggler(found, options, since_s=since_s, drained_s=drained_s, is_draining=is_draining)
        if plan.action is StragglerAction.DRAIN:
            self._drained_at = now
            return plan
        if is_due:
            self._report(StragglerFound(found.rank, round(1e3 * found.own_s, 3), found.ratio, plan.reason))
        return None

    def _own_s(self, workers: TimedWorkers) -> dict[int, float]:
        inside = workers.inside
        found = {rank: read_progress(self._folder, rank, pid) for rank, pid in workers.pids().items() if rank in inside}
        return {rank: progress.own_s for rank, progress in found.items() if progress is not None}
