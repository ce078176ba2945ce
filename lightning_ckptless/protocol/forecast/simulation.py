"""A discrete-event simulation of a job: what a sequence of incidents does to it.

The job follows the rules of the protocol. Replicas are placed by `placement`, the kind of recovery is chosen by
`recovery`, and a loss that memory does not cover leads to the newest durable state or to the start of the job:

    training | incident | wait for a node | recovery | training
                                            ^ another incident here starts the recovery again

A lost node is replaced by a spare. Without a spare the job continues on fewer nodes if it is elastic, and waits for a
repaired node if it is not. A repaired node fills a vacancy, or becomes a spare.

The simulation is a function of its incidents; all randomness is in them. It skips from one incident to the next, and
counts the versions in between by division.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from heapq import heappop, heappush, nsmallest

from lightning_ckptless.protocol.forecast.coverage import Coverage
from lightning_ckptless.protocol.forecast.failure_model import Incident
from lightning_ckptless.protocol.forecast.job import Job
from lightning_ckptless.protocol.recovery import Rung, Situation, plan_recovery


class Bucket(StrEnum):
    """Where the time of a job goes."""

    TRAINING = "training"
    DATA_WAIT = "data_wait"
    MIRROR_STALL = "mirror_stall"
    CHECKPOINT_WAIT = "checkpoint_wait"
    RECOVERY = "recovery"
    REPLAY = "replay"
    ELASTIC_TRANSITION = "elastic_transition"
    FEWER_NODES = "fewer_nodes"
    NODE_WAIT = "node_wait"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What happened to one simulated job.

    Args:
        spent_s: seconds by bucket; they sum to the duration of the job.
        incidents: incidents that hit the job.
        uncovered: losses that memory did not cover.
        first_uncovered_s: instant of the first of them; None if there was none.
    """

    spent_s: Mapping[Bucket, float]
    incidents: int
    uncovered: int
    first_uncovered_s: float | None

    @property
    def wall_s(self) -> float:
        """Duration of the job, in seconds."""
        return sum(self.spent_s.values())

    @property
    def ettr(self) -> float:
        """Effective training time ratio: productive time divided by wall time."""
        return self.spent_s[Bucket.TRAINING] / self.wall_s


def simulate(job: Job, incidents: Iterable[Incident], horizon_s: float, coverage: Coverage | None = None) -> Outcome:
    """Run a job through its incidents.

    Args:
        job: the job.
        incidents: incidents in chronological order.
        horizon_s: duration of the job, in seconds.
        coverage: coverage of the job's choices, to be shared by several simulations; None to make it.
    """
    run = _Run(job, coverage or Coverage(job.cluster, job.choices))
    for incident in incidents:
        run.repair_until(incident.at_s)
        run.fail(incident)
    run.repair_until(horizon_s)
    return run.end(horizon_s)


class _Run:
    """The state of a simulated job. Instants and durations are in seconds."""

    def __init__(self, job: Job, coverage: Coverage) -> None:
        self._job, self._coverage = job, coverage
        self._segment = job.segment
        self._full_s = self._segment.total_s
        self._spent = dict.fromkeys(Bucket, 0.0)
        self._now = 0.0
        self._wait_until = self._up_from = 0.0
        self._pause = Bucket.RECOVERY
        self._up_s = 0.0
        self._partial_s = 0.0
        self._versions = 0
        self._spares = job.choices.spares
        self._vacant = set[int]()
        self._repairs = list[float]()
        self._unprotected = set[int]()
        self._tries = 0
        self._recovery_s = 0.0
        self._was_in_place = self._from_durable = False
        self._incidents = self._uncovered = 0
        self._first_uncovered: float | None = None

    # ------------------------------------------------------------------ time

    def _advance(self, until: float) -> None:
        """Let time pass: waiting for a node, then the recovery, then training."""
        self._spend(Bucket.NODE_WAIT, min(until, self._wait_until))
        self._spend(self._pause, min(until, self._up_from))
        if until <= self._now:
            return
        self._up_s += until - self._now
        self._partial_s += until - self._now
        self._now = until
        segment_s = self._full_s / self._share
        count = int(self._partial_s / segment_s)
        if count:
            self._commit(count)
            self._partial_s = max(0.0, self._partial_s - count * segment_s)

    def _spend(self, bucket: Bucket, until: float) -> None:
        if until > self._now:
            self._spent[bucket] += until - self._now
            self._now = until

    def _commit(self, count: float) -> None:
        """Count versions, each at the end of its segment."""
        segment, spent = self._segment, self._spent
        spent[Bucket.TRAINING] += count * segment.useful_s
        spent[Bucket.DATA_WAIT] += count * segment.data_s
        spent[Bucket.MIRROR_STALL] += count * segment.mirror_s
        spent[Bucket.CHECKPOINT_WAIT] += count * segment.durable_s
        if self._vacant and count:
            spent[Bucket.FEWER_NODES] += count * self._full_s * (1 / self._share - 1)
        self._versions += int(count)
        self._unprotected.clear()
        self._from_durable = False

    @property
    def _share(self) -> float:
        """Nodes that train, as a share of all nodes of the job; the global batch stays the same."""
        return 1 - len(self._vacant) / self._job.cluster.nodes

    # ------------------------------------------------------------------ nodes

    def repair_until(self, until: float) -> None:
        """Take back the nodes whose repair ends by an instant."""
        while self._repairs and self._repairs[0] <= until:
            at = heappop(self._repairs)
            self._advance(at)
            if not self._vacant:
                self._spares += 1
            elif self._now < self._up_from or self._now < self._wait_until:
                # The recovery under way includes the node.
                self._vacant.pop()
            else:
                self._grow()

    def _grow(self) -> None:
        """A repaired node joins while the others train; they finish the step in flight."""
        done = self._partial_s / (self._full_s / self._share)
        self._vacant.pop()
        partial_s = done * self._full_s / self._share
        self._spent[Bucket.FEWER_NODES] += self._partial_s - partial_s
        self._partial_s = partial_s
        self._pause, self._wait_until = Bucket.ELASTIC_TRANSITION, self._now
        self._up_from = self._now + self._job.costs.grow_s

    # ------------------------------------------------------------------ incidents

    def fail(self, incident: Incident) -> None:
        """Lose a process or nodes."""
        lost = [node for node in dict.fromkeys(incident.nodes) if node not in self._vacant]
        if incident.nodes and not lost:
            return
        self._incidents += 1
        self._advance(incident.at_s)
        was_up = self._now >= self._up_from
        self._spent[Bucket.REPLAY] += self._partial_s
        self._partial_s = 0.0
        absent = self._vacant - self._unprotected
        self._unprotected.update(lost)
        if not self._from_durable and not self._coverage.covers(self._unprotected, absent):
            self._lose_memory()
        if was_up:
            unfinished = self._was_in_place and self._up_s < self._job.costs.full_step_s
            self._tries, self._recovery_s = (self._tries + 1 if unfinished else 0), 0.0
        self._replace(lost, incident.repairs_s)
        self._recover(bool(lost))

    def _lose_memory(self) -> None:
        """Roll back to the newest durable state, or to the start of the job."""
        self._uncovered += 1
        self._first_uncovered = self._now if self._first_uncovered is None else self._first_uncovered
        segment, spent = self._segment, self._spent
        every = segment.per_durable
        kept = self._versions // every * every if every else 0
        count, self._versions = self._versions - kept, kept
        spent[Bucket.TRAINING] -= count * segment.useful_s
        spent[Bucket.DATA_WAIT] -= count * segment.data_s
        spent[Bucket.MIRROR_STALL] -= count * segment.mirror_s
        spent[Bucket.CHECKPOINT_WAIT] -= count * segment.durable_s
        spent[Bucket.REPLAY] += count * self._full_s
        self._from_durable = True

    def _replace(self, lost: Sequence[int], repairs_s: Sequence[float]) -> None:
        for node, repair_s in zip(lost, repairs_s, strict=False):
            heappush(self._repairs, self._now + repair_s)
            if self._spares:
                self._spares -= 1
            else:
                self._vacant.add(node)

    def _recover(self, lost_nodes: bool) -> None:
        """Plan the recovery. It begins once there are enough nodes."""
        cluster, costs = self._job.cluster, self._job.costs
        missing = cluster.min_nodes - (cluster.nodes - len(self._vacant))
        self._wait_until = nsmallest(missing, self._repairs)[-1] if missing > 0 else self._now
        rung = _rung(lost_nodes, cluster.ranks_per_node, cluster.ranks, self._job.choices.in_place, self._tries)
        if self._from_durable:
            own_s = costs.relaunch_s + costs.durable_restore_s
        elif rung is Rung.RELAUNCH:
            own_s = costs.relaunch_s
        elif lost_nodes:
            own_s = 0.0
        else:
            own_s = costs.standby_s if self._job.choices.standbys else costs.in_place_s
        if lost_nodes:
            own_s = max(own_s, costs.shrink_s if self._vacant and missing <= 0 else costs.join_s)
        self._was_in_place = rung is Rung.IN_PLACE and not self._from_durable
        self._recovery_s = max(self._recovery_s, own_s)
        self._up_from, self._up_s = self._wait_until + self._recovery_s, 0.0
        self._pause = Bucket.RECOVERY

    def end(self, horizon_s: float) -> Outcome:
        """Close the account. The segment in progress counts as far as it has come."""
        self._advance(horizon_s)
        self._commit(self._partial_s * self._share / self._full_s)
        return Outcome(self._spent, self._incidents, self._uncovered, self._first_uncovered)


@cache
def _rung(lost_nodes: bool, ranks_per_node: int, ranks: int, in_place: bool, tries: int) -> Rung:
    """The kind of recovery by the rules of the protocol."""
    lost = tuple(range(ranks_per_node if lost_nodes else 1))
    now = Situation(lost, ranks, None, None, in_place, None, {}, tries)
    return plan_recovery(now).rung
