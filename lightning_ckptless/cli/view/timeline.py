"""The timeline of a run: its steps, faults, recoveries and goodput over time, built from ledger and trace.

Pure functions. Input times are in seconds since the epoch, output times in seconds since the run began.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_ckptless.cli.time_spent import RunTime, run_time
from lightning_ckptless.ledger import Event
from lightning_ckptless.protocol.phases import PHASES


@dataclass(frozen=True, slots=True)
class Step:
    """A finished optimizer step.

    Args:
        at: time in seconds since the run began.
        step: number of the step, from 1.
        generation: generation that ran it.
    """

    at: float
    step: int
    generation: int


@dataclass(frozen=True, slots=True)
class Mark:
    """A labelled point in time.

    Args:
        at: time in seconds since the run began.
        text: label.
    """

    at: float
    text: str


@dataclass(frozen=True, slots=True)
class Span:
    """A recovery.

    Args:
        began_at: time of the fault, in seconds since the run began.
        ended_at: end of the first step after it, in seconds since the run began.
        generation: generation after the recovery.
        text: failed rank, cause, and the version that training resumed from.
        fields: fields of the event in the ledger.
    """

    began_at: float
    ended_at: float
    generation: int
    text: str
    fields: Mapping[str, Any]

    @property
    def phases(self) -> dict[str, float]:
        """Duration of each phase in seconds."""
        return {name: float(self.fields["phases"].get(f"{name}_s", 0.0)) for name in PHASES}

    @property
    def total_s(self) -> float:
        """Duration in seconds."""
        return self.ended_at - self.began_at


@dataclass(frozen=True, slots=True)
class Timeline:
    """A run over time.

    Args:
        run_id: id of the run.
        wall_s: seconds from its beginning to its last event.
        steps: steps in chronological order, including those that were rolled back.
        faults: the faults.
        recoveries: the recoveries.
        time: where its time went.
    """

    run_id: str
    wall_s: float
    steps: tuple[Step, ...]
    faults: tuple[Mark, ...]
    recoveries: tuple[Span, ...]
    time: RunTime

    @property
    def last_step(self) -> int:
        """The highest finished step."""
        return max((step.step for step in self.steps), default=0)

    @property
    def by_generation(self) -> dict[int, list[Step]]:
        """The steps of each generation."""
        found: dict[int, list[Step]] = {}
        for step in self.steps:
            found.setdefault(step.generation, []).append(step)
        return found


def timeline_of(run_id: str, events: Sequence[Event], finished: Sequence[Step] = ()) -> Timeline:
    """Build a timeline.

    Args:
        run_id: id of the run.
        events: events of its ledger; at least one.
        finished: steps from a trace, with times in seconds since the epoch; if empty, the `committed` events of the
            ledger are used instead.
    """
    time = run_time(events)
    began_at = time.account.began_at
    known = finished or [
        Step(event.at, int(event.fields["step"]), event.generation or 0)
        for event in events
        if event.event == "committed" and "step" in event.fields
    ]
    steps = tuple(Step(step.at - began_at, step.step, step.generation) for step in known)
    recoveries = tuple(_span(event, began_at) for event in events if event.event == "recovery")
    ended_at = max([event.at - began_at for event in events] + [step.at for step in steps])
    return Timeline(
        run_id=run_id,
        wall_s=ended_at,
        steps=steps,
        faults=tuple(_fault(event, began_at) for event in _seen_first_hand(events)),
        recoveries=recoveries,
        time=time,
    )


def _seen_first_hand(events: Sequence[Event]) -> list[Event]:
    """Return the faults as reported by the agents that observed them; agents of other nodes report fewer details."""
    faults = [event for event in events if event.event == "fault"]
    known = {event.fields.get("restart") for event in faults if event.rank is not None}
    return [event for event in faults if event.rank is not None or event.fields.get("restart") not in known]


def _fault(event: Event, began_at: float) -> Mark:
    signal_name, code = event.fields.get("signal_name"), event.fields.get("exit_code")
    died_at = event.fields.get("died_at") or event.at
    how = signal_name or ("lost" if code is None else f"exit {code}")
    return Mark(float(died_at) - began_at, how if event.rank is None else f"rank {event.rank}: {how}")


def _span(event: Event, began_at: float) -> Span:
    fields = event.fields
    rank = fields.get("culprit_rank")
    who = "" if rank is None else f"rank {rank} "
    ended_at = event.at - began_at
    text = f"{who}{fields['cause']}, resumed from {fields['version']}"
    return Span(ended_at - float(fields["total_s"]), ended_at, event.generation or 0, text, fields)
