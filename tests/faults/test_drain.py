"""Draining a rank: another process takes it at a committed step, and no step is replayed."""

from __future__ import annotations

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from lightning_ckptless.membership.agent.signals import AskedToEnd
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


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.long)])
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


@pytest.mark.long
@pytest.mark.parametrize("killed", [0, 1])
def test_a_kill_while_a_rank_is_drained(killed: int, job: Run, undisturbed: Callable[[Options], Variant]) -> None:
    # The standby of the drain may take the killed rank. Then another one is started for the drained rank.
    answer = run_and_drain(job, LONG, 1, f"kill:rank={killed}:step=8")
    assert answer.accepted or "was lost before it handed over, and was replaced" in answer.reason
    assert len(job.events("fault")) == 1
    assert len(job.events("drained")) == answer.accepted
    assert_identical(job, undisturbed(LONG))


@pytest.mark.long
def test_what_cannot_be_drained_is_refused_while_the_run_continues(
    job: Run, undisturbed: Callable[[Options], Variant]
) -> None:
    folder = job.folder / "runs" / job.run_id
    folder.mkdir(parents=True)
    requests = DrainRequest(rank=2), DrainRequest(node=0), DrainRequest(node=1)
    with ThreadPoolExecutor(1) as terminal:
        asked = terminal.map(lambda request: submit(folder, request, timeout_s=100), requests)
        assert job.start(replace(LONG, slow_mirror_s=0.05)).exit_code == 0
        answers = list(asked)
    assert [answer.accepted for answer in answers] == [False] * 3
    reasons = ["the run has 2 ranks", "it is the only node of the run", "the run has 1 node, numbered from 0"]
    assert all(reason in answer.reason for reason, answer in zip(reasons, answers, strict=True))
    assert_identical(job, undisturbed(LONG))


def test_a_preemption_notice_ends_a_run_whose_work_nothing_can_take(job: Run) -> None:
    soon = "tests.lab.kinds.preempted"
    with pytest.raises(AskedToEnd):
        job.start(replace(LONG, slow_mirror_s=0.1), preemption_notice=soon)
    (refused,) = (event.fields for event in job.events("drain"))
    assert refused["cause"] == f"{soon} gave notice: in two minutes"
    assert (refused["action"], "the only node of the run" in refused["reason"]) == ("refuse", True)
    # As on SIGTERM, all ranks have stopped after the same step.
    assert {event.rank for event in job.events("stopped")} == {0, 1}


@pytest.mark.parametrize("factor", [1.5, pytest.param(1e6, marks=pytest.mark.long)])
def test_a_straggler_hands_over_to_another_process(
    factor: float, job: Run, undisturbed: Callable[[Options], Variant]
) -> None:
    asked = {"drain_stragglers_after_s": 3.0, "straggler_factor": factor, "broadcast_buffers": False}
    options = replace(LONG, epochs=2 if factor < 2 else 1, callback="dragging", strategy_options=repr(asked))
    slow = replace(options, slow_mirror_s=0.1, slow_until=str(job.folder / "swift"))
    assert job.start(slow if factor < 2 else options, "kill:rank=1:step=9999").exit_code == 0, job.output
    drained = [event.fields for event in job.events("drained")]
    if factor > 2:
        assert not drained
        return
    assert [fields["drained_rank"] for fields in drained] == [1]
    (planned,) = (event.fields for event in job.events("drain"))
    assert planned["cause"] == drained[0]["cause"]
    assert re.fullmatch(
        r"straggler: rank 1 takes \d+\.\d ms per step, \d+\.\dx the median of the others for \d+\.\d s",
        planned["cause"],
    )
    (recovery,) = (event.fields for event in job.events("recovery"))
    assert (recovery["kind"], recovery["steps_replayed"]) == ("drained", 0)
    assert_identical(job, undisturbed(options))


def test_stragglers_are_not_drained_where_ranks_wait_in_the_forward_pass(job: Run) -> None:
    assert job.start(replace(LONG, strategy_options=repr({"drain_stragglers_after_s": 3.0}))).exit_code != 0
    assert "Set broadcast_buffers=False, or leave the option out" in job.output


def test_an_unfit_node_that_cannot_be_drained_is_reported_once(
    job: Run, undisturbed: Callable[[Options], Variant], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {"health_check": "kinds.disk_answers", "health_check_every_s": 0.2}
    options = replace(LONG, strategy_options=repr(asked))
    expected = undisturbed(options)
    monkeypatch.setenv("LAB_UNFIT", str(job.folder / DONE))
    assert job.start(replace(options, slow_mirror_s=0.1, slow_until=str(job.folder / DONE))).exit_code == 0, job.output
    (refused,) = (event.fields for event in job.events("drain"))
    assert refused["cause"] == (
        "the node failed its health check: kinds.disk_answers raised OSError: the disk does not answer"
    )
    assert (refused["action"], "the only node of the run" in refused["reason"]) == ("refuse", True)
    assert_identical(job, expected)
