"""Stamps of the steps that ranks have begun."""

from __future__ import annotations

from pathlib import Path

from lightning_ckptless.replica.transport import SoloTransport
from lightning_ckptless.trainer.commit.step_stamps import StepStamps, last_begun, step_in_flight


def test_nothing_has_begun_before_the_first_stamp(tmp_path: Path) -> None:
    assert (last_begun(tmp_path), step_in_flight(tmp_path, SoloTransport())) == (0, 0)


def test_the_step_in_flight_is_the_last_that_all_ranks_have_begun(tmp_path: Path) -> None:
    for rank, step in ((0, 5), (1, 4)):
        stamps = StepStamps(tmp_path)
        stamps.stamp(rank, step)
        stamps.close()
    assert (last_begun(tmp_path), step_in_flight(tmp_path, SoloTransport())) == (5, 4)


def test_a_process_stamps_the_steps_of_the_rank_that_it_has(tmp_path: Path) -> None:
    stamps = StepStamps(tmp_path)
    stamps.stamp(1, 4)
    stamps.stamp(0, 4)
    stamps.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["begun-by-0000", "begun-by-0001"]


def test_a_shorter_stamp_replaces_a_longer_one(tmp_path: Path) -> None:
    stamps = StepStamps(tmp_path)
    for step in (1000, 7):
        stamps.stamp(0, step)
        assert last_begun(tmp_path) == step
    stamps.close()
