"""The settings of a durable writer, passed as a single command-line argument.

The share of a node's writer depends on the ranks of the node, so it is a note in the arena and not one of the
settings.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from lightning_ckptless.protocol.durable_schedule import Timetable

MODULE = "lightning_ckptless.durable"


@dataclass(frozen=True, slots=True)
class WriterSettings:
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
        """Serialize the settings."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_text(cls, text: str) -> WriterSettings:
        """Parse the result of `to_text`."""
        return cls(**json.loads(text))
