"""The story of a run: times count from its beginning, and steps that are rolled back do not count as goodput."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_ckptless.cli.runs import find_run
from lightning_ckptless.cli.view.story import Span, Step, goodput_over_time, story_of
from lightning_ckptless.ledger import Event
from lightning_ckptless.protocol.goodput import PHASES
from tests.cli.ledgers import RUN_ID, STEPS, write_ledger


def test_a_story_of_ledger_and_trace(tmp_path: Path) -> None:
    write_ledger(tmp_path)
    story = story_of(RUN_ID, find_run(None, tmp_path).events, STEPS)
    assert story.wall_s == 11.0
    assert story.last_step == 6
    assert story.final_goodput == 0.75
    assert [(mark.at, mark.text) for mark in story.faults] == [(5.0, "rank 1: SIGKILL"), (8.0, "rank 0: SIGKILL")]
    assert [(round(span.began_at, 6), round(span.ended_at, 6)) for span in story.recoveries] == [(5.0, 6.0), (8.1, 9.1)]
    assert story.recoveries[0].text == "rank 1 died by SIGKILL, resumed from step 2"
    assert {generation: len(steps) for generation, steps in story.by_generation.items()} == {1: 3, 2: 2, 3: 3}


def test_phases_sum_to_the_span(tmp_path: Path) -> None:
    write_ledger(tmp_path)
    for span in story_of(RUN_ID, find_run(None, tmp_path).events).recoveries:
        assert sum(span.phases.values()) == pytest.approx(span.total_s)


def test_a_story_without_a_trace(tmp_path: Path) -> None:
    write_ledger(tmp_path, ended=False)
    story = story_of(RUN_ID, find_run(None, tmp_path).events)
    assert (story.steps, story.goodput, story.final_goodput) == ((), (), None)
    assert story.wall_s == pytest.approx(9.1)


def span(generation: int, replay_s: float) -> Span:
    return Span(0.0, 0.0, generation, "", dict.fromkeys(PHASES, 0.0) | {"replay": replay_s})


def test_goodput_without_a_fault() -> None:
    curve = goodput_over_time([Step(1.0, 1, 1), Step(2.0, 2, 1), Step(4.0, 3, 1)], [])
    assert curve == [(1.0, 0.0), (2.0, 0.5), (4.0, 0.75)]


def test_steps_that_are_rolled_back_do_not_count() -> None:
    """Steps 2 and 3 ran, were rolled back and ran again; the second run of step 2 took half a second."""
    steps = [Step(1.0, 1, 1), Step(2.0, 2, 1), Step(3.0, 3, 1), Step(6.0, 2, 2), Step(7.0, 3, 2)]
    curve = goodput_over_time(steps, [span(2, 0.5)])
    assert [instant for instant, _ in curve] == [1.0, 2.0, 3.0, 6.0, 7.0]
    assert [share for _, share in curve] == pytest.approx([0.0, 1 / 2, 2 / 3, 0.5 / 6, 1.5 / 7])


def test_goodput_counts_from_the_beginning_of_training() -> None:
    steps = [Step(11.0, 1, 1), Step(12.0, 2, 1)]
    assert goodput_over_time(steps, [], since=10.0) == [(11.0, 0.0), (12.0, 0.5)]


def test_fault_of_another_node_is_shown_once() -> None:
    """Two agents report it: one saw rank 3 die, the other only that the members changed."""
    seen = {"restart": 1, "died_at": 5.0, "signal_name": "SIGKILL"}
    heard = {"restart": 1, "died_at": 6.0, "signal_name": None, "exit_code": None}
    events = [
        Event("fault", 5.1, None, 3, seen),
        Event("fault", 6.1, None, None, heard),
        Event("fault", 9.0, None, None, heard | {"restart": 2, "died_at": 8.5}),
    ]
    story = story_of("run", [Event("workers_spawned", 0.0, None, None, {}), *events])
    assert [(mark.at, mark.text) for mark in story.faults] == [(5.0, "rank 3: SIGKILL"), (8.5, "lost")]
