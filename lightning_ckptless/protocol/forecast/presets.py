"""Published failure rates, with their sources.

Only rates are taken over. Repairs, bursts and the share of process failures are separate inputs, because few sources
publish them.
"""

from __future__ import annotations

from dataclasses import dataclass

from lightning_ckptless.errors import OptionsError


@dataclass(frozen=True, slots=True)
class Preset:
    """A published failure rate.

    Args:
        name: name on the command line.
        rate: failures per 1,000 node-days.
        shape: Weibull shape of the gaps; 1 where none is published.
        source: publication.
        basis: how the rate follows from the publication.
    """

    name: str
    rate: float
    shape: float
    source: str
    basis: str


PRESETS = (
    Preset(
        "rsc-1",
        6.50,
        1.0,
        "Meta, Revisiting Reliability in Large-Scale Machine Learning Research Clusters (HPCA 2025, arXiv 2410.21680)",
        "published as failures per 1,000 node-days of the cluster RSC-1",
    ),
    Preset(
        "rsc-2",
        2.34,
        1.0,
        "Meta, Revisiting Reliability in Large-Scale Machine Learning Research Clusters (HPCA 2025, arXiv 2410.21680)",
        "published as failures per 1,000 node-days of the cluster RSC-2",
    ),
    Preset(
        "rsc-jobs",
        23.73,
        1.0,
        "Meta, Revisiting Reliability in Large-Scale Machine Learning Research Clusters (HPCA 2025, arXiv 2410.21680)",
        "measured mean time to failure of 7.9 h of jobs with 1,024 GPUs, i.e. 128 nodes; 3.7 times the rate of rsc-1",
    ),
    Preset(
        "llama-3",
        3.79,
        1.0,
        "Meta, The Llama 3 Herd of Models (2024)",
        "419 unplanned interruptions in 54 days on 16,384 GPUs, i.e. 2,048 nodes",
    ),
    Preset(
        "hsdp-100k",
        6.40,
        1.0,
        "Meta, FT-HSDP (2026, arXiv 2602.00277)",
        "a failure every 18 minutes on about 100,000 GPUs, i.e. 12,500 nodes",
    ),
    Preset(
        "infinitehbd",
        4.18,
        0.62,
        "stepfun-ai/InfiniteHBD-Trace, an open trace of 400 servers over 345 days (584 faults)",
        "faults per 1,000 node-days; the shape is fitted to the gaps, whose coefficient of variation is 1.76",
    ),
)
"""A node has eight GPUs in all of them."""

BURST_SHARE = 0.034
"""InfiniteHBD-Trace: share of hardware faults after which another node fails within 30 s (0.03 % if independent). Meta
reports 3 to 5 % of failures that co-occur."""
REPAIR_MEDIAN_H = 20.4
REPAIR_MEAN_H = 133.0
"""InfiniteHBD-Trace: duration of repairs, in hours."""


def preset(name: str) -> Preset:
    """Look up a preset.

    Raises:
        OptionsError: there is no such preset.
    """
    for known in PRESETS:
        if known.name == name:
            return known
    raise OptionsError(f"preset={name!r}: expected one of {', '.join(known.name for known in PRESETS)}")
