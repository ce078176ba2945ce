"""Unequal numbers of batches end the run with one clear error and without a recovery."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from lightning_ckptless.membership.forkserver.client import ForkServer
from lightning_ckptless.testing.drill import run_variant
from tests.faults.conftest import REPOSITORY, command_for
from tests.faults.matrix import BASE

REASON = "rank 1 ran out of training data after step 3, rank 0 did not: give every rank the same number of batches"


def test_a_rank_that_runs_out_of_data_early_is_reported(
    parent: ForkServer, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    options = replace(BASE, data="uneven", epochs=1, samples=24, logger="none")
    env = {"PYTHONPATH": str(REPOSITORY)}
    run = run_variant(command_for(options), tmp_path / "run", nproc=2, parent=parent, isolate=True, env=env)
    assert run.exit_code == 1
    errors = capfd.readouterr().err
    assert f"not relaunched: {REASON}" in errors
    assert "restart" not in errors
    assert f"UnevenStepsError: {REASON}" in run.tail()
