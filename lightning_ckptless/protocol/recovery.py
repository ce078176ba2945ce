"""The ladder: how far down a fault makes a run go, and what a worker may do next.

The rung is chosen by a cascade, from what ends the run to what costs the least:

| Fault | And | Then |
|---|---|---|
| a worker says that another try would end alike | | end |
| no recovery is left | | end |
| recovery in place is switched off | | relaunch |
| a worker cannot be told, or says that it cannot go on in place | | relaunch |
| no worker survives | | relaunch |
| a rank is not in the training loop | | relaunch |
| recovery in place was tried twice, the ranks have met, and no step was made since | | relaunch |
| | | in place |

What a relaunch starts from, the arenas or a checkpoint file, is decided when it starts (`start.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from lightning_ckptless.errors import ProtocolError
from lightning_ckptless.protocol.crash_loop import Stage

TRIES_IN_PLACE = 2
"""Tries without a step in between, after which the next rung is taken."""


class Rung(StrEnum):
    """A rung of the ladder."""

    IN_PLACE = "in place"
    RELAUNCH = "relaunch"
    END = "end"


@dataclass(frozen=True, slots=True)
class Situation:
    """What an agent knows when workers of its node were lost.

    Args:
        lost: their ranks.
        world_size: number of ranks.
        final: why a worker says that another try would end alike; None where none does.
        exhausted: why the run may not recover once more; None where it may.
        in_place: whether survivors may go on in place.
        obstacle: why a worker cannot go on in place, in its own words; None where none said so.
        outside: ranks of this node that are not in the training loop, with where they are.
        tries: recoveries in place since the last step that was made, of those in which the ranks have met.
    """

    lost: tuple[int, ...]
    world_size: int
    final: str | None
    exhausted: str | None
    in_place: bool
    obstacle: str | None
    outside: Mapping[int, Stage]
    tries: int


@dataclass(frozen=True, slots=True)
class RecoveryPlan:
    """A rung, and why."""

    rung: Rung
    reason: str


def plan_recovery(now: Situation) -> RecoveryPlan:
    """Choose the rung."""
    lost = _ranks(now.lost)
    if now.final is not None:
        return RecoveryPlan(Rung.END, f"not relaunched: {now.final}")
    if now.exhausted is not None:
        return RecoveryPlan(Rung.END, now.exhausted)
    if not now.in_place:
        return RecoveryPlan(Rung.RELAUNCH, "recovery in place is switched off")
    if now.obstacle is not None:
        return RecoveryPlan(Rung.RELAUNCH, f"not in place: {now.obstacle}")
    if len(now.lost) >= now.world_size:
        return RecoveryPlan(Rung.RELAUNCH, f"none of {now.world_size} ranks survives")
    if now.outside:
        return RecoveryPlan(Rung.RELAUNCH, f"not in place: {_whereabouts(now.outside)}")
    if now.tries >= TRIES_IN_PLACE:
        return RecoveryPlan(Rung.RELAUNCH, f"recovery in place was tried {now.tries} times, and no step was made since")
    survivors = now.world_size - len(now.lost)
    return RecoveryPlan(Rung.IN_PLACE, f"{survivors} of {now.world_size} ranks go on, {lost} replaced")


def _whereabouts(outside: Mapping[int, Stage]) -> str:
    by_stage = {stage: tuple(rank for rank in sorted(outside) if outside[rank] is stage) for stage in Stage}
    return ", ".join(f"{_ranks(ranks)} {stage}" for stage, ranks in by_stage.items() if ranks)


def _ranks(ranks: tuple[int, ...]) -> str:
    names = ", ".join(str(rank) for rank in ranks)
    return f"rank {names} is" if len(ranks) == 1 else f"ranks {names} are"


class WorkerState(StrEnum):
    """Where a worker is, as far as recovery is concerned."""

    OUTSIDE = "outside"
    TRAINING = "training"
    CUT = "cut"
    REGROUPING = "regrouping"
    RESTORING = "restoring"
    ENDED = "ended"


class WorkerEvent(StrEnum):
    """What moves a worker from one state to the next."""

    ENTER = "enter"
    FAULT = "fault"
    ASSIGN = "assign"
    MEET = "meet"
    RESTORE = "restore"
    LEAVE = "leave"
    GIVE_UP = "give_up"


_S, _E = WorkerState, WorkerEvent
WORKER_TRANSITIONS: Mapping[WorkerState, Mapping[WorkerEvent, WorkerState]] = {
    _S.OUTSIDE: {_E.ENTER: _S.TRAINING, _E.ASSIGN: _S.REGROUPING},
    _S.TRAINING: {_E.FAULT: _S.CUT, _E.LEAVE: _S.OUTSIDE},
    _S.CUT: {_E.ASSIGN: _S.REGROUPING, _E.GIVE_UP: _S.ENDED},
    _S.REGROUPING: {_E.MEET: _S.RESTORING, _E.FAULT: _S.CUT, _E.GIVE_UP: _S.ENDED},
    _S.RESTORING: {_E.RESTORE: _S.TRAINING, _E.FAULT: _S.CUT, _E.GIVE_UP: _S.ENDED},
    _S.ENDED: {},
}
"""What a worker may do next: any other event is a bug of ours."""


def next_state(state: WorkerState, event: WorkerEvent) -> WorkerState:
    """The state that an event leads to.

    Raises:
        ProtocolError: the table has no such transition.
    """
    if event not in WORKER_TRANSITIONS[state]:
        expected = ", ".join(WORKER_TRANSITIONS[state]) or "nothing"
        raise ProtocolError(f"a worker that is {state} met {event}, expected {expected}")
    return WORKER_TRANSITIONS[state][event]
