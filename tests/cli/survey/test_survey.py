"""Ranks, pace and tiers follow from what was read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from lightning_ckptless.cli.survey.reader import RunReader
from lightning_ckptless.cli.survey.survey import Tier, survey_of
from lightning_ckptless.cli.view.buckets import as_duration, buckets
from lightning_ckptless.cli.view.watch import screen, slowest_first
from lightning_ckptless.ledger import LEDGER_NAME, Event, Ledger, LedgerTail, read_ledger
from lightning_ckptless.protocol.hang_detection import Point
from tests.cli.ledgers import write_ledger
from tests.cli.survey.readings import NOW, event, placed, reading, spawned, worker


def test_a_rank_is_where_its_worker_says() -> None:
    workers = [worker(0, silent_s=0.3), worker(1, 9, Point.BATCH, own_s=0.2)]
    first, second = survey_of(reading([placed()], workers=workers)).members
    assert (first.rank, first.node, first.pid, first.state, first.step, first.point) == (
        0, "a", 10, "running", 8, "backward"
    )  # fmt: skip
    assert first.progress_age_s == pytest.approx(0.3)
    assert (second.point, second.step_s) == ("batch", 0.2)
    assert [member.rank for member in slowest_first([second, first])] == [0, 1]


def test_a_rank_that_was_replaced_or_is_elsewhere() -> None:
    replaced = event("in_place", 5.0, new={"1": [40, "standby"]})
    (first, second) = survey_of(reading([placed(), replaced], hosted=["a"])).members
    assert (first.state, first.point, first.progress_age_s) == ("running", "", None)
    assert (second.pid, second.state, second.step) == (40, "elsewhere", None)


def test_a_node_that_has_left_has_no_members() -> None:
    moved = [placed(), placed(before_s=10.0, nodes=("a",)), spawned("c", 1, before_s=5.0)]
    assert {member.node for member in survey_of(reading(moved)).members} == {"a", "c"}


def test_the_pace_and_the_end() -> None:
    steps = [event("committed", 10.0 - 2 * count, 0, step=100 + 10 * count, of=200) for count in range(5)]
    pace = survey_of(reading([placed(), *steps])).pace
    assert (pace.step, pace.of, pace.steps_per_s, pace.eta_s) == (140, 200, 5.0, 12.0)


def test_a_later_fit_counts_its_own_steps() -> None:
    again = event("run_started", 8.0, 0, arena="/shm/ckptless-run-a", world_size=2)
    earlier = [placed(), event("committed", 20.0, 0, step=500, of=500), again]
    found = survey_of(reading([*earlier, placed(before_s=6.0), event("committed", 5.0, 0, step=3, of=40)]))
    assert (found.pace.step, found.pace.of, found.pace.steps_per_s) == (7, 40, None)
    assert survey_of(reading(earlier)).protected.text == "nothing is protected yet: no version has been mirrored"


def test_arenas_of_an_earlier_fit_protect_nothing() -> None:
    run = reading([event("run_started", 8.0, 0, arena="/shm/ckptless-run-a"), placed(before_s=6.0)])
    earlier, other = run.arenas
    later = replace(run, arenas=(earlier, replace(other, info=replace(other.info, run_id="run.0"))))
    assert later.current_arenas == (earlier,)
    assert len(survey_of(later).arenas) == 2


def test_tiers_and_their_lag() -> None:
    durable = event("durable_written", 30.0, step=4, path="/durable/step-4")
    found = survey_of(reading([placed(), durable], workers=[worker(0, step=9), worker(1, step=9)]))
    memory, storage = found.tiers
    assert (memory.name, memory.step, memory.lag_steps, memory.place) == ("memory", 7, 1, "/shm")
    assert memory.age_s == pytest.approx(0.2)
    assert storage == Tier("storage", 4, 4, 30.0, "/durable")


def test_a_run_on_other_hosts_is_silent_after_a_minute() -> None:
    assert survey_of(reading([event("committed", 5.0, 0, step=3)], hosted=())).state == "running"
    assert survey_of(reading([event("committed", 61.0, 0, step=3)], hosted=())).state == "silent"


@pytest.mark.parametrize("height", [None, 8, 40])
def test_the_view_fits_the_terminal(height: int | None) -> None:
    lines = screen(survey_of(reading([placed()], workers=[worker(0), worker(1)])), 60, height).renderables
    assert height is None or len(lines) < height
    assert any("any 1 node may be lost" in str(line) for line in lines)


def test_time_is_shown_by_bucket() -> None:
    lines = [str(line).split() for line in buckets({"detect": 1.0, "replay": 3.0, "abort": 0.0})]
    assert [line[:4] for line in lines] == [["replay", "3.0", "s", "75%"], ["detect", "1.0", "s", "25%"]]
    assert [as_duration(s) for s in (0.02, 90.0, 7260.0, 200_000.0)] == ["20 ms", "1 min 30 s", "2 h 1 min", "2 d 7 h"]


def test_a_ledger_is_read_from_where_the_last_reading_ended(tmp_path: Path) -> None:
    path = write_ledger(tmp_path) / LEDGER_NAME
    whole, data = read_ledger(path).events, path.read_bytes()
    tail, found = LedgerTail(path), list[Event]()
    for cut in range(0, len(data), 97):
        path.write_bytes(data[:cut])
        found += tail.read()
    path.write_bytes(data)
    assert (*found, *tail.read()) == whole
    assert tail.read() == ()


def test_a_reader_sees_what_is_added(tmp_path: Path) -> None:
    folder = write_ledger(tmp_path, ended=False)
    reader = RunReader(folder, tmp_path / "shm", clock=lambda: NOW)
    assert survey_of(reader.read()).pace.step is None
    Ledger(folder / LEDGER_NAME).record("committed", step=12, of=20)
    pace = survey_of(reader.read()).pace
    assert (pace.step, pace.of) == (12, 20)
