"""One attempt to recover in place: this rank joins the others in a new generation and restores a version with them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass
from typing import Any

from lightning_ckptless.membership.worker.watcher import Assignment, Watcher
from lightning_ckptless.protocol.messages import CreatedGroup, Message, Regrouped
from lightning_ckptless.protocol.replacement_startup import Arrival
from lightning_ckptless.protocol.versions import Complete, Tier, Version
from lightning_ckptless.replica.restore import choose
from lightning_ckptless.replica.transport import gather_json
from lightning_ckptless.trainer.commit.step_stamps import last_begun
from lightning_ckptless.trainer.data.training_data import TrainingData
from lightning_ckptless.trainer.recovery.own_process import THIS_PROCESS, CannotRecoverInPlaceError, OwnProcess
from lightning_ckptless.trainer.recovery.restoration import Restoration
from lightning_ckptless.trainer.recovery.restore_procedure import RestoreProcedure
from lightning_ckptless.trainer.session.running_fit import RunningFit
from lightning_ckptless.trainer.session.session import Session

Fetch = Callable[[Complete, Complete | None], Restoration]
"""Fetches a version to this rank, given the newest one in the arenas as well. All ranks call it together."""


@dataclass(frozen=True, slots=True)
class RegroupResult:
    """What the ranks have exchanged after regrouping.

    Args:
        moved: whether any process has changed its rank.
        arrivals: startup figures of the new processes.
    """

    moved: bool
    arrivals: list[Arrival]


class Regrouping:
    """Regroups with the other ranks and restores a version, in any number of attempts.

    Args:
        strategy: strategy of the trainer.
        session: session of this rank.
        data: data of the trainer.
        running: the fit.
        fetch: fetches the version.
        procedure: puts it into this rank.
        watcher: listens to our agent; None under an external agent, or with a single rank.
        process: this process.
    """

    def __init__(
        self,
        strategy: Any,
        session: Session,
        data: TrainingData,
        running: RunningFit,
        fetch: Fetch,
        procedure: RestoreProcedure,
        watcher: Watcher | None,
        process: OwnProcess = THIS_PROCESS,
    ) -> None:
        self._strategy = strategy
        self._session = session
        self._data = data
        self._running = running
        self._fetch = fetch
        self._procedure = procedure
        self._watcher = watcher
        self._process = process
        self._arrival: Arrival | None = None

    def report_arrival(self, arrival: Arrival) -> None:
        """Report the startup figures of this process in the first regrouping that it takes part in."""
        self._arrival = arrival

    def regroup(self, assignment: Assignment) -> RegroupResult:
        """Leave the ended generation and form the next one.

        Args:
            assignment: the rendezvous, and the rank of this process from now on.

        Raises:
            CannotRecoverInPlaceError: this process has not run all hooks of a starting fit, or the script has process
                groups that cannot be re-created.
            TransportError: not all ranks arrived, or another fault was reported.
        """
        session, world = self._session, self._session.world
        session.report.faulted(assignment)
        self._running.progress.interrupt()
        self._adopt_rank(assignment.env)
        self._running.mirroring.abandon()
        if not self._running.has_started:
            # They may have been interrupted halfway, and a survivor does not call them.
            raise CannotRecoverInPlaceError("the fault occurred before this rank had run the start hooks of `fit`")
        if foreign := world.foreign_groups():
            raise CannotRecoverInPlaceError(
                f"the script has created {foreign} process groups of its own, which cannot be re-created"
            )
        self._probe("regroup")
        world.leave()
        if self._watcher is not None:
            self._watcher.release()
        self._strategy.rejoin(
            assignment.number,
            lambda: self._watcher is not None and self._watcher.is_over,
            lambda: self._probe("connect"),
        )
        # The agent names a rank that has created fewer groups than the others, which wait for it.
        self._tell(CreatedGroup(assignment.number, 1))
        transport, nodes = session.connect()
        self._tell(CreatedGroup(assignment.number, 2))
        arrival, self._arrival = self._arrival, None
        facts: list[Any] = [self._data.has_moved, None if arrival is None else astuple(arrival)]
        has_moved, arrivals = zip(*gather_json(transport, facts), strict=True)
        members = session.begin_generation(transport, nodes)
        world.renumber(members.generation)
        session.loggers.identify_as_noted(members)
        return RegroupResult(any(has_moved), [Arrival(*figures) for figures in arrivals if figures is not None])

    def restore(self, assignment: Assignment, ranks: RegroupResult, *, survivor: bool) -> Version:
        """Restore the newest complete version together with the ranks that have regrouped.

        Args:
            assignment: their rendezvous.
            ranks: what they have exchanged.
            survivor: whether this process has trained before.

        Raises:
            CannotRecoverInPlaceError: there is no complete version.
            TransportError: another rank was lost.
        """
        session, progress = self._session, self._running.progress
        progress.restore()
        self._tell(Regrouped(assignment.number))
        session.durable.assign_writer(session.members)
        session.report.regrouped(ranks.arrivals)
        found, host = self._choose()
        progress.restore()
        restoration = self._fetch(found, host)
        progress.restore()
        self._probe("restore")
        return self._procedure.apply(restoration, survivor=survivor, moved=ranks.moved)

    def _choose(self) -> tuple[Complete, Complete | None]:
        """The newest complete version, and the newest one in the arenas, which may be older."""
        arena, members, device = self._session.arena, self._session.members, self._session.device_tier
        transport, nodes = members.transport, members.nodes
        found = choose(arena, transport, nodes, device=() if device is None else device.offer(transport, nodes))
        if not isinstance(found, Complete):
            raise CannotRecoverInPlaceError(found.reason)
        if all(replica.tier is Tier.HOST for replicas in found.replicas for replica in replicas):
            return found, found
        host = choose(arena, transport, nodes)
        return found, host if isinstance(host, Complete) else None

    def _adopt_rank(self, env: Mapping[str, str]) -> None:
        """Adopt the rank that the agent assigns; does nothing if this process already has it.

        Args:
            env: environment variables that define the rank.
        """
        trainer = self._session.trainer
        before = trainer.global_rank, trainer.world_size
        self._process.env.update(env)
        if (trainer.global_rank, trainer.world_size) == before:
            return
        self._strategy.set_world_ranks()
        place, places, _ = self._strategy.place_among_virtual_ranks()
        self._data.move_to(place, places)
        self._session.loggers.hold(self._session.arena.path)

    def _tell(self, message: Message) -> None:
        if self._watcher is not None:
            self._watcher.send(message)

    def _probe(self, moment: str) -> None:
        """Notify the probes of a moment; they receive the last step begun before it."""
        self._session.probe(moment, Version(last_begun(self._session.arena.path), False))
