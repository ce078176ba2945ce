"""What is kept when a run ends, and the message to the user."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest

from lightning_ckptless.protocol.run_end import Conclusion, RunOutcome, conclude

COMMAND = "ckptless run --rdzv-id=mine train.py"
ENDED = RunOutcome(
    is_asked_for=False, has_given_up=False, is_named=True, committed="step 7", durable="", command=COMMAND
)
ASKED = replace(ENDED, is_asked_for=True)
UNNAMED = replace(ASKED, is_named=False)
GIVEN_UP = replace(ENDED, has_given_up=True, is_named=False)


@pytest.mark.parametrize("durable", ["", "the durable state of step 5"])
def test_nothing_is_kept_of_a_run_that_finished_or_failed_by_its_script(durable: str) -> None:
    assert conclude(replace(ENDED, durable=durable)) == Conclusion(keeps_arenas=False)


@pytest.mark.parametrize("outcome", [ASKED, GIVEN_UP])
def test_a_run_that_can_be_continued_is_kept_and_the_command_is_shown(outcome: RunOutcome) -> None:
    text = f"step 7 is kept in shared memory; continue with: {COMMAND}"
    assert conclude(outcome) == Conclusion(keeps_arenas=True, text=text)


def test_a_run_without_a_run_id_is_not_kept_when_it_is_stopped() -> None:
    found = conclude(UNNAMED)
    assert not found.keeps_arenas
    assert "step 7 is not kept: no run id was given. Start the run with `ckptless run --rdzv-id NAME`" in found.text


def test_a_run_can_be_continued_from_a_durable_state() -> None:
    found = conclude(replace(UNNAMED, durable="the durable state of step 5"))
    assert found == Conclusion(
        keeps_arenas=False, text=f"the durable state of step 5 is kept; continue with: {COMMAND}"
    )


@pytest.mark.parametrize("outcome", [ASKED, GIVEN_UP])
def test_slots_in_the_agents_memory_are_not_kept(outcome: RunOutcome) -> None:
    found = conclude(replace(outcome, committed="", was_in_agent=True))
    assert not found.keeps_arenas and "it was in the agent's memory" in found.text


def test_without_a_state_nothing_is_kept() -> None:
    for asked, given_up, named in product([False, True], repeat=3):
        found = conclude(RunOutcome(asked, given_up, named, committed="", durable="", command=COMMAND))
        assert not found.keeps_arenas
        assert found.text == ("no state is kept: no step was committed" if asked or given_up else "")
