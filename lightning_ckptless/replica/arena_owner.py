"""The process that owns an arena. After it has exited, the arena may be adopted or removed."""

from __future__ import annotations

from dataclasses import dataclass

import psutil

from lightning_ckptless.formats.schema import PID, number, record

_CLOCK_TOLERANCE_S = 2.0
"""The start time of a process is derived from the boot time, which clock adjustments shift slightly."""


@dataclass(frozen=True)
class Owner:
    """A process, identified by its id and start time, since process ids are reused.

    Args:
        pid: process id.
        started_at: wall clock of its start, in seconds since the epoch.
    """

    pid: int
    started_at: float

    @classmethod
    def of(cls, pid: int) -> Owner:
        """The identity of a live process.

        Raises:
            psutil.NoSuchProcess: there is no such process.
        """
        return cls(pid, psutil.Process(pid).create_time())

    @classmethod
    def running(cls, pid: int, started_at: float | None) -> Owner | None:
        """The live process with an id; None if there is none, or if it started at another time.

        Args:
            pid: process id.
            started_at: wall clock of its start, in seconds since the epoch; None if unknown.
        """
        try:
            owner = cls.of(pid) if started_at is None else cls(pid, started_at)
        except psutil.NoSuchProcess:
            return None
        return owner if owner.alive() else None

    def alive(self) -> bool:
        """Whether the process is still running. A zombie counts as dead."""
        try:
            process = psutil.Process(self.pid)
            same = abs(process.create_time() - self.started_at) < _CLOCK_TOLERANCE_S
            return same and process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
        except psutil.NoSuchProcess:
            return False


OWNER = record(Owner, pid=PID, started_at=number())
"""The schema of a stored owner."""
