"""About fifty faults of the soak test, and the seeds that exposed bugs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from lightning_ckptless.membership.forkserver.client import ForkServer
from lightning_ckptless.membership.launch.config import LaunchConfig
from lightning_ckptless.membership.launch.launch import make_parent
from lightning_ckptless.testing.starters import program_of
from tests.faults.conftest import LAB
from tests.soak.draw import scenario
from tests.soak.run import run
from tests.soak.stage import Undisturbed

SELECTION = (148,)
"""DDP with dataloader workers and durable states."""
LONG = {
    166: "a 2D mesh with a standby, and flipped bytes",
    862: "FSDP2 with accumulation",
    3: "the second hang was detected eight times later than the first",
    15: "a survivor waited forever for a process group with another name",
    114: "a node failed on an arena that another node had just removed",
    134: "a second rank died during the rendezvous",
}
"""Further seeds: what they contain, or the bug that they have exposed."""


@pytest.fixture(scope="module")
def undisturbed(parent: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    return Undisturbed(tmp_path_factory.mktemp("undisturbed"), parent)


@pytest.fixture
def own_parent() -> Iterator[ForkServer]:
    """A fork server of one run, which may kill it; its successor would be reported as left behind by the test."""
    with make_parent(LaunchConfig(program=program_of([str(LAB)]))) as preloaded:
        preloaded.ready()
        yield preloaded


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", [*SELECTION, *(pytest.param(seed, marks=pytest.mark.long) for seed in LONG)])
def test_random_faults(seed: int, tmp_path: Path, own_parent: ForkServer, undisturbed: Undisturbed) -> None:
    drawn = scenario(seed)
    result = run(drawn, tmp_path / "run", own_parent, undisturbed)
    assert (result.outcome, result.why) == ("good", "")
    assert len(result.struck) >= 0.8 * len(drawn.faults), f"{set(drawn.faults) - set(result.struck)} were not injected"
    assert result.recoveries
    assert result.lost_steps == 0
