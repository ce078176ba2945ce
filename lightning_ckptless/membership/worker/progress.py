"""The progress of a worker: a few bytes of shared memory that it writes at every step and that its agent reads.

Writing costs a microsecond and no system call. The agent can read it without disturbing the worker, and even after the
worker has stopped responding.
"""

from __future__ import annotations

import faulthandler
import mmap
import os
import signal
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from lightning_ckptless import environment
from lightning_ckptless.protocol.hang_detection import Point, RankProgress
from lightning_ckptless.system.procfs import stat_fields

STACKS_SIGNAL = signal.SIGRTMIN + 4
"""Makes a worker write the stack of each of its threads to a file."""

_FORMAT = struct.Struct("=qqqdddqqqqq")
_SMOOTHING = 0.1
_PREFIX = "progress-"


@dataclass(frozen=True, slots=True)
class _Record:
    """The content of a progress file, in the order in which it is written; see `RankProgress`."""

    step: int
    point: int
    count: int
    at: float
    longest_pause_s: float
    own_s: float
    epoch: int
    out_of_data: int
    begun: int
    pid: int
    rank: int

    @classmethod
    def read(cls, path: Path) -> _Record | None:
        """Read a file; None if nothing has been written yet."""
        try:
            data = path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        # A new file is all zero.
        return cls(*_FORMAT.unpack(data)) if len(data) == _FORMAT.size and any(data) else None


@dataclass(frozen=True, slots=True)
class WorkerProgress:
    """The progress of a worker, as written by itself.

    Args:
        rank: its rank.
        local_rank: its rank on its node.
        pid: its process id.
        is_running: whether the process exists; a zombie counts as gone.
        progress: where it is, or was at its end.
    """

    rank: int
    local_rank: int
    pid: int
    is_running: bool
    progress: RankProgress


class ProgressWriter:
    """Writes one worker's progress.

    Args:
        path: path of the file that its agent reads.
        clock: seconds of a clock that all ranks of the node share.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        with path.open("wb+") as file:
            file.truncate(_FORMAT.size)
            self._memory = mmap.mmap(file.fileno(), _FORMAT.size)
        self._place = (-1, Point.OUTSIDE)
        self._begun = -1
        self._count = 0
        self._last_at = 0.0
        self._longest_pause_s = 0.0
        self._own_s = 0.0
        self._began_at = 0.0
        self._stacks: IO[str] | None = None
        self._first_step = -1
        self._epoch = -1
        self._out_of_data = False
        self._pid = os.getpid()
        self._rank = int(os.environ.get("RANK", "-1"))

    @classmethod
    def from_environment(cls) -> ProgressWriter | None:
        """Return the writer of the progress that this worker's agent reads; None if the agent is not ours."""
        folder = os.environ.get(environment.AGENT_DIR)
        return cls(progress_path(Path(folder), int(os.environ["LOCAL_RANK"]))) if folder else None

    def dump_stacks_into(self, path: Path) -> None:
        """Write all stacks to a file when the agent asks for them."""
        self._stacks = path.open("w")
        faulthandler.register(STACKS_SIGNAL, file=self._stacks, all_threads=True)

    def beat(
        self, step: int, point: Point, epoch: int = -1, *, out_of_data: bool = False, rank: int | None = None
    ) -> None:
        """Record this rank's position; the arguments are those of `RankProgress`.

        Args:
            step: see there.
            point: see there.
            epoch: see there.
            out_of_data: see there.
            rank: this rank, which a world change may change; None for the one of the last call.
        """
        self._rank = self._rank if rank is None else rank
        self._epoch, self._out_of_data = epoch, out_of_data
        self.advance(step, point)

    def advance(self, step: int, point: Point) -> None:
        """Record this rank's position; everything else is as in the last call of `beat`.

        Args:
            step: see `RankProgress`.
            point: see there.
        """
        now = self._clock()
        self._begun = step
        if (step, point) == self._place:
            self._count += 1
        else:
            self._place, self._count = (step, point), 0
        if self._first_step < 0:
            self._first_step = step
        if step > self._first_step + 1 and self._last_at:
            self._longest_pause_s = max(self._longest_pause_s, now - self._last_at)
        if point is Point.BATCH:
            self._began_at = now
        elif point is Point.BACKWARD and self._began_at and step > self._first_step:
            # From the batch to the first collective: this rank's own work. The first step of a process is not
            # representative.
            took_s = now - self._began_at
            self._own_s = took_s if not self._own_s else self._own_s + _SMOOTHING * (took_s - self._own_s)
        self._last_at = now
        self._write(now)

    def outside(self) -> None:
        """Record that this rank is in no step, so that no progress is expected of it."""
        self._begun = -1
        self.interrupt()

    def interrupt(self) -> None:
        """Record that a fault has ended the step: the time until this rank's next step is no pause of training.

        It contains the silence before the fault was detected. If it counted, it would extend the limit for the next
        hang.
        """
        self._place, self._count, self._last_at, self._began_at = (-1, Point.OUTSIDE), 0, 0.0, 0.0
        self._write(self._clock())

    def restore(self) -> None:
        """Record that this rank has joined the other ranks, or made progress in restoring a version with them."""
        place = (0, Point.RESTORE)
        self._place, self._count = place, self._count + 1 if self._place == place else 0
        self._write(self._clock())

    def _write(self, now: float) -> None:
        # `pack_into` zeroes the memory first, so for a moment the agent would read a time of 0, i.e. that of the boot.
        self._memory[:] = _FORMAT.pack(
            *self._place,
            self._count,
            now,
            self._longest_pause_s,
            self._own_s,
            self._epoch,
            self._out_of_data,
            self._begun,
            self._pid,
            self._rank,
        )

    def close(self) -> None:
        """Release the memory and the signal."""
        self._memory.close()
        if self._stacks is not None:
            faulthandler.unregister(STACKS_SIGNAL)
            self._stacks.close()


def progress_path(folder: Path, local_rank: int) -> Path:
    """File of a worker's progress, in the folder of its agent."""
    return folder / f"{_PREFIX}{local_rank}"


def stacks_path(folder: Path, local_rank: int) -> Path:
    """File of a worker's stacks, in the folder of its agent."""
    return folder / f"stacks-{local_rank}.txt"


def step_begun(folder: Path, local_rank: int) -> int | None:
    """Return the last step that a worker has begun, whether or not it still runs; None if there was none.

    Args:
        folder: its agent's folder.
        local_rank: local rank of the worker.
    """
    record = _Record.read(progress_path(folder, local_rank))
    # Steps are counted from 1.
    return record.begun if record is not None and record.begun > 0 else None


def read_progress(folder: Path, local_rank: int, pid: int) -> RankProgress | None:
    """Return the progress of a worker; None if it has written none.

    Args:
        folder: its agent's folder.
        local_rank: local rank of the worker.
        pid: its process id.
    """
    record, fields = _Record.read(progress_path(folder, local_rank)), stat_fields(pid)
    return None if record is None or fields is None else _progress(record, fields[0])


def read_workers(folder: Path) -> tuple[WorkerProgress, ...]:
    """Return the progress of all workers that have written any, whether or not they still run.

    Args:
        folder: their agent's folder.
    """
    found = []
    for path in folder.glob(f"{_PREFIX}*"):
        if (record := _Record.read(path)) is not None:
            fields = stat_fields(record.pid)
            state = "X" if fields is None else fields[0]
            local_rank = int(path.name.removeprefix(_PREFIX))
            progress = _progress(record, state)
            found.append(WorkerProgress(record.rank, local_rank, record.pid, state not in "XZ", progress))
    return tuple(sorted(found, key=lambda worker: worker.local_rank))


def _progress(record: _Record, state: str) -> RankProgress:
    return RankProgress(
        record.step,
        Point(record.point),
        record.count,
        record.at,
        record.longest_pause_s,
        record.own_s,
        stopped=state == "T",
        traced=state == "t",
        epoch=record.epoch,
        out_of_data=bool(record.out_of_data),
    )
