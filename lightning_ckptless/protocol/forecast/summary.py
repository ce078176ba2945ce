"""The statistics of many simulated jobs: expectation and spread."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lightning_ckptless.protocol.forecast.simulation import Bucket, Outcome

_NONE_SEEN = 3.0
"""If none of several jobs had a loss, its rate is below 3 per observed time with 95 % confidence."""


@dataclass(frozen=True, slots=True)
class Summary:
    """Simulated jobs in summary.

    Args:
        ettr: mean effective training time ratio.
        ettr_low: its 5th percentile over the jobs.
        ettr_high: its 95th percentile.
        spent_s: mean seconds by bucket.
        incidents: mean number of incidents per job.
        uncovered: mean number of losses per job that memory did not cover.
        uncovered_after_s: mean time to the first loss that memory does not cover, in seconds.
        uncovered_seen: whether any job had one; otherwise `uncovered_after_s` is a lower bound (95 % confidence).
    """

    ettr: float
    ettr_low: float
    ettr_high: float
    spent_s: Mapping[Bucket, float]
    incidents: float
    uncovered: float
    uncovered_after_s: float
    uncovered_seen: bool


def summarize(outcomes: Sequence[Outcome]) -> Summary:
    """Summarize simulated jobs of the same duration."""
    ettr = [outcome.ettr for outcome in outcomes]
    low, high = np.percentile(ettr, (5, 95)).tolist()
    hit = sum(outcome.first_uncovered_s is not None for outcome in outcomes)
    until_s = sum(o.wall_s if o.first_uncovered_s is None else o.first_uncovered_s for o in outcomes)
    return Summary(
        ettr=float(np.mean(ettr)),
        ettr_low=low,
        ettr_high=high,
        spent_s={bucket: float(np.mean([outcome.spent_s[bucket] for outcome in outcomes])) for bucket in Bucket},
        incidents=float(np.mean([outcome.incidents for outcome in outcomes])),
        uncovered=float(np.mean([outcome.uncovered for outcome in outcomes])),
        # The maximum likelihood estimate for jobs of which some ended before their first loss.
        uncovered_after_s=until_s / (hit or _NONE_SEEN),
        uncovered_seen=bool(hit),
    )
