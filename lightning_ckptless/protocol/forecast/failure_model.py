"""Failure models: when which nodes are lost, and for how long.

A model produces incidents. An incident is the loss of one process, of one node, or of several neighbouring nodes at
once (a burst). The rate is given per node, so a larger cluster has more failures. A burst counts as one failure of each
of its nodes: with bursts, the same rate gives fewer incidents, which take more nodes.

The gaps between incidents of the whole job are independent and either exponential or Weibull. A Weibull shape below 1
clusters them, which is what failure logs show. The simulation replays incidents and is otherwise deterministic, so
alternatives can be compared under the same incidents.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import exp, gamma, log, sqrt
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightning_ckptless.errors import OptionsError

SECONDS_PER_HOUR = 3600.0
SECONDS_PER_DAY = 86400.0
_CHUNK = 256
_SHORT = 0.01
"""Share of the time during which there may be too few spares."""

Floats = NDArray[np.float64]


class Incident(NamedTuple):
    """One failure.

    Args:
        at_s: when it happens, in seconds since the start of the job.
        nodes: nodes that are lost at once; empty if only a process is lost.
        repairs_s: how long each of these nodes is in repair, in seconds.
    """

    at_s: float
    nodes: tuple[int, ...]
    repairs_s: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Repair:
    """How long a failed node is in repair: a log-normal distribution.

    Args:
        median_s: median, in seconds.
        mean_s: mean, in seconds; at least the median, and equal to it for a constant duration.
    """

    median_s: float
    mean_s: float

    def draw(self, generator: np.random.Generator, count: int) -> Floats:
        """Draw durations, in seconds."""
        if self.mean_s <= 0:
            return np.zeros(count)
        spread = sqrt(2 * log(self.mean_s / self.median_s))
        return self.median_s * np.exp(spread * generator.standard_normal(count))


@dataclass(frozen=True, slots=True)
class Gaps:
    """The distribution of the time between two incidents of the job.

    Args:
        mean_s: mean, in seconds.
        shape: Weibull shape; 1 for an exponential distribution, less for clustered incidents.
    """

    mean_s: float
    shape: float = 1.0

    @property
    def scale_s(self) -> float:
        """Weibull scale, in seconds."""
        return self.mean_s / gamma(1 + 1 / self.shape)

    def survival(self, gaps_s: Floats) -> Floats:
        """Probability that a gap is longer than each of these durations."""
        survived: Floats = np.exp(-((gaps_s / self.scale_s) ** self.shape))
        return survived

    def draw(self, generator: np.random.Generator, horizon_s: float) -> Iterator[float]:
        """Draw the instants of all incidents before the horizon."""
        now_s = 0.0
        while True:
            for at_s in now_s + np.cumsum(self.scale_s * generator.weibull(self.shape, _CHUNK)):
                now_s = float(at_s)
                if now_s >= horizon_s:
                    return
                yield now_s


@dataclass(frozen=True, slots=True)
class FailureModel:
    """Failures at a constant rate per node.

    Args:
        per_node_s: failures of a node per second.
        repair: duration of repairs.
        shape: Weibull shape of the gaps between incidents; 1 for exponential gaps.
        process_share: share of incidents that take a process and leave its node.
        burst_share: share of the other incidents that take several neighbouring nodes at once.
        burst_nodes: nodes that a burst takes.
    """

    per_node_s: float
    repair: Repair
    shape: float = 1.0
    process_share: float = 0.0
    burst_share: float = 0.0
    burst_nodes: int = 2

    def gaps(self, nodes: int) -> Gaps:
        """The gaps between the incidents of a job on this many nodes."""
        burst = min(self.burst_nodes, nodes)
        failures = self.process_share + (1 - self.process_share) * (1 + self.burst_share * (burst - 1))
        return Gaps(failures / (nodes * self.per_node_s), self.shape)

    def node_losses_per_s(self, nodes: int) -> float:
        """Nodes that the job loses per second."""
        losses = (1 - self.process_share) * (1 + self.burst_share * (min(self.burst_nodes, nodes) - 1))
        return losses / self.gaps(nodes).mean_s

    def draw(self, generator: np.random.Generator, nodes: int, rack_nodes: int, horizon_s: float) -> list[Incident]:
        """Draw the incidents of one job.

        Args:
            generator: source of randomness.
            nodes: nodes of the job.
            rack_nodes: nodes per rack; a burst takes neighbours in one rack.
            horizon_s: duration of the job, in seconds.
        """
        instants = list(self.gaps(nodes).draw(generator, horizon_s))
        kinds, starts, offsets = generator.random((3, len(instants)))
        burst_below = self.process_share + (1 - self.process_share) * self.burst_share
        incidents = []
        for at_s, kind, start, offset in zip(instants, kinds, starts, offsets, strict=True):
            node = int(start * nodes)
            if kind < self.process_share:
                lost: tuple[int, ...] = ()
            elif kind < burst_below:
                lost = _neighbours(node, offset, self.burst_nodes, rack_nodes, nodes)
            else:
                lost = (node,)
            incidents.append(Incident(at_s, lost, tuple(self.repair.draw(generator, len(lost)).tolist())))
        return incidents


def _neighbours(node: int, offset: float, count: int, rack_nodes: int, nodes: int) -> tuple[int, ...]:
    """Neighbouring nodes in the rack of a node."""
    first = node - node % rack_nodes
    size = min(rack_nodes, nodes - first)
    lost = min(count, size)
    start = first + int(offset * (size - lost + 1))
    return tuple(range(start, start + lost))


def spares_needed(node_losses_per_s: float, repair: Repair) -> int:
    """The number of spares that is too low at most 1 % of the time.

    The number of nodes in repair has a Poisson distribution, whatever the distribution of the repairs.

    Args:
        node_losses_per_s: nodes lost per second.
        repair: duration of repairs.
    """
    mean = node_losses_per_s * repair.mean_s
    if mean > 500:
        # exp(-mean) would underflow; the normal distribution is exact enough here.
        return round(mean + 2.326 * sqrt(mean)) + 1
    spares, probability = 0, exp(-mean)
    total = probability
    while total < 1 - _SHORT:
        spares += 1
        probability *= mean / spares
        total += probability
    return spares


def require_rate(failures_per_1000_node_days: float) -> float:
    """Check a failure rate, and convert it to failures of a node per second.

    Raises:
        OptionsError: the rate is not greater than 0.
    """
    if not failures_per_1000_node_days > 0:
        raise OptionsError(
            f"rate={failures_per_1000_node_days:g}: expected more than 0 failures per 1,000 node-days, e.g. 6.5; "
            "for a job without failures there is nothing to forecast"
        )
    return failures_per_1000_node_days / 1000 / SECONDS_PER_DAY
