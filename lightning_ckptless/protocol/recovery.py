"""Recovery: how a run recovers from a fault, and the states of a worker in a recovery.

The kind of recovery is chosen by the first row that applies, from ending the run to the cheapest recovery:

| Fault | And | Then |
|---|---|---|
| a worker reports that another attempt would fail in the same way | | end |
| no recovery is left | | end |
| recovery in place is disabled | | relaunch |
| a worker cannot be notified, or reports that it cannot recover in place | | relaunch |
| no worker survives | | relaunch |
| a rank is not in the training loop | | relaunch |
| two recoveries in place completed their rendezvous, and no step was completed since | | relaunch |
| | | in place |

What a relaunch starts from, the arenas or a checkpoint file, is decided when it starts (`startup.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from lightning_ckptless.errors import ProtocolError
from lightning_ckptless.protocol.crash_loop import Stage
from lightning_ckptless.protocol.wording import name_ranks

TRIES_IN_PLACE = 2
"""Recoveries in place without a completed step in between, after which the run is relaunched."""


class Rung(StrEnum):
    """A kind of recovery."""

    IN_PLACE = "in place"
    RELAUNCH = "relaunch"
    END = "end"


@dataclass(frozen=True, slots=True)
class Situation:
    """What an agent knows when workers of its node are lost.

    Args:
        lost: ranks of the lost workers.
        world_size: number of ranks.
        final: why another attempt would fail in the same way, as reported by a worker; None if none reported that.
        exhausted: why the run may not recover again; None if it may.
        in_place: whether recovery in place is enabled.
        obstacle: why a worker cannot recover in place, as reported by it; None if none reported that.
        outside: ranks of this node outside the training loop, and where they are.
        tries: recoveries in place since the last completed step, counting those that completed their rendezvous.
        handed_over: whether all lost workers have handed their ranks over, as planned.
    """

    lost: tuple[int, ...]
    world_size: int
    final: str | None
    exhausted: str | None
    in_place: bool
    obstacle: str | None
    outside: Mapping[int, Stage]
    tries: int
    handed_over: bool = False


@dataclass(frozen=True, slots=True)
class RecoveryPlan:
    """A kind of recovery and the reason for it."""

    rung: Rung
    reason: str


def plan_recovery(now: Situation) -> RecoveryPlan:
    """Choose the kind of recovery."""
    if now.final is not None:
        return RecoveryPlan(Rung.END, f"not relaunched: {now.final}")
    if now.exhausted is not None:
        return RecoveryPlan(Rung.END, now.exhausted)
    if not now.in_place:
        return RecoveryPlan(Rung.RELAUNCH, "recovery in place is disabled")
    if now.obstacle is not None:
        return RecoveryPlan(Rung.RELAUNCH, f"not in place: {now.obstacle}")
    if len(now.lost) >= now.world_size:
        return RecoveryPlan(Rung.RELAUNCH, f"none of {now.world_size} ranks survived")
    if now.outside:
        return RecoveryPlan(Rung.RELAUNCH, f"not in place: {_whereabouts(now.outside)}")
    if now.tries >= TRIES_IN_PLACE:
        return RecoveryPlan(
            Rung.RELAUNCH, f"recovery in place was tried {now.tries} times, and no step was completed since"
        )
    survivors = now.world_size - len(now.lost)
    which = f"replacing {name_ranks(now.lost)}"
    return RecoveryPlan(
        Rung.IN_PLACE,
        f"handing over: {survivors} of {now.world_size} ranks stay, {which}"
        if now.handed_over
        else f"recovering in place: {survivors} of {now.world_size} ranks survived, {which}",
    )


def _whereabouts(outside: Mapping[int, Stage]) -> str:
    by_stage = {stage: tuple(rank for rank in sorted(outside) if outside[rank] is stage) for stage in Stage}
    return ", ".join(f"{name_ranks(at)} {_be(at)} {stage}" for stage, at in by_stage.items() if at)


def _be(ranks: tuple[int, ...]) -> str:
    return "is" if len(ranks) == 1 else "are"


class WorkerState(StrEnum):
    """The state of a worker with respect to recovery."""

    OUTSIDE = "outside"
    TRAINING = "training"
    ABORTED = "aborted"
    REGROUPING = "regrouping"
    RESTORING = "restoring"
    ENDED = "ended"


class WorkerEvent(StrEnum):
    """An event that changes the state of a worker."""

    ENTER = "enter"
    FAULT = "fault"
    ASSIGN = "assign"
    JOIN = "join"
    RESTORE = "restore"
    LEAVE = "leave"
    GIVE_UP = "give_up"


_S, _E = WorkerState, WorkerEvent
WORKER_TRANSITIONS: Mapping[WorkerState, Mapping[WorkerEvent, WorkerState]] = {
    _S.OUTSIDE: {_E.ENTER: _S.TRAINING, _E.ASSIGN: _S.REGROUPING},
    _S.TRAINING: {_E.FAULT: _S.ABORTED, _E.LEAVE: _S.OUTSIDE},
    _S.ABORTED: {_E.ASSIGN: _S.REGROUPING, _E.GIVE_UP: _S.ENDED},
    _S.REGROUPING: {_E.JOIN: _S.RESTORING, _E.FAULT: _S.ABORTED, _E.GIVE_UP: _S.ENDED},
    _S.RESTORING: {_E.RESTORE: _S.TRAINING, _E.FAULT: _S.ABORTED, _E.GIVE_UP: _S.ENDED},
    _S.ENDED: {},
}
"""The allowed transitions; any other event is a bug in this package."""


def next_state(state: WorkerState, event: WorkerEvent) -> WorkerState:
    """The state after an event.

    Raises:
        ProtocolError: the event is not allowed in this state.
    """
    if event not in WORKER_TRANSITIONS[state]:
        expected = ", ".join(WORKER_TRANSITIONS[state]) or "nothing"
        raise ProtocolError(f"a worker in state {state} received event {event}, expected {expected}")
    return WORKER_TRANSITIONS[state][event]
