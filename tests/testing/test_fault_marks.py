"""A fault is claimed once per run, however many ranks try and however often the workers restart."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lightning_ckptless.protocol.fault_script import parse_faults
from lightning_ckptless.testing.fault_marks import FaultMarks


def marks(folder: Path, *, generation: int = 1, rank: int = 0) -> FaultMarks:
    return FaultMarks(folder / "faults", lambda: generation, rank)


def test_a_fault_is_claimed_once_per_run(tmp_path: Path) -> None:
    (fault,) = parse_faults("kill:rank=0:step=7")
    first = marks(tmp_path)
    assert first.claim(0, fault)
    assert not first.claim(0, fault)
    assert not marks(tmp_path, generation=2).claim(0, fault)


def test_a_repeated_fault_is_claimed_once_per_generation(tmp_path: Path) -> None:
    (fault,) = parse_faults("kill:rank=0:step=7:times=2")
    for generation, happens in ((1, True), (2, True), (3, False)):
        now = marks(tmp_path, generation=generation)
        assert now.claim(0, fault) == happens
        assert not now.claim(0, fault)


def test_a_fault_of_all_ranks_is_claimed_in_one_generation(tmp_path: Path) -> None:
    (fault,) = parse_faults("kill:rank=all:step=7")
    assert marks(tmp_path, rank=1).claim(0, fault)
    assert marks(tmp_path, rank=0).claim(0, fault)
    # The agent killed rank 2 before it reached the fault.
    assert not marks(tmp_path, generation=2, rank=2).claim(0, fault)


def test_equal_faults_with_different_indices_are_separate(tmp_path: Path) -> None:
    faults = parse_faults("kill:rank=0:step=7,kill:rank=0:step=7")
    assert marks(tmp_path).claim(0, faults[0])
    assert marks(tmp_path, generation=2).claim(1, faults[1])


def test_claimed_lists_the_injected_faults(tmp_path: Path) -> None:
    faults = parse_faults("kill:rank=0:step=7,raise:rank=1:step=9:at=commit")
    assert FaultMarks.claimed(tmp_path / "faults") == frozenset()
    marks(tmp_path).claim(1, faults[1])
    assert FaultMarks.claimed(tmp_path / "faults") == {1}


def test_only_one_of_many_concurrent_claims_succeeds(tmp_path: Path) -> None:
    (fault,) = parse_faults("kill:rank=0:step=7")
    contenders = [marks(tmp_path, generation=generation, rank=generation) for generation in range(16)]
    with ThreadPoolExecutor(16) as pool:
        won = list(pool.map(lambda contender: contender.claim(0, fault), contenders))
    assert won.count(True) == 1
    assert len(list((tmp_path / "faults").iterdir())) == 1
