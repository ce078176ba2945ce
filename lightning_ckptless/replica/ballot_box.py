"""The ballot box: memory that the ranks of a node share to vote (`protocol/ballots.py`), and how a rank waits for it.

The memory is a file in the arena's folder. The lowest rank of the node creates it under a name that is never used
again, sends the name to the others, and removes the file when all have mapped it. So a process of another generation
cannot open it. If the rank is killed in between, the file is removed with the arena.

**Ordering.** A ballot is one aligned value of 8 bytes, which Python stores and loads by a copy of constant length: one
instruction on x86-64 and on aarch64, which is atomic. The number of the round and the bits are in the same value, so
the order in which processors see stores to different cells does not matter. A voter overwrites a cell only if the loads
of the round before have returned a certain number: a store that depends on a load is not made before it, on either
architecture. The vote orders nothing else. What a rank reads of another one's afterwards is in files, which are ordered
by the kernel, or in messages.

**Waiting.** A rank sleeps on the cell that it awaits, and whoever stores a ballot wakes those who sleep on it. The
sleep ends early every `_LOOK_EVERY_S`, to check whether a process that has not voted still runs: under a foreign agent,
nothing else reveals that. `abort` ends it within milliseconds. A call of `abort` has no effect if it comes after the
sleeper has checked for it but before the kernel has put it to sleep; then the next call or check has.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

from lightning_ckptless.errors import ArenaError, TransportError
from lightning_ckptless.formats.schema import text
from lightning_ckptless.protocol.ballots import CELLS_PER_LINE, Voter
from lightning_ckptless.replica.arena_owner import Owner
from lightning_ckptless.replica.arena_space import MAKE_ROOM
from lightning_ckptless.system import futex

BALLOTS_NAME = text(r"votes-[0-9a-f]{32}")
"""The schema of the name of a file."""
_CELL_BYTES = 8
_LOOK_EVERY_S = 0.2


@dataclass(frozen=True)
class Mate:
    """A rank of the node.

    Args:
        rank: its rank.
        process: its process.
    """

    rank: int
    process: Owner


class BallotBox:
    """One rank's access to the ballots of its node. After an error, every further vote raises one too.

    Args:
        memory: the mapped file; closed with this object.
        mates: the ranks of the node, this one included, in order. The first of them leads.
        rank: this rank.
        is_led: whether the leader announces the outcome, because there are other nodes.
        timeout_s: longest wait for the others, in seconds.
    """

    def __init__(self, memory: mmap.mmap, mates: Sequence[Mate], rank: int, *, is_led: bool, timeout_s: float) -> None:
        ranks = [mate.rank for mate in mates]
        announcement, everyone = len(mates), range(len(mates))
        self._rank = rank
        self._timeout_s = timeout_s
        self._look_every_s = min(_LOOK_EVERY_S, timeout_s)
        self._voter = Voter(ranks.index(rank), [announcement] if is_led and rank != ranks[0] else everyone)
        self._announcer = Voter(announcement, ())
        self._mates = (*mates, mates[0])
        self._memory = memory
        self._cells = memoryview(memory).cast("Q")
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        self._sleeps_on = 0
        self._is_aborted = False

    def collect(self, bits: int) -> int:
        """Vote, and wait for the ballots that this rank awaits; returns their bitwise AND.

        Raises:
            TransportError: another rank has exited or does not vote in time, or `abort` was called.
        """
        self._require_not_aborted()
        try:
            self._store(*self._voter.cast(bits))
            self._await_ballots()
        except BaseException:
            # The others may have received this vote, so this rank does not know which round they are in.
            self._is_aborted = True
            raise
        return self._voter.outcome

    def announce(self, bits: int) -> None:
        """Announce the outcome of all nodes to this one. Called by the leader after it has collected.

        Raises:
            TransportError: `abort` was called.
        """
        self._require_not_aborted()
        self._store(*self._announcer.cast(bits))

    def abort(self) -> None:
        """End the wait of `collect` with an error. Callable from any thread, and repeatedly."""
        self._is_aborted = True
        if self._sleeps_on:
            futex.wake(self._sleeps_on)

    def close(self) -> None:
        """Release the memory. A thread that still votes gets an error."""
        self.abort()
        self._cells.release()
        self._memory.close()

    def _store(self, cell: int, contents: int) -> None:
        self._cells[cell] = contents
        futex.wake(self._address + cell * _CELL_BYTES)

    def _await_ballots(self) -> None:
        began = looked = monotonic()
        while (cell := self._voter.awaited_cell) is not None:
            contents = self._cells[cell]
            if self._voter.take(contents):
                continue
            self._sleep(cell, contents)
            now = monotonic()
            if now - looked >= self._look_every_s:
                self._look_for_others(now - began)
                looked = now

    def _sleep(self, cell: int, contents: int) -> None:
        self._sleeps_on = self._address + cell * _CELL_BYTES
        self._require_not_aborted()
        futex.wait(self._sleeps_on, contents, self._look_every_s)
        self._require_not_aborted()

    def _look_for_others(self, waited_s: float) -> None:
        # In this order: the vote of a rank that exits afterwards counts.
        exited = {mate.rank for mate in self._mates if not mate.process.alive()}
        missing = [self._mates[line] for line in self._voter.missing(self._cells)]
        if lost := [mate for mate in missing if mate.rank in exited]:
            raise self._error(f"rank {lost[0].rank} (process {lost[0].process.pid}) has exited")
        if missing and waited_s > self._timeout_s:
            who = ", ".join(str(mate.rank) for mate in missing)
            raise self._error(f"no vote of rank {who} of this node within {self._timeout_s:g} s")

    def _require_not_aborted(self) -> None:
        if self._is_aborted:
            raise self._error("this rank was notified of a regroup, or an earlier vote failed")

    def _error(self, why: str) -> TransportError:
        return TransportError(f"rank {self._rank}: vote with peers failed: {why}")


def make_ballots(folder: Path, voters: int) -> Path:
    """Create the file for the ballots of a node, and of the announcement.

    Args:
        folder: folder of the arena.
        voters: number of ranks of the node.

    Raises:
        ArenaError: the file cannot be created.
    """
    path = folder / f"votes-{uuid.uuid4().hex}"
    try:
        with open(path, "xb", opener=_private) as file:
            # Written rather than left sparse: a full file system raises an error now instead of a signal later.
            file.write(bytes((voters + 1) * CELLS_PER_LINE * _CELL_BYTES))
    except OSError as error:
        raise ArenaError(f"{path}: cannot create the memory for votes: {error}: {MAKE_ROOM}") from error
    return path


def map_ballots(path: Path) -> mmap.mmap:
    """Map the file for the ballots of a node.

    Raises:
        OSError: it no longer exists, because the rank that created it has exited or failed.
    """
    with open(path, "r+b", opener=_private) as file:
        return mmap.mmap(file.fileno(), 0)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
