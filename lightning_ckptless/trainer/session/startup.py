"""The start of a generation: gathers the states it could resume from, and lets the protocol choose one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lightning_ckptless.options import CkptlessOptions
from lightning_ckptless.protocol.durable_schedule import DurableState
from lightning_ckptless.protocol.startup import CheckpointFile, Left, Start, StartPlan, plan_start
from lightning_ckptless.protocol.versions import Complete, Missing
from lightning_ckptless.replica.restore import choose
from lightning_ckptless.trainer.commit.durable import DurableRung
from lightning_ckptless.trainer.outputs.checkpoint_files import newest_checkpoint, step_of
from lightning_ckptless.trainer.session.member_set import MemberSet


@dataclass(frozen=True)
class Sources:
    """States outside the arenas that a generation could resume from.

    Args:
        rung: reads durable states.
        states: durable states that all ranks can read, newest first.
        ckpt_path: checkpoint file that the script passed to `fit`.
        logs_are_named: whether the loggers' run folders are known from an earlier start.
    """

    rung: DurableRung
    states: list[DurableState]
    ckpt_path: str | None
    logs_are_named: bool


def decide_start(
    trainer: Any, members: MemberSet, options: CkptlessOptions, sources: Sources, *, relaunched: bool
) -> tuple[StartPlan, Complete | Missing]:
    """Decide what a generation starts from, and bring it into the arenas. All ranks call it together.

    Args:
        trainer: the trainer.
        members: the member set.
        options: the user's settings.
        sources: states outside the arenas.
        relaunched: whether this generation follows another one of the same start.

    Returns:
        The plan, and what the arenas now contain.
    """
    found = choose(members.arena, members.transport, members.nodes)
    is_lost = sources.logs_are_named and not isinstance(found, Complete)
    file, asked = newest_checkpoint(trainer) if is_lost else None, sources.ckpt_path
    # Files are read for their step only if there is more than one state to choose from.
    file_step, asked_step = members.gather([step_of(p) if p and sources.states else None for p in (file, asked)])[0]
    start = Start(
        generation=members.generation,
        world_size=members.world_size,
        relaunched=relaunched,
        had_commit=members.noted.committed is not None,
        asked=None if asked is None else CheckpointFile(asked, asked_step),
        origin=members.noted.origin,
        on_unrecoverable=options.on_unrecoverable,
    )
    states, damaged = list(sources.states), tuple[str, ...]()
    while True:
        newest = None if file is None else CheckpointFile(file, file_step)
        plan = plan_start(start, found, Left(states[0] if states else None, newest, damaged))
        if plan.state is None:
            return plan, found
        brought = sources.rung.bring(plan.state, members)
        if isinstance(brought, Complete):
            return plan, brought
        damaged = (*damaged, brought)
        states.pop(0)
