"""Logs the batches fetched since the last committed version, so that survivors replay them without fetching again.

A survivor keeps its dataloaders, their workers and prefetched batches. It is rolled back by one batch, rarely two, and
takes these batches from the log. The generator states after each fetch are restored with it.

A batch cannot be replayed if a step wrote to its tensors. The data is then read again from its position, as in a new
process.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lightning_ckptless.internals.lightning.fetcher import copy_containers, watch_fetches
from lightning_ckptless.internals.lightning.loops import FitLoops
from lightning_ckptless.protocol.versions import Version
from lightning_ckptless.trainer.data.position import apply_attributes, attributes_now, data_position, set_attributes
from lightning_ckptless.trainer.state.changes import Changed
from lightning_ckptless.trainer.state.rng import RngState, apply_rng, capture_rng

MOST_BYTES = 2**30
"""Limit on logged batches. If they are larger, the data is read again after a fault."""


@dataclass(frozen=True)
class _Fetched:
    """One fetch: the batch, and the state of fetcher, generators and dataloader attributes after it."""

    data: Any
    write_counts: tuple[int, ...]
    bytes: int
    fetched: int
    done: bool
    rng: RngState
    attributes: list[Changed | None]


@dataclass(frozen=True)
class _Mark:
    """A captured version: the number of fetches before it, and the data position."""

    fetches: int
    fetched: int
    done: bool
    position: dict[str, Any]


class BatchLog:
    """Logs the fetches of one fit loop.

    Args:
        loops: the fit loop.
        limit: returns the largest number of fetches to keep; 0 disables the log.
    """

    def __init__(self, loops: FitLoops, limit: Callable[[], int]) -> None:
        self._loops = loops
        self._limit = limit
        self._is_on = limit() > 0
        self._fetcher: Any = None
        self._entries: list[_Fetched] = []
        self._first = 0
        self._marks: dict[Version, _Mark] = {}
        self._replay: list[_Fetched] = []

    def watch(self, fetcher: Any) -> None:
        """Log what a fetcher returns from now on; called before each batch."""
        if fetcher is self._fetcher or not self._is_on:
            return
        self.reset()
        self._fetcher = fetcher
        if not watch_fetches(fetcher, self):
            self._is_on = False

    def reset(self) -> None:
        """Clear the log: the data was reopened."""
        self._entries.clear()
        self._marks.clear()
        self._replay.clear()
        self._first = 0

    # ------------------------------------------------------------------ fetches

    def fetch(self, fetch: Any) -> Any:
        """Return the next batch: one to replay, or a new one."""
        if self._replay:
            entry = self._replay.pop(0)
            self._fetcher.fetched, self._fetcher.done = entry.fetched, entry.done
            apply_rng(entry.rng)
            apply_attributes(self._loops, entry.attributes)
            self._entries.append(entry)
            return copy_containers(entry.data)[0]
        data = fetch()
        kept, write_counts, size_bytes = copy_containers(data)
        fetcher = self._fetcher
        now = capture_rng(), attributes_now(self._loops)
        self._entries.append(_Fetched(kept, write_counts, size_bytes, fetcher.fetched, fetcher.done, *now))
        held_bytes, limit = sum(entry.bytes for entry in self._entries), self._limit()
        while self._entries and (len(self._entries) > limit or held_bytes > MOST_BYTES):
            held_bytes -= self._entries.pop(0).bytes
            self._first += 1
        return data

    # ------------------------------------------------------------------ versions

    def position_at(self, version: Version) -> dict[str, Any]:
        """Return the data position at a version captured now, not counting batches still to be replayed."""
        known = self._marks.get(version)
        position = known.position if known is not None and self._replay else data_position(self._loops)
        if self._is_on:
            fetcher = self._loops.fetcher
            count = self._first + len(self._entries)
            self._marks[version] = _Mark(count, fetcher.fetched, fetcher.done, position)
        return position

    def forget_before(self, committed: Version | None) -> None:
        """Drop batches that no recovery can need: it never rolls back past a committed version."""
        if committed is None or committed not in self._marks:
            return
        surplus = self._marks[committed].fetches - self._first
        if surplus > 0:
            del self._entries[:surplus]
            self._first += surplus
        self._marks = {version: mark for version, mark in self._marks.items() if version >= committed}

    def go_back_to(self, version: Version) -> bool:
        """Replay the batches after a version.

        Returns:
            False if they are not all available and unmodified: the data then has to be moved.
        """
        mark = self._marks.get(version)
        if mark is None or mark.fetches < self._first or self._loops.fetcher is not self._fetcher:
            return False
        again = [*self._entries[mark.fetches - self._first :], *self._replay]
        if any(copy_containers(entry.data)[1] != entry.write_counts for entry in again):
            return False
        self._replay = again
        del self._entries[mark.fetches - self._first :]
        self._fetcher.fetched, self._fetcher.done = mark.fetched, mark.done
        set_attributes(self._loops, mark.position)
        return True
