"""The mirror interval that a run chooses from known step times."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lightning_ckptless.errors import OptionsError
from lightning_ckptless.options import CkptlessOptions
from lightning_ckptless.protocol.mirror_interval import IntervalPlan, agreed
from lightning_ckptless.protocol.run_counts import RunCounts
from lightning_ckptless.protocol.time_account import TimeAccount
from lightning_ckptless.protocol.versions import Version
from lightning_ckptless.trainer.commit.mirror_interval import MirrorInterval


class FakeReport:
    """The part of a report that a mirror_interval uses."""

    def __init__(self) -> None:
        self.account = TimeAccount(began_at=0.0)
        self.counts = RunCounts()
        self.last_phases = None
        self.clock = lambda: 0.0
        self.chosen: list[tuple[int, IntervalPlan]] = []

    def mirror_interval(self, interval: int, plan: IntervalPlan) -> None:
        self.chosen.append((interval, plan))


def run(
    mirror_interval: MirrorInterval, now: list[float], steps: int, *, step_s: float, copy_s: float, hand_over_s: float
) -> None:
    """Train; a version is handed over at the end of every second step and copied during the next one."""
    first = 2
    for done in range(first, first + steps):
        mirror_interval.begin_step(done)
        now[0] += step_s + (copy_s if done % 2 == 0 else 0.0)
        if (done + 1) % 2 == 0:
            now[0] += hand_over_s
            mirror_interval.took(Version(done + 1, True), hand_over_s)


def auto(told: Any, now: list[float], **options: Any) -> MirrorInterval:
    return MirrorInterval(CkptlessOptions(mirror_every_n_steps="auto", **options), told, clock=lambda: now[0])


def test_a_number_is_used_as_the_interval() -> None:
    mirror_interval = MirrorInterval(CkptlessOptions(mirror_every_n_steps=7), FakeReport())  # type: ignore[arg-type]
    assert (mirror_interval.interval, mirror_interval.chosen, mirror_interval.word()) == (7, 7, None)


def test_handing_over_and_copying_both_count_as_the_versions_cost() -> None:
    told, now = FakeReport(), [0.0]
    mirror_interval = auto(told, now, mirror_budget=0.01, failures_per_day=1e6)
    assert (mirror_interval.interval, mirror_interval.word()) == (2, None)
    run(mirror_interval, now, 60, step_s=0.1, copy_s=0.004, hand_over_s=0.003)
    word = mirror_interval.word()
    assert word is not None
    # 7 ms are 1 % of 7 steps.
    assert agreed(word) == 10
    mirror_interval.settle(20)
    ((interval, plan),) = told.chosen
    assert interval == mirror_interval.interval == mirror_interval.chosen == 20
    assert "a version costs 7.00 ms and a step takes 100.00 ms" in plan.reason
    assert mirror_interval.word() is None


def test_a_larger_budget_allows_more_versions() -> None:
    told, now = FakeReport(), [0.0]
    mirror_interval = auto(told, now, mirror_budget=0.08, failures_per_day=1e6)
    run(mirror_interval, now, 60, step_s=0.1, copy_s=0.004, hand_over_s=0.003)
    assert agreed(mirror_interval.word() or 0) == 1


def test_rare_failures_lengthen_the_interval() -> None:
    told, now = FakeReport(), [0.0]
    mirror_interval = auto(told, now, mirror_budget=1.0, failures_per_day=0.01)
    run(mirror_interval, now, 60, step_s=0.1, copy_s=0.004, hand_over_s=0.003)
    assert agreed(mirror_interval.word() or 0) == 1000


def test_the_chosen_interval_is_part_of_the_version() -> None:
    told, now = FakeReport(), [0.0]
    mirror_interval = auto(told, now)
    mirror_interval.begin(50)
    run(mirror_interval, now, 60, step_s=0.1, copy_s=0.004, hand_over_s=0.003)
    assert (mirror_interval.interval, mirror_interval.chosen, mirror_interval.word()) == (50, 50, None)
    # A rank that had already chosen rolls back with the version, like all others.
    mirror_interval.begin(None)
    assert (mirror_interval.interval, mirror_interval.chosen) == (2, None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mirror_every_n_steps": "often"}, "mirror_every_n_steps='often': expected an integer of at least 1, or"),
        ({"mirror_every_n_steps": 0}, "mirror_every_n_steps=0: expected"),
        ({"mirror_every_n_steps": "auto", "on_late": "skip"}, "it never waits: choose one of the two"),
        ({"mirror_budget": 0.0}, "mirror_budget=0.0: expected a number greater than 0 and at most 1"),
        ({"failures_per_day": -1.0}, "failures_per_day=-1.0: expected"),
        ({"arena_dir": Path(), "mirror_budget": 2.0}, "mirror_budget=2.0"),
    ],
)
def test_invalid_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionsError, match=message.replace("(", r"\(")):
        CkptlessOptions(**options)
