"""Follow a job by the notes of its processes."""

from __future__ import annotations

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
        reports: reports on rounds of the mirror.
        turn: the note with which it waits for its turn.
    """

    rank: int = -1
    moments: dict[str, float] = field(default_factory=dict)
    steps: dict[int, float] = field(default_factory=dict)
    first_step: int = 0
    last_step: int = 0
    committed: int = 0
    fingerprints: dict[int, int] = field(default_factory=dict)
    reports: list[dict[str, Any]] = field(default_factory=list)
    turn: Note | None = None

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
        elif note.moment == "rounds":
            self.reports.append(note.fields)
        elif note.moment == "ready":
            self.turn = note


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
        """Follow the job for a number of seconds, or until it ends."""
        deadline = time.monotonic() + seconds
        while (left_s := deadline - time.monotonic()) > 0 and self.command.running:
            if (note := self.inbox.next(min(left_s, _LOOK_S))) is not None:
                self.take(note)

    def until_begun(self, timeout_s: float = START_S) -> list[Life]:
        """Follow the job until all ranks have finished a step."""
        return self.until(lambda lives: min(life.first_step for life in lives) > 0, timeout_s, "a first step")

    def until_end(self, timeout_s: float = START_S) -> None:
        """Follow the job until it has ended.

        Raises:
            NoRecoveryError: If it fails, or does not report for so long.
        """
        deadline = time.monotonic() + timeout_s
        while self.command.running and time.monotonic() < deadline:
            if (note := self.inbox.next(_LOOK_S)) is not None:
                self.take(note)
                deadline = time.monotonic() + timeout_s
        while (note := self.inbox.next(0.0)) is not None:
            self.take(note)
        if exit_code := self.command.wait(_LOOK_S):
            raise NoRecoveryError(f"the job ended with exit code {exit_code}:\n{self.command.output_tail()}")
