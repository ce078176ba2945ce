"""What the exit of a worker means: a fault of the node, or an error of the script."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lightning_ckptless.protocol.crash_loop import EndPlan, ProgramEnd, Stage, Starts, judge_end


def ends(*ends_: ProgramEnd, came_to_fit: bool = True, has_stepped: bool = False) -> EndPlan:
    """Judge several ends in a row; returns the plan for the last one."""
    plan = EndPlan(Starts(came_to_fit=came_to_fit))
    for end in ends_:
        assert plan.final is None
        plan = judge_end(end, plan.starts, has_stepped=has_stepped)
    return plan


@pytest.mark.parametrize("stage", Stage)
def test_a_signal_and_a_lost_peer_are_recovered_from_at_any_stage(stage: Stage) -> None:
    killed = ProgramEnd(-9, stage)
    peer_lost = ProgramEnd(1, stage, "RuntimeError: Connection closed by peer", is_of_lost_peer=True)
    unknown = ProgramEnd(None, stage)
    assert ends(*[killed, peer_lost, unknown] * 4).final is None


@pytest.mark.parametrize(
    ("end", "text"),
    [
        (ProgramEnd(1, Stage.PAST, "KeyError: 'mine'"), "exited after fit (KeyError: 'mine') and would do so again"),
        (ProgramEnd(7, Stage.PAST), "exited after fit (exit code 7)"),
        (ProgramEnd(-9, Stage.PAST, "ValueError: kept from ending"), "exited after fit (ValueError: kept from ending)"),
    ],
)
def test_an_exit_after_fit_ends_the_run_at_once(end: ProgramEnd, text: str) -> None:
    plan = ends(end, has_stepped=True)
    assert plan.final is not None and text in plan.final
    assert not plan.keeps_state


def test_a_script_that_cannot_run_again_before_fit_ends_the_run_and_keeps_its_state() -> None:
    refused = ProgramEnd(1, Stage.BEFORE, "FileExistsError: out")
    assert ends(refused).final is None
    plan = ends(refused, refused)
    assert plan.final is not None and plan.keeps_state
    assert (
        "2 new processes in a row exited before fit (FileExistsError: out), which the first processes reached"
        in plan.final
    )


@pytest.mark.parametrize("end", [ProgramEnd(6, Stage.BEFORE), ProgramEnd(6, Stage.INSIDE)])
def test_three_starts_without_a_step_end_the_run(end: ProgramEnd) -> None:
    assert ends(end, end, came_to_fit=False).final is None
    plan = ends(end, end, end, came_to_fit=False)
    assert plan.final == "3 starts in a row exited before completing a step, the last with exit code 6"
    assert not plan.keeps_state


def test_a_step_or_a_signal_in_between_resets_the_count() -> None:
    exited = ProgramEnd(3, Stage.INSIDE)
    assert ends(*[exited, exited, ProgramEnd(-9, Stage.INSIDE)] * 3).final is None
    assert ends(*[exited] * 9, has_stepped=True).final is None


ABORTED = ProgramEnd(-6, Stage.BEFORE, signal_name="SIGABRT")
FAULTED = ProgramEnd(-11, Stage.INSIDE, signal_name="SIGSEGV", rank=1, step=7)
KILLED = replace(FAULTED, exit_code=-9, signal_name="SIGKILL")
STARVED = replace(KILLED, out_of_memory="the kernel has killed 4 processes")


@pytest.mark.parametrize("stage", Stage)
def test_the_third_crash_at_a_stage_outside_the_loop_ends_the_run_and_keeps_its_state(stage: Stage) -> None:
    crash = replace(ABORTED, stage=stage)
    other = replace(crash, rank=1)
    assert ends(crash, other, came_to_fit=False).final is None
    plan = ends(crash, other, crash, came_to_fit=False)
    assert plan.keeps_state
    assert plan.final == (
        f"ranks 0, 1 crashed 3 times in a row {stage} (SIGABRT) and would do so again. "
        "Set PYTHONFAULTHANDLER=1 to print where it crashes"
    )


def test_the_fourth_crash_at_a_step_ends_the_run_and_keeps_its_state() -> None:
    assert ends(*[FAULTED] * 3).final is None
    plan = ends(*[FAULTED] * 4)
    assert plan.final is not None and plan.keeps_state
    assert "rank 1 crashed 4 times in a row at step 7 (SIGSEGV) and would" in plan.final


def test_only_a_sigkill_for_lack_of_memory_is_a_crash() -> None:
    plan = ends(*[STARVED] * 4)
    assert plan.final is not None
    assert "The kernel has killed 4 processes: raise the memory limit or use less memory" in plan.final
    assert ends(*[KILLED] * 20).final is None
    # One kill that the kernel has not counted yet, or one from outside, changes nothing of what repeats.
    assert ends(STARVED, STARVED, KILLED, STARVED, STARVED).final is not None


def test_a_crash_at_another_place_resets_the_count() -> None:
    elsewhere = replace(FAULTED, step=8)
    assert ends(*[FAULTED] * 3, elsewhere, *[FAULTED] * 3).final is None
    assert ends(*[ABORTED] * 2, replace(ABORTED, stage=Stage.INSIDE), *[ABORTED] * 2).final is None


def test_new_steps_reset_the_count_of_a_stage_but_not_of_a_step() -> None:
    assert ends(*[ABORTED] * 9, has_stepped=True).final is None
    assert ends(*[FAULTED] * 3, has_stepped=True).final is None
    assert ends(*[FAULTED] * 4, has_stepped=True).final is not None


def test_an_error_reported_before_the_signal_is_no_crash() -> None:
    assert not replace(FAULTED, error="ValueError: mine").is_crash
    assert not replace(FAULTED, exit_code=None, signal_name="").is_crash
