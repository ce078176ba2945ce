"""Jobs for tests of the forecast, with round numbers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lightning_ckptless.protocol.forecast.job import Choices, Cluster, Costs, Job

HOUR_S = 3600.0
DAY_S = 86400.0

CHOICES = Choices(
    mirror_every_n_steps=1,
    copies=1,
    failure_domain="node",
    in_place=True,
    standbys=0,
    spares=0,
    durable_every_s=None,
)
COSTS = Costs(
    step_s=10.0,
    version_s=0.0,
    in_place_s=2.0,
    standby_s=1.0,
    relaunch_s=20.0,
    join_s=30.0,
    shrink_s=15.0,
    grow_s=3.0,
    durable_restore_s=100.0,
    durable_stall_s=0.0,
)


def job_of(nodes: int = 8, *, min_nodes: int | None = None, rack_nodes: int = 4, **changes: Any) -> Job:
    """A job whose choices and costs differ from the usual ones by some values."""
    of_choices = {name: value for name, value in changes.items() if hasattr(CHOICES, name)}
    of_costs = {name: value for name, value in changes.items() if name not in of_choices}
    cluster = Cluster(nodes, 8, min_nodes or nodes, rack_nodes)
    return Job(cluster, replace(CHOICES, **of_choices), replace(COSTS, **of_costs))
