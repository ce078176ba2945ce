"""A run interrupted at any version equals the run that was not, for every kind of data, optimizer and validation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lightning_ckptless.protocol.versions import Version
from tests.lab.parts import Options
from tests.trainer.interrupted import interrupted, run

BASE = Options(samples=24, epochs=2)
CASES = {
    "plain": BASE,
    "sampler": replace(BASE, data="sampler"),
    "iterable": replace(BASE, data="iterable"),
    "sized_iterable": replace(BASE, data="sized_iterable"),
    "stateful": replace(BASE, data="stateful"),
    "combined": replace(BASE, data="combined"),
    "accumulate": replace(BASE, accumulate=2, samples=40),
    "manual": replace(BASE, optimization="manual"),
    "two_optimizers": replace(BASE, optimization="two", samples=12),
    "plateau": replace(BASE, scheduler="plateau"),
    "epoch_scheduler": replace(BASE, scheduler="epoch"),
    "clip": replace(BASE, clip=0.5),
    "bf16": replace(BASE, precision="bf16-mixed"),
    "ema": replace(BASE, ema=True),
    "validation_in_mid_epoch": replace(BASE, val_interval=2),
    "limited": replace(BASE, limit_train=4, early_stopping=True),
    "max_steps": replace(BASE, max_steps=9),
}
WORKERS = {
    "two_workers": replace(BASE, workers=2),
    "persistent_workers": replace(BASE, workers=2, persistent=True),
    "sampler_with_workers": replace(BASE, workers=2, data="sampler"),
    "iterable_with_workers": replace(BASE, workers=2, data="iterable"),
}


def _versions(options: Options, root: Path) -> list[Version]:
    outcome, _ = run(options, root)
    return outcome.versions


def _assert_exact(options: Options, root: Path, at: Version) -> None:
    whole, _ = run(options, root / "whole")
    joined = interrupted(options, root / "joined", at)
    for expected, found in zip(whole.rows, joined.rows, strict=False):
        assert found == expected
    assert len(joined.rows) == len(whole.rows)
    assert joined.log_rows == whole.log_rows
    assert joined.versions == whole.versions
    for name, tensor in whole.weights.items():
        assert torch.equal(tensor, joined.weights[name]), name


@pytest.mark.parametrize("place", ["first", "early", "second epoch", "last"])
@pytest.mark.parametrize("case", CASES)
def test_interrupted(case: str, place: str, tmp_path: Path) -> None:
    options = CASES[case]
    versions = _versions(options, tmp_path / "versions")
    index = {"first": 0, "early": 3, "second epoch": 2 * len(versions) // 3, "last": -1}[place]
    _assert_exact(options, tmp_path, versions[index])


@pytest.mark.parametrize("case", WORKERS)
def test_interrupted_with_workers(case: str, tmp_path: Path) -> None:
    options = WORKERS[case]
    versions = _versions(options, tmp_path / "versions")
    for number, index in enumerate((3, 2 * len(versions) // 3)):
        _assert_exact(options, tmp_path / str(number), versions[index])
