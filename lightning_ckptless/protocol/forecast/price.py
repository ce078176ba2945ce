"""What lost time and copies cost: money by bucket, and memory per node."""

from __future__ import annotations

from lightning_ckptless.protocol.forecast.failure_model import SECONDS_PER_HOUR
from lightning_ckptless.protocol.forecast.job import Job
from lightning_ckptless.protocol.forecast.simulation import Bucket
from lightning_ckptless.protocol.forecast.summary import Summary

SPARE_NODES = "spare_nodes"
_SLOTS = 2


def lost_money(found: Summary, job: Job, price: float | None) -> dict[str, float] | None:
    """Money lost per job, by bucket; waiting spare nodes are a separate bucket.

    A failed node is paid for like a spare until its repair ends.

    Args:
        found: simulated jobs.
        job: the job.
        price: price of a rank for an hour; None without money.
    """
    if price is None:
        return None
    per_s = price * job.cluster.ranks / SECONDS_PER_HOUR
    lost = {str(bucket): per_s * spent_s for bucket, spent_s in found.spent_s.items() if bucket is not Bucket.TRAINING}
    wall_s = sum(found.spent_s.values())
    return lost | {SPARE_NODES: per_s * wall_s * job.choices.spares / job.cluster.nodes}


def arena_bytes_per_node(job: Job, state_bytes: float | None, copies: int | None = None) -> float | None:
    """Shared memory that the slots of a node need, in bytes; None if the size of the state is unknown.

    Args:
        job: the job.
        state_bytes: size of the state of all ranks.
        copies: replicas of each shard; None for those of the job.
    """
    if state_bytes is None:
        return None
    copies = job.choices.copies if copies is None else copies
    return _SLOTS * (1 + copies) * state_bytes / job.cluster.nodes
