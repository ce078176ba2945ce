"""The elastic benchmark: counting of sample rows, and its tables."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from benchmarks.elastic import SETUPS, add_marks, grown, shrunk, tables
from benchmarks.harness.samples import Row, Step, Tally, counting, finished, first_of, tally
from lightning_ckptless.ledger import Event


def row(attempt: int, step: int, rank: int, world: int, at: float, *samples: int, epoch: int = 0) -> Row:
    return Row(attempt, epoch, step, rank, world, at, samples)


SHRUNK = [
    row(0, 0, 0, 2, 1.0, 0),
    row(0, 0, 1, 2, 1.1, 1),
    row(0, 1, 0, 2, 2.0, 2),
    row(1, 1, 0, 1, 9.0, 2, 3),
]
"""Two ranks; one is lost in its second step, which the other one replays for both."""


def test_a_step_is_finished_when_all_ranks_of_its_world_are_done() -> None:
    steps = finished(SHRUNK)
    assert steps == [Step(0, 0, 2, 1.1), Step(1, 1, 1, 9.0)]
    assert first_of(steps, 1, after=2.0) == steps[1]
    assert first_of(steps, 2, after=2.0) is None


def test_steps_that_a_later_attempt_replays_count_once() -> None:
    assert counting(SHRUNK) == [SHRUNK[0], SHRUNK[1], SHRUNK[3]]
    assert tally(SHRUNK, samples=4, epochs=1) == Tally(due=4, twice=0, never=0)


def test_steps_after_the_replayed_ones_are_rolled_back_too() -> None:
    rows = [row(0, step, 0, 1, float(step), step) for step in range(4)] + [row(1, 1, 0, 1, 9.0, 7)]
    assert [(r.attempt, r.step) for r in counting(rows)] == [(0, 0), (1, 1)]


def test_repeated_and_skipped_samples_are_counted_per_epoch() -> None:
    rows = [row(0, 0, 0, 1, 1.0, 0, 1), row(0, 1, 0, 1, 2.0, 1, 0), row(0, 2, 0, 1, 3.0, 0, 1, 2, epoch=1)]
    assert tally(rows, samples=3, epochs=2) == Tally(due=6, twice=2, never=1)


STEPS = [Step(0, n, 4, float(n)) for n in range(10)] + [Step(1, 9 + n, 3, 15.0 + n) for n in range(4)]
STEPS.append(Step(2, 12, 4, 18.5))


def test_the_loss_of_a_node_is_measured_from_the_kill_to_a_step_of_the_others() -> None:
    assert shrunk(STEPS, 9.5, STEPS[10]) == {"seconds": 5.5, "step_s": 1.0, "repeated_steps": 1}


def test_the_return_of_a_node_is_measured_by_how_long_the_others_are_paused() -> None:
    assert grown(STEPS, 15.5, STEPS[-1]) == {
        "paused_s": 0.5,
        "seconds": 3.0,
        "steps_meanwhile": 3,
        "repeated_steps": 1,
    }


def cycle() -> dict[str, Any]:
    return {
        "killed_at": 100.0, "came_at": 120.0, "full_at": 130.0,
        "shrink": {"seconds": 9.0, "step_s": 0.1, "repeated_steps": 1},
        "grow": {"paused_s": 0.3, "seconds": 10.0, "steps_meanwhile": 50, "repeated_steps": 0},
    }  # fmt: skip


def test_the_tables_show_median_and_maximum() -> None:
    noticed, late = cycle(), cycle()
    noticed["shrink"]["noticed_s"] = 5.0
    late["shrink"] |= {"noticed_s": 6.0, "seconds": 12.0}
    late["grow"]["paused_s"] = 0.5
    counted = {"due": 100, "twice": 0, "never": 0, "weight": 1.2e-7}
    setups: dict[str, dict[str, Any]] = {
        "ours": {"cycles": [noticed, late], "failed": "", **counted},
        "theirs": {"cycles": [cycle()], "failed": "no sign\nof it"},
        "none": {"cycles": [], "failed": "never began"},
    }
    shrink, grow, samples = tables(Namespace(), {"setups": setups})
    assert shrink.rows[0] == ("ours", "2", "10.50", "11.85", "12.00", "5.50", "5.00", "6.00", "0.10", "1", "1")
    assert shrink.rows[1][:8] == ("theirs", "1", "9.00", "9.00", "9.00", "", "", "")
    assert shrink.rows[2][:3] == ("none", "0", "")
    assert shrink.notes[-2:] == ["theirs: no sign", "none: never began"]
    assert grow.rows[0] == ("ours", "2", "0.40", "0.50", "10.00", "10.00", "50", "50", "0", "0")
    assert samples.rows == [("ours", "2", "100", "0", "0", "1.2e-07")]


def test_every_setup_has_its_own_command_line() -> None:
    lines = {(*setup.job.to_arguments(), *setup.flags) for setup in SETUPS}
    assert len(lines) == len(SETUPS)


def test_the_time_of_a_loss_is_divided_at_the_events_of_the_ledger() -> None:
    found = cycle()
    moments = {"node_lost": 101.5, "move": 101.75, "fault": 102.0, "restored": 103.0}
    events = [Event(name, at + late, None, None, {"node": "a"}) for late in (0.0, 0.1) for name, at in moments.items()]
    add_marks([found], events)
    _, phases, *_ = tables(Namespace(), {"setups": {"ours": {"cycles": [found], "failed": ""}}})
    assert [(row[0], row[2]) for row in phases.rows] == [
        ("notice", "1.50"),
        ("meet", "0.25"),
        ("tell the workers", "0.25"),
        ("regroup and restore", "1.00"),
        ("first step", "6.00"),
    ]
