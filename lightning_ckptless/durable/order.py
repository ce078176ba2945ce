"""What a durable writer is told, as the one argument of its command line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from lightning_ckptless.protocol.durable_schedule import Share, Timetable

MODULE = "lightning_ckptless.durable"
SHARE_NOTE = "durable share"
"""What the writer of a node has to do: it changes with the ranks of the node, which the order does not know."""


def share_note(share: Share) -> dict[str, Any]:
    """A share as a note in an arena."""
    return asdict(share)


def read_share(notes: Mapping[str, Any]) -> Share | None:
    """The share that was noted in an arena; None where none was."""
    fields = notes.get(SHARE_NOTE)
    return None if fields is None else Share(**(fields | {"shards": tuple(fields["shards"])}))


@dataclass(frozen=True, slots=True)
class WriterOrder:
    """What is written where.

    Args:
        arena: folder of the node's arena.
        folder: of the durable states.
        ledger: file of the run's ledger.
        run_id: the run.
        agent_pid: process whose end ends the writer.
        every_n_steps: optimizer steps from one state to the next; None to leave it to the time.
        every_s: seconds from one to the next; None to leave it to the steps.
        keep: how many states are kept.
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
        """How often."""
        return Timetable(self.every_n_steps, self.every_s)

    def to_text(self) -> str:
        """The order as an argument."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_text(cls, text: str) -> WriterOrder:
        """The order that `to_text` made."""
        return cls(**json.loads(text))
