"""Count the messages of a rank, and time the rounds of its mirror, by wrapping the transport and probing the mirror.

Apart from `training`, because it changes the transport's class in the process that imports it.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import lightning.pytorch as pl

from benchmarks.harness.wire import Wire
from benchmarks.jobs.training import StepReporter
from lightning_ckptless.replica.node_transport import NodeTransport

EVERY_ROUNDS = 10
"""Committed versions between two reports."""
PARTS = {"exchange": ("send", "agree"), "vote": ("agree", "committed"), "round": ("send", "committed")}
"""Parts of a round, by the moments at which they begin and end."""
COUNTS, ROUNDS_S = Counter[str](), dict[str, list[float]]()
MOMENTS: dict[str, float] = {}
"""Of this process; not attributes of the callback, which a recovery would take back to an earlier version."""


class Census(StepReporter):
    """Report steps and versions, and every `EVERY_ROUNDS` versions the times of the rounds and the traffic so far."""

    def __init__(self, wire: Wire) -> None:
        super().__init__(wire)
        exchange = NodeTransport.exchange

        def counted(self: NodeTransport, sends: Sequence[Any], receives: Sequence[Any]) -> None:
            COUNTS["messages"] += sum(data.numel() > 0 for _, _, data in sends)
            COUNTS["message bytes"] += sum(data.numel() for _, _, data in sends)
            exchange(self, sends, receives)

        NodeTransport.exchange = counted  # type: ignore[method-assign]

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        probes: list[Callable[[str, Any], None]] = getattr(trainer.strategy, "probes")  # noqa: B009 - of our strategies
        probes.append(self.timed)

    def timed(self, moment: str, version: Any) -> None:  # noqa: ARG002 - the signature of probes
        """Record the times of a round; runs in the mirror thread."""
        MOMENTS[moment] = time.perf_counter()
        if moment != "committed" or not {"send", "agree"} <= MOMENTS.keys():
            return
        for part, (begin, end) in PARTS.items():
            ROUNDS_S.setdefault(part, []).append(MOMENTS[end] - MOMENTS[begin])
        MOMENTS.clear()
        if len(ROUNDS_S["round"]) >= EVERY_ROUNDS:
            self.wire.send("rounds", rounds_s=ROUNDS_S, counts=dict(COUNTS))
            ROUNDS_S.clear()
