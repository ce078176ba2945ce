"""The ballot box: how the ranks of a node vote, and send payloads to each other, in memory that they share.

`protocol/ballots.py` has the rules, and `node_memory.py` the memory.

**Ordering.** A ballot is one aligned value of 8 bytes, which Python stores and loads by a copy of constant length: one
instruction on x86-64 and on aarch64, which is atomic. The number of the round and the bits are in the same value, so
the order in which processors see stores to different cells does not matter. A voter overwrites a cell only if the loads
of the round before have returned a certain number: a store that depends on a load is not made before it, on either
architecture. The vote orders nothing else. Payloads have a checksum. What a rank reads of another one's afterwards is
in files, which are ordered by the kernel, or in messages.

**Waiting.** A rank sleeps on the cell that it awaits, and whoever stores a ballot wakes those who sleep on it. The
sleep ends early every `_LOOK_EVERY_S`, to check whether a process that has not voted still runs: under an external
agent, nothing else reveals that. `abort` ends it within milliseconds. A call of `abort` has no effect if it comes after
the sleeper has checked for it but before the kernel has put it to sleep; then the next call or check has. A process is
known from the moment at which it has opened the memory.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from time import monotonic

from lightning_ckptless.errors import TransportError
from lightning_ckptless.protocol.ballots import Voter
from lightning_ckptless.replica.arena_owner import Owner
from lightning_ckptless.replica.node_memory import NodeMemory
from lightning_ckptless.system import futex

_LOOK_EVERY_S = 0.2


class BallotBox:
    """One rank's access to the ballots of its node. After an error, every further vote raises one too.

    Args:
        memory: the memory of the node; closed with this object.
        ranks: the ranks of the node, this one included, in order. The first of them leads.
        rank: this rank.
        is_led: whether the leader announces the outcome, because there are other nodes.
        timeout_s: longest wait for the others, in seconds.
    """

    def __init__(self, memory: NodeMemory, ranks: Sequence[int], rank: int, *, is_led: bool, timeout_s: float) -> None:
        announcement, everyone = len(ranks), range(len(ranks))
        self._rank = rank
        self._timeout_s = timeout_s
        self._look_every_s = min(_LOOK_EVERY_S, timeout_s)
        self._awaited = [announcement] if is_led and rank != ranks[0] else everyone
        self._voter = Voter(ranks.index(rank), self._awaited)
        self._announcer = Voter(announcement, ())
        # The leader votes in the first line and announces in the last one.
        self._ranks = (*ranks, ranks[0])
        self._memory = memory
        self._sleeps_on = 0
        self._is_aborted = False
        memory.introduce(self._voter.line, Owner.of(os.getpid()))

    def collect(self, bits: int, payload: bytes | None = None) -> int:
        """Vote, and wait for the ballots that this rank awaits; returns their bitwise AND.

        Args:
            bits: the vote.
            payload: what those who await this rank can read afterwards.

        Raises:
            TransportError: another rank has exited or does not vote in time, or `abort` was called.
            ArenaError: there is no space for the payload.
        """
        with self._or_abort():
            if payload is not None:
                self._memory.write(self._voter.line, self._voter.round + 1, payload)
            self._store(*self._voter.cast(bits))
            self._await_ballots()
        return self._voter.outcome

    def gather(self, payload: bytes) -> list[bytes]:
        """Send a payload, and wait for those that this rank awaits, in the order of their lines.

        Those of all ranks of the node, or if another rank leads, the one that it announces.

        Raises:
            TransportError: see `collect`.
            ArenaError: there is no space for the payload.
        """
        self.collect(0, payload)
        with self._or_abort():
            return [self._memory.read(line, self._voter.round) for line in self._awaited]

    def announce(self, bits: int, payload: bytes | None = None) -> None:
        """Announce the outcome of all nodes to this one. Called by the leader after it has collected.

        Args:
            bits: the outcome.
            payload: what the others can read afterwards.

        Raises:
            TransportError: `abort` was called.
            ArenaError: there is no space for the payload.
        """
        with self._or_abort():
            if payload is not None:
                self._memory.write(self._announcer.line, self._announcer.round + 1, payload)
            self._store(*self._announcer.cast(bits))

    @contextmanager
    def _or_abort(self) -> Iterator[None]:
        self._require_not_aborted()
        try:
            yield
        except BaseException:
            # The others may have received this vote, so this rank does not know which round they are in.
            self._is_aborted = True
            raise

    def abort(self) -> None:
        """End the wait of `collect` with an error. Callable from any thread, and repeatedly."""
        self._is_aborted = True
        if self._sleeps_on:
            futex.wake(self._sleeps_on)

    def close(self) -> None:
        """Release the memory. A thread that still votes gets an error."""
        self.abort()
        self._memory.close()

    def _store(self, cell: int, contents: int) -> None:
        self._memory.cells[cell] = contents
        futex.wake(self._memory.address(cell))

    def _await_ballots(self) -> None:
        began = looked = monotonic()
        while (cell := self._voter.awaited_cell) is not None:
            contents = self._memory.cells[cell]
            if self._voter.take(contents):
                continue
            self._sleep(cell, contents)
            now = monotonic()
            if now - looked >= self._look_every_s:
                self._look_for_others(now - began)
                looked = now

    def _sleep(self, cell: int, contents: int) -> None:
        self._sleeps_on = self._memory.address(cell)
        self._require_not_aborted()
        futex.wait(self._sleeps_on, contents, self._look_every_s)
        self._require_not_aborted()

    def _look_for_others(self, waited_s: float) -> None:
        # In this order: the vote of a rank that exits afterwards counts.
        processes = {line: self._memory.process(line % (len(self._ranks) - 1)) for line in self._awaited}
        exited = {line: process.pid for line, process in processes.items() if process and not process.alive()}
        missing = self._voter.missing(self._memory.cells)
        for line in missing:
            if line in exited:
                raise self._error(f"rank {self._ranks[line]} (process {exited[line]}) has exited")
        if missing and waited_s > self._timeout_s:
            who = ", ".join(str(self._ranks[line]) for line in missing)
            raise self._error(f"no vote of rank {who} of this node within {self._timeout_s:g} s")

    def _require_not_aborted(self) -> None:
        if self._is_aborted:
            raise self._error("this rank was notified of a regroup, or an earlier vote failed")

    def _error(self, why: str) -> TransportError:
        return TransportError(f"rank {self._rank}: vote with peers failed: {why}")
