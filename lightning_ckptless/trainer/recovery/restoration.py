"""A version on its way from the arenas into a trainer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from lightning_ckptless.internals.lightning.loops import FitLoops
from lightning_ckptless.protocol.versions import Complete, Version
from lightning_ckptless.replica.layout.layout import Layout
from lightning_ckptless.replica.rereplicate import rereplicate
from lightning_ckptless.replica.restore import Fetched
from lightning_ckptless.trainer.commit.mirroring import Mirroring
from lightning_ckptless.trainer.data.hooks import DataHooks
from lightning_ckptless.trainer.data.position import move_data_to
from lightning_ckptless.trainer.data.virtual_ranks import VirtualRanks
from lightning_ckptless.trainer.reporting.report import Moved, RunReport
from lightning_ckptless.trainer.session.member_set import MemberSet
from lightning_ckptless.trainer.state.layout_tensors import fill_trainer
from lightning_ckptless.trainer.state.parameter_groups import restore_groups
from lightning_ckptless.trainer.state.rng import apply_rng
from lightning_ckptless.trainer.state.tensors import StateIndex, trained_alone


@dataclass
class Restoration:
    """A version that has been brought here, waiting for the trainer that takes it.

    Args:
        complete: the version, with its replicas.
        layout: how it is cut.
        bulks: tensor part of each shard.
        host_state: this rank's host state, with the accounts of the run.
        index: where its tensors are in the trainer; None until it is filled.
    """

    complete: Complete
    layout: Layout
    bulks: dict[int, Any]
    host_state: dict[str, Any]
    index: StateIndex | None = None

    @property
    def version(self) -> Version:
        """The version."""
        return self.complete.snapshot.version

    @property
    def state(self) -> dict[str, Any]:
        """The host state of the trainer."""
        state: dict[str, Any] = self.host_state["state"]
        return state

    def fill(self, trainer: Any, *, optimizers_hold: bool = False, index: StateIndex | None = None) -> None:
        """Put the tensors into the trainer.

        Args:
            trainer: its strategy is set up.
            optimizers_hold: whether the optimizers' state is that of the version already.
            index: where the trainer's tensors are, if it is known that they are those of the version's layout.
        """
        rank = trainer.global_rank
        restore_structure(trainer, self.state)
        self.index = fill_trainer(
            trainer, self.layout, self.bulks, rank=rank, optimizers_hold=optimizers_hold, index=index
        )

    def make_data(self, hooks: DataHooks, alone: Callable[[], AbstractContextManager[None]]) -> None:
        """Have the dataloaders be those of the version; the state is put in after it."""
        hooks.make_as(self.host_state["data_hooks"], alone)

    def move_data(self, loops: FitLoops) -> None:
        """Open the training data anew at the position of the version."""
        move_data_to(loops, self.state["data"])

    def open_streams(self, streams: VirtualRanks) -> None:
        """Say what there is to run, before the training data is opened."""
        streams.open(self.host_state["streams"])

    def move_streams(self, streams: VirtualRanks) -> None:
        """Have the streams beside this rank's own go on from the version; the training data is set up."""
        streams.move_to(self.host_state["streams"])

    def resume(self, mirroring: Mirroring, report: RunReport, members: MemberSet) -> None:
        """Protect the version beside training, and mirror from here on; the generators come last. All ranks call it."""
        assert self.index is not None
        self.index.refresh()

        def protect() -> None:
            report.protected(
                rereplicate(self.complete, members.arena, members.transport, members.nodes, members.placement)
            )

        report.resume(self.host_state["report"])
        mirroring.cadence.begin(self.host_state["interval"])
        mirroring.resume(self.version, self.layout, self.index, protect)
        apply_rng(self.state["rng"])


def restore_structure(trainer: Any, state: dict[str, Any]) -> None:
    """Have the parameter groups of a version, and know which parameters ranks have trained for themselves.

    Tensors of the optimizers are filled after that: a new process has no place for them before.
    """
    restore_groups(trainer, state["groups"])
    trained_alone(trainer).clear()
    trained_alone(trainer).update(state["trained_alone"])


def sum_over_ranks(fetched: Fetched, members: MemberSet) -> Moved:
    """Where a state came from, over all ranks. All call it together."""
    moved = members.gather([fetched.moved_bytes, fetched.sources])
    sources: Counter[str] = Counter()
    for _, of_rank in moved:
        sources.update(of_rank)
    return Moved(sum(moved_bytes for moved_bytes, _ in moved), dict(sources))
