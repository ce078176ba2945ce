"""A run that is asked to end, by SIGTERM to one rank: all ranks end behind one step, however versions are taken."""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import replace

import pytest

from lightning_ckptless.protocol.versions import Complete, Version, newest_complete
from lightning_ckptless.testing.drill import Variant
from tests.faults.matrix import BASE
from tests.faults.test_restart import Run, assert_identical, job, whole
from tests.lab.parts import Options

__all__ = ["job", "whole"]


def test_one_rank_ends_with_the_step_in_which_it_was_asked(job: Run, whole: Callable[[Options], Variant]) -> None:
    # As under Lightning's own strategies; no version would be due before step 8.
    long = replace(BASE, devices=1, samples=80, epochs=1)
    options = replace(long, strategy_options="{'mirror_every_n_steps': 4}")
    assert job.start(replace(options, terminate_at=6)).exit_code == 128 + signal.SIGTERM
    assert [event.fields["cause"] for event in job.events("stopped")] == ["SIGTERMException"]
    found = newest_complete(job.arena.inventory())
    assert isinstance(found, Complete) and found.snapshot.version == Version(6, True)
    assert job.start(options).exit_code == 0
    assert_identical(job, whole(long))


@pytest.mark.parametrize(
    "strategy_options",
    [pytest.param({"on_late": "skip"}, marks=pytest.mark.long), {"mirror_every_n_steps": 4}],
    ids=str,
)
def test_all_end_behind_one_step(
    strategy_options: dict[str, object], job: Run, whole: Callable[[Options], Variant]
) -> None:
    # Each version is still on its way when the next step is done. The ranks need far fewer steps than there are.
    long = replace(BASE, samples=144)
    options = replace(long, strategy_options=repr(strategy_options), slow_mirror_s=0.1)
    assert job.start(replace(options, terminate_at=5)).exit_code == 128 + signal.SIGTERM
    assert {(event.rank, event.fields["cause"]) for event in job.events("stopped")} == {
        (rank, "SIGTERMException") for rank in (0, 1)
    }
    found = newest_complete(job.arena.inventory())
    assert isinstance(found, Complete) and found.snapshot.version.optimizer_step in range(5, 36)
    assert job.start(options).exit_code == 0
    assert_identical(job, whole(long))
