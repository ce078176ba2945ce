"""The job that is forecast: its cluster, the options under examination, and what steps and recoveries cost."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil
from typing import Protocol

import numpy as np

from lightning_ckptless.protocol.forecast.failure_model import Gaps, Incident, Repair

FAILURE_DOMAINS = ("node", "rack")


class Failures(Protocol):
    """The interface of failure models and failure traces."""

    @property
    def repair(self) -> Repair:
        """Duration of repairs."""

    @property
    def process_share(self) -> float:
        """Share of the failures that leave the node."""

    def gaps(self, nodes: int) -> Gaps:
        """The gaps between the incidents of a job on this many nodes."""

    def node_losses_per_s(self, nodes: int) -> float:
        """Nodes that the job loses per second."""

    def draw(self, generator: np.random.Generator, nodes: int, rack_nodes: int, horizon_s: float) -> list[Incident]:
        """Draw the incidents of one job."""


@dataclass(frozen=True, slots=True)
class Cluster:
    """The nodes of a job.

    Args:
        nodes: nodes that the job trains on.
        ranks_per_node: ranks on each of them.
        min_nodes: fewest nodes that the job continues on; equal to `nodes` if it is not elastic.
        rack_nodes: neighbouring nodes that share a rack, or whatever else fails as a whole.
    """

    nodes: int
    ranks_per_node: int
    min_nodes: int
    rack_nodes: int

    @property
    def ranks(self) -> int:
        """Number of ranks."""
        return self.nodes * self.ranks_per_node


@dataclass(frozen=True, slots=True)
class Choices:
    """The options that a recommendation may change.

    Args:
        mirror_every_n_steps: optimizer steps between mirrored versions.
        copies: replicas of each shard, in addition to the source rank's own copy.
        failure_domain: `node` or `rack`: where replicas of a shard may not be together.
        in_place: whether survivors stay in `fit`.
        standbys: processes per node that wait for a lost rank.
        spares: nodes that wait for a lost node.
        durable_every_s: seconds between durable states; None without durable states.
    """

    mirror_every_n_steps: int
    copies: int
    failure_domain: str
    in_place: bool
    standbys: int
    spares: int
    durable_every_s: float | None


@dataclass(frozen=True, slots=True)
class Costs:
    """What steps, versions and recoveries cost, all in seconds.

    A recovery lasts from the fault until the state is restored; the replayed steps are counted by the model.

    Args:
        step_s: step without mirroring and without waiting for its data.
        data_wait_s: how long a step waits for its data.
        version_s: additional duration of a step while a version is mirrored.
        in_place_s: recovery in place of a process.
        standby_s: the same with a standby.
        relaunch_s: recovery by relaunching all workers.
        join_s: recovery in which a spare node replaces a lost node.
        shrink_s: recovery in which the job continues without the lost nodes.
        grow_s: pause when a repaired node rejoins.
        durable_restore_s: reading a durable state, in addition to a relaunch.
        durable_stall_s: delay of training per durable state.
    """

    step_s: float
    version_s: float
    in_place_s: float
    standby_s: float
    relaunch_s: float
    join_s: float
    shrink_s: float
    grow_s: float
    durable_restore_s: float
    durable_stall_s: float
    data_wait_s: float = 0.0

    @property
    def full_step_s(self) -> float:
        """Seconds from one step to the next without mirroring."""
        return self.step_s + self.data_wait_s


@dataclass(frozen=True, slots=True)
class Segment:
    """What happens from one version to the next if there is no failure.

    Args:
        useful_s: productive time, in seconds.
        data_s: waiting for data.
        mirror_s: delay by the version.
        durable_s: delay by durable states, on average.
        per_durable: versions from one durable state to the next; 0 without durable states.
    """

    useful_s: float
    data_s: float
    mirror_s: float
    durable_s: float
    per_durable: int

    @property
    def total_s(self) -> float:
        """Duration, in seconds."""
        return self.useful_s + self.data_s + self.mirror_s + self.durable_s


@dataclass(frozen=True, slots=True)
class Job:
    """A job on a cluster with one choice of options."""

    cluster: Cluster
    choices: Choices
    costs: Costs

    @property
    def segment(self) -> Segment:
        """What happens from one version to the next."""
        steps, costs, every_s = self.choices.mirror_every_n_steps, self.costs, self.choices.durable_every_s
        plain = Segment(steps * costs.step_s, steps * costs.data_wait_s, costs.version_s, 0.0, 0)
        if every_s is None:
            return plain
        per_durable = max(1, ceil(every_s / plain.total_s))
        return replace(plain, durable_s=costs.durable_stall_s / per_durable, per_durable=per_durable)
