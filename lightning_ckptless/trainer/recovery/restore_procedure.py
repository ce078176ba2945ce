"""Putting a fetched version into a rank: one order for every process, whether it survived a fault or is new.

| | survivor | replacement | new, like all others |
|---|---|---|---|
| start hooks of a fit | not called | called before it joins the others | called once its tensors are in place |
| tensors | those that its optimizers do not hold | all | all |
| dataloaders | remade if they differ from the version's | the same | the same |
| training data | replays the batches in flight, if it can | moved | moved |
| progress bar | moved back | drawn afresh | drawn afresh |

All but the first and last row follow from the state of the process: a new one holds no optimizer state, no batches in
flight and no known layout. After a change of ranks the local state belongs to the previous rank, so nothing of it is
kept, and all ranks reopen their data.

If the start hooks make modules of callbacks, their tensors have no place before: the hooks are then called first.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

from lightning_ckptless.internals.lightning import progress_bar
from lightning_ckptless.protocol.versions import Version
from lightning_ckptless.trainer.data.position import move_data_to
from lightning_ckptless.trainer.data.training_data import TrainingData
from lightning_ckptless.trainer.recovery.restoration import Restoration
from lightning_ckptless.trainer.session.running_fit import RunningFit
from lightning_ckptless.trainer.session.session import Session

StartHooks = Callable[[], None]
"""Runs the hooks of a starting fit."""


class RestoreProcedure:
    """Puts versions into one trainer, its dataloaders and its loggers.

    Args:
        session: session of this rank.
        data: data of the trainer.
        running: the fit.
        alone: context in which Lightning's collectives do not wait for other ranks.
    """

    def __init__(
        self,
        session: Session,
        data: TrainingData,
        running: RunningFit,
        alone: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._session = session
        self._data = data
        self._running = running
        self._alone = alone

    def apply(
        self,
        restoration: Restoration,
        *,
        survivor: bool,
        moved: bool = False,
        start_hooks: StartHooks | None = None,
    ) -> Version:
        """Put a version into this rank and resume mirroring. All ranks call it together.

        Args:
            restoration: the version.
            survivor: whether this process has trained before.
            moved: whether any process has changed its rank.
            start_hooks: the start hooks of the fit; None if they have run, or are not to be called.

        Returns:
            The version.
        """
        session, mirroring, rank_state = self._session, self._running.mirroring, self._running.rank_state
        version = restoration.version
        if start_hooks is not None and restoration.lacks_modules(session.trainer):
            start_hooks()
            start_hooks = None
        restoration.fill(
            session.trainer,
            optimizers_hold=mirroring.optimizers_hold(version) and not moved,
            index=mirroring.index_of(restoration.layout),
        )
        if start_hooks is not None:
            rank_state.host_state.apply(restoration.state, with_settings=False)
            start_hooks()
        self._data.hooks.make_as(restoration.host_state["data_hooks"], self._alone)
        rank_state.host_state.apply(restoration.state)
        self._running.rewinding.restore(restoration.host_state["rewinds"])
        session.loggers.restore(restoration.logs)
        self._move_data(restoration, moved=moved)
        self._running.boundaries.last = version
        progress_bar.show_position(session.trainer, afresh=not survivor)
        restoration.resume(session, mirroring)
        return version

    def _move_data(self, restoration: Restoration, *, moved: bool) -> None:
        """Move the training data to the version; its dataloaders exist."""
        loops, virtual_ranks, batches = self._data.loops, self._data.virtual_ranks, self._running.batches
        saved = restoration.host_state["virtual_ranks"]
        if moved:
            self._data.reopen()
        elif virtual_ranks.opened_for != virtual_ranks.count:
            self._data.reopen_training_data()
        virtual_ranks.open(saved)
        if moved or not batches.go_back_to(restoration.version):
            loops.set_sampler_epochs()
            move_data_to(loops, restoration.state["data"])
            batches.reset()
        virtual_ranks.move_to(saved)
