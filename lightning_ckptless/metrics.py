"""Goodput and recovery time as torchmetrics that are logged, reset and merged over ranks like any other metric."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_ckptless.protocol.phases import PHASE_FIELDS, Phases


class Goodput(Metric):
    """Productive time divided by total time, summed over updates and ranks.

    Args:
        kwargs: keyword arguments of `torchmetrics.Metric`.

    Example:
        >>> goodput = Goodput()
        >>> goodput.update(productive_s=9.0, wall_s=10.0)
        >>> goodput.update(productive_s=3.0, wall_s=6.0)
        >>> goodput.compute().item()
        0.75
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    productive_s: Tensor
    wall_s: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("productive_s", default=_seconds(0.0), dist_reduce_fx="sum")
        self.add_state("wall_s", default=_seconds(0.0), dist_reduce_fx="sum")

    def update(self, productive_s: float, wall_s: float) -> None:
        """Add a span of time.

        Args:
            productive_s: part of it, in seconds, spent in steps that were not rolled back.
            wall_s: its length in seconds.

        Raises:
            ValueError: either value is negative, or `productive_s` is greater than `wall_s`.
        """
        if not 0.0 <= productive_s <= wall_s:
            raise ValueError(f"productive_s={productive_s}, wall_s={wall_s}: expected 0 <= productive_s <= wall_s")
        self.productive_s += productive_s
        self.wall_s += wall_s

    def compute(self) -> Tensor:
        """Return the goodput, 0 to 1; NaN before the first update."""
        return self.productive_s / self.wall_s


class RecoveryTime(Metric):
    """Mean, maximum and last recovery time, and the mean of each phase, in seconds.

    Values of ranks that report the same recoveries are averaged; the last recovery is the one that ended last on any
    rank.

    Args:
        kwargs: keyword arguments of `torchmetrics.Metric`.

    Example:
        >>> recovery_time = RecoveryTime()
        >>> recovery_time.update(Phases(detect_s=0.5, restore_s=1.0, replay_s=0.5), ended_at=100.0)
        >>> recovery_time.update(Phases(detect_s=0.5, restore_s=0.25, replay_s=0.25), ended_at=200.0)
        >>> {name: value.item() for name, value in recovery_time.compute().items() if value}
        {'mean_s': 1.5, 'max_s': 2.0, 'last_s': 1.0, 'detect_s': 0.5, 'restore_s': 0.625, 'replay_s': 0.375}
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False

    count: Tensor
    phases_s: Tensor
    max_s: Tensor
    last: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("count", default=torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("phases_s", default=_seconds(*[0.0] * len(PHASE_FIELDS)), dist_reduce_fx="sum")
        self.add_state("max_s", default=_seconds(-torch.inf), dist_reduce_fx="max")
        # End and duration of the last recovery, in one tensor: they can only be merged as a pair.
        self.add_state("last", default=_seconds(-torch.inf, torch.nan), dist_reduce_fx=_latest)

    def update(self, phases: Phases, ended_at: float) -> None:
        """Add a recovery.

        Args:
            phases: duration of each phase.
            ended_at: time at which it ended, in seconds of a clock that all ranks share.
        """
        self.count += 1
        self.phases_s += _seconds(*[getattr(phases, name) for name in PHASE_FIELDS]).to(self.device)
        self.max_s = self.max_s.clamp(min=phases.total_s)
        self.last = _latest(torch.stack([self.last, _seconds(ended_at, phases.total_s).to(self.device)]))

    def compute(self) -> dict[str, Tensor]:
        """Return `mean_s`, `max_s`, `last_s`, and the mean of each phase by its name; NaN before the first recovery."""
        means_s = self.phases_s / self.count
        longest_s = torch.where(self.count > 0, self.max_s, torch.nan)
        total = {"mean_s": means_s.sum(), "max_s": longest_s, "last_s": self.last[1]}
        return total | dict(zip(PHASE_FIELDS, means_s, strict=True))


def _latest(ended: Tensor) -> Tensor:
    """Return the row (end, duration) with the latest end."""
    return ended[ended[:, 0].argmax()]


def _seconds(*values: float) -> Tensor:
    # In single precision, a sum of 0.1 s steps becomes inaccurate within days.
    return torch.tensor(values if len(values) > 1 else values[0], dtype=torch.float64)
