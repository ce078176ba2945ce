"""The end of the training loop: the workers of all nodes leave it together, or all fail with one error.

A worker that has completed its last step asks its agent whether it may leave. It may once every rank on every node has
completed its last step. If one rank has, and another one has begun a further step, the latter would wait forever.
The agent that finds this first publishes the reason, and all agents have their workers raise it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from lightning_ckptless.membership.agent.hang_watch import HangWatch
from lightning_ckptless.membership.agent.positions import Positions
from lightning_ckptless.membership.agent.workers import WorkerGroup
from lightning_ckptless.membership.clock import Clock
from lightning_ckptless.protocol.hang_detection import Point, RankProgress
from lightning_ckptless.protocol.messages import TrainingFailed
from lightning_ckptless.protocol.uneven_steps import AtEnd, find_uneven, out_of_data

_RAISE_S = 30.0
"""Time for workers to raise the reason why training cannot continue, once they have received it."""
_KNOW_S = 5.0
"""Time for the other nodes to read the reason, before this node's workers raise it and its store may disappear."""
_SILENT_S = 1.0
"""Time without progress on this node after which it checks whether another node has completed its last step."""
_SHORTEST_PAUSE_S = 0.005
_PAUSE_SHARE = 0.25
"""Pause between two checks of the other nodes, as a share of the time waited for them so far."""


class LoopEnd:
    """One agent's part in the end of the training loop, in one round of the rendezvous.

    Args:
        hangs: knows the progress of the workers.
        positions: positions of all nodes in the round.
        clock: clock of the workers' progress.
    """

    def __init__(self, hangs: HangWatch, positions: Positions, clock: Clock) -> None:
        self._hangs = hangs
        self._positions = positions
        self._clock = clock
        self._waiting_since: float | None = None
        self._looked_at = 0.0
        self._reason = ""
        self._found_at = 0.0
        self._sent_at: float | None = None

    def pause_s(self, longest_s: float) -> float:
        """How long the agent may wait for its workers before it checks the other nodes again, in seconds.

        Args:
            longest_s: pause if there is nothing to check.
        """
        if self._waiting_since is None:
            return longest_s
        waited_s = self._clock.monotonic() - self._waiting_since
        return min(longest_s, max(_SHORTEST_PAUSE_S, _PAUSE_SHARE * waited_s))

    @property
    def is_failing(self) -> bool:
        """Whether training is known to be unable to continue, and workers have time left to raise the reason."""
        if not self._reason:
            return False
        return self._sent_at is None or self._clock.monotonic() - self._sent_at < _RAISE_S

    def maintain(self, workers: WorkerGroup, *, number: int, may_end: Callable[[], bool], has_recovered: bool) -> None:
        """Let workers that have completed their last step leave together, or fail those that never can.

        Args:
            workers: this node's workers.
            number: number of the last regrouping that they were notified of.
            may_end: whether they may leave once all ranks have completed their last step.
            has_recovered: whether the run has recovered from a fault.
        """
        if workers.all_at_end and not self._reason:
            self._let_leave(workers, may_end)
        else:
            self._waiting_since = None
        if workers.at_end and not workers.all_at_end:
            self._look_for_uneven(workers, {}, self._progress(workers), has_recovered=has_recovered)
        elif self._positions.is_shared and self._is_silent(workers):
            ended = self._positions.first_ended(number)
            self._look_for_uneven(workers, ended, self._progress(workers), has_recovered=has_recovered)
            self._adopt(self._positions.settled())
        self._send(workers)

    def explains_hang(self, workers: WorkerGroup, *, has_recovered: bool) -> bool:
        """Whether workers make no progress because one rank ran out of data and another did not.

        Args:
            workers: this node's workers, of which some are considered hung.
            has_recovered: whether the run has recovered from a fault.
        """
        progress = self._progress(workers) | self._hangs.elsewhere
        self._look_for_uneven(workers, out_of_data(progress), progress, has_recovered=has_recovered)
        return self.is_failing

    def _let_leave(self, workers: WorkerGroup, may_end: Callable[[], bool]) -> None:
        number = max(ending.number for ending in workers.at_end.values())
        if not self._positions.have_all_ended(number, self._ended(workers)):
            self._waiting_since = self._clock.monotonic() if self._waiting_since is None else self._waiting_since
            self._adopt(self._positions.settled())
        elif may_end():
            self._waiting_since = None
            workers.allow_leave()
            self._positions.leave(number)

    def _look_for_uneven(
        self,
        workers: WorkerGroup,
        ended: Mapping[int, AtEnd],
        progress: Mapping[int, RankProgress],
        *,
        has_recovered: bool,
    ) -> None:
        if self._reason:
            return
        found = find_uneven({**ended, **self._ended(workers)}, progress, has_recovered=has_recovered)
        if found is not None:
            self._adopt(self._positions.settle(found))

    def _adopt(self, reason: str) -> None:
        if reason and not self._reason:
            self._reason, self._found_at = reason, self._clock.monotonic()

    def _send(self, workers: WorkerGroup) -> None:
        if not self._reason or self._sent_at is not None:
            return
        if self._positions.all_know() or self._clock.monotonic() - self._found_at > _KNOW_S:
            workers.send(TrainingFailed(self._reason))
            self._sent_at = self._clock.monotonic()

    def _is_silent(self, workers: WorkerGroup) -> bool:
        """Whether to check the other nodes: all workers are in the loop, and none makes progress."""
        now = self._clock.monotonic()
        if now - self._looked_at < _SILENT_S:
            return False
        self._looked_at = now
        progress = self._hangs.progress(workers)
        return len(progress) == len(workers.pids()) and all(
            progress.point is not Point.OUTSIDE and now - progress.at > _SILENT_S for progress in progress.values()
        )

    def _progress(self, workers: WorkerGroup) -> dict[int, RankProgress]:
        return self._positions.by_rank(self._hangs.progress(workers))

    def _ended(self, workers: WorkerGroup) -> dict[int, AtEnd]:
        return {self._positions.ranks[local]: ending.at for local, ending in workers.at_end.items()}
