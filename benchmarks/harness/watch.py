"""Follow a job by the notes of its processes, kill one of its ranks, and measure the recovery from outside."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median
from typing import Any

from benchmarks.harness.processes import Command
from benchmarks.harness.wire import Inbox, Note

START_S = 180.0
_LOOK_S = 1.0
_LAST_STEPS = 10
_WITNESSES = 6
"""Steps after a recovery whose fingerprints are compared."""


class NoRecoveryError(RuntimeError):
    """An awaited event did not occur in time, or the job has ended; `victim` is the rank that had been killed."""

    def __init__(self, message: str, victim: int | None = None) -> None:
        super().__init__(message)
        self.victim = victim


@dataclass
class Life:
    """What one process of a job has reported.

    Args:
        rank: rank of the process; -1 until it has one.
        moments: wall clock of the first occurrence of each moment.
        steps: wall clock at which each step was last finished.
        first_step: first step that it finished; 0 for none.
        last_step: last step that it finished.
        committed: newest step that it has seen committed on all ranks.
        fingerprints: fingerprint of model and optimizer after the last execution of each step.
    """

    rank: int = -1
    moments: dict[str, float] = field(default_factory=dict)
    steps: dict[int, float] = field(default_factory=dict)
    first_step: int = 0
    last_step: int = 0
    committed: int = 0
    fingerprints: dict[int, int] = field(default_factory=dict)

    @property
    def step_s(self) -> float:
        """Usual step time in seconds, from the last steps."""
        times = sorted(self.steps.values())[-_LAST_STEPS:]
        return median(after - before for before, after in pairwise(times)) if len(times) > 1 else 0.0

    def take(self, note: Note) -> None:
        self.moments.setdefault(note.moment, note.at)
        if note.moment == "step":
            self.last_step = note.fields["step"]
            self.steps[self.last_step] = note.at
            self.fingerprints[self.last_step] = note.fields.get("fingerprint", 0)
            self.first_step = self.first_step or self.last_step
        elif note.moment == "committed":
            self.committed = max(self.committed, note.fields["step"])


@dataclass
class Watch:
    """Follow a job.

    Args:
        inbox: receives the notes.
        command: the job.
        ranks: number of ranks.

    Attributes:
        lives: reports of all processes so far, by process id.
        pids: newest process of each rank.
    """

    inbox: Inbox
    command: Command
    ranks: int
    lives: dict[int, Life] = field(default_factory=dict)
    pids: dict[int, int] = field(default_factory=dict)

    def take(self, note: Note) -> None:
        life = self.lives.setdefault(note.pid, Life())
        life.take(note)
        if note.rank != life.rank:
            life.rank = note.rank
            self.pids[note.rank] = note.pid

    def now(self) -> list[Life]:
        """Return the newest process of each rank that has started."""
        return [self.lives[self.pids[rank]] for rank in range(self.ranks) if rank in self.pids]

    def until(self, reached: Callable[[list[Life]], bool], timeout_s: float, awaited: str) -> list[Life]:
        """Follow the job until all ranks have started and `reached` returns True.

        Raises:
            NoRecoveryError: If that does not happen in time, or the job has ended.
        """
        deadline = time.monotonic() + timeout_s
        while len(lives := self.now()) < self.ranks or not reached(lives):
            note = self.inbox.next(_LOOK_S)
            if note is not None:
                self.take(note)
            elif not self.command.running:
                missed = f"the job ended before this was reached: {awaited}"
                raise NoRecoveryError(f"{missed}:\n{self.command.output_tail()}")
            if time.monotonic() > deadline:
                raise NoRecoveryError(f"{awaited} not reached within {timeout_s} s:\n{self.command.output_tail()}")
        return lives

    def until_step(self, step: int, timeout_s: float) -> list[Life]:
        """Follow the job until all ranks have finished a step."""
        return self.until(lambda lives: min(life.last_step for life in lives) >= step, timeout_s, f"step {step}")

    def follow(self, seconds: float) -> None:
        """Follow the job for a number of seconds."""
        deadline = time.monotonic() + seconds
        while (note := self.inbox.next(max(0.0, deadline - time.monotonic()))) is not None:
            self.take(note)


def kill_one(
    watch: Watch, chance: random.Random, *, every_n_steps: int, within_s: float, timeout_s: float
) -> dict[str, Any]:
    """Kill a random rank after a random number of steps, at a random moment of the step.

    Args:
        watch: a job that trains until it is ended.
        chance: random generator.
        every_n_steps: the kill comes after at least this many steps and fewer than twice as many, all equally likely.
            If a checkpoint file is written equally often, the kill is equally likely at any distance from the last one.
        within_s: approximate length of a step, in seconds.
        timeout_s: longest wait for the recovery, in seconds.

    Returns:
        Seconds from the kill to the first step finished by all, replayed steps, lost committed steps, how often the
        workers were started, the fingerprints of the steps after the recovery, and the moments of the new processes in
        seconds since the kill.

    Raises:
        NoRecoveryError: If the job does not recover in time, or fails soon afterwards.
    """
    watch.until(lambda lives: min(life.first_step for life in lives) > 0, START_S, "a first step")
    # Count from the last recovery: the newest process began with its first step.
    steps = max(life.first_step for life in watch.now()) - 1 + every_n_steps + chance.randrange(every_n_steps)
    watch.until_step(steps, START_S)
    watch.follow(chance.random() * within_s)
    victim, old, dying, known = chance.randrange(watch.ranks), dict(watch.pids), watch.now(), set(watch.lives)
    last, committed = max(life.last_step for life in dying), max(life.committed for life in dying)
    step_s = dying[victim].step_s
    killed_at = time.time()
    os.kill(watch.pids[victim], signal.SIGKILL)

    def recovered(lives: list[Life]) -> bool:
        # The replacement's first step has been finished by all ranks since the kill.
        first = lives[victim].first_step
        again = watch.pids[victim] != old[victim] and first > 0
        return again and all(life.steps.get(first, 0.0) > killed_at for life in lives)

    try:
        lives = watch.until(recovered, timeout_s, f"a step by all ranks after the loss of rank {victim}")
        first = lives[victim].first_step
        ended_at = max(life.steps[first] for life in lives)
        fingerprints = _fingerprints(watch, range(first, first + _WITNESSES), timeout_s)
    except NoRecoveryError as error:
        raise NoRecoveryError(str(error), victim) from error
    restored, new = first - 1, [watch.lives[pid] for rank, pid in watch.pids.items() if pid != old.get(rank)]
    starts = sum(pid not in known and life.rank >= 0 for pid, life in watch.lives.items())
    return {
        "victim": victim,
        "killed_at": killed_at,
        "seconds": ended_at - killed_at,
        "step_before": last,
        "committed_before": committed,
        "restored_step": restored,
        "repeated_steps": last - restored,
        "lost_committed_steps": max(0, committed - restored),
        "starts": max(starts, len(new)) / watch.ranks,
        "step_s": step_s,
        "fingerprints": fingerprints,
        "ranks": [{name: at - killed_at for name, at in life.moments.items()} for life in lives if life in new],
    }


def _fingerprints(watch: Watch, steps: range, timeout_s: float) -> dict[int, list[int]]:
    """Follow the job through these steps, and return the fingerprints of its ranks after each."""
    lives = watch.until_step(steps[-1], timeout_s)
    return {step: sorted({life.fingerprints[step] for life in lives}) for step in steps}
