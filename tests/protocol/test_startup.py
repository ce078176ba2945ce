"""How a generation starts: every case, and that there are no others."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_ckptless.errors import OptionsError, StateMissingError
from lightning_ckptless.protocol.durable_schedule import DurableState
from lightning_ckptless.protocol.startup import CheckpointFile, Left, Start, StartAction, StartPlan, plan_start
from lightning_ckptless.protocol.versions import Complete, Missing, Snapshot, Version

COMPLETE = Complete(Snapshot(Version(7, True), 1, 4, "layout"), ((),) * 4, "step 7 of generation 1 is complete")
TORN = Missing((1, 3), Version(7, True), "no version is complete: shards 1, 3 of 4 have no replica of step 7")
EMPTY = Missing((), None, "the arenas are empty")


def kept(step: int, *, world_size: int = 4, origin: str | None = None) -> DurableState:
    return DurableState(f"durable/{step}", Snapshot(Version(step, True), 1, world_size, "layout"), "before", origin)


files = st.sampled_from([None, *(CheckpointFile(f"{name}.ckpt", step) for name in "ab" for step in (None, 5, 7, 9))])
states = st.sampled_from([None, *(kept(step, origin=origin) for step in (6, 7, 8) for origin in (None, "a.ckpt"))])
cases = st.fixed_dictionaries(
    {
        "found": st.sampled_from([COMPLETE, TORN, EMPTY]),
        "generation": st.integers(100, 200),
        "world_size": st.integers(1, 6),
        "relaunched": st.booleans(),
        "had_commit": st.booleans(),
        "asked": files,
        "origin": st.sampled_from([None, "a.ckpt", "b.ckpt"]),
        "state": states,
        "file": files,
        "damaged": st.sampled_from([(), ("durable/9 is damaged",)]),
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
        "asked": None,
        "origin": None,
        "state": None,
        "file": None,
        "damaged": (),
        "on_unrecoverable": "durable",
    }
    case = usual | changes
    found, left = case.pop("found"), Left(case.pop("state"), case.pop("file"), case.pop("damaged"))
    return plan_start(Start(**case), found, left)


@given(cases)
def test_every_case_has_a_consistent_plan(case: dict[str, Any]) -> None:
    plan = planned(**case)
    lost = isinstance(case["found"], Missing)
    assert (plan.error is not None) == (plan.action is StartAction.REFUSE)
    if plan.action is StartAction.RESTORE:
        assert isinstance(case["found"], Complete)
    if plan.action is StartAction.FRESH and plan.ckpt_path is None:
        assert lost and not case["had_commit"] and not case["damaged"] and case["state"] is None
    if plan.action is StartAction.DURABLE:
        assert (plan.state is None) != (plan.ckpt_path is None)
        assert plan.state in (None, case["state"])
        assert plan.ckpt_path in (None, *(file.path for file in (case["file"], case["asked"]) if file is not None))
    assert plan.enters_midway == (plan.action is StartAction.RESTORE or plan.state is not None)


@given(cases)
def test_the_newest_state_is_resumed(case: dict[str, Any]) -> None:
    plan, state, found = planned(**case), case["state"], case["found"]
    if plan.action is StartAction.RESTORE and state is not None and not case["relaunched"]:
        assert state.snapshot.version <= found.snapshot.version
    if plan.state is not None and isinstance(found, Complete):
        assert plan.state.snapshot.version > found.snapshot.version and not case["relaunched"]
    if plan.action is StartAction.DURABLE and plan.ckpt_path is not None and state is not None:
        steps = [
            file.step for file in (case["file"], case["asked"]) if file is not None and file.path == plan.ckpt_path
        ]
        assert any(step is not None and step > state.snapshot.version.optimizer_step for step in steps)


@given(cases)
def test_every_reason_contains_its_numbers(case: dict[str, Any]) -> None:
    plan, state = planned(**case), case["state"]
    expected: list[str] = []
    if plan.error is OptionsError:
        expected = ["step ", case["asked"].path]
    else:
        expected = [f"generation {case['generation']}"]
        is_newer = state is not None and str(state) in plan.reason
        if plan.state is None and not is_newer:
            expected.append(case["found"].reason)
    if plan.ckpt_path is not None:
        expected.append(plan.ckpt_path)
    if plan.state is not None:
        expected += [plan.state.path, f"step {plan.state.snapshot.version.optimizer_step}", "of run before"]
    assert all(part in plan.reason for part in expected), (plan.reason, expected)


def test_empty_arenas_start_a_new_run() -> None:
    assert planned(generation=1, relaunched=False, had_commit=False) == StartPlan(
        StartAction.FRESH, "the arenas are empty: a new run, generation 1 starts from scratch"
    )


def test_a_new_run_starts_from_the_file_that_the_user_passed() -> None:
    plan = planned(generation=1, relaunched=False, had_commit=False, asked=CheckpointFile("a.ckpt"))
    assert plan == StartPlan(
        StartAction.FRESH, "the arenas are empty: a new run, generation 1 starts from a.ckpt", "a.ckpt"
    )


@pytest.mark.parametrize("found", [EMPTY, TORN])
def test_a_relaunch_before_the_first_commit_starts_from_scratch(found: Missing) -> None:
    plan = planned(found=found, had_commit=False)
    assert plan.action is StartAction.FRESH
    assert plan.reason == (
        f"generation 2 starts from scratch: no earlier generation committed a version ({found.reason})"
    )


@pytest.mark.parametrize("relaunched", [False, True])
def test_a_complete_version_is_restored(relaunched: bool) -> None:
    plan = planned(found=COMPLETE, relaunched=relaunched)
    assert plan == StartPlan(StartAction.RESTORE, "generation 2 resumes: step 7 of generation 1 is complete")


def test_a_version_of_another_world_size_is_restored() -> None:
    """Whether it can be continued is checked when the version is read (`protocol.virtual_ranks`)."""
    plan = planned(found=COMPLETE, world_size=3)
    assert plan.action is StartAction.RESTORE
    assert plan.reason == "generation 2 resumes: step 7 of generation 1 is complete; written by 4 ranks, resumed on 3"


def test_a_checkpoint_file_other_than_the_runs_own_is_refused_at_a_first_start_only() -> None:
    plan = planned(found=COMPLETE, relaunched=False, asked=CheckpointFile("b.ckpt"), origin="a.ckpt")
    assert plan.error is OptionsError
    assert plan.reason == (
        "ckpt_path='b.ckpt', but the arenas hold step 7 of a run that started from a.ckpt: "
        "pass ckpt_path='a.ckpt' to continue that run, or remove it with `ckptless clean`"
    )
    assert planned(found=COMPLETE, relaunched=True, asked=CheckpointFile("b.ckpt"), origin="a.ckpt").error is None
    assert planned(found=COMPLETE, relaunched=False, asked=CheckpointFile("a.ckpt"), origin="a.ckpt").error is None


def test_lost_shards_fall_back_to_the_newest_file() -> None:
    plan = planned(found=TORN, file=CheckpointFile("a.ckpt"))
    assert (plan.action, plan.ckpt_path) == (StartAction.DURABLE, "a.ckpt")
    assert "shards 1, 3 of 4" in plan.reason


@pytest.mark.parametrize("found", [EMPTY, TORN])
@pytest.mark.parametrize(
    ("file", "on_unrecoverable", "why"),
    [
        (None, "durable", "no checkpoint file of the run was found"),
        (None, "raise", "no checkpoint file of the run was found"),
        (
            CheckpointFile("a.ckpt"),
            "raise",
            "on_unrecoverable='raise' forbids resuming from a checkpoint file: pass ckpt_path='a.ckpt'",
        ),
    ],
)
def test_no_state_left_is_an_error(
    found: Missing, file: CheckpointFile | None, on_unrecoverable: str, why: str
) -> None:
    plan = planned(found=found, file=file, on_unrecoverable=on_unrecoverable)
    assert plan.error is StateMissingError
    assert why in plan.reason


# ---------------------------------------------------------------------- durable states


def test_arenas_are_preferred_to_a_durable_state_of_the_same_step() -> None:
    assert planned(found=COMPLETE, state=kept(7), relaunched=False).action is StartAction.RESTORE
    assert planned(found=COMPLETE, state=kept(6), relaunched=False).action is StartAction.RESTORE


def test_a_durable_state_newer_than_the_arenas_is_used() -> None:
    plan = planned(found=COMPLETE, state=kept(9), relaunched=False)
    assert plan.state == kept(9)
    assert plan.reason == (
        "generation 2 resumes from the durable state durable/9: step 9 of run before is the newest state left, newer "
        "than step 7 in the arenas"
    )


def test_a_new_start_resumes_from_a_durable_state() -> None:
    plan = planned(state=kept(9), generation=1, relaunched=False, had_commit=False)
    assert plan.state == kept(9)
    assert plan.reason.endswith("step 9 of run before is the newest state left; the arenas are empty")


@pytest.mark.parametrize(("step", "takes_state"), [(8, True), (9, True), (10, False)])
def test_the_newer_of_a_durable_state_and_the_users_file_is_used(step: int, takes_state: bool) -> None:
    asked = CheckpointFile("other.ckpt", step)
    plan = planned(state=kept(9), asked=asked, relaunched=False, had_commit=False)
    assert (plan.state is not None) is takes_state
    assert plan.ckpt_path == (None if takes_state else "other.ckpt")
    assert f"other.ckpt (step {step})" in plan.reason


def test_the_file_that_the_run_started_from_is_older_than_its_states() -> None:
    plan = planned(state=kept(9, origin="a.ckpt"), asked=CheckpointFile("a.ckpt"), relaunched=False, had_commit=False)
    assert plan.state is not None


def test_a_file_whose_step_is_unknown_is_refused() -> None:
    plan = planned(state=kept(9), asked=CheckpointFile("last"), relaunched=False, had_commit=False)
    assert plan.error is OptionsError
    assert "ckpt_path='last', but the durable state durable/9 holds step 9" in plan.reason
    assert "omit ckpt_path" in plan.reason


def test_a_durable_state_of_another_world_size_is_resumed() -> None:
    plan = planned(state=kept(9, world_size=2), relaunched=False, had_commit=False)
    assert plan.state is not None
    assert plan.reason.endswith("; written by 2 ranks, resumed on 4")


@pytest.mark.parametrize(("step", "takes_state"), [(None, True), (9, True), (10, False)])
def test_the_newer_of_a_durable_state_and_a_file_of_the_run_is_used(step: int | None, takes_state: bool) -> None:
    plan = planned(found=TORN, state=kept(9), file=CheckpointFile("a.ckpt", step))
    assert plan.action is StartAction.DURABLE
    assert (plan.state is not None) is takes_state


def test_a_durable_restore_may_be_forbidden() -> None:
    plan = planned(found=TORN, state=kept(9), on_unrecoverable="raise")
    assert plan.error is StateMissingError
    assert "forbids resuming from the durable state durable/9" in plan.reason


def test_a_damaged_durable_state_does_not_start_the_run_from_scratch() -> None:
    plan = planned(had_commit=False, relaunched=False, damaged=("durable/9: shard 1 is damaged",))
    assert plan.error is StateMissingError
    assert "ignored: durable/9: shard 1 is damaged" in plan.reason
    older = planned(had_commit=False, relaunched=False, state=kept(6), damaged=("durable/9: shard 1 is damaged",))
    assert older.state == kept(6)
    assert "ignored: durable/9: shard 1 is damaged" in older.reason
