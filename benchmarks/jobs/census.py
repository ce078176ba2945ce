"""Count what a rank's protocol sends, and time its rounds, by wrapping the transport's class and probing the mirror."""

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


class Records:
    """What a process has counted and timed."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.rounds_s: dict[str, list[float]] = {}
        self.moments: dict[str, float] = {}

    def take(self, moment: str) -> None:
        """Record the time of a moment of a round, and at its end the times of its parts."""
        self.moments[moment] = time.perf_counter()
        if moment != "committed" or not {"send", "agree"} <= self.moments.keys():
            return
        at, self.moments = self.moments, {}
        parts = {"exchange": ("send", "agree"), "vote": ("agree", "committed"), "round": ("send", "committed")}
        for part, (begin, end) in parts.items():
            self.rounds_s.setdefault(part, []).append(at[end] - at[begin])


RECORDS = Records()
"""Of this process; not an attribute of the callback, which a recovery would take back to an earlier version."""


class Census(StepReporter):
    """Report steps and versions, and every `EVERY_ROUNDS` versions the times of the rounds and the protocol's traffic.

    A message is one that this rank addresses to a peer, or one collective; its bytes are those that this rank passes
    to the transport. Counts grow from the start of the process.
    """

    def __init__(self, wire: Wire) -> None:
        super().__init__(wire)
        _count_calls(RECORDS.counts)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        probes: list[Callable[[str, Any], None]] = getattr(trainer.strategy, "probes")  # noqa: B009 - of our strategies
        probes.append(self.timed)

    def timed(self, moment: str, version: Any) -> None:  # noqa: ARG002 - the signature of probes
        """Record the times of a round; runs in the mirror thread."""
        RECORDS.take(moment)
        if len(RECORDS.rounds_s.get("round", ())) >= EVERY_ROUNDS:
            self.wire.send("rounds", rounds_s=RECORDS.rounds_s, counts=dict(RECORDS.counts))
            RECORDS.rounds_s = {}


def _count_calls(counts: Counter[str]) -> None:
    """Count all calls of the transport between ranks in this process from now on."""
    exchange, vote, gather = NodeTransport.exchange, NodeTransport.vote, NodeTransport.gather

    def counted_exchange(self: NodeTransport, sends: Sequence[Any], receives: Sequence[Any]) -> None:
        counts["messages"] += sum(data.numel() > 0 for _, _, data in sends)
        counts["message bytes"] += sum(data.numel() for _, _, data in sends)
        exchange(self, sends, receives)

    def counted_vote(self: NodeTransport, mine: int) -> int:
        counts["votes"] += 1
        return vote(self, mine)

    def counted_gather(self: NodeTransport, payload: bytes) -> list[bytes]:
        counts["gathers"] += 1
        counts["gathered bytes"] += len(payload)
        return gather(self, payload)

    NodeTransport.exchange = counted_exchange  # type: ignore[method-assign]
    NodeTransport.vote = counted_vote  # type: ignore[method-assign]
    NodeTransport.gather = counted_gather  # type: ignore[method-assign]
