"""The durable writer: a sidecar process that periodically writes the state in the arena to storage.

Training does not interact with it: the writer only reads the arena, and a failure here is an event in the ledger. On
SIGTERM, or when the run has finished, it writes the last version and exits.
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

from lightning_ckptless.durable.capture import Captured, CopyBuffers, capture, newest_committed
from lightning_ckptless.durable.folder import DurableFolder, Manifest, ShardFacts, write_manifest
from lightning_ckptless.durable.node_writer import POLL_EVERY_S, NodeWriter
from lightning_ckptless.durable.store import require_space, state_bytes, write_state
from lightning_ckptless.durable.writer_settings import WriterSettings
from lightning_ckptless.errors import ArenaError, CkptlessError, DurableError
from lightning_ckptless.ledger import Ledger
from lightning_ckptless.protocol.durable_schedule import Share, states_to_drop
from lightning_ckptless.protocol.versions import Complete, Version
from lightning_ckptless.replica.arena import Arena
from lightning_ckptless.system.reaper import MARKER

LONGEST_PAUSE_S = 1.0
MOST_CPU_FRACTION = 0.02
"""Largest fraction of one core that is spent on checking whether a state is due."""


class DurableWriter:
    """Writes the durable states of one arena.

    Args:
        settings: settings of the writer.
    """

    def __init__(self, settings: WriterSettings) -> None:
        self._settings = settings
        self._folder = DurableFolder(Path(settings.folder))
        self._ledger = Ledger(settings.ledger)
        self._buffers = CopyBuffers()
        self._arena: Arena | None = None
        self._last: Version | None = None
        self._last_at = time.monotonic()
        self._written: Version | None = None
        self._warned = False
        self._node_writer = NodeWriter(settings, self._failed)

    def write_if_due(self, *, is_last: bool = False) -> None:
        """Write a state if one is due.

        Args:
            is_last: whether this is the last call: the newest version is due unless it is already written.
        """
        share = self._share()
        if share is not None and not share.is_whole:
            if share.shards and self._arena is not None:
                self._node_writer.write_if_due(self._arena, share, is_last=is_last)
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
            due = self._settings.timetable.is_due(newest, self._last, since_s=since_s)
        if due:
            self._last, self._last_at = newest, time.monotonic()
            self._try_to_write(newest)

    def _share(self) -> Share | None:
        """Return the share of this node, as noted by its workers; None if they have not."""
        try:
            self._arena = self._arena or Arena.attach(Path(self._settings.arena))
            return self._arena.notes().durable_share
        except (ArenaError, FileNotFoundError):
            return None

    def _may_be_due(self) -> bool:
        """Return whether to inspect the arena; with an interval in seconds, nothing is due before it has passed."""
        settings = self._settings
        return settings.every_n_steps is not None or time.monotonic() - self._last_at >= (settings.every_s or 0.0)

    def _newest(self) -> Version | None:
        try:
            self._arena = self._arena or Arena.attach(Path(self._settings.arena))
            found = newest_committed([self._arena])
        except (ArenaError, FileNotFoundError):
            return None
        return found.snapshot.version if isinstance(found, Complete) else None

    def _start_of(self, newest: Version) -> Version:
        """Return the version from which the interval counts: the one that the run started from.

        Called at the start, and again if the run was restored from a version older than the last one written.
        """
        assert self._arena is not None
        self._written = max((version for version in self._folder.versions() if version <= newest), default=None)
        if self._written is not None:
            return self._written
        # With a checkpoint as origin, its step is unknown here. Use the first version that is seen instead.
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
        captured = capture([self._arena], self._buffers, threads=max(1, (os.cpu_count() or 1) // 2))
        copied_s = time.monotonic() - began
        version = captured.snapshot.version
        self._folder.prepare()
        with self._folder.locked() as held:
            if not held:
                raise DurableError(f"{self._folder.path}: another process is writing durable states to this folder")
            self._folder.remove_leftovers()
            try:
                path, size_bytes = self._store(captured)
            finally:
                # After a failure on a full disk, free the space of the incomplete state.
                self._folder.remove_leftovers()
        return _Written(version, path, size_bytes, copied_s, captured.tries)

    def _store(self, captured: Captured) -> tuple[Path, int]:
        version = captured.snapshot.version
        require_space(self._folder.path, state_bytes(captured))
        part = self._folder.begin(version)
        size_bytes = write_state(captured, part)
        write_manifest(part, self._manifest(captured))
        path = self._folder.complete(part, version)
        for old in states_to_drop(self._folder.versions(), version, self._settings.keep):
            self._folder.drop(old)
        return path, size_bytes

    def _manifest(self, captured: Captured) -> Manifest:
        assert self._arena is not None
        notes = self._arena.notes()
        return Manifest(
            run_id=self._settings.run_id,
            snapshot=captured.snapshot,
            shards=tuple(ShardFacts(s.bulk.numel(), len(s.blob), s.checksum) for s in captured.shards),
            origin=notes.origin or None,
            logger_identities=notes.logger_identities,
            written_at=time.time(),
        )

    def _failed(self, due: Version, error: Exception) -> None:
        cause = f"{type(error).__name__}: {error}"[:500]
        self._ledger.record("durable_failed", step=due.optimizer_step, validation_done=due.validation_done, cause=cause)
        if not self._warned:
            self._warned = True
            print(
                f"ckptless: writing the durable state of {due} failed ({cause}); training continues, the next state "
                "will be written when it is due, and the ledger records every failure",
                file=sys.stderr,
                flush=True,
            )

    def is_over(self) -> bool:
        """Return whether the run has finished, or its arena no longer exists."""
        folder = Path(self._settings.arena)
        return (folder / MARKER).exists() or not folder.exists()


@dataclass(frozen=True, slots=True)
class _Written:
    """A complete state.

    Args:
        version: version of the state.
        path: folder of the state.
        bytes: size on disk.
        copied_s: seconds to copy it out of the arena.
        tries: number of attempts that the copy took.
    """

    version: Version
    path: Path
    bytes: int
    copied_s: float
    tries: int


def run(settings: WriterSettings) -> None:
    """Write durable states until the run or the agent ends.

    Args:
        settings: settings of the writer.
    """
    torch.set_num_threads(1)
    # Blocked and polled between two states, so that a state is completed before the process exits.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        agent = os.pidfd_open(settings.agent_pid)
    except ProcessLookupError:
        return
    writer = DurableWriter(settings)
    try:
        pause_s = POLL_EVERY_S
        while not (_is_terminated(pause_s) or _has_ended(agent) or writer.is_over()):
            began = time.thread_time()
            writer.write_if_due()
            pause_s = min(max(POLL_EVERY_S, (time.thread_time() - began) / MOST_CPU_FRACTION), LONGEST_PAUSE_S)
        writer.write_if_due(is_last=True)
    finally:
        os.close(agent)


def _is_terminated(timeout_s: float) -> bool:
    return signal.sigtimedwait({signal.SIGTERM}, timeout_s) is not None


def _has_ended(pidfd: int) -> bool:
    return bool(select.select([pidfd], [], [], 0)[0])
