"""A run interrupted at any version equals an uninterrupted run, for every kind of data, optimizer and validation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy

from lightning_ckptless.protocol.versions import Version
from tests.lab.parts import Options
from tests.trainer.interrupted import Outcome, fit, interrupted, run

BASE = Options(samples=24, epochs=2)
CASES = {
    "plain": BASE,
    "sampler": replace(BASE, data="sampler"),
    "iterable": replace(BASE, data="iterable"),
    "sized_iterable": replace(BASE, data="sized_iterable"),
    "stateful": replace(BASE, data="stateful"),
    "combined": replace(BASE, data="combined"),
    "combined_stream": replace(BASE, data="combined_stream"),
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
PLACES: dict[str, Callable[[int], int]] = {
    "first": lambda _: 0,
    "early": lambda _: 3,
    "second epoch": lambda count: 2 * count // 3,
    "last": lambda count: count - 1,
}
# Two places per case. Over all cases, they cover every place and every pair of adjacent places.
PAIRED = [(case, [*PLACES][(number + step) % 4]) for number, case in enumerate(CASES) for step in (0, 1)]
OTHER_PLACES = [(case, place) for case in CASES for place in PLACES if (case, place) not in PAIRED]

Whole = Callable[[Options], Outcome]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """Return uninterrupted runs, each run once."""

    @cache
    def outcome(options: Options) -> Outcome:
        complete, _ = run(options, tmp_path_factory.mktemp("whole"))
        assert isinstance(complete, Outcome)
        return complete

    return outcome


def _assert_exact(whole: Outcome, options: Options, root: Path, at: Version) -> None:
    joined = interrupted(options, root, at)
    for expected, found in zip(whole.rows, joined.rows, strict=False):
        assert found == expected
    assert len(joined.rows) == len(whole.rows)
    assert joined.log_rows == whole.log_rows
    assert joined.versions == whole.versions
    for name, tensor in whole.weights.items():
        assert torch.equal(tensor, joined.weights[name]), name


@pytest.mark.parametrize("case", ["plain", "iterable", "combined_stream", "manual"])
def test_capturing_versions_does_not_change_the_run(case: str, whole: Whole, tmp_path: Path) -> None:
    expected, found = fit(CASES[case], tmp_path, SingleDeviceStrategy("cpu")), whole(CASES[case])
    assert found.versions
    assert found.rows == expected.rows
    assert found.log_rows == expected.log_rows
    for name, tensor in expected.weights.items():
        assert torch.equal(tensor, found.weights[name]), name


@pytest.mark.parametrize(("case", "place"), PAIRED)
def test_an_interrupted_run_is_exact(case: str, place: str, whole: Whole, tmp_path: Path) -> None:
    complete = whole(CASES[case])
    at = complete.versions[PLACES[place](len(complete.versions))]
    _assert_exact(complete, CASES[case], tmp_path, at)


@pytest.mark.slow
@pytest.mark.parametrize(("case", "place"), OTHER_PLACES)
def test_an_interrupted_run_is_exact_at_the_other_places(case: str, place: str, whole: Whole, tmp_path: Path) -> None:
    test_an_interrupted_run_is_exact(case, place, whole, tmp_path)


def test_an_interruption_after_an_iterable_restarted_is_exact(whole: Whole, tmp_path: Path) -> None:
    complete = whole(CASES["combined_stream"])
    _assert_exact(complete, CASES["combined_stream"], tmp_path, Version(5, validation_done=True))


@pytest.mark.parametrize("place", ["early", "second epoch"])
@pytest.mark.parametrize("case", WORKERS)
def test_an_interrupted_run_with_workers_is_exact(case: str, place: str, whole: Whole, tmp_path: Path) -> None:
    complete = whole(WORKERS[case])
    at = complete.versions[PLACES[place](len(complete.versions))]
    _assert_exact(complete, WORKERS[case], tmp_path, at)
