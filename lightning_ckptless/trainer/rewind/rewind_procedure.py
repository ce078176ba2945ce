"""Rewinding all ranks to an earlier version, in place: the same restoration as after a fault, without a rendezvous.

| Step | A fault in it leaves |
|---|---|
| a new generation, whose versions are never combined with those of the abandoned branch | the newest version |
| the version is restored, and batches are skipped if the plan requires it | the newest version |
| it is mirrored again, with what the skip has changed | the newest version |
| all other versions from it on are discarded, the newest one last | the newest version, or the restored one |

The request for the rewind is part of the newest version, so that the rewind is decided again after the fault.
"""

from __future__ import annotations

from lightning_ckptless.errors import StateMissingError
from lightning_ckptless.protocol.rewind import RewindPlan
from lightning_ckptless.protocol.versions import Complete, Version
from lightning_ckptless.replica.restore import choose
from lightning_ckptless.trainer.data.skipping import skip
from lightning_ckptless.trainer.data.training_data import TrainingData
from lightning_ckptless.trainer.recovery.restore_procedure import RestoreProcedure
from lightning_ckptless.trainer.recovery.version_fetch import fetch_version
from lightning_ckptless.trainer.rewind.rewinding import carried_out
from lightning_ckptless.trainer.session.running_fit import RunningFit
from lightning_ckptless.trainer.session.session import Session


class RewindProcedure:
    """Carries out the rewinds of one trainer.

    Args:
        session: session of this rank.
        data: data of the trainer.
        running: the fit.
        procedure: puts the version into this rank.
    """

    def __init__(self, session: Session, data: TrainingData, running: RunningFit, procedure: RestoreProcedure) -> None:
        self._session = session
        self._data = data
        self._running = running
        self._procedure = procedure

    def stop_if_due(self) -> None:
        """Called when this rank has completed its last step: decide on a rewind that was requested in it.

        Raises:
            GoBackError: all ranks go back.
            RewindError: they cannot, and the run must end.
            DivergenceError: replicas differ, and the run must end.
        """
        self._running.mirroring.stop_if_due(at_end=True)

    def carry_out(self, plan: RewindPlan) -> Version:
        """Go back to the version of a plan. All ranks call it together, between two steps.

        Returns:
            The version.

        Raises:
            StateMissingError: all replicas of a shard are damaged, in this version and in those before it.
            TransportError: a peer is lost.
        """
        session, mirroring = self._session, self._running.mirroring
        session.report.rewinding(plan)
        self._running.progress.restore()
        newest = mirroring.newest
        assert newest is not None, "a rewind is decided after the first version"
        mirroring.abandon()
        members = session.begin_generation(session.members.transport, session.members.nodes)
        session.world.renumber(members.generation)
        session.probe("rewind", plan.version)
        found = choose(members.arena, members.transport, members.nodes, newest=plan.version)
        if not isinstance(found, Complete):
            raise StateMissingError(f"rank {session.rank}: {plan.reason}: {found.reason}")
        restoration = fetch_version(
            session, self._data.virtual_ranks, found, found, goes_back=True, abandons_files=plan.is_answer
        )
        restoration.is_mirrored_next, state = True, restoration.host_state
        state["rewinds"] = carried_out(state["rewinds"], plan)
        skipped = 0
        if plan.skip_batches or plan.skip_to_batch:
            skipped = skip(state, plan.batches_to_skip, self._data.loops)
        # The batches in flight belong to the abandoned branch.
        self._running.batches.reset()
        self._running.progress.restore()
        version = self._procedure.apply(restoration, survivor=True)
        mirroring.go_back(version, newest)
        session.report.rewound(skipped)
        return version
