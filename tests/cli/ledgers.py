"""Writes the ledger of a run with two faults, with round numbers as times."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning_ckptless.cli.view.timeline import Step
from lightning_ckptless.ledger import LEDGER_NAME, Ledger

BEGAN_AT = 1000.0
RUN_ID = "20250131-120000-abcd"


class Writer:
    """Writes events at given times.

    Args:
        folder: folder of the run.
    """

    def __init__(self, folder: Path) -> None:
        self.now = BEGAN_AT
        self.ledger = Ledger(folder / LEDGER_NAME, clock=lambda: self.now)

    def at(self, after_s: float, event: str, *, generation: int | None = None, **fields: Any) -> None:
        """Write an event at a time in seconds after the run began."""
        self.now = BEGAN_AT + after_s
        self.ledger.record(event, generation=generation, **fields)


def write_ledger(root: Path, *, arena: Path | None = None, ended: bool = True) -> Path:
    """Write the ledger of a run, and return the run's folder.

    Args:
        root: folder of all runs.
        arena: arena of the run; None for one that no longer exists.
        ended: whether the run has ended.
    """
    folder = root / RUN_ID
    writer = Writer(folder)
    node: dict[str, Any] = {"node": "node-a", "host": "host-a", "agent": 60, "folder": "/tmp/agent"}
    writer.at(0.0, "workers_spawned", world_size=2, pids={"0": 70, "1": 71}, **node)
    writer.at(4.0, "standbys", ready=1, wanted=2, pids=[80, 81])
    writer.at(8.2, "in_place", new={"1": [80, "standby"]})
    if ended:
        writer.at(4.5, "time_spent", generation=1, **time_spent(4.5, start=1.0, training=3.5))
    for generation, (began_s, action) in enumerate(((1.0, "fresh"), (5.3, "restore"), (8.4, "restore")), 1):
        if generation > 1:
            writer.at(began_s - 0.2, "relaunch", restart=generation - 1)
        facts = {"world_size": 2, "action": action, "placement": "2 shards, 2 copies each", "arena": str(arena)}
        writer.at(began_s, "run_started", generation=generation, **facts)
        if generation > 1:
            writer.at(began_s + 0.7, "recovery", generation=generation, **recovery(generation))
        if generation < 3:
            dead_s = (5.0, 8.0)[generation - 1]
            writer.at(dead_s + 0.1, "fault", rank=2 - generation, signal_name="SIGKILL", died_at=BEGAN_AT + dead_s)
    if ended:
        writer.at(
            10.9, "time_spent", generation=3, **time_spent(11.0, is_over=True, start=1.0, training=8.25, detect=1.75)
        )
        writer.at(11.0, "run_ended", generation=3, goodput=0.75, recoveries=2)
    return folder


def time_spent(until_s: float, *, is_over: bool = False, **seconds: float) -> dict[str, Any]:
    """The fields of a report of the time until an instant, in seconds after the run began."""
    until = BEGAN_AT + until_s
    counts = {"failures": 2, "steps_replayed": 2, "step": round(until_s), "versions": round(until_s)}
    return {"began_at": BEGAN_AT, "until": until, "seconds": seconds, "is_over": is_over, **counts}


def recovery(generation: int) -> dict[str, Any]:
    """The fields of a recovery that took one second."""
    seconds = (0.01, 0.09, 0.3, 0.4, 0.2, 0.0)
    names = ("detect_s", "abort_s", "regroup_s", "restore_s", "replay_s", "other_s")
    return {
        "rung": "in place",
        "kind": "killed",
        "culprit_rank": 3 - generation,
        "cause": "died by SIGKILL",
        "version": f"step {generation}",
        "steps_replayed": 1,
        "phases": dict(zip(names, seconds, strict=True)),
        "total_s": 1.0,
    }


STEPS = (
    *(Step(BEGAN_AT + 1.0 + number, number, 1) for number in range(1, 4)),
    *(Step(BEGAN_AT + 3.0 + number, number, 2) for number in range(3, 5)),
    *(Step(BEGAN_AT + 5.0 + number, number, 3) for number in range(4, 7)),
)
"""One step per second: 1 to 3, then 3 and 4, then 4 to 6."""
