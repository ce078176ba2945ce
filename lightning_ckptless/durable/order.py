"""The order of a durable writer: its settings, passed as a single command-line argument."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from lightning_ckptless.protocol.durable_schedule import Share, Timetable

MODULE = "lightning_ckptless.durable"
SHARE_NOTE = "durable share"
"""Arena note with the share of a node's writer, which depends on the ranks of the node and is not part of the order."""


def share_note(share: Share) -> dict[str, Any]:
    """Convert a share to an arena note."""
    return asdict(share)


def read_share(notes: Mapping[str, Any]) -> Share | None:
    """Read the share from the notes of an arena; None if there is none."""
    fields = notes.get(SHARE_NOTE)
    return None if fields is None else Share(**(fields | {"shards": tuple(fields["shards"])}))


@dataclass(frozen=True, slots=True)
class WriterOrder:
    """The settings of a durable writer.

    Args:
        arena: folder of the node's arena.
        folder: folder of the durable states.
        ledger: file of the run's ledger.
        run_id: id of the run.
        agent_pid: process id of the agent; the writer exits with it.
        every_n_steps: optimizer steps between two states; None for no limit.
        every_s: seconds between two states; None for no limit.
        keep: number of states to keep.
    """

    arena: str
    folder: str
    ledger: str
    run_id: str
    agent_pid: int
    every_n_steps: int | None
    every_s: float | None
    keep: int

    @property
    def timetable(self) -> Timetable:
        """The interval between two states."""
        return Timetable(self.every_n_steps, self.every_s)

    def to_text(self) -> str:
        """Serialize the order."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_text(cls, text: str) -> WriterOrder:
        """Parse the result of `to_text`."""
        return cls(**json.loads(text))
