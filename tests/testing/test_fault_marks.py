"""A fault happens once per run, whoever asks, however often the workers start again."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lightning_ckptless.protocol.fault_script import parse_faults
from lightning_ckptless.testing.fault_marks import FaultMarks


def marks(folder: Path, *, generation: int = 1, rank: int = 0) -> FaultMarks:
    return FaultMarks(folder / "faults", lambda: generation, rank)


def test_once_per_run(tmp_path: Path) -> None:
    (fault,) = parse_faults("kill:rank=0:step=7")
    first = marks(tmp_path)
    assert first.claim(0, fault)
    assert not first.claim(0, fault)
    assert not marks(tmp_path, generation=2).claim(0, fault)


def test_several_times_is_once_in_each_of_several_generations(tmp_path: Path) -> None:
    (fault,) = parse_faults("kill:rank=0:step=7:times=2")
    for generation, happens in ((1, True), (2, True), (3, False)):
        now = marks(tmp_path, generation=generation)
        assert now.claim(0, fault) == happens
        assert not now.claim(0, fault)


def test_all_ranks_of_one_generation_and_none_of_the_next(tmp_path: Path) -> None:
    (fault,) = parse_faults("kill:rank=all:step=7")
    assert marks(tmp_path, rank=1).claim(0, fault)
    assert marks(tmp_path, rank=0).claim(0, fault)
    # Rank 2 was ended by the agent before its turn.
    assert not marks(tmp_path, generation=2, rank=2).claim(0, fault)


def test_equal_faults_at_different_places_are_two(tmp_path: Path) -> None:
    faults = parse_faults("kill:rank=0:step=7,kill:rank=0:step=7")
    assert marks(tmp_path).claim(0, faults[0])
    assert marks(tmp_path, generation=2).claim(1, faults[1])


def test_claimed_names_what_has_happened(tmp_path: Path) -> None:
    faults = parse_faults("kill:rank=0:step=7,raise:rank=1:step=9:at=commit")
    assert FaultMarks.claimed(tmp_path / "faults") == frozenset()
    marks(tmp_path).claim(1, faults[1])
    assert FaultMarks.claimed(tmp_path / "faults") == {1}


def test_of_many_at_once_one_wins(tmp_path: Path) -> None:
    (fault,) = parse_faults("kill:rank=0:step=7")
    contenders = [marks(tmp_path, generation=generation, rank=generation) for generation in range(16)]
    with ThreadPoolExecutor(16) as pool:
        won = list(pool.map(lambda contender: contender.claim(0, fault), contenders))
    assert won.count(True) == 1
    assert len(list((tmp_path / "faults").iterdir())) == 1
