"""The batches in hand: what was fetched since the last committed version, to be run again without being fetched again.

A rank that survives a fault keeps its dataloaders, their workers and what lies prefetched. It is rolled back by a
batch, rarely two, and takes these from here. The random numbers that fetching had drawn are put back with each.

A batch whose tensors the step has written to cannot be used again; then the data is read anew from its position, as a
new process does it.
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
"""Of batches that are held; where they are larger the data is read anew after a fault."""


@dataclass(frozen=True)
class _Fetched:
    """One fetch: what came, where the fetcher was then, and the generators and dataloaders' attributes after it."""

    data: Any
    stamps: tuple[int, ...]
    bytes: int
    fetched: int
    done: bool
    rng: RngState
    attributes: list[Changed | None]


@dataclass(frozen=True)
class _Mark:
    """A version that was taken: how many fetches stood before it, and where the data was."""

    fetches: int
    fetched: int
    done: bool
    position: dict[str, Any]


class BatchLog:
    """Remembers fetches of one fit loop.

    Args:
        loops: whose fetches.
        limit: tells how many fetches to remember at most; with 0 none is remembered.
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
        """Remember what a fetcher hands out from now on; called before each batch."""
        if fetcher is self._fetcher or not self._is_on:
            return
        self.reset()
        self._fetcher = fetcher
        if not watch_fetches(fetcher, self):
            self._is_on = False

    def reset(self) -> None:
        """Forget all: the data was opened anew."""
        self._entries.clear()
        self._marks.clear()
        self._replay.clear()
        self._first = 0

    # ------------------------------------------------------------------ fetches

    def fetch(self, fetch: Any) -> Any:
        """The next batch: one that is to be run again, or a new one."""
        if self._replay:
            entry = self._replay.pop(0)
            self._fetcher.fetched, self._fetcher.done = entry.fetched, entry.done
            apply_rng(entry.rng)
            apply_attributes(self._loops, entry.attributes)
            self._entries.append(entry)
            return copy_containers(entry.data)[0]
        data = fetch()
        kept, stamps, size_bytes = copy_containers(data)
        fetcher = self._fetcher
        now = capture_rng(), attributes_now(self._loops)
        self._entries.append(_Fetched(kept, stamps, size_bytes, fetcher.fetched, fetcher.done, *now))
        held_bytes, limit = sum(entry.bytes for entry in self._entries), self._limit()
        while self._entries and (len(self._entries) > limit or held_bytes > MOST_BYTES):
            held_bytes -= self._entries.pop(0).bytes
            self._first += 1
        return data

    # ------------------------------------------------------------------ versions

    def position_at(self, version: Version) -> dict[str, Any]:
        """Where the data is at a version that is taken now, not counting what is still to be run again."""
        known = self._marks.get(version)
        position = known.position if known is not None and self._replay else data_position(self._loops)
        if self._is_on:
            fetcher = self._loops.fetcher
            count = self._first + len(self._entries)
            self._marks[version] = _Mark(count, fetcher.fetched, fetcher.done, position)
        return position

    def forget_before(self, committed: Version | None) -> None:
        """Let go of what no recovery can ask for: it never goes back behind a committed version."""
        if committed is None or committed not in self._marks:
            return
        surplus = self._marks[committed].fetches - self._first
        if surplus > 0:
            del self._entries[:surplus]
            self._first += surplus
        self._marks = {version: mark for version, mark in self._marks.items() if version >= committed}

    def go_back_to(self, version: Version) -> bool:
        """Let the batches behind a version come again.

        Returns:
            False where they are not there, or not as they were: then the data has to be moved.
        """
        mark = self._marks.get(version)
        if mark is None or mark.fetches < self._first or self._loops.fetcher is not self._fetcher:
            return False
        again = [*self._entries[mark.fetches - self._first :], *self._replay]
        if any(copy_containers(entry.data)[1] != entry.stamps for entry in again):
            return False
        self._replay = again
        del self._entries[mark.fetches - self._first :]
        self._fetcher.fetched, self._fetcher.done = mark.fetched, mark.done
        set_attributes(self._loops, mark.position)
        return True
