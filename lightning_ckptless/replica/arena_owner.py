"""The process that an arena belongs to: when it has ended, the arena may be taken over or removed."""

from __future__ import annotations

from dataclasses import dataclass

import psutil

from lightning_ckptless.formats.schema import integer, number, record

_CLOCK_TOLERANCE_S = 2.0
"""The start time of a process is derived from the boot time, which a clock adjustment moves a little."""


@dataclass(frozen=True)
class Owner:
    """A process, told apart from a later one with the same number by the time of its start.

    Args:
        pid: process id.
        started_at: wall clock of its start, in seconds since the epoch.
    """

    pid: int
    started_at: float

    @classmethod
    def of(cls, pid: int) -> Owner:
        """The owner that a live process is.

        Raises:
            psutil.NoSuchProcess: there is no such process.
        """
        return cls(pid, psutil.Process(pid).create_time())

    @classmethod
    def running(cls, pid: int, started_at: float | None) -> Owner | None:
        """The live process with a number; None where there is none, or it has started at another time.

        Args:
            pid: process id.
            started_at: when it started; None where that is not known.
        """
        try:
            owner = cls.of(pid) if started_at is None else cls(pid, started_at)
        except psutil.NoSuchProcess:
            return None
        return owner if owner.alive() else None

    def alive(self) -> bool:
        """Whether the process still runs. One that has ended and was not waited for counts as dead."""
        try:
            process = psutil.Process(self.pid)
            same = abs(process.create_time() - self.started_at) < _CLOCK_TOLERANCE_S
            return same and process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
        except psutil.NoSuchProcess:
            return False


HIGHEST_PID = 1 << 22
"""The kernel gives no higher number to a process."""
OWNER = record(Owner, pid=integer(1, HIGHEST_PID), started_at=number())
"""The schema of an owner that is written down."""
