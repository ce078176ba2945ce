"""The closed form: goodput of a job as a renewal process.

Between two incidents lies a gap X. The recovery of r seconds comes first, then segments of s seconds, each with u
productive seconds, and the segment in which the next incident falls is lost. So a gap contributes `floor((X - r) / s)`
segments, and the goodput is

    G = u / E[X] * sum over k >= 1 of P(X > r + k s)

For exponential gaps with rate f this is Daly's formula, `G = u f / (exp(f r) (exp(f s) - 1))`, which also chooses the
mirror interval (`mirror_interval`). It needs no approximation: incidents during a recovery start the recovery again,
which is a gap without a segment.

The formula holds if gaps are independent and all recoveries take the same time. It does not model losses that memory
does not cover, waiting for nodes, and running on fewer nodes; the simulation does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, expm1

import numpy as np

from lightning_ckptless.protocol.forecast.failure_model import Gaps
from lightning_ckptless.protocol.forecast.job import Failures, Job

_EXACT_TERMS = 4096
_GROWTH = 1.01
_NEGLIGIBLE = 1e-12
_HOPELESS = 700.0
"""Average number of incidents in a segment above which no segment is ever completed."""


def renewal_goodput(gaps: Gaps, useful_s: float, segment_s: float, recovery_s: float) -> float:
    """Expected goodput as a fraction.

    Args:
        gaps: time between incidents.
        useful_s: productive time per segment, in seconds.
        segment_s: duration of a segment, in seconds.
        recovery_s: duration of a recovery without the replay, in seconds.
    """
    if gaps.shape == 1:
        rate = 1 / gaps.mean_s
        if rate * max(segment_s, recovery_s) > _HOPELESS:
            return 0.0
        return useful_s * rate / (exp(rate * recovery_s) * expm1(rate * segment_s))
    return useful_s / gaps.mean_s * _segments_per_gap(gaps, segment_s, recovery_s)


def _segments_per_gap(gaps: Gaps, segment_s: float, recovery_s: float) -> float:
    """The sum of the survival function. After some exact terms, blocks of terms count by the one in their middle."""
    first = np.arange(1, _EXACT_TERMS + 1, dtype=np.float64)
    total = float(gaps.survival(recovery_s + first * segment_s).sum())
    at = float(_EXACT_TERMS + 1)
    while float(gaps.survival(np.array([recovery_s + at * segment_s]))[0]) > _NEGLIGIBLE:
        edges = np.floor(at * _GROWTH ** np.arange(257))
        middle = (edges[:-1] + edges[1:] - 1) / 2
        total += float((np.diff(edges) * gaps.survival(recovery_s + middle * segment_s)).sum())
        at = float(edges[-1])
    return total


@dataclass(frozen=True, slots=True)
class ClosedForm:
    """The forecast by the closed form.

    Args:
        ettr: expected goodput as a fraction.
        left_out: what the formula leaves out of this job; empty if it holds.
    """

    ettr: float
    left_out: Sequence[str]


def closed_form(job: Job, failures: Failures, *, bursts: bool, trace: bool) -> ClosedForm:
    """Apply the closed form to a job.

    Args:
        job: the job.
        failures: its failures.
        bursts: whether several nodes may be lost at once.
        trace: whether the failures are a recorded trace.
    """
    gaps, share, segment = failures.gaps(job.cluster.nodes), failures.process_share, job.segment
    ettr = sum(
        weight * renewal_goodput(gaps, segment.useful_s, segment.total_s, recovery_s)
        for weight, recovery_s in ((share, process_recovery_s(job)), (1 - share, node_recovery_s(job)))
        if weight
    )
    left_out = []
    if bursts:
        left_out.append("losses that memory does not cover")
    if share < 1:
        left_out.append("waiting for nodes")
    if 0 < share < 1:
        left_out.append("recoveries of one kind that interrupt those of another")
    if trace:
        left_out.append("the gaps of the trace, which count as exponential")
    return ClosedForm(ettr, left_out)


def process_recovery_s(job: Job) -> float:
    """Seconds to recover from the loss of a process."""
    costs, choices = job.costs, job.choices
    if not choices.in_place or job.cluster.ranks == 1:
        return costs.relaunch_s
    return costs.standby_s if choices.standbys else costs.in_place_s


def node_recovery_s(job: Job) -> float:
    """Seconds to recover from the loss of a node that is replaced by a spare."""
    in_place = job.choices.in_place and job.cluster.nodes > 1
    return job.costs.join_s if in_place else max(job.costs.relaunch_s, job.costs.join_s)
