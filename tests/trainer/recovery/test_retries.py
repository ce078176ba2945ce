"""Whether an exception of the script is worth a retry."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from lightning_ckptless.errors import OptionsError
from lightning_ckptless.protocol.versions import Version
from lightning_ckptless.replica.arena import Arena, Owner
from lightning_ckptless.trainer.recovery.retries import why_final

STEP = Version(5, True)


@pytest.fixture
def arena(tmp_path: Path) -> Iterator[Arena]:
    found = Arena.create(tmp_path, "run", "node0", Owner.of(os.getpid()))
    yield found
    found.close()


def test_the_first_exception_of_its_kind_at_a_step_is_retried(arena: Arena) -> None:
    assert why_final(ValueError(), rank=0, taken=STEP, arena=arena) is None
    assert why_final(KeyError(), rank=0, taken=STEP, arena=arena) is None
    assert why_final(KeyError(), rank=0, taken=Version(6, True), arena=arena) is None


def test_the_second_one_is_final(arena: Arena) -> None:
    why_final(ValueError(), rank=0, taken=STEP, arena=arena)
    for _ in range(2):
        reason = why_final(ValueError(), rank=0, taken=STEP, arena=arena)
        assert reason is not None and reason.startswith("ValueError after step 5 was raised again after a recovery")


def test_what_all_ranks_raise_is_retried_once_by_each(arena: Arena) -> None:
    assert [why_final(ValueError(), rank=rank, taken=STEP, arena=arena) for rank in range(2)] == [None, None]


def test_the_first_one_of_a_slow_rank_is_final_if_another_rank_has_raised_it_twice(arena: Arena) -> None:
    for _ in range(2):
        why_final(ValueError(), rank=1, taken=STEP, arena=arena)
    assert why_final(ValueError(), rank=0, taken=STEP, arena=arena) is not None
    assert why_final(ValueError(), rank=0, taken=Version(6, True), arena=arena) is None


@pytest.mark.parametrize("taken", [None, STEP])
def test_nothing_is_retried_before_the_first_step_or_if_the_run_is_misconfigured(
    taken: Version | None, arena: Arena
) -> None:
    error = ValueError() if taken is None else OptionsError("no")
    assert why_final(error, rank=0, taken=taken, arena=arena) is not None
