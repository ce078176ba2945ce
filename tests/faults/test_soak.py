"""About fifty faults of the soak, and the seeds that have found something."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest

from benchmarks.soak import nodes, one_node
from benchmarks.soak.draw import scenario
from benchmarks.soak.processes import MARK
from benchmarks.soak.stage import Undisturbed
from lightning_ckptless.membership.parent import PreloadedParent

SELECTION = (71, 148, 154, 166)
FOUND = (3,)
"""Seeds that have found something once."""


@pytest.fixture(scope="module")
def undisturbed(parent: PreloadedParent, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    return Undisturbed(tmp_path_factory.mktemp("undisturbed"), parent)


@pytest.fixture(autouse=True)
def _mark(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MARK, uuid.uuid4().hex)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("seed", [*SELECTION, *(pytest.param(seed, marks=pytest.mark.long) for seed in FOUND)])
def test_random_faults(seed: int, tmp_path: Path, parent: PreloadedParent, undisturbed: Undisturbed) -> None:
    drawn = scenario(seed)
    run = one_node.run if drawn.configuration.loss is None else nodes.run
    result = run(drawn, tmp_path / "run", parent, undisturbed)
    assert (result.outcome, result.why) == ("good", "")
    assert len(result.struck) >= 0.8 * len(drawn.faults), f"{set(drawn.faults) - set(result.struck)} did not strike"
    assert result.recoveries
    assert result.lost_steps == 0
