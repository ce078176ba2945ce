"""Workers that stay in the training loop when nodes leave or join.

The nodes rendezvous again, as torch elastic requires, but the workers are not stopped for it. Joining workers reach the
training loop on their own while the others continue to train. Once they wait there, the training workers receive their
new ranks. This costs one step, and the time for the ranks to regroup. `protocol/reconfiguration.py` decides which
workers stay, and when all are relaunched instead.

| Key | Written by | Content |
|---|---|---|
| `status/NODE` | every node, during the rendezvous | its status |
| `ready/NODE` | a node whose workers all wait at the training loop | |
| `outcome` | the first node whose workers are to regroup, or may leave the training loop | which of the two |

A fault brings all workers of the round together, even if not all have reached the training loop. So its agent settles
the outcome before it opens a regrouping: workers that may leave would not come to it, and the others would wait.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from datetime import timedelta
from enum import Enum, auto
from typing import Any, Protocol

from torch.distributed import DistError
from torch.distributed.distributed_c10d import Store

from lightning_ckptless.membership.agent.departure import Departure
from lightning_ckptless.membership.agent.fault_log import FaultLog
from lightning_ckptless.membership.agent.in_place import InPlaceRecovery, WorkerControl
from lightning_ckptless.membership.agent.positions import Positions
from lightning_ckptless.membership.rendezvous.regrouping import Regrouping
from lightning_ckptless.protocol.reconfiguration import MovePlan, NodeStatus, plan_move

_AGREE_S = 60.0
_STATUS = "ckptless/status/{}"
_READY = "ckptless/ready/{}"
_OUTCOME = "ckptless/outcome"
_JOIN, _OVER = "join", "over"


def publish_status(store: Any, status: NodeStatus, node: int) -> None:
    """Publish the status of a node, by its place in the order in which the nodes joined the round."""
    store.set(_STATUS.format(node), json.dumps(asdict(status)))


def agree(store: Any, status: NodeStatus, node: int, nodes: int) -> MovePlan:
    """Decide with the agents of all nodes whose workers stay.

    Args:
        store: the agents' store for this round.
        status: status of this node.
        node: its place in the order in which the nodes joined the round, which is not the order of their numbers.
        nodes: how many there are.
    """
    if nodes == 1:
        return plan_move([status])
    keys = [_STATUS.format(other) for other in range(nodes)]
    try:
        publish_status(store, status, node)
        store.wait(keys, timedelta(seconds=_AGREE_S))
        return plan_move([NodeStatus(**json.loads(store.get(key))) for key in keys])
    except DistError as error:
        # A node has left again, and those that stay would wait for it. Its absence is detected, and all nodes
        # rendezvous again.
        everyone = tuple(range(nodes))
        return MovePlan(everyone, (), everyone, 0, f"the nodes could not agree on which of them stay: {error}")


class JoinProgress(Enum):
    """How the regroup of workers that stay with those that join proceeds."""

    UNDER_WAY = auto()
    """Nothing to do: it is too early, or all is settled."""
    WITHOUT_US = auto()
    """The other nodes rendezvous again, and cannot complete that without this one."""
    TOO_LATE = auto()
    """The workers that this node's workers should have joined have left the training loop."""


class StayingWorkers(WorkerControl, Protocol):
    """What a reconfiguration needs of this node's workers; see `WorkerGroup`."""

    @property
    def all_train(self) -> bool:
        """Whether all workers run, are in the training loop and have not been allowed to leave it."""

    def pids(self) -> dict[int, int]:
        """Process ids by local rank."""


class Reconfiguration:
    """One node's part in the regroup of the nodes of a rendezvous round.

    Args:
        plan: which nodes keep their workers.
        node: number of this node.
        store: store that all workers of the round share.
        in_place: the recoveries in place of this node.
        faults: this node's faults.
        positions: positions of the round.
        departure: departure, in the previous round, of a drained node; None if none has.
    """

    def __init__(
        self,
        plan: MovePlan,
        node: int,
        store: Store,
        in_place: InPlaceRecovery,
        faults: FaultLog,
        positions: Positions,
        departure: Departure | None = None,
    ) -> None:
        self._plan = plan
        self._node = node
        self._store = store
        self._in_place = in_place
        self._faults = faults
        self._positions = positions
        self._departure = departure
        self._has_to_notify = False
        self._world_before = 0
        self._has_announced = False

    @property
    def stays(self) -> bool:
        """Whether this node's workers stay in the training loop."""
        return self._node in self._plan.stay

    @property
    def _joins(self) -> bool:
        return bool(self._plan.stay) and self._node in self._plan.come

    def keep_workers(self, world_before: int) -> None:
        """Record that the workers stay, and have yet to be notified of the regroup.

        Args:
            world_before: number of ranks until then.
        """
        self._has_to_notify, self._world_before = True, world_before

    @property
    def _have_regrouped(self) -> bool:
        return bool(self._plan.stay) and self._in_place.completed >= self._plan.number

    def obstacle(self) -> str:
        """Why the workers of this round cannot regroup after a fault; if they can, none leaves the loop before.

        Raises:
            DistError: the store is lost.
        """
        if not self._plan.stay or self._have_regrouped or self._settle_on(_JOIN) == _JOIN:
            return ""
        return "workers that stayed have been allowed to leave the training loop after the last step"

    def follow(self) -> None:
        """Record that a fault has brought the workers that stay and those that join together."""
        if self._has_to_notify and self._have_regrouped:
            self._has_to_notify = False
            self._positions.peers = self._plan.stay + self._plan.come

    def joined_regrouping(self, world_size: int) -> Regrouping | None:
        """Return the regrouping in which new workers of this node join the others; None if all start together.

        Args:
            world_size: number of ranks.
        """
        return Regrouping(self._plan.number, self._faults.of_change(world_size)) if self._joins else None

    def poll(self, workers: StayingWorkers) -> JoinProgress:
        """Advance the regroup.

        Args:
            workers: this node's workers.
        """
        if not self._plan.stay:
            return JoinProgress.UNDER_WAY
        try:
            if self._joins:
                return JoinProgress.TOO_LATE if self._comes_too_late(workers) else JoinProgress.UNDER_WAY
            is_apart = self._has_to_notify and not self._bring_together(workers)
        except DistError:
            # The store was lost with its node: the rendezvous detects that.
            return JoinProgress.UNDER_WAY
        return JoinProgress.WITHOUT_US if is_apart else JoinProgress.UNDER_WAY

    @property
    def is_too_late(self) -> bool:
        """Whether this node's workers join others that have left the training loop: a fault of theirs costs nothing."""
        try:
            return self._joins and not self._have_regrouped and self._is_over()
        except DistError:
            # The store was lost with its node: the rendezvous detects that.
            return False

    def may_end(self) -> bool:
        """Whether workers may leave: not before workers that restart are back, or once a regroup is settled."""
        if not self._has_to_notify:
            return True
        try:
            return not self._plan.restart and self._settle_on(_OVER) == _OVER
        except DistError:
            # The store was lost with its node: the rendezvous detects that.
            return False

    def _bring_together(self, workers: StayingWorkers) -> bool:
        """Notify workers that stay once joining ones wait at the loop; returns whether all nodes do the same."""
        all_train = workers.all_train
        if all_train and (not self._are_ready() or not self._has_departed()):
            return True
        settled = self._settle_on(_JOIN if all_train else _OVER)
        self._has_to_notify = False
        if all_train and settled == _JOIN:
            drained = "" if self._departure is None else self._departure.why()
            fault = self._faults.of_change(self._world_before, drained=drained)
            self._faults.add(fault)
            self._positions.peers = self._plan.stay + self._plan.come
            self._in_place.regroup(workers, self._plan.number, fault)
            self._faults.lost_at = 0.0
        return all_train or settled == _OVER

    def _has_departed(self) -> bool:
        """Whether the workers of a leaving node have exited; lets them hand over."""
        if self._departure is None:
            return True
        self._departure.note_ready()
        return self._departure.is_finished()

    def _settle_on(self, outcome: str) -> str:
        """Return the outcome, set by the first node whose workers are to regroup, or may leave the training loop."""
        settled: bytes = self._store.compare_set(_OUTCOME, "", outcome)
        return settled.decode()

    def _are_ready(self) -> bool:
        come = self._plan.come
        return not come or bool(self._store.check([_READY.format(node) for node in come]))

    def _comes_too_late(self, workers: StayingWorkers) -> bool:
        """Announce that all workers wait at the loop; returns whether the nodes they join have left it meanwhile."""
        if self._in_place.trains or self._have_regrouped:
            return False
        if not self._has_announced and self._in_place.waiting_at_loop >= set(workers.pids()):
            self._store.set(_READY.format(self._node), "1")
            self._has_announced = True
        return self._is_over()

    def _is_over(self) -> bool:
        return bool(self._store.check([_OUTCOME])) and self._store.get(_OUTCOME).decode() == _OVER
