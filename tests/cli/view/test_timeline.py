"""The timeline of a run: times count from its beginning."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_ckptless.cli.runs import find_run
from lightning_ckptless.cli.view.timeline import timeline_of
from lightning_ckptless.ledger import Event
from tests.cli.ledgers import RUN_ID, STEPS, write_ledger


def test_a_timeline_of_ledger_and_trace(tmp_path: Path) -> None:
    write_ledger(tmp_path)
    timeline = timeline_of(RUN_ID, find_run(None, tmp_path).events, STEPS)
    assert timeline.wall_s == 11.0
    assert timeline.last_step == 6
    assert timeline.time.account.goodput == 0.75
    assert timeline.time.curve == [(4.5, 3.5 / 4.5), (11.0, 0.75)]
    assert [(mark.at, mark.text) for mark in timeline.faults] == [(5.0, "rank 1: SIGKILL"), (8.0, "rank 0: SIGKILL")]
    assert [(round(span.began_at, 6), round(span.ended_at, 6)) for span in timeline.recoveries] == [
        (5.0, 6.0),
        (8.1, 9.1),
    ]
    assert timeline.recoveries[0].text == "rank 1 died by SIGKILL, resumed from step 2"
    assert {generation: len(steps) for generation, steps in timeline.by_generation.items()} == {1: 3, 2: 2, 3: 3}


def test_phases_sum_to_the_span(tmp_path: Path) -> None:
    write_ledger(tmp_path)
    for span in timeline_of(RUN_ID, find_run(None, tmp_path).events).recoveries:
        assert sum(span.phases.values()) == pytest.approx(span.total_s)


def test_a_timeline_without_a_trace(tmp_path: Path) -> None:
    write_ledger(tmp_path, ended=False)
    timeline = timeline_of(RUN_ID, find_run(None, tmp_path).events)
    assert (timeline.steps, timeline.time.curve, timeline.time.is_known) == ((), [], False)
    assert timeline.wall_s == pytest.approx(9.1)


def test_fault_of_another_node_is_shown_once() -> None:
    """Two agents report it: one saw rank 3 die, the other only that the members changed."""
    seen = {"restart": 1, "died_at": 5.0, "signal_name": "SIGKILL"}
    heard = {"restart": 1, "died_at": 6.0, "signal_name": None, "exit_code": None}
    events = [
        Event("fault", 5.1, None, 3, seen),
        Event("fault", 6.1, None, None, heard),
        Event("fault", 9.0, None, None, heard | {"restart": 2, "died_at": 8.5}),
    ]
    timeline = timeline_of("run", [Event("workers_spawned", 0.0, None, None, {}), *events])
    assert [(mark.at, mark.text) for mark in timeline.faults] == [(5.0, "rank 3: SIGKILL"), (8.5, "lost")]
