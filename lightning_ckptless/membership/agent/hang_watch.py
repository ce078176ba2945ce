"""Detection of hung workers, and of workers that have failed and do not exit."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lightning_ckptless.membership.agent.positions import Positions
from lightning_ckptless.membership.agent.workers import WorkerGroup
from lightning_ckptless.membership.channel.agent_channel import FromWorker
from lightning_ckptless.membership.channel.program_failure import failure_of
from lightning_ckptless.membership.clock import Clock
from lightning_ckptless.membership.events import HangFound, Report
from lightning_ckptless.membership.worker.progress import STACKS_SIGNAL, read_progress, stacks_path
from lightning_ckptless.protocol.hang_detection import (
    Hang,
    Idleness,
    RankProgress,
    RegroupStatus,
    are_silent,
    find_hang,
    find_late,
    should_ask,
)
from lightning_ckptless.protocol.messages import Blocked, QueryBlocked
from lightning_ckptless.system.procfs import stat_fields, used_s

_POLL_EVERY_S = 0.25
_EXCHANGE_EVERY_S = 1.0
_ANSWERS = 4
"""Number of consecutive answers that must agree."""
_STACKS_WAIT_S = 0.5
_STACKS_POLL_S = 0.02
_MOST_STACKS = 8000


class _Answers:
    """The answers of ranks to `QueryBlocked`: whether they wait for other ranks."""

    def __init__(self) -> None:
        self._asked = 0
        self._asked_at = 0.0
        self._given: dict[int, deque[bool]] = {}

    def ask(self, workers: WorkerGroup, now: float) -> None:
        """Ask all workers, unless the last question is too recent."""
        if now - self._asked_at >= _POLL_EVERY_S:
            self._asked, self._asked_at = self._asked + 1, now
            workers.send(QueryBlocked())

    def receive(self, rank: int, *, waits: bool) -> None:
        """Record an answer; ignored if no question was asked."""
        if self._asked:
            self._given.setdefault(rank, deque(maxlen=_ANSWERS)).append(waits)

    def waits(self, rank: int) -> bool | None:
        """Whether a rank waits for others, by its last answers. A rank that cannot answer does not."""
        answers = self._given.get(rank, deque())
        if len(answers) < _ANSWERS:
            return False if not answers and self._asked > 2 * _ANSWERS else None
        return answers[0] if len(set(answers)) == 1 else None

    def forget(self) -> None:
        """Drop all answers."""
        self._asked = 0
        self._given.clear()


class HangWatch:
    """Watches the progress of one node's workers, and of the other nodes' workers while none makes progress.

    Args:
        folder: folder in which workers write their progress.
        report: receives events.
        clock: clock of the workers' progress.

    Attributes:
        limit_s: silence in seconds after which ranks count as hung; None to learn it, 0 to disable.
        elsewhere: positions of the ranks of the other nodes, by rank, while no rank of any node makes progress.
    """

    def __init__(self, folder: Path, report: Report, clock: Clock) -> None:
        self.limit_s: float | None = None
        self.elsewhere: dict[int, RankProgress] = {}
        self._positions: Positions | None = None
        self._exchanged_at = 0.0
        self._folder = folder
        self._report = report
        self._clock = clock
        self._looked_at = 0.0
        self._in_step = _Answers()
        self._idle: dict[int, Idleness] = {}
        self._in_regroup = _Answers()
        self._stopped: dict[int, float] = {}

    def begin_round(self, positions: Positions) -> None:
        """Begin a round of the rendezvous.

        Args:
            positions: positions of all nodes in the round.
        """
        self._positions, self.elsewhere = positions, {}

    def poll(self, workers: WorkerGroup) -> Hang | None:
        """Check for hangs if a check is due; returns the ranks that hang."""
        now = self._clock.monotonic()
        if now - self._looked_at < _POLL_EVERY_S:
            return None
        self._looked_at = now
        pids = workers.pids()
        known = self.progress(workers)
        if len(known) < len(pids) or any(workers.hang_reason(rank) for rank in pids):
            self._note_progress()
            return None
        if are_silent(known, now=now, override_s=self.limit_s):
            return self._look_everywhere(self._ask(known, workers, now), now)
        self._note_progress()
        return find_hang(known, now=now, override_s=self.limit_s)

    def _note_progress(self) -> None:
        self._idle.clear()
        self._in_step.forget()
        self.elsewhere = {}
        if self._positions is not None:
            self._positions.withdraw()

    def _look_everywhere(self, silent: dict[int, RankProgress], now: float) -> Hang | None:
        """Find hung ranks of this node that only the progress of the other nodes reveals."""
        positions = self._positions
        if positions is None or not positions.is_shared:
            return find_hang(silent, now=now, override_s=self.limit_s)
        if now - self._exchanged_at >= _EXCHANGE_EVERY_S:
            self._exchanged_at, self.elsewhere = now, positions.exchange(silent, now)
        everyone = positions.by_rank(silent) | self.elsewhere
        found = find_hang(everyone, now=now, override_s=self.limit_s, is_whole=bool(self.elsewhere))
        own = () if found is None else tuple(rank for rank in silent if positions.ranks[rank] in found.ranks)
        return None if found is None or not own else replace(found, ranks=own)

    def _ask(self, silent: dict[int, RankProgress], workers: WorkerGroup, now: float) -> dict[int, RankProgress]:
        """Add to the progress of silent ranks whether each waits for others, and how long it has been idle."""
        for rank, pid in workers.pids().items():
            used = used_s(pid)
            self._idle[rank] = self._idle.get(rank, Idleness(used, now)).after(used, now)
        found = {
            rank: replace(rank_progress, idle_s=now - self._idle[rank].since) for rank, rank_progress in silent.items()
        }
        everyone = found if self._positions is None else self._positions.by_rank(found) | self.elsewhere
        if not should_ask(everyone, override_s=self.limit_s):
            return found
        self._in_step.ask(workers, now)
        return {rank: replace(rank_progress, waits=self._in_step.waits(rank)) for rank, rank_progress in found.items()}

    def poll_regroup(self, status: RegroupStatus, workers: WorkerGroup) -> Hang | None:
        """Find ranks that hold up a regroup; once they are late, they are asked what they do."""
        now = self._clock.monotonic()
        stopped = self._note_stopped(workers if status.is_under_way else None, now)
        if not status.is_late(now, self.limit_s):
            self._in_regroup.forget()
            return find_late(status, now=now, override_s=self.limit_s, stopped=stopped)
        self._in_regroup.ask(workers, now)
        waits = {rank: self._in_regroup.waits(rank) for rank in status.ready}
        return find_late(status, now=now, override_s=self.limit_s, stopped=stopped, waits=waits)

    def _note_stopped(self, workers: WorkerGroup | None, now: float) -> dict[int, float]:
        """Return since when each rank has been seen stopped by a signal.

        Args:
            workers: this node's workers; None if no regroup is under way.
            now: time on the clock of the progress.
        """
        fields = {} if workers is None else {rank: stat_fields(pid) for rank, pid in workers.pids().items()}
        stopped = [rank for rank, found in fields.items() if found is not None and found[0] == "T"]
        self._stopped = {rank: self._stopped.get(rank, now) for rank in stopped}
        return self._stopped

    def progress(self, workers: WorkerGroup) -> dict[int, RankProgress]:
        """Return the progress of workers in the training loop, by local rank, as far as it is known."""
        found = {rank: read_progress(self._folder, rank, pid) for rank, pid in workers.pids().items()}
        return {
            rank: rank_progress
            for rank, rank_progress in found.items()
            if rank_progress is not None and rank in workers.inside
        }

    def receive(self, received: Sequence[FromWorker]) -> None:
        """Process the answers of workers."""
        for rank, message, _ in received:
            if isinstance(message, Blocked):
                for answers in (self._in_step, self._in_regroup):
                    answers.receive(rank, waits=message.waits)

    def kill(self, hang: Hang, workers: WorkerGroup) -> None:
        """Record the stacks of hung workers and kill them; their exits are detected like any other."""
        stacks = {rank: self._stacks(rank, workers) for rank in hang.ranks}
        self._report(HangFound(list(hang.ranks), hang.reason, stacks))
        workers.kill_hung(hang.ranks, hang.reason, since=self._clock.wall() - hang.silent_s)

    def _stacks(self, rank: int, workers: WorkerGroup) -> str:
        path = stacks_path(self._folder, rank)
        workers.signal_one(rank, STACKS_SIGNAL)
        deadline = time.monotonic() + _STACKS_WAIT_S
        while time.monotonic() < deadline:
            if path.exists() and (text := path.read_text()).count("most recent call first"):
                return text[:_MOST_STACKS]
            time.sleep(_STACKS_POLL_S)
        return "the worker did not write its stacks"


class LateExits:
    """Kills workers whose script has failed and that do not exit.

    Args:
        folder: folder in which failures are reported.
        grace_s: time in seconds between the report of a failure and the exit of the process.
        clock: this node's clock.
    """

    def __init__(self, folder: Path, grace_s: float, clock: Clock) -> None:
        self._folder = folder
        self._grace_s = grace_s
        self._clock = clock
        self._since: dict[int, float] = {}

    def poll(self, workers: WorkerGroup) -> None:
        """Kill workers whose grace period is over.

        Args:
            workers: this node's workers.
        """
        now = self._clock.monotonic()
        failed = {int(path.stem.removeprefix("failure-")) for path in self._folder.glob("failure-*.json")}
        self._since = {pid: self._since.get(pid, now) for pid in failed}
        for rank, pid in workers.pids().items():
            waited_s = now - self._since.get(pid, now)
            if rank in workers.running_ranks and waited_s >= self._grace_s and not workers.hang_reason(rank):
                failure = failure_of(self._folder, pid)
                error = "" if failure is None else failure.error
                reason = f"{error} was reported {waited_s:.0f} s ago, but the process has not exited"
                workers.kill_hung([rank], reason, self._clock.wall())
