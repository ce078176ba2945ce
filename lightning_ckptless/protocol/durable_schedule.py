"""The durable rung, as decisions: when a state is written to storage, which ones are kept, how they are called.

A durable state is a version outside of memory. It is written beside training from what the arenas hold, so it is always
a version that training has passed; how far behind is what the timetable says.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from lightning_ckptless.protocol.versions import Snapshot, Version

_NAME = re.compile(r"step-(\d{10})(-before-tail)?")


@dataclass(frozen=True, slots=True)
class Timetable:
    """How often a durable state is written.

    Args:
        every_n_steps: optimizer steps from one to the next; None to leave it to the time.
        every_s: seconds from one to the next; None to leave it to the steps.
    """

    every_n_steps: int | None = None
    every_s: float | None = None

    @property
    def is_on(self) -> bool:
        """Whether states are written at all."""
        return self.every_n_steps is not None or self.every_s is not None

    def is_due(self, newest: Version, last: Version, *, since_s: float) -> bool:
        """Whether a version is to be written.

        By steps, a state is due when a multiple of the interval has been passed. The version that is written need not
        be that multiple itself: training does not wait to be looked at.

        Args:
            newest: newest committed version.
            last: the version that was last due; at first the one that the run began from.
            since_s: seconds since that one was begun.
        """
        if newest <= last:
            return False
        by_time = self.every_s is not None and since_s >= self.every_s
        n = self.every_n_steps
        return by_time or (n is not None and newest.optimizer_step // n > last.optimizer_step // n)


@dataclass(frozen=True, slots=True)
class Share:
    """What a node's writer has to do with the durable states of a run.

    Args:
        shards: those that it writes; none, where others write all.
        of: how many there are.
        leads: whether it puts the parts of all nodes together.
        every_n_steps: where there are several writers, the states that all of them write: nobody is asked when one is
            due.
    """

    shards: tuple[int, ...]
    of: int
    leads: bool
    every_n_steps: int | None = None

    @property
    def is_whole(self) -> bool:
        """Whether one writer does it all."""
        return len(self.shards) == self.of

    def is_due(self, version: Version) -> bool:
        """Whether a version is one that all writers write."""
        return (
            bool(self.every_n_steps)
            and version.validation_done
            and version.optimizer_step % (self.every_n_steps or 1) == 0
        )


def share_of(node: str, holders: Sequence[Sequence[int]], nodes: Sequence[str], every_n_steps: int | None) -> Share:
    """What a node writes: all, where the node of rank 0 holds all shards and is this one; else its own ranks' shards.

    Args:
        node: name of the node.
        holders: for each shard the ranks, beyond its writer, that keep a copy.
        nodes: name of each rank's node.
        every_n_steps: optimizer steps from one state of several writers to the next; None where time decides.
    """
    first, count = nodes[0], len(nodes)
    held = [first in {nodes[rank] for rank in (shard, *others)} for shard, others in enumerate(holders)]
    if all(held):
        return Share(tuple(range(count)) if node == first else (), count, node == first)
    return Share(tuple(rank for rank in range(count) if nodes[rank] == node), count, node == first, every_n_steps)


def states_to_drop(kept: Collection[Version], written: Version, keep: int) -> tuple[Version, ...]:
    """The states that go when a new one is complete.

    Those behind the written version belong to a future that did not happen: the run has gone back since. Of a step
    before and after its tail the later one is kept.

    Args:
        kept: versions of all complete states, the written one included.
        written: the one just completed.
        keep: how many are to be kept.
    """
    of_step = {version.optimizer_step: version for version in sorted(kept) if version <= written}
    newest = sorted(of_step, reverse=True)[:keep]
    return tuple(sorted(set(kept) - {of_step[step] for step in newest}))


def state_name(version: Version) -> str:
    """Name of the folder of a version's durable state."""
    return f"step-{version.optimizer_step:010d}{'' if version.validation_done else '-before-tail'}"


def version_of(name: str) -> Version | None:
    """The version behind a name of a folder; None for other names."""
    found = _NAME.fullmatch(name)
    return found and Version(int(found[1]), found[2] is None)


@dataclass(frozen=True, slots=True)
class DurableState:
    """A complete durable state.

    Args:
        path: its folder.
        snapshot: what it holds.
        run_id: run that has written it.
        origin: checkpoint file that this run began from; None where it began from none.
    """

    path: str
    snapshot: Snapshot
    run_id: str
    origin: str | None = None

    def __str__(self) -> str:
        return f"the durable state {self.path}"


def newest_first(states: Sequence[DurableState]) -> list[DurableState]:
    """Durable states in the order in which they are tried."""
    return sorted(states, key=lambda state: state.snapshot, reverse=True)
