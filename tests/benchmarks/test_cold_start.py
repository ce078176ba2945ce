from typing import Any

from benchmarks.cold_start import BASE, ColdStart
from benchmarks.jobs.job import JobOptions


def start(seconds: float) -> dict[str, Any]:
    ranks = [dict.fromkeys(("script", "imported", "fit", "train", "step"), at) for at in (seconds - 1.0, seconds)]
    return {"seconds": seconds, "first_script": 0.5, "ranks": ranks}


RESULTS = {
    BASE: [start(10.0), start(20.0), start(10.0)],
    "ckptless run": [start(5.0), start(11.0), start(9.0)],
    "python, ckptless": [start(13.0), start(30.0), start(14.0)],
}


def test_quotients_are_taken_within_a_round() -> None:
    table, _ = ColdStart().tables(RESULTS)

    assert [row[5] for row in table.rows] == ["1.00", "0.55", "1.40"]
    assert table.notes[1:] == [
        "ckptless run: 0.55 x python, ddp (target 1 x python, ddp): met",
        "python, ckptless: 1.40 x python, ddp (target 1.3 x python, ddp): missed",
    ]


def test_moments_are_those_of_the_slowest_rank() -> None:
    _, table = ColdStart().tables(RESULTS)

    assert table.rows[0] == (BASE, "0.50", *5 * ("10.00",))


def test_options_survive_the_command_line() -> None:
    options = JobOptions("1M", 8, "ckptless", {"staging": "blocking"}, 4, 7, 50, "a folder", turns=True)

    assert JobOptions.from_arguments(options.to_arguments()) == options
