import pytest

from benchmarks.quantiles import fit_line, median, quantile, summary


def test_quantiles_lie_between_their_neighbours() -> None:
    assert quantile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert quantile([4.0, 1.0, 2.0, 3.0], 0.5) == 2.5
    assert quantile([0.0, 10.0], 0.95) == pytest.approx(9.5)
    assert quantile([7.0], 0.95) == 7.0


def test_summary_has_median_and_extremes() -> None:
    assert summary([1.0, 2.0, 6.0]) == {"mean": 3.0, "p50": 2.0, "p95": pytest.approx(5.6), "min": 1.0, "max": 6.0}


def test_a_linear_fit_finds_the_line() -> None:
    line = fit_line([(x, 1.5 + 0.25 * x) for x in (0.1, 6.0, 60.0, 200.0)])

    assert line.fixed == pytest.approx(1.5)
    assert line.slope == pytest.approx(0.25)


def test_an_outlier_at_a_large_size_moves_the_fixed_part_little() -> None:
    exact = [(x, 1.0 + 0.1 * x) for x in (0.0, 10.0, 100.0, 1000.0)]
    off = [*exact[:-1], (1000.0, 110.0)]

    assert fit_line(off).fixed == pytest.approx(1.0, abs=0.05)


def test_the_median_ignores_one_outlier() -> None:
    assert median([1.0, 1.0, 1.0, 900.0]) == 1.0
