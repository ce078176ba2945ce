"""What a generation does when it starts: every case, and that there is no other."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_ckptless.errors import OptionsError, StateMissingError, WorldSizeError
from lightning_ckptless.protocol.start import StartAction, StartPlan, plan_start
from lightning_ckptless.protocol.versions import Complete, Missing, Snapshot, Version

COMPLETE = Complete(Snapshot(Version(7, True), 1, 4, "layout"), ((),) * 4, "step 7 of generation 1 is complete")
TORN = Missing((1, 3), Version(7, True), "no version is complete: of step 7 shards 1, 3 of 4 have no replica")
EMPTY = Missing((), None, "the arenas are empty")

paths = st.sampled_from([None, "a.ckpt", "b.ckpt"])
cases = st.fixed_dictionaries(
    {
        "found": st.sampled_from([COMPLETE, TORN, EMPTY]),
        "generation": st.integers(100, 200),
        "world_size": st.integers(1, 6),
        "relaunched": st.booleans(),
        "had_commit": st.booleans(),
        "ckpt_path": paths,
        "origin": paths,
        "durable": paths,
        "on_unrecoverable": st.sampled_from(["durable", "raise"]),
    }
)


def planned(**changes: Any) -> StartPlan:
    usual: dict[str, Any] = {
        "found": EMPTY,
        "generation": 2,
        "world_size": 4,
        "relaunched": True,
        "had_commit": True,
        "ckpt_path": None,
        "origin": None,
        "durable": None,
        "on_unrecoverable": "durable",
    }
    return plan_start(**(usual | changes))


@given(cases)
def test_every_case_has_a_plan_that_hangs_together(case: dict[str, Any]) -> None:
    plan = plan_start(**case)
    assert (plan.error is not None) == (plan.action is StartAction.REFUSE)
    assert (plan.action is StartAction.RESTORE) <= isinstance(case["found"], Complete)
    assert (plan.action is StartAction.FRESH) <= (isinstance(case["found"], Missing) and not case["had_commit"])
    assert plan.ckpt_path == {StartAction.FRESH: case["ckpt_path"], StartAction.DURABLE: case["durable"]}.get(
        plan.action
    )


@given(cases)
def test_every_reason_has_its_numbers(case: dict[str, Any]) -> None:
    plan = plan_start(**case)
    expected = [case["found"].reason]
    if plan.error is WorldSizeError:
        expected = ["step 7", "by 4 ranks", f"{case['world_size']} are started", "start 4 ranks"]
    elif plan.error is OptionsError:
        expected = ["step 7", case["ckpt_path"], case["origin"] or "without a checkpoint file"]
    else:
        expected.append(f"generation {case['generation']}")
    if plan.ckpt_path is not None:
        expected.append(plan.ckpt_path)
    assert all(part in plan.reason for part in expected), (plan.reason, expected)


def test_empty_arenas_begin_a_new_run() -> None:
    assert planned(generation=1, relaunched=False, had_commit=False) == StartPlan(
        StartAction.FRESH, "the arenas are empty: a new run, generation 1 begins from the start"
    )


def test_a_new_run_begins_from_the_file_that_was_asked_for() -> None:
    plan = planned(generation=1, relaunched=False, had_commit=False, ckpt_path="a.ckpt")
    assert plan == StartPlan(
        StartAction.FRESH, "the arenas are empty: a new run, generation 1 begins from a.ckpt", "a.ckpt"
    )


@pytest.mark.parametrize("found", [EMPTY, TORN])
def test_death_before_the_first_commit_begins_again(found: Missing) -> None:
    plan = planned(found=found, had_commit=False)
    assert plan.action is StartAction.FRESH
    assert plan.reason == (
        f"generation 2 begins from the start: no generation before it has committed a version ({found.reason})"
    )


@pytest.mark.parametrize("relaunched", [False, True])
def test_a_complete_version_is_restored(relaunched: bool) -> None:
    plan = planned(found=COMPLETE, relaunched=relaunched)
    assert plan == StartPlan(StartAction.RESTORE, "generation 2 goes on: step 7 of generation 1 is complete")


def test_another_world_size_is_refused() -> None:
    plan = planned(found=COMPLETE, world_size=3)
    assert plan.error is WorldSizeError
    assert plan.reason == (
        "step 7 was mirrored by 4 ranks, and 3 are started: "
        "start 4 ranks, or remove the mirrored state with `ckptless clean`"
    )


def test_another_checkpoint_file_than_the_runs_own_is_refused_at_a_first_start_only() -> None:
    plan = planned(found=COMPLETE, relaunched=False, ckpt_path="b.ckpt", origin="a.ckpt")
    assert plan.error is OptionsError
    assert plan.reason == (
        "ckpt_path='b.ckpt', but the arenas hold step 7 of a run that began from a.ckpt: "
        "pass ckpt_path='a.ckpt' to go on with that run, or remove it with `ckptless clean`"
    )
    assert planned(found=COMPLETE, relaunched=True, ckpt_path="b.ckpt", origin="a.ckpt").error is None
    assert planned(found=COMPLETE, relaunched=False, ckpt_path="a.ckpt", origin="a.ckpt").error is None


def test_lost_shards_fall_to_the_newest_file() -> None:
    plan = planned(found=TORN, durable="a.ckpt")
    assert (plan.action, plan.ckpt_path) == (StartAction.DURABLE, "a.ckpt")
    assert "shards 1, 3 of 4" in plan.reason


@pytest.mark.parametrize("found", [EMPTY, TORN])
@pytest.mark.parametrize(
    ("durable", "on_unrecoverable", "why"),
    [
        (None, "durable", "no checkpoint file of the run was found"),
        (None, "raise", "no checkpoint file of the run was found"),
        ("a.ckpt", "raise", "on_unrecoverable='raise' forbids to go on from a checkpoint file: ckpt_path='a.ckpt'"),
    ],
)
def test_no_rung_left_is_an_error(found: Missing, durable: str | None, on_unrecoverable: str, why: str) -> None:
    plan = planned(found=found, durable=durable, on_unrecoverable=on_unrecoverable)
    assert plan.error is StateMissingError
    assert why in plan.reason
