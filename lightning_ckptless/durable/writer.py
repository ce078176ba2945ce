"""The durable writer: a process beside the workers that writes what their arena holds to storage, now and then.

It asks nothing of training, which does not know of it: it reads the arena, and whatever goes wrong here is one line in
the ledger. Asked to end (SIGTERM), or when the run has finished, it writes the last version and goes.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from lightning_ckptless.durable.capture import Captured, Room, capture, newest_committed
from lightning_ckptless.durable.folder import DurableFolder, Manifest, ShardFacts, write_manifest
from lightning_ckptless.durable.order import WriterOrder, read_share
from lightning_ckptless.durable.shared import SharedWriter
from lightning_ckptless.durable.store import require_space, state_bytes, write_state
from lightning_ckptless.errors import ArenaError, CkptlessError, DurableError
from lightning_ckptless.ledger import Ledger
from lightning_ckptless.protocol.durable_schedule import Share, states_to_drop
from lightning_ckptless.protocol.versions import Complete, Version
from lightning_ckptless.replica.arena import Arena

LOOK_EVERY_S = 0.05
LONGEST_PAUSE_S = 1.0
SHARE = 0.02
"""Of one core, at most, that is spent on looking whether a state is due."""
_FINISHED = "finished"


class DurableWriter:
    """Writes the durable states of one arena.

    Args:
        order: what to write where.
    """

    def __init__(self, order: WriterOrder) -> None:
        self._order = order
        self._folder = DurableFolder(Path(order.folder))
        self._ledger = Ledger(order.ledger)
        self._room = Room()
        self._arena: Arena | None = None
        self._last: Version | None = None
        self._last_at = time.monotonic()
        self._written: Version | None = None
        self._warned = False
        self._shared = SharedWriter(order, self._failed)

    def look(self, *, is_last: bool = False) -> None:
        """Write a state if one is due.

        Args:
            is_last: nothing follows: the newest version is due unless it is written already.
        """
        share = self._share()
        if share is not None and not share.is_whole:
            if share.shards and self._arena is not None:
                self._shared.look(self._arena, share, is_last=is_last)
            return
        if not is_last and not self._may_be_due():
            return
        newest = self._newest()
        if newest is None:
            return
        if self._last is None or newest < self._last:
            self._last = self._start_of(newest)
        since_s = time.monotonic() - self._last_at
        if is_last:
            due = self._written is None or newest > self._written
        else:
            due = self._order.timetable.is_due(newest, self._last, since_s=since_s)
        if due:
            self._last, self._last_at = newest, time.monotonic()
            self._try_to_write(newest)

    def _share(self) -> Share | None:
        """What this node has to do, as its workers have noted it; None where they have not."""
        try:
            self._arena = self._arena or Arena.attach(Path(self._order.arena))
            return read_share(self._arena.notes())
        except (ArenaError, FileNotFoundError):
            return None

    def _may_be_due(self) -> bool:
        """Whether it is worth looking into the arena: by time alone nothing is due before."""
        order = self._order
        return order.every_n_steps is not None or time.monotonic() - self._last_at >= (order.every_s or 0.0)

    def _newest(self) -> Version | None:
        try:
            self._arena = self._arena or Arena.attach(Path(self._order.arena))
            found = newest_committed([self._arena])
        except (ArenaError, FileNotFoundError):
            return None
        return found.snapshot.version if isinstance(found, Complete) else None

    def _start_of(self, newest: Version) -> Version:
        """The version from which the interval counts: the state that the run has gone on from, or its beginning.

        Asked for at first, and again where the run has gone back behind what was written.
        """
        assert self._arena is not None
        self._written = max((version for version in self._folder.versions() if version <= newest), default=None)
        if self._written is not None:
            return self._written
        # Which step of which file nobody has told: the first version that is seen will do.
        return newest if self._arena.origin is not None else Version(0, True)

    def _try_to_write(self, due: Version) -> None:
        began = time.monotonic()
        try:
            written = self._write()
        except (CkptlessError, OSError, RuntimeError) as error:
            self._failed(due, error)
            return
        self._written = written.version
        self._warned = False
        self._ledger.record(
            "durable_written",
            step=written.version.optimizer_step,
            validation_done=written.version.validation_done,
            path=str(written.path),
            bytes=written.bytes,
            copied_s=round(written.copied_s, 6),
            total_s=round(time.monotonic() - began, 6),
            tries=written.tries,
        )

    def _write(self) -> _Written:
        assert self._arena is not None
        began = time.monotonic()
        captured = capture([self._arena], self._room, threads=max(1, (os.cpu_count() or 1) // 2))
        copied_s = time.monotonic() - began
        version = captured.snapshot.version
        self._folder.prepare()
        with self._folder.locked() as held:
            if not held:
                raise DurableError(f"{self._folder.path}: another process writes durable states into it")
            self._folder.tidy()
            try:
                path, size_bytes = self._store(captured)
            finally:
                # What was begun in vain takes room that a full disk has not.
                self._folder.tidy()
        return _Written(version, path, size_bytes, copied_s, captured.tries)

    def _store(self, captured: Captured) -> tuple[Path, int]:
        version = captured.snapshot.version
        require_space(self._folder.path, state_bytes(captured))
        part = self._folder.begin(version)
        size_bytes = write_state(captured, part)
        write_manifest(part, self._manifest(captured))
        path = self._folder.complete(part, version)
        for old in states_to_drop(self._folder.versions(), version, self._order.keep):
            self._folder.drop(old)
        return path, size_bytes

    def _manifest(self, captured: Captured) -> Manifest:
        assert self._arena is not None
        notes = self._arena.notes()
        return Manifest(
            run_id=self._order.run_id,
            snapshot=captured.snapshot,
            shards=tuple(ShardFacts(s.bulk.numel(), len(s.blob), s.checksum) for s in captured.shards),
            origin=notes.get("origin"),
            logger_identities=notes.get("logger_identities"),
            written_at=time.time(),
        )

    def _failed(self, due: Version, error: Exception) -> None:
        cause = f"{type(error).__name__}: {error}"[:500]
        self._ledger.record("durable_failed", step=due.optimizer_step, validation_done=due.validation_done, cause=cause)
        if not self._warned:
            self._warned = True
            print(
                f"ckptless: the durable state of {due} was not written ({cause}); training goes on, the next one that "
                "is due is tried again, and the ledger tells of all",
                file=sys.stderr,
                flush=True,
            )

    def is_over(self) -> bool:
        """Whether the run has finished, or its arena is gone."""
        folder = Path(self._order.arena)
        return (folder / _FINISHED).exists() or not folder.exists()


@dataclass(frozen=True, slots=True)
class _Written:
    """A state that is complete.

    Args:
        version: of the state.
        path: its folder.
        bytes: what it takes on the disk.
        copied_s: time to copy it out of the arena.
        tries: how often that was tried.
    """

    version: Version
    path: Path
    bytes: int
    copied_s: float
    tries: int


def run(order: WriterOrder) -> None:
    """Write durable states until the run ends, or the agent does.

    Args:
        order: what to write where.
    """
    torch.set_num_threads(1)
    # Looked at between two states: one that is being written is finished first.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        agent = os.pidfd_open(order.agent_pid)
    except ProcessLookupError:
        return
    writer = DurableWriter(order)
    try:
        pause_s = LOOK_EVERY_S
        while not (_asked_to_end(pause_s) or _has_ended(agent) or writer.is_over()):
            began = time.thread_time()
            writer.look()
            pause_s = min(max(LOOK_EVERY_S, (time.thread_time() - began) / SHARE), LONGEST_PAUSE_S)
        writer.look(is_last=True)
    finally:
        os.close(agent)


def _asked_to_end(timeout_s: float) -> bool:
    return signal.sigtimedwait({signal.SIGTERM}, timeout_s) is not None


def _has_ended(pidfd: int) -> bool:
    return bool(select.select([pidfd], [], [], 0)[0])
