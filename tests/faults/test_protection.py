"""A start writes missing copies before its first step, so that it tolerates the next loss."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from lightning_ckptless.membership.forkserver.client import ForkServer
from lightning_ckptless.membership.launch.config import new_run_id
from lightning_ckptless.protocol.versions import Version
from lightning_ckptless.runner import remove_arenas
from tests.faults.test_restart import PER_RANK, Run


@pytest.fixture
def job(tmp_path: Path, parent: ForkServer) -> Iterator[Run]:
    """A run; its arena is removed at the end."""
    started = Run(tmp_path, parent, new_run_id())
    yield started
    assert started.config is not None
    remove_arenas(started.config)


def lose(job: Run, rank: int) -> None:
    """Remove all replicas that a rank holds."""
    for path in job.arena.path.glob(f"*.held-by-{rank:04d}.*"):
        path.unlink()


def test_missing_copies_are_rereplicated_before_the_first_step(job: Run) -> None:
    # While a version is being mirrored, the previous one is committed, so the restored version is deterministic.
    first = "kill:rank=1:step=7:at=mirror"
    job.start(PER_RANK, first)
    lose(job, 1)
    job.start(PER_RANK, f"{first},kill:rank=0:step=7:at=mirror")
    (protection,) = job.events("protection")
    assert protection.fields["pairs"] == [[0, 1], [1, 1]]
    assert protection.fields["copied_bytes"] > 0
    assert "filled in 2 missing copies of step 6" in job.output
    lose(job, 0)
    assert job.start(PER_RANK).exit_code == 0
    restored = [event.fields["version"] for event in job.events("restored")]
    assert restored == [str(Version(6, validation_done=True))] * 2
    assert [event.fields["pairs"] for event in job.events("protection")[1:]] == [[[0, 0], [1, 0]]]
