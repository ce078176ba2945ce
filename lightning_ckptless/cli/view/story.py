"""The story of a run: steps, faults, recoveries and goodput over time, put together from ledger and trace.

Pure: instants come in as seconds since the epoch and go out as seconds since the run began.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lightning_ckptless.ledger import Event

PHASES = ("detect", "abort", "regroup", "restore", "replay", "other")


@dataclass(frozen=True, slots=True)
class Step:
    """An optimizer step that was finished.

    Args:
        at: when, in seconds since the run began.
        step: its number, from 1.
        generation: number of the membership that made it.
    """

    at: float
    step: int
    generation: int


@dataclass(frozen=True, slots=True)
class Mark:
    """Something that happened at an instant.

    Args:
        at: when, in seconds since the run began.
        text: what.
    """

    at: float
    text: str


@dataclass(frozen=True, slots=True)
class Span:
    """A recovery.

    Args:
        began_at: when the fault struck, in seconds since the run began.
        ended_at: when the first step after it was done.
        generation: number of the membership that recovered.
        text: who, how, and from where the run went on.
        phases: seconds by phase.
    """

    began_at: float
    ended_at: float
    generation: int
    text: str
    phases: Mapping[str, float]

    @property
    def total_s(self) -> float:
        """How long it took."""
        return self.ended_at - self.began_at


@dataclass(frozen=True, slots=True)
class Story:
    """A run over time.

    Args:
        run_id: its name.
        wall_s: from its first event to its last.
        steps: in the order of time; those that were rolled back are among them.
        faults: what struck.
        recoveries: from the faults.
        goodput: (instant, share of the time so far that went into steps that count).
        final_goodput: as the run itself counted it; None where it has not come to its end.
    """

    run_id: str
    wall_s: float
    steps: tuple[Step, ...]
    faults: tuple[Mark, ...]
    recoveries: tuple[Span, ...]
    goodput: tuple[tuple[float, float], ...]
    final_goodput: float | None

    @property
    def last_step(self) -> int:
        """The highest step that was finished."""
        return max((step.step for step in self.steps), default=0)

    @property
    def by_generation(self) -> dict[int, list[Step]]:
        """The steps that each membership made."""
        found: dict[int, list[Step]] = {}
        for step in self.steps:
            found.setdefault(step.generation, []).append(step)
        return found


def story_of(run_id: str, events: Sequence[Event], finished: Sequence[Step] = ()) -> Story:
    """Put a story together.

    Args:
        run_id: name of the run.
        events: of its ledger; at least one.
        finished: steps from a trace, their instants in seconds since the epoch; none where it was not traced, then
            the ledger's own `committed` events stand for them.
    """
    began_at = min(event.at for event in events)
    known = finished or [
        Step(event.at, int(event.fields["step"]), event.generation or 0)
        for event in events
        if event.event == "committed" and "step" in event.fields
    ]
    steps = tuple(Step(step.at - began_at, step.step, step.generation) for step in known)
    recoveries = tuple(_span(event, began_at) for event in events if event.event == "recovery")
    ended_at = max([event.at - began_at for event in events] + [step.at for step in steps])
    ends = [event.fields["goodput"] for event in events if event.event == "run_ended" and "goodput" in event.fields]
    return Story(
        run_id=run_id,
        wall_s=ended_at,
        steps=steps,
        faults=tuple(_fault(event, began_at) for event in _seen_first_hand(events)),
        recoveries=recoveries,
        goodput=tuple(goodput_over_time(steps, recoveries, since=_training_began_at(events) - began_at)),
        final_goodput=ends[-1] if ends else None,
    )


def _training_began_at(events: Sequence[Event]) -> float:
    """When the first workers had met, as the run's own account has it; its first event where that is not known."""
    return min((event.at for event in events if event.event == "run_started"), default=min(e.at for e in events))


def _seen_first_hand(events: Sequence[Event]) -> list[Event]:
    """The faults, each as told by the agent that saw it; the agents of other nodes know only that there was one."""
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
    phases = {name: float(fields["phases"].get(f"{name}_s", 0.0)) for name in PHASES}
    ended_at = event.at - began_at
    text = f"{who}{fields['cause']}, went on from {fields['version']}"
    return Span(ended_at - float(fields["total_s"]), ended_at, event.generation or 0, text, phases)


def goodput_over_time(
    steps: Sequence[Step], recoveries: Sequence[Span], *, since: float = 0.0
) -> list[tuple[float, float]]:
    """The share of the time so far that went into steps that count.

    A step counts from the one before it in the same generation; the first of a generation that recovered counts from
    the end of the restore. What is rolled back counts no more.

    Args:
        steps: in the order of time.
        recoveries: they say how long the first step after each took.
        since: instant from which time counts.

    Returns:
        (instant, share) at every finished step.
    """
    replay_s = {span.generation: span.phases["replay"] for span in recoveries}
    counted: list[tuple[int, float]] = []
    curve = []
    before: Step | None = None
    for step in steps:
        if before is None or step.generation != before.generation:
            counted = [(number, took_s) for number, took_s in counted if number < step.step]
            took_s = replay_s.get(step.generation, 0.0)
        else:
            took_s = step.at - before.at
        counted.append((step.step, took_s))
        before = step
        if step.at > since:
            curve.append((step.at, min(1.0, sum(took_s for _, took_s in counted) / (step.at - since))))
    return curve
