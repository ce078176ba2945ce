"""The observed mean time between failures: its interval against tables, and its coverage."""

from __future__ import annotations

from math import fsum, inf, isclose
from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_ckptless.protocol.mtbf import observed_mtbf, poisson_cdf

# Garwood's limits of a Poisson mean at 95 %, from published tables: failures, lower, upper.
GARWOOD = ((0, 0.0, 3.689), (1, 0.0253, 5.572), (5, 1.623, 11.668), (10, 4.795, 18.390), (30, 20.241, 42.827))


@pytest.mark.parametrize(("failures", "low", "high"), GARWOOD)
def test_the_interval_is_that_of_the_tables(failures: int, low: float, high: float) -> None:
    found = observed_mtbf(failures, 1000.0)
    assert found.low_s == pytest.approx(1000.0 / high, rel=5e-4)
    assert (found.high_s, found.mean_s) == (
        pytest.approx((1000.0 / low, 1000.0 / failures), rel=3e-3) if failures else (inf, inf)
    )


@given(st.integers(0, 2000), st.floats(0.01, 3000.0))
def test_the_poisson_distribution_is_the_incomplete_gamma_function(count: int, mean: float) -> None:
    both = torch.tensor([count + 1.0, mean], dtype=torch.float64)
    expected = torch.special.gammaincc(both[0], both[1]).item()
    assert isclose(poisson_cdf(count, mean), expected, rel_tol=1e-6, abs_tol=1e-9)


@given(st.integers(0, 500), st.floats(0.001, 1e9))
def test_the_interval_contains_the_estimate_and_narrows(failures: int, observed_s: float) -> None:
    found, more = observed_mtbf(failures, observed_s), observed_mtbf(2 * failures + 2, 2 * observed_s)
    assert 0 < found.low_s < found.mean_s and found.mean_s <= found.high_s
    assert more.high_s / more.low_s < found.high_s / found.low_s


def test_the_interval_covers_the_true_value() -> None:
    """The exact interval is conservative: it covers at least 95 %."""
    random, hits = Random(1), 0
    for _ in range(1000):
        gaps = [random.expovariate(1 / 50.0) for _ in range(60)]
        failures = next(n for n in range(60) if fsum(gaps[: n + 1]) > 400.0)
        found = observed_mtbf(failures, 400.0)
        hits += found.low_s <= 50.0 <= found.high_s
    assert hits >= 950


def test_it_is_worded_with_its_interval() -> None:
    assert str(observed_mtbf(3, 300.0)) == "a failure every 100 s (95 %: 34.2 s to 485 s)"
    assert str(observed_mtbf(0, 300.0)) == "no failure yet; with 95 % confidence, fewer than one in 81.3 s"
