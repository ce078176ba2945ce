"""Draining a rank: another process takes it at a committed step, and no step is replayed."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from lightning_ckptless.membership.requests import Answer, DrainRequest, submit
from lightning_ckptless.testing.drill import Variant
from tests.faults.matrix import BASE
from tests.faults.test_restart import Run, assert_identical, job, undisturbed
from tests.lab.parts import Options

__all__ = ["job", "undisturbed"]

LONG = replace(BASE, samples=400, epochs=2)
"""Two ranks, fifty steps per epoch."""
DONE = "drained"


def run_and_drain(job: Run, options: Options, rank: int, faults: str = "") -> Answer:
    """Run to the end, and drain a rank meanwhile; steps take long until the drain is over."""
    folder, done = job.folder / "runs" / job.run_id, job.folder / DONE
    folder.mkdir(parents=True)
    slow = replace(options, slow_mirror_s=0.1, slow_until=str(done))

    def drain() -> Answer:
        try:
            return submit(folder, DrainRequest(rank=rank), timeout_s=100)
        finally:
            done.touch()

    with ThreadPoolExecutor(1) as terminal:
        answer = terminal.submit(drain)
        assert job.start(slow, faults, max_restarts=5).exit_code == 0, job.output
        return answer.result()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_drained_rank_is_handed_over_without_a_replayed_step(
    rank: int, job: Run, undisturbed: Callable[[Options], Variant]
) -> None:
    answer = run_and_drain(job, LONG, rank)
    assert answer.accepted, answer.reason
    (drained,) = (event.fields for event in job.events("drained"))
    (recovery,) = (event.fields for event in job.events("recovery"))
    (spawned,) = (event.fields["pids"] for event in job.events("workers_spawned"))
    assert (drained["drained_rank"], drained["exit_code"], drained["kind"]) == (rank, 0, "standby")
    assert drained["pid"] == spawned[str(rank)] != drained["new_pid"]
    assert (recovery["kind"], recovery["steps_replayed"], recovery["culprit_rank"]) == ("drained", 0, rank)
    assert recovery["version"] == f"step {drained['step']}"
    assert not job.events("fault")
    assert_identical(job, undisturbed(LONG))
