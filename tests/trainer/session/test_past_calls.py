"""Records of earlier calls: when they are used, and why a new process cannot replay a call without one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_ckptless import environment
from lightning_ckptless.errors import TransportError
from lightning_ckptless.membership.channel.program_failure import report_failure
from lightning_ckptless.trainer.session.past_calls import PastCalls


def record(rank: int) -> dict[str, Any]:
    shared = {"weight": torch.arange(3.0)} if rank == 0 else {}
    return {"shared": shared, "tensors": {"mean": torch.full((2,), float(rank))}, "result": [rank]}


@pytest.fixture
def ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[PastCalls]:
    """Records of two ranks on one node."""
    monkeypatch.setenv(environment.AGENT_DIR, str(tmp_path))
    return [PastCalls(tmp_path / "calls", rank, 2) for rank in range(2)]


def test_a_call_counts_as_recorded_when_all_ranks_have_recorded_it(ranks: list[PastCalls]) -> None:
    ranks[0].write(0, record(0))
    assert ranks[0].find(0) is None
    assert ranks[1].obstacle(1) == "call 1 of the script's trainers is not recorded"
    ranks[1].write(0, record(1))
    for rank, past in enumerate(ranks):
        found = past.find(0)
        assert found is not None
        assert found["result"] == [rank]
        assert found["tensors"]["weight"].tolist() == [0, 1, 2]
        assert found["tensors"]["mean"].tolist() == [rank, rank]
        assert past.obstacle(1) is None


def test_a_call_that_cannot_be_recorded_is_over_and_stores_the_reason(ranks: list[PastCalls]) -> None:
    assert not ranks[1].is_over(0)
    ranks[0].refuse(0, "it returned 3 GB")
    assert ranks[1].is_over(0)
    assert not ranks[1].is_over(1)
    assert ranks[0].obstacle(1) == "it returned 3 GB"
    assert ranks[0].find(0) is None


def test_a_call_that_is_made_again_is_recorded_again(ranks: list[PastCalls]) -> None:
    ranks[0].refuse(0, "it returned 3 GB")
    ranks[0].write(0, record(0))
    assert ranks[0].obstacle(1) is None
    assert ranks[1].is_over(0)
    ranks[0].forget(0)
    assert not ranks[1].is_over(0)


def test_an_unpicklable_result_is_refused_and_leaves_no_partial_file(ranks: list[PastCalls], tmp_path: Path) -> None:
    ranks[0].write(0, record(0) | {"result": lambda: None})
    assert "could not be recorded" in str(ranks[0].obstacle(1))
    assert [path.name for path in (tmp_path / "calls").iterdir()] == ["why-not-0-of-rank-0"]


@pytest.mark.parametrize(("error", "counts"), [(ValueError("mine"), True), (TransportError("a peer was lost"), False)])
def test_no_record_is_used_after_a_script_failed_between_calls(
    error: Exception, counts: bool, ranks: list[PastCalls]
) -> None:
    for rank, past in enumerate(ranks):
        past.write(0, record(rank))
    ranks[0].begin_replay()
    assert ranks[1].find(0) is not None
    report_failure(error)
    assert (ranks[1].find(0) is None) is counts
    assert (ranks[1].obstacle(1) is not None) is counts


def test_a_failure_after_the_last_recorded_call_is_ignored(ranks: list[PastCalls]) -> None:
    for rank, past in enumerate(ranks):
        past.write(0, record(rank))
    ranks[0].begin_replay()
    ranks[0].end_replay()
    report_failure(ValueError("mine"))
    assert ranks[1].find(0) is not None


def test_without_an_agent_there_are_no_records() -> None:
    past = PastCalls(None, 0, 1)
    assert not past.are_kept
    assert past.find(0) is None
    assert past.obstacle(0) is None
    assert "only on a single node" in str(past.obstacle(1))
