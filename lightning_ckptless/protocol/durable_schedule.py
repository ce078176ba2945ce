"""Decisions about durable states: when one is written to storage, which ones are kept, and how they are named.

A durable state is a version on storage. It is written from the arenas while training continues, so it is always older
than the current step. The timetable bounds by how much.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from lightning_ckptless.protocol.versions import Snapshot, Version

FOLDER_MARKER = "ckptless-durable.json"
"""Name of the file that marks a folder of durable states."""
MANIFEST_NAME = "state.json"
"""Name of the file that makes a durable state complete."""
_NAME = re.compile(r"step-(\d{10})(-before-validation)?")


@dataclass(frozen=True, slots=True)
class Timetable:
    """How often a durable state is written.

    Args:
        every_n_steps: optimizer steps between two states; None to schedule by time only.
        every_s: seconds between two states; None to schedule by steps only.
    """

    every_n_steps: int | None = None
    every_s: float | None = None

    @property
    def is_on(self) -> bool:
        """Whether durable states are written at all."""
        return self.every_n_steps is not None or self.every_s is not None

    def is_due(self, newest: Version, last: Version, *, since_s: float) -> bool:
        """Whether to write a version.

        By steps, a state is due when a multiple of the interval has been passed. The version that is written may be
        newer than that multiple, because training does not wait for the writer.

        Args:
            newest: newest committed version.
            last: version that was last due; initially the one that the run started from.
            since_s: seconds since writing `last` began.
        """
        if newest <= last:
            return False
        by_time = self.every_s is not None and since_s >= self.every_s
        n = self.every_n_steps
        return by_time or (n is not None and newest.optimizer_step // n > last.optimizer_step // n)


@dataclass(frozen=True, slots=True)
class Share:
    """A node's share of writing the durable states of a run.

    Args:
        shards: shards that this node writes; empty if other nodes write all of them.
        of: total number of shards.
        leads: whether this node combines the parts of all nodes.
        every_n_steps: interval if there are several writers. All of them write the versions at its multiples, so no
            node has to announce that one is due.
    """

    shards: tuple[int, ...]
    of: int
    leads: bool
    every_n_steps: int | None = None

    @property
    def is_whole(self) -> bool:
        """Whether a single writer writes all shards."""
        return len(self.shards) == self.of

    def is_due(self, version: Version) -> bool:
        """Whether all writers write a version."""
        return (
            bool(self.every_n_steps)
            and version.validation_done
            and version.optimizer_step % (self.every_n_steps or 1) == 0
        )


def share_of(node: str, holders: Sequence[Sequence[int]], nodes: Sequence[str], every_n_steps: int | None) -> Share:
    """Assign a node its share of the writing.

    If the node of rank 0 holds all shards, it writes all of them. Otherwise each node writes the shards of its own
    ranks.

    Args:
        node: name of the node.
        holders: for each shard the ranks, other than its writer, that keep a copy.
        nodes: name of each rank's node.
        every_n_steps: optimizer steps between two states written by several nodes; None to schedule by time.
    """
    first, count = nodes[0], len(nodes)
    held = [first in {nodes[rank] for rank in (shard, *others)} for shard, others in enumerate(holders)]
    if all(held):
        return Share(tuple(range(count)) if node == first else (), count, node == first)
    return Share(tuple(rank for rank in range(count) if nodes[rank] == node), count, node == first, every_n_steps)


def states_to_drop(kept: Collection[Version], written: Version, keep: int) -> tuple[Version, ...]:
    """The states to delete when a new one is complete.

    States newer than the written version are obsolete: the run has rolled back since they were written. If a step has
    states before and after validation, the later one is kept.

    Args:
        kept: versions of all complete states, including `written`.
        written: the version just completed.
        keep: number of states to keep.
    """
    of_step = {version.optimizer_step: version for version in sorted(kept) if version <= written}
    newest = sorted(of_step, reverse=True)[:keep]
    return tuple(sorted(set(kept) - {of_step[step] for step in newest}))


def state_name(version: Version) -> str:
    """Name of the folder of a version's durable state."""
    return f"step-{version.optimizer_step:010d}{'' if version.validation_done else '-before-validation'}"


def version_of(name: str) -> Version | None:
    """The version that a folder name denotes; None for other names."""
    found = _NAME.fullmatch(name)
    return found and Version(int(found[1]), found[2] is None)


@dataclass(frozen=True, slots=True)
class DurableState:
    """A complete durable state.

    Args:
        path: folder of the state.
        snapshot: the snapshot that it contains.
        run_id: run that wrote it.
        origin: checkpoint file that this run started from; None if it started from scratch.
    """

    path: str
    snapshot: Snapshot
    run_id: str
    origin: str | None = None

    def __str__(self) -> str:
        return f"the durable state {self.path}"


def newest_first(states: Sequence[DurableState]) -> list[DurableState]:
    """Durable states in the order in which to try them."""
    return sorted(states, key=lambda state: state.snapshot, reverse=True)
