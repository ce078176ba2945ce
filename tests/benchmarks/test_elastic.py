"""The elastic benchmark: the steps that a world has finished, the costs of a loss and of a return, and its tables."""

from __future__ import annotations

from typing import Any

from benchmarks.elastic import Elastic, Step, add_marks, finished, first_of, grown, shrunk
from lightning_ckptless.ledger import Event


def row(attempt: int, step: int, rank: int, world: int, at: float) -> dict[str, Any]:
    return {"attempt": attempt, "step": step, "rank": rank, "world": world, "at": at}


def test_a_step_is_finished_when_all_ranks_of_its_world_are_done() -> None:
    """Two ranks; one is lost in its second step, which the other one replays for both."""
    rows = [row(0, 0, 0, 2, 1.0), row(0, 0, 1, 2, 1.1), row(0, 1, 0, 2, 2.0), row(1, 1, 0, 1, 9.0)]
    steps = finished(rows)
    assert steps == [Step(0, 0, 2, 1.1), Step(1, 1, 1, 9.0)]
    assert first_of(steps, 1, after=2.0) == steps[1]
    assert first_of(steps, 2, after=2.0) is None


STEPS = [Step(0, n, 4, float(n)) for n in range(10)] + [Step(1, 9 + n, 3, 15.0 + n) for n in range(4)]
STEPS.append(Step(2, 12, 4, 18.5))


def test_the_loss_of_a_node_is_measured_from_the_kill_to_a_step_of_the_others() -> None:
    assert shrunk(STEPS, 9.5, STEPS[10]) == {"seconds": 5.5, "step_s": 1.0, "repeated_steps": 1}


def test_the_return_of_a_node_is_measured_by_how_long_the_others_are_paused() -> None:
    assert grown(STEPS, 15.5, STEPS[-1]) == {
        "paused_s": 0.5,
        "seconds": 3.0,
        "repeated_steps": 1,
    }


def cycle() -> dict[str, Any]:
    return {
        "killed_at": 100.0, "came_at": 120.0,
        "shrink": {"seconds": 9.0, "step_s": 0.1, "repeated_steps": 1},
        "grow": {"paused_s": 0.3, "seconds": 10.0, "repeated_steps": 0},
    }  # fmt: skip


def test_the_tables_show_median_and_maximum() -> None:
    late = cycle()
    late["shrink"]["seconds"], late["grow"]["paused_s"] = 12.0, 0.5
    setups = {
        "ours": {"cycles": [cycle(), late], "failed": ""},
        "none": {"cycles": [], "failed": "no sign\nof it"},
    }
    shrink, grow = Elastic().tables({"setups": setups})
    assert shrink.rows[0][:8] == ("ours", "2", "10.50", "11.85", "12.00", "0.10", "1", "1")
    assert shrink.rows[1][:3] == ("none", "0", "")
    assert shrink.notes[-1] == "none: no sign"
    assert grow.rows[0] == ("ours", "2", "0.40", "0.50", "10.00", "10.00", "0", "0")


def test_the_time_of_a_loss_is_divided_at_the_events_of_the_ledger() -> None:
    found = cycle()
    moments = {"node_lost": 101.5, "move": 101.75, "fault": 102.0, "restored": 103.0}
    events = [Event(name, at + late, None, None, {"node": "a"}) for late in (0.0, 0.1) for name, at in moments.items()]
    add_marks([found], events)
    shrink, _ = Elastic().tables({"setups": {"ours": {"cycles": [found], "failed": ""}}})
    assert shrink.rows[0][-5:] == ("1.50", "0.25", "0.25", "1.00", "6.00")
