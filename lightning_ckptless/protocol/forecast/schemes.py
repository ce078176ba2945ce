"""Ways to survive failures, compared over the size of the cluster by the closed form.

What other systems are assumed to do is taken from their own publications, at the scale that they name, and does not
grow with the cluster. So the comparison favours all fast recoveries at large sizes, ours included.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import ceil, sqrt

from lightning_ckptless.protocol.forecast.failure_model import Gaps
from lightning_ckptless.protocol.forecast.job import Cluster, Costs, Failures, Job
from lightning_ckptless.protocol.forecast.renewal import node_recovery_s, process_recovery_s, renewal_goodput
from lightning_ckptless.protocol.mirror_interval import INTERVALS

RESTART_S = 1350.0
"""Restart of all workers from a checkpoint: 22.5 min, the middle of the 15 to 30 min that AWS names for 2,304 GPUs."""
CHECKPOINT_S = 20.0
"""Delay of training per checkpoint: an assumption for a blocking write of a large state."""
FAST_RESTART_S = 47.0
"""Fast restart: AWS SageMaker HyperPod checkpointless, Llama 3 70B on 256 GPUs."""
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)


@dataclass(frozen=True, slots=True)
class Curve:
    """The expected goodput of one scheme over the size of the cluster.

    Args:
        name: name of the scheme.
        assumptions: what is assumed of it.
        ettr: expected goodput as a fraction, one value per size.
    """

    name: str
    assumptions: str
    ettr: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Comparison:
    """Schemes over the size of the cluster.

    Args:
        ranks: sizes, in ranks.
        curves: one curve per scheme.
    """

    ranks: tuple[int, ...]
    curves: tuple[Curve, ...]


def compare_schemes(job: Job, failures: Failures) -> Comparison:
    """Compare schemes for the steps and failures of a job, over the size of the cluster.

    Args:
        job: the job.
        failures: failures of its nodes.
    """
    nodes = sorted({*_SIZES, job.cluster.nodes})
    per_node = job.cluster.ranks_per_node
    costs = job.costs
    restart = (
        f"{RESTART_S / 60:g} min per restart (AWS: 15 to 30 min at 2,304 GPUs); {CHECKPOINT_S:g} s per checkpoint "
        "(assumed); the best interval for each size"
    )
    fast = (
        f"{FAST_RESTART_S:g} s (AWS HyperPod checkpointless at 256 GPUs), at most one step is replayed; no cost per "
        "step, since none is published"
    )
    process_s = process_recovery_s(_with_nodes(job, 2, in_place=True))
    node_s = max(costs.relaunch_s, costs.join_s)
    relaunch = f"{costs.relaunch_s:g} s per process, {node_s:g} s per node, the best mirror interval for each size"
    schemes: tuple[tuple[str, str, Callable[[Gaps, int], float]], ...] = (
        (
            "checkpoint and restart",
            restart,
            lambda gaps, _: checkpoint_goodput(gaps, costs, CHECKPOINT_S, RESTART_S),
        ),
        (
            f"fast restart, {FAST_RESTART_S:g} s",
            fast,
            lambda gaps, _: renewal_goodput(gaps, costs.step_s, costs.full_step_s, FAST_RESTART_S),
        ),
        (
            "ckptless, relaunch",
            relaunch,
            lambda gaps, size: _ours(job, failures.process_share, gaps, size, in_place=False),
        ),
        (
            "ckptless, in place",
            f"{process_s:g} s per process, {costs.join_s:g} s per node, the best mirror interval for each size",
            lambda gaps, size: _ours(job, failures.process_share, gaps, size, in_place=True),
        ),
    )
    curves = tuple(
        Curve(name, text, tuple(ettr(failures.gaps(size), size) for size in nodes)) for name, text, ettr in schemes
    )
    return Comparison(tuple(size * per_node for size in nodes), curves)


def checkpoint_goodput(gaps: Gaps, costs: Costs, checkpoint_s: float, restart_s: float) -> float:
    """Goodput with checkpoints at the best interval.

    The best interval is searched around Young's, sqrt(2 c / f), which is exact for rare failures.

    Args:
        gaps: time between failures.
        costs: what a step costs.
        checkpoint_s: delay per checkpoint, in seconds.
        restart_s: duration of a restart, in seconds.
    """
    step_s = costs.full_step_s
    young = sqrt(2 * checkpoint_s * gaps.mean_s) / step_s
    intervals: Sequence[int] = sorted({max(1, ceil(young * factor)) for factor in (0.25, 0.5, 0.7, 0.85, 1, 1.2, 1.5)})
    return max(renewal_goodput(gaps, n * costs.step_s, n * step_s + checkpoint_s, restart_s) for n in intervals)


def _ours(job: Job, process_share: float, gaps: Gaps, nodes: int, *, in_place: bool) -> float:
    """Goodput of this package with the best mirror interval for this size."""
    sized = _with_nodes(job, nodes, in_place=in_place)
    recoveries = ((process_share, process_recovery_s(sized)), (1 - process_share, node_recovery_s(sized)))

    def ettr(interval: int) -> float:
        segment = replace(sized, choices=replace(sized.choices, mirror_every_n_steps=interval)).segment
        return sum(
            share * renewal_goodput(gaps, segment.useful_s, segment.total_s, recovery_s)
            for share, recovery_s in recoveries
        )

    return max(map(ettr, INTERVALS))


def _with_nodes(job: Job, nodes: int, *, in_place: bool) -> Job:
    cluster = Cluster(nodes, job.cluster.ranks_per_node, nodes, job.cluster.rack_nodes)
    return replace(job, cluster=cluster, choices=replace(job.choices, in_place=in_place))
