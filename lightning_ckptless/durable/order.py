"""What a durable writer is told, as the one argument of its command line."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from lightning_ckptless.protocol.durable import Timetable

MODULE = "lightning_ckptless.durable"


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
