"""A version on its way from the arenas into a trainer."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from lightning_ckptless.protocol.versions import Complete, Version
from lightning_ckptless.replica.arena import LEAST_SLOTS
from lightning_ckptless.replica.layout.layout import Layout
from lightning_ckptless.replica.rereplicate import rereplicate
from lightning_ckptless.replica.restore import Fetched
from lightning_ckptless.trainer.commit.mirroring import Mirroring
from lightning_ckptless.trainer.outputs.loggers import Captured
from lightning_ckptless.trainer.reporting.report import Moved
from lightning_ckptless.trainer.session.member_set import MemberSet
from lightning_ckptless.trainer.session.session import Session
from lightning_ckptless.trainer.state.added_modules import restore_modules
from lightning_ckptless.trainer.state.layout_tensors import fill_trainer
from lightning_ckptless.trainer.state.parameter_groups import restore_groups
from lightning_ckptless.trainer.state.rng import apply_rng
from lightning_ckptless.trainer.state.tensors import StateIndex, callback_modules, trained_alone


@dataclass
class Restoration:
    """A fetched version, ready to be put into a trainer.

    Args:
        complete: the version with its replicas.
        layout: layout of its tensors.
        bulks: tensor part of each shard.
        host_state: this rank's host state, including the accounts of the run.
        index: where the version's tensors are in the trainer; None until it is filled.
        host: the newest version in the arenas, the same unless it comes from the device tier; None if there is none.
        is_mirrored_next: whether it is mirrored again before anything else, so that no replica is missing.
    """

    complete: Complete
    layout: Layout
    bulks: dict[int, Any]
    host_state: dict[str, Any]
    host: Complete | None = None
    index: StateIndex | None = None
    is_mirrored_next: bool = False

    @property
    def version(self) -> Version:
        """The version."""
        return self.complete.snapshot.version

    @property
    def state(self) -> dict[str, Any]:
        """The host state of the trainer."""
        state: dict[str, Any] = self.host_state["state"]
        return state

    @property
    def logs(self) -> Captured | None:
        """The state of the loggers; None for a rank that has logged nothing."""
        logs: Captured | None = self.host_state["logs"]
        return logs

    def lacks_modules(self, trainer: Any) -> bool:
        """Return whether the version has modules of callbacks that this process does not have.

        These are then made by the start hooks of the fit.
        """
        restore_modules(trainer, self.state["added_modules"])
        there = tuple(f"{place}/" for place, _ in callback_modules(trainer))
        return not all(
            name.startswith(there) for name in self.layout.known_to(trainer.global_rank) if name.startswith("callback/")
        )

    def fill(self, trainer: Any, *, optimizers_hold: bool = False, index: StateIndex | None = None) -> None:
        """Put the tensors into the trainer.

        Args:
            trainer: trainer whose strategy is set up.
            optimizers_hold: whether the optimizers already hold the version's state.
            index: where the trainer's tensors are, if they are known to match the version's layout.
        """
        rank = trainer.global_rank
        restore_structure(trainer, self.state)
        self.index = fill_trainer(
            trainer, self.layout, self.bulks, rank=rank, optimizers_hold=optimizers_hold, index=index
        )

    def resume(self, session: Session, mirroring: Mirroring) -> None:
        """Resume mirroring, and rereplicate the version in the background. All ranks call it.

        The random number generators are restored last, because everything before may draw from them.
        """
        assert self.index is not None
        self.index.refresh()
        report, members, host = session.report, session.members, self.host

        def protect() -> None:
            if host is None:
                return
            report.protected(
                rereplicate(
                    host,
                    members.arena,
                    members.transport,
                    members.nodes,
                    members.placement,
                    slots=session.options.history + LEAST_SLOTS,
                )
            )

        report.resume(self.host_state["report"])
        mirroring.mirror_interval.begin(self.host_state["interval"])
        mirroring.resume(
            self.version,
            self.layout,
            self.index,
            None if self.is_mirrored_next else protect,
            None if host is None else host.snapshot.version,
        )
        apply_rng(self.state["rng"])


def restore_structure(trainer: Any, state: dict[str, Any]) -> None:
    """Restore a version's modules of callbacks, parameter groups, and set of parameters trained on single ranks.

    The optimizers' tensors are filled afterwards: a new process has no parameter groups for them before.
    """
    restore_modules(trainer, state["added_modules"])
    restore_groups(trainer, state["groups"])
    trained_alone(trainer).clear()
    trained_alone(trainer).update(state["trained_alone"])


def sum_over_ranks(fetched: Fetched, members: MemberSet) -> Moved:
    """Sum over all ranks where a state came from. All ranks call it together."""
    moved = members.gather([fetched.moved_bytes, fetched.sources])
    sources: Counter[str] = Counter()
    for _, of_rank in moved:
        sources.update(of_rank)
    return Moved(sum(moved_bytes for moved_bytes, _ in moved), dict(sources))
