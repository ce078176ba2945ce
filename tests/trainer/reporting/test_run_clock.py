"""The clock of a run: nested spans, faults in the middle of one, and when the ledger is written."""

from __future__ import annotations

import os
from contextlib import suppress
from itertools import pairwise
from math import fsum
from pathlib import Path

import psutil
import pytest

from lightning_ckptless import environment
from lightning_ckptless.ledger import Ledger, read_ledger
from lightning_ckptless.protocol.time_account import Bucket, Outage
from lightning_ckptless.trainer.reporting.rank_ledger import RankLedger
from lightning_ckptless.trainer.reporting.run_clock import RunClock, agent_started_at


class Lab:
    """A run clock whose time is set by the test; the run begins at 100."""

    def __init__(self, folder: Path) -> None:
        self.now = 100.0
        self.path = folder / "ledger.jsonl"
        self.clock = RunClock(RankLedger(Ledger(self.path), lambda: 0, lambda: 1), 100.0, lambda: self.now)

    def after(self, seconds: float) -> RunClock:
        self.now += seconds
        return self.clock

    @property
    def seconds(self) -> dict[str, float]:
        return {str(bucket): spent_s for bucket, spent_s in self.clock.account.seconds.items()}


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(tmp_path)


def test_time_goes_to_the_innermost_span(lab: Lab) -> None:
    lab.after(5.0).begin_training()
    lab.after(1.0)
    with lab.clock.spending(Bucket.VALIDATION):
        lab.after(2.0)
        with lab.clock.spending(Bucket.CHECKPOINT_WAIT):
            lab.after(4.0)
        lab.after(8.0)
    lab.after(16.0).end_training()
    lab.after(32.0).touch()
    assert lab.seconds == {"start": 5, "training": 17, "validation": 10, "checkpoint_wait": 4, "idle": 32}


def test_everything_before_the_first_batch_is_start(lab: Lab) -> None:
    with lab.clock.spending(Bucket.VALIDATION):
        lab.after(3.0)
    lab.after(4.0).begin_training()
    lab.after(1.0).begin_training()
    lab.after(1.0).touch()
    assert lab.seconds == {"start": 7, "training": 2}


def test_a_fault_in_a_span_ends_it(lab: Lab) -> None:
    lab.clock.begin_training()
    lab.after(2.0)
    saved = lab.clock.state()
    with suppress(OSError), lab.clock.spending(Bucket.VALIDATION):
        lab.after(5.0)
        raise OSError("a peer is lost")
    lab.after(5.0).resume(saved, Outage(fault_at=104.0, detected_at=105.0, stopped_at=106.0, regrouped_at=110.0))
    lab.after(1.0).touch()
    assert lab.seconds == {
        "training": 3, "replay": 2, "detect": 1, "abort": 1, "regroup": 4, "restore": 2,
    }  # fmt: skip


def test_a_rewind_and_added_ranks_have_one_bucket_each(lab: Lab) -> None:
    lab.clock.begin_training()
    saved = lab.after(2.0).state()
    lab.after(8.0).begin_rewind()
    lab.after(1.0).end_rewind(saved)
    assert lab.seconds == {"training": 2, "rewind": 9}
    saved = lab.after(1.0).state()
    lab.after(8.0).resume(saved, Outage(fault_at=113.0, grows=True))
    assert lab.seconds == {"training": 3, "rewind": 9, "replay": 1, "elastic_transition": 7}


def test_a_fit_that_begins_again_without_a_version_has_lost_its_work(lab: Lab) -> None:
    lab.after(20.0).begin_training(Outage(fault_at=110.0, detected_at=112.0, stopped_at=113.0, regrouped_at=117.0))
    assert lab.seconds == {"replay": 10, "detect": 2, "abort": 1, "regroup": 4, "restore": 3}


def test_the_ledger_is_written_ever_less_often(lab: Lab) -> None:
    lab.clock.begin_training()
    for _ in range(20_000):
        lab.after(1.0).touch()
        if lab.clock.is_note_due:
            lab.clock.note(is_over=False, failures=0, steps_replayed=0, step=1, versions=1)
    reports = [event.fields for event in read_ledger(lab.path)]
    assert 1000 < len(reports) < 5000
    for report in reports:
        assert fsum(report["seconds"].values()) == report["until"] - report["began_at"]
    for before, after in pairwise(reports):
        assert 1.0 <= after["until"] - before["until"] <= 1.0 + 1e-3 * (after["until"] - 100.0)


def test_own_work_ends_at_the_first_collective_of_a_batch(lab: Lab) -> None:
    lab.clock.begin_training()
    for _ in range(3):
        with lab.clock.spending(Bucket.DATA_WAIT):
            lab.after(0.5)
        lab.clock.begin_batch()
        lab.after(2.0).end_own_work()
        lab.after(4.0).end_own_work()
    saved = lab.clock.state()
    lab.clock.begin_batch()
    lab.after(30.0).end_own_work()
    lab.after(5.0).resume(saved, Outage())
    lab.clock.note_rank()
    assert not lab.path.exists()
    lab.path.touch()
    lab.clock.note_rank()
    (event,) = read_ledger(lab.path)
    assert event.fields == {"data_wait_s": 1.5, "own_s": 6.0, "batches": 3}


def test_a_rank_reports_ever_less_often(lab: Lab) -> None:
    at = []
    for _ in range(20_000):
        lab.after(1.0).touch()
        if lab.clock.is_note_of_rank_due:
            lab.clock.note_rank()
            at.append(lab.now - 100.0)
    assert at[:3] == [60.0, 120.0, 180.0] and 30 < len(at) < 60


def test_our_agent_says_when_it_was_started_and_another_is_asked() -> None:
    assert agent_started_at(1, own_agent=True, env={environment.AGENT_STARTED_AT: "12.5"}) == 12.5
    started_at = psutil.Process().create_time()
    assert agent_started_at(os.getpid(), own_agent=False) == started_at
    assert agent_started_at(2**22 - 1, own_agent=False) > started_at
