"""What stays of a run that is over, and what its user is told."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest

from lightning_ckptless.protocol.conclusion import Conclusion, Ending, conclude

COMMAND = "ckptless run --rdzv-id=mine train.py"
ENDED = Ending(is_asked_for=False, has_given_up=False, is_named=True, committed="step 7", durable="", command=COMMAND)
ASKED = replace(ENDED, is_asked_for=True)
UNNAMED = replace(ASKED, is_named=False)
GIVEN_UP = replace(ENDED, has_given_up=True, is_named=False)


@pytest.mark.parametrize("durable", ["", "the durable state of step 5"])
def test_nothing_stays_of_a_run_that_ended_well_or_by_its_program(durable: str) -> None:
    assert conclude(replace(ENDED, durable=durable)) == Conclusion(keeps_arenas=False)


@pytest.mark.parametrize("ending", [ASKED, GIVEN_UP])
def test_what_can_be_continued_is_kept_with_the_command(ending: Ending) -> None:
    text = f"step 7 is kept in shared memory; continue with: {COMMAND}"
    assert conclude(ending) == Conclusion(keeps_arenas=True, text=text)


def test_a_run_without_a_name_is_not_kept_when_it_is_asked_to_end() -> None:
    found = conclude(UNNAMED)
    assert not found.keeps_arenas
    assert "step 7 is not kept: the run was given no name. `ckptless run --rdzv-id NAME` starts one" in found.text


def test_a_durable_state_is_a_place_to_continue_from() -> None:
    found = conclude(replace(UNNAMED, durable="the durable state of step 5"))
    assert found == Conclusion(
        keeps_arenas=False, text=f"the durable state of step 5 is kept; continue with: {COMMAND}"
    )


@pytest.mark.parametrize("ending", [ASKED, GIVEN_UP])
def test_what_was_memory_of_the_agent_is_said_to_be_gone_with_it(ending: Ending) -> None:
    found = conclude(replace(ending, committed="", was_in_agent=True))
    assert not found.keeps_arenas and "it was in memory of the agent" in found.text


def test_who_is_told_is_told_one_thing_and_nothing_is_kept_without_a_state() -> None:
    for asked, given_up, named in product([False, True], repeat=3):
        found = conclude(Ending(asked, given_up, named, committed="", durable="", command=COMMAND))
        assert not found.keeps_arenas
        assert found.text == ("no state is kept: no step had been committed" if asked or given_up else "")
